"""Tiny models of many families, each with a batch of its kind of labels."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoConfig

VOCABULARY, LENGTH, CLASSES = 40, 10, 3

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_ENCODER = {
    **_SMALL,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DECODER = {**_SMALL, "num_key_value_heads": 1, "max_position_embeddings": 32}
_EXPERTS = {"output_router_logits": True, "router_aux_loss_coef": 5.0}

#: Configurations by the name of their `model_type`.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_positions": 32,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    "llama": _DECODER,
    "qwen3": {**_DECODER, "head_dim": 8},
    "mixtral": {**_DECODER, **_EXPERTS, "num_local_experts": 2},
    "qwen3_moe": {
        **_DECODER,
        **_EXPERTS,
        "head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
    },
    "bert": _ENCODER,
    "roberta": {**_ENCODER, "type_vocab_size": 1},
    "modernbert": {
        **_SMALL,
        "max_position_embeddings": 32,
        "cls_token_id": 0,
        "sep_token_id": 2,
    },
    "t5": {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "switch_transformers": {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_heads": 2,
        "num_experts": 2,
        "router_jitter_noise": 0.0,
        "dropout_rate": 0.0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "bart": {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 32,
        "dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    },
    "vit": {
        **{key: value for key, value in _ENCODER.items() if not key.endswith("_id")},
        "image_size": 8,
        "patch_size": 4,
    },
    "whisper": {
        "vocab_size": VOCABULARY,
        "num_mel_bins": 4,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_source_positions": 8,
        "max_target_positions": 16,
        "dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    },
    "wav2vec2": {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "conv_dim": (8, 8),
        "conv_stride": (4, 4),
        "conv_kernel": (8, 4),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "classifier_proj_size": 8,
        "layerdrop": 0.0,
        "apply_spec_augment": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.0,
    },
    "llava": {
        "text_config": {**_DECODER, "model_type": "llama", "vocab_size": VOCABULARY + 1},
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": 8,
            "patch_size": 4,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "projection_dim": 16,
        },
        "image_token_id": VOCABULARY,
        "vision_feature_layer": -1,
    },
    "videomae": {
        "image_size": 8,
        "patch_size": 4,
        "num_frames": 2,
        "tubelet_size": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}


@dataclass(frozen=True)
class Case:
    """One (model class, head) pair.

    Args:
        model: The model class's name.
        family: A key of `CONFIGS`.
        rows: Makes `n` training examples of this head.
        config: What the head wants of the configuration.
    """

    model: str
    family: str
    rows: Callable[[int], list[dict[str, torch.Tensor]]]
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        suffix = self.config.get("problem_type", "") or "-".join(
            name for name in self.config if name.startswith("sparse")
        )
        return f"{self.model}-{suffix}" if suffix else self.model

    def make(self, **options: Any) -> torch.nn.Module:
        """Make the model, the same one each time."""
        values = {**CONFIGS[self.family], **self.config, **options}
        config = AutoConfig.for_model(self.family, **values)
        torch.manual_seed(0)
        return getattr(transformers, self.model)(config)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _text(count: int, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
    """Sequences of tokens that end in `</s>`, the second half of them padded on the right."""
    rows = []
    for index in range(count):
        ids = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator)
        mask = torch.ones(LENGTH, dtype=torch.long)
        end = LENGTH - 3 if index % 2 else LENGTH
        ids[end - 1], ids[end:], mask[end:] = 2, 1, 0
        rows.append({"input_ids": ids, "attention_mask": mask})
    return rows


def causal_rows(count: int) -> list[dict[str, torch.Tensor]]:
    rows = _text(count, _generator())
    return [
        {**row, "labels": row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)}
        for row in rows
    ]


def masked_rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = _generator()
    rows = []
    for row in _text(count, generator):
        chosen = torch.rand(LENGTH, generator=generator) < 0.4
        chosen[0] = True
        labels = row["input_ids"].masked_fill(~chosen | (row["attention_mask"] == 0), -100)
        rows.append({**row, "input_ids": row["input_ids"].masked_fill(chosen, 3), "labels": labels})
    return rows


def seq2seq_rows(count: int) -> list[dict[str, torch.Tensor]]:
    return [{**row, "labels": row["labels"][:7]} for row in causal_rows(count)]


def token_rows(count: int) -> list[dict[str, torch.Tensor]]:
    return [
        {**row, "labels": (row["input_ids"] % CLASSES).masked_fill(row["input_ids"] == 1, -100)}
        for row in _text(count, _generator())
    ]


def class_rows(count: int) -> list[dict[str, torch.Tensor]]:
    rows = _text(count, _generator())
    return [{**row, "labels": torch.tensor(i % CLASSES)} for i, row in enumerate(rows)]


def pair_rows(count: int) -> list[dict[str, torch.Tensor]]:
    rows = _text(count, _generator())
    return [{**row, "labels": torch.tensor(i % 2)} for i, row in enumerate(rows)]


def flag_rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = _generator()
    rows = _text(count, generator)
    return [
        {**row, "labels": torch.randint(2, (CLASSES,), generator=generator).float()} for row in rows
    ]


def number_rows(count: int) -> list[dict[str, torch.Tensor]]:
    rows = _text(count, _generator())
    return [{**row, "labels": torch.tensor(0.3 * i - 1.0)} for i, row in enumerate(rows)]


def numbers_rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = _generator()
    rows = _text(count, generator)
    return [{**row, "labels": torch.randn(CLASSES, generator=generator)} for row in rows]


def choice_rows(count: int) -> list[dict[str, torch.Tensor]]:
    texts = _text(2 * count, _generator())
    return [
        {
            **{k: torch.stack([texts[2 * i][k], texts[2 * i + 1][k]]) for k in texts[0]},
            "labels": torch.tensor(i % 2),
        }
        for i in range(count)
    ]


def answer_rows(count: int) -> list[dict[str, torch.Tensor]]:
    rows = _text(count, _generator())
    # One end lies behind the text, as truncation leaves it.
    return [
        {
            **row,
            "start_positions": torch.tensor(i % 5),
            "end_positions": torch.tensor(LENGTH + 7 if i == 1 else i % 5 + 2),
        }
        for i, row in enumerate(rows)
    ]


def image_rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = _generator()
    return [
        {
            "pixel_values": torch.randn(3, 8, 8, generator=generator),
            "labels": torch.tensor(i % CLASSES),
        }
        for i in range(count)
    ]


def speech_rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = _generator()
    return [
        {"input_features": torch.randn(4, 16, generator=generator), "labels": row["labels"]}
        for row in seq2seq_rows(count)
    ]


def sound_rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = _generator()
    return [
        {
            "input_values": torch.randn(400, generator=generator),
            "labels": torch.tensor(i % CLASSES),
        }
        for i in range(count)
    ]


def video_rows(count: int) -> list[dict[str, torch.Tensor]]:
    rows = image_rows(count)
    return [{**row, "pixel_values": row["pixel_values"].expand(2, -1, -1, -1)} for row in rows]


def picture_rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Texts that begin with the four patches of a picture."""
    rows = []
    for text, image in zip(causal_rows(count), image_rows(count), strict=True):
        patches = torch.full((4,), VOCABULARY)
        rows.append(
            {
                "pixel_values": image["pixel_values"],
                "input_ids": torch.cat([patches, text["input_ids"]]),
                "attention_mask": torch.cat([torch.ones_like(patches), text["attention_mask"]]),
                "labels": torch.cat([torch.full_like(patches, -100), text["labels"]]),
            }
        )
    return rows


_CLASSES = {"num_labels": CLASSES}
_FLAGS = {"num_labels": CLASSES, "problem_type": "multi_label_classification"}
_NUMBERS = {"num_labels": CLASSES, "problem_type": "regression"}

CASES = [
    Case("GPT2LMHeadModel", "gpt2", causal_rows),
    Case("GPT2ForSequenceClassification", "gpt2", class_rows, _CLASSES),
    Case("GPT2ForTokenClassification", "gpt2", token_rows, _CLASSES),
    Case("GPT2ForQuestionAnswering", "gpt2", answer_rows),
    Case("LlamaForCausalLM", "llama", causal_rows),
    Case("LlamaForSequenceClassification", "llama", number_rows, {"num_labels": 1}),
    Case("LlamaForQuestionAnswering", "llama", answer_rows),
    Case("Qwen3ForCausalLM", "qwen3", causal_rows),
    Case("Qwen3ForTokenClassification", "qwen3", token_rows, _CLASSES),
    Case("Qwen3MoeForCausalLM", "qwen3_moe", causal_rows),
    Case("LlavaForConditionalGeneration", "llava", picture_rows),
    Case("MixtralForCausalLM", "mixtral", causal_rows),
    Case("BertForMaskedLM", "bert", masked_rows),
    Case("BertLMHeadModel", "bert", causal_rows, {"is_decoder": True}),
    Case("BertForSequenceClassification", "bert", class_rows, _CLASSES),
    Case("BertForSequenceClassification", "bert", flag_rows, _FLAGS),
    Case("BertForSequenceClassification", "bert", numbers_rows, _NUMBERS),
    Case("BertForTokenClassification", "bert", token_rows, _CLASSES),
    Case("BertForMultipleChoice", "bert", choice_rows),
    Case("BertForQuestionAnswering", "bert", answer_rows),
    Case("BertForNextSentencePrediction", "bert", pair_rows),
    Case("RobertaForMaskedLM", "roberta", masked_rows),
    Case("RobertaForSequenceClassification", "roberta", number_rows, {"num_labels": 1}),
    Case("RobertaForMultipleChoice", "roberta", choice_rows),
    Case("ModernBertForMaskedLM", "modernbert", masked_rows),
    Case("ModernBertForMaskedLM", "modernbert", masked_rows, {"sparse_prediction": True}),
    Case("ModernBertForSequenceClassification", "modernbert", class_rows, _CLASSES),
    Case("T5ForConditionalGeneration", "t5", seq2seq_rows),
    Case("T5ForTokenClassification", "t5", token_rows, _CLASSES),
    Case("SwitchTransformersForConditionalGeneration", "switch_transformers", seq2seq_rows),
    Case("BartForConditionalGeneration", "bart", seq2seq_rows),
    Case("BartForCausalLM", "bart", causal_rows),
    Case("BartForSequenceClassification", "bart", class_rows, _CLASSES),
    Case("BartForQuestionAnswering", "bart", answer_rows),
    Case("ViTForImageClassification", "vit", image_rows, _CLASSES),
    Case("VideoMAEForVideoClassification", "videomae", video_rows, _CLASSES),
    Case("Wav2Vec2ForSequenceClassification", "wav2vec2", sound_rows, _CLASSES),
    Case("WhisperForConditionalGeneration", "whisper", speech_rows),
]
