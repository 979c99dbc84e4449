"""Sophia's step in one pass over memory, for a list of tensors at a time, on CPU and CUDA.

A kernel is made from the parameters, their `exp_avg` and their `hessian`, and updates them in place
as often as they stay where they are. The optimizer asks for one by device and dtype and never sees
which it is.
"""

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch

from hf_sophia.kernels import cpu, cuda
from hf_sophia.kernels.scalars import SMALLEST_NORMAL, SMALLEST_RHO, StepScalars

__all__ = [
    "SMALLEST_NORMAL",
    "SMALLEST_RHO",
    "Kernel",
    "StepScalars",
    "kernel_for",
    "no_kernel_because",
]


_KERNELS = {"cpu": cpu, "cuda": cuda}


class Kernel(Protocol):
    """What a kernel does; all tensors are contiguous, and of one device.

    It works on addresses, so the caller keeps the tensors alive.

    Args:
        params: Parameters of one dtype.
        averages: Their gradients' averages m, in fp32.
        hessians: Their Hessian's averages h, in fp32.
    """

    #: Whether what is not finite is known only after a later update.
    late: ClassVar[bool]

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        averages: Sequence[torch.Tensor],
        hessians: Sequence[torch.Tensor],
    ) -> None: ...

    def update(
        self,
        grads: Sequence[torch.Tensor],
        rho: float | Sequence[torch.Tensor],
        scalars: StepScalars,
    ) -> None:
        """Take a step.

        Args:
            grads: The gradients, of the parameters' dtype.
            rho: The threshold, or one of no dimension in fp32 for each parameter.
            scalars: The other options.
        """

    def finite(self, *, wait: bool = False) -> bool:
        """Whether all gradients were finite, as far as is known.

        On the CPU these are the last update's, and it can be taken back. Where the kernel is `late`
        they may be those of a step before, in which the coordinates of the others were updated as
        if their gradients were 0.

        Args:
            wait: For the device, to know of all updates.
        """

    def undo(self) -> None:
        """Take back the last update, to rounding, where the kernel is not late.

        To the rounding of what was added: beside a gradient of 1e6 an average of 0.1 comes back
        with an error of some 0.01.
        """

    @property
    def clipped(self) -> int | torch.Tensor:
        """The number of coordinates that the last update clipped; on a device, a tensor there."""


def kernel_for(device: torch.device, dtype: torch.dtype) -> type[Kernel] | None:
    """Return the kernel for parameters of a device and dtype, or None where there is none."""
    if no_kernel_because(device, dtype):
        return None
    return cpu.CpuStep if device.type == "cpu" else cuda.TritonStep


def no_kernel_because(device: torch.device, dtype: torch.dtype) -> str:
    """Say why there is no kernel for parameters of a device and dtype; empty: there is one."""
    if device.type not in _KERNELS:
        return f"there is no kernel for device {device.type!r}"
    own = _KERNELS[device.type]
    if dtype not in own.DTYPES:
        return f"there is no kernel for {dtype}, only for {', '.join(map(str, own.DTYPES))}"
    return own.missing()
