"""Which kernel runs a call: one pure function, asked when an op runs and by whoever explains a graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A kernel, why it was taken, and why each of the others was not."""

    kernel: str
    because: str
    others: dict[str, str]


def choose(device: str, rows: int, slots: int) -> Choice:
    """The kernel for T rows and K slots on a type of device ("cpu", "cuda", "xpu")."""
    few = rows <= slots
    sizes = f"T = {rows} {'<=' if few else '>'} K = {slots}"
    gather = f"{sizes}: copying each row's weights costs at most one read of all slots"
    grouped = f"{sizes}, and the sizes of the groups can be read on a CPU without waiting"
    dense = f"{sizes}, and nothing on the host may depend on the indices"
    if few:
        return Choice("gather", gather, {"grouped": f"{sizes}: few rows share an adapter", "dense": sizes})
    copies = f"{sizes}: it would copy weights that grow with T"
    if device == "cpu":
        return Choice("grouped", grouped, {"gather": copies, "dense": "it computes every row K times"})
    return Choice("dense", dense, {"gather": copies, "grouped": f"it would read the groups' sizes back from {device}"})
