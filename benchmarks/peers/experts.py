"""LoRA on experts as vLLM and SGLang compute it, from source folders of the user's: see `benchmarks.peers`.

`xpu-lora bench moe --device cuda --peers DIR` calls this from a checkout. Read from vLLM 0.33.0 and SGLang 0.5.23.

How each sorts its rows is computed before, in plain PyTorch, and not timed: vLLM's own op for that is in its compiled
library, and SGLang's takes one that it compiles from CUDA.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from xpu_lora_compile.bench.peers import ExpertsCall, ExpertsOperands, ExpertsPeer
from xpu_lora_compile.errors import BenchError

from .sources import sglang_experts, vllm_experts


class VllmExperts(ExpertsPeer):
    """VLLM's Triton op `fused_moe_lora`: before the activation, and before the sum over the experts of a token.

    Args:
        folder: that holds `vllm`.
        block: rows in a block, which vLLM takes from a table of its base product's sizes.
    """

    weighs_down = True
    # It takes pairs as they come where there are so few of them: a constant of its `punica_gpu`.
    SPARSITY = 8

    def __init__(self, folder: Path, block: int) -> None:
        self._ops: Any = vllm_experts(folder)("vllm.lora.ops.triton_ops.fused_moe_lora_op")
        self._block = block

    def prepare(self, operands: ExpertsOperands) -> ExpertsCall:
        """As `ExpertsPeer.prepare`."""
        device, (rows, count) = operands.index.device, operands.index.shape
        slots, experts, rank, _ = operands.gate_up[0][0].shape
        active = torch.tensor(sorted({slot for slot in operands.slots.tolist() if slot >= 0}), dtype=torch.int32)
        how_many = torch.tensor([len(active)], dtype=torch.int32)
        enabled = torch.ones(slots + 1, dtype=torch.int32, device=device)
        if rows * count * self.SPARSITY <= experts * slots:
            routing: tuple[Any, ...] = (None, operands.index.reshape(-1), None)
        else:
            routing = _blocks(operands.index, operands.slots, slots, experts, self._block)
        outputs = [
            torch.zeros(rows, count, b.shape[2], dtype=operands.hidden.dtype, device=device)
            for _, b in (operands.gate_up[0], operands.down[0])
        ]
        active = active.to(device)
        sizes = self._block, 64, 32, 8, 4, 3, 1
        # Weights are looked up by address here, too: see `Vllm`.
        table: dict[Any, Any] = {}

        def add(output: Tensor, inputs: Tensor, a: Tensor, b: Tensor, weighs: bool) -> None:
            self._ops._fused_moe_lora(
                output,
                inputs,
                [a],
                [b],
                operands.weights,
                *routing,
                operands.slots,
                rank,
                count,
                active,
                how_many,
                enabled,
                *sizes,
                *sizes,
                weighs,
            )

        def call(layer: int) -> tuple[Tensor, Tensor]:
            self._ops._LORA_PTR_DICT = table
            at = layer % len(operands.gate_up)
            add(outputs[0], operands.hidden, *operands.gate_up[at], False)
            add(outputs[1], operands.activated, *operands.down[at], True)
            return outputs[0].flatten(0, 1), outputs[1].flatten(0, 1)

        return _warm(call, len(operands.gate_up), outputs)


class SglangExperts(ExpertsPeer):
    """SGLang's kernels of LoRA on experts, as its plans say for the sizes and a Hopper GPU.

    What they compute is written, and not added. Its layers add it in the activation and in the sum over the experts,
    and compute it beside the base products or in the activation where the plans say so: not here, where it is alone.

    Args:
        folder: that holds `sglang`.
        decode_rows: as of `SglangV2`.
    """

    def __init__(self, folder: Path, *, decode_rows: int = 256) -> None:
        load = sglang_experts(folder)
        self._runner: Any = load("sglang.srt.lora.moe.runner")
        self._plan: Any = load("sglang.srt.lora.moe.plan")
        self._view: Any = load("sglang.kernels.ops.lora.common.route_view")
        self._workspace: Any = load("sglang.srt.lora.workspace").LoraWorkspace
        self._decode_rows = decode_rows

    def prepare(self, operands: ExpertsOperands) -> ExpertsCall:
        """As `ExpertsPeer.prepare`."""
        plan_module, runner_module = self._plan, self._runner
        device, (rows, count) = operands.index.device, operands.index.shape
        slots, experts, rank, features = operands.gate_up[0][0].shape
        inner = operands.activated.shape[1]
        phases = plan_module.Phase
        phase = phases.DECODE if rows <= self._decode_rows else phases.PREFILL
        selected = plan_module.resolve_plans(
            architecture="sm90",
            is_shared_outer=False,
            physical_rank=rank,
            activation=runner_module.ActivationFn.SILU,
            hidden_size=features,
            num_local_experts=experts,
            quant_family="bf16",
        )[phase]
        plan, launch = selected.plan, selected.tiles.config_for(rows)
        grouped = plan_module.BFamily.GROUPED
        specs = {
            # Where the activation computes B there, it is one of the default kind here.
            site: spec or plan_module.BSpec(site, grouped)
            for site, spec in ((plan_module.Site.GATE_UP, plan.gate_up_b), (plan_module.Site.DOWN, plan.down_b))
        }
        block = launch.routing_block_size
        sorted_ids, codes, padded = _buckets(operands.index, operands.slots, slots, experts, block)
        common = {
            "block_size": block,
            "token_slots": operands.slots,
            "group_ids": operands.index,
            "groups_per_slot": experts,
            "max_loras": slots,
        }
        kinds = self._view.RouteViewKind
        raw = self._view.RouteView(view=kinds.RAW, **common)
        aligned = self._view.RouteView(
            view=kinds.ALIGNED,
            maybe_sorted_pair_ids=sorted_ids,
            maybe_block_bucket_ids=codes,
            maybe_num_pairs_post_padded=padded,
            **common,
        )
        routes = SimpleNamespace(raw=lambda _: raw, aligned=lambda _: aligned)
        workspace = self._workspace()
        workspace._caller = lambda _: 0
        # SGLang's runner, with all that its two methods read.
        runner: Any = object.__new__(runner_module.MoeLoraRunner)
        runner.workspace, runner.lora_delta_dtype, runner.gate_up_slices = workspace, operands.hidden.dtype, 2
        outputs = [
            torch.zeros(rows * count, width, dtype=operands.hidden.dtype, device=device)
            for width in (2 * inner, features)
        ]
        # Gate and up have an A each there.
        gate_up = [(torch.cat([a, a], 2), b) for a, b in operands.gate_up]
        flat = [[(a.flatten(0, 1), b.flatten(0, 1)) for a, b in side] for side in (gate_up, operands.down)]

        def call(layer: int) -> tuple[Tensor, Tensor]:
            for side, spec_a, inputs in ((0, plan.gate_up_a, operands.hidden), (1, plan.down_a, operands.activated)):
                a, b = flat[side][layer % len(operands.gate_up)]
                bridge = runner._run_a(launch, spec_a, inputs, a, routes, f"a{side}")
                runner._run_b(launch, specs[spec_a.site], bridge, b, outputs[side], routes)
            return outputs[0], outputs[1]

        return _warm(call, len(operands.gate_up), outputs)


def find(folder: Path) -> dict[str, ExpertsPeer]:
    """The peers whose sources are in a folder, by name.

    Raises:
        BenchError: there are none, or they are not laid out as those that this was written for; or Triton is missing.
    """
    folder = folder.resolve()
    there = [name for name in ("vllm", "sglang") if (folder / name).is_dir()]
    if not there:
        remedy = "Unpack a wheel of vLLM or SGLang there: python -m zipfile -e WHEEL DIR."
        raise BenchError("bench moe: --peers", "a folder that holds vllm or sglang", str(folder), remedy)
    peers: dict[str, ExpertsPeer] = {}
    if "vllm" in there:
        peers |= {f"vLLM, blocks of {block}": VllmExperts(folder, block) for block in (16, 64)}
    if "sglang" in there:
        peers["SGLang"] = SglangExperts(folder)
    return peers


def _warm(call: ExpertsCall, layers: int, outputs: list[Tensor]) -> ExpertsCall:
    """Have kernels compiled and scratch allocated; then the outputs are zeros again."""
    for layer in range(layers):
        call(layer)
        for output in outputs:
            output.zero_()
    return call


def _by_group(index: Tensor, slots: Tensor, count: int, experts: int) -> list[list[int]]:
    """The pairs of each slot and expert, `slot * experts + expert`."""
    groups: list[list[int]] = [[] for _ in range(count * experts)]
    chosen = index.shape[1]
    for token, (slot, its_experts) in enumerate(zip(slots.tolist(), index.tolist(), strict=True)):
        for place, expert in enumerate(its_experts):
            if 0 <= slot < count:
                groups[slot * experts + expert].append(token * chosen + place)
    return groups


def _blocks(index: Tensor, slots: Tensor, count: int, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """What vLLM's `moe_lora_align_block_size` makes: for each slot its pairs by expert, in blocks of one expert.

    Returns:
        Pairs `[K, L]`, filled up with T k; the expert of each block, `[K, L / block]`, -1 where there is none; and how
        many pairs each slot has with what fills blocks up, `[K]`.
    """
    pairs = index.numel()
    longest = pairs + experts * (block - 1)
    if pairs < experts:
        longest = pairs * block
    length = -(-longest // block) * block
    groups = _by_group(index, slots, count, experts)
    ids = torch.full((count, length), pairs, dtype=torch.int32)
    codes = torch.full((count, length // block), -1, dtype=torch.int32)
    padded = torch.zeros(count, dtype=torch.int32)
    for slot in range(count):
        at = 0
        for expert in range(experts):
            mine = groups[slot * experts + expert]
            blocks = -(-len(mine) // block)
            ids[slot, at : at + len(mine)] = torch.tensor(mine, dtype=torch.int32)
            codes[slot, at // block : at // block + blocks] = expert
            at += blocks * block
        padded[slot] = at
    return ids.to(index.device), codes.to(index.device), padded.to(index.device)


def _buckets(index: Tensor, slots: Tensor, count: int, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """What SGLang's `build_route` makes: pairs by slot and expert, in blocks of one of both; those without one last.

    Returns:
        Pairs `[L]`, filled up with T k; slot and expert of each block as one number, -1 for pairs without an adapter;
        and how many pairs that are, `[1]`.
    """
    pairs = index.numel()
    groups = _by_group(index, slots, count, experts)
    routed = {pair for group in groups for pair in group}
    groups.append([pair for pair in range(pairs) if pair not in routed])
    ids: list[int] = []
    codes: list[int] = []
    for code, group in enumerate(groups):
        blocks = -(-len(group) // block)
        ids += group + [pairs] * (blocks * block - len(group))
        codes += [code if code < count * experts else -1] * blocks
    return tuple(torch.tensor(values, dtype=torch.int32, device=index.device) for values in (ids, codes, [len(ids)]))  # type: ignore[return-value]
