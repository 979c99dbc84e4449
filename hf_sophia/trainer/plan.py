"""Which way a run's Hessian is estimated; decided once, from how the model is wrapped."""

import math
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from hf_sophia.trainer.own_pass import has_fused_head, has_liger_kernels, reentrant_modules
from hf_sophia.trainer.support import inside_compilation

#: Share of the batch that a forward pass for the Hessian alone takes when nothing else is asked.
DEFAULT_FRACTION = 0.25


@dataclass(frozen=True)
class HessianPlan:
    """How the estimate is made.

    Args:
        estimator: `"gnb"` or `"hutchinson"`.
        fraction: The share of the batch that a forward pass of its own takes; None: the graph of
            the training pass is kept and differentiated too.
        reason: Why, for the log.
        sharded: Whether parameters are FSDP2's, so that processes make each pass together.
        kept: Of how many of a step's micro-batches the graph is kept; None: of all.
    """

    estimator: str
    fraction: float | None
    reason: str
    sharded: bool = False
    kept: int | None = None

    def __str__(self) -> str:
        """Say it in one line."""
        if self.kept is not None:
            return f"{self.estimator} on the kept graphs of {self.kept} micro-batches of each step"
        if self.fraction is None:
            return f"{self.estimator} on the kept graph of the training pass"
        return f"{self.estimator} in a pass of its own on {self.fraction:g} of the batch"


#: What a forward pass of its own costs for each that a second backward pass on a kept graph does:
#: forward and backward against backward, about twice as long as forward.
_OWN_PASS_COST = 1.5


def make_plan(
    wrapped: torch.nn.Module,
    model: torch.nn.Module,
    estimator: str,
    fraction: float | None,
    micro_batches: int = 1,
    *,
    offloaded: bool = False,
) -> HessianPlan:
    """Choose between the kept graph and a forward pass of its own.

    Of a share of the batch, whole micro-batches of an accumulated one are taken where that is
    cheaper than a pass on just the share, though it may be a little more than was asked for.

    Args:
        wrapped: The model as it trains.
        model: The model inside all wrappers.
        estimator: `"gnb"` or `"hutchinson"`.
        fraction: The share of the batch that was asked for; None: nothing was.
        micro_batches: How many a step accumulates.
        offloaded: Whether activations wait elsewhere for the one pass back through them.

    Returns:
        The plan.
    """
    wrapped = inside_compilation(wrapped)
    sharded = isinstance(wrapped, FSDPModule)
    reason = None
    if estimator == "hutchinson":
        reason = "Hutchinson's estimator needs attention with a second derivative"
    elif sharded:
        reason = "FSDP2's gradients come out of a backward pass only"
    elif has_fused_head(model):
        reason = "the loss is fused with the head and makes no logits"
    elif has_liger_kernels(model):
        reason = "Liger's kernels overwrite the graph in its first backward pass"
    elif offloaded:
        reason = "activation offloading frees the graph in its first backward pass"
    elif reentrant_modules(model):
        reason = "reentrant gradient checkpointing leaves no graph to differentiate"
    elif isinstance(wrapped, DistributedDataParallel) and wrapped.static_graph:
        reason = "a static graph of DistributedDataParallel must not be used twice"
    elif fraction is None:
        return HessianPlan(estimator, None, "the logits of the training pass can be used")
    if fraction is None:
        return HessianPlan(estimator, DEFAULT_FRACTION, reason, sharded)
    kept = math.ceil(fraction * micro_batches - 1e-9)  # 0.1 * 30 is a little more than 3
    if (
        reason is None
        and kept < micro_batches
        and kept <= _OWN_PASS_COST * fraction * micro_batches
    ):
        because = f"hessian_batch_fraction={fraction:g}, and a pass of its own would cost more"
        return HessianPlan(estimator, None, because, kept=kept)
    return HessianPlan(estimator, fraction, reason or "hessian_batch_fraction asks for it", sharded)
