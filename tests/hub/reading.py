"""What the loopback Hub tells of its repositories, and downloads."""

from urllib.parse import parse_qs, quote, urlencode

import yaml

from .repositories import Commit, Entry, Refused, Repository
from .serving import Answer, Request, as_json
from .state import API, PAGE, REVISION, State
from .storage import signature

ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("GET", API, "info"),
    ("GET", rf"{API}/revision/{REVISION}", "info"),
    ("GET", rf"{API}/tree/{REVISION}(?:/(?P<path>.+))?", "tree"),
    ("POST", rf"{API}/paths-info/{REVISION}", "paths_info"),
    ("GET", rf"{API}/refs", "refs"),
    ("GET", rf"{API}/commits/{REVISION}", "history"),
    ("GET", rf"{PAGE}/resolve/{REVISION}/(?P<path>.+)", "download"),
]
STORAGE_ROUTES = [
    ("GET", "/(?P<action>download)/(?P<oid>.+)", "fetch"),
]


def front_matter(card: bytes) -> dict[str, object]:
    """What a card says in YAML between two lines of dashes at its top."""
    parts = card.decode("utf-8").split("---\n")
    return yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0] else {}


class Reading(State):
    page_size = 1000

    def whoami(self, request: Request) -> Answer:
        if not self.signed_in(request):
            raise Refused(401, "Invalid username or password.")
        access = {"displayName": "tests", "role": "write"}
        auth = {"type": "access_token", "accessToken": access}
        return as_json({"type": "user", "id": "0", "name": self.user, "orgs": [], "auth": auth})

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
            "cardData": next(
                (front_matter(self.content(repository, e)) for e in files if e.path == "README.md"),
                {},
            ),
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

    def fetch(self, request: Request, action: str, oid: str) -> Answer:
        grant = self.storage.granted(action, signature(request))
        return Answer(200, self.storage.read(grant.pointer), {"ETag": f'"{oid}"'})


def is_true(value: str | None) -> bool:
    return (value or "").lower() in ("true", "1")


def hub_date(commit: Commit) -> str:
    return commit.date[:19] + ".000Z"
