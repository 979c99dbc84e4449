"""The recipes for GPT-2 on OpenWebText: their real shapes on paper, and a run of a scaled copy."""

import itertools
import json
from pathlib import Path

import pretrain_gpt2
import pytest
import torch
from common.arguments import parse_arguments
from common.models import make_gpt2
from common.tokenization import train_tokenizer
from datasets import Dataset
from transformers import AutoModelForCausalLM

CONFIGS = Path(pretrain_gpt2.__file__).parent / "configs"

#: Parameters of OpenAI's models of these shapes, as transformers counts them.
SIZES = {"125m": 124_439_808, "355m": 354_823_168, "770m": 774_030_080}


class VocabularyOfGPT2:
    """What a model's configuration takes from the tokenizer."""

    bos_token_id = eos_token_id = 50256
    pad_token_id = None

    def __len__(self) -> int:
        return 50257


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_the_real_shape_and_batch_are_the_published_ones(name, size) -> None:
    model_args, corpus_args, args = parse_arguments(
        pretrain_gpt2.ARGUMENTS, ["--bf16=false"], CONFIGS / f"gpt2_{name}.yaml"
    )
    with torch.device("meta"):
        model = make_gpt2(model_args, VocabularyOfGPT2(), model_args.block_size)
    assert model.num_parameters() == size
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 10 == 480
    assert model_args.block_size == 1024
    assert corpus_args.streaming
    assert args.lr_scheduler_kwargs["min_lr"] < args.learning_rate


@pytest.fixture
def offline(tmp_path) -> list[str]:
    """Options that put local text, a local tokenizer and a tiny shape in place of the real ones."""
    texts = [f"Document {i} says that {i} and {i} make {2 * i}. " * 8 for i in range(400)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    train_tokenizer(Dataset.from_dict({"text": texts}), 280).save_pretrained(tmp_path / "tokenizer")
    values = {
        "dataset_name": "",
        "train_file": tmp_path / "text.jsonl",
        "tokenizer_name": tmp_path / "tokenizer",
        "validation_documents": 8,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 32,
        "per_device_train_batch_size": 4,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": tmp_path / "run",
        "warmup_steps": 1,
    }
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.mark.parametrize("name", SIZES)
def test_a_scaled_copy_trains(name, offline, tmp_path, capsys) -> None:
    argv = [f"--config={CONFIGS / f'gpt2_{name}.yaml'}", *offline]
    metrics = pretrain_gpt2.main([*argv, "--max_steps=2", "--logging_steps=1"])
    assert 4.0 < metrics["eval_loss"] < 6.0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert all(entry["sophia/hessian_norm"] > 0 for entry in logged)
    assert "streamed" in capsys.readouterr().out
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run").config
    assert saved.scale_attn_by_inverse_layer_idx == (name != "125m")


@pytest.mark.parametrize("step", [3, 25], ids=["first pass", "third pass"])
def test_a_stream_resumes_where_it_was(step, offline, tmp_path) -> None:
    argv = [f"--config={CONFIGS / 'gpt2_125m.yaml'}", *offline, "--gradient_accumulation_steps=1"]
    argv += [f"--max_steps={2 * step}", f"--save_steps={step}", "--eval_strategy=no"]
    # 400 documents make fewer than 50 steps of 40 blocks.
    argv += ["--per_device_train_batch_size=40", "--logging_steps=1"]
    whole = pretrain_gpt2.main(argv)
    checkpoint = tmp_path / "run" / f"checkpoint-{step}"
    resumed = pretrain_gpt2.main([*argv, f"--resume_from_checkpoint={checkpoint}"])
    assert resumed["eval_loss"] == whole["eval_loss"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--tokenizer_name=", "streaming needs --tokenizer_name"),
        ("--max_steps=-1", "streaming needs --max_steps"),
        ("--dataloader_num_workers=2", "set --dataloader_num_workers 0"),
        ("--validation_documents=0", "validation_documents must be at least 1, got 0"),
        ("--validation_documents=400", "the training text is too short"),
        ("--text_column=body", "has no column 'body'"),
    ],
)
def test_a_stream_that_cant_be_used_is_refused(option, message, offline, ends_in_one_line) -> None:
    argv = [f"--config={CONFIGS / 'gpt2_125m.yaml'}", *offline, "--max_steps=2", option]
    ends_in_one_line(pretrain_gpt2.main, argv, message)


def test_each_pass_has_every_block_once_in_another_order(offline) -> None:
    argv = [f"--config={CONFIGS / 'gpt2_125m.yaml'}", *offline, "--max_steps=2"]
    trainer = pretrain_gpt2.prepare(argv).trainer
    text = next(Path(option.split("=")[1]) for option in offline if "train_file" in option)
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    encoded = trainer.processing_class(documents[8:])["input_ids"]
    count = sum(len(ids) + 1 for ids in encoded) // 32
    stream = itertools.islice(trainer.train_dataset, 2 * count)
    rows = [tuple(row["input_ids"]) for row in stream]
    assert count > 1000
    assert sorted(rows[:count]) == sorted(rows[count:])
    assert rows[:count] != rows[count:]


def test_held_out_documents_are_not_trained_on(offline) -> None:
    argv = [f"--config={CONFIGS / 'gpt2_125m.yaml'}", *offline, "--max_steps=2"]
    trainer = pretrain_gpt2.prepare(argv).trainer
    texts = [
        {tuple(row["input_ids"]) for row in itertools.islice(rows, 3000)}
        for rows in (trainer.train_dataset, trainer.eval_dataset)
    ]
    assert len(texts[0]) > 100
    assert len(texts[1]) > 5
    assert not texts[0] & texts[1]
