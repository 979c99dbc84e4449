"""One Hessian refresh of a training run: sampled labels of each micro-batch of one step."""

from collections.abc import Iterable
from hashlib import blake2b

import torch

from hf_sophia.estimators import GaussNewtonBartlett
from hf_sophia.trainer.heads import HeadOutput


def label_noise(seed: int, step: int, rank: int, micro_batch: int) -> torch.Generator:
    """Return the generator of one micro-batch's label noise.

    Its seed is a hash of where the micro-batch stands in the run. So nothing has to be saved for an
    exact resume, the data and dropout streams are those of a run with another optimizer, and every
    rank has noise of its own; shared noise would bias the estimate. It draws on the CPU, so that a
    run on another device samples the same labels.

    Args:
        seed: The run's seed.
        step: The optimizer steps taken before this one.
        rank: The process's index.
        micro_batch: The micro-batch's index within the step.

    Returns:
        A seeded generator on the CPU.
    """
    place = f"{seed},{step},{rank},{micro_batch}".encode()
    digest = int.from_bytes(blake2b(place, digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(digest >> 1)


class HessianRefresh:
    """Collects the Gauss-Newton-Bartlett estimate over the micro-batches of one step.

    Args:
        params: The parameters that train.
        seed: The run's seed.
        step: The optimizer steps taken before this one.
        rank: The process's index.
    """

    def __init__(self, params: Iterable[torch.Tensor], *, seed: int, step: int, rank: int) -> None:
        self._seed, self._step, self._rank = seed, step, rank
        self._estimator = GaussNewtonBartlett(params)
        self.micro_batches = 0

    def add(self, head: HeadOutput) -> None:
        """Differentiate sampled labels of one micro-batch; its graph is kept for the training loss.

        Raises:
            ValueError: Logits and targets do not fit.
            RuntimeError: The graph does not allow a pass of its own.
        """
        generator = label_noise(self._seed, self._step, self._rank, self.micro_batches)
        try:
            self._estimator.add(
                head.logits,
                head.targets,
                likelihood=head.likelihood,
                generator=generator,
                retain_graph=True,
            )
        except RuntimeError as error:
            if "use_reentrant" not in str(error) and ".grad()" not in str(error):
                raise
            raise RuntimeError(
                "Sophia-G differentiates the kept graph, which reentrant gradient checkpointing"
                " does not allow: set"
                " gradient_checkpointing_kwargs={'use_reentrant': False}"
            ) from error
        self.micro_batches += 1

    @property
    def count(self) -> int:
        """The number of predictions that counted, B."""
        return self._estimator.count

    def estimate(self) -> dict[torch.Tensor, torch.Tensor]:
        """Return `{parameter: hhat}` over all micro-batches.

        Raises:
            ValueError: No prediction counted.
        """
        return self._estimator.estimate()
