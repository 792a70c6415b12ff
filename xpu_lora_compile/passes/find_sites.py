"""Every call that adds LoRA to an output -> the same call, with a decision on it for the other passes to fill."""

from __future__ import annotations

from torch.fx import Graph, Node

from xpu_lora_compile.ops import BGMV_EXPAND, BGMV_EXPAND_SLICE, LORA_LINEAR
from xpu_lora_compile.passes.decisions import Decision, decisions_on, record, set_decisions
from xpu_lora_compile.passes.editing import arguments_of, calls_to, origin_of, value_of
from xpu_lora_compile.torch_internals import is_known

_ADDING = (BGMV_EXPAND, BGMV_EXPAND_SLICE, LORA_LINEAR)


def find_sites(graph: Graph) -> None:
    """Put a decision on each call of `bgmv_expand`, `bgmv_expand_slice` and `lora_linear`, and record it.

    Before and after: the same graph.

    Left alone: a call that has its decision from an earlier run.

    Runs on: graphs of Dynamo and of `torch.export`, before functionalization.
    """
    sites = {call: op for op in _ADDING for call in calls_to(graph, op)}
    for node in graph.nodes:
        if node in sites:
            decision_of(node, sites[node])
            record(decision_of(node, sites[node]))


def decision_of(call: Node, op: object) -> Decision:
    """The decision on a call, made here if it has none."""
    if not decisions_on(call):
        set_decisions(call, [_undecided(call, op)])
    return decisions_on(call)[0]


def _undecided(call: Node, op: object) -> Decision:
    overload = next(one for one in _ADDING if one is op)
    arguments = arguments_of(call, overload)
    weights = arguments[3] if op is LORA_LINEAR else [arguments[2]]
    width = sum(value_of(b).shape[-2] for b in weights)
    columns = value_of(arguments[0]).shape[1]
    source, module = origin_of(call)
    name = overload._schema.name.split("::")[1]
    decision = Decision(name, source, module, str(width), str(columns), len(weights))
    if op is LORA_LINEAR and len(weights) == 1 and is_known(width == columns):
        decision.relation = "equal"
    return decision
