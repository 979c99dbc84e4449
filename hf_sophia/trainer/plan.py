"""Which way a run's Hessian is estimated; decided once, from how the model is wrapped."""

from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from hf_sophia.trainer.own_pass import reentrant_modules
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
    """

    estimator: str
    fraction: float | None
    reason: str
    sharded: bool = False

    def __str__(self) -> str:
        """Say it in one line."""
        if self.fraction is None:
            return f"{self.estimator} on the kept graph of the training pass"
        return f"{self.estimator} in a pass of its own on {self.fraction:g} of the batch"


def make_plan(
    wrapped: torch.nn.Module, model: torch.nn.Module, estimator: str, fraction: float | None
) -> HessianPlan:
    """Choose between the kept graph and a forward pass of its own.

    Args:
        wrapped: The model as it trains.
        model: The model inside all wrappers.
        estimator: `"gnb"` or `"hutchinson"`.
        fraction: The share of the batch that was asked for; None: nothing was.

    Returns:
        The plan.
    """
    wrapped = inside_compilation(wrapped)
    sharded = isinstance(wrapped, FSDPModule)
    reason = None
    if estimator == "hutchinson":
        reason = "Hutchinson's estimator needs attention with a second derivative"
    elif fraction is not None:
        reason = "hessian_batch_fraction asks for it"
    elif sharded:
        reason = "FSDP2's gradients come out of a backward pass only"
    elif reentrant_modules(model):
        reason = "reentrant gradient checkpointing leaves no graph to differentiate"
    elif isinstance(wrapped, DistributedDataParallel) and wrapped.static_graph:
        reason = "a static graph of DistributedDataParallel must not be used twice"
    if reason is None:
        return HessianPlan(estimator, None, "the logits of the training pass can be used")
    fraction = DEFAULT_FRACTION if fraction is None else fraction
    return HessianPlan(estimator, fraction, reason, sharded)
