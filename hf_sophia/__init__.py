"""The Sophia optimizer (with Adam and RAdam) for PyTorch and Hugging Face Transformers.

Importing this package makes `--optim sophia`, `adam` and `radam` valid in `TrainingArguments`.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from hf_sophia.estimators import gauss_newton_bartlett, hutchinson
from hf_sophia.optim import Adam, RAdam, Sophia, WeightDecay
from hf_sophia.trainer.registration import register, unregister

if TYPE_CHECKING:
    from hf_sophia.trainer.card_facts import TrainingCorpus
    from hf_sophia.trainer.examination import diagnose
    from hf_sophia.trainer.publishing import HubPushError
    from hf_sophia.trainer.sophia_trainer import (
        SophiaSeq2SeqTrainer,
        SophiaTrainer,
        SophiaTrainerMixin,
    )

__version__ = version("hf_sophia")

__all__ = [
    "Adam",
    "HubPushError",
    "RAdam",
    "Sophia",
    "SophiaSeq2SeqTrainer",
    "SophiaTrainer",
    "SophiaTrainerMixin",
    "TrainingCorpus",
    "WeightDecay",
    "diagnose",
    "gauss_newton_bartlett",
    "hutchinson",
    "register",
    "unregister",
]

register()


_LATER = {
    "HubPushError": "hf_sophia.trainer.publishing",
    "TrainingCorpus": "hf_sophia.trainer.card_facts",
    "SophiaSeq2SeqTrainer": "hf_sophia.trainer.sophia_trainer",
    "SophiaTrainer": "hf_sophia.trainer.sophia_trainer",
    "SophiaTrainerMixin": "hf_sophia.trainer.sophia_trainer",
    "diagnose": "hf_sophia.trainer.examination",
}


def __getattr__(name: str) -> Any:
    """Import the trainers on first use: `transformers.trainer` takes seconds to import."""
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
