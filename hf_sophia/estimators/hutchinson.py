"""Hutchinson's estimate of the Hessian's diagonal, from Hessian-vector products."""

import torch
from torch.distributed.tensor import DTensor

from hf_sophia.estimators.grouped import GroupedEstimate, Parameters, trained

#: How the probe vectors may be distributed.
DISTRIBUTIONS = ("rademacher", "gaussian")


def _probe(
    param: torch.Tensor, distribution: str, generator: torch.Generator | None
) -> torch.Tensor:
    source = param.device if generator is None else generator.device
    if distribution == "gaussian":
        noise = torch.randn(param.shape, dtype=param.dtype, device=source, generator=generator)
        return noise.to(param.device)
    signs = torch.randint(0, 2, param.shape, device=source, generator=generator)
    return signs.to(param.device, param.dtype).mul_(2).sub_(1)


class Hutchinson(GroupedEstimate):
    """Accumulates the estimate over groups of predictions: micro-batches, for instance.

    With `L_r` the mean loss of group r, `B_r` the number of its predictions and a probe `u_r` of
    its own for each group,

    ```
    hhat = sum_r u_r * (H(B_r L_r) u_r) / sum_r B_r
    ```

    which is unbiased for the diagonal of the Hessian of the mean loss over all predictions.

    Args:
        params: The parameters to estimate for, with or without their names; those with
            `requires_grad=False` are left out.

    References:
        Liu et al., "Sophia", 2023, arXiv 2305.14342, Section 2.3 and Algorithm 1.
    """

    def add(
        self,
        loss: torch.Tensor,
        count: torch.Tensor | int = 1,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Add one group's Hessian-vector product with a Rademacher probe.

        The loss is multiplied by its count before it is differentiated, so that what a mean over
        many predictions makes small does not underflow in fp16.

        Args:
            loss: The group's mean loss, a tensor of one element with its graph. The graph is kept.
            count: The number of its predictions; a group without any adds nothing.
            generator: Source of the probe; None: torch's default.

        Raises:
            ValueError, RuntimeError: As for `hutchinson`.
        """
        self._check_params()
        count = torch.as_tensor(count, device=self.params[0].device)
        if int(count) == 0:
            return
        estimate = hutchinson(loss * count.to(loss.device), self.params, generator=generator)
        with torch.no_grad():
            self._add_count(count)
            for param, term in estimate.items():
                self._sum_of(param).add_(term)


def hutchinson(
    loss: torch.Tensor,
    params: Parameters,
    *,
    probes: int = 1,
    distribution: str = "rademacher",
    generator: torch.Generator | None = None,
) -> dict[torch.Tensor, torch.Tensor]:
    """Estimate the diagonal of the Hessian of a loss: the mean over probes u of `u * (H u)`.

    `E[u u^T] = I` makes it unbiased for the diagonal of the Hessian itself, which may be negative.
    With Rademacher probes (+1 or -1 with equal chance) a diagonal Hessian is met exactly.

    Args:
        loss: A tensor of one element with its graph, twice differentiable. The graph is kept.
        params: The parameters to estimate for, with or without their names; those with
            `requires_grad=False` are left out.
        probes: How many probe vectors to average over; >= 1. Each costs one backward pass through
            the gradient's graph.
        distribution: `"rademacher"` or `"gaussian"`.
        generator: Source of the probes, on any device; None: torch's default.

    Returns:
        `{parameter: hhat}`, shaped like the parameter, in fp32 at least; zeros where the graph does
        not reach or the loss is linear.

    Raises:
        ValueError: The loss has more than one element or no graph, an option is out of range, or a
            parameter is sharded.
        TypeError: Something in params is no parameter.
        RuntimeError: An operation in the graph has no second derivative, or the graph was freed.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> hutchinson((x**3).sum(), [x])[x]
        tensor([ 6., 12.])

    References:
        Hutchinson, 1989; Liu et al., "Sophia", 2023, arXiv 2305.14342, Section 2.3, Algorithm 1.

    Differs from the paper: Rademacher instead of Gaussian probes by default, for less variance.
    """
    if distribution not in DISTRIBUTIONS:
        known = ", ".join(map(repr, DISTRIBUTIONS))
        raise ValueError(f"distribution must be one of {known}, got {distribution!r}")
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be an integer >= 1, got {probes!r}")
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(f"loss must be a tensor of one element with its graph, got {loss!r}")
    params = trained(params)
    if not params:
        raise ValueError("params holds no parameter that requires a gradient")
    if any(isinstance(param, DTensor) for param in params):
        raise ValueError(
            "hutchinson does not support sharded parameters (DTensor): they are not in the graph"
            " that it differentiates twice. Use gauss_newton_bartlett, or whole parameters on each"
            " process"
        )
    try:
        return _estimate(loss, params, probes, distribution, generator)
    except RuntimeError as error:
        if "is not implemented" in str(error):
            raise RuntimeError(
                "an operation in the loss has no second derivative, which fused attention has not:"
                " run the forward pass under"
                " torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
            ) from error
        if "second time" in str(error):
            raise RuntimeError(
                "the graph of the loss is gone: call hutchinson before loss.backward(), or"
                " loss.backward(retain_graph=True)"
            ) from error
        raise


def _estimate(
    loss: torch.Tensor,
    params: list[torch.Tensor],
    probes: int,
    distribution: str,
    generator: torch.Generator | None,
) -> dict[torch.Tensor, torch.Tensor]:
    # autograd.grad, not backward(create_graph=True): that ties parameters and graph in a cycle.
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    dtypes = {param: torch.promote_types(param.dtype, torch.float32) for param in params}
    result = {param: torch.zeros_like(param, dtype=dtypes[param]) for param in params}
    curved = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None and g.grad_fn]
    if not curved:
        return result
    reached = [param for param, _ in curved]
    for _ in range(probes):
        probe = [_probe(param, distribution, generator) for param in reached]
        products = torch.autograd.grad(
            [grad for _, grad in curved],
            reached,
            grad_outputs=probe,
            retain_graph=True,
            allow_unused=True,
        )
        for param, u, product in zip(reached, probe, products, strict=True):
            if product is not None:
                dtype = dtypes[param]
                result[param].addcmul_(u.to(dtype), product.to(dtype), value=1.0 / probes)
    return result
