"""A step of our optimizers beside torch's own forms of theirs, and the limit that memory sets.

    python benchmarks/step.py --output benchmarks/results/step_cpu.json
    python benchmarks/step.py --peers .venv-peers/bin/python    # other packages too

All take turns in one run on the same parameters and gradients. A ratio is that of one round, to
`torch.optim.AdamW(fused=True)`; the table shows its median and its quartiles.
"""

import argparse
import ctypes
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from measuring import Way, ratios, take_turns, write
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sophia import Adam, RAdam, Sophia
from hf_sophia.kernels.compilation import compiled

REFERENCE = "torch AdamW fused"

#: GPT-2's layers, width and vocabulary; and many tensors of next to nothing, for the host's cost.
SIZES = {
    "1B": (24, 1792, 50257),
    "124M": (12, 768, 50257),
    "10M": (6, 256, 20000),
    "0.4M": (2, 96, 2000),
    "148 tiny": None,
}

LR = 1e-9  # so that parameters stay where numbers are ordinary


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES)[1:], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=15, help="Steps of each (default 15)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="(default 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Leave other ways out")
    parser.add_argument("--peers", help="Python of an environment with the other packages")
    parser.add_argument("--output", type=Path, help="Write the results here too, as JSON")
    return parser.parse_args()


def parameters(size: str, device: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Return parameters of a size with gradients."""
    torch.manual_seed(0)
    if SIZES[size] is None:
        shapes = [torch.Size([16])] * 148
    else:
        layers, width, vocabulary = SIZES[size]
        config = GPT2Config(
            n_layer=layers,
            n_embd=width,
            n_head=4,
            vocab_size=vocabulary,
            n_positions=1024,
            bos_token_id=0,
            eos_token_id=0,
        )
        with torch.device("meta"):
            shapes = [param.shape for param in GPT2LMHeadModel(config).parameters()]
    params = [
        torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes
    ]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def sophia(params: list[torch.nn.Parameter], **options: Any) -> Way:
    """Return a step of Sophia whose Hessian has been estimated once."""
    optimizer = Sophia(params, lr=LR, k=10**9, **options)
    optimizer.update_hessian({param: torch.rand_like(param) for param in params})
    return optimizer.step


def ways(params: list[torch.nn.Parameter], wanted: Callable[[str], bool]) -> dict[str, Way]:
    """Return what to measure, by name; only what is wanted takes memory."""
    auto = {"rho": "auto", "nesterov": True, "bias_correction": True}
    makers: dict[str, Callable[[], Way]] = {
        REFERENCE: lambda: torch.optim.AdamW(params, lr=LR, fused=True).step,
        "sophia": lambda: sophia(params),
        "sophia rho=auto nesterov": lambda: sophia(params, **auto),
        "sophia eager": lambda: sophia(params, fused=False),
        "adam": lambda: Adam(params, lr=LR).step,
        "radam": lambda: RAdam(params, lr=LR).step,
        "torch Adam fused": lambda: torch.optim.Adam(params, lr=LR, fused=True).step,
    }
    for name in ("AdamW", "Adam", "RAdam"):
        for form in ("foreach", "loop"):
            makers[f"torch {name} {form}"] = lambda name=name, form=form: (
                getattr(torch.optim, name)(params, lr=LR, foreach=form == "foreach").step
            )
    return {name: make() for name, make in makers.items() if wanted(name)}


class _Job(ctypes.Structure):
    """The `job` of limit.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("theta", "grad", "m", "h", "size", "first_chunk")),
        *((name, ctypes.c_int64) for name in ("tensors", "next")),
    )


#: How torch starts threads, where it was built with GNU OpenMP.
_PARALLEL = getattr(ctypes.CDLL(None), "GOMP_parallel", None)

#: Elements of a chunk, as limit.c has them.
_CHUNK = 16384


def limit(params: list[torch.nn.Parameter], threads: int) -> Way:
    """Return a pass over as much memory as Sophia's step, by as many of torch's threads."""
    function = compiled(Path(__file__).with_name("limit.c")).limit
    function.argtypes, function.restype = (ctypes.c_void_p,), None
    m, h = ([torch.zeros_like(param) for param in params] for _ in range(2))
    tensors = (params, [param.grad for param in params], m, h)
    sizes = [param.numel() for param in params]
    first_chunk = [0, *accumulate(-(-size // _CHUNK) for size in sizes)]
    tables = [torch.tensor([tensor.data_ptr() for tensor in same]) for same in tensors]
    tables += [torch.tensor(sizes), torch.tensor(first_chunk)]
    job = _Job(*(table.data_ptr() for table in tables), tensors=len(sizes))
    start = _PARALLEL if threads > 1 else None

    def once(held: object = (tensors, tables)) -> None:
        job.next = 0
        if start is None:
            function(ctypes.byref(job))
        else:
            start(function, ctypes.byref(job), threads, 0)

    return once


def device_copy(params: list[torch.nn.Parameter]) -> Way:
    """Return a copy on the device that moves as many bytes as Sophia's step."""
    # theta and m are read and written, the gradient and h read; m and h are fp32.
    moved = sum(3 * param.nbytes + 3 * 4 * param.numel() for param in params)
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=params[0].device)
    target = torch.empty_like(source)

    def once() -> None:
        target.copy_(source)

    return once


@contextmanager
def peer(python: str, package: str, threads: int, sizes: list[int]) -> Iterator[Way]:
    """Start another package's optimizer; the way returns the seconds that it says."""
    command = [python, Path(__file__).parent / "peers" / "worker.py", package, str(threads)]
    with subprocess.Popen(
        [*command, *map(str, sizes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"{package} does not work in the environment of {python}")

        def once() -> float:
            process.stdin.write("step\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        yield once
        process.stdin.close()


def main() -> None:
    """Measure and print a table for each size and number of threads."""
    options = parse()

    def wanted(name: str) -> bool:
        return name == REFERENCE or not options.only or name in options.only

    results = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for size in options.sizes:
            params = parameters(size, options.device, getattr(torch, options.dtype))
            with ExitStack() as stack:
                found = ways(params, wanted)
                limited = options.device == "cpu" and options.dtype == "float32"
                if limited and (threads == 1 or _PARALLEL):
                    found["memory limit"] = limit(params, threads)
                elif options.device != "cpu":
                    found["device copy"] = device_copy(params)
                for package in ("labml-nn", "pytorch_optimizer") if options.peers else ():
                    sizes = [param.numel() for param in params]
                    found[package] = stack.enter_context(
                        peer(options.peers, package, threads, sizes)
                    )
                summary = ratios(take_turns(found, options.rounds, options.device), REFERENCE)
            results[f"{size}, {threads} threads"] = summary
            # As it grows: a run that is stopped keeps what it has measured.
            write(options.output, options.device, vars(options), results)
            count = sum(param.numel() for param in params)
            print(f"\n{size}: {count:,} parameters, {threads} threads, {options.dtype}")
            for name, row in sorted(summary.items(), key=lambda item: item[1]["ratio"]):
                low, high = row["lower quartile"], row["upper quartile"]
                milliseconds = row["seconds"] * 1e3
                print(
                    f"{name:26s} {milliseconds:9.3f} ms  {row['ratio']:6.3f} ({low:.3f}-{high:.3f})"
                )


if __name__ == "__main__":
    main()
