"""What a Trainer asks of Sophia, however it comes to its optimizer."""

import copy
import math
from typing import Any

import torch
from transformers.trainer import Trainer

from hf_sophia.optim import Sophia
from hf_sophia.trainer.held import held, hooks_held
from hf_sophia.trainer.sophia_trainer import SophiaTrainerMixin
from hf_sophia.trainer.trainer_sophia import TrainerSophia


def optimizer_of(trainer: SophiaTrainerMixin, name: str) -> torch.optim.Optimizer | None:
    """Return the optimizer that a Trainer was given, or one like that which it would make.

    Args:
        trainer: One that has not trained. What its own code does to its parameters'
            `requires_grad` stays.
        name: The optimizer that its arguments name.

    Returns:
        The optimizer; None where the Trainer would make the one that its arguments name, and that
        is none of this package's.

    Raises:
        ValueError: The Trainer can't make it, or `--optim sophia` would have no effect.
    """
    source = "was given (optimizers=...)"
    with held(trainer), hooks_held(trainer.model.parameters()):
        if trainer.optimizer is None:
            own = trainer._has_its_own("create_optimizer")
            if not own and trainer.optimizer_cls_and_kwargs is None and name != "sophia":
                return None
            source = (
                "makes (create_optimizer)" if own else "was given (optimizer_cls_and_kwargs=...)"
            )
            # Copies, which code of the user's may change, and that know what training would.
            trainer.args, trainer.state = copy.copy(trainer.args), copy.copy(trainer.state)
            trainer.state.max_steps = steps_of(trainer)
            trainer.create_optimizer()
            if trainer.optimizer is None:
                raise ValueError(
                    f"{type(trainer).__name__}.create_optimizer left self.optimizer None: set it"
                    " there"
                )
        optimizer = trainer.optimizer if trainer._sophia is None else trainer._sophia
    if name == "sophia" and not isinstance(optimizer, Sophia):
        raise ValueError(
            f"the optimizer that the Trainer {source} is {type(optimizer).__name__}, so that"
            " --optim sophia would have no effect: leave it out"
        )
    return optimizer


def steps_of(trainer: Trainer) -> int:
    """Return the optimizer steps that a run would take, or 0 where nobody knows.

    Args:
        trainer: What would run.
    """
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    try:
        rows = len(trainer.train_dataset)
    except TypeError:
        return 0
    batch = args.train_batch_size * args.gradient_accumulation_steps
    return math.ceil(math.ceil(rows / batch) * args.num_train_epochs)


def options_of(optimizer: Sophia) -> dict[str, Any]:
    """Return the options of a Sophia, those of its first group, as its constructor takes them.

    Args:
        optimizer: The optimizer.
    """
    group = optimizer.param_groups[0]
    options = {name: group[name] for name in TrainerSophia._asked_for if name != "weight_decay"}
    options["fused"] = optimizer.fused
    if isinstance(optimizer, TrainerSophia):
        options["embedding_clip_fraction"] = optimizer.embedding_clip_fraction
        options["hessian_batch_fraction"] = optimizer.hessian_batch_fraction
    return options


def not_shared(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[str]:
    """Say which parameters only one of an optimizer and a model has.

    Args:
        optimizer: The optimizer.
        model: The model inside all wrappers.

    Returns:
        Sentences with the remedy; none where they agree.
    """
    own = {param for group in optimizer.param_groups for param in group["params"]}
    trained = {param: name for name, param in model.named_parameters() if param.requires_grad}
    sentences = []
    if lacking := [name for param, name in trained.items() if param not in own]:
        sentences.append(
            f"the optimizer lacks {_counted(lacking)} of the model's trained parameters: freeze"
            " what it lacks, or give it to it"
        )
    if foreign := own - set(model.parameters()):
        sentences.append(
            f"the optimizer holds {len(foreign)} tensors that are no parameters of the model, as"
            " after a layer was replaced: make it from the model as it is now"
        )
    return sentences


def _counted(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
