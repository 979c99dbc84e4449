"""Kill a training run at random moments, resume it, and compare it with one that was left alone.

A run of `SophiaTrainer` with dropout, accumulation and a schedule writes checkpoints all the time.
Each trial kills one with SIGKILL, which no program can prepare for, at a moment drawn from a seed:
in every second trial within 10 ms of the moment when a checkpoint's folder appears, so that many of
them die while it is being written. It is resumed with
`resume_from_checkpoint=True` and, at its end, every parameter and every tensor of the optimizer's
state must equal those of the uninterrupted run, bit for bit.

    python benchmarks/soak.py --trials 20 --output benchmarks/results/soak.json
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import accelerate
import torch
import transformers
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from hf_sophia import SophiaTrainer
from hf_sophia.trainer.checkpoints import checkpoints_of, is_whole, last_whole

#: Not a multiple of SAVE_STEPS or of REFRESH_STEPS, which divide neither each other.
STEPS, SAVE_STEPS, REFRESH_STEPS = 120, 5, 4
VOCABULARY = 97


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=20, help="how many runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    parser.add_argument("--output", type=Path, help="where to write the result, as JSON")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def train(folder: Path) -> None:
    """Train, from the newest whole checkpoint if there is one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=48, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    ids = torch.randint(VOCABULARY, (256, 24), generator=torch.Generator().manual_seed(1))
    args = TrainingArguments(
        folder,
        optim="sophia",
        optim_args=f"rho=0.3,k={REFRESH_STEPS}",
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        weight_decay=0.1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS + 2,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        logging_steps=10,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    trainer = SophiaTrainer(
        model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids]
    )
    trainer.train(
        resume_from_checkpoint=bool(checkpoints_of(folder)) and last_whole(folder) is not None
    )
    trainer.accelerator.wait_for_everyone()


def start(folder: Path) -> subprocess.Popen:
    """Start a run, with its output in a file beside its folder."""
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, __file__, "--train", str(folder)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def finish(folder: Path) -> None:
    """Run to the end."""
    if start(folder).wait(timeout=600):
        raise RuntimeError((folder.parent / f"{folder.name}.log").read_text()[-2000:])


def kill(folder: Path, draw: random.Random, writing: bool) -> dict[str, object]:
    """Start a run and kill it: after a random checkpoint has begun, or some time after that."""
    process = start(folder)
    target = draw.randrange(SAVE_STEPS, STEPS, SAVE_STEPS)
    # A checkpoint takes some 10 ms here, the steps to the next one 150 ms.
    delay = draw.uniform(0.0, 0.01 if writing else 0.2)
    aimed_at = folder / f"checkpoint-{target}"
    while process.poll() is None and not aimed_at.exists():
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()  # SIGKILL
    status = process.wait()
    found = checkpoints_of(folder)
    return {
        "killed": status == -signal.SIGKILL,
        "newest checkpoint": found[0].name,
        "it was whole": is_whole(found[0]),
    }


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint's weights and of its optimizer's state."""
    tensors = dict(load_file(checkpoint / "model.safetensors"))
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    for index, state in saved.items():
        for name, value in state.items():
            tensors[f"{index}.{name}"] = torch.as_tensor(value)
    return tensors


def main() -> None:
    """Run the trials and print, and where asked write, what came out."""
    options = arguments()
    if options.train is not None:
        train(options.train)
        return
    draw = random.Random(options.seed)
    trials = []
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        root, last = Path(name), f"checkpoint-{STEPS + 2}"
        finish(root / "whole")
        expected = state_of(root / "whole" / last)
        for trial in range(options.trials):
            folder = root / f"trial-{trial}"
            result = kill(folder, draw, writing=trial % 2 == 1)
            finish(folder)
            actual = state_of(folder / last)
            result["equal"] = actual.keys() == expected.keys() and all(
                torch.equal(expected[key], value) for key, value in actual.items()
            )
            trials.append(result)
            print(f"trial {trial + 1}: {result}", flush=True)
    equal = sum(trial["equal"] for trial in trials)
    half = sum(not trial["it was whole"] for trial in trials)
    print(f"{equal} of {len(trials)} equal; {half} killed while a checkpoint was being written")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": " ".join(["python", "benchmarks/soak.py", *sys.argv[1:]]),
            "equal": equal,
            "killed while a checkpoint was being written": half,
            "tensors compared": len(expected),
            "trials": trials,
            "environment": {
                "device": platform.processor() or platform.machine(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "accelerate": accelerate.__version__,
            },
        }
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    if equal < len(trials):
        sys.exit(1)


if __name__ == "__main__":
    main()
