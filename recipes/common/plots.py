"""A picture of a training run."""

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


def plot_losses(
    log_history: list[dict[str, Any]], path: Path, title: str, unit: str = "nats per token"
) -> Path | None:
    """Draw training and evaluation loss over steps.

    Args:
        log_history: `trainer.state.log_history`.
        path: The PNG to write.
        title: Stands above the picture.
        unit: What the loss is measured in.

    Returns:
        The path, or None where matplotlib is not installed.
    """
    if (pyplot := load_pyplot()) is None:
        return None

    figure, axes = pyplot.subplots(figsize=(7.0, 4.5), layout="constrained")
    for key, label, style in (
        ("loss", "training", {"color": "#0072B2", "linewidth": 1.2}),
        ("eval_loss", "validation", {"color": "#D55E00", "marker": "o", "markersize": 4}),
    ):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(f"loss ({unit})")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
