"""A clipping threshold that follows the data: the rho that clips a wanted share of coordinates.

`|m|` is noise of order `sqrt(h / B)`, so that `|m| / h` depends on the batch size, the layer and
the stage of training, and no fixed rho fits all of them. Here rho is the quantile of
`|m| / max(h, eps)` over a sample of coordinates, taken at each refresh and smoothed in the
logarithm.
"""

from collections.abc import Iterator, MutableMapping, Sequence

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from hf_sophia.kernels import StepScalars
from hf_sophia.optim.base import Batch, State
from hf_sophia.optim.sharding import local, placed_like
from hf_sophia.optim.sophia_update import curvature

#: Coordinates looked at for each tensor. Two sigma of rank: 3 % for their 50 % quantile, 0.6 % for
#: their 99 % quantile.
SAMPLE_SIZE = 1024

#: Tensors whose quantiles are found in one call.
ROWS_AT_ONCE = 4096

#: Steps in which a threshold forgets half of its logarithm. The first quantiles are far too large,
#: as the first h is of few estimates, and how slowly rho leaves them is a warm-up of its own:
#: following at once was worse wherever it was tried, and half of it at each refresh was for k = 1.
HALF_LIFE = 10


def sample_indices(size: int) -> torch.Tensor:
    """Return the coordinates to look at in a tensor, always the same ones.

    Multiples of the golden ratio, modulo 1, are spread evenly over the tensor and fall into step
    with no number of columns, as every n-th coordinate would.

    Args:
        size: The number of the tensor's elements.

    Returns:
        Indices into the flat tensor, ascending, shape (min(size, SAMPLE_SIZE),).
    """
    if size <= SAMPLE_SIZE:
        return torch.arange(size, device="cpu")
    places = (
        (torch.arange(SAMPLE_SIZE, dtype=torch.float64, device="cpu") + 0.5)
        * 0.6180339887498949
        % 1.0
    )
    return (places * size).long().sort().values


class CoordinateSample:
    """The sampled coordinates of one parameter, and which of them are in this process's shard.

    Args:
        param: The parameter, whole or sharded along its first dimension.

    Raises:
        ValueError: It is sharded in another way.
    """

    def __init__(self, param: torch.Tensor) -> None:
        indices = sample_indices(param.numel())
        self.size = len(indices)
        shard = local(param)
        self._where = (param.numel(), shard.numel(), shard.device)
        start = _offset(param)
        inside = (indices >= start) & (indices < start + shard.numel())
        #: Where in the sample, and where in the flat shard, the local coordinates are.
        self.positions = inside.nonzero().squeeze(1).to(shard.device)
        self.indices = (indices[inside] - start).to(shard.device)

    def fits(self, param: torch.Tensor) -> bool:
        """Whether the parameter still has the size and the device of before."""
        shard = local(param)
        return (param.numel(), shard.numel(), shard.device) == self._where

    def take(self, shard: torch.Tensor) -> torch.Tensor:
        """Return the local coordinates of a tensor that is sharded as the parameter is."""
        return shard.reshape(-1).index_select(0, self.indices)


def _offset(param: torch.Tensor) -> int:
    """Return how many elements of a parameter are in the shards before this process's."""
    if not isinstance(param, DTensor):
        return 0
    cut = [placement for placement in param.placements if not placement.is_replicate()]
    if param.device_mesh.ndim != 1 or any(not placement.is_shard(0) for placement in cut):
        raise ValueError(
            "rho='auto' supports parameters that are sharded along their first dimension over one"
            f" mesh dimension, as fully_shard does, got {param.placements}; give rho as a number"
        )
    if not cut:
        return 0
    own = torch.tensor([param.to_local().numel()], device=param.device_mesh.device_type)
    group = param.device_mesh.get_group(0)
    sizes = [torch.zeros_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(sizes, own, group=group)
    return int(torch.cat(sizes[: distributed.get_rank(group)] or [own * 0]).sum())


def clipping_quantiles(
    params: Sequence[torch.Tensor],
    samples: Sequence[CoordinateSample],
    ratios: Sequence[torch.Tensor],
    target: float,
    *,
    together: bool,
) -> torch.Tensor:
    """Return the threshold that a share of the ratios reaches, for each parameter.

    Args:
        params: Parameters of one device.
        samples: Their sampled coordinates.
        ratios: `|m| / h` at the local ones of these; 0 where h is at most eps, as `|m| / eps` is no
            scale of anything.
        target: The share, in (0, 1).
        together: One threshold for all of them, each counted by its size, instead of one each.

    Returns:
        Shape (len(params),), in fp32, on the parameters' device; 0 where nothing in the sample
        moves and has curvature. The same on all processes, without a device sync.
    """
    width = max(1, *(sample.size for sample in samples))
    table = ratios[0].new_full((len(params), width), 0.0, dtype=torch.float32)
    for row, sample, ratio in zip(table, samples, ratios, strict=True):
        row.index_copy_(0, sample.positions, ratio.to(torch.float32))
    for mesh, rows in _sharded_rows(params):
        # Every coordinate is in one shard, and 0 in the others.
        part = table[rows]
        distributed.all_reduce(part, group=mesh.get_group(0))
        table[rows] = part
    # Coordinates that do not move, of rows of an embedding that no batch had for instance, are 0.
    counted = table > 0.0
    if not together:
        # In parts: torch's quantile takes 2^24 elements at most.
        parts = table.where(counted, torch.nan).split(ROWS_AT_ONCE)
        quantiles = torch.cat([part.nanquantile(1.0 - target, dim=1) for part in parts])
        return quantiles.nan_to_num(0.0)
    each = [
        param.numel() / max(sample.size, 1) for param, sample in zip(params, samples, strict=True)
    ]
    weight = torch.tensor(each, device=table.device)[:, None].where(counted, 0.0).reshape(-1)
    values, order = table.reshape(-1).sort()
    below = weight[order].cumsum(0)
    place = torch.searchsorted(below, (1.0 - target) * below[-1]).clamp(max=len(values) - 1)
    return values[place].expand(len(params))


def _sharded_rows(params: Sequence[torch.Tensor]) -> Iterator[tuple[object, torch.Tensor]]:
    rows: dict[object, list[int]] = {}
    for row, param in enumerate(params):
        if isinstance(param, DTensor) and any(p.is_shard() for p in param.placements):
            rows.setdefault(param.device_mesh, []).append(row)
    for mesh, found in rows.items():
        yield mesh, torch.tensor(found, device=local(params[found[0]]).device)


def smoothed(old: torch.Tensor, quantile: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the next thresholds, averaged in the logarithm; where one is 0, the other alone.

    Args:
        old: The thresholds so far, 0 where there is none yet.
        quantile: The new quantiles, 0 where there is none.
        steps: The optimizer's steps from those to these; 0 keeps those that there are.
    """
    if steps == 0:
        return old.where(old > 0.0, quantile)
    kept = 0.5 ** (steps / HALF_LIFE)
    mixed = torch.exp(kept * old.log() + (1.0 - kept) * quantile.log())
    return torch.where((old > 0.0) & (quantile > 0.0), mixed, torch.maximum(old, quantile))


def follow(
    batch: Batch,
    scalars: StepScalars,
    samples: MutableMapping[torch.Tensor, CoordinateSample],
    targets: Sequence[float],
    steps: int,
    l2: float = 0.0,
    absent: Sequence[State] = (),
) -> None:
    """Bring the thresholds of a group towards this step's quantiles, in place.

    A parameter without curvature keeps the threshold it has: 0 at first, and sign steps.

    Args:
        batch: Its parameters with finite gradients; their state has `exp_avg`, `hessian` and `rho`.
        scalars: The options of the step that follows.
        samples: Each parameter's sample, made here where there is none.
        targets: The share to clip of each parameter; where one threshold is for all, the same.
        steps: As in `smoothed`.
        l2: How much of a parameter the step adds to its gradient: weight decay, not decoupled.
        absent: States of the group's parameters without a gradient in this step, which follow where
            one threshold is for all.
    """
    alike: dict[tuple[torch.device, float], list[int]] = {}
    for index, (param, target) in enumerate(zip(batch.params, targets, strict=True)):
        alike.setdefault((local(param).device, target), []).append(index)
    together = batch.group["rho_scope"] == "group"
    for (device, target), indices in alike.items():
        params = [batch.params[index] for index in indices]
        states = [batch.states[index] for index in indices]
        for param in params:
            if param not in samples or not samples[param].fits(param):
                samples[param] = CoordinateSample(param)
        quantiles = clipping_quantiles(
            params,
            [samples[param] for param in params],
            [
                _sampled_ratios(samples[p], p, s, scalars, l2)
                for p, s in zip(params, states, strict=True)
            ],
            target,
            together=together,
        )
        if together:
            # Of one value, but for those that have none yet or come from thresholds of their own.
            states += [state for state in absent if state["rho"].device == device]
            quantiles = quantiles[0].expand(len(states))
        old = torch.stack([state["rho"].to(quantiles.dtype) for state in states])
        if together:
            old = old.where(old > 0.0, torch.nan).nanmedian().nan_to_num(0.0).expand(len(states))
        new = smoothed(old, quantiles, steps)
        for state, rho in zip(states, new, strict=True):
            state["rho"].copy_(rho)


def _sampled_ratios(
    sample: CoordinateSample,
    param: torch.Tensor,
    state: State,
    scalars: StepScalars,
    l2: float,
) -> torch.Tensor:
    """Return what the step will clip, as `clipping_quantiles` wants it."""
    m, h, g = (
        sample.take(local(tensor))
        for tensor in (state["exp_avg"], state["hessian"], placed_like(param.grad, param))
    )
    g = g.to(m.dtype)
    if l2:
        g = g.add(sample.take(local(param)).to(m.dtype), alpha=l2)
    m = m.lerp_(g, 1.0 - scalars.beta1)
    if scalars.nesterov:
        m = m.lerp_(g, 1.0 - scalars.beta1)
    divisor = curvature(h, scalars)
    return m.abs_().div_(divisor).where(divisor > scalars.eps, 0.0)
