"""From a model's outputs to what its loss counts: one adapter per kind of head, in a table."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.auto import modeling_auto
from transformers.utils import is_peft_available

from hf_sophia.estimators.likelihoods import IGNORE_INDEX


class NoLogitsError(ValueError):
    """A forward pass returned no logits, as where its loss is fused with the head."""


@dataclass(frozen=True)
class HeadOutput:
    """Logits, and which predictions on them the loss counts.

    Args:
        logits: The model's outputs with their graph, shape (..., classes).
        targets: The true labels, aligned with the logits; -100 where the loss does not count. Only
            that is read from them, and by the check that they are aligned.
        likelihood: What the loss is the likelihood of, a key of
            `hf_sophia.estimators.LIKELIHOODS`.
        check_loss: Whether the true labels' mean loss has to agree with the model's own. Say False
            where these labels are right and the loss holds more: class weights, a penalty.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    likelihood: str = "categorical"
    check_loss: bool = True


Adapter = Callable[[torch.nn.Module, Mapping[str, Any], Mapping[str, Any]], HeadOutput]


def causal_lm(
    model: torch.nn.Module, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> HeadOutput:
    """Align the labels of a causal language model: position i predicts label i + 1.

    Packed batches bring `shift_labels`, which are aligned already. Prompt tuning puts positions of
    its own before the labelled ones.
    """
    logits = _logits(model, outputs)
    if (shifted := inputs.get("shift_labels")) is not None:
        return HeadOutput(logits, shifted)
    labels = _labels(model, inputs)
    prompt = logits.shape[-2] - labels.shape[-1]
    shape = (*labels.shape[:-1], max(prompt, 0) + labels.shape[-1])
    targets = labels.new_full(shape, IGNORE_INDEX)
    targets[..., max(prompt - 1, 0) : -1] = labels if prompt > 0 else labels[..., 1:]
    return HeadOutput(logits, targets)


def per_token(
    model: torch.nn.Module, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> HeadOutput:
    """Take labels that stand where they are predicted: position i predicts label i.

    Masked and encoder-decoder language models and token classifiers. Some return the logits of the
    labelled positions alone (`sparse_prediction`).
    """
    logits, labels = _logits(model, outputs), _labels(model, inputs)
    if logits.dim() == labels.dim():
        labels = labels[labels != IGNORE_INDEX]
    elif (prompt := logits.shape[-2] - labels.shape[-1]) > 0:
        labels = torch.nn.functional.pad(labels, (prompt, 0), value=IGNORE_INDEX)
    return HeadOutput(logits, labels)


def multimodal_lm(
    model: torch.nn.Module, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> HeadOutput:
    """Shift the labels unless a decoder of its own predicts them."""
    adapter = per_token if model.config.is_encoder_decoder else causal_lm
    return adapter(model, inputs, outputs)


#: The likelihood of each `config.problem_type`.
_LIKELIHOOD_OF_PROBLEM = {
    "single_label_classification": "categorical",
    "multi_label_classification": "bernoulli",
    "regression": "gaussian",
}


def classification(
    model: torch.nn.Module, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> HeadOutput:
    """Take one row of logits per example as its `problem_type` says: classes, flags or numbers."""
    logits, labels = _logits(model, outputs), _labels(model, inputs)
    problem = model.config.problem_type
    if problem is None:
        problem = _derived_problem(model, logits, labels, outputs)
    likelihood = _LIKELIHOOD_OF_PROBLEM[problem]
    shape = logits.shape[:-1] if likelihood == "categorical" else logits.shape
    return HeadOutput(logits, _shaped(model, labels, shape), likelihood)


def _derived_problem(
    model: torch.nn.Module,
    logits: torch.Tensor,
    labels: torch.Tensor,
    outputs: Mapping[str, Any],
) -> str:
    """Decide as transformers does, where its loss has not noted it in the configuration."""
    if logits.shape[-1] > 1 and labels.dtype in (torch.long, torch.int):
        return "single_label_classification"
    if outputs.get("loss") is None:
        # A loss of the user's own may mean anything by such labels: flags, numbers, soft classes.
        raise ValueError(
            f"{type(model).__name__} has no loss of its own here, and labels of {labels.dtype} for"
            f" {logits.shape[-1]} outputs do not tell what they are: set model.config.problem_type"
            f" to one of {', '.join(_LIKELIHOOD_OF_PROBLEM)}, or override"
            " sophia_head(self, model, inputs, outputs) in your Trainer"
        )
    return "regression" if logits.shape[-1] == 1 else "multi_label_classification"


def choice(
    model: torch.nn.Module, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> HeadOutput:
    """Take one row of logits per example as the scores of its choices."""
    logits = _logits(model, outputs)
    return HeadOutput(logits, _shaped(model, _labels(model, inputs), logits.shape[:-1]))


def question_answering(
    model: torch.nn.Module, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> HeadOutput:
    """Stack the two predictions of an extractive answer, where it starts and where it ends.

    Positions beyond the last token do not count, as in the model's own loss.
    """
    start, end = (_logits(model, outputs, name) for name in ("start_logits", "end_logits"))
    positions = [_labels(model, inputs, name) for name in ("start_positions", "end_positions")]
    targets = torch.stack([p.reshape(len(start)) for p in positions], dim=1).clamp(min=0)
    targets = targets.masked_fill(targets >= start.shape[-1], IGNORE_INDEX)
    return HeadOutput(torch.stack([start, end], dim=1), targets)


def _names(*kinds: str) -> frozenset[str]:
    """The class names that transformers' auto classes of these kinds know."""
    tables = (getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES") for kind in kinds)
    names: set[str] = set()
    for table in tables:
        for value in table.values():
            names.update([value] if isinstance(value, str) else value)
    return frozenset(names)


_CAUSAL_LM = _names("CAUSAL_LM")

#: Causal language models whose loss takes labels that are shifted already.
_UNSHIFTED_CAUSAL_LM = frozenset(
    {
        "BartForCausalLM",
        "BigBirdPegasusForCausalLM",
        "BlenderbotForCausalLM",
        "BlenderbotSmallForCausalLM",
        "MBartForCausalLM",
        "MarianForCausalLM",
        "MvpForCausalLM",
        "PLBartForCausalLM",
        "PegasusForCausalLM",
        "TrOCRForCausalLM",
        "WhisperForCausalLM",
        "XLNetLMHeadModel",
    }
)

#: Adapters by the model classes they serve; the first that names a class serves it.
HEADS: tuple[tuple[Collection[str], Adapter], ...] = (
    (_UNSHIFTED_CAUSAL_LM, per_token),
    (_CAUSAL_LM, causal_lm),
    (
        _names("MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "TOKEN_CLASSIFICATION"),
        per_token,
    ),
    (_names("IMAGE_TEXT_TO_TEXT"), multimodal_lm),
    (
        _names(
            "SEQUENCE_CLASSIFICATION",
            "IMAGE_CLASSIFICATION",
            "VIDEO_CLASSIFICATION",
            "AUDIO_CLASSIFICATION",
        ),
        classification,
    ),
    (_names("MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION"), choice),
    (_names("QUESTION_ANSWERING"), question_answering),
)


def _adapter_of(model: torch.nn.Module) -> Adapter | None:
    """Return the adapter of a model's class or of the nearest class it inherits from."""
    for cls in type(base_model(model)).__mro__:
        for names, adapter in HEADS:
            if cls.__name__ in names:
                return adapter
    return None


def shifts_labels(model: torch.nn.Module) -> bool:
    """Return whether the model's own loss shifts its labels by one position."""
    adapter = _adapter_of(model)
    if adapter is multimodal_lm:
        return not base_model(model).config.is_encoder_decoder
    return adapter is causal_lm


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
        ValueError: The head is unknown, or the labels are missing.
        NoLogitsError: The logits are missing; a ValueError too.
    """
    adapter = _adapter_of(model)
    model = base_model(model)
    if adapter is None:
        raise ValueError(
            f"SophiaTrainer does not know the head of {type(model).__name__}: override"
            " sophia_head(self, model, inputs, outputs) in a subclass and return"
            " hf_sophia.trainer.heads.HeadOutput(logits, targets, likelihood); or, for a loss that"
            " is no likelihood, use --optim_args hessian_computation_type=hutchinson"
        )
    return adapter(model, inputs, outputs)


def _logits(
    model: torch.nn.Module, outputs: Mapping[str, Any], name: str = "logits"
) -> torch.Tensor:
    logits = outputs.get(name) if isinstance(outputs, Mapping) else None
    if not isinstance(logits, torch.Tensor):
        raise NoLogitsError(
            f"{type(model).__name__} returned no {name}, which Sophia-G samples labels from: leave"
            " return_dict on, or override sophia_head(self, model, inputs, outputs) in your Trainer"
        )
    return logits


def _labels(model: torch.nn.Module, inputs: Mapping[str, Any], name: str = "labels") -> Any:
    if inputs.get(name) is None:
        raise ValueError(
            f"the batch for {type(model).__name__} has no {name!r}, only {sorted(inputs)}: Sophia-G"
            " needs them to see which predictions the loss counts. Use a data collator that makes"
            " them, or, for a loss without labels, --optim_args hessian_computation_type=hutchinson"
        )
    return inputs[name]


def _shaped(model: torch.nn.Module, labels: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if labels.numel() != shape.numel():
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit the logits of"
            f" {type(model).__name__}, which make {tuple(shape)} predictions: see its"
            " config.problem_type and config.num_labels, or override"
            " sophia_head(self, model, inputs, outputs) in your Trainer"
        )
    return labels.reshape(shape)
