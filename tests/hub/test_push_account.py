"""What is said at the end of a run, however it ends, and what the Hub then holds."""

import itertools
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from concurrent import futures
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http
from transformers import GPT2LMHeadModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from hf_sophia import HubPushError, SophiaTrainer
from hf_sophia.trainer import publishing
from hf_sophia.trainer.hub import bounded, cause, download_checkpoint, hold_limit, reason

from .pushed_runs import REPO, folders_of, same_weights, trainer_of

httpx2 = pytest.importorskip("httpx2")


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, do) -> None:
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.do()


def wait_until(done, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def stop() -> None:
    raise RuntimeError("stopped here")


def test_a_run_that_ends_in_an_exception_gives_its_account(
    hub, tmp_path, tiny_gpt2, caplog
) -> None:
    hub.fail("POST", "/commit/", status=403)
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="checkpoint", hub_always_push=True)
    trainer.add_callback(At(5, stop))
    with pytest.raises(RuntimeError, match="stopped here"):
        trainer.train()
    account = caplog.records[-1]
    assert account.levelno == logging.WARNING
    assert f"pushed to {REPO}: nothing" in account.message
    assert f"hf upload {REPO} {tmp_path} ." in account.message
    futures.wait(trainer.push_in_progress.jobs)


def test_the_limit_stays_as_long_as_an_upload_runs(hub, tmp_path, tiny_gpt2, caplog) -> None:
    stall = hub.stall("POST", "/preupload/")
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="every_save")
    trainer.hub_timeout = 0.3
    trainer.add_callback(At(3, stop))
    with pytest.raises(RuntimeError, match="stopped here"):
        trainer.train()
    assert get_session().timeout.read == 0.3
    assert not futures.wait(trainer.push_in_progress.jobs, timeout=30).not_done
    assert stall.hits == 6  # the client's own number of tries
    wait_until(lambda: get_session().timeout.read is None)
    assert "still being uploaded" in caplog.text


def test_a_process_ends_although_the_hub_stalls(hub, tmp_path) -> None:
    hub.stall("POST", "/preupload/")
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            f"""
            from pathlib import Path
            import pytest
            from hub.client import retry_at_once
            from hub.pushed_runs import trainer_of
            from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

            class Interrupt(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    if state.global_step == 3:
                        raise KeyboardInterrupt

            retry_at_once(pytest.MonkeyPatch())
            shape = dict(vocab_size=37, n_positions=32, n_embd=16, n_layer=1, n_head=2)
            model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
            trainer = trainer_of(Path({str(tmp_path / "out")!r}), model)
            trainer.hub_timeout = 0.5
            trainer.add_callback(Interrupt())
            trainer.train()
            """
        )
    )
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": tests}
    ended = subprocess.run(
        [sys.executable, script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "KeyboardInterrupt" in ended.stderr
    assert "still being uploaded" in ended.stderr


def test_the_last_save_is_pushed_even_if_it_was_skipped_at_first(
    hub, tmp_path, tiny_gpt2, caplog
) -> None:
    stall = hub.stall("POST", "/preupload/", times=1)
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="checkpoint")
    # Let go of only when the last save has been left out.
    trainer.add_callback(At(6, lambda: threading.Timer(0.5, stall.release).start()))
    with caplog.at_level(logging.INFO, "hf_sophia"):
        trainer.train()
    assert "step 4, 6 (" in caplog.messages[-1]
    assert f"pushed to {REPO}: the model of step 6" in caplog.messages[-1]
    assert same_weights(GPT2LMHeadModel.from_pretrained(REPO), trainer.model)
    state = json.loads(hub.files(REPO)[f"last-checkpoint/{TRAINER_STATE_NAME}"])
    assert state["global_step"] == 6


def test_a_last_save_that_is_not_there_is_warned_of(hub, tmp_path, tiny_gpt2, caplog) -> None:
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="every_save")
    stall = hub.stall("POST", "/preupload/", times=1)

    def lose_the_last() -> None:
        stall.release()
        for folder in tmp_path.glob("checkpoint-*"):
            folder.rename(folder.with_name(f"lost-{folder.name}"))

    trainer._finish_current_push = lose_the_last
    trainer.train()
    (account,) = [r for r in caplog.records if "pushed to user/tiny" in r.getMessage()]
    assert account.levelno == logging.WARNING
    assert "not pushed: what was saved at step 6" in account.getMessage()
    futures.wait(trainer.push_in_progress.jobs)


def test_files_of_another_run_do_not_stay_in_last_checkpoint(hub, tmp_path, tiny_gpt2) -> None:
    options = {"hub_strategy": "checkpoint", "hub_always_push": True}
    trainer_of(tmp_path / "a", tiny_gpt2(), **options, max_steps=4).train()
    assert "last-checkpoint/optimizer.pt" in hub.files(REPO)
    trainer_of(tmp_path / "b", tiny_gpt2(), **options, save_only_model=True).train()
    local = {path.name for path in (tmp_path / "b" / "checkpoint-6").iterdir()}
    there = {p.split("/")[1] for p in hub.files(REPO) if p.startswith("last-checkpoint/")}
    assert there == local
    assert "optimizer.pt" not in there


def test_the_checkpoint_that_was_pushed_last_is_taken(hub, tmp_path, tiny_gpt2) -> None:
    options = {"hub_strategy": "all_checkpoints", "hub_always_push": True}
    trainer_of(tmp_path / "a", tiny_gpt2(), **options).train()
    last = max(date for date in dates(hub))
    while max(date for date in dates(hub)) == last:  # the Hub's clock has seconds
        trainer_of(tmp_path / "b", tiny_gpt2(seed=1), **options, max_steps=4).train()
    assert download_checkpoint(f"hub:{REPO}", None).name == "checkpoint-4"


def dates(hub) -> list[str]:
    return hub.repository(REPO).git("log", "--format=%aI").decode().split()


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"\xff"])
def test_a_broken_checkpoint_on_the_hub_is_named(hub, tmp_path, tiny_gpt2, content) -> None:
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="checkpoint", hub_always_push=True)
    trainer.train()
    HfApi().upload_file(
        path_or_fileobj=content, path_in_repo=f"last-checkpoint/{TRAINER_STATE_NAME}", repo_id=REPO
    )
    with pytest.raises(ValueError, match=f"'hub:{REPO}' can't be resumed from"):
        trainer.train(resume_from_checkpoint=f"hub:{REPO}")


def test_removing_them_is_bounded_although_the_training_is_over(
    hub, tmp_path, tiny_gpt2, monkeypatch
) -> None:
    limits = []
    monkeypatch.setattr(
        publishing, "remove_others", lambda *args: limits.append(get_session().timeout.read)
    )
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="checkpoint", save_steps=6)
    trainer.train()
    wait_until(lambda: limits)
    assert limits == [5.0]


def test_the_best_is_not_described_beside_the_weights_of_the_last_save(
    hub, tmp_path, tiny_gpt2, caplog
) -> None:
    stall = hub.stall("POST", "/preupload/", times=1)
    trainer = trainer_of(
        tmp_path,
        tiny_gpt2(),
        hub_strategy="every_save",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.add_callback(At(6, lambda: threading.Timer(0.5, stall.release).start()))
    trainer.train()
    assert "not pushed: what was saved at step 6" in caplog.text
    assert "It has taken 2 of 6" in hub.files(REPO)["README.md"].decode()


class SavesShards(SophiaTrainer):
    """As under FSDP2 with sharded state dictionaries: no file has whole weights."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        (Path(checkpoint_folder) / "model.safetensors").unlink()
        super()._push_from_checkpoint(checkpoint_folder)


def test_what_has_no_weights_is_not_called_a_model(hub, tmp_path, tiny_gpt2, caplog) -> None:
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="every_save", hub_always_push=True)
    trainer.__class__ = SavesShards
    with caplog.at_level(logging.INFO, "hf_sophia"):
        trainer.train()
    assert caplog.text.count("holds no weights that could be pushed") == 1
    assert "FULL_STATE_DICT" in caplog.text
    assert caplog.messages[-1] == f"pushed to {REPO}: the card, without weights, of step 6"


def test_a_private_checkpoint_needs_the_token_that_is_passed(
    hub, tmp_path, tiny_gpt2, monkeypatch
) -> None:
    options = {"hub_strategy": "checkpoint", "hub_always_push": True, "hub_private_repo": True}
    trainer_of(tmp_path / "a", tiny_gpt2(), **options, hub_token=hub.token).train()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="RepositoryNotFoundError"):
        download_checkpoint(f"hub:{REPO}", None)
    assert download_checkpoint(f"hub:{REPO}", hub.token).name == "last-checkpoint"


def test_a_push_in_the_background_after_the_training(hub, tmp_path, tiny_gpt2, caplog) -> None:
    hub.fail("POST", "/commit/", status=403)
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="end")
    trainer.train()
    with caplog.at_level(logging.INFO, "hf_sophia"):
        futures.wait([trainer.push_to_hub(blocking=False, revision="main")])
        wait_until(lambda: any("not pushed to" in message for message in caplog.messages))
    (said,) = [m for m in caplog.messages if "pushed to" in m]
    assert "was not pushed to user/tiny: HfHubHTTPError: HTTP 403" in said
    assert "--revision main" in said


def test_a_fault_of_the_disk_is_not_the_hubs(hub, tmp_path, tiny_gpt2, monkeypatch) -> None:
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="end")
    trainer.train()

    def full(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left") as raised:
        trainer.push_to_hub()
    assert not isinstance(raised.value, HubPushError)


@pytest.mark.parametrize("card", [b"---\n- a\n---\n", b"---\ntags: [a\n---\n", b"\xff\xfe"])
def test_a_card_that_can_not_be_read_is_put_aside(hub, tmp_path, tiny_gpt2, card, caplog) -> None:
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="end")
    trainer.train()
    (tmp_path / "README.md").write_bytes(card)
    trainer.push_to_hub()
    assert (tmp_path / "README.md.unreadable").read_bytes() == card
    assert "can't be read" in caplog.text
    assert "Sophia-G" in ModelCard.load(REPO).text


def test_no_card_is_worth_the_push(hub, tmp_path, tiny_gpt2, monkeypatch, caplog) -> None:
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="every_save", hub_always_push=True)
    monkeypatch.setattr(SophiaTrainer, "_write_card", lambda *args, **kwargs: stop())
    trainer.train()
    trainer.push_to_hub()
    assert "the model card could not be written: RuntimeError: stopped here" in caplog.text
    assert same_weights(GPT2LMHeadModel.from_pretrained(REPO), trainer.model)
    with pytest.raises(RuntimeError, match="stopped here"):
        trainer.create_model_card()


def test_the_card_goes_along_on_the_way(hub, tmp_path, tiny_gpt2) -> None:
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="every_save", hub_always_push=True)
    trainer.train()
    commits = {title: sha for sha, title in hub.commits(REPO)}
    card = hub.files(REPO, commits["Training in progress, step 2"])["README.md"].decode()
    assert "# tiny\n" in card
    assert "It has taken 2 of 6 planned optimizer steps." in card


def test_keys_of_uploads_are_in_no_log_and_no_traceback(hub, tmp_path, tiny_gpt2, caplog) -> None:
    trainer = trainer_of(tmp_path, tiny_gpt2(), hub_strategy="every_save", hub_always_push=True)
    with caplog.at_level(logging.DEBUG):
        trainer.train()
    assert "/upload/" in caplog.text  # of those that arrived, which httpx logs
    hub.fail("PUT", "/upload/", status=403)
    trainer.model.get_input_embeddings().weight.data.add_(1.0)  # what is there is not sent again
    with caplog.at_level(logging.DEBUG), pytest.raises(HubPushError) as raised:
        trainer.push_to_hub(revision="main")
    assert "--revision main" in str(raised.value)
    assert "signature=" not in caplog.text
    assert "signature=" not in "".join(traceback.format_exception(raised.value))


def test_a_stalled_hub_is_given_up_on_when_the_repository_is_made(
    hub, tmp_path, tiny_gpt2, monkeypatch
) -> None:
    hub.stall("POST", "/api/repos/create")
    assert 1 < SophiaTrainer.hub_timeout < 600
    monkeypatch.setattr(SophiaTrainer, "hub_timeout", 0.2)
    with pytest.raises(HubPushError, match="can't be pushed to: .*Timeout"):
        trainer_of(tmp_path, tiny_gpt2())


def test_limits_of_several_threads_and_of_the_users_factory() -> None:
    factory = _http._GLOBAL_CLIENT_FACTORY
    with bounded(7.0):
        inner = futures.ThreadPoolExecutor().submit(hold_limit, 3.0)
        let_go = inner.result()
        assert get_session().timeout.read == 7.0
    assert get_session().timeout.read == 7.0  # the other still holds it
    let_go()
    assert get_session().timeout.read is None
    assert _http._GLOBAL_CLIENT_FACTORY is factory

    def own():
        client = factory()
        client.timeout = 55.0
        return client

    try:
        with bounded(7.0):
            _http.set_client_factory(own)
        assert _http._GLOBAL_CLIENT_FACTORY is own
        with bounded(7.0):
            assert get_session().timeout.read == 55.0
        assert get_session().timeout.read == 55.0
    finally:
        _http.set_client_factory(factory)


def test_a_reason_holds_no_key() -> None:
    outer = RuntimeError("Error while uploading 'a'")
    outer.__cause__ = ConnectionError("PUT https://storage/a?signature=abc failed")
    assert reason(outer) == "ConnectionError: PUT https://storage/a failed"


def raised_from(*errors: Exception) -> Exception:
    """Return the first of the errors, each of which was raised from the next."""
    for outer, inner in itertools.pairwise(errors):
        outer.__cause__ = inner
    return errors[0]


def test_one_cause_may_have_two_faces() -> None:
    reset = raised_from(
        RuntimeError("Error while uploading 'a'"), httpx2.WriteError("x"), ConnectionResetError(104)
    )
    ended = raised_from(RuntimeError("Error while uploading 'b'"), httpx2.RemoteProtocolError("y"))
    assert cause(reset) == cause(ended)
    late = [cause(error("x")) for error in (httpx2.ReadTimeout, httpx2.WriteTimeout)]
    assert late[0] == late[1]
    nowhere = cause(raised_from(httpx2.ConnectError("x"), OSError(-2, "no such name")))
    full = cause(OSError(28, "No space left on device"))
    request = httpx2.Request("PUT", "http://storage")
    refused, busy = (
        cause(HfHubHTTPError("no", response=httpx2.Response(status, request=request)))
        for status in (403, 503)
    )
    assert len({cause(reset), late[0], nowhere, full, refused, busy}) == 6


def test_two_checkpoints_with_a_best_among_them_wait_too(hub, tmp_path, tiny_gpt2, caplog) -> None:
    # Three are there after step 6; the best is the first, so that the second goes.
    stall = hub.stall("POST", "/preupload/", skip=3)  # that of the second
    trainer = trainer_of(
        tmp_path,
        tiny_gpt2(),
        hub_strategy="checkpoint",
        hub_always_push=True,
        save_total_limit=2,
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    kept = []

    def release() -> None:
        kept.append((tmp_path / "checkpoint-4").is_dir())
        stall.release()

    trainer.add_callback(At(6, lambda: threading.Timer(1.0, release).start()))
    with caplog.at_level(logging.INFO, "hf_sophia"):
        trainer.train()
    assert kept == [True]
    assert "not pushed" not in caplog.text
    assert folders_of(hub) == {"last-checkpoint"}
