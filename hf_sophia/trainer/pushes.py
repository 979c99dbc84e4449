"""What a run has pushed to the Hub, what not, and why: a record, and its account at the end."""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path

from hf_sophia.trainer.hub import push_command, reason


@dataclass
class Upload:
    """One folder on its way to the Hub.

    Args:
        what: What to call it: `model` or `checkpoint`.
        folder: The local folder.
        place: Where it goes in the repository.
        step: The optimizer steps that it holds.
        job: The client's job.
    """

    what: str
    folder: Path
    place: str
    step: int
    job: Future

    def __str__(self) -> str:
        """Name it in a message."""
        return f"the {self.what} of step {self.step}"


@dataclass
class PushRecord:
    """Watches the uploads of a run, in whose background threads nobody would see them fail.

    Args:
        warn: Called with a message once for each cause of failure, perhaps in another thread.
    """

    warn: Callable[[str], None]
    uploads: list[Upload] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    failures: dict[Future, str] = field(default_factory=dict)
    _causes: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, upload: Upload) -> None:
        """Watch an upload.

        Args:
            upload: It; its job may have ended already.
        """
        self.uploads.append(upload)
        upload.job.add_done_callback(lambda job: self._ended(upload, job))

    def _ended(self, upload: Upload, job: Future) -> None:
        error = CancelledError() if job.cancelled() else job.exception()
        if error is None:
            return
        cause = reason(error)
        self.failures[job] = cause
        self.warn_once(
            f"{upload} was not pushed to the Hub: {cause}. Training goes on and nothing local is"
            " lost; other pushes that fail for this reason are told of at the end",
            cause,
        )

    def warn_once(self, message: str, cause: str | None = None) -> None:
        """Warn, unless it has been done for this cause.

        Args:
            message: The warning.
            cause: What to know it by again; None: the message.
        """
        cause = message if cause is None else cause
        with self._lock:
            if cause in self._causes:
                return
            self._causes.add(cause)
        self.warn(message)

    def running_from(self, folders: set[Path]) -> list[Future]:
        """Return the jobs that still read one of these folders.

        Args:
            folders: Absolute paths.
        """
        return [
            upload.job
            for upload in self.uploads
            if not upload.job.done() and upload.folder.resolve() in folders
        ]

    def account(self, repo: str, revision: str | None) -> tuple[str, bool]:
        """Say what is on the Hub and what is not, when all uploads have ended.

        Args:
            repo: The repository.
            revision: The branch, or None for the default.

        Returns:
            The message, and whether the last upload of each place arrived.
        """
        pushed, failed = [], []
        last: dict[str, Upload] = {upload.place: upload for upload in self.uploads}
        for place, upload in last.items():
            if upload.job in self.failures:
                failed.append(upload)
            there = [u for u in self.uploads if u.place == place and u.job not in self.failures]
            if there:
                where = "" if place == "." else f" as {place}"
                pushed.append(f"{there[-1]}{where}")
        lines = [f"pushed to {repo}: {', '.join(pushed) or 'nothing'}"]
        if self.skipped:
            steps = ", ".join(map(str, self.skipped))
            lines.append(
                f"left out, as the upload before was still running: step {steps}"
                " (--hub_always_push waits instead)"
            )
        for upload in failed:
            lines.append(f"not pushed: {upload} ({self.failures[upload.job]})")
            if upload.folder.is_dir():
                lines.append(f"  {push_command(repo, upload.folder, upload.place, revision)}")
            else:
                lines.append(f"  {upload.folder} has been removed since (save_total_limit)")
        return "\n".join(lines), not failed
