"""Sophia: a momentum step preconditioned by a diagonal Hessian and clipped per coordinate."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any, ClassVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from hf_sophia.kernels import SMALLEST_NORMAL, SMALLEST_RHO, StepScalars, no_kernel_because
from hf_sophia.optim.base import BaseOptimizer, Batch, Group, State, first_non_finite
from hf_sophia.optim.kernel_plan import KernelPlan, run_kernels
from hf_sophia.optim.own_estimates import OwnEstimates
from hf_sophia.optim.sharding import local, placed_like, total
from hf_sophia.optim.sophia_metrics import SophiaMetrics
from hf_sophia.optim.sophia_options import (
    AUTO,
    check_hessian_computation_type,
    check_rho,
    check_rho_scope,
)
from hf_sophia.optim.sophia_update import Scratch, updated_in_blocks
from hf_sophia.optim.threshold import follow
from hf_sophia.optim.validation import (
    check_count,
    check_flag,
    check_non_negative,
    check_open_fraction,
    check_positive,
    check_positive_integer,
)
from hf_sophia.optim.weight_decay import WeightDecay

_LATE = (
    "a gradient of an earlier step held NaN or infinity, which a GPU tells of one step later: those"
    " coordinates were updated as if it were 0, and the others by it. Go back to a checkpoint"
)


# With these, map looks at each of many tensors without a line of Python.
_step_of, _rho_of = itemgetter("step"), itemgetter("rho")
_device_of, _dtype_of = attrgetter("device"), attrgetter("dtype")


class NonFiniteHessianError(ValueError):
    """A Hessian estimate holds NaN or infinity; the optimizer is as it was before."""


def _hessian_weight(group: Group) -> float:
    """Return what h is divided by: with bias correction, how much of the average is filled."""
    return (group["hessian_weight"] or 1.0) if group["bias_correction"] else 1.0


def _have_thresholds(states: Sequence[State], devices: Sequence[torch.device]) -> bool:
    """Whether all have a threshold in fp32 on their device."""
    if not all(["rho" in state for state in states]):
        return False
    rhos = list(map(_rho_of, states))
    return list(map(_device_of, rhos)) == devices and set(map(_dtype_of, rhos)) <= {torch.float32}


class Sophia(OwnEstimates, SophiaMetrics):
    """Sophia, with either Hessian estimator: Sophia-G (`"gnb"`) or Sophia-H (`"hutchinson"`).

    ```
    h <- beta2 h + (1 - beta2) hhat        at steps t with t mod k = 1 (k = 1: every step)
    m <- beta1 m + (1 - beta1) g
    theta <- theta - (lr / rho) * clip(m / max(h, eps), -rho, rho)
    ```

    The estimate `hhat` comes in one of three ways, each before the update of the same step:

    - `update_hessian(mapping)`, when `hessian_due`: any estimate, from anywhere;
    - `step(logits=logits)` for `"gnb"`, after `loss.backward(retain_graph=True)`: every row of the
      logits counts and labels are sampled from them;
    - `step(closure)` for `"hutchinson"`, with a closure that returns the loss and does not call
      `backward()`; `step` then fills `.grad` itself, replacing what was there.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: The largest step per coordinate, `eta * rho` in the paper; >= 0.
        betas: Decay rates of the gradient's and of the Hessian's average, each in [0, 1).
        eps: Smallest curvature to divide by; > 0. Coordinates below it take sign steps.
        rho: Clipping threshold of `m / max(h, eps)`; > 0. Larger clips less, so it moves the method
            from sign momentum towards Newton's. `|m|` is noise of order `sqrt(h / B)`, so the right
            value grows like `1 / sqrt(B)`: 0.05 at 480k tokens a step is about 0.7 at 2k.
            `"auto"`: a threshold of its own for each tensor or group that follows the data, so that
            the share `target_clip_fraction` of the coordinates is clipped. It is the quantile of
            `|m| / max(h, eps)` over a fixed sample of coordinates, taken at each refresh and
            averaged in the logarithm, with a half-life of ten steps. Until a parameter has an
            estimate its steps are those of the sign.
        weight_decay: A `WeightDecay`, or its strength as a number (then decoupled).
        defaults: Further defaults of group values.
        k: Steps from one Hessian refresh to the next, >= 1; the same in every group.
        hessian_computation_type: Estimator that `step` runs by itself; the same in every group.
        target_clip_fraction: For `rho="auto"`: the share to clip, in (0, 1); some parameters, such
            as embeddings, can have one of their own (`set_clip_fraction`).
        rho_scope: For `rho="auto"`: `"tensor"` or `"group"`, what has a rho of its own.
        nesterov: Clip `(beta1 m + (1 - beta1) g) / max(h, eps)`, with the new m, in the place of
            `m / max(h, eps)`: Nesterov's momentum as in Dozat, "Incorporating Nesterov momentum
            into Adam", 2016.
        bias_correction: Divide h by `1 - beta2^n` after n refreshes, as Adam does its averages.
        fused: Take the step by a kernel, in one pass over memory. None: where there is one, which
            is for contiguous fp32 and bf16 parameters with decoupled weight decay, on the CPU where
            there is a C compiler, and on CUDA, also for fp16, with Triton. True: a parameter that
            is none of these is an error; False: never. The results are the same to rounding.

    State per parameter: `step` (this optimizer's count of steps when the parameter last moved),
    `exp_avg` (m) and `hessian` (h), in fp32 at least, and `rho` where that is `"auto"`. Refreshes
    follow this optimizer's own count of steps, which goes on through a checkpoint; each group's
    `refreshed_step` is the last of them.

    Raises:
        ValueError, TypeError: An option is out of range or of a wrong type.

    Example:
        >>> import torch
        >>> from hf_sophia import gauss_newton_bartlett
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = Sophia(model.parameters(), lr=1e-2, rho=1.0, k=10)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> for _ in range(20):
        ...     logits = model(x)
        ...     loss = torch.nn.functional.cross_entropy(logits, y)
        ...     if optimizer.hessian_due:
        ...         estimate = gauss_newton_bartlett(logits, model.parameters(), retain_graph=True)
        ...         optimizer.update_hessian(estimate)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    References:
        Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
        Pre-training", 2023, arXiv 2305.14342, Algorithm 3 (with 1 and 2 as its estimators).

    Differs from the authors' code: that one refreshes h after the step and for the first time after
    step k, clips the sampled gradient before squaring it, and has the user pass the batch size to
    `step`, as m / (rho B h). Here B is counted at each refresh and is part of the estimate.
    """

    _checks: ClassVar[dict[str, Any]] = {
        **BaseOptimizer._checks,
        "eps": check_positive,
        "rho": check_rho,
        "target_clip_fraction": check_open_fraction,
        "rho_scope": check_rho_scope,
        "nesterov": check_flag,
        "bias_correction": check_flag,
        "hessian_weight": check_non_negative,
        "k": check_positive_integer,
        "refreshed_step": check_count,
        "hessian_computation_type": check_hessian_computation_type,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-12,
        rho: float | str = 0.03,
        weight_decay: WeightDecay | float = WeightDecay(),
        defaults: Mapping[str, Any] | None = None,
        *,
        k: int = 10,
        hessian_computation_type: str = "gnb",
        target_clip_fraction: float = 0.5,
        rho_scope: str = "tensor",
        nesterov: bool = False,
        bias_correction: bool = False,
        fused: bool | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "rho": rho,
            "k": k,
            "hessian_computation_type": hessian_computation_type,
            # The last step whose refresh has been made; in the groups, so that it is saved.
            "refreshed_step": 0,
            "target_clip_fraction": target_clip_fraction,
            "rho_scope": rho_scope,
            "nesterov": nesterov,
            "bias_correction": bias_correction,
            # How much of the average h has been filled, 1 - beta2^n after n refreshes.
            "hessian_weight": 0.0,
        }
        # A due step that passed without its refresh.
        self._missed_step: int | None = None
        self._warned = False
        self._clipped = []
        self._moved = 0
        self._own_fractions: dict[torch.Tensor, float] = {}
        super().__init__(params, options, weight_decay, defaults, fused)

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group; `k` and the estimator must be those of the other groups.

        Raises:
            ValueError, TypeError: An option is out of range, or a parameter is complex.
        """
        group = {**self.defaults, **param_group}
        self._check_group(group)
        for name in ("k", "hessian_computation_type"):
            for other in self.param_groups[:1]:
                if group[name] != other[name]:
                    raise ValueError(
                        f"{name} must be the same in every parameter group, got {group[name]!r}"
                        f" beside {other[name]!r}: one backward pass refreshes all of them"
                    )
        # Groups taken from another optimizer bring its options, but its Hessian is not theirs.
        super().add_param_group({**param_group, "refreshed_step": 0, "hessian_weight": 0.0})

    def set_clip_fraction(self, params: Iterable[torch.Tensor], fraction: float) -> None:
        """Give parameters a share to clip of their own, in the place of their group's.

        It is for `rho="auto"` with a threshold for each tensor, and is not part of the state: who
        makes the optimizer again says it again.

        Args:
            params: Parameters of this optimizer.
            fraction: The share, in (0, 1).

        Raises:
            ValueError, TypeError: The share is out of range, or a parameter is not one of these.
        """
        check_open_fraction("fraction", fraction)
        params = list(params)
        held = {param for group in self.param_groups for param in group["params"]}
        for param in params:
            if param not in held:
                raise ValueError(
                    f"set_clip_fraction got {self._describe(param)}; pass parameters that it was"
                    " built with"
                )
        self._own_fractions.update(dict.fromkeys(params, fraction))

    def clip_fraction_asked(self, param: torch.Tensor, group: Group) -> float:
        """Return the share of a parameter that `rho="auto"` is to clip.

        Args:
            param: The parameter.
            group: The group that it is in.
        """
        shared = group["target_clip_fraction"]
        return shared if group["rho_scope"] == "group" else self._own_fractions.get(param, shared)

    _optional_state: ClassVar[frozenset[str]] = frozenset({"rho", "refreshed"})

    def _state_names(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "hessian")

    @property
    def _next_step(self) -> int:
        # Whoever looks up the state of a parameter that has none leaves an empty one.
        return 1 + max(map(_step_of, filter(None, self.state.values())), default=0)

    @property
    def hessian_due(self) -> bool:
        """Whether `update_hessian` should be called before the next `step()`."""
        self._notice_lost_state()
        return self._due_at(self._next_step)

    def _notice_lost_state(self) -> None:
        """Begin again where `state` was cleared: h is gone, whatever the groups say of it."""
        if not any(self.state.values()) and any(
            group["hessian_weight"] for group in self.param_groups
        ):
            for group in self.param_groups:
                group["refreshed_step"], group["hessian_weight"] = 0, 0.0

    def _due_at(self, step: int) -> bool:
        group = self.param_groups[0]
        return (step - 1) % group["k"] == 0 and group["refreshed_step"] != step

    @torch.no_grad()
    def update_hessian(self, mapping: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Fold an estimate into the Hessian: `h <- beta2 h + (1 - beta2) hhat`.

        Args:
            mapping: The estimate of each parameter, shaped like it; computed in any floating
                dtype, folded in fp32 at least. For a sharded parameter a DTensor, or the same whole
                tensor on every process. Parameters that are missing keep their h. An empty mapping
                says that this refresh was left out on purpose.

        Raises:
            ValueError: A key is not a parameter of this optimizer, or an estimate has another
                shape; nothing has changed then.
            TypeError: The mapping is none, or an estimate is no tensor; nothing has changed then.
            NonFiniteHessianError: An estimate holds NaN or infinity; a ValueError too, and nothing
                has changed.
        """
        if not isinstance(mapping, Mapping):
            raise TypeError(
                f"update_hessian wants {{parameter: estimate}}, got a {type(mapping).__name__}"
            )
        groups = {param: group for group in self.param_groups for param in group["params"]}
        for param, estimate in mapping.items():
            if param not in groups:
                raise ValueError(
                    f"update_hessian got {self._describe(param)}; pass the parameters that this"
                    " optimizer was built with"
                )
            if not isinstance(estimate, torch.Tensor):
                raise TypeError(
                    f"update_hessian got a {type(estimate).__name__} for {self._describe(param)}:"
                    " an estimate is a tensor of its shape"
                )
            if estimate.shape != param.shape:
                raise ValueError(
                    f"update_hessian got an estimate of shape {tuple(estimate.shape)} for"
                    f" {self._describe(param)}"
                )
        if mapping and (index := first_non_finite(list(mapping.values()))) is not None:
            raise NonFiniteHessianError(
                f"the Hessian estimate of {self._describe(list(mapping)[index])} holds NaN or"
                " infinity; nothing was changed. Leave this refresh out with update_hessian({})"
            )
        self._notice_lost_state()
        for group in self.param_groups:
            group["refreshed_step"] = self._next_step
            if params := [param for param in group["params"] if param in mapping]:
                hessians = [local(self._state_of(param, group)["hessian"]) for param in params]
                estimates = [
                    local(placed_like(mapping[param], param)).to(hessian)
                    for param, hessian in zip(params, hessians, strict=True)
                ]
                self._fit_correction(group, params, hessians, estimates)
                torch._foreach_lerp_(hessians, estimates, 1.0 - group["betas"][1])
        self._missed_step = None

    def _fit_correction(
        self,
        group: Group,
        params: list[torch.Tensor],
        hessians: list[torch.Tensor],
        estimates: list[torch.Tensor],
    ) -> None:
        """Let the weight of a group grow by a refresh, so that dividing by it is right for each.

        The weight is the group's, but its parameters need not all be in each refresh. One that has
        its first estimate later than others, unfrozen by then, begins as if those before had been
        like it; one that is left out keeps its quotient.

        Args:
            group: The group.
            params: Those of its parameters that have an estimate.
            hessians: Their averages, before the estimates are folded in.
            estimates: Their estimates.
        """
        before, beta2 = group["hessian_weight"], group["betas"][1]
        group["hessian_weight"] = beta2 * before + 1.0 - beta2
        if group["bias_correction"] and before > 0.0:
            for param, hessian, estimate in zip(params, hessians, estimates, strict=True):
                if not self.state[param]["refreshed"]:
                    hessian.copy_(estimate).mul_(before)
            given = set(params)
            rest = [p for p in group["params"] if p not in given and self.state.get(p)]
            if rest:
                left_out = [local(self.state[param]["hessian"]) for param in rest]
                torch._foreach_mul_(left_out, group["hessian_weight"] / before)
        for param in params:
            self.state[param]["refreshed"] = True

    def _state_of(self, param: torch.Tensor, group: Group) -> State:
        if not self.state[param]:
            super()._state_of(param, group)["refreshed"] = False  # h holds no estimate yet
        return self.state[param]

    def repeat_refresh(self) -> bool:
        """Make the refresh of the next step due again, for when it was left out by `{}`.

        Where a gradient scaler has skipped the step as well, a smaller loss scale may give an
        estimate that is finite. After a step that was taken this does nothing.

        Returns:
            Whether it is due again.
        """
        again = [g for g in self.param_groups if g["refreshed_step"] == self._next_step]
        for group in again:
            group["refreshed_step"] = 0
        return bool(again)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, logits: torch.Tensor | None = None
    ) -> Any:
        """Take one step, first refreshing the Hessian from `logits` or `closure` where it is due.

        Args:
            closure: Returns the loss; run with gradients enabled. For `"gnb"` it calls
                `backward()`, as for any torch optimizer; for `"hutchinson"` it must not on the
                steps where the Hessian is due, and need not on the others.
            logits: For `"gnb"`: the model's logits, shape (..., classes), with their graph. Only
                read when the Hessian is due.

        Returns:
            The closure's loss, or None without a closure.

        Raises:
            ValueError: A gradient or an estimate holds NaN or infinity, or logits came with
                `"hutchinson"`; no parameter has changed, but for rounding where a kernel had begun.
                On CUDA a gradient's comes a step later, and the coordinates of the others have
                moved.
            RuntimeError: The graph that the refresh needs is gone, a gradient is sparse or complex,
                or the Hessian is due in one of several processes, each of which would have its own.
        """
        by_hutchinson = self.param_groups[0]["hessian_computation_type"] == "hutchinson"
        if by_hutchinson and logits is not None:
            raise ValueError(
                "step(logits=...) samples labels for hessian_computation_type='gnb', this optimizer"
                " has 'hutchinson'; pass a closure that returns the loss instead"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = self._differentiate(closure) if by_hutchinson else closure()
        if logits is not None and self.hessian_due:
            self._check_alone("step(logits=...)", shards=True)
            self.update_hessian(self._from_logits(logits))
        self._apply_gradients()
        return loss

    def _apply_gradients(self) -> None:
        self._notice_lost_state()
        self._current_step = self._next_step
        super()._apply_gradients()

    def _on_missed_refresh(self, due_step: int) -> None:
        """React to a step that moves parameters although the refresh of `due_step` never came."""
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"Sophia steps without the Hessian refresh that was due at step {due_step}: where h is"
            " 0 it is sign momentum. Call update_hessian(...) when hessian_due, step(logits=...)"
            " or, for 'hutchinson', step(closure)",
            stacklevel=9,
        )

    def _check_refreshed(self) -> None:
        """Notice that a refresh which was due by this step never came."""
        if self._due_at(self._current_step):
            self._missed_step = self._current_step
        if self._missed_step is None:
            return
        if any(group["lr"] > 0.0 for group in self.param_groups):
            self._on_missed_refresh(self._missed_step)
        elif self._missed_step == self._current_step:
            # Nothing moves, so the refresh can still come in time: torch.distributed.checkpoint
            # takes such a step for the state to be there.
            self._current_step -= 1

    def _not_fused_because(self, param: torch.Tensor) -> str:
        if not self._kernels_decay:
            return "kernels know decoupled weight decay only"
        if type(param) not in (torch.Tensor, torch.nn.Parameter):
            return f"kernels do not know what a {type(param).__name__} is"
        if not param.is_contiguous():
            return "it is not contiguous"
        return no_kernel_because(param.device, param.dtype)

    @property
    def _kernels_decay(self) -> bool:
        return type(self.weight_decay) is WeightDecay and self.weight_decay.weight_decouple

    def _update_all(self, batches: list[Batch]) -> None:
        params = [param for batch in batches for param in batch.params]
        if not params:
            return
        self._check_refreshed()
        shares = [(batch, self._plan(index, batch)) for index, batch in enumerate(batches)]
        for index in range(len(batches), len(self.__dict__.get("_plans", ()))):
            self._plans.pop(index, None)  # of groups that are gone
        rest = [batch.params[index] for batch, plan in shares for index in plan.rest]
        self._check_kinds(rest)
        following = [batch for batch in batches if self._follows_now(batch)]
        scalars = [self._scalars(batch.group) for batch in batches]
        # A kernel finds on its way what is not finite and takes back what it did: unless more than
        # its step depends on the gradients, or the way back is lost in rounding.
        if following or any(abs(own.decay) < 0.5 for own in scalars):
            self._check_gradients(params)
        rhos = [self._thresholds(batch) for batch in batches]
        # By the parameters, as long as there are any.
        samples = self.__dict__.setdefault("_samples", WeakTensorKeyDictionary())
        for batch, own in zip(batches, scalars, strict=True):
            if batch in following:
                decay = self.weight_decay
                l2 = 0.0 if decay.weight_decouple else batch.group["weight_decay"]
                targets = [self.clip_fraction_asked(p, batch.group) for p in batch.params]
                # Between refreshes, for those that have none yet.
                due = batch.group["refreshed_step"] == self._current_step
                steps = batch.group["k"] if due else 0
                follow(batch, own, samples, targets, steps, l2, self._absent(batch))
        calls = [
            (call, rho, own)
            for (_, plan), rho, own in zip(shares, rhos, scalars, strict=True)
            for call in plan.calls
        ]
        if not run_kernels(calls, rest):
            late = any(call.late for call, _, _ in calls)
            # These say where. What no kernel takes was looked at before any began, but for shards,
            # as other processes' may have been in order.
            self._check_gradients([p for p in rest if local(p) is p] if late else params)
            raise ValueError(_LATE)
        self._clipped = [(call.finish(), call.owner) for call, _, _ in calls]
        for batch, plan in shares:
            counts = self._update_each(batch, plan.rest)
            owners = [batch.params[index] for index in plan.rest]
            self._clipped += zip(counts, owners, strict=True)
            for state in batch.states:
                state["step"] = self._current_step
        self._moved = sum(call.size for call, _, _ in calls)
        self._moved += sum(param.numel() for param in rest)

    def _plan(self, index: int, batch: Batch) -> KernelPlan:
        """Say which of a group's parameters kernels take in this step."""
        if self.fused is False or not self._kernels_decay:
            return KernelPlan(rest=range(len(batch.params)))
        plan = self.__dict__.setdefault("_plans", {}).setdefault(index, KernelPlan())
        if not plan.refresh(batch.params, batch.grads, batch.states):
            raise ValueError(_LATE)
        return plan

    def _scalars(self, group: Group) -> StepScalars:
        return StepScalars(
            lr=group["lr"],
            decay=self.weight_decay.factor(group),
            beta1=group["betas"][0],
            eps=max(group["eps"], SMALLEST_NORMAL),
            hessian_weight=_hessian_weight(group),
            nesterov=group["nesterov"],
        )

    def _thresholds(self, batch: Batch) -> float | list[torch.Tensor]:
        """Return the number of a group, or what each of its parameters has."""
        rho = batch.group["rho"]
        if rho != AUTO:
            return float(rho)
        devices = list(map(_device_of, batch.params))
        if not _have_thresholds(batch.states, devices):
            for device, state in zip(devices, batch.states, strict=True):
                rho = state.get("rho", torch.zeros(()))
                # Of a float64 parameter's checkpoint, or left behind by a parameter that moved:
                # a kernel would read something else at its address.
                state["rho"] = rho.to(device, torch.float32)
        return list(map(_rho_of, batch.states))

    def _update(
        self, theta: torch.Tensor, grad: torch.Tensor, state: State, group: Group
    ) -> torch.Tensor:
        rho = state["rho"].clamp(min=SMALLEST_RHO) if group["rho"] == AUTO else group["rho"]
        tensors = (theta, state["exp_avg"], state["hessian"], grad)
        scratch = self.__dict__.setdefault("_scratch", Scratch())
        return updated_in_blocks(tensors, rho, self._scalars(group), scratch)

    def _absent(self, batch: Batch) -> list[State]:
        """Return the states with a threshold of a group's parameters that have no gradient now."""
        present = set(batch.params)
        rest = [p for p in batch.group["params"] if p not in present]
        return [self.state[p] for p in rest if "rho" in self.state.get(p, {})]

    def _follows_now(self, batch: Batch) -> bool:
        """Whether the group's thresholds are brought up to date in this step."""
        group = batch.group
        if group["rho"] != AUTO or not batch.params:
            return False
        # A run that had a number until now does not wait for the next refresh.
        new = group["hessian_weight"] > 0.0 and not all(["rho" in state for state in batch.states])
        return new or group["refreshed_step"] == self._current_step

    def state_dict(self) -> dict[str, Any]:
        """Return the state dictionary.

        Raises:
            ValueError: On CUDA a gradient of the last step held NaN or infinity: what it spoilt is
                not to be saved.
        """
        self.check_finite()
        return super().state_dict()

    def check_finite(self) -> None:
        """Wait for the device, and raise where a gradient of the steps so far was not finite.

        A step on CUDA tells of it one step later, and the last one tells nobody. On the CPU this
        does nothing, for there a step tells by itself.

        Raises:
            ValueError: One was.
        """
        plans = self.__dict__.get("_plans", {}).values()
        if not all([call.was_finite() for plan in plans for call in plan.calls if call.late]):
            raise ValueError(_LATE)

    def _has_curvature(self, param: torch.Tensor) -> bool:
        found = local(self.state[param]["hessian"]).count_nonzero()
        return bool(total([found], [param]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary; the refresh phase follows from the loaded step count.

        Raises:
            ValueError: As in every optimizer here.
        """
        super().load_state_dict(state_dict)
        self._missed_step = None
        for group in self.param_groups:
            if group["rho"] != AUTO:
                # Not of this run: torch.distributed.checkpoint leaves what it began with.
                for param in group["params"]:
                    self.state.get(param, {}).pop("rho", None)
        for param, state in self.state.items():
            # Older state dictionaries do not say.
            if state and "refreshed" not in state:
                state["refreshed"] = self._has_curvature(param)
        # They hold on to the state that was.
        self.__dict__.pop("_plans", None)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep."""
        kept = ("_missed_step", "_warned", "_clipped", "_moved", "_own_fractions")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}
