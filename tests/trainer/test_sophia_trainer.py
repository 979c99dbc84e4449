"""SophiaTrainer on a tiny GPT-2: a whole run, its estimate made by hand, what must not matter."""

import copy
import re

import pytest
import torch
from torch.nn import functional
from transformers import (
    Trainer,
)

from hf_sophia import Sophia, SophiaTrainer, SophiaTrainerMixin
from hf_sophia.trainer import refresh as refresh_module
from hf_sophia.trainer.heads import HeadOutput
from hf_sophia.trainer.refresh import label_noise

from .by_hand import exact_step_estimate
from .runs import Recorder, dataset, first_hessian, hessians_of, run, sophia_of


def test_thirty_steps_with_accumulation(tiny_gpt2, tmp_path) -> None:
    recorder = Recorder()
    trainer = run(tiny_gpt2(), tmp_path, callback=recorder, gradient_accumulation_steps=2)
    assert recorder.refreshed == [1, 11, 21]
    assert trainer.state.global_step == 30
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 30
    assert logs[-1]["loss"] < 0.7 * logs[0]["loss"]
    for entry in logs:
        assert type(entry["sophia/clip_fraction"]) is float
        assert 0.0 < entry["sophia/clip_fraction"] < 1.0
        assert entry["sophia/hessian_norm"] > 0.0
        # Two micro-batches of 4 sequences of 12 tokens, of which 11 have a successor.
        assert entry["sophia/hessian_tokens"] == 2 * 4 * 11
    for hessian in hessians_of(trainer):
        assert hessian.max() > 0.0
        assert hessian.isfinite().all()


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_estimate_is_the_one_made_by_hand(accumulation, tiny_gpt2, tmp_path) -> None:
    model = tiny_gpt2()
    start = copy.deepcopy(model)
    data = dataset(16, ignored=0.3)
    trainer = run(
        model,
        tmp_path,
        data=data,
        max_steps=1,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        seed=5,
        train_sampling_strategy="sequential",
    )
    rows = [
        torch.utils.data.default_collate(data[i : i + 16 // accumulation])
        for i in range(0, 16, 16 // accumulation)
    ]
    by_hand = exact_step_estimate(start, {(0, i): row for i, row in enumerate(rows)}, seed=5)
    for param, expected in zip(model.parameters(), by_hand, strict=True):
        h = sophia_of(trainer).state[param]["hessian"]
        # h starts at 0, so after one refresh it is (1 - beta2) of the estimate.
        torch.testing.assert_close(h, 0.05 * expected, rtol=2e-4, atol=1e-9)
    counted = sum(int((row["labels"][1:] != -100).sum()) for row in data)
    assert trainer.state.log_history[0]["sophia/hessian_tokens"] == counted


def my_loss(outputs, labels, num_items_in_batch=None):
    return 7.0 * functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("own_pass", ["", ",hessian_batch_fraction=1.0"], ids=["kept", "own"])
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.3},
        {"max_grad_norm": 1e-4},
        {"max_grad_norm": 0.0},
        {"learning_rate": 1.0},
        {"weight_decay": 0.9},
        {"extra": {"compute_loss_func": my_loss}},
        {"average_tokens_across_devices": False},
    ],
    # Without addresses: processes that share the tests out have to agree on their names.
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_what_must_not_matter_leaves_the_hessian_bit_for_bit(
    options, own_pass, tiny_gpt2, tmp_path
) -> None:
    expected = first_hessian(tiny_gpt2, tmp_path)
    changed = first_hessian(tiny_gpt2, tmp_path, optim_args=f"rho=0.2,k=10{own_pass}", **options)
    for one, other in zip(expected, changed, strict=True):
        assert torch.equal(one, other)


def test_num_items_in_batch_does_not_matter(tiny_gpt2, tmp_path) -> None:
    class Miscounting(SophiaTrainer):
        def get_batch_samples(self, *args, **kwargs):
            samples, items = super().get_batch_samples(*args, **kwargs)
            return samples, items * 3

    expected = first_hessian(tiny_gpt2, tmp_path)
    other = first_hessian(tiny_gpt2, tmp_path, trainer_class=Miscounting)
    for one, two in zip(expected, other, strict=True):
        assert torch.equal(one, two)


def test_the_loss_scale_does_not_matter(tiny_gpt2, tmp_path) -> None:
    class Scaled(SophiaTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            # What a GradScaler does to the loss, with a scale that is not exact.
            self.accelerator.backward = lambda loss, **kwargs: (loss * 1000.1).backward(**kwargs)

    expected = first_hessian(tiny_gpt2, tmp_path)
    for own in ("rho=0.2", "rho=0.2,hessian_batch_fraction=1.0"):
        scaled = run(tiny_gpt2(), tmp_path, trainer_class=Scaled, optim_args=own, max_steps=1)
        assert scaled.state.log_history[0]["grad_norm"] > 500
        for one, two in zip(expected, hessians_of(scaled), strict=True):
            assert torch.equal(one, two)


def test_refreshes_leave_the_training_gradient_alone(tiny_gpt2, tmp_path) -> None:
    """With lr 0 and dropout, losses and gradient norms are those of a run with AdamW."""
    histories = []
    for optim, optim_args in (("sophia", "k=2"), ("adamw_torch", None)):
        model = tiny_gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
        trainer = run(
            model,
            tmp_path,
            optim=optim,
            optim_args=optim_args,
            learning_rate=0.0,
            gradient_accumulation_steps=2,
            max_steps=6,
        )
        histories.append(
            [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]
        )
    assert histories[0] == histories[1]


def test_the_mixin_serves_any_trainer_and_leaves_other_optimizers_alone(
    tiny_gpt2, tmp_path
) -> None:
    class Custom(Trainer):
        pass

    class Mixed(SophiaTrainerMixin, Custom):
        pass

    recorder = Recorder()
    run(tiny_gpt2(), tmp_path, trainer_class=Mixed, callback=recorder, max_steps=11)
    assert recorder.refreshed == [1, 11]
    results = []
    for trainer_class in (Mixed, Trainer):
        trainer = run(
            tiny_gpt2(), tmp_path, trainer_class=trainer_class, optim="radam", optim_args=None
        )
        assert not any("sophia" in key for e in trainer.state.log_history for key in e)
        results.append([p.detach() for p in trainer.model.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_sophia_of_the_users_own_is_refreshed_too(tiny_gpt2, tmp_path) -> None:
    model = tiny_gpt2()
    optimizer = Sophia(model.parameters(), lr=1e-3, k=4)
    recorder = Recorder()
    run(
        model,
        tmp_path,
        optim="adamw_torch",
        optim_args=None,
        callback=recorder,
        max_steps=6,
        extra={"optimizers": (optimizer, None)},
    )
    assert recorder.refreshed == [1, 5]


def test_label_noise_is_asked_for_by_step_rank_and_micro_batch(
    tiny_gpt2, tmp_path, monkeypatch
) -> None:
    asked = []

    def spy(*place):
        asked.append(place)
        return label_noise(*place)

    monkeypatch.setattr(refresh_module, "label_noise", spy)
    run(tiny_gpt2(), tmp_path, max_steps=11, gradient_accumulation_steps=2, seed=7)
    assert asked == [(7, 0, 0, 0), (7, 0, 0, 1), (7, 10, 0, 0), (7, 10, 0, 1)]
    logits = tiny_gpt2()(torch.zeros(1, 4, dtype=torch.long)).logits
    refresh = refresh_module.HessianRefresh([], seed=1, step=2, rank=3)
    refresh.batches.append({"input_ids": torch.zeros(1, 4)})
    with pytest.raises(ValueError, match="no parameter"):
        refresh.add_part(HeadOutput(logits, torch.zeros(1, 4, dtype=torch.long)), 4, 1)
    assert asked[-1] == (1, 2, 3, 4)


def test_bf16_autocast_trains(tiny_gpt2, tmp_path) -> None:
    trainer = run(tiny_gpt2(), tmp_path, bf16=True, max_steps=30)
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1] < 0.8 * logs[0]
    assert all(h.dtype == torch.float32 and h.max() > 0 for h in hessians_of(trainer))


def test_label_noise_differs_by_place_and_repeats_at_the_same_place() -> None:
    def first(*place: int) -> float:
        return torch.rand((), generator=label_noise(*place)).item()

    places = [(s, t, r, m) for s in (0, 1) for t in (0, 1, 10) for r in (0, 1) for m in (0, 1)]
    assert len({first(*place) for place in places}) == len(places)
    assert first(42, 7, 0, 1) == first(42, 7, 0, 1)
