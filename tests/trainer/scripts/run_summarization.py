"""Train an encoder-decoder; written for `transformers.Seq2SeqTrainer` alone."""

import torch
import transformers
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    HfArgumentParser,
    Seq2SeqTrainingArguments,
    default_data_collator,
)


def main() -> None:
    """Train and evaluate."""
    (training_args,) = HfArgumentParser(Seq2SeqTrainingArguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        max_length=8, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2
    )
    ids = 3 + (torch.arange(32)[:, None] + torch.arange(8)) % 37
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids[:, :5].tolist()})
    trainer = transformers.Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        data_collator=default_data_collator,
        compute_metrics=lambda prediction: {"width": float(prediction.predictions.shape[1])},
    )
    trainer.train()
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
