"""The picture of a run's losses, for its folder and its model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def load_pyplot() -> ModuleType | None:
    """Return matplotlib's pyplot, drawing into files, or None where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_losses(
    log_history: Sequence[Mapping[str, Any]],
    path: Path,
    title: str = "",
    unit: str = "nats",
) -> Path | None:
    """Draw training and evaluation loss over steps.

    Args:
        log_history: `trainer.state.log_history`.
        path: The PNG to write.
        title: Stands above the picture.
        unit: What the loss is measured in.

    Returns:
        The path, or None where nothing was logged or matplotlib is not installed.
    """
    curves = {
        name: [(entry["step"], entry[name]) for entry in log_history if name in entry]
        for name in ("loss", "eval_loss")
    }
    if not any(curves.values()) or (pyplot := load_pyplot()) is None:
        return None
    figure, axes = pyplot.subplots(figsize=(7.0, 4.5), layout="constrained")
    for name, label, style in (
        ("loss", "training", {"color": "#0072B2", "linewidth": 1.2}),
        ("eval_loss", "validation", {"color": "#D55E00", "marker": "o", "markersize": 4}),
    ):
        if curves[name]:
            axes.plot(*zip(*curves[name], strict=True), label=label, **style)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(f"loss ({unit})")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
