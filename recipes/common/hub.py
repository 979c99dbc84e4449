"""Pushing the rows that a recipe prepared, with a card that says what they are."""

import shlex
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData
from transformers import TrainingArguments

from common.data import Corpus
from hf_sophia import HubPushError, SophiaTrainerMixin
from hf_sophia.trainer.hub import HUB_ERRORS, bounded, licence_of, reason

#: For licences that are not in the Hub's list, as PSF-2.0 is not.
_OTHER = "other"


def licence_on_the_hub(corpus: Corpus, args: TrainingArguments) -> str | None:
    """Return the licence that a data set of the Hub names, for the card of a model to push.

    Args:
        corpus: The rows.
        args: Say whether to push, and give the token.
    """
    if not args.push_to_hub or corpus.hub_id is None:
        return None
    try:
        with bounded(SophiaTrainerMixin.hub_timeout):
            return licence_of(corpus.hub_id, args.hub_token, kind="dataset")
    except HUB_ERRORS:
        return None  # said to be not known


def push_data(corpus: Corpus, args: TrainingArguments) -> str:
    """Push both splits, and a card where the data set has none.

    Args:
        corpus: What to push, and where to: its `publish_as`.
        args: Give the token, whether a new repository is private, and the folder of the run.

    Returns:
        The data set's address.

    Raises:
        HubPushError: The Hub did not take it; the rows are on the disk, and the message has the
            command that pushes them.
    """
    target = corpus.publish_as
    try:
        with bounded(SophiaTrainerMixin.hub_timeout):
            _push(corpus, target, args)
    except HUB_ERRORS as error:
        folder = Path(args.output_dir).absolute() / "data"
        for name, split in corpus.documents.items():
            split.to_parquet(folder / f"{name}.parquet")
        command = ["hf", "upload", "--type", "dataset", target, str(folder), "."]
        raise HubPushError(
            f"the data were not pushed to {target}: {reason(error)}. They are in {folder}; push"
            f" them with\n  {shlex.join(command)}"
        ) from None
    return f"https://huggingface.co/datasets/{target}"


def _push(corpus: Corpus, target: str, args: TrainingArguments) -> None:
    corpus.documents.push_to_hub(target, token=args.hub_token, private=args.hub_private_repo)
    card = DatasetCard.load(target, token=args.hub_token)  # has the columns and splits
    if card.text.strip():
        return  # somebody has written what it is
    facts = card.data.to_dict() | {"tags": ["hf_sophia"]}
    if corpus.licence:
        facts |= {"license": _OTHER, "license_name": corpus.licence}
    rows = ", ".join(f"{len(split):,} rows of `{name}`" for name, split in corpus.documents.items())
    text = (
        f"# {target.split('/')[-1]}\n\n{corpus.title}: {rows}.\n\n"
        f"- content before it was split: {corpus.content}\n"
        f"- licence: {corpus.licence or 'not known'}\n"
    )
    whole = DatasetCard(f"---\n{DatasetCardData(**facts).to_yaml()}\n---\n\n{text}")
    whole.push_to_hub(target, token=args.hub_token)
