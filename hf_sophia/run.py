"""Run a script that uses the HF Trainer with `--optim sophia`, without changing the script.

    python -m hf_sophia.run train.py --optim sophia --learning_rate 1e-3 ...
    hf-sophia run train.py --optim sophia ...
    torchrun --nproc_per_node 2 -m hf_sophia.run train.py ...
    accelerate launch -m hf_sophia.run train.py ...

Every Trainer that the script makes, of whatever class, refreshes Sophia's Hessian, and `sophia`,
`adam` and `radam` are names of optimizers. Arguments, `__main__`, `sys.argv`, `sys.path[0]`, exit
code and tracebacks are those of `python train.py ...`. Libraries read some environment variables
when they are imported, which happens before the script starts: set those outside (HF_HOME, for
instance), not in the script's first lines.
"""

import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence
from typing import NoReturn

USAGE = "usage: python -m hf_sophia.run SCRIPT [ARGUMENT ...]"
_COMMANDS = """usage: hf-sophia run SCRIPT [ARGUMENT ...]
       hf-sophia doctor SCRIPT [ARGUMENT ...]
       hf-sophia plot RUN [RUN ...] [--output FILE]"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script as `python SCRIPT ARGUMENT ...` would, with Sophia in every Trainer.

    Args:
        argv: The script's path and its arguments; None: the process's own.

    Raises:
        SystemExit: There is no script to run (code 2, as of Python itself).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{USAGE}\n\n{__doc__}")
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        _refuse(f"a script's path comes first, got {argv[0] if argv else 'nothing'!r}")
    path = script_path(argv[0])

    from hf_sophia.trainer.injection import inject

    inject()
    run_script(path, argv)


def script_path(script: str) -> str:
    """Return a script's absolute path.

    Args:
        script: Its path.

    Raises:
        SystemExit: There is no such file (code 2, as of Python itself).
    """
    path = os.path.abspath(script)
    if not os.path.isfile(path):
        _refuse(f"can't open file {path!r}: no such file")
    return path


def command(argv: Sequence[str] | None = None) -> None:
    """Run the console command `hf-sophia`, whose subcommands are `run`, `doctor` and `plot`.

    Args:
        argv: The command line without the program's name; None: the process's own.

    Raises:
        SystemExit: The subcommand is missing or unknown, or as `main`, `doctor.main` and
            `plot.main`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{_COMMANDS}\n\n{__doc__}")
        raise SystemExit(0)
    if argv[:1] == ["doctor"]:
        from hf_sophia import doctor

        return doctor.main(argv[1:])
    if argv[:1] == ["plot"]:
        from hf_sophia import plot

        return plot.main(argv[1:])
    if argv[:1] != ["run"]:
        _refuse(f"unknown command {argv[0]!r}" if argv else "a command is missing", _COMMANDS)
    return main(argv[1:])


def _refuse(message: str, usage: str = USAGE) -> NoReturn:
    print(f"{usage}\nhf_sophia.run: {message}", file=sys.stderr)
    raise SystemExit(2)


def run_script(path: str, argv: list[str]) -> None:
    """Make a script `__main__` and execute it; its errors show its own frames only.

    Args:
        path: The script's path.
        argv: What the script shall see as `sys.argv`.
    """
    sys.argv[:] = argv
    # What `-m` and console scripts have put there is not what a script's run would have.
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    module = types.ModuleType("__main__")
    module.__dict__.update(
        __file__=path,
        __loader__=loader,
        __builtins__=sys.modules["builtins"],
        __cached__=None,
        __annotations__={},
    )
    sys.modules["__main__"] = module
    show = sys.excepthook

    def show_the_scripts_frames(kind: type, error: BaseException, trace: object) -> None:
        # None of them where the script could not even be compiled.
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename != path:
            frames = frames.tb_next
        show(kind, error.with_traceback(frames), frames)

    sys.excepthook = show_the_scripts_frames
    exec(loader.source_to_code(loader.get_data(path), path), module.__dict__)


if __name__ == "__main__":
    main()
