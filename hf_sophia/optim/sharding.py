"""Parameters that are sharded over processes, as FSDP2's are: work on the shard, agree on the rest.

Every update here is elementwise, so that a process needs only its own shard of the parameter, the
gradient and the state. Only what is said about whole tensors needs the other processes: sums over
coordinates, and whether any of them holds a NaN.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a DTensor, sharing its memory; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's state with the shards of its tensors, sharing their memory."""
    return {
        name: local(value) if isinstance(value, torch.Tensor) else value
        for name, value in state.items()
    }


def placed_like(value: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Return a tensor sharded as a parameter of the same shape is.

    Args:
        value: A DTensor, or a whole tensor, then the same one on every process.
        param: The parameter.
    """
    if not isinstance(param, DTensor):
        return value.full_tensor() if isinstance(value, DTensor) else value
    if not isinstance(value, DTensor):
        device = param.to_local().device
        return distribute_tensor(value.to(device), param.device_mesh, param.placements)
    if value.placements == param.placements and value.device_mesh == param.device_mesh:
        return value
    return value.redistribute(param.device_mesh, param.placements)


def agreed_first(index: int | None, tensors: Iterable[torch.Tensor]) -> int | None:
    """Return the smallest index that any process found, on all processes that share the tensors.

    Args:
        index: What this process found, or None.
        tensors: The tensors that it was found among. Where none is a DTensor, every process holds
            them whole and nothing is asked of the others.
    """
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
    none = torch.iinfo(torch.long).max
    for mesh in meshes:
        found = torch.tensor(none if index is None else index, device=mesh.device_type)
        for dimension in range(mesh.ndim):
            distributed.all_reduce(found, distributed.ReduceOp.MIN, group=mesh.get_group(dimension))
        index = None if int(found) == none else int(found)
    return index


def total(values: list[torch.Tensor], owners: list[torch.Tensor]) -> torch.Tensor:
    """Add up one value for each tensor, over the shards of those that are sharded.

    Args:
        values: Zero-dimensional tensors; each is about this process's shard of its owner.
        owners: The tensors, not empty.

    Returns:
        A zero-dimensional tensor on the first value's device, without a device sync.
    """
    device = values[0].device
    parts: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for value, owner in zip(values, owners, strict=True):
        parts.setdefault(_sharding_groups(owner), []).append(value.to(device))
    sums = []
    for groups, part in parts.items():
        sums.append(torch.stack(part).sum())
        for group in groups:
            distributed.all_reduce(sums[-1], group=group)
    return torch.stack(sums).sum()


def _sharding_groups(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The process groups over which a tensor is cut up; over others it is repeated."""
    if not isinstance(tensor, DTensor):
        return ()
    return tuple(
        tensor.device_mesh.get_group(dimension)
        for dimension, placement in enumerate(tensor.placements)
        if placement.is_shard()
    )
