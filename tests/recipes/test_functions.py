"""The labelled data that comes from the standard library's functions."""

import ast
import json
from collections import Counter
from pathlib import Path

import pytest
from common import functions
from common.functions import functions_of, write_packages, write_summaries

TEXT = '''
@cache
def outer(x):
    """Return twice the number.  More is said here.

    And here.
    """
    # A comment stays.

    class Local:
        async def method(self):
            "Await nothing at all."
            return x

    return 2 * x

def bare(x): return x

def empty():
    """Say something, do nothing."""

def told():
    """Open the door now."""
    print("open  the door, now!")

def crowded(): """Share a line with code."""; return 1

def raw(x):
    r"""Match a \\d of text"""
    return x
'''


def test_functions_come_without_their_docstrings() -> None:
    found = {function.source.split("(")[0]: function for function in functions_of(TEXT)}
    assert {name.split()[-1]: function.summary for name, function in found.items()} == {
        "outer": "Return twice the number.",
        "method": "Await nothing at all.",
        "bare": "",
        "raw": r"Match a \d of text",
    }
    outer = found["@cache\ndef outer"].source
    assert outer.startswith("@cache\ndef outer(x):\n    # A comment stays.\n")
    assert outer.endswith("return 2 * x")
    assert found["async def method"].source == "async def method(self):\n    return x"
    assert found["def raw"].source == "def raw(x):\n    return x"


def test_text_that_does_not_parse_has_no_functions() -> None:
    assert list(functions_of("def f(:\n  pass")) == []
    assert list(functions_of("def f():\n    pass\n\f\ndef g():\n    pass\n")) == []


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Return it.", ""),
        ("Return it, e.g. this.", "Return it, e.g. this."),
        ("One sentence\n   over two lines. Another.", "One sentence over two lines."),
        ("A b c\n\nd", "A b c"),
        ("word " * 40, ""),
        ("", ""),
    ],
)
def test_a_summary_is_the_first_sentence(docstring, summary) -> None:
    assert functions._summary(docstring) == summary


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("functions")


def read(paths: dict[str, Path]) -> dict[str, list[dict[str, str]]]:
    return {
        split: [json.loads(line) for line in path.read_text().splitlines()]
        for split, path in paths.items()
    }


def docstrings(source: str) -> str | None:
    return ast.get_docstring(ast.parse(source).body[0])


def test_no_source_gives_its_summary_away(folder) -> None:
    splits = read(write_summaries(folder))
    assert len(splits["train"]) > 3_000
    assert len(splits["validation"]) > 100
    for row in (row for rows in splits.values() for row in rows):
        assert row["summary"] not in row["source"]
        assert len(row["summary"].split()) >= 3
    # A string that comes first in what is left is the function's own statement, and rare.
    rows = splits["validation"]
    assert sum(docstrings(row["source"]) is not None for row in rows) == 0
    packages = {split: {row["package"] for row in rows} for split, rows in splits.items()}
    assert not packages["train"] & packages["validation"]
    assert len({row["source"] for rows in splits.values() for row in rows}) == sum(
        map(len, splits.values())
    )


def test_packages_are_balanced_and_split_by_file(folder) -> None:
    splits = read(write_packages(folder))
    for rows in splits.values():
        counts = Counter(row["label"] for row in rows)
        assert 3 < len(counts) <= 8  # some distributions package idlelib and tkinter apart
        assert len(set(counts.values())) == 1
        assert all(row["path"].startswith(f"{row['label']}/") for row in rows)
    assert 0.1 < len(splits["validation"]) / len(splits["train"]) < 0.4
    files = {split: {row["path"] for row in rows} for split, rows in splits.items()}
    assert not files["train"] & files["validation"]
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts)


def test_whole_files_are_held_out_up_to_a_share() -> None:
    files = {
        f"{name}.py": [{"path": f"{name}.py"}] * size
        for name, size in zip("abcd", (5, 5, 9, 81), strict=True)
    }
    groups = functions._hold_out_files(files)
    assert {row["path"] for row in groups["validation"]} == {"a.py", "b.py", "c.py"}
    assert {row["path"] for row in groups["train"]} == {"d.py"}
