"""Runs that push to the Hub: what gets there, and what is said and kept where it does not."""

import copy
import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, create_repo, get_session, model_info
from huggingface_hub.utils import _http
from transformers import GPT2LMHeadModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from hf_sophia import HubPushError
from hf_sophia.trainer.checkpoints import is_whole
from hf_sophia.trainer.hub import download_checkpoint

from .pushed_runs import REPO, folders_of, same_weights, trainer_of


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", set()),
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-2", "checkpoint-4", "checkpoint-6"}),
    ],
)
def test_a_pushed_run_is_all_there(hub, tmp_path, tiny_gpt2, strategy, folders) -> None:
    # hub_always_push: no push is left out because the one before is still running.
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy=strategy, hub_always_push=True)
    trainer.train()
    trainer.push_to_hub()

    assert folders_of(hub) == folders
    assert same_weights(GPT2LMHeadModel.from_pretrained(REPO), trainer.model)
    card = ModelCard.load(REPO)
    card.validate()  # by the Hub's own check
    assert {"sophia", "hf_sophia"} <= set(card.data.tags)
    result = card.data.eval_results[0]
    assert (result.metric_type, result.dataset_name) == ("loss", "random tokens")
    assert result.metric_value == trainer.state.log_history[-2]["eval_loss"]
    for said in ("Sophia-G", "| k | 2 |", "trained from scratch", "12ab", "CC0-1.0", "loss.png"):
        assert said in card.text
    assert "AdamW" not in card.text
    assert hub.files(REPO)["loss.png"].startswith(b"\x89PNG")


def test_a_run_is_pushed_by_xet_too(xet_hub, tmp_path, tiny_gpt2, caplog) -> None:
    # There the client makes a commit again that was refused once.
    xet_hub.fail("POST", "/commit/", status=503, times=1)
    trainer = trainer_of(
        tmp_path,
        tiny_gpt2(),
        hub_strategy="checkpoint",
        hub_always_push=True,
        hub_token="hf_loopback",
    )
    with caplog.at_level(logging.INFO):
        trainer.train()
        trainer.push_to_hub()
    assert "not pushed" not in caplog.text
    assert folders_of(xet_hub) == {"last-checkpoint"}
    assert same_weights(GPT2LMHeadModel.from_pretrained(REPO), trainer.model)
    assert all(b"hf_loopback" not in content for content in xet_hub.files(REPO).values())


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_a_run_resumes_on_another_machine_from_what_it_has_pushed(
    hub, tmp_path, tiny_gpt2, strategy, caplog
) -> None:
    options = {"lr_scheduler_type": "constant", "hub_strategy": strategy, "hub_always_push": True}
    whole = trainer_of(tmp_path / "whole", tiny_gpt2(), **{**options, "push_to_hub": False})
    whole.train()
    trainer_of(tmp_path / "first", tiny_gpt2(), **options, max_steps=4).train()

    elsewhere = tmp_path / "elsewhere"
    second = trainer_of(elsewhere, tiny_gpt2(seed=1), **{**options, "push_to_hub": False})
    with caplog.at_level(logging.INFO, "hf_sophia"):
        second.train(resume_from_checkpoint=f"hub:{REPO}")
    assert f"resuming from hub:{REPO}" in caplog.text
    assert second.state.global_step == 6
    assert not (elsewhere / "checkpoint-4").exists()
    assert same_weights(second.model, whole.model)
    states = (t.optimizer.optimizer.state.values() for t in (second, whole))
    for mine, theirs in zip(*states, strict=True):
        assert mine["hessian"].any()
        assert all(torch.equal(mine[name], theirs[name]) for name in ("exp_avg", "hessian"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("hub:user/nobody", "'hub:user/nobody' can't be resumed from: RepositoryNotFoundError"),
        (f"hub:{REPO}@nowhere", "can't be resumed from: RevisionNotFoundError"),
        (f"hub:{REPO}", "holds no checkpoint: runs push them with --hub_strategy checkpoint"),
        ("hub:", "'hub:' can't be resumed from"),
    ],
)
def test_a_checkpoint_that_is_not_on_the_hub(hub, tmp_path, tiny_gpt2, asked, message) -> None:
    create_repo(REPO)
    trainer = trainer_of(tmp_path, tiny_gpt2(), push_to_hub=False)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=asked)
    assert trainer.state.global_step == 0


def test_of_several_checkpoints_the_one_that_is_furthest_is_taken(hub, tmp_path, tiny_gpt2) -> None:
    options = {"lr_scheduler_type": "constant", "hub_always_push": True}
    for steps, strategy in ((4, "checkpoint"), (6, "all_checkpoints")):
        folder = tmp_path / strategy
        trainer_of(folder, tiny_gpt2(), **options, max_steps=steps, hub_strategy=strategy).train()
    assert folders_of(hub) == {"last-checkpoint", "checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert download_checkpoint(f"hub:{REPO}", None).name == "checkpoint-6"


@pytest.mark.parametrize("status", [401, 403, 503])
def test_who_may_not_push_learns_it_before_the_training(hub, tmp_path, tiny_gpt2, status) -> None:
    hub.fail("POST", "/api/repos/create", status=status)
    with pytest.raises(
        HubPushError, match=rf"'user/tiny' can't be pushed to: .*{status}"
    ) as raised:
        trainer_of(tmp_path, tiny_gpt2())
    assert "hf auth whoami" in str(raised.value)


PERSISTENT = {
    "401": lambda hub: hub.fail("POST", "/commit/", status=401),
    "403": lambda hub: hub.fail("POST", "/commit/", status=403),
    "503": lambda hub: hub.fail("POST", "/commit/", status=503),
    "storage 403": lambda hub: hub.fail("PUT", "/upload/", status=403),
    "reset": lambda hub: hub.reset("PUT", "/upload/", after=1000),
    "stall": lambda hub: hub.stall("POST", "/preupload/"),
}


@pytest.mark.parametrize("fault", PERSISTENT)
def test_a_push_that_fails_is_loud_and_harms_nothing(
    hub, tmp_path, tmp_path_factory, tiny_gpt2, fault, caplog
) -> None:
    rule = PERSISTENT[fault](hub)
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="checkpoint", hub_always_push=True)
    trainer.hub_timeout = 0.2
    with caplog.at_level(logging.INFO, "hf_sophia"):
        assert trainer.train().global_step == 6
    assert rule.hits
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("hf_sophia.trainer.p")]
    once = [text for text in warnings if "was not pushed to the Hub" in text]
    assert len(once) == 1, once
    account = warnings[-1]
    assert f"pushed to {REPO}: nothing" in account
    assert "not pushed: the model of step 6" in account
    assert "not pushed: the checkpoint of step 6" in account
    assert "signature=" not in caplog.text
    assert all(is_whole(tmp_path / f"checkpoint-{step}") for step in (2, 4, 6))
    local = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-6")
    assert same_weights(local, trainer.model)

    with pytest.raises(HubPushError, match="was not pushed to user/tiny") as raised:
        trainer.push_to_hub()
    assert same_weights(GPT2LMHeadModel.from_pretrained(tmp_path), trainer.model)

    hub.faults.clear()
    for text in (account, str(raised.value)):
        for line in text.splitlines():
            if line.startswith("  hf upload"):
                by_hand(hub, line, tmp_path_factory.mktemp("home"))
    assert same_weights(GPT2LMHeadModel.from_pretrained(REPO), trainer.model)
    assert folders_of(hub) == {"last-checkpoint"}
    assert f"last-checkpoint/{TRAINER_STATE_NAME}" in hub.files(REPO)


def by_hand(hub, line: str, home: Path) -> None:
    """Run a command that a message gave."""
    program, *rest = shlex.split(line)
    assert program == "hf"
    subprocess.run(
        [Path(sys.executable).with_name("hf"), *rest],
        env={**os.environ, **hub.environment(home)},
        check=True,
        capture_output=True,
    )


PASSING = {
    "503": lambda hub: hub.fail("POST", "/preupload/", status=503, times=1),
    "storage 503": lambda hub: hub.fail("PUT", "/upload/", status=503, times=1),
    "reset": lambda hub: hub.reset("PUT", "/upload/", after=1000, times=1),
    "stall": lambda hub: hub.stall("POST", "/preupload/", times=1),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_nobodys_concern(hub, tmp_path, tiny_gpt2, fault, caplog) -> None:
    rule = PASSING[fault](hub)
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="every_save", hub_always_push=True)
    trainer.hub_timeout = 1.0
    with caplog.at_level(logging.INFO, "hf_sophia"):
        trainer.train()
    assert rule.hits == 1
    assert "not pushed" not in caplog.text
    assert f"pushed to {REPO}: the model of step 6" in caplog.text
    assert same_weights(GPT2LMHeadModel.from_pretrained(REPO), trainer.model)


def test_a_later_push_makes_up_for_one_that_failed(hub, tmp_path, tiny_gpt2, caplog) -> None:
    # The client tries no commit again: it can't know whether it was made.
    hub.fail("POST", "/commit/", status=503, times=1)
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="every_save", hub_always_push=True)
    with caplog.at_level(logging.INFO, "hf_sophia"):
        trainer.train()
    assert "the model of step 2 was not pushed to the Hub: HfHubHTTPError: HTTP 503" in caplog.text
    account = caplog.messages[-1]
    assert account == f"pushed to {REPO}: the model of step 6"


def test_what_is_pushed_is_of_the_step_that_its_commit_names(hub, tmp_path, tiny_gpt2) -> None:
    # Else the upload of step 2, still waiting, would take the files of step 4.
    stall = hub.stall("POST", "/preupload/", times=1)
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="every_save", hub_always_push=True)

    def release() -> None:
        stall.wait_until_reached()
        time.sleep(0.5)  # time enough to train on
        stall.release()

    thread = threading.Thread(target=release)
    thread.start()
    trainer.train()
    thread.join()
    commits = {title: sha for sha, title in hub.commits(REPO)}
    for step in (2, 4, 6):
        pushed = hub.files(REPO, commits[f"Training in progress, step {step}"])
        local = tmp_path / f"checkpoint-{step}" / "model.safetensors"
        assert pushed["model.safetensors"] == local.read_bytes()


def test_a_push_that_was_left_out_is_told_of(hub, tmp_path, tiny_gpt2, caplog) -> None:
    stall = hub.stall("POST", "/preupload/", times=1)
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="every_save")

    class Release(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 5:
                stall.release()
                futures.wait(trainer.push_in_progress.jobs)

    trainer.add_callback(Release())
    with caplog.at_level(logging.INFO, "hf_sophia"):
        trainer.train()
    assert "still running: step 4 (" in caplog.text
    assert f"pushed to {REPO}: the model of step 6" in caplog.text


def test_a_checkpoint_is_not_removed_while_it_is_uploaded(hub, tmp_path, tiny_gpt2, caplog) -> None:
    # That of step 2 goes when that of step 4 is there; until then its upload hangs.
    stall = hub.stall("POST", "/preupload/", times=1)
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="checkpoint", save_total_limit=1)

    def release() -> None:
        stall.wait_until_reached()
        while not is_whole(tmp_path / "checkpoint-4"):
            time.sleep(0.02)
        time.sleep(0.3)  # time enough to remove it
        kept.append(is_whole(tmp_path / "checkpoint-2"))
        stall.release()

    kept: list[bool] = []
    thread = threading.Thread(target=release)
    thread.start()
    with caplog.at_level(logging.INFO, "hf_sophia"):
        trainer.train()
    thread.join()
    assert kept == [True]
    assert "not pushed" not in caplog.text
    assert not (tmp_path / "checkpoint-2").exists()
    state = json.loads(hub.files(REPO)[f"last-checkpoint/{TRAINER_STATE_NAME}"])
    assert state["global_step"] == 6


def test_with_a_limit_of_one_the_upload_of_the_last_ends_before_the_best_stays_alone(
    hub, tmp_path, tiny_gpt2, caplog
) -> None:
    stall = hub.stall("POST", "/preupload/", skip=2)  # the model and the checkpoint of step 3 pass
    trainer = trainer_of(
        tmp_path,
        tiny_gpt2(),
        hub_strategy="checkpoint",
        save_total_limit=1,
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first is the best
        hub_always_push=True,
    )

    def release() -> None:
        stall.wait_until_reached()
        time.sleep(0.5)  # time enough to end the training
        stall.release()

    thread = threading.Thread(target=release)
    thread.start()
    with caplog.at_level(logging.INFO, "hf_sophia"):
        trainer.train()
    thread.join()
    assert "not pushed" not in caplog.text
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    state = json.loads(hub.files(REPO)[f"last-checkpoint/{TRAINER_STATE_NAME}"])
    assert state["global_step"] == 6


def test_the_client_is_as_before_when_the_training_has_ended(hub, tmp_path, tiny_gpt2) -> None:
    factory, timeout = _http._GLOBAL_CLIENT_FACTORY, get_session().timeout
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            seen.append((get_session().timeout.read, _http._GLOBAL_CLIENT_FACTORY().timeout.read))

    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="end")
    trainer.add_callback(Look())
    trainer.train()
    trainer.push_to_hub()
    assert seen == [(5.0, 5.0)] * 6
    assert _http._GLOBAL_CLIENT_FACTORY is factory
    assert get_session().timeout == timeout


def test_the_token_gets_nowhere_but_to_the_hub(hub, tmp_path, tiny_gpt2, caplog, capfd) -> None:
    options = {"hub_strategy": "all_checkpoints", "hub_always_push": True, "hub_token": hub.token}
    hub.fail("POST", "/commit/", status=403, skip=1, times=1)
    with caplog.at_level(logging.DEBUG):
        trainer = trainer_of(tmp_path, tiny_gpt2(), **options)
        trainer.train()
        trainer.push_to_hub()
    assert "403" in caplog.text
    token = hub.token.encode()
    assert all(token not in content for content in hub.files(REPO).values())
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written)
    assert all(token not in path.read_bytes() for path in written)
    said = caplog.text + "".join(capfd.readouterr()) + repr(trainer.args)
    assert hub.token not in said
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.hub_token is None
    assert trainer.args.hub_token == copy.deepcopy(trainer.args).hub_token == hub.token


def test_a_private_repository_stays_private(hub, tmp_path, tiny_gpt2) -> None:
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="end", hub_private_repo=True)
    trainer.train()
    trainer.push_to_hub()
    assert model_info(REPO).private
