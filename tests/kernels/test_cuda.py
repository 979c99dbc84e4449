"""The CUDA kernel without a GPU: its results in Triton's interpreter, its accesses in PTX."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sophia.kernels import cuda, kernel_for

triton = pytest.importorskip("triton", reason="triton is not installed")


def test_it_follows_the_equations_in_the_interpreter() -> None:
    script = Path(__file__).parent / "scripts" / "interpret_triton.py"
    result = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "all agree\n"


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """Compile ahead of time for an H100, by dtype and alignment."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    os.environ.setdefault("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    kernel, types = cuda._kernel()
    tables = {"table", "sizes", "owner", "start", "clipped", "bad"}
    constants = {"TYPE", "BLOCK", "ALIGNED"}

    def compiled(dtype: torch.dtype, aligned: bool) -> str:
        signature = {
            name: "*i64"
            if name in tables
            else "constexpr"
            if name in constants
            else "i32"
            if name == "tensors"
            else "fp32"
            for name in kernel.arg_names
        }
        values = {"TYPE": types[dtype], "BLOCK": cuda.BLOCK, "ALIGNED": aligned}
        source = ASTSource(kernel, signature=signature, constexprs=values)
        options = {"num_warps": cuda.WARPS}
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

    return compiled


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_whole_blocks_are_read_and_written_by_128_bits(ptx, dtype) -> None:
    """Two fp32 tensors read and one written, and as many of the parameters' own dtype."""
    text = ptx(dtype, True)
    each_thread = cuda.BLOCK // (32 * cuda.WARPS)
    wide, own = each_thread * 4 // 16, each_thread * dtype.itemsize // 16
    assert len(re.findall(r"ld\.global\.v4\.b32", text)) == 2 * (wide + own)
    assert len(re.findall(r"st\.global\.v4\.b32", text)) == wide + own
    assert "v4" not in ptx(dtype, False)


def test_there_is_a_kernel_for_cuda() -> None:
    for dtype in cuda.DTYPES:
        assert kernel_for(torch.device("cuda"), dtype) is cuda.TritonStep
    assert kernel_for(torch.device("cuda"), torch.float64) is None
    assert kernel_for(torch.device("mps"), torch.float32) is None


def test_one_launch_updates_a_group(monkeypatch) -> None:
    """Whatever the number of tensors; a second step tells the device nothing that it knows."""
    launches, tables = [], []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: (
                launches.append((grid, args, options)),
                tables.append(args[0]),
            )

    monkeypatch.setattr(cuda, "_kernel", lambda: (Kernel(), dict.fromkeys(cuda.DTYPES)))
    tensors = [torch.zeros(size) for size in (1, cuda.BLOCK, cuda.BLOCK + 1)]
    kernel = cuda.TritonStep(tensors, tensors, tensors)
    scalars = cuda.StepScalars(0.1, 1.0, 0.9, 1e-12, 1.0, False)
    for _ in range(2):
        kernel.update(tensors, 0.3, scalars)
    assert [grid for grid, *_ in launches] == [(4,), (4,)]
    assert tables[0] is tables[1]
    kernel.update([torch.zeros_like(tensor) for tensor in tensors], 0.3, scalars)
    assert tables[2] is not tables[1]
    # A kernel keeps the block that its tables were made for.
    block = cuda.BLOCK
    monkeypatch.setattr(cuda, "BLOCK", 2 * block)
    kernel.update(tensors, 0.3, scalars)
    assert launches[-1][0] == (4,)
    assert launches[-1][2]["BLOCK"] == block


def test_a_triton_that_can_not_build_here_is_a_reason(monkeypatch) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "_try_out", refuse)
    cuda.missing.cache_clear()
    try:
        assert "Failed to find C compiler" in cuda.missing()
        assert kernel_for(torch.device("cuda"), torch.float32) is None
    finally:
        cuda.missing.cache_clear()
