"""The CUDA kernel on a GPU: the CPU's results, one launch a group, nothing that waits."""

import pytest
import torch

from hf_sophia import Sophia
from hf_sophia.kernels import StepScalars, cpu, cuda

pytestmark = pytest.mark.gpu

SIZES = (1, 2047, 2048, 2049, 100_001)


def tensors(dtype: torch.dtype, device: str) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    theta, g, m, h = ([torch.randn(size, generator=generator) for size in SIZES] for _ in range(4))
    h = [x.abs() * x * ((x > 0) | (x < -0.7)) for x in h]  # also negative, as Hutchinson's
    return [
        [x.to(device, dtype) for x in theta],
        [x.to(device, dtype) for x in g],
        [x.to(device) for x in m],
        [x.to(device) for x in h],
    ]


@pytest.mark.skipif(bool(cpu.missing()), reason=cpu.missing() or "-")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [False, True])
def test_it_takes_the_cpus_step(dtype, nesterov) -> None:
    s = StepScalars(0.01, 0.99, 0.9, 1e-12, 0.5, nesterov)
    results = []
    for device, make in (("cpu", cpu.CpuStep), ("cuda", cuda.TritonStep)):
        theta, grads, m, h = tensors(dtype, device)
        kernel = make(theta, m, h)
        for rho in (0.25, [torch.tensor(0.1 * i + 0.1, device=device) for i in range(len(SIZES))]):
            kernel.update(grads, rho, s)
        results.append((theta, m, int(kernel.clipped)))
    for here, there in zip(results[0][:2], results[1][:2], strict=True):
        for one, other in zip(here, there, strict=True):
            rtol = 1e-5 if one.dtype == torch.float32 else 1e-2
            torch.testing.assert_close(other.cpu(), one, rtol=rtol, atol=1e-6)
    assert abs(results[0][2] - results[1][2]) <= 5


def test_a_step_is_one_launch_for_a_group_and_does_not_wait() -> None:
    params = [torch.nn.Parameter(torch.randn(50, 60, device="cuda")) for _ in range(20)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = Sophia(params, lr=0.01, k=10**9)
    optimizer.update_hessian({param: torch.rand_like(param) for param in params})
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    launches = [e for e in profile.events() if "sophia_kernel" in e.name]
    assert len(launches) == 1


def test_a_gradient_that_is_not_finite_is_an_error_within_two_steps() -> None:
    param = torch.nn.Parameter(torch.ones(5000, device="cuda"))
    optimizer = Sophia([param], lr=0.01, k=10**9)
    optimizer.update_hessian({param: torch.ones_like(param)})
    param.grad = torch.ones_like(param)
    param.grad[7] = float("nan")

    def three_steps() -> None:
        for _ in range(3):
            optimizer.step()
            torch.cuda.synchronize()
            param.grad = torch.ones_like(param)

    with pytest.raises(ValueError, match="NaN or infinity"):
        three_steps()
    assert param.isfinite().all()


def test_a_captured_step_is_refused() -> None:
    param = torch.nn.Parameter(torch.ones(5, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = Sophia([param], lr=0.01, k=10**9)
    optimizer.update_hessian({param: torch.ones_like(param)})
    optimizer.step()
    with (
        pytest.raises(RuntimeError, match="can't be captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


def test_no_recompilation_for_other_lists_and_rates() -> None:
    kernel, _ = cuda._kernel()
    scalars = StepScalars(0.01, 0.99, 0.9, 1e-12, 0.5, True)
    compiled = []
    for count in (1, 2, 3, 16, 17):
        theta, grads, m, h = ([t for t in ts[-1:] * count] for ts in tensors(torch.float32, "cuda"))
        step = cuda.TritonStep([t.clone() for t in theta], [t.clone() for t in m], h)
        for _ in range(3):
            step.update(grads, 0.1 * count, scalars)
        compiled.append(sum(len(cache[0]) for cache in kernel.device_caches.values()))
    assert len(set(compiled)) == 1
