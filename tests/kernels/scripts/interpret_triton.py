"""Run the CUDA kernel in Triton's interpreter, on CPU tensors, against the equations in float64.

Started with TRITON_INTERPRET=1, which has to be there before triton is imported.
"""

import itertools
import os

import numpy as np
import torch

from hf_sophia.kernels import StepScalars, cuda

#: Empty, below, at and above the border of a block, and some blocks.
SIZES = (0, 5, cuda.BLOCK - 1, cuda.BLOCK, cuda.BLOCK + 1, 3 * cuda.BLOCK + 7)
RHO = 0.25


def check(dtype: torch.dtype, nesterov: bool, own: bool, shift: int) -> None:
    """Take two steps; with a shift, the tensors begin off the border of 16 bytes."""
    generator = torch.Generator().manual_seed(0)

    def make() -> list[torch.Tensor]:
        return [torch.randn(size + shift, generator=generator)[shift:] for size in SIZES]

    def narrow(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        wide = [torch.zeros(len(t) + shift, dtype=dtype)[shift:] for t in tensors]
        return [a.copy_(b) for a, b in zip(wide, tensors, strict=True)]

    theta, grads, m = narrow(make()), narrow(make()), make()
    h = [x.abs() * x * ((x > 0) | (x < -0.7)) for x in make()]  # also negative, as Hutchinson's
    s = StepScalars(0.01, 0.99, 0.9, 1e-12, 0.5, nesterov)
    thresholds = [torch.tensor(RHO * 2**i) for i in range(len(SIZES))] if own else RHO
    kernel = cuda.TritonStep(theta, m, h)
    for _ in range(2):
        before = [[x.clone() for x in tensors] for tensors in (theta, m)]
        kernel.update(grads, thresholds, s)
        assert kernel.finite()
        assert kernel._aligned == (shift == 0)
        clipped = 0
        for i, (old, old_m) in enumerate(zip(*before, strict=True)):
            rho = float(thresholds[i]) if own else RHO
            t, g, average, curvature = (x.double().numpy() for x in (old, grads[i], old_m, h[i]))
            new_m = 0.9 * average + 0.1 * g
            ahead = 0.9 * new_m + 0.1 * g if nesterov else new_m
            ratio = ahead / np.maximum(curvature / 0.5, 1e-12)
            clipped += (np.abs(ratio) >= rho).sum()
            new = 0.99 * t - 0.01 / rho * np.clip(ratio, -rho, rho)
            # The parameter's own rounding, of half of its last bit, besides that of fp32.
            last = torch.finfo(dtype).eps if dtype != torch.float32 else 2.0**-23
            np.testing.assert_allclose(theta[i].double().numpy(), new, rtol=last, atol=2.0**-22)
            np.testing.assert_allclose(m[i].numpy(), new_m, rtol=2.0**-22, atol=2.0**-22)
        # A ratio that rounds to the threshold may fall on either side.
        assert abs(int(kernel.clipped) - clipped) <= 2, (int(kernel.clipped), clipped)
    grads[5][-1] = float("nan")
    grads[3][0] = float("inf")
    kernel.update(grads, thresholds, s)
    assert not kernel.finite()
    assert all(x.isfinite().all() for x in (*theta, *m))


def check_the_end_of_fp32() -> None:
    """An average that becomes infinite is clipped; nothing becomes NaN."""
    theta, m, h = torch.zeros(5), torch.full((5,), 3e38), torch.ones(5)
    kernel = cuda.TritonStep([theta], [m], [h])
    kernel.update([torch.full((5,), -3e38)], RHO, StepScalars(0.01, 1.0, 0.9, 1e-12, 1.0, False))
    assert m.isinf().all()
    assert torch.equal(theta, torch.full((5,), 0.01))


def check_the_trial() -> None:
    """What tells whether there is a kernel does not depend on the user's default dtype."""
    torch.set_default_dtype(torch.float64)
    cuda._try_out(torch.device("cpu"))
    torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for case in itertools.product(dtypes, (False, True), (False, True), (0, 1)):
        check(*case)
    check_the_end_of_fp32()
    check_the_trial()
    print("all agree")
