"""Models of images alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .family import BATCH, ENCODED, Family, Inputs, batch_first, config_of, model_of

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
}
# Names of sizes in Swin and what derives from it: windows of 2 by 2 patches.
WINDOWS: dict[str, Any] = {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 2}
# Names of sizes in DETR and what derives from it, with a ResNet before it.
DETECTOR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": BATCH,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}


def images(size: int = 16, *more: int) -> Callable[[], Inputs]:
    """Return a maker of images, `[3, *more, 3, size, size]`."""
    return lambda: {"pixel_values": torch.randn(BATCH, *more, 3, size, size)}


def seen(name: str, stem: str, *, read: Any = ENCODED, inputs: Any = None, note: str = "", **sizes: Any) -> Family:
    """Return the family of `<stem>Model`."""
    model, exclude = sizes.pop("model", f"{stem}Model"), sizes.pop("exclude", None)
    without = sizes.pop("without", ())
    kept = {key: size for key, size in SIZES.items() if key not in without}
    return Family(
        name,
        model_of(model, config_of(f"{stem}Config", kept, **sizes)),
        inputs or images(sizes.get("image_size", 16)),
        batch_first(*read),
        exclude=exclude,
        note=note,
    )


def detector(name: str, stem: str, **sizes: Any) -> Family:
    """Return the family of a detector with a small ResNet in it."""

    def config() -> Any:
        import transformers

        resnet = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        )
        return getattr(transformers, f"{stem}Config")(**{**DETECTOR, "backbone_config": resnet, **sizes})

    return Family(
        name,
        model_of(f"{stem}ForObjectDetection", config),
        images(32),
        batch_first("logits", "pred_boxes"),
    )


FAMILIES = [
    seen("ViT", "ViT"),
    seen("ViT (classifier)", "ViT", model="ViTForImageClassification", read=("logits",)),
    seen("DeiT", "DeiT"),
    seen("BEiT", "Beit", use_relative_position_bias=True),
    seen(
        "Swin",
        "Swin",
        **WINDOWS,
        without=["num_attention_heads", "hidden_size"],
        note="its layers see windows, not images",
    ),
    seen(
        "Swin v2",
        "Swinv2",
        **WINDOWS,
        without=["num_attention_heads", "hidden_size"],
        note="its layers see windows, not images",
    ),
    seen("DINOv2", "Dinov2"),
    seen("DINOv3", "DINOv3ViT", num_register_tokens=1),
    seen(
        "SegFormer",
        "Segformer",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
    ),
    seen(
        "ConvNeXt",
        "ConvNext",
        hidden_sizes=[8, 16],
        depths=[1, 1],
        patch_size=2,
        num_stages=2,
        layer_scale_init_value=1.0,
        without=["num_hidden_layers", "hidden_size"],
        note="few of its layers are Linear",
    ),
    seen(
        "Pyramid Vision Transformer",
        "Pvt",
        image_size=32,
        depths=[1, 1],
        hidden_sizes=[16, 32],
        sequence_reduction_ratios=[2, 1],
        patch_sizes=[4, 2],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        num_encoder_blocks=2,
    ),
    seen(
        "Hiera",
        "Hiera",
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        image_size=[16, 16],
        patch_size=[3, 3],
        patch_stride=[2, 2],
        patch_padding=[1, 1],
        query_stride=[2, 2],
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, False],
        num_query_pool=1,
        inputs=images(16),
    ),
    seen(
        "MobileViT",
        "MobileViT",
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
        image_size=32,
        patch_size=2,
    ),
    seen("ViT-MSN", "ViTMSN"),
    seen("YOLOS", "Yolos", image_size=[16, 16], num_detection_tokens=BATCH, inputs=images(16)),
    seen("SigLIP (vision)", "SiglipVision"),
    seen("VideoMAE", "VideoMAE", num_frames=4, tubelet_size=2, inputs=images(16, 4)),
    seen(
        "TimeSformer",
        "Timesformer",
        num_frames=BATCH,
        inputs=images(16, BATCH),
        note="three frames in each of three videos",
    ),
    seen("ViViT", "Vivit", num_frames=4, tubelet_size=[2, 8, 8], inputs=images(16, 4)),
    detector("DETR", "Detr"),
    detector("Conditional DETR", "ConditionalDetr"),
]
