"""Every recipe pushes what it made, and the data where that is asked for; and starts from there."""

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard
from transformers import AutoModelForCausalLM

REPO = "user/of-a-recipe"
DATA = "user/rows"

TEXTS = [f"{i} times {i} is {i * i}." for i in range(200)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "pretrain_gpt2": [{"text": text} for text in TEXTS],
    "finetune_causal_lm": [{"source": t[: len(t) // 2], "summary": t} for t in TEXTS],
    "finetune_classification": [{"text": t, "label": i % 3} for i, t in enumerate(TEXTS)],
    "finetune_seq2seq": [{"source": text, "summary": text[::-1]} for text in TEXTS],
}


def run(recipe: str, folder: Path, **changes: Any) -> dict[str, float]:
    file = folder / "rows.jsonl"
    if not file.exists():
        file.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS[recipe]))
    values = {
        "output_dir": folder / "run",
        "train_file": file,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "vocab_size": 270,
        "max_steps": 4,
        "warmup_steps": 1,
        "eval_steps": 4,
        "save_steps": 2,
        "logging_steps": 2,
        "per_device_train_batch_size": 8,
        "disable_tqdm": True,
        "use_cpu": True,
        "push_to_hub": True,
        "hub_model_id": REPO,
        "hub_strategy": "checkpoint",
        "hub_always_push": True,
        **({"block_size": 16} if recipe == "pretrain_gpt2" else {}),
    }
    argv = [f"--{k}={v}" for k, v in (values | changes).items() if v is not None]
    return importlib.import_module(recipe).main(argv)


@pytest.mark.parametrize("recipe", ROWS)
def test_a_recipe_pushes_model_card_checkpoint_and_data(hub, tmp_path, recipe, capfd) -> None:
    metrics = run(recipe, tmp_path, hub_dataset_id=DATA)
    files = hub.files(REPO)
    for name in ("model.safetensors", "tokenizer.json", "corpus.json", "loss.png"):
        assert files[name] == (tmp_path / "run" / name).read_bytes()
    assert "last-checkpoint/optimizer.pt" in files
    card = ModelCard.load(REPO)
    card.validate()
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["loss"] == metrics["eval_loss"]
    assert "sophia" in card.data.tags
    assert json.loads(files["corpus.json"])["sha256"] in card.text
    assert "rows.jsonl" in card.text
    assert str(tmp_path) not in card.content

    pushed = load_dataset(DATA)
    assert sum(map(len, pushed.values())) == len(TEXTS)
    of_data = DatasetCard.load(DATA)
    of_data.validate()
    assert "hf_sophia" in of_data.data.tags
    assert json.loads(files["corpus.json"])["sha256"] in of_data.text
    assert str(tmp_path) not in of_data.content
    assert f"https://huggingface.co/datasets/{DATA}" in capfd.readouterr().out


def test_pushed_data_and_a_pushed_checkpoint_carry_on_elsewhere(hub, tmp_path, caplog) -> None:
    run("pretrain_gpt2", tmp_path, hub_dataset_id=DATA)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with caplog.at_level(logging.INFO, "hf_sophia"):
        run(
            "pretrain_gpt2",
            elsewhere,
            train_file=None,
            dataset_name=DATA,
            tokenizer_name=REPO,
            resume_from_checkpoint=f"hub:{REPO}",
            max_steps=6,
        )
    assert f"resuming from hub:{REPO}" in caplog.text
    state = json.loads((elsewhere / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    assert [e["step"] for e in state["log_history"] if "loss" in e] == [2, 4, 6]
    card = ModelCard.load(REPO)
    assert card.data.datasets == [DATA]
    assert AutoModelForCausalLM.from_pretrained(REPO).num_parameters() > 0


def test_the_model_that_came_from_the_hub_is_named_with_its_licence(hub, tmp_path) -> None:
    run("pretrain_gpt2", tmp_path, block_size=64)
    base = ModelCard.load(REPO)
    base.data.license = "mit"
    base.push_to_hub(REPO)
    other = tmp_path / "other"
    other.mkdir()
    lengths = {"max_source_length": 40, "max_target_length": 20}
    options = {"model_name_or_path": REPO, "hub_model_id": "user/further", **lengths}
    run("finetune_causal_lm", other, **options)
    card = ModelCard.load("user/further")
    assert (card.data.base_model, card.data.license) == (REPO, "mit")
    assert "trained from scratch" not in card.text


def test_a_push_that_fails_ends_a_recipe_in_an_error_with_all_on_the_disk(hub, tmp_path) -> None:
    hub.fail("POST", "/commit/", status=403)
    with pytest.raises(SystemExit, match="error: the model was not pushed to user/of-a-recipe"):
        run("pretrain_gpt2", tmp_path)
    for name in ("model.safetensors", "trainer_state.json", "corpus.json", "loss.png", "README.md"):
        assert (tmp_path / "run" / name).is_file()


def test_data_that_can_not_be_pushed(hub, tmp_path) -> None:
    with pytest.raises(SystemExit, match="hub_dataset_id='user/rows': rows that are streamed"):
        run("pretrain_gpt2", tmp_path, hub_dataset_id=DATA, streaming=True, tokenizer_name=REPO)
    hub.fail("POST", "/api/datasets/", status=403)
    with pytest.raises(SystemExit, match="error: .*403"):
        run("pretrain_gpt2", tmp_path, hub_dataset_id=DATA, push_to_hub=False)
