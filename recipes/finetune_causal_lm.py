r"""Fine-tune a causal language model on prompts and completions, whole or by LoRA.

    python recipes/finetune_causal_lm.py
    python recipes/finetune_causal_lm.py --model_name_or_path runs/gpt2_small --lora_r 8
    python recipes/finetune_causal_lm.py --model_name_or_path openai-community/gpt2 \
        --train_file my_pairs.jsonl --source_column question --target_column answer \
        --learning_rate 5e-5

Pairs -> prompt, separator, completion -> model -> SophiaTrainer; only completions count in the
loss. Values come from a YAML file (`--config`), the command line overrides each; `--help` lists
them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from common.arguments import one_line_errors
from common.evaluation import LanguageModelEvaluation
from common.models import (
    ModelArguments,
    count_shifted_labels,
    describe,
    load_model,
    load_tokenizer,
    make_gpt2,
)
from common.pairs import PairArguments, load_pairs
from common.runs import Run, carry_out, language_model_headline, ready, start
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

import hf_sophia

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG = Path(__file__).parent / "configs" / "finetune_causal_lm.yaml"


@dataclass
class PromptArguments(PairArguments):
    """The pairs, and what stands between prompt and completion."""

    separator: str = field(
        default="\n\nSummary: ", metadata={"help": "Text between the prompt and its completion"}
    )


@dataclass
class LoraArguments:
    """Low-rank adapters, as an alternative to training every weight."""

    lora_r: int = field(default=0, metadata={"help": "Rank of the adapters; 0: train all weights"})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "The adapters' scale times their rank; by default 2 r"}
    )

    def __post_init__(self) -> None:
        """Check the rank."""
        if self.lora_r < 0:
            raise ValueError(f"lora_r must not be negative, got {self.lora_r}")


#: What the command line and the YAML file fill.
ARGUMENTS = (ModelArguments, LoraArguments, PromptArguments, TrainingArguments)


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
    model_args, lora_args, data_args, args, resume = start(ARGUMENTS, argv, CONFIG)
    with one_line_errors():
        corpus = load_pairs(data_args, args.seed)
        tokenizer = load_tokenizer(model_args, corpus.documents["train"])
        encode = PromptEncoder(tokenizer, data_args)
        model = load_model(
            model_args,
            AutoModelForCausalLM,
            lambda: make_gpt2(model_args, tokenizer, encode.length),
            encode.length,
        )
        count_shifted_labels(model)
        if lora_args.lora_r:
            model = add_adapters(model, lora_args, model_args.model_name_or_path)
    rows = corpus.encode(encode)
    print(f"{corpus}; {describe(model, model_args.model_name_or_path)}")

    trainer = hf_sophia.SophiaTrainer(
        model,
        args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        **LanguageModelEvaluation(tokenizer).hooks(),
    )
    return Run(trainer, resume, corpus, language_model_headline, "nats per token")


class PromptEncoder:
    """Turns pairs into tokens, of which only the completion's and the end are labels.

    Args:
        tokenizer: Has an end of sequence.
        arguments: The separator, and how long prompt and completion may be.

    Raises:
        ValueError: The tokenizer has no end, or the separator leaves no room for a prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: PromptArguments) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, which ends each completion")
        self._tokenizer = tokenizer
        self._separator = tokenizer(arguments.separator, add_special_tokens=False)["input_ids"]
        self._source = arguments.max_source_length - len(self._separator)
        self._target = arguments.max_target_length
        self.length = arguments.max_source_length + arguments.max_target_length
        if self._source < 1:
            raise ValueError(
                f"max_source_length={arguments.max_source_length} has no room for a prompt: the"
                f" separator takes {len(self._separator)} tokens"
            )

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        """Encode a batch of pairs."""
        sources = self._tokenizer(batch["source"], truncation=True, max_length=self._source)
        targets = self._tokenizer(batch["target"], add_special_tokens=False)
        encoded = {"input_ids": [], "labels": []}
        for source, target in zip(sources["input_ids"], targets["input_ids"], strict=True):
            prompt = source + self._separator
            # A completion that is cut has no end: the model would learn to stop there.
            completion = [*target, self._tokenizer.eos_token_id][: self._target]
            encoded["input_ids"].append(prompt + completion)
            encoded["labels"].append([-100] * len(prompt) + completion)
        return encoded


def add_adapters(model: PreTrainedModel, arguments: LoraArguments, path: str | None) -> "PeftModel":
    """Put trainable adapters on a model whose own weights stay as they are.

    Args:
        model: The model.
        arguments: The adapters.
        path: Where its weights came from; None: they are fresh.

    Returns:
        The model under adapters.

    Raises:
        ValueError: PEFT is not installed, or the weights are fresh.
    """
    if path is None:
        raise ValueError(
            f"lora_r={arguments.lora_r} adapts weights that stay as they are, and fresh ones know"
            " nothing; give --model_name_or_path, or train all weights with --lora_r 0"
        )
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(f"lora_r={arguments.lora_r} needs PEFT: pip install peft") from error
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha or 2 * arguments.lora_r,
    )
    return get_peft_model(model, config)


if __name__ == "__main__":
    main()
