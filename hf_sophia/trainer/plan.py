"""Which way a run's Hessian is estimated, or why it can't be; decided before its first step."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_compiled_module
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_sophia.trainer.heads import base_model
from hf_sophia.trainer.own_pass import has_fused_head, reentrant_modules

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
    """

    estimator: str
    fraction: float | None
    reason: str

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
    reason = None
    if estimator == "hutchinson":
        reason = "Hutchinson's estimator needs attention with a second derivative"
    elif fraction is not None:
        reason = "hessian_batch_fraction asks for it"
    elif reentrant_modules(model):
        reason = "reentrant gradient checkpointing leaves no graph to differentiate"
    elif isinstance(wrapped, DistributedDataParallel) and wrapped.static_graph:
        reason = "a static graph of DistributedDataParallel must not be used twice"
    if reason is None:
        return HessianPlan(estimator, None, "the logits of the training pass can be used")
    return HessianPlan(estimator, DEFAULT_FRACTION if fraction is None else fraction, reason)


def check_supported(args: Any, accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Refuse what would give every process or shard a Hessian of its own.

    Args:
        args: The `TrainingArguments`.
        accelerator: The Trainer's.
        model: The unwrapped model.

    Raises:
        ValueError: The set-up is not supported; the message says what is.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"Sophia does not run under torch.nn.DataParallel, got {args.n_gpu} devices in one"
            " process: start with torchrun --nproc_per_node, or set CUDA_VISIBLE_DEVICES to one"
        )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
    ):
        raise ValueError(
            f"Sophia does not support {accelerator.distributed_type.value} so far; run on one"
            " process or with plain DistributedDataParallel (torchrun)"
        )
    for name, param in model.named_parameters():
        if isinstance(param, DTensor):
            raise ValueError(
                f"Sophia does not support sharded parameters so far, and {name} is a DTensor; train"
                " with whole parameters on each process"
            )


def _is_compiled(model: torch.nn.Module) -> bool:
    """Whether any part of a model runs compiled, by `torch.compile` or its own `compile()`."""
    return any(
        is_compiled_module(module) or vars(module).get("_compiled_call_impl") is not None
        for module in model.modules()
    )


def check_twice_differentiable(args: Any, wrapped: torch.nn.Module, model: torch.nn.Module) -> None:
    """Refuse models whose graph has no second derivative, which Hutchinson's estimator needs.

    Args:
        args: The `TrainingArguments`.
        wrapped: The model as it trains.
        model: The model inside all wrappers.

    Raises:
        ValueError: The message says what to change.
    """
    instead = "or use hessian_computation_type=gnb"
    if args.torch_compile or _is_compiled(wrapped):
        raise ValueError(
            "hessian_computation_type=hutchinson needs a second derivative, which compiled models"
            f" do not have: leave torch_compile off, {instead}"
        )
    if args.use_liger_kernel or has_fused_head(model):
        raise ValueError(
            "hessian_computation_type=hutchinson needs a second derivative, which the fused loss of"
            f" Liger or TRL does not have: leave use_liger_kernel off, {instead}"
        )
    if reentrant_modules(model):
        raise ValueError(
            "hessian_computation_type=hutchinson needs a second derivative, which reentrant"
            " gradient checkpointing does not have: set"
            f" gradient_checkpointing_kwargs={{'use_reentrant': False}}, {instead}"
        )
    config = getattr(base_model(model), "config", None)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        raise ValueError(
            "hessian_computation_type=hutchinson needs a second derivative, which attention by"
            f" {attention!r} does not have: load the model with attn_implementation='sdpa',"
            f" {instead}"
        )
