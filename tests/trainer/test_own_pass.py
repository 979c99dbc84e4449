"""The forward pass for the Hessian alone: the same estimate, and training does not notice it."""

import copy
import importlib
import logging
import pickle
import random
from types import MethodType, SimpleNamespace

import numpy
import pytest
import torch
from torch import mps
from torch.nn import functional
from torch.utils.data import default_collate
from transformers import GPT2LMHeadModel, Trainer

from hf_sophia import SophiaTrainer, SophiaTrainerMixin, gauss_newton_bartlett
from hf_sophia.trainer import sophia_trainer as trainer_module
from hf_sophia.trainer.heads import HeadOutput, causal_lm
from hf_sophia.trainer.noise import Place, label_noise, noise_seed
from hf_sophia.trainer.own_pass import (
    reentrant_modules,
    seeded,
    share_counts,
    take_rows,
    undisturbed,
)

from .runs import Gradients, Recorder, dataset, first_hessian, hessians_of, run, sophia_of

WHOLE = "rho=0.2,k=10,hessian_batch_fraction=1.0"


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def assert_equal(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> None:
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_on_the_whole_batch_it_is_the_kept_graphs_estimate(accumulation, tiny_gpt2, tmp_path):
    options = {"gradient_accumulation_steps": accumulation}
    expected = first_hessian(tiny_gpt2, tmp_path, **options)
    actual = first_hessian(tiny_gpt2, tmp_path, optim_args=WHOLE, **options)
    assert_equal(expected, actual)


def test_a_share_is_estimated_by_hand(tiny_gpt2, tmp_path) -> None:
    model, data = tiny_gpt2(), dataset(8, ignored=0.2)
    trainer = run(
        tiny_gpt2(),
        tmp_path,
        data=data,
        seed=3,
        max_steps=1,
        per_device_train_batch_size=8,
        optim_args="rho=0.2,hessian_batch_fraction=0.5",
        train_sampling_strategy="sequential",
    )
    order = torch.Generator().manual_seed(noise_seed(Place(3, 0, 0, 0), "rows"))
    rows = torch.randperm(8, generator=order)[:4].sort().values.tolist()
    assert rows != [0, 1, 2, 3]
    batch = default_collate([data[row] for row in rows])
    outputs = model(**batch)
    head = causal_lm(model, batch, outputs)
    expected = gauss_newton_bartlett(
        head.logits,
        model.parameters(),
        targets=head.targets,
        generator=label_noise(3, 0, 0, 0),
    )
    for estimate, param in zip(expected.values(), trainer.model.parameters(), strict=True):
        hessian = sophia_of(trainer).state[param]["hessian"]
        torch.testing.assert_close(hessian, 0.05 * estimate, rtol=1e-5, atol=1e-9)
    counted = trainer.state.log_history[0]["sophia/hessian_tokens"]
    assert counted == (head.targets != -100).sum()


@pytest.mark.parametrize(
    ("fraction", "sizes", "taken"),
    [
        (0.25, [4, 4], [1, 1]),
        (0.25, [1] * 8, [1, 0, 0, 0, 1, 0, 0, 0]),
        (0.1, [30], [3]),
        (0.1, [3, 3, 3, 1], [1, 0, 0, 0]),
        (1.0, [5, 2], [5, 2]),
        (0.01, [2], [1]),
    ],
)
def test_the_share_is_spread_over_micro_batches(fraction, sizes, taken) -> None:
    batches = [{"labels": torch.arange(size), "use_cache": False} for size in sizes]
    assert share_counts(batches, fraction) == taken
    for inputs, count in zip(batches, taken, strict=True):
        part = take_rows(inputs, count, generator())
        assert part["use_cache"] is False
        assert len(set(part["labels"].tolist())) == len(part["labels"]) == count


@pytest.mark.parametrize(
    "extra",
    [
        {"cu_seq_lens_q": torch.tensor([0, 3, 8])},
        {"position_ids": torch.zeros(3, 4, 5)},
        {"position_ids": torch.zeros(4, 4, 5)},
        {"images": [torch.zeros(2)]},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_a_batch_that_cannot_be_cut_is_taken_whole(extra) -> None:
    inputs = {"input_ids": torch.zeros(4, 5), **extra}
    divisible = {"input_ids": torch.zeros(4, 5)}
    assert share_counts([inputs, divisible, divisible], 0.5) == [4, 0, 2]
    assert take_rows(inputs, 2, generator()) == inputs


def test_rows_stay_together() -> None:
    inputs = {"a": torch.arange(10), "b": torch.arange(10) * 2, "scalar": torch.tensor(5)}
    part = take_rows(inputs, 3, generator())
    assert len(part["a"]) == 3
    assert torch.equal(part["b"], 2 * part["a"])
    assert part["scalar"] == 5


@pytest.mark.parametrize(
    ("kind", "fraction"),
    [("gnb", 0.3), ("gnb", 0.5), ("hutchinson", 0.3)],
    ids=["gnb", "gnb on the graph of one micro-batch", "hutchinson"],
)
def test_losses_and_gradients_are_those_of_a_run_with_adamw(
    kind, fraction, tiny_gpt2, tmp_path
) -> None:
    histories = []
    own = f"k=2,hessian_batch_fraction={fraction},hessian_computation_type={kind}"
    for optim, optim_args in (("sophia", own), ("adamw_torch", None)):
        trainer = run(
            tiny_gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2),
            tmp_path,
            optim=optim,
            optim_args=optim_args,
            learning_rate=0.0,
            gradient_accumulation_steps=2,
            max_steps=6,
            neftune_noise_alpha=5.0,
        )
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        histories.append([(entry["loss"], entry["grad_norm"]) for entry in logs])
    assert histories[0] == histories[1]


def test_every_pass_has_dropout_and_rows_of_its_own(tiny_gpt2, tmp_path, monkeypatch) -> None:
    seeds, rows = [], []

    def spy(model, seed):
        seeds.append(seed)
        return undisturbed(model, seed)

    class Watching(SophiaTrainer):
        def sophia_head(self, model, inputs, outputs):
            rows.append(inputs["input_ids"][:, 0].tolist())
            return super().sophia_head(model, inputs, outputs)

    monkeypatch.setattr(trainer_module, "undisturbed", spy)
    run(
        tiny_gpt2(),
        tmp_path,
        data=dataset(8),
        trainer_class=Watching,
        optim_args="k=1,hessian_batch_fraction=0.3",
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        max_steps=3,
        seed=1,
    )
    assert len(set(seeds)) == len(seeds) == 6
    # Every step sees the same two batches here, and takes other rows of them.
    assert len({tuple(part) for part in rows[::2]}) > 1


def test_a_wrong_head_is_caught_in_this_pass_too(tiny_gpt2, tmp_path) -> None:
    class Unshifted(SophiaTrainer):
        def sophia_head(self, model, inputs, outputs):
            return HeadOutput(outputs["logits"], inputs["labels"])

    with pytest.raises(RuntimeError, match="not aligned with the logits"):
        run(tiny_gpt2(), tmp_path, trainer_class=Unshifted, optim_args=WHOLE)


class Noisy(torch.nn.Module):
    """Uses every source of randomness, and a buffer that its forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x, labels):
        noise = torch.rand(()) + random.random() + numpy.random.rand()
        logits = self.layer(functional.dropout(self.norm(x), 0.5)) * noise
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def test_every_stream_and_buffer_is_as_before() -> None:
    model, x, labels = Noisy(), torch.randn(8, 4), torch.zeros(8, dtype=torch.long)

    def draws() -> list[float]:
        return [torch.rand(()).item(), random.random(), float(numpy.random.rand())]

    def buffers() -> list[torch.Tensor]:
        return [buffer.clone() for buffer in model.buffers()]

    results = []
    for use in (False, True):
        torch.manual_seed(1)
        random.seed(1)
        numpy.random.seed(1)
        held = buffers()
        if use:
            with undisturbed(model, 5):
                first = model(x, labels)["loss"].item()
                assert not torch.equal(buffers()[0], held[0])
            with undisturbed(model, 5):
                assert model(x, labels)["loss"].item() == first
            with undisturbed(model, 6):
                assert model(x, labels)["loss"].item() != first
        assert_equal(held, buffers())
        results.append(draws())
    assert results[0] == results[1]


def test_packed_weights_are_not_copied() -> None:
    model = torch.nn.Linear(2, 2)
    packed = torch.zeros(2**20 + 1, dtype=torch.int8)
    counts = torch.zeros(4, dtype=torch.int64)
    wide = torch.zeros(2**20 + 1)
    for name, buffer in (("packed", packed), ("counts", counts), ("wide", wide)):
        model.register_buffer(name, buffer)
    with undisturbed(model, 1):
        for buffer in model.buffers():
            buffer.add_(1)
    assert [int(buffer.sum()) for buffer in (counts, wide)] == [0, 0]
    # Nothing changes these; that it was not undone shows that no copy was made.
    assert int(packed.sum()) == len(packed)


def test_a_kind_of_device_with_one_generator_gets_it_back(monkeypatch) -> None:
    held = torch.Generator().manual_seed(3)
    only = SimpleNamespace(
        get_rng_state=lambda: held.get_state(),
        set_rng_state=lambda state: held.set_state(state),
        manual_seed=lambda seed: held.manual_seed(seed),
    )
    assert all(hasattr(mps, name) for name in vars(only))
    assert not hasattr(mps, "device")
    before = held.get_state()
    monkeypatch.setattr(torch, "get_device_module", lambda device: only)
    draws = []
    for seed in (5, 5, 6):
        with seeded(torch.device("mps"), seed):
            draws.append(torch.rand((), generator=held).item())
        assert torch.equal(held.get_state(), before)
    assert draws[0] == draws[1] != draws[2]


def test_the_pass_trains_the_model_after_an_evaluation_too(tiny_gpt2, tmp_path) -> None:
    modes = []

    class Watching(SophiaTrainer):
        def sophia_head(self, model, inputs, outputs):
            modes.append(model.training)
            return super().sophia_head(model, inputs, outputs)

    run(
        tiny_gpt2(),
        tmp_path,
        trainer_class=Watching,
        optim_args="k=2,hessian_batch_fraction=0.5",
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        extra={"eval_dataset": dataset(4)},
    )
    assert modes == [True, True]


def checkpointing(reentrant: bool) -> dict:
    return {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }


def test_checkpointing_without_reentrance_keeps_the_graph(tiny_gpt2, tmp_path) -> None:
    expected = first_hessian(tiny_gpt2, tmp_path)
    trainer = run(tiny_gpt2(), tmp_path, max_steps=1, **checkpointing(False))
    assert trainer._plan.fraction is None
    for one, other in zip(expected, hessians_of(trainer), strict=True):
        torch.testing.assert_close(one, other)


def test_reentrant_checkpointing_gets_a_pass_of_its_own(tiny_gpt2, tmp_path) -> None:
    expected = first_hessian(tiny_gpt2, tmp_path)
    actual = first_hessian(tiny_gpt2, tmp_path, optim_args=WHOLE, **checkpointing(True))
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, other)
    model = tiny_gpt2()
    trainer = run(model, tmp_path, max_steps=2, **checkpointing(True))
    assert trainer._plan.fraction == 0.25
    assert trainer.state.log_history[0]["sophia/hessian_tokens"] == 11
    assert len(reentrant_modules(model)) == 3


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
def test_checkpointing_that_does_not_say_which_form_is_reentrant(tiny_gpt2, tmp_path) -> None:
    expected = first_hessian(tiny_gpt2, tmp_path)
    unsaid = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"preserve_rng_state": False},
    }
    actual = first_hessian(tiny_gpt2, tmp_path, optim_args=WHOLE, **unsaid)
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, other)
    assert run(tiny_gpt2(), tmp_path, max_steps=1, **unsaid)._plan.fraction == 0.25


def test_reentrant_checkpointing_outside_transformers_is_explained(tiny_gpt2, tmp_path) -> None:
    class Checkpointed(GPT2LMHeadModel):
        def forward(self, input_ids, labels):
            embedded = self.transformer.wte(input_ids)
            logits = torch.utils.checkpoint.checkpoint(
                lambda x: self.lm_head(x.tanh()), embedded, use_reentrant=True
            )
            return {"loss": self.loss_function(logits, labels, 37), "logits": logits}

    model = Checkpointed(tiny_gpt2().config)
    with pytest.raises(RuntimeError, match="with use_reentrant=False"):
        run(model, tmp_path)


class Fused(GPT2LMHeadModel):
    """Makes no logits in training unless it is told to, as Liger's models."""

    def forward(self, *args, labels=None, skip_logits=None, **kwargs):
        skip = skip_logits if skip_logits is not None else self.training and labels is not None
        outputs = super().forward(*args, labels=labels, **kwargs)
        return type(outputs)(loss=outputs.loss) if skip else outputs


def test_a_fused_loss_is_asked_for_its_logits(tiny_gpt2, tmp_path) -> None:
    expected = first_hessian(tiny_gpt2, tmp_path)
    recorder, model = Recorder(), Fused(tiny_gpt2().config)
    model.load_state_dict(tiny_gpt2().state_dict())
    options = {"max_steps": 3, "remove_unused_columns": False}
    whole = WHOLE.replace("k=10", "k=2")
    run(model, tmp_path, callback=recorder, optim_args=whole, **options)
    assert recorder.refreshed == [1, 3]
    assert_equal(expected, recorder.hessians[1])


class OverwritingSquare(torch.autograd.Function):
    """Writes gradients over its saved activation, unseen by autograd, as Liger's SwiGLU does."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        x.detach().numpy()[...] = (2.0 * x * cotangent).numpy()
        return x.clone()


def overwriting_forward(module, x):
    return OverwritingSquare.apply(x)


class Overwriting(torch.nn.Module):
    forward = overwriting_forward


def squares_by_class(monkeypatch) -> torch.nn.Module:
    monkeypatch.setattr(Overwriting, "__module__", "liger_kernel.transformers.swiglu")
    return Overwriting()


def squares_by_forward(monkeypatch) -> torch.nn.Module:
    """A module whose forward pass alone is replaced, as Liger does where a model exists already."""
    monkeypatch.setattr(overwriting_forward, "__module__", "liger_kernel.transformers.swiglu")
    module = torch.nn.Identity()
    module.forward = MethodType(overwriting_forward, module)
    return module


@pytest.mark.parametrize("squares", [squares_by_class, squares_by_forward])
def test_kernels_that_overwrite_the_graph_do_not_spoil_training(
    squares, tiny_gpt2, tmp_path, monkeypatch
) -> None:
    recorder, act = Gradients(), squares(monkeypatch)
    for optim, optim_args in (("adamw_torch", None), ("sophia", None), ("sophia", WHOLE)):
        model = tiny_gpt2()
        for block in model.transformer.h:
            block.mlp.act = act
        options = {"optim": optim, "optim_args": optim_args, "max_steps": 1}
        # Labels outside of the model keep the logits of Liger's causal models.
        run(model, tmp_path, callback=recorder, label_smoothing_factor=0.1, **options)
    expected, *others = recorder.of_steps
    for actual in others:
        assert_equal(expected, actual)


def test_a_training_pass_without_logits_is_noticed(tiny_gpt2, tmp_path, caplog) -> None:
    class Detached(GPT2LMHeadModel):
        def forward(self, *args, labels=None, **kwargs):
            outputs = super().forward(*args, labels=labels, **kwargs)
            if self.watched:
                outputs.logits = outputs.logits.detach()
            return outputs

    class Watched(SophiaTrainer):
        """Makes the training pass alone one without a graph of its logits."""

        def compute_loss(self, model, inputs, **kwargs):
            model.watched = True
            result = super().compute_loss(model, inputs, **kwargs)
            model.watched = False
            return result

        def sophia_head(self, model, inputs, outputs):
            model.watched = False
            return super().sophia_head(model, inputs, outputs)

    start = tiny_gpt2()
    for cls, trainer_class in ((Fused, SophiaTrainer), (Detached, Watched)):
        model, recorder = cls(start.config), Recorder()
        model.watched = False
        model.load_state_dict(start.state_dict())
        with caplog.at_level(logging.INFO, "hf_sophia"):
            trainer = run(
                model,
                tmp_path,
                callback=recorder,
                trainer_class=trainer_class,
                max_steps=3,
                optim_args="k=2",
                gradient_accumulation_steps=2,
                remove_unused_columns=False,
            )
        assert recorder.refreshed == [1, 3]
        assert trainer._plan.fraction == 0.25
        assert trainer.state.log_history[0]["sophia/hessian_tokens"] == 2 * 11
        assert "0.25 of the batch: the training pass makes no logits with a graph" in caplog.text


def test_a_compute_loss_that_changes_the_batch_is_named(tiny_gpt2, tmp_path) -> None:
    class Renaming(SophiaTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(input_ids=inputs["tokens"], labels=inputs["labels"])
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    data = [{"tokens": row["input_ids"], "labels": row["labels"]} for row in dataset()]
    options = {"data": data, "optim_args": WHOLE, "remove_unused_columns": False}
    told = r"\['labels', 'tokens'\], which failed .*If Renaming's compute_loss changes it first"
    with pytest.raises(RuntimeError, match=told):
        run(tiny_gpt2(), tmp_path, trainer_class=Renaming, **options)


def test_a_compute_loss_of_any_kind_works_beside_it(tiny_gpt2, tmp_path) -> None:
    class Weighted(SophiaTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss = 3.0 * model(**inputs).loss
            return (loss, None) if return_outputs else loss

    expected = first_hessian(tiny_gpt2, tmp_path)
    options = {"trainer_class": Weighted, "optim_args": WHOLE}
    assert_equal(expected, first_hessian(tiny_gpt2, tmp_path, **options))


@pytest.mark.parametrize("returned", ["loss alone", "logits beside"])
def test_an_override_without_outputs_gets_a_pass_of_its_own(returned, tiny_gpt2, tmp_path) -> None:
    class Plain(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            if returned == "loss alone" or not return_outputs:
                return outputs.loss
            return outputs.loss, outputs.logits

    class Mixed(SophiaTrainerMixin, Plain):
        pass

    trainer = run(tiny_gpt2(), tmp_path, trainer_class=Mixed, max_steps=2)
    assert trainer._plan.fraction == 0.25
    assert all(h.max() > 0 for h in hessians_of(trainer))


def test_the_plan_is_made_anew_for_each_run(tiny_gpt2, tmp_path) -> None:
    trainer = run(tiny_gpt2(), tmp_path, max_steps=1)
    assert trainer._plan.fraction is None
    trainer.model.gradient_checkpointing_enable({"use_reentrant": True})
    trainer.train()
    assert trainer._plan.fraction == 0.25


def test_the_option_is_kept_by_copies_of_the_optimizer(tiny_gpt2, tmp_path) -> None:
    optimizer = sophia_of(run(tiny_gpt2(), tmp_path, optim_args=WHOLE, max_steps=1))
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.hessian_batch_fraction == 1.0


def test_a_stock_trainer_takes_the_option_and_still_stops(tiny_gpt2, tmp_path) -> None:
    with pytest.raises(RuntimeError, match="hf_sophia.SophiaTrainer instead of"):
        run(tiny_gpt2(), tmp_path, trainer_class=Trainer, optim_args=WHOLE)


@pytest.mark.gpu
def test_the_accelerators_stream_is_as_before() -> None:
    model = Noisy().cuda()
    states = []
    for use in (False, True):
        torch.manual_seed(1)
        if use:
            with undisturbed(model, 5):
                torch.rand(3, device="cuda")
        states.append(torch.rand(3, device="cuda"))
    assert torch.equal(*states)


def test_a_compiled_graph_that_can_be_used_once_gets_a_pass_of_its_own(
    tiny_gpt2, tmp_path, monkeypatch, caplog
) -> None:
    """Under DistributedDataParallel inductor reuses the memory of some graphs in their one pass."""
    expected = first_hessian(tiny_gpt2, tmp_path, optim_args="hessian_batch_fraction=0.25")
    module = importlib.import_module("hf_sophia.estimators.gauss_newton_bartlett")
    original = module.gradients

    def once(*args, retain_graph):
        if retain_graph:
            raise RuntimeError(
                "This backward function was compiled with non-empty donated buffers which requires"
                " create_graph=False and retain_graph=False."
            )
        return original(*args, retain_graph=retain_graph)

    monkeypatch.setattr(module, "gradients", once)
    with caplog.at_level(logging.INFO, "hf_sophia"):
        actual = first_hessian(tiny_gpt2, tmp_path)
    assert_equal(expected, actual)
    assert "own on 0.25 of the batch: the compiled graph can be used only once" in caplog.text
