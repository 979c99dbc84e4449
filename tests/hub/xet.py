"""Xet for the loopback Hub: the client's own library keeps the files in a folder.

`hf_xet` takes `local://FOLDER` for the address of a store. The client then uploads and downloads as
it does by default, except that chunks are files of the folder and not requests: faults reach
the token and the commit, not the transfer.
"""

import tempfile
import time
from pathlib import Path

from .repositories import Pointer, Refused

# A shard (the table of what a store holds) has a header of as many bytes, then rows of as many.
ROW = 48
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30


class XetStore:
    def __init__(self, folder: Path) -> None:
        self.url = f"local://{folder.absolute()}"
        # What an upload has come to its end with; the others may be half written.
        self.shards = folder / "xet" / "xorbs" / "shards"
        self.read_shards: set[Path] = set()
        self.hashes: dict[str, str] = {}

    def find(self, pointer: Pointer) -> str | None:
        """Return the name that xet gives a file of this checksum, if the store holds it."""
        if pointer.oid not in self.hashes:
            for shard in set(self.shards.glob("*.mdb")) - self.read_shards:
                self.hashes |= files_of(shard.read_bytes())
                self.read_shards.add(shard)
        return self.hashes.get(pointer.oid)

    def read(self, pointer: Pointer) -> bytes:
        import hf_xet

        name = self.find(pointer)
        if name is None:
            raise Refused(404, "The object was not uploaded")
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "file"
            expires = int(time.time()) + 3600
            with hf_xet.XetSession().new_file_download_group(self.url, "xet", expires) as group:
                group.start_download_file(hf_xet.XetFileInfo(name, pointer.size), str(target))
            return target.read_bytes()


def files_of(shard: bytes) -> dict[str, str]:
    """Return the names of a shard's files by their SHA-256."""
    found, place = {}, ROW
    while place + ROW <= len(shard) and shard[place : place + 32] != b"\xff" * 32:
        name = shard[place : place + 32]
        flags, rows = (int.from_bytes(shard[place + n : place + n + 4], "little") for n in (32, 36))
        place += ROW * (1 + rows * (2 if flags & WITH_VERIFICATION else 1))
        if flags & WITH_METADATA:
            found[hexadecimal(shard[place : place + 32])] = hexadecimal(name)
            place += ROW
    return found


def hexadecimal(name: bytes) -> str:
    # Xet writes a hash as four little-endian numbers.
    return b"".join(name[n : n + 8][::-1] for n in range(0, 32, 8)).hex()
