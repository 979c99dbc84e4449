"""Adam and RAdam by torch's own fused kernel, in one pass over memory for a list of tensors.

The kernel takes AdamW's step. What differs is folded into its numbers: another place of eps into
eps, a factor on the step into lr, and the decay that must not change with lr into weight_decay.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import increment_version

from hf_sophia.optim.base import Batch
from hf_sophia.optim.sharding import local, placed_like
from hf_sophia.optim.weight_decay import WeightDecay

#: Where torch has the kernel.
_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class AdamNumbers:
    """What AdamW's step is taken with: `m_hat lr / (sqrt(v_hat) + eps)`.

    Args:
        lr: The factor of the step.
        eps: Added to the denominator.
    """

    lr: float
    eps: float

    @classmethod
    def of(cls, lr: float, eps: float, beta2: float, step: int, early: bool) -> "AdamNumbers":
        """Return the numbers of a step with eps before the bias correction of v, or after it.

        Args:
            lr: The factor of the step with corrected moments.
            eps: Added to `sqrt(v)` if early, else to `sqrt(v_hat)`.
            beta2: Decay rate of v.
            step: The number of the step, from 1.
            early: Which of them.
        """
        return cls(lr, eps / math.sqrt(1.0 - beta2**step) if early else eps)


def not_fused_because(param: torch.Tensor, weight_decay: WeightDecay) -> str:
    """Say why torch's kernel can't take a parameter's step; empty: it can."""
    if type(weight_decay) is not WeightDecay:
        return f"torch's kernel knows nothing of {type(weight_decay).__name__}"
    if not param.is_contiguous():
        return "it is not contiguous"
    if param.device.type not in _DEVICES:
        return f"torch has no kernel for device {param.device.type!r}"
    if param.dtype not in (torch.float32, torch.float64):
        return f"torch's kernel would keep the state in {param.dtype}"
    return ""


def update_fused(
    batch: Batch, weight_decay: WeightDecay, numbers: Callable[[int], AdamNumbers | None]
) -> list[int]:
    """Update a group's parameters as far as torch's kernel can.

    Args:
        batch: The parameters; their state has `exp_avg`, `exp_avg_sq`, `step` and, for AMSGrad,
            `max_exp_avg_sq`.
        weight_decay: Applied here too.
        numbers: Says with what to take the step of a number; None: the kernel can't.

    Returns:
        The places of the parameters that are left.
    """
    alike: dict[tuple[int, torch.device, torch.dtype], list[int]] = {}
    rest = []
    for index, (param, grad, state) in enumerate(
        zip(batch.params, batch.grads, batch.states, strict=True)
    ):
        if _kernel_takes(param, grad, state, weight_decay):
            key = (state["step"] + 1, local(param).device, param.dtype)
            alike.setdefault(key, []).append(index)
        else:
            rest.append(index)
    for (step, device, _), indices in alike.items():
        own = numbers(step)
        decay = None if own is None else _decay(own, weight_decay, batch.group)
        if decay is None:
            rest += indices
            continue
        params = [batch.params[index] for index in indices]
        grads = [batch.grads[index] for index in indices]
        states = [batch.states[index] for index in indices]
        amsgrad = batch.group.get("amsgrad", False)
        largest = [local(state["max_exp_avg_sq"]) for state in states] if amsgrad else []
        take = torch._fused_adamw_ if weight_decay.weight_decouple else torch._fused_adam_
        beta1, beta2 = batch.group["betas"]
        take(
            [local(param) for param in params],
            [local(placed_like(g, p)) for g, p in zip(grads, params, strict=True)],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            largest,
            [torch.tensor(float(step), dtype=torch.float32, device=device)] * len(states),
            lr=own.lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=own.eps,
            amsgrad=amsgrad,
            maximize=False,
        )
        increment_version(params)  # the kernel writes past autograd
        for state in states:
            state["step"] = step
    return rest


def _decay(own: AdamNumbers, weight_decay: WeightDecay, group: dict[str, float]) -> float | None:
    """Return the kernel's weight_decay, which it multiplies by lr; None: there is none."""
    if not weight_decay.weight_decouple:
        return group["weight_decay"]
    lost = 1.0 - weight_decay.factor(group)
    if lost == 0.0:
        return 0.0
    return None if own.lr == 0.0 else lost / own.lr


def _kernel_takes(
    param: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], weight_decay: WeightDecay
) -> bool:
    """Whether all lie in memory alike, which torch's kernel takes for granted."""
    tensors = [grad, *(value for value in state.values() if isinstance(value, torch.Tensor))]
    return not not_fused_because(param, weight_decay) and all(
        tensor.layout == torch.strided
        and tensor.dtype == param.dtype
        and tensor.shape == param.shape
        and tensor.is_contiguous()
        for tensor in tensors
    )
