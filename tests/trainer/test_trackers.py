"""What is logged reaches the trackers that run on this machine, and can be read back there."""

import json
import math
from pathlib import Path

import pytest

from .runs import dataset, run

OWN = {"clip_fraction", "hessian_norm", "rho", "hessian_tokens"}
#: transformers gives these to a tracker under other names or not at all.
SUMMARY = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}


def tracked(tiny_gpt2, folder: Path, tracker: str, **options) -> list[dict]:
    """Train with a tracker; return what the Trainer has kept of its logs."""
    options = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 8, "k": 3, **options}
    extra = {"eval_dataset": dataset(8)}
    optim_args = f"rho=auto,k={options.pop('k')}"
    trainer = run(
        tiny_gpt2(), folder, extra=extra, report_to=tracker, optim_args=optim_args, **options
    )
    trainer.save_state()
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def expected(history: list[dict]) -> dict[str, dict[int, float]]:
    """Return what a tracker shall hold: values over steps, under transformers' names for them."""
    found: dict[str, dict[int, float]] = {}
    for entry in history:
        for key, value in entry.items():
            if key != "step" and key not in SUMMARY and key != "total_flos":
                name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
                found.setdefault(name, {})[entry["step"]] = value
    return found


def assert_all_is_there(read: dict[str, dict[int, float]], history: list[dict]) -> None:
    wanted = expected(history)
    own = {name: values for name, values in wanted.items() if "/sophia/" in name}
    assert set(own) == {f"train/sophia/{name}" for name in OWN}
    assert all(list(values) == list(range(1, 9)) for values in own.values())
    assert all(math.isfinite(v) for values in own.values() for v in values.values())
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss"} <= set(wanted)
    assert list(wanted["eval/loss"]) == [4, 8]
    for name, values in wanted.items():
        # TensorBoard keeps single precision.
        assert read[name] == pytest.approx(values, rel=1e-6), name
    # Nothing of ours is said of an evaluation, where no step was taken.
    assert not any("sophia" in name for name in set(read) - set(own))


def test_tensorboard_holds_what_the_trainer_logged(tiny_gpt2, tmp_path, monkeypatch) -> None:
    accumulation = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    history = tracked(tiny_gpt2, tmp_path / "out", "tensorboard")
    accumulator = accumulation.EventAccumulator(str(tmp_path / "events"))
    accumulator.Reload()
    read = {
        name: {event.step: event.value for event in accumulator.Scalars(name)}
        for name in accumulator.Tags()["scalars"]
    }
    assert_all_is_there(read, history)


@pytest.fixture(scope="module")
def trackio(tmp_path_factory):
    # Read when trackio is imported.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        yield pytest.importorskip("trackio")


def test_trackio_holds_what_the_trainer_logged(trackio, tiny_gpt2, tmp_path) -> None:
    options = {"project": "sophia", "run_name": "first", "trackio_static_space_id": False}
    history = tracked(tiny_gpt2, tmp_path, "trackio", **options)
    (found,) = trackio.Api().runs("sophia")
    assert found.name == "first"
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("sophia", "first", run_id=found.id)
    read: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(("train/", "eval/")):
                read.setdefault(name, {})[row["train/global_step"]] = value
    assert_all_is_there(read, history)
    assert found.config["optim_args"] == "rho=auto,k=3"
