r"""Fine-tune an encoder-decoder model on pairs of texts.

    python recipes/finetune_seq2seq.py
    python recipes/finetune_seq2seq.py --predict_with_generate true
    python recipes/finetune_seq2seq.py --model_name_or_path google-t5/t5-small \
        --train_file my_pairs.jsonl --source_column article --target_column summary \
        --learning_rate 5e-5

Pairs -> tokens -> T5 -> SophiaSeq2SeqTrainer. Values come from a YAML file (`--config`), the
command line overrides each; `--help` lists them all.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common.arguments import one_line_errors
from common.models import (
    ModelArguments,
    ShapeArguments,
    describe,
    load_model,
    load_tokenizer,
    vocabulary,
)
from common.pairs import PairArguments, load_pairs
from common.runs import Run, carry_out, ready, start
from common.tokenization import END_OF_TEXT
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_sophia

CONFIG = Path(__file__).parent / "configs" / "finetune_seq2seq.yaml"

#: What the command line and the YAML file fill.
ARGUMENTS = (ModelArguments, PairArguments, Seq2SeqTrainingArguments)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate and save; return the final metrics.

    Args:
        argv: The command line without the program's name; None: the process's own.

    Returns:
        The evaluation's metrics.
    """
    return carry_out(ready(prepare, argv))


def prepare(argv: Sequence[str] | None = None) -> Run:
    """Load the data and make the model and its Trainer.

    Args:
        argv: The command line without the program's name; None: the process's own.

    Returns:
        The run, not begun yet.
    """
    model_args, data_args, args, resume = start(ARGUMENTS, argv, CONFIG)
    with one_line_errors():
        corpus = load_pairs(data_args, args.seed)
        tokenizer = load_tokenizer(
            model_args, corpus.documents["train"], template=f"$A {END_OF_TEXT}"
        )
        model = load_model(
            model_args,
            AutoModelForSeq2SeqLM,
            lambda: make_t5(model_args, tokenizer),
            max(data_args.max_source_length, data_args.max_target_length),
        )

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        sources = tokenizer(
            batch["source"], truncation=True, max_length=data_args.max_source_length
        )
        targets = tokenizer(
            text_target=batch["target"], truncation=True, max_length=data_args.max_target_length
        )
        return {**sources, "labels": targets["input_ids"]}

    rows = corpus.encode(encode)
    print(f"{corpus}; {describe(model, model_args.model_name_or_path)}")

    if args.generation_max_length is None:
        args.generation_max_length = data_args.max_target_length
    trainer = hf_sophia.SophiaSeq2SeqTrainer(
        model,
        args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=GeneratedText(tokenizer) if args.predict_with_generate else None,
    )
    return Run(trainer, resume, corpus, headline, "nats per token")


def headline(metrics: dict[str, float]) -> str:
    """Say in a line what the evaluation gave."""
    words = f"evaluation loss {metrics['eval_loss']:.4f} nats per token"
    if "eval_f1" in metrics:
        words += f" (word F1 {metrics['eval_f1']:.3f}, {metrics['eval_exact_match']:.1%} exact)"
    return words


def make_t5(
    shape: ShapeArguments, tokenizer: PreTrainedTokenizerBase
) -> T5ForConditionalGeneration:
    """Make a T5 with fresh weights.

    Args:
        shape: Its shape; encoder and decoder have `n_layer` blocks each.
        tokenizer: Gives the vocabulary's size, the end and the padding.

    Returns:
        The model, in fp32.
    """
    config = T5Config(
        **vocabulary(tokenizer),
        d_model=shape.n_embd,
        d_kv=shape.n_embd // shape.n_head,
        d_ff=4 * shape.n_embd,
        num_layers=shape.n_layer,
        num_heads=shape.n_head,
        dropout_rate=shape.dropout,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


class GeneratedText:
    """Compares generated texts with the wanted ones, word by word.

    `exact_match` is the share of texts that are equal; `f1` is the mean over texts of the harmonic
    mean of precision and recall of words, as in SQuAD but with case and punctuation kept.

    Args:
        tokenizer: Turns tokens back into text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute both from generated tokens and labels; -100 stands for padding in either."""
        pairs = list(
            zip(
                self._decode(prediction.predictions),
                self._decode(prediction.label_ids),
                strict=True,
            )
        )
        return {
            "exact_match": float(np.mean([text == wanted for text, wanted in pairs])),
            "f1": float(np.mean([_word_f1(text, wanted) for text, wanted in pairs])),
        }

    def _decode(self, tokens: np.ndarray) -> list[str]:
        tokens = np.where(tokens == -100, self._tokenizer.pad_token_id, tokens)
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]


def _word_f1(text: str, wanted: str) -> float:
    words, wanted_words = Counter(text.split()), Counter(wanted.split())
    total = words.total() + wanted_words.total()
    return 2 * (words & wanted_words).total() / total if total else 1.0


if __name__ == "__main__":
    main()
