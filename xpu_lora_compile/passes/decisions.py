"""What the passes decided: one record a call, kept on the node and given to whoever asked for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

Relation = Literal["equal", "narrower", "wider", "undecided"]

# The key of a node's meta that holds its Decision.
DECISION = "xpu_lora"


@dataclass(frozen=True)
class Decision:
    """How one `bgmv_expand` was settled.

    Attributes:
        relation: of the weights' width to the output's; `undecided` keeps the op that decides at run time.
        width: W, rows of an adapter's B; a symbol's name where it is symbolic.
        columns: H, columns of the output, likewise.
        guard: the condition under which the compiled graph is kept; None where the sizes are constants.
        source: `file:line` of the call.
        module: path of the module that made the call, as Dynamo names it; empty outside modules.
    """

    relation: Relation
    width: str
    columns: str
    guard: str | None
    source: str
    module: str

    def __str__(self) -> str:
        sign = {"equal": "==", "narrower": "<", "wider": ">", "undecided": "?"}[self.relation]
        guard = f", guarded by {self.guard}" if self.guard else ""
        return f"{self.module or '(no module)'}: {self.width} {sign} {self.columns}{guard} ({self.source})"


_RECORDS: ContextVar[tuple[list[Decision], ...]] = ContextVar("records", default=())


@contextmanager
def record_decisions() -> Iterator[list[Decision]]:
    """Collect what the passes decide while the block runs, in the order of the graph.

    With `inductor_options`, a graph that Inductor answers from its cache runs no passes and yields no decisions.

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


def record(decision: Decision) -> None:
    """Give a decision to every block of `record_decisions` that is open."""
    for records in _RECORDS.get():
        records.append(decision)
