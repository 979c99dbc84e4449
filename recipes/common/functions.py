"""Small labelled data that every machine has: the functions of Python's own standard library.

Two tasks come from it. *Summaries*: from a function's source to the first sentence of its
docstring; whole packages are held out, as in the corpus itself. *Packages*: from a function's
source to the package it comes from; here every package has to be in both splits, so whole files
are held out, since the functions of one file resemble each other.
"""

import ast
import json
import re
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.standard_library import fraction_of, write_splits, write_standard_library

#: Words and characters of a summary that says something and is no paragraph.
_MIN_WORDS, _MAX_CHARACTERS = 3, 160

#: Lines of a function that is worth a row.
_MIN_LINES = 3

#: Packages to tell apart; one with fewer files can't be held out by file.
_PACKAGES, _MIN_FILES = 8, 8

#: Share of files that are held out in the task of packages.
_VALIDATION_SHARE = 0.2

_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Function(NamedTuple):
    """A function of the corpus.

    Args:
        source: Its text without its docstring, dedented, decorators included.
        summary: The first sentence of its docstring; empty where it has none.
    """

    source: str
    summary: str


def write_summaries(folder: Path) -> dict[str, Path]:
    """Write `{"source", "summary", "package", "path"}` per function that says what it does.

    Args:
        folder: Where to write; made if missing.

    Returns:
        The path of each split.

    Raises:
        FileNotFoundError: The standard library's sources are not installed.
    """
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for split, row in _rows(folder):
        if row["summary"]:
            splits[split].append(row)
    return write_splits(folder / "summaries", splits)


def write_packages(folder: Path) -> dict[str, Path]:
    """Write `{"text", "label", "path"}` per function of the packages with most functions.

    Every package has the same number of rows in a split, so that the accuracy of always naming
    one of them is 1 / packages.

    Args:
        folder: Where to write; made if missing.

    Returns:
        The path of each split.

    Raises:
        FileNotFoundError: The standard library's sources are not installed.
    """
    packages: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for _, row in _rows(folder):
        if row["source"].count("\n") + 1 >= _MIN_LINES:
            packages[row["package"]][row["path"]].append(row)
    candidates = [name for name, files in packages.items() if len(files) >= _MIN_FILES]
    candidates.sort(key=lambda name: -sum(map(len, packages[name].values())))
    chosen = {name: _hold_out_files(packages[name]) for name in sorted(candidates[:_PACKAGES])}
    splits: dict[str, list[dict[str, str]]] = {}
    for split in ("train", "validation"):
        size = min(len(groups[split]) for groups in chosen.values())
        splits[split] = [
            {"text": row["source"], "label": name, "path": row["path"]}
            for name, groups in chosen.items()
            for row in sorted(groups[split], key=lambda row: fraction_of(row["source"]))[:size]
        ]
    return write_splits(folder / "packages", splits)


def functions_of(text: str) -> Iterator[Function]:
    """Find the functions and methods in a file's source that have a body besides a docstring.

    Left out: a function whose docstring shares a line with code, and one whose source says its
    summary a second time, as a comment or a message.

    Args:
        text: Python source; nothing is found in text that this Python can't parse, or whose lines
            `str.splitlines` counts otherwise, as it does with form feeds.

    Yields:
        Functions, in the order of their first lines.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in the text, not in this program
            tree = ast.parse(text)
    except SyntaxError:
        return
    nodes = [node for node in ast.walk(tree) if isinstance(node, _FunctionNode)]
    lines = text.splitlines(keepends=True)
    if len(lines) != text.count("\n") + (not text.endswith("\n")):
        return
    for node in sorted(nodes, key=lambda node: node.lineno):
        docstring = ast.get_docstring(node)
        body = node.body[1:] if docstring is not None else node.body
        if not body:
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        kept = lines[first - 1 : node.end_lineno]
        if docstring is not None:
            begin, end = node.body[0].lineno, node.body[0].end_lineno
            before, after = lines[begin - 1][: node.body[0].col_offset], lines[end - 1].rstrip()
            if before.strip() or not after.endswith(("'", '"')):
                continue
            kept = lines[first - 1 : begin - 1] + lines[end : node.end_lineno]
        source = textwrap.dedent("".join(kept)).strip()
        summary = _summary(docstring or "")
        if not summary or _plain(summary) not in _plain(source):
            yield Function(source, summary)


def _rows(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    seen = set()
    for split, path in write_standard_library(folder).items():
        for line in path.read_text(encoding="utf-8").splitlines():
            document = json.loads(line)
            package = document["path"].split("/")[0].removesuffix(".py")
            for function in functions_of(document["text"]):
                if function.source not in seen:
                    seen.add(function.source)
                    yield split, function._asdict() | {"package": package, "path": document["path"]}


def _hold_out_files(files: dict[str, list[dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    """Hold out files, in an order by hash, as long as they stay within their share of the rows."""
    groups: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    room = _VALIDATION_SHARE * sum(map(len, files.values()))
    for path in sorted(files, key=fraction_of):
        split = "validation" if len(groups["validation"]) + len(files[path]) <= room else "train"
        groups[split] += files[path]
    return groups


def _summary(docstring: str) -> str:
    """Return the first sentence, or nothing where it is too short or too long to be one."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0]
    fits = len(sentence.split()) >= _MIN_WORDS and len(sentence) <= _MAX_CHARACTERS
    return sentence if fits else ""


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
