"""Pretrain a GPT-2 from scratch with Sophia-G.

    python recipes/pretrain_gpt2.py
    python recipes/pretrain_gpt2.py --learning_rate 3e-3 --optim_args k=5
    python recipes/pretrain_gpt2.py --train_file my_text.txt --output_dir runs/my_text

Text -> tokenizer -> blocks -> GPT-2 -> SophiaTrainer. Values come from a YAML file (`--config`),
the command line overrides each; `--help` lists them all.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.arguments import one_line_errors, without_secrets
from common.corpus import CorpusArguments, load_corpus
from common.evaluation import LanguageModelEvaluation
from common.models import ShapeArguments, make_gpt2
from common.runs import Run, carry_out, language_model_headline, ready, start
from common.tokenization import make_blocks, train_tokenizer
from transformers import AutoTokenizer, TrainingArguments, default_data_collator

import hf_sophia

CONFIG = Path(__file__).parent / "configs" / "pretrain_gpt2_small.yaml"


@dataclass
class ModelArguments(ShapeArguments):
    """The shape of the GPT-2, its vocabulary and its window."""

    block_size: int = field(default=128, metadata={"help": "Tokens in a training example"})
    scale_attn_by_inverse_layer_idx: bool = field(
        default=False, metadata={"help": "Divide attention by the layer's number too"}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Use this tokenizer instead of training one"}
    )

    def __post_init__(self) -> None:
        """Check the shape."""
        super().__post_init__()
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {self.block_size}")


#: What the command line and the YAML file fill.
ARGUMENTS = (ModelArguments, CorpusArguments, TrainingArguments)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate and save; return the final metrics.

    Args:
        argv: The command line without the program's name; None: the process's own.

    Returns:
        The evaluation's metrics.
    """
    run = ready(prepare, argv)
    metrics = carry_out(run)
    command = next_command(run.trainer.args, sys.argv[1:] if argv is None else argv)
    print(f"try next      {command}")
    return metrics


def prepare(argv: Sequence[str] | None = None) -> Run:
    """Load the data and make the model and its Trainer.

    Args:
        argv: The command line without the program's name; None: the process's own.

    Returns:
        The run, not begun yet.
    """
    model_args, corpus_args, args, resume = start(ARGUMENTS, argv, CONFIG)
    with one_line_errors():
        if corpus_args.streaming and not model_args.tokenizer_name:
            raise ValueError("streaming needs --tokenizer_name: one is trained on whole texts only")
        if corpus_args.streaming and args.max_steps <= 0:
            raise ValueError("streaming needs --max_steps: a stream's length is not known")
        if corpus_args.streaming and args.dataloader_num_workers:
            raise ValueError(
                "streaming reads in the main process: set --dataloader_num_workers 0, or the"
                " documents held out would be other ones for each worker"
            )
        corpus = load_corpus(corpus_args)
        if model_args.tokenizer_name:
            tokenizer = AutoTokenizer.from_pretrained(
                model_args.tokenizer_name, trust_remote_code=False
            )
        else:
            tokenizer = train_tokenizer(corpus.documents["train"], model_args.vocab_size)
        train, validation = make_blocks(
            corpus.documents,
            tokenizer,
            model_args.block_size,
            corpus_args.validation_percent,
            args.seed,
        )
    model = make_gpt2(
        model_args,
        tokenizer,
        model_args.block_size,
        scale_attn_by_inverse_layer_idx=model_args.scale_attn_by_inverse_layer_idx,
    )
    amount = "a stream of blocks" if corpus_args.streaming else f"{len(train):,} blocks"
    which = "streamed" if corpus_args.streaming else f"{corpus.digest_kind} {corpus.digest[:12]}"
    print(
        f"{corpus.name} ({which}): {amount} of {model_args.block_size} tokens to train on,"
        f" {len(validation):,} to evaluate on; GPT-2 with {model.num_parameters():,} parameters"
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
    return Run(trainer, resume, corpus, language_model_headline, "nats per token")


def next_command(args: TrainingArguments, argv: Sequence[str]) -> str:
    """Return the command that runs the same with the other optimizer, to compare."""
    program = [os.path.relpath(sys.executable), os.path.relpath(__file__)]
    folder = args.output_dir.rstrip("/")
    if args.optim == "sophia":
        other = ["--optim", "adamw_torch_fused", "--optim_args=", "--adam_beta2", "0.95"]
        other += ["--output_dir", f"{folder}_adamw"]
    else:
        other = ["--optim", "sophia", "--optim_args=", "--output_dir", f"{folder}_sophia"]
    if args.resume_from_checkpoint:
        other.append("--resume_from_checkpoint=")
    return shlex.join([*program, *without_secrets(argv), *other])


if __name__ == "__main__":
    main()
