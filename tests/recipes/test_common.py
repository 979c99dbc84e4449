"""The parts of the recipes: arguments, corpus, tokenizer and blocks, metric."""

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

import evaluate
import pytest
import torch
from common import standard_library
from common.arguments import parse_arguments
from common.corpus import CorpusArguments, load_corpus
from common.data import Corpus, hold_out
from common.evaluation import LanguageModelEvaluation
from common.runs import checkpoint_of
from common.tokenization import END_OF_TEXT, make_blocks, train_tokenizer
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models
from transformers import EvalPrediction, PreTrainedTokenizerFast, TrainingArguments

from hf_sophia.metrics import metric_path

TEXTS = [f"Text number {i}: naïve café, tabs\tand\nnew lines {i * i}." for i in range(50)]


# Arguments


@dataclass
class Options:
    rate: float = field(default=1.0)
    steps: int = field(default=5)
    name: str | None = field(default=None)
    flag: bool = field(default=False)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError("steps must not be negative")


def parse(tmp_path: Path, config: str, *argv: str) -> Options:
    path = tmp_path / "config.yaml"
    path.write_text(config)
    (options,) = parse_arguments((Options,), ["--config", str(path), *argv], Path("missing"))
    return options


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path) -> None:
    options = parse(tmp_path, "rate: 1e-3\nname: file\nflag: true\n", "--name", "line")
    assert options == Options(rate=1e-3, steps=5, name="line", flag=True)
    assert parse(tmp_path, "") == Options()
    # YAML would read `no` as False, 1e-3 as text and 12 as a number.
    assert parse(tmp_path, "name: no\nrate: null").name == "no"
    assert parse(tmp_path, "name: 12").name == "12"
    assert json.loads(parse(tmp_path, "name: {rate: 1e-2, on: 2024-01-01}").name)["rate"] == 0.01
    assert parse(tmp_path, "<<: {steps: 3}").steps == 3
    default = tmp_path / "config.yaml"
    default.write_text("steps: 7\n")
    assert parse_arguments((Options,), [], default) == (Options(steps=7),)


@pytest.mark.parametrize(
    ("config", "argv", "message"),
    [
        ("stepps: 3\n", [], "unknown options stepps"),
        ("steps: [1\n", [], "not YAML"),
        ("- steps\n", [], "wanted 'option: value' lines"),
        ("rate: fast\n", [], "invalid float value: 'fast'"),
        ("steps: 3.5\n", [], "invalid int value: '3.5'"),
        ("rate: [1, 2]\n", [], "2"),
        ("name: []\n", [], "name is an empty list"),
        ("steps: -1\n", [], "error: steps must not be negative"),
        ("", ["--conf", "nowhere.yaml"], "--conf"),
        ("", ["--stepps", "3"], "--stepps"),
        ("", ["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
)
def test_wrong_configurations_are_named(config, argv, message, tmp_path, capsys) -> None:
    with pytest.raises((SystemExit, ValueError)) as caught:
        parse(tmp_path, config, *argv)
    assert message in capsys.readouterr().err + str(caught.value)


# The embedded corpus


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> dict[str, list[dict]]:
    paths = standard_library.write_standard_library(tmp_path_factory.mktemp("corpus"))
    return {
        split: [json.loads(line) for line in path.read_text().splitlines()]
        for split, path in paths.items()
    }


def test_the_standard_library_is_split_by_package_without_overlap(library) -> None:
    packages = {
        split: {row["path"].split("/")[0].removesuffix(".py") for row in rows}
        for split, rows in library.items()
    }
    assert not packages["train"] & packages["validation"]
    sizes = {split: sum(len(row["text"]) for row in rows) for split, rows in library.items()}
    assert sizes["train"] > 5e6
    assert 1e5 < sizes["validation"] < 0.15 * sizes["train"]
    texts = [row["text"] for rows in library.values() for row in rows]
    assert len(set(texts)) == len(texts)

    def shingles(rows):
        for row in rows:
            words = row["text"].split()
            yield from (" ".join(words[i : i + 8]) for i in range(len(words) - 7))

    held_out = set(shingles(library["validation"]))
    shared = held_out & set(shingles(library["train"]))
    assert len(shared) < 0.02 * len(held_out)


def test_the_files_are_only_written_when_their_content_changes(tmp_path, monkeypatch) -> None:
    documents = {"train": {"a.py": "x"}, "validation": {"b.py": "y"}}
    monkeypatch.setattr(standard_library, "_splits", lambda: documents)
    paths = standard_library.write_standard_library(tmp_path)
    times = {split: path.stat().st_mtime_ns for split, path in paths.items()}
    standard_library.write_standard_library(tmp_path)
    assert {split: path.stat().st_mtime_ns for split, path in paths.items()} == times
    documents["train"]["a.py"] = "changed"
    standard_library.write_standard_library(tmp_path)
    assert paths["train"].stat().st_mtime_ns != times["train"]
    assert paths["validation"].stat().st_mtime_ns == times["validation"]


def test_runs_that_start_together_never_read_half_a_file(tmp_path) -> None:
    contents = [{"train": [{"text": letter * 1_000_000}]} for letter in "ab"]
    (path,) = standard_library.write_splits(tmp_path, contents[0]).values()
    whole = {path.stat().st_size}
    done = Event()

    def write_again() -> None:
        for turn in range(1, 30):
            standard_library.write_splits(tmp_path, contents[turn % 2])
        done.set()

    writer = Thread(target=write_again)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(len(path.read_bytes()))
    writer.join()
    assert seen == whole
    assert list(tmp_path.iterdir()) == [path]


def test_near_duplicates_of_training_text_are_not_held_out(monkeypatch) -> None:
    text = " ".join(f"word{i}" for i in range(200))
    other = " ".join(f"other{i}" for i in range(200))
    documents = [("a.py", text), ("b.py", text + " changed"), ("c.py", other), ("d.py", other)]
    monkeypatch.setattr(standard_library, "_documents", lambda root: documents)
    held_out = {"b.py", "c.py", "d.py"}
    monkeypatch.setattr(
        standard_library, "_split_of", lambda p: "validation" if p in held_out else "train"
    )
    assert standard_library._splits() == {"train": {"a.py": text}, "validation": {"c.py": other}}
    monkeypatch.setattr(standard_library, "_documents", lambda root: [])
    with pytest.raises(FileNotFoundError, match="--train_file"):
        standard_library._splits()


# Files and data sets


def write(path: Path, texts: list[str], column: str = "text") -> str:
    if path.suffix == ".parquet":
        Dataset.from_dict({column: texts}).to_parquet(path)
    elif path.suffix == ".csv":
        Dataset.from_dict({column: texts}).to_csv(path)
    elif path.suffix == ".txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps({column: t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_local_files_load(suffix, tmp_path) -> None:
    train = write(tmp_path / f"train{suffix}", [*TEXTS, "", "  \n"], "body")
    held_out = write(tmp_path / f"held_out{suffix}", TEXTS[:3], "body")
    arguments = CorpusArguments(train_file=train, validation_file=held_out, text_column="body")
    corpus = load_corpus(arguments)
    assert corpus.documents["train"]["text"] == TEXTS
    assert corpus.documents["validation"]["text"] == TEXTS[:3]
    assert corpus.documents["train"].column_names == ["text"]
    assert load_corpus(arguments).digest == corpus.digest
    write(Path(held_out), TEXTS[:4], "body")
    assert load_corpus(arguments).digest != corpus.digest


def test_a_text_file_is_one_document(tmp_path) -> None:
    file = write(tmp_path / "book.txt", TEXTS)
    corpus = load_corpus(CorpusArguments(train_file=file))
    assert [text.strip() for text in corpus.documents["train"]["text"]] == ["\n".join(TEXTS)]


def test_a_data_set_folder_loads_by_name(tmp_path) -> None:
    write(tmp_path / "train.jsonl", TEXTS)
    write(tmp_path / "validation.jsonl", TEXTS[:5])
    corpus = load_corpus(CorpusArguments(dataset_name=str(tmp_path)))
    assert {split: len(rows) for split, rows in corpus.documents.items()} == {
        "train": 50,
        "validation": 5,
    }
    assert corpus.digest


def test_bad_corpora_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="'nowhere.txt' does not exist"):
        load_corpus(CorpusArguments(train_file="nowhere.txt"))
    strange = tmp_path / "data.docx"
    strange.write_text("x")
    with pytest.raises(ValueError, match="unknown kind '.docx'; known: .txt, .json"):
        load_corpus(CorpusArguments(train_file=str(strange)))
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty.txt' is empty"):
        load_corpus(CorpusArguments(train_file=str(empty)))
    blank = write(tmp_path / "blank.jsonl", ["", " \n"])
    with pytest.raises(ValueError, match="holds no text: every document is blank"):
        load_corpus(CorpusArguments(train_file=blank))
    other = write(tmp_path / "other.jsonl", TEXTS, "body")
    with pytest.raises(ValueError, match=r"no column 'text', only \['body'\].*--text_column"):
        load_corpus(CorpusArguments(train_file=other))
    with pytest.raises(ValueError, match="choose one"):
        CorpusArguments(train_file="a.txt", dataset_name="b")
    with pytest.raises(ValueError, match="validation_file needs train_file"):
        CorpusArguments(validation_file="a.txt")
    with pytest.raises(ValueError, match="got 100"):
        CorpusArguments(validation_percent=100)
    other_name = CorpusArguments(train_file=write(tmp_path / "n.jsonl", [1], "n"), text_column="n")
    with pytest.raises(ValueError, match="column 'n' of .* holds int64, not text"):
        load_corpus(other_name)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{broken\n')
    with pytest.raises(ValueError, match="broken.jsonl' can't be read as json"):
        load_corpus(CorpusArguments(train_file=str(broken)))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt' can't be read as text.*utf-8"):
        load_corpus(CorpusArguments(train_file=str(latin)))
    numbers = write(tmp_path / "numbers.jsonl", [1, 2])
    with pytest.raises(ValueError, match="column 'text' of .* holds int64, not text"):
        load_corpus(CorpusArguments(train_file=numbers))
    good = write(tmp_path / "good.parquet", TEXTS)
    with pytest.raises(ValueError, match=r"different kinds: \['json', 'parquet'\]"):
        load_corpus(CorpusArguments(train_file=good, validation_file=blank))


def test_rows_are_held_out_at_random_but_the_same_for_a_seed() -> None:
    rows = Dataset.from_dict({"text": [str(i) for i in range(100)]})
    corpus = Corpus(DatasetDict(train=rows), "rows", "digest")
    parts = hold_out(corpus, 20, seed=1).documents
    assert {split: len(part) for split, part in parts.items()} == {"train": 80, "validation": 20}
    assert sorted([*parts["train"]["text"], *parts["validation"]["text"]]) == sorted(rows["text"])
    held_out = list(parts["validation"]["text"])
    assert held_out != rows["text"][-20:]
    assert list(hold_out(corpus, 20, seed=1).documents["validation"]["text"]) == held_out
    assert list(hold_out(corpus, 20, seed=2).documents["validation"]["text"]) != held_out
    whole = Corpus(parts, "rows", "digest")
    assert hold_out(whole, 50, seed=1) is whole


# Tokens and blocks


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Dataset.from_dict({"text": TEXTS}), vocab_size=300)


def test_the_tokenizer_is_byte_level_and_lossless(tokenizer, tmp_path) -> None:
    assert len(tokenizer) == 300
    for text in (*TEXTS, "日本語 🙂 \x00 unseen"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
    with pytest.raises(ValueError, match="at least 257.*got 100"):
        train_tokenizer(Dataset.from_dict({"text": TEXTS}), vocab_size=100)


def test_a_template_puts_an_end_into_every_text() -> None:
    rows = Dataset.from_dict({"text": TEXTS, "more": ["日本語"] * len(TEXTS)})
    ended = train_tokenizer(rows, vocab_size=300, template=f"$A {END_OF_TEXT}")
    ids = ended("日本語")["input_ids"]
    assert ids[-1] == ended.eos_token_id
    assert ended("日本語", add_special_tokens=False)["input_ids"] == ids[:-1]
    # The second column was trained on too.
    assert len(ids) < 1 + len("日本語".encode())


def test_blocks_are_the_joined_documents(tokenizer) -> None:
    documents = DatasetDict(
        train=Dataset.from_dict({"text": TEXTS}), validation=Dataset.from_dict({"text": TEXTS[:9]})
    )
    train, validation = make_blocks(documents, tokenizer, 16, validation_percent=5)
    for blocks, texts in ((train, TEXTS), (validation, TEXTS[:9])):
        assert blocks["labels"] == blocks["input_ids"]
        joined = tokenizer.decode([token for block in blocks["input_ids"] for token in block])
        whole = "".join(text + END_OF_TEXT for text in texts)
        assert whole.startswith(joined)
        assert len(tokenizer(whole[len(joined) :])["input_ids"]) < 16


def test_without_a_validation_split_the_last_blocks_are_held_out(tokenizer) -> None:
    documents = DatasetDict(train=Dataset.from_dict({"text": TEXTS}))
    whole, _ = make_blocks(
        DatasetDict(train=documents["train"], validation=documents["train"]), tokenizer, 16, 5
    )
    train, validation = make_blocks(documents, tokenizer, 16, validation_percent=20)
    assert [*train["input_ids"], *validation["input_ids"]] == list(whole["input_ids"])
    assert len(validation) == pytest.approx(0.2 * len(whole), abs=1)


def test_many_short_documents_lose_no_token_between_batches(tokenizer) -> None:
    documents = DatasetDict(train=Dataset.from_dict({"text": ["ab"] * 5_000}))
    count = 5_000 * (1 + len(tokenizer("ab")["input_ids"]))
    train, validation = make_blocks(documents, tokenizer, 700, validation_percent=5)
    assert len(train) + len(validation) == count // 700


def test_a_tokenizer_without_an_end_is_named(tokenizer) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        make_blocks(DatasetDict(train=Dataset.from_dict({"text": TEXTS})), endless, 16, 5)


def test_too_little_text_is_named(tokenizer) -> None:
    short = Dataset.from_dict({"text": ["word"]})
    with pytest.raises(ValueError, match="training text is too short.*block of 64.*block_size"):
        make_blocks(DatasetDict(train=short), tokenizer, 64, 5)
    documents = DatasetDict(train=Dataset.from_dict({"text": TEXTS}), validation=short)
    with pytest.raises(ValueError, match="validation text is too short"):
        make_blocks(documents, tokenizer, 64, 5)


# Metric and picture


def test_the_metric_is_the_one_made_by_hand(tokenizer) -> None:
    evaluation = LanguageModelEvaluation(tokenizer)
    texts = TEXTS[:6]
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    length = max(map(len, ids))
    labels = torch.full((6, length), -100)
    for row, tokens in zip(labels, ids, strict=True):
        row[: len(tokens)] = tokens
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, length, len(tokenizer))
    sums = evaluation.preprocess_logits_for_metrics((logits, "past"), labels)
    metrics = evaluation.compute_metrics(EvalPrediction(sums.numpy(), labels.numpy()))

    nll, correct, count, size = 0.0, 0, 0, 0
    for index, (text, tokens) in enumerate(zip(texts, ids, strict=True)):
        for position in range(1, len(tokens)):
            scores = logits[index, position - 1].double().log_softmax(0)
            nll -= scores[tokens[position]].item()
            correct += int(scores.argmax() == tokens[position])
            count += 1
        size += len(text.encode()) - len(tokenizer.decode(tokens[:1]).encode())
    assert metrics["loss"] == pytest.approx(nll / count, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert metrics["accuracy"] == correct / count
    assert metrics["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-6)


def test_bytes_are_only_counted_where_tokens_are_bytes(tokenizer) -> None:
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(["naïveté"])
    labels = torch.tensor([extended("a naïveté b")["input_ids"]])
    logits = torch.zeros(*labels.shape, len(extended))
    sums = LanguageModelEvaluation(extended).preprocess_logits_for_metrics(logits, labels)
    assert sums[0, 3] == len(" naïveté b".encode())

    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    )
    evaluation = LanguageModelEvaluation(words)
    sums = evaluation.preprocess_logits_for_metrics(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 0]]))
    metrics = evaluation.compute_metrics(EvalPrediction(sums.numpy(), None))
    assert "bits_per_byte" not in metrics
    assert metrics["loss"] == pytest.approx(math.log(2))


def test_the_metric_module_loads_by_path_and_checks_its_input() -> None:
    metric = evaluate.load(metric_path("language_modeling"))
    assert metric.compute(nll=[800.0], correct=[1], tokens=[1], bytes=[2])["perplexity"] == math.inf
    with pytest.raises(ValueError, match="no token counts"):
        metric.compute(nll=[0.0], correct=[0], tokens=[0], bytes=[0])
    with pytest.raises(ValueError, match="unknown metric 'bleu'; known: language_modeling"):
        metric_path("bleu")


def test_last_is_the_newest_checkpoint_that_is_whole(tmp_path) -> None:
    for step, content in ((2, "{}"), (4, "{}"), (6, '{"cut off')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(content)
    args = TrainingArguments(str(tmp_path), resume_from_checkpoint="last")
    assert checkpoint_of(args) == str(tmp_path / "checkpoint-4")
