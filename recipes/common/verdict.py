"""What the records of a study say: a table and a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

from common.study import OWN_ARGUMENTS, Trial
from common.trials import Record
from hf_sophia.trainer.picture import new_figure

DASHES = ("-", "--", ":")
# What one line takes in the height of the legend.
LEGEND_INCHES = 0.18


@dataclass(frozen=True)
class Line:
    """A candidate's or an ablation's runs, one for each seed.

    Args:
        name: What to call it.
        trial: The trial of the first seed.
        records: Of all seeds, in their order.
        paces: Seconds per step in each round, in turns with the other lines; empty: not measured.
    """

    name: str
    trial: Trial
    records: Sequence[Record]
    paces: Sequence[float] = ()

    @property
    def losses(self) -> list[float]:
        """The best validation loss with each seed; infinite where a run failed."""
        return [record.best for record in self.records]

    @property
    def pace(self) -> float:
        """Seconds per step, the median over rounds; NaN where it was not measured."""
        return median(self.paces) if self.paces else math.nan

    @property
    def rank(self) -> tuple[int, float]:
        """What lines are sorted by: first the number of runs that failed, then the mean loss."""
        reached = [loss for loss in self.losses if math.isfinite(loss)]
        return len(self.losses) - len(reached), mean(reached) if reached else math.inf


def table(lines: Sequence[Line], reference: Line) -> str:
    """Make a Markdown table, the lowest loss first.

    Steps and wall-clock are those to the reference's best loss of the same seed, over what the
    reference takes to it. Wall-clock counts steps by the pace: the median over rounds of the ratio
    to the reference's seconds per step, shown with the least and the largest.

    Args:
        lines: What to compare.
        reference: What to compare with, one of the lines.
    """
    rows = [
        f"| optimizer | validation loss | minus {reference.name} | steps | wall-clock | s/step"
        " | pace | settings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in sorted(lines, key=lambda line: line.rank):
        ours, theirs = line.losses, reference.losses
        gaps = [own - other for own, other in zip(ours, theirs, strict=True)]
        rows.append(
            f"| {line.name} | {_spread(ours)} | {_spread(gaps, sign=True)}"
            f" | {_ratio(steps_ratios(line, reference))}"
            f" | {_ratio(steps_ratios(line, reference, timed=True))}"
            f" | {line.pace:.3f} | {_range(pace_ratios(line, reference))}"
            f" | {settings(line.trial)} |"
        )
    return "\n".join(rows) + "\n"


def settings(trial: Trial) -> str:
    """Say what a candidate's best trial was set to."""
    shown = ("learning_rate", *OWN_ARGUMENTS)
    own = {name: value for name, value in trial.arguments.items() if name in shown}
    return ", ".join(f"{name} {value}" for name, value in {**own, **trial.optim_args}.items())


def pace_ratios(line: Line, reference: Line) -> list[float]:
    """Return the line's seconds per step over the reference's, for each round."""
    if len(line.paces) != len(reference.paces):
        return []
    return [own / other for own, other in zip(line.paces, reference.paces, strict=True)]


def differences(records: Sequence[Record]) -> str:
    """Say in what the environments of records differ; empty: in nothing.

    Losses depend on it a little, and times much.
    """
    names = dict.fromkeys(name for record in records for name in record.environment)
    found = {
        name: sorted({str(record.environment.get(name, "unknown")) for record in records})
        for name in names
    }
    return "; ".join(f"{name}: {', '.join(v)}" for name, v in found.items() if len(v) > 1)


def steps_ratios(line: Line, reference: Line, *, timed: bool = False) -> list[float | None]:
    """Return, for each seed, the steps to the reference's best loss over the reference's own.

    Args:
        line: What to compare.
        reference: What to compare with.
        timed: Return ratios of wall-clock instead.
    """
    pace = median(pace_ratios(line, reference) or [math.nan]) if timed else 1.0
    ratios: list[float | None] = []
    for own, other in zip(line.records, reference.records, strict=True):
        steps = own.steps_to(other.best)
        wanted = other.steps_to(other.best)
        ratios.append(None if steps is None or wanted is None else pace * steps / wanted)
    return ratios


def _spread(values: Sequence[float], *, sign: bool = False) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "failed"
    shown = f"{mean(finite):+.3f}" if sign else f"{mean(finite):.3f}"
    if len(finite) > 1:
        shown += f" ± {stdev(finite):.3f}"
    return shown if len(finite) == len(values) else f"{shown} ({len(finite)} of {len(values)})"


def _range(ratios: Sequence[float]) -> str:
    if not ratios:
        return "unknown"
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _ratio(ratios: Sequence[float | None]) -> str:
    reached = [ratio for ratio in ratios if ratio is not None]
    if not reached:
        return "never"
    if any(math.isnan(ratio) for ratio in reached):
        return "unknown"
    shown = f"{mean(reached):.2f}"
    return shown if len(reached) == len(ratios) else f"{shown} ({len(reached)} of {len(ratios)})"


def learning_rates(grids: Mapping[str, Sequence[tuple[float, Record]]]) -> str:
    """Make a Markdown list of what each learning rate gave, with the first seed."""
    rows = []
    for name, grid in grids.items():
        points = ", ".join(f"{rate:g}: {record.best:.3f}" for rate, record in grid)
        rows.append(f"- {name}: {points}")
    return "\n".join(rows) + "\n"


def plot(lines: Sequence[Line], path: Path, title: str) -> Path | None:
    """Draw the validation losses of every line over steps, the mean of its seeds.

    Args:
        lines: What to draw.
        path: The PNG to write.
        title: Stands above the picture.

    Returns:
        The path, or None where matplotlib is not installed.
    """
    try:
        figure = new_figure(figsize=(9.0, max(5.0, 0.2 + LEGEND_INCHES * len(lines))))
    except ModuleNotFoundError:
        return None
    axes = figure.subplots()
    for index, line in enumerate(sorted(lines, key=lambda line: line.rank)):
        curves = [record.evaluations for record in line.records if math.isfinite(record.best)]
        if curves:
            steps = [step for step, _ in curves[0]]
            means = [mean(loss for _, loss in point) for point in zip(*curves, strict=True)]
            label = f"{line.name}: {line.rank[1]:.3f}"
            # Both by the index, as a color alone repeats after ten lines.
            color, dashes = f"C{index % 10}", DASHES[index // 10 % len(DASHES)]
            axes.plot(steps, means, label=label, color=color, linestyle=dashes, linewidth=1.3)
    # The first evaluations would squeeze the rest, where the curves part.
    whole = [r for line in lines for r in line.records if math.isfinite(r.best)]
    early = [record.evaluations[len(record.evaluations) // 3][1] for record in whole]
    if early := [loss for loss in early if math.isfinite(loss)]:
        axes.set_ylim(min(record.best for record in whole) - 0.05, max(early))
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("validation loss (nats)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.lines:
        # Beside the axes: many lines leave no room within.
        figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path)
    return path
