"""Weight decay as one part that every optimizer of this package shares."""

from dataclasses import dataclass
from typing import Any

import torch

from hf_sophia.optim.validation import check_flag, check_non_negative


@dataclass(frozen=True)
class WeightDecay:
    """L2 regularisation of a parameter, decoupled from the gradient or added to it.

    Decoupled, the parameter shrinks before the update and the gradient stays as it is:
    `theta <- theta * (1 - lr * weight_decay)`, or `theta * (1 - weight_decay)` when `absolute`.
    Not decoupled, the gradient becomes `grad + weight_decay * theta`.

    Args:
        weight_decay: Default strength for parameter groups that name none; >= 0. The strength in
            force is always `group["weight_decay"]`, so groups may differ.
        weight_decouple: Decay the parameter itself (AdamW's way) instead of its gradient.
        absolute: Do not multiply the decoupled decay by the learning rate.

    Raises:
        ValueError: `weight_decay` is negative or not finite, or `absolute` is asked for without
            `weight_decouple`, where it would have no effect.
        TypeError: `weight_decay` is not a number, or a flag is not True or False.

    Example:
        >>> import torch
        >>> decay = WeightDecay(0.1)
        >>> weight = torch.tensor([1.0])
        >>> _ = decay(weight, torch.tensor([3.0]), {"lr": 0.5, "weight_decay": 0.1})
        >>> weight
        tensor([0.9500])

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """

    weight_decay: float = 0.0
    weight_decouple: bool = True
    absolute: bool = False

    def __post_init__(self) -> None:
        """Check the strength once, here."""
        check_non_negative("weight_decay", self.weight_decay)
        check_flag("weight_decouple", self.weight_decouple)
        check_flag("absolute", self.absolute)
        if self.absolute and not self.weight_decouple:
            raise ValueError(
                "absolute=True needs weight_decouple=True: a decay that is added to the gradient"
                " is always multiplied by the learning rate"
            )

    @torch.no_grad()
    def __call__(
        self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]
    ) -> torch.Tensor:
        """Decay `param` in place, or return its gradient with the decay added.

        Args:
            param: The parameter, any shape; changed in place when decoupled.
            grad: Its gradient, same shape; never changed.
            group: The parameter group: reads `weight_decay`, and `lr` unless `absolute`.

        Returns:
            The gradient to use, same shape as `grad`.
        """
        strength = group["weight_decay"]
        if strength == 0.0:
            return grad
        if not self.weight_decouple:
            return grad.add(param, alpha=strength)
        param.mul_(self.factor(group))
        return grad

    def factor(self, group: dict[str, Any]) -> float:
        """Return what a decoupled decay multiplies parameters by.

        Args:
            group: The parameter group: reads `weight_decay`, and `lr` unless `absolute`.
        """
        strength = group["weight_decay"]
        return 1.0 - (strength if self.absolute else group["lr"] * strength)
