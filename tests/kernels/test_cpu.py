"""The CPU kernel against the equations in float64, at every size, border and option."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_sophia.kernels import StepScalars, compilation, cpu

pytestmark = pytest.mark.skipif(bool(cpu.missing()), reason=cpu.missing() or "-")

#: Empty, a scalar, below and above a vector's width, around a block's and a chunk's border.
SIZES = (0, 1, 7, 64, 1023, 1025, 16383, 16384, 16385, 50001)

OPTIONS = {"lr": 0.01, "decay": 0.99, "beta1": 0.9, "eps": 1e-12, "hessian_weight": 1.0}

#: Of a product and of a sum, each by half of the last of 24 bits.
TWO_ROUNDINGS = {"rtol": 2.0**-23, "atol": 2.0**-23}


def tensors(dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    make = lambda: [torch.randn(size, generator=generator) for size in sizes]  # noqa: E731
    theta, grads = ([x.to(dtype) for x in make()] for _ in range(2))
    # Zero in a fourth of the coordinates and, as Hutchinson's, negative in another.
    h = [x.abs() * x * ((x > 0) | (x < -0.7)) for x in make()]
    return theta, grads, [0.1 * x for x in make()], h


def expected(theta, g, m, h, rho, s: StepScalars):
    """Algorithm 3 in float64: the new parameter, the new m, and the clipped coordinates."""
    theta, g, m, h = (x.double().numpy() for x in (theta, g, m, h))
    m = s.beta1 * m + (1 - s.beta1) * g
    ahead = s.beta1 * m + (1 - s.beta1) * g if s.nesterov else m
    ratio = ahead / np.maximum(h / s.hessian_weight, s.eps)
    clipped = np.abs(ratio) >= rho
    return s.decay * theta - s.lr / rho * np.clip(ratio, -rho, rho), m, clipped


def copies(tensors):
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize(
    ("nesterov", "hessian_weight", "own", "threads", "eps"),
    [
        *itertools.product([False, True], [1.0, 0.0975], [False, True], [1], [1e-12]),
        (True, 0.5, True, 3, 0.5),
    ],
)
def test_it_follows_the_equations(nesterov, hessian_weight, own, threads, eps) -> None:
    theta, grads, m, h = tensors()
    changed = {"hessian_weight": hessian_weight, "eps": eps}
    s = StepScalars(**{**OPTIONS, **changed}, nesterov=nesterov)
    # The equations' float32 thresholds, so that both clip the same coordinates.
    rho = [torch.tensor(0.05 * 1.5**i) for i in range(len(theta))] if own else 0.25
    before = [copies(theta), copies(m)]
    kernel = cpu.CpuStep(theta, m, h)
    torch.set_num_threads(threads)
    try:
        kernel.update(grads, rho, s)
    finally:
        torch.set_num_threads(1)
    clipped = 0
    for index, (t, average) in enumerate(zip(*before, strict=True)):
        threshold = float(rho[index]) if own else rho
        new, new_m, hit = expected(t, grads[index], average, h[index], threshold, s)
        np.testing.assert_allclose(theta[index].numpy(), new, **TWO_ROUNDINGS)
        np.testing.assert_allclose(m[index].numpy(), new_m, **TWO_ROUNDINGS)
        clipped += hit.sum()
    assert clipped > 0
    # A ratio that rounds to the threshold may fall on either side.
    assert abs(kernel.clipped - clipped) <= 2


def test_bf16_is_the_fp32_step_rounded_once() -> None:
    theta, grads, m, h = tensors(torch.bfloat16)
    wide = [x.float() for x in theta]
    wide_m = copies(m)
    s = StepScalars(**OPTIONS, nesterov=True)
    cpu.CpuStep(wide, wide_m, h).update([g.float() for g in grads], 0.25, s)
    kernel = cpu.CpuStep(theta, m, h)
    kernel.update(grads, 0.25, s)
    for narrow, rounded, one, other in zip(theta, wide, m, wide_m, strict=True):
        assert torch.equal(narrow, rounded.bfloat16())
        assert torch.equal(one, other)


def test_the_number_of_threads_changes_no_bit() -> None:
    results = []
    for threads in (1, 2, 5):
        theta, grads, m, h = tensors(sizes=(100_003, 300_001, 1))
        torch.set_num_threads(threads)
        try:
            kernel = cpu.CpuStep(theta, m, h)
            for _ in range(3):
                kernel.update(grads, 0.25, StepScalars(**OPTIONS, nesterov=True))
        finally:
            torch.set_num_threads(1)
        results.append([*theta, *m, torch.tensor(kernel.clipped)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (3, 63), (9, 50000)])
def test_what_is_not_finite_is_found_and_the_step_taken_back(dtype, bad, place) -> None:
    theta, grads, m, h = tensors(dtype, sizes=(1, *SIZES[1:]))
    grads[place[0]][place[1]] = bad
    before = [copies(theta), copies(m)]
    kernel = cpu.CpuStep(theta, m, h)
    for _ in range(2):  # what was done in one step is not taken back in another
        kernel.update(grads, 0.25, StepScalars(**OPTIONS, nesterov=True))
        assert not kernel.finite()
        kernel.undo()
        # bf16 rounds where the step, of up to 0.01, has led to.
        close = {"rtol": 1e-6, "atol": 1e-6}
        if dtype == torch.bfloat16:
            close = {"rtol": 2**-6, "atol": 0.02 * 2**-8}
        for tensor, old in zip([*theta, *m], itertools.chain(*before), strict=True):
            torch.testing.assert_close(tensor, old, **close)


def test_a_step_after_one_that_was_taken_back_is_whole() -> None:
    theta, grads, m, h = tensors()
    again, m_again = copies(theta), copies(m)
    kernel = cpu.CpuStep(theta, m, h)
    spoilt = copies(grads)
    spoilt[5][0] = float("nan")
    s = StepScalars(**OPTIONS, nesterov=False)
    kernel.update(spoilt, 0.25, s)
    assert not kernel.finite()
    kernel.undo()
    kernel.update(grads, 0.25, s)
    assert kernel.finite()
    cpu.CpuStep(again, m_again, h).update(grads, 0.25, s)
    for one, other in zip([*theta, *m], [*again, *m_again], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_an_earlier_step_did_is_not_taken_back_with_the_last() -> None:
    theta, grads, m, h = tensors()
    kernel = cpu.CpuStep(theta, m, h)
    s = StepScalars(**OPTIONS, nesterov=False)
    kernel.update(grads, 0.25, s)
    before = [*copies(theta), *copies(m)]
    grads[1][0] = float("nan")  # in the first chunk, so that the others are not begun
    kernel.update(grads, 0.25, s)
    kernel.undo()
    for tensor, old in zip([*theta, *m], before, strict=True):
        torch.testing.assert_close(tensor, old, rtol=1e-6, atol=1e-6)


def test_a_threshold_of_zero_is_a_sign_step() -> None:
    theta, grads, m, h = tensors(sizes=(1000,))
    before = theta[0].clone()
    s = StepScalars(**{**OPTIONS, "decay": 1.0}, nesterov=False)
    kernel = cpu.CpuStep(theta, m, h)
    kernel.update(grads, [torch.tensor(0.0)], s)
    torch.testing.assert_close(theta[0], before - 0.01 * m[0].sign(), **TWO_ROUNDINGS)
    assert kernel.clipped == 1000


def test_every_loop_over_elements_is_vectorised(tmp_path) -> None:
    compiler = compilation._compiler()
    if "Free Software Foundation" not in compilation._run([*compiler, "--version"]).stdout:
        pytest.skip("only GCC says so in a way that this reads")
    source = Path(cpu.__file__).with_name("sophia.c")
    loops = {
        number
        for number, line in enumerate(source.read_text().splitlines(), start=1)
        if re.match(r"\s*for \(int64_t i = 0; i < n; i\+\+\)", line)
    }
    assert len(loops) == 4
    said = compilation._run(
        [
            *(*compiler, *compilation.FLAGS, "-fopt-info-vec-optimized"),
            *(str(source), "-o", str(tmp_path / "sophia.so")),
        ]
    ).stderr
    done = {int(number) for number in re.findall(r"sophia\.c:(\d+):\d+: .*loop vectorized", said)}
    assert done == loops
