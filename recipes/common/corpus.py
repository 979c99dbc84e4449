"""Text to train on: the embedded corpus, local files or a data set of the Hub."""

from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from common.standard_library import LICENCE, write_standard_library

#: The `datasets` builder of each kind of file.
_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class CorpusArguments:
    """Where the text comes from; with none of these, Python's own standard library."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set of the Hub, or a local data set folder"}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of that data set"}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Local .txt, .jsonl, .json or .parquet file"}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Local file to evaluate on, of the same kind"}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text"})
    validation_percent: float = field(
        default=5.0,
        metadata={"help": "Share of blocks, at the end, to evaluate on where no split is given"},
    )
    corpus_dir: str = field(
        default="runs/corpus", metadata={"help": "Where the embedded corpus is written"}
    )

    def __post_init__(self) -> None:
        """Check what can be checked before anything is read."""
        if self.dataset_name and self.train_file:
            raise ValueError(
                f"both dataset_name={self.dataset_name!r} and train_file={self.train_file!r} are"
                " given; choose one"
            )
        if self.validation_file and not self.train_file:
            raise ValueError("validation_file needs train_file")
        if not 0.0 < self.validation_percent < 100.0:
            raise ValueError(
                f"validation_percent must lie between 0 and 100, got {self.validation_percent}"
            )


@dataclass(frozen=True)
class Corpus:
    """Documents and what they are.

    Args:
        documents: Splits `train` and perhaps `validation`, each with one column `text`.
        name: What to call it.
        digest: A hash of the content, to tell one corpus from another.
        licence: The text's licence, where it is known.
    """

    documents: DatasetDict
    name: str
    digest: str
    licence: str | None = None


def load_corpus(arguments: CorpusArguments) -> Corpus:
    """Load the text that the arguments ask for.

    Args:
        arguments: Where it comes from.

    Returns:
        The corpus; blank documents are left out.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file's kind is unknown or its content broken, the text column is missing, or
            there is no text.
    """
    if arguments.dataset_name:
        documents = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
        name, licence = arguments.dataset_name, None
        digest = "-".join(split._fingerprint for split in documents.values())
    else:
        if arguments.train_file:
            files = {"train": Path(arguments.train_file)}
            if arguments.validation_file:
                files["validation"] = Path(arguments.validation_file)
            name, licence = arguments.train_file, None
        else:
            files = write_standard_library(Path(arguments.corpus_dir))
            name, licence = "Python standard library", LICENCE
        documents = _load_files(files)
        digest = _hash_files(files)
    kept = {
        split: _text_only(documents[split], arguments.text_column, name)
        for split in ("train", "validation")
        if split in documents
    }
    if "train" not in kept:
        raise ValueError(f"{name} has no split 'train', only {sorted(documents)}")
    return Corpus(DatasetDict(kept), name, digest, licence)


def _load_files(files: dict[str, Path]) -> DatasetDict:
    for path in files.values():
        if not path.is_file():
            raise FileNotFoundError(f"data file {str(path)!r} does not exist")
        if path.suffix not in _BUILDERS:
            raise ValueError(
                f"data file {str(path)!r} is of unknown kind {path.suffix!r}; known:"
                f" {', '.join(_BUILDERS)}"
            )
        if path.stat().st_size == 0:
            raise ValueError(f"data file {str(path)!r} is empty")
    kinds = {_BUILDERS[path.suffix] for path in files.values()}
    if len(kinds) > 1:
        raise ValueError(f"train_file and validation_file are of different kinds: {sorted(kinds)}")
    kind = kinds.pop()
    # One document a file: lines of a text are not texts.
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    try:
        return load_dataset(kind, data_files={k: str(v) for k, v in files.items()}, **options)
    except DatasetGenerationError as error:
        names = " or ".join(repr(str(path)) for path in files.values())
        raise ValueError(f"{names} can't be read as {kind}: {error.__cause__ or error}") from error


def _hash_files(files: dict[str, Path]) -> str:
    digest = sha256()
    for path in files.values():
        digest.update(sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _text_only(documents: Dataset, column: str, name: str) -> Dataset:
    if column not in documents.column_names:
        raise ValueError(
            f"{name} has no column {column!r}, only {documents.column_names}; name it with"
            " --text_column"
        )
    kind = documents.features[column].dtype
    if kind not in ("string", "large_string"):
        raise ValueError(f"column {column!r} of {name} holds {kind}, not text")
    documents = documents.select_columns([column])
    if column != "text":
        documents = documents.rename_column(column, "text")
    documents = documents.filter(lambda text: bool(text and text.strip()), input_columns="text")
    if len(documents) == 0:
        raise ValueError(f"{name} holds no text: every document is blank")
    return documents
