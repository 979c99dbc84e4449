"""One Hessian refresh of a training run: the estimate over the micro-batches of one step."""

from collections.abc import Iterable

import torch

from hf_sophia.estimators import GaussNewtonBartlett, Hutchinson
from hf_sophia.trainer.heads import HeadOutput
from hf_sophia.trainer.noise import Place, label_noise, noise_seed

_ESTIMATORS = {"gnb": GaussNewtonBartlett, "hutchinson": Hutchinson}


class HessianRefresh:
    """Collects the estimate over the micro-batches of one step, and over all processes.

    Args:
        params: The parameters that train.
        seed: The run's seed.
        step: The optimizer steps taken before this one.
        rank: The process's index.
        estimator: `"gnb"` or `"hutchinson"`.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        *,
        seed: int,
        step: int,
        rank: int,
        estimator: str = "gnb",
    ) -> None:
        self._seed, self._step, self._rank = seed, step, rank
        self._estimator = _ESTIMATORS[estimator](params)
        self.micro_batches = 0

    @property
    def place(self) -> Place:
        """Where the next micro-batch stands in the run."""
        return Place(self._seed, self._step, self._rank, self.micro_batches)

    def add_logits(self, head: HeadOutput, *, retain_graph: bool) -> None:
        """Differentiate the sampled labels of one micro-batch.

        Args:
            head: Its logits and which predictions count.
            retain_graph: Keep the graph for the training loss.

        Raises:
            ValueError: Logits and targets do not fit.
            RuntimeError: The graph does not allow a pass of its own.
        """
        try:
            self._estimator.add(
                head.logits,
                head.targets,
                likelihood=head.likelihood,
                generator=label_noise(*self.place),
                retain_graph=retain_graph,
            )
        except RuntimeError as error:
            if "use_reentrant" not in str(error) and ".grad()" not in str(error):
                raise
            raise RuntimeError(
                "Sophia differentiates the graph once more, which reentrant gradient checkpointing"
                " does not allow: call torch.utils.checkpoint with use_reentrant=False"
            ) from error
        self.micro_batches += 1

    def add_loss(self, loss: torch.Tensor, count: torch.Tensor | int) -> None:
        """Differentiate the loss of one micro-batch twice, along a probe.

        Args:
            loss: Its mean loss with its graph.
            count: The number of its predictions.

        Raises:
            ValueError, RuntimeError: As for `hf_sophia.hutchinson`.
        """
        probe = torch.Generator(loss.device).manual_seed(noise_seed(self.place, "probe"))
        self._estimator.add(loss, count, generator=probe)
        self.micro_batches += 1

    def skip(self) -> None:
        """Leave one micro-batch out."""
        self.micro_batches += 1

    def all_reduce(self) -> None:
        """Add up what all processes have collected; every one of them calls it."""
        self._estimator.all_reduce()

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
