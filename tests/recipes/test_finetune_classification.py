"""The recipe for classifiers, with labels of every kind."""

import numpy as np
import pretrain_gpt2
import pytest
from common.data import Corpus
from common.labels import Labels, encode_labels
from datasets import ClassLabel, Dataset, DatasetDict
from finetune_classification import main
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction

WORDS = ["rain", "snow", "wind"]
ROWS = [{"text": f"{WORDS[i % 3]} on day {i}", "label": WORDS[i % 3]} for i in range(120)]
SIZES = {
    "max_length": 24,
    "learning_rate": 1e-2,
    "max_steps": 30,
    "eval_steps": 15,
    "save_steps": 15,
}


def encoded(train, validation, feature=None) -> tuple[DatasetDict, Labels]:
    splits = DatasetDict(
        train=Dataset.from_dict({"text": ["x"] * len(train), "label": train}),
        validation=Dataset.from_dict({"text": ["y"] * len(validation), "label": validation}),
    )
    if feature is not None:
        splits = splits.cast_column("label", feature)
    corpus, labels = encode_labels(Corpus(splits, "rows", "digest"))
    return corpus.documents, labels


def test_names_become_classes() -> None:
    rows, labels = encoded(["b", "a", "b", "c"], ["c", "b", "b", "b"])
    assert list(rows["train"]["labels"]) == [1, 0, 1, 2]
    assert list(rows["validation"]["labels"]) == [2, 1, 1, 1]
    assert labels == Labels("single_label_classification", ("a", "b", "c"))
    headline = labels.headline({"eval_loss": 1.0, "eval_accuracy": 0.5}, rows)
    assert headline.endswith("(accuracy 50.0%; 75.0% by always saying the most common)")
    assert labels.model_options()["label2id"] == {"a": 0, "b": 1, "c": 2}


def test_integers_are_classes_and_a_data_set_may_name_them() -> None:
    rows, labels = encoded([7, 3, 7], [3])
    assert list(rows["train"]["labels"]) == [1, 0, 1]
    assert labels.names == ("3", "7")
    rows, labels = encoded([2, 0, 2], [1], ClassLabel(names=["x", "y", "z"]))
    assert list(rows["validation"]["labels"]) == [1]
    assert labels.names == ("x", "y", "z")


def test_lists_become_flags() -> None:
    rows, labels = encoded([["a"], [], ["c", "a"]], [["c"], ["a"]])
    assert list(rows["train"]["labels"]) == [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    assert labels.problem_type == "multi_label_classification"
    assert labels.names == ("a", "c")
    assert str(labels) == "sets of 2 classes"


def test_floats_stay_numbers() -> None:
    rows, labels = encoded([0.5, 2.0], [1.5])
    assert list(rows["train"]["labels"]) == [0.5, 2.0]
    assert labels == Labels("regression", ("value",))


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (
            ["a", "b"],
            ["c"],
            "label 'c' of the split 'validation' of rows is unknown; known: 'a', 'b'",
        ),
        ([["a"], ["b"]], [["a", "c"]], "label 'c' of the split 'validation'"),
        (["a", "a"], ["a"], "rows has labels of 1 class; wanted two or more"),
        (["a", None], ["a"], "a row of rows has no label"),
        ([[0.5], [1.0]], [[1.0]], "wanted a name or an integer"),
        ([{"a": 1}, {"a": 2}], [{"a": 1}], "wanted a name or an integer"),
    ],
)
def test_labels_that_can_not_be_used_are_named(train, validation, message) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        encoded(train, validation)


def test_a_class_may_lie_in_held_out_rows_only(options, write_rows, capsys) -> None:
    rows = [*ROWS[:20], {"text": "hail", "label": "hail"}]
    short = SIZES | {"max_steps": 1, "validation_percent": 90}
    main(options(train_file=write_rows(rows), **short))
    assert "4 classes" in capsys.readouterr().out


def test_an_unlabelled_row_of_a_named_class_is_unknown() -> None:
    with pytest.raises(ValueError, match="label -1 of the split 'train'"):
        encoded([0, -1, 1], [0], ClassLabel(names=["x", "y"]))


def test_the_metrics_are_those_made_by_hand() -> None:
    def compute(problem, outputs, labels):
        prediction = EvalPrediction(np.array(outputs), np.array(labels))
        return Labels(problem, ("x", "y")).compute_metrics(prediction)

    single = compute("single_label_classification", [[1, 2], [3, 0], [0, 1]], [1, 0, 0])
    assert single == {"accuracy": pytest.approx(2 / 3)}
    several = compute("multi_label_classification", [[1, -1], [1, 1]], [[1, 0], [0, 1]])
    assert several == {"accuracy": 0.5, "f1": 0.8}
    number = compute("regression", [[1.0], [3.0]], [0.0, 4.0])
    assert number == {"mse": 1.0, "r2": 0.75}
    two = EvalPrediction((np.array([[1.0, 0.0]]), np.zeros(3)), np.array([0]))
    labels = Labels("single_label_classification", ("x", "y"))
    assert labels.compute_metrics(two) == {"accuracy": 1.0}


def test_a_fresh_model_learns_saves_and_resumes(
    options, write_rows, check_history, same_weights, tmp_path, capsys
) -> None:
    argv = options(train_file=write_rows(ROWS), validation_percent=25, **SIZES)
    metrics = main(argv)
    output = tmp_path / "run"
    printed = capsys.readouterr().out
    assert "90 rows to train on, 30 to evaluate on; 3 classes; ModernBertForSequence" in printed
    assert f"(accuracy {metrics['eval_accuracy']:.1%};" in printed
    assert "by always saying the most common" in printed
    check_history(output)
    assert metrics["eval_accuracy"] > 0.6

    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.id2label == dict(enumerate(sorted(WORDS)))
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("snow", return_tensors="pt")
    assert model(**ids).logits.shape == (1, 3)

    resumed = main([*argv, "--resume_from_checkpoint", str(output / "checkpoint-15")])
    assert resumed["eval_loss"] == metrics["eval_loss"]
    assert same_weights(model, AutoModelForSequenceClassification.from_pretrained(output))


@pytest.mark.parametrize(
    ("label", "metric", "unit"),
    [
        (lambda i: [WORDS[i % 3], *(["even"] if i % 2 else [])], "f1", "nats"),
        (lambda i: float(i % 3), "r2", "squared error"),
    ],
    ids=["sets", "numbers"],
)
def test_other_kinds_of_labels_train(
    label, metric, unit, options, write_rows, check_history, tmp_path, capsys
) -> None:
    rows = [row | {"label": label(i)} for i, row in enumerate(ROWS)]
    metrics = main(options(train_file=write_rows(rows), **SIZES))
    check_history(tmp_path / "run")
    assert f"eval_{metric}" in metrics
    assert f"{metrics['eval_loss']:.4f} {unit} (" in capsys.readouterr().out


def test_pairs_of_texts_are_read_together(
    options, write_rows, check_history, tmp_path, capsys
) -> None:
    """The label is in the second text alone."""
    rows = [{"text": f"day {i}", "label": WORDS[i % 3], "next": WORDS[i % 3]} for i in range(120)]
    argv = options(train_file=write_rows(rows), text_pair_column="next", **SIZES)
    metrics = main([*argv, "--validation_percent", "25"])
    check_history(tmp_path / "run")
    assert metrics["eval_accuracy"] > 0.6
    with pytest.raises(SystemExit, match="--text_pair_column"):
        main(options(train_file=write_rows(rows), text_pair_column="second", **SIZES))


def test_a_folder_gets_a_head_for_the_new_labels(options, write_rows, tmp_path, capsys) -> None:
    base, short = tmp_path / "base", SIZES | {"max_steps": 2, "eval_steps": 2, "save_steps": 2}
    main(options(train_file=write_rows(ROWS), output_dir=base, **short))
    rows = [row | {"label": i % 5} for i, row in enumerate(ROWS)]
    file = write_rows(rows, "five.jsonl")
    main(options(train_file=file, model_name_or_path=base, **short))
    assert "5 classes; ModernBertForSequenceClassification with" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.num_labels == 5


def test_a_language_model_gets_a_head_and_pads(options, write_rows, tmp_path) -> None:
    text, base = tmp_path / "text.txt", tmp_path / "base"
    text.write_text("\n".join(row["text"] for row in ROWS * 5))
    pretrain_gpt2.main(options(train_file=text, output_dir=base, block_size=24))
    main(options(train_file=write_rows(ROWS), model_name_or_path=base, **SIZES))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert type(model).__name__ == "GPT2ForSequenceClassification"
    assert model.config.pad_token_id == model.config.eos_token_id


def test_bad_input_ends_in_one_line(options, write_rows, ends_in_one_line) -> None:
    file = write_rows(ROWS)
    other = write_rows([{"text": "hail", "label": "hail"}], "other.jsonl")
    for changes, message in (
        ({"label_column": "topic"}, "has no column 'topic', only ['text', 'label']; name it with"),
        ({"text_column": "body"}, "--text_column"),
        ({"validation_file": other}, "label 'hail' of the split 'validation'"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"model_name_or_path": "tests"}, "can't load 'tests'"),
    ):
        ends_in_one_line(main, options(**{"train_file": file, **SIZES, **changes}), message)
