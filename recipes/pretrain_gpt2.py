"""Pretrain a GPT-2 from scratch with Sophia-G.

    python recipes/pretrain_gpt2.py
    python recipes/pretrain_gpt2.py --learning_rate 2e-3 --optim_args "rho=0.05,k=10"
    python recipes/pretrain_gpt2.py --train_file my_text.txt --output_dir runs/my_text

Text -> tokenizer -> blocks -> GPT-2 -> SophiaTrainer. Values come from a YAML file (`--config`),
the command line overrides each; `--help` lists them all.
"""

import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.arguments import one_line_errors, parse_arguments
from common.corpus import CorpusArguments, load_corpus
from common.evaluation import LanguageModelEvaluation
from common.plots import plot_losses
from common.tokenization import make_blocks, train_tokenizer
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

import hf_sophia

CONFIG = Path(__file__).parent / "configs" / "pretrain_gpt2_small.yaml"


@dataclass
class ModelArguments:
    """The shape of the GPT-2 and its vocabulary."""

    n_layer: int = field(default=4, metadata={"help": "Transformer blocks"})
    n_head: int = field(default=4, metadata={"help": "Attention heads"})
    n_embd: int = field(default=128, metadata={"help": "Width; a multiple of n_head"})
    block_size: int = field(default=128, metadata={"help": "Tokens in a training example"})
    dropout: float = field(default=0.0, metadata={"help": "Dropout everywhere"})
    vocab_size: int = field(default=2048, metadata={"help": "Size of a tokenizer trained here"})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Use this tokenizer instead of training one"}
    )

    def __post_init__(self) -> None:
        """Check the shape."""
        for name, least in (("n_layer", 1), ("n_head", 1), ("n_embd", 1), ("block_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate and save; return the final metrics.

    Args:
        argv: The command line without the program's name; None: the process's own.

    Returns:
        The evaluation's metrics.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_sophia").setLevel(logging.INFO)
    model_args, corpus_args, args = parse_arguments(
        (ModelArguments, CorpusArguments, TrainingArguments), argv, CONFIG
    )
    set_seed(args.seed)
    argv = sys.argv[1:] if argv is None else argv

    with one_line_errors():
        check_length(args, argv)
        resume = checkpoint_of(args)
        corpus = load_corpus(corpus_args)
        if model_args.tokenizer_name:
            tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name)
        else:
            tokenizer = train_tokenizer(corpus.documents["train"], model_args.vocab_size)
        train, validation = make_blocks(
            corpus.documents, tokenizer, model_args.block_size, corpus_args.validation_percent
        )
        model = build_model(model_args, tokenizer)
    print(
        f"{corpus.name} (sha256 {corpus.digest[:12]}): {len(train):,} blocks of"
        f" {model_args.block_size} tokens to train on, {len(validation):,} to evaluate on;"
        f" GPT-2 with {model.num_parameters():,} parameters"
    )

    evaluation = LanguageModelEvaluation(tokenizer)
    trainer = hf_sophia.SophiaTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        **evaluation.hooks(),
    )
    with one_line_errors():
        trainer.create_optimizer()  # its options are checked here
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    output = Path(args.output_dir)
    record = {"name": corpus.name, "sha256": corpus.digest, "licence": corpus.licence}
    (output / "corpus.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    picture = plot_losses(
        trainer.state.log_history,
        output / "loss.png",
        f"GPT-2, {model.num_parameters() / 1e6:.1f}M parameters, {args.optim.value}, {corpus.name}",
    )
    report(metrics, output, picture)
    print(f"try next      {next_command(args, argv)}")
    return metrics


def build_model(model_args: ModelArguments, tokenizer: object) -> GPT2LMHeadModel:
    """Make a GPT-2 with fresh weights.

    Args:
        model_args: Its shape.
        tokenizer: Gives the vocabulary's size and the end of text.

    Returns:
        The model, in fp32.
    """
    dropout = model_args.dropout
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=model_args.block_size,
        n_embd=model_args.n_embd,
        n_layer=model_args.n_layer,
        n_head=model_args.n_head,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    # transformers derives it from class names, misses GPT-2's and would count one label too many.
    model.loss_type = "ForCausalLM"
    return model


def check_length(args: TrainingArguments, argv: Sequence[str]) -> None:
    """Refuse epochs that max_steps would silently overrule.

    Raises:
        ValueError: Both are in force.
    """
    named = {piece.split("=")[0] for piece in argv}
    changed = args.num_train_epochs != TrainingArguments.num_train_epochs
    if (changed or "--num_train_epochs" in named) and args.max_steps > 0:
        raise ValueError(
            f"max_steps={args.max_steps} wins over num_train_epochs; set --max_steps -1"
        )


def checkpoint_of(args: TrainingArguments) -> str | None:
    """Return the checkpoint to resume from: a path, or for `last` the newest one.

    Raises:
        FileNotFoundError: It does not exist.
    """
    wanted = args.resume_from_checkpoint or None
    if wanted == "last":
        exists = Path(args.output_dir).is_dir()
        newest = get_last_checkpoint(args.output_dir) if exists else None
        if newest is None:
            raise FileNotFoundError(f"there is no checkpoint in {args.output_dir!r} to resume from")
        return newest
    if wanted is not None and not (Path(wanted) / TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {wanted!r}: no {TRAINER_STATE_NAME}")
    return wanted


def report(metrics: dict[str, float], output: Path, picture: Path | None) -> None:
    """Print what came out and where it lies."""
    bits = metrics.get("eval_bits_per_byte")
    print(
        f"\nevaluation loss {metrics['eval_loss']:.4f} nats per token"
        f" (perplexity {metrics['eval_perplexity']:.1f},"
        + (f" {bits:.3f} bits per byte," if bits is not None else "")
        + f" {metrics['eval_accuracy']:.1%} of tokens right)"
    )
    print(f"model         {output}")
    print(f"loss curve    {picture or 'not drawn: pip install matplotlib'}")


def next_command(args: TrainingArguments, argv: Sequence[str]) -> str:
    """Return the command that runs the same with the other optimizer, to compare."""
    program = [os.path.relpath(sys.executable), os.path.relpath(__file__)]
    folder = args.output_dir.rstrip("/")
    if args.optim == "sophia":
        other = ["--optim", "adamw_torch_fused", "--optim_args=", "--learning_rate", "3e-3"]
        other += ["--adam_beta2", "0.95", "--output_dir", f"{folder}_adamw"]
    else:
        other = ["--optim", "sophia", "--optim_args", "rho=0.1,k=10", "--learning_rate", "1e-3"]
        other += ["--output_dir", f"{folder}_sophia"]
    if args.resume_from_checkpoint:
        other.append("--resume_from_checkpoint=")
    return shlex.join([*program, *argv, *other])


if __name__ == "__main__":
    main()
