"""What the passes decided: one record a call, kept on the node and given to whoever asked for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from torch.fx import Node

Relation = Literal["equal", "narrower", "wider", "slice", "undecided"]

# The key of a node's meta that holds the decisions on all the calls that it stands for, a list.
_DECISIONS = "xpu_lora"


@dataclass
class Decision:
    """What the passes decided about one call that adds LoRA to an output: a site.

    Attributes:
        op: the public op that was called.
        source: `file:line` of the call.
        module: path of the module that made the call, as Dynamo names it; empty outside modules.
        width: W, rows of an adapter's B; a symbol's name where it is symbolic. Of a `lora_linear` all slices' together.
        columns: H, columns of the output, likewise.
        slices: how many pairs of A and B the call has.
        relation: of W to H; `slice` where the call itself says which columns, `undecided` keeps the op that decides
            when it runs.
        guard: the condition under which the compiled graph is kept; None where the sizes are constants.
        notes: what each pass did with the call, or why it left it alone, in their order.
    """

    op: str
    source: str
    module: str
    width: str
    columns: str
    slices: int = 1
    relation: Relation = "slice"
    guard: str | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sign = {"equal": "==", "narrower": "<", "wider": ">", "slice": "in", "undecided": "?"}[self.relation]
        guard = f", guarded by {self.guard}" if self.guard else ""
        return f"{self.module or '(no module)'}: {self.width} {sign} {self.columns}{guard} ({self.source})"

    @property
    def place(self) -> str:
        """The module, or the source line outside of modules."""
        return self.module or self.source


def decisions_on(node: Node) -> list[Decision]:
    """The decisions on the calls that a node stands for."""
    found: list[Decision] = node.meta.get(_DECISIONS, [])
    return found


def set_decisions(node: Node, decisions: list[Decision]) -> None:
    """Have the node stand for the calls that these decisions are about."""
    node.meta[_DECISIONS] = decisions


def note(node: Node, text: str) -> None:
    """Add a line to each decision on a node, unless it is there."""
    for decision in decisions_on(node):
        if text not in decision.notes:
            decision.notes.append(text)


_RECORDS: ContextVar[tuple[list[Decision], ...]] = ContextVar("records", default=())


@contextmanager
def record_decisions() -> Iterator[list[Decision]]:
    """Collect what the passes decide while the block runs, in the order of the graph.

    A graph that Dynamo captures twice before it is content, as some with dynamic sizes, yields its decisions twice.
    With `inductor_options`, a graph that Inductor answers from its cache runs no passes and yields none.

    Example:
        >>> import torch
        >>> import xpu_lora_compile as xlc
        >>> b, index = torch.ones(1, 3, 1), torch.tensor([0])
        >>> @torch.compile(backend="xpu_lora", options={"xpu_lora.execute": "eager"})
        ... def logits(output, hidden):
        ...     xlc.bgmv_expand(output, hidden, b, index)
        ...     return output
        >>> with xlc.record_decisions() as decisions:
        ...     _ = logits(torch.zeros(1, 4), torch.ones(1, 1))
        >>> [(d.relation, d.width, d.columns) for d in decisions]
        [('narrower', '3', '4')]
    """
    records: list[Decision] = []
    token = _RECORDS.set((*_RECORDS.get(), records))
    try:
        yield records
    finally:
        _RECORDS.reset(token)


def record(decision: Decision, *lists: list[Decision]) -> None:
    """Add a decision, once, to these lists and to those of the blocks of `record_decisions` that are open."""
    for records in (*lists, *_RECORDS.get()):
        if not any(known is decision for known in records):
            records.append(decision)
