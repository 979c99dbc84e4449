"""Makes `sophia`, `adam` and `radam` valid `optim` names of transformers; it can be undone.

Two tables of transformers know the optimizers: the enum `OptimizerNames`, which the command line,
`TrainingArguments` and `set_optimizer` check against, and the handlers that build an optimizer. An
enum can't be subclassed once it has members, and a replaced one would not be the one that other
modules hold, so the names are added to the enum in place.
"""

import sys
from collections.abc import Callable
from inspect import signature
from types import ModuleType
from typing import Any

from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames

from hf_sophia.optim import OPTIMIZERS
from hf_sophia.trainer.options import OPTION_TABLES, constructor_options, known_options
from hf_sophia.trainer.trainer_sophia import TrainerSophia


def _handler(name: str) -> Callable[[Any], tuple[type, dict[str, Any]]]:
    optimizer = TrainerSophia if name == "sophia" else OPTIMIZERS[name]
    default_betas = signature(OPTIMIZERS[name]).parameters["betas"].default

    def build(context: Any) -> tuple[type, dict[str, Any]]:
        return optimizer, constructor_options(name, context.args, default_betas)

    return build


_HANDLERS = {name: _handler(name) for name in OPTIMIZERS}
_stock_parse_optim_args = trainer_optimizer._parse_optim_args


def _parse_optim_args(text: str | None) -> dict[str, str]:
    """Parse as transformers does; a malformed text gets a message instead of an unpacking error."""
    try:
        return _stock_parse_optim_args(text)
    except ValueError:
        options = "; ".join(f"{name}: {known_options(name)}" for name in OPTION_TABLES)
        raise ValueError(
            f"optim_args {text!r} is not of the form option=value,option=value. Options of"
            f" hf_sophia's optimizers: {options}"
        ) from None


def _modules_with_parser() -> list[ModuleType]:
    """The modules that hold the parser by name: its own, and the Trainer's once imported."""
    modules = [trainer_optimizer, sys.modules.get("transformers.trainer")]
    return [module for module in modules if module is not None]


def register() -> None:
    """Add the names to transformers. Called by `import hf_sophia`; calling it again is harmless.

    Raises:
        RuntimeError: transformers has an optimizer of one of these names itself.
    """
    handlers = trainer_optimizer._OPTIMIZER_HANDLERS
    members = {name: OptimizerNames._value2member_map_.get(name) for name in _HANDLERS}
    for name, member in members.items():
        if member is not None and handlers.get(member) is not _HANDLERS[name]:
            raise RuntimeError(
                f"transformers already has an optimizer named {name!r}; hf_sophia can't register"
                " its own. Use an hf_sophia release that knows this transformers version"
            )
    for name, member in members.items():
        handlers[member or _add_member(name)] = _HANDLERS[name]
    for module in _modules_with_parser():
        module._parse_optim_args = _parse_optim_args


def unregister() -> None:
    """Restore transformers to what it was before `register()`. Harmless when not registered."""
    for name, handler in _HANDLERS.items():
        member = OptimizerNames._value2member_map_.get(name)
        if member is not None and trainer_optimizer._OPTIMIZER_HANDLERS.get(member) is handler:
            del trainer_optimizer._OPTIMIZER_HANDLERS[member]
            _remove_member(member)
    for module in _modules_with_parser():
        if module._parse_optim_args is _parse_optim_args:
            module._parse_optim_args = _stock_parse_optim_args


def _add_member(value: str) -> OptimizerNames:
    name = value.upper()
    member = str.__new__(OptimizerNames, value)
    member._name_ = name
    member._value_ = value
    member._sort_order_ = len(OptimizerNames._member_names_)
    OptimizerNames._member_names_.append(name)
    OptimizerNames._member_map_[name] = member
    OptimizerNames._value2member_map_[value] = member
    # EnumType refuses to set a member; a plain class attribute is how Python stores one.
    type.__setattr__(OptimizerNames, name, member)
    _hashable_values().append(value)
    return member


def _remove_member(member: OptimizerNames) -> None:
    OptimizerNames._member_names_.remove(member._name_)
    del OptimizerNames._member_map_[member._name_]
    del OptimizerNames._value2member_map_[member._value_]
    type.__delattr__(OptimizerNames, member._name_)
    if member._value_ in _hashable_values():
        _hashable_values().remove(member._value_)


def _hashable_values() -> list[str]:
    """The list that `value in OptimizerNames` reads from Python 3.13 on; a throw-away before."""
    return vars(OptimizerNames).get("_hashable_values_", [])
