"""A corpus that every machine has: the source of Python's own standard library.

About 10 MB of code and English documentation. Whole top-level packages go to one split, decided by
a hash of the package's name, so that no file's neighbours leak into the validation text; exact and
near duplicates are removed.
"""

import json
import sysconfig
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

#: Folders without text worth learning: tests, generated tables, a bundled copy of pip.
_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "encodings",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "__pycache__",
}

#: Share of top-level packages that are held out.
_VALIDATION_SHARE = 0.06

#: Words in a shingle, and the share of a held-out file's shingles that training text may contain.
_SHINGLE_WORDS = 8
_MAX_SHARED = 0.05

#: The licence of the text.
LICENCE = "Python Software Foundation License (PSF-2.0)"


def write_standard_library(folder: Path) -> dict[str, Path]:
    """Write the corpus as `train.jsonl` and `validation.jsonl`, one `{"path", "text"}` per file.

    Args:
        folder: Where to write; made if missing.

    Returns:
        The path of each split.

    Raises:
        FileNotFoundError: The standard library's sources are not installed.
    """
    rows = {
        split: [{"path": path, "text": text} for path, text in documents.items()]
        for split, documents in _splits().items()
    }
    return write_splits(folder, rows)


def write_splits(folder: Path, splits: Mapping[str, list[dict[str, str]]]) -> dict[str, Path]:
    """Write rows as one `<split>.jsonl` per split.

    A file is only written when its content differs, since a new modification time would make
    `datasets` prepare it again, and in one piece, since runs that start together read it too.

    Args:
        folder: Where to write; made if missing.
        splits: The rows of each split.

    Returns:
        The path of each split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, rows in splits.items():
        paths[split] = folder / f"{split}.jsonl"
        content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
        if not paths[split].exists() or paths[split].read_bytes() != content:
            draft = folder / f".{split}-{uuid4().hex}"
            draft.write_bytes(content)
            draft.replace(paths[split])
    return paths


def fraction_of(text: str) -> float:
    """Return a number in [0, 1) that is the same for the same text on every machine."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") / 2**64


def _splits() -> dict[str, dict[str, str]]:
    splits: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
    seen: set[bytes] = set()
    for path, text in _documents(Path(sysconfig.get_path("stdlib"))):
        digest = sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            splits[_split_of(path)][path] = text
    if not all(splits.values()):
        raise FileNotFoundError(
            f"no Python sources under {sysconfig.get_path('stdlib')}: this Python comes without its"
            " standard library's text. Pass --train_file with text of your own"
        )
    known = set()
    for text in splits["train"].values():
        known.update(_shingles(text))
    splits["validation"] = {
        path: text
        for path, text in splits["validation"].items()
        if _shared(_shingles(text), known) <= _MAX_SHARED
    }
    return splits


def _documents(root: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if _SKIPPED.isdisjoint(relative.parts[:-1]):
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                yield relative.as_posix(), text


def _split_of(path: str) -> str:
    # `_pydecimal` and `decimal`, `_pyio` and `io` belong together.
    package = path.split("/")[0].removesuffix(".py").removeprefix("_").removeprefix("py")
    return "validation" if fraction_of(package) < _VALIDATION_SHARE else "train"


def _shingles(text: str) -> set[int]:
    words = text.split()
    return {
        hash(tuple(words[start : start + _SHINGLE_WORDS]))
        for start in range(len(words) - _SHINGLE_WORDS + 1)
    }


def _shared(shingles: set[int], known: set[int]) -> float:
    return len(shingles & known) / max(len(shingles), 1)
