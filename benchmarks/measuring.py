"""What all benchmarks share: ways that take turns, ratios of one round, the environment."""

import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

#: Runs once what is measured; returns a float where it has timed itself, in seconds.
Way = Callable[[], Any]


def clock(device: str) -> float:
    """Return the time after all work on the device."""
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def take_turns(
    ways: Mapping[str, Way], rounds: int, device: str, warmup: int = 2
) -> dict[str, list[float]]:
    """Run every way once a round, so that what else the machine does falls on all alike.

    The order is another one in each round, since a way finds caches as the one before left them.

    Args:
        ways: What to measure, by name.
        rounds: How often.
        device: Where it runs.
        warmup: Rounds before those that count; the first ones allocate and compile.

    Returns:
        The seconds of each round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + warmup):
        order = random.Random(turn).sample(list(ways.items()), len(ways))
        for name, way in order:
            began = clock(device)
            own = way()
            spent = own if isinstance(own, float) else clock(device) - began
            if turn >= warmup:
                seconds[name].append(spent)
    return seconds


def ratios(seconds: Mapping[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Return the median seconds of each way, and the median and quartiles of its ratio.

    Args:
        seconds: Of each round, by name.
        reference: What to divide by, in the same round.
    """
    summary = {}
    for name, own in seconds.items():
        each = [a / b for a, b in zip(own, seconds[reference], strict=True)]
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        summary[name] = {
            "seconds": statistics.median(own),
            "ratio": statistics.median(each),
            "lower quartile": low,
            "upper quartile": high,
        }
    return summary


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


def write(path: Path | None, device: str, options: Mapping[str, Any], results: Any) -> None:
    """Write results with their command and environment as JSON; None: don't."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "options": {name: value for name, value in options.items() if name != "output"},
        "environment": environment(device),
        "results": results,
    }
    path.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
