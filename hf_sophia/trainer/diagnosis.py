"""What the doctor found in a run: the sampled curvature, what follows from it, and its findings."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from hf_sophia.trainer.options import AUTO_DEFAULTS

#: The share to clip that recommendations aim at.
TARGET: float = AUTO_DEFAULTS["target_clip_fraction"]

#: Thresholds to predict the clipping of.
LADDER = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Finding:
    """Something that would make Sophia wrong or slow.

    Args:
        severity: `"error"` (it would not run), `"warning"` or `"note"`.
        message: What it is, and the remedy.
    """

    severity: str
    message: str


class Sample(NamedTuple):
    """The sampled coordinates of one tensor; all of shape (sampled coordinates,).

    Args:
        n: What the step divides by h and clips: |m|, with Nesterov's momentum its look ahead.
        m: |m|, what AdamW divides.
        h: The Hessian, at least eps.
        square: The mean square of the gradients.
        weight: How many coordinates each of these stands for.
        eps: The bound on h.
    """

    n: torch.Tensor
    m: torch.Tensor
    h: torch.Tensor
    square: torch.Tensor
    weight: float
    eps: float

    @property
    def ratio(self) -> torch.Tensor:
        """What rho is compared with."""
        return self.n / self.h

    @property
    def auto_rho(self) -> float | None:
        """The threshold that `rho=auto` would begin with; None where nothing moves."""
        moving = self.ratio > 0
        curved = moving & (self.h > self.eps)
        counted = self.ratio[curved if curved.any() else moving]
        return float(counted.quantile(1.0 - TARGET)) if len(counted) else None


@dataclass(frozen=True)
class Curvature:
    """The sampled coordinates of the parameters of one kind.

    Args:
        kind: Their name, with `*` for the layer's number.
        size: Coordinates in all.
        tensors: One for each tensor that a gradient reaches.
    """

    kind: str
    size: int
    tensors: list[Sample]


@dataclass
class Diagnosis:
    """What was found.

    Args:
        model: The model's class and size.
        head: The head's likelihood and the shape of its logits, or None where there is none.
        way: How the Hessian would be estimated, and why.
        tokens: B of each refresh.
        curvatures: One for each kind of parameter.
        plain_seconds: The median time of a step without a refresh; NaN where none was taken.
        refresh_seconds: The median time of a step with one.
        plain_bytes: Peak memory of a step without a refresh; None on a CPU, which does not tell.
        refresh_bytes: Peak memory of a step with one.
        k: Steps between refreshes of the run that was asked for.
        rho: The threshold asked for, a number or `"auto"`; None: another optimizer was.
        adamw_lr: The learning rate of AdamW to compare with, or None.
        not_fused: Why the optimizer's step is not taken in one pass, with the share of coordinates.
        findings: Errors, warnings and notes.
    """

    model: str
    head: str | None = None
    way: str | None = None
    tokens: list[int] = field(default_factory=list)
    curvatures: list[Curvature] = field(default_factory=list)
    plain_seconds: float = float("nan")
    refresh_seconds: float = float("nan")
    plain_bytes: int | None = None
    refresh_bytes: int | None = None
    k: int = 10
    rho: float | str | None = None
    adamw_lr: float | None = None
    not_fused: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether the run would end with an error."""
        return any(finding.severity == "error" for finding in self.findings)

    @property
    def overhead(self) -> float:
        """The share of a plain step's time that refreshes add to the average step."""
        return (self.refresh_seconds / self.plain_seconds - 1.0) / self.k

    def ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return n / h of all sampled coordinates that move, ascending, and their weights."""
        parts = [part for curvature in self.curvatures for part in curvature.tensors]
        ratios = torch.cat([part.ratio for part in parts])
        weights = torch.cat([torch.full_like(part.n, part.weight) for part in parts])
        moving = ratios > 0
        ratios, order = ratios[moving].sort()
        return ratios, weights[moving][order]

    def clip_fraction(self, rho: float) -> float:
        """Predict the share of the coordinates that move which a threshold would clip."""
        ratios, weights = self.ratios()
        return float(weights[ratios >= rho].sum() / weights.sum())

    def rho_for(self, clip_fraction: float) -> float:
        """Return the threshold that would clip a share of the coordinates that move."""
        ratios, weights = self.ratios()
        below = weights.cumsum(0)
        place = torch.searchsorted(below, (1.0 - clip_fraction) * below[-1])
        return float(ratios[place.clamp(max=len(ratios) - 1)])

    def learning_rates(self) -> tuple[float, float] | None:
        """Return the range to look for a learning rate in, against AdamW's; None: unknown.

        From the rate with which `rho=auto` moves the parameters as far as AdamW does, in the root
        mean square, up to AdamW's own, which bounds the largest step of a coordinate alike.
        """
        if self.adamw_lr is None or not self.curvatures:
            return None
        ours = theirs = 0.0
        for curvature in self.curvatures:
            for part in curvature.tensors:
                if (rho := part.auto_rho) is None:
                    continue
                moving = part.ratio > 0
                ours += part.weight * float((part.ratio / rho).clamp(max=1.0).square().sum())
                adamw = part.m[moving].square() / part.square[moving]
                theirs += part.weight * float(adamw.sum())
        if not ours:
            return None
        matched = self.adamw_lr * (theirs / ours) ** 0.5
        return min(matched, self.adamw_lr), max(matched, self.adamw_lr)
