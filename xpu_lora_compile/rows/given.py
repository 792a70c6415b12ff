"""`GivenRows`: the routing of layers in a program whose slots are an input, by what a followed call has shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from xpu_lora_compile.errors import UnprovedRowsError
from xpu_lora_compile.rows.layout import Layout


class GivenRows:
    """What layers have in the place of a `BatchRouting` while a program is traced.

    Attributes:
        slots: `[batch]`, an input of the program.
        ranks: `[K]`, another one: the highest rank of each slot's adapter; None where no kernel asks for it.
        called: the names of the layers that asked.
    """

    def __init__(self, layouts: Mapping[tuple[str, int], Layout]) -> None:
        """Take the layout of each layer's rows, by its name and the number of dimensions of its input."""
        self.layouts = layouts
        self.sequence_slots: Tensor | None = None
        self.ranks: Tensor | None = None
        self.called: set[str] = set()

    def rows_of(self, layer: Any, inputs: Tensor, features: int) -> Tensor:
        """Return the slot of each row of a layer's inputs.

        Raises:
            UnprovedRowsError: the call that was followed did not reach the layer in this way.
        """
        assert self.sequence_slots is not None  # noqa: S101 - for the type checker
        self.called.add(layer.lora_name)
        shape = inputs.shape[: inputs.dim() - features]
        layout = self.layouts.get((layer.lora_name, inputs.dim()))
        if layout is None or not layout.takes(shape[layout.dimension], self.sequence_slots.shape[0]):
            raise UnprovedRowsError(
                f"export: {layer.lora_name}",
                "rows as they were when the model was called with the example inputs",
                f"an input of shape {list(shape)} while it is traced",
                "Have the model do the same when torch.compiler.is_compiling() says that it is traced.",
            )
        return layout.rows(self.sequence_slots, shape)

    def note_read(self, layer: Any) -> None:
        """Nothing: a weight that something else than its layer reads has been found before."""
