"""Text to pretrain on: the embedded corpus, local files or a data set of the Hub."""

from dataclasses import dataclass, field

from common.data import Corpus, DataArguments, load_data
from common.standard_library import write_standard_library


@dataclass
class CorpusArguments(DataArguments):
    """Where the text comes from; with none of these, Python's own standard library."""

    text_column: str = field(default="text", metadata={"help": "Column that holds the text"})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read text while training instead of preparing all of it before"},
    )
    validation_documents: int = field(
        default=4000,
        metadata={"help": "Documents to hold out of a stream that has no validation split"},
    )

    def __post_init__(self) -> None:
        """Check what can be checked before anything is read."""
        super().__post_init__()
        if self.validation_documents < 1:
            raise ValueError(
                f"validation_documents must be at least 1, got {self.validation_documents}"
            )


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
    return load_data(
        arguments,
        write_standard_library,
        {"text": arguments.text_column},
        streamed_validation=arguments.validation_documents if arguments.streaming else None,
    )
