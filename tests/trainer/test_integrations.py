"""PEFT's adapters and TRL's trainer with Sophia."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_sophia import SophiaTrainerMixin
from hf_sophia.trainer.injection import with_mixin

from .runs import Recorder, hessians_of, run, sophia_of

peft = pytest.importorskip("peft")


def adapted(model: torch.nn.Module, kind: str) -> torch.nn.Module:
    """Wrap a causal language model with an adapter whose every weight gets a gradient at once."""
    task = {"task_type": "CAUSAL_LM"}
    if kind == "prompt":
        config = peft.PromptTuningConfig(num_virtual_tokens=3, **task)
    else:
        # B starts at 0 otherwise, and A has no gradient until B has moved.
        config = peft.LoraConfig(
            r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True, **task
        )
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("fraction", ["", ",hessian_batch_fraction=0.5"], ids=["kept", "own"])
@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_adapters(kind, fraction, tiny_gpt2, tmp_path) -> None:
    model = adapted(tiny_gpt2(), kind)
    start = {name: value.clone() for name, value in model.named_parameters()}
    recorder = Recorder()
    trainer = run(
        model, tmp_path, callback=recorder, optim_args=f"rho=0.2,k=2{fraction}", max_steps=4
    )
    assert recorder.refreshed == [1, 3]
    held = sophia_of(trainer).state
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert len(trained) == len(held) == (1 if kind == "prompt" else 4)
    for name, param in model.named_parameters():
        assert (param in held) == (name in trained)
        assert torch.equal(param, start[name]) == (name not in trained)
    assert all(state["hessian"].max() > 0 for state in held.values())
    # In prompt tuning the last virtual token predicts the first label too.
    labels = 12 if kind == "prompt" else 11
    assert trainer.state.log_history[0]["sophia/hessian_tokens"] == labels * (2 if fraction else 4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_with_checkpointing(reentrant, tiny_gpt2, tmp_path) -> None:
    own = {"optim_args": "rho=0.2,hessian_batch_fraction=1.0", "max_steps": 1}
    expected = hessians_of(run(adapted(tiny_gpt2(), "lora"), tmp_path, **own))
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        "max_steps": 1,
        **(own if reentrant else {"optim_args": "rho=0.2"}),
    }
    actual = hessians_of(run(adapted(tiny_gpt2(), "lora"), tmp_path, **options))
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, other)
        assert one.max() > 0


def test_hutchinson_with_lora(tiny_gpt2, tmp_path) -> None:
    options = {"optim_args": "hessian_computation_type=hutchinson", "max_steps": 2}
    trainer = run(adapted(tiny_gpt2(), "lora"), tmp_path, **options)
    assert all(h.abs().max() > 0 for h in hessians_of(trainer))


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "</s>", *(f"w{i}" for i in range(30))]
    backend = Tokenizer(models.WordLevel(dict(zip(words, range(33), strict=True)), "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )


def tune(trl, trainer_class, model, tmp_path, callback=None, lora=False, **options):
    """Fine-tune on sentences of ten words."""
    rows = [{"text": " ".join(f"w{(i + 3 * j) % 30}" for j in range(10))} for i in range(32)]
    adapters = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    values = {
        "optim": "sophia",
        "optim_args": "rho=0.2,k=2",
        "learning_rate": 5e-3,
        "max_steps": 5,
        "max_length": 24,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **options,
    }
    trainer = trainer_class(
        model=model,
        args=trl.SFTConfig(str(tmp_path), **values),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        callbacks=[callback] if callback else None,
        peft_config=adapters if lora else None,
    )
    trainer.train()
    return trainer


TOKENS = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2}


@pytest.mark.parametrize("how", ["mixin", "injected"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_trls_supervised_fine_tuning(how, lora, packing, tiny_gpt2, tmp_path) -> None:
    trl = pytest.importorskip("trl")

    class Mixed(SophiaTrainerMixin, trl.SFTTrainer):
        pass

    trainer_class = Mixed if how == "mixin" else with_mixin(trl.SFTTrainer)
    recorder, model = Recorder(), tiny_gpt2(**TOKENS)
    packed = {"packing": packing, "packing_strategy": "wrapped"}
    trainer = tune(trl, trainer_class, model, tmp_path, recorder, lora, **packed)
    assert recorder.refreshed == [1, 3, 5]
    assert all(h.max() > 0 for h in hessians_of(trainer))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert all("mean_token_accuracy" in entry for entry in logs)
    if not packing:
        # Ten words and an end, of which ten have a predecessor, in a quarter of eight texts.
        assert logs[0]["sophia/hessian_tokens"] == 2 * 10


def test_trls_training_does_not_notice_a_refresh(tiny_gpt2, tmp_path) -> None:
    trl = pytest.importorskip("trl")
    losses = []
    for optim in ("sophia", "adamw_torch"):
        torch.manual_seed(0)
        model = tiny_gpt2(**TOKENS, resid_pdrop=0.1, embd_pdrop=0.1)
        options = {"optim": optim, "optim_args": None, "learning_rate": 0.0}
        trainer = tune(trl, with_mixin(trl.SFTTrainer), model, tmp_path, **options)
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 1


def test_trls_fused_loss_has_no_second_derivative(tiny_gpt2, tmp_path) -> None:
    trl = pytest.importorskip("trl")
    options = {"optim_args": "hessian_computation_type=hutchinson"}
    with pytest.raises(ValueError, match="fused loss of TRL do not have"):
        tune(trl, with_mixin(trl.SFTTrainer), tiny_gpt2(**TOKENS), tmp_path, **options)
