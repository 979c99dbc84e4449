"""Optimizers to compare Sophia with that the HF Trainer has no name for."""

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import nn

from hf_sophia import Sophia
from hf_sophia.trainer.embeddings import embeddings_of

Groups = list[dict[str, Any]]


def _called(closure: Callable[[], Any] | None) -> Any:
    """Return the closure's loss, or None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class NAdamW(torch.optim.Optimizer):
    """AdamW with Nesterov's momentum, in its standard form.

    ```
    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
    n  = beta1 m / (1 - beta1^(t+1)) + (1 - beta1) g / (1 - beta1^t)
    theta <- theta - lr wd theta - lr n / (sqrt(v / (1 - beta2^t)) + eps)
    ```

    torch's NAdam changes beta1 from step to step by a schedule of its own.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of m and v.
        eps: Added to the denominator.
        weight_decay: Strength of the decoupled weight decay.

    References:
        Dozat, "Incorporating Nesterov momentum into Adam", 2016, Algorithm 2, with constant beta1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; a closure is called first and its loss returned."""
        loss = _called(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if (grad := param.grad) is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update(step=0, m=torch.zeros_like(param), v=torch.zeros_like(param))
                state["step"] += 1
                t, m, v = state["step"], state["m"], state["v"]
                m.lerp_(grad, 1.0 - beta1)
                v.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
                ahead = m * (beta1 / (1.0 - beta1 ** (t + 1)))
                ahead.add_(grad, alpha=(1.0 - beta1) / (1.0 - beta1**t))
                scale = (v / (1.0 - beta2**t)).sqrt_().add_(group["eps"])
                param.mul_(1.0 - group["lr"] * group["weight_decay"])
                param.addcdiv_(ahead, scale, value=-group["lr"])
        return loss


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for hidden matrices and `torch.optim.AdamW` for all else, with one lr.

    Muon's step is scaled to the root mean square of AdamW's (`match_rms_adamw`), so that one
    learning rate and weight decay serve both.

    Args:
        params: Parameter groups.
        matrices: The parameters that Muon takes.
        lr: Learning rate of both.
        momentum: Muon's.
        betas: AdamW's.
        eps: AdamW's.

    References:
        Liu et al., "Muon is Scalable for LLM Training", 2025, arXiv 2502.16982.
    """

    def __init__(
        self,
        params: Groups,
        matrices: set[nn.Parameter],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        halves: tuple[Groups, Groups] = ([], [])
        for group in params:
            for half, wanted in zip(halves, (True, False), strict=True):
                if chosen := [p for p in group["params"] if (p in matrices) == wanted]:
                    half.append({**group, "params": chosen})
        if not all(halves):
            raise ValueError(
                f"Muon with AdamW needs hidden matrices and other parameters to share out, got"
                f" {len(halves[0])} and {len(halves[1])} groups of them"
            )
        self._parts = (
            torch.optim.Muon(halves[0], lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(halves[1], lr=lr, betas=betas, eps=eps, fused=True),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})
        # The same dictionaries, so that a scheduler's learning rate reaches the parts.
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of both; a closure is called first and its loss returned."""
        loss = _called(closure)
        for part in self._parts:
            part.step()
        return loss


class SecondMomentSophia(Sophia):
    """Sophia's step with a power of AdamW's second moment in the place of the Hessian.

    All else, threshold, clip and momentum, is Sophia's, so that the comparison with it says what
    the Hessian is worth. The second moment is of the training gradients, bias-corrected, and is
    brought up to date at every step, as in AdamW; `rho="auto"` follows it every k steps.

    Args:
        params: Parameters or parameter groups.
        power: What v is raised to: 0.5 for AdamW's own scale, 1 for a stand-in of the Hessian
            (the "empirical Fisher").
        betas: Decay rates of m and v.
        embeddings: Parameters that `embedding_clip_fraction` is for.
        embedding_clip_fraction: As for Sophia under a Trainer; None: that of the others.
        **options: Sophia's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        power: float = 0.5,
        betas: tuple[float, float] = (0.9, 0.95),
        embeddings: AbstractSet[nn.Parameter] = frozenset(),
        embedding_clip_fraction: float | None = None,
        **options: Any,
    ) -> None:
        self._power, self._beta2 = power, betas[1]
        self._moments: dict[torch.Tensor, torch.Tensor] = {}
        self._steps = 0
        # The average is taken here, of v itself.
        super().__init__(params, betas=(betas[0], 0.0), **options)
        if embedding_clip_fraction is not None:
            self.set_clip_fraction(embeddings, embedding_clip_fraction)

    @property
    def hessian_due(self) -> bool:
        """Never, as no estimate is needed."""
        return False

    def _follows_now(self, batch: Any) -> bool:
        return batch.group["rho"] == "auto" and (self._steps - 1) % batch.group["k"] == 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; a closure is called first and its loss returned."""
        loss = _called(closure)
        self._steps += 1
        scales = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    v = self._moments.setdefault(param, torch.zeros_like(param))
                    v.mul_(self._beta2).addcmul_(param.grad, param.grad, value=1.0 - self._beta2)
                    scales[param] = (v / (1.0 - self._beta2**self._steps)).pow_(self._power)
        self.update_hessian(scales)
        super().step()
        return loss


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Return the matrices that are neither an embedding nor the output layer."""
    ends = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    # As transformers names them, of language models and of classifiers.
    ends += [getattr(model, name, nn.Identity()) for name in ("lm_head", "classifier", "score")]
    outside = {param for end in ends for param in end.parameters()}
    return {param for param in model.parameters() if param.ndim == 2 and param not in outside}


def _lion(model: nn.Module, options: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    try:
        from pytorch_optimizer import Lion
    except ModuleNotFoundError as error:
        raise ValueError(
            "optim 'lion' needs the package pytorch_optimizer: pip install 'hf_sophia[compare]'"
        ) from error
    return Lion, options


#: How to build each of them: from the model and `optim_args` to a class and its options.
RIVALS: dict[str, Callable[[nn.Module, dict[str, Any]], tuple[type, dict[str, Any]]]] = {
    "nadamw": lambda model, options: (NAdamW, options),
    "muon_adamw": lambda model, options: (
        MuonWithAdamW,
        {"matrices": hidden_matrices(model), **options},
    ),
    "lion": _lion,
    "second_moment_sophia": lambda model, options: (
        SecondMomentSophia,
        {"embeddings": embeddings_of(model), **options},
    ),
}
