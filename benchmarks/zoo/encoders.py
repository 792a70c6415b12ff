"""Encoders of text."""

from __future__ import annotations

from typing import Any

import torch

from .family import BATCH, ENCODED, TEXT_SIZES, Family, Inputs, batch_first, config_of, model_of, text, tokens


def encoder(name: str, stem: str, *, inputs: Any = None, note: str = "", **sizes: Any) -> Family:
    """Return the family of `<stem>Model`."""
    model = sizes.pop("model", f"{stem}Model")
    read = sizes.pop("read", ENCODED)
    without = sizes.pop("without", ())
    kept = {key: size for key, size in TEXT_SIZES.items() if key not in without}
    prompt, exclude = sizes.pop("prompt", None), sizes.pop("exclude", None)
    return Family(
        name,
        model_of(model, config_of(f"{stem}Config", kept, **sizes)),
        inputs or text(),
        batch_first(*read),
        prompt,
        exclude=exclude,
        note=note,
    )


def boxes() -> Inputs:
    """Return tokens and where each stands on the page."""
    corners = torch.randint(0, 15, (BATCH, BATCH, 2))
    return {**text()(), "bbox": torch.cat([corners, corners + 1], -1)}


def with_global_token() -> Inputs:
    """Return tokens of which the first of each sequence attends to all."""
    return {**text()(), "global_attention_mask": torch.tensor([[1, 0, 0]] * BATCH)}


def bytes_of_text() -> Inputs:
    """Return characters, of which CANINE wants more than one block."""
    return text(8)()


def ids_alone() -> Inputs:
    """Return tokens without a mask."""
    return {"input_ids": tokens()}


# Names of sizes in XLM and Flaubert.
XLM: dict[str, Any] = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 99, "max_position_embeddings": 64}

FAMILIES = [
    encoder("BERT", "Bert"),
    encoder("BERT (classifier)", "Bert", model="BertForSequenceClassification", read=("logits",)),
    encoder("RoBERTa", "Roberta"),
    encoder("XLM-RoBERTa", "XLMRoberta"),
    encoder("ALBERT", "Albert", embedding_size=16, note="its layers share one set of modules"),
    encoder("DistilBERT", "DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    encoder("ELECTRA", "Electra", embedding_size=16),
    encoder("DeBERTa", "Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8),
    encoder("DeBERTa-v2", "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True),
    encoder("ModernBERT", "ModernBert", attn_implementation="eager"),
    encoder("Longformer", "Longformer", attention_window=[4, 4], inputs=with_global_token),
    encoder("BigBird", "BigBird", attention_type="original_full"),
    encoder(
        "BigBird (block sparse)",
        "BigBird",
        attention_type="block_sparse",
        block_size=4,
        num_random_blocks=1,
        inputs=text(48),
        max_position_embeddings=64,
    ),
    encoder(
        "Funnel",
        "Funnel",
        without=["num_hidden_layers", "num_attention_heads", "hidden_size"],
        block_sizes=[1, 1],
        num_decoder_layers=1,
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=48,
        inputs=text(8),
    ),
    encoder("FNet", "FNet", inputs=ids_alone, use_tpu_fourier_optimizations=False),
    encoder("LayoutLM", "LayoutLM", inputs=boxes, max_2d_position_embeddings=32),
    encoder(
        "XLNet",
        "XLNet",
        without=["max_position_embeddings", "hidden_size"],
        d_model=32,
        n_layer=2,
        n_head=4,
        d_inner=48,
        note="its layers see [T, batch, D]",
    ),
    encoder("XLM", "XLM", **XLM),
    encoder("Flaubert", "Flaubert", **XLM),
    encoder("MPNet", "MPNet"),
    encoder("RoFormer", "RoFormer", embedding_size=32),
    encoder("Nystromformer", "Nystromformer", num_landmarks=3, segment_means_seq_len=3),
    encoder(
        "MobileBERT",
        "MobileBert",
        embedding_size=16,
        true_hidden_size=16,
        intra_bottleneck_size=16,
        num_feedforward_networks=1,
        use_bottleneck=True,
    ),
    encoder(
        "SqueezeBERT",
        "SqueezeBert",
        embedding_size=32,
        q_groups=1,
        read=("pooler_output",),
        note="its layers are Conv1d; LoRA is on the pooler",
    ),
    encoder("ConvBERT", "ConvBert", embedding_size=32, conv_kernel_size=3),
    encoder(
        "CANINE", "Canine", inputs=bytes_of_text, downsampling_rate=4, num_hash_buckets=50, local_transformer_stride=4
    ),
    encoder(
        "Perceiver",
        "Perceiver",
        model="PerceiverForMaskedLM",
        read=("logits",),
        d_model=32,
        d_latents=32,
        num_latents=3,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        qk_channels=32,
        v_channels=32,
        max_position_embeddings=8,
        inputs=text(8),
    ),
    encoder(
        "Reformer",
        "Reformer",
        attn_layers=["local", "lsh"],
        axial_pos_embds=False,
        attention_head_size=8,
        local_attn_chunk_length=4,
        lsh_attn_chunk_length=4,
        num_hashes=1,
        num_buckets=2,
        hash_seed=0,
        feed_forward_size=48,
        is_decoder=False,
        inputs=text(8),
        note="reversible layers",
    ),
    encoder("ESM", "Esm", mask_token_id=4, position_embedding_type="rotary", token_dropout=False),
    encoder("RemBERT", "RemBert", input_embedding_size=16, output_embedding_size=16),
    encoder("NomicBERT", "NomicBert"),
    encoder("EuroBERT", "EuroBert"),
    encoder("LiLT", "Lilt", inputs=boxes, max_2d_position_embeddings=32, channel_shrink_ratio=2, hidden_size=48),
]
