"""`Watch`: follow the owners of all tensors through one run of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from xpu_lora_compile.rows import rules
from xpu_lora_compile.rows.layout import Layout, Picked, fit
from xpu_lora_compile.rows.owners import GUESS, MIXED, SHARED, UNKNOWN, Owned, compress, constant, fold
from xpu_lora_compile.torch_internals import decomposed, is_composite, without_modes

# Operands of these meet where they are broadcast to: one that has an owner everywhere is enough to know whose the
# result is, in whatever order the others came.
_MEETING = {rules.pointwise, rules.product, rules.product_and_sum, rules.attention, rules.lora}
_WITHOUT_VALUES = {rules.filled, rules.factory, rules.numbers}
# Elements of memory whose owners are told apart when a view of it is written to: 256 MiB of numbers.
_LARGEST = 1 << 26
_ATTRIBUTE = "_xpu_lora_owned"


# What hands values to Python without an op of the dispatcher.
_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__, Tensor.__format__)
# Ops whose result, or the size of whose result, is decided by values.
_TELLING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Readers(TorchFunctionMode):
    """Notes what the dispatcher is not asked for: values that become lists of Python's, or arrays of numpy's."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        if func in _READS:
            self.watch.note_look(args[0])
        return func(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """While it is entered, each op of ATen passes the owners of its operands on to its results.

    Args:
        batch: the number of sequences.
        lengths: of the sequences, where their tokens lie in one row; see `rules.attend`.
    """

    # Of torch: this mode is given `cond` and the like, too.
    supports_higher_order_operators = True

    def __init__(self, batch: int, lengths: tuple[int, ...] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch = batch
        self.lengths = lengths
        self._labelled: list[weakref.ref[Tensor]] = []
        self._aliases: dict[int, list[weakref.ref[Tensor]]] = {}
        # Tensors that were computed from sizes alone, by identity.
        self._from_sizes: dict[int, weakref.ref[Tensor]] = {}
        # Whether Python has looked at a value of the inputs, and may do something else the next time; or at a mask.
        self.looked_at_values = self.looked_at_masks = False
        self._readers = _Readers(self)

    def own(self, tensor: Tensor, owners: Tensor, cause: str = "", *, mask: bool = False) -> None:
        """Say whose the elements of a tensor are."""
        self._set(tensor, Owned(owners, cause=cause, mask=mask))

    def known(self, tensor: Tensor) -> Owned | None:
        """What is known of a tensor; None for constants."""
        marks = vars(tensor).get(_ATTRIBUTE)
        return None if marks is None else marks.get(id(self))

    def layout_of(self, inputs: Tensor, features: int) -> Layout | Picked | str:
        """The layout of a layer's input, whose rows they are in this call alone, or what is wrong with it.

        Args:
            inputs: of the layer.
            features: how many of its last dimensions are no rows.
        """
        owned = self.known(inputs)
        if owned is None:
            return "these rows belong to no sequence: all share them"
        rows = inputs.dim() - features
        owners = fold(owned.owners, range(rows, inputs.dim()))
        owners = owners.reshape(owners.shape[:rows])
        found = fit(owners, inputs.shape[:rows], self.batch, self.lengths, by_data=owned.by_data)
        if isinstance(found, str):
            return f"{found} ({owned.cause})" if owned.cause else found
        # Whoever the rows were guessed to belong to: they are theirs once they have got their adapter.
        if bool((owned.owners >= GUESS).any()):
            owned.owners = torch.where(owned.owners >= GUESS, owned.owners - GUESS, owned.owners)
        return found

    def note_look(self, tensor: Tensor) -> None:
        """Python looks at the values of a tensor."""
        owned = self.known(tensor)
        if owned is not None and owned.varies:
            self.looked_at_masks |= owned.mask
            self.looked_at_values |= not owned.mask

    def start(self) -> None:
        """Follow from here on."""
        self.__enter__()  # type: ignore[no-untyped-call]
        self._readers.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Follow no longer."""
        self._readers.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def is_from_sizes(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed in this run from nothing that the model keeps or is given."""
        reference = self._from_sizes.get(id(tensor))
        return reference is not None and reference() is tensor

    def is_mixed(self, tensor: Tensor) -> bool:
        """Whether several sequences went into every element of a tensor."""
        owned = self.known(tensor)
        return owned is not None and bool((owned.owners == MIXED).all())

    def forget(self) -> None:
        """Take all marks off the tensors that still live."""
        for reference in self._labelled:
            tensor = reference()
            marks = None if tensor is None else vars(tensor).get(_ATTRIBUTE)
            if marks is not None and marks.pop(id(self), None) and not marks:
                delattr(tensor, _ATTRIBUTE)
        self._labelled.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op, and note the owners of its results."""
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return self._run_higher_order(func, args, kwargs)
        if is_composite(func):
            with self:
                result = decomposed(func, args, kwargs)
            if result is not NotImplemented:
                return result
        if not _TELLING.isdisjoint(func.tags):
            self._note_telling(func, args, kwargs)
        result = func(*args, **kwargs)
        results = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        if results and func.namespace != "prim":
            with without_modes(), torch.no_grad():
                self._follow(func, args, kwargs, results)
        elif not results and func.namespace != "prim":
            with without_modes(), torch.no_grad():
                self._follow_without_results(func, args, kwargs)
        return result

    def follow_unrun(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note the owners of the results of an op that could not be run, for want of values."""
        results = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        with without_modes(), torch.no_grad():
            self._follow(func, args, kwargs, results)

    def _note_telling(self, func: Any, args: Any, kwargs: Any) -> None:
        """Values of these operands decide what Python sees of a result: all, or those of an index that are masks."""
        operands = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten._unsafe_index.Tensor):
            operands = [index for index in operands[1:] if index.dtype in (torch.bool, torch.uint8)]
        for operand in operands:
            self.note_look(operand)

    def _run_higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What `torch.cond` and the like compute is not followed."""
        result = func(*args, **kwargs)
        with without_modes():
            for leaf in tree_flatten(result)[0]:
                if isinstance(leaf, Tensor):
                    self.own(leaf, constant(UNKNOWN, leaf.dim()), f"after {func}, which is not followed")
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        for result in results:
            self._note_alias(result)
        rule = rules.rule_for(func)
        packed = self.lengths is not None
        step = rules.Step(func, args, kwargs, results, self.known, self.batch, packed, from_sizes=self.is_from_sizes)
        if func is not torch.ops.aten.lift_fresh.default and all(self.is_from_sizes(tensor) for tensor in step.tensors):
            self._from_sizes |= {id(result): weakref.ref(result) for result in results}
        known = [owned for tensor in step.tensors if (owned := self.known(tensor)) is not None]
        if torch.Tag.nondeterministic_seeded in func.tags and not known:
            # Another number each time.
            for result in results:
                self._set(result, Owned(constant(SHARED, result.dim())))
            return
        if not known and rule not in (rules.rearranged, rules.factory, rules.filled):
            return
        cause = next((owned.cause for owned in known if owned.cause), "")
        if rule is None:
            found: Any = constant(UNKNOWN, 0)
            cause = cause or f"after {func}, which is not followed"
        else:
            try:
                found = rule(step)
            except Exception as error:
                found = constant(UNKNOWN, 0)
                cause = cause or f"after {func}, which is not followed here: {error}"
        several = found if isinstance(found, list) else [found] * len(results)
        if len(several) != len(results):
            several = [several[0]] * len(results)
        varies = rule not in _WITHOUT_VALUES and any(owned.varies for owned in known)
        mask = bool(known) and all(owned.mask for owned in known)
        by_data = step.by_data or _is_by_data(rule, known)
        for owners, result in zip(several, results, strict=True):
            if owners.dim() != result.dim():
                value = int(fold(owners, range(owners.dim())).flatten()[0]) if owners.dim() else int(owners)
                owners = constant(value, result.dim())
            if not known and owners.numel() == 1 and int(owners) == SHARED:
                continue
            mixed = not cause and bool((owners == MIXED).any())
            before = self.known(result)
            self._set(result, Owned(owners, varies, by_data, f"since {func}" if mixed else cause, mask))
            if func._schema.is_mutable:
                self._spread(func, result, before)

    def _follow_without_results(self, func: Any, args: Any, kwargs: Any) -> None:
        """Ops that change lists of tensors: what they leave behind is not followed."""
        if not func._schema.is_mutable or rules.rule_for(func) is rules.lora:
            return
        leaves, _ = tree_flatten((args, kwargs))
        for tensor in leaves:
            if isinstance(tensor, Tensor):
                before = self.known(tensor)
                unknown = constant(UNKNOWN, tensor.dim())
                self._set(tensor, Owned(unknown, by_data=True, cause=f"after {func}, which is not followed"))
                self._spread(func, tensor, before)

    def _note_alias(self, tensor: Tensor) -> None:
        """Remember who looks into which memory."""
        key = tensor.untyped_storage()._cdata
        known = self._aliases.setdefault(key, [])
        known[:] = [reference for reference in known if reference() is not None]
        if not any(reference() is tensor for reference in known):
            known.append(weakref.ref(tensor))

    def _spread(self, func: Any, target: Tensor, before: Owned | None) -> None:
        """A write into a tensor is one into all that look into the same memory."""
        owned = self.known(target)
        if owned is None:
            return
        if before is not None and _same(before.owners, owned.owners) and owned.by_data == before.by_data:
            return
        references = self._aliases.get(target.untyped_storage()._cdata, [])
        others = [other for reference in references if (other := reference()) is not None and other is not target]
        if not others:
            return
        size = target.untyped_storage().nbytes() // target.element_size()
        alike = all(other.dtype == target.dtype for other in others)
        flat = torch.full((size if alike and size <= _LARGEST else 0,), SHARED, dtype=torch.int32)
        for other in sorted(others, key=lambda other: other.numel()):
            known = self.known(other)
            if known is not None and len(flat):
                part = flat.as_strided(other.shape, other.stride(), other.storage_offset())
                part.copy_(known.owners.expand(other.shape))
        if len(flat):
            part = flat.as_strided(target.shape, target.stride(), target.storage_offset())
            part.copy_(owned.owners.expand(target.shape))
        for other in others:
            owners, cause = constant(MIXED, other.dim()), f"written through another view by {func}"
            if len(flat):
                owners = compress(flat.as_strided(other.shape, other.stride(), other.storage_offset()).clone())
                cause = owned.cause
            known = self.known(other)
            by_data = owned.by_data or (known is not None and known.by_data)
            self._set(other, Owned(owners, True, by_data, cause))

    def _set(self, tensor: Tensor, owned: Owned) -> None:
        self._note_alias(tensor)
        marks = vars(tensor).setdefault(_ATTRIBUTE, {})
        if id(self) not in marks:
            self._labelled.append(weakref.ref(tensor))
        marks[id(self)] = owned


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _is_by_data(rule: Callable[..., Any] | None, known: list[Owned]) -> bool:
    """Whether values decide the order of the rows of a result."""
    owned = [tensor for tensor in known if bool((tensor.owners >= 0).any())]
    if not any(tensor.by_data for tensor in owned):
        return False
    if rule in _MEETING:
        real = [tensor for tensor in owned if not tensor.by_data]
        return not any(bool(((tensor.owners >= 0) & (tensor.owners < GUESS)).all()) for tensor in real)
    return True
