"""What a Trainer asks of Sophia, however it comes to its optimizer."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_sophia.optim import Sophia
from hf_sophia.trainer.sophia_trainer import SophiaTrainerMixin
from hf_sophia.trainer.trainer_sophia import TrainerSophia


@contextmanager
def held(*things: Any) -> Iterator[None]:
    """Give the attributes of some objects back as they were.

    Args:
        *things: The objects; what their attributes refer to is not copied, but for dictionaries
            and lists.
    """
    before = [(vars(thing), _plainly_copied(vars(thing))) for thing in things]
    try:
        yield
    finally:
        for current, attributes in before:
            current.clear()
            current.update(attributes)


def _plainly_copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copy attributes: dictionaries and the lists in them anew, all else as it is."""

    def copied(value: Any) -> Any:
        if type(value) in (dict, defaultdict):
            fresh = {key: copied(inner) for key, inner in value.items()}
            return fresh if type(value) is dict else defaultdict(value.default_factory, fresh)
        # Not what is in it: a list may be the data set.
        return list(value) if type(value) is list else value

    return {name: copied(value) for name, value in attributes.items()}


def optimizer_of(trainer: SophiaTrainerMixin, name: str) -> torch.optim.Optimizer | None:
    """Return the optimizer that a Trainer was given, or one like that which it would make.

    Args:
        trainer: One that has not trained.
        name: The optimizer that its arguments name.

    Returns:
        The optimizer; None where the Trainer would make the one that its arguments name, and that
        is none of this package's.

    Raises:
        ValueError: The Trainer can't make it, or `--optim sophia` would have no effect.
    """
    if trainer.optimizer is not None:
        optimizer, source = trainer.optimizer, "was given (optimizers=...)"
    else:
        own = trainer._has_its_own("create_optimizer")
        if not own and trainer.optimizer_cls_and_kwargs is None and name != "sophia":
            return None
        source = "makes (create_optimizer)" if own else "was given (optimizer_cls_and_kwargs=...)"
        with held(trainer):
            trainer.create_optimizer()
            optimizer = trainer.optimizer
    if name == "sophia" and not isinstance(optimizer, Sophia):
        raise ValueError(
            f"the optimizer that the Trainer {source} is {type(optimizer).__name__}, so that"
            " --optim sophia would have no effect: leave it out"
        )
    return optimizer


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
            f"the optimizer lacks {lacking[0]} and {len(lacking) - 1} more of the model's trained"
            " parameters: freeze them, or give them to it"
        )
    if foreign := own - set(model.parameters()):
        sentences.append(
            f"the optimizer holds {len(foreign)} tensors that are no parameters of the model, as"
            " after a layer was replaced: make it from the model as it is now"
        )
    return sentences
