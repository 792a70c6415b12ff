"""Whether a compiled model computes what it should, call by call: `print(xlc.verify(model)(inputs))`."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node

from xpu_lora_compile.adapters.bank import NO_ADAPTER
from xpu_lora_compile.errors import VerificationError
from xpu_lora_compile.layers import LoraEmbedding, LoraLinear
from xpu_lora_compile.ops import ADD_LORA, BGMV_EXPAND, BGMV_EXPAND_SLICE, BGMV_SHRINK, LORA_LINEAR, LORA_LINEARS
from xpu_lora_compile.ops.budget import Budget, budget_of
from xpu_lora_compile.passes import rewrite
from xpu_lora_compile.passes.decisions import Decision, decisions_on
from xpu_lora_compile.passes.editing import arguments_of
from xpu_lora_compile.passes.find_sites import find_sites
from xpu_lora_compile.passes.memory import input_storages, storages_of, written_by
from xpu_lora_compile.torch_internals import fresh_compilation

# How far, relative to its norm, an operand may be from that of the eager run when everything before it has been given
# the eager run's values: only differences between two runs of the same ops remain.
_SAME_OPERAND = 1e-2


@dataclass
class SiteError:
    """How far one call that adds LoRA is from its exact value.

    Attributes:
        place: the module that makes the call, or its source line.
        rewritten: the worst error of the rewritten graph, run operation by operation on the eager run's values, as a
            fraction of what rounding allows: up to 1 is right.
        compiled: the same for the generated code, on its own values; None where no code was generated.
        reads_the_same: whether the rewritten call reads and adds to what the original one did.
        at: row and column of the worst error.
    """

    place: str
    rewritten: float
    compiled: float | None
    reads_the_same: bool
    at: tuple[int, int]

    @property
    def is_right(self) -> bool:
        """Whether both are within the budget."""
        return self.reads_the_same and self.rewritten <= 1 and (self.compiled is None or self.compiled <= 1)


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        sites: one for each call that adds LoRA, in the order of the graphs.
        output_error: the largest difference between an element of the compiled and the eager model's results,
            relative to the largest element: rounding adds up over a model, so it has no budget.
        unchecked: calls inside subgraphs (of `cond` and the like), which are compiled but not compared one by one.
    """

    sites: list[SiteError]
    output_error: float
    unchecked: int

    def __str__(self) -> str:
        worst = sorted(self.sites, key=lambda site: max(site.rewritten, site.compiled or 0.0), reverse=True)[:5]
        lines = [
            f"{len(self.sites)} sites, {sum(site.is_right for site in self.sites)} of them right; the results of the "
            f"model differ by {self.output_error:.2g} of their largest element.",
            *(f"{self.unchecked} sites in subgraphs were not compared." for _ in range(min(1, self.unchecked))),
            "Worst errors, as fractions of what rounding allows (rewritten graph, generated code):",
        ]
        for site in worst:
            compiled = "-" if site.compiled is None else f"{site.compiled:.3g}"
            wrong = "" if site.is_right else "   WRONG" + ("" if site.reads_the_same else ": it reads something else")
            lines.append(f"  {site.rewritten:8.3g}  {compiled:>8}  {site.place} at {list(site.at)}{wrong}")
        return "\n".join(lines)


def verify(
    model: Callable[..., Any], *, seed: int = 0, generate_code: bool = True
) -> Callable[..., Verification]:
    """Compare a model's compiled LoRA with exact values, call by call: `verify(model)(*args, **kwargs)`.

    Runs the model eagerly and compiled on the same inputs. Where LoRA is attached to it, every slot holds random
    weights meanwhile, and every sequence of the batch a random slot or none; afterwards both are as they were. Each
    call that adds LoRA is compared with its value in float64; what rounding may do is derived, not set.

    Args:
        model: a module or a function. Its inputs are not changed by the call, and random numbers are the same in
            each run.
        seed: of the random weights and slots.
        generate_code: check the code that Inductor generates too; by default yes. Its graph returns each call's
            operands and result besides its own results.

    Returns:
        A function of the model's inputs that runs all this and returns a `Verification`.

    Raises:
        VerificationError: by that function: a call is wrong; names it. Its attribute `verification` has all.

    Example:
        >>> import torch
        >>> import xpu_lora_compile as xlc
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
        >>> bank = xlc.attach(model, slots=2, max_rank=2)
        >>> result = xlc.verify(model, generate_code=False)(torch.randn(5, 4))
        >>> [(site.place, site.is_right) for site in result.sites]
        [('0', True), ('1', True)]
    """

    def run(*args: Any, **kwargs: Any) -> Verification:
        checks: list[_Check] = []

        def backend(module: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
            checks.append(_Check(module, inputs, generate_code))
            return checks[-1].call

        with _random_adapters(model, (args, kwargs), seed), torch.random.fork_rng(), fresh_compilation():
            torch.manual_seed(seed)
            wanted = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            torch.manual_seed(seed)
            got = torch.compile(model, backend=backend)(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        sites = [site for check in checks for site in check.errors]
        result = Verification(sites, _difference(got, wanted), sum(check.unchecked for check in checks))
        wrong = [site for site in sites if not site.is_right]
        if wrong:
            error = VerificationError(
                "verify",
                "every call that adds LoRA within what rounding allows",
                f"{len(wrong)} of {len(sites)} beyond it, the first one {wrong[0].place}\n{result}\n",
                "Set XPU_LORA_FUEL to find the rewrite, and XPU_LORA_DUMP to see it.",
            )
            error.verification = result
            raise error
        return result

    return run


class _Site:
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
    ) -> None:
        self.output, self.slices = output, slices
        # Before rank space: for a call of expand, those of the shrink that filled its buffer.
        self.inputs, self.a, self.b, self.indices, self.scaling = inputs, a, b, indices, scaling
        self.hidden, self.adds = inputs, True
        self.before = self.columns_of(output).clone()
        self.after = self.before

    def columns_of(self, output: Tensor) -> Tensor:
        """The columns that the call adds to, slice beside slice."""
        return torch.cat([output[:, offset : offset + width] for offset, width in self.slices], 1)


# Of a site whose work no call does.
_LOST = (math.inf, (0, 0))


class _Check:
    """One graph of Dynamo: rewritten and compiled, and each of its calls compared when it runs."""

    def __init__(self, module: GraphModule, inputs: Sequence[Tensor], generate_code: bool) -> None:
        find_sites(module.graph)
        decisions = _decisions(module.graph)
        self.places = [decision.place for decision in decisions]
        self.changed = _changed_inputs(module.graph)
        self.original = _copy_of(module)
        self.unchecked = len(rewrite(module)) - len(decisions)
        # The calls that do the sites' work, each with the numbers of its sites.
        numbers = {id(decision): number for number, decision in enumerate(decisions)}
        self.work = {
            node.name: [numbers[id(one)] for one in decisions_on(node)] for node in module.graph.nodes if decisions_on(node)
        }
        self.rewritten = _copy_of(module)
        self.module = module
        self.errors: list[SiteError] = []
        self.taps: _Taps | None = None
        self.compiled: Callable[..., Any] = module.forward
        if generate_code:
            from xpu_lora_compile.backend import generate_code as compiled

            self.taps = _Taps(module, list(self.work))
            self.compiled = compiled(module, inputs, {})

    def call(self, *args: Any) -> Any:
        """Run and compare, and return what the graph returns."""
        state = torch.random.get_rng_state()
        with torch.no_grad():
            eager = _Eager(self.original)
            eager.run(*self._copies(args))
            torch.random.set_rng_state(state)
            forced = _Forced(self.rewritten, self.work, eager.sites)
            forced.run(*self._copies(args))
        torch.random.set_rng_state(state)
        results = self.compiled(*args)
        generated: dict[int, tuple[float, tuple[int, int]]] = {}
        if self.taps is not None:
            results, tapped = self.taps.split(results)
            with torch.no_grad():
                for name, values in tapped.items():
                    generated.update(forced.layouts[name].excesses(*values))
        self.errors = [
            SiteError(
                place,
                forced.excesses.get(number, _LOST)[0],
                None if self.taps is None else generated.get(number, _LOST)[0],
                forced.reads_the_same.get(number, False),
                max(forced.excesses.get(number, _LOST), generated.get(number, (0.0, (0, 0))))[1],
            )
            for number, place in enumerate(self.places)
        ]
        return results

    def _copies(self, args: tuple[Any, ...]) -> list[Any]:
        return [arg.clone() if at in self.changed else arg for at, arg in enumerate(args)]


class _Eager(Interpreter):
    """Runs the original graph and keeps each call's operands, with the exact origin of what rank buffers hold."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.sites: list[_Site] = []
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

    def _site(self, op: Any, given: dict[str, Any]) -> _Site:
        inputs, indices = given["inputs"].clone(), given["lora_indices_tensor"]
        if op is LORA_LINEAR:
            slices = [(o, b.shape[-2]) for o, b in zip(given["slice_offsets"], given["lora_b"], strict=True)]
            return _Site(given["base"], slices, inputs, given["lora_a"], given["lora_b"], indices, given["scaling"])
        output, b = given["output_tensor"], given["lora_b_weights"]
        width = min(b.shape[-2], output.shape[1])
        site = _Site(output, [(given.get("slice_offset", 0), width)], inputs, [], [b[..., :width, :]], indices)
        site.hidden, site.adds = inputs, given["add_inputs"]
        origin, wrote = self.origins.get(_where(given["inputs"]), (None, inputs))
        # Only if nothing has changed the buffer since, and if it was for the same rows.
        if origin is not None and torch.equal(wrote, inputs) and torch.equal(origin["lora_indices_tensor"], indices):
            site.inputs, site.a, site.scaling = origin["inputs"], [origin["lora_a_weights"]], origin["scaling"]
        return site


class _Forced(Interpreter):
    """Runs the rewritten graph, compares each call, and goes on with the eager run's values."""

    def __init__(self, module: GraphModule, work: dict[str, list[int]], sites: list[_Site]) -> None:
        super().__init__(module)
        self.work, self.sites = work, sites
        self.layouts: dict[str, _Layout] = {}
        self.excesses: dict[int, tuple[float, tuple[int, int]]] = {}
        self.reads_the_same: dict[int, bool] = {}

    def run_node(self, n: Node) -> Any:
        """Run a node; compare it where it does the work of sites."""
        if n.name not in self.work:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        op = getattr(n.target, "default", n.target)
        layout = self.layouts[n.name] = _Layout(op, _bind(op, args, kwargs), self.work[n.name], self.sites)
        bases = [base.clone() for base in layout.bases]
        inputs = layout.inputs.clone()
        for number, (site, places) in layout.sites.items():
            same = _is_close(inputs, site.hidden if layout.is_expand else site.inputs)
            columns = [bases[at][:, offset : offset + width] for at, offset, width in places]
            self.reads_the_same[number] = same and _is_close(torch.cat(columns, 1), site.before)
        result = super().run_node(n)
        results = layout.bases if result is None else [result] if isinstance(result, Tensor) else result
        self.excesses.update(layout.excesses(bases, inputs, results))
        for site, places in layout.sites.values():
            done = 0
            for at, offset, width in places:
                results[at][:, offset : offset + width] = site.after[:, done : done + width]
                done += width
        return result


class _Layout:
    """Which columns of which outputs of a final call belong to which site."""

    def __init__(self, op: Any, given: dict[str, Any], numbers: list[int], sites: list[_Site]) -> None:
        self.is_expand = op not in (ADD_LORA, LORA_LINEAR, LORA_LINEARS)
        first = next(iter(given.values()))
        self.bases: list[Tensor] = list(first) if isinstance(first, list | tuple) else [first]
        self.inputs: Tensor = given["inputs"]
        if self.is_expand:
            places = [(0, given.get("slice_offset", given.get("offset", 0)))]
        else:
            offsets = given["slice_offsets"]
            targets = given.get("slice_outputs", given.get("slice_bases", [0] * len(offsets)))
            places = list(zip(targets, offsets, strict=True))
        self.sites: dict[int, tuple[_Site, list[tuple[int, int, int]]]] = {}
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
            excess = self._budget(at, base, inputs).excess(result)
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
        site = slices[0][0]
        if self.is_expand:
            ((_, _, offset),) = slices
            given = {"output_tensor": base, "inputs": inputs, "lora_b_weights": site.b[0], "indices": site.indices}
            size = {"slice_offset": offset, "slice_size": site.b[0].shape[-2], "add_inputs": site.adds}
            return budget_of("bgmv_expand_slice", {**given, **size})
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
            },
        )


class _Taps:
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
            op: Any = getattr(node.target, "default", node.target)
            first, inputs, *_ = arguments_of(node, op)
            bases = list(first) if isinstance(first, list | tuple) else [first]
            with graph.inserting_before(node):
                taps += [graph.call_function(torch.clone, (one,)) for one in (inputs, *bases)]
            with graph.inserting_after(node):
                if op is LORA_LINEARS:
                    results = [graph.call_function(operator.getitem, (node, at)) for at in range(len(bases))]
                else:
                    results = [node] if op is LORA_LINEAR else bases
            last = max((node, *results), key=list(graph.nodes).index) if op is LORA_LINEARS else node
            with graph.inserting_after(last):
                # Each is put in front of the one before.
                taps += reversed([graph.call_function(torch.clone, (one,)) for one in reversed(results)])
            self.counts.append(len(bases))
        output = next(node for node in reversed(graph.nodes) if node.op == "output")
        self.own = len(output.args[0])  # type: ignore[arg-type]
        output.args = ((*output.args[0], *taps),)  # type: ignore[misc]
        module.recompile()

    def split(self, results: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, tuple[list[Tensor], Tensor, list[Tensor]]]]:
        """The graph's own results; and of each call its bases, its inputs and its results."""
        rest, tapped = list(results[self.own :]), {}
        for name, count in zip(self.names, self.counts, strict=True):
            inputs, bases, after = rest[0], rest[1 : 1 + count], rest[1 + count : 1 + 2 * count]
            tapped[name] = bases, inputs, after
            rest = rest[1 + 2 * count :]
        return tuple(results[: self.own]), tapped


@contextmanager
def _random_adapters(model: object, inputs: Any, seed: int) -> Iterator[None]:
    """Random weights in every slot of an attached model, and a random slot or none for each sequence; then as before."""
    layers = [one for one in model.modules() if isinstance(one, LoraLinear | LoraEmbedding)] if isinstance(model, nn.Module) else []
    if not layers:
        yield
        return
    routing = layers[0].lora_routing
    slots, stacks = routing.slots, [(layer.lora_a.clone(), layer.lora_b.clone()) for layer in layers]
    batch = len(slots) if slots is not None else next((len(one) for one in _tensors_in(inputs) if one.dim()), 1)
    random = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for layer in layers:
                for stack in (layer.lora_a, layer.lora_b):
                    # The product of both then adds about as much as a linear layer gives.
                    values = torch.randn(stack.shape, generator=random) / stack.shape[-1] ** 0.5
                    stack.copy_(values)
        number = len(layers[0].lora_a)
        # An adapter first, then none, then the other adapters, in as many rounds as it takes; in any order.
        first, *rest = torch.randperm(number, generator=random).tolist()
        kinds = torch.tensor([first, NO_ADAPTER, *rest])
        chosen = kinds[torch.arange(batch) % len(kinds)][torch.randperm(batch, generator=random)]
        routing.slots = chosen.to(layers[0].lora_a.device)
        yield
    finally:
        routing.slots = slots
        with torch.no_grad():
            for layer, (a, b) in zip(layers, stacks, strict=True):
                layer.lora_a.copy_(a)
                layer.lora_b.copy_(b)


def _decisions(graph: Graph) -> list[Decision]:
    return [decision for node in graph.nodes for decision in decisions_on(node)]


def _changed_inputs(graph: Graph) -> set[int]:
    """The positions of the inputs that the graph writes to."""
    written = {storage for node in graph.nodes for storage in written_by(node)} & input_storages(graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return {at for at, node in enumerate(inputs) if storages_of(node) & written}


def _copy_of(module: GraphModule) -> GraphModule:
    graph = Graph()
    result = graph.graph_copy(module.graph, {})
    graph.output(result)
    return GraphModule(module, graph)


def _bind(op: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments by name."""
    given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False))
    defaults = {one.name: one.default_value for one in op._schema.arguments if one.has_default_value()}
    return {argument.name: {**defaults, **given, **kwargs}[argument.name] for argument in op._schema.arguments}


def _where(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _is_close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    difference = (one.double() - other.double()).norm()
    return bool(difference <= _SAME_OPERAND * other.double().norm()) or bool(difference.isnan() and other.isnan().any())


def _difference(got: Any, wanted: Any) -> float:
    pairs = list(zip(_tensors_in(got), _tensors_in(wanted), strict=True))
    floats = [(one.detach().double(), other.detach().double()) for one, other in pairs if other.is_floating_point() and other.numel()]
    largest = max((float(other.abs().max()) for _, other in floats), default=1.0)
    return max((float((one - other).abs().max()) for one, other in floats), default=0.0) / (largest or 1.0)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors_in(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors_in(one)
