"""Bare git repositories that hold what the loopback Hub is sent."""

import os
import re
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path

# What the Hub commits first: files of these names go to the storage of large files.
LARGE = "arrow bin ckpt gz h5 model npy npz onnx parquet pickle pkl pt pth safetensors tar zip zst"
ATTRIBUTES = "".join(f"*.{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LARGE.split())
AUTHOR = "user <user@loopback.invalid>"
POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n"
)


class Refused(Exception):
    """What the Hub answers instead: a status, and the code that the client tells errors by."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


@dataclass(frozen=True)
class Pointer:
    """What git holds of a large file."""

    oid: str
    size: int

    def text(self) -> bytes:
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{self.oid}\nsize {self.size}\n".encode()


@dataclass(frozen=True)
class Entry:
    path: str
    kind: str
    oid: str
    git_size: int = 0
    pointer: Pointer | None = None

    @property
    def size(self) -> int:
        return self.pointer.size if self.pointer else self.git_size

    @property
    def etag(self) -> str:
        return self.pointer.oid if self.pointer else self.oid


@dataclass(frozen=True)
class Commit:
    sha: str
    date: str
    title: str
    message: str


@dataclass
class Repository:
    """One bare repository.

    A commit maps each path that it changes to its bytes, or to None to delete it.
    """

    folder: Path
    private: bool = False
    gated: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    known: dict[str, dict[str, Entry]] = field(default_factory=dict)

    def create(self) -> None:
        self.folder.mkdir(parents=True)
        self.git("init", "--quiet", "--bare", "--initial-branch=main", ".")
        self.commit("main", {".gitattributes": ATTRIBUTES.encode()}, "initial commit")

    def git(self, *arguments: str, stdin: bytes = b"", check: bool = True) -> bytes:
        # Neither the machine's configuration nor a repository around the tests has a say.
        clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        own = {"GIT_DIR": ".", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        result = subprocess.run(
            ["git", *arguments],
            cwd=self.folder,
            input=stdin,
            capture_output=True,
            env={**clean, **own},
            check=False,
        )
        if check and result.returncode:
            raise RuntimeError(f"git {arguments[0]}: {result.stderr.decode()}")
        return result.stdout

    def resolve(self, revision: str) -> str:
        asked = ["--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"]
        sha = self.git("rev-parse", *asked, check=False).decode().strip()
        if not re.fullmatch(r"[0-9a-f]{40}", sha):
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def entries(self, revision: str) -> dict[str, Entry]:
        """Return files and folders by path; a commit does not change, so it is read once."""
        sha = self.resolve(revision)
        if sha not in self.known:
            listing = self.git("ls-tree", "-r", "-t", "-z", "-l", "--full-tree", sha).decode()
            found = []
            for line in filter(None, listing.split("\0")):
                about, path = line.split("\t", 1)
                _, kind, oid, size = about.split()
                found.append(Entry(path, kind, oid, int(size) if kind == "blob" else 0))
            pointers = self.pointers([e.oid for e in found if e.kind == "blob" and e.size < 200])
            self.known[sha] = {
                e.path: Entry(e.path, e.kind, e.oid, e.git_size, pointers.get(e.oid)) for e in found
            }
        return self.known[sha]

    def pointers(self, oids: list[str]) -> dict[str, Pointer]:
        texts = self.git("cat-file", "--batch", stdin="".join(f"{o}\n" for o in oids).encode())
        found, place = {}, 0
        while place < len(texts):
            end = texts.index(b"\n", place)
            oid, _, size = texts[place:end].decode().split()
            match = POINTER.fullmatch(texts[end + 1 : end + 1 + int(size)])
            if match:
                found[oid] = Pointer(match[1].decode(), int(match[2]))
            place = end + 1 + int(size) + 1
        return found

    def read(self, oid: str) -> bytes:
        return self.git("cat-file", "blob", oid)

    def commits(self, revision: str, *limits: str) -> list[Commit]:
        """Return the commits, the newest first."""
        form = "--format=%H%x00%aI%x00%s%x00%b%x01"
        text = self.git("log", form, self.resolve(revision), *limits).decode()
        rows = [row.strip("\n").split("\0") for row in text.split("\x01")[:-1]]
        return [Commit(sha, date, title, body.strip("\n")) for sha, date, title, body in rows]

    def commit(
        self,
        branch: str,
        changes: dict[str, bytes | None],
        message: str,
        parent: str | None = None,
    ) -> str:
        with self.lock:
            pieces = [b"commit refs/heads/%s\nmark :1\n" % branch.encode()]
            pieces += [b"committer %s now\n" % AUTHOR.encode(), data(message.encode())]
            if self.git("rev-parse", "--verify", "--quiet", "HEAD", check=False):
                head = self.resolve(f"refs/heads/{branch}")
                if parent and not head.startswith(parent):
                    stale = "A commit has happened since. Please refresh and try again."
                    raise Refused(412, stale)
                present = self.entries(head)
                pieces.append(b"from %s\n" % head.encode())
            else:
                present = {}
            for path, content in changes.items():
                if set(path.split("/")) & {"", ".", "..", ".git"} or "\n" in path:
                    raise Refused(400, f"Invalid path: {path!r}")
                if content is None:
                    if path not in present:
                        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                    pieces.append(b"D %s\n" % path.encode())
                else:
                    pieces += [b"M 100644 inline %s\n" % path.encode(), data(content)]
            stream = b"".join([*pieces, b"\nget-mark :1\n"])
            answer = self.git("fast-import", "--quiet", "--date-format=now", stdin=stream)
            return answer.decode().strip()


def data(content: bytes) -> bytes:
    return b"data %d\n%s\n" % (len(content), content)
