"""What a long run is watched for: each cause is warned of once, with its likely remedy."""

import logging
from collections import deque
from typing import Any

logger = logging.getLogger(__name__)

#: Clip fractions that a Sophia with a number for rho logs where it works, one threshold for all
#: tensors: the paper's are 0.5 to 0.9. Outside of this band the number is most likely a wrong one.
HEALTHY_CLIPPING = (0.05, 0.95)

#: The clip fraction is judged by this many logs in a row, after this many refreshes: h starts from
#: nothing, and the learning rate's warm-up does not touch the fraction.
LOGS_JUDGED, REFRESHES_BEFORE = 5, 10

#: Of so many refreshes that were due, so many without an estimate are worth a word: h is older than
#: k says. A gradient scaler that tries a larger scale costs one now and then.
REFRESHES_JUDGED, OFTEN = 10, 5


class HessianHealth:
    """Watches the refreshes of one run, and warns at most once for each cause.

    Args:
        k: Steps from one refresh to the next.
        first_step: The number of the run's first step, more than 1 where it resumes.
    """

    def __init__(self, k: int, first_step: int) -> None:
        self._k, self._first_step = k, first_step
        self._refreshes = 0
        self._recent: deque[bool] = deque(maxlen=REFRESHES_JUDGED)
        self._outside: list[float] = []
        self._warned: set[str] = set()

    def warn_once(self, cause: str, message: str, *values: Any) -> None:
        """Log a warning unless this cause had one.

        Args:
            cause: Names it.
            message: As for `logging`, with `%s` for values.
            *values: The values.
        """
        if cause not in self._warned:
            self._warned.add(cause)
            logger.warning(message, *values)

    def refreshed(self) -> None:
        """Note that an estimate was folded in."""
        self._refreshes += 1
        self._recent.append(True)

    def left_out(self, step: int, cause: str, message: str) -> None:
        """Note a refresh that was due and brought nothing.

        Args:
            step: The step it was due at.
            cause: Names the cause.
            message: What happened, with `%d` for the step.
        """
        self.warn_once(cause, message, step)
        self._recent.append(False)
        failed = self._recent.count(False)
        if self._refreshes and len(self._recent) == REFRESHES_JUDGED and failed >= OFTEN:
            self.warn_once(
                "often",
                "%d of the last %d Hessian refreshes until step %d brought nothing, so that the"
                " Hessian is older than k=%d says: see the warnings before this one. Where"
                " estimates in fp16 are not finite, train in bf16 or fp32",
                failed,
                REFRESHES_JUDGED,
                step,
                self._k,
            )
        if self._refreshes == 0 and step > self._first_step + self._k - 1:
            self.warn_once(
                "no refresh",
                "no Hessian refresh has succeeded from step %d to step %d (k=%d), so Sophia trains"
                " without curvature of this run: see the warnings before this one",
                self._first_step,
                step,
                self._k,
            )

    def tried_again(self) -> None:
        """Note that the last one that brought nothing is made again, as its step was not taken."""
        self._recent.pop()

    def logged(self, clip_fraction: float | None, hessian_norm: float) -> None:
        """Judge what the Trainer logs.

        Args:
            clip_fraction: The share of coordinates that the last step clipped; None: not to be
                judged, as where rho follows a share that was asked for.
            hessian_norm: The L2 norm of h.
        """
        if self._refreshes and hessian_norm == 0.0:
            self.warn_once(
                "zero",
                "the Hessian is zero everywhere after %d refreshes, so Sophia takes sign steps:"
                " do gradients reach the parameters that train, and are the model's predictions so"
                " certain that sampled labels never differ from them?",
                self._refreshes,
            )
        low, high = HEALTHY_CLIPPING
        if (
            clip_fraction is None
            or self._refreshes < REFRESHES_BEFORE
            or low <= clip_fraction <= high
        ):
            self._outside.clear()
            return
        self._outside.append(clip_fraction)
        if len(self._outside) >= LOGS_JUDGED and hessian_norm > 0.0:
            remedy = (
                "nearly every coordinate takes a sign step of size lr. Try a larger rho"
                if clip_fraction > high
                else "hardly any coordinate is kept from a long Newton step. Try a smaller rho"
            )
            self.warn_once(
                "clipping",
                "sophia/clip_fraction was outside of %g to %g in the last %d logs, now %.3g: %s",
                low,
                high,
                len(self._outside),
                clip_fraction,
                remedy,
            )
