"""The storage of large files: content by checksum, behind signed addresses on a port of its own."""

import hashlib
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path

from .repositories import Pointer, Refused
from .serving import Request


@dataclass(frozen=True)
class Grant:
    """What the holder of a signature may do, as with the Hub's pre-signed addresses."""

    action: str
    pointer: Pointer
    part: int = 0


class Storage:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True)
        self.grants: dict[str, Grant] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.lock = threading.Lock()

    def sign(self, action: str, pointer: Pointer, part: int = 0) -> str:
        """Return the path that allows one action with one file, without a token."""
        signature = secrets.token_urlsafe(16)
        with self.lock:
            self.grants[signature] = Grant(action, pointer, part)
        return f"/{action}/{pointer.oid}?part={part}&signature={signature}"

    def granted(self, action: str, signature: str) -> Grant:
        grant = self.grants.get(signature)
        if grant is None or grant.action != action:
            raise Refused(403, "SignatureDoesNotMatch")
        return grant

    def has(self, pointer: Pointer) -> bool:
        path = self.folder / pointer.oid
        return path.exists() and path.stat().st_size == pointer.size

    def put(self, pointer: Pointer, content: bytes) -> None:
        """Keep content, if it is what was announced."""
        sent = hashlib.sha256(content).hexdigest()
        if (sent, len(content)) != (pointer.oid, pointer.size):
            raise Refused(400, f"BadDigest: announced {pointer}, came {sent}")
        # Under its name it is whole, whatever is read or written at the same time.
        partial = self.folder / secrets.token_hex(8)
        partial.write_bytes(content)
        partial.rename(self.folder / pointer.oid)

    def put_part(self, grant: Grant, content: bytes) -> str:
        with self.lock:
            self.parts[grant.pointer.oid, grant.part] = content
        return hashlib.md5(content).hexdigest()

    def complete(self, grant: Grant, etags: list[tuple[int, str]]) -> None:
        """Join the parts that came before, in the order in which the client names them."""
        pieces = []
        for part, etag in etags:
            piece = self.parts.get((grant.pointer.oid, part), b"")
            if hashlib.md5(piece).hexdigest() != etag.strip('"'):
                raise Refused(400, f"InvalidPart: {part}")
            pieces.append(piece)
        self.put(grant.pointer, b"".join(pieces))

    def read(self, pointer: Pointer) -> bytes:
        content = (self.folder / pointer.oid).read_bytes()
        assert len(content) == pointer.size
        assert hashlib.sha256(content).hexdigest() == pointer.oid
        return content


def signature(request: Request) -> str:
    # As the Hub's storage does; it also shows a client that gives the token away.
    if request.authorized:
        raise Refused(400, "Only one auth mechanism allowed")
    return request.query.get("signature", "")
