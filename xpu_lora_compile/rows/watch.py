"""`Watch`: follow the owners of all tensors through one run of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from xpu_lora_compile.rows import rules
from xpu_lora_compile.rows.layout import Layout, fit
from xpu_lora_compile.rows.owners import GUESS, MIXED, SHARED, UNKNOWN, Owned, compress, constant, fold, merge
from xpu_lora_compile.torch_internals import decomposed, is_composite, without_modes

# Operands of these meet where they are broadcast to: one that has an owner everywhere is enough to know whose the
# result is, in whatever order the others came.
_MEETING = {rules.pointwise, rules.product, rules.product_and_sum, rules.attention, rules.lora}
_WITHOUT_VALUES = {rules.filled, rules.factory, rules.numbers}
_ATTRIBUTE = "_xpu_lora_owned"


class Watch(TorchDispatchMode):
    """While it is entered, each op of ATen passes the owners of its operands on to its results.

    Args:
        batch: the number of sequences.
        lengths: of the sequences, where their tokens lie in one row; see `rules.attend`.
    """

    def __init__(self, batch: int, lengths: tuple[int, ...] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch = batch
        self.lengths = lengths
        self._labelled: list[weakref.ref[Tensor]] = []

    def own(self, tensor: Tensor, owners: Tensor, cause: str = "", *, varies: bool = True) -> None:
        """Say whose the elements of a tensor are."""
        self._set(tensor, Owned(owners, varies=varies, cause=cause))

    def known(self, tensor: Tensor) -> Owned | None:
        """What is known of a tensor; None for constants."""
        marks = vars(tensor).get(_ATTRIBUTE)
        return None if marks is None else marks.get(id(self))

    def layout_of(self, inputs: Tensor, features: int) -> Layout | str:
        """The layout of a layer's input, or what is wrong with it.

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
        found = fit(owners, inputs.shape[:rows], self.batch, self.lengths)
        if isinstance(found, Layout) and owned.by_data:
            found = "the model computes by an index which rows these are"
        if isinstance(found, str):
            return f"{found} ({owned.cause})" if owned.cause else found
        # Whoever the rows were guessed to belong to: they are theirs once they have got their adapter.
        if bool((owned.owners >= GUESS).any()):
            owned.owners = torch.where(owned.owners >= GUESS, owned.owners - GUESS, owned.owners)
        return found

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
        if is_composite(func):
            with self:
                result = decomposed(func, args, kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        results = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        if results and func.namespace != "prim":
            with without_modes(), torch.no_grad():
                self._follow(func, args, kwargs, results)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        rule = rules.rule_for(func)
        step = rules.Step(func, args, kwargs, results, self.known, self.batch, self.lengths is not None)
        known = [owned for tensor in step.tensors if (owned := self.known(tensor)) is not None]
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
        by_data = step.by_data or _is_by_data(rule, known)
        for owners, result in zip(several, results, strict=True):
            if owners.dim() != result.dim():
                value = int(fold(owners, range(owners.dim())).flatten()[0]) if owners.dim() else int(owners)
                owners = constant(value, result.dim())
            if not known and owners.numel() == 1 and int(owners) == SHARED:
                continue
            mixed = not cause and bool((owners == MIXED).any())
            note = f"since {func}" if mixed else cause
            base = self._base(func, args, kwargs, result)
            self._set(result, Owned(owners, varies, by_data, note, base))
        if func._schema.is_mutable:
            self._write_through(func, args, results)

    def _base(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> tuple[Tensor, Any] | None:
        """For a view: what it looks into, and how."""
        returns = func._schema.returns
        if len(returns) != 1 or returns[0].alias_info is None or func._schema.is_mutable or not args:
            return None
        source = args[0]
        if not isinstance(source, Tensor) or returns[0].type.kind() == "ListType":
            return None
        return source, lambda tensor: func(tensor, *args[1:], **kwargs)

    def _write_through(self, func: Any, args: Any, results: list[Tensor]) -> None:
        """A write into a view is one into what it looks into."""
        target = results[0]
        owned = self.known(target)
        if owned is None or owned.base is None or (rules.is_fake(target) and owned.owners.numel() > 1):
            return
        source, view = owned.base
        before = self.known(source)
        full = (constant(SHARED, source.dim()) if before is None else before.owners).expand(source.shape).clone()
        part = view(full)
        part.copy_(merge([part.clone(), owned.owners]).expand(part.shape))
        merged = Owned(compress(full), owned.varies, owned.by_data, owned.cause)
        merged.base = None if before is None else before.base
        self._set(source, merged)
        if merged.base is not None:
            self._write_through(func, args, [source])

    def _set(self, tensor: Tensor, owned: Owned) -> None:
        marks = vars(tensor).setdefault(_ATTRIBUTE, {})
        if id(self) not in marks:
            self._labelled.append(weakref.ref(tensor))
        marks[id(self)] = owned


def _is_by_data(rule: Callable[..., Any] | None, known: list[Owned]) -> bool:
    """Whether values decide the order of the rows of a result."""
    owned = [one for one in known if bool((one.owners >= 0).any())]
    if not any(one.by_data for one in owned):
        return False
    if rule in _MEETING or rule is rules.written:
        return not any(not one.by_data and bool((one.owners >= 0).all()) for one in owned)
    return True
