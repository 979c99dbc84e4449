"""Metric modules for `evaluate`, shipped with the package so that they load without the Hub."""

from pathlib import Path


def metric_path(name: str) -> str:
    """Return the path to give `evaluate.load`.

    Args:
        name: The metric's name: `"language_modeling"`.

    Returns:
        The module's path.

    Raises:
        ValueError: There is no such metric; the message lists those there are.
    """
    folder = Path(__file__).parent
    known = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    if name not in known:
        raise ValueError(f"unknown metric {name!r}; known: {', '.join(known)}")
    return str(folder / f"{name}.py")
