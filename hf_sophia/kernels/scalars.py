"""What the forms of Sophia's step take besides tensors."""

from dataclasses import dataclass

#: The smallest number that fp32 holds with all its bits; below, a division may end in 0 / 0.
SMALLEST_NORMAL = 2.0**-126

#: Stands for a rho that there is none of yet: with it every coordinate that moves is clipped.
SMALLEST_RHO = 1e-30


@dataclass(frozen=True, slots=True)
class StepScalars:
    """The options of one step.

    Args:
        lr: The largest step per coordinate.
        decay: What parameters are multiplied by first.
        beta1: Decay rate of the gradient's average.
        eps: Smallest curvature to divide by.
        hessian_weight: What the Hessian's average is divided by.
        nesterov: Clip the average's next value along the gradient.
    """

    lr: float
    decay: float
    beta1: float
    eps: float
    hessian_weight: float
    nesterov: bool

    @property
    def scaled_eps(self) -> float:
        """The smallest curvature before it is divided by `hessian_weight`; a normal fp32 number."""
        return max(self.eps * self.hessian_weight, SMALLEST_NORMAL)
