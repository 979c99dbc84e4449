"""Pushing the rows that a recipe prepared, with a card that says what they are."""

from huggingface_hub import DatasetCard, DatasetCardData
from transformers import TrainingArguments

from common.data import Corpus
from hf_sophia.trainer.hub import HUB_ERRORS, bounded, reason

#: For licences that are not in the Hub's list, as PSF-2.0 is not.
_OTHER = "other"

#: Seconds without a byte from the Hub after which its client gives up.
_TIMEOUT = 120.0


def push_data(corpus: Corpus, args: TrainingArguments) -> str:
    """Push both splits and a card.

    Args:
        corpus: What to push, and where to: its `publish_as`.
        args: Give the token, and whether a new repository is private.

    Returns:
        The data set's address.

    Raises:
        OSError: The Hub did not take it.
    """
    target = corpus.publish_as
    try:
        with bounded(_TIMEOUT):
            _push(corpus, target, args)
    except HUB_ERRORS as error:
        raise OSError(f"the data were not pushed to {target}: {reason(error)}") from error
    return f"https://huggingface.co/datasets/{target}"


def _push(corpus: Corpus, target: str, args: TrainingArguments) -> None:
    corpus.documents.push_to_hub(target, token=args.hub_token, private=args.hub_private_repo)
    card = DatasetCard.load(target, token=args.hub_token)  # has the columns and splits
    facts = card.data.to_dict() | {"tags": ["hf_sophia"]}
    if corpus.licence:
        facts |= {"license": _OTHER, "license_name": corpus.licence}
    rows = ", ".join(f"{len(split):,} rows of `{name}`" for name, split in corpus.documents.items())
    text = (
        f"# {target.split('/')[-1]}\n\n{corpus.title}: {rows}.\n\n"
        f"- content before it was split: sha256 `{corpus.digest}`\n"
        f"- licence: {corpus.licence or 'not known'}\n"
    )
    whole = DatasetCard(f"---\n{DatasetCardData(**facts).to_yaml()}\n---\n\n{text}")
    whole.push_to_hub(target, token=args.hub_token)
