"""The recipe for causal language models: whole, by LoRA, and with bad input."""

import json
import sys
from pathlib import Path

import pretrain_gpt2
import pytest
import torch
from common.models import ModelArguments, load_tokenizer
from datasets import Dataset
from finetune_causal_lm import PromptArguments, PromptEncoder, main
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

PAIRS = [{"source": f"{i} times {i} is", "summary": f"the square of {i}"} for i in range(80)]
SIZES = {"max_source_length": 40, "max_target_length": 16}


@pytest.fixture(scope="module")
def tokenizer():
    texts = Dataset.from_list(PAIRS)
    return load_tokenizer(ModelArguments(vocab_size=270), texts)


def test_only_the_completion_and_its_end_are_labels(tokenizer) -> None:
    arguments = PromptArguments(separator=" -> ", max_source_length=10, max_target_length=6)
    encoded = PromptEncoder(tokenizer, arguments)(
        {"source": ["abc", "a" * 50], "target": ["xy", "x" * 50]}
    )
    for ids, labels in zip(encoded["input_ids"], encoded["labels"], strict=True):
        kept = [label for label in labels if label != -100]
        assert len(ids) == len(labels)
        assert ids[-len(kept) :] == kept
        assert set(labels[: -len(kept)]) == {-100}
    short, cut = encoded["input_ids"]
    assert tokenizer.decode(short) == "abc -> xy<|endoftext|>"
    # What is cut keeps the separator whole, and does not pretend to end.
    assert " -> x" in tokenizer.decode(cut)
    assert len(cut) == 16
    assert tokenizer.eos_token_id not in cut


def test_a_fresh_model_learns_saves_and_resumes(
    options, write_rows, check_history, same_weights, tmp_path, capsys
) -> None:
    argv = options(train_file=write_rows(PAIRS), **SIZES)
    metrics = main(argv)
    output = tmp_path / "run"
    printed = capsys.readouterr().out
    assert "76 rows to train on, 4 to evaluate on; GPT2LMHeadModel" in printed
    assert "fresh weights" in printed
    assert f"evaluation loss {metrics['eval_loss']:.4f}" in printed
    check_history(output)
    assert set(metrics) >= {"eval_perplexity", "eval_bits_per_byte", "eval_accuracy"}
    assert (output / "loss.png").exists()
    assert len(json.loads((output / "corpus.json").read_text())["sha256"]) == 64

    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.pad_token == "<|pad|>"
    assert model.config.vocab_size == len(tokenizer)
    resumed = main([*argv, "--resume_from_checkpoint", str(output / "checkpoint-6")])
    assert resumed["eval_loss"] == metrics["eval_loss"]
    assert same_weights(model, AutoModelForCausalLM.from_pretrained(output))


@pytest.fixture
def base(options, tmp_path) -> Path:
    """What the pretraining recipe leaves behind, with a tokenizer that has no padding."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{i} times {i} is the square of {i}." for i in range(300)))
    folder = tmp_path / "base"
    pretrain_gpt2.main(options(train_file=text, output_dir=folder, block_size=56, max_steps=60))
    return folder


def test_adapters_train_save_and_load_on_their_base(
    base, options, write_rows, check_history, tmp_path, capsys
) -> None:
    file = write_rows(PAIRS)
    argv = options(
        train_file=file,
        model_name_or_path=base,
        lora_r=4,
        learning_rate=0.1,
        max_steps=24,
        **SIZES,
    )
    metrics = main(argv)
    output = tmp_path / "run"
    check_history(output)
    # Rank 4 on the fused attention: 16 to 48.
    assert f", {4 * (16 + 48)} of them trained; weights of {base}" in capsys.readouterr().out
    assert not (output / "model.safetensors").exists()

    adapted = AutoPeftModelForCausalLM.from_pretrained(output)
    assert adapted.peft_config["default"].r == 4
    assert adapted.peft_config["default"].lora_alpha == 8
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer(PAIRS[0]["source"], return_tensors="pt")["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        assert not torch.equal(adapted(ids).logits, plain(ids).logits)
        with adapted.disable_adapter():
            assert torch.equal(adapted(ids).logits, plain(ids).logits)
    resumed = main([*argv, "--resume_from_checkpoint", str(output / "checkpoint-18")])
    assert resumed["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)


def test_a_missing_peft_is_named(base, options, write_rows, ends_in_one_line, monkeypatch) -> None:
    file = write_rows(PAIRS)
    monkeypatch.setitem(sys.modules, "peft", None)
    argv = options(train_file=file, model_name_or_path=base, lora_r=4, **SIZES)
    ends_in_one_line(main, argv, "lora_r=4 needs PEFT: pip install peft")


def test_examples_longer_than_the_window_are_named(
    base, options, write_rows, ends_in_one_line
) -> None:
    file = write_rows(PAIRS)
    argv = options(train_file=file, model_name_or_path=base, max_source_length=99)
    ends_in_one_line(main, argv, "examples of up to 131 tokens do not fit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_column": "question"}, "has no column 'question', only"),
        ({"target_column": "answer"}, "name it with --target_column"),
        ({"target_column": "number"}, "column 'number' of"),
        ({"train_file": "nowhere.jsonl"}, "'nowhere.jsonl' does not exist"),
        ({"lora_r": 4}, "give --model_name_or_path"),
        ({"lora_r": -1}, "lora_r must not be negative, got -1"),
        ({"max_source_length": 3}, "max_source_length=3 has no room for a prompt"),
        ({"max_target_length": 1}, "max_target_length must be at least 2, got 1"),
        ({"model_name_or_path": "tests"}, "can't load 'tests' with AutoTokenizer"),
        ({"optim_args": "rho=-1"}, "rho must be a finite number > 0, got -1.0"),
        ({"resume_from_checkpoint": "last"}, "there is no whole checkpoint in"),
        ({"num_train_epochs": 2}, "set --max_steps -1"),
    ],
)
def test_bad_input_ends_in_one_line(
    changes, message, options, write_rows, ends_in_one_line
) -> None:
    file = write_rows([pair | {"number": 1} for pair in PAIRS])
    ends_in_one_line(main, options(**{"train_file": file, **SIZES, **changes}), message)


def test_too_little_data_is_named(options, write_rows, tmp_path, ends_in_one_line) -> None:
    single = write_rows(PAIRS[:1])
    ends_in_one_line(main, options(train_file=single), "has a single row")
    blank = write_rows([{"source": "a", "summary": " "}])
    ends_in_one_line(main, options(train_file=blank), "holds no text: every document is blank")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    ends_in_one_line(main, options(train_file=empty), "empty.jsonl' is empty")


def test_a_tokenizer_without_an_end_is_named(tokenizer) -> None:
    endless = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<|pad|>")
    with pytest.raises(ValueError, match="no eos_token, which ends each completion"):
        PromptEncoder(endless, PromptArguments())
