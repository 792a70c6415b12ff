"""Language models that are decoders alone."""

from __future__ import annotations

from typing import Any

from .family import TEXT_SIZES, Family, batch_first, config_of, model_of, text


def decoder(
    name: str,
    stem: str,
    *,
    note: str = "",
    targets: Any = "all-linear",
    exclude: Any = None,
    generates: bool = True,
    **sizes: Any,
) -> Family:
    """Return the family of `<stem>ForCausalLM`."""
    model = sizes.pop("model", f"{stem}ForCausalLM")
    config = sizes.pop("config", f"{stem}Config")
    without = sizes.pop("without", ())
    return Family(
        name,
        model_of(
            model, config_of(config, {name: size for name, size in TEXT_SIZES.items() if name not in without}, **sizes)
        ),
        text(),
        batch_first("logits"),
        text(4) if generates else None,
        targets=targets,
        exclude=exclude,
        note=note,
    )


# Sizes of mixtures of experts.
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Sizes of DeepSeek's attention.
LATENT: dict[str, Any] = {
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
DEEPSEEK: dict[str, Any] = {
    **LATENT,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# Where "all-linear" would make PEFT target the parameters of the experts, too. A name such as "gate_proj" outside of
# attention is enough for that.
ATTENTION = r".*attn\.[a-z_]+_proj[a-z_]*"
# Names of sizes in the family of GPT-2.
OLD: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

FAMILIES = [
    decoder("Llama", "Llama"),
    decoder("Mistral", "Mistral", sliding_window=4),
    decoder("Ministral", "Ministral", sliding_window=4),
    decoder("Qwen2", "Qwen2"),
    decoder("Qwen3", "Qwen3"),
    decoder("Gemma", "Gemma"),
    decoder("Gemma 2", "Gemma2", sliding_window=4),
    decoder("Gemma 3 (text)", "Gemma3", config="Gemma3TextConfig", sliding_window=4),
    decoder(
        "Gemma 3n (text)",
        "Gemma3n",
        config="Gemma3nTextConfig",
        sliding_window=4,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    decoder("Phi", "Phi", partial_rotary_factor=0.5),
    decoder("Phi-3", "Phi3"),
    decoder("OPT", "OPT", ffn_dim=48, word_embed_proj_dim=32),
    decoder("OPT (projected embeddings)", "OPT", ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    decoder("GPT-2", "GPT2", model="GPT2LMHeadModel", **OLD),
    decoder("GPT-J", "GPTJ", **OLD, rotary_dim=4),
    decoder("GPT-NeoX", "GPTNeoX"),
    decoder("GPT-Neo", "GPTNeo", num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4, window_size=4),
    decoder("GPT-BigCode", "GPTBigCode", **OLD),
    decoder("CodeGen", "CodeGen", **OLD, rotary_dim=4),
    decoder("BLOOM", "Bloom", n_layer=2, n_head=4),
    decoder("Falcon", "Falcon", without=["head_dim"], multi_query=True, alibi=False),
    decoder("Falcon (ALiBi)", "Falcon", without=["head_dim"], multi_query=False, alibi=True),
    decoder("MPT", "Mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    decoder("StableLM", "StableLm"),
    decoder("StarCoder2", "Starcoder2"),
    decoder("OLMo", "Olmo"),
    decoder("OLMo 2", "Olmo2"),
    decoder("OLMo 3", "Olmo3"),
    decoder("Cohere", "Cohere"),
    decoder("Cohere 2", "Cohere2"),
    decoder("Granite", "Granite"),
    decoder("Nemotron", "Nemotron"),
    decoder("Persimmon", "Persimmon"),
    decoder("SmolLM3", "SmolLM3"),
    decoder("GLM", "Glm"),
    decoder("GLM-4", "Glm4"),
    decoder("EXAONE 4", "Exaone4"),
    decoder("Helium", "Helium"),
    decoder("Seed-OSS", "SeedOss"),
    decoder("Arcee", "Arcee"),
    decoder("ERNIE 4.5", "Ernie4_5"),
    decoder("BioGPT", "BioGpt"),
    decoder("XGLM", "XGLM", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    decoder("ModernBERT decoder", "ModernBertDecoder"),
    decoder("LFM2", "Lfm2"),
    # State spaces and hybrids.
    decoder("Mamba", "Mamba", state_size=8, targets=["in_proj", "x_proj"]),
    decoder(
        "Mamba (dt_proj)", "Mamba", state_size=8, targets=["in_proj", "dt_proj"], note="the mixer reads dt_proj.weight"
    ),
    decoder("Mamba 2", "Mamba2", state_size=8, num_heads=8, n_groups=1, chunk_size=4, targets=["in_proj"]),
    decoder("Falcon-Mamba", "FalconMamba", state_size=8, targets=["in_proj", "x_proj"]),
    decoder(
        "Jamba",
        "Jamba",
        exclude=["dt_proj"],
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    decoder(
        "Bamba", "Bamba", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4
    ),
    decoder(
        "Falcon-H1",
        "FalconH1",
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=4,
        targets=["in_proj", "q_proj", "v_proj", "gate_proj", "down_proj"],
    ),
    decoder(
        "RecurrentGemma",
        "RecurrentGemma",
        lru_width=32,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
    ),
    decoder("RWKV", "Rwkv", attention_hidden_size=32, context_length=64),
    decoder(
        "Zamba",
        "Zamba",
        num_hidden_layers=4,
        attn_layer_period=1,
        attn_layer_offset=0,
        mamba_d_state=8,
        n_mamba_heads=2,
        use_mamba_kernels=False,
        attention_head_dim=16,
        attention_hidden_size=64,
    ),
    decoder(
        "Zamba 2",
        "Zamba2",
        num_hidden_layers=3,
        mamba_d_state=8,
        mamba_expand=2,
        n_mamba_heads=8,
        mamba_headdim=8,
        chunk_size=4,
        layers_block_type=["mamba", "hybrid", "mamba"],
        num_mem_blocks=1,
    ),
    decoder(
        "Qwen3-Next",
        "Qwen3Next",
        **EXPERTS,
        shared_expert_intermediate_size=16,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"],
        targets=ATTENTION,
    ),
    # Mixtures of experts.
    decoder("Qwen2-MoE", "Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=24),
    decoder("Qwen3-MoE", "Qwen3Moe", **EXPERTS, targets=ATTENTION),
    decoder(
        "Mixtral (experts)",
        "Mixtral",
        num_local_experts=4,
        num_experts_per_tok=2,
        note="PEFT puts LoRA on the parameters of the experts",
    ),
    decoder("Mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2, targets=ATTENTION),
    decoder("OLMoE", "Olmoe", num_experts=4, num_experts_per_tok=2, targets=ATTENTION),
    decoder("DeepSeek-V2", "DeepseekV2", without=["head_dim"], **DEEPSEEK, targets=ATTENTION),
    decoder("DeepSeek-V3", "DeepseekV3", without=["head_dim"], **DEEPSEEK, targets=ATTENTION),
    decoder("gpt-oss", "GptOss", num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    decoder(
        "Llama 4 (text)",
        "Llama4",
        exclude=["router"],
        config="Llama4TextConfig",
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=8,
    ),
    decoder("GraniteMoE", "GraniteMoe", num_local_experts=4, num_experts_per_tok=2),
    decoder(
        "GraniteMoE (shared)",
        "GraniteMoeShared",
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=24,
    ),
    decoder(
        "DBRX",
        "Dbrx",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    ),
    decoder("Phi-3.5-MoE", "Phimoe", exclude=["router"], num_local_experts=4, num_experts_per_tok=2),
    decoder(
        "GLM-4-MoE",
        "Glm4Moe",
        **EXPERTS,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        targets=ATTENTION,
    ),
    decoder(
        "ERNIE 4.5 MoE",
        "Ernie4_5_Moe",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=16,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        targets=ATTENTION,
    ),
    decoder("JetMoE", "JetMoe", num_local_experts=4, num_experts_per_tok=2, kv_channels=8),
    decoder(
        "dots.llm1",
        "Dots1",
        **EXPERTS,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        targets=ATTENTION,
    ),
]
