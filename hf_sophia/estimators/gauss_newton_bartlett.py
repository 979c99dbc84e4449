"""The Gauss-Newton-Bartlett estimate of the Hessian's diagonal, from labels the model samples."""

import math

import torch
from torch.distributed.tensor import DTensor

from hf_sophia.estimators.differentiation import gradients
from hf_sophia.estimators.grouped import GroupedEstimate, Parameters
from hf_sophia.estimators.likelihoods import sampled_cotangent


class GaussNewtonBartlett(GroupedEstimate):
    """Accumulates the estimate over groups of predictions: micro-batches, for instance.

    With `L_r` the mean loss of group r's sampled labels, `B_r` the number of its predictions and
    `G_r = B_r grad L_r` the gradient of the summed loss, which is what is computed,

    ```
    hhat = sum_r G_r^2 / sum_r B_r
    ```

    Every prediction's label is drawn on its own, so the cross terms of `G_r^2` vanish in the mean
    and the estimate is unbiased for the diagonal of the Gauss-Newton matrix of the mean loss,
    however the predictions are grouped. More groups have fewer cross terms and less variance.

    Under FSDP2 a group is what all processes add together, and it is made after the backward pass
    of the step's last micro-batch, with every parameter that trains.

    Args:
        params: The parameters to estimate for, with or without their names; those with
            `requires_grad=False` are left out.

    References:
        Liu et al., "Sophia", 2023, arXiv 2305.14342, Section 2.3 and Algorithm 2.
    """

    def add(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        likelihood: str = "categorical",
        generator: torch.Generator | None = None,
        retain_graph: bool = False,
        loss_scale: float | None = None,
    ) -> None:
        """Sample labels for one group, differentiate their loss and add its square.

        Nothing touches `.grad`. Arguments as for `gauss_newton_bartlett`.

        Args:
            logits: The model's outputs with their graph, shape (..., classes).
            targets: Say which predictions count: those that are not -100; None: all.
            likelihood: `"categorical"`, `"bernoulli"` or `"gaussian"`.
            generator: Source of the labels' randomness.
            retain_graph: Keep the graph for a later backward pass through it.
            loss_scale: For fp16: the factor of the training loss, `GradScaler.get_scale()`, over n
                where that is a mean over n groups. It keeps gradients within fp16's range, and is
                in the pass and not in the estimate.

        Raises:
            ValueError: The logits carry no graph, an argument is wrong, or only some parameters are
                sharded.
            RuntimeError: The graph was freed by an earlier backward pass, or FSDP2 does not reduce
                gradients at this point of the step.
        """
        self._check_params()
        differentiable = isinstance(logits, torch.Tensor) and logits.is_floating_point()
        if differentiable and not logits.requires_grad:
            raise ValueError(
                "the logits carry no graph: run the forward pass with gradients enabled and pass"
                " them as the model returned them, not detached"
            )
        cotangent, count = sampled_cotangent(
            logits, targets, likelihood=likelihood, generator=generator
        )
        factor = 1.0 if loss_scale is None else _factor_on_the_sum(loss_scale, int(count))
        if factor != 1.0:
            cotangent = cotangent * factor
        try:
            grads = gradients(logits, self.params, cotangent, retain_graph=retain_graph)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise RuntimeError(
                "the graph of the logits is gone: estimate before loss.backward(), or call"
                " loss.backward(retain_graph=True) on the steps where the Hessian is due"
            ) from error
        with torch.no_grad():
            self._add_count(count)
            for index, param in enumerate(self.params):
                # Let go of each gradient as its square is taken: one copy of all at a time.
                grad, grads[index] = grads[index], None
                if grad is not None:
                    total = self._sum_of(param)
                    grad = grad.to(total.dtype)
                    if factor != 1.0:
                        grad = grad / factor
                    total.addcmul_(grad, grad)


#: A gradient scaler goes to the edge of fp16's range, with the gradients of the true labels. Once
#: these are learnt those of sampled ones are larger, as (p (1 - p))^(1/2) is to 1 - p.
_HEADROOM = 2.0**-5


def _factor_on_the_sum(loss_scale: float, count: int) -> float:
    """Return what a summed loss is multiplied by, a power of two, where its mean has `loss_scale`.

    Powers of two leave no rounding behind when they are taken out again.
    """
    if not math.isfinite(loss_scale) or loss_scale <= 0.0:
        raise ValueError(f"loss_scale must be positive and finite, got {loss_scale!r}")
    return 2.0 ** round(math.log2(_HEADROOM * loss_scale / max(count, 1)))


def gauss_newton_bartlett(
    logits: torch.Tensor,
    params: Parameters,
    *,
    targets: torch.Tensor | None = None,
    likelihood: str = "categorical",
    generator: torch.Generator | None = None,
    retain_graph: bool = False,
    loss_scale: float | None = None,
) -> dict[torch.Tensor, torch.Tensor]:
    """Estimate the diagonal Gauss-Newton matrix of the mean loss from one batch of logits.

    `hhat = B grad L * grad L`, with L the mean negative log-likelihood of labels that are drawn
    from the model's own distribution, and B how many there are.

    Args:
        logits: The model's outputs with their graph, shape (..., classes).
        params: The parameters to estimate for, with or without their names; those with
            `requires_grad=False` are left out.
        targets: Only say which predictions count: those that are not -100. Shape (...) for
            `"categorical"` (for a causal language model, the labels shifted by one), else that of
            the logits; None: all count.
        likelihood: `"categorical"` (cross-entropy), `"bernoulli"` (binary cross-entropy) or
            `"gaussian"` (squared error, without a factor 1/2).
        generator: Source of the labels' randomness, on any device; None: torch's default.
        retain_graph: Keep the graph for the training loss's `backward()`.
        loss_scale: For fp16: the factor of the training loss, `GradScaler.get_scale()`; it does not
            reach the estimate.

    Returns:
        `{parameter: hhat}`, shaped like the parameter, >= 0, in fp32 at least; zeros where the
        graph does not reach.

    Raises:
        ValueError: The logits carry no graph, no prediction counts, or an argument is wrong.
        TypeError: Something in params is no parameter.
        RuntimeError: The graph was freed by an earlier backward pass.

    Under DistributedDataParallel it is this process's own; `GaussNewtonBartlett.all_reduce` makes
    it everyone's. Under FSDP2 it is that of all processes, which call it together.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> logits = model(torch.randn(8, 4))
        >>> estimate = gauss_newton_bartlett(logits, model.parameters())
        >>> estimate[model.weight].shape
        torch.Size([3, 4])

    References:
        Liu et al., "Sophia", 2023, arXiv 2305.14342, Section 2.3 and Algorithm 2.

    Differs from the authors' code: no clipping of the gradient before it is squared, and only the
    predictions that the loss counts are sampled and counted.
    """
    accumulator = GaussNewtonBartlett(params)
    accumulator.add(
        logits,
        targets,
        likelihood=likelihood,
        generator=generator,
        retain_graph=retain_graph,
        loss_scale=loss_scale,
    )
    if any(isinstance(param, DTensor) for param in accumulator.params):
        accumulator.all_reduce()
    return accumulator.estimate()
