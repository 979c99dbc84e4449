"""Evaluation of language models through `evaluate`, from sums per example."""

from collections.abc import Callable
from typing import Any

import evaluate
import torch
from tokenizers import decoders
from torch.nn import functional
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_sophia.metrics import metric_path


class LanguageModelEvaluation:
    """The two hooks of a Trainer that together compute the metric of a causal language model.

    Args:
        tokenizer: Says how many bytes of text each token stands for, if it is byte-level; with
            another one there are no bits per byte.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._metric = evaluate.load(metric_path("language_modeling"))
        self._bytes = torch.tensor(_bytes_of_tokens(tokenizer))

    def preprocess_logits_for_metrics(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Reduce logits to sums, so that the Trainer never gathers them.

        Args:
            logits: Shape (examples, positions, vocabulary), or a tuple that begins with them.
            labels: Shape (examples, positions); position i predicts label i + 1.

        Returns:
            Per example: nll in nats, tokens ranked first, tokens, bytes; shape (examples, 4),
            float64.
        """
        logits = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1]
        targets = labels[:, 1:]
        counted = targets != -100
        nll = functional.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")
        correct = (logits.argmax(-1) == targets) & counted
        sizes = self._bytes.to(targets.device)[targets.clamp(min=0)] * counted
        sums = [nll.double(), correct, counted, sizes]
        return torch.stack([value.sum(-1).double() for value in sums], dim=-1)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the metric from the sums of all examples."""
        nll, correct, tokens, size = prediction.predictions.T
        return self._metric.compute(
            nll=nll,
            correct=correct.astype(int),
            tokens=tokens.astype(int),
            bytes=size.astype(int),
        )

    def hooks(self) -> dict[str, Callable[..., Any]]:
        """Return both hooks as keyword arguments of a Trainer."""
        return {
            "preprocess_logits_for_metrics": self.preprocess_logits_for_metrics,
            "compute_metrics": self.compute_metrics,
        }


def _bytes_of_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the UTF-8 bytes of each token; zeros unless the tokenizer is byte-level."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.decoder, decoders.ByteLevel):
        return [0] * len(tokenizer)
    # A byte-level vocabulary writes one character a byte; added tokens are written as they are.
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    sizes = []
    for index in range(len(tokenizer)):
        if index in tokenizer.all_special_ids:
            sizes.append(0)
        elif index in added:
            sizes.append(len(added[index].encode()))
        else:
            sizes.append(len(tokenizer.convert_ids_to_tokens(index)))
    return sizes
