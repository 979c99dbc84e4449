"""A check that the labels an adapter counts are those that the model's own loss counts."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from hf_sophia.estimators import mean_nll
from hf_sophia.trainer.heads import HeadOutput, base_model, is_causal_lm


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
        num_items_in_batch: What the model divided its summed loss by, or None if it took the mean
            over the micro-batch itself.

    Returns:
        True when they agree or the model has no loss to compare with; False when this micro-batch
        says nothing, because no label counts or a loss is not finite.

    Raises:
        RuntimeError: They differ.
    """
    model = base_model(model)
    nll, count = mean_nll(head.logits, head.targets, likelihood=head.likelihood)
    own = _own_loss(model, outputs)
    if own is None:
        # The labels were kept from the forward pass, for label smoothing for instance.
        own, num_items_in_batch = _loss_of_labels(model, head, inputs), None
        if own is None:
            return True
    own_mean, mean = own.item(), nll.item()
    if num_items_in_batch is not None:
        own_mean *= float(num_items_in_batch) / max(int(count), 1)
    if not (math.isfinite(mean) and math.isfinite(own_mean)):
        return False
    # Both come from the same logits; only a loss that was rounded to 16 bits may differ more.
    tolerance = 1e-4 if own.dtype in (torch.float32, torch.float64) else 1e-2
    if abs(mean - own_mean) > tolerance * max(abs(own_mean), 1e-3):
        raise RuntimeError(
            f"the labels that Sophia-G counts for {type(model).__name__} have a mean loss of"
            f" {mean:.6g}, the model's own loss is {own_mean:.6g}: they are not aligned with the"
            " logits, or the loss is not their likelihood. Override"
            " sophia_head(self, model, inputs, outputs) in your Trainer"
        )
    return True


def _own_loss(model: torch.nn.Module, outputs: Any) -> torch.Tensor | None:
    """Return the loss the forward pass returned, less a mixture of experts' auxiliary loss."""
    if not isinstance(outputs, Mapping):
        return outputs[0].detach()  # as the Trainer reads a tuple
    loss = outputs.get("loss")
    if loss is None:
        return None
    auxiliary = outputs.get("aux_loss")
    if auxiliary is not None:
        loss = loss - model.config.router_aux_loss_coef * auxiliary
    return loss.detach()


@torch.no_grad()
def _loss_of_labels(
    model: torch.nn.Module, head: HeadOutput, inputs: Mapping[str, Any]
) -> torch.Tensor | None:
    labels = inputs.get("labels")
    if labels is None or not is_causal_lm(model):
        return None
    return model.loss_function(logits=head.logits, labels=labels, vocab_size=head.logits.shape[-1])
