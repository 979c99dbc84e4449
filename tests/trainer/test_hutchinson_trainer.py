"""Hutchinson's estimator through the Trainer: the Hessian of the loss that trains."""

import gc
from pathlib import Path

import pytest
import torch
from reference.curvature import hessian_diagonal
from torch.nn import functional
from torch.utils.data import default_collate
from transformers import AutoConfig, AutoModelForCausalLM

from hf_sophia import SophiaTrainer, hutchinson
from hf_sophia.trainer.noise import Place, noise_seed

from .families import CASES, flag_rows
from .runs import Recorder, arguments, dataset, first_hessian, hessians_of, run, sophia_of

HUTCHINSON = "hessian_computation_type=hutchinson,rho=0.2"
WHOLE = f"{HUTCHINSON},hessian_batch_fraction=1.0"


def test_it_trains(tiny_gpt2, tmp_path) -> None:
    recorder = Recorder()
    trainer = run(tiny_gpt2(), tmp_path, callback=recorder, optim_args=f"{HUTCHINSON},k=5")
    assert recorder.refreshed == [1, 6, 11, 16, 21, 26]
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1] < 0.7 * logs[0]
    assert trainer._plan.estimator == "hutchinson"
    assert trainer.state.log_history[0]["sophia/hessian_tokens"] == 11
    # A curvature of the loss itself, unlike Gauss-Newton's, has both signs.
    assert any((hessian < 0).any() for hessian in hessians_of(trainer))


def test_the_estimate_is_the_one_made_by_hand(tiny_gpt2, tmp_path) -> None:
    """Two micro-batches with different numbers of labels, weighted by them."""
    model, data = tiny_gpt2(attn_implementation="eager"), dataset(8, ignored=0.0)
    for row in data[4:]:
        row["labels"] = row["labels"].index_fill(0, torch.arange(5), -100)
    trainer = run(
        tiny_gpt2(),
        tmp_path,
        data=data,
        max_steps=1,
        seed=4,
        gradient_accumulation_steps=2,
        optim_args=WHOLE,
        train_sampling_strategy="sequential",
    )
    params = list(model.parameters())
    total, count = [torch.zeros_like(p) for p in params], 0
    for index in range(2):
        batch = default_collate(data[4 * index : 4 * index + 4])
        labels = int((batch["labels"][:, 1:] != -100).sum())
        probe = torch.Generator().manual_seed(noise_seed(Place(4, 0, 0, index), "probe"))
        # The Trainer's groups put the parameters with weight decay first.
        ordered = [p for g in trainer.optimizer.param_groups for p in g["params"]]
        names = {p: name for name, p in trainer.model.named_parameters()}
        mine = dict(model.named_parameters())
        params_in_order = [mine[names[p]] for p in ordered]
        estimate = hutchinson(model(**batch).loss, params_in_order, generator=probe)
        for sums, param in zip(total, params, strict=True):
            sums += labels * estimate[param]
        count += labels
    assert count == 4 * 11 + 4 * 7
    assert trainer.state.log_history[0]["sophia/hessian_tokens"] == count
    for sums, param in zip(total, trainer.model.parameters(), strict=True):
        hessian = sophia_of(trainer).state[param]["hessian"]
        torch.testing.assert_close(hessian, 0.05 * sums / count, rtol=1e-3, atol=1e-7)


def test_it_is_unbiased_for_the_hessian_of_the_loss_that_trains(tmp_path) -> None:
    """The mean of 400 steps' estimates against the exact diagonal of a smoothed loss.

    Seed 0; the tolerance is five standard errors of each mean, which one of 20 coordinates exceeds
    by chance once in 90,000 times.
    """

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x):
            return {"logits": self.layer(x)}

    def smoothed(outputs, labels, num_items_in_batch=None):
        return functional.cross_entropy(outputs["logits"], labels, label_smoothing=0.2)

    generator = torch.Generator().manual_seed(0)
    data = [
        {"x": torch.randn(4, generator=generator), "labels": torch.tensor(i % 4)} for i in range(6)
    ]
    torch.manual_seed(0)
    model, recorder = Linear(), Recorder()
    trainer = run(
        model,
        tmp_path,
        data=data,
        callback=recorder,
        # Without memory h is the estimate of the step.
        optim_args=f"{WHOLE},k=1,beta2=0",
        learning_rate=0.0,
        max_steps=400,
        per_device_train_batch_size=6,
        remove_unused_columns=False,
        logging_steps=400,
        extra={"compute_loss_func": smoothed},
    )
    drawn = torch.stack([torch.cat([h.flatten() for h in hs]) for hs in recorder.hessians.values()])
    assert len(drawn) == 400
    model = model.double()
    x = torch.stack([row["x"] for row in data]).double()
    labels = torch.stack([row["labels"] for row in data])
    loss = smoothed({"logits": model.layer(x)}, labels)
    params = list(sophia_of(trainer).state)
    exact = torch.cat([d.flatten() for d in hessian_diagonal(loss, params)])
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - exact).abs() <= 5 * error + 1e-7).all()
    assert error.max() < 0.1 * exact.max()


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.family in ("bert", "t5", "vit", "llama")], ids=str
)
def test_every_kind_of_head(case, tmp_path) -> None:
    trainer = run(case.make(), tmp_path, data=case.rows(4), optim_args=HUTCHINSON, max_steps=2)
    assert any(hessian.abs().max() > 0 for hessian in hessians_of(trainer))
    assert all(hessian.isfinite().all() for hessian in hessians_of(trainer))


def test_a_model_of_unknown_head_needs_no_adapter(tmp_path) -> None:
    class Regressor(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def forward(self, x, y):
            return {"loss": (self.layer(x).tanh() - y).square().mean()}

    data = [{"x": torch.randn(2), "y": torch.randn(1)} for _ in range(8)]
    trainer = run(Regressor(), tmp_path, data=data, optim_args=WHOLE, max_steps=2)
    assert all(hessian.abs().max() > 0 for hessian in hessians_of(trainer))
    assert trainer.state.log_history[0]["sophia/hessian_tokens"] == 4


def summed(outputs, labels, num_items_in_batch):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch


class Summing(SophiaTrainer):
    """Divides a sum as the Trainer's documentation has it, in a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = summed(outputs, inputs["labels"], num_items_in_batch)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class Passing(SophiaTrainer):
    """Leaves the division to the model, whose loss takes the number."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs)


BY_NUMBER = {
    "function": {"extra": {"compute_loss_func": summed}},
    "method": {"trainer_class": Summing},
    "model": {"trainer_class": Passing},
}


@pytest.mark.parametrize("options", BY_NUMBER.values(), ids=BY_NUMBER)
def test_a_loss_may_need_the_number_of_items(options, tiny_gpt2, tmp_path) -> None:
    shared = {"optim_args": WHOLE, "gradient_accumulation_steps": 2}
    expected = first_hessian(tiny_gpt2, tmp_path, **shared)
    actual = first_hessian(tiny_gpt2, tmp_path, **options, **shared)
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("options", BY_NUMBER.values(), ids=BY_NUMBER)
def test_of_several_processes_each_takes_its_own_mean(
    options, average, tiny_gpt2, tmp_path, monkeypatch
) -> None:
    trainer = options.get("trainer_class", SophiaTrainer)(
        tiny_gpt2(),
        arguments(tmp_path, average_tokens_across_devices=average),
        train_dataset=dataset(),
        **options.get("extra", {}),
    )
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 3)
    inputs = default_collate(dataset(4))
    expected = trainer.model(**inputs).loss
    loss = trainer._mean_loss(trainer.model, inputs)
    torch.testing.assert_close(loss, expected)


class Renaming(SophiaTrainer):
    """Has labels of another name, which the Trainer does not count: a mean, as no number comes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert num_items_in_batch is None
        inputs = dict(inputs)
        inputs["labels"] = inputs.pop("target")
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_a_loss_whose_labels_are_not_counted_gets_no_number(tiny_gpt2, tmp_path) -> None:
    inputs = default_collate(dataset(4))
    expected = tiny_gpt2()(**inputs).loss
    trainer = Renaming(tiny_gpt2(), arguments(tmp_path), train_dataset=dataset())
    inputs["target"] = inputs.pop("labels")
    torch.testing.assert_close(trainer._mean_loss(trainer.model, inputs), expected)


def test_a_loss_of_several_outputs_is_divided_by_what_training_divides_by(tmp_path) -> None:
    # Twelve labels, which are four predictions of three independent outputs each.
    case = next(case for case in CASES if case.rows is flag_rows)
    model, inputs = case.make(), default_collate(case.rows(4))

    def summed_flags(outputs, labels, num_items_in_batch):
        assert num_items_in_batch == labels.numel()
        total = functional.binary_cross_entropy_with_logits(outputs.logits, labels, reduction="sum")
        return total / num_items_in_batch

    trainer = SophiaTrainer(model, arguments(tmp_path), compute_loss_func=summed_flags)
    torch.testing.assert_close(trainer._mean_loss(model, inputs), model(**inputs).loss)


def test_checkpointing_without_reentrance_gives_the_same(tiny_gpt2, tmp_path) -> None:
    expected = first_hessian(tiny_gpt2, tmp_path, optim_args=WHOLE)
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    actual = first_hessian(tiny_gpt2, tmp_path, optim_args=WHOLE, **options)
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_bf16_autocast_works(tiny_gpt2, tmp_path) -> None:
    trainer = run(tiny_gpt2(), tmp_path, optim_args=HUTCHINSON, bf16=True, max_steps=12)
    assert all(h.dtype == torch.float32 and h.isfinite().all() for h in hessians_of(trainer))
    assert any(h.abs().max() > 0 for h in hessians_of(trainer))


def test_models_without_a_second_derivative_are_refused(tiny_gpt2, tmp_path) -> None:
    reentrant = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    with pytest.raises(ValueError, match="reentrant gradient checkpointing does not have"):
        run(tiny_gpt2(), tmp_path, optim_args=HUTCHINSON, **reentrant)
    with pytest.raises(ValueError, match="compiled models do not have: leave torch_compile off"):
        run(tiny_gpt2(), tmp_path, optim_args=HUTCHINSON, torch_compile=True)
    compiled = tiny_gpt2()
    compiled.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled models do not have"):
        run(compiled, tmp_path, optim_args=HUTCHINSON)
    flexible = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=40)
    )
    flexible.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention by 'flash_attention_2' does not have"):
        run(flexible, tmp_path, optim_args=HUTCHINSON)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_hundred_refreshes_leave_no_memory_behind(tiny_gpt2, tmp_path) -> None:
    """Each refresh's graph holds over 4 MB here: a leak of all would be 400 MB, of one in ten 40.

    The allocator's own wandering over 100 steps has been under 5 MB; 20 MB are allowed.
    """

    class Measured(SophiaTrainer):
        resident: dict[int, int]

        def training_step(self, *args, **kwargs):
            if self.state.global_step in (20, 120):
                gc.collect()
                self.resident = {**getattr(self, "resident", {}), self.state.global_step: 0}
                self.resident[self.state.global_step] = resident_bytes()
            return super().training_step(*args, **kwargs)

    trainer = run(
        tiny_gpt2(n_embd=64, n_head=4),
        tmp_path,
        data=dataset(64, length=32),
        trainer_class=Measured,
        optim_args=f"{WHOLE},k=1",
        max_steps=121,
        per_device_train_batch_size=8,
        logging_steps=1000,
    )
    assert trainer.resident[120] - trainer.resident[20] < 20e6
