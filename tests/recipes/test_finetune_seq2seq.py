"""The recipe for encoder-decoder models, with and without generated texts."""

import numpy as np
import pytest
from common.models import ModelArguments, load_tokenizer
from common.tokenization import END_OF_TEXT
from datasets import Dataset
from finetune_seq2seq import GeneratedText, main
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, EvalPrediction

PAIRS = [{"source": f"{i} times {i} is", "summary": f"the square of {i}"} for i in range(80)]
SIZES = {"max_source_length": 24, "max_target_length": 16}


def test_a_fresh_model_learns_saves_and_resumes(
    options, write_rows, check_history, same_weights, tmp_path, capsys
) -> None:
    argv = options(train_file=write_rows(PAIRS), **SIZES)
    metrics = main(argv)
    output = tmp_path / "run"
    printed = capsys.readouterr().out
    assert "76 rows to train on, 4 to evaluate on; T5ForConditionalGeneration" in printed
    assert f"evaluation loss {metrics['eval_loss']:.4f} nats per token\n" in printed
    assert "eval_f1" not in metrics
    check_history(output)

    model = AutoModelForSeq2SeqLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("3 times 3 is", return_tensors="pt")["input_ids"]
    assert ids[0, -1] == tokenizer.eos_token_id == model.config.eos_token_id
    assert model.generate(ids, max_new_tokens=3).shape[1] <= 4
    resumed = main([*argv, "--resume_from_checkpoint", str(output / "checkpoint-6")])
    assert resumed["eval_loss"] == metrics["eval_loss"]
    assert same_weights(model, AutoModelForSeq2SeqLM.from_pretrained(output))


def test_generated_texts_are_compared_on_demand(options, write_rows, capsys) -> None:
    pairs = [{"source": f"number {i}", "summary": "the same"} for i in range(60)]
    argv = options(
        train_file=write_rows(pairs), predict_with_generate=True, max_steps=60, eval_steps=60,
        learning_rate=2e-2, **SIZES
    )  # fmt: skip
    metrics = main(argv)
    assert metrics["eval_f1"] > 0.9
    assert metrics["eval_exact_match"] > 0.9
    assert f"(word F1 {metrics['eval_f1']:.3f}," in capsys.readouterr().out


def test_texts_are_compared_by_words() -> None:
    tokenizer = load_tokenizer(
        ModelArguments(vocab_size=270), Dataset.from_dict({"text": ["a b"]}), f"$A {END_OF_TEXT}"
    )

    def padded(*texts: str) -> np.ndarray:
        rows = [tokenizer(text)["input_ids"] for text in texts]
        longest = max(map(len, rows))
        return np.array([row + [-100] * (longest - len(row)) for row in rows])

    generated = padded("set the door", "open it", "", "x")
    wanted = padded("open the door", "open it", "", "a longer text than that")
    metrics = GeneratedText(tokenizer)(EvalPrediction(generated, wanted))
    assert metrics["exact_match"] == 0.5
    assert metrics["f1"] == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)


def test_a_folder_is_fine_tuned_further(options, write_rows, tmp_path, capsys) -> None:
    base, file = tmp_path / "base", write_rows(PAIRS)
    first = main(options(train_file=file, output_dir=base, **SIZES))
    argv = options(train_file=file, model_name_or_path=base, max_steps=6, **SIZES)
    second = main(argv)
    assert f"weights of {base}" in capsys.readouterr().out
    assert second["eval_loss"] < first["eval_loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_column": "question"}, "has no column 'question', only"),
        ({"train_file": "nowhere.jsonl"}, "'nowhere.jsonl' does not exist"),
        ({"max_source_length": 1}, "max_source_length must be at least 2, got 1"),
        ({"vocab_size": 100}, "vocab_size must be at least 257"),
        ({"model_name_or_path": "tests"}, "can't load 'tests' with AutoTokenizer"),
    ],
)
def test_bad_input_ends_in_one_line(
    changes, message, options, write_rows, ends_in_one_line
) -> None:
    file = write_rows(PAIRS)
    ends_in_one_line(main, options(**{"train_file": file, **SIZES, **changes}), message)
