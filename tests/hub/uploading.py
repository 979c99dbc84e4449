"""Where the content of a commit goes before the commit: what is large, and its way."""

import base64
import fnmatch
import time

from .repositories import Pointer, Refused
from .serving import Answer, Request, as_json
from .state import API, PAGE, REVISION, State
from .storage import signature

ROUTES = [
    ("POST", rf"{API}/preupload/{REVISION}", "preupload"),
    ("POST", rf"{PAGE}\.git/info/lfs/objects/batch", "large_files"),
    ("POST", "/api/lfs/verify", "verify"),
    ("POST", "/complete/(?P<oid>.+)", "complete"),
    ("GET", rf"{API}/xet-(?P<action>read|write)-token/{REVISION}", "xet_token"),
]
STORAGE_ROUTES = [
    ("PUT", "/(?P<action>upload)/(?P<oid>.+)", "store"),
    ("PUT", "/(?P<action>part)/(?P<oid>.+)", "store"),
]


class Uploading(State):
    # From these sizes on, a file is large whatever its name, and comes in several parts.
    large_from = 10 * 2**20
    parts_from = 64 * 2**20

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

    def verify(self, request: Request) -> Answer:
        asked = request.json()
        if not self.signed_in(request):
            raise Refused(401, "Invalid username or password.")
        if not self.held(Pointer(asked["oid"], asked["size"])):
            raise Refused(404, "The object was not uploaded")
        return as_json({})

    def store(self, request: Request, action: str, oid: str) -> Answer:
        grant = self.storage.granted(action, signature(request))
        if action == "part":
            return Answer(headers={"ETag": f'"{self.storage.put_part(grant, request.body)}"'})
        self.storage.put(grant.pointer, request.body)
        return Answer()

    def complete(self, request: Request, oid: str) -> Answer:
        grant = self.storage.granted("complete", request.query.get("signature", ""))
        parts = [(part["partNumber"], part["etag"]) for part in request.json()["parts"]]
        self.storage.complete(grant, parts)
        return as_json({})

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
