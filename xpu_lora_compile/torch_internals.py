"""Every name of torch that is not public, in one place, with what differs between its versions.

Nothing here loads Inductor or the symbolic-shape machinery before it is needed: importing the package must stay cheap.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import repeat
from operator import getitem, is_
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch._C._dynamo.eval_frame import set_eval_frame

# Code that Dynamo traces where it is called from traced code, and leaves to Python otherwise.
_RUN_BY_PYTHON: list[Any] = []


def run_by_python(function: Any) -> Any:
    """Have Dynamo not compile a function by itself, when it is called by code that is not traced."""
    _RUN_BY_PYTHON.append(function.__code__)
    return function


def holds(condition: bool | torch.SymBool) -> bool:
    """Whether the condition is true, while compiling too.

    A symbolic condition is settled by a guard; one on sizes that nobody knows yet becomes a run-time assertion and
    counts as true.
    """
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import expect_true

    return expect_true(condition)


def check_before_autograd(library: torch.library.Library, op: Any, check: Any) -> None:
    """Have `check(*args)` run at each call of `op` in grad mode, where it can see what requires grad.

    The eager function and the fake of an op run below autograd, where neither says what the caller had.
    """

    def call(keyset: Any, *args: Any) -> Any:
        # The dispatcher has put keywords in their places, and has dropped trailing defaults.
        if torch.is_grad_enabled():
            check(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    # One key a device, since `custom_op` holds the alias key "Autograd" itself.
    for device in ("CPU", "CUDA", "XPU", "Meta"):
        library.impl(name_of(op), call, f"Autograd{device}", with_keyset=True)


def inline_under_aot(library: torch.library.Library, name: str, body: Any, *, unless: Any) -> None:
    """Have AOT put an op's body in its place, as it does for a `torch.library.triton_op`; export keeps the op.

    A `triton_op` itself would load Triton when it is defined, and costs 20 us when it is called eagerly.

    Args:
        library: that defines the op.
        name: of the op, without its namespace.
        body: what is called with the op's arguments; of aten's ops and kernels in `torch.library.wrap_triton`.
        unless: whether a call with these arguments is left alone.
    """
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    def rule(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if custom_triton_ops_decomposition_disabled() or unless(*args, **kwargs):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return body(*args, **kwargs)

    torch.library.register_torch_dispatch(f"{library.ns}::{name}", FunctionalTensorMode, rule, lib=library)


def number_of(size: int | torch.SymInt) -> int | None:
    """A size that is the same for all inputs that the graph is for; None of one that is not."""
    if isinstance(size, int):
        return size
    known: int | None = size.node.maybe_as_int()
    return known


def writes_to(tensor: torch.Tensor) -> int:
    """How often the tensor, or a view of the same memory, has been written to in place; no inference tensor."""
    return tensor._version


def runs_plainly(*operands: Any) -> bool:
    """Whether nothing looks at calls of ops on these tensors: no compiler, no mode, no subclass, no gradient.

    An eager op may then be called without the dispatcher, which takes 70 us for a `custom_op` (torch 2.13, one EPYC
    core), several times what the smallest products take. Ask `torch.compiler.is_compiling` first: what Dynamo traces
    here it guards at each call of the graph.
    """
    return (
        not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._is_torch_function_mode_enabled()
        and all(type(operand) in _PLAIN and not operand.is_meta and not operand.is_neg() for operand in operands)
    )


def queue_after_backward(call: Any) -> None:
    """Have something called at the end of the backward pass that runs now."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def is_traced() -> bool:
    """Whether ops are looked at by a mode or a transform, as while a backward pass is traced to be compiled."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor, or a fake one, is of a subclass that holds others and knows few ops: a quantized weight."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return is_traceable_wrapper_subclass(tensor)


def note_write(tensor: torch.Tensor) -> None:
    """Have autograd know that a tensor was written to, as the dispatcher would; it keeps no count for inference."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def hint_of(size: int | torch.SymInt) -> int:
    """A size as a number: of a symbolic one that of the example inputs, without a guard; 1 where nobody knows."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1


@contextmanager
def fresh_compilation(model: Any) -> Iterator[Any]:
    """Give the model without what `torch.compile` has made of it, to be compiled anew, as often as it takes.

    What Dynamo had compiled stays; `model.compile()` counts again when the block ends.
    """
    from torch._dynamo import config

    # A wrapped module hands attributes on to the one inside; a wrapped function has one of its own.
    wrapped = "_orig_mod" if isinstance(model, torch.nn.Module) else "_torchdynamo_orig_callable"
    model = getattr(model, wrapped, model)
    modules = (
        [module for module in model.modules() if module._compiled_call_impl]
        if isinstance(model, torch.nn.Module)
        else []
    )
    calls = [module._compiled_call_impl for module in modules]
    try:
        for module in modules:
            module._compiled_call_impl = None
        many = 1 << 16
        patch: Any = config.patch
        with patch(recompile_limit=many, accumulated_recompile_limit=many, fail_on_recompile_limit_hit=True):
            yield model
    finally:
        for module, call in zip(modules, calls, strict=True):
            module._compiled_call_impl = call


def instruction_set() -> tuple[object, ...]:
    """What Inductor writes C++ for on this CPU: what was written for another computes wrong numbers, or ends here.

    Keys of vLLM's and of Inductor's caches of compiled models do not have it.
    """
    more = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported")
    return torch.backends.cpu.get_cpu_capability(), *(bool(getattr(torch.cpu, name, bool)()) for name in more)


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether the condition is true for all sizes that the graph is for."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def is_guarded(condition: bool | torch.SymBool) -> bool:
    """Whether the condition is true for all sizes that the graph is for, if need be thanks to a guard.

    A guard only while Dynamo compiles: elsewhere (an exported program, a graph edited by hand) nobody would check it.
    Never on sizes that depend on data.
    """
    if is_known(condition):
        return True
    if isinstance(condition, bool):
        return False
    from torch._guards import TracingContext
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return TracingContext.try_get() is not None and guard_or_false(condition)


def is_compiling_for_this_process() -> bool:
    """Whether Dynamo is compiling, and so the graph will run here: not elsewhere, as an exported program may."""
    from torch._guards import TracingContext

    return TracingContext.try_get() is not None


@contextmanager
def without_memory() -> Iterator[None]:
    """Have tensors in the block be fake: shapes, dtypes and a device, which need not exist, but no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        yield


def compiled_after_aot(module: Any, compiler: Any) -> Any:
    """What `compiler(graph, inputs)` makes of a graph of Dynamo after AOT: aten's ops, without writes in place."""
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._guards import tracing
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    # In torch 2.8 Dynamo's context has a fake mode of its own, which is not the inputs'.
    inputs = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
    with unset_fake_temporarily(), tracing(None):
        return aot_module_simplified(module, inputs, fw_compiler=compiler)


def name_of(op: torch._ops.OpOverload) -> str:
    """An op's name without its namespace and its overload."""
    return op._schema.name.split("::")[1]


def is_composite(op: Any) -> bool:
    """Whether an op is no more than calls of other ops, which autograd or a mode would rather see."""
    # A tensor's device is asked for by an op that is not the dispatcher's.
    return op.namespace != "prim" and torch._C._dispatch_has_kernel_for_dispatch_key(
        op.name(), "CompositeImplicitAutograd"
    )


def decomposed(op: Any, args: Any, kwargs: Any) -> Any:
    """What a composite op returns, by calls of others; NotImplemented where it is none."""
    return op.decompose(*args, **kwargs)


def schemas_of(namespace: str) -> list[str]:
    """The names of all ops of a namespace."""
    return sorted(
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(f"{namespace}::")
    )


def schema_of(name: str) -> Any:
    """The schema of an op that may not be there, by its full name; None where it is not."""
    found = torch._C._jit_get_schemas_for_operator(name)
    return found[0] if found else None


def has_kernel_for(name: str, key: str) -> bool:
    """Whether an op that is there has a kernel of its own for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def has_fake(name: str) -> bool:
    """Whether an op that is there has a kernel for fake tensors, of its own or registered from Python."""
    from torch._library.simple_registry import singleton

    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta") or (
        singleton.find(name).fake_impl.kernel is not None
    )


def source_of(placeholder: Any) -> str:
    """Where an input of a graph of Dynamo comes from, as one would write it: `layers.0.weight`; empty if unknown."""
    name: Any = getattr(getattr(placeholder, "_dynamo_source", None), "name", "")
    # A method up to torch 2.9.
    text = str(name() if callable(name) else name)
    return path_of(text) or re.sub(r"^[LG]\['(\w+)'\]", r"\1", text)


def path_of(source: str) -> str:
    """`layers.0` for what Dynamo writes as `L['self'].layers[0]`, or in other versions with `_modules['0']`.

    The model is `L['args'][0]` where a decorator has wrapped its `forward`, as in transformers 5.24.
    """
    text = re.sub(r"^[LG]\['args'\]\[0\]|^[LG]\['\w+'\]|\b_(modules|parameters|buffers)\b", "", source)
    return re.sub(r"\.+", ".", re.sub(r"\['?([^'\]]+)'?\]", r".\1", text)).strip(".")


def is_vmapped() -> bool:
    """Whether `vmap` is at work, so that tensors have a dimension that they do not show."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Vmap


def copy_each(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target: on CUDA in a few launches where sizes and strides agree, else one by one."""
    torch._foreach_copy_(targets, sources)


def multiply_each(tensors: list[torch.Tensor], factors: list[float]) -> None:
    """Multiply each tensor in place; half precision is computed in float32 and rounded once."""
    torch._foreach_mul_(tensors, factors)


def zero_each(tensors: list[torch.Tensor]) -> None:
    """Fill each tensor with zeros: on CUDA in a few launches."""
    torch._foreach_zero_(tensors)


def is_capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on the device's current stream."""
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    return bool(getattr(module, "is_current_stream_capturing", bool)())


def current_backward() -> int | None:
    """A number for the backward pass that this thread runs a part of; None outside of all."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


@run_by_python
def out_of_sight(function: Any, *args: Any) -> None:
    """Call a function, and all that it calls, with Dynamo looking away; its last argument is whether it had looked.

    As `torch.compiler.disable` does, which makes a wrapper in each call: that costs some 80 us.
    """
    callback = set_eval_frame(None)
    try:
        function(*args, callable(callback))
    finally:
        set_eval_frame(callback)


@run_by_python
def look_away() -> Any:
    """Have Dynamo look at nothing from now on; returns what `look_again` takes."""
    return set_eval_frame(None)


@run_by_python
def look_again(sight: Any) -> None:
    """Have Dynamo look as it did before `look_away`."""
    set_eval_frame(sight)


# Called before a graph is compiled by the backend, for what is to be done once the graph has run; each returns that or
# None. What stands on the backend puts its own here.
ONCE_IT_RAN: list[Callable[[], Callable[[], None] | None]] = []

# Questions that traced code asks, each with the function that answers it.
_QUESTIONS: list[tuple[Any, Any]] = []


def answers_while_tracing(answer: Any) -> Any:
    """Have a function be called by Dynamo while it traces a call of it, with nothing of it in the graph.

    `answer(at, *args)` is given where the trace is, the node of each argument that is a tensor, and other arguments as
    they are; it returns constants. Where no graph of Dynamo is made (in `torch.export`, say), `at` is None.
    """

    def ask(*args: Any) -> Any:
        return answer(None, *args)

    ask.__name__ = ask.__qualname__ = answer.__name__
    _QUESTIONS.append((ask, answer))
    return ask


# Functions that read attributes of modules, each with what Dynamo calls in the place of it.
_READERS: list[tuple[Any, Any]] = []


def reads_object(name: str, is_pinned: Any) -> Any:
    """Return a function that reads an attribute of a module: an object that many modules hold.

    Where code reads it by itself, Dynamo compares the objects of two modules in Python, for each module at each call.
    In torch 2.11 it then also checks each module around such a one at each call, and not only the tags of their dicts.

    Args:
        name: of the attribute.
        is_pinned: whether a graph that reads this object is for these modules alone. Then their identity is guarded,
            and one guard asks all modules of the graph for the object; else a guard of each module does.
    """

    def read(module: Any) -> Any:
        return getattr(module, name)

    def trace(at: Any, module: Any) -> Any:
        from torch._dynamo.guards import GuardBuilder, install_guard
        from torch._dynamo.source import AttrSource

        module = module.realize()
        known, attributes = at.output.side_effects, vars(getattr(module, "value", module))
        value = attributes.get(name)
        if value not in known:
            # Dynamo knows the object from here on.
            return _attribute(at, module, name)
        found = known[value]
        if found.source is None or module.source is None:
            return _attribute(at, module, name)
        install_guard(found.source.make_guard(GuardBuilder.ID_MATCH))
        if is_pinned(value):
            install_guard(module.source.make_guard(GuardBuilder.ID_MATCH))
            _guard_on_holder(at, attributes, name)
        else:
            install_guard(AttrSource(module.source, name).make_guard(GuardBuilder.ID_MATCH))
        return found

    _READERS.append((read, trace))
    return read


def _attribute(at: Any, variable: Any, name: str) -> Any:
    """What `getattr` finds in traced code."""
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.builder import SourcelessBuilder

    found: Any = SourcelessBuilder.create(at, getattr)
    return found.call_function(at, [variable, ConstantVariable.create(name)], {}).realize()


def _guard_on_holder(at: Any, attributes: dict[str, Any], name: str) -> None:
    """Have the graph that is made there be used only while an object, and others that had the same, have it still.

    Args:
        at: where Dynamo is.
        attributes: of the object. The graph goes when an object goes whose identity it guards.
        name: of the attribute.
    """
    value = attributes[name]
    own, key = weakref.ref(value), (id(value), name)
    holders = vars(at.output).setdefault("_xpu_lora_holders", {}).setdefault(key, [])
    holders.append(attributes)

    def all_have_it() -> bool:
        try:
            # All in C, since it runs at each call.
            return all(map(is_, map(getitem, holders, repeat(name)), repeat(own())))
        except KeyError:
            return False

    guard_on(at, f"xpu_lora: {name} {id(value)} of all modules", all_have_it)


def prepare_for_tracing() -> None:
    """Tell Dynamo of the questions; loads it. A second call changes nothing."""
    import torch._dynamo as dynamo
    from torch._dynamo.eval_frame import skip_code
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.variables import ConstantVariable, TupleVariable
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    def constant(value: Any) -> Any:
        if isinstance(value, tuple):
            return TupleVariable([constant(item) for item in value])
        return ConstantVariable.create(value)

    def plain(variable: Any) -> Any:
        variable = variable.realize()
        if variable.is_python_constant():
            return variable.as_python_constant()
        if hasattr(variable, "value"):
            return variable.value
        return variable.as_proxy().node

    def handler_of(answer: Any) -> Any:
        def handle(_: Any, at: Any, owner: Any, *args: Any) -> Any:
            # What is true of one object's state holds for no other's: each has graphs of its own.
            source, key = owner.realize().source, f"id {id(plain(owner))}"
            if source is not None and key not in vars(at.output).setdefault("_xpu_lora_guards", set()):
                vars(at.output)["_xpu_lora_guards"].add(key)
                install_guard(source.make_guard(GuardBuilder.ID_MATCH))
            return constant(answer(at, *map(plain, (owner, *args))))

        return handle

    for code in _RUN_BY_PYTHON:
        skip_code(code)
    handlers = TorchInGraphFunctionVariable._get_handlers()
    while _QUESTIONS:
        ask, answer = _QUESTIONS.pop()
        dynamo.allow_in_graph(ask)
        handlers[ask] = handler_of(answer)
    while _READERS:
        read, trace = _READERS.pop()
        dynamo.allow_in_graph(read)
        handlers[read] = lambda _, at, module, trace=trace: trace(at, module)


def real_input(node: torch.fx.Node) -> tuple[torch.Tensor | None, bool]:
    """The tensor that an input of a graph of Dynamo stands for, and whether it is a parameter or buffer of a module."""
    argument = node.meta.get("grapharg")
    try:
        real = None if argument is None else argument.example
    except AssertionError:  # it has been let go of
        real = None
    source = getattr(getattr(node, "_dynamo_source", None) or getattr(argument, "source", None), "name", "")
    text = str(source() if callable(source) else source)
    is_weight = isinstance(real, torch.nn.Parameter) or "_buffers" in text or "_parameters" in text
    return real if isinstance(real, torch.Tensor) else None, is_weight


def graphs_at(at: Any) -> list[torch.fx.Graph]:
    """The graph that is made there, after those that it is a subgraph of."""
    graphs, tracer = [], at.output.current_tracer
    while tracer is not None:
        graphs.append(tracer.graph)
        tracer = tracer.parent
    return graphs[::-1]


def module_of_frame(at: Any) -> torch.nn.Module | None:
    """The module whose method Dynamo compiles there; None for other code."""
    root = at.output.root_tx
    found = _object_in(root.f_locals, name_of_self(root.f_code, root.f_locals))
    return found if isinstance(found, torch.nn.Module) else None


def _object_in(local: Mapping[str, Any], name: str) -> Any:
    """What a variable of that name holds, or the first of many arguments."""
    found = local.get(name)
    return next(iter(found), None) if isinstance(found, tuple) else found


# What Dynamo calls the rest of a function behind a break of its graph.
_RESUMED = re.compile(r"^torch_dynamo_resume_in_(\w+)_at_\d+$")


def name_of_self(code: CodeType, local: Mapping[str, Any]) -> str:
    """Return which local variable of a method's frame is the method's object: `self`, or as its author calls it.

    It is `args`, whose first it is, where a decorator has wrapped the method.
    """
    if "self" in local:
        return "self"
    resumed = _RESUMED.match(code.co_name)
    method = resumed[1] if resumed else code.co_name
    for name, value in local.items():
        function: Any = getattr(type(value), method, None) if isinstance(value, torch.nn.Module) else None
        own: CodeType | None = getattr(inspect.unwrap(function), "__code__", None)
        if own is not None and own.co_varnames[:1] == (name,) and (own is code or resumed):
            return name
    return "args"


def arguments_of_frame(at: Any, module: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of the call of a module that Dynamo compiles there; None where it compiles something else."""
    local = at.output.root_tx.f_locals
    if local.get("self") is not module or "args" not in local:
        return None
    return tuple(local["args"]), dict(local.get("kwargs") or {})


def guard_on_module_of_frame(at: Any) -> None:
    """Have the graph that is made there be used for that module alone, and not for others of its class."""
    module, key = module_of_frame(at), "xpu_lora: its module"
    if module is None:
        return
    own, name = weakref.ref(module), name_of_self(at.output.root_tx.f_code, at.output.root_tx.f_locals)

    guard_on(at, key, lambda local: _object_in(local, name) is own(), of_locals=True)


def guard_on(at: Any, name: str, holds: Any, *, of_locals: bool = False) -> None:
    """Have the graph that is made there be used only while `holds()` is true; once a graph for each name."""
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import GlobalStateSource

    if name in vars(at.output).setdefault("_xpu_lora_guards", set()):
        return
    vars(at.output)["_xpu_lora_guards"].add(name)

    def add(builder: Any, _: Any) -> None:
        root, check = builder.guard_manager.root, holds if of_locals else lambda _: holds()
        try:
            root.add_lambda_guard(check, [name], None)
        except TypeError:  # torch before 2.12
            root.add_lambda_guard(check, [name])

    install_guard(GlobalStateSource().make_guard(add))


def without_modes() -> Any:
    """Have ops in the block be seen by no mode."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def fake_mode() -> Any:
    """A mode in which tensors have sizes, all of them numbers, and no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def without_tracing() -> Iterator[None]:
    """Have nothing that runs in the block be noted by a compiler at work."""
    from torch._guards import tracing
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), tracing(None):
        yield


def is_state_change(target: Any) -> bool:
    """Whether a call in a graph changes a mode of the thread, and computes nothing."""
    module, name = getattr(target, "__module__", None) or "", getattr(target, "__name__", "")
    return module.startswith(("torch._functorch", "torch.amp", "torch.autograd")) or name in (
        *("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode", "_set_deterministic_algorithms"),
        *("_saved_tensors_hooks_disable", "_saved_tensors_hooks_enable", "_enter_autocast", "_exit_autocast"),
    )


def is_autograd_function(target: Any) -> bool:
    """Whether a call in a graph of Dynamo is one of a `torch.autograd.Function`: its forward graph comes first."""
    from torch._functorch.autograd_function import autograd_function_apply

    return target is autograd_function_apply


def memory_of(tensor: torch.Tensor) -> int | None:
    """The address of the memory that a tensor is a view of; None of one that holds none of its own."""
    return None if is_wrapper(tensor) or tensor.is_meta else tensor.untyped_storage().data_ptr() or None


@contextmanager
def before_each_op(check: Any) -> Iterator[None]:
    """Have `check(op, args, kwargs)` run before each op that the dispatcher is asked for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Checked(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            check(op, args, kwargs or {})
            return op(*args, **(kwargs or {}))

    with Checked():  # type: ignore[no-untyped-call]
        yield


def written_by(op: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The tensors among the arguments that the op writes into."""
    arguments = op._schema.arguments
    values = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    # The schema of `native_batch_norm` does not say that training updates the statistics.
    unsaid = ("running_mean", "running_var") if values.get("training") is True else ()
    for argument in arguments:
        if argument.name in unsaid or (argument.alias_info is not None and argument.alias_info.is_write):
            value = values.get(argument.name)
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, torch.Tensor):
                    yield tensor


def open_guards(graph: torch.fx.Graph) -> list[str]:
    """What an exported program's trace has taken for granted, and the ranges of its sizes do not imply."""
    from torch.utils._sympy.value_ranges import bound_sympy

    values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None)
    if mode is None or mode.shape_env is None:
        return []
    env = mode.shape_env
    replaced = [env.replace(guard.expr) for guard in env.guards]
    # Two sizes that were found to be equal are one by now.
    unsettled = [guard for guard in replaced if guard != True and bound_sympy(guard, env.var_to_range).lower != True]  # noqa: E712 - sympy's
    return list(dict.fromkeys(map(str, unsettled)))


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes a device has free, those included that PyTorch keeps for later; None where nobody says."""
    if device.type in ("cuda", "xpu"):
        module = getattr(torch, device.type)
        try:
            free: int = module.mem_get_info(device)[0]
            kept: int = module.memory_reserved(device) - module.memory_allocated(device)
        except (AssertionError, AttributeError, RuntimeError):
            # A build without that device, for a model on fake tensors; a torch or a driver that does not say.
            return None
        return free + kept
    if device.type == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        said = next((line for line in lines if line.startswith("MemAvailable:")), None)
        return None if said is None else int(said.split()[1]) * 1024
    return None
