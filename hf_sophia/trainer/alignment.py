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
    num_items_in_batch: torch.Tensor | int | None = None,
    processes: int = 1,
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
        processes: What the Trainer may have multiplied the returned loss by, in place.

    Returns:
        True when the mean agrees with the returned loss, when there is nothing to compare with, or
        when the head says not to; False when this micro-batch says nothing, because no label counts
        or a loss is not finite. Where the returned loss is missing or holds an auxiliary loss, a
        causal language model's is computed anew.

    Raises:
        RuntimeError: They differ.
    """
    if not head.check_loss:
        return True
    model = base_model(model)
    own = _own_loss(outputs)
    if own is None:
        own = _loss_of_labels(model, head, inputs)
    if own is None:
        return True
    means, count = _means(head, outputs)
    own_means = [own.item()]
    if num_items_in_batch is not None and count:
        whole = own.item() * float(num_items_in_batch) / count
        own_means += [whole, own_means[0] / processes, whole / processes]
    if count == 0:
        # Then the model's own loss is 0 or no number.
        agree = not (math.isfinite(own_means[0]) and own_means[0] > 0.0)
    elif not all(map(math.isfinite, (*means, *own_means))):
        return False
    else:
        # Both come from the same logits; only a loss that was computed in 16 bits may differ more.
        share, least = _rounding(own, head)
        agree = any(
            abs(mean - value) <= max(share * abs(value), least)
            for mean in means
            for value in own_means
        )
    if not agree:
        raise RuntimeError(
            f"the {count} labels that Sophia-G counts for {type(model).__name__} have a mean loss"
            f" of {means[0]:.6g}, the model's own loss is {own_means[-1]:.6g}: they are not aligned"
            " with the logits, or the loss is not their likelihood. Override"
            " sophia_head(self, model, inputs, outputs) in your Trainer; if the labels are right"
            " and the loss holds more (class weights, a penalty), return"
            " HeadOutput(..., check_loss=False) there"
        )
    return count > 0


def _rounding(own: torch.Tensor, head: HeadOutput) -> tuple[float, float]:
    """Return by what share of itself a model's loss may be off, and by how much at least."""
    logits, targets, dtype = head.logits.detach(), head.targets, own.dtype
    if head.likelihood == "bernoulli":
        # Flags in fp32 make the result that, of terms that the logits' dtype has rounded.
        dtype = min(dtype, logits.dtype, key=lambda dtype: dtype.itemsize)
    if dtype.itemsize >= 4:
        return 1e-4, 1e-7
    # A normalizer as large as a row's largest logit is rounded, and a sum of 1 or more, whatever
    # small loss is left. A row's smallest logit may stand for a class that is masked.
    sizes = logits.amax(-1) if head.likelihood == "categorical" else logits
    sizes = sizes.reshape(-1).float().abs()
    counted = sizes.isfinite() & (targets.to(sizes.device).reshape(-1) != IGNORE_INDEX)
    size = sizes[counted].mean().nan_to_num().item()
    # Half as much again as the most that was seen on the CPU.
    eps = torch.finfo(dtype).eps
    return 4.0 * eps, 2.0 * eps * max(size, 1.0)


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
