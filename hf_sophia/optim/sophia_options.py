"""What Sophia's own options may be."""

from typing import Any

import torch

from hf_sophia.optim.validation import check_positive

#: What `hessian_computation_type` may be: the estimator that `step()` runs by itself.
HESSIAN_COMPUTATION_TYPES = ("gnb", "hutchinson")


#: The rho that follows the data.
AUTO = "auto"

#: What has one rho of its own under `rho="auto"`.
RHO_SCOPES = ("tensor", "group")


def check_rho(name: str, value: Any) -> None:
    """Refuse all but a number > 0 that fp32 holds, and `"auto"`."""
    if value != AUTO:
        if isinstance(value, str):
            raise ValueError(f"{name} must be a number > 0 or {AUTO!r}, got {value!r}")
        check_positive(name, value)
        if value > torch.finfo(torch.float32).max:
            raise ValueError(f"{name} must be a number that fp32 holds, got {value!r}")


def check_rho_scope(name: str, value: Any) -> None:
    """Refuse all but one of `RHO_SCOPES`."""
    if value not in RHO_SCOPES:
        known = ", ".join(map(repr, RHO_SCOPES))
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def check_hessian_computation_type(name: str, value: Any) -> None:
    """Refuse all but one of `HESSIAN_COMPUTATION_TYPES`."""
    if value not in HESSIAN_COMPUTATION_TYPES:
        known = ", ".join(map(repr, HESSIAN_COMPUTATION_TYPES))
        raise ValueError(f"{name} must be one of {known}, got {value!r}")
