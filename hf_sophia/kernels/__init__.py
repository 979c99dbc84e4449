"""Sophia's step in one pass over memory, for a list of tensors at a time.

A kernel is made from the parameters, their `exp_avg` and their `hessian`, and updates them in place
as often as they stay where they are. The optimizer asks for one by device and dtype and never sees
which it is.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from hf_sophia.kernels import cpu
from hf_sophia.kernels.scalars import StepScalars

__all__ = ["SMALLEST_RHO", "Kernel", "StepScalars", "kernel_for", "no_kernel_because"]


#: Stands for a rho that there is none of yet: with it every coordinate that moves is clipped.
SMALLEST_RHO = 1e-30


class Kernel(Protocol):
    """What a kernel does; all tensors are contiguous, and of one device.

    Args:
        params: Parameters of one dtype.
        averages: Their gradients' averages m, in fp32.
        hessians: Their Hessian's averages h, in fp32.
    """

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
    ) -> bool:
        """Take a step.

        Args:
            grads: The gradients, of the parameters' dtype.
            rho: The threshold, or one of no dimension in fp32 for each parameter.
            scalars: The other options.

        Returns:
            Whether all gradients are finite; else there is something to `undo`.
        """

    def undo(self) -> None:
        """Take back the last update, to rounding; its gradients must still be there."""

    @property
    def clipped(self) -> int:
        """The number of coordinates that the last update clipped."""


def kernel_for(device: torch.device, dtype: torch.dtype) -> type[Kernel] | None:
    """Return the kernel for parameters of a device and dtype, or None where there is none."""
    return None if no_kernel_because(device, dtype) else cpu.CpuStep


def no_kernel_because(device: torch.device, dtype: torch.dtype) -> str:
    """Say why there is no kernel for parameters of a device and dtype; empty: there is one."""
    if device.type != "cpu":
        return f"there is none for device {device.type!r}"
    if dtype not in cpu.DTYPES:
        return f"there is none for {dtype}, only for {', '.join(map(str, cpu.DTYPES))}"
    return cpu.missing()
