"""What a run has pushed to the Hub, what not, and why: a record, and its account at the end."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path

from hf_sophia.trainer.hub import cause, push_command, reason


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

    def add(self, upload: Upload, then: Iterable[Callable[[], None]] = ()) -> None:
        """Watch an upload.

        Args:
            upload: It; its job may have ended already.
            then: What to do when it has ended, whether it arrived or not.
        """
        self.uploads.append(upload)
        upload.job.add_done_callback(lambda job: self._ended(upload, job))
        for do in then:
            upload.job.add_done_callback(lambda job, do=do: do())

    def _ended(self, upload: Upload, job: Future) -> None:
        error = CancelledError() if job.cancelled() else job.exception()
        if error is None:
            return
        self.failures[job] = reason(error)
        self.warn_once(
            f"{upload} was not pushed to the Hub: {reason(error)}. Training goes on and nothing"
            " local is lost; other pushes that fail alike are told of at the end",
            cause(error),
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

    @property
    def last_save_was_skipped(self) -> bool:
        """Whether a save came after the last upload began, and was not pushed."""
        return bool(self.skipped) and self.skipped[-1] > max(
            (upload.step for upload in self.uploads), default=-1
        )

    def account(self, repo: str, revision: str | None) -> tuple[str, bool]:
        """Say what is on the Hub and what is not.

        Args:
            repo: The repository.
            revision: The branch, or None for the default.

        Returns:
            The message, and whether the last save is there.
        """
        last = {upload.place: upload for upload in self.uploads}
        pushed = []
        for place in last:
            there = [u for u in self.uploads if u.place == place and self._arrived(u)]
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
        missing = [upload for upload in last.values() if not self._arrived(upload)]
        for upload in missing:
            why = self.failures.get(upload.job, "still being uploaded")
            lines.append(f"not pushed: {upload} ({why})")
            if upload.folder.is_dir():
                lines.append(f"  {push_command(repo, upload.folder, upload.place, revision)}")
            else:
                lines.append(f"  {upload.folder} has been removed since (save_total_limit)")
        if self.last_save_was_skipped:
            lines.append(f"not pushed: what was saved at step {self.skipped[-1]}")
            lines.append("  trainer.push_to_hub() pushes the model as it is")
        return "\n".join(lines), not missing and not self.last_save_was_skipped

    def _arrived(self, upload: Upload) -> bool:
        return upload.job.done() and upload.job not in self.failures
