"""The same while Dynamo traces: the graph that it has captured so far shows where a layer's input comes from.

`layout_of`, `enter` and `leave` are called by traced code and answered while tracing; nothing of them is in the graph.
The graph is run once more, on fake tensors of the example inputs' sizes under a `Watch`, as far as the layer at hand.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_exporting
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map

from xpu_lora_compile.errors import counted
from xpu_lora_compile.rows.inputs import named_inputs, parameters
from xpu_lora_compile.rows.layout import UNSAID, Layout, Picked
from xpu_lora_compile.rows.owners import UNKNOWN, constant
from xpu_lora_compile.rows.rules import library_op
from xpu_lora_compile.rows.watch import Watch
from xpu_lora_compile.torch_internals import (
    answers_while_tracing,
    arguments_of_frame,
    fake_mode,
    graphs_at,
    guard_on,
    guard_on_module_of_frame,
    hint_of,
    is_autograd_function,
    is_state_change,
    module_of_frame,
    real_input,
    without_tracing,
)

CHANGES_OUTSIDE = "a checkpoint, or another graph inside of the graph, writes to memory from outside of it"
# A call whose sequences all have the same adapter needs no proof, and is not followed.
CALL_ONCE = (
    "Call the model once without torch.compile in a `use` block with two different names: that call is followed."
)
# Of a value that comes into a graph which is not the beginning of a call.
OUTSIDE = "from outside of the compiled graph"


def enter(routing: Any, slots: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Traced: a module that holds layers is called with these inputs; returns the number of such calls, if one begins.

    Raises:
        BatchError: the inputs hold another number of sequences than there are names.
    """
    for position, value in enumerate(args):
        _note_inputs(routing, module, position, value, 0)
    for name, value in kwargs.items():
        _note_inputs(routing, module, name, value, 0)
    problem = _entered(routing, slots, module)
    if problem is not None:
        raise routing.batch_error(problem)
    number: int | None = _number(routing, module)
    return number


def leave(routing: Any) -> None:
    """Traced: that call ends."""
    _left(routing)


def _note_inputs(routing: Any, module: nn.Module, name: Any, value: Any, depth: int) -> None:
    if isinstance(value, Tensor):
        _note_input(routing, module, name, value)
    elif depth < 3 and isinstance(value, dict):
        for key, item in value.items():
            _note_inputs(routing, module, f"{name}.{key}", item, depth + 1)
    elif depth < 3 and isinstance(value, (list, tuple)):
        for item in value:
            _note_inputs(routing, module, f"{name}[]", item, depth + 1)


# Answered while tracing.


@answers_while_tracing
def layout_of(at: Any, routing: Any, layer: Any, inputs: Any, features: int) -> tuple[int, int, int]:
    """The layout of a layer's rows, as three constants; (-1, 0, 0) where every sequence has the same adapter."""
    if at is None:
        trace, found, example = None, "", inputs
    else:
        routing.traced_calls.add(layer.lora_name)
        _check_caller(at, routing)
        # In a subgraph, of a checkpoint say, values of the graph around it are used as they are.
        trace, example = _trace_of(at, routing, inputs.graph), inputs.meta["example_value"]
        is_changed = _trace_of(at, routing).changes_outside()
        found = CHANGES_OUTSIDE if is_changed else trace.layout_of(inputs, features)
    if not isinstance(found, str):
        if at is not None and found[2] < 0:
            own, layout = weakref.proxy(routing), Layout(*found)
            guard_on(at, f"xpu_lora: tokens of {id(routing)} that become one row", lambda: own.keeps_apart(layout))
        return tuple(found)
    was_entered = trace is not None and trace.was_entered
    unsaid = not was_entered or found.startswith(UNSAID)
    if at is not None:
        # Layers and blocks of one class share code, and not what is known of them.
        guard_on_module_of_frame(at)
    number = None if trace is None else trace.number
    if number is None:
        # The call began before this graph.
        number = running = routing.note_question(layer, example)
        if at is not None:
            of_call = weakref.proxy(routing)
            guard_on(
                at,
                f"xpu_lora: calls of number {number} of {id(routing)}",
                lambda: of_call.number_of_running() == running,
            )
    shape = example.shape[: example.dim() - features]
    if unsaid and (known := routing.known_anywhere(layer.lora_name, shape, number)):
        if at is not None:
            _guard_on_agreement(at, routing, number)
        return tuple(known)
    is_exported = at is None or is_exporting()
    if routing.uniform and not is_exported:
        own = weakref.proxy(routing)
        guard_on(at, f"xpu_lora: one adapter for all rows of {routing.part or 'the model'}", lambda: own.uniform)
        return -1, 0, 0
    if was_entered and OUTSIDE not in found:
        raise routing.unproved(layer.lora_name, example, found)
    reason = "the compiler broke the graph between the inputs of the model and this layer"
    reason, remedy = routing.why_unknown(layer.lora_name, shape, number, reason)
    if is_exported:
        # An exported program has no guards: it serves blocks of all names.
        reason = "torch.export does not follow the inputs of the model to this layer"
        remedy = "Use xlc.export. Or call the model once in a `use` block with two different names before torch.export."
    raise routing.unproved(layer.lora_name, example, reason, remedy)


def _guard_on_agreement(at: Any, routing: Any, number: int) -> None:
    """Have the graph be used only until a call of that number is followed that shows something else."""
    own, doubts = weakref.proxy(routing), routing.doubts.get(number, 0)
    guard_on(
        at,
        f"xpu_lora: what calls of number {number} of {id(routing)} have shown",
        lambda: own.doubts.get(number, 0) == doubts,
    )


def _check_caller(at: Any, routing: Any) -> None:
    """Only code of the thread or task that opened the block may run the graph."""
    if not routing.is_mine():
        routing.check_caller()
    own = weakref.proxy(routing)
    guard_on(at, f"xpu_lora: a call from its block {id(routing)}", lambda: own.is_mine())


@answers_while_tracing
def _note_input(at: Any, routing: Any, module: Any, name: Any, value: Any) -> None:
    if at is not None:
        _trace_of(at, routing).pending.append((name, value))


@answers_while_tracing
def _entered(at: Any, routing: Any, slots: Any, module: Any) -> str | None:
    if at is None:
        return None
    _check_caller(at, routing)
    return _trace_of(at, routing).entered(module, slots)


@answers_while_tracing
def _number(at: Any, routing: Any, module: nn.Module) -> int | None:
    if at is None:
        return None
    trace = _trace_of(at, routing)
    if trace.depth != 1 or trace.entered_module is not module:
        return None
    given = arguments_of_frame(at, module)
    number: int = -1 if given is None else routing.number_of(module, named_inputs(module, *given))
    trace.number = number
    return number


@answers_while_tracing
def note_read(at: Any, routing: Any, layer: Any, weight: Any) -> None:
    """The weight of a layer is read by traced code."""
    if at is not None and layer.lora_name not in routing.traced_calls:
        routing.traced_reads[layer.lora_name] = weight


@answers_while_tracing
def _left(at: Any, routing: Any) -> None:
    if at is not None:
        trace = _trace_of(at, routing)
        trace.depth = max(0, trace.depth - 1)


class Trace:
    """One graph in the making, and whose the values of its nodes are."""

    def __init__(
        self,
        graph: Graph,
        routing: Any,
        outer: Trace | None,
        roots: dict[int, tuple[int | None, str]],
        modules: Mapping[str, Any],
    ) -> None:
        self.graph = graph
        # What nodes get from Dynamo by name: graphs of functions, too.
        self.modules = modules
        self.routing = routing
        self.outer = outer
        self.depth = 0
        # What an eager hook has seen come in, by identity.
        self.roots = roots
        self.was_entered: bool = outer is not None and outer.was_entered
        self.entered_module: nn.Module | None = None
        # Of the call, see `BatchRouting.number_of`; None where it began before this graph.
        self.number: int | None = None if outer is None else outer.number
        self.pending: list[tuple[Any, Node]] = []
        self.values: dict[Node, Any] = {}
        # What this graph reads of the one around it, each with how often it had been written to.
        self.copies: list[tuple[Tensor, int]] = []
        batch = len(routing.lengths or routing.sequence_slots)
        self.watch: Watch = Watch(batch, routing.lengths) if outer is None else outer.watch
        self.mode: Any = fake_mode() if outer is None else outer.mode

    def entered(self, module: nn.Module, slots: Node) -> str | None:
        """A module is called with the inputs that were noted; says what is wrong with their sizes."""
        noted, self.pending = self.pending, []
        self.depth += 1
        if self.depth > 1 or self.roots or self.routing.is_inside_another(module):
            return None
        self.was_entered, self.entered_module = True, module
        names = parameters(type(module))
        inputs = []
        for name, node in noted:
            text = name if isinstance(name, str) else names[name] if name < len(names) else f"input {name}"
            inputs.append((text, node))
        self.advance()
        size = slots.meta["example_value"].shape[0]
        found = 0
        for name, node in inputs:
            example = node.meta["example_value"]
            value = self.values.get(node)
            if not isinstance(value, Tensor) or not value.dim():
                continue
            dimension = self.routing.batch_dimension(module, name, example.shape, inputs, size)
            if dimension is None:
                cause = f"from the input {name} {list(value.shape)}"
                self.watch.own(value, constant(UNKNOWN, value.dim()), cause)
            else:
                found += 1
                self.watch.own(value, self.routing.owners(dimension, value.dim()))
        if found or not self.routing.named:
            return None
        shown = [
            value.shape[0] for _, node in inputs if isinstance(value := self.values.get(node), Tensor) and value.dim()
        ]
        return f"{counted(hint_of(size), 'name')} for a batch of {shown[0] if shown else 0}"

    def layout_of(self, inputs: Node, features: int) -> Any:
        """The layout of the rows of a node's value, or what is wrong with them."""
        self.advance()
        value = self.values.get(inputs)
        if not isinstance(value, Tensor):
            return "the graph does not show where they come from"
        if self.watch.batch < 2 and not self.routing.lengths:
            return 0, 1, 0
        with without_tracing():
            found = self.watch.layout_of(value, features)
        # A graph serves other calls, too.
        return found.why if isinstance(found, Picked) else found

    def changes_outside(self) -> bool:
        """Whether this graph, or one around it that has one around itself, writes to what it reads from outside."""
        self.advance()
        is_changed = any(copy._version != version for copy, version in self.copies)
        return is_changed or (self.outer is not None and self.outer.changes_outside())

    def advance(self) -> None:
        """Follow what has been added to the graph."""
        with without_tracing(), torch.no_grad():
            for node in list(self.graph.nodes):
                if node not in self.values and node.op != "output":
                    self.values[node] = self._value_of(node)

    def _value_of(self, node: Node) -> Any:
        example = node.meta.get("example_value")
        if node.op == "placeholder" or node.op == "get_attr":
            if self.outer is not None and (value := self.outer.same_as(example)) is not None:
                copy = self._apart(value)
                self.copies.append((copy, copy._version))
                return copy
            return self._input(node, example)
        if node.op not in ("call_function", "call_method") or is_state_change(node.target):
            return self._unknown(node, example)
        args, kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), self._look_up)
        if is_autograd_function(node.target):
            # Before what is kept for the backward pass.
            return self._result_of(node, args[2:], lambda result: result[0])
        if node.target is torch.ops.higher_order.tag_activation_checkpoint:
            return self._result_of(node, args[1:], lambda result: result)
        try:
            with self.mode, self.watch:
                if node.op == "call_method":
                    value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    value = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:
            # - what cannot be run on fake tensors is not followed, but for ops of which the rule is known by name
            func = library_op(node.target)
            if func is None:
                return self._unknown(node, example)
            value = tree_map(self._fake, example)
            self.watch.follow_unrun(func, args, kwargs, value)
        if isinstance(value, Tensor) != isinstance(example, Tensor) or (
            isinstance(example, Tensor) and list(value.shape) != [hint_of(size) for size in example.shape]
        ):
            return self._unknown(node, example)
        return value

    def _result_of(self, node: Node, args: tuple[Any, ...], chosen: Callable[[Any], Any]) -> Any:
        """What the graph that a node calls returns for these arguments: of a checkpoint, or of an autograd function.

        Args:
            node: whose first argument is the graph.
            args: of the graph.
            chosen: what of the graph's output counts.
        """
        forward = self.modules.get(str(getattr(node.args[0], "target", None)))
        inputs = [] if forward is None else forward.graph.find_nodes(op="placeholder")
        values = list(args)
        if len(inputs) == len(values) + 1:
            # Older versions of torch, such as 2.8, have a place for an autograd function's context.
            values.insert(0, None)
        if forward is None or len(inputs) != len(values):
            return self._unknown(node, node.meta.get("example_value"))
        outside, self.values = self.values, {}
        copies = [self._apart(value) if isinstance(value, Tensor) else value for value in values]
        versions = [copy._version if isinstance(copy, Tensor) else 0 for copy in copies]
        try:
            given = iter(copies)
            for inner in forward.graph.nodes:
                if inner.op == "placeholder":
                    self.values[inner] = next(given)
                elif inner.op == "output":
                    return torch.fx.node.map_aggregate(chosen(inner.args[0]), self._look_up)
                elif inner.op == "get_attr":
                    self.values[inner] = tree_map(self._fake, getattr(forward, inner.target, None))
                else:
                    self.values[inner] = self._value_of(inner)
        finally:
            self.values = outside
            for value, copy, version in zip(values, copies, versions, strict=True):
                if isinstance(copy, Tensor) and copy._version != version:
                    self._forget(value)
        return None

    def _forget(self, value: Tensor) -> None:
        """Whose the rows of a value are is not known from now on; nor of what shares its memory."""
        with self.mode, self.watch:
            unknown = torch.empty_like(value)
            self.watch.own(unknown, constant(UNKNOWN, value.dim()), CHANGES_OUTSIDE)
            value.copy_(unknown)

    def _apart(self, value: Tensor) -> Tensor:
        """The same rows in memory of their own: what a graph inside changes in place would be changed twice."""
        with self.mode, self.watch:
            return value.clone()

    def _input(self, node: Node, example: Any) -> Any:
        """The value of an input: a weight, an input of the model that was entered eagerly, or of unknown owners."""
        value = tree_map(self._fake, example)
        real, is_weight = real_input(node)
        if not isinstance(value, Tensor) or is_weight or node.op == "get_attr":
            return value
        dimension, name = self.roots.get(id(real), (None, ""))
        if dimension is not None:
            self.was_entered = True
            self.watch.own(value, self.routing.owners(dimension, value.dim()))
        else:
            cause = f"from the input {name} {list(value.shape)}" if name else OUTSIDE
            self.watch.own(value, constant(UNKNOWN, value.dim()), cause)
        return value

    def same_as(self, example: Any) -> Any:
        """The value of the node that Dynamo has this example of."""
        if not isinstance(example, Tensor):
            return None
        self.advance()
        return next((value for node, value in self.values.items() if node.meta.get("example_value") is example), None)

    def _look_up(self, argument: Any) -> Any:
        return self.values.get(argument) if isinstance(argument, Node) else argument

    def _unknown(self, node: Node, example: Any) -> Any:
        def fake(leaf: Any) -> Any:
            made = self._fake(leaf)
            if isinstance(made, Tensor):
                self.watch.own(made, constant(UNKNOWN, made.dim()), f"after {node.target}, which is not followed")
            return made

        return tree_map(fake, example)

    def _fake(self, leaf: Any) -> Any:
        """A fake tensor of the sizes that the example inputs have."""
        if isinstance(leaf, torch.SymInt):
            return hint_of(leaf)
        if not isinstance(leaf, Tensor):
            return leaf
        try:
            sizes, strides = [hint_of(size) for size in leaf.shape], [hint_of(step) for step in leaf.stride()]
            with self.mode:
                return torch.empty_strided(sizes, strides, dtype=leaf.dtype, device=leaf.device)
        except (RuntimeError, NotImplementedError):
            return None


# The attribute of a graph that holds its traces, by routing: so that they go when it goes.
_TRACES = "_xpu_lora_traces"


def _trace_of(at: Any, routing: Any, wanted: Graph | None = None) -> Trace:
    trace: Trace | None = None
    for graph in graphs_at(at):
        known = vars(graph).setdefault(_TRACES, {})
        if id(routing) not in known:
            # Of code inside of the module that was entered nobody knows that its inputs are those of the module.
            roots = routing.entered_inputs(module_of_frame(at)) if trace is None else trace.roots
            known[id(routing)] = Trace(graph, routing, trace, roots, at.output.nn_modules)
        trace = known[id(routing)]
        if graph is wanted:
            break
    assert trace is not None  # noqa: S101 - for the type checker
    return trace
