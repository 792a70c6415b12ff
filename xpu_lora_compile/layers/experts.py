"""Mixtures of experts as transformers 5 stores them: the weights of all experts in one tensor each.

    gate_up = experts(x)  + LoRA    ->  activation  ->  down = experts(y)  + LoRA  ->  times the router's weight, summed

A row of a product is a pair of a token and one of its experts; its adapter's weights are those of (slot, expert). They
lie in pages: page p holds one expert's A and B of one adapter, and a table says which page each (slot, expert) has. So
an adapter takes memory for the experts that it changes, and to the op a page is what a slot is to other layers.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import groupby
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from xpu_lora_compile.adapters.checkpoint import ModuleSizes
from xpu_lora_compile.errors import AttachError, NoFreePageError
from xpu_lora_compile.layers.host import (
    Host,
    LoraLayer,
    added_in_place,
    empty_b,
    full_name,
    layer_class,
    routing_of,
)
from xpu_lora_compile.ops import SORTED_INDICES
from xpu_lora_compile.ops.lora_linear import tiles_eagerly
from xpu_lora_compile.torch_internals import runs_plainly

# The module of transformers whose decorator gives classes of experts their forward.
_MOE = "transformers.integrations.moe"
_LLAMA_4 = "transformers.models.llama4.modeling_llama4.Llama4TextExperts"
# Parameters that can carry LoRA, by the product that they are of.
_UP, _GATE_UP, _DOWN = "up_proj", "gate_up_proj", "down_proj"
# What a forward of transformers computes, in the order of the rows that it has here.
_SORTED = ("eager", "grouped_mm")
# Of up to so many experts a token's rows are added one by one in a compiled graph.
_UNROLLED = 16
# Held while pages are taken: two adapters may be loaded at once.
_FILLING = threading.Lock()


class _Pages(NamedTuple):
    """The page of each row, and what the calls for both products share that is computed from it."""

    indices: Tensor
    tiles: Tensor | None


class _Pairs(NamedTuple):
    """Pairs of a token and one of its experts: the rows of both products."""

    # Which pair each row is; None where they are in the order of the tokens.
    order: Tensor | None
    tokens: Tensor
    experts: Tensor
    # What computes a product without LoRA, and where each expert's rows end or which each row has, as that wants it.
    product: Callable[..., Tensor]
    ends: Tensor
    pages: _Pages


class ExpertsLayer(LoraLayer):
    """Experts of a mixture, each with the LoRA of each row's own adapter.

    Buffers: `lora_a_<parameter>` `[P, R, D]` and `lora_b_<parameter>` `[P, W, R]`, the pages, with scaling folded into
    B; `lora_pages` `[K + 1, E]`, int64: the page of each expert of each slot, or -1. The last row is that of tokens
    without an adapter, whose slot is -1.

    Attributes:
        lora_parameters: which parameters carry LoRA, with their sizes.
    """

    lora_takes_one_input = False
    lora_parameters: dict[str, ModuleSizes]
    lora_pages: Tensor

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # type: ignore[override]
        """The output of all experts, with each token's adapter added while a `bank.use` block runs.

        Args:
            hidden_states: `[T, D]`.
            top_k_index: `[T, k]`, the experts of each token.
            top_k_weights: `[T, k]`, the router's weight of each.
        """
        slots = routing_of(self).rows_of(self, hidden_states, 1)
        if slots is None:
            return self.without_lora(hidden_states, top_k_index, top_k_weights)
        module = cast("Any", self)
        pairs = self._pairs(top_k_index, slots)
        rows = self._product(_GATE_UP if module.has_gate else _UP, hidden_states[pairs.tokens], pairs)
        rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
        rows = self._product(_DOWN, rows, pairs)
        # Of transformers from 5.20 on.
        if getattr(module, "has_post_expert_norm", False):
            rows = module.post_expert_norm(rows)
        return _summed(rows, pairs.order, top_k_weights).to(hidden_states.dtype)

    def without_lora(self, *inputs: Tensor) -> Tensor:
        """The output of the experts alone."""
        return cast("Tensor", super(LoraLayer, self).forward(*inputs))

    def _pairs(self, top_k_index: Tensor, slots: Tensor) -> _Pairs:
        """The pairs of tokens and experts in the order that this form of the products wants."""
        module, count = cast("Any", self), top_k_index.shape[-1]
        form = module.config._experts_implementation
        if form in _SORTED:
            return self._sorted_pairs(top_k_index, slots)
        if form == "batched_mm":
            experts = top_k_index.reshape(-1)
            tokens = torch.arange(top_k_index.shape[0], device=experts.device).repeat_interleave(count)
            pages = self._pages(self.lora_pages[slots[tokens], experts])
            return _Pairs(None, tokens, experts, _batched, experts, pages)
        raise AttachError(
            f"attach: {self.lora_name}",
            f"an experts_implementation of {', '.join((*_SORTED, 'batched_mm'))}",
            repr(form),
            'Call model.set_experts_implementation("grouped_mm").',
        )

    def _sorted_pairs(self, top_k_index: Tensor, slots: Tensor) -> _Pairs:
        """The pairs by expert, and those of one expert by slot: so the rows of a page lie together, too."""
        table_rows, experts = self.lora_pages.shape
        count, flat = top_k_index.shape[-1], top_k_index.flatten()
        if _is_few(flat, experts):
            expert, order = torch.sort(flat)
            tokens = order // count
            pages = self._pages(self.lora_pages[slots[tokens], expert])
            return _Pairs(order, tokens, expert, _one_by_one, expert, pages)
        groups, order = self.sorted_groups(top_k_index, slots)
        ends, codes = self.ends_of(groups), self.page_of_group()
        if is_compiling():
            pages = _Pages(SORTED_INDICES(groups, codes, ends), None)
        else:
            pages = self._pages(codes[groups], ends, codes)
        ends_of_experts = ends[table_rows - 1 :: table_rows].contiguous()
        return _Pairs(order, order // count, groups // table_rows, _grouped, ends_of_experts, pages)

    def sorted_groups(self, top_k_index: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Sort the pairs of tokens and experts by groups: those of one expert and one slot, or no adapter.

        Args:
            top_k_index: `[T, k]`, the experts of each token.
            slots: `[T]`, -1 for none.

        Returns:
            The group of each row, in order, and which pair each row is: `[T k]`, int64.
        """
        table_rows, experts = self.lora_pages.shape
        # Of fewer bits, fewer are sorted by.
        dtype = torch.int16 if table_rows * experts < 1 << 15 else torch.int32
        group = top_k_index * table_rows + torch.remainder(slots, table_rows).unsqueeze(1)
        groups, order = torch.sort(group.flatten().to(dtype))
        return groups.long(), order

    def ends_of(self, groups: Tensor) -> Tensor:
        """`[G]`, int32: where each group ends among rows that are sorted by them."""
        bounds = torch.arange(self.lora_pages.numel(), device=groups.device)
        return torch.searchsorted(groups, bounds, right=True, out_int32=True)

    def page_of_group(self) -> Tensor:
        """`[G]`, int64: the page of each group of `sorted_groups`, or -1."""
        return self.lora_pages.t().flatten()

    def _product(self, name: str, rows: Tensor, pairs: _Pairs) -> Tensor:
        module = cast("Any", self)
        bias = getattr(module, f"{name}_bias")[pairs.experts] if module.has_bias else None
        output: Tensor = pairs.product(rows, getattr(module, name), pairs.ends, bias, module.is_transposed)
        return self._with_lora(name, output, rows, pairs.pages)

    def _pages(self, indices: Tensor, ends: Tensor | None = None, codes: Tensor | None = None) -> _Pages:
        stack = cast("Tensor", self._buffers[f"lora_a_{next(iter(self.lora_parameters))}"])
        return _Pages(indices, tiles_eagerly(indices, stack, ends, codes))

    def _with_lora(self, name: str, output: Tensor, rows: Tensor, pages: _Pages) -> Tensor:
        if name not in self.lora_parameters:
            return output
        a, b = (cast("Tensor", self._buffers[f"lora_{factor}_{name}"]) for factor in "ab")
        return added_in_place(output, rows, a, b, pages.indices, tiles=pages.tiles)

    @property
    def lora_stacks(self) -> dict[str, Tensor]:
        """All memory for adapters."""
        names = (f"lora_{factor}_{name}" for name in self.lora_parameters for factor in "ab")
        return {name: cast("Tensor", self._buffers[name]) for name in names} | {"lora_pages": self.lora_pages}

    @property
    def lora_factors(self) -> list[Tensor]:
        """A and B of all pages, of each parameter."""
        return [stack for name, stack in self.lora_stacks.items() if name != "lora_pages"]

    @property
    def slot_count(self) -> int:
        """K."""
        return len(self.lora_pages) - 1

    @property
    def page_count(self) -> int:
        """P."""
        return len(self.lora_factors[0])

    def fill(self, slot: int, experts: list[int], weights: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Give a slot, which is empty, pages for some experts, and fill them.

        Args:
            slot: of the bank.
            experts: their numbers.
            weights: for each parameter A `[n, r, D]` and B `[n, W, r]` of these experts; none of a parameter without.

        Raises:
            NoFreePageError: more experts than there are free pages.
        """
        with _FILLING:
            table, pages = self.lora_pages, self.page_count
            taken = set(table[table >= 0].tolist())
            free = [page for page in range(pages) if page not in taken][: len(experts)]
            if len(free) < len(experts):
                raise NoFreePageError(
                    f"load: {self.lora_name}",
                    f"free pages for {len(experts)} experts",
                    f"{pages - len(taken)} of {pages}",
                    "Drop an adapter, or attach with more: xlc.attach(model, expert_pages=...).",
                )
            place = torch.tensor(free, dtype=torch.int64, device=table.device)
            for name in self.lora_parameters:
                for factor, stack in zip("ab", (0, 1), strict=True):
                    buffer = cast("Tensor", self._buffers[f"lora_{factor}_{name}"])
                    buffer[place] = 0
                    if name in weights:
                        values = weights[name][stack].to(buffer.device, buffer.dtype)
                        buffer[place, : values.shape[1], : values.shape[2]] = values
            table[slot].fill_(-1)
            table[slot, torch.tensor(experts, dtype=torch.int64, device=table.device)] = place

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        with _FILLING:
            self.lora_pages[slot].fill_(-1)

    def restore(self) -> None:
        """As `LoraLayer.restore`."""
        for name in self.lora_stacks:
            delattr(self, name)
        for name in ("lora_parameters", "lora_routing", "lora_name", "lora_site"):
            delattr(self, name)
        self.become_base()


class DenseExpertsLayer(ExpertsLayer):
    """Experts that are each given all tokens, as those of Llama 4: rows of tokens that are not theirs are zeros."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """The output of all experts, with each token's adapter added while a `bank.use` block runs.

        Args:
            hidden_states: `[E T, D]`, all tokens of the first expert first.
        """
        slots = routing_of(self).rows_of(self, hidden_states, 1)
        if slots is None:
            return self.without_lora(hidden_states)
        module = cast("Any", self)
        experts = torch.arange(module.num_experts, device=slots.device)
        experts = experts.repeat_interleave(hidden_states.shape[0] // module.num_experts)
        # What is zeros stays so: no LoRA is read for it.
        pages = self._pages(torch.where(hidden_states.any(1), self.lora_pages[slots, experts], -1))
        gate, up = self._dense(_GATE_UP, hidden_states, pages).chunk(2, -1)
        return self._dense(_DOWN, up * module.act_fn(gate), pages)

    def _dense(self, name: str, rows: Tensor, pages: _Pages) -> Tensor:
        weight = getattr(cast("Any", self), name)
        output = torch.bmm(rows.view(weight.shape[0], -1, weight.shape[1]), weight).view(-1, weight.shape[2])
        return self._with_lora(name, output, rows, pages)


def _summed(rows: Tensor, order: Tensor | None, weights: Tensor) -> Tensor:
    """The rows of each token's experts, times the router's weights, summed: `[T, D]`.

    Args:
        rows: `[T k, D]`.
        order: which pair each row is; None where they are in order.
        weights: `[T, k]`.
    """
    count, features = weights.shape[-1], rows.shape[-1]
    if order is not None and rows.device.type == "cpu" and _is_plain(rows, order):
        rows, order = torch.empty_like(rows).index_copy_(0, order, rows), None
    if order is None:
        return (rows * weights.reshape(-1, 1)).view(-1, count, features).sum(1)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0], device=order.device)
    if is_compiling() and count <= _UNROLLED and not torch.is_grad_enabled():
        # Inductor makes one pass over memory of it: a sum over a dimension takes it twice as long on an H200. (A
        # backward pass would take one for each of a token's experts.)
        places, dtype = places.view(-1, count), torch.promote_types(rows.dtype, torch.float32)
        parts = (rows[places[:, at]] * weights[:, at, None] for at in range(count))
        return cast("Tensor", sum(part.to(dtype) for part in parts))
    return (rows[places] * weights.reshape(-1, 1)).view(-1, count, features).sum(1)


def _is_plain(*operands: Tensor) -> bool:
    """Return whether nothing looks at calls of ops on these tensors."""
    return not is_compiling() and runs_plainly(*operands)


def _is_few(experts: Tensor, count: int) -> bool:
    """Return whether rows are so few that on a CPU most time of a grouped product goes to experts without any."""
    return experts.device.type == "cpu" and _is_plain(experts) and 0 < 4 * experts.shape[0] <= count


def _one_by_one(rows: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
    """The same product as `_grouped`, of a few rows that are sorted by expert."""
    used = [(expert, len([*same])) for expert, same in groupby(experts.tolist())]
    parts = rows.to(weight.dtype).split([count for _, count in used])
    products = [
        part @ weight[expert] if is_transposed else nn.functional.linear(part, weight[expert])
        for (expert, _), part in zip(used, parts, strict=True)
    ]
    output = torch.cat(products)
    return output if bias is None else output.add_(bias)


def _grouped(rows: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
    return cast("Tensor", _of_transformers("_grouped_linear")(rows, weight, ends, bias, is_transposed))


def _batched(rows: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
    return cast("Tensor", _of_transformers("_batched_linear")(rows, weight[experts], bias, is_transposed))


def _of_transformers(name: str) -> Any:
    return getattr(sys.modules[_MOE], name)


class Experts(Host):
    """Classes of experts whose forward transformers 5 has made."""

    name = "experts of transformers 5"
    mixin = ExpertsLayer
    has_weight = False

    def takes_class(self, kind: type[nn.Module]) -> bool:
        """Return whether it is a class whose forward the decorator of transformers has made, or that of Llama 4."""
        # That of a module of TorchScript cannot be asked for.
        forward = inspect.getattr_static(kind, "forward", None)
        is_made = isinstance(forward, FunctionType) and forward.__globals__.get("__name__") == _MOE
        return is_made or full_name(kind) == _LLAMA_4

    def layer(self, module: nn.Module) -> type[LoraLayer]:
        """As `Host.layer`."""
        return layer_class(DenseExpertsLayer if full_name(type(module)) == _LLAMA_4 else ExpertsLayer, type(module))

    def takes(self, module: nn.Module) -> bool:
        """Return whether its weights are floating numbers, and all of its experts are here."""
        # Asked first, since a module of TorchScript has no such dict.
        if not self.takes_class(type(module)) or getattr(module, "_is_expert_parallel", False):
            return False
        weights = [module._parameters.get(name) for name in self._names(module)]
        return all(weight is not None and weight.dim() == 3 and _is_computed_in(weight) for weight in weights)

    def site(self, module: nn.Module) -> ModuleSizes:
        """Return the sizes of the first product."""
        return next(iter(self.parameter_sites(module).values()))

    def parameter_sites(self, module: nn.Module) -> dict[str, ModuleSizes]:
        """Return the sizes of each parameter that can carry LoRA; also of a module that has it already."""
        held = cast("Any", module)
        sites: dict[str, ModuleSizes] = {}
        if not (isinstance(module, ExpertsLayer) or self.takes(module)):
            return sites
        # PEFT asks the module whether its weights are transposed. Those of Llama 4 are, and do not say so: PEFT's A is
        # then of what the weight gives, and B of what it takes.
        swaps = not hasattr(module, "is_transposed")
        columns, rows = (1, 2) if swaps or held.is_transposed else (2, 1)
        for name in self._names(module):
            weight = cast("Tensor", module._parameters[name])
            halves = "" if name != _GATE_UP else "one after the other" if swaps or held.is_concatenated else "in turn"
            sizes = weight.shape[columns], weight.shape[rows]
            sites[name] = ModuleSizes(
                "experts", *sizes, padded=False, experts=weight.shape[0], halves=halves, swaps=swaps
            )
        return sites

    @staticmethod
    def _names(module: nn.Module) -> tuple[str, str]:
        return (_GATE_UP if getattr(module, "has_gate", True) else _UP), _DOWN

    def dtype(self, module: nn.Module) -> torch.dtype | None:
        """Return that of the weights."""
        return cast("Tensor", module._parameters[_DOWN]).dtype


def _is_computed_in(weight: Tensor) -> bool:
    return weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def count_pages(slots: int, experts: int, pages: int | None) -> int:
    """Return P, where a caller wants so many pages: more than one for each expert of each slot have no use."""
    return slots * experts if pages is None else min(pages, slots * experts)


def empty_pages(
    host: Experts,
    module: nn.Module,
    ranks: Mapping[str, int],
    slots: int,
    pages: int | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return the buffers of a layer whose slots are empty.

    Args:
        host: of the module.
        module: before it is a layer.
        ranks: R of a page, by the name of each parameter that gets LoRA.
        slots: K.
        pages: P; by default one for each expert of each slot.
        dtype: of the pages.
    """
    device, sites = host.device(module), host.parameter_sites(module)
    experts = next(iter(sites.values())).experts
    count = count_pages(slots, experts, pages)
    # A buffer made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        buffers: dict[str, Tensor] = {}
        for name, rank in ranks.items():
            site = sites[name]
            buffers[f"lora_a_{name}"] = torch.zeros(count, rank, site.in_features, dtype=dtype, device=device)
            buffers[f"lora_b_{name}"] = empty_b(count, site.out_features, rank, dtype, device)
        buffers["lora_pages"] = torch.full((slots + 1, experts), -1, device=device)
        return buffers


def become_layer(host: Experts, module: nn.Module, buffers: Mapping[str, Tensor], parameters: Collection[str]) -> None:
    """Give a module of experts the class and the buffers of one that carries LoRA."""
    sites = host.parameter_sites(module)
    module.__class__ = host.layer(module)
    layer = cast("ExpertsLayer", module)
    ranks = {name: buffers[f"lora_a_{name}"].shape[1] for name in parameters}
    layer.lora_parameters = {name: replace(sites[name], most_rank=rank) for name, rank in ranks.items()}
    for name, buffer in buffers.items():
        layer.register_buffer(name, buffer, persistent=False)
