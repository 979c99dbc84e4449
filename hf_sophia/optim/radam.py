"""RAdam: Adam whose adaptive step is scaled by how far its variance can be trusted."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from hf_sophia.optim.adam import adam_update, update_moments
from hf_sophia.optim.base import BaseOptimizer, Batch, Group, State
from hf_sophia.optim.fused_adam import AdamNumbers, not_fused_because, update_fused
from hf_sophia.optim.validation import check_flag
from hf_sophia.optim.weight_decay import WeightDecay


def rectification(beta2: float, step: int) -> float | None:
    """Return the rectification term `r_t`, or None while the variance is intractable.

    `rho_t`, the length of the simple moving average that the second moment resembles, starts at
    1 and grows to `2 / (1 - beta2) - 1`; the variance is taken as tractable from `rho_t >= 5`.
    """
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    decay = beta2**step
    rho = rho_inf - 2.0 * step * decay / (1.0 - decay)
    if rho < 5.0:
        return None
    return math.sqrt(
        (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
    )


class RAdam(BaseOptimizer):
    """Rectified Adam: Adam's step times `r_t`, and none of the adaptive part before that is known.

    ```
    rho_inf = 2 / (1 - beta2) - 1
    rho_t   = rho_inf - 2 t beta2^t / (1 - beta2^t)
    r_t     = sqrt((rho_t-4)(rho_t-2) rho_inf / ((rho_inf-4)(rho_inf-2) rho_t))
    theta  <- theta - lr r_t * (Adam's step)              if rho_t >= 5
    theta  <- theta - lr * m / (1 - beta1^t)              else, if degenerated_to_sgd
    ```

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate alpha, the size of a typical step per coordinate; >= 0.
        betas: Decay rates of both moments, each in [0, 1). With beta2 <= 2/3 the adaptive step
            never becomes tractable.
        eps: Added to the denominator; >= 0.
        weight_decay: A `WeightDecay`, or its strength as a number (then decoupled).
        optimized_update: Add `eps` before the bias correction of `v`.
        amsgrad: Use the running maximum of `v` in the denominator.
        degenerated_to_sgd: While intractable take plain momentum steps instead of none.
        defaults: Further defaults of group values.

    Raises:
        ValueError, TypeError: An option is out of range or of a wrong type.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = RAdam([weight], lr=0.1)
        >>> (3 * weight).sum().backward()
        >>> optimizer.step()  # rho_1 = 1: a plain step, 0.1 * 3
        >>> weight.data
        tensor([0.7000])

    References:
        Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2020, Algorithm 2.

    Differs from the paper: tractable from `rho_t >= 5`, as implementations have it (the
    paper: > 4). Differs from torch.optim.RAdam: state in fp32 at least, decoupled decay, `eps`,
    `amsgrad`, and a gradient that is not finite is an error; with `eps` matched it is the same to
    rounding.
    """

    _checks: ClassVar[dict[str, Any]] = {
        **BaseOptimizer._checks,
        "optimized_update": check_flag,
        "amsgrad": check_flag,
        "degenerated_to_sgd": check_flag,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: WeightDecay | float = WeightDecay(),
        optimized_update: bool = True,
        amsgrad: bool = False,
        degenerated_to_sgd: bool = True,
        defaults: Mapping[str, Any] | None = None,
        *,
        fused: bool | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "optimized_update": optimized_update,
            "amsgrad": amsgrad,
            "degenerated_to_sgd": degenerated_to_sgd,
        }
        super().__init__(params, options, weight_decay, defaults, fused)

    def _not_fused_because(self, param: torch.Tensor) -> str:
        return not_fused_because(param, self.weight_decay)

    def _update_batch(self, batch: Batch) -> None:
        if self.fused is False:
            return super()._update_batch(batch)
        group = batch.group
        beta2 = group["betas"][1]

        def numbers(step: int) -> AdamNumbers | None:
            r = rectification(beta2, step)
            if r is None:  # the first few steps have no second moment
                return None
            return AdamNumbers.of(
                group["lr"] * r, group["eps"], beta2, step, group["optimized_update"]
            )

        self._update_each(batch, update_fused(batch, self.weight_decay, numbers))

    def _state_names(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())

    def _update(self, theta: torch.Tensor, grad: torch.Tensor, state: State, group: Group) -> None:
        state["step"] += 1
        beta1, beta2 = group["betas"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        update_moments(m, v, grad, beta1, beta2)
        if group["amsgrad"]:
            v = torch.maximum(state["max_exp_avg_sq"], v, out=state["max_exp_avg_sq"])
        r = rectification(beta2, state["step"])
        if r is not None:
            adam_update(
                theta,
                m,
                v,
                lr=group["lr"] * r,
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                step=state["step"],
                optimized_update=group["optimized_update"],
            )
        elif group["degenerated_to_sgd"]:
            theta.add_(m, alpha=-group["lr"] / (1.0 - beta1 ** state["step"]))
