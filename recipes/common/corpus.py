"""Text to pretrain on: the embedded corpus, local files or a data set of the Hub."""

from dataclasses import dataclass, field

from common.data import Corpus, DataArguments, load_data
from common.standard_library import write_standard_library


@dataclass
class CorpusArguments(DataArguments):
    """Where the text comes from; with none of these, Python's own standard library."""

    text_column: str = field(default="text", metadata={"help": "Column that holds the text"})


def load_corpus(arguments: CorpusArguments) -> Corpus:
    """Load the text that the arguments ask for.

    Args:
        arguments: Where it comes from.

    Returns:
        Documents in one column `text`; blank ones are left out.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file's kind is unknown or its content broken, the text column is missing, or
            there is no text.
    """
    return load_data(arguments, write_standard_library, {"text": arguments.text_column})
