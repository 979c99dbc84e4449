"""A checkpoint is whole or known not to be, and a damaged one is said to be so."""

import hashlib
import logging
import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager

from hf_sophia import Sophia, SophiaTrainer
from hf_sophia.trainer.checkpoints import checkpoints_of, is_whole, last_whole

from .runs import arguments, dataset, hessians_of, run, sophia_of

SAVING = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "optim_args": "rho=0.2,k=3"}


def resume(tiny_gpt2, folder: Path, asked: str | bool = True, **options) -> SophiaTrainer:
    trainer = SophiaTrainer(
        tiny_gpt2(seed=1), arguments(folder, **{**SAVING, **options}), train_dataset=dataset()
    )
    trainer.train(resume_from_checkpoint=asked)
    return trainer


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_same_end(one: SophiaTrainer, other: SophiaTrainer) -> None:
    for first, second in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(first, second)
        states = sophia_of(one).state[first], sophia_of(other).state[second]
        assert states[0]["step"] == states[1]["step"]
        assert all(torch.equal(states[0][n], states[1][n]) for n in ("exp_avg", "hessian"))


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_checkpoint_that_was_not_finished_is_passed_over(
    damage, tiny_gpt2, tmp_path, caplog
) -> None:
    whole = run(tiny_gpt2(), tmp_path, **SAVING)
    newest = tmp_path / "checkpoint-8"
    state = newest / "trainer_state.json"
    if damage == "missing":
        state.unlink()
    else:
        state.write_text(state.read_text()[:100] if damage == "truncated" else "")
    assert checkpoints_of(tmp_path) == [newest, tmp_path / "checkpoint-4"]
    assert last_whole(tmp_path) == tmp_path / "checkpoint-4"
    with pytest.raises(ValueError, match="checkpoint-8 was not written to its end .*checkpoint-4"):
        resume(tiny_gpt2, tmp_path, str(newest))
    with caplog.at_level(logging.WARNING, "hf_sophia"):
        resumed = resume(tiny_gpt2, tmp_path)
    assert "checkpoint-8 was not written to its end: resuming from" in caplog.text
    assert_same_end(whole, resumed)
    assert last_whole(tmp_path) == newest


class MakesSophia(SophiaTrainer):
    def create_optimizer(self, *args):
        self.optimizer = Sophia(self.model.parameters(), lr=1e-3, rho=0.2, k=3)
        return self.optimizer


@pytest.mark.parametrize("own", ["class", "method"])
def test_it_is_passed_over_where_the_arguments_do_not_name_sophia(
    own, tiny_gpt2, tmp_path, caplog
) -> None:
    args = arguments(tmp_path, **{**SAVING, "optim": "adamw_torch", "optim_args": None})
    made = {"optimizer_cls_and_kwargs": (Sophia, {"lr": 1e-3, "rho": 0.2, "k": 3})}

    def trainer() -> SophiaTrainer:
        if own == "method":
            return MakesSophia(tiny_gpt2(), args, train_dataset=dataset())
        return SophiaTrainer(tiny_gpt2(), args, train_dataset=dataset(), **made)

    whole = trainer()
    whole.train()
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-8 was not written to its end: resuming from" in caplog.text
    assert_same_end(whole, resumed)


def test_without_a_whole_checkpoint_resuming_is_an_error(tiny_gpt2, tmp_path) -> None:
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        resume(tiny_gpt2, tmp_path)
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(ValueError, match=r"no checkpoint in .* was written to its end \(checkp"):
        resume(tiny_gpt2, tmp_path)


def test_another_optimizers_checkpoints_are_left_to_transformers(tiny_gpt2, tmp_path) -> None:
    options = {**SAVING, "optim": "adamw_torch", "optim_args": None}
    run(tiny_gpt2(), tmp_path, **options)
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError):
        resume(tiny_gpt2, tmp_path, **options)


class LimitedFiles(TrainerCallback):
    """Lets no file grow beyond a size after a step, as a full disk does at some moment."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def lift(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_full_disk_at_a_checkpoint_is_said_and_the_last_one_stays(
    file, tiny_gpt2, tmp_path
) -> None:
    whole = run(tiny_gpt2(), tmp_path / "whole", **SAVING)
    folder = tmp_path / "run"
    size = (tmp_path / "whole" / "checkpoint-4" / file).stat().st_size - 1
    if file == "trainer_state.json":
        # The others are larger: make them disappear from the count.
        size = None
    limit = LimitedFiles(8, size or 0)

    class Failing(SophiaTrainer):
        def _save_rng_state(self, output_dir):
            super()._save_rng_state(output_dir)
            if size is None and self.state.global_step == 8:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit.before[1]))

    # A checkpoint of the same name, whole, of an earlier run: it is about to be overwritten.
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", folder / "checkpoint-8")
    try:
        with pytest.raises(OSError, match=r"checkpoint-8 could not be written.*checkpoint-4") as e:
            run(
                tiny_gpt2(),
                folder,
                trainer_class=Failing,
                callback=limit if size else None,
                **SAVING,
            )
    finally:
        limit.lift()
    assert "save_total_limit" in str(e.value)
    assert [is_whole(path) for path in checkpoints_of(folder)] == [False, True]
    assert_same_end(whole, resume(tiny_gpt2, folder))


def foreign(tiny_gpt2, tmp_path: Path, **options) -> bytes:
    folder = tmp_path / "foreign"
    run(tiny_gpt2(**options.pop("model", {})), folder, **{**SAVING, "max_steps": 4, **options})
    return (folder / "checkpoint-4" / "optimizer.pt").read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "adamw", "wider", "pickle"])
def test_an_optimizer_file_that_does_not_fit_is_named_and_nothing_is_overwritten(
    damage, tiny_gpt2, tmp_path
) -> None:
    folder = tmp_path / "run"
    run(tiny_gpt2(), folder, **{**SAVING, "max_steps": 4})
    checkpoint = folder / "checkpoint-4"
    path = checkpoint / "optimizer.pt"
    if damage == "adamw":
        path.write_bytes(foreign(tiny_gpt2, tmp_path, optim="adamw_torch", optim_args=None))
    elif damage == "wider":
        path.write_bytes(foreign(tiny_gpt2, tmp_path, model={"n_embd": 24}))
    elif damage == "pickle":
        torch.save({"a": SophiaTrainer}, path)
    else:
        bad = {"truncated": path.read_bytes()[:5000], "garbage": os.urandom(4000), "empty": b""}
        path.write_bytes(bad[damage])
    before = contents(folder)
    with pytest.raises(ValueError, match=r"optimizer\.pt can't be loaded") as error:
        resume(tiny_gpt2, folder, str(checkpoint))
    assert "without resume_from_checkpoint" in str(error.value)
    assert contents(folder) == before


@pytest.mark.parametrize("file", ["model.safetensors", "rng_state.pth"])
def test_other_damaged_files_are_named_too(file, tiny_gpt2, tmp_path) -> None:
    run(tiny_gpt2(), tmp_path, **{**SAVING, "max_steps": 4})
    path = tmp_path / "checkpoint-4" / file
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"checkpoint-4.* can't be loaded"):
        resume(tiny_gpt2, tmp_path)


def test_a_missing_schedule_is_an_error(tiny_gpt2, tmp_path) -> None:
    """Transformers would then leave the optimizer's state out too, without a word."""
    run(tiny_gpt2(), tmp_path, **{**SAVING, "max_steps": 4})
    (tmp_path / "checkpoint-4" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"no scheduler\.pt, without which"):
        resume(tiny_gpt2, tmp_path)


@pytest.mark.parametrize("gone", ["one", "all", "random numbers"])
def test_what_is_not_in_a_checkpoint_is_said(gone, tiny_gpt2, tmp_path, caplog) -> None:
    run(tiny_gpt2(), tmp_path, **{**SAVING, "max_steps": 4})
    path = tmp_path / "checkpoint-4" / "optimizer.pt"
    saved = torch.load(path, weights_only=True)
    parameters = len(saved["state"])
    if gone == "one":
        del saved["state"][0]
    elif gone == "all":
        saved["state"] = {}
    else:
        (tmp_path / "checkpoint-4" / "rng_state.pth").unlink()
    torch.save(saved, path)
    with caplog.at_level(logging.WARNING, "hf_sophia"):
        resume(tiny_gpt2, tmp_path)
    expected = {
        "one": "has nothing for 1 parameters: theirs starts anew",
        "all": f"has nothing for {parameters} parameters: theirs starts anew",
        "random numbers": "holds no rng_state.pth: dropout",
    }
    warned = [r.message for r in caplog.records if r.name.startswith("hf_sophia")]
    assert [expected[gone] in message for message in warned] == [True]


def test_a_damaged_schedule_is_named_too(tiny_gpt2, tmp_path) -> None:
    run(tiny_gpt2(), tmp_path, **{**SAVING, "max_steps": 4})
    (tmp_path / "checkpoint-4" / "scheduler.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"scheduler\.pt can't be loaded"):
        resume(tiny_gpt2, tmp_path)


def test_a_checkpoint_without_the_optimizers_state_says_so(tiny_gpt2, tmp_path, caplog) -> None:
    run(tiny_gpt2(), tmp_path, **{**SAVING, "max_steps": 4, "save_only_model": True})
    with caplog.at_level(logging.WARNING, "hf_sophia"):
        trainer = resume(tiny_gpt2, tmp_path)
    assert "holds no state of the optimizer" in caplog.text
    assert next(iter(sophia_of(trainer).state.values()))["step"] == 4


class Terminator(TrainerCallback):
    """Sends SIGTERM, as a scheduler does, and leaves transformers the time it takes to notice."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            for thread in threading.enumerate():
                if isinstance(thread, threading.Timer):
                    thread.join()


@pytest.mark.parametrize("k", [3, 4])
def test_a_just_in_time_checkpoint_at_sigterm_resumes_exactly(k, tiny_gpt2, tmp_path) -> None:
    """It is saved within step 4, for k=3 after the refresh of that step was folded in."""
    options = {"max_steps": 8, "optim_args": f"rho=0.2,k={k}"}
    whole = run(tiny_gpt2(), tmp_path / "whole", **options)
    stopped = run(
        tiny_gpt2(), tmp_path / "run", callback=Terminator(), enable_jit_checkpoint=True, **options
    )
    saved = tmp_path / "run" / "checkpoint-3"
    assert stopped.state.global_step == 4
    assert is_whole(saved)
    groups = torch.load(saved / "optimizer.pt", weights_only=True)["param_groups"]
    assert groups[0]["refreshed_step"] == (4 if k == 3 else 1)
    assert any(tensor.any() for tensor in load_file(saved / "model.safetensors").values())
    resumed = resume(tiny_gpt2, tmp_path / "run", save_strategy="no", **options)
    assert_same_end(whole, resumed)
    assert max(h.max() for h in hessians_of(resumed)) > 0


def test_sigterm_after_a_save_does_not_touch_the_checkpoint_of_that_step(
    tiny_gpt2, tmp_path, monkeypatch
) -> None:
    """Within step 4 transformers would write the folder of step 3 anew, the only whole one."""
    saving = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}
    options = {"max_steps": 8, "optim_args": "rho=0.2,k=3", **saving}
    whole = run(tiny_gpt2(resid_pdrop=0.2), tmp_path / "whole", **options)
    seen = []
    execute_jit_checkpoint = CheckpointManager.execute_jit_checkpoint

    def spied(self):
        saved = tmp_path / "run" / "checkpoint-3"
        seen.append(contents(saved))
        execute_jit_checkpoint(self)
        seen.append(contents(saved))

    monkeypatch.setattr(CheckpointManager, "execute_jit_checkpoint", spied)
    model = tiny_gpt2(resid_pdrop=0.2)
    run(model, tmp_path / "run", callback=Terminator(), enable_jit_checkpoint=True, **options)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    trainer = SophiaTrainer(
        tiny_gpt2(seed=1, resid_pdrop=0.2),
        arguments(tmp_path / "run", **options),
        train_dataset=dataset(),
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_end(whole, trainer)


def test_a_mark_of_a_run_that_was_killed_is_removed(tiny_gpt2, tmp_path) -> None:
    run(tiny_gpt2(), tmp_path, **{**SAVING, "max_steps": 4})
    mark = tmp_path / "checkpoint-4" / "checkpoint-is-incomplete.txt"
    mark.write_text("in progress")
    resume(tiny_gpt2, tmp_path)
    assert not mark.exists()
