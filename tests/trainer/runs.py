"""Tiny training runs that the tests of the Trainer share."""

from pathlib import Path

import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sophia import Sophia, SophiaTrainer

VOCABULARY = 37


def dataset(examples: int = 64, length: int = 12, ignored: float = 0.0) -> list[dict]:
    """Sequences that a small model can learn: each token is the last plus a fixed stride."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(examples):
        start = int(torch.randint(VOCABULARY, (), generator=generator))
        ids = (start + 3 * torch.arange(length)) % VOCABULARY
        drop = torch.rand(length, generator=generator) < ignored
        rows.append({"input_ids": ids, "labels": ids.masked_fill(drop, -100)})
    return rows


def arguments(folder: Path, **options) -> TrainingArguments:
    defaults = {
        "optim": "sophia",
        "optim_args": "rho=0.2,k=10",
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "per_device_train_batch_size": 4,
        "max_steps": 30,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(folder, **{**defaults, **options})


def sophia_of(trainer: Trainer) -> Sophia:
    return trainer.optimizer.optimizer


class Recorder(TrainerCallback):
    """Notes the Hessians before and after each step, and those that changed."""

    def __init__(self) -> None:
        self.refreshed: list[int] = []
        self.hessians: dict[int, list[torch.Tensor]] = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        held = [s["hessian"].clone() for s in optimizer.state.values()]
        last = self.hessians[max(self.hessians)] if self.hessians else []
        # No state yet is as good as a state of zeros.
        last = last or [torch.zeros_like(h) for h in held]
        if not all(torch.equal(a, b) for a, b in zip(held, last, strict=True)):
            self.refreshed.append(state.global_step + 1)
        self.hessians[state.global_step + 1] = held


class Gradients(TrainerCallback):
    """Notes the gradients that each step trains on."""

    def __init__(self) -> None:
        self.of_steps: list[list[torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        grads = [param.grad.clone() for param in model.parameters() if param.grad is not None]
        self.of_steps.append(grads)


def run(
    model, folder, data=None, callback=None, trainer_class=SophiaTrainer, extra=None, **options
):
    trainer = trainer_class(
        model,
        arguments(folder, **options),
        train_dataset=data or dataset(),
        callbacks=[callback] if callback else None,
        **(extra or {}),
    )
    trainer.train()
    return trainer


def hessians_of(trainer: Trainer) -> list[torch.Tensor]:
    state = sophia_of(trainer).state
    return [state[p]["hessian"] for g in trainer.optimizer.param_groups for p in g["params"]]


def first_hessian(tiny_gpt2, folder, **options) -> list[torch.Tensor]:
    return hessians_of(run(tiny_gpt2(), folder, max_steps=1, **options))
