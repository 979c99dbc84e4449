"""A check that the labels an adapter counts are those that the model's own loss counts."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from hf_sophia.estimators import mean_nll
from hf_sophia.estimators.likelihoods import IGNORE_INDEX
from hf_sophia.trainer.heads import HeadOutput, base_model, shifts_labels


def labels_are_aligned(
    model: torch.nn.Module,
    head: HeadOutput,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    num_items_in_batch: torch.Tensor | int | None,
) -> bool:
    """Compare the true labels' mean loss through the adapter with the model's own.

    A missing shift or a wrong set of counted labels shows here, before it spoils a run.

    Args:
        model: The unwrapped model.
        head: What the adapter made of its outputs.
        inputs: The micro-batch, labels included.
        outputs: What the forward pass returned.
        num_items_in_batch: What the model may have divided its summed loss by, the predictions of
            all micro-batches; models that ignore it take the mean over the micro-batch.

    Returns:
        True when the mean agrees with the returned loss, or for a causal language model with its
        class's loss of the labels (the returned one may hold more), or when there is neither; False
        when this micro-batch says nothing, because no label counts or a loss is not finite.

    Raises:
        RuntimeError: They differ.
    """
    model = base_model(model)
    means, count = _means(head, outputs)
    own = _own_loss(outputs)
    of_labels = _loss_of_labels(model, head, inputs)
    own_means = [loss.item() for loss in (own, of_labels) if loss is not None]
    if not own_means:
        return True
    if own is not None and num_items_in_batch is not None:
        own_means.append(own.item() * float(num_items_in_batch) / max(count, 1))
    if not all(map(math.isfinite, (*means, *own_means))):
        return False
    # Both come from the same logits; only a loss that was rounded to 16 bits may differ more.
    rounded = own is not None and own.dtype not in (torch.float32, torch.float64)
    tolerance = 1e-2 if rounded else 1e-4
    if any(
        abs(mean - value) <= tolerance * max(abs(value), 1e-3)
        for mean in means
        for value in own_means
    ):
        return True
    raise RuntimeError(
        f"the labels that Sophia-G counts for {type(model).__name__} have a mean loss of"
        f" {means[0]:.6g}, the model's own loss is {own_means[-1]:.6g}: they are not aligned with"
        " the logits, or the loss is not their likelihood. Override"
        " sophia_head(self, model, inputs, outputs) in your Trainer"
    )


def _means(head: HeadOutput, outputs: Any) -> tuple[list[float], int]:
    """Return the ways to take the mean of the true labels' losses, and how many labels count."""
    nll, count = mean_nll(head.logits, head.targets, likelihood=head.likelihood)
    means = [nll.item()]
    if isinstance(outputs, Mapping) and "start_logits" in outputs:
        # Such a model takes the mean of two means, another one where only a start lies too far.
        pairs = zip(head.logits.unbind(1), head.targets.unbind(1), strict=True)
        means.append(sum(mean_nll(logits, targets)[0].item() for logits, targets in pairs) / 2)
    return means, int(count)


def _own_loss(outputs: Any) -> torch.Tensor | None:
    """Return the loss of the forward pass, or None where it is missing or more than the labels'."""
    # The Trainer reads a tuple's first element, which is the logits when it took the labels away.
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(outputs, Mapping):
        return loss.detach() if loss.numel() == 1 else None
    # A mixture of experts adds its auxiliary loss, with a factor that each family names otherwise.
    if loss is None or any(name.endswith("aux_loss") for name in outputs):
        return None
    return loss.detach()


@torch.no_grad()
def _loss_of_labels(
    model: torch.nn.Module, head: HeadOutput, inputs: Mapping[str, Any]
) -> torch.Tensor | None:
    """Return the loss the model's class has for these logits and labels, without a forward pass."""
    labels = inputs.get("labels")
    if labels is None or not shifts_labels(model):
        return None
    positions, classes = head.logits.shape[-2:]
    # Prompt tuning's own positions come first and have no labels.
    labels = functional.pad(labels, (positions - labels.shape[-1], 0), value=IGNORE_INDEX)
    return model.loss_function(logits=head.logits, labels=labels, vocab_size=classes)
