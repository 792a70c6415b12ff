"""Calls of the four public ops: named cases that cover every line of the contract, and the tensors of each.

Whatever an op must not read is NaN: weights of slots that no row uses, the rank buffer before a shrink, memory around a
strided input. Whatever it must not write is random, so that the whole buffer around an output can be compared.
`XPU_LORA_TEST_DEVICE` chooses the device of all tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from xpu_lora_compile import ops
from xpu_lora_compile.inspect.operands import RandomOperands, every_kind_of_index, poison_unused_slots
from xpu_lora_compile.kernels import KERNELS, kernel_named
from xpu_lora_compile.kernels.call import LoraCall
from xpu_lora_compile.kernels.routing import RowRouting

DEVICE = torch.device(os.environ.get("XPU_LORA_TEST_DEVICE", "cpu"))

SHRINK, EXPAND, EXPAND_SLICE, LORA_LINEAR = OPS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice", "lora_linear")
MUTATING = OPS[:3]

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
I64, I32 = torch.int64, torch.int32

LAYOUTS = ("contiguous", "transposed", "strided", "expanded")
WINDOWS = ("rows", "columns", "transposed")

_SHORT = {F64: "fp64", F32: "fp32", BF16: "bf16", F16: "fp16", I64: "i64", I32: "i32"}


@dataclass(frozen=True)
class Case:
    """One call, in the letters of the contract.

    Attributes:
        T: rows.
        D: input features.
        R: rank.
        K: adapter slots.
        W: rows of B.
        H: columns of the output.
        inputs: dtype of what is multiplied.
        weights: dtype of A and B.
        output: dtype of what is written.
        second: dtype of B in `lora_linear`; as A where it is None.
        index: dtype of the indices.
        indices: the adapter of each row; where None, a mix of slots and of every kind of index that is none.
        layout: how the weights lie in memory.
        window: how the output lies in the buffer around it.
        with_slice_dim: whether weights have vLLM's extra 1 in second place.
        add: whether expand adds or replaces.
        scaling: factor of shrink and of `lora_linear`.
        slices: slices of `lora_linear`; the second overlaps the first, is narrower, and has another rank.
    """

    T: int = 5
    D: int = 7
    R: int = 3
    K: int = 4
    W: int = 8
    H: int = 8
    inputs: torch.dtype = F32
    weights: torch.dtype = F32
    output: torch.dtype = F32
    second: torch.dtype | None = None
    index: torch.dtype = I64
    indices: tuple[int, ...] | None = None
    layout: str = "contiguous"
    window: str = "columns"
    with_slice_dim: bool = False
    add: bool = True
    scaling: float = 0.75
    slices: int = 1

    def __str__(self) -> str:
        """The shape, then the dtypes, then whatever differs from the default."""
        dtypes = [_SHORT[dtype] for dtype in (self.inputs, self.weights, self.output)]
        shape = f"T{self.T}-D{self.D}-R{self.R}-K{self.K}-W{self.W}-H{self.H}"
        told = {"T", "D", "R", "K", "W", "H", "inputs", "weights", "output"}
        rest = [_spelled(f.name, getattr(self, f.name), f.default) for f in fields(self) if f.name not in told]
        return "-".join([shape, dtypes[0] if len(set(dtypes)) == 1 else ".".join(dtypes), *filter(None, rest)])

    @property
    def routing(self) -> tuple[int, ...]:
        """The adapter of each row."""
        return every_kind_of_index(self.T, self.K, self.index) if self.indices is None else self.indices

    @property
    def has_adapter(self) -> list[bool]:
        """Whether each row has an adapter."""
        return [0 <= i < self.K for i in self.routing]

    @property
    def offset(self) -> int:
        """The first column of the slice: in the middle of what the slice leaves over."""
        return (self.H - self.W + 1) // 2


def _spelled(name: str, value: Any, default: Any) -> str:
    if value == default:
        return ""
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    if name == "indices":
        return f"indices[{','.join(map(str, value))}]"
    return f"{name}-{_SHORT.get(value, value)}" if not isinstance(value, str) else f"{value}-{name}"


CASES = (
    # The three relations of W and H, in both forms of the portable kernel: T <= K and T > K.
    Case(),
    Case(H=10),
    Case(W=11, H=6),
    Case(T=3),
    Case(T=3, H=10),
    Case(T=3, W=11, H=6),
    Case(T=4, K=4, H=9),
    # The edges of T, and of every other letter.
    Case(T=0),
    Case(T=0, K=1, H=9),
    Case(T=1),
    Case(T=1, K=1),
    Case(T=2, K=1, H=9),
    Case(T=6, D=1, R=1, K=2, W=1, H=1),
    Case(T=6, D=1, R=1, K=2, W=1, H=4),
    Case(T=9, D=129, R=17, K=3, W=65, H=67),
    Case(T=2, D=300, R=33, K=3, W=130, H=131),
    # Rows without an adapter: none of them, all of them, each kind alone.
    Case(indices=(0, 1, 2, 3, 0)),
    Case(indices=(3, 3, 3, 3, 3)),
    Case(indices=(-1,) * 5),
    Case(T=3, indices=(-1, -1, -1)),
    Case(T=1, indices=(-1,)),
    Case(T=1, indices=(4,)),
    Case(T=1, indices=(5,), index=I32),
    Case(T=2, indices=(2**63 - 1, -(2**63))),
    Case(T=2, indices=(2**31 - 1, -(2**31)), index=I32),
    # A 64-bit index whose lower half is a slot.
    Case(T=2, indices=(2**32, -(2**32) + 1)),
    Case(T=9, index=I32),
    Case(T=9, H=10),
    # One dtype, and mixed ones with each dtype in each place.
    Case(H=10, inputs=BF16, weights=BF16, output=BF16),
    Case(T=3, D=129, R=17, W=33, H=35, inputs=BF16, weights=BF16, output=BF16),
    Case(T=9, D=129, R=17, W=33, H=35, inputs=BF16, weights=BF16, output=BF16),
    Case(H=10, inputs=F16, weights=F16, output=F16),
    Case(T=9, D=129, R=17, W=33, H=35, inputs=F16, weights=F16, output=F16),
    Case(H=10, inputs=F64, weights=F64, output=F64),
    Case(H=10, inputs=BF16),
    Case(H=10, weights=BF16),
    Case(H=10, output=BF16),
    Case(H=10, inputs=BF16, weights=F16, output=F32, second=F32),
    Case(H=10, inputs=F16, weights=F32, output=BF16, second=BF16),
    Case(T=3, H=10, inputs=F32, weights=BF16, output=F16, second=F16),
    Case(T=3, W=11, H=6, inputs=F32, weights=BF16, output=F16),
    # Results among the subnormal numbers of fp16.
    Case(H=10, output=F16, scaling=2.0**-20, add=False),
    # Any strides.
    Case(H=10, layout="transposed", window="rows"),
    Case(T=3, H=10, layout="transposed", window="transposed"),
    Case(H=10, layout="strided", window="transposed"),
    Case(T=3, W=11, H=6, layout="strided", inputs=BF16, weights=BF16, output=BF16),
    Case(H=10, layout="expanded"),
    Case(T=3, H=10, layout="expanded", window="rows"),
    # vLLM's extra dimension.
    Case(with_slice_dim=True),
    Case(T=3, H=10, with_slice_dim=True),
    Case(T=3, K=1, H=10, with_slice_dim=True),
    Case(W=11, H=6, with_slice_dim=True, layout="strided"),
    Case(T=3, H=10, with_slice_dim=True, layout="transposed"),
    Case(H=10, with_slice_dim=True, layout="expanded"),
    # Replace, and scale.
    Case(add=False),
    Case(H=10, add=False),
    Case(W=11, H=6, add=False),
    Case(T=3, H=10, add=False, inputs=BF16, weights=BF16, output=BF16),
    Case(scaling=1.0),
    Case(scaling=-2.5, inputs=BF16, weights=BF16, output=BF16),
    Case(scaling=0.0),
    # Several slices, which overlap.
    Case(H=10, slices=2),
    Case(T=3, H=10, slices=2, with_slice_dim=True, layout="transposed"),
    Case(T=9, D=129, R=17, W=33, H=35, slices=2, inputs=BF16, weights=BF16, output=BF16),
)


# What `lower` makes of a `lora_linear` on the device of the tests, and how often it computes a routing for all of them.
ADD_HERE, ROUTINGS_HERE = ("native_add_lora", 0) if DEVICE.type == "cpu" else ("add_lora", 1)
# The kernels that can run there and round once; on a CPU Triton's interpreter runs those that are its, if it is there.
KERNELS_HERE = [kernel.name for kernel in KERNELS if not (kernel.by_force_alone or kernel.problem(DEVICE.type))]


def float64_call() -> LoraCall:
    """A whole call of one row whose operands are all float64."""
    matrix = torch.ones(1, 1, dtype=F64, device=DEVICE)
    routing = RowRouting(torch.zeros(1, dtype=I64, device=DEVICE), 1)
    return LoraCall([matrix.clone()], matrix, [matrix[None]], [matrix[None]], routing)


# Those that compute in float32, and refuse float64.
FLOAT32_KERNELS = [name for name in KERNELS_HERE if kernel_named(name).refusal(float64_call())]


def cases_of(op: str, cases: Sequence[Case] = CASES) -> tuple[Case, ...]:
    """The cases that the op can be called with, each different one once: a slice has to lie inside the output."""
    if op in (EXPAND_SLICE, LORA_LINEAR):
        cases = [case for case in cases if case.W <= case.H]
    return tuple(cases if op == LORA_LINEAR else [case for case in cases if case.slices == 1])


@dataclass
class Call:
    """One call of an op that is ready to run.

    Attributes:
        op: the op's name.
        args: its arguments by name, in order.
        buffer: the memory around the output, `args`' first.
        written: `[T, H]`, true where the op may change the output, and where values are its own.
        window: the part of the buffer, or of a mask of its shape, that the output is.
    """

    op: str
    args: dict[str, Any]
    buffer: Tensor
    written: Tensor
    window: Callable[[Tensor], Tensor]

    @property
    def output(self) -> Tensor:
        """What the op changes, or adds to."""
        return next(iter(self.args.values()))

    def run(self) -> Tensor:
        """Call the op by its Python name; the output, or what the functional op returns."""
        result = getattr(ops, self.op)(**self.args)
        return self.output if result is None else result

    def outside(self) -> Tensor:
        """True for each element of the buffer that the op must leave alone."""
        mask = torch.ones(self.buffer.shape, dtype=torch.bool)
        self.window(mask)[self.written] = self.op == LORA_LINEAR
        return mask.to(self.buffer.device)

    def weights(self) -> list[Tensor]:
        """All weights of the call."""
        return [w for name, arg in self.args.items() if "lora_" in name for w in _as_list(arg) if w.is_floating_point()]


def build(op: str, case: Case, device: torch.device = DEVICE, seed: int = 0) -> Call:
    """The tensors of one call: seeded, with NaN wherever the op must not read."""
    random = _Random(case, device, seed)
    width = max(case.R, case.H) if op == SHRINK else case.H
    buffer, window = random.buffer(width)
    indices = torch.tensor(case.routing, dtype=case.index, device=device)
    written = torch.tensor(case.has_adapter, dtype=torch.bool)[:, None].expand(case.T, width).clone()
    output = window(buffer)
    if op == SHRINK:
        output[:, : case.R] = torch.nan
        written[:] = torch.arange(width) < case.R
        args = {
            "output_tensor": output,
            "inputs": random.rows(case.D),
            "lora_a_weights": random.weights(case.R, case.D),
        }
        return Call(op, {**args, "lora_indices_tensor": indices, "scaling": case.scaling}, buffer, written, window)
    if op == LORA_LINEAR:
        ranks, widths = [case.R, case.R + 1][: case.slices], [case.W, max(1, case.W // 2)][: case.slices]
        offsets = [case.offset, case.H - widths[-1]][: case.slices]
        covered = [
            (torch.arange(width) >= o) & (torch.arange(width) < o + w) for o, w in zip(offsets, widths, strict=True)
        ]
        args = {
            "base": output,
            "inputs": random.rows(case.D),
            "lora_a": [random.weights(rank, case.D) for rank in ranks],
            "lora_b": [random.weights(w, rank, case.second) for w, rank in zip(widths, ranks, strict=True)],
            "lora_indices_tensor": indices,
            "slice_offsets": offsets,
            "scaling": case.scaling,
        }
        return Call(op, args, buffer, written & torch.stack(covered).any(0), window)
    args = {"output_tensor": output, "inputs": random.rows(case.R), "lora_b_weights": random.weights(case.W, case.R)}
    args["lora_indices_tensor"] = indices
    if op == EXPAND:
        written[:, case.W :] = False
    else:
        args |= {"slice_offset": case.offset, "slice_size": case.W}
        written &= (torch.arange(width) >= case.offset) & (torch.arange(width) < case.offset + case.W)
    return Call(op, {**args, "add_inputs": case.add}, buffer, written, window)


class _Random(RandomOperands):
    """Seeded tensors of one case, in its layouts, with NaN wherever the op must not read."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        super().__init__(seed, device)
        self.case = case

    def buffer(self, width: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        rows, height = slice(1, 1 + self.case.T), self.case.T + 2
        if self.case.window == "rows":
            return self.normal(height, width, dtype=self.case.output), lambda buffer: buffer[rows]
        columns = slice(2, 2 + width)
        if self.case.window == "transposed":
            return self.normal(width + 5, height, dtype=self.case.output), lambda buffer: buffer.t()[rows, columns]
        return self.normal(height, width + 5, dtype=self.case.output), lambda buffer: buffer[rows, columns]

    def rows(self, columns: int) -> Tensor:
        rows = self.normal(self.case.T, columns, dtype=self.case.inputs)
        if self.case.layout == "contiguous":
            return rows
        around = rows.new_full((self.case.T, 2 * columns + 3), torch.nan)
        around[:, 1 : 1 + 2 * columns : 2] = rows
        return around[:, 1 : 1 + 2 * columns : 2]

    def weights(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        layout, slots = self.case.layout, self.case.K
        # Small enough for sums of products to stay inside fp16.
        stack = self.normal(slots, rows, columns, dtype=dtype or self.case.weights, scale=0.5)
        poison_unused_slots(stack, self.case.routing)
        if layout == "expanded":
            stack = stack[min(set(self.case.routing) & set(range(slots)), default=0)].expand(slots, rows, columns)
        elif layout == "transposed":
            stack = stack.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "strided":
            around = stack.new_full((slots + 2, 2 * rows + 1, columns + 3), torch.nan)
            around[1:-1, 1::2, 2:-1] = stack
            stack = around[1:-1, 1::2, 2:-1]
        return stack.unsqueeze(1) if self.case.with_slice_dim else stack


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same bits, so that the two zeros differ and a NaN equals itself."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[left.element_size()]
    return torch.equal(left.detach().contiguous().view(bits), right.detach().contiguous().view(bits))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
