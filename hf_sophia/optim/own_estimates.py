"""Estimates that Sophia makes by itself in `step`, for a plain loop in one process."""

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from hf_sophia.estimators import gauss_newton_bartlett, hutchinson
from hf_sophia.optim.base import BaseOptimizer


class OwnEstimates(BaseOptimizer):
    """What `Sophia.step` does with logits and closures; `hessian_due` says when."""

    hessian_due: bool
    update_hessian: Callable[..., None]

    def _trainable(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _from_logits(self, logits: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
        return gauss_newton_bartlett(logits, self._trainable())

    def _check_alone(self, call: str, *, shards: bool) -> None:
        """Refuse what differentiates here, past DistributedDataParallel, in several processes.

        Args:
            call: What the user wrote.
            shards: Whether it is right for sharded parameters, whose processes do it together.
        """
        if not distributed.is_available() or not distributed.is_initialized():
            return
        if shards and any(isinstance(param, DTensor) for param in self._trainable()):
            return
        if distributed.get_world_size() > 1:
            raise RuntimeError(
                f"{call} would give each of {distributed.get_world_size()} processes a result of"
                " its own, and their parameters would drift apart. Add the logits of each to a"
                " hf_sophia.estimators.GaussNewtonBartlett (or Hutchinson), call its all_reduce()"
                " and update_hessian(its estimate()), and let backward() make the gradients"
            )

    def _differentiate(self, closure: Callable[[], Any]) -> Any:
        """Run a closure; unless it called `backward()`, differentiate its loss here."""
        params = self._trainable()
        accumulated: list[torch.Tensor] = []
        hooks = [p.register_post_accumulate_grad_hook(accumulated.append) for p in params]
        try:
            loss = closure()
        finally:
            for hook in hooks:
                hook.remove()
        if accumulated:
            if self.hessian_due:
                raise RuntimeError(
                    "the closure called backward(), which frees the graph that"
                    " hessian_computation_type='hutchinson' needs: let it only return the loss, or"
                    " call update_hessian(hutchinson(loss, parameters)) before its backward()"
                )
            return loss
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                "with hessian_computation_type='hutchinson' the closure must return the loss, a"
                f" tensor of one element with its graph, got {loss!r}"
            )
        self._check_alone("step(closure) without backward()", shards=False)
        if self.hessian_due:
            self.update_hessian(hutchinson(loss, params))
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        return loss
