"""From documents to blocks of tokens: a byte-level BPE trained on the spot, then concatenation."""

import itertools
from collections.abc import Iterator, Sized

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

#: GPT-2's only special token: the end of a document.
END_OF_TEXT = "<|endoftext|>"

#: Blocks of a stream that are shuffled together.
SHUFFLED_BLOCKS = 1000


def train_tokenizer(
    documents: Dataset, vocab_size: int, template: str | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE as GPT-2 has it.

    Args:
        documents: Rows to train on; every column holds text.
        vocab_size: Tokens in all, the 256 bytes and the end of text included; at least 257.
        template: Where each encoded text, `$A`, gets an end of text; None: nowhere.

    Returns:
        The tokenizer, with `<|endoftext|>` as its end of sequence.

    Raises:
        ValueError: `vocab_size` is too small.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (bytes and one end), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_batches(documents), trainer)
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template,
            special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def _batches(documents: Dataset, size: int = 100) -> Iterator[list[str]]:
    for start in range(0, len(documents), size):
        yield from documents[start : start + size].values()


class _BlockCutter:
    """Turns batches of documents into blocks; what does not fill one waits for the next batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        self._tokenizer, self._size = tokenizer, block_size
        self._rest: list[int] = []

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        """Cut a batch of documents."""
        # A document may be longer than any model's window; the blocks are not.
        encoded = self._tokenizer(batch["text"], add_special_tokens=False, verbose=False)
        tokens = self._rest
        for ids in encoded["input_ids"]:
            tokens += [*ids, self._tokenizer.eos_token_id]
        end = len(tokens) - len(tokens) % self._size
        blocks = [tokens[start : start + self._size] for start in range(0, end, self._size)]
        self._rest = tokens[end:]
        return {"input_ids": blocks, "labels": blocks}


def make_blocks(
    documents: DatasetDict | IterableDatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    validation_percent: float,
    seed: int = 0,
) -> tuple[Dataset | IterableDataset, Dataset]:
    """Tokenize documents, join them with ends of text and cut them into blocks.

    Args:
        documents: Splits `train` and perhaps `validation`, with a column `text`; of streams both.
        tokenizer: Has an `eos_token`.
        block_size: Tokens in a block; what does not fill a split's last one is dropped.
        validation_percent: Share of blocks at the end of `train` to hold out where there is no
            `validation`.
        seed: Shuffles the training blocks of a stream, some at a time; others the Trainer shuffles.

    Returns:
        Training and validation blocks, with columns `input_ids` and `labels`. Of a stream the
        training blocks are cut as they are read, pass after pass without an end.

    Raises:
        ValueError: There is less than one block of training or validation text, or the tokenizer
            has no `eos_token`.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos_token, which ends each document; use another tokenizer or"
            " leave --tokenizer_name out to train one"
        )
    if isinstance(documents, IterableDatasetDict):
        return _stream_blocks(documents, tokenizer, block_size, seed)
    blocks = {
        split: rows.map(
            _BlockCutter(tokenizer, block_size),
            batched=True,
            remove_columns=["text"],
            desc=f"Tokenizing {split} text",
        )
        for split, rows in documents.items()
    }
    train, validation = blocks["train"], blocks.get("validation")
    if validation is None:
        held_out = max(1, round(len(train) * validation_percent / 100))
        cut_at = max(len(train) - held_out, 0)
        train, validation = train.select(range(cut_at)), train.select(range(cut_at, len(train)))
    for name, split in (("training", train), ("validation", validation)):
        _check_not_empty(split, name, block_size)
    return train, validation


def _stream_blocks(
    documents: IterableDatasetDict, tokenizer: PreTrainedTokenizerBase, block_size: int, seed: int
) -> tuple[IterableDataset, Dataset]:
    blocks = {
        split: IterableDataset.from_generator(
            _cut_blocks,
            gen_kwargs={"rows": rows, "tokenizer": tokenizer, "block_size": block_size},
        )
        for split, rows in documents.items()
    }
    # Read once: every evaluation uses it.
    rows = list(blocks["validation"])
    _check_not_empty(rows, "validation", block_size)
    _check_not_empty(list(blocks["train"].take(1)), "training", block_size)
    shuffled = blocks["train"].shuffle(seed, buffer_size=SHUFFLED_BLOCKS)
    endless = IterableDataset.from_generator(_pass_after_pass, gen_kwargs={"blocks": shuffled})
    return endless, Dataset.from_list(rows)


def _cut_blocks(
    rows: IterableDataset, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> Iterator[dict[str, list[int]]]:
    """Cut a stream; each pass begins anew, so that it does not depend on the last one."""
    cutter = _BlockCutter(tokenizer, block_size)
    for batch in rows.batch(100):
        for block in cutter(batch)["input_ids"]:
            yield {"input_ids": block, "labels": block}


def _pass_after_pass(blocks: IterableDataset) -> Iterator[dict[str, list[int]]]:
    """Go through a stream for ever, each time in another order.

    To the Trainer that is one epoch: a run that resumes skips what was read, in whichever pass it
    was. Streams of several epochs would begin with the first one again.
    """
    for number in itertools.count():
        blocks.set_epoch(number)
        yield from blocks


def _check_not_empty(blocks: Sized, name: str, block_size: int) -> None:
    if len(blocks) == 0:
        raise ValueError(
            f"the {name} text is too short: less than one block of {block_size} tokens; give"
            " more text or a smaller --block_size"
        )
