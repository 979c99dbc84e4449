"""Where the randomness of a Hessian estimate comes from: its place in the run."""

from hashlib import blake2b
from typing import NamedTuple

import torch


class Place(NamedTuple):
    """Where a micro-batch stands in a run.

    Args:
        seed: The run's seed.
        step: The optimizer steps taken before this one.
        rank: The process's index.
        micro_batch: The micro-batch's index within the step.
    """

    seed: int
    step: int
    rank: int
    micro_batch: int


def noise_seed(place: Place, purpose: str = "") -> int:
    """Return the seed of one purpose's noise at a place, a non-negative number of 63 bits.

    It is a hash of both. So nothing has to be saved for an exact resume, the data and dropout
    streams are those of a run with another optimizer, and every rank has noise of its own; shared
    noise would bias the estimate.

    Args:
        place: The micro-batch.
        purpose: Tells streams apart; the labels' has no name.
    """
    text = purpose + ",".join(map(str, place))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def label_noise(seed: int, step: int, rank: int, micro_batch: int) -> torch.Generator:
    """Return the generator of one micro-batch's label noise.

    It draws on the CPU, so that a run on another device samples the same labels.

    Args:
        seed: The run's seed.
        step: The optimizer steps taken before this one.
        rank: The process's index.
        micro_batch: The micro-batch's index within the step.

    Returns:
        A seeded generator on the CPU.
    """
    return torch.Generator().manual_seed(noise_seed(Place(seed, step, rank, micro_batch)))
