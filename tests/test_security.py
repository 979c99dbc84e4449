"""No code from data, and no token where others read."""

import ast
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pretrain_gpt2
import pytest
import torch
from common.arguments import without_secrets
from common.models import ModelArguments, load_tokenizer
from trainer.runs import arguments, dataset

from hf_sophia import SophiaTrainer

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / name for name in ("hf_sophia", "recipes", "benchmarks")]
SOURCES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))

#: What runs code that it reads.
UNSAFE = {"eval", "exec", "system", "popen", "loads", "load", "dump", "dumps", "Unpickler"}
SECRETS = ("hf_secretOfTheCommandLine123456", "hf_secretOfTheEnvironment1234567")


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        owner, _, method = name.rpartition(".")
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
        elif name == "yaml.load":
            assert keywords.get("Loader") in ("_Loader", "yaml.BaseLoader", "yaml.SafeLoader")
        else:
            # The launcher runs the script that it is given: that is its purpose. Triton's language
            # loads numbers out of a device's memory, cards are text with YAML's plain values.
            harmless = owner in ("json", "evaluate", "tl", "ModelCard", "DatasetCard") or (
                path.name,
                name,
            ) == (
                "run.py",
                "exec",
            )
            assert harmless or method not in UNSAFE, f"{path}:{node.lineno} calls {name}"
        assert keywords.get("trust_remote_code", "False") == "False", f"{path}:{node.lineno}"
        assert keywords.get("shell", "False") == "False", f"{path}:{node.lineno}"
        if method == "from_pretrained" and "trainer" not in path.parts:
            assert "trust_remote_code" in keywords, f"{path}:{node.lineno}"


def test_a_models_own_code_is_not_run(tmp_path) -> None:
    proof = tmp_path / "was_here"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass A: pass\n")
    code = {"AutoConfig": "code.A", "AutoTokenizer": ["code.A", None]}
    config = {"model_type": "unheard", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": code}))
    with pytest.raises(ValueError, match="can't load"):
        load_tokenizer(ModelArguments(model_name_or_path=str(folder)), dataset())
    assert not proof.exists()


def test_a_pickled_object_in_an_optimizer_file_is_not_run(tiny_gpt2, tmp_path) -> None:
    proof = tmp_path / "was_here"

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(proof),))

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = SophiaTrainer(tiny_gpt2(), arguments(tmp_path, **options), train_dataset=dataset())
    trainer.train()
    torch.save({"state": Bomb()}, tmp_path / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer\.pt can't be loaded"):
        trainer.train(resume_from_checkpoint=True)
    assert not proof.exists()


@pytest.fixture
def secrets_given(monkeypatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, SECRETS[1])


def assert_no_secret_in(*texts: str) -> None:
    for text in texts:
        for secret in SECRETS:
            assert secret not in text


def written_files(folder: Path) -> list[str]:
    """Everything that was written, the pickled arguments included, as what letters it holds."""
    return [p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file()]


def test_logs_cards_and_errors_of_a_trainer_hold_no_token(
    secrets_given, tiny_gpt2, tmp_path, caplog, capfd
) -> None:
    options = {"hub_token": SECRETS[0], "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    trainer = SophiaTrainer(tiny_gpt2(), arguments(tmp_path, **options), train_dataset=dataset())
    with caplog.at_level(logging.DEBUG):
        trainer.train()
    trainer.create_model_card()
    trainer.save_state()
    texts = written_files(tmp_path)
    assert any("base_model" in text or "library_name" in text for text in texts), "no card"
    assert_no_secret_in(caplog.text, *capfd.readouterr(), *texts, str(trainer.args))
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="can't be loaded") as error:
        trainer.train(resume_from_checkpoint=True)
    assert_no_secret_in(str(error.value))
    bad = arguments(tmp_path, optim_args="rhoo=1", hub_token=SECRETS[0])
    refused = SophiaTrainer(tiny_gpt2(), bad, train_dataset=dataset())
    with pytest.raises(ValueError, match="optim_args") as error:
        refused.train()
    assert_no_secret_in(str(error.value))


def test_what_a_recipe_prints_and_writes_holds_no_token(
    secrets_given, tmp_path, capsys, caplog
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{i} times {i} is {i * i}." for i in range(2000)))
    values = {
        "output_dir": tmp_path / "run", "train_file": text, "n_layer": 1, "n_head": 2, "n_embd": 16,
        "block_size": 16, "vocab_size": 270, "max_steps": 4, "use_cpu": True,
    }  # fmt: skip
    argv = [f"--{name}={value}" for name, value in values.items()]
    with caplog.at_level(logging.DEBUG):
        pretrain_gpt2.main([*argv, "--hub_token", SECRETS[0]])
    printed = capsys.readouterr()
    assert "try next" in printed.out
    assert_no_secret_in(*printed, caplog.text, *written_files(tmp_path / "run"))


def test_a_command_line_is_shown_without_its_tokens() -> None:
    argv = ["--a", "1", "--hub_token", "x", "--b=2", "--hub_token=y", "--flag", "--hub_token"]
    assert without_secrets(argv) == ["--a", "1", "--b=2", "--flag"]


def test_a_broken_configuration_does_not_quote_its_lines(tmp_path, capsys) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"max_steps: 3\nhub_token: [{SECRETS[0]}\n")
    with pytest.raises(SystemExit):
        pretrain_gpt2.main(["--config", str(config)])
    printed = capsys.readouterr()
    assert "not YAML, line" in printed.err
    assert_no_secret_in(*printed)


def test_the_launcher_shows_no_token(secrets_given, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom transformers import TrainingArguments, HfArgumentParser\n"
        "args, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()\n"
        "print(args)\nraise ValueError(args.optim)\n"
    )
    result = subprocess.run(
        [
            sys.executable, "-m", "hf_sophia.run", script, "--optim", "sophia",
            "--output_dir", tmp_path / "out", "--hub_token", SECRETS[0],
        ],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert "ValueError: " in result.stderr
    assert "<HUB_TOKEN>" in result.stdout
    assert_no_secret_in(result.stdout, result.stderr)
