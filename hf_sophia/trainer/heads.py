"""From a model's outputs to what its loss counts: one adapter per kind of head, in a table."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.auto import modeling_auto
from transformers.utils import is_peft_available

from hf_sophia.estimators.likelihoods import IGNORE_INDEX


@dataclass(frozen=True)
class HeadOutput:
    """Logits, and which predictions on them the loss counts.

    Args:
        logits: The model's outputs with their graph, shape (..., classes).
        targets: The true labels, aligned with the logits; -100 where the loss does not count. Only
            that is read from them, and by the check that they are aligned.
        likelihood: What the loss is the likelihood of, a key of
            `hf_sophia.estimators.LIKELIHOODS`.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    likelihood: str = "categorical"


Adapter = Callable[[Mapping[str, Any], torch.Tensor], HeadOutput]


def causal_lm(inputs: Mapping[str, Any], logits: torch.Tensor) -> HeadOutput:
    """Align the labels of a causal language model: position i predicts label i + 1.

    Packed batches bring `shift_labels`, which are aligned already. Prompt tuning puts positions of
    its own before the labelled ones.
    """
    if (shifted := inputs.get("shift_labels")) is not None:
        return HeadOutput(logits, shifted)
    labels = inputs["labels"]
    prompt = logits.shape[-2] - labels.shape[-1]
    shape = (*labels.shape[:-1], max(prompt, 0) + labels.shape[-1])
    targets = labels.new_full(shape, IGNORE_INDEX)
    targets[..., max(prompt - 1, 0) : -1] = labels if prompt > 0 else labels[..., 1:]
    return HeadOutput(logits, targets)


_CAUSAL_LM = frozenset(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())

#: Adapters by the model classes they serve.
HEADS: tuple[tuple[Collection[str], Adapter], ...] = ((_CAUSAL_LM, causal_lm),)


def _serves(names: Collection[str], model: torch.nn.Module) -> bool:
    """Whether the model's class, or one it inherits from, is among the names."""
    return any(cls.__name__ in names for cls in type(model).__mro__)


def is_causal_lm(model: torch.nn.Module) -> bool:
    """Return whether transformers knows the model's class as a causal language model."""
    return _serves(_CAUSAL_LM, model)


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model()
    return model


def head_output(
    model: torch.nn.Module, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> HeadOutput:
    """Find the adapter of a model's class, or of a class it inherits from, and apply it.

    Args:
        model: The unwrapped model.
        inputs: The model's inputs, labels included.
        outputs: What its forward pass returned.

    Returns:
        Logits, aligned targets and likelihood.

    Raises:
        ValueError: The head is unknown, or labels or logits are missing.
    """
    model = base_model(model)
    name = type(model).__name__
    adapter = next((adapter for names, adapter in HEADS if _serves(names, model)), None)
    if adapter is None:
        raise ValueError(
            f"SophiaTrainer does not know the head of {name}: override"
            " sophia_head(self, model, inputs, outputs) in a subclass and return"
            " hf_sophia.trainer.heads.HeadOutput(logits, targets, likelihood)"
        )
    if "labels" not in inputs and "shift_labels" not in inputs:
        raise ValueError(
            f"the batch for {name} has no 'labels', only {sorted(inputs)}: Sophia-G needs them to"
            " see which predictions the loss counts. Use a data collator that makes labels"
        )
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f"{name} returned no logits, which Sophia-G samples labels from: leave return_dict on"
            " and turn off fused losses that skip the logits (use_liger_kernel)"
        )
    return adapter(inputs, logits)
