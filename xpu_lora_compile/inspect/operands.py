"""Random operands of LoRA calls, for all that checks or times them: doctor, the benchmarks and the tests.

T rows, D features, R rank, K slots, W width of a slice, as in the contract of `xpu_lora_compile.ops`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class RandomOperands:
    """Seeded random tensors. The same calls in the same order give the same numbers.

    Args:
        seed: of the numbers.
        device: of the tensors.
        drawn_on: the device that draws. Numbers from the CPU are the same for every device; an accelerator draws its
            own much faster.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu", drawn_on: torch.device | str = "cpu") -> None:
        self.device = device
        self.generator = torch.Generator(drawn_on).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """A tensor of normal numbers, drawn in float32."""
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return (drawn if scale == 1 else drawn * scale).to(self.device, dtype)

    def stacks(
        self, features: int, widths: Sequence[int], ranks: Sequence[int], dtype: torch.dtype
    ) -> tuple[list[Tensor], list[Tensor]]:
        """A, `[K, R, D]`, and B, `[K, R, W]` as the bank stores it, of each slice; zeros beyond the rank of a slot."""
        slots, most = len(ranks), max(ranks)
        beyond = torch.arange(most, device=self.device) >= torch.tensor(ranks, device=self.device)[:, None]

        def stack(columns: int, scale: float) -> Tensor:
            made = self.normal(slots, most, columns, dtype=dtype, scale=scale)
            return made.masked_fill_(beyond[:, :, None], 0)

        return [stack(features, features**-0.5) for _ in widths], [stack(width, most**-0.5) for width in widths]

    def indices(self, rows: int, slots: int) -> Tensor:
        """The adapter of each row. 10 % of the rows have no adapter, but the first always has one."""
        drawn_on = self.generator.device
        indices = torch.randint(0, slots, (rows,), generator=self.generator, device=drawn_on)
        indices[1:][torch.rand(rows - 1, generator=self.generator, device=drawn_on) < 0.1] = -1
        return indices.to(self.device)


def every_kind_of_index(rows: int, slots: int, dtype: torch.dtype = torch.int64) -> tuple[int, ...]:
    """An index for each row: slots, and every kind of index that means no adapter, in turn."""
    limits = torch.iinfo(dtype)
    kinds = (slots - 1, -1, 0, slots, 0, slots + 1, slots // 2, limits.max, limits.min)
    return tuple(itertools.islice(itertools.cycle(kinds), rows))


def poison_unused_slots(stack: Tensor, indices: Iterable[int]) -> Tensor:
    """Set the weights of each slot that no row uses to NaN: a kernel that reads them cannot be right."""
    stack[sorted(set(range(len(stack))) - set(indices))] = torch.nan
    return stack
