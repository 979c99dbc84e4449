"""Tiny runs that push, which the tests of pushing share."""

from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, TrainingArguments

from hf_sophia import SophiaTrainer, TrainingCorpus

REPO = "user/tiny"


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 37, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_of(folder: Path, model: GPT2LMHeadModel, **options: object) -> SophiaTrainer:
    arguments = {
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "learning_rate": 1e-2,
        "optim": "sophia",
        "optim_args": "k=2",
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "push_to_hub": True,
        "hub_model_id": REPO,
        **options,
    }
    data = rows()
    trainer = SophiaTrainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=data,
        eval_dataset=data[:8],
    )
    trainer.corpus = TrainingCorpus("random tokens", content="sha256 12ab", licence="CC0-1.0")
    trainer.hub_timeout = 5.0
    return trainer


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def folders_of(hub, repo: str = REPO) -> set[str]:
    return {path.split("/")[0] for path in hub.files(repo) if "/" in path}
