"""SophiaTrainer on a tiny GPT-2: a whole run, its estimate made by hand, resume, errors."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sophia import Sophia, SophiaTrainer, SophiaTrainerMixin
from hf_sophia.trainer import refresh as refresh_module
from hf_sophia.trainer.heads import HeadOutput, causal_lm
from hf_sophia.trainer.refresh import label_noise

VOCABULARY = 37


def dataset(examples: int = 64, length: int = 12, ignored: float = 0.0) -> list[dict]:
    """Sequences that a small model can learn: each token is the last plus a fixed stride."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(examples):
        start = int(torch.randint(VOCABULARY, (), generator=generator))
        ids = (start + 3 * torch.arange(length)) % VOCABULARY
        drop = torch.rand(length, generator=generator) < ignored
        rows.append({"input_ids": ids, "labels": ids.masked_fill(drop, -100)})
    return rows


def arguments(folder: Path, **options) -> TrainingArguments:
    defaults = {
        "optim": "sophia",
        "optim_args": "rho=0.2,k=10",
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "per_device_train_batch_size": 4,
        "max_steps": 30,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(folder, **{**defaults, **options})


def sophia_of(trainer: Trainer) -> Sophia:
    return trainer.optimizer.optimizer


class Recorder(TrainerCallback):
    """Notes the Hessians before and after each step, and those that changed."""

    def __init__(self) -> None:
        self.refreshed: list[int] = []
        self.hessians: dict[int, list[torch.Tensor]] = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        held = [s["hessian"].clone() for s in optimizer.state.values()]
        last = self.hessians[max(self.hessians)] if self.hessians else []
        # No state yet is as good as a state of zeros.
        last = last or [torch.zeros_like(h) for h in held]
        if not all(torch.equal(a, b) for a, b in zip(held, last, strict=True)):
            self.refreshed.append(state.global_step + 1)
        self.hessians[state.global_step + 1] = held


def run(
    model, folder, data=None, callback=None, trainer_class=SophiaTrainer, extra=None, **options
):
    trainer = trainer_class(
        model,
        arguments(folder, **options),
        train_dataset=data or dataset(),
        callbacks=[callback] if callback else None,
        **(extra or {}),
    )
    trainer.train()
    return trainer


def hessians_of(trainer: Trainer) -> list[torch.Tensor]:
    state = sophia_of(trainer).state
    return [state[p]["hessian"] for g in trainer.optimizer.param_groups for p in g["params"]]


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


def exact_step_estimate(model, batches, seed: int, step: int) -> list[torch.Tensor]:
    """ĥ = Σ G² / Σ B by hand: sampled labels found from the cotangent, losses through autograd."""
    from hf_sophia.estimators import sampled_cotangent

    params = list(model.parameters())
    squares, count = [torch.zeros_like(p) for p in params], 0
    for index, batch in enumerate(batches):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        padded = torch.full_like(batch["labels"], -100)
        padded[:, :-1] = targets
        full = torch.cat([logits.detach(), logits.detach()[:, -1:]], dim=1)
        noise = label_noise(seed, step, 0, index)
        labels = sampled_cotangent(full, padded, generator=noise)[0].argmin(-1)[:, :-1]
        counted = targets != -100
        loss = functional.cross_entropy(logits[counted], labels[counted], reduction="sum")
        for square, grad in zip(squares, torch.autograd.grad(loss, params), strict=True):
            square += grad**2
        count += int(counted.sum())
    return [square / count for square in squares]


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
    by_hand = exact_step_estimate(start, rows, seed=5, step=0)
    for param, expected in zip(model.parameters(), by_hand, strict=True):
        h = sophia_of(trainer).state[param]["hessian"]
        # h starts at 0, so after one refresh it is (1 - beta2) of the estimate.
        torch.testing.assert_close(h, 0.05 * expected, rtol=2e-4, atol=1e-9)
    counted = sum(int((row["labels"][1:] != -100).sum()) for row in data)
    assert trainer.state.log_history[0]["sophia/hessian_tokens"] == counted


def first_hessian(tiny_gpt2, folder, **options) -> list[torch.Tensor]:
    return hessians_of(run(tiny_gpt2(), folder, max_steps=1, **options))


def my_loss(outputs, labels, num_items_in_batch=None):
    return 7.0 * functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


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
    ids=str,
)
def test_what_must_not_matter_leaves_the_hessian_bit_for_bit(options, tiny_gpt2, tmp_path) -> None:
    expected = first_hessian(tiny_gpt2, tmp_path)
    for one, other in zip(expected, first_hessian(tiny_gpt2, tmp_path, **options), strict=True):
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


def test_resume_equals_the_uninterrupted_run_bit_for_bit(tiny_gpt2, tmp_path) -> None:
    # Dropout, accumulation, a schedule, and a save between two refreshes.
    options = {
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "save_strategy": "steps",
        "save_steps": 13,
    }
    whole = run(tiny_gpt2(resid_pdrop=0.1), tmp_path / "run", **options)
    checkpoint = tmp_path / "run" / "checkpoint-13"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert set(saved["state"][0]) == {"step", "exp_avg", "hessian"}

    recorder = Recorder()
    resumed = SophiaTrainer(
        tiny_gpt2(seed=1, resid_pdrop=0.1),
        arguments(tmp_path / "again", **options),
        train_dataset=dataset(),
        callbacks=[recorder],
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert recorder.refreshed[1:] == [21]  # the first entry is the state that was loaded
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    for one, other in pairs:
        assert torch.equal(one, other)
        states = [sophia_of(t).state[p] for t, p in ((whole, one), (resumed, other))]
        assert states[0]["step"] == states[1]["step"] == 30
        for name in ("exp_avg", "hessian"):
            assert torch.equal(states[0][name], states[1][name])


def test_options_asked_for_on_resume_take_effect_and_are_logged(
    tiny_gpt2, tmp_path, caplog
) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    run(tiny_gpt2(), tmp_path, **options)
    recorder = Recorder()
    changed = {
        **options,
        "optim_args": "rho=0.7,k=3,beta1=0.8,eps=1e-6",
        "max_steps": 9,
        "weight_decay": 0.3,
    }
    trainer = SophiaTrainer(
        tiny_gpt2(), arguments(tmp_path, **changed), train_dataset=dataset(), callbacks=[recorder]
    )
    with caplog.at_level(logging.WARNING, "hf_sophia"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for group in trainer.optimizer.param_groups:
        assert (group["rho"], group["k"], group["betas"]) == (0.7, 3, (0.8, 0.95))
        assert group["eps"] == 1e-6
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.3, 0.0]
    assert recorder.refreshed[1:] == [7]
    assert "resuming with k=3 in parameter group 0; the checkpoint had 10" in caplog.text
    assert "betas=(0.8, 0.95)" in caplog.text
    assert "hessian_computation_type" not in caplog.text


# What goes wrong is said


def test_the_stock_trainer_is_refused_at_its_first_moving_step(tiny_gpt2, tmp_path) -> None:
    model = tiny_gpt2()
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="hf_sophia.SophiaTrainer instead of"):
        run(model, tmp_path, trainer_class=Trainer, max_steps=3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name])
    with pytest.raises(RuntimeError, match="reached step 2 without .* due at step 1"):
        run(
            tiny_gpt2(),
            tmp_path,
            trainer_class=Trainer,
            lr_scheduler_type="linear",
            warmup_steps=2,
            max_steps=3,
        )


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


def test_a_batch_without_labels_that_count_skips_that_refresh(tiny_gpt2, tmp_path, caplog) -> None:
    data = dataset(40)
    for row in data[:8]:
        row["labels"] = torch.full_like(row["labels"], -100)
    recorder = Recorder()
    model = tiny_gpt2()
    with caplog.at_level(logging.WARNING, "hf_sophia"):
        trainer = run(
            model,
            tmp_path,
            data=data,
            callback=recorder,
            optim_args="k=2,rho=0.2",
            max_steps=8,
            train_sampling_strategy="sequential",
        )
    assert caplog.text.count("no label of the batch of step 1 counts") == 1
    assert recorder.refreshed == [3, 5, 7]
    assert all(p.isfinite().all() for p in model.parameters())
    assert trainer.state.log_history[-2]["sophia/hessian_tokens"] == 4 * 11


def test_an_estimate_that_is_not_finite_is_discarded(tiny_gpt2, tmp_path, caplog) -> None:
    class Poisoned(SophiaTrainer):
        def sophia_head(self, model, inputs, outputs):
            head = super().sophia_head(model, inputs, outputs)
            if self.state.global_step == 0:
                return head
            return HeadOutput(head.logits * float("inf"), head.targets)

    recorder = Recorder()
    with caplog.at_level(logging.WARNING, "hf_sophia"):
        run(
            tiny_gpt2(),
            tmp_path,
            trainer_class=Poisoned,
            callback=recorder,
            max_steps=7,
            optim_args="k=2",
        )
    assert recorder.refreshed == [1]
    assert caplog.text.count("is discarded; the Hessian stays as it was") == 1


def test_a_wrong_shift_is_caught_on_the_first_refresh(tiny_gpt2, tmp_path) -> None:
    class Unshifted(SophiaTrainer):
        def sophia_head(self, model, inputs, outputs):
            return HeadOutput(outputs["logits"], inputs["labels"])

    for options in ({}, {"label_smoothing_factor": 0.1}, {"gradient_accumulation_steps": 2}):
        with pytest.raises(RuntimeError, match="not aligned with the logits.*sophia_head"):
            run(tiny_gpt2(), tmp_path, trainer_class=Unshifted, **options)


def test_packed_batches_bring_their_own_shift(tiny_gpt2, tmp_path) -> None:
    data = dataset(16)
    packed, masked = [], []
    for row in data:
        # Two documents in one row: the last token of the first predicts nothing.
        shifted = torch.cat([row["labels"][1:], torch.tensor([-100])])
        shifted[4] = -100
        packed.append({**row, "shift_labels": shifted})
        masked.append({**row, "labels": row["labels"].index_fill(0, torch.tensor([5]), -100)})
    expected = run(tiny_gpt2(), tmp_path, data=masked, max_steps=1)
    options = {"remove_unused_columns": False}
    actual = run(tiny_gpt2(), tmp_path, data=packed, max_steps=1, **options)
    assert actual.state.log_history[0]["sophia/hessian_tokens"] == 4 * 10
    for one, other in zip(hessians_of(expected), hessians_of(actual), strict=True):
        assert torch.equal(one, other)


def test_a_head_of_a_model_that_ignores_num_items_in_batch_is_accepted(tmp_path) -> None:
    class Classifier(SophiaTrainer):
        def sophia_head(self, model, inputs, outputs):
            return HeadOutput(outputs["logits"], inputs["labels"])

    config = AutoConfig.for_model(
        "bert",
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    data = [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(dataset(16))]
    options = {"gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = run(model, tmp_path, data=data, trainer_class=Classifier, **options)
    assert trainer.state.log_history[0]["sophia/hessian_tokens"] == 8
    assert all(h.max() > 0 for h in hessians_of(trainer)[:3])


def test_models_may_return_tuples(tmp_path) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x, labels):
            logits = self.layer(x)
            return functional.cross_entropy(logits, labels), logits

    class Known(SophiaTrainer):
        def sophia_head(self, model, inputs, outputs):
            return HeadOutput(outputs[1], inputs["labels"])

    data = [{"x": torch.randn(2), "labels": torch.tensor(i % 2)} for i in range(8)]
    trainer = run(Plain(), tmp_path, data=data, trainer_class=Known, max_steps=2)
    assert all(h.max() > 0 for h in hessians_of(trainer))
    with pytest.raises(ValueError, match="head of Plain"):
        run(Plain(), tmp_path, data=data)


def test_prompt_tuning_puts_positions_before_the_labelled_ones() -> None:
    labels = torch.tensor([[5, 6, -100, 8]])
    assert causal_lm({"labels": labels}, torch.zeros(1, 4, 9)).targets.tolist() == [
        [6, -100, 8, -100]
    ]
    assert causal_lm({"labels": labels}, torch.zeros(1, 6, 9)).targets.tolist() == [
        [-100, 5, 6, -100, 8, -100]
    ]


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
    with pytest.raises(ValueError, match="no parameter"):
        refresh.add(HeadOutput(logits, torch.zeros(1, 4, dtype=torch.long)))
    assert asked[-1] == (1, 2, 3, 0)


def test_a_step_that_failed_starts_its_refresh_anew(tiny_gpt2, tmp_path) -> None:
    class Failing(SophiaTrainer):
        failed = False

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if not self.failed and self._refresh is not None:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")
            return loss

    class FailingInside(SophiaTrainer):
        failed = False

        def sophia_head(self, *args):
            head = super().sophia_head(*args)
            if self._refresh.micro_batches == 1 and not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")
            return head

    for trainer_class in (Failing, FailingInside):
        trainer = run(
            tiny_gpt2(),
            tmp_path,
            trainer_class=trainer_class,
            max_steps=2,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            auto_find_batch_size=True,
        )
        assert trainer.failed
        smaller = trainer._train_batch_size
        assert smaller < 8
        counted = trainer.state.log_history[0]["sophia/hessian_tokens"]
        assert counted == 2 * smaller * 11


def test_an_unknown_head_names_the_class_and_the_method(tmp_path) -> None:
    class Strange(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x, labels):
            logits = self.layer(x)
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": torch.randn(2), "labels": torch.tensor(i % 2)} for i in range(8)]
    with pytest.raises(ValueError, match=r"head of Strange: override sophia_head\(self, model"):
        run(Strange(), tmp_path, data=data)

    class Known(SophiaTrainer):
        def sophia_head(self, model, inputs, outputs):
            return HeadOutput(outputs["logits"], inputs["labels"])

    trainer = run(Strange(), tmp_path, data=data, trainer_class=Known, max_steps=2)
    assert all(h.max() > 0 for h in hessians_of(trainer))


def test_a_compute_loss_that_bypasses_the_mixin_is_an_error(tiny_gpt2, tmp_path) -> None:
    class Bypassing(SophiaTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    with pytest.raises(RuntimeError, match="Bypassing.compute_loss did not reach"):
        run(tiny_gpt2(), tmp_path, trainer_class=Bypassing)


def test_unsupported_set_ups_are_refused_before_the_first_step(
    tiny_gpt2, tmp_path, monkeypatch
) -> None:
    with pytest.raises(ValueError, match="type='gnb', got 'hutchinson'"):
        run(tiny_gpt2(), tmp_path, optim_args="hessian_computation_type=hutchinson")
    trainer = SophiaTrainer(tiny_gpt2(), arguments(tmp_path), train_dataset=dataset())
    sharded = property(lambda self: DistributedType.FSDP)
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.accelerator), "distributed_type", sharded)
        with pytest.raises(ValueError, match="does not support FSDP"):
            trainer.create_optimizer()
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="one process and one device so far, got 2 processes"):
        SophiaTrainer(tiny_gpt2(), arguments(tmp_path), train_dataset=dataset()).create_optimizer()


def test_checkpointing_works_without_reentrance_and_says_so_with(tiny_gpt2, tmp_path) -> None:
    def options(reentrant: bool) -> dict:
        return {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        }

    expected = first_hessian(tiny_gpt2, tmp_path)
    actual = first_hessian(tiny_gpt2, tmp_path, **options(False))
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="'use_reentrant': False"):
        first_hessian(tiny_gpt2, tmp_path, **options(True))


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


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_other_causal_models_and_auxiliary_losses(family, tmp_path) -> None:
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
        **({"output_router_logits": True, "num_local_experts": 2} if family == "mixtral" else {}),
    )
    if family == "mixtral":
        config.router_aux_loss_coef = 10.0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    trainer = run(model, tmp_path, max_steps=2, gradient_accumulation_steps=2)
    assert all(h.max() > 0.0 for h in hessians_of(trainer))
    assert trainer.state.log_history[0]["sophia/hessian_tokens"] == 88
