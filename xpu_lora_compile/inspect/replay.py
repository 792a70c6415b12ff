"""Runs of a graph in which each call that adds LoRA is kept, compared and put right: what `verify` is made of."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from xpu_lora_compile.kernels import rounds_before_adding
from xpu_lora_compile.ops import (
    BGMV_EXPAND,
    BGMV_EXPAND_SLICE,
    BGMV_SHRINK,
    LORA_LINEAR,
    LORA_LINEARS,
)
from xpu_lora_compile.ops.budget import Budget, budget_of
from xpu_lora_compile.passes.calls import EXPANDS, LoraNode
from xpu_lora_compile.rows.inputs import leaves

# How far, relative to its norm, an operand may be from that of the eager run when everything before it has been given
# the eager run's values: only differences between two runs of the same ops remain.
_SAME_OPERAND = 1e-2


class EagerCall:
    """The operands of one call in the eager run of the original graph, and what it made of them."""

    def __init__(
        self,
        output: Tensor,
        slices: list[tuple[int, int]],
        inputs: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        indices: Tensor,
        scaling: float = 1.0,
        adapter_weights: Tensor | None = None,
    ) -> None:
        self.adapter_weights = adapter_weights
        self.output, self.slices = output, slices
        # Before rank space: for a call of expand, those of the shrink that filled its buffer.
        self.inputs, self.a, self.b, self.indices, self.scaling = inputs, a, b, indices, scaling
        self.hidden, self.adds = inputs, True
        self.before = self.columns_of(output).clone()
        self.after = self.before

    def columns_of(self, output: Tensor) -> Tensor:
        """The columns that the call adds to, slice beside slice."""
        return torch.cat([output[:, offset : offset + width] for offset, width in self.slices], 1)


class Eager(Interpreter):
    """Runs the original graph and keeps each call's operands, with the exact origin of what rank buffers hold."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.sites: list[EagerCall] = []
        # By where a rank vector lies in memory: what shrink computed it from, and what it wrote.
        self.origins: dict[Any, tuple[dict[str, Any], Tensor]] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a call, taking note of ours."""
        op = getattr(target, "default", target)
        site = self._site(op, _bind(op, args, kwargs)) if op in (BGMV_EXPAND, BGMV_EXPAND_SLICE, LORA_LINEAR) else None
        origin = _bind(op, args, kwargs) if op is BGMV_SHRINK else None
        result = super().call_function(target, args, kwargs)
        if origin is not None:
            hidden = origin["output_tensor"][:, : origin["lora_a_weights"].shape[-2]]
            self.origins[_where(hidden)] = {**origin, "inputs": origin["inputs"].clone()}, hidden.clone()
        if site is not None:
            site.after = site.columns_of(site.output if result is None else result).clone()
            self.sites.append(site)
        return self._follow(result, target, args)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a call, following copies of rank vectors."""
        return self._follow(super().call_method(target, args, kwargs), target, args)

    def _follow(self, result: Any, target: Any, args: Any) -> Any:
        if target == "copy_" or target is torch.ops.aten.copy_.default:
            known = self.origins.get(_where(args[1])) if isinstance(args[1], Tensor) else None
            if known is not None:
                self.origins[_where(args[0])] = known[0], args[0].clone()
        return result

    def _site(self, op: Any, given: dict[str, Any]) -> EagerCall:
        inputs, indices = given["inputs"].clone(), given["lora_indices_tensor"]
        if op is LORA_LINEAR:
            slices = [(o, b.shape[-2]) for o, b in zip(given["slice_offsets"], given["lora_b"], strict=True)]
            stacks, more = (given["lora_a"], given["lora_b"]), (given["scaling"], given["adapter_weights"])
            return EagerCall(given["base"], slices, inputs, *stacks, indices, *more)
        output, b = given["output_tensor"], given["lora_b_weights"]
        width = min(b.shape[-2], output.shape[1])
        site = EagerCall(output, [(given.get("slice_offset", 0), width)], inputs, [], [b[..., :width, :]], indices)
        site.hidden, site.adds = inputs, given["add_inputs"]
        origin, wrote = self.origins.get(_where(given["inputs"]), (None, inputs))
        # Only if nothing has changed the buffer since, and if it was for the same rows.
        if (
            origin is not None
            and torch.equal(_bits(wrote), _bits(inputs))
            and torch.equal(origin["lora_indices_tensor"], indices)
        ):
            site.inputs, site.a, site.scaling = origin["inputs"], [origin["lora_a_weights"]], origin["scaling"]
        return site


class Forced(Interpreter):
    """Runs the rewritten graph, compares each call, and goes on with the eager run's values."""

    def __init__(self, module: GraphModule, work: dict[str, list[int]], sites: list[EagerCall]) -> None:
        super().__init__(module)
        self.work, self.sites = work, sites
        self.layouts: dict[str, Layout] = {}
        self.excesses: dict[int, tuple[float, tuple[int, int]]] = {}
        self.reads_the_same: dict[int, bool] = {}

    def run_node(self, n: Node) -> Any:
        """Run a node; compare it where it does the work of sites."""
        if n.name not in self.work:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        op = getattr(n.target, "default", n.target)
        layout = self.layouts[n.name] = Layout(op, _bind(op, args, kwargs), self.work[n.name], self.sites)
        bases = [base.clone() for base in layout.bases]
        inputs = layout.inputs.clone()
        for number, (site, places) in layout.sites.items():
            same = is_close(inputs, site.hidden if layout.is_expand else site.inputs)
            columns = [bases[at][:, offset : offset + width] for at, offset, width in places]
            self.reads_the_same[number] = same and is_close(torch.cat(columns, 1), site.before)
        result = super().run_node(n)
        results = layout.bases if result is None else [result] if isinstance(result, Tensor) else result
        self.excesses.update(layout.excesses(bases, inputs, results))
        for site, places in layout.sites.values():
            done = 0
            for at, offset, width in places:
                results[at][:, offset : offset + width] = site.after[:, done : done + width]
                done += width
        return result


# The bases, the inputs and the results of a call.
Tapped: TypeAlias = tuple[list[Tensor], Tensor, list[Tensor]]


class Layout:
    """Which columns of which outputs of a final call belong to which site."""

    def __init__(self, op: Any, given: dict[str, Any], numbers: list[int], sites: list[EagerCall]) -> None:
        self.is_expand = op in EXPANDS
        first = next(iter(given.values()))
        self.bases: list[Tensor] = list(first) if isinstance(first, list | tuple) else [first]
        self.inputs: Tensor = given["inputs"]
        if self.is_expand:
            places = [(0, given.get("slice_offset", given.get("offset", 0)))]
        else:
            offsets = given["slice_offsets"]
            targets = given.get("slice_outputs", ([0] * len(offsets)))
            places = list(zip(targets, offsets, strict=True))
        self.sites: dict[int, tuple[EagerCall, list[tuple[int, int, int]]]] = {}
        for number in numbers:
            widths = [width for _, width in sites[number].slices]
            mine, places = places[: len(widths)], places[len(widths) :]
            # A call that has lost slices leaves sites out, which then are in nobody's layout.
            if len(mine) == len(widths):
                self.sites[number] = sites[number], [(*place, width) for place, width in zip(mine, widths, strict=True)]

    def excesses(
        self, bases: Sequence[Tensor], inputs: Tensor, results: Sequence[Tensor]
    ) -> dict[int, tuple[float, tuple[int, int]]]:
        """For each site its worst error as a fraction of its budget, and where; what is beside all slices is each's."""
        found: dict[int, tuple[float, tuple[int, int]]] = {}
        for at, (base, result) in enumerate(zip(bases, results, strict=True)):
            if not any(target == at for _, places in self.sites.values() for target, *_ in places):
                continue
            budget = self._budget(at, base, inputs)
            excess = budget.excess(result)
            # What overflows, or is not a number to begin with, has no error.
            overflows = ~budget.exact.to(result.dtype).isfinite() & ~result.detach().cpu().isfinite()
            excess = torch.where(overflows, 0.0, excess)
            beside = torch.ones(excess.shape[1], dtype=torch.bool)
            columns: dict[int, Tensor] = {}
            for number, (_, places) in self.sites.items():
                mine = torch.zeros_like(beside)
                for target, offset, width in places:
                    mine[offset : offset + width] |= target == at
                beside &= ~mine
                if mine.any():
                    columns[number] = mine
            for number, mine in columns.items():
                worst = torch.where(mine | beside, excess, 0.0)
                if worst.numel():
                    row, column = divmod(int(worst.argmax()), worst.shape[1])
                    found[number] = max(found.get(number, (0.0, (0, 0))), (float(worst.max()), (row, column)))
                found.setdefault(number, (0.0, (0, 0)))
        return found

    def _budget(self, at: int, base: Tensor, inputs: Tensor) -> Budget:
        slices = [
            (site, s, offset)
            for site, places in self.sites.values()
            for s, (target, offset, _) in enumerate(places)
            if target == at
        ]
        site, rounds_early = slices[0][0], rounds_before_adding(base.device.type)
        if self.is_expand:
            ((_, _, offset),) = slices
            given = {"output_tensor": base, "inputs": inputs, "lora_b_weights": site.b[0], "indices": site.indices}
            size = {"slice_offset": offset, "slice_size": site.b[0].shape[-2], "add_inputs": site.adds}
            return budget_of("bgmv_expand_slice", {**given, **size}, rounds_before_adding=rounds_early)
        return budget_of(
            "lora_linear",
            {
                "base": base,
                "inputs": inputs,
                "lora_a": [site.a[s] for site, s, _ in slices],
                "lora_b": [site.b[s] for site, s, _ in slices],
                "indices": site.indices,
                "slice_offsets": [offset for _, _, offset in slices],
                "scaling": site.scaling,
                "ranks": None,
                "adapter_weights": site.adapter_weights,
            },
            rounds_before_adding=rounds_early,
        )


class Taps:
    """A graph that returns, besides its own results, each call's operands and results."""

    def __init__(self, module: GraphModule, names: Sequence[str]) -> None:
        graph = module.graph
        self.names = list(names)
        # Of each call: how many outputs it has.
        self.counts: list[int] = []
        taps: list[Node] = []
        nodes = {node.name: node for node in graph.nodes}
        for name in names:
            node = nodes[name]
            call = LoraNode(node)
            op, inputs, bases = call.op, call.inputs, call.outputs
            with graph.inserting_before(node):
                taps += [graph.call_function(torch.clone, (operand,)) for operand in (inputs, *bases)]
            with graph.inserting_after(node):
                if op is LORA_LINEARS:
                    results = [graph.call_function(operator.getitem, (node, at)) for at in range(len(bases))]
                else:
                    results = [node] if op is LORA_LINEAR else bases
            last = max((node, *results), key=list(graph.nodes).index) if op is LORA_LINEARS else node
            with graph.inserting_after(last):
                # Each is put in front of the one before.
                taps += reversed([graph.call_function(torch.clone, (result,)) for result in reversed(results)])
            self.counts.append(len(bases))
        output = next(node for node in reversed(graph.nodes) if node.op == "output")
        self.own = len(output.args[0])
        output.args = ((*output.args[0], *taps),)
        module.recompile()

    def split(self, results: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Tapped]]:
        """The graph's own results; and of each call its bases, its inputs and its results."""
        rest, tapped = list(results[self.own :]), {}
        for name, count in zip(self.names, self.counts, strict=True):
            inputs, bases, after = rest[0], rest[1 : 1 + count], rest[1 + count : 1 + 2 * count]
            tapped[name] = bases, inputs, after
            rest = rest[1 + 2 * count :]
        return tuple(results[: self.own]), tapped


def copy_of(module: GraphModule) -> GraphModule:
    """The same module with a graph of its own, whose nodes keep their names."""
    graph = Graph()
    result = graph.graph_copy(module.graph, {})
    graph.output(result)
    return GraphModule(module, graph)


def _bind(op: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments by name."""
    given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False))
    defaults = {
        argument.name: argument.default_value for argument in op._schema.arguments if argument.has_default_value()
    }
    return {argument.name: {**defaults, **given, **kwargs}[argument.name] for argument in op._schema.arguments}


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that a NaN equals itself."""
    return tensor.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


def _where(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same but for the rounding of a few ops: by the norm of what is finite in both."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    if one.element_size() == 1:
        # Few ops take eight bits.
        one, other = one.float(), other.float()
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return False
    difference = torch.where(finite, one.double() - other.double(), 0.0).norm()
    return bool(difference <= _SAME_OPERAND * torch.where(finite, other.double(), 0.0).norm())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and mappings."""
    return (leaf for leaf in leaves(value) if isinstance(leaf, Tensor))
