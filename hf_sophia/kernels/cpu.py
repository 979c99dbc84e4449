"""Sophia's step on the CPU for a list of tensors at once, in C."""

import ctypes
import logging
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch

from hf_sophia.kernels.compilation import CompilationError, compiled
from hf_sophia.kernels.scalars import StepScalars

logger = logging.getLogger(__name__)

#: What parameters and gradients may be; the state is fp32.
DTYPES = (torch.float32, torch.bfloat16)

#: A thread is worth starting for this many chunks.
_CHUNKS_PER_THREAD = 4


class _Job(ctypes.Structure):
    """The `job` of sophia.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("theta", "grad", "m", "h", "rho")),
        ("size", ctypes.c_void_p),
        ("first_chunk", ctypes.c_void_p),
        ("tensors", ctypes.c_int64),
        ("lr", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("decay", "weight", "eps", "hessian_weight")),
        *((name, ctypes.c_int32) for name in ("nesterov", "bf16", "undo")),
        *((name, ctypes.c_int64) for name in ("next", "bad", "clipped")),
    )


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """Return the compiled kernel, or None and why there is none."""
    try:
        library = compiled(Path(__file__).with_name("sophia.c"))
    except CompilationError as error:
        logger.info("Sophia's steps on the CPU are not fused: %s", error)
        return None, str(error)
    for name in ("chunk_elements", "job_bytes"):
        getattr(library, name).restype = ctypes.c_int64
    if library.job_bytes() != ctypes.sizeof(_Job):
        return None, f"this compiler lays out {library.job_bytes()} bytes where Python has others"
    library.step.argtypes = (ctypes.c_void_p,)
    library.step.restype = None
    return library, ""


def missing() -> str:
    """Return why there is no kernel here; empty where there is one."""
    return _library()[1]


@cache
def _parallel() -> Callable[..., None] | None:
    """Return torch's own way to start threads, so that there is one pool of them; None: no way."""
    try:
        start = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        logger.info("Sophia's steps on the CPU take one thread: torch was built without GNU OpenMP")
        return None
    start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    start.restype = None
    return start


class CpuStep:
    """A `Kernel` for the CPU."""

    late = False

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        averages: Sequence[torch.Tensor],
        hessians: Sequence[torch.Tensor],
    ) -> None:
        library, reason = _library()
        if library is None:
            raise CompilationError(reason)
        self._step = library.step
        sizes = [param.numel() for param in params]
        length = library.chunk_elements()
        first_chunk = [0, *accumulate(-(-size // length) for size in sizes)]
        self._chunks = first_chunk[-1]
        self._fixed = [
            *(_addresses(tensors) for tensors in (params, averages, hessians)),
            array("q", sizes),
            array("q", first_chunk),
        ]
        theta, m, h, size, chunk = (table.buffer_info()[0] for table in self._fixed)
        self._job = _Job(
            theta=theta,
            m=m,
            h=h,
            size=size,
            first_chunk=chunk,
            tensors=len(sizes),
            bf16=params[0].dtype == torch.bfloat16,
        )
        self._number = array("f", [0.0])
        self._one_for_all = array("q", [self._number.buffer_info()[0]] * len(sizes))
        self._passing: tuple[array[int], ...] = ()

    def update(
        self,
        grads: Sequence[torch.Tensor],
        rho: float | Sequence[torch.Tensor],
        scalars: StepScalars,
    ) -> None:
        """Take a step."""
        if isinstance(rho, float):
            self._number[0] = rho
            thresholds = self._one_for_all
        else:
            thresholds = _addresses(rho)
        self._passing = (_addresses(grads), thresholds)
        job = self._job
        job.grad, job.rho = (table.buffer_info()[0] for table in self._passing)
        job.lr, job.decay, job.weight = scalars.lr, scalars.decay, 1.0 - scalars.beta1
        job.eps, job.hessian_weight = scalars.scaled_eps, scalars.hessian_weight
        job.nesterov, job.undo = scalars.nesterov, False
        job.bad = job.clipped = 0
        self._run()

    def finite(self, *, wait: bool = False) -> bool:
        """Whether all gradients of the last update were finite."""
        return not self._job.bad

    def undo(self) -> None:
        """Take back the last update, to rounding; its gradients must still be there."""
        self._job.undo = True
        self._run()

    @property
    def clipped(self) -> int:
        """The number of coordinates that the last update clipped."""
        return self._job.clipped

    def _run(self) -> None:
        self._job.next = 0
        job = ctypes.byref(self._job)
        threads = min(torch.get_num_threads(), self._chunks // _CHUNKS_PER_THREAD)
        if threads > 1 and (parallel := _parallel()) is not None:
            parallel(self._step, job, threads, 0)
        else:
            self._step(job)


def _addresses(tensors: Sequence[torch.Tensor]) -> "array[int]":
    return array("q", list(map(torch.Tensor.data_ptr, tensors)))
