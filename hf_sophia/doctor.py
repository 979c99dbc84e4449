"""Say what Sophia would do in a training script, without training.

    hf-sophia doctor run_clm.py --optim sophia --learning_rate 1e-3 ...
    hf-sophia doctor --steps 40 --adamw-lr 3e-4 train.py ...

The script runs until its Trainer would train. Some of its steps are then taken with a learning
rate of 0, and what they show is printed: the head, what a refresh counts and costs, the spectrum of
the Hessian, what a ladder of rho would clip, which rho and learning rate to try, and what would be
wrong or slow. Nothing of the script after that runs. From Python: `hf_sophia.diagnose(trainer)`.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from hf_sophia.run import run_script, script_path


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script up to its training, and examine that.

    Args:
        argv: Options, the script's path and its arguments; None: the process's own.

    Raises:
        SystemExit: Always; with code 1 where the run would fail or there is none, 2 for wrong
            arguments.
    """
    parser = argparse.ArgumentParser(
        prog="hf-sophia doctor", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="Steps to look at (default 20, or 2 / (1 - beta1) where that is more)",
    )
    parser.add_argument(
        "--adamw-lr",
        type=float,
        help="A learning rate that is good for AdamW here, to compare with",
    )
    parser.add_argument("script", help="The script that would train")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="The script's own arguments")
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 4:
        parser.error(f"--steps must be at least 4, got {options.steps}")
    if options.adamw_lr is not None and not 0 < options.adamw_lr < math.inf:
        parser.error(f"--adamw-lr must be > 0 and finite, got {options.adamw_lr}")
    path = script_path(options.script)

    from transformers.trainer import Trainer

    from hf_sophia.trainer.diagnosis import Finding
    from hf_sophia.trainer.examination import diagnose
    from hf_sophia.trainer.injection import inject
    from hf_sophia.trainer.report import report

    train = Trainer.train

    def examine(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        Trainer.train = train
        try:
            diagnosis = diagnose(trainer, options.steps, options.adamw_lr)
        except ValueError as error:
            print(f"hf-sophia doctor: {error}", file=sys.stderr)
            _end(1)
        if kwargs.get("resume_from_checkpoint") or args[:1] not in ((), (None,), (False,)):
            note = "the weights are those before the checkpoint that the script resumes from"
            diagnosis.findings.append(Finding("note", note))
        print(f"\n{report(diagnosis)}")
        _end(1 if diagnosis.failed else 0)

    inject()
    Trainer.train = examine
    try:
        run_script(path, [options.script, *options.arguments])
    except SystemExit as exit_:
        # A script may well end so, with 0; that it has not trained is the answer here.
        if exit_.code not in (None, 0):
            raise
    sys.exit("hf-sophia doctor: the script ended without training")


def _end(code: int) -> NoReturn:
    """End the process; a script's `except` or `finally` could save what never trained."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
