"""Train a causal language model; written for `transformers.Trainer` alone."""

import math
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class ModelArguments:
    """The model."""

    model_type: str = field(default="gpt2", metadata={"help": "Its family"})


def main() -> None:
    """Train and evaluate."""
    model_args, training_args = HfArgumentParser(
        (ModelArguments, TrainingArguments)
    ).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    config = AutoConfig.for_model(
        model_args.model_type,
        vocab_size=40,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = (torch.arange(64)[:, None] + 3 * torch.arange(12)) % 40
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=rows.select(range(48)) if training_args.do_train else None,
        eval_dataset=rows.select(range(48, 64)) if training_args.do_eval else None,
        data_collator=default_data_collator,
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
