"""Exact diagonals by brute force in float64: Jacobians and Hessians, no sampling."""

import torch


def hessian_diagonal(loss: torch.Tensor, params: list[torch.Tensor]) -> list[torch.Tensor]:
    """Differentiate every entry of the gradient once more."""
    grads = torch.autograd.grad(loss, params, create_graph=True)
    diagonals = []
    for param, grad in zip(params, grads, strict=True):
        entries = [
            torch.autograd.grad(entry, param, retain_graph=True)[0].reshape(-1)[index]
            for index, entry in enumerate(grad.reshape(-1))
        ]
        diagonals.append(torch.stack(entries).view_as(param))
    return diagonals


def gauss_newton_diagonal(outputs, params, loss_of_outputs) -> list[torch.Tensor]:
    """The diagonal of J^T H J, with H the loss's full Hessian by the outputs.

    `loss_of_outputs` maps the flattened outputs to the mean loss over all predictions.
    """
    flat = outputs.reshape(-1)
    hessian = torch.autograd.functional.hessian(loss_of_outputs, flat.detach())
    rows = [torch.autograd.grad(o, params, retain_graph=True, allow_unused=True) for o in flat]
    diagonals = []
    for index, param in enumerate(params):
        zero = torch.zeros_like(param)
        jacobian = torch.stack([zero if r[index] is None else r[index] for r in rows]).flatten(1)
        diagonals.append(torch.einsum("ap,ab,bp->p", jacobian, hessian, jacobian).view_as(param))
    return diagonals
