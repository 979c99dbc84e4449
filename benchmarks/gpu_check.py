"""Everything that needs a GPU, in one command that ends within nine minutes.

    make gpu-check

Runs the tests marked `gpu`, tunes the kernel's block size, measures steps, refreshes and whole
training runs beside torch's fused AdamW, and writes the results as JSON. Nothing is fetched. Each
part has a share of the time; one that fails or takes longer is named at the end.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import torch
from measuring import take_turns, write

HERE = Path(__file__).parent


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gpu")
    parser.add_argument("--tune", action="store_true", help="Only tune the kernel's block size")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # for the tests
    return parser.parse_args()


def parts(device: str, output: Path) -> dict[str, tuple[list[str], int]]:
    """Return each part's command, for CUDA or small enough for the tests, and its seconds."""
    gpu = device != "cpu"
    python = [sys.executable]

    def script(name: str, *options: str) -> list[str]:
        result = output / f"{name.replace(' ', '_')}.json"
        path = HERE / f"{name.split()[0]}.py"
        return [*python, str(path), "--device", device, "--output", str(result), *options]

    fused = ["--only", "sophia", "sophia rho=auto nesterov", "adam", "radam", "torch Adam fused"]
    # Six optimizers of 1B parameters with their state, and a copy to compare with.
    room = gpu and torch.cuda.mem_get_info()[0] > 100e9
    if gpu and not room:
        print("steps of 1B parameters are left out: they need 100 GB that are free")
    sizes = ["--sizes", "124M", *(["1B"] if room else [])]
    sizes = sizes if gpu else ["--sizes", "0.4M", "--rounds", "1"]
    whole = ["--batch", "8", "--length", "1024", "--rounds", "5"]
    refresh = [*sizes, *whole] if gpu else ["--sizes", "tiny", "--rounds=1"]
    train = ["--size", "124M" if gpu else "tiny", "--bf16", "--learning_rate", "6e-4"]
    train += (
        ["--batch", "16", "--length", "1024", "--steps", "300", "--rounds", "1"]
        if gpu
        else ["--steps", "2", "--skip", "1", "--rounds", "1", "--length", "8"]
    )
    mark = "gpu" if gpu else "gpu and not gpu"
    return {
        "tests": ([*python, "-m", "pytest", "-q", "-m", mark, str(HERE.parent / "tests")], 130),
        "tune": ([*python, __file__, "--device", device, "--output", str(output), "--tune"], 40),
        "step fp32": (script("step fp32", *sizes, *fused), 50),
        "step bf16": (script("step bf16", *sizes, *fused, "--dtype", "bfloat16"), 50),
        "refresh bf16": (script("refresh bf16", *refresh, "--bf16"), 70),
        "refresh fp32": (script("refresh fp32", *refresh), 70),
        "train": (script("train", *train), 100),
    }


def tune(device: str, output: Path) -> None:
    """Measure the kernel's blocks and warps on parameters of 124M and print the best."""
    from step import parameters, sophia

    from hf_sophia.kernels import cuda

    shipped = (cuda.BLOCK, cuda.WARPS)
    params = parameters("124M" if device != "cpu" else "148 tiny", device, torch.float32)
    found = {}
    for block, warps in product((1024, 2048, 4096), (4, 8)):
        cuda.BLOCK, cuda.WARPS = block, warps
        # A kernel keeps those of the time when it is made, in the first step.
        found[f"{block} elements, {warps} warps"] = step = sophia(params)
        step()
    cuda.BLOCK, cuda.WARPS = shipped
    seconds = take_turns(found, 20, device)
    best = {name: min(own) for name, own in seconds.items()}
    for name, own in sorted(best.items(), key=lambda item: item[1]):
        print(f"{name:24s} {own * 1e3:8.3f} ms")
    write(output / "tune.json", device, {"shipped": shipped}, best)


def main() -> None:
    """Run the parts and say how they ended."""
    options = parse()
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here, so nothing was checked")
    options.output.mkdir(parents=True, exist_ok=True)
    if options.tune:
        tune(options.device, options.output)
        return
    ended = {}
    for name, (command, seconds) in parts(options.device, options.output).items():
        # The limits share out a few minutes of a GPU. A CPU may be busy with something else.
        seconds = 600 if options.device == "cpu" else seconds
        print(f"\n== {name}, up to {seconds} s", flush=True)
        began = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            result = process.wait(seconds)
        except subprocess.TimeoutExpired:
            # With the processes that it has started, which would go on with the GPU.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            result = f"took longer than {seconds} s"
        # pytest's 5: no test was collected, as on the CPU.
        passed = result == 0 or (name == "tests" and options.device == "cpu" and result == 5)
        ended[name] = "passed" if passed else f"failed ({result})"
        print(f"   {ended[name]} after {time.monotonic() - began:.0f} s", flush=True)
    write(options.output / "summary.json", options.device, vars(options), ended)
    if failed := [name for name, end in ended.items() if end != "passed"]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
