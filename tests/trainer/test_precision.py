"""Low precision: the loss scale stays out of the Hessian, and the Hessian out of the scaler."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from hf_sophia import Sophia, SophiaTrainer, gauss_newton_bartlett
from hf_sophia.estimators import GaussNewtonBartlett
from hf_sophia.trainer.health import HessianHealth

from .runs import Recorder, arguments, dataset, first_hessian, hessians_of, run, sophia_of


class ScaledTrainer(SophiaTrainer):
    """Scales its loss, as in fp16, which accelerate allows on GPUs only; the pass stays fp32."""

    initial_scale, growth_interval = 2.0**16, 3

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=self.initial_scale, growth_interval=self.growth_interval
        )


def scaled(tiny_gpt2, folder, trainer_class=ScaledTrainer, **options) -> SophiaTrainer:
    return run(tiny_gpt2(), folder, trainer_class=trainer_class, **options)


@pytest.mark.parametrize("way", ["", "hessian_batch_fraction=0.3"], ids=["kept", "own"])
def test_the_loss_scale_leaves_the_hessian_exactly(way, tiny_gpt2, tmp_path) -> None:
    options = {"optim_args": way or None, "gradient_accumulation_steps": 2}
    expected = first_hessian(tiny_gpt2, tmp_path, **options)
    trainer = scaled(tiny_gpt2, tmp_path, max_steps=1, **options)
    assert trainer.accelerator.scaler.get_scale() == 2.0**16
    for one, other in zip(expected, hessians_of(trainer), strict=True):
        assert torch.equal(one, other)


def test_an_estimate_that_overflows_is_discarded_and_the_scaler_does_not_notice(
    tiny_gpt2, tmp_path, caplog
) -> None:
    class Overflowing(ScaledTrainer):
        def sophia_head(self, *args):
            head = super().sophia_head(*args)
            if self.state.global_step != 2:
                return head
            return replace(head, logits=head.logits * 1e38 * 1e38)

    options = {"optim_args": "k=2,rho=0.2", "max_steps": 7}
    recorder = Recorder()
    with caplog.at_level(logging.WARNING, "hf_sophia"):
        poisoned = scaled(tiny_gpt2, tmp_path, Overflowing, callback=recorder, **options)
    clean = scaled(tiny_gpt2, tmp_path, **options)
    assert recorder.refreshed == [1, 5, 7]
    assert caplog.text.count("holds NaN or infinity and is discarded") == 1
    assert poisoned.accelerator.scaler.state_dict() == clean.accelerator.scaler.state_dict()
    assert poisoned.accelerator.scaler.get_scale() == 2.0**18


@pytest.mark.parametrize("discarded", [False, True], ids=["kept", "discarded"])
def test_a_step_that_the_scaler_skips_has_its_estimate_once(discarded, tiny_gpt2, tmp_path) -> None:
    class Skipping(ScaledTrainer):
        # Overflows until it has come down.
        initial_scale, growth_interval = 2.0**126, 1000

        def sophia_head(self, *args):
            head = super().sophia_head(*args)
            if discarded and self.accelerator.scaler.get_scale() == self.initial_scale:
                return replace(head, logits=head.logits * float("nan"))
            return head

    recorder = Recorder()
    trainer = scaled(
        tiny_gpt2, tmp_path, Skipping, callback=recorder, optim_args="k=2,rho=0.2", max_steps=12
    )
    steps = next(iter(sophia_of(trainer).state.values()))["step"]
    assert 2 < steps < 12
    skipped = 12 - steps
    first, *later = recorder.refreshed
    # What was folded in is not made again while its step is tried again; what was discarded is.
    assert first <= skipped + 1
    assert (first > 1) == discarded
    assert later == list(range(skipped + 3, 13, 2))
    assert all(h.isfinite().all() for h in hessians_of(trainer))


@pytest.mark.parametrize("way", ["", "hessian_batch_fraction=1.0"], ids=["kept", "own"])
def test_under_fp16_autocast_refreshes_bear_the_scale_that_training_bears(
    way, tiny_gpt2, tmp_path, monkeypatch
) -> None:
    """The scaler goes to the edge of fp16's range; the mean is over eight micro-batches there.

    Without headroom most estimates overflow.
    """

    class AtTheEdge(ScaledTrainer):
        def compute_loss_context_manager(self):
            return torch.autocast("cpu", torch.float16)

    tries, failed = [], []
    fold, leave_out = AtTheEdge._fold_in, HessianHealth.left_out
    monkeypatch.setattr(AtTheEdge, "_fold_in", lambda *a: (tries.append(1), fold(*a)))
    monkeypatch.setattr(HessianHealth, "left_out", lambda *a: (failed.append(1), leave_out(*a)))
    scaled(
        tiny_gpt2,
        tmp_path,
        AtTheEdge,
        max_steps=80,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        optim_args=f"k=2,{way}".rstrip(","),
    )
    assert len(tries) > 30
    assert len(failed) < len(tries) / 4


@pytest.mark.parametrize(
    ("way", "shares"),
    [
        # Five micro-batches are an epoch: a step of four, and one of one.
        ("", [1 / 4] * 4 + [1]),
        ("hessian_batch_fraction=1.0", [1 / 4] * 4 + [1]),
        ("hessian_batch_fraction=0.3", [2 / 16, 1 / 16, 1 / 16, 1 / 16, 2 / 4]),
    ],
    ids=["kept", "own", "part"],
)
def test_each_pass_has_its_share_of_the_scale(
    way, shares, tiny_gpt2, tmp_path, monkeypatch
) -> None:
    given = []
    add = GaussNewtonBartlett.add

    def spy(self, *args, loss_scale, **kwargs):
        given.append(loss_scale)
        add(self, *args, loss_scale=loss_scale, **kwargs)

    monkeypatch.setattr(GaussNewtonBartlett, "add", spy)
    options = {"gradient_accumulation_steps": 4, "max_steps": 2, "data": dataset(20)}
    scaled(tiny_gpt2, tmp_path, optim_args=f"k=1,{way}".rstrip(","), **options)
    assert given == [share * 2.0**16 for share in shares]


def test_in_fp16_the_scale_keeps_small_gradients() -> None:
    """Gradients of 1e-7, of which fp16 has hardly a bit."""
    torch.manual_seed(0)
    features = torch.randn(64, 8) * 1e-3
    targets = torch.randint(50, (64,))

    def estimate(dtype: torch.dtype | None, scale: float | None) -> torch.Tensor:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 50))
        with torch.no_grad():
            model[1].weight.mul_(1e-4)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            logits = model(features).float()
        return gauss_newton_bartlett(
            logits,
            model.parameters(),
            generator=torch.Generator().manual_seed(2),
            targets=targets,
            loss_scale=scale,
        )[model[0].weight]

    exact = estimate(None, None)
    assert torch.equal(estimate(None, 2.0**20), exact)
    assert torch.equal(estimate(None, 3.7e4), exact)
    errors = [
        ((estimate(torch.float16, scale) - exact).norm() / exact.norm()).item()
        for scale in (2.0**18, None)
    ]
    assert errors[0] < 0.01 < 0.1 < errors[1]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_loss_scale_that_is_none_is_refused(scale) -> None:
    layer = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match="loss_scale must be positive and finite, got"):
        gauss_newton_bartlett(layer(torch.ones(1, 2)), layer.parameters(), loss_scale=scale)


def test_a_plain_loop_under_fp16_autocast_and_a_grad_scaler() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    optimizer = Sophia(model.parameters(), lr=0.02, rho=1.0, k=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    x = torch.randn(256, 8)
    y = x[:, :4].argmax(1)
    losses = []
    for step in range(60):
        with torch.autocast("cpu", torch.float16):
            logits = model(x)
            loss = functional.cross_entropy(logits.float(), y)
        if optimizer.hessian_due:
            estimate = gauss_newton_bartlett(
                logits, model.parameters(), retain_graph=True, loss_scale=scaler.get_scale()
            )
            optimizer.update_hessian(estimate)
        scaler.scale(loss).backward()
        if step == 10:
            model[0].weight.grad[0, 0] = float("inf")  # an overflow: this step is skipped
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model[0].weight) == (step == 10)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert scaler.get_scale() == 2.0**13
    assert losses[-1] < 0.5 * losses[0]


def test_pure_bf16_parameters_have_the_fp32_runs_hessian(tiny_gpt2, tmp_path) -> None:
    expected = first_hessian(tiny_gpt2, tmp_path)
    trainer = run(tiny_gpt2().bfloat16(), tmp_path, max_steps=1)
    for one, other in zip(expected, hessians_of(trainer), strict=True):
        assert other.dtype == torch.float32
        # Labels may fall on the other side of an edge; the gradients have 8 bits.
        assert other.sum().item() == pytest.approx(one.sum().item(), rel=0.2)
    longer = run(tiny_gpt2().bfloat16(), tmp_path, max_steps=30)
    losses = [entry["loss"] for entry in longer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert next(longer.model.parameters()).dtype == torch.bfloat16


def test_resuming_pure_bf16_keeps_the_state_in_fp32(tiny_gpt2, tmp_path) -> None:
    options = {"save_strategy": "steps", "save_steps": 7, "max_steps": 12, "optim_args": "k=4"}
    whole = run(tiny_gpt2().bfloat16(), tmp_path, **options)
    trainer = SophiaTrainer(
        tiny_gpt2(seed=1).bfloat16(),
        arguments(tmp_path / "again", **options),
        train_dataset=dataset(),
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    for one, other in zip(hessians_of(whole), hessians_of(trainer), strict=True):
        assert torch.equal(one, other)
