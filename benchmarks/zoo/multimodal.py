"""Models of images or sounds together with text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from .family import BATCH, ENCODED, TEXT_SIZES, VOCABULARY, Family, Inputs, batch_first, model_of, text, tokens
from .vision import SIZES as VISION_SIZES

IMAGE = VOCABULARY - 1
VIDEO = VOCABULARY - 2
# How many images each sequence has. There are as many images as sequences in both.
ONE_EACH, UNEVEN = (1, 1, 1), (2, 0, 1)
LLAMA: dict[str, Any] = {**TEXT_SIZES, "model_type": "llama"}
CLIP: dict[str, Any] = {**VISION_SIZES, "model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP: dict[str, Any] = {**VISION_SIZES, "model_type": "siglip_vision_model", "vision_use_head": False}
QFORMER: dict[str, Any] = {**TEXT_SIZES, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
OPT: dict[str, Any] = {**TEXT_SIZES, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}


def config(stem: str, **parts: Any) -> Callable[[], Any]:
    """Return a maker of `<stem>Config`; parts that are dictionaries are copied, since configurations change them."""
    return lambda: getattr(transformers, f"{stem}Config")(
        **{name: dict(part) if isinstance(part, dict) else part for name, part in parts.items()}
    )


def pictured(counts: Sequence[int], each: int) -> Inputs:
    """Return tokens in which each image of a sequence stands as `each` tokens."""
    return with_places([[each] * count for count in counts])


def with_places(lengths: Sequence[Sequence[int]]) -> Inputs:
    """Return tokens in which the images of each sequence stand as so many tokens, each after a token of text."""
    ids = tokens(2 + max(len(row) + sum(row) for row in lengths), high=VIDEO)
    for row, images in enumerate(lengths):
        start = 1
        for length in images:
            ids[row, start : start + length] = IMAGE
            start += length + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def chatter(
    name: str,
    stem: str,
    parts: dict[str, Any],
    inputs: Callable[[], Inputs],
    *,
    targets: Any = "all-linear",
    exclude: Any = None,
    note: str = "",
    model: str | None = None,
    generates: bool = True,
) -> Family:
    """Return the family of `<stem>ForConditionalGeneration`, which answers questions about images."""
    return Family(
        name,
        model_of(model or f"{stem}ForConditionalGeneration", config(stem, **parts)),
        inputs,
        batch_first("logits"),
        inputs if generates else None,
        targets=targets,
        exclude=exclude,
        note=note,
    )


def with_images(counts: Sequence[int], each: int) -> Callable[[], Inputs]:
    """Return a maker of tokens and of the images one after the other, `[images, 3, 16, 16]`."""

    def make() -> Inputs:
        return {**pictured(counts, each), "pixel_values": torch.randn(sum(counts), 3, 16, 16)}

    return make


def padded_images(counts: Sequence[int], each: int) -> Callable[[], Inputs]:
    """Return a maker of tokens and of images with empty ones as padding, `[3, most images, 3, 16, 16]`."""

    def make() -> Inputs:
        images = torch.randn(BATCH, max(counts), 3, 16, 16)
        for row, count in enumerate(counts):
            images[row, count:] = 0
        mask = torch.ones(BATCH, max(counts), 16, 16, dtype=torch.bool)
        return {**pictured(counts, each), "pixel_values": images, "pixel_attention_mask": mask}

    return make


def patches(grids: Sequence[Sequence[Sequence[int]]], features: int) -> Callable[[], Inputs]:
    """Return a maker of tokens and of images cut into patches, `[patches of all images, features]`.

    Args:
        grids: for each sequence the grid of each of its images; four patches become one token.
        features: numbers in a patch.
    """

    def make() -> Inputs:
        sizes = [[height * width // 4 for _, height, width in row] for row in grids]
        text_inputs = with_places(sizes)
        flat = torch.tensor([grid for row in grids for grid in row])
        return {
            **text_inputs,
            "mm_token_type_ids": (text_inputs["input_ids"] == IMAGE).long(),
            "pixel_values": torch.randn(int(flat.prod(1).sum()), features),
            "image_grid_thw": flat,
        }

    return make


def mllama_inputs() -> Inputs:
    """Return tokens, an image of two tiles for each sequence, and which token sees which."""
    length = BATCH
    return {
        **text(length)(),
        "pixel_values": torch.randn(BATCH, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.full((BATCH, 1), 1),
        "aspect_ratio_mask": torch.ones(BATCH, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(BATCH, length, 1, 2, dtype=torch.long),
    }


def captioned() -> Inputs:
    """Return an image and tokens for each sequence."""
    return {**text()(), "pixel_values": torch.randn(BATCH, 3, 16, 16)}


def with_tokens_of_queries() -> Inputs:
    """Return an image for each sequence, and tokens in which its three queries stand."""
    return {**pictured(ONE_EACH, 3), "pixel_values": torch.randn(BATCH, 3, 16, 16)}


def instructed() -> Inputs:
    """Return the same, and an instruction for the queries."""
    question = text()()
    return {
        **with_tokens_of_queries(),
        "qformer_input_ids": question["input_ids"],
        "qformer_attention_mask": question["attention_mask"],
    }


def reader(name: str, encoder: Callable[[], Any], decoder: Callable[[], Any], size: int = 16) -> Family:
    """Return the family of a vision encoder with a text decoder, which reads what an image says."""

    def make() -> Any:
        both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder(), decoder())
        both.decoder_start_token_id, both.pad_token_id = 1, 0
        return both

    def images() -> Inputs:
        return {"pixel_values": torch.randn(BATCH, 3, size, size)}

    return Family(
        name,
        model_of("VisionEncoderDecoderModel", make),
        lambda: {**images(), "decoder_input_ids": tokens()},
        batch_first("logits"),
        images,
    )


def pix2struct_patches() -> Inputs:
    """Return images cut into patches, each with its row and column before its numbers."""
    return {"flattened_patches": torch.cat([torch.ones(BATCH, BATCH, 2), torch.randn(BATCH, BATCH, 12)], -1)}


def clicked() -> Inputs:
    """Return an image and three prompts of one point each."""
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32), "input_points": torch.rand(BATCH, BATCH, 1, 2) * 32}


QWEN_TEXT: dict[str, Any] = {
    **TEXT_SIZES,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
}
QWEN2_VL: dict[str, Any] = {
    **QWEN_TOKENS,
    "text_config": QWEN_TEXT,
    "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2},
}
QWEN25_VL: dict[str, Any] = {
    **QWEN_TOKENS,
    "text_config": QWEN_TEXT,
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_heads": 4,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    },
}
LLAVA: dict[str, Any] = {
    "text_config": LLAMA,
    "vision_config": CLIP,
    "image_token_id": IMAGE,
    "vision_feature_layer": -1,
}
# Three images of four patches, which become one token each.
SMALL_UNEVEN = [[[1, 2, 2], [1, 2, 2]], [], [[1, 2, 2]]]
IDEFICS: dict[str, Any] = {
    "text_config": LLAMA,
    "vision_config": VISION_SIZES,
    "image_token_id": IMAGE,
    "scale_factor": 2,
}
LANGUAGE = r".*language_model.*_proj"

FAMILIES = [
    chatter("LLaVA", "Llava", LLAVA, with_images(ONE_EACH, 4)),
    chatter("LLaVA (2, 0 and 1 images)", "Llava", LLAVA, with_images(UNEVEN, 4)),
    chatter("LLaVA (2, 1 and 1 images)", "Llava", LLAVA, with_images((2, 1, 1), 4)),
    chatter("LLaVA (2, 0 and 1 images, language alone)", "Llava", LLAVA, with_images(UNEVEN, 4), targets=LANGUAGE),
    chatter("VipLLaVA", "VipLlava", {**LLAVA, "vision_feature_layers": [-1, -2]}, with_images(UNEVEN, 4)),
    chatter("Qwen2-VL", "Qwen2VL", QWEN2_VL, patches([[[1, 4, 4]], [[1, 2, 2]], [[1, 4, 2]]], 96)),
    chatter(
        "Qwen2-VL (merger)",
        "Qwen2VL",
        QWEN2_VL,
        patches(SMALL_UNEVEN, 96),
        targets=r".*merger\.mlp\.[02]|" + LANGUAGE,
        note="three images of one token each in two of the sequences",
    ),
    chatter("Qwen2-VL (language alone)", "Qwen2VL", QWEN2_VL, patches(SMALL_UNEVEN, 96), targets=LANGUAGE),
    chatter("Qwen2.5-VL", "Qwen2_5_VL", QWEN25_VL, patches([[[1, 4, 4]], [[1, 2, 2]], [[1, 4, 2]]], 96)),
    chatter(
        "Gemma 3 (vision)",
        "Gemma3",
        {
            "text_config": {**TEXT_SIZES, "sliding_window": 4},
            "vision_config": {**SIGLIP, "patch_size": 4},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
        },
        with_images(UNEVEN, 4),
    ),
    chatter("Idefics3", "Idefics3", IDEFICS, padded_images(UNEVEN, 1)),
    chatter("SmolVLM", "SmolVLM", IDEFICS, padded_images(UNEVEN, 1)),
    chatter(
        "Idefics2",
        "Idefics2",
        {
            "text_config": {**TEXT_SIZES, "model_type": "mistral"},
            "vision_config": VISION_SIZES,
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 3,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            },
            "image_token_id": IMAGE,
        },
        padded_images(UNEVEN, 3),
    ),
    chatter(
        "PaliGemma",
        "PaliGemma",
        {
            "text_config": {**TEXT_SIZES, "model_type": "gemma"},
            "vision_config": SIGLIP,
            "projection_dim": 32,
            "hidden_size": 32,
            "image_token_index": IMAGE,
        },
        with_images(ONE_EACH, 4),
    ),
    chatter(
        "InternVL",
        "InternVL",
        {
            "text_config": {**TEXT_SIZES, "model_type": "qwen2"},
            "vision_config": {**VISION_SIZES, "image_size": [16, 16], "patch_size": [8, 8]},
            "image_token_id": IMAGE,
            "downsample_ratio": 0.5,
        },
        with_images(UNEVEN, 1),
    ),
    chatter(
        "AyaVision",
        "AyaVision",
        {
            "text_config": {**TEXT_SIZES, "model_type": "cohere2"},
            "vision_config": SIGLIP,
            "image_token_index": IMAGE,
            "downsample_factor": 2,
            "adapter_layer_norm_eps": 1e-6,
            "alignment_intermediate_size": 48,
        },
        with_images(UNEVEN, 1),
    ),
    chatter(
        "BLIP-2",
        "Blip2",
        {
            "text_config": OPT,
            "vision_config": VISION_SIZES,
            "qformer_config": QFORMER,
            "num_query_tokens": 3,
            "image_token_index": IMAGE,
        },
        with_tokens_of_queries,
    ),
    chatter(
        "InstructBLIP",
        "InstructBlip",
        {
            "text_config": OPT,
            "vision_config": VISION_SIZES,
            "qformer_config": QFORMER,
            "num_query_tokens": 3,
            "image_token_index": IMAGE,
        },
        instructed,
    ),
    chatter(
        "Mllama",
        "Mllama",
        {
            "text_config": {
                **TEXT_SIZES,
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "vision_config": {
                **VISION_SIZES,
                "num_global_layers": 1,
                "attention_heads": 4,
                "max_num_tiles": 2,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 64,
                "supported_aspect_ratios": [[1, 1], [1, 2]],
            },
            "image_token_index": IMAGE,
        },
        mllama_inputs,
        generates=False,
    ),
    chatter(
        "BLIP",
        "Blip",
        {
            "text_config": {**TEXT_SIZES, "encoder_hidden_size": 32, "sep_token_id": 2},
            "vision_config": VISION_SIZES,
            "projection_dim": 32,
            "image_text_hidden_size": 32,
        },
        captioned,
    ),
    chatter("GIT", "Git", {**TEXT_SIZES, "vision_config": VISION_SIZES}, captioned, model="GitForCausalLM"),
    chatter(
        "Kosmos-2",
        "Kosmos2",
        {
            "text_config": {**TEXT_SIZES, "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4},
            "vision_config": VISION_SIZES,
            "latent_query_num": 3,
        },
        lambda: {
            **pictured(ONE_EACH, 3),
            "pixel_values": torch.randn(BATCH, 3, 16, 16),
            "image_embeds_position_mask": (pictured(ONE_EACH, 3)["input_ids"] == IMAGE).long(),
        },
    ),
    reader(
        "TrOCR",
        lambda: transformers.ViTConfig(**VISION_SIZES),
        lambda: transformers.TrOCRConfig(
            **{
                **TEXT_SIZES,
                "d_model": 32,
                "decoder_layers": 2,
                "decoder_attention_heads": 4,
                "decoder_ffn_dim": 48,
                "cross_attention_hidden_size": 32,
            }
        ),
    ),
    reader(
        "Donut",
        lambda: transformers.DonutSwinConfig(
            embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=2, patch_size=2, image_size=16
        ),
        lambda: transformers.MBartConfig(
            **{**TEXT_SIZES, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
        ),
    ),
    Family(
        "Pix2Struct",
        model_of(
            "Pix2StructForConditionalGeneration",
            config(
                "Pix2Struct",
                text_config={
                    "vocab_size": 99,
                    "hidden_size": 32,
                    "d_kv": 8,
                    "d_ff": 48,
                    "num_layers": 2,
                    "num_heads": 4,
                    "decoder_start_token_id": 1,
                },
                vision_config={
                    "hidden_size": 32,
                    "patch_embed_hidden_size": 12,
                    "d_ff": 48,
                    "d_kv": 8,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "seq_len": 8,
                },
            ),
        ),
        lambda: {**pix2struct_patches(), "decoder_input_ids": tokens()},
        batch_first("logits"),
        pix2struct_patches,
    ),
    Family(
        "CLIP",
        model_of(
            "CLIPModel",
            config(
                "CLIP", text_config={**TEXT_SIZES, "projection_dim": 32}, vision_config=VISION_SIZES, projection_dim=32
            ),
        ),
        captioned,
        batch_first("text_embeds", "image_embeds"),
    ),
    Family(
        "SigLIP",
        model_of("SiglipModel", config("Siglip", text_config=TEXT_SIZES, vision_config=VISION_SIZES)),
        captioned,
        batch_first("text_embeds", "image_embeds"),
        targets=["q_proj", "v_proj", "fc1"],
    ),
    Family(
        "ViLT",
        model_of("ViltModel", config("Vilt", **{**TEXT_SIZES, **VISION_SIZES}, max_image_length=-1)),
        captioned,
        batch_first(*ENCODED),
    ),
    Family(
        "SAM",
        model_of(
            "SamModel",
            config(
                "Sam",
                vision_config={
                    **VISION_SIZES,
                    "image_size": 32,
                    "output_channels": 16,
                    "window_size": 2,
                    "global_attn_indexes": [1],
                    "num_pos_feats": 8,
                    "mlp_dim": 48,
                },
                prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
                mask_decoder_config={
                    "hidden_size": 16,
                    "mlp_dim": 24,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "iou_head_hidden_dim": 16,
                    "iou_head_depth": 2,
                },
            ),
        ),
        clicked,
        batch_first("pred_masks", "iou_scores"),
        note="three prompts for each image",
    ),
]
