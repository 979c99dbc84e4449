"""A Hub on the loopback interface, which the real client talks to.

It answers what `huggingface_hub` asks to create, push, list and download repositories of models
and data sets. It has no pull requests, no discussions, no search, and no .gitignore rules.
"""

import base64
import fnmatch
import json
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, quote, urlencode

import yaml

from .faults import Fault, Faults
from .repositories import Commit, Entry, Pointer, Refused, Repository
from .serving import Answer, Request, Server, as_json
from .storage import Storage
from .xet import XetStore

NAME = r"(?P<name>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{NAME}"
PAGE = rf"/(?:(?P<kind>datasets|spaces)/)?{NAME}"
REVISION = r"(?P<revision>[^/]+)"

ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate_card"),
    ("POST", "/api/repos/create", "create"),
    ("DELETE", "/api/repos/delete", "delete"),
    ("GET", API, "info"),
    ("GET", rf"{API}/revision/{REVISION}", "info"),
    ("GET", rf"{API}/tree/{REVISION}(?:/(?P<path>.+))?", "tree"),
    ("POST", rf"{API}/paths-info/{REVISION}", "paths_info"),
    ("GET", rf"{API}/refs", "refs"),
    ("GET", rf"{API}/commits/{REVISION}", "history"),
    ("POST", rf"{API}/(?P<what>branch|tag)/{REVISION}", "create_ref"),
    ("DELETE", rf"{API}/(?P<what>branch|tag)/{REVISION}", "delete_ref"),
    ("POST", rf"{API}/preupload/{REVISION}", "preupload"),
    ("POST", rf"{API}/commit/{REVISION}", "commit"),
    ("GET", rf"{API}/xet-(?P<action>read|write)-token/{REVISION}", "xet_token"),
    ("POST", rf"{PAGE}\.git/info/lfs/objects/batch", "large_files"),
    ("POST", "/api/lfs/verify", "verify"),
    ("POST", "/complete/(?P<oid>.+)", "complete"),
    ("GET", rf"{PAGE}/resolve/{REVISION}/(?P<path>.+)", "download"),
]
STORAGE_ROUTES = [
    ("PUT", "/(?P<action>upload)/(?P<oid>.+)", "store"),
    ("PUT", "/(?P<action>part)/(?P<oid>.+)", "store"),
    ("GET", "/(?P<action>download)/(?P<oid>.+)", "fetch"),
]


class LoopbackHub:
    """A Hub with one user, whose repositories lie in a folder.

    Args:
        folder: Empty, or to be made.
        xet: Offer xet, as the Hub does since 2025; else only the older LFS protocol is spoken.
    """

    user = "user"
    token = "hf_loopback"
    page_size = 1000
    # From these sizes on, a file is large whatever its name, and comes in several parts.
    large_from = 10 * 2**20
    parts_from = 64 * 2**20

    def __init__(self, folder: Path | str, xet: bool = False) -> None:
        self.folder = Path(folder)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.storage = Storage(self.folder / "objects")
        self.xet = XetStore(self.folder / "xet") if xet else None
        self.requests: list[Request] = []
        self.faults = Faults()
        self.stopped = threading.Event()
        self.servers = [Server(self, ROUTES), Server(self, STORAGE_ROUTES)]
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

    def content(self, repository: Repository, entry: Entry) -> bytes:
        if entry.pointer is None:
            return repository.read(entry.oid)
        if not self.storage.has(entry.pointer) and self.xet:
            self.storage.put(entry.pointer, self.xet.read(entry.pointer))
        return self.storage.read(entry.pointer)

    # Who may do what.

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

    def whoami(self, request: Request) -> Answer:
        if not self.signed_in(request):
            raise Refused(401, "Invalid username or password.")
        access = {"displayName": "tests", "role": "write"}
        auth = {"type": "access_token", "accessToken": access}
        return as_json({"type": "user", "id": "0", "name": self.user, "orgs": [], "auth": auth})

    # Repositories.

    def create(self, request: Request) -> Answer:
        asked = request.json()
        kind, owner = asked.get("type") or "model", asked.get("organization") or self.user
        if not self.signed_in(request):
            raise Refused(401, "Invalid username or password.")
        if owner != self.user:
            raise Refused(403, f"You don't have the rights to create a {kind} under {owner}")
        name = f"{owner}/{asked['name']}"
        url = f"{self.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.repositories:
            taken = f"You already created this {kind} repo"
            return as_json({"error": taken, "url": url}, 409, **{"X-Error-Message": taken})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repository = Repository(self.folder / "git" / f"{kind}s" / f"{name}.git", private)
        repository.create()
        self.repositories[kind, name] = repository
        return as_json({"url": url, "name": name, "id": name})

    def delete(self, request: Request) -> Answer:
        asked = request.json()
        kind = asked.get("type") or "model"
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        repository = self.allowed(request, f"{kind}s", name, write=True)
        del self.repositories[kind, name]
        repository.folder.rename(repository.folder.with_suffix(f".deleted{time.time_ns()}"))
        return as_json({})

    def info(self, request: Request, kind: str, name: str, revision: str = "") -> Answer:
        repository = self.allowed(request, kind, name)
        sha = repository.resolve(revision or "main")
        files = [e for e in repository.entries(sha).values() if e.kind == "blob"]
        about = {
            "_id": "0",
            "id": name,
            "author": self.user,
            "sha": sha,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "lastModified": hub_date(repository.commits(sha, "-1")[0]),
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": e.path} for e in files],
        }
        if "blobs" in request.query:
            about["siblings"] = [
                {**self.described(e), "rfilename": e.path, "blobId": e.oid} for e in files
            ]
        return as_json(about)

    def described(self, entry: Entry) -> dict[str, object]:
        if entry.kind == "tree":
            return {"type": "directory", "path": entry.path, "oid": entry.oid, "size": 0}
        about = {"type": "file", "path": entry.path, "oid": entry.oid, "size": entry.size}
        if (pointer := entry.pointer) is not None:
            large = {"oid": pointer.oid, "sha256": pointer.oid, "size": pointer.size}
            about["lfs"] = {**large, "pointerSize": entry.git_size}
            if self.xet and (xet_hash := self.xet.find(pointer)):
                about["xetHash"] = xet_hash
        return about

    def listed(
        self, repository: Repository, revision: str, entries: list[Entry], expand: bool
    ) -> list[dict[str, object]]:
        rows = [self.described(entry) for entry in entries]
        for row, entry in zip(rows, entries, strict=True):
            if expand:
                last = repository.commits(revision, "-1", "--", entry.path)[0]
                row["lastCommit"] = {"id": last.sha, "title": last.title, "date": hub_date(last)}
        return rows

    def tree(self, request: Request, kind: str, name: str, revision: str, path: str = "") -> Answer:
        repository = self.allowed(request, kind, name)
        entries, inside = repository.entries(revision), f"{path}/" if path else ""
        if path and (path not in entries or entries[path].kind != "tree"):
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        deep = is_true(request.query.get("recursive"))
        found = [
            e
            for e in entries.values()
            if e.path.startswith(inside) and (deep or "/" not in e.path[len(inside) :])
        ]
        first = int(request.query.get("cursor", 0))
        last, more = first + self.page_size, {}
        if last < len(found):
            following = urlencode({**request.query, "cursor": last})
            more["Link"] = f'<{self.endpoint}{request.path}?{following}>; rel="next"'
        expand = is_true(request.query.get("expand"))
        return as_json(self.listed(repository, revision, found[first:last], expand), **more)

    def paths_info(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        entries = (repository := self.allowed(request, kind, name)).entries(revision)
        form = parse_qs(request.body.decode())
        found = [entries[p] for p in form.get("paths", []) if p in entries]
        expand = is_true(form.get("expand", [""])[0])
        return as_json(self.listed(repository, revision, found, expand))

    def refs(self, request: Request, kind: str, name: str) -> Answer:
        repository = self.allowed(request, kind, name)
        rows = [
            row.split()
            for row in repository.git("for-each-ref", "--format=%(refname) %(objectname)")
            .decode()
            .splitlines()
        ]
        named = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/convert/": "converts"}
        return as_json(
            {
                what: [
                    {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
                    for ref, sha in rows
                    if ref.startswith(prefix)
                ]
                for prefix, what in named.items()
            }
        )

    def history(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        rows = self.allowed(request, kind, name).commits(revision)
        author = {"user": self.user}
        return as_json(
            [
                {"id": c.sha, "title": c.title, "message": c.message, "date": hub_date(c)}
                | {"authors": [author]}
                for c in rows
            ]
        )

    def create_ref(
        self, request: Request, kind: str, name: str, what: str, revision: str
    ) -> Answer:
        repository = self.allowed(request, kind, name, write=True)
        asked = request.json()
        # A branch is named in the address, a tag in the body: the address says what it tags.
        ref = f"refs/heads/{revision}" if what == "branch" else f"refs/tags/{asked['tag']}"
        start = asked.get("startingPoint", "main") if what == "branch" else revision
        sha = repository.resolve(start)
        if repository.git("for-each-ref", ref):
            raise Refused(409, f"Reference already exists: {ref}")
        repository.git("update-ref", ref, sha)
        return as_json({})

    def delete_ref(
        self, request: Request, kind: str, name: str, what: str, revision: str
    ) -> Answer:
        repository = self.allowed(request, kind, name, write=True)
        ref = f"refs/{'heads' if what == 'branch' else 'tags'}/{revision}"
        repository.resolve(ref)
        repository.git("update-ref", "-d", ref)
        return as_json({})

    # Uploads.

    def validate_card(self, request: Request) -> Answer:
        text = request.json()["content"]
        pieces = text.split("---\n", 2) if text.startswith("---\n") else []
        if len(pieces) < 3:
            warning = {"message": "empty or missing yaml metadata in repo card"}
            return as_json({"errors": [], "warnings": [warning]})
        try:
            sound = isinstance(yaml.safe_load(pieces[1]), (dict, type(None)))
            message = '"metadata" must be of type object'
        except yaml.YAMLError as error:
            sound, message = False, str(error)
        found = [] if sound else [{"message": message}]
        return as_json({"errors": found, "warnings": []}, 200 if sound else 400)

    def preupload(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repository = self.allowed(request, kind, name, write=True)
        entries = repository.entries(revision)
        rules = entries.get(".gitattributes")
        text = repository.read(rules.oid).decode() if rules else ""
        patterns = [line.split()[0] for line in text.splitlines() if "filter=lfs" in line]
        rows = []
        for file in request.json()["files"]:
            path, held = file["path"], entries.get(file["path"])
            named = any(fnmatch.fnmatch(path.split("/")[-1], pattern) for pattern in patterns)
            binary = b"\0" in base64.b64decode(file.get("sample", ""))
            large = named or binary or file["size"] >= self.large_from
            mode = "lfs" if large else "regular"
            row = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            rows.append({**row, "oid": held.etag if held else None})
        return as_json({"files": rows})

    def large_files(self, request: Request, name: str, kind: str = "") -> Answer:
        self.allowed(request, kind, name, write=True)
        asked, rows = request.json(), []
        for one in asked["objects"]:
            pointer = Pointer(one["oid"], one["size"])
            row = {"oid": pointer.oid, "size": pointer.size}
            if not self.held(pointer):
                verify = {"href": f"{self.endpoint}/api/lfs/verify"}
                row["actions"] = {"upload": self.upload(pointer, asked), "verify": verify}
            rows.append(row)
        return as_json({"transfer": "basic", "objects": rows})

    def upload(self, pointer: Pointer, asked: dict) -> dict[str, object]:
        if pointer.size < self.parts_from or "multipart" not in asked["transfers"]:
            return {"href": self.storage_endpoint + self.storage.sign("upload", pointer)}
        count = -(-pointer.size // self.parts_from)
        parts = {
            str(n): self.storage_endpoint + self.storage.sign("part", pointer, n)
            for n in range(1, count + 1)
        }
        href = self.endpoint + self.storage.sign("complete", pointer)
        return {"href": href, "header": {"chunk_size": str(self.parts_from), **parts}}

    def held(self, pointer: Pointer) -> bool:
        return self.storage.has(pointer) or bool(self.xet and self.xet.find(pointer))

    def verify(self, request: Request) -> Answer:
        asked = request.json()
        if not self.signed_in(request):
            raise Refused(401, "Invalid username or password.")
        if not self.held(Pointer(asked["oid"], asked["size"])):
            raise Refused(404, "The object was not uploaded")
        return as_json({})

    def complete(self, request: Request, oid: str) -> Answer:
        grant = self.storage.granted("complete", request.query.get("signature", ""))
        parts = [(part["partNumber"], part["etag"]) for part in request.json()["parts"]]
        self.storage.complete(grant, parts)
        return as_json({})

    def commit(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repository = self.allowed(request, kind, name, write=True)
        if "create_pr" in request.query:
            raise Refused(501, "The loopback Hub has no pull requests")
        repository.resolve(f"refs/heads/{revision}")
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        header, changes = {}, {}
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                header = value
            elif key == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                pointer = Pointer(value["oid"], value.get("size") or self.size_of(value["oid"]))
                if not self.held(pointer):
                    raise Refused(400, f"Your push was rejected: {value['path']} was not uploaded")
                changes[value["path"]] = pointer.text()
            elif key == "deletedFile":
                changes[value["path"]] = None
            elif key == "deletedFolder":
                changes[value["path"].rstrip("/")] = None
        message = f"{header['summary']}\n\n{header.get('description', '')}".strip()
        sha = repository.commit(revision, changes, message, header.get("parentCommit"))
        prefix = "" if kind == "models" else f"{kind}/"
        url = f"{self.endpoint}/{prefix}{name}/commit/{sha}"
        return as_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def size_of(self, oid: str) -> int:
        # A copy of a large file names no size.
        path = self.storage.folder / oid
        return path.stat().st_size if path.exists() else 0

    # Downloads.

    def download(
        self, request: Request, name: str, revision: str, path: str, kind: str = ""
    ) -> Answer:
        repository = self.allowed(request, kind, name)
        if repository.gated and not self.signed_in(request):
            raise Refused(401, f"Access to model {name} is restricted.", "GatedRepo")
        sha = repository.resolve(revision)
        entry = repository.entries(sha).get(path)
        headers = {"X-Repo-Commit": sha}
        if entry is None or entry.kind == "tree":
            raise Refused(404, "Entry not found", "EntryNotFound", **headers)
        headers["ETag"] = f'"{entry.etag}"'
        pointer = entry.pointer
        if pointer is None:
            return Answer(200, repository.read(entry.oid), headers)
        headers |= {"X-Linked-ETag": f'"{pointer.oid}"', "X-Linked-Size": str(pointer.size)}
        if self.xet and (xet_hash := self.xet.find(pointer)):
            route = f"{self.endpoint}/api/{kind or 'models'}/{quote(name)}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": xet_hash, "Link": f'<{route}>; rel="xet-auth"'}
        # Where only xet has it so far, the storage is given it before it is pointed to.
        self.content(repository, entry)
        headers["Location"] = self.storage_endpoint + self.storage.sign("download", pointer)
        return Answer(302, b"", headers)

    def xet_token(
        self, request: Request, kind: str, name: str, action: str, revision: str
    ) -> Answer:
        self.allowed(request, kind, name, write=action == "write")
        if self.xet is None:
            raise Refused(404, "This Hub has no xet")
        expires = int(time.time()) + 3600
        body = {"casUrl": self.xet.url, "accessToken": "xet", "exp": expires}
        headers = {"X-Xet-Cas-Url": self.xet.url, "X-Xet-Access-Token": "xet"}
        return as_json(body, **headers, **{"X-Xet-Token-Expiration": str(expires)})

    # The storage of large files, on the other port.

    def store(self, request: Request, action: str, oid: str) -> Answer:
        grant = self.storage.granted(action, signature(request))
        if action == "part":
            return Answer(headers={"ETag": f'"{self.storage.put_part(grant, request.body)}"'})
        self.storage.put(grant.pointer, request.body)
        return Answer()

    def fetch(self, request: Request, action: str, oid: str) -> Answer:
        grant = self.storage.granted(action, signature(request))
        return Answer(200, self.storage.read(grant.pointer), {"ETag": f'"{oid}"'})


def signature(request: Request) -> str:
    # As the Hub's storage does; it also shows a client that gives the token away.
    if request.authorized:
        raise Refused(400, "Only one auth mechanism allowed")
    return request.query.get("signature", "")


def is_true(value: str | None) -> bool:
    return (value or "").lower() in ("true", "1")


def hub_date(commit: Commit) -> str:
    return commit.date[:19] + ".000Z"


QUIET = {
    # A proxy of the machine knows nothing of this Hub.
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # It would ask a service of the Hub, in a thread, for what is not there.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
}
