"""How `xpu-lora bench gpu` asks for the LoRA kernels of other projects, its peers.

`benchmarks/peers` calls the kernels of vLLM, SGLang and LMDeploy. It is in the repository, and not in the wheel.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def peers_of(folder: Path) -> dict[str, Peer]:
    """The peers whose sources are in a folder, by name.

    Raises:
        BenchError: the package was installed without `benchmarks/peers`; or the folder has no peer that this can call.
    """
    try:
        found = importlib.import_module("benchmarks.peers")
    except ModuleNotFoundError as missing:
        if missing.name not in ("benchmarks", "benchmarks.peers"):
            raise
        wanted = "benchmarks/peers, which calls vLLM's, SGLang's and LMDeploy's kernels and is in no wheel"
        remedy = "In a checkout of the repository, run: python -m xpu_lora_compile.cli bench gpu --peers DIR."
        raise BenchError("bench gpu: --peers", wanted, str(missing), remedy) from missing
    peers: dict[str, Peer] = found.find(folder)
    return peers
