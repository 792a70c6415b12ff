"""Models of speech and other sounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .family import BATCH, ENCODED, TEXT_SIZES, Family, Inputs, batch_first, config_of, model_of, tokens

# Names of sizes in Wav2Vec2 and what derives from it: two convolutions, which turn 72 samples into 3 frames or so.
WAVES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": [16, 16],
    "conv_kernel": [8, 4],
    "conv_stride": [4, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "num_adapter_layers": 1,
    "output_hidden_size": 32,
    "apply_spec_augment": False,
}
SIZES: dict[str, Any] = {
    **TEXT_SIZES,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


def samples(length: int) -> Callable[[], Inputs]:
    """Return a maker of waves, `[3, length]`."""
    return lambda: {"input_values": torch.randn(BATCH, length)}


def heard(name: str, stem: str, length: int = 72, **sizes: Any) -> Family:
    """Return the family of an encoder of waves."""
    model = sizes.pop("model", f"{stem}Model")
    inputs, note = sizes.pop("inputs", samples(length)), sizes.pop("note", "")
    read = sizes.pop("read", ENCODED)
    return Family(
        name,
        model_of(model, config_of(f"{stem}Config", WAVES, **sizes)),
        inputs,
        batch_first(*read),
        note=note,
    )


def written(name: str, stem: str, features: Callable[[], Inputs], **sizes: Any) -> Family:
    """Return the family of a model that writes down what it hears."""
    model = sizes.pop("model", f"{stem}ForConditionalGeneration")
    note = sizes.pop("note", "")
    return Family(
        name,
        model_of(model, config_of(f"{stem}Config", SIZES, **sizes)),
        lambda: {**features(), "decoder_input_ids": tokens()},
        batch_first("logits"),
        features,
        note=note,
    )


def spectrum(name: str, *shape: int) -> Callable[[], Inputs]:
    """Return a maker of spectra, `[3, *shape]`, under the name that a model gives them."""
    return lambda: {name: torch.randn(BATCH, *shape)}


FAMILIES = [
    heard("Wav2Vec2", "Wav2Vec2"),
    heard("Wav2Vec2 (CTC)", "Wav2Vec2", model="Wav2Vec2ForCTC", read=("logits",)),
    heard("Wav2Vec2-Conformer", "Wav2Vec2Conformer", position_embeddings_type="relative", conv_depthwise_kernel_size=3),
    heard(
        "Wav2Vec2-BERT",
        "Wav2Vec2Bert",
        inputs=spectrum("input_features", BATCH, 16),
        feature_projection_input_dim=16,
        conv_depthwise_kernel_size=3,
        left_max_position_embeddings=4,
        right_max_position_embeddings=4,
        position_embeddings_type="relative_key",
    ),
    heard("HuBERT", "Hubert"),
    heard(
        "WavLM",
        "WavLM",
        num_buckets=8,
        max_bucket_distance=8,
        note="its attention reads the weights of q, k, v and out",
    ),
    heard("UniSpeech", "UniSpeech"),
    heard("SEW", "SEW", length=136, squeeze_factor=2),
    heard("SEW-D", "SEWD", length=136, squeeze_factor=2, position_buckets=4, max_position_embeddings=16),
    heard("Data2Vec audio", "Data2VecAudio", num_conv_pos_embeddings=2, conv_pos_kernel_size=3),
    heard(
        "Audio Spectrogram Transformer",
        "AST",
        inputs=spectrum("input_values", 16, 8),
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=16,
        num_mel_bins=8,
    ),
    written(
        "Whisper",
        "Whisper",
        spectrum("input_features", 8, 6),
        num_mel_bins=8,
        max_source_positions=BATCH,
        max_target_positions=64,
    ),
    written(
        "Speech2Text",
        "Speech2Text",
        spectrum("input_features", 12, 8),
        input_feat_per_channel=8,
        input_channels=1,
        num_conv_layers=2,
        conv_kernel_sizes=[3, 3],
        conv_channels=16,
        max_source_positions=32,
        max_target_positions=64,
    ),
    written(
        "Moonshine",
        "Moonshine",
        spectrum("input_values", 4000),
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
    ),
]
