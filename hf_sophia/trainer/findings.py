"""What would make Sophia wrong or slow in a run that works, with its remedy."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer import Trainer

from hf_sophia.trainer.asked import steps_of
from hf_sophia.trainer.diagnosis import Diagnosis, Finding
from hf_sophia.trainer.health import HEALTHY_CLIPPING

#: What counts as few: predictions in a refresh, refreshes in a run.
FEW_TOKENS = 256
FEW_REFRESHES = 20

#: The share of a tensor's moving coordinates without curvature that is worth a word.
MANY_FLAT = 0.05

#: The bound on the curvature that Sophia has unless the arguments say otherwise.
_EPS = 1e-12


def judge(
    diagnosis: Diagnosis,
    trainer: Trainer,
    optimizer: torch.optim.Optimizer | None,
    asked: dict[str, Any],
) -> None:
    """Say what is wrong or slow in a run that works.

    Args:
        diagnosis: What was measured; findings are added to it.
        trainer: The Trainer that would run.
        optimizer: What it was given or would make itself; None: what its arguments name.
        asked: Sophia's options there.
    """

    def add(severity: str, message: str) -> None:
        diagnosis.findings.append(Finding(severity, message))

    if diagnosis.rho is None:
        named = getattr(trainer.args.optim, "value", trainer.args.optim)
        instead, remedy = f"the arguments ask for --optim {named}", ""
        if optimizer is not None:
            instead = f"the Trainer has an optimizer of its own, {type(optimizer).__name__}"
            remedy = " in its place"
        add(
            "note",
            f"{instead}, so that nothing here would take place: give --optim sophia with the"
            f" options below{remedy}",
        )
    if isinstance(trainer.train_dataset, Iterator):
        add(
            "warning",
            "the data set is an iterator, which can be read once only: what was looked at is"
            " gone, and a second epoch would be empty",
        )
    unreached = [c.kind for c in diagnosis.curvatures if not c.tensors]
    if unreached:
        add(
            "warning",
            f"no gradient reaches {_listed(unreached)}: freeze what shall not train, or look"
            " for what cuts the graph",
        )
    still = [
        curvature.kind
        for curvature in diagnosis.curvatures
        if curvature.tensors and not any((part.m > 0).any() for part in curvature.tensors)
    ]
    if still:
        add(
            "note",
            f"the gradient of {_listed(still)} is 0 at the start, as behind weights that start"
            " at 0 (LoRA's A): nothing below tells of them",
        )
    if len(unreached) + len(still) == len(diagnosis.curvatures):
        add("error", "no parameter moves: the loss does not depend on any of them")
        return
    eps = asked.get("eps", _EPS)
    flat = [
        curvature.kind
        for curvature in diagnosis.curvatures
        if curvature.kind not in (*unreached, *still)
        and all((part.h <= eps).all() for part in curvature.tensors)
        and not all(part.negative.all() for part in curvature.tensors)
    ]
    if flat:
        why = (
            "Does the loss reach them other than through the logits, or is the model that certain?"
        )
        if diagnosis.estimator == "hutchinson":
            why = "Is the loss linear in them, or eps too large?"
        add(
            "warning",
            f"the Hessian of {_listed(flat)} is at most eps={eps:g} although gradients are not"
            f" 0. {why}",
        )
    if diagnosis.negative_share > MANY_FLAT:
        low, *_, high = diagnosis.rates()
        add(
            "warning",
            f"the Hessian of {diagnosis.negative_share:.0%} of the coordinates that move is"
            " negative: Hutchinson's estimates have both signs, and so has their average where it"
            " is mostly noise. There steps are full, and want to be smaller than with gnb: try"
            f" {low:g} to {high:g} times AdamW's learning rate",
        )
    for curvature in diagnosis.curvatures:
        worst = max((part.flat_share for part in curvature.tensors), default=0.0)
        if worst > MANY_FLAT and curvature.kind not in flat:
            curved = torch.cat([part.h[part.h > part.eps] for part in curvature.tensors])
            add(
                "warning",
                f"{worst:.0%} of the coordinates of {curvature.kind} that move have a Hessian of"
                f" at most eps={eps:g}, as rows of an embedding do that no refresh has seen. They"
                " take full steps of lr until m has faded, beside the share that rho=auto clips."
                f" eps={float(curved.quantile(0.01)):.0e}, the least hundredth of the others'"
                " Hessian, lets them fade",
            )
    if min(diagnosis.tokens) < FEW_TOKENS:
        add(
            "warning",
            f"a refresh counts {min(diagnosis.tokens):,} predictions, which makes a noisy"
            " estimate: a larger batch, gradient accumulation, or hessian_batch_fraction=1"
            " where a share is taken now",
        )
    for reason, share in diagnosis.not_fused.items():
        add(
            "note",
            f"the step of {share:.0%} of the coordinates is not fused, and takes several times as"
            f" long: {reason}",
        )
    low, high = HEALTHY_CLIPPING
    if isinstance(diagnosis.rho, int | float):
        clipped = diagnosis.clip_fraction(diagnosis.rho)
        if not low <= clipped <= high:
            add(
                "warning",
                f"rho={diagnosis.rho:g} would clip {clipped:.1%} of the coordinates:"
                f" {'nearly all take sign steps' if clipped > high else 'hardly any is kept'}"
                f"{'' if clipped > high else ' from a long step'}. rho=auto follows the data,"
                f" or take {diagnosis.fixed_options()}",
            )
    steps = steps_of(trainer)
    if 0 < steps < FEW_REFRESHES * diagnosis.k:
        add(
            "warning",
            f"{steps} steps have {-(-steps // diagnosis.k)} refreshes with k={diagnosis.k}, of"
            f" which the average of h takes in {1 / (1 - asked['betas'][1]):.0f}: a smaller k",
        )
    if diagnosis.rho is not None and not asked.get("bias_correction", False):
        add(
            "note",
            f"without bias_correction=true h is too small for about"
            f" {diagnosis.k / (1 - asked['betas'][1]):.0f} steps, and clips more than later",
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
