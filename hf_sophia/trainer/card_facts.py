"""What a model card states, taken from the objects that trained the model."""

import numbers
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from transformers.modelcard import TASK_MAPPING

from hf_sophia.optim import Adam, RAdam, Sophia
from hf_sophia.optim.sophia_options import AUTO
from hf_sophia.trainer.trainer_sophia import TrainerSophia

_TITLES = {
    "gnb": "Sophia-G (Gauss-Newton-Bartlett)",
    "hutchinson": "Sophia-H (Hutchinson)",
}

#: Of an optimizer's options, those that only choose how the same step is computed.
_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable", "maximize"})

#: What Sophia's groups keep of its state, which is no option.
_STATE = frozenset({"refreshed_step", "hessian_weight"})

_SPEED = re.compile(r".*_(runtime|per_second|model_preparation_time)|epoch|step")


@dataclass(frozen=True)
class TrainingCorpus:
    """What a model was trained on, for its card: `trainer.corpus = TrainingCorpus(...)`.

    Args:
        name: What to call it.
        content: What its content is known by, `"sha256 0a1b..."` for instance.
        licence: Its licence, where it is known.
        hub_id: Its name on the Hub, where it is there.
    """

    name: str
    content: str | None = None
    licence: str | None = None
    hub_id: str | None = None


@dataclass(frozen=True)
class RunFacts:
    """What a card states of a run that the Trainer itself does not keep.

    Args:
        class_name: The model's class.
        corpus: What the model was trained on, where that is known.
        pretrained: Whether weights were loaded before the training.
        base: Which model of the Hub they are of, where that is known.
        loaded_best: The step of the best checkpoint, where that was loaded at the end.
        schedule: The name of the learning rate's schedule, or None before there is one.
        earlier_steps: Optimizer steps of trainings before the present one, in this process.
        hessian: What to say of Sophia's Hessian, by name; empty with other optimizers.
    """

    class_name: str
    corpus: TrainingCorpus | None
    pretrained: bool
    base: str | None
    loaded_best: int | None
    schedule: str | None
    earlier_steps: int
    hessian: Mapping[str, Any]


def task_of(model: torch.nn.Module) -> str | None:
    """Return the Hub's name of what a model does, or None where its class does not say.

    Args:
        model: The model, not wrapped; subclasses count as what they are of.
    """
    for cls in type(model).__mro__:
        for task, mapping in TASK_MAPPING.items():
            for names in mapping.values():
                if cls.__name__ in ([names] if isinstance(names, str) else names):
                    return task
    return None


def scheduler_under(scheduler: Any) -> Any:
    """Return the scheduler under accelerate's wrapper.

    Args:
        scheduler: It, wrapped or not; None stays None.
    """
    return getattr(scheduler, "scheduler", scheduler)


def describe_optimizer(
    optimizer: torch.optim.Optimizer | None, trained: bool = True
) -> tuple[str, dict[str, Any]]:
    """Say which optimizer ran and with which options, from the object itself.

    Args:
        optimizer: The optimizer, in accelerate's wrapper or not; None: none was made.
        trained: Whether it has taken a step.

    Returns:
        Its name and its options; of one that differs between parameter groups all values.
    """
    optimizer = unwrapped(optimizer)
    if optimizer is None or not trained:
        return "not known: this process has not trained the model", {}
    options = {}
    for name in optimizer.defaults:
        values = distinct(group[name] for group in optimizer.param_groups if name in group)
        if name in _STATE or not values:
            continue
        if name == "lr":
            # A schedule has moved on from the one that was asked for.
            name = "learning_rate (largest)"
            values = distinct(g.get("initial_lr", g["lr"]) for g in optimizer.param_groups)
        if name not in _IMPLEMENTATION or any(values):
            options[name] = values[0] if len(values) == 1 else f"by group: {values}"
    kind = type(optimizer)
    name = f"{kind.__module__.split('.')[0]}.{kind.__name__}"
    if isinstance(optimizer, Sophia):
        name = _TITLES[options.pop("hessian_computation_type")]
        if options["rho"] != AUTO:
            for needless in ("target_clip_fraction", "rho_scope"):
                options.pop(needless)
        elif isinstance(optimizer, TrainerSophia) and optimizer.embedding_clip_fraction is not None:
            options["embedding_clip_fraction"] = optimizer.embedding_clip_fraction
    elif isinstance(optimizer, (Adam, RAdam)):
        name = f"{kind.__name__} of hf_sophia"
    return name, options


def unwrapped(optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
    """Return the optimizer under accelerate's wrapper.

    Args:
        optimizer: It, wrapped or not; None stays None.
    """
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return the values that differ, in order; they need no hash.

    Args:
        values: The values.
    """
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def is_pretrained(model: torch.nn.Module) -> bool:
    """Whether weights were loaded into a model before it was trained.

    A model's name does not say: that of `from_config(AutoConfig.from_pretrained("gpt2"))` is
    `gpt2` too. `from_pretrained` marks each parameter that it loads.

    Args:
        model: The model, not wrapped.
    """
    return any(getattr(param, "_is_hf_initialized", False) for param in model.parameters())


def evaluation_of(
    trainer: transformers.Trainer, loaded_best: int | None
) -> tuple[int | None, dict[str, float]]:
    """Return the last evaluation of the weights that the model has now, and its step.

    Args:
        trainer: The Trainer, during or after the training.
        loaded_best: The step of the best checkpoint, where that was loaded at the end.

    Returns:
        The step, and the metrics without those of speed, under the Trainer's names (`eval_loss`).
    """
    history = trainer.state.log_history
    done = next((i for i, entry in enumerate(history) if "train_runtime" in entry), len(history))
    entries = history[done:]
    if not any(metrics_in(entry) for entry in entries):
        # What was loaded at the end is not what the last evaluation saw.
        best = loaded_best is not None
        entries = [e for e in history if not best or e.get("step") == loaded_best]
    steps = [entry["step"] for entry in entries if metrics_in(entry)]
    if not steps:
        return None, {}
    metrics: dict[str, float] = {}
    for entry in entries:
        if entry["step"] == steps[-1]:
            metrics |= metrics_in(entry)
    return steps[-1], metrics


def metrics_in(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of an evaluation, without those of its speed.

    Args:
        entry: One of `trainer.state.log_history`; one that is no evaluation has none.
    """
    return {
        name: float(value)
        for name, value in entry.items()
        if name.startswith("eval_")
        and not _SPEED.fullmatch(name)
        and isinstance(value, numbers.Real)
    }
