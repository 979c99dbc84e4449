"""Whole Trainer runs: tokens a second, peak memory and loss, Sophia beside torch's fused AdamW.

    python benchmarks/train.py --output benchmarks/results/train_cpu.json

Each run is a process of its own, so that its peak of memory is its own, and the optimizers take
turns. The first steps of a run are left out of its speed: they allocate and compile. The text is
Python's own standard library, byte by byte.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from measuring import clock, write
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments

from hf_sophia import SophiaTrainer

#: Layers, width and vocabulary of GPT-2s; the text has 256 tokens only.
SIZES = {
    "tiny": (1, 16, 256),
    "5M": (4, 256, 8192),
    "29M": (6, 512, 20000),
    "124M": (12, 768, 50257),
}

#: What is compared, as the command line of a Trainer says it.
WAYS = {
    "adamw_torch_fused": {"optim": "adamw_torch_fused", "adam_beta2": 0.95},
    "sophia": {"optim": "sophia"},
    "sophia, 1/4 of the batch": {"optim": "sophia", "optim_args": "hessian_batch_fraction=0.25"},
}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="5M", choices=SIZES)
    parser.add_argument("--steps", type=int, default=40, help="Steps that count (default 40)")
    parser.add_argument("--skip", type=int, default=10, help="Steps before them (default 10)")
    parser.add_argument("--rounds", type=int, default=5, help="Runs of each (default 5)")
    parser.add_argument("--batch", type=int, default=8, help="Sequences at a time (default 8)")
    parser.add_argument("--length", type=int, default=128, help="Tokens a sequence (default 128)")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="Write the results here too, as JSON")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


class Pace(TrainerCallback):
    """Notes the time of every step, and the losses."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.times: list[float] = []

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """Note the time."""
        self.times.append(clock(self._device))


def text(sequences: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Cut sequences of bytes out of the standard library."""
    data = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        data += path.read_bytes()
        if len(data) > sequences * length:
            break
    whole = len(data) // length * length
    ids = torch.frombuffer(data[:whole], dtype=torch.uint8).long().view(-1, length)
    return [{"input_ids": row, "labels": row} for row in ids[:sequences]]


def run(options: argparse.Namespace) -> dict[str, float]:
    """Train once in this process."""
    layers, width, vocabulary = SIZES[options.size]
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=4 if width < 768 else 12,
        vocab_size=vocabulary,
        n_positions=options.length,
        bos_token_id=0,
        eos_token_id=0,
    )
    steps = options.skip + options.steps
    data = text(steps * options.batch * options.accumulation, options.length)
    pace = Pace(options.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SophiaTrainer(
            model=GPT2LMHeadModel(config),
            args=TrainingArguments(
                folder,
                **WAYS[options.worker],
                max_steps=steps,
                learning_rate=options.learning_rate,
                per_device_train_batch_size=options.batch,
                gradient_accumulation_steps=options.accumulation,
                bf16=options.bf16,
                use_cpu=options.device == "cpu",
                logging_steps=max(options.steps // 10, 1),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=data,
            callbacks=[pace],
        )
        trainer.train()
    seconds = pace.times[-1] - pace.times[options.skip - 1]
    tokens = options.steps * options.batch * options.accumulation * options.length
    if options.device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = torch.cuda.max_memory_allocated()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens a second": tokens / seconds,
        "peak bytes": peak,
        "last loss": losses[-1],
    }


def main() -> None:
    """Let the runs take turns and print a table."""
    options = parse()
    if options.worker:
        print("result " + json.dumps(run(options)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for turn in range(options.rounds):
        # In another order each time, as in take_turns.
        for name, runs in random.Random(turn).sample(list(found.items()), len(found)):
            command = [sys.executable, *sys.argv, "--worker", name]
            result = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in result.stdout.splitlines() if line.startswith("result ")]
            if result.returncode or not lines:
                raise SystemExit(f"{name} failed:\n{result.stderr[-3000:]}")
            runs.append(json.loads(lines[-1].removeprefix("result ")))
            # As it grows: a run that is stopped keeps what it has measured.
            write(options.output, options.device, vars(options), found)
    reference = found["adamw_torch_fused"]
    for name, runs in found.items():
        pairs = list(zip(runs, reference, strict=True))
        speed, peak = (
            statistics.median(own[key] / other[key] for own, other in pairs)
            for key in ("tokens a second", "peak bytes")
        )
        tokens = statistics.median(own["tokens a second"] for own in runs)
        print(
            f"{name:26s} {tokens:10,.0f} tokens/s x {speed:.3f}"
            f"  {runs[0]['peak bytes'] / 2**20:8,.0f} MiB x {peak:.3f}"
            f"  loss {runs[-1]['last loss']:.3f}"
        )


if __name__ == "__main__":
    main()
