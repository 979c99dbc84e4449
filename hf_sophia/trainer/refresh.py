"""One Hessian refresh of a training run: the estimate over the micro-batches of one step."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hf_sophia.estimators import GaussNewtonBartlett, Hutchinson
from hf_sophia.trainer.heads import HeadOutput
from hf_sophia.trainer.noise import Place, label_noise, noise_seed
from hf_sophia.trainer.own_pass import count_examples, take_rows

_ESTIMATORS = {"gnb": GaussNewtonBartlett, "hutchinson": Hutchinson}


class HessianRefresh:
    """Collects the estimate over the micro-batches of one step, and over all processes.

    What the kept graphs give is added as they come; `batches` keeps every micro-batch for passes of
    their own after the last one. The Trainer holds them all until then as well.

    Args:
        params: The parameters that train.
        seed: The run's seed.
        step: The optimizer steps taken before this one.
        rank: The process's index.
        estimator: `"gnb"` or `"hutchinson"`.
        fraction: The share of the examples for passes of their own; None: graphs are kept.
        kept: Of how many micro-batches the graphs are kept; None: of all.
        micro_batches: How many the step has.
        loss_scale: What the mean loss of the step is multiplied by in fp16; None: nothing.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        *,
        seed: int,
        step: int,
        rank: int,
        estimator: str = "gnb",
        fraction: float | None = None,
        kept: int | None = None,
        micro_batches: int = 1,
        loss_scale: float | None = None,
    ) -> None:
        self._loss_scale, self._kept, self._micro_batches = loss_scale, kept, micro_batches
        self._seed, self._step, self._rank = seed, step, rank
        self._params, self._kind = list(params), _ESTIMATORS[estimator]
        self.batches: list[Mapping[str, Any]] = []
        self.start_over(fraction)

    def start_over(self, fraction: float | None) -> None:
        """Forget what was collected, and go on with passes of their own on a share.

        Args:
            fraction: The share.
        """
        self.fraction = fraction
        self._estimator = self._kind(self._params)
        self.seen_graphs = 0

    @property
    def missed_a_graph(self) -> bool:
        """Whether a micro-batch's graph was to be kept and did not come."""
        if self.fraction is not None:
            return False
        come = len(self.batches)
        return self.seen_graphs < (come if self._kept is None else min(come, self._kept))

    @property
    def wants_graphs(self) -> bool:
        """Whether the graph of the next micro-batch is to be kept."""
        return self.fraction is None and (self._kept is None or self.seen_graphs < self._kept)

    def place(self, index: int) -> Place:
        """Where a micro-batch of this step stands in the run."""
        return Place(self._seed, self._step, self._rank, index)

    def part(self, index: int, count: int) -> dict[str, Any]:
        """Return a random part of a micro-batch, the same one at every call.

        Args:
            index: Which micro-batch.
            count: The number of its examples to take.
        """
        rows = torch.Generator().manual_seed(noise_seed(self.place(index), "rows"))
        return take_rows(self.batches[index], count, rows)

    def add_graph(self, head: HeadOutput) -> None:
        """Differentiate the sampled labels of the next micro-batch on its training graph, kept.

        Args:
            head: Its logits and which predictions count.

        Raises:
            ValueError: Logits and targets do not fit.
            RuntimeError: The graph does not allow a pass of its own.
        """
        share = 1.0 / self._micro_batches
        self._add_logits(head, self.seen_graphs, share, retain_graph=True)
        self.seen_graphs += 1

    def add_part(self, head: HeadOutput, index: int, count: int) -> None:
        """Differentiate the sampled labels of part of a micro-batch.

        Args:
            head: Its logits and which predictions count.
            index: Which micro-batch of the step it is.
            count: The number of its examples.

        Raises:
            ValueError, RuntimeError: As for `add_graph`.
        """
        share = count / max(1, sum(map(count_examples, self.batches)))
        self._add_logits(head, index, share)

    def _add_logits(
        self, head: HeadOutput, index: int, share: float, *, retain_graph: bool = False
    ) -> None:
        # The scale is as large as fp16 bears with the mean over the whole step: these predictions
        # are to weigh as much in their own mean as they do in that.
        scale = None if self._loss_scale is None else self._loss_scale * share
        try:
            self._estimator.add(
                head.logits,
                head.targets,
                likelihood=head.likelihood,
                generator=label_noise(*self.place(index)),
                retain_graph=retain_graph,
                loss_scale=scale,
            )
        except RuntimeError as error:
            if "use_reentrant" not in str(error) and ".grad()" not in str(error):
                raise
            raise RuntimeError(
                "Sophia differentiates the graph once more, which reentrant gradient checkpointing"
                " does not allow: call torch.utils.checkpoint with use_reentrant=False"
            ) from error

    def add_loss(self, loss: torch.Tensor, count: torch.Tensor | int, index: int) -> None:
        """Differentiate the loss of one micro-batch twice, along a probe.

        Args:
            loss: Its mean loss with its graph.
            count: The number of its predictions.
            index: Which micro-batch of the step it is.

        Raises:
            ValueError, RuntimeError: As for `hf_sophia.hutchinson`.
        """
        probe = torch.Generator(loss.device).manual_seed(noise_seed(self.place(index), "probe"))
        self._estimator.add(loss, count, generator=probe)

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
