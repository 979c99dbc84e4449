"""What every recipe does around its model: start, train, evaluate, save, report."""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from common.arguments import one_line_errors, parse_arguments
from common.data import Corpus
from common.hub import licence_on_the_hub, push_data
from hf_sophia import HubPushError, SophiaTrainerMixin, TrainingCorpus
from hf_sophia.trainer.checkpoints import last_whole
from hf_sophia.trainer.hub import HUB_PREFIX, bounded, download_checkpoint


@dataclass(frozen=True)
class Run:
    """A training run that has not begun.

    Args:
        trainer: Ready to train.
        resume: The checkpoint to go on from, or None.
        corpus: Where the data came from.
        headline: Says in a line what an evaluation's metrics mean.
        unit: What the loss is measured in.
    """

    trainer: SophiaTrainerMixin
    resume: str | None
    corpus: Corpus
    headline: Callable[[dict[str, float]], str]
    unit: str


def start(types: Sequence[type], argv: Sequence[str] | None, config: Path) -> tuple[Any, ...]:
    """Parse the command line, set the seed and find the checkpoint to resume from.

    Args:
        types: The dataclasses to fill, `TrainingArguments` or a subclass last.
        argv: The command line without the program's name; None: the process's own.
        config: The YAML file that is read where `--config` is missing.

    Returns:
        One instance of each type, then the checkpoint's path or None.

    Raises:
        SystemExit: A value or option is wrong; the message says which.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_sophia").setLevel(logging.INFO)
    parsed = parse_arguments(types, argv, config)
    args = parsed[-1]
    set_seed(args.seed)
    with one_line_errors():
        check_length(args, sys.argv[1:] if argv is None else argv)
        return *parsed, checkpoint_of(args)


def ready(prepare: Callable[[Sequence[str] | None], Run], argv: Sequence[str] | None) -> Run:
    """Prepare a run; a repository that it can't push to ends the program in one line.

    Args:
        prepare: The recipe's own.
        argv: The command line without the program's name; None: the process's own.

    Raises:
        SystemExit: The Hub refuses, or can't be reached.
    """
    try:
        return prepare(argv)
    except HubPushError as error:
        raise SystemExit(f"error: {error}") from None


def check_length(args: TrainingArguments, argv: Sequence[str]) -> None:
    """Refuse epochs that max_steps would silently overrule.

    Raises:
        ValueError: Both are in force.
    """
    named = {piece.split("=")[0] for piece in argv}
    changed = args.num_train_epochs != TrainingArguments.num_train_epochs
    if (changed or "--num_train_epochs" in named) and args.max_steps > 0:
        raise ValueError(
            f"max_steps={args.max_steps} wins over num_train_epochs; set --max_steps -1"
        )


def checkpoint_of(args: TrainingArguments) -> str | None:
    """Return the checkpoint to resume from: a path, for `last` the newest whole one, or `hub:...`.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It is not on the Hub.
    """
    wanted = args.resume_from_checkpoint or None
    if wanted is not None and wanted.startswith(HUB_PREFIX):
        # Here and not by the Trainer, so that what is not there is known before data are prepared.
        with args.main_process_first(), bounded(SophiaTrainerMixin.hub_timeout):
            return str(download_checkpoint(wanted, args.hub_token))
    if wanted == "last":
        newest = last_whole(Path(args.output_dir))
        if newest is None:
            raise FileNotFoundError(
                f"there is no whole checkpoint in {args.output_dir!r} to resume from"
            )
        return str(newest)
    if wanted is not None and not (Path(wanted) / TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {wanted!r}: no {TRAINER_STATE_NAME}")
    return wanted


def carry_out(run: Run) -> dict[str, float]:
    """Train, evaluate, write model, state, the corpus's record and loss curve, and report.

    Args:
        run: The run.

    Returns:
        The evaluation's metrics.

    Raises:
        SystemExit: The optimizer's options are wrong.
    """
    trainer, corpus = run.trainer, run.corpus
    licence = corpus.licence or licence_on_the_hub(corpus, trainer.args)
    trainer.corpus = TrainingCorpus(corpus.title, corpus.content, licence, corpus.hub_id)
    trainer.loss_unit = run.unit
    with one_line_errors():
        trainer.create_optimizer()  # its options are checked here
    trainer.train(resume_from_checkpoint=run.resume)
    metrics = trainer.evaluate()
    trainer.save_model(_internal_call=True)  # pushing comes last, with all that belongs to it
    trainer.save_state()
    output = Path(trainer.args.output_dir)
    record = {
        "name": corpus.title,
        corpus.digest_kind: corpus.digest,
        "licence": licence,
    }
    (output / "corpus.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    picture = trainer.draw_run()
    print(f"\n{run.headline(metrics)}")
    print(f"model         {trainer.args.output_dir}")
    print(f"loss curve    {picture or 'not drawn: pip install matplotlib'}")
    publish(run)
    return metrics


def publish(run: Run) -> None:
    """Push model and data to the Hub, as far as that was asked for.

    Args:
        run: The run, at its end.

    Raises:
        SystemExit: The Hub did not take them; the message says how to push them by hand.
    """
    trainer, corpus = run.trainer, run.corpus
    faults = []
    if trainer.args.push_to_hub:
        try:
            trainer.push_to_hub()
        except HubPushError as error:
            faults.append(str(error))
    if corpus.publish_as and trainer.is_world_process_zero():
        try:
            print(f"data set      {push_data(corpus, trainer.args)}")
        except HubPushError as error:
            faults.append(str(error))
    if faults:
        raise SystemExit("error: " + "\nerror: ".join(faults))


def language_model_headline(metrics: dict[str, float]) -> str:
    """Say in a line what the evaluation of a language model gave."""
    bits = metrics.get("eval_bits_per_byte")
    return (
        f"evaluation loss {metrics['eval_loss']:.4f} nats per token"
        f" (perplexity {metrics['eval_perplexity']:.1f},"
        + (f" {bits:.3f} bits per byte," if bits is not None else "")
        + f" {metrics['eval_accuracy']:.1%} of tokens right)"
    )
