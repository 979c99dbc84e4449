"""Gives every Trainer of a process the Hessian refresh, for scripts that do not know of Sophia.

A script names its Trainer's class itself, and libraries subclass it before it could be replaced in
some module. So the class stays what it is, and its instances change theirs: to the class that was
asked for, with `SophiaTrainerMixin` put first among its bases.
"""

import functools
import types
from typing import Any

from transformers.trainer import Trainer

from hf_sophia.trainer.sophia_trainer import SophiaTrainerMixin

_stock_init = Trainer.__init__


class _InjectedMixin(SophiaTrainerMixin):
    def __init_subclass__(cls) -> None:
        # No call to super: the hook of a script's own base is for the script's own classes.
        pass


@functools.cache
def with_mixin(cls: type) -> type:
    """Return a Trainer's class with `SophiaTrainerMixin` first among its bases.

    Args:
        cls: The class; one that has the mixin already is returned as it is.

    Returns:
        A subclass of the same name, the same one each time.
    """
    if issubclass(cls, SophiaTrainerMixin):
        return cls
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return types.new_class(
        cls.__name__, (_InjectedMixin, cls), exec_body=lambda space: space.update(names)
    )


@functools.wraps(_stock_init)
def _init(self: Trainer, *args: Any, **kwargs: Any) -> None:
    self.__class__ = with_mixin(type(self))
    _stock_init(self, *args, **kwargs)


def inject() -> None:
    """From now on make every Trainer with the mixin. Calling it again is harmless."""
    Trainer.__init__ = _init


def withdraw() -> None:
    """Make Trainers as transformers does again. Harmless when nothing was injected."""
    Trainer.__init__ = _stock_init
