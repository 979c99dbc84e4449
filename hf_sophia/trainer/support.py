"""Set-ups whose Hessian would be wrong or is unproven: refused, with the reason and what works."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_compiled_module
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_sophia.trainer.heads import base_model
from hf_sophia.trainer.own_pass import has_fused_head, has_liger_kernels, reentrant_modules

#: How processes may work together, besides FSDP version 2.
_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

_WORKS = "one process, DistributedDataParallel (torchrun) or FSDP version 2"


_OFFLOADED = (
    "Sophia is not tested with FSDP's CPU offload, where gradients are on another device than the"
    " pass that makes them: leave offload_params off (fsdp_cpu_offload of a DistributedConfig)"
)


def inside_compilation(wrapped: torch.nn.Module) -> torch.nn.Module:
    """Return what tells how processes work together; FSDP2 shards what is compiled already."""
    while not isinstance(wrapped, FSDPModule) and hasattr(wrapped, "_orig_mod"):
        wrapped = wrapped._orig_mod
    return wrapped


def check_supported(args: Any, accelerator: Accelerator) -> None:
    """Refuse ways of using several devices that are wrong or unproven, before a model is wrapped.

    Args:
        args: The `TrainingArguments`.
        accelerator: The Trainer's.

    Raises:
        ValueError: The set-up is not supported; the message says what is.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"Sophia does not run under torch.nn.DataParallel, got {args.n_gpu} devices in one"
            " process: start with torchrun --nproc_per_node, or set CUDA_VISIBLE_DEVICES to one"
        )
    _check_parallelism(getattr(accelerator, "parallelism_config", None))
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        _check_fsdp(accelerator)
    elif kind == DistributedType.DEEPSPEED:
        raise ValueError(
            "Sophia does not support DeepSpeed: it steps inside of the backward pass, its"
            " optimizer holds flat pieces of parameters, and its accessors can't write their state"
            " before the first step, when the first Hessian is due, nor in any group but the first."
            " Use FSDP version 2 instead (fsdp=True, fsdp_config={'fsdp_version': 2}), which shards"
            " the same states"
        )
    elif kind not in _PLAIN:
        raise ValueError(f"Sophia is not tested under {kind.value}; what works is {_WORKS}")


def _check_parallelism(config: Any) -> None:
    if config is None:
        return
    kinds = {
        "tp": "tensor parallelism",
        "cp": "context parallelism",
        "sp": "sequence parallelism",
        "dp_replicate": "hybrid sharding (dp_replicate_size)",
    }
    for name, kind in kinds.items():
        size = getattr(config, f"{name}_size", 1) or 1
        # Replicas alone are plain DistributedDataParallel.
        sharded = name != "dp_replicate" or (config.dp_shard_size or 1) > 1
        if size > 1 and sharded:
            raise ValueError(
                f"Sophia does not support {kind}, got {name}_size={size}: its sampled labels and"
                f" their count are not shown to be right there; what works is {_WORKS}"
            )


def _check_fsdp(accelerator: Accelerator) -> None:
    version2 = "fsdp_config={'fsdp_version': 2}"
    if not getattr(accelerator, "is_fsdp2", False):
        raise ValueError(
            "Sophia does not support FSDP version 1: it flattens the parameters of a layer into one"
            f" and is deprecated in torch. Use {version2}"
        )
    if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(_OFFLOADED)


def check_wrapped(
    wrapped: torch.nn.Module, model: torch.nn.Module, accelerator: Accelerator
) -> None:
    """Refuse a wrapper under which each process would have a Hessian of its own.

    Args:
        wrapped: The model as it trains.
        model: The model inside all wrappers.
        accelerator: The Trainer's.

    Raises:
        ValueError: The message says what works.
    """
    outside = inside_compilation(wrapped)
    sharded = isinstance(outside, FSDPModule)
    if accelerator.num_processes > 1 and not (
        sharded or isinstance(outside, DistributedDataParallel)
    ):
        raise ValueError(
            f"Sophia does not know how {type(outside).__name__} brings the gradients of"
            f" {accelerator.num_processes} processes together; what works is {_WORKS}"
        )
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if sharded and not isinstance(param, DTensor):
            raise ValueError(
                f"FSDP does not shard {name}, so every process would have a gradient of its own:"
                " freeze it, or leave it out of ignored_modules"
            )
        if sharded and param.to_local().device.type != accelerator.device.type:
            raise ValueError(_OFFLOADED)
        if isinstance(param, DTensor) and (not sharded or param.device_mesh.ndim > 1):
            raise ValueError(
                f"Sophia does not support how {name} is sharded, over a mesh of"
                f" {tuple(param.device_mesh.shape)} processes: {_WORKS} work"
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
    if isinstance(inside_compilation(wrapped), FSDPModule):
        raise ValueError(
            "hessian_computation_type=hutchinson needs a second derivative, which sharded"
            f" parameters do not have: train with DistributedDataParallel, {instead}"
        )
    if args.torch_compile or _is_compiled(wrapped):
        raise ValueError(
            "hessian_computation_type=hutchinson needs a second derivative, which compiled models"
            f" do not have: leave torch_compile off, {instead}"
        )
    if args.use_liger_kernel or has_liger_kernels(model) or has_fused_head(model):
        raise ValueError(
            "hessian_computation_type=hutchinson needs a second derivative, which the kernels of"
            " Liger and the fused loss of TRL do not have: leave use_liger_kernel and Liger's"
            f" patches off, {instead}"
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
