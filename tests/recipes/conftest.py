"""Tiny runs of the fine-tuning recipes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel


@pytest.fixture
def write_rows(tmp_path) -> Callable[..., str]:
    """Write rows as JSON lines and return the file's path."""

    def write(rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def options(tmp_path) -> Callable[..., list[str]]:
    """Make the command line of a run of seconds; names given replace or add to its options."""

    def make(**changes: Any) -> list[str]:
        values = {
            "output_dir": tmp_path / "run",
            "n_layer": 1,
            "n_head": 2,
            "n_embd": 16,
            "vocab_size": 270,
            "learning_rate": 5e-3,
            "max_steps": 12,
            "warmup_steps": 1,
            "eval_steps": 6,
            "save_steps": 6,
            "logging_steps": 3,
            "per_device_train_batch_size": 8,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return [f"--{name}={value}" for name, value in (values | changes).items()]

    return make


@pytest.fixture
def ends_in_one_line() -> Callable[[Callable[..., Any], list[str], str], None]:
    """Check that a recipe ends with one line that holds the message."""

    def check(main: Callable[..., Any], argv: list[str], message: str) -> None:
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert str(caught.value).startswith("error: ")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    return check


@pytest.fixture
def check_history() -> Callable[[Path], None]:
    """Check that a run learned, with a Hessian that was refreshed."""

    def check(output: Path) -> None:
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        logged = [entry for entry in history if "loss" in entry]
        assert len(logged) >= 2
        assert logged[-1]["loss"] < logged[0]["loss"]
        assert all(entry["sophia/hessian_norm"] > 0 for entry in logged)
        assert all(entry["sophia/hessian_tokens"] > 0 for entry in logged)
        evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        assert evaluated[-1] < evaluated[0]

    return check


@pytest.fixture
def same_weights() -> Callable[[PreTrainedModel, PreTrainedModel], bool]:
    """Compare two models bit by bit."""

    def compare(one: PreTrainedModel, other: PreTrainedModel) -> bool:
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    return compare
