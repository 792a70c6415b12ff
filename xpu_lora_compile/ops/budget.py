"""How far a result may be from the exact value: derived from the dtypes and the lengths of the sums, never set by hand.

```
|got - exact| <= half an ulp of the output's dtype + gamma(n) * sum |products|,     gamma(n) = n u / (1 - n u)
```

The first term is the one rounding that the contract allows. The second is the bound of a sum in any order (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1): n is the number of roundings on the way of a product into
the result, u the unit roundoff of the accumulator. Since the ops are sums of products, the sum of the products'
absolute values is the reference itself, called with the absolute value of every operand.

A kernel may say that it rounds each slice's product to the output's dtype before it adds it. Then half an ulp of each
product is allowed, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xpu_lora_compile.ops import reference


@dataclass
class Budget:
    """The exact value of each element of an output, and how far from it a result may be; float64, on the CPU."""

    exact: Tensor
    allowed: Tensor

    def excess(self, got: Tensor) -> Tensor:
        """The error as a fraction of what is allowed: 1 is on the edge, and a NaN is infinitely wrong."""
        error = (got.detach().cpu().double() - self.exact).abs()
        return (error / self.allowed).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def check(self, got: Tensor, where: Tensor) -> None:
        """Assert that every element of `got` at which the mask `where` is true is within the budget."""
        excess = torch.where(where.cpu(), self.excess(got), 0.0)
        if excess.numel() and excess.max() > 1:
            row, column = divmod(int(excess.argmax()), excess.shape[1])
            raise AssertionError(
                f"row {row}, column {column}: {got[row, column].item()!r} is {excess.max():.3g} times its budget of "
                f"{self.allowed[row, column]:.3g} away from {self.exact[row, column].item()!r}; "
                f"{int((excess > 1).sum())} elements are"
            )


def budget_of(op: str, args: dict[str, Any], *, rounds_before_adding: bool = False) -> Budget:
    """Return the budget of one call.

    Args:
        op: the op's name.
        args: its arguments by name, in order, as they are before the call.
        rounds_before_adding: as `Kernel.rounds_before_adding`, of the kernel that runs it.
    """
    output, *rest = args.values()
    operands = [output.detach().cpu().double(), *map(_on_cpu, rest)]
    exact = getattr(reference, op)(*operands)
    magnitude = getattr(reference, op)(*map(_absolute, operands))
    n = _roundings(op, args)
    accumulator = torch.float64 if torch.float64 in _dtypes(args) else torch.float32
    # The oracle sums in float64 and is itself as far from the exact value as its own bound says.
    accumulated = (_gamma(n, accumulator) + _gamma(n, torch.float64)) * magnitude
    underflow = n * torch.finfo(accumulator).smallest_normal * torch.finfo(accumulator).eps
    added = _added(op, operands, exact, args) if rounds_before_adding else []
    early = sum((_half_ulp(part.abs() + accumulated, output.dtype) for part in added), torch.zeros_like(exact))
    late = _half_ulp(exact.abs() + accumulated + early, output.dtype)
    return Budget(exact, late + early + accumulated + underflow)


def _added(op: str, operands: list[Any], exact: Tensor, args: dict[str, Any]) -> list[Tensor]:
    """What an op adds to its output, one by one."""
    if op != "lora_linear":
        return [exact - operands[0]] if args.get("add_inputs") else []
    base, inputs, lora_a, lora_b, indices, offsets, *rest = operands
    slices = zip(lora_a, lora_b, offsets, strict=True)
    return [
        reference.lora_linear(torch.zeros_like(base), inputs, [a], [b], indices, [offset], *rest)
        for a, b, offset in slices
    ]


def _roundings(op: str, args: dict[str, Any]) -> int:
    """The longest way of a product into the result: multiply and add along each sum, scaling, and the output."""
    columns: int = args["inputs"].shape[1]
    if op == "bgmv_shrink":
        # One for each element of the sum, one to round the scaling, one to multiply by it.
        return columns + 2
    if op in ("lora_linear", "moe_lora_linear"):
        ranks: list[int] = [a.shape[-2] for a in args["lora_a"]]
        if (weights := args.get("adapter_weights")) is not None:
            # One to multiply by the weight, and the sum over the adapters of a row.
            several: int = weights.shape[1]
            return columns + 3 + max(ranks) + len(ranks) * several
        return columns + 2 + max(ranks) + len(ranks)
    return columns + 1


def _gamma(n: int, accumulator: torch.dtype) -> float:
    unit = torch.finfo(accumulator).eps / 2
    return n * unit / (1 - n * unit)


def _half_ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(magnitude.clamp(min=info.smallest_normal))
    return torch.exp2(exponent.double() - 1) * info.eps / 2


def _dtypes(args: dict[str, Any]) -> set[torch.dtype]:
    flat = [x for arg in args.values() for x in (arg if isinstance(arg, list) else [arg])]
    return {x.dtype for x in flat if isinstance(x, Tensor)}


def _on_cpu(value: Any) -> Any:
    if isinstance(value, list):
        return [_on_cpu(item) for item in value]
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _absolute(value: Any) -> Any:
    """The operand with every float in it made positive; indices, offsets and flags as they are."""
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    is_float = value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float)
    return abs(value) if is_float else value
