"""Draw what training runs have logged: losses, learning rate and Sophia's own values.

    hf-sophia plot runs/gpt2_small
    hf-sophia plot runs/sophia runs/adamw/checkpoint-300 --output comparison.png

A RUN is an output folder, a checkpoint or a `trainer_state.json`. Of an output folder its own
`trainer_state.json` is taken, else that of its newest checkpoint. Runs of any optimizer can be
drawn; a panel that no run has values for is left out. From Python:
`hf_sophia.trainer.picture.draw`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from hf_sophia.trainer.picture import History, draw, new_figure

STATE_NAME = "trainer_state.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Draw runs into one picture, and print its path.

    Args:
        argv: The runs and options; None: the process's own.

    Raises:
        SystemExit: A run can't be read or the picture can't be written (code 1), or the arguments
            are wrong (code 2).
    """
    parser = argparse.ArgumentParser(
        prog="hf-sophia plot", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="Output folder, checkpoint or trainer_state.json"
    )
    parser.add_argument(
        "--output",
        default="plot.png",
        metavar="FILE",
        help="The picture to write; its suffix says which kind (default %(default)s)",
    )
    parser.add_argument(
        "--unit", default="nats", help="What the losses are measured in (default %(default)s)"
    )
    options = parser.parse_args(argv)
    try:
        output = writable(Path(options.output))
        runs = [Path(run) for run in options.runs]
        histories = [read_history(state_file(run)) for run in runs]
        figure = draw(dict(zip(names_of(runs), histories, strict=True)), unit=options.unit)
        figure.savefig(output)
    # RuntimeError: a kind of picture may need a program that is not there.
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        sys.exit(f"hf-sophia plot: {error}")
    print(output)


def writable(path: Path) -> Path:
    """Return a picture's path if it can be written there.

    Args:
        path: Of the picture.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: It is a folder, matplotlib can't write its kind, or its folder does not exist.
    """
    if path.is_dir():
        raise ValueError(f"--output {str(path)!r} is a folder; name a file")
    kinds = sorted(new_figure().canvas.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise ValueError(
            f"matplotlib can't write --output {str(path)!r}, whose suffix is {path.suffix!r}; it"
            f" knows .{', .'.join(kinds)}"
        )
    if not path.parent.is_dir():
        raise ValueError(
            f"the folder of --output {str(path)!r} does not exist; make it: mkdir -p {path.parent}"
        )
    return path


def state_file(run: Path) -> Path:
    """Find the Trainer's state of a run.

    Args:
        run: Its output folder, a checkpoint or the file itself.

    Raises:
        FileNotFoundError: There is none; the message says what was looked for.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise FileNotFoundError(
            f"{str(run)!r} does not exist; name an output folder, a checkpoint or a {STATE_NAME}"
        )
    if (run / STATE_NAME).is_file():
        return run / STATE_NAME
    # Imported here, as transformers.trainer takes seconds.
    from hf_sophia.trainer.checkpoints import last_whole

    newest = last_whole(run)
    if newest is None:
        raise FileNotFoundError(
            f"{str(run)!r} holds neither a {STATE_NAME} nor a whole checkpoint; name a run's"
            " output_dir, or wait for its first checkpoint"
        )
    return newest / STATE_NAME


def read_history(file: Path) -> History:
    """Read what a run has logged.

    Args:
        file: Its `trainer_state.json`.

    Raises:
        OSError: It can't be read.
        ValueError: It is not a Trainer's state.
    """
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{str(file)!r} is not JSON ({error}); if it was cut off, name another checkpoint"
        ) from error
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ValueError(f"{str(file)!r} has no log_history; name a Trainer's {STATE_NAME}")
    return history


def names_of(runs: Sequence[Path]) -> list[str]:
    """Return the shortest names that tell runs apart: ends of their paths, less what all share.

    Args:
        runs: Output folders, checkpoints or files.

    Raises:
        ValueError: Two are the same.
    """
    paths = [run.resolve() for run in runs]
    paths = [path.parent if path.name == STATE_NAME else path for path in paths]
    for run, path in zip(runs, paths, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"{str(run)!r} is given twice; name each run once")
    # The checkpoints of all runs have the same names: the run's belongs to them.
    least = [2 if path.name.startswith("checkpoint-") else 1 for path in paths]
    names = [path.parts for path in paths]
    for more in range(max(map(len, names))):
        ends = [path.parts[-(n + more) :] for path, n in zip(paths, least, strict=True)]
        if len(set(ends)) == len(ends):
            names = ends
            break
    if len(names) > 1:
        for _ in ("start", "end"):
            names = [name[::-1] for name in _without_shared_start(names)]
    return ["/".join(name) for name in names]


def _without_shared_start(names: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    # A part of each stays, so that none is empty.
    columns = zip(*(name[:-1] for name in names), strict=False)
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, columns)))
    return [name[shared:] for name in names]


if __name__ == "__main__":
    main()
