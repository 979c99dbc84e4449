"""Repositories made, changed and deleted."""

import base64
import json
import time

import yaml

from .repositories import Pointer, Refused, Repository
from .serving import Answer, Request, as_json
from .state import API, REVISION, State

ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("DELETE", "/api/repos/delete", "delete"),
    ("POST", rf"{API}/(?P<what>branch|tag)/{REVISION}", "create_ref"),
    ("DELETE", rf"{API}/(?P<what>branch|tag)/{REVISION}", "delete_ref"),
    ("POST", "/api/validate-yaml", "validate_card"),
    ("POST", rf"{API}/commit/{REVISION}", "commit"),
]


class Writing(State):
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
