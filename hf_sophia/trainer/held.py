"""What looking at a run leaves behind in the objects of that run, taken back."""

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy
import torch

_CONTAINERS = (dict, defaultdict, OrderedDict, Counter, list, set, deque)

#: Where a tensor keeps its hooks.
_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@contextmanager
def held(*things: Any) -> Iterator[None]:
    """Take back what is done to the attributes of some objects.

    That is which objects they are, what is in those that are containers, in dictionaries of
    dictionaries too, and how far generators of random numbers have come; objects that hold other
    things otherwise, tensors among them, are as they have become.

    Args:
        *things: The objects; those without attributes are left out.
    """
    steps: list[Callable[[], Any]] = []
    seen: set[int] = set()

    def note(value: Any) -> None:
        if id(value) in seen or (step := _way_back(value)) is None:
            return
        seen.add(id(value))
        steps.append(step)
        if isinstance(value, dict):
            for inner in value.values():
                note(inner)

    for thing in things:
        note(getattr(thing, "__dict__", None))
    try:
        yield
    finally:
        for step in steps:
            step()


@contextmanager
def generators_held(thing: Any) -> Iterator[None]:
    """Let generators of random numbers that are attributes of an object come no further.

    Args:
        thing: The object, whose containers may be too large to note.
    """
    values = getattr(thing, "__dict__", {}).values()
    steps = [_way_back(value) for value in values if type(value) not in _CONTAINERS]
    try:
        yield
    finally:
        for step in filter(None, steps):
            step()


def _way_back(value: Any) -> Callable[[], Any] | None:
    """Return what makes something as it is now; None for what is not noted."""
    if type(value) in _CONTAINERS:
        # Not what is in it: a list may be the data set.
        return partial(_refill, value, copy.copy(value))
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, numpy.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, numpy.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _refill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(content)


@contextmanager
def hooks_held(params: Iterable[torch.Tensor]) -> Iterator[None]:
    """Take hooks of parameters off again that were registered meanwhile.

    Args:
        params: The parameters.
    """
    before = [(param, name, set(getattr(param, name) or ())) for param in params for name in _HOOKS]
    try:
        yield
    finally:
        for param, name, keys in before:
            # Autograd has the dictionary too: only out of that they are gone.
            hooks = getattr(param, name) or {}
            for key in hooks.keys() - keys:
                del hooks[key]
