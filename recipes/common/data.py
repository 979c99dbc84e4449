"""Rows to train on: embedded data, local files or a data set of the Hub."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from common.standard_library import LICENCE

#: The `datasets` builder of each kind of file.
_BUILDERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}


@dataclass
class DataArguments:
    """Where the data comes from; with none of these, from Python's own standard library."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set of the Hub, or a local data set folder"}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of that data set"}
    )
    train_file: str | None = field(
        default=None, metadata={"help": f"Local file of one of {', '.join(_BUILDERS)}"}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Local file to evaluate on, of the same kind"}
    )
    validation_percent: float = field(
        default=5.0,
        metadata={"help": "Share to evaluate on where there is no validation split"},
    )
    corpus_dir: str = field(
        default="runs/corpus", metadata={"help": "Where the embedded data is written"}
    )
    hub_dataset_id: str | None = field(
        default=None,
        metadata={"help": "Push the rows to this data set of the Hub (user/name) after training"},
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
    """Documents or other rows, and what they are.

    Args:
        documents: Splits `train` and perhaps `validation`; both where they are streams.
        name: What to call it.
        digest: Of the content, to tell one corpus from another.
        digest_kind: What the digest is: `sha256`, a `fingerprint` or a `version`.
        licence: The text's licence, where it is known.
        hub_id: Its name on the Hub, where it came from there.
        publish_as: The data set of the Hub that it is to be pushed to.
    """

    documents: DatasetDict | IterableDatasetDict
    name: str
    digest: str
    licence: str | None = None
    digest_kind: str = "sha256"
    hub_id: str | None = None
    publish_as: str | None = None

    @property
    def content(self) -> str:
        """What its content is known by."""
        return f"{self.digest_kind} {self.digest}"

    @property
    def title(self) -> str:
        """Its name as others may read it: of a file without the folders of this machine."""
        return self.name if self.hub_id else Path(self.name).name

    def __str__(self) -> str:
        """Say what it is and how large."""
        train, validation = self.documents["train"], self.documents["validation"]
        return f"{self.name}: {len(train):,} rows to train on, {len(validation):,} to evaluate on"

    def encode(self, encode: Callable[[dict[str, list[Any]]], dict[str, list[Any]]]) -> DatasetDict:
        """Turn the texts of both splits into tokens, a batch of rows at a time.

        Args:
            encode: Takes the columns and returns new ones, which replace all but `labels`.

        Returns:
            The splits.
        """
        texts = [name for name in self.documents["train"].column_names if name != "labels"]
        return self.documents.map(encode, batched=True, remove_columns=texts, desc="Tokenizing")


def load_data(
    arguments: DataArguments,
    embedded: Callable[[Path], dict[str, Path]],
    texts: dict[str, str],
    others: dict[str, str] | None = None,
    streamed_validation: int | None = None,
) -> Corpus:
    """Load the rows that the arguments ask for.

    Args:
        arguments: Where they come from.
        embedded: Writes the embedded data into a folder and returns the path of each split.
        texts: The columns of text to keep: our name, and the data's own. `--<our name>_column` is
            the option that names it.
        others: Further columns, of any kind.
        streamed_validation: Read rows as a stream, and hold this many of the first ones out where
            there is no validation split; None: prepare all of them first.

    Returns:
        The rows, with the columns under our names; rows with a blank text are left out.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file's kind is unknown or its content broken, a column is missing or holds no
            text, or there is no split to train on.
    """
    streaming = streamed_validation is not None
    hub_id = None
    if streaming and arguments.hub_dataset_id:
        raise ValueError(
            f"hub_dataset_id={arguments.hub_dataset_id!r}: rows that are streamed can't be pushed"
        )
    if arguments.dataset_name:
        name, licence = arguments.dataset_name, None
        hub_id = None if Path(name).is_dir() else name
        rows = load_dataset(name, arguments.dataset_config_name, streaming=streaming)
        if streaming:
            # What has not been read has no fingerprint; the builder's version is what is known.
            digest, kind = str(rows["train"].info.version) if "train" in rows else "", "version"
        else:
            digest = "-".join(split._fingerprint for split in rows.values())
            kind = "fingerprint"
    else:
        if arguments.train_file:
            files = {"train": Path(arguments.train_file)}
            if arguments.validation_file:
                files["validation"] = Path(arguments.validation_file)
            name, licence = arguments.train_file, None
        else:
            files = embedded(Path(arguments.corpus_dir))
            name, licence = "Python standard library", LICENCE
        rows = _load_files(files, streaming)
        digest, kind = _hash_files(files), "sha256"
    if "train" not in rows:
        raise ValueError(f"{name} has no split 'train', only {sorted(rows)}")
    kept = {
        split: _select(rows[split], texts, others or {}, name)
        for split in ("train", "validation")
        if split in rows
    }
    if not streaming:
        published = arguments.hub_dataset_id
        return Corpus(DatasetDict(kept), name, digest, licence, kind, hub_id, published)
    if "validation" not in kept:
        rest = kept["train"].skip(streamed_validation)
        kept = {"train": rest, "validation": kept["train"].take(streamed_validation)}
    return Corpus(IterableDatasetDict(kept), name, digest, licence, kind, hub_id)


def hold_out(corpus: Corpus, percent: float, seed: int) -> Corpus:
    """Hold out random rows of `train` where there is no `validation`.

    Args:
        corpus: Rows that do not depend on their neighbours.
        percent: Share to hold out, at least one row.
        seed: Chooses them.

    Returns:
        The corpus with both splits.

    Raises:
        ValueError: There is only one row.
    """
    if "validation" in corpus.documents:
        return corpus
    train = corpus.documents["train"]
    if len(train) < 2:
        raise ValueError(f"{corpus.name} has a single row: none is left to evaluate on")
    held_out = max(1, round(len(train) * percent / 100))
    parts = train.train_test_split(test_size=held_out, seed=seed)
    return replace(corpus, documents=DatasetDict(train=parts["train"], validation=parts["test"]))


def _load_files(files: dict[str, Path], streaming: bool) -> DatasetDict | IterableDatasetDict:
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
        paths = {split: str(path) for split, path in files.items()}
        return load_dataset(kind, data_files=paths, streaming=streaming, **options)
    except DatasetGenerationError as error:
        names = " or ".join(repr(str(path)) for path in files.values())
        raise ValueError(f"{names} can't be read as {kind}: {error.__cause__ or error}") from error


def _hash_files(files: dict[str, Path]) -> str:
    """Return a file's sha256; of several, that of their digests one after the other."""
    digests = []
    for path in files.values():
        with path.open("rb") as file:
            digests.append(file_digest(file, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def _select(
    rows: Dataset | IterableDataset, texts: dict[str, str], others: dict[str, str], name: str
) -> Dataset | IterableDataset:
    columns = texts | others
    if isinstance(rows, IterableDataset) and rows.column_names is None:
        rows = rows._resolve_features()  # looks at the first rows
    for own, column in columns.items():
        if column not in rows.column_names:
            raise ValueError(
                f"{name} has no column {column!r}, only {rows.column_names}; name it with"
                f" --{own}_column"
            )
    for column in texts.values():
        feature = rows.features[column]
        kind = getattr(feature, "dtype", feature)
        if kind not in ("string", "large_string"):
            raise ValueError(f"column {column!r} of {name} holds {kind}, not text")
    rows = rows.select_columns([*columns.values()])
    rows = rows.rename_columns({column: own for own, column in columns.items() if own != column})
    rows = rows.filter(
        lambda *values: all(value and value.strip() for value in values), input_columns=[*texts]
    )
    if next(iter(rows), None) is None:
        raise ValueError(f"{name} holds no text: every document is blank")
    return rows
