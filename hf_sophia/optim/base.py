"""What Adam, RAdam and Sophia have in common: groups, checks, state in fp32, state dictionaries."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import is_
from typing import Any, ClassVar, NoReturn

import torch
from torch.optim.optimizer import Optimizer

from hf_sophia.optim.sharding import agreed_first, local, local_state, placed_like
from hf_sophia.optim.validation import check_betas, check_flag, check_non_negative
from hf_sophia.optim.weight_decay import WeightDecay

State = dict[str, Any]
Group = dict[str, Any]


def state_dtype(param: torch.Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state: fp32 at least, float64 for float64 parameters.

    A bf16 moving average stops moving once its increments fall below 2^-8 of it, and fp16
    underflows to 0.
    """
    return torch.promote_types(param.dtype, torch.float32)


@torch.no_grad()
def first_non_finite(tensors: list[torch.Tensor]) -> int | None:
    """Return the index of the first tensor that holds a NaN or an infinity, else None.

    One pass over the norms and one device sync when all is well; the exact search runs only
    when a norm is not finite, which large but finite values can cause too. Of sharded tensors each
    process sees its shard, and all of them get the same answer: else those that found nothing would
    go on and wait for the others.
    """
    return agreed_first(_first_non_finite([local(tensor) for tensor in tensors]), tensors)


def _first_non_finite(tensors: list[torch.Tensor]) -> int | None:
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    norms = (torch.stack(_norms(same_device)) for same_device in by_device.values())
    if all(norm.isfinite().all().item() for norm in norms):
        return None
    finite = (tensor.isfinite().all().item() for tensor in tensors)
    return next((index for index, good in enumerate(finite) if not good), None)


def _norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [norm.to(torch.float32) for norm in torch._foreach_norm(tensors)]


def _is_captured() -> bool:
    """Whether a CUDA graph is being made of what is done now."""
    return (
        torch.backends.cuda.is_built()
        and torch.cuda.is_available()
        and torch.cuda.is_current_stream_capturing()
    )


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The parameters of one group that have a gradient.

    Args:
        group: The group.
        params: Its parameters.
        grads: Their gradients.
        states: Their state.
    """

    group: Group
    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    states: list[State]


def comparable(value: Any) -> Any:
    """Return an option so that it can be compared: JSON and YAML turn tuples into lists."""
    return tuple(value) if isinstance(value, list) else value


class BaseOptimizer(Optimizer):
    """Base of the optimizers here; a subclass writes its equation in `_update`.

    Args:
        params: Parameters, named parameters or parameter groups, as for any torch optimizer.
        options: The named constructor options of the subclass, as defaults of every group.
        weight_decay: A `WeightDecay`, or its strength as a number (then decoupled).
        defaults: Further defaults of group values. A key that is also a named option must
            agree with it.
        fused: Take steps in one pass over memory: None where that is possible, True or it is an
            error, False never.
    """

    #: Every option of a group with its check; a subclass extends it.
    _checks: ClassVar[dict[str, Callable[[str, Any], None]]] = {
        "lr": check_non_negative,
        "betas": check_betas,
        "eps": check_non_negative,
        "weight_decay": check_non_negative,
    }

    #: State besides `step` and the tensors of `_state_names` that a parameter may have.
    _optional_state: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        params: Iterable[Any],
        options: dict[str, Any],
        weight_decay: WeightDecay | float,
        defaults: Mapping[str, Any] | None,
        fused: bool | None,
    ) -> None:
        if fused is not None:
            check_flag("fused", fused)
        self.fused = fused
        if not isinstance(weight_decay, WeightDecay):
            weight_decay = WeightDecay(weight_decay)
        self.weight_decay = weight_decay
        options = {**options, "weight_decay": weight_decay.weight_decay}
        for name, value in (defaults or {}).items():
            if name in options and comparable(options[name]) != comparable(value):
                raise ValueError(
                    f"defaults holds {name}={value!r}, but the constructor's own {name} is"
                    f" {options[name]!r}; pass {name}={value!r} as an argument instead"
                )
        super().__init__(params, {**(defaults or {}), **options})

    @abstractmethod
    def _state_names(self, group: Group) -> tuple[str, ...]:
        """Name the state tensors of a parameter of this group, all shaped like it."""

    @abstractmethod
    def _update(self, theta: torch.Tensor, grad: torch.Tensor, state: State, group: Group) -> Any:
        """Advance `state["step"]` and the state tensors and change `theta`, all in place.

        `theta`, `grad` and the state tensors share the shape and `state_dtype(theta)`. Of sharded
        parameters they are this process's shards, which may be empty.
        """

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, with the same checks as the constructor's.

        Raises:
            ValueError, TypeError: An option is out of range, or a parameter is complex.
        """
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.is_complex():
                del self.param_groups[-1]
                raise ValueError(
                    f"{self._name} does not support complex parameters, got one of shape"
                    f" {tuple(param.shape)}; optimize torch.view_as_real(parameter) instead"
                )
            if self.fused and (reason := self._not_fused_because(local(param))):
                shape = tuple(param.shape)
                del self.param_groups[-1]
                raise ValueError(
                    f"fused=True is not possible for a parameter of shape {shape}: {reason}. Leave"
                    " fused at None, and what can be fused is"
                )

    def not_fused(self) -> dict[str, int]:
        """Say why steps are not taken in one pass: how many coordinates for each reason."""
        found: dict[str, int] = {}
        for group in self.param_groups:
            for param in group["params"]:
                reason = "fused is False"
                if self.fused is not False:
                    reason = self._not_fused_because(local(param))
                if reason:
                    found[reason] = found.get(reason, 0) + param.numel()
        return found

    @abstractmethod
    def _not_fused_because(self, param: torch.Tensor) -> str:
        """Say why a parameter's step can't be taken in one pass; empty: it can."""

    @property
    def _name(self) -> str:
        """The public name: a subclass elsewhere speaks as the optimizer it extends."""
        return next(c.__name__ for c in type(self).__mro__ if c.__module__.startswith(__package__))

    def _check_group(self, group: Mapping[str, Any]) -> None:
        for name, check in self._checks.items():
            check(name, group[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Re-evaluates the loss and calls `backward()`; run with gradients enabled.

        Returns:
            The closure's loss, or None without a closure.

        Raises:
            ValueError: A gradient holds NaN or infinity; no parameter has changed.
            RuntimeError: A gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._apply_gradients()
        return loss

    def _apply_gradients(self) -> None:
        """Check every gradient before any parameter changes, then update each."""
        if _is_captured():
            raise RuntimeError(
                f"{self._name}.step() can't be captured in a CUDA graph, whose replays would keep"
                " this step's learning rate and number. Capture forward and backward only"
            )
        self._update_all([self._batch(group) for group in self.param_groups])

    def _batch(self, group: Group) -> Batch:
        params = group["params"]
        grads = [param.grad for param in params]
        if any(map(is_, grads, repeat(None))):
            params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        states = [self.state[param] for param in params]
        if not all(states):
            states = [self._state_of(param, group) for param in params]
        return Batch(group, params, grads, states)

    def _update_all(self, batches: list[Batch]) -> None:
        self._check_gradients([param for batch in batches for param in batch.params])
        for batch in batches:
            self._update_batch(batch)

    def _update_batch(self, batch: Batch) -> None:
        """Update a group's parameters, whose gradients are known to be finite."""
        self._update_each(batch, range(len(batch.params)))

    def _update_each(self, batch: Batch, indices: Iterable[int]) -> list[Any]:
        """Update some of a group's parameters one by one; return what `_update` does of each."""
        results = []
        for index in indices:
            param, state = batch.params[index], batch.states[index]
            dtype = state_dtype(param)
            shard, grad = local(param), local(placed_like(batch.grads[index], param))
            theta = shard.to(dtype)
            grad = self.weight_decay(theta, grad.to(dtype), batch.group)
            shards = local_state(state)
            results.append(self._update(theta, grad, shards, batch.group))
            state["step"] = shards["step"]
            if theta is not shard:
                shard.copy_(theta)
        return results

    def _check_gradients(self, params: Sequence[torch.Tensor]) -> None:
        self._check_kinds(params)
        if params and (index := first_non_finite([p.grad for p in params])) is not None:
            self._refuse_gradient(params[index])

    def _refuse_gradient(self, param: torch.Tensor) -> NoReturn:
        raise ValueError(
            f"the gradient of {self._describe(param)} holds NaN or infinity; the step was"
            " not taken. Call zero_grad() and leave this batch out, lower the learning rate or, in"
            " fp16, step through a GradScaler"
        )

    def _check_kinds(self, params: Iterable[torch.Tensor]) -> None:
        for param in params:
            sparse = param.grad.is_sparse or param.grad.is_sparse_csr
            if not sparse and not param.grad.is_complex():
                continue
            kind = "sparse" if sparse else "complex"
            remedy = "; use sparse=False in the embedding that made it" if sparse else ""
            raise RuntimeError(
                f"{self._name} does not support {kind} gradients, got one for"
                f" {self._describe(param)}{remedy}"
            )

    def _describe(self, param: object) -> str:
        if not isinstance(param, torch.Tensor):
            return f"{param!r}, which is no parameter"
        for index, group in enumerate(self.param_groups):
            for position, candidate in enumerate(group["params"]):
                if candidate is param:
                    names = group.get("param_names")
                    label = repr(names[position]) if names else f"{position} of group {index}"
                    return f"parameter {label} (shape {tuple(param.shape)})"
        return f"a parameter of shape {tuple(param.shape)} that this optimizer does not hold"

    def _state_of(self, param: torch.Tensor, group: Group) -> State:
        """Return the parameter's state, made whole on first use."""
        state = self.state[param]
        if not state:
            state["step"] = 0
            for name in self._state_names(group):
                state[name] = torch.zeros_like(
                    param, dtype=state_dtype(param), memory_format=torch.preserve_format
                )
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary, keeping every state tensor in fp32 at least.

        torch's own method casts state to the parameter's dtype, which would round a bf16 run's
        moving averages at every resume. Whole tensors, of a run on one process, are cut into the
        shards of parameters that are sharded here.

        Raises:
            ValueError: It was saved by another optimizer, or for parameters of another shape or
                number; this optimizer is as it was before.
        """
        exact: dict[str, Any] = {}

        def check_and_keep(_: Optimizer, loaded: dict[str, Any]) -> None:
            self._check_state_dict(loaded)
            exact.update(loaded)

        handle = self.register_load_state_dict_pre_hook(check_and_keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for param, _, saved in self._match(exact):
            for name, value in saved.items():
                if isinstance(value, torch.Tensor):
                    if value.shape == param.shape:
                        value = placed_like(value, param)
                    self.state[param][name] = value.to(param.device, state_dtype(param), copy=True)

    def _match(self, state_dict: dict[str, Any]) -> Iterable[tuple[torch.Tensor, Group, State]]:
        """Pair each parameter with its saved group and state (empty where none was saved)."""
        saved_groups = state_dict["param_groups"]
        ids = chain.from_iterable(
            ((saved, index) for index in saved["params"]) for saved in saved_groups
        )
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for param, (saved, index) in zip(params, ids, strict=True):
            yield param, saved, state_dict["state"].get(index, {})

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        name = self._name
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        if sizes != saved_sizes:
            raise ValueError(
                f"the state dictionary holds parameter groups of {saved_sizes} parameters, this"
                f" {name} has groups of {sizes}; build the model and its groups as they were when"
                " it was saved"
            )
        for group in state_dict["param_groups"]:
            if missing := sorted(self._checks.keys() - group.keys()):
                raise ValueError(
                    f"the state dictionary was not saved by {name}: its groups lack {missing}."
                    " Load it into the optimizer that saved it, or start without it"
                )
            self._check_group(group)
        for param, group, state in self._match(state_dict):
            wanted = {"step", *self._state_names(group)}
            if state and not wanted <= state.keys() <= wanted | self._optional_state:
                raise ValueError(
                    f"the state dictionary was not saved by {name} with these options: it keeps"
                    f" {sorted(state)} for {self._describe(param)}, wanted {sorted(wanted)}"
                )
            for key in self._state_names(group) if state else ():
                if state[key].shape != param.shape:
                    raise ValueError(
                        f"the state dictionary does not fit {self._describe(param)}: its {key}"
                        f" has shape {tuple(state[key].shape)}"
                    )

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: torch's part and what is in no group."""
        return {**super().__getstate__(), "weight_decay": self.weight_decay, "fused": self.fused}
