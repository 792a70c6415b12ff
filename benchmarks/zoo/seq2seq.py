"""Encoder-decoders of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .family import BATCH, TEXT_SIZES, Family, Inputs, batch_first, config_of, model_of, text, tokens

SIZES: dict[str, Any] = {
    **TEXT_SIZES,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
# Sizes of its own, since a configuration of these takes no others.
ROUTED: dict[str, Any] = {
    "num_experts": 4,
    "expert_capacity": 64,
    "router_jitter_noise": 0.0,
    "router_dtype": "float32",
}


def pairs(source: int, target: int) -> Callable[[], Inputs]:
    """Return a maker of tokens for the encoder and the decoder."""

    def make() -> Inputs:
        return {
            "input_ids": tokens(source),
            "attention_mask": torch.ones(BATCH, source, dtype=torch.long),
            "decoder_input_ids": tokens(target),
        }

    return make


def with_global_token() -> Inputs:
    """Return the same, of which the first token of each source attends to all."""
    return {**pairs(BATCH, BATCH)(), "global_attention_mask": torch.tensor([[1, 0, 0]] * BATCH)}


def translator(name: str, stem: str, *, source: int = BATCH, note: str = "", **sizes: Any) -> Family:
    """Return the family of `<stem>ForConditionalGeneration`; the decoder's input is as long as the batch is large."""
    model = sizes.pop("model", f"{stem}ForConditionalGeneration")
    exclude, inputs = sizes.pop("exclude", None), sizes.pop("inputs", pairs(source, BATCH))
    without = sizes.pop("without", ())
    kept = {key: size for key, size in SIZES.items() if key not in without}
    return Family(
        name,
        model_of(model, config_of(f"{stem}Config", kept, **sizes)),
        inputs,
        batch_first("logits"),
        text(source),
        exclude=exclude,
        note=note,
    )


FAMILIES = [
    translator("T5", "T5"),
    translator("T5 (gated)", "T5", feed_forward_proj="gated-gelu", tie_word_embeddings=False, source=4),
    translator("mT5", "MT5"),
    translator("UMT5", "UMT5"),
    translator("BART", "Bart"),
    translator("mBART", "MBart"),
    translator("Pegasus", "Pegasus"),
    translator("Pegasus-X", "PegasusX", num_global_tokens=2, block_size=4, source=8),
    translator("Marian", "Marian", model="MarianMTModel", decoder_vocab_size=99),
    translator("M2M100", "M2M100"),
    translator("NLLB-MoE", "NllbMoe", **ROUTED, encoder_sparse_step=2, decoder_sparse_step=2, exclude=["classifier"]),
    translator(
        "LED",
        "LED",
        inputs=with_global_token,
        attention_window=[4, 4],
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    translator(
        "ProphetNet",
        "ProphetNet",
        without=["num_hidden_layers", "d_model", "encoder_layers", "decoder_layers"],
        num_encoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        ngram=2,
        num_buckets=8,
    ),
    translator("BigBirdPegasus", "BigBirdPegasus", attention_type="original_full"),
    translator(
        "Switch Transformers",
        "SwitchTransformers",
        **ROUTED,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        exclude=["classifier"],
    ),
    translator("LongT5", "LongT5", local_radius=3, encoder_attention_type="local", source=8),
    translator(
        "LongT5 (global)",
        "LongT5",
        local_radius=3,
        global_block_size=4,
        encoder_attention_type="transient-global",
        source=8,
    ),
    translator("Blenderbot", "Blenderbot"),
    translator("Blenderbot-small", "BlenderbotSmall"),
    translator("MVP", "Mvp"),
    translator("PLBart", "PLBart"),
    translator("FSMT", "FSMT", langs=["en", "de"], src_vocab_size=99, tgt_vocab_size=99, without=["vocab_size"]),
]
