"""A Hub on the loopback interface, which the real client talks to.

It answers what `huggingface_hub` asks to create, push, list and download repositories of models
and data sets. It has no pull requests, no discussions, no search, and no .gitignore rules.
"""

import threading
from pathlib import Path

from . import reading, uploading, writing
from .faults import Fault
from .repositories import Repository
from .serving import Server

QUIET = {
    # A proxy of the machine knows nothing of this Hub.
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # It would ask a service of the Hub, in a thread, for what is not there.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
}

HUB_ROUTES = [*reading.ROUTES, *writing.ROUTES, *uploading.ROUTES]
STORAGE_ROUTES = [*reading.STORAGE_ROUTES, *uploading.STORAGE_ROUTES]


class LoopbackHub(reading.Reading, writing.Writing, uploading.Uploading):
    """A Hub with one user, whose repositories lie in a folder.

    Args:
        folder: Empty, or to be made.
        xet: Offer xet, as the Hub does since 2025; else only the older LFS protocol is spoken.
    """

    def __init__(self, folder: Path | str, xet: bool = False) -> None:
        super().__init__(Path(folder), xet)
        self.servers = [Server(self, HUB_ROUTES), Server(self, STORAGE_ROUTES)]
        self.endpoint, self.storage_endpoint = (server.address for server in self.servers)

    def start(self) -> "LoopbackHub":
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.stopped.set()
        self.faults.clear()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> "LoopbackHub":
        return self.start()

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def environment(self, home: Path | str) -> dict[str, str]:
        """Return what makes a new process's client talk to this Hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            # The client does not ask whether a Hub speaks xet: it uses it where it is installed.
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            **QUIET,
        }

    # What a test arranges and looks at.

    def fail(
        self, method: str = "*", path: str = "", status: int = 503, **options: object
    ) -> Fault:
        return self.faults.add(Fault("status", method, path, status=status, **options))

    def reset(self, method: str, path: str, after: int = 0, **options: object) -> Fault:
        return self.faults.add(Fault("reset", method, path, after=after, **options))

    def lose(self, method: str, path: str, **options: object) -> Fault:
        return self.faults.add(Fault("lose", method, path, **options))

    def stall(self, method: str, path: str, **options: object) -> Fault:
        return self.faults.add(Fault("stall", method, path, **options))

    def truncate(self, method: str, path: str, after: int = 0, **options: object) -> Fault:
        return self.faults.add(Fault("truncate", method, path, after=after, **options))

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.repositories[kind, name]

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Return what git holds, large files resolved and checked against their checksums."""
        repository = self.repository(name, kind)
        entries = repository.entries(revision).values()
        return {e.path: self.content(repository, e) for e in entries if e.kind == "blob"}

    def commits(
        self, name: str, revision: str = "main", kind: str = "model"
    ) -> list[tuple[str, str]]:
        """Return the commits' names and titles, the oldest first."""
        return [(c.sha, c.title) for c in self.repository(name, kind).commits(revision)][::-1]
