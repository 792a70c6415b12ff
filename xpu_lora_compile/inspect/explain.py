"""What the compiler makes of a model's LoRA: `print(xlc.explain(model)(inputs))`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from xpu_lora_compile.errors import DeadAdapterError, OptionError, counted
from xpu_lora_compile.inspect.report import GraphReport, NodeReport, Report, SiteReport
from xpu_lora_compile.kernels import choice_for
from xpu_lora_compile.layers.host import LoraLayer
from xpu_lora_compile.passes import check_environment, rewrite
from xpu_lora_compile.passes.calls import LORA_OPS, ROUTINGS, LoraNode
from xpu_lora_compile.passes.decisions import Decision, decisions_on
from xpu_lora_compile.passes.editing import arguments_of, graphs_of, origin_of, value_of
from xpu_lora_compile.passes.find_sites import find_sites
from xpu_lora_compile.passes.graph import Rewrite
from xpu_lora_compile.passes.liveness import live_nodes
from xpu_lora_compile.passes.memory import read_by, storage_of, storages_of, written_by
from xpu_lora_compile.passes.text import dtype_of, lines_of
from xpu_lora_compile.torch_internals import fresh_compilation, hint_of, name_of, source_of


def explain(
    model: Callable[..., Any], *, bandwidth: float | None = None, generate_code: bool = False
) -> Callable[..., Report]:
    """Compile a model and say what became of every call that adds LoRA: `explain(model)(*args, **kwargs)`.

    Args:
        model: a module or a function. A model that LoRA is attached to is called inside its `bank.use` block.
        bandwidth: GB/s for the floors; by default that of a copy, measured on the model's device.
        generate_code: have Inductor compile the graph too, so that the report can say which part of the whole the
            passes took. By default the rewritten graph runs operation by operation.

    Returns:
        A function of the model's inputs that compiles, runs once, and returns the `Report`.

    Raises:
        DeadAdapterError: by that function: a call that adds LoRA has no influence on what its graph returns, an
            attached module was not reached at all, or there is no such call. Its attribute `report` holds the report.
        OptionError: something that cannot be called, or a bandwidth that is not above 0.

    Example:
        >>> import torch
        >>> import xpu_lora_compile as xlc
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
        >>> bank = xlc.attach(model, slots=2, max_rank=2)
        >>> with bank.use([None, None]), torch.no_grad():
        ...     report = xlc.explain(model, bandwidth=50)(torch.randn(2, 4))
        >>> [(site.module, site.shapes["H"], site.relation) for site in report.sites]
        [('0', '4', 'equal'), ('1', '3', 'equal')]
    """
    if not callable(model):
        raise OptionError("explain", "a model", type(model).__name__, "Write `explain(model)(inputs)`.")
    if bandwidth is not None and not bandwidth > 0:
        raise OptionError("explain: bandwidth", "GB/s above 0", repr(bandwidth), "Leave it out to have it measured.")

    def run(*args: Any, **kwargs: Any) -> Report:
        captured: list[_Captured] = []

        def backend(module: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
            captured.append(_Captured(module, sum(len(graph.decisions) for graph in captured)))
            if not generate_code:
                return module.forward
            from xpu_lora_compile.backend import generate_code as with_inductor

            return with_inductor(module, inputs, {"fx_graph_cache": False})

        check_environment()
        with fresh_compilation(model) as plain:
            calls_before = _eager_calls(plain)
            start = time.perf_counter()
            compiled: Any = torch.compile(cast("Callable[..., Any]", plain), backend=backend)
            compiled(*args, **kwargs)
            seconds = time.perf_counter() - start
            by_python = sorted(set(_eager_calls(plain).items()) - set(calls_before.items()))
        sites, calls = [], 0
        for graph in captured:
            sites += graph.sites(calls)
            calls += len(graph.calls)
        _name_fully(sites, _layers(plain))
        device = captured[0].device if captured else torch.device("cpu")
        if not bandwidth and device.type == "meta":
            raise OptionError("explain", "a device with memory", "meta", "Give a bandwidth, or move the model.")
        speed, source = (bandwidth, "as told") if bandwidth else _measured_bandwidth(device)
        for site in sites:
            site.floor_us = site.bytes / speed / 1e3
        report = Report(
            sites,
            [graph.report for graph in captured],
            speed,
            source,
            sum(graph.seconds for graph in captured),
            seconds,
            generate_code,
            {"torch": torch.__version__},
            by_python=[name for name, _ in by_python],
        )
        _check_liveness(plain, report)
        return report

    return run


class _Captured:
    """One graph of Dynamo: looked at, rewritten, and looked at again."""

    def __init__(self, module: GraphModule, first_site: int) -> None:
        self.first_site = first_site
        graphs = list(graphs_of(module))
        for graph in graphs:
            find_sites(graph, Rewrite())
        decided = [(node, decision) for graph in graphs for node in graph.nodes for decision in decisions_on(node)]
        self.decisions: list[Decision] = [decision for _, decision in decided]
        live = set().union(*(live_nodes(graph) for graph in graphs))
        self.live = [node in live for node, _ in decided]
        before, calls_before = self._nodes(module), _count(graphs)
        start = time.perf_counter()
        # With its base product inside, a call would not say what it adds to.
        rewrite(module, keep_bases=True)
        self.seconds = time.perf_counter() - start
        self.report = GraphReport(before, self._nodes(module), calls_before, _count(graphs))
        # The calls that do the sites' work, by the position of the site, each with its number.
        self.calls = [node for graph in graphs for node in graph.nodes if decisions_on(node)]
        self.device = next(
            (value_of(node).device for graph in graphs for node in graph.nodes if isinstance(value_of(node), Tensor)),
            torch.device("cpu"),
        )

    def sites(self, first_call: int) -> list[SiteReport]:
        """The sites in the order of the graph; calls are numbered from `first_call`."""
        found: dict[int, SiteReport] = {}
        for number, node in enumerate(self.calls, start=first_call):
            decisions, done = decisions_on(node), 0
            for decision in decisions:
                slices = slice(done, done + decision.slices)
                done += decision.slices
                at = next(at for at, recorded in enumerate(self.decisions) if recorded is decision)
                others = [other.place for other in decisions if other is not decision]
                found[at] = _site(node, number, decision, slices, others, self.live[at])
        return [found[at] for at in sorted(found)]

    def _nodes(self, module: GraphModule) -> list[NodeReport]:
        order: dict[Node, int] = {}
        reports: list[NodeReport] = []
        # For each storage, where it was written to and by whom.
        writers: dict[int, dict[_Span, int]] = {}
        subgraphs = {
            child.graph: name for name, child in module.named_modules() if name and isinstance(child, GraphModule)
        }
        position = {id(decision): at for at, decision in enumerate(self.decisions, start=self.first_site)}
        for node, name, type_, text in lines_of(module):
            order[node] = len(order)
            mine = sorted(position[id(decision)] for decision in decisions_on(node))
            operands = [operand for operand in node.all_input_nodes if operand in order]
            read, written = read_by(node) | written_by(node), written_by(node)
            after = {
                at
                for operand in operands
                for span in _spans_of(operand)
                if span.storage in read
                for other, at in writers.get(span.storage, {}).items()
                if span.overlaps(other)
            }
            changed = [operand for operand in operands if storages_of(operand) & written]
            inputs = [order[operand] for operand in operands]
            reports.append(
                NodeReport(
                    name=name,
                    type=type_,
                    text=text,
                    kind=_kind(node),
                    module=source_of(node) or origin_of(node)[1],
                    subgraph=subgraphs.get(node.graph, ""),
                    inputs=inputs,
                    roles=_roles(node, operands),
                    writes=[order[operand] for operand in changed],
                    after=sorted(after - set(inputs)),
                    sites=mine,
                )
            )
            for span in (span for operand in changed for span in _spans_of(operand)):
                writers.setdefault(span.storage, {})[span] = order[node]
        return reports


class _Span(NamedTuple):
    """Where a tensor lies in memory, at the sizes of this run: from its first to its last element."""

    storage: int
    start: int
    end: int

    def overlaps(self, other: _Span) -> bool:
        """Whether the two have elements in common, as far as their ends tell."""
        return self.storage == other.storage and self.start <= other.end and other.start <= self.end


def _spans_of(node: Node) -> list[_Span]:
    """The memory of each tensor that a node stands for."""
    value = value_of(node)
    spans = []
    for tensor in value if isinstance(value, list | tuple) else [value]:
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
            start = hint_of(tensor.storage_offset())
            steps = ((hint_of(n) - 1) * hint_of(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append(_Span(storage_of(tensor), start, start + sum(steps)))
    return spans


def _site(
    node: Node, number: int, decision: Decision, slices: slice, others: list[str], reaches_output: bool
) -> SiteReport:
    lora = LoraNode(node)
    call = lora.call(slices)
    a, b, inputs = call.lora_a, call.lora_b, call.inputs
    output, total = call.outputs[call.slice_outputs[0]], len(lora.lora_b)
    rows, slots = hint_of(inputs.shape[0]), hint_of(b[0].shape[0])
    used = min(rows, slots)
    size = sum(used * hint_of(stack.shape[-1]) * hint_of(stack.shape[-2]) * stack.element_size() for stack in (*a, *b))
    columns = sum(min(hint_of(stack.shape[-2]), hint_of(output.shape[1])) for stack in b)
    size += 2 * rows * columns * output.element_size()
    size += rows * hint_of(inputs.shape[1]) * inputs.element_size() * len(b) // total
    choice = choice_for(call)
    ranks = [stack.shape[-1] for stack in b]
    return SiteReport(
        module=decision.module,
        source=decision.source,
        op=decision.op,
        shapes={
            "T": _size(inputs.shape[0]),
            "D": _size(inputs.shape[1]) if a else "-",
            "R": "+".join(map(_size, ranks)),
            "K": _size(b[0].shape[0]),
            "W": decision.width if len(b) == 1 else "+".join(_size(stack.shape[-2]) for stack in b),
            "H": decision.columns,
        },
        dtypes={"output": dtype_of(output), "inputs": dtype_of(inputs)}
        | ({"A": dtype_of(a[0])} if a else {})
        | {"B": dtype_of(b[0])},
        relation=decision.relation,
        guard=decision.guard,
        call=f"{lora.name} {number}",
        fused_with=others,
        kernel=choice.kernel.name,
        because=choice.because,
        others=dict(choice.others),
        bytes=size,
        floor_us=0.0,
        reaches_output=reaches_output,
        notes=decision.notes,
    )


def _size(size: int | torch.SymInt) -> str:
    return str(size) if isinstance(size, int) else f"{size} (here {hint_of(size)})"


def _roles(node: Node, operands: list[Node]) -> list[str]:
    """What our op calls each operand; the first of its names where it is given twice."""
    op: Any = getattr(node.target, "default", node.target)
    if op not in LORA_OPS and op not in ROUTINGS:
        return []
    names: dict[Node, str] = {}
    for argument, value in zip(op._schema.arguments, arguments_of(node, op), strict=True):
        for operand in value if isinstance(value, list | tuple) else [value]:
            if isinstance(operand, Node):
                names.setdefault(operand, argument.name)
    return [names[operand] for operand in operands]


def _kind(node: Node) -> str:
    target = getattr(node.target, "default", node.target)
    if node.op in ("placeholder", "get_attr"):
        return "input"
    if node.op == "output":
        return "output"
    if target in LORA_OPS:
        return "lora"
    if target in ROUTINGS or any(operand.target in ROUTINGS for operand in node.all_input_nodes):
        return "routing"
    shares = storages_of(node) and storages_of(node) <= set().union(*map(storages_of, node.all_input_nodes))
    return "view" if shares and not written_by(node) else "other"


def _count(graphs: list[Graph]) -> dict[str, int]:
    """How often each op of ours is called, and each way of copying."""
    counts: Counter[str] = Counter()
    for graph in graphs:
        for node in graph.nodes:
            target = getattr(node.target, "default", node.target)
            if target in LORA_OPS or target in ROUTINGS:
                counts[name_of(target)] += 1
            elif target in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default) or target in ("clone", "copy_"):
                counts["clone" if "clone" in str(target) else "copy_"] += 1
    return dict(counts)


def _measured_bandwidth(device: torch.device) -> tuple[float, str]:
    """GB/s of a copy between buffers larger than the caches, the best of a few, read and write both counted."""
    size = 1 << 28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        _wait_for(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait_for(device)
        best = max(best, 2 * size / (time.perf_counter() - start) / 1e9)
    return best, f"a copy of 256 MiB on {device.type}, measured in this run"


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def _check_liveness(model: object, report: Report) -> None:
    """Raise for adapters that the model's result cannot depend on."""
    dead = [site for site in report.sites if not site.reaches_output]
    wanted, remedy, got = "", "", ""
    if dead:
        wanted = "every call that adds LoRA to reach what the graph returns"
        got = f"{_list(f'{site.place} ({site.source})' for site in dead)} without influence on it"
        remedy = "Return what the call wrote to, or do not call it."
    elif not report.graphs:
        wanted, got = "a graph", "none, since Dynamo compiled nothing"
        remedy = "If it gave up on this code before, at its limit of recompilations, call `torch.compiler.reset()`."
    elif unreached := _unreached(model, report):
        wanted = "a call in the graph for every module that LoRA is attached to"
        got = f"none for {_list(unreached)}"
        remedy = (
            "Run inside `bank.use([...])`, where the model would otherwise be the base model; "
            "leave modules that the model does not call out of target_modules."
        )
    elif not report.sites:
        wanted, got = "a call that adds LoRA", f"none in {counted(len(report.graphs), 'graph')}"
        remedy = "Attach LoRA to the model, or call the ops; what is compiled apart, or not at all, is not seen here."
    if wanted:
        error = DeadAdapterError("explain", wanted, got, remedy)
        report.problem = str(error)
        error.report = report
        raise error


def _unreached(model: object, report: Report) -> list[str]:
    reached = {site.module for site in report.sites}.union(report.by_python)
    # Where Dynamo has broken the graph, one graph may serve like layers of several blocks, by the rest of their names.
    return [name for name in _layers(model) if not any(name == path or name.endswith(f".{path}") for path in reached)]


def _layers(model: object) -> dict[str, LoraLayer]:
    """The layers with LoRA of a model, by name."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


def _eager_calls(model: object) -> dict[str, int]:
    """How often Python has called each layer in the innermost block."""
    called = {name: layer.lora_routing.called.get(layer.lora_name) for name, layer in _layers(model).items()}
    return {name: last[1] for name, last in called.items() if last}


def _name_fully(sites: list[SiteReport], layers: Iterable[str]) -> None:
    """Give sites in graphs that begin inside of the model the layer's whole name, where only one can be meant."""
    for site in sites:
        if site.module and site.module not in layers:
            meant = [name for name in layers if name.endswith(f".{site.module}")]
            if len(meant) == 1:
                site.module = meant[0]


def _list(places: Any) -> str:
    places = list(places)
    more = f" and {len(places) - 5} more" if len(places) > 5 else ""
    return ", ".join(places[:5]) + more
