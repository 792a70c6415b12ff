"""Tiny random models that look at images, and batches for them."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor, nn

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def llava() -> nn.Module:
    """LLaVA: four tokens for each image, and images in a batch of their own."""
    text = hf.LlamaConfig(**SMALL, intermediate_size=48)
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=98, vision_feature_layer=-1)
    )


def llava_batch(images: list[int]) -> dict[str, Tensor]:
    """Three sequences with so many images each."""
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    for row, count in enumerate(images):
        ids[row, 1 : 1 + 4 * count] = 98
    pixels = torch.randn(sum(images), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def qwen2_vl() -> nn.Module:
    """Qwen2-VL: the patches of all images in one row."""
    text = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    special = {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=text, vision_config={**vision, "in_channels": 3}, **special)
    )


GRIDS = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 2, 2]])


def qwen2_vl_batch() -> dict[str, Tensor]:
    """Two images in the first row, none in the second, one in the third, all of different sizes."""
    ids = torch.randint(3, 90, (3, 16), generator=torch.Generator().manual_seed(0))
    patches = [int(grid.prod()) for grid in GRIDS]
    at = 1
    for number, count in enumerate(patches):
        row, at = (0, at) if number < 2 else (2, 1)
        ids[row, at] = 96
        ids[row, at + 1 : at + 1 + count // 4] = 98
        at += count // 4 + 2
    pixels = torch.randn(sum(patches), 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 98).int()}
    return {**text, "pixel_values": pixels, "image_grid_thw": GRIDS}
