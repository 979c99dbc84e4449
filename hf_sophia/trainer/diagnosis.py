"""What the doctor found in a run: the sampled curvature, what follows from it, and its findings."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from hf_sophia.trainer.options import AUTO_DEFAULTS, SHARED_CLIP_FRACTION

#: Sophia's learning rate over AdamW's: for each estimator a grid that held the best one for
#: rho=auto in this package's studies, with the default shares. Where Hutchinson's h is negative,
#: coordinates take full steps, as all do under sign momentum, which wants far smaller ones.
RATES = {"gnb": (0.5, 1.0, 2.0, 4.0), "hutchinson": (0.125, 0.25, 0.5)}

#: The same with one threshold for a group, which clips far more.
GROUP_RATES = (0.125, 0.25, 0.5, 1.0, 2.0)

#: What part of the others' gradient may be rounding.
_ROUNDING = 1e-3

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
        m: |m|.
        h: The Hessian, at least eps.
        negative: Where it was below 0.
        weight: How many coordinates each of these stands for.
        eps: The bound on h.
        group: The parameter group of the tensor.
        target: The share that `rho=auto` is to clip of it.
    """

    n: torch.Tensor
    m: torch.Tensor
    h: torch.Tensor
    negative: torch.Tensor
    weight: float
    eps: float
    group: int = 0
    target: float = AUTO_DEFAULTS["target_clip_fraction"]

    @property
    def ratio(self) -> torch.Tensor:
        """What rho is compared with."""
        return self.n / self.h

    @property
    def moving(self) -> torch.Tensor:
        """Where there is a gradient worth the name.

        What stands before a softmax that does not depend on it, as a bias of attention's keys, has
        one of rounding alone.
        """
        curved = self.m[self.h > self.eps]
        typical = curved if len(curved) else self.m[self.m > 0.0]
        return self.m > _ROUNDING * (typical.median() if len(typical) else math.inf)

    @property
    def flat_share(self) -> float:
        """Of the coordinates that move, the share whose curvature is from 0 to eps."""
        if not (self.h > self.eps).any():
            return 0.0  # of these another finding tells
        flat = self.moving & (self.h <= self.eps) & ~self.negative
        return float(flat.sum() / self.moving.sum().clamp(min=1))


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
        plain_bytes: Peak memory of a step without a refresh; None on a CPU, whose allocator keeps
            what was freed, so that peaks tell nothing.
        refresh_bytes: Peak memory of a step with one.
        k: Steps between refreshes of the run that was asked for.
        rho: The threshold asked for, a number or `"auto"`; None: another optimizer was.
        target: The share that one threshold for all is to clip, a number or that
            of `rho_scope=group`.
        rho_scope: What has a threshold of its own then.
        nesterov: Whether n looks ahead.
        estimator: `"gnb"` or `"hutchinson"`.
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
    target: float = SHARED_CLIP_FRACTION
    rho_scope: str = "tensor"
    nesterov: bool = AUTO_DEFAULTS["nesterov"]
    estimator: str = "gnb"
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

    @property
    def samples(self) -> list[Sample]:
        """Those of all tensors that a gradient reaches."""
        return [part for curvature in self.curvatures for part in curvature.tensors]

    @property
    def negative_share(self) -> float:
        """Of the coordinates that move, the share whose Hessian is negative."""
        weights = _weights(self.samples) * torch.cat([part.moving for part in self.samples])
        negative = torch.cat([part.negative for part in self.samples])
        return float(weights[negative].sum() / weights.sum().clamp(min=1))

    def clip_fraction(self, rho: float) -> float:
        """Predict the share of the coordinates that move which a threshold would clip."""
        ratios = torch.cat([part.ratio for part in self.samples])
        weights = torch.where(ratios > 0, _weights(self.samples), 0.0)
        return float(weights[ratios >= rho].sum() / weights.sum())

    def rho_for(self, clip_fraction: float) -> float:
        """Return the threshold that would clip a share of the coordinates that move.

        Of those that have curvature: the others are clipped by any threshold worth its name.
        """
        return _quantile(*_counted(self.samples), 1.0 - clip_fraction)

    def fixed_options(self) -> str:
        """Return options with a number for rho that clips the target's share at first.

        That share of all that has curvature. Those that a number switches off are in it: without
        them it would clip another share.
        """
        nesterov = str(self.nesterov).lower()
        options = f"rho={self.rho_for(self.target):.2g},nesterov={nesterov},bias_correction=true"
        return options if self.estimator == "gnb" else f"{options},{self.estimator_option()}"

    def estimator_option(self) -> str:
        """Return the option that asks for the run's estimator."""
        return f"hessian_computation_type={self.estimator}"

    def auto_rho(self, part: Sample) -> float | None:
        """Return the threshold that `rho=auto` would come to; None: none, and sign steps.

        A run begins with far larger ones: its first h is of one estimate, many of whose values are
        small by chance, and here it is of several.

        Args:
            part: A tensor's sample.
        """
        together = [part]
        if self.rho_scope == "group":
            together = [other for other in self.samples if other.group == part.group]
        if not any(((other.ratio > 0) & (other.h > other.eps)).any() for other in together):
            return None
        ratios, weights = _counted(together)
        if self.rho_scope == "tensor":
            return float(ratios.quantile(1.0 - part.target))
        return _quantile(ratios, weights, 1.0 - part.target)

    def learning_rates(self) -> tuple[float, ...] | None:
        """Return learning rates to try, ascending, against AdamW's; None: that is unknown.

        A rule of thumb for `rho=auto`. In this package's studies the best one was AdamW's own to
        four times that, with one threshold for a group a sixth to twice, with Hutchinson's
        estimator a third to a half. With a number for rho and the paper's step a language model
        wanted far less, a sixth.
        """
        if self.adamw_lr is None or not self.curvatures:
            return None
        return tuple(rate * self.adamw_lr for rate in self.rates())

    def rates(self) -> tuple[float, ...]:
        """Return the learning rates to try over AdamW's."""
        if self.rho_scope == "group" and self.estimator != "hutchinson":
            return GROUP_RATES
        # An estimator that was added has not been measured: as for squares, which have one sign.
        return RATES.get(self.estimator, RATES["gnb"])


def _counted(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n / h of the coordinates that a threshold is chosen by, and their weights.

    Those that move and have curvature; where none has, those that move.
    """
    ratios = torch.cat([part.ratio for part in samples])
    moving = ratios > 0
    curved = moving & torch.cat([part.h > part.eps for part in samples])
    counted = curved if curved.any() else moving
    return ratios[counted], _weights(samples)[counted]


def _weights(samples: list[Sample]) -> torch.Tensor:
    return torch.cat([torch.full_like(part.n, part.weight) for part in samples])


def _quantile(values: torch.Tensor, weights: torch.Tensor, share: float) -> float:
    """Return the value below which a share of the weights lies."""
    values, order = values.sort()
    below = weights[order].cumsum(0)
    place = torch.searchsorted(below, share * below[-1])
    return float(values[place.clamp(max=len(values) - 1)])
