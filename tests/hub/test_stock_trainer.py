"""What the Trainer of transformers pushes, against a Hub that is really there."""

from pathlib import Path

import huggingface_hub.errors as errors
import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from .server import LoopbackHub

NAME = "user/run"
MODEL = {"model.safetensors", "config.json", "generation_config.json", "training_args.bin"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
FIRST = ["initial commit"]


class AwaitPush(TrainerCallback):
    """Lets each push end before training goes on: else a later save changes what it sends."""

    trainer: Trainer

    def on_save(self, *arguments, **kwargs) -> None:
        self.trainer._finish_current_push()


def trainer(model, folder: Path, await_push: bool = True, **options) -> Trainer:
    defaults = {
        "push_to_hub": True,
        "hub_model_id": NAME,
        "hub_always_push": True,
        "max_steps": 4,
        # A shorter run has the learning rates of the beginning of a longer one.
        "lr_scheduler_type": "constant",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    rows = [{"input_ids": torch.arange(n, n + 8)} for n in range(8)]
    data = [{**row, "labels": row["input_ids"]} for row in rows]
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    made = Trainer(model, arguments, train_dataset=data)
    if await_push:
        waiting = AwaitPush()
        waiting.trainer = made
        made.add_callback(waiting)
    return made


def titles(hub: LoopbackHub, revision: str = "main") -> list[str]:
    return [title for _, title in hub.commits(NAME, revision)]


def assert_same_model(one, other) -> None:
    named = dict(other.named_parameters())
    assert set(dict(one.named_parameters())) == set(named)
    assert all(torch.equal(p, named[name]) for name, p in one.named_parameters())


@pytest.fixture(params=["hub", "xet_hub"])
def any_hub(request: pytest.FixtureRequest) -> LoopbackHub:
    return request.getfixturevalue(request.param)


STRATEGIES = {
    "end": ([], []),
    "every_save": (["step 2", "step 4"], []),
    "checkpoint": (
        ["step 2", "step 2, checkpoint", "step 4", "step 4, checkpoint"],
        [("last-checkpoint", "checkpoint-4")],
    ),
    "all_checkpoints": (
        ["step 2", "step 2, checkpoint", "step 4", "step 4, checkpoint"],
        [("checkpoint-2", "checkpoint-2"), ("checkpoint-4", "checkpoint-4")],
    ),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_pushes_what_its_name_says(strategy, any_hub, tiny_gpt2, tmp_path) -> None:
    pushes, checkpoints = STRATEGIES[strategy]
    run = trainer(tiny_gpt2(), tmp_path, hub_strategy=strategy)
    run.train()
    assert titles(any_hub) == FIRST + [f"Training in progress, {push}" for push in pushes]
    expected = {f"{pushed}/{file}" for pushed, _ in checkpoints for file in MODEL | STATE}
    files = any_hub.files(NAME)
    assert set(files) == {".gitattributes", *expected, *(MODEL if pushes else [])}
    for pushed, local in checkpoints:
        for file in MODEL | STATE:
            assert files[f"{pushed}/{file}"] == (tmp_path / local / file).read_bytes()
    # The last push is asked for by whoever trains.
    run.push_to_hub()
    assert titles(any_hub)[-1] == "End of training"
    files = any_hub.files(NAME)
    assert set(files) == {".gitattributes", "README.md", *expected, *MODEL}
    assert_same_model(AutoModelForCausalLM.from_pretrained(NAME), run.model)


def test_a_pushed_checkpoint_is_resumed_from(hub, tiny_gpt2, tmp_path) -> None:
    whole = trainer(tiny_gpt2(), tmp_path / "whole", push_to_hub=False)
    whole.train()
    trainer(tiny_gpt2(), tmp_path / "cut", hub_strategy="checkpoint", max_steps=2).train()
    # Downloaded elsewhere: the first machine is gone.
    pushed = Path(snapshot_download(NAME, local_dir=tmp_path / "new"))
    resumed = trainer(tiny_gpt2(seed=1), tmp_path / "new", push_to_hub=False)
    resumed.train(resume_from_checkpoint=str(pushed / "last-checkpoint"))
    assert_same_model(resumed.model, whole.model)


def test_a_private_run_on_a_branch(hub, tiny_gpt2, tmp_path) -> None:
    HfApi().create_repo(NAME, private=True)
    HfApi().create_branch(NAME, branch="side")
    options = {"hub_private_repo": True, "hub_revision": "side"}
    run = trainer(tiny_gpt2(), tmp_path, **options)
    run.train()
    assert titles(hub) == FIRST
    assert titles(hub, "side")[1:] == [f"Training in progress, step {n}" for n in (2, 4)]
    assert_same_model(AutoModelForCausalLM.from_pretrained(NAME, revision="side"), run.model)
    with pytest.raises(OSError, match="not a valid model identifier"):
        AutoModelForCausalLM.from_pretrained("user/none")


def test_a_run_without_the_right_token_does_not_begin(hub, tiny_gpt2, tmp_path) -> None:
    with pytest.raises(errors.HfHubHTTPError, match="Invalid credentials"):
        trainer(tiny_gpt2(), tmp_path, hub_token="hf_other")
    assert not hub.repositories


def test_training_goes_on_while_a_push_is_stalled(hub, tiny_gpt2, tmp_path) -> None:
    rule = hub.stall("POST", "/commit/")

    class Release(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 3:
                rule.wait_until_reached()
                assert titles(hub) == FIRST
            if state.global_step == 4:
                rule.release()
                self.steps = 4

    run = trainer(tiny_gpt2(), tmp_path, await_push=False, hub_always_push=False)
    release = Release()
    run.add_callback(release)
    run.train()
    assert release.steps == 4
    assert titles(hub)[1] == "Training in progress, step 2"


def test_a_push_that_is_refused_on_the_way_ends_without_a_word(
    hub, tiny_gpt2, tmp_path, caplog
) -> None:
    rule = hub.fail("POST", "/commit/", status=403)
    run = trainer(tiny_gpt2(), tmp_path)
    run.train()
    assert (rule.hits, titles(hub)) == (2, FIRST)
    assert "403" not in caplog.text
    with pytest.raises(errors.HfHubHTTPError, match="you need write access"):
        run.push_to_hub()
