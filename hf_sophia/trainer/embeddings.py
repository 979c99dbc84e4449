"""Gives embeddings a share to clip of their own.

A tensor's threshold is a quantile over all of its coordinates. The rows of an embedding are reached
as often as their tokens occur, so that `|m| / h` spans far more there than within another matrix:
the quantile that suits the others is that of the rarest tokens, and the rows of all others hardly
move. With a larger share to clip they do. So it is with the rows of an output layer.
"""

import torch

from hf_sophia.optim import Sophia


def embeddings_of(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """Return the weights of a model's input and output embeddings: those with a row for each token.

    Args:
        model: The model. Input embeddings are its `torch.nn.Embedding` modules, output embeddings
            what its `get_output_embeddings` says, as in transformers. The rows of PEFT's
            `prompt_encoder` are left out: every text has all of them.
    """
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    if hasattr(model, "get_output_embeddings"):
        modules.append(model.get_output_embeddings())
    weights = (getattr(module, "weight", None) for module in modules)
    found = {weight for weight in weights if isinstance(weight, torch.nn.Parameter)}
    prompts = getattr(model, "prompt_encoder", None)
    return found - set(prompts.parameters() if isinstance(prompts, torch.nn.Module) else ())


def give_embeddings_their_share(
    optimizer: Sophia, model: torch.nn.Module, fraction: float | None
) -> None:
    """Set the share to clip of those embeddings that an optimizer holds.

    Args:
        optimizer: The optimizer. A group that was given a share which is not the optimizer's keeps
            it for all of its parameters.
        model: What it trains, not wrapped.
        fraction: The share; None: that of all others.

    Raises:
        ValueError: The share is not in (0, 1).
    """
    if fraction is None:
        return
    embeddings, usual = embeddings_of(model), optimizer.defaults["target_clip_fraction"]
    for group in optimizer.param_groups:
        if group["target_clip_fraction"] == usual:
            held = [param for param in group["params"] if param in embeddings]
            optimizer.set_clip_fraction(held, fraction)
