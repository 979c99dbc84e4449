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

    with one_line_errors():
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
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resume if resume != "last" else True)
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
    report(metrics, output, picture, args.optim.value)
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
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config)


def report(metrics: dict[str, float], output: Path, picture: Path | None, optim: str) -> None:
    """Print what came out, where it lies and what to try next."""
    print(
        f"\nevaluation loss {metrics['eval_loss']:.4f} nats per token"
        f" (perplexity {metrics['eval_perplexity']:.1f},"
        f" {metrics['eval_bits_per_byte']:.3f} bits per byte,"
        f" {metrics['eval_accuracy']:.1%} of tokens right)"
    )
    print(f"model         {output}")
    print(f"loss curve    {picture or 'not drawn: pip install matplotlib'}")
    command = f"{os.path.relpath(sys.executable)} {os.path.relpath(__file__)}"
    if optim == "sophia":
        print("try next      AdamW on the same text, to compare:")
        command += (
            " --optim adamw_torch_fused --optim_args= --learning_rate 3e-3 --adam_beta2 0.95"
            " --output_dir runs/gpt2_small_adamw"
        )
    else:
        print("try next      Sophia on the same text, to compare:")
    print(f"              {command}")


if __name__ == "__main__":
    main()
