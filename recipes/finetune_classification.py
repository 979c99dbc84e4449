r"""Fine-tune an encoder to classify texts: by one label, by several, or by a number.

    python recipes/finetune_classification.py
    python recipes/finetune_classification.py --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name stanfordnlp/imdb --learning_rate 5e-5
    python recipes/finetune_classification.py --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name nyu-mll/glue --dataset_config_name mrpc --text_column sentence1 \
        --text_pair_column sentence2 --learning_rate 5e-5
    python recipes/finetune_classification.py --train_file my_rows.csv --label_column topic

Rows -> tokens -> ModernBERT -> SophiaTrainer. What the labels are, classes, lists of classes or
floats, says which kind of head the model gets. Values come from a YAML file (`--config`), the
command line overrides each; `--help` lists them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.arguments import one_line_errors
from common.data import DataArguments, hold_out, load_data
from common.functions import write_packages
from common.labels import Labels, encode_labels
from common.models import (
    ModelArguments,
    ShapeArguments,
    describe,
    load_model,
    load_tokenizer,
    vocabulary,
)
from common.runs import Run, carry_out, ready, start
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

import hf_sophia

CONFIG = Path(__file__).parent / "configs" / "finetune_classification.yaml"


@dataclass
class RowArguments(DataArguments):
    """Where the rows come from; without a name or file, functions of Python's library."""

    text_column: str = field(default="text", metadata={"help": "Column that holds the text"})
    text_pair_column: str | None = field(
        default=None, metadata={"help": "Column of a second text, where texts come in pairs"}
    )
    label_column: str = field(default="label", metadata={"help": "Column that holds the label"})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text; cut at the end"})

    def __post_init__(self) -> None:
        """Check what can be checked before anything is read."""
        super().__post_init__()
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")


#: What the command line and the YAML file fill.
ARGUMENTS = (ModelArguments, RowArguments, TrainingArguments)


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
    length = data_args.max_length
    with one_line_errors():
        texts = {"text": data_args.text_column}
        if data_args.text_pair_column:
            texts["text_pair"] = data_args.text_pair_column
        corpus = load_data(data_args, write_packages, texts, {"label": data_args.label_column})
        # Before rows are held out: the only one of a class may be among them.
        corpus, labels = encode_labels(corpus)
        corpus = hold_out(corpus, data_args.validation_percent, args.seed)
        tokenizer = load_tokenizer(model_args, corpus.documents["train"].select_columns([*texts]))
        model = load_model(
            model_args,
            AutoModelForSequenceClassification,
            lambda: make_modern_bert(model_args, tokenizer, labels, length),
            length,
            ignore_mismatched_sizes=True,  # the head of another task
            **labels.model_options(),
        )
        model.config.pad_token_id = tokenizer.pad_token_id

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        columns = [batch[name] for name in texts]
        return tokenizer(*columns, truncation=True, max_length=length)

    rows = corpus.encode(encode)
    print(f"{corpus}; {labels}; {describe(model, model_args.model_name_or_path)}")

    trainer = hf_sophia.SophiaTrainer(
        model,
        args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=labels.compute_metrics,
    )
    return Run(
        trainer,
        resume,
        corpus,
        lambda metrics: labels.headline(metrics, rows),
        labels.unit,
    )


def make_modern_bert(
    shape: ShapeArguments, tokenizer: PreTrainedTokenizerBase, labels: Labels, length: int
) -> ModernBertForSequenceClassification:
    """Make a ModernBERT with fresh weights.

    It classifies the mean over a text's tokens and normalizes before each layer, which learns
    sooner from scratch than BERT's first token and late normalization.

    Args:
        shape: Its shape.
        tokenizer: Gives the vocabulary's size, the end and the padding.
        labels: Give the head.
        length: Tokens in the longest example.

    Returns:
        The model, in fp32.
    """
    config = ModernBertConfig(
        **vocabulary(tokenizer),
        hidden_size=shape.n_embd,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        intermediate_size=2 * shape.n_embd,
        max_position_embeddings=length,
        classifier_pooling="mean",
        embedding_dropout=shape.dropout,
        attention_dropout=shape.dropout,
        mlp_dropout=shape.dropout,
        classifier_dropout=shape.dropout,
        cls_token_id=None,
        sep_token_id=None,
        **labels.model_options(),
    )
    return ModernBertForSequenceClassification(config)


if __name__ == "__main__":
    main()
