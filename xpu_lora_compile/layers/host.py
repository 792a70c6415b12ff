"""`Host`, a kind of module that can carry LoRA, and `LoraLayer`, such a module once it does.

    module of a model --Host.takes--> Host.site, dtype, device --attach--> the same module, of the class Host.layer

A host answers for plain modules, before LoRA is attached to them; a layer is such a module afterwards.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from xpu_lora_compile.adapters.checkpoint import ModuleSizes
from xpu_lora_compile.kernels.call import accumulator
from xpu_lora_compile.ops import bgmv_expand, bgmv_shrink, lora_linear
from xpu_lora_compile.ops.lora_linear import add_lora_eagerly
from xpu_lora_compile.rows.routing import BatchRouting
from xpu_lora_compile.rows.tracing import note_read
from xpu_lora_compile.torch_internals import reads_object

# In a `use` block a graph belongs to the modules that it was traced with, outside of all it serves all of their kind.
routing_of = reads_object("lora_routing", lambda routing: routing.sequence_slots is not None)


class LoraLayer(nn.Module):
    """A module that adds `B[i] @ A[i] @ x` to the rows of adapter i, one shrink and one expand for the batch.

    A class of layers has two bases: first this one, and last the class that its modules have without LoRA. The methods
    here are for modules that map `[..., D]` to `[..., H]`; a class for others has its own.

    Buffers: `lora_a` `[K, R, D]`, `lora_b` `[K, W, R]`, with scaling folded into B; a free slot is all zeros.

    Attributes:
        lora_features: how many of the last dimensions of its input are no rows; `forward` says the same to the routing.
    """

    lora_site: ModuleSizes
    lora_name: str
    lora_routing: BatchRouting
    lora_a: Tensor
    lora_b: Tensor

    lora_features = 1

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, for calls by keyword
        """The base layer's output, with each row's adapter added while a `bank.use` block runs."""
        routing = routing_of(self)
        indices = routing.rows_of(self, input, 1)
        if indices is None:
            return self.without_lora(input)
        # Rows first, so that the op changes the product itself and not a view of it: see `backend._SAFE`.
        rows = input.reshape(-1, input.shape[-1])
        output = self.without_lora(rows)
        shape = (*input.shape[:-1], output.shape[1])
        lora_a, lora_b = self.lora_a, self.lora_b
        columns = min(lora_b.shape[1], output.shape[1])
        # What a CPU's kernel does not ask for need not be an input of its graphs.
        ranks = None if rows.device.type == "cpu" else routing.ranks
        if add_lora_eagerly(output, rows, lora_a, lora_b, indices, columns, ranks):
            return output.view(shape)
        if torch.is_grad_enabled() or ranks is not None:
            b = lora_b.narrow(1, 0, columns)
            return lora_linear(output, rows, [lora_a], [b], indices, [0], ranks=ranks).view(shape)
        # Not `promote_types`, which an exported program would record as an op.
        hidden = rows.new_empty(rows.shape[0], lora_a.shape[1], dtype=accumulator(rows))
        bgmv_shrink(hidden, rows, lora_a, indices)
        bgmv_expand(output, hidden, lora_b, indices)
        return output.view(shape)

    def without_lora(self, input: Tensor) -> Tensor:  # noqa: A002
        """The base layer's output."""
        return cast("Tensor", super().forward(input))

    @property
    def weight(self) -> Tensor:
        """The base weight; a parent that reads it without a call of the layer leaves LoRA out."""
        weight = cast("Tensor", self._parameters["weight"])
        routing = routing_of(self)
        if routing.sequence_slots is not None:
            if is_compiling():
                note_read(routing, self, weight)
            else:
                routing.note_read(self)
        return weight

    @staticmethod
    def shape_of_a(site: ModuleSizes, rank: int) -> tuple[int, int]:
        """Shape of A in one slot, as `store` fills it and `forward` reads it."""
        return rank, site.in_features

    def places(
        self, slot_a: Tensor, slot_b: Tensor, shape_a: tuple[int, int], shape_b: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Views of one slot's memory that A `[r, D]` and B `[W', r]` fill; the rest of the slot is zeros.

        Args:
            slot_a: `[R, D]`, of a slot of `lora_a` or of other memory.
            slot_b: `[W, R]`.
            shape_a: of A.
            shape_b: of B.
        """
        return slot_a[: shape_a[0]], slot_b[: shape_b[0], : shape_b[1]]

    def store(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Copy A and B into an empty slot, at their `places`."""
        shapes = cast("tuple[int, int]", a.shape), cast("tuple[int, int]", b.shape)
        for place, weight in zip(self.places(self.lora_a[slot], self.lora_b[slot], *shapes), (a, b), strict=True):
            place.copy_(weight)

    def restore(self) -> None:
        """Become again the module it was before LoRA."""
        for name in ("lora_a", "lora_b", "lora_routing", "lora_name", "lora_site"):
            delattr(self, name)
        # Of a class that others have derived since, as FSDP does, the base that `Host.layer` has given.
        given = next(kind for kind in type(self).__mro__ if LoraLayer in kind.__bases__)
        self.__class__ = given.__bases__[-1]


class Host:
    """One kind of module that can carry LoRA: a file of its own, an entry in `HOSTS`, a test file.

    Attributes:
        name: what errors call this kind of module.
    """

    name: str

    def takes_class(self, kind: type[nn.Module]) -> bool:
        """Return whether modules of exactly this class are of this kind."""
        raise NotImplementedError(self.name)

    def takes(self, module: nn.Module) -> bool:
        """Return whether a module is of this kind, and computes with the weight that it holds."""
        # Asked first, since a module of TorchScript has no such dict.
        if not self.takes_class(type(module)):
            return False
        weight = module._parameters.get("weight")
        return isinstance(weight, Tensor) and weight.is_floating_point()

    def site(self, module: nn.Module) -> ModuleSizes:
        """Return the sizes of a module that this host takes."""
        raise NotImplementedError(self.name)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Return the dtype in which a module computes, which its adapters are stored in."""
        return cast("Tensor", module._parameters["weight"]).dtype

    def device(self, module: nn.Module) -> torch.device:
        """Return the device on which a module computes."""
        return cast("Tensor", module._parameters["weight"]).device

    def layer(self, module: nn.Module) -> type[LoraLayer]:
        """Return the class that a module gets, each time the same, and with it the forward pass that adds LoRA."""
        raise NotImplementedError(self.name)
