"""Sophia's step for one tensor, in torch's own operations: what kernels are tested against."""

import torch

from hf_sophia.kernels import StepScalars

#: Elements that are updated at a time on the CPU: from one operation to the next they stay in the
#: cache. A quarter of it and four times as many were slower, and whole tensors of 20M took four
#: times as long. Elsewhere, only so that no parameter is matched by memory of its size.
BLOCK = 2**18
LARGE_BLOCK = 2**24


class Scratch:
    """Memory to work in, kept from tensor to tensor and from step to step."""

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def rows(self, like: torch.Tensor, size: int) -> torch.Tensor:
        """Return two rows, whose content is whatever it was.

        Args:
            like: Of its device and dtype.
            size: Their length.

        Returns:
            Shape (2, size).
        """
        place = like.device, like.dtype
        if place not in self._kept or self._kept[place].numel() < 2 * size:
            self._kept[place] = like.new_empty(2 * size)
        return self._kept[place][: 2 * size].view(2, size)


def sophia_update(
    theta: torch.Tensor,
    m: torch.Tensor,
    h: torch.Tensor,
    g: torch.Tensor,
    rho: float | torch.Tensor,
    scalars: StepScalars,
    scratch: torch.Tensor,
) -> torch.Tensor:
    """Change `m` and `theta` in place: lines 6 and 13 of Algorithm 3, with lr = eta * rho.

    Returns the number of coordinates that were clipped. `scratch` has two rows like the tensors.
    """
    ratio, ahead = scratch
    m.lerp_(g, 1.0 - scalars.beta1)
    numerator = torch.lerp(m, g, 1.0 - scalars.beta1, out=ahead) if scalars.nesterov else m
    torch.div(numerator, curvature(h, scalars, out=ratio), out=ratio)
    ratio.clamp_(-rho, rho)
    clipped = (torch.abs(ratio, out=ahead) >= rho).sum()
    if isinstance(rho, torch.Tensor):
        theta.sub_(ratio.mul_(scalars.lr / rho))
    else:
        theta.add_(ratio, alpha=-scalars.lr / rho)
    return clipped


def curvature(
    h: torch.Tensor, scalars: StepScalars, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what to divide by: `max(h / hessian_weight, eps)`."""
    if scalars.hessian_weight == 1.0:
        return torch.clamp(h, min=scalars.eps, out=out)
    return torch.div(h, scalars.hessian_weight, out=out).clamp_(min=scalars.eps)


def updated_in_blocks(
    tensors: tuple[torch.Tensor, ...],
    rho: float | torch.Tensor,
    scalars: StepScalars,
    scratch: Scratch,
) -> torch.Tensor:
    """Do `sophia_update`, in parts where the tensors are contiguous.

    Args:
        tensors: The parameter, m, h and the gradient.
        rho: The threshold.
        scalars: The other options.
        scratch: To work in.

    Returns:
        The number of clipped coordinates.
    """
    theta, size = tensors[0], tensors[0].numel()
    block = BLOCK if theta.device.type == "cpu" else LARGE_BLOCK
    if size <= block or not all(tensor.is_contiguous() for tensor in tensors):
        rows = scratch.rows(theta, size).view(2, *theta.shape)
        return sophia_update(*tensors, rho, scalars, rows)
    rows = scratch.rows(theta, block)
    parts = zip(*(tensor.view(-1).split(block) for tensor in tensors), strict=True)
    clipped = [sophia_update(*part, rho, scalars, rows[:, : len(part[0])]) for part in parts]
    return torch.stack(clipped).sum()
