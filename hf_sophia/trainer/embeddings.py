"""Gives embeddings a share to clip of their own.

A tensor's threshold is a quantile over all of its coordinates. The rows of an embedding are reached
as often as their tokens occur, so that `|m| / h` spans far more there than within another matrix:
the quantile that suits the others is that of the rarest tokens, and the rows of all others hardly
move. With a larger share to clip they do.
"""

from collections.abc import Set as AbstractSet

import torch

from hf_sophia.optim import Sophia
from hf_sophia.optim.base import Group


def embeddings_of(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """Return the weights of a model's `torch.nn.Embedding` modules, an output tied to them too."""
    modules = (part for part in model.modules() if isinstance(part, torch.nn.Embedding))
    return {module.weight for module in modules}


def split_off_embeddings(
    optimizer: Sophia, embeddings: AbstractSet[torch.nn.Parameter], clip_fraction: float | None
) -> None:
    """Move embeddings into parameter groups of their own, with a share to clip.

    Also where the share makes no difference, with a number for rho for instance, so that a
    checkpoint fits whatever kind of rho it is resumed with. With one threshold for a group there is
    no share for some of it, and the groups stay as they are. Doing it again changes nothing.

    Args:
        optimizer: Not stepped yet.
        embeddings: The parameters; those that it does not hold are left out.
        clip_fraction: The share; None: that of the group which they are in.
    """
    for group in list(optimizer.param_groups):
        held = [param in embeddings for param in group["params"]]
        if group["rho_scope"] == "group" or not any(held):
            continue
        if not all(held):
            own = {**group, **_part(group, held, wanted=True)}
            group.update(_part(group, held, wanted=False))
            optimizer.add_param_group(own)
            group = optimizer.param_groups[-1]
        if clip_fraction is not None:
            group["target_clip_fraction"] = clip_fraction


def _part(group: Group, held: list[bool], *, wanted: bool) -> dict[str, list]:
    """Return what a group has a list of, for some of its parameters."""
    return {
        name: [value for value, mark in zip(group[name], held, strict=True) if mark is wanted]
        for name in ("params", "param_names")
        if name in group
    }
