"""Random programs over a few tensors that share memory: what a pass may take for a chain of calls, and often is none.

All values are small whole numbers in float64, so that results are exact and every wrong element shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from support.cases import DEVICE
from torch import Tensor

import xpu_lora_compile as xlc

# T rows, D = H columns, R ranks, K slots.
T, D, R, K = 3, 4, 2, 2

# Each statement, with `{m}` for a matrix [T, D], `{h}` for [T, R], `{s}` for a stack [2, T, R], `{i}` for indices,
# `{a}` and `{b}` for weights, `{new}` for a name of the kind that stands before it, and `{=...}` for a choice.
STATEMENTS = (
    "m{new} = {m} @ w",
    "m{new} = {m} * 2",
    "m{new} = {m} + {m}",
    "m{new} = torch.zeros_like(x)",
    "m{new} = {m}.view(2, 6).view(3, 4)",
    "m{new} = {m}.reshape(3, 4)",
    "m{new} = {m}.view_as(x)",
    "h{new} = x.new_zeros(3, 2)",
    "h{new} = torch.zeros(3, 2, dtype=x.dtype, device=x.device)",
    "h{new} = {m}[:, {=0,1,2}:][:, :2]",
    "h{new} = {h} * 2",
    "s{new} = x.new_zeros(2, 3, 2)",
    "h{new} = {s}[{=0,1}]",
    "i{new} = {i} + 1",
    "i{new} = {i}.view(3, 1).expand(3, 1).reshape(-1)",
    "{m}.add_(1)",
    "{m}.copy_({m})",
    "{m}[:, {=0,1}:3].mul_(2)",
    "{h}.add_(1)",
    "{s}.zero_()",
    "{h}.copy_({h})",
    "{i}.copy_({i})",
    "{i}.add_(1)",
    "a1.neg_()",
    "xlc.bgmv_shrink({h}, {m}, {a}, {i}, {=1.0,2.0})",
    "xlc.bgmv_shrink({s}[{=0,1}], {m}, {a}, {i})",
    "xlc.bgmv_shrink({m}, {m}, {a}, {i})",
    "xlc.bgmv_expand({m}, {h}, {b}, {i}, {=True,True,False})",
    "xlc.bgmv_expand({h}, {h}, {b}, {i})",
    "xlc.bgmv_expand({m}, {s}[{=0,1}], {b}, {i})",
    "xlc.bgmv_expand_slice({m}, {h}, b2, {i}, {=0,1,2}, 2, {=True,True,False})",
    "xlc.bgmv_expand_slice({m}, {s}[{=0,1}], b2, {i}, {=0,1,2}, 2)",
    "m{new} = xlc.lora_linear({m}, {m}, [{a}], [b2], {i}, [{=0,1,2}], {=1.0,2.0})",
    "m{new} = xlc.lora_linear({m}, {m}, [{a}, {a}], [b2, b4], {i}, [{=0,1,2}, 0])",
    # Whole chains, as people write them; what stands before and after them is random.
    "h{new} = x.new_zeros(3, 2); xlc.bgmv_shrink(h{new}, {m}, {a}, i0); xlc.bgmv_expand({m}, h{new}, {b}, i0)",
    "h{new} = x.new_zeros(3, 2); xlc.bgmv_shrink(h{new}, x, a1, i0); xlc.bgmv_expand_slice(y, h{new}, b2, i0, 2, 2)",
    (
        "s{new} = x.new_zeros(2, 3, 2); xlc.bgmv_shrink(s{new}[0], x, a1, i0); xlc.bgmv_shrink(s{new}[1], x, a2, i0); "
        "xlc.bgmv_expand_slice({m}, s{new}[0], b2, i0, {=0,2}, 2); xlc.bgmv_expand_slice({m}, s{new}[1], b2, i0, 2, 2)"
    ),
    (
        "h{new} = x.new_zeros(3, 2); s{new} = x.new_zeros(2, 3, 2); xlc.bgmv_shrink(h{new}, {m}, {a}, i0); "
        "s{new}[0].copy_(h{new}); xlc.bgmv_expand({m}, s{new}[0], {b}, i0)"
    ),
)

WEIGHTS = {"a": ("a1", "a2"), "b": ("b2", "b4", "b6")}


@dataclass(frozen=True)
class Program:
    """A function of tensors as source text, with the tensors that it takes."""

    source: str

    def __str__(self) -> str:
        return self.source

    def __repr__(self) -> str:
        return "\n" + self.source

    def function(self) -> Callable[..., Any]:
        """The function, ready to be called or traced."""
        names: dict[str, Any] = {"torch": torch, "xlc": xlc}
        exec(compile(self.source, "<program>", "exec"), names)  # noqa: S102
        return names["program"]

    @staticmethod
    def inputs() -> list[Tensor]:
        """`x`, `y`, `w`, A twice, B in three widths, and two kinds of indices: new ones each time."""
        generator = torch.Generator().manual_seed(0)

        def whole(*shape: int) -> Tensor:
            return torch.randint(-2, 3, shape, generator=generator).double().to(DEVICE)

        shapes = ((T, D), (T, D), (D, D), (K, R, D), (K, R, D), (K, 2, R), (K, 4, R), (K, 6, R))
        indices = [torch.tensor(rows, device=DEVICE) for rows in ([1, -1, 0], [0, 2, 1])]
        return [*(whole(*shape) for shape in shapes), *indices]


@st.composite
def programs(draw: st.DrawFn, most: int = 14) -> Program:
    """Any sequence of statements, and a result of some of its tensors."""
    live = {"m": ["x", "y"], "h": ["h0"], "s": ["s0"], "i": ["i0", "i1"]}
    lines = ["h0 = x.new_zeros(3, 2)", "s0 = x.new_zeros(2, 3, 2)", "m0 = x @ w"]
    live["m"].append("m0")
    for number in range(1, draw(st.integers(1, most)) + 1):
        text, made = draw(st.sampled_from(STATEMENTS)), []
        while "{" in text:
            before, _, rest = text.partition("{")
            hole, _, after = rest.partition("}")
            if hole == "new":
                if (before[-1], number) not in made:
                    made.append((before[-1], number))
                filled = str(number)
            elif hole.startswith("="):
                filled = draw(st.sampled_from(hole[1:].split(",")))
            else:
                filled = draw(st.sampled_from(WEIGHTS[hole] if hole in WEIGHTS else live[hole][-4:]))
            text = before + filled + after
        for kind, count in made:
            live[kind].append(f"{kind}{count}")
        lines.append(text)
    names = [name for kind in live.values() for name in kind]
    result = draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
    body = "\n".join(f"    {line}" for line in [*lines, f"return [{', '.join(result)}]"])
    return Program(f"def program(x, y, w, a1, a2, b2, b4, b6, i0, i1):\n{body}\n")
