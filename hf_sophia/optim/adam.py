"""Adam: an exponential moving average of the gradient over the root of that of its square."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from hf_sophia.optim.base import BaseOptimizer, Batch, Group, State
from hf_sophia.optim.fused_adam import AdamNumbers, not_fused_because, update_fused
from hf_sophia.optim.validation import check_flag
from hf_sophia.optim.weight_decay import WeightDecay


def update_moments(
    m: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, beta1: float, beta2: float
) -> None:
    """Fold a gradient into both moments, in place: `m <- b1 m + (1-b1) g`, `v` with `g^2`."""
    m.lerp_(grad, 1.0 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)


def adam_update(
    theta: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    optimized_update: bool,
) -> None:
    """Change `theta` in place by one bias-corrected Adam step."""
    correction1 = 1.0 - beta1**step
    correction2 = 1.0 - beta2**step
    if optimized_update:
        theta.addcdiv_(m, v.sqrt().add_(eps), value=-lr * math.sqrt(correction2) / correction1)
    else:
        theta.addcdiv_(m, v.div(correction2).sqrt_().add_(eps), value=-lr / correction1)


class Adam(BaseOptimizer):
    """Adam, with the bias correction of the second moment before or after `eps` is added.

    ```
    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    theta <- theta - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    ```

    With `optimized_update` the denominator is `sqrt(v) + eps` and the step size
    `lr * sqrt(1 - beta2^t) / (1 - beta1^t)`: the same but for the meaning of `eps`.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate alpha, the size of a typical step per coordinate; >= 0.
        betas: Decay rates of both moments, each in [0, 1).
        eps: Added to the denominator; >= 0. Far smaller than torch's 1e-8.
        weight_decay: A `WeightDecay`, or its strength as a number (then decoupled, as AdamW).
        optimized_update: Add `eps` before the bias correction of `v`.
        defaults: Further defaults of group values.

    Raises:
        ValueError, TypeError: An option is out of range or of a wrong type.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Adam([weight], lr=0.1)
        >>> (3 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000])

    References:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, Algorithm 1 and the
        reordering at the end of Section 2.

    Differs from torch.optim.Adam: state in fp32 at least, decoupled decay, `eps`, and a gradient
    that is not finite is an error. With `optimized_update=False` and `eps` matched it is the same
    to rounding.
    """

    _checks: ClassVar[dict[str, Any]] = {**BaseOptimizer._checks, "optimized_update": check_flag}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: WeightDecay | float = WeightDecay(),
        optimized_update: bool = True,
        defaults: Mapping[str, Any] | None = None,
        *,
        fused: bool | None = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "optimized_update": optimized_update}
        super().__init__(params, options, weight_decay, defaults, fused)

    def _not_fused_because(self, param: torch.Tensor) -> str:
        return not_fused_because(param, self.weight_decay)

    def _update_batch(self, batch: Batch) -> None:
        if self.fused is False:
            return super()._update_batch(batch)
        group = batch.group

        def numbers(step: int) -> AdamNumbers:
            return AdamNumbers.of(
                group["lr"], group["eps"], group["betas"][1], step, group["optimized_update"]
            )

        self._update_each(batch, update_fused(batch, self.weight_decay, numbers))

    def _state_names(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _update(self, theta: torch.Tensor, grad: torch.Tensor, state: State, group: Group) -> None:
        state["step"] += 1
        beta1, beta2 = group["betas"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        update_moments(m, v, grad, beta1, beta2)
        adam_update(
            theta,
            m,
            v,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            step=state["step"],
            optimized_update=group["optimized_update"],
        )
