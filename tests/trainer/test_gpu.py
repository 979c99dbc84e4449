"""The tiny run on CUDA: fp32 agrees with the CPU's, bf16 and fp16 train."""

import pytest
import torch

from hf_sophia import Adam, RAdam, Sophia
from hf_sophia.estimators import sampled_cotangent

from .runs import hessians_of, run

pytestmark = pytest.mark.gpu


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_fp32_agrees_with_the_cpu(tiny_gpt2, tmp_path) -> None:
    # Labels are drawn on the CPU for both, so only rounding differs; 12 steps keep it small.
    options = {"gradient_accumulation_steps": 2, "max_steps": 12}
    cpu = run(tiny_gpt2(), tmp_path, **options)
    gpu = run(tiny_gpt2(), tmp_path, use_cpu=False, **options)
    assert next(gpu.model.parameters()).is_cuda
    assert losses_of(gpu) == pytest.approx(losses_of(cpu), rel=1e-3)
    for one, other in zip(hessians_of(cpu), hessians_of(gpu), strict=True):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(precision, tiny_gpt2, tmp_path) -> None:
    trainer = run(tiny_gpt2(), tmp_path, use_cpu=False, **{precision: True})
    losses = losses_of(trainer)
    assert losses[-1] < 0.8 * losses[0]
    for hessian in hessians_of(trainer):
        assert hessian.dtype == torch.float32
        assert hessian.isfinite().all()
        assert hessian.max() > 0.0


def test_fp16_loss_scale_does_not_reach_the_hessian(tiny_gpt2, tmp_path) -> None:
    full = hessians_of(run(tiny_gpt2(), tmp_path, use_cpu=False, max_steps=1))
    half = hessians_of(run(tiny_gpt2(), tmp_path, use_cpu=False, max_steps=1, fp16=True))
    for one, other in zip(full, half, strict=True):
        assert other.sum().item() == pytest.approx(one.sum().item(), rel=0.2)


def test_pure_bf16_parameters_train(tiny_gpt2, tmp_path) -> None:
    trainer = run(tiny_gpt2().bfloat16(), tmp_path, use_cpu=False)
    losses = losses_of(trainer)
    assert losses[-1] < 0.8 * losses[0]
    assert all(h.dtype == torch.float32 for h in hessians_of(trainer))


@pytest.mark.parametrize("optimizer", [Sophia, Adam, RAdam])
@pytest.mark.filterwarnings("ignore:Sophia steps without")
def test_optimizers_take_the_cpus_step(optimizer) -> None:
    torch.manual_seed(0)
    start, grad = torch.randn(1000), torch.randn(1000)
    results = []
    for device in ("cpu", "cuda"):
        param = torch.nn.Parameter(start.to(device, copy=True))
        opt = optimizer([param], lr=0.01, weight_decay=0.1)
        for _ in range(5):
            param.grad = grad.to(device)
            opt.step()
        results.append(param.detach().cpu())
    torch.testing.assert_close(*results)


def test_sampled_labels_are_the_cpus() -> None:
    torch.manual_seed(0)
    logits = torch.randn(512, 50257)
    labels = [
        sampled_cotangent(logits.to(device), generator=torch.Generator().manual_seed(1))[0]
        .argmin(-1)
        .cpu()
        for device in ("cpu", "cuda")
    ]
    # A label on the edge between two classes may fall on either side.
    assert (labels[0] != labels[1]).sum() <= 1
