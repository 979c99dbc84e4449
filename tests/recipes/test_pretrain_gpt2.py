"""The recipe from its command line to a model that loads."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pretrain_gpt2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"{i} times {i} is {i * i}." for i in range(2000)))
    return path


def options(tmp_path: Path, text_file: Path) -> list[str]:
    values = {
        "output_dir": tmp_path / "run",
        "train_file": text_file,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 16,
        "vocab_size": 270,
        "max_steps": 12,
        "warmup_steps": 2,
        "eval_steps": 6,
        "save_steps": 6,
        "logging_steps": 3,
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return [piece for name, value in values.items() for piece in (f"--{name}", str(value))]


def test_the_recipe_trains_evaluates_saves_and_resumes(text_file, tmp_path, capsys) -> None:
    argv = options(tmp_path, text_file)
    metrics = pretrain_gpt2.main(argv)
    printed = capsys.readouterr().out
    output = tmp_path / "run"
    assert f"evaluation loss {metrics['eval_loss']:.4f}" in printed
    assert str(output / "loss.png") in printed
    assert "try next" in printed
    assert f"--train_file {text_file}" in printed
    assert f"--output_dir {output}_adamw" in printed
    assert "loss_type" not in printed
    assert set(metrics) >= {
        "eval_loss",
        "eval_perplexity",
        "eval_bits_per_byte",
        "eval_accuracy",
    }
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert all(entry["sophia/hessian_norm"] > 0 for entry in logged)
    assert logged[0]["sophia/hessian_tokens"] == 4 * 15
    assert logged[-1]["loss"] < logged[0]["loss"]
    record = json.loads((output / "corpus.json").read_text())
    assert len(record["sha256"]) == 64
    assert (output / "loss.png").stat().st_size > 5_000

    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("12 times 12", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))

    resumed = pretrain_gpt2.main([*argv, "--resume_from_checkpoint", str(output / "checkpoint-6")])
    assert pretrain_gpt2.main([*argv, "--resume_from_checkpoint", "last"]) is not None
    assert "--resume_from_checkpoint=" in capsys.readouterr().out
    assert resumed["eval_loss"] == metrics["eval_loss"]
    again = AutoModelForCausalLM.from_pretrained(output)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_next_command_runs_too(text_file, tmp_path, capsys) -> None:
    argv = [*options(tmp_path, text_file), "--max_steps", "2"]
    for _ in range(2):
        pretrain_gpt2.main(argv)
        command = shlex.split(capsys.readouterr().out.partition("try next")[2].strip())
        argv = command[2:]
    assert argv[-1] == str(tmp_path / "run_adamw_sophia")
    assert argv[argv.index("--train_file") + 1] == str(text_file)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--train_file", "nowhere.txt"], "error: data file 'nowhere.txt' does not exist"),
        (["--block_size", "100000"], "error: the training text is too short"),
        (["--n_head", "3"], "error: n_embd=16 is not a multiple of n_head=3"),
        (["--block_size", "0"], "error: block_size must be at least 2, got 0"),
        (["--optim_args", "rho=-1"], "error: rho must be a finite number > 0, got -1.0"),
        (["--optim", "adam", "--optim_args", "rho=0.1"], "error: optim_args 'rho=0.1"),
        (["--resume_from_checkpoint", "last"], "error: there is no whole checkpoint in"),
        (["--resume_from_checkpoint", "recipes"], "error: there is no checkpoint at 'recipes'"),
        (["--max_steps", "5", "--num_train_epochs", "2"], "set --max_steps -1"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
    ],
)
def test_bad_input_ends_in_one_line(extra, message, text_file, tmp_path) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "recipes/pretrain_gpt2.py", *options(tmp_path, text_file), *extra],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert message in result.stderr.strip().splitlines()[-1]
