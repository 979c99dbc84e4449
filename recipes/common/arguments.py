"""Command lines of the recipes: a YAML file gives the values, the command line overrides each."""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_arguments(
    types: Sequence[type], argv: Sequence[str] | None, default_config: Path
) -> tuple[Any, ...]:
    """Parse dataclasses from `--config FILE.yaml` and the command line.

    Args:
        types: The dataclasses to fill, `TrainingArguments` among them.
        argv: The command line without the program's name; None: the process's own.
        default_config: The YAML file that is read where `--config` is missing.

    Returns:
        One instance of each type, in order.

    Raises:
        SystemExit: A value or option is wrong; the message says which, as argparse does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(types, allow_abbrev=False)
    parser.add_argument(
        "--config",
        type=Path,
        default=default_config,
        help="YAML file with a value for any option below; the command line wins over it",
    )
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path, default=default_config)
    config = finder.parse_known_args(argv)[0].config
    known = {field.name for cls in types for field in fields(cls) if field.init}
    namespace = parser.parse_args([*_read(parser, config, known), *argv])
    with one_line_errors():
        return tuple(
            cls(**{f.name: getattr(namespace, f.name) for f in fields(cls) if f.init})
            for cls in types
        )


def without_secrets(argv: Sequence[str]) -> list[str]:
    """Return a command line that can be shown: without tokens.

    Args:
        argv: The command line without the program's name.
    """
    shown: list[str] = []
    pieces = iter(argv)
    for piece in pieces:
        name, given, _ = piece.partition("=")
        if not (name.startswith("--") and name.endswith("_token")):
            shown.append(piece)
        elif not given:
            next(pieces, None)
    return shown


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with the message alone when what the user gave can't be used.

    Put it around the reading of input only: elsewhere a traceback is worth having.

    Raises:
        SystemExit: A `ValueError` or `OSError` came up inside.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number and refuses names given twice, as YAML 1.2 does; PyYAML does not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a dictionary of a node's pairs."""
        merge = "tag:yaml.org,2002:merge"  # `<<`, which PyYAML resolves below
        names = [self.construct_object(n, deep=True) for n, _ in node.value if n.tag != merge]
        if twice := sorted({str(name) for name in names if names.count(name) > 1}):
            problem = f"{', '.join(twice)} given twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), "-+.0123456789"
)


def read_yaml(path: Path, *, as_written: bool = False) -> dict[str, Any]:
    """Read the `name: value` lines of a YAML file.

    Args:
        path: The file.
        as_written: Leave values as text; YAML itself would read `no` as False.

    Returns:
        The values by name; none for an empty file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not YAML, or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
        # Both, since only one of them refuses names given twice.
        values = yaml.load(text, Loader=_Loader) or {}
        if as_written and values:
            values = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # Not the error itself: it quotes the line, which may hold a token.
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}: {error.problem}" if mark else ""
        raise ValueError(f"{path}: not YAML{place}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: wanted 'option: value' lines, got {values!r}")
    return values


def _read(parser: argparse.ArgumentParser, config: Path, known: set[str]) -> list[str]:
    """Return the file's values as command-line options, so that both are checked alike."""
    try:
        values = read_yaml(config)
        written = read_yaml(config, as_written=True)
    except (ValueError, OSError) as error:
        parser.error(f"--config {error}")
    if unknown := sorted(map(str, values.keys() - known)):
        parser.error(f"--config {config}: unknown options {', '.join(unknown)}")
    options = []
    for name, value in values.items():
        if isinstance(value, dict):
            options.append(f"--{name}={json.dumps(value, default=str)}")
        elif isinstance(value, list):
            if not value:
                parser.error(f"--config {config}: {name} is an empty list; leave it out")
            options += [f"--{name}", *map(str, written.get(name, value))]
        elif value is not None:
            options.append(f"--{name}={written.get(name, value)}")
    return options
