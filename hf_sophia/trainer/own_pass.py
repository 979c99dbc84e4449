"""A forward pass for the Hessian alone, on a share of the batch, that training does not notice."""

import functools
import inspect
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
from torch import distributed
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_sophia.estimators.likelihoods import IGNORE_INDEX
from hf_sophia.trainer.heads import base_model, shifts_labels


def share_counts(batches: Sequence[Mapping[str, Any]], fraction: float) -> list[int]:
    """Say how many examples of each micro-batch a share of the step's examples takes.

    After each micro-batch `ceil(fraction * seen)` examples have been taken, so that the first one
    gives at least one and a fraction that is smaller than one example a micro-batch skips some. A
    batch that can't be cut along the first dimension of all its tensors, a packed one for instance,
    is taken whole, and later ones are skipped for it.

    Args:
        batches: The step's micro-batches.
        fraction: The share, in (0, 1].
    """
    counts: list[int] = []
    seen = 0
    for inputs in batches:
        rows = count_examples(inputs)
        seen += rows
        # 0.1 * 30 is a little more than 3.
        wanted = max(0, math.ceil(fraction * seen - 1e-9) - sum(counts))
        whole = wanted >= rows or (wanted > 0 and not _divisible(inputs, rows))
        counts.append(rows if whole else wanted)
    return counts


def agreed_counts(counts: list[int], device: torch.device) -> list[int]:
    """Make processes that run each pass together agree which micro-batches have one.

    Args:
        counts: This process's counts of examples; their number is the same on all processes.
        device: Where the processes talk.

    Returns:
        The counts, with one example where others take some and this process none.
    """
    wanted = torch.tensor([min(count, 1) for count in counts], device=device)
    distributed.all_reduce(wanted, distributed.ReduceOp.MAX)
    return [max(count, least) for count, least in zip(counts, wanted.tolist(), strict=True)]


def take_rows(inputs: Mapping[str, Any], count: int, generator: torch.Generator) -> dict[str, Any]:
    """Return a random part of a micro-batch, or all of it where it can't be cut.

    Args:
        inputs: The micro-batch.
        count: The number of its examples to take.
        generator: Source of the choice, on the CPU: batches may be sorted.
    """
    rows = count_examples(inputs)
    if count >= rows or not _divisible(inputs, rows):
        return dict(inputs)
    chosen = torch.randperm(rows, generator=generator)[:count].sort().values
    return {
        name: value[chosen.to(value.device)] if _is_batched(value) else value
        for name, value in inputs.items()
    }


def _is_batched(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def count_examples(inputs: Mapping[str, Any]) -> int:
    """Return the number of examples: the first dimension of the first tensor that has one.

    Args:
        inputs: The micro-batch.
    """
    return next((len(value) for value in inputs.values() if _is_batched(value)), 1)


def _divisible(inputs: Mapping[str, Any], rows: int) -> bool:
    """Whether the first dimension of every tensor counts examples."""
    for name, value in inputs.items():
        # Multimodal models have three positions a token, and put these first.
        three_positions = name == "position_ids" and _is_batched(value) and value.dim() == 3
        nested = isinstance(value, (Mapping, list, tuple))
        if nested or three_positions or (_is_batched(value) and len(value) != rows):
            return False
    return True


def count_predictions(model: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor | int:
    """Count the labels that a model's mean loss is taken over; without such labels, the examples.

    Args:
        model: The unwrapped model; says whether the first label of a row is predicted.
        inputs: The micro-batch.
    """
    shifted = inputs.get("shift_labels") is not None
    labels = inputs["shift_labels"] if shifted else inputs.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return count_examples(inputs)
    if not shifted and labels.dim() > 1 and shifts_labels(model):
        labels = labels[..., 1:]
    return (labels != IGNORE_INDEX).sum()


#: Integer buffers of more elements are weights, quantized: counters and statistics are smaller.
_COUNTERS = 2**20


def _packed(buffer: torch.Tensor) -> bool:
    whole = not buffer.is_floating_point() and not buffer.is_complex()
    return whole and buffer.numel() > _COUNTERS


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed a device's generator, and give it back as it was.

    Args:
        device: The device.
        seed: The seed.
    """
    module = torch.get_device_module(device)
    if hasattr(module, "device"):
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            with module.device(device):
                module.manual_seed(seed)
            yield
        return
    # There is only one of its kind, and it is not chosen: mps.
    state = module.get_rng_state()
    module.manual_seed(seed)
    try:
        yield
    finally:
        module.set_rng_state(state)


@contextmanager
def undisturbed(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Run a pass through a model and leave no trace of it in the training run.

    Random numbers inside come from generators seeded here; those of Python, NumPy, torch's CPU and
    the model's devices are as before afterwards, and so are the buffers (running statistics) but
    for what can only be packed weights. A buffer that the pass puts another tensor in the place of
    stays so: that is how models keep what they compute from the length of the longest batch, and
    note that length where nobody sees it.

    Args:
        model: The unwrapped model.
        seed: Seeds the dropout of this pass.
    """
    python, arrays = random.getstate(), numpy.random.get_state()
    buffers = [(b, b.clone()) for b in model.buffers() if not _packed(b)]
    devices = {p.device for p in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    with ExitStack() as forks:
        forks.enter_context(torch.random.fork_rng(devices=[]))
        torch.default_generator.manual_seed(seed)
        for device in devices:
            forks.enter_context(seeded(device, seed))
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def reentrant_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules that transformers has set to reentrant gradient checkpointing."""
    return [
        module
        for module in model.modules()
        if vars(module).get("gradient_checkpointing")
        and isinstance(func := vars(module).get("_gradient_checkpointing_func"), functools.partial)
        # Torch takes the reentrant form where nothing is said.
        and func.keywords.get("use_reentrant") in (None, True)
    ]


@contextmanager
def without_reentrance(model: torch.nn.Module) -> Iterator[None]:
    """Let modules with reentrant gradient checkpointing use the other form, which has a graph.

    Args:
        model: The unwrapped model.
    """
    modules = reentrant_modules(model)
    held = [module._gradient_checkpointing_func for module in modules]
    try:
        for module, func in zip(modules, held, strict=True):
            module._gradient_checkpointing_func = functools.partial(func, use_reentrant=False)
        yield
    finally:
        for module, func in zip(modules, held, strict=True):
            module._gradient_checkpointing_func = func


def asking_for_logits(model: torch.nn.Module) -> dict[str, bool]:
    """Return the arguments that make a forward pass with Liger's fused loss return logits too.

    Args:
        model: The unwrapped model.
    """
    known = inspect.signature(base_model(model).forward).parameters
    return {"skip_logits": False} if "skip_logits" in known else {}


def has_fused_head(model: torch.nn.Module) -> bool:
    """Return whether TRL has given the model a head that is fused with its loss.

    Args:
        model: The unwrapped model.
    """
    # It hides behind the signature of the forward pass that it wraps.
    own = inspect.signature(base_model(model).forward, follow_wrapped=False).parameters
    return "fused_lm_head" in own


def has_liger_kernels(model: torch.nn.Module) -> bool:
    """Return whether modules of a model are Liger's, or run its forward passes.

    Some of their backward passes write gradients over the activations that they saved, so that a
    graph can be differentiated once; and they do it unseen by autograd's version counters.

    Args:
        model: The unwrapped model.
    """
    return any(
        str(getattr(origin, "__module__", "")).startswith("liger_kernel.")
        for module in model.modules()
        for origin in (type(module), module.forward)
    )


def twice_differentiable_attention() -> Any:
    """Return a context whose attention has a second derivative; the fused kernels have none."""
    return sdpa_kernel(SDPBackend.MATH)
