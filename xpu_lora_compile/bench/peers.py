"""How `xpu-lora bench gpu` asks for the LoRA kernels of other projects, its peers.

`benchmarks/peers` calls the kernels of vLLM, SGLang and LMDeploy. It is in the repository, and not in the wheel.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from xpu_lora_compile.errors import BenchError

# Takes the number of a layer, and returns where its result is.
Call = Callable[[int], Tensor]


@dataclass(frozen=True)
class Operands:
    """What all layers work on. LoRA is added to the outputs, the slices side by side."""

    # [T, D], bfloat16 or float16.
    inputs: Tensor
    # [T, sum(W)] each; layers beyond their number begin with the first again.
    outputs: Sequence[Tensor]
    # For each layer and slice, [K, R, D] and [K, W, R].
    a: Sequence[Sequence[Tensor]]
    b: Sequence[Sequence[Tensor]]
    # [T], -1 for rows without an adapter.
    indices: Tensor
    # [K], at most R each.
    ranks: Sequence[int]

    @property
    def widths(self) -> list[int]:
        """Width of each slice."""
        return [stack.shape[1] for stack in self.b[0]]

    def output(self, layer: int) -> Tensor:
        """The tensor that a layer adds to."""
        return self.outputs[layer % len(self.outputs)]


class Peer(ABC):
    """A way to compute LoRA.

    `prepare` and `prepare_in_situ` settle indices, layouts, compilation and scratch. What they return only launches
    kernels, and can be captured into a CUDA graph on any stream; the graph is valid while that function is referenced.

    Attributes:
        most_rows: T, up to which it is made for rows whose adapters are in any order.
    """

    most_rows = 1 << 31

    def prepare(self, operands: Operands) -> Call:
        """A function that adds a layer's LoRA to its output, whatever scratch must be zeroed included."""
        return self._prepared(operands, None)

    def prepare_in_situ(self, operands: Operands, base: Call) -> Call:
        """A function that computes a layer's base product and adds LoRA to it, overlapped as the peer's own layers do.

        Args:
            operands: whose outputs are not used.
            base: the base product, in new memory or memory of the caller's, on the stream that is current.
        """
        return self._prepared(operands, base)

    def _prepared(self, operands: Operands, base: Call | None) -> Call:
        call = self._bind(operands, base)
        # Kernels are compiled and scratch is allocated now, and outputs are put back as they were.
        for layer in range(len(operands.a)):
            kept = None if base else operands.output(layer).clone()
            result = call(layer)
            if kept is not None:
                result.copy_(kept)
        return call

    @abstractmethod
    def _bind(self, operands: Operands, base: Call | None) -> Call: ...


@dataclass(frozen=True)
class ExpertsOperands:
    """What all layers of experts work on: a row is a pair of a token and one of its k experts, token by token."""

    # [T, D], bfloat16 or float16: the inputs of gate and up.
    hidden: Tensor
    # [T k, I]: the inputs of down.
    activated: Tensor
    # [T, k], int32.
    index: Tensor
    # [T, k], float32: what each expert of a token counts.
    weights: Tensor
    # [T], int32, -1 for tokens without an adapter.
    slots: Tensor
    # For each layer A [K, E, R, D] and B [K, E, 2 I, R] of gate and up, which share an A.
    gate_up: Sequence[tuple[Tensor, Tensor]]
    # For each layer A [K, E, R, I] and B [K, E, D, R].
    down: Sequence[tuple[Tensor, Tensor]]


# Takes the number of a layer, and adds its LoRA to zeros, or writes it: [T k, 2 I] and [T k, D], which are all layers'.
ExpertsCall = Callable[[int], tuple[Tensor, Tensor]]


class ExpertsPeer(ABC):
    """A way to compute LoRA on experts. `prepare` settles all but the launches of kernels, as that of `Peer`.

    Attributes:
        weighs_down: whether what it adds to down is multiplied by what the expert counts.
    """

    weighs_down = False

    @abstractmethod
    def prepare(self, operands: ExpertsOperands) -> ExpertsCall:
        """A function that computes a layer's LoRA, which has run once for each layer."""


def experts_peers_of(folder: Path) -> dict[str, ExpertsPeer]:
    """The peers with LoRA on experts whose sources are in a folder, by name.

    Raises:
        BenchError: as `peers_of`.
    """
    found: dict[str, ExpertsPeer] = _imported("benchmarks.peers.experts", "bench moe").find(folder)
    return found


def peers_of(folder: Path) -> dict[str, Peer]:
    """The peers whose sources are in a folder, by name.

    Raises:
        BenchError: the package was installed without `benchmarks/peers`; or the folder has no peer that this can call.
    """
    peers: dict[str, Peer] = _imported("benchmarks.peers", "bench gpu").find(folder)
    return peers


def _imported(name: str, command: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in ("benchmarks", "benchmarks.peers"):
            raise
        wanted = "benchmarks/peers, which calls vLLM's, SGLang's and LMDeploy's kernels and is in no wheel"
        remedy = f"In a checkout of the repository, run: python -m xpu_lora_compile.cli {command} --peers DIR."
        raise BenchError(f"{command}: --peers", wanted, str(missing), remedy) from missing
