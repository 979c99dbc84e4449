"""Dealing with the Hub: its client's patience, its errors in a line, checkpoints that are there."""

import json
import logging
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

#: What stands before a repository's name where a checkpoint on the Hub is meant.
HUB_PREFIX = "hub:"

#: What the client raises when the Hub, the way to it or the disk is at fault. httpx's errors are
#: no OSErrors, and which httpx that is differs between releases.
HUB_ERRORS = (HfHubHTTPError.__bases__[0], OSError, RuntimeError, ValueError)

#: What the Trainer leaves out when it pushes its output folder.
_LEFT_OUT = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*")

#: The state of the checkpoint that hub_strategy="checkpoint" overwrites again and again.
_LAST = f"last-checkpoint/{TRAINER_STATE_NAME}"


class Secret(str):
    """A token that works as any string does and that neither pickle nor repr shows.

    The Trainer pickles its arguments into `training_args.bin`, the token among them, and pushes
    that file.
    """

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Be None in a pickle."""
        return type(None), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Secret":
        """Stay what it is: a copy in this process is not an output."""
        return self

    __copy__ = None

    def __repr__(self) -> str:
        """Show that there is one."""
        return "'<hub_token>'"


def _without_queries(record: logging.LogRecord) -> bool:
    """Take the key out of addresses that files are sent to, which the client logs at errors."""
    record.msg = re.sub(r"\?[^\s'\"]+", "", str(record.msg))
    return True


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Let the Hub's client give up where nothing comes for so long; by itself it waits for ever.

    A client that has time limits already, from a factory of the user's own, keeps them.

    Args:
        seconds: Without an answer, or a byte of it; the client tries again a few times.
    """
    factory = _http._GLOBAL_CLIENT_FACTORY
    if getattr(factory, "bounded", False):
        yield
        return

    def make() -> Any:
        client = factory()
        if client.timeout.read is None:
            client.timeout = seconds
        return client

    make.bounded = True
    # The client is made anew after errors, so that the limit has to be in the factory too;
    # set_client_factory would close the present one, which may be in use.
    client = huggingface_hub.get_session()
    before = client.timeout
    if before.read is None:
        client.timeout = seconds
    _http._GLOBAL_CLIENT_FACTORY = make
    _http.logger.addFilter(_without_queries)
    try:
        yield
    finally:
        _http.logger.removeFilter(_without_queries)
        _http._GLOBAL_CLIENT_FACTORY = factory
        huggingface_hub.get_session().timeout = before


def reason(error: BaseException) -> str:
    """Say in a line why the Hub did not do something, without addresses that may hold a key.

    Args:
        error: What the client raised.
    """
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__  # the client's own says which file it was, but not why
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        said = error.server_message or error.response.reason_phrase
        return f"{type(error).__name__}: HTTP {error.response.status_code}, {said}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def push_command(
    repo: str, folder: Path | str, place: str = ".", revision: str | None = None
) -> str:
    """Return the command that pushes a folder as the Trainer would have.

    Args:
        repo: The repository.
        folder: The local folder.
        place: Where in the repository.
        revision: The branch, where it is not the default.
    """
    command = ["hf", "upload", repo, str(folder), place]
    if place == ".":
        command += [piece for pattern in _LEFT_OUT for piece in ("--exclude", pattern)]
    if revision is not None:
        command += ["--revision", revision]
    return shlex.join(command)


def licence_of(repo: str, token: str | None) -> str | None:
    """Return a model's licence, or None where it has none.

    Args:
        repo: The repository.
        token: To read a private one; None: the one that is logged in.
    """
    card = huggingface_hub.model_info(repo, token=token).card_data
    return None if card is None else card.license


def download_checkpoint(asked: str, token: str | None) -> Path:
    """Download the newest checkpoint of a repository.

    Args:
        asked: `hub:user/name`, or `hub:user/name@revision`.
        token: To read a private one; None: the one that is logged in.

    Returns:
        Its folder in the Hub's cache.

    Raises:
        ValueError: There is no such repository or revision, or no checkpoint in it.
    """
    repo, _, revision = asked.removeprefix(HUB_PREFIX).partition("@")
    try:
        files = huggingface_hub.list_repo_files(repo, revision=revision or None, token=token)
    except HUB_ERRORS as error:
        raise ValueError(f"{asked!r} can't be resumed from: {reason(error)}") from error
    numbered = {name: step for name in files if (step := _step_of(name)) is not None}
    states = [max(numbered, key=numbered.__getitem__)] if numbered else []
    states += [_LAST] if _LAST in files else []
    if not states:
        raise ValueError(
            f"{asked!r} holds no checkpoint: runs push them with --hub_strategy checkpoint or"
            " all_checkpoints"
        )

    def steps_done(name: str) -> int:
        path = huggingface_hub.hf_hub_download(repo, name, revision=revision or None, token=token)
        return json.loads(Path(path).read_text(encoding="utf-8"))["global_step"]

    newest = Path(max(states, key=steps_done)).parent
    snapshot = huggingface_hub.snapshot_download(
        repo, revision=revision or None, token=token, allow_patterns=f"{newest}/*"
    )
    return Path(snapshot) / newest


def _step_of(name: str) -> int | None:
    """Return the number of a checkpoint whose state is of this name, None for other files."""
    folder, _, file = name.partition("/")
    prefix, _, step = folder.partition("-")
    whole = file == TRAINER_STATE_NAME and prefix == PREFIX_CHECKPOINT_DIR and step.isdigit()
    return int(step) if whole else None
