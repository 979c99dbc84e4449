"""What a model's outputs mean: the distribution of the labels that a loss is the likelihood of.

The Gauss-Newton-Bartlett estimator draws labels from the model's own distribution and needs the
gradient of their negative log-likelihood with respect to the logits, which is (mean - label) for
each likelihood here, up to a factor. Nothing else of the loss enters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from hf_sophia.estimators.sampling import sample_categorical, uniform_dtype

#: The label that says: this prediction does not count.
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Likelihood:
    """One distribution of labels given logits.

    Args:
        per_row: One prediction per row of logits (shape (..., classes)); otherwise one per element.
        ignorable: A target of -100 says that a prediction does not count.
        draw: The noise that labels come from: `torch.rand` or `torch.randn`.
        residual: Maps rows of logits, in fp32 at least, and their noise to the gradient of the
            sampled labels' negative log-likelihood by the logits; same shape as the logits.
        nll: Maps rows of logits and of true targets to the summed negative log-likelihood, up to a
            constant.
    """

    per_row: bool
    ignorable: bool
    draw: Callable[..., torch.Tensor]
    residual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    nll: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _categorical_residual(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    residual = logits.softmax(-1)
    label = sample_categorical(residual, uniform)
    residual[torch.arange(len(label), device=label.device), label] -= 1.0
    return residual


def _bernoulli_residual(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    mean = logits.sigmoid()
    return mean - (uniform < mean).to(mean.dtype)


def _gaussian_residual(logits: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
    # (f - y)^2 is the negative log-likelihood at variance 1/2, so y = f + n / sqrt(2) and the
    # gradient 2 (f - y) = -sqrt(2) n, whatever f is.
    return normal.mul(-(2.0**0.5)).to(logits.dtype)


def _categorical_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def _bernoulli_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = functional.binary_cross_entropy_with_logits(
        logits, targets.to(logits.dtype), reduction="none"
    )
    return loss.masked_fill(targets == IGNORE_INDEX, 0.0).sum()


def _gaussian_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(logits, targets.to(logits.dtype), reduction="sum")


LIKELIHOODS = {
    "categorical": Likelihood(True, True, torch.rand, _categorical_residual, _categorical_nll),
    "bernoulli": Likelihood(False, True, torch.rand, _bernoulli_residual, _bernoulli_nll),
    "gaussian": Likelihood(False, False, torch.randn, _gaussian_residual, _gaussian_nll),
}

#: Elements of logits that are worked on at a time: 16 MiB in fp32, so scratch space stays small.
_CHUNK_ELEMENTS = 1 << 22


def _check(
    logits: torch.Tensor, targets: torch.Tensor | None, likelihood: str
) -> tuple[Likelihood, torch.Size]:
    """Return the likelihood and the shape of its predictions, after checking the arguments."""
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"likelihood must be one of {', '.join(map(repr, LIKELIHOODS))}, got {likelihood!r}"
        )
    if (
        not isinstance(logits, torch.Tensor)
        or not logits.is_floating_point()
        or logits.dim() < 1
        or logits.shape[-1] < 1
    ):
        raise ValueError(
            "logits must be a floating-point tensor of shape (..., classes), got"
            f" {_describe(logits)}"
        )
    if targets is not None and not isinstance(targets, torch.Tensor):
        raise ValueError(f"targets must be a tensor or None, got {_describe(targets)}")
    record = LIKELIHOODS[likelihood]
    shape = logits.shape[:-1] if record.per_row else logits.shape
    if targets is not None and targets.shape != shape:
        raise ValueError(
            f"targets must have one entry per {likelihood} prediction, shape {tuple(shape)} for"
            f" logits of shape {tuple(logits.shape)}, got shape {tuple(targets.shape)}"
        )
    return record, shape


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return repr(type(value).__name__)


def _counted(
    record: Likelihood, targets: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Return which predictions count, or None when all do."""
    if targets is None or not record.ignorable:
        return None
    return (targets != IGNORE_INDEX).to(device)


def _count(counted: torch.Tensor | None, shape: torch.Size, device: torch.device) -> torch.Tensor:
    return torch.tensor(shape.numel(), device=device) if counted is None else counted.sum()


def _rows_per_chunk(rows: torch.Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // rows.shape[-1])


@torch.no_grad()
def sampled_cotangent(
    logits: torch.Tensor,
    targets: torch.Tensor | None = None,
    *,
    likelihood: str = "categorical",
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample labels from the model and differentiate their summed loss by the logits.

    For the categorical likelihood that is `softmax(logits) - onehot(sampled)`. The sum and not the
    mean: divided by B, most of a softmax over a large vocabulary would be 0 in fp16. Works through
    the rows in chunks, in fp32 at least. Beside the result no tensor of the logits' size is made,
    but for the noise of the likelihoods that have a prediction per element, and a copy of logits
    that are not contiguous.

    Args:
        logits: The model's outputs, shape (..., classes), any floating dtype.
        targets: Say which predictions count: those that are not -100. Shape (...) for
            `"categorical"`, else that of the logits; None: all count, as they always do for
            `"gaussian"`.
        likelihood: `"categorical"` (cross-entropy), `"bernoulli"` (binary cross-entropy) or
            `"gaussian"` (squared error).
        generator: Source of the labels' randomness, on any device (one on the CPU draws the same
            labels whatever the logits' device); None: torch's default of the logits' device.

    Returns:
        The cotangent, of the logits' shape and dtype, zero where a prediction does not count; and
        B, the number of predictions that count, as a zero-dimensional int64 tensor.

    Raises:
        ValueError: The likelihood is unknown, or a shape or dtype is wrong.
    """
    record, shape = _check(logits, targets, likelihood)
    counted = _counted(record, targets, logits.device)
    # All noise at once, so that labels do not depend on the size of a chunk.
    source = logits.device if generator is None else generator.device
    noise_dtype = uniform_dtype(logits.device) if record.per_row else torch.float32
    noise = record.draw(shape, dtype=noise_dtype, device=source, generator=generator)
    noise = noise.to(logits.device)
    cotangent = torch.empty_like(logits, memory_format=torch.contiguous_format)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    classes = logits.shape[-1]
    rows, out = logits.detach().reshape(-1, classes), cotangent.view(-1, classes)
    # One column per row, or one per element.
    noise = noise.reshape(-1) if record.per_row else noise.reshape(-1, classes)
    uncounted = None if counted is None else ~counted.reshape(-1, 1 if record.per_row else classes)
    step = _rows_per_chunk(rows)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        residual = record.residual(rows[part].to(dtype), noise[part])
        if uncounted is not None:
            residual.masked_fill_(uncounted[part], 0.0)
        out[part] = residual
    return cotangent, _count(counted, shape, logits.device)


@torch.no_grad()
def mean_nll(
    logits: torch.Tensor, targets: torch.Tensor, *, likelihood: str = "categorical"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean negative log-likelihood of true targets, and how many of them count.

    Args:
        logits: The model's outputs, shape (..., classes), any floating dtype.
        targets: The true labels, shape (...) for `"categorical"`, else that of the logits; -100
            does not count (`"gaussian"`: every target counts).
        likelihood: As for `sampled_cotangent`.

    Returns:
        The mean over the predictions that count, in fp32 at least (NaN when none does), and their
        number; both zero-dimensional.

    Raises:
        ValueError: The likelihood is unknown, or a shape or dtype is wrong.
    """
    record, shape = _check(logits, targets, likelihood)
    counted = _counted(record, targets, logits.device)
    count = _count(counted, shape, logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    classes = logits.shape[-1]
    rows = logits.detach().reshape(-1, classes)
    targets = targets.to(logits.device).reshape(rows.shape[:-1] if record.per_row else rows.shape)
    step = _rows_per_chunk(rows)
    total = torch.zeros((), dtype=dtype, device=logits.device)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        total += record.nll(rows[part].to(dtype), targets[part])
    return total / count, count
