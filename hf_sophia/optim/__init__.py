"""The optimizers. They know torch alone: no model, no Trainer."""

from hf_sophia.optim.adam import Adam
from hf_sophia.optim.base import BaseOptimizer
from hf_sophia.optim.radam import RAdam
from hf_sophia.optim.sophia import NonFiniteHessianError, Sophia
from hf_sophia.optim.weight_decay import WeightDecay

#: Every optimizer by its `--optim` name. The contract tests and the registration iterate it.
OPTIMIZERS: dict[str, type[BaseOptimizer]] = {"sophia": Sophia, "adam": Adam, "radam": RAdam}

__all__ = [
    "OPTIMIZERS",
    "Adam",
    "BaseOptimizer",
    "NonFiniteHessianError",
    "RAdam",
    "Sophia",
    "WeightDecay",
]
