"""Gradients of a model's outputs for an estimate, without a trace in `.grad`."""

import torch
from torch.distributed.tensor import DTensor


def gradients(
    outputs: torch.Tensor,
    params: list[torch.Tensor],
    cotangent: torch.Tensor,
    *,
    retain_graph: bool,
) -> list[torch.Tensor | None]:
    """Return the vector-Jacobian product of the outputs, for each parameter.

    Parameters that FSDP2 has sharded are not in the graph: what they get comes from its hooks, in a
    backward pass that reduces over the processes. It is called by all of them together, and the
    result is the sum over them.

    Args:
        outputs: A tensor with its graph.
        params: Either none of them sharded or all of them, then with every parameter that trains.
        cotangent: The vector, shaped like the outputs.
        retain_graph: Keep the graph for a later backward pass.

    Returns:
        A gradient for each parameter, None where the graph does not reach; DTensors for DTensors.

    Raises:
        ValueError: Only some parameters are sharded.
        RuntimeError: The graph is gone, or sharded gradients are not reduced.
    """
    sharded = [isinstance(param, DTensor) for param in params]
    if all(sharded):
        return _reduced_gradients(outputs, params, cotangent, retain_graph)
    if any(sharded):
        shape = tuple(params[sharded.index(False)].shape)
        raise ValueError(
            f"some parameters are sharded and one of shape {shape} is not, so its gradient would be"
            " that of this process alone: shard all that train with fully_shard, or none"
        )
    return list(
        torch.autograd.grad(
            outputs, params, grad_outputs=cotangent, retain_graph=retain_graph, allow_unused=True
        )
    )


def _reduced_gradients(
    outputs: torch.Tensor, params: list[DTensor], cotangent: torch.Tensor, retain_graph: bool
) -> list[torch.Tensor | None]:
    held = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        outputs.backward(cotangent, retain_graph=retain_graph)
        grads = [param.grad for param in params]
    finally:
        for param, grad in zip(params, held, strict=True):
            param.grad = grad
    if all(grad is None for grad in grads):
        raise RuntimeError(
            "the backward pass left no gradient: between micro-batches, where FSDP2 does not reduce"
            " (set_requires_gradient_sync(False), no_sync), there is none to estimate from, and"
            " the training gradients of this step are spoilt. Estimate after the backward pass of"
            " the last micro-batch"
        )
    for param, grad in zip(params, grads, strict=True):
        if grad is not None:
            # FSDP2 takes the mean over the processes, and the estimate is about sums.
            grad.mul_(param.device_mesh.size())
    return grads
