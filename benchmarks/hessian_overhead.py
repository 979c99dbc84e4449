"""What a refresh of Sophia-G's Hessian costs in a training step, by the way it is made.

    python benchmarks/hessian_overhead.py --output benchmarks/results/hessian_overhead_cpu.json

Steps without a refresh and with one, by every way, take turns in one run, so that what else the
machine does falls on all alike. A way's overhead is its median extra time over the median plain
step, divided by k.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sophia import Sophia
from hf_sophia.trainer.heads import head_output
from hf_sophia.trainer.noise import noise_seed
from hf_sophia.trainer.own_pass import share_counts, undisturbed
from hf_sophia.trainer.refresh import HessianRefresh

#: The share of the batch of each way; None: the kept graph of the training pass.
WAYS = {"kept graph": None, "own, 1": 1.0, "own, 1/2": 0.5, "own, 1/4": 0.25, "own, 1/8": 0.125}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="Steps of each way (default 15)")
    parser.add_argument("--k", type=int, default=10, help="Steps between refreshes (default 10)")
    parser.add_argument("--batch", type=int, default=8, help="Sequences a step (default 8)")
    parser.add_argument("--length", type=int, default=128, help="Tokens a sequence (default 128)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="Write the results here too, as JSON")
    return parser.parse_args()


def main() -> None:
    """Measure and print a table."""
    options = parse()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=options.vocabulary,
        n_positions=options.length,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).to(options.device).train()
    optimizer = Sophia(model.parameters(), lr=1e-4, rho=0.1, k=1)
    ids = torch.randint(options.vocabulary, (options.batch, options.length), device=options.device)
    inputs = {"input_ids": ids, "labels": ids}
    times: dict[str, list[float]] = {name: [] for name in ("plain", *WAYS)}
    for turn in range(options.rounds + 2):
        for name in times:
            began = clock(options.device)
            step(model, optimizer, inputs, name, turn)
            if turn >= 2:  # the first ones allocate
                times[name].append(clock(options.device) - began)
    plain = statistics.median(times["plain"])
    overheads = {
        name: (statistics.median(times[name]) - plain) / plain / options.k for name in WAYS
    }
    print(f"plain step {plain * 1e3:.1f} ms; overhead of a refresh every {options.k} steps:")
    for name, overhead in overheads.items():
        print(f"{name:12s} {overhead:6.2%}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "options": {k: v for k, v in vars(options).items() if k != "output"},
            "parameters": model.num_parameters(),
            "environment": environment(options.device),
            "plain_step_seconds": plain,
            "overhead": overheads,
        }
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def step(
    model: GPT2LMHeadModel,
    optimizer: Sophia,
    inputs: dict[str, torch.Tensor],
    way: str,
    turn: int,
) -> None:
    """Take one training step, with a refresh unless it is the plain one."""
    refresh = HessianRefresh(model.parameters(), seed=0, step=turn, rank=0)
    refresh.batches.append(inputs)
    outputs = model(**inputs)
    if way == "kept graph":
        refresh.add_graph(head_output(model, inputs, outputs))
    outputs.loss.backward()
    if way not in ("plain", "kept graph"):
        own_pass(model, refresh, WAYS[way])
    optimizer.update_hessian(refresh.estimate() if way != "plain" else {})
    optimizer.step()
    optimizer.zero_grad()


def own_pass(model: GPT2LMHeadModel, refresh: HessianRefresh, fraction: float) -> None:
    """Estimate in a forward pass of its own, as the Trainer does."""
    (count,) = share_counts(refresh.batches, fraction)
    share = refresh.part(0, count)
    with undisturbed(model, noise_seed(refresh.place(0), "dropout")):
        outputs = model(**share)
        refresh.add_logits(head_output(model, share, outputs), 0)


def clock(device: str) -> float:
    """Return the time after all work on the device."""
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def environment(device: str) -> dict[str, str | int]:
    """Return what the numbers depend on."""
    processor = platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
    }


if __name__ == "__main__":
    main()
