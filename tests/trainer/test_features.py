"""What the Trainer can do beside training plainly, each together with Sophia."""

import pytest
import torch
from torch.utils.data import default_collate
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Seq2SeqTrainingArguments,
)

import hf_sophia
from hf_sophia import SophiaSeq2SeqTrainer, SophiaTrainer

from .families import CASES, CONFIGS
from .runs import (
    VOCABULARY,
    Gradients,
    Recorder,
    dataset,
    first_hessian,
    hessians_of,
    run,
    sophia_of,
)


def test_neftune_noise_reaches_both_passes_alike(tiny_gpt2, tmp_path) -> None:
    trainer = run(tiny_gpt2(), tmp_path, neftune_noise_alpha=5.0, max_steps=12)
    assert all(h.max() > 0 for h in hessians_of(trainer))
    plain = first_hessian(tiny_gpt2, tmp_path)
    noisy = first_hessian(tiny_gpt2, tmp_path, neftune_noise_alpha=5.0)
    assert not all(torch.equal(one, other) for one, other in zip(plain, noisy, strict=True))


@pytest.mark.parametrize("fraction", ["", ",hessian_batch_fraction=0.5"], ids=["kept", "own"])
def test_packing_counts_no_label_across_documents(fraction, tmp_path) -> None:
    """Four documents in one row: the estimate is that of the same documents apart."""
    config = AutoConfig.for_model(
        "llama", **{**CONFIGS["llama"], "vocab_size": VOCABULARY, "attn_implementation": "sdpa"}
    )
    rows = [{"input_ids": row["input_ids"].tolist()} for row in dataset(8)]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    trainer = run(
        model,
        tmp_path,
        data=rows,
        max_steps=2,
        optim_args=f"k=1{fraction}",
        extra={"data_collator": DataCollatorWithFlattening()},
    )
    # One row can't be cut, so its pass takes it whole.
    assert trainer.state.log_history[0]["sophia/hessian_tokens"] == 4 * 11
    assert all(h.max() > 0 for h in hessians_of(trainer))


def test_left_and_right_padding_give_the_same(tmp_path) -> None:
    config = AutoConfig.for_model("llama", **CONFIGS["llama"])

    class SameLabels(SophiaTrainer):
        """Draws the labels of all positions alike wherever the text stands."""

        def sophia_head(self, model, inputs, outputs):
            head = super().sophia_head(model, inputs, outputs)
            texts = inputs["attention_mask"].argmax(-1)
            rolled = [
                [tensor.roll(-int(start), 0) for tensor, start in zip(whole, texts, strict=True)]
                for whole in (head.logits, head.targets)
            ]
            return hf_sophia.trainer.heads.HeadOutput(*map(torch.stack, rolled))

    results = []
    for side in ("left", "right"):
        rows = []
        for index, row in enumerate(dataset(4)):
            text = row["input_ids"][: 12 - 3 * (index % 2)]
            pad = 12 - len(text)
            widths = (pad, 0) if side == "left" else (0, pad)
            # The first token would be predicted from a pad where there is one on its left.
            labels = text.index_fill(0, torch.tensor([0]), -100)
            mask = torch.nn.functional.pad(torch.ones_like(text), widths)
            rows.append(
                {
                    "input_ids": torch.nn.functional.pad(text, widths, value=1),
                    "attention_mask": mask,
                    "position_ids": (mask.cumsum(0) - 1).clamp(min=0),
                    "labels": torch.nn.functional.pad(labels, widths, value=-100),
                }
            )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        trainer = run(model, tmp_path, data=rows, max_steps=1, trainer_class=SameLabels)
        assert trainer.state.log_history[0]["sophia/hessian_tokens"] == 2 * (11 + 8)
        results.append(hessians_of(trainer))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5 * float(right.max()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_models(backend, tiny_gpt2, tmp_path) -> None:
    expected = first_hessian(tiny_gpt2, tmp_path)
    torch._dynamo.reset()
    recorder = Recorder()
    trainer = run(
        tiny_gpt2(),
        tmp_path,
        callback=recorder,
        torch_compile=True,
        torch_compile_backend=backend,
        max_steps=3,
        optim_args="rho=0.2,k=2",
        gradient_accumulation_steps=1,
    )
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    assert trainer._plan.fraction is None
    assert recorder.refreshed == [1, 3]
    for one, other in zip(expected, recorder.hessians[1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-8)


def test_a_compiled_models_own_pass(tiny_gpt2, tmp_path) -> None:
    expected = first_hessian(tiny_gpt2, tmp_path)
    torch._dynamo.reset()
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    own = "rho=0.2,hessian_batch_fraction=1.0"
    actual = first_hessian(tiny_gpt2, tmp_path, optim_args=own, **options)
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one)


def test_frozen_embeddings_have_no_hessian(tiny_gpt2, tmp_path) -> None:
    model = tiny_gpt2(tie_word_embeddings=False)
    model.transformer.wte.requires_grad_(False)
    model.transformer.wpe.requires_grad_(False)
    trainer = run(model, tmp_path, max_steps=2)
    held = sophia_of(trainer).state
    for name, param in model.named_parameters():
        assert (param in held) == param.requires_grad, name
    assert all(state["hessian"].max() > 0 for state in held.values())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_with_their_collator_and_generation(family, smoothing, tmp_path) -> None:
    case = next(c for c in CASES if c.family == family and "Conditional" in c.model)
    model = case.make()
    model.generation_config.max_length = 6

    class Padding:
        padding_side = "right"

        def pad(self, rows, **options):
            return default_collate(rows)

    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in case.rows(8)]
    trainer = SophiaSeq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            tmp_path,
            optim="sophia",
            optim_args="rho=0.2,k=2",
            max_steps=3,
            per_device_train_batch_size=4,
            logging_steps=1,
            label_smoothing_factor=smoothing,
            predict_with_generate=True,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows[:2],
        data_collator=lambda batch: DataCollatorForSeq2Seq(Padding(), model=model)(
            [dict(row) for row in batch]
        ),
    )
    trainer.train()
    counted = sum(int((row["labels"] != -100).sum()) for row in rows[:8]) / 2
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {entry["sophia/hessian_tokens"] for entry in logs} == {counted}
    assert all(h.max() > 0 for h in hessians_of(trainer) if h.numel() > 16)
    predictions = trainer.predict(rows[:2]).predictions
    assert predictions.shape[0] == 2
    assert predictions.shape[1] <= 6


@pytest.mark.gpu
def test_liger_kernels(tmp_path) -> None:
    """The real ones; passes like theirs are imitated in the tests of the own pass."""
    pytest.importorskip("liger_kernel")
    config = AutoConfig.for_model("llama", **{**CONFIGS["llama"], "vocab_size": VOCABULARY})
    hessians = []
    for use in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        options = {"optim_args": "rho=0.2,hessian_batch_fraction=1.0", "max_steps": 1}
        trainer = run(model, tmp_path, use_cpu=False, use_liger_kernel=use, **options)
        hessians.append(hessians_of(trainer))
    for one, other in zip(*hessians, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-3 * float(one.max()))


@pytest.mark.gpu
def test_a_refresh_does_not_spoil_ligers_gradients(tmp_path) -> None:
    """Their SwiGLU overwrites what it saved; with label smoothing the pass makes logits."""
    pytest.importorskip("liger_kernel")
    config = AutoConfig.for_model("llama", **{**CONFIGS["llama"], "vocab_size": VOCABULARY})

    recorder = Gradients()
    for optim in ("adamw_torch", "sophia"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        options = {"optim": optim, "optim_args": None, "label_smoothing_factor": 0.1}
        options |= {"use_cpu": False, "use_liger_kernel": True, "max_steps": 1}
        run(model, tmp_path, callback=recorder, **options)
    for one, other in zip(*recorder.of_steps, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3 * float(one.abs().max()))
