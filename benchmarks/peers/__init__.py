"""The LoRA kernels of vLLM, SGLang and LMDeploy, called in place, from source folders of the user's.

The kernels are theirs, and so is the code that launches them and chooses their sizes. `sources` says which code is not
theirs, and where that could make a difference. CUDA graphs are timed: the time that their Python takes on each call
does not count. Read from vLLM 0.32.0, SGLang 0.5.23 and LMDeploy 0.18.0; other versions may be laid out differently.

`xpu-lora bench gpu --peers DIR` calls this from a checkout, through `xpu_lora_compile.bench.peers`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from xpu_lora_compile.bench.peers import Call, Operands, Peer
from xpu_lora_compile.errors import BenchError

from .sources import lmdeploy, sglang, vllm


class Vllm(Peer):
    """VLLM's Triton `lora_shrink` and `lora_expand`: one launch each for all slices.

    Args:
        folder: that holds `vllm`.
        specialize: launch for the adapters that have rows, not for every slot: its `specialize_active_lora`, which is
            off by default. Their exact number, where vLLM rounds it up to one that it has captured a graph for.
        two_streams: in situ, LoRA beside the base product: its `VLLM_LORA_ENABLE_DUAL_STREAM`, off by default.
    """

    def __init__(self, folder: Path, *, specialize: bool = False, two_streams: bool = False) -> None:
        load = vllm(folder)
        self._envs = load("vllm.envs")
        self._pointers = load("vllm.lora.ops.triton_ops.utils")
        self._wrapper: Any = load("vllm.lora.punica_wrapper.punica_gpu").PunicaWrapperGPU
        self._linear: Any = load("vllm.lora.layers.base_linear").BaseLinearLayerWithLoRA
        self._specialize, self._two_streams = specialize, two_streams

    def _bind(self, operands: Operands, base: Call | None) -> Call:
        device, rows = operands.inputs.device, len(operands.indices)
        config = SimpleNamespace(max_loras=len(operands.ranks), specialize_active_lora=self._specialize)
        wrapper = self._wrapper(rows, rows, device, lora_config=config)
        wrapper.token_mapping_meta.prepare_tensors(operands.indices)
        a, b = ([tuple(map(Tensor.contiguous, slices)) for slices in layers] for layers in (operands.a, operands.b))
        on_two_streams = self._two_streams and base is not None and device.type == "cuda"
        events = [torch.cuda.Event(), torch.cuda.Event()] if on_two_streams else None
        # Weights are looked up here by address, also those whose memory has been given to others since: each case has
        # tables of its own, which its graphs read, too.
        tables: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})

        def call(layer: int) -> Tensor:
            self._pointers._LORA_A_PTR_DICT, self._pointers._LORA_B_PTR_DICT = tables
            self._envs.VLLM_LORA_ENABLE_DUAL_STREAM = on_two_streams
            # vLLM's layer, with all that its two methods read.
            linear = object.__new__(self._linear)
            method = SimpleNamespace(apply=lambda *_: (base or operands.output)(layer))
            linear.base_layer = SimpleNamespace(quant_method=method)
            linear.lora_a_stacked, linear.lora_b_stacked, linear.output_slices = a[layer], b[layer], operands.widths
            linear.punica_wrapper, linear.device, linear._events = wrapper, device, events
            linear._lora_stream = _other_stream() if on_two_streams else None
            apply = linear._apply_async_impl if on_two_streams else linear._apply_sync
            result: Tensor = apply(operands.inputs)
            return result

        return call


class SglangV2(Peer):
    """SGLang's `triton_v2`: grouped, per-row or all-slots kernels, as its plans say for the sizes and this GPU.

    In situ, where they say so, the shrink or all of LoRA is on a side stream beside the base product.

    Args:
        folder: that holds `sglang`.
        decode_rows: up to so many rows are taken to be a decode step, which has other plans than a prefill.
    """

    def __init__(self, folder: Path, *, decode_rows: int = 256) -> None:
        load = sglang(folder)
        self._runner = load("sglang.srt.lora.dense.runner")
        self._plan = load("sglang.srt.lora.dense.plan")
        self._workspace: Any = load("sglang.srt.lora.workspace").LoraWorkspace
        self._decode_rows = decode_rows

    def _bind(self, operands: Operands, base: Call | None) -> Call:
        device, (rows, features) = operands.inputs.device, operands.inputs.shape
        slots, rank, _ = operands.a[0][0].shape
        phase = self._runner.Phase.DECODE if rows <= self._decode_rows else self._runner.Phase.PREFILL
        workspace = self._workspace()
        # It keeps scratch for each stream; here it is one, so that what is warm is so on the stream that captures.
        workspace._caller = lambda _: 0
        workspace.side_stream = lambda _: _other_stream()
        runner = self._runner.DenseLoraRunner(workspace, max_loras=slots, device=device)
        runner.begin_batch(
            token_slots=operands.indices.int(),
            lora_ranks=torch.tensor(operands.ranks, dtype=torch.int32, device=device),
            scalings=torch.ones(slots, device=device),
            num_tokens=rows,
            phase=phase,
            graph_mode=False,
        )
        # A capacity has its Triton kernels build the route, where else those would that it compiles from CUDA.
        build = functools.partial(self._runner.build_route, runner.token_slots, max_loras=slots)
        runner.route = functools.cache(lambda block: build(block_size=block, capacity=0 if rows > 512 else None))
        offsets = (0, *itertools.accumulate(operands.widths))
        plan = runner.plan_for(self._plan.DenseLoraKind.LINEAR, rank, features, offsets[-1], num_tokens=rows)
        if base is None:
            # Nothing to hide the shrink under.
            plan = dataclasses.replace(plan, overlap=self._plan.Overlap.NONE)
        a = [_packed(slices, operands.ranks) for slices in operands.a]
        b = [torch.cat(list(slices), 1) for slices in operands.b]

        def call(layer: int) -> Tensor:
            product = functools.partial(base or operands.output, layer)
            result: Tensor = runner.apply(operands.inputs, product, plan, a=a[layer], b=b[layer], offsets=offsets)
            return result

        return call


class SglangChunked(Peer):
    """SGLang's `csgmv`, its default: rows sorted by adapter and cut into chunks.

    Rows without an adapter have a slot of rank 0, as there. Its variables `SGLANG_ENABLE_LORA_CSGMV_SPLIT_K` and
    `SGLANG_LORA_CONFIG_DIR` are honoured.

    Args:
        folder: that holds `sglang`.
        chunk: at most so many rows in one: its `max_lora_chunk_size`, 16 by default.
    """

    def __init__(self, folder: Path, *, chunk: int = 16) -> None:
        load = sglang(folder)
        self._utils = load("sglang.srt.lora.utils")
        self._module = load("sglang.srt.lora.backend.chunked_backend")
        self._chunk = chunk

    def _bind(self, operands: Operands, base: Call | None) -> Call:
        device, slots = operands.inputs.device, len(operands.ranks)
        self._module.get_lora = lambda: SimpleNamespace(max_lora_chunk_size=self._chunk)
        backend = self._module.ChunkedSgmvLoRABackend(slots + 1, device, None)
        chunk = backend._determine_chunk_size_for_tokens(len(operands.indices))
        by_slot, permutation = torch.where(operands.indices < 0, slots, operands.indices).sort(stable=True)
        ids, lengths = self._utils.merge_and_chunk_segments(by_slot.tolist(), [1] * len(by_slot), chunk)

        def ints(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        backend.batch_info = self._utils.LoRABatchInfo(
            use_cuda_graph=False,
            bs=len(by_slot),
            num_segments=len(ids),
            seg_indptr=ints([0, *itertools.accumulate(lengths)]),
            weight_indices=ints(ids),
            lora_ranks=ints([*operands.ranks, 0]),
            scalings=torch.ones(slots + 1, device=device),
            max_len=chunk,
            seg_lens=None,
            permutation=permutation.int(),
        )
        ends = [0, *itertools.accumulate(operands.widths)]
        offsets, offsets_cpu = ints(ends), torch.tensor(ends, dtype=torch.int32)
        a = [_packed(slices, operands.ranks) for slices in operands.a]
        b = [torch.cat(list(slices), 1) for slices in operands.b]

        def call(layer: int) -> Tensor:
            result: Tensor = backend.run_qkv_lora(
                operands.inputs,
                a[layer],
                b[layer],
                offsets,
                max(operands.widths),
                base_output=(base or operands.output)(layer),
                n_slices=len(operands.widths),
                output_offset_cpu=offsets_cpu,
            )
            return result

        return call


class Lmdeploy(Peer):
    """LMDeploy's `fused_lora`: shrink and expand of a slice in one launch, for each request by its adapter.

    Here each row is a request, as in decoding. In a prefill its requests are runs of rows of one adapter, which these
    batches do not have.

    Args:
        folder: that holds `lmdeploy`.
    """

    most_rows = 256

    def __init__(self, folder: Path) -> None:
        load = lmdeploy(folder)
        self._info: Any = load("lmdeploy.pytorch.backends.lora").AdapterInfo
        self._lora: Any = load("lmdeploy.pytorch.backends.cuda.lora").TritonLoRAImpl

    def _bind(self, operands: Operands, base: Call | None) -> Call:
        device, (rows, features) = operands.inputs.device, operands.inputs.shape
        context = SimpleNamespace(
            q_start_loc=torch.arange(rows, device=device),
            q_seqlens=torch.ones(rows, dtype=torch.int64, device=device),
            # The first one is none, of rank 0.
            local_adapter_ids=operands.indices + 1,
            is_decoding=True,
        )
        manager = SimpleNamespace(current_context=lambda: context)
        ranks = torch.tensor([0, *operands.ranks], device=device)
        ends = [0, *itertools.accumulate(operands.widths)]
        infos = [
            self._info(features, end - start, ranks, torch.ones(len(ranks), device=device), slice(start, end))
            for start, end in itertools.pairwise(ends)
        ]
        # Every slot's ranks below those of the one before.
        used = list(enumerate(operands.ranks))
        a = [[torch.cat([stack[slot, :r] for slot, r in used]) for stack in slices] for slices in operands.a]
        b = [[torch.cat([stack[slot, :, :r].t() for slot, r in used]) for stack in slices] for slices in operands.b]
        lora = self._lora()

        def call(layer: int) -> Tensor:
            result = (base or operands.output)(layer)
            for info, its_a, its_b in zip(infos, a[layer], b[layer], strict=True):
                lora.forward(operands.inputs, its_a, its_b, result, info, manager, colwise=True)
            return result

        return call


def find(folder: Path) -> dict[str, Peer]:
    """The peers whose sources are in a folder, by name.

    Raises:
        BenchError: there are none, or they are not laid out as those that this was written for; or Triton is missing.
    """
    folder = folder.resolve()
    there = [name for name in ("vllm", "sglang", "lmdeploy") if (folder / name).is_dir()]
    if not there:
        remedy = "Unpack a wheel of vLLM, SGLang or LMDeploy there: python -m zipfile -e WHEEL DIR."
        raise BenchError("bench: --peers", "a folder that holds vllm, sglang or lmdeploy", str(folder), remedy)
    peers: dict[str, Peer] = {}
    if "vllm" in there:
        peers["vLLM"] = Vllm(folder)
        peers["vLLM, specialized"] = Vllm(folder, specialize=True)
        peers["vLLM, specialized, two streams"] = Vllm(folder, specialize=True, two_streams=True)
    if "sglang" in there:
        peers["SGLang triton_v2"] = SglangV2(folder)
        peers["SGLang csgmv"] = SglangChunked(folder)
        peers["SGLang csgmv, chunks of 128"] = SglangChunked(folder, chunk=128)
    if "lmdeploy" in there:
        peers["LMDeploy"] = Lmdeploy(folder)
    return peers


def _packed(a: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """A's slices one below the other, `[K, slices * R, D]`: without gaps in each slot, whatever its rank."""
    packed = torch.cat(list(a), 1)
    for slot, rank in enumerate(ranks):
        packed[slot, : rank * len(a)] = torch.cat([stack[slot, :rank] for stack in a])
    return packed


@functools.cache
def _streams() -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(), torch.cuda.Stream()


def _other_stream() -> torch.cuda.Stream:
    """A stream that is not the current one. There are only so many: of ever new ones, some would be the current."""
    return next(stream for stream in _streams() if stream != torch.cuda.current_stream())
