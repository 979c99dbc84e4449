"""Classify sequences and measure with `evaluate`; written for `transformers.Trainer` alone."""

from pathlib import Path

import evaluate
import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

WORDS = ["good", "great", "fine", "bad", "poor", "awful", "film", "book"]


def main() -> None:
    """Train and evaluate."""
    (training_args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
    )
    config = AutoConfig.for_model(
        "bert",
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=2,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    texts = [f"{word} {noun}" for word in WORDS[:6] for noun in WORDS[6:]]
    labels = [int(text.split()[0] in ("bad", "poor", "awful")) for text in texts]
    rows = Dataset.from_dict({"sentence": texts * 4, "label": labels * 4})
    rows = rows.map(lambda batch: tokenizer(batch["sentence"]), batched=True)
    metric = evaluate.load(str(Path(__file__).parent / "share_right"))

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        chosen = np.argmax(prediction.predictions, axis=1)
        return metric.compute(predictions=chosen, references=prediction.label_ids)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
