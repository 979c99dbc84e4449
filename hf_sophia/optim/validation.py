"""Checks of optimizer options: each names the option, what came and what is wanted."""

import math
from numbers import Integral, Real
from typing import Any


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")


def check_non_negative(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number >= 0."""
    _check_number(name, value)
    if not (value >= 0.0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number > 0."""
    _check_number(name, value)
    if not (value > 0.0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def check_fraction(name: str, value: Any) -> None:
    """Raise unless `value` lies in (0, 1]."""
    _check_number(name, value)
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")


def check_open_fraction(name: str, value: Any) -> None:
    """Raise unless `value` lies in (0, 1), without its ends."""
    _check_number(name, value)
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must lie in (0, 1), without 0 and 1, got {value!r}")


def check_betas(name: str, value: Any) -> None:
    """Raise unless `value` holds two decay rates in [0, 1)."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be two numbers (beta1, beta2), got {value!r}")
    for position, beta in enumerate(value):
        _check_number(f"{name}[{position}]", beta)
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}[{position}] must lie in [0, 1), got {beta!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _check_integer(name: str, value: Any, least: int) -> None:
    wanted = f"{name} must be an integer >= {least}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{wanted} ({type(value).__name__})")
    if value < least:
        raise ValueError(wanted)


def check_positive_integer(name: str, value: Any) -> None:
    """Raise unless `value` is an integer >= 1."""
    _check_integer(name, value, 1)


def check_count(name: str, value: Any) -> None:
    """Raise unless `value` is an integer >= 0."""
    _check_integer(name, value, 0)
