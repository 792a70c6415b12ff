"""Which calls of a graph can influence what it returns."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Graph, Node

from xpu_lora_compile.passes.editing import value_of
from xpu_lora_compile.passes.memory import input_storages, is_pure, read_by, storages_of, written_by
from xpu_lora_compile.torch_internals import is_known

# Methods and ops that replace all of what they write to.
_REPLACING = {"copy_", "zero_", "fill_"}


def live_nodes(graph: Graph) -> set[Node]:
    """The nodes from which data flows to the graph's outputs, or into memory that others see: its inputs.

    By whole tensors in memory: a write counts as read if anything reads any of that memory before all of it is
    overwritten. A call that is not known to be pure is live.
    """
    live: set[Node] = set()
    # The memory whose content, as it is after the node at hand, is used later.
    used = input_storages(graph)
    for node in reversed(graph.nodes):
        written = written_by(node)
        acts = node.op in ("output", "placeholder") or (
            node.op.startswith("call") and not is_pure(node) and not written
        )
        if not (acts or node in live or written & used):
            continue
        live.add(node)
        live.update(node.all_input_nodes)
        replaced = _replaced_by(node)
        used -= replaced
        used |= read_by(node) - replaced
    return live


def _replaced_by(node: Node) -> set[int]:
    """The memory all of whose content a node makes new, without a look at what it was."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "").split(".")[0]
    target = node.args[0] if node.args else None
    if name not in _REPLACING or not isinstance(target, Node) or not isinstance(value_of(target), Tensor):
        return set()
    value = value_of(target)
    is_whole = is_known(value.numel() * value.element_size() == value.untyped_storage().nbytes())
    sources = set().union(*(storages_of(operand) for operand in node.all_input_nodes if operand is not target))
    return storages_of(target) - sources if is_whole else set()
