"""Draws from categorical distributions: an inverse CDF in two levels."""

import torch


def uniform_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype to draw uniforms in: float64, so that classes of 1e-9 are drawn too."""
    return torch.float32 if device.type == "mps" else torch.float64


def sample_categorical(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one class per row, from one uniform number per row.

    The classes are cut into blocks of about `sqrt(classes)`. The uniform number first picks a block
    by the cumulated block sums; its place within that block is uniform again and picks the class.
    So each row costs one pass over its probabilities and two short cumulative sums, where a
    cumulative sum over all classes would write a second matrix of their size.

    Args:
        probabilities: Weights >= 0, shape (rows, classes); each row is normalised by its own sum.
            Any number of classes >= 1.
        uniform: Uniform numbers in [0, 1), shape (rows,), in `uniform_dtype`.

    Returns:
        The class indices, shape (rows,), int64. A class of weight 0 is never drawn.
    """
    classes = probabilities.shape[1]
    size = max(1, round(classes**0.5))
    whole = classes - classes % size
    sums = probabilities[:, :whole].unflatten(1, (-1, size)).sum(-1)
    if whole < classes:
        sums = torch.cat([sums, probabilities[:, whole:].sum(-1, keepdim=True)], dim=1)
    block, uniform = _invert(sums.to(uniform.dtype), uniform)
    index = block[:, None] * size + torch.arange(size, device=block.device)
    inside = probabilities.gather(1, index.clamp(max=classes - 1)).to(uniform.dtype)
    offset, _ = _invert(inside.masked_fill_(index >= classes, 0.0), uniform)
    return block * size + offset


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index that `uniform` falls on by the weights, and its place within that index."""
    cumulative = weights.cumsum(-1)
    target = uniform * cumulative[:, -1]
    index = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
    # Rounding may put the target on the very end; the last index of positive weight takes it.
    index = torch.minimum(index, (cumulative < cumulative[:, -1:]).sum(-1))
    weight = weights.gather(1, index[:, None]).squeeze(1)
    start = cumulative.gather(1, index[:, None]).squeeze(1) - weight
    return index, ((target - start) / weight).clamp(0.0, 1.0)
