"""What a diagnosis says, as text."""

import statistics

import torch

from hf_sophia.trainer.diagnosis import LADDER, Diagnosis
from hf_sophia.trainer.options import AUTO_DEFAULTS

_QUANTILES = (0.01, 0.5, 0.99)


def report(diagnosis: Diagnosis) -> str:
    """Return a diagnosis as tables in Markdown.

    Args:
        diagnosis: What was found.
    """
    parts = ["# hf-sophia doctor", _overview(diagnosis)]
    parts.append(
        "\n".join(f"- {finding.severity}: {finding.message}" for finding in diagnosis.findings)
        or "Nothing was found that would make Sophia wrong or slow here."
    )
    if not diagnosis.failed:
        parts += [
            f"## Curvature\n\n{_spectrum(diagnosis)}",
            f"## Clipping\n\n{_ladder(diagnosis)}",
            f"## Recommended\n\n{_recommended(diagnosis)}",
        ]
    return "\n\n".join(parts) + "\n"


def _overview(diagnosis: Diagnosis) -> str:
    lines = [
        ("model", diagnosis.model),
        ("head", diagnosis.head or "none was seen"),
        ("Hessian", diagnosis.way or "no way was chosen"),
    ]
    if diagnosis.tokens:
        low, high = min(diagnosis.tokens), max(diagnosis.tokens)
        lines.append(("predictions in a refresh", f"{low:,}" + f" to {high:,}" * (high > low)))
    if not diagnosis.failed:
        plain, refresh = (
            f"{seconds * 1e3:.1f} ms"
            for seconds in (diagnosis.plain_seconds, diagnosis.refresh_seconds)
        )
        # Noise may have made refreshes seem faster than plain steps.
        extra = max(diagnosis.overhead, 0.0)
        time = f"a step {plain}, with a refresh {refresh}: {extra:.1%} at k={diagnosis.k}"
        lines.append(("time", time))
        size = sum(curvature.size for curvature in diagnosis.curvatures)
        memory = (
            f"with a refresh about {4 * size / 2**20:+,.1f} MiB expected, the sums in fp32; it is"
            " measured on a CUDA device only"
        )
        if diagnosis.plain_bytes is not None and diagnosis.refresh_bytes is not None:
            step = diagnosis.plain_bytes / 2**20
            more = diagnosis.refresh_bytes / 2**20 - step
            memory = f"a step {step:,.0f} MiB, with a refresh {more:+,.0f} MiB"
        lines.append(("memory", memory))
    return _table(("", ""), lines)


def _spectrum(diagnosis: Diagnosis) -> str:
    rows = []
    for curvature in diagnosis.curvatures:
        if not curvature.tensors:
            rows.append((curvature.kind, f"{curvature.size:,}", *["no gradient"] * 5))
            continue
        m = torch.cat([part.m for part in curvature.tensors])
        h = torch.cat([part.h for part in curvature.tensors])
        # By rank: each tensor's sample counts alike among tensors of one kind and size.
        quantiles = h.quantile(torch.tensor(_QUANTILES)).tolist()
        found = (diagnosis.auto_rho(part) for part in curvature.tensors)
        thresholds = [rho for rho in found if rho is not None]
        rho = statistics.geometric_mean(thresholds) if thresholds else 0.0
        rows.append(
            (
                curvature.kind,
                f"{curvature.size:,}",
                *(f"{quantile:.1e}" for quantile in quantiles),
                f"{float(m.median()):.1e}",
                f"{rho:.2g}",
            )
        )
    names = ("parameters", "number", *(f"h, {q:.0%}" for q in _QUANTILES), "abs(m), 50%")
    return _table((*names, "rho=auto"), rows)


def _ladder(diagnosis: Diagnosis) -> str:
    rows = [(f"{rho:g}", f"{diagnosis.clip_fraction(rho):.1%}") for rho in LADDER]
    return _table(("rho", "coordinates clipped"), rows)


def _recommended(diagnosis: Diagnosis) -> str:
    defaults = ",".join(f"{name}={value}".lower() for name, value in AUTO_DEFAULTS.items())
    options = "`--optim sophia`"
    if diagnosis.estimator != "gnb":
        options += f" with {diagnosis.estimator_option()}"
    lines = [
        ("options", f"{options}, whose defaults are {defaults}"),
        (
            f"a fixed rho that clips {100 * diagnosis.target:.2g} % of what has curvature",
            diagnosis.fixed_options(),
        ),
    ]
    rates = diagnosis.learning_rates()
    if rates is None:
        lines.append(("learning rate", "unknown; give --adamw-lr to compare with"))
    else:
        grid = ", ".join(f"{rate:.3g}" for rate in rates)
        lines.append(
            (
                "learning rate",
                f"with rho=auto one of {grid}, against AdamW's {diagnosis.adamw_lr:g}",
            )
        )
    return _table(("", ""), lines)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Make a Markdown table whose columns line up in a terminal too."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: tuple[str, ...]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([line(head), rule, *map(line, rows)])
