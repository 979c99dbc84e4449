"""The picture of training runs: losses, learning rate and Sophia's own values over steps.

Drawn with matplotlib, which is imported on first use and is not needed for anything else.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What a Trainer logs, entry by entry: `trainer.state.log_history`.
History = Sequence[Mapping[str, Any]]

#: Okabe and Ito's palette without its yellow, which is too pale for lines on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: As many as colours, so that runs can be told apart in grey.
_STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 3)), (0, (1, 3)))
_MARKERS = "osD^vPX"

_TITLE_WIDTH = 80
#: Characters that fit into a line of the legend, and those that a run's line and gaps take.
_LEGEND_WIDTH = 92
_LEGEND_HANDLE = 12

#: The loss panel shows what is not above the losses after this share of a run's steps. The first
#: losses would squeeze the rest, where runs part.
_EARLY = 0.05


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Args:
        label: Names its vertical axis.
        key: What it shows over steps.
        evaluated: The same of evaluations, or None.
        log: Whether its scale is logarithmic.
    """

    label: str
    key: str
    evaluated: str | None = None
    log: bool = False

    def has_points(self, history: History) -> bool:
        """Whether a run has a value to show."""
        return bool(_points(history, self.key) or _points(history, self.evaluated))


_PANELS = (
    Panel("loss", "loss", evaluated="eval_loss"),
    Panel("learning rate", "learning_rate"),
    Panel("clip fraction\n(of coordinates)", "sophia/clip_fraction"),
    Panel("Hessian norm\n(L2 of h)", "sophia/hessian_norm", log=True),
    Panel("rho\n(geometric mean)", "sophia/rho", log=True),
)


def has_points(history: History) -> bool:
    """Whether a run has logged anything to draw.

    Args:
        history: What it has logged.
    """
    return any(panel.has_points(history) for panel in _PANELS)


def draw(
    histories: Mapping[str, History], title: str | None = None, unit: str = "nats"
) -> "Figure":
    """Draw runs over their optimizer steps, a panel for each value that any of them has logged.

    Args:
        histories: What each run has logged, under its name.
        title: Stands above the picture; None: the name of a single run.
        unit: What the losses are measured in.

    Returns:
        A figure; `savefig` writes it.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: There are no runs, or one has logged nothing to draw.

    Example:
        ```python
        draw({"sophia": trainer.state.log_history}).savefig("sophia.png")
        ```
    """
    if not histories:
        raise ValueError("there are no runs to draw")
    for name, history in histories.items():
        if not has_points(history):
            raise ValueError(
                f"the run {name!r} has logged nothing to draw; train on, or log more often"
                " (--logging_steps)"
            )
    panels = [panel for panel in _PANELS if any(map(panel.has_points, histories.values()))]
    # The first has a row for itself, and so has the last where it would stand alone.
    first, *keys = [panel.key for panel in panels]
    rows = [[first, first], *(keys[i : i + 2] for i in range(0, len(keys), 2))]
    rows[-1] = [rows[-1][0], rows[-1][-1]]
    figure = new_figure(figsize=(9.0, 1.4 + 2.4 * len(rows)))
    axes = figure.subplot_mosaic(rows, sharex=True, height_ratios=[1.6, *[1.0] * (len(rows) - 1)])
    for panel in panels:
        _fill(axes[panel.key], panel, histories, unit)
        # Panels are of two widths: not all stand above each other's numbers.
        axes[panel.key].tick_params(labelbottom=True)
    for key in rows[-1]:
        axes[key].set_xlabel("optimizer steps")
    axes[first].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.align_ylabels()
    if title is not None or len(histories) == 1:
        shown = textwrap.fill(title or next(iter(histories)), _TITLE_WIDTH)
        figure.suptitle(shown, parse_math=False)
    if len(histories) > 1:
        _name_runs(figure, list(histories))
    return figure


def new_figure(**options: Any) -> "Figure":
    """Make an empty figure of matplotlib's.

    Args:
        **options: Passed on.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        # Not pyplot, which would choose a backend for the whole process.
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "drawing needs matplotlib: pip install 'hf_sophia[plots]'", name=error.name
        ) from error
    return Figure(**{"dpi": 150, "layout": "constrained", **options})


def _points(history: History, key: str | None) -> list[tuple[float, float]]:
    """Return a value's steps and values."""
    found = [(entry.get("step"), entry.get(key)) for entry in history]
    return [point for point in found if all(isinstance(x, int | float) for x in point)]


def _look(index: int) -> dict[str, Any]:
    # One further at each round through the colours: no two of 49 runs look alike.
    shifted = index + index // len(_COLOURS)
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _STYLES[shifted % len(_STYLES)],
        "marker": _MARKERS[shifted % len(_MARKERS)],
        "markersize": 5,
        "linewidth": 1.5,
    }


def _fill(axes: "Axes", panel: Panel, histories: Mapping[str, History], unit: str) -> None:
    kinds = set()
    for index, history in enumerate(histories.values()):
        points, evaluated = _points(history, panel.key), _points(history, panel.evaluated)
        # A single point would make no line.
        look = _look(index) | ({"marker": ""} if len(points) > 1 else {})
        if points:
            faint = {"alpha": 0.6, "linewidth": 1.0} if evaluated else {}
            axes.plot(*zip(*points, strict=True), **(look | faint))
            kinds.add("training")
        if evaluated:
            axes.plot(*zip(*evaluated, strict=True), **_look(index))
            kinds.add("validation")
    axes.grid(alpha=0.3)
    if panel.log:
        _scale_logarithmically(axes)
    if panel.evaluated is None:
        axes.set_ylabel(panel.label)
        return
    _leave_out_early_values(axes)
    kind = kinds.pop() + " " if len(kinds) == 1 else ""
    axes.set_ylabel(f"{kind}{panel.label} ({unit})")
    if not kind:
        _explain_kinds(axes)


def _scale_logarithmically(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    values = [y for line in axes.lines for y in line.get_ydata() if 0 < y < math.inf]
    if not values:
        return  # a Hessian of zeros
    axes.set_yscale("log", nonpositive="mask")
    if max(values) < 4 * min(values):
        # So near to each other there might be no number beside them.
        middle = math.sqrt(min(values) * max(values))
        axes.set_ylim(middle / 3, middle * 3)
    subs = (1, 2, 5) if max(values) < 1000 * min(values) else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _leave_out_early_values(axes: "Axes") -> None:
    tops = []
    for line in axes.lines:
        steps, values = line.get_data()
        later = [y for x, y in zip(steps, values, strict=True) if x >= _EARLY * max(steps)]
        tops += [y for y in later if math.isfinite(y)]
    low, high = axes.get_ylim()
    if tops:
        axes.set_ylim(low, min(high, max(tops) + 0.05 * (max(tops) - low)))


def _explain_kinds(axes: "Axes") -> None:
    from matplotlib.lines import Line2D

    axes.legend(
        handles=[
            Line2D([], [], color="grey", linewidth=1.0, label="training"),
            Line2D([], [], color="grey", linewidth=1.5, marker="o", label="validation"),
        ]
    )


def _name_runs(figure: "Figure", names: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_look(index)) for index in range(len(names))]
    # A legend leaves out what begins with an underscore.
    labels = [textwrap.fill(f"./{n}" if n.startswith("_") else n, _LEGEND_WIDTH) for n in names]
    widest = max(len(name) for name in names) + _LEGEND_HANDLE
    columns = max(1, min(len(names), _LEGEND_WIDTH // widest))
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, handlelength=4
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    # The panels shall not pay for it.
    lines = math.ceil(sum(1 + label.count("\n") for label in labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.22 * lines)
