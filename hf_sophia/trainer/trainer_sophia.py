"""Sophia as the Trainer builds it."""

import logging
from collections.abc import Iterable
from typing import Any

from hf_sophia.optim import Sophia
from hf_sophia.optim.base import comparable
from hf_sophia.optim.validation import check_fraction, check_open_fraction

logger = logging.getLogger(__name__)


class TrainerSophia(Sophia):
    """Sophia under a Trainer: no step without its Hessian, and the options asked for on resume.

    A stock `Trainer` never refreshes the Hessian, so what the bare optimizer warns of is an error.

    Args:
        params: As for `Sophia`.
        hessian_batch_fraction: The share of the batch, in (0, 1], whose logits come from a forward
            pass for the Hessian alone; None: the Trainer chooses.
        embedding_clip_fraction: The share to clip, in (0, 1), of embeddings under `rho="auto"`,
            which the Trainer finds in its model; None: that of all others.
        **options: As for `Sophia`.

    Raises:
        ValueError, TypeError: As for `Sophia`.
    """

    #: Whether embeddings have been looked for in the model.
    embeddings_known = False

    #: Options that a resumed run takes from its own arguments; lr belongs to the scheduler.
    _asked_for = (
        "betas",
        "eps",
        "rho",
        "weight_decay",
        "k",
        "hessian_computation_type",
        "target_clip_fraction",
        "rho_scope",
        "nesterov",
        "bias_correction",
    )

    def __init__(
        self,
        params: Iterable[Any],
        *,
        hessian_batch_fraction: float | None = None,
        embedding_clip_fraction: float | None = None,
        **options: Any,
    ) -> None:
        if hessian_batch_fraction is not None:
            check_fraction("hessian_batch_fraction", hessian_batch_fraction)
        if embedding_clip_fraction is not None:
            check_open_fraction("embedding_clip_fraction", embedding_clip_fraction)
        self.hessian_batch_fraction = hessian_batch_fraction
        self.embedding_clip_fraction = embedding_clip_fraction
        super().__init__(params, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep."""
        own = ("hessian_batch_fraction", "embedding_clip_fraction")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def _on_missed_refresh(self, due_step: int) -> None:
        raise RuntimeError(
            f"optim='sophia' would take step {self._current_step} without the Hessian refresh that"
            f" was due at step {due_step}, as sign momentum. Train with"
            " hf_sophia.SophiaTrainer instead of transformers.Trainer, or put"
            " hf_sophia.SophiaTrainerMixin first among the bases of your Trainer"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary but keep this run's options; log those that changed.

        torch restores the saved options, so that `k=5` on the command line of a resumed run would
        silently stay the checkpoint's `k=10`.

        Raises:
            ValueError: As in every optimizer here.
        """
        asked = [{name: group[name] for name in self._asked_for} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for index, (group, options) in enumerate(zip(self.param_groups, asked, strict=True)):
            for name, value in options.items():
                if comparable(group[name]) != comparable(value):
                    logger.warning(
                        "resuming with %s=%s in parameter group %d; the checkpoint had %s",
                        name,
                        value,
                        index,
                        group[name],
                    )
                group[name] = value
