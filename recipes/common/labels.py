"""Labels of a classifier, of any kind that data sets have, and the metrics that go with them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
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
        baseline: Share of validation rows that are right when every row is given the most common
            label, or set of labels, of the training split; None for regression.
    """

    problem_type: str
    names: tuple[str, ...]
    baseline: float | None

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

    def headline(self, metrics: dict[str, float]) -> str:
        """Say in a line what the evaluation gave, beside what knowing nothing would give."""
        loss = f"evaluation loss {metrics['eval_loss']:.4f} {self.unit}"
        if self.problem_type == "regression":
            return f"{loss} (r2 {metrics['eval_r2']:.3f}; 0 by always saying the mean)"
        f1 = f", F1 {metrics['eval_f1']:.3f}" if "eval_f1" in metrics else ""
        return (
            f"{loss} (accuracy {metrics['eval_accuracy']:.1%}{f1};"
            f" {self.baseline:.1%} by always saying the most common)"
        )

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the metrics of the kind of labels.

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
        corpus: Splits `train` and `validation` with a column `label`.

    Returns:
        The corpus with `labels` in the place of `label`, and what they mean.

    Raises:
        ValueError: A row has no label or an unknown one, there is only one class, or labels are of
            another kind.
    """
    train, validation = corpus.documents["train"], corpus.documents["validation"]
    if any(label is None for split in (train, validation) for label in split["label"]):
        raise ValueError(f"a row of {corpus.name} has no label; remove it or label it")
    several = isinstance(train[0]["label"], list)
    kind = train.features["label"].feature if several else train.features["label"]
    if not isinstance(kind, Value | ClassLabel) or (several and "float" in kind.dtype):
        raise ValueError(
            f"labels of {corpus.name} are {train.features['label']}; wanted a name or an integer"
            " (a class), a list of those (classes), or a float (a number to predict)"
        )
    if "float" in kind.dtype:
        return _map_labels(corpus, float), Labels("regression", ("value",), None)
    sets = {
        name: [set(label) if several else {label} for label in split["label"]]
        for name, split in (("training", train), ("validation", validation))
    }
    known = (
        range(kind.num_classes) if isinstance(kind, ClassLabel) else set().union(*sets["training"])
    )
    index = {label: position for position, label in enumerate(sorted(known))}
    for name, labels in sets.items():
        if unknown := sorted(set().union(*labels) - index.keys()):
            raise ValueError(
                f"label {unknown[0]!r} of the {name} split of {corpus.name} is unknown; known:"
                f" {', '.join(map(repr, index))}"
            )
    if len(index) < 2:
        raise ValueError(f"{corpus.name} has labels of {len(index)} class; wanted two or more")
    names = tuple(kind.names) if isinstance(kind, ClassLabel) else tuple(map(str, index))
    baseline = _share_of_most_common(*sets.values())
    if several:
        labels = Labels("multi_label_classification", names, baseline)
        return _map_labels(corpus, lambda row: [float(one in row) for one in index]), labels
    return _map_labels(corpus, index.get), Labels("single_label_classification", names, baseline)


def _map_labels(corpus: Corpus, encode: Callable[[Any], Any]) -> Corpus:
    documents = {
        split: rows.remove_columns("label").add_column("labels", [*map(encode, rows["label"])])
        for split, rows in corpus.documents.items()
    }
    return replace(corpus, documents=DatasetDict(documents))


def _share_of_most_common(train: list[set[Any]], validation: list[set[Any]]) -> float:
    ((common, _),) = Counter(map(frozenset, train)).most_common(1)
    return sum(labels == common for labels in validation) / len(validation)
