"""Which predictions a model's loss counts, and the check that the adapter agrees with it."""

import pytest
import torch
from torch.nn import functional
from torch.utils.data import default_collate
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
)

from hf_sophia import SophiaTrainer
from hf_sophia.trainer.alignment import labels_are_aligned
from hf_sophia.trainer.heads import (
    HeadOutput,
    causal_lm,
    classification,
    head_output,
    per_token,
    question_answering,
)

from .families import CASES
from .runs import VOCABULARY, dataset, hessians_of, run


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


class WithPenalty(GPT2LMHeadModel):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.loss = outputs.loss + 1e-2 * outputs.logits.logsumexp(-1).square().mean()
        return outputs


class PreShifted(GPT2LMHeadModel):
    def forward(self, input_ids, labels):
        logits = super().forward(input_ids).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


class IgnoresPadding(GPT2LMHeadModel):
    def forward(self, input_ids, labels):
        logits = super().forward(input_ids).logits
        shifted = labels[:, 1:].flatten()
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), shifted, ignore_index=3)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["1", "2"])
@pytest.mark.parametrize("model_class", [WithPenalty, PreShifted, IgnoresPadding])
def test_a_causal_model_with_another_loss_is_caught(
    model_class, options, tiny_gpt2, tmp_path
) -> None:
    model = model_class(tiny_gpt2().config)
    options = {"max_steps": 2, "remove_unused_columns": False, **options}
    with pytest.raises(RuntimeError, match=r"not aligned.*HeadOutput\(..., check_loss=False\)"):
        run(model, tmp_path, **options)


def test_a_label_that_the_adapter_alone_leaves_out_is_caught(tiny_gpt2, tmp_path) -> None:
    data = [
        {**row, "labels": row["labels"].index_fill(0, torch.arange(1, 12), -100)}
        for row in dataset()
    ]
    model = PreShifted(tiny_gpt2().config)
    with pytest.raises(RuntimeError, match="the 0 labels that Sophia-G counts for PreShifted"):
        run(model, tmp_path, data=data, remove_unused_columns=False)


def test_a_head_may_say_that_the_loss_holds_more(tiny_gpt2, tmp_path) -> None:
    class Trusting(SophiaTrainer):
        def sophia_head(self, model, inputs, outputs):
            head = super().sophia_head(model, inputs, outputs)
            return HeadOutput(head.logits, head.targets, check_loss=False)

    model = WithPenalty(tiny_gpt2().config)
    options = {"max_steps": 1, "remove_unused_columns": False, "trainer_class": Trusting}
    trainer = run(model, tmp_path, **options)
    assert all(h.max() > 0 for h in hessians_of(trainer))
    assert trainer.state.log_history[0]["sophia/hessian_tokens"] == 44


@pytest.mark.parametrize("own_pass", ["", ",hessian_batch_fraction=1.0"], ids=["kept", "own"])
def test_a_loss_of_the_users_own_makes_ambiguous_labels_an_error(own_pass, tmp_path) -> None:
    case = next(c for c in CASES if c.config.get("num_labels") == 1 and c.family == "roberta")
    data = [{**row, "labels": torch.tensor(float(i % 2))} for i, row in enumerate(case.rows(8))]

    def binary(outputs, labels, num_items_in_batch=None):
        return functional.binary_cross_entropy_with_logits(outputs.logits.squeeze(-1), labels)

    options = {
        "data": data,
        "extra": {"compute_loss_func": binary},
        "optim_args": f"rho=0.2{own_pass}",
        "max_steps": 1,
    }
    with pytest.raises(ValueError, match="set model.config.problem_type to one of single_label"):
        run(case.make(), tmp_path, **options)
    numbers = run(case.make(problem_type="regression"), tmp_path, **options)
    flags = run(case.make(problem_type="multi_label_classification"), tmp_path, **options)
    means = [sum(h.sum() for h in hessians_of(trainer)) for trainer in (numbers, flags)]
    # A number's label has variance 1/2 and its residual counts twice: 2 against p (1 - p) <= 1/4.
    assert means[0] > 4 * means[1] > 0


def test_a_tuple_of_logits_alone_has_no_loss_to_compare() -> None:
    logits, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    head = HeadOutput(logits, labels)
    assert labels_are_aligned(torch.nn.Linear(1, 1), head, {"labels": labels}, (logits,))


def test_prompt_tuning_puts_positions_before_the_labelled_ones() -> None:
    labels = torch.tensor([[5, 6, -100, 8]])
    for adapter, positions, expected in (
        (causal_lm, 4, [6, -100, 8, -100]),
        (causal_lm, 6, [-100, 5, 6, -100, 8, -100]),
        (per_token, 4, [5, 6, -100, 8]),
        (per_token, 6, [-100, -100, 5, 6, -100, 8]),
    ):
        outputs = {"logits": torch.zeros(1, positions, 9)}
        head = adapter(torch.nn.Identity(), {"labels": labels}, outputs)
        assert head.targets.tolist() == [expected]


def test_answers_beyond_the_text_do_not_count() -> None:
    outputs = {name: torch.randn(3, 6) for name in ("start_logits", "end_logits")}
    positions = {
        "start_positions": torch.tensor([[0], [6], [-1]]),
        "end_positions": torch.tensor([[5], [99], [2]]),
    }
    head = question_answering(torch.nn.Identity(), positions, outputs)
    assert head.targets.tolist() == [[0, 5], [-100, -100], [0, 2]]
    assert torch.equal(head.logits[:, 0], outputs["start_logits"])
    assert torch.equal(head.logits[:, 1], outputs["end_logits"])


def test_labels_that_do_not_fit_the_logits_are_explained() -> None:
    model = CASES[1].make()
    inputs, outputs = {"labels": torch.zeros(4, 2).long()}, {"logits": torch.zeros(4, 3)}
    with pytest.raises(
        ValueError, match=r"labels of shape \(4, 2\) do not fit the logits of GPT2F"
    ):
        classification(model, inputs, outputs)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_labels_are_aligned_with_weights_of_16_bits(case, dtype) -> None:
    model = case.make().to(dtype)
    inputs = {
        name: value.to(dtype)
        if name in ("pixel_values", "input_values", "input_features")
        else value
        for name, value in default_collate(case.rows(4)).items()
    }
    with torch.no_grad():
        outputs = model(**inputs)
    assert labels_are_aligned(model, head_output(model, inputs, outputs), inputs, outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_a_loss_rounded_to_16_bits_is_told_from_a_wrong_one(likelihood, dtype) -> None:
    """700 batches, seed 0: where logits are confident, a small loss is all rounding."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(1, 1)
    loss_of = {
        "categorical": functional.cross_entropy,
        "bernoulli": functional.binary_cross_entropy_with_logits,
    }[likelihood]
    for rows in (1, 2, 4, 16, 34, 64, 256):
        for batch in range(100):
            logits = torch.randn(rows, 5, generator=generator).mul(1 + batch % 10).to(dtype)
            if likelihood == "categorical":
                drawn = torch.randint(5, (rows,), generator=generator)
                likely = logits.argmax(-1)
                wrong = (likely + 1) % 5
            else:
                drawn = torch.rand(rows, 5, generator=generator).round()
                likely = (logits > 0).float()
                wrong = 1.0 - likely
            for labels in (drawn, likely):
                head = HeadOutput(logits, labels, likelihood)
                assert labels_are_aligned(model, head, {}, {"loss": loss_of(logits, labels)})
            with pytest.raises(RuntimeError, match="not aligned"):
                labels_are_aligned(model, head, {}, {"loss": loss_of(logits, wrong)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_neither_masked_classes_nor_ignored_rows_hide_wrong_labels_in_16_bits(dtype) -> None:
    """64 rows, seed 0, of likely labels: five of 20 classes are masked, eight rows ignored."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(15, (64,), generator=generator)
    logits = torch.randn(64, 20, generator=generator)
    logits[torch.arange(64), labels] += 5
    logits[:, 15:] = torch.finfo(dtype).min
    logits[:8], labels[:8] = 3e4, -100
    logits, model = logits.to(dtype), torch.nn.Linear(1, 1)
    outputs = {"loss": functional.cross_entropy(logits, labels)}
    assert labels_are_aligned(model, HeadOutput(logits, labels, "categorical"), {}, outputs)
    rolled = torch.cat((labels[:8], labels[8:].roll(1)))
    with pytest.raises(RuntimeError, match="not aligned"):
        labels_are_aligned(model, HeadOutput(logits, rolled, "categorical"), {}, outputs)
