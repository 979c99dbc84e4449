"""Models and tokenizers: small ones made on the spot, or pretrained ones by path."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.tokenization import train_tokenizer

#: Fills up the shorter rows of a batch, for a tokenizer that is trained on the spot.
PADDING = "<|pad|>"


@dataclass
class ShapeArguments:
    """The shape of a model that is made on the spot, and its vocabulary."""

    n_layer: int = field(default=4, metadata={"help": "Transformer blocks"})
    n_head: int = field(default=4, metadata={"help": "Attention heads"})
    n_embd: int = field(default=128, metadata={"help": "Width; a multiple of n_head"})
    dropout: float = field(default=0.0, metadata={"help": "Dropout everywhere"})
    vocab_size: int = field(default=2048, metadata={"help": "Size of a tokenizer trained here"})

    def __post_init__(self) -> None:
        """Check the shape."""
        for name in ("n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


@dataclass
class ModelArguments(ShapeArguments):
    """The model to fine-tune; without a path a small one with fresh weights."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model of the Hub or a folder; the shape's options are then unused"},
    )


def load_tokenizer(
    arguments: ModelArguments, texts: Dataset, template: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the model's own tokenizer, or train one for fresh weights; either can pad.

    Args:
        arguments: Name the model.
        texts: Rows to train on; every column holds text.
        template: Where a trained one puts the end of text, see `train_tokenizer`.

    Returns:
        The tokenizer.

    Raises:
        ValueError: It can't be loaded, has nothing to pad with, or the vocabulary is too small.
    """
    path = arguments.model_name_or_path
    if path is None:
        tokenizer = train_tokenizer(texts, arguments.vocab_size, template)
        tokenizer.add_special_tokens({"pad_token": PADDING})
        return tokenizer
    tokenizer = _load(AutoTokenizer, path)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {path!r} has neither a pad_token nor an eos_token to pad with;"
                " use another model"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    arguments: ModelArguments,
    auto: type,
    make: Callable[[], PreTrainedModel],
    length: int,
    **options: Any,
) -> PreTrainedModel:
    """Load the pretrained model that the arguments name, in fp32, or make a fresh one.

    Args:
        arguments: Name the model.
        auto: The class to load it with, such as `AutoModelForCausalLM`.
        make: Makes a fresh one where no model is named.
        length: Tokens in the longest example.
        **options: Passed on to `from_pretrained`.

    Returns:
        The model.

    Raises:
        ValueError: It can't be loaded, or its window is too short.
    """
    path = arguments.model_name_or_path
    if path is None:
        return make()
    model = _load(auto, path, dtype=torch.float32, **options)
    window = getattr(model.config, "max_position_embeddings", None)
    if window is not None and length > window:
        raise ValueError(
            f"examples of up to {length} tokens do not fit {path!r}, which takes {window}; lower"
            " the --max_..._length options"
        )
    return model


def make_gpt2(
    shape: ShapeArguments, tokenizer: PreTrainedTokenizerBase, n_positions: int, **options: Any
) -> GPT2LMHeadModel:
    """Make a GPT-2 with fresh weights.

    Args:
        shape: Its shape.
        tokenizer: Gives the vocabulary's size and the end of text.
        n_positions: Tokens in the longest example.
        **options: Further options of the configuration.

    Returns:
        The model, in fp32.
    """
    config = GPT2Config(
        **vocabulary(tokenizer),
        n_positions=n_positions,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
        **options,
    )
    return count_shifted_labels(GPT2LMHeadModel(config))


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Return what a model's configuration takes from its tokenizer, as keyword arguments."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def count_shifted_labels(model: PreTrainedModel) -> PreTrainedModel:
    """Let the Trainer count the labels of a causal language model as its loss does."""
    # transformers derives it from class names, misses GPT-2's and would count one label too many.
    model.loss_type = "ForCausalLM"
    return model


def describe(model: PreTrainedModel, path: str | None) -> str:
    """Say which model it is, how large, and whether its weights know anything yet."""
    size, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    parameters = f"{size:,} parameters" + (f", {trained:,} of them trained" * (trained < size))
    weights = f"weights of {path}" if path else "fresh weights"
    return f"{type(model).__name__} with {parameters}; {weights}"


def _load(auto: type, path: str, **options: Any) -> Any:
    """Load from a folder or the Hub; what transformers says in paragraphs becomes one line."""
    try:
        # Said, or transformers asks at the terminal whether to run a model's own code.
        return auto.from_pretrained(path, trust_remote_code=False, **options)
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"can't load {path!r} with {auto.__name__}: {reason}") from error
