"""What the doctor says of a run, and that the run does not notice."""

import collections
import copy
import math
import random
import re
import statistics
import typing
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sophia import Sophia, SophiaTrainer, diagnose
from hf_sophia.trainer.diagnosis import Curvature, Diagnosis, Sample
from hf_sophia.trainer.options import SHARED_CLIP_FRACTION
from hf_sophia.trainer.report import report

from .runs import arguments, dataset, sophia_of


class Rows(torch.utils.data.IterableDataset, Iterator):
    """Rows that can be read once."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = iter(rows)

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        return next(self.rows)


def trainer_of(model, folder, trainer_class=SophiaTrainer, data=None, **options) -> Trainer:
    rows = dataset() if data is None else data
    return trainer_class(model, arguments(folder, **options), train_dataset=rows)


def messages(diagnosis, severity: str) -> list[str]:
    return [f.message for f in diagnosis.findings if f.severity == severity]


class LastGradients(TrainerCallback):
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.grads = {param: param.grad.clone() for param in model.parameters()}


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_prediction_is_what_such_a_run_clips(nesterov, tiny_gpt2, tmp_path) -> None:
    # Tensors of this model have fewer coordinates than a sample: the prediction can be exact.
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = f"rho=0.2,k=2,bias_correction=true,nesterov={nesterov}"
    found = diagnose(trainer_of(tiny_gpt2(), tmp_path, optim_args=args, **options), steps=8)
    trainer = trainer_of(
        tiny_gpt2(), tmp_path, learning_rate=0.0, max_steps=8, optim_args=args, **options
    )
    last = LastGradients()
    trainer.add_callback(last)
    trainer.train()
    optimizer = sophia_of(trainer)
    group = optimizer.param_groups[0]
    parts = []
    for param, state in optimizer.state.items():
        m = state["exp_avg"] / (1 - 0.9**8)
        n = 0.9 * m + 0.1 * last.grads[param] if nesterov else m
        h = (state["hessian"] / group["hessian_weight"]).clamp(min=1e-12)
        parts.append((n.abs() / h).flatten())
    ratios = torch.cat(parts)
    moving = ratios[ratios > 0]
    for rho in (0.03, 0.3, 3.0, 30.0):
        share = (moving >= rho).float().mean()
        assert found.clip_fraction(rho) == pytest.approx(share.item(), abs=1e-5)
    assert found.clip_fraction(found.rho_for(0.25)) == pytest.approx(0.25, abs=1e-3)
    assert found.tokens == [4 * 11] * 4
    assert found.head == "categorical, logits of shape (2, 12, 37)"
    assert "kept graph" in found.way
    sizes = [param.numel() for param in optimizer.state]
    assert sum(curvature.size for curvature in found.curvatures) == sum(sizes)
    assert not found.failed


@pytest.mark.parametrize(
    ("asked", "share"),
    [
        ("rho_scope=group,target_clip_fraction=0.25,nesterov=true,k=2", 0.25),
        ("rho_scope=group,target_clip_fraction=0.25,nesterov=false,k=2", 0.25),
        # What is asked for each tensor is not what suits one number for all.
        ("k=2", 0.5),
    ],
)
def test_the_recommended_number_clips_what_it_says(asked, share, tiny_gpt2, tmp_path) -> None:
    """A run with exactly these options, whose first steps are those that were looked at."""
    options = {"per_device_train_batch_size": 8}
    found = diagnose(trainer_of(tiny_gpt2(), tmp_path, optim_args=asked, **options), steps=40)
    trainer = trainer_of(
        tiny_gpt2(), tmp_path, optim_args=f"{found.fixed_options()},k=2", max_steps=40,
        learning_rate=0.0, logging_steps=1, **options,
    )  # fmt: skip
    trainer.train()
    logged = [entry["sophia/clip_fraction"] for entry in trainer.state.log_history[:-1]]
    # The gradients' noise goes through m from step to step; what is held against a false option
    # is a factor: without the correction the first steps clip 0.6 and more.
    assert statistics.mean(logged[20:]) == pytest.approx(share, abs=0.05)


def test_the_recommended_number_is_not_that_of_rows_without_curvature(tmp_path) -> None:
    """Most rows of such an embedding and head are in no refresh, and hold a ratio beyond 1e6."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=2000, n_positions=12, n_embd=8, n_layer=1, n_head=2,
            bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
        )
    )  # fmt: skip
    rows = torch.randint(2000, (256, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    asked = "rho_scope=group,target_clip_fraction=0.1"
    found = diagnose(trainer_of(model, tmp_path, data=data, optim_args=asked))
    assert found.clip_fraction(1e4) > 0.1
    rho = found.rho_for(0.1)
    assert rho < 1e4
    assert f"rho={rho:.2g}," in found.fixed_options()
    curved = [part.n[part.h > part.eps] / part.h[part.h > part.eps] for part in found.samples]
    weights = [torch.full_like(n, p.weight) for n, p in zip(curved, found.samples, strict=True)]
    ratios, weights = torch.cat(curved), torch.cat(weights)
    share = weights[ratios >= rho].sum() / weights[ratios > 0].sum()
    assert share.item() == pytest.approx(0.1, abs=0.01)


def test_no_more_steps_are_taken_than_the_run_has(tiny_gpt2, tmp_path) -> None:
    options = {"per_device_train_batch_size": 2, "max_steps": 5}
    trainer = trainer_of(tiny_gpt2(), tmp_path, data=Rows(dataset()[:10]), **options)
    found = diagnose(trainer)
    assert not found.failed
    assert len(found.tokens) == 3


def test_a_model_with_nothing_to_train_is_told_of(tiny_gpt2, tmp_path) -> None:
    trainer = trainer_of(tiny_gpt2().requires_grad_(False), tmp_path)
    assert "requires_grad is False for all" in messages(diagnose(trainer), "error")[0]


def test_the_thresholds_are_those_that_auto_comes_to(tiny_gpt2, tmp_path) -> None:
    for scope, target in (("tensor", 0.3), ("group", 0.2)):
        args = f"rho=auto,target_clip_fraction={target},rho_scope={scope},k=2"
        found = diagnose(trainer_of(tiny_gpt2(), tmp_path, optim_args=args), steps=4)
        # With one for each tensor, what is said of a number is of the share that is good for one.
        shared = target if scope == "group" else SHARED_CLIP_FRACTION
        assert (found.target, found.rho_scope) == (shared, scope)
        own = [found.auto_rho(part) for c in found.curvatures for part in c.tensors]
        groups = [part.group for c in found.curvatures for part in c.tensors]
        # A share of each tensor, or of each parameter group, is clipped.
        assert len(set(own)) == (len(own) if scope == "tensor" else len(set(groups)))
        parts = [part for c in found.curvatures for part in c.tensors]
        # Embeddings have a share of their own.
        assert {part.target for part in parts} == {target, *([0.5] if scope == "tensor" else [])}
        kinds = range(len(parts)) if scope == "tensor" else groups
        for kind in set(kinds):
            chosen = [(p, rho) for p, rho, k in zip(parts, own, kinds, strict=True) if k == kind]
            curved = [((p.n > 0) & (p.h > p.eps), p, rho) for p, rho in chosen]
            hit = sum(float((p.ratio[c] >= rho).sum()) * p.weight for c, p, rho in curved)
            counted = sum(float(c.sum()) * p.weight for c, p, _ in curved)
            wanted = chosen[0][0].target
            assert hit / counted == pytest.approx(wanted, abs=1.5 / counted + 0.01)


def test_a_healthy_run_has_no_findings(tiny_gpt2, tmp_path) -> None:
    options = {"per_device_train_batch_size": 32, "max_steps": 400}
    asked = "rho=auto,nesterov=true,bias_correction=true"
    found = diagnose(
        trainer_of(tiny_gpt2(), tmp_path, optim_args=asked, data=dataset(256), **options), steps=20
    )
    assert found.findings == []


def test_rows_that_no_refresh_has_seen_are_told_of(tiny_gpt2, tmp_path) -> None:
    """An embedding that the head does not share, and tokens that most batches lack."""
    # Two tokens in a row, so that each row of the embedding is seen by few batches.
    data = dataset(64, length=3)
    model = tiny_gpt2(tie_word_embeddings=False)
    args = "rho=auto,k=2"
    trainer = trainer_of(model, tmp_path, optim_args=args, data=data, per_device_train_batch_size=1)
    (warning,) = [
        text for text in messages(diagnose(trainer), "warning") if "transformer.wte" in text
    ]
    assert "have a Hessian of at most eps=1e-12" in warning


def test_the_run_does_not_notice(tiny_gpt2, tmp_path) -> None:
    options = {"max_steps": 6, "optim_args": "rho=0.2,k=2"}
    plain = trainer_of(tiny_gpt2(attn_pdrop=0.1), tmp_path, **options)
    plain.train()

    trainer = trainer_of(tiny_gpt2(attn_pdrop=0.1), tmp_path, **options)
    before = copy.deepcopy(trainer.model.state_dict())
    args, callbacks = copy.copy(trainer.args), list(trainer.callback_handler.callbacks)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    diagnose(trainer, steps=5)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert states[:2] == after[:2]
    assert torch.equal(states[2], after[2])
    assert all(torch.equal(before[n], value) for n, value in trainer.model.state_dict().items())
    assert all(param.grad is None for param in trainer.model.parameters())
    assert vars(trainer.args) == vars(args)
    assert trainer.callback_handler.callbacks == callbacks
    assert trainer.optimizer is None
    assert "sophia_head" not in vars(trainer)
    assert trainer.state.global_step == 0
    trainer.train()
    pairs = zip(plain.model.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_learning_rates_are_a_grid_around_adamws_own(tiny_gpt2, tmp_path) -> None:
    found = diagnose(trainer_of(tiny_gpt2(), tmp_path, optim="adamw_torch", optim_args=None))
    assert found.learning_rates() == (2.5e-3, 5e-3, 1e-2, 2e-2)
    assert "one of 0.0025, 0.005, 0.01, 0.02, against AdamW's 0.005" in report(found)
    assert found.rho is None
    assert "ask for --optim adamw_torch" in messages(found, "note")[0]
    given = diagnose(trainer_of(tiny_gpt2(), tmp_path), adamw_lr=1e-3)
    assert given.learning_rates() == (5e-4, 1e-3, 2e-3, 4e-3)
    assert diagnose(trainer_of(tiny_gpt2(), tmp_path)).learning_rates() is None
    # Where Hutchinson's h is negative, steps are full. It is told of once, not for each kind.
    options = "hessian_computation_type=hutchinson"
    signed = diagnose(trainer_of(tiny_gpt2(), tmp_path, optim_args=options), adamw_lr=1e-3)
    assert signed.learning_rates() == (1.25e-4, 2.5e-4, 5e-4)
    told = [message for message in messages(signed, "warning") if "Hessian of" in message]
    assert len(told) == 1
    assert re.match(r"the Hessian of [45]\d% of the coordinates that move is negative", told[0])
    assert "try 0.125 to 0.5 times AdamW's learning rate" in told[0]
    assert f"`--optim sophia` with {options}, whose defaults" in report(signed)
    assert signed.fixed_options().endswith(f",bias_correction=true,{options}")
    assert not any("is negative" in message for message in messages(given, "warning"))
    # Of an optimizer that the script made, too.
    model = tiny_gpt2()
    trainer = trainer_of(model, tmp_path, optim="adamw_torch", optim_args=None)
    trainer.optimizer = Sophia(
        model.parameters(), rho="auto", hessian_computation_type="hutchinson"
    )
    assert diagnose(trainer, steps=6).estimator == "hutchinson"


def test_the_negative_share_counts_what_moves_by_the_size_of_its_tensor() -> None:
    m, h = torch.tensor([1.0, 1.0, 1e-9, 1.0]), torch.tensor([1.0, 1e-12, 1e-12, 1.0])
    negative = torch.tensor([False, True, True, False])
    large = Sample(m, m, h, negative, 30.0, 1e-12)
    small = Sample(m[:1], m[:1], h[:1], negative[:1], 10.0, 1e-12)
    found = Diagnosis("", curvatures=[Curvature("", 130, [large, small])])
    # The third one's gradient is rounding.
    assert found.negative_share == pytest.approx(30 / 100)
    assert large.flat_share == 0.0
    zero = large._replace(negative=torch.zeros(4, dtype=torch.bool))
    assert zero.flat_share == pytest.approx(1 / 3)
    # Of another all are negative.
    below = Sample(m[:2], m[:2], h[1:3], negative[1:3], 50.0, 1e-12)
    found.curvatures.append(Curvature("", 100, [below]))
    assert found.negative_share == pytest.approx(130 / 200)
    assert below.flat_share == 0.0


def test_a_bound_above_every_hessian_is_told_of_whatever_its_sign(tiny_gpt2, tmp_path) -> None:
    options = "hessian_computation_type=hutchinson,eps=1e6"
    found = diagnose(trainer_of(tiny_gpt2(), tmp_path, optim_args=options), steps=6)
    (told,) = (text for text in messages(found, "warning") if "is at most eps=1e+06" in text)
    assert "transformer.wte.weight" in told
    assert told.endswith("Is the loss linear in them, or eps too large?")


def test_an_estimator_of_ones_own_has_learning_rates_too() -> None:
    found = Diagnosis("", curvatures=[Curvature("", 0, [])], estimator="own", adamw_lr=1.0)
    assert found.learning_rates() == (0.5, 1.0, 2.0, 4.0)


def test_one_threshold_for_a_group_wants_smaller_learning_rates(tiny_gpt2, tmp_path) -> None:
    found = diagnose(trainer_of(tiny_gpt2(), tmp_path, optim_args="rho_scope=group"), adamw_lr=4e-3)
    assert found.learning_rates() == (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


@pytest.mark.parametrize(
    ("options", "severity", "message"),
    [
        ({"optim_args": "rho=1e9"}, "warning", "rho=1e+09 would clip 0.0%"),
        ({"optim_args": "rho=1e-9"}, "warning", "rho=1e-09 would clip 100.0%"),
        ({"optim_args": "rho=1"}, "warning", "a refresh counts 44 predictions"),
        ({"max_steps": 30}, "warning", "30 steps have 3 refreshes with k=10"),
        ({"optim_args": "rho=1"}, "note", "without bias_correction=true h is too small"),
        ({"optim_args": "fused=false"}, "note", "step of 100% of the coordinates is not fused"),
        ({"optim_args": "rho=auto,colour=1"}, "error", "unknown option 'colour'"),
        ({"trainer": "own optimizer"}, "error", "that the Trainer makes (create_optimizer) is SGD"),
        ({"model": "unreached"}, "warning", "no gradient reaches lost: freeze"),
        ({"data": "iterator", "max_steps": 300}, "warning", "the data set is an iterator"),
        (
            {"max_steps": -1, "num_train_epochs": 2},
            "warning",
            "32 steps have 4 refreshes with k=10",
        ),
        ({"trainer": "given optimizer"}, "error", "the Trainer was given (optimizers=...) is SGD"),
        ({"data": "beyond"}, "error", "IndexError: "),
        ({"data": "ignored"}, "error", "no refresh has succeeded"),
        ({"data": "ignored"}, "warning", "no label of the batch of step 1 counts"),
        (
            {"data": "shifted"},
            "error",
            "labels that Sophia-G counts for GPT2LMHeadModel have a mean loss",
        ),
    ],
)
def test_what_would_go_wrong_is_found(options, severity, message, tiny_gpt2, tmp_path) -> None:
    options = dict(options)
    model, data, trainer_class = tiny_gpt2(), dataset(), SophiaTrainer
    if options.pop("model", None):
        model.register_parameter("lost", torch.nn.Parameter(torch.ones(3)))
    kind = options.pop("data", None)
    if kind == "ignored":
        data = dataset(ignored=1.1)
    if kind == "shifted":

        class Misaligned(SophiaTrainer):
            def sophia_head(self, model, inputs, outputs):
                head = super().sophia_head(model, inputs, outputs)
                return type(head)(head.logits.roll(1, dims=1), head.targets, head.likelihood)

        trainer_class = Misaligned
    if kind == "iterator":
        data = Rows(data * 20)
    if kind == "beyond":
        data = [{name: ids + 1000 for name, ids in row.items()} for row in data]
    given = options.pop("trainer", None)
    if given == "own optimizer":

        class Own(SophiaTrainer):
            def create_optimizer(self, *args):
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
                return self.optimizer

        trainer_class = Own
    trainer = trainer_of(model, tmp_path, trainer_class, data, **options)
    if given == "given optimizer":
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = diagnose(trainer, steps=6)
    assert any(message in text for text in messages(found, severity)), found.findings
    assert found.failed == (severity == "error" or kind == "ignored")
    assert message in report(found)


def test_the_users_scheduler_stays_his(tiny_gpt2, tmp_path) -> None:
    model = tiny_gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None, max_steps=3)
    trainer = SophiaTrainer(model, args, train_dataset=dataset(), optimizers=(optimizer, schedule))
    found = diagnose(trainer, steps=4)
    assert any("has an optimizer of its own, SGD" in text for text in messages(found, "note"))
    assert not trainer.accelerator._optimizers
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == [0.1, 0.05, 0.025]


def test_a_sophia_that_was_given_is_examined(tiny_gpt2, tmp_path) -> None:
    model = tiny_gpt2()
    trainer = trainer_of(model, tmp_path, optim="adamw_torch", optim_args=None)
    trainer.optimizer = Sophia(model.parameters(), lr=1e-3, rho=1e9, k=3)
    found = diagnose(trainer, steps=6)
    assert (found.rho, found.k) == (1e9, 3)
    assert any("rho=1e+09 would clip 0.0%" in text for text in messages(found, "warning"))


class MakesSophia(SophiaTrainer):
    """Layer-wise learning rates and a schedule in the training step, as scripts have them."""

    def create_optimizer(self, *args):
        torch.rand(3), np.random.rand(), random.random()  # as a random projection would
        params = list(self.model.parameters())
        groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:]}]
        self.optimizer = Sophia(groups, lr=0.1, rho=1e9, k=3, betas=(0.8, 0.9))
        return self.optimizer

    def training_step(self, *args, **kwargs):
        for group in self.optimizer.param_groups:
            group["lr"] = 0.3
        return super().training_step(*args, **kwargs)


def makes_of_a_class(model, args, train_dataset) -> SophiaTrainer:
    options = {"lr": 0.1, "rho": 1e9, "k": 3, "betas": (0.8, 0.9)}
    made = (Sophia, options)
    return SophiaTrainer(model, args, train_dataset=train_dataset, optimizer_cls_and_kwargs=made)


@pytest.mark.parametrize("trainer_class", [MakesSophia, makes_of_a_class])
@pytest.mark.parametrize("optim", ["sophia", "adamw_torch"])
def test_a_sophia_that_the_trainer_makes_is_examined_and_moves_nothing(
    trainer_class, optim, tiny_gpt2, tmp_path
) -> None:
    model = tiny_gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_of(model, tmp_path, trainer_class, optim=optim, optim_args=None)
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = diagnose(trainer, steps=6)
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == numbers[1:]
    assert not found.failed, found.findings
    assert (found.rho, found.k, len(found.tokens)) == (1e9, 3, 3)
    assert any("rho=1e+09 would clip 0.0%" in text for text in messages(found, "warning"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trainer.optimizer is trainer.lr_scheduler is None
    trainer.args.max_steps = 2
    trainer.train()
    assert sophia_of(trainer).param_groups[0]["betas"] == (0.8, 0.9)
    moved = [not torch.equal(value, before[name]) for name, value in model.state_dict().items()]
    assert any(moved)


def test_an_optimizer_of_other_parameters_than_the_models_is_told_of(tiny_gpt2, tmp_path) -> None:
    model = tiny_gpt2()
    trainer = trainer_of(model, tmp_path)
    trainer.optimizer = Sophia(list(tiny_gpt2().parameters())[:3], lr=1e-3)
    told = messages(diagnose(trainer, steps=4), "warning")
    count = len(list(model.parameters())) - 1
    assert any(f"lacks transformer.wte.weight and {count} more" in text for text in told)
    assert any("holds 3 tensors that are no parameters of the model" in text for text in told)
    trainer.optimizer = Sophia(model.parameters(), lr=1e-3)
    agree = messages(diagnose(trainer, steps=4), "warning")
    assert not any("lacks" in text or "holds" in text for text in agree)


def test_a_share_of_the_batch_is_that_of_the_given_optimizer(tiny_gpt2, tmp_path) -> None:
    trainer = trainer_of(tiny_gpt2(), tmp_path, optim_args="hessian_batch_fraction=0.5,fused=false")
    trainer.create_optimizer()
    found = diagnose(trainer, steps=4)
    assert found.tokens == [22, 22]
    assert set(found.not_fused) == {"fused is False"}


def test_what_starts_at_zero_is_told_from_what_is_cut_off(tiny_gpt2, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"])
    model = peft.get_peft_model(tiny_gpt2(), config)
    found = diagnose(trainer_of(model, tmp_path), steps=6)
    assert any("lora_A.default.weight is 0 at the start" in m for m in messages(found, "note"))
    assert not any("no gradient reaches" in text for text in messages(found, "warning"))
    assert not found.failed


def test_a_model_that_is_made_anew_is_examined_too(tiny_gpt2, tmp_path) -> None:
    args = arguments(tmp_path, eval_on_start=True)
    trainer = SophiaTrainer(None, args, train_dataset=dataset(), model_init=lambda: tiny_gpt2())
    assert not diagnose(trainer, steps=4).failed
    assert trainer.model_init is not None


def test_as_many_steps_as_the_momentum_remembers(tiny_gpt2, tmp_path) -> None:
    assert len(diagnose(trainer_of(tiny_gpt2(), tmp_path)).tokens) == 10
    trainer = trainer_of(tiny_gpt2(), tmp_path, optim_args="rho=1,beta1=0.96")
    assert len(diagnose(trainer).tokens) == 25


def test_what_cant_be_examined_is_refused(tiny_gpt2, tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="needs a SophiaTrainer or another Trainer"):
        diagnose(trainer_of(tiny_gpt2(), tmp_path, Trainer))
    trainer = trainer_of(tiny_gpt2(), tmp_path)
    with pytest.raises(ValueError, match="steps must be at least 4, got 3"):
        diagnose(trainer, steps=3)
    with pytest.raises(ValueError, match="adamw_lr must be > 0 and finite, got inf"):
        diagnose(trainer, adamw_lr=math.inf)
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="no train_dataset"):
        diagnose(trainer)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="this is one of 2: start it without torchrun"):
        diagnose(trainer)


def test_the_report_shows_each_kind_of_parameter(tiny_gpt2, tmp_path) -> None:
    found = diagnose(trainer_of(tiny_gpt2(), tmp_path, optim_args="rho=auto"), adamw_lr=1e-3)
    text = report(found)
    assert "| transformer.h.*.mlp.c_fc.weight" in text
    assert "transformer.h.0" not in text
    assert "| 0.03  |" in text
    assert "`--optim sophia`, whose defaults are rho=auto,target_clip_fraction=0.01," in text
    assert "against AdamW's 0.001" in text
    assert found.overhead == pytest.approx(
        (found.refresh_seconds - found.plain_seconds) / found.plain_seconds / 10
    )


def test_on_a_cpu_the_memory_that_is_expected_is_told(tiny_gpt2, tmp_path) -> None:
    found = diagnose(trainer_of(tiny_gpt2(), tmp_path))
    size = sum(param.nbytes for param in tiny_gpt2().parameters()) / 2**20
    assert f"with a refresh about +{size:,.1f} MiB expected" in report(found)


@pytest.mark.gpu
def test_memory_is_measured_on_a_gpu(tiny_gpt2, tmp_path) -> None:
    found = diagnose(trainer_of(tiny_gpt2(), tmp_path, use_cpu=False))
    assert found.refresh_bytes >= found.plain_bytes > 0


class TouchesTheRun(SophiaTrainer):
    """Does in `create_optimizer` and in steps what leaves something behind."""

    logs: typing.ClassVar[list[int]] = []

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.seen, self.counts = [], collections.Counter()
        self.nested = {"seen": collections.deque()}

    def create_optimizer(self, *args):
        share = 1.0 / self.state.max_steps  # 0 before training, for the stock Trainer
        for param in self.model.transformer.h[0].parameters():
            param.register_hook(lambda grad: grad * 0.1)

        def step(param: torch.Tensor) -> None:
            param.data.add_(1.0)

        self.model.transformer.ln_f.weight.register_post_accumulate_grad_hook(step)
        self.model.transformer.wpe.requires_grad_(False)
        self.model.transformer.wte.requires_grad_(True)
        self.args.learning_rate *= share
        return super().create_optimizer(*args)

    def training_step(self, *args, **kwargs):
        self.seen.append(1)
        self.counts["steps"] += 1
        self.nested["seen"].append(1)
        return super().training_step(*args, **kwargs)

    def log(self, *args, **kwargs) -> None:
        self.logs.append(1)
        super().log(*args, **kwargs)


class Masking:
    """A collator with random numbers of its own, as transformers' that mask have them."""

    def __init__(self) -> None:
        self.generators = None
        self.own = torch.Generator().manual_seed(3)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        if self.generators is None:
            self.generators = np.random.default_rng(3), random.Random(3)
        drawn = self.generators[0].random() + self.generators[1].random()
        batch = torch.utils.data.default_collate(rows)
        dropped = torch.rand(batch["labels"].shape, generator=self.own) < 0.2 * drawn
        return {**batch, "labels": batch["labels"].masked_fill(dropped, -100)}


class Augmented(torch.utils.data.Dataset):
    """Rows that are cut by random numbers of the data set's."""

    def __init__(self) -> None:
        self.rows = dataset()
        self.generators = np.random.default_rng(5)
        self.legacy, self.python = np.random.RandomState(5), random.Random(5)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        drawn = self.generators.random() + self.legacy.rand() + self.python.random()
        return self.rows[(index + int(10 * drawn)) % len(self.rows)]


def test_nothing_that_a_users_code_does_stays(tiny_gpt2, tmp_path) -> None:
    def made() -> SophiaTrainer:
        model = tiny_gpt2()
        model.transformer.wte.requires_grad_(False)
        args = arguments(tmp_path, max_steps=5, logging_first_step=True, optim_args=None)
        return TouchesTheRun(model, args, train_dataset=Augmented(), data_collator=Masking())

    plain, trainer = made(), made()
    plain.train()
    before = copy.deepcopy(trainer.model.state_dict())
    data, seen = trainer.train_dataset, trainer.seen
    logged = len(TouchesTheRun.logs)
    found = diagnose(trainer, steps=5)
    assert not found.failed, found.findings
    assert all(torch.equal(before[n], value) for n, value in trainer.model.state_dict().items())
    assert not trainer.model.transformer.wte.weight.requires_grad
    assert trainer.model.transformer.wpe.weight.requires_grad
    assert trainer.args.learning_rate == 5e-3
    assert len(TouchesTheRun.logs) == logged
    assert trainer.seen is seen
    assert trainer.train_dataset is data
    assert (trainer.seen, trainer.counts, list(trainer.nested["seen"])) == ([], {}, [])
    trainer.train()
    assert seen == [1] * 5
    pairs = zip(plain.model.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_list_of_rows_is_the_same_one_afterwards(tiny_gpt2, tmp_path) -> None:
    rows = dataset()
    trainer = trainer_of(tiny_gpt2(), tmp_path, data=rows)
    diagnose(trainer, steps=4)
    assert trainer.train_dataset is rows
    assert len(rows) == len(dataset())


def test_a_given_sophia_may_have_been_prepared(tiny_gpt2, tmp_path) -> None:
    model = tiny_gpt2()
    trainer = trainer_of(model, tmp_path, optim_args=None)
    trainer.optimizer = trainer.accelerator.prepare(Sophia(model.parameters(), lr=1e-3, k=3))
    found = diagnose(trainer, steps=4)
    assert not found.failed, found.findings
    assert found.k == 3


def test_a_create_optimizer_that_only_returns_one_is_told_of(tiny_gpt2, tmp_path) -> None:
    class Returning(SophiaTrainer):
        def create_optimizer(self, *args):
            return Sophia(self.model.parameters(), lr=1e-3)

    found = diagnose(trainer_of(tiny_gpt2(), tmp_path, Returning), steps=4)
    assert messages(found, "error") == [
        "Returning.create_optimizer left self.optimizer None: set it there"
    ]
