"""Answer questions with a subclass of `transformers.Trainer`, as HF's example does."""

import torch
from datasets import Dataset
from trainer_qa import QuestionAnsweringTrainer
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    HfArgumentParser,
    TrainingArguments,
    default_data_collator,
)


def main() -> None:
    """Train and evaluate."""
    (training_args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert",
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    ids = (torch.arange(32)[:, None] + 3 * torch.arange(10)) % 40
    starts = torch.arange(32) % 8
    rows = Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "start_positions": starts.tolist(),
            "end_positions": (starts + 1).tolist(),
        }
    )
    trainer = QuestionAnsweringTrainer(
        model=AutoModelForQuestionAnswering.from_config(config),
        args=training_args,
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        data_collator=default_data_collator,
        greeting="hello",
    )
    trainer.train()
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
