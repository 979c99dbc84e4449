"""Sophia's step on CUDA for a list of tensors at once.

The host does not wait for the device: that a gradient was not finite is known a step later, and
until then such a coordinate is updated as if its gradient were 0.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from hf_sophia.kernels.scalars import SMALLEST_RHO, StepScalars

logger = logging.getLogger(__name__)

#: Parameters and gradients may be of these; the state is fp32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Elements of a program, and the warps that share them.
BLOCK, WARPS = 2048, 4

#: What addresses are multiples of where accesses of 128 bits are possible.
_ALIGNMENT = 16

#: Steps whose counts of clipped coordinates are kept before they are set to 0 again.
_SLOTS = 256


@cache
def missing() -> str:
    """Return why there is no kernel here; empty where there is one.

    Where there is a device the kernel is built and run, on nothing: Triton needs a C compiler,
    Python's headers and a device that it knows, and says so only then.
    """
    if not find_spec("triton"):
        return "the package triton is not installed"
    if not torch.cuda.is_available():
        return ""
    try:
        _try_out(torch.device("cuda", torch.cuda.current_device()))
    except Exception as error:  # whatever a compiler or a driver raises
        logger.info("Sophia's steps on CUDA are not fused: %s", error)
        return f"Triton can't make a kernel here: {str(error).strip() or type(error).__name__}"
    return ""


def _try_out(device: torch.device) -> None:
    theta, g, m, h = torch.zeros((4, 1), dtype=torch.float32, device=device)
    kernel = TritonStep([theta], [m], [h])
    kernel.update([g], 1.0, StepScalars(0.0, 1.0, 0.9, 1.0, 1.0, nesterov=False))
    kernel.finite(wait=True)  # errors of a launch may come later


@cache
def _kernel() -> tuple[Any, dict[torch.dtype, Any]]:
    """Return the kernel and Triton's names of the types; imported here, as it takes a while."""
    import triton.language as tl

    from hf_sophia.kernels.triton_kernel import sophia_kernel

    return sophia_kernel, dict(zip(DTYPES, (tl.float32, tl.bfloat16, tl.float16), strict=True))


class TritonStep:
    """A `Kernel` for any device that Triton knows."""

    late = True

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        averages: Sequence[torch.Tensor],
        hessians: Sequence[torch.Tensor],
    ) -> None:
        first = params[0]
        self._device, self._dtype = first.device, first.dtype
        sizes = torch.tensor([param.numel() for param in params], device="cpu")
        self._block, self._warps = BLOCK, WARPS
        blocks = (sizes + BLOCK - 1) // BLOCK
        owner = torch.repeat_interleave(torch.arange(len(params), device="cpu"), blocks)
        before = (blocks.cumsum(0) - blocks)[owner]
        start = (torch.arange(len(owner), device="cpu") - before) * BLOCK
        self._programs = len(owner)
        self._sizes, self._owner, self._start = (
            tensor.to(self._device) for tensor in (sizes, owner, start)
        )
        self._fixed = [_addresses(tensors) for tensors in (params, averages, hessians)]
        self._number = torch.zeros((), dtype=torch.float32, device=self._device)
        self._told: float | None = None
        self._passing: list[list[int]] = []
        self._table = torch.zeros(0, dtype=torch.long)
        self._aligned = False
        self._clipped = torch.zeros(_SLOTS, dtype=torch.long, device=self._device)
        self._bad = torch.zeros((), dtype=torch.long, device=self._device)
        self._slot = -1
        self._news: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def update(
        self,
        grads: Sequence[torch.Tensor],
        rho: float | Sequence[torch.Tensor],
        scalars: StepScalars,
    ) -> None:
        """Take a step."""
        # Triton launches on the current device, which need not be that of the parameters.
        with self._as_current():
            self._launch(grads, rho, scalars)

    def _as_current(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _launch(
        self,
        grads: Sequence[torch.Tensor],
        rho: float | Sequence[torch.Tensor],
        scalars: StepScalars,
    ) -> None:
        if isinstance(rho, float):
            if rho != self._told:
                self._number.fill_(rho)
                self._told = rho
            thresholds = [self._number.data_ptr()] * len(grads)
        else:
            thresholds = _addresses(rho)
        self._tell(_addresses(grads), thresholds)
        self._slot = (self._slot + 1) % _SLOTS
        if self._slot == 0:
            self._clipped.zero_()
        if self._programs == 0:
            return
        weight = 1.0 - scalars.beta1
        kernel, types = _kernel()
        kernel[(self._programs,)](
            self._table,
            self._sizes,
            self._owner,
            self._start,
            self._clipped[self._slot :],
            self._bad,
            len(grads),
            scalars.lr,
            scalars.decay,
            weight,
            weight if scalars.nesterov else 0.0,
            scalars.scaled_eps,
            scalars.hessian_weight,
            SMALLEST_RHO,
            TYPE=types[self._dtype],
            BLOCK=self._block,
            ALIGNED=self._aligned,
            num_warps=self._warps,
        )

    def finite(self, *, wait: bool = False) -> bool:
        """Whether no gradient is known not to have been finite; it may be that of a step before."""
        if wait or self._device.type != "cuda":
            return not self._bad
        if self._news is not None:
            count, arrived = self._news
            if not arrived.query():
                return True
            self._news = None
            if count:
                self._bad.zero_()
                return False
        with self._as_current():
            count = torch.empty((), dtype=torch.long, device="cpu", pin_memory=True)
            count.copy_(self._bad, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._news = (count, arrived)
        return True

    def undo(self) -> None:
        """Do nothing: when it is known, the gradients are gone."""

    @property
    def clipped(self) -> torch.Tensor:
        """The number of coordinates that the last update clipped, on the device."""
        return self._clipped[self._slot]

    def _tell(self, grads: list[int], thresholds: list[int]) -> None:
        """Bring the table of addresses to the device, unless it is the last step's."""
        if self._passing == [grads, thresholds]:
            return
        self._passing = [grads, thresholds]
        theta, m, h = self._fixed
        places = (*theta, *grads, *m, *h)
        self._aligned = not any(address % _ALIGNMENT for address in places)
        table = torch.tensor([theta, grads, m, h, thresholds], device="cpu")
        if self._device.type == "cuda":
            table = table.pin_memory()
        self._table = table.to(self._device, non_blocking=True)


def _addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))
