"""Every call that adds LoRA to an output -> the same call, with a decision on it for the other passes to fill."""

from __future__ import annotations

from torch.fx import Graph

from xpu_lora_compile.ops import BGMV_EXPAND, BGMV_EXPAND_SLICE, LORA_LINEAR, TRAINED_LINEAR
from xpu_lora_compile.passes.calls import LoraNode, lora_calls
from xpu_lora_compile.passes.decisions import Decision, decisions_on, set_decisions
from xpu_lora_compile.passes.editing import origin_of, value_of
from xpu_lora_compile.passes.graph import Rewrite
from xpu_lora_compile.torch_internals import is_known


def find_sites(graph: Graph, rewrite: Rewrite) -> None:
    """Put a decision on each call of `bgmv_expand`, `bgmv_expand_slice`, `lora_linear` and `trained_linear`.

    Before and after: the same graph.

    Left alone: a call that has its decision from an earlier run.

    Runs on: graphs of Dynamo and of `torch.export`, before functionalization.
    """
    for call in lora_calls(graph, BGMV_EXPAND, BGMV_EXPAND_SLICE, LORA_LINEAR, TRAINED_LINEAR):
        rewrite.record(decision_of(call))


def decision_of(call: LoraNode) -> Decision:
    """Return the decision on a call, made here if it has none."""
    if not decisions_on(call.node):
        set_decisions(call.node, [_undecided(call)])
    return decisions_on(call.node)[0]


def _undecided(call: LoraNode) -> Decision:
    width = sum(value_of(b).shape[-2] for b in call.lora_b)
    columns = value_of(call.outputs[0]).shape[1]
    source, module = origin_of(call.node)
    decision = Decision(call.name, source, module, str(width), str(columns), len(call.lora_b))
    if call.op in (LORA_LINEAR, TRAINED_LINEAR) and len(call.lora_b) == 1 and is_known(width == columns):
        decision.relation = "equal"
    return decision
