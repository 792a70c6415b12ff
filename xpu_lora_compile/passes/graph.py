"""`Rewrite`, one run of the passes over a program, and `Memory`, what a pass knows of one graph while it changes it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.fx import Graph, Node

from xpu_lora_compile.passes.decisions import Decision, note, record
from xpu_lora_compile.passes.editing import value_of
from xpu_lora_compile.passes.memory import (
    input_storages,
    is_barrier,
    knows_its_views,
    storage_of,
    storages_of,
    written_by,
)

# Who launches the Triton kernels: "inductor", which sees them, or "op", an op that Inductor does not look into; "auto"
# leaves it to `lower`.
Launch = Literal["auto", "inductor", "op"]


@dataclass
class Rewrite:
    """One run of the passes over a program.

    Attributes:
        fuel: how many more rewrites the passes may do; None is without limit.
        keeps_bases: whether base products stay as they are, for a reader who compares what LoRA is added to.
        launch: who launches the Triton kernels, see `Launch`.
        without_python: whether the program is to run in a process without Python, where an op that is written in it
            would be missing.
        decisions: what the passes decide, in the order of the graph.
    """

    fuel: int | None = None
    keeps_bases: bool = False
    launch: Launch = "auto"
    without_python: bool = False
    decisions: list[Decision] = field(default_factory=list)

    def takes_fuel(self, node: Node) -> bool:
        """Use up one rewrite, and return whether there was one left; every pass asks before it replaces a node."""
        if self.fuel is None:
            return True
        if self.fuel == 0:
            note(node, "left as it is: XPU_LORA_FUEL has run out")
            return False
        self.fuel -= 1
        return True

    def record(self, decision: Decision) -> None:
        """Keep a decision, and give it to the blocks of `record_decisions` that are open."""
        record(decision, self.decisions)


class Memory:
    """The order of a graph's nodes, and which of them share, read and write which memory.

    A pass that adds a node tells it (`add`). Nodes that are erased stay in the order, and do no harm.
    """

    def __init__(self, graph: Graph) -> None:
        self.knows_views = knows_its_views(graph)
        # What others see, too: the memory of inputs and constants.
        self.inputs = input_storages(graph)
        self.has_barriers = any(map(is_barrier, graph.nodes))
        self.has_gradients = any(
            isinstance(value_of(node), Tensor) and value_of(node).requires_grad
            for node in graph.nodes
            if node.op.startswith("call")
        )
        self._order: dict[Node, float] = {node: place for place, node in enumerate(graph.nodes)}
        self._aliases: dict[int, list[Node]] = {}
        self._writes: dict[int, list[float]] = {}
        for node in graph.nodes:
            self._add_aliases(node)
            for storage in written_by(node):
                self._writes.setdefault(storage, []).append(self._order[node])

    def add(self, node: Node, before: Node) -> Node:
        """Take note of a new node in front of another, and return it."""
        self._order[node] = self._order[before] - 0.5
        self._add_aliases(node)
        return node

    def unite(self, base: Node, result: Tensor) -> None:
        """Take note that the memory of `base` is now that of `result`, too."""
        mine, its = storage_of(value_of(base)), storage_of(result)
        if mine != its:
            self._aliases[mine] = self._aliases[its] = [*self._aliases[mine], *self._aliases.get(its, [])]

    def is_before(self, node: Node, other: Node) -> bool:
        """Return whether a node comes before another one."""
        return self._order[node] < self._order[other]

    def users_after(self, last: Node, storage: int) -> dict[Node, list[Node]]:
        """Return the aliases of that memory that exist at `last`, each with its users from there on."""
        place = self._order[last]
        later = {
            alias: [user for user in alias.users if self._order.get(user, 0) > place]
            for alias in self._aliases[storage]
            if self._order[alias] < place
        }
        return {alias: users for alias, users in later.items() if users}

    def is_unchanged(self, tensor: Node, since: Node, until: Node) -> bool:
        """Return whether for certain nothing writes to a tensor between two nodes."""
        start, end = self._order[since], self._order[until]
        writes = [place for storage in storages_of(tensor) for place in self._writes.get(storage, [])]
        return self.knows_views and not any(start < place < end for place in writes)

    def is_seen_after(self, base: Node, call: Node) -> bool:
        """Return whether the content that the base has now may be seen after the call."""
        value = value_of(base)
        # What autograd has saved is seen by a backward pass that is not in the graph yet.
        if self.has_gradients or not self.knows_views:
            return True
        if storage_of(value) in self.inputs or not value.is_contiguous():
            return True
        results = {call, *(user for user in call.users if user.target is operator.getitem)}
        return any(alias not in results for alias in self.users_after(call, storage_of(value)))

    def _add_aliases(self, node: Node) -> None:
        for storage in storages_of(node):
            self._aliases.setdefault(storage, []).append(node)
