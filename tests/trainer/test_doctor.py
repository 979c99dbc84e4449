"""The doctor's command line, on scripts that know nothing of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_sophia import doctor

from .processes import own_environment

SCRIPT = """
import sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=37, n_positions=12, n_embd=8, n_layer=1, n_head=2,
               bos_token_id=0, eos_token_id=0)
)
ids = torch.randint(37, (64, 12))
trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
if args.do_train:
    try:
        trainer.train()
    except BaseException:
        pass
    finally:
        trainer.save_model()
        print("trained")
"""


@pytest.fixture
def run_doctor(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def run(*options: str, script: Path = script, own: tuple[str, ...] = ()):
        fixed = ["--output_dir", str(tmp_path / "out"), "--report_to", "none", "--use_cpu"]
        argv = ["-m", "hf_sophia.doctor", *own, str(script), *fixed, *options]
        return subprocess.run(
            [sys.executable, *argv], capture_output=True, text=True, env=own_environment()
        )

    return run


def test_an_unmodified_script_is_examined_and_does_not_train(run_doctor, tmp_path) -> None:
    own = ("--steps", "6", "--adamw-lr", "3e-3")
    ended = run_doctor("--do_train", "--optim", "sophia", "--optim_args", "rho=auto", own=own)
    assert ended.returncode == 0, ended.stderr
    assert "# hf-sophia doctor" in ended.stdout
    assert "| predictions in a refresh | 88 " in ended.stdout
    assert "against AdamW's 0.003" in ended.stdout
    assert "\ntrained\n" not in ended.stdout
    assert not list((tmp_path / "out").glob("*"))


def test_a_run_that_would_fail_is_told_by_the_exit_code(run_doctor) -> None:
    ended = run_doctor("--do_train", "--optim", "sophia", "--optim_args", "colour=1")
    assert ended.returncode == 1
    assert "- error: optim_args 'colour=1': unknown option 'colour'" in ended.stdout
    assert "Recommended" not in ended.stdout


@pytest.mark.parametrize("last_line", ["", "sys.exit(0)"])
def test_a_script_that_does_not_train_is_an_error(run_doctor, tmp_path, last_line) -> None:
    script = tmp_path / "own.py"
    script.write_text(f"{SCRIPT}{last_line}\n")
    ended = run_doctor(script=script)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("hf-sophia doctor: the script ended without training")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "3", "x.py"], "--steps must be at least 4, got 3"),
        (["--adamw-lr", "0", "x.py"], "--adamw-lr must be > 0 and finite, got 0.0"),
        (["--adamw-lr", "inf", "x.py"], "--adamw-lr must be > 0 and finite, got inf"),
        (["no_such.py"], "no such file"),
        ([], "the following arguments are required: script"),
    ],
)
def test_bad_command_lines_are_refused(argv, message, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        doctor.main(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
