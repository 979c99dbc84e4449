"""Dealing with the Hub: its client's patience, its errors in a line, checkpoints that are there."""

import importlib
import json
import logging
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

#: What stands before a repository's name where a checkpoint on the Hub is meant.
HUB_PREFIX = "hub:"

#: The client's httpx: which package that is differs between its releases.
_httpx = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])

#: What the client raises when the Hub, the way to it or the disk is at fault. httpx's errors are
#: no OSErrors.
HUB_ERRORS = (_httpx.HTTPError, OSError, RuntimeError, ValueError)

#: What a connection raises that ends while it is in use.
_CUT = (_httpx.NetworkError, _httpx.RemoteProtocolError)

#: What the Trainer leaves out when it pushes its output folder.
_LEFT_OUT = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*")

#: Where hub_strategy="checkpoint" pushes, again and again.
LAST_CHECKPOINT = "last-checkpoint"

#: Loggers that name the addresses of requests.
_LOGGERS = (_http.logger, logging.getLogger("httpx"), logging.getLogger("httpx2"))


class Secret(str):
    """A token that works as any string does and that neither pickle nor repr shows.

    The Trainer pickles its arguments into `training_args.bin`, the token among them, and pushes
    that file.
    """

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Be None in a pickle."""
        return type(None), ()

    def __copy__(self) -> "Secret":
        """Stay what it is: a copy in this process is not an output."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Secret":
        """Stay what it is."""
        return self

    def __repr__(self) -> str:
        """Show that there is one."""
        return "'<hub_token>'"


class _Limit:
    """The time limit of the process's client, in force as long as anyone holds it.

    A client has no limit by itself. It is made anew after errors, so that the limit has to be in
    its factory; `set_client_factory` would close the present one, which may be in use.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0

    def hold(self, seconds: float) -> Callable[[], None]:
        """Put the limit in force; the first holder's counts. Returns what lets go of it."""
        with self._lock:
            self._holders += 1
            if self._holders == 1:
                self._begin(seconds)
        return self._let_go

    def _begin(self, seconds: float) -> None:
        self._theirs = theirs = _http._GLOBAL_CLIENT_FACTORY

        def limit(client: Any) -> Any:
            # A factory of the user's own may have set limits already.
            if client.timeout.read is None:
                client.timeout = seconds
            return client

        client = huggingface_hub.get_session()
        self._before = client.timeout
        limit(client)
        self._ours = _http._GLOBAL_CLIENT_FACTORY = lambda: limit(theirs())
        for logger in _LOGGERS:
            logger.addFilter(_without_queries)

    def _let_go(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders:
                return
            for logger in _LOGGERS:
                logger.removeFilter(_without_queries)
            if _http._GLOBAL_CLIENT_FACTORY is not self._ours:
                return  # the user has set one meanwhile
            _http._GLOBAL_CLIENT_FACTORY = self._theirs
            huggingface_hub.get_session().timeout = self._before


_LIMIT = _Limit()


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Let the Hub's client give up where nothing comes for so long; by itself it waits for ever.

    Args:
        seconds: Without an answer, or a byte of it; the client tries again a few times.
    """
    let_go = hold_limit(seconds)
    try:
        yield
    finally:
        let_go()


def hold_limit(seconds: float) -> Callable[[], None]:
    """Do the same until what is returned is called, for jobs in the background.

    Args:
        seconds: As for `bounded`.
    """
    return _LIMIT.hold(seconds)


def _without_queries(record: logging.LogRecord) -> bool:
    """Take the key out of addresses that files are sent to."""
    record.msg, record.args = _cut_queries(record.getMessage()), ()
    return True


def _cut_queries(text: str) -> str:
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text)


def reason(error: BaseException) -> str:
    """Say in a line why the Hub did not do something, without keys that addresses may hold.

    Args:
        error: What the client raised.
    """
    error = _root(error)
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        said = error.server_message or error.response.reason_phrase
        return f"{type(error).__name__}: HTTP {error.response.status_code}, {said}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {_cut_queries(text[0])}" if text else type(error).__name__


def cause(error: BaseException) -> str:
    """Return what to know a reason by again, whatever numbers and names are in its text.

    Args:
        error: What the client raised.
    """
    for link in _chain(error):
        # How a connection that is cut shows is up to the moment: it is reset, or is at its end.
        if isinstance(link, _CUT) and not isinstance(link, _httpx.ConnectError):
            return "the connection was cut"
        if isinstance(link, _httpx.TimeoutException):
            return "no answer in time"
    root = _root(error)
    response = getattr(root, "response", None)
    code = getattr(root, "errno", None) if response is None else response.status_code
    return f"{type(root).__name__} {code}"


def _root(error: BaseException) -> BaseException:
    # The client's own outer errors say which file it was, but not why.
    *_, root = _chain(error)
    return root


def _chain(error: BaseException) -> Iterator[BaseException]:
    yield error
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
        yield error


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
    command = ["hf", "upload", repo, str(Path(folder).absolute()), place]
    if place == ".":
        command += [piece for pattern in _LEFT_OUT for piece in ("--exclude", pattern)]
    if revision is not None:
        command += ["--revision", revision]
    return shlex.join(command)


def licence_of(repo: str, token: str | None, kind: str = "model") -> str | None:
    """Return the licence of a model or data set, or None where it names none.

    Args:
        repo: The repository.
        token: To read a private one; None: the one that is logged in.
        kind: `"model"` or `"dataset"`.
    """
    card = HfApi(token=token).repo_info(repo, repo_type=kind).card_data
    if card is None:
        return None
    return card.get("license_name") or card.get("license")


def remove_others(
    repo: str, folder: Path, place: str, token: str | None, revision: str | None
) -> None:
    """Remove what a folder of the Hub has besides the files of a local one.

    Args:
        repo: The repository.
        folder: The local folder, which was uploaded.
        place: Where to.
        token: To write with; None: the one that is logged in.
        revision: The branch, or None for the default.
    """
    api = HfApi(token=token)
    own = {f"{place}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*")}
    there = api.list_repo_files(repo, revision=revision)
    old = [name for name in there if name.startswith(f"{place}/") and name not in own]
    if old:
        operations = [CommitOperationDelete(path_in_repo=name) for name in old]
        message = f"Remove files of another run from {place}"
        api.create_commit(repo, operations, commit_message=message, revision=revision)


def download_checkpoint(asked: str, token: str | None) -> Path:
    """Download the checkpoint that was pushed to a repository last.

    Args:
        asked: `hub:user/name`, or `hub:user/name@revision`.
        token: To read a private one; None: the one that is logged in.

    Returns:
        Its folder in the Hub's cache.

    Raises:
        ValueError: There is no such repository or revision, or no whole checkpoint in it.
    """
    repo, _, revision = asked.removeprefix(HUB_PREFIX).partition("@")
    api = HfApi(token=token)
    try:
        # One commit for all that follows, whatever is pushed meanwhile.
        commit = api.repo_info(repo, revision=revision or None).sha
        names = [name for name in api.list_repo_files(repo, revision=commit) if _is_state(name)]
        newest = max(
            names, key=lambda name: _age(api, repo, name, commit), default=f"/{TRAINER_STATE_NAME}"
        )
        if names:
            folder = Path(newest).parent
            patterns = f"{folder}/*"
            found = Path(api.snapshot_download(repo, revision=commit, allow_patterns=patterns))
            logger.info("resuming from %s: %s, downloaded to %s", asked, folder, found / folder)
            return found / folder
    except (*HUB_ERRORS, KeyError, TypeError) as error:
        raise ValueError(f"{asked!r} can't be resumed from: {reason(error)}") from None
    raise ValueError(
        f"{asked!r} holds no checkpoint: runs push them with --hub_strategy checkpoint or"
        " all_checkpoints"
    )


def _is_state(name: str) -> bool:
    folder, _, file = name.partition("/")
    prefix, _, step = folder.partition("-")
    numbered = prefix == PREFIX_CHECKPOINT_DIR and step.isdigit()
    return file == TRAINER_STATE_NAME and (numbered or folder == LAST_CHECKPOINT)


def _age(api: HfApi, repo: str, name: str, commit: str) -> tuple[Any, int]:
    """Return what orders checkpoints: when they were pushed, then how far they are."""
    (about,) = api.get_paths_info(repo, [name], revision=commit, expand=True)
    pushed = about.last_commit.date
    path = api.hf_hub_download(repo, name, revision=commit)
    return pushed, int(json.loads(Path(path).read_text(encoding="utf-8"))["global_step"])
