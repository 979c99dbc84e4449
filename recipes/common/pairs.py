"""Pairs of texts to learn a mapping from: source and target."""

from dataclasses import dataclass, field

from common.data import Corpus, DataArguments, hold_out, load_data
from common.functions import write_summaries


@dataclass
class PairArguments(DataArguments):
    """Where the pairs come from; without a name or file, functions of Python's library."""

    source_column: str = field(default="source", metadata={"help": "Column of what is given"})
    target_column: str = field(default="summary", metadata={"help": "Column of what is wanted"})
    max_source_length: int = field(
        default=96, metadata={"help": "Tokens of the source, with what follows it; cut at the end"}
    )
    max_target_length: int = field(
        default=32, metadata={"help": "Tokens of the target and its end; cut at the end"}
    )

    def __post_init__(self) -> None:
        """Check what can be checked before anything is read."""
        super().__post_init__()
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")


def load_pairs(arguments: PairArguments, seed: int) -> Corpus:
    """Load the pairs that the arguments ask for.

    Args:
        arguments: Where they come from.
        seed: Chooses what is held out where there is no validation split.

    Returns:
        Splits `train` and `validation` with columns `source` and `target`.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: The data is broken, a column is missing, or there is too little.
    """
    columns = {"source": arguments.source_column, "target": arguments.target_column}
    corpus = load_data(arguments, write_summaries, columns)
    return hold_out(corpus, arguments.validation_percent, seed)
