"""Which parameters of a group a kernel updates, and which are left to the eager form.

A kernel works on addresses, so they have to be those of this step: gradients are new tensors each
time, a parameter may have been moved or its state loaded. All of it is looked at in every step, and
found anew where anything is not as it was; what is kept saves only the work of finding the same
answer again.
"""

from collections.abc import Sequence
from operator import is_, itemgetter
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from hf_sophia.kernels import StepScalars, kernel_for
from hf_sophia.optim.base import first_non_finite
from hf_sophia.optim.sharding import agreed_first, local, placed_like

Tensors = Sequence[torch.Tensor]


class KernelCall:
    """Parameters of one device and dtype that one call of a kernel updates.

    Args:
        indices: Their places among the group's; None: all of them.
        fixed: The group's parameters, their `exp_avg` and their `hessian`.
        owners: The group's parameters, whole or sharded; those of a call are sharded alike.

    Attributes:
        owner: One of the parameters, for the others are sharded as it is.
        size: The number of coordinates, on all processes that have shards of them.
    """

    def __init__(
        self, indices: Sequence[int] | None, fixed: Sequence[Tensors], owners: Tensors
    ) -> None:
        # A getter of a single index would not return a sequence.
        self._select = None if indices is None else itemgetter(*indices, indices[0])
        self._fixed = [self.of(tensors) for tensors in fixed]
        self._places = _places(self._fixed)
        self._sizes = [param.numel() for param in self._fixed[0]]
        self.owner = self.of(owners)[0]
        self.size = sum(owner.numel() for owner in self.of(owners))
        first = self._fixed[0][0]
        self._dtype = first.dtype
        self._kernel = kernel_for(first.device, first.dtype)(*self._fixed)
        self._grads: Tensors = ()

    def of(self, values: Tensors) -> Tensors:
        """Return those of the group's tensors that belong to this call."""
        return values if self._select is None else self._select(values)[:-1]

    def fits(self, fixed: Sequence[Tensors], grads: Tensors) -> bool:
        """Whether all tensors are those of before, where they were, and gradients are like them."""
        fixed = [self.of(tensors) for tensors in fixed]
        self._grads = self.of(grads)
        return (
            all(map(_same, fixed, self._fixed))
            # What is as it was may have been given other memory, or another view of the same.
            and _places(fixed) == self._places
            and all(all(map(torch.Tensor.is_contiguous, tensors)) for tensors in fixed)
            and list(map(torch.Tensor.numel, fixed[0])) == self._sizes
            and list(map(torch.Tensor.numel, self._grads)) == self._sizes
            and _plain(self._grads, self._dtype)
        )

    def update(self, rho: float | Tensors, scalars: StepScalars) -> bool:
        """Take the step for the gradients that were found to fit.

        Args:
            rho: The group's threshold, or one for each of its parameters.
            scalars: The other options.

        Returns:
            Whether all gradients are known to be finite; else there is something to `undo`.
        """
        own = rho if isinstance(rho, float) else self.of(rho)
        self._kernel.update(self._grads, own, scalars)
        # A kernel writes past autograd, which notices by this that a graph is out of date.
        increment_version((*self._fixed[0], *self._fixed[1]))
        return self._kernel.finite()

    @property
    def late(self) -> bool:
        """Whether what is not finite is known only after a later step."""
        return self._kernel.late

    def was_finite(self) -> bool:
        """Whether the gradients of all steps were finite; waits for the device."""
        return self._kernel.finite(wait=True)

    def undo(self) -> None:
        """Take back the last update, to rounding."""
        self._kernel.undo()

    def finish(self) -> int | torch.Tensor:
        """Let go of the gradients; return the number of coordinates that were clipped."""
        self._grads = ()
        return self._kernel.clipped


class KernelPlan:
    """How one group's parameters are shared out between kernels and the eager form.

    Args:
        rest: The places of the parameters that no kernel takes.
    """

    def __init__(self, rest: Sequence[int] = ()) -> None:
        self.calls: list[KernelCall] = []
        self.rest = rest
        self._length = -1
        self._sharded = False
        # Where those of the rest lie that a kernel would take if others were not there too.
        self._shared: dict[int, tuple[int, int]] = {}

    def refresh(self, params: Tensors, grads: Tensors, states: Sequence[dict[str, Any]]) -> bool:
        """Bring the plan up to date with this step's tensors.

        Args:
            params: The group's parameters that have a gradient.
            grads: Their gradients.
            states: Their state, with `exp_avg` and `hessian`.

        Returns:
            False where a call that is of no use any more had a gradient that was not finite.
        """
        fixed = [params, [s["exp_avg"] for s in states], [s["hessian"] for s in states]]
        if self._sharded:
            fixed, grads = _shards(fixed, grads)
        if (
            len(grads) == self._length
            and all([call.fits(fixed, grads) for call in self.calls])
            and all([_span(fixed[0][index]) == span for index, span in self._shared.items()])
            and not any(
                _kernel_takes(*(part[index] for part in (*fixed, grads)))
                for index in self.rest
                if index not in self._shared
            )
        ):
            return True
        finite = all([call.was_finite() for call in self.calls if call.late])
        if not self._sharded and any(isinstance(param, DTensor) for param in params):
            self._sharded = True
            fixed, grads = _shards(fixed, grads)
        self._make(fixed, grads, params)
        return finite

    def _make(self, fixed: Sequence[Tensors], grads: Tensors, owners: Tensors) -> None:
        self._length = len(grads)
        alike: dict[Any, list[int]] = {}
        rest = []
        overlapping = _overlapping(fixed[0])
        self._shared = {index: _span(fixed[0][index]) for index in overlapping}
        for index, (param, m, h, grad) in enumerate(zip(*fixed, grads, strict=True)):
            if index not in overlapping and _kernel_takes(param, m, h, grad):
                owner = owners[index]
                sharded = isinstance(owner, DTensor)
                cut = (owner.device_mesh, owner.placements) if sharded else None
                alike.setdefault((param.device, param.dtype, cut), []).append(index)
            else:
                rest.append(index)
        self.rest = rest
        self.calls = [
            KernelCall(None if len(indices) == len(grads) else indices, fixed, owners)
            for indices in alike.values()
        ]
        for call in self.calls:
            call.fits(fixed, grads)  # takes up the gradients


def _shards(fixed: Sequence[Tensors], grads: Tensors) -> tuple[list[Tensors], Tensors]:
    own = [local(placed_like(grad, param)) for grad, param in zip(grads, fixed[0], strict=True)]
    return [[local(tensor) for tensor in tensors] for tensors in fixed], own


def _kernel_takes(
    param: torch.Tensor, m: torch.Tensor, h: torch.Tensor, grad: torch.Tensor
) -> bool:
    return (
        kernel_for(param.device, param.dtype) is not None
        and _plain([param, grad], param.dtype)
        and _plain([m, h], torch.float32)
        and m.device == h.device == param.device
        and m.shape == h.shape == grad.shape == param.shape
    )


def _plain(tensors: Tensors, dtype: torch.dtype) -> bool:
    """Whether all are of a dtype and in memory as they read: no gaps, no other order, no sign."""
    try:
        return (
            all([tensor.dtype is dtype for tensor in tensors])
            and {torch.Tensor, torch.nn.Parameter}.issuperset(map(type, tensors))
            and all(map(torch.Tensor.is_contiguous, tensors))
            and not any(map(torch.Tensor.is_neg, tensors))
        )
    except RuntimeError:  # some sparse layouts do not know
        return False


def _overlapping(params: Tensors) -> set[int]:
    """Return the places of parameters that share memory, whose updates must not run at once."""
    spans = sorted((_span(param), index) for index, param in enumerate(params) if param.numel())
    found, end, last = set(), 0, -1
    for (first, after), index in spans:
        if first < end:
            found |= {last, index}
        if after > end:
            end, last = after, index
    return found


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _places(tensors: Sequence[Tensors]) -> list[list[int]]:
    return [list(map(torch.Tensor.data_ptr, same)) for same in tensors]


def _same(now: Tensors, before: Tensors) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


def run_kernels(
    calls: Sequence[tuple[KernelCall, float | Tensors, StepScalars]], rest: Tensors
) -> bool:
    """Let kernels take their part of a step, unless a gradient is not finite.

    Args:
        calls: The calls of all groups, each with its threshold and the other options.
        rest: The parameters that no kernel takes, whose gradients count too.

    Returns:
        Whether all gradients are known to be finite, on all processes that have shards of these
        parameters. Where they are not, everything is as it was, to rounding, but for what late
        kernels did.
    """
    grads = [local(placed_like(param.grad, param)) for param in rest]
    finite = not grads or first_non_finite(grads) is None
    done = []
    for call, rho, scalars in calls:
        if finite:
            done.append(call)
            finite = call.update(rho, scalars)
    if rest or not all([call.late for call, _, _ in calls]):
        owners = [*rest, *(call.owner for call, _, _ in calls)]
        finite = agreed_first(None if finite else 0, owners) is None
    if not finite:
        for call in done:
            call.undo()
            call.finish()
    return finite
