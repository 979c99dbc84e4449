"""What the loopback Hub holds, and who may do what with it."""

import threading
from pathlib import Path

from .faults import Faults
from .repositories import Entry, Pointer, Refused, Repository
from .serving import Request
from .storage import Storage
from .xet import XetStore

NAME = r"(?P<name>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{NAME}"
PAGE = rf"/(?:(?P<kind>datasets|spaces)/)?{NAME}"
REVISION = r"(?P<revision>[^/]+)"


class State:
    """Repositories and the content of large files; the routes are added to it."""

    user = "user"
    token = "hf_loopback"
    endpoint: str
    storage_endpoint: str

    def __init__(self, folder: Path, xet: bool) -> None:
        self.folder = folder
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.storage = Storage(self.folder / "objects")
        self.xet = XetStore(self.folder / "xet") if xet else None
        self.requests: list[Request] = []
        self.faults = Faults()
        self.stopped = threading.Event()

    def content(self, repository: Repository, entry: Entry) -> bytes:
        if entry.pointer is None:
            return repository.read(entry.oid)
        if not self.storage.has(entry.pointer) and self.xet:
            self.storage.put(entry.pointer, self.xet.read(entry.pointer))
        return self.storage.read(entry.pointer)

    def held(self, pointer: Pointer) -> bool:
        return self.storage.has(pointer) or bool(self.xet and self.xet.find(pointer))

    def signed_in(self, request: Request) -> bool:
        if request.token is None:
            return False
        if request.token != f"Bearer {self.token}":
            raise Refused(401, "Invalid credentials in Authorization header")
        return True

    def allowed(self, request: Request, kind: str, name: str, write: bool = False) -> Repository:
        signed_in = self.signed_in(request)
        found = self.repositories.get(((kind or "models")[:-1], name))
        # A stranger is not told whether a repository exists. The client tells this 401 by its
        # address over https, and by the code elsewhere.
        if not signed_in and (found is None or found.private or write):
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        if found is None:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return found
