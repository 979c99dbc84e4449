"""Labels of a classifier, of any kind that data sets have, and the metrics that go with them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from datasets import ClassLabel, DatasetDict, Value
from transformers import EvalPrediction

from common.data import Corpus


@dataclass(frozen=True)
class Labels:
    """What a classifier's outputs stand for.

    Args:
        problem_type: As transformers' models have it: `single_label_classification`,
            `multi_label_classification` or `regression`.
        names: The name of each output.
    """

    problem_type: str
    names: tuple[str, ...]

    def model_options(self) -> dict[str, Any]:
        """Return what a model's configuration has to know, as keyword arguments."""
        return {
            "problem_type": self.problem_type,
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
        }

    def __str__(self) -> str:
        """Say what the task is."""
        if self.problem_type == "regression":
            return "regression"
        return f"{'sets of ' * (self.problem_type[0] == 'm')}{len(self.names)} classes"

    @property
    def unit(self) -> str:
        """What the loss is measured in."""
        return "squared error" if self.problem_type == "regression" else "nats"

    def headline(self, metrics: dict[str, float], rows: DatasetDict) -> str:
        """Say in a line what the evaluation gave, beside what knowing nothing would give.

        Args:
            metrics: The evaluation's metrics.
            rows: Splits `train` and `validation` with a column `labels`.

        Returns:
            The line.
        """
        loss = f"evaluation loss {metrics['eval_loss']:.4f} {self.unit}"
        if self.problem_type == "regression":
            return f"{loss} (r2 {metrics['eval_r2']:.3f}; 0 by always saying the mean)"
        f1 = f", F1 {metrics['eval_f1']:.3f}" if "eval_f1" in metrics else ""
        return (
            f"{loss} (accuracy {metrics['eval_accuracy']:.1%}{f1};"
            f" {_share_of_most_common(rows):.1%} by always saying the most common)"
        )

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the metrics of this kind of labels.

        Args:
            prediction: Outputs, shape (rows, outputs), or a tuple that begins with them; and the
                encoded labels.

        Returns:
            Of single labels `accuracy`; of sets of labels `accuracy` (share of rows whose whole
            set is right) and `f1` over all labels and rows; of numbers `mse` and `r2` (0 is what
            the mean gives, 1 is perfect).
        """
        outputs, labels = prediction.predictions, prediction.label_ids
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        if self.problem_type == "regression":
            mse = float(np.mean((outputs.squeeze(-1) - labels) ** 2))
            variance = float(np.var(labels))
            return {"mse": mse, "r2": 1 - mse / variance if variance else float("nan")}
        if self.problem_type == "single_label_classification":
            return {"accuracy": float(np.mean(outputs.argmax(-1) == labels))}
        chosen, wanted = outputs > 0, labels > 0
        total = int(chosen.sum() + wanted.sum())
        return {
            "accuracy": float(np.mean((chosen == wanted).all(-1))),
            "f1": 2 * int((chosen & wanted).sum()) / total if total else 1.0,
        }


def encode_labels(corpus: Corpus) -> tuple[Corpus, Labels]:
    """Turn the column `label` into what a model takes, `labels`.

    Names and integers are classes, lists of them sets of classes, and floats numbers to predict.
    Which classes there are is read from the data set's own list, or else from `train`.

    Args:
        corpus: Splits `train` and perhaps `validation` with a column `label`.

    Returns:
        The corpus with `labels` in the place of `label`, and what they mean.

    Raises:
        ValueError: A row has no label or an unknown one, there is only one class, or labels are of
            another kind.
    """
    train = corpus.documents["train"]
    if any(label is None for rows in corpus.documents.values() for label in rows["label"]):
        raise ValueError(f"a row of {corpus.name} has no label; remove it or label it")
    several = isinstance(train[0]["label"], list)
    kind = train.features["label"].feature if several else train.features["label"]
    if not isinstance(kind, Value | ClassLabel) or (several and "float" in kind.dtype):
        raise ValueError(
            f"labels of {corpus.name} are {train.features['label']}; wanted a name or an integer"
            " (a class), a list of those (classes), or a float (a number to predict)"
        )
    if "float" in kind.dtype:
        return _map_labels(corpus, float), Labels("regression", ("value",))
    sets = {
        split: set(chain.from_iterable(rows["label"]) if several else rows["label"])
        for split, rows in corpus.documents.items()
    }
    known = range(kind.num_classes) if isinstance(kind, ClassLabel) else sets["train"]
    index = {label: position for position, label in enumerate(sorted(known))}
    for split, found in sets.items():
        if unknown := sorted(found - index.keys()):
            raise ValueError(
                f"label {unknown[0]!r} of the split {split!r} of {corpus.name} is unknown; known:"
                f" {', '.join(map(repr, index))}"
            )
    if len(index) < 2:
        raise ValueError(f"{corpus.name} has labels of {len(index)} class; wanted two or more")
    names = tuple(kind.names) if isinstance(kind, ClassLabel) else tuple(map(str, index))
    if several:
        labels = Labels("multi_label_classification", names)
        return _map_labels(corpus, lambda row: [float(one in row) for one in index]), labels
    return _map_labels(corpus, index.get), Labels("single_label_classification", names)


def _map_labels(corpus: Corpus, encode: Callable[[Any], Any]) -> Corpus:
    documents = {
        split: rows.remove_columns("label").add_column("labels", [*map(encode, rows["label"])])
        for split, rows in corpus.documents.items()
    }
    return replace(corpus, documents=DatasetDict(documents))


def _share_of_most_common(rows: DatasetDict) -> float:
    """Return the accuracy of always saying the training split's most common label, or set."""
    train, validation = ([*map(str, rows[split]["labels"])] for split in ("train", "validation"))
    ((common, _),) = Counter(train).most_common(1)
    return validation.count(common) / len(validation)
