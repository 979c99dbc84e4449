"""Sophia's step for one tensor, in torch's own operations: what kernels are tested against."""

import torch

from hf_sophia.kernels import StepScalars

#: Elements that are updated at a time on the CPU: from one operation to the next they stay in the
#: cache, and no operation makes a tensor as large as the parameter. A quarter of it and four times
#: as many were slower, and whole tensors of 20M took four times as long.
BLOCK = 2**18


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
    tensors: tuple[torch.Tensor, ...], rho: float | torch.Tensor, scalars: StepScalars
) -> torch.Tensor:
    """Do `sophia_update`, on the CPU in parts that fit into its cache.

    Args:
        tensors: The parameter, m, h and the gradient.
        rho: The threshold.
        scalars: The other options.

    Returns:
        The number of clipped coordinates.
    """
    theta = tensors[0]
    whole = theta.device.type != "cpu" or theta.numel() <= BLOCK
    if whole or not all(tensor.is_contiguous() for tensor in tensors):
        return sophia_update(*tensors, rho, scalars, theta.new_empty(2, *theta.shape))
    scratch = theta.new_empty(2, BLOCK)
    parts = zip(*(tensor.view(-1).split(BLOCK) for tensor in tensors), strict=True)
    clipped = [sophia_update(*part, rho, scalars, scratch[:, : len(part[0])]) for part in parts]
    return torch.stack(clipped).sum()
