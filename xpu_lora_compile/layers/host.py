"""`Host`, a kind of module that can carry LoRA, and `LoraLayer`, such a module once it does.

    module of a model --Host.takes--> Host.site, dtype, device --attach--> the same module, of the class Host.layer

A host answers for plain modules, before LoRA is attached to them; a layer is such a module afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from xpu_lora_compile.adapters.checkpoint import ModuleSizes
from xpu_lora_compile.adapters.training import TrainedSlots
from xpu_lora_compile.errors import AttachError, counted
from xpu_lora_compile.kernels import preferred_on
from xpu_lora_compile.kernels.call import accumulator
from xpu_lora_compile.ops import TRAINED_LINEAR, bgmv_expand, bgmv_shrink, lora_linear
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
        lora_in_place: whether the base class makes a new tensor for each call, to which LoRA may be added in place.
        lora_takes_one_input: whether it is called with its input alone.
        lora_training: the slots that are trained, whose B is without scaling meanwhile, perhaps none; None where no
            layer of the bank has any.
    """

    lora_site: ModuleSizes
    lora_name: str
    lora_routing: BatchRouting
    lora_a: Tensor
    lora_b: Tensor

    lora_features = 1
    lora_in_place = True
    lora_takes_one_input = True
    lora_training: TrainedSlots | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, for calls by keyword
        """The base layer's output, with each row's adapter added while a `bank.use` block runs."""
        routing = routing_of(self)
        indices = routing.rows_of(self, input, 1)
        if indices is None:
            return self.without_lora(input)
        # Rows first, so that the op changes the product itself and not a view of it: see `backend._SAFE`.
        rows = input.reshape(-1, input.shape[-1])
        output = self.without_lora(rows) if self.lora_in_place else self._rows_of_base(self.without_lora(input))
        shape = (*input.shape[:-1], output.shape[1])
        lora_a, lora_b = self.lora_a, self.lora_b
        if (training := self.lora_training) is not None:
            columns = min(lora_b.shape[1], output.shape[1])
            # A layer without trained slots hands gradients on by the same op as the others, which a compiler sees
            # through, unless it has been converted since, or its output is narrower than B.
            if len(training) or (torch.is_grad_enabled() and training.fits(lora_a, columns)):
                return self._with_training(training, output, rows, indices, columns).view(shape)
        # What a CPU's kernel does not ask for need not be an input of its graphs.
        ranks = None if rows.device.type == "cpu" else routing.ranks
        if self.lora_in_place:
            return added_in_place(output, rows, lora_a, lora_b, indices, ranks).view(shape)
        b = lora_b.narrow(1, 0, min(lora_b.shape[1], output.shape[1]))
        return lora_linear(output, rows, [lora_a], [b], indices, [0], ranks=ranks).view(shape)

    def _with_training(
        self, training: TrainedSlots, output: Tensor, rows: Tensor, indices: Tensor, columns: int
    ) -> Tensor:
        """The output with LoRA, some of whose slots are trained: with dropout, and gradients for their parameters."""
        if self.training and training.rates:
            rows = training.dropped(rows, indices)
        stacks = [self.lora_a], [self.lora_b.narrow(1, 0, columns)]
        trained = training.scalings, training.slots, [training.leaf_a], [training.leaf_b]
        return cast("Tensor", TRAINED_LINEAR([output], rows, *stacks, indices, *trained)[0])

    def without_lora(self, input: Tensor) -> Tensor:  # noqa: A002
        """The base layer's output."""
        return cast("Tensor", super().forward(input))

    def _rows_of_base(self, output: Any) -> Tensor:
        """The result of a base class that is known by its word alone, as rows.

        Raises:
            AttachError: it is no tensor of as many columns as it says.
        """
        wanted = cast("int", self.out_features)
        if not isinstance(output, Tensor) or output.shape[-1] != wanted:
            got = f"{type(output).__name__} {list(output.shape)}" if isinstance(output, Tensor) else repr(type(output))
            raise AttachError(
                f"attach: {self.lora_name}",
                f"a result [..., {wanted}] of {type(self).__bases__[-1].__name__}, which is said to be a linear layer",
                got,
                "Leave it out with exclude_modules.",
            )
        return output.reshape(-1, wanted)

    @property
    def weight(self) -> Tensor:
        """The base weight; a parent that reads it without a call of the layer leaves LoRA out."""
        weight = self._parameters.get("weight")
        if weight is None:
            # Then Python asks `__getattr__`, which finds a buffer, or says that there is none.
            raise AttributeError("weight")
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

    @property
    def lora_stacks(self) -> Mapping[str, Tensor]:
        """All memory for adapters, by the name of the buffer."""
        return {"lora_a": self.lora_a, "lora_b": self.lora_b, **self.lora_extras}

    @property
    def lora_factors(self) -> list[Tensor]:
        """A and B of all slots, in turn where there are several."""
        return [self.lora_a, self.lora_b]

    @property
    def slot_count(self) -> int:
        """K."""
        return len(self.lora_a)

    @property
    def lora_extras(self) -> Mapping[str, Tensor]:
        """Buffers with what each slot has besides A and B, by name: see `adapters.extras`."""
        return {}

    def restore(self) -> None:
        """Become again the module it was before LoRA."""
        for name in ("lora_a", "lora_b", "lora_routing", "lora_name", "lora_site"):
            delattr(self, name)
        vars(self).pop("lora_training", None)
        self.become_base()

    def become_base(self) -> None:
        """Have the class without LoRA."""
        self.__class__ = _base_of(type(self))
        have_hook_call(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the module without LoRA, but for its class: one that `layer_class` has made has no name to be found by."""
        found: Any = super().__reduce_ex__(protocol)
        kind = type(self)
        if kind in _MADE and found[1][:1] == (kind,):
            return _new, (*_MADE[kind], *found[1][1:]), *found[2:]
        return found


def added_in_place(
    output: Tensor,
    rows: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    indices: Tensor,
    ranks: Tensor | None = None,
    tiles: Tensor | None = None,
) -> Tensor:
    """Return `output` with each row's LoRA: the same tensor, changed, where no gradient needs it as it was.

    Args:
        output: `[T, H]`, which nothing else reads.
        rows: `[T, D]`.
        lora_a: `[K, R, D]`.
        lora_b: `[K, W, R]`.
        indices: `[T]`.
        ranks: as of `lora_linear`.
        tiles: what `tiles_eagerly` has made of the indices, if several calls share them.
    """
    columns = min(lora_b.shape[1], output.shape[1])
    if add_lora_eagerly(output, rows, lora_a, lora_b, indices, columns, ranks, tiles):
        return output
    if torch.is_grad_enabled() or ranks is not None:
        return lora_linear(output, rows, [lora_a], [lora_b.narrow(1, 0, columns)], indices, [0], ranks=ranks)
    # Not `promote_types`, which an exported program would record as an op.
    hidden = rows.new_empty(rows.shape[0], lora_a.shape[1], dtype=accumulator(rows))
    bgmv_shrink(hidden, rows, lora_a, indices)
    bgmv_expand(output, hidden, lora_b, indices)
    return output


def empty_b(count: int, width: int, rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros `[count, width, rank]`, in memory as the device's kernel reads B.

    The columns of one rank lie side by side, or the ranks of one column.
    """
    if device.type in preferred_on(device.type).ranks_of_b_together_on:
        return torch.zeros(count, width, rank, dtype=dtype, device=device)
    return torch.zeros(count, rank, width, dtype=dtype, device=device).transpose(1, 2)


def _base_of(kind: type[nn.Module]) -> type[Any]:
    """Return the class without LoRA: of a class that others have derived since, as FSDP does, the one it had before."""
    given = next(base for base in kind.__mro__ if len(base.__bases__) > 1 and issubclass(base.__bases__[0], LoraLayer))
    base = given.__bases__[-1]
    return _base_of(base) if issubclass(base, LoraLayer) else base


# The classes that `layer_class` has made, by what they are made of, and the other way around.
_CLASSES: dict[tuple[type[LoraLayer], type[nn.Module]], type[LoraLayer]] = {}
_MADE: dict[type[nn.Module], tuple[type[LoraLayer], type[nn.Module]]] = {}


def layer_class(mixin: type[LoraLayer], base: type[nn.Module]) -> type[LoraLayer]:
    """Make the class of modules of another class that carry LoRA; their own forward stays what it was.

    Args:
        mixin: adds LoRA to what the base class returns.
        base: the class of the modules; or one that this function has made of it, to which the mixin adds more.
    """
    if (mixin, base) in _CLASSES:
        return _CLASSES[mixin, base]
    members: dict[str, Any] = {"__module__": base.__module__, "__doc__": base.__doc__}
    is_layer = issubclass(base, LoraLayer)
    forward = _base_of(base).forward if is_layer else base.forward
    names = [*inspect.signature(forward).parameters][1:] or ["input"]
    if mixin.lora_takes_one_input and names != ["input"]:
        members["forward"] = _forward_with(mixin, names[0])
    if hasattr(base, "weight"):
        # A property of that class, which computes it.
        members["weight"] = inspect.getattr_static(base, "weight")
    made = cast("type[LoraLayer]", type(base.__name__ if is_layer else f"Lora{base.__name__}", (mixin, base), members))
    _CLASSES[mixin, base], _MADE[made] = made, (mixin, base)
    return made


def forward_class(kind: type[LoraLayer]) -> type[nn.Module]:
    """Return the class whose forward adds LoRA in layers of a class, whatever they call its argument."""
    return next(base for base in kind.__mro__ if "forward" in vars(base) and base not in _MADE)


def _forward_with(mixin: type[LoraLayer], name: str) -> Any:
    """Return the forward of a mixin, whose argument has another name for those who call it by keyword."""

    def forward(self: LoraLayer, *args: Any, **kwargs: Any) -> Any:
        if len(args) + len(kwargs) != 1:
            raise AttachError(
                f"attach: {self.lora_name}",
                f"calls of a linear layer with its input alone, {name}",
                f"one with {counted(len(args) + len(kwargs), 'argument')}",
                "Have its parent pass the input alone, or leave it out with exclude_modules.",
            )
        return mixin.forward(self, *args, **{("input" if key == name else key): kwargs[key] for key in kwargs})

    return forward


def _new(mixin: type[LoraLayer], base: type[nn.Module], *arguments: Any) -> LoraLayer:
    """Make an object of such a class, as `copyreg.__newobj__` does; pickled files name this function."""
    kind = layer_class(mixin, base)
    return kind.__new__(kind, *arguments)


def have_hook_call(module: nn.Module) -> None:
    """Have a hook of accelerate's call the forward of the class that the module has now."""
    if "_old_forward" in vars(module):
        module._old_forward = MethodType(type(module).forward, module)  # type: ignore[assignment]


class Host:
    """One kind of module that can carry LoRA: a file of its own, an entry in `HOSTS`, a test file.

    Attributes:
        name: what errors call this kind of module.
        classes: the full names of its classes, so that no library is imported for them.
        mixin: what adds LoRA to what a class of theirs returns.
        has_weight: whether `weight_of` gives a weight, which DoRA takes.
    """

    name: str
    classes: tuple[str, ...] = ()
    mixin: type[LoraLayer] = LoraLayer
    has_weight = True

    def takes_class(self, kind: type[nn.Module]) -> bool:
        """Return whether modules of exactly this class are of this kind: a subclass is that keeps the forward."""
        known: Any = next((base for base in kind.__mro__ if full_name(base) in self.classes), None)
        return known is not None and kind.forward is known.forward

    def takes(self, module: nn.Module) -> bool:
        """Return whether a module is of this kind, and computes with the weight that it holds."""
        # Asked first, since a module of TorchScript has no such dict.
        if not self.takes_class(type(module)):
            return False
        weight = module._parameters.get("weight")
        return isinstance(weight, Tensor) and weight.is_floating_point()

    def site(self, module: nn.Module) -> ModuleSizes:
        """Return the sizes of a module that this host takes."""
        sizes = cast("int", module.in_features), cast("int", module.out_features)
        return ModuleSizes("linear", *sizes, padded=False)

    def parameter_sites(self, module: nn.Module) -> dict[str, ModuleSizes]:
        """Return the sizes of parameters that carry LoRA each for themselves, by name: those of experts."""
        return {}

    def dtype(self, module: nn.Module) -> torch.dtype | None:
        """Return the dtype in which a module computes, which its adapters are stored in; None if it does not say."""
        return cast("Tensor", module._parameters["weight"]).dtype

    def device(self, module: nn.Module) -> torch.device:
        """Return the device on which a module computes."""
        hook = execution_device(module)
        tensors = [*module.parameters(), *module.buffers()]
        is_plain = isinstance(vars(module).get("weight"), Tensor)
        if is_plain or (hook is None and not tensors):
            raise AttachError(
                "attach: model",
                f"a weight or buffer of each {type(module).__name__}, which says on what device it computes",
                "one whose weight is a plain attribute" if is_plain else "one without any",
                "Register its weight as a parameter or buffer, or leave it out with exclude_modules.",
            )
        return hook or tensors[0].device

    def layer(self, module: nn.Module) -> type[LoraLayer]:
        """Return the class that a module gets, each time the same, and with it the forward pass that adds LoRA."""
        return layer_class(self.mixin, type(module))

    def weight_of(self, module: nn.Module) -> Tensor:
        """Return the weight with which a layer computes, `[out_features, in_features]`, to be read only."""
        weight = cast("Tensor", module._parameters["weight"])
        # What stands for other tensors, as those of torchao do, can be made one.
        return weight.detach() if type(weight) is nn.Parameter else weight.dequantize()


class Quantized(Host):
    """A linear layer whose weight is stored in another way than it computes with."""

    has_weight = False

    def takes(self, module: nn.Module) -> bool:
        """Return whether a module is of this kind."""
        return self.takes_class(type(module))

    def dtype(self, module: nn.Module) -> torch.dtype | None:
        """Return what the module, or its bias, says: never the dtype of the storage."""
        said = getattr(module, "compute_dtype", None)
        bias = getattr(module, "bias", None)
        if isinstance(said, torch.dtype):
            return said
        return bias.dtype if isinstance(bias, Tensor) and bias.is_floating_point() else None


def full_name(kind: type) -> str:
    """Return the name of a class behind that of its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def has_other_forward(module: nn.Module) -> bool:
    """Whether something has given the module a forward of its own, and not one that calls that of its class.

    Two are known to call it: hooks of accelerate's, as `_old_forward` of the module; and compressed-tensors, which
    replaces the weight meanwhile. Where that changes inputs or results, too, LoRA would see the changed ones.
    """
    forward = vars(module).get("forward")
    if forward is None:
        return False
    if getattr(getattr(forward, "func", None), "__module__", "") == "accelerate.hooks":
        before = vars(module).get("_old_forward")
        return "_hf_hook" not in vars(module) or getattr(before, "__func__", None) is not type(module).forward
    # Its name is that of the forward that it wraps.
    places = getattr(getattr(forward, "__func__", None), "__globals__", {})
    if places.get("__name__") == "compressed_tensors.quantization.lifecycle.forward":
        scheme = getattr(module, "quantization_scheme", None)
        return any(getattr(scheme, part, None) is not None for part in ("input_activations", "output_activations"))
    return True


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device on which a hook of accelerate's has a module run; None without such a hook."""
    hooks = [vars(module).get("_hf_hook")]
    hooks += getattr(hooks[0], "hooks", ())
    said = next((device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None), None)
    return None if said is None else torch.empty(0, device=said).device
