"""The passes in a compilation: `torch.compile(model, backend="xpu_lora")`, or as options of stock Inductor."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.fx import Graph, GraphModule

from xpu_lora_compile.errors import OptionError
from xpu_lora_compile.inductor_internals import (
    CustomGraphPass,
    compile_fx,
    config_of,
    in_slot,
    mode_names,
    option_names,
    writes_no_python,
)
from xpu_lora_compile.kernels import forced_kernel
from xpu_lora_compile.passes import Launch, checked_launch, fuel, rewrite
from xpu_lora_compile.torch_internals import ONCE_IT_RAN, instruction_set

# Our own options, each with the values it takes; the first is the default.
OPTIONS = {"xpu_lora.execute": ("inductor", "eager"), "xpu_lora.launch": ("auto", "inductor", "op")}

# Inductor may compute a product with padded columns, and then hands an op that changes a view of the product in place
# the strides it had without the padding: wrong numbers, seen on CUDA with torch 2.11 and reproduced on torch 2.13.
_SAFE = {"shape_padding": False}

# What decides the code that a graph becomes: any change there must miss Inductor's caches.
_HASHED = ("ops", "passes", "kernels")


def xpu_lora(
    graph_module: GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend of `torch.compile(model, backend="xpu_lora")`: our passes, then Inductor.

    Args:
        graph_module: what Dynamo captured; changed in place.
        example_inputs: its inputs, fake or real.
        mode: as for Inductor: "default", "reduce-overhead", "max-autotune", ...
        options: Inductor's own, and `xpu_lora.execute`: "inductor" (default), or "eager" to run the rewritten
            graph operation by operation, without generating code. `xpu_lora.launch`: who launches the Triton kernels,
            "inductor", or "op" for an op that it does not look into; "auto" (default) leaves it to us.

    Raises:
        OptionError: an unknown mode or option, or a value of the wrong type.
    """
    options = dict(_checked_type(options or {}))
    execute = options.pop("xpu_lora.execute", "inductor")
    launch = options.pop("xpu_lora.launch", "auto")
    if launch not in OPTIONS["xpu_lora.launch"]:
        values = ", ".join(map(repr, OPTIONS["xpu_lora.launch"]))
        raise OptionError("option xpu_lora.launch", f"one of {values}", repr(launch), "Leave it out for 'auto'.")
    if execute not in OPTIONS["xpu_lora.execute"]:
        values = " or ".join(map(repr, OPTIONS["xpu_lora.execute"]))
        raise OptionError("option xpu_lora.execute", values, repr(execute), "Leave it out for Inductor.")
    config = _checked_config(mode, options)
    if execute == "eager" and config:
        raise OptionError(
            "option xpu_lora.execute",
            "no mode and no options of Inductor beside 'eager', which does without Inductor",
            ", ".join(config),
            "Leave out one or the other.",
        )
    if then := next(filter(None, (ask() for ask in ONCE_IT_RAN)), None):
        return _run_once(graph_module, then)
    rewrite(graph_module, launch=_settled(launch, config))
    return graph_module.forward if execute == "eager" else generate_code(graph_module, example_inputs, config)


def _run_once(graph_module: GraphModule, then: Callable[[], None]) -> Callable[..., Any]:
    """Run a graph as it is, which no later call comes to, and do something after it.

    Not before: Dynamo checks the guards of a graph that it has made, and what is done may change what they ask for.
    """

    def run(*args: Any) -> Any:
        result = graph_module.forward(*args)
        then()
        return result

    return run


def generate_code(
    graph_module: GraphModule, example_inputs: Sequence[Tensor], config: dict[str, Any]
) -> Callable[..., Any]:
    """Have Inductor compile a graph that has been rewritten, with options of its own."""
    config = {**config, **_SAFE, "post_grad_custom_pre_pass": in_slot("post_grad_custom_pre_pass", CacheKey(), config)}
    compiled: Any = compile_fx(graph_module, example_inputs, config_patches=config)
    return cast("Callable[..., Any]", compiled)


def _settled(launch: Launch, config: dict[str, Any]) -> Launch:
    """Who launches the Triton kernels: Inductor, if the code that it writes is no Python, and nothing else is asked."""
    return "inductor" if launch == "auto" and writes_no_python(config) else launch


def inductor_options(options: dict[str, Any] | None = None, *, launch: Launch = "auto") -> dict[str, Any]:
    """Options that put the same passes into stock Inductor.

    Args:
        options: further options of Inductor to go with them; passes among them keep running, after ours.
        launch: who launches the Triton kernels, as of `xlc.rewrite`.

    Example:
        >>> import torch
        >>> import xpu_lora_compile as xlc
        >>> sorted(xlc.inductor_options())
        ['post_grad_custom_pre_pass', 'pre_grad_custom_pass', 'shape_padding']
        >>> compiled = torch.compile(torch.nn.Linear(2, 2), options=xlc.inductor_options())

    Raises:
        OptionError: an unknown option or `launch`, or a value of the wrong type.
    """
    config = _checked_config(None, options or {})
    return {
        **config,
        **_SAFE,
        "pre_grad_custom_pass": in_slot("pre_grad_custom_pass", RewritePass(checked_launch(launch)), config),
        "post_grad_custom_pre_pass": in_slot("post_grad_custom_pre_pass", CacheKey(), config),
    }


def inductor_config(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with which Inductor compiles a program that has been rewritten and leaves this process.

    Its constants stay outside of the code: slots without an adapter then take no room in a file.

    Raises:
        OptionError: an unknown option, or a value of the wrong type.
    """
    return {**_checked_config(None, options), **_SAFE, "aot_inductor.package_constants_in_so": False}


class CacheKey(CustomGraphPass):
    """A pass that changes nothing: its identity puts ours into the keys of Inductor's caches.

    Without it a changed kernel was answered from an older process's cache, with wrong numbers (seen on torch 2.13).
    """

    def __init__(self) -> None:
        # An attribute, since torch before 2.12 pickles some passes instead of asking for the uuid.
        self.identity = _identity()

    def __call__(self, graph: Graph) -> None:
        """Leave the graph as it is."""

    def uuid(self) -> Any:
        """The package's name, its version, a hash of all that decides the code, how many rewrites, a forced kernel."""
        return _identity()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.identity == getattr(other, "identity", None)

    def __hash__(self) -> int:
        return hash((type(self), self.identity))


class RewritePass(CacheKey):
    """The passes of `xlc.rewrite`, for Inductor's slot `pre_grad_custom_pass`."""

    def __init__(self, launch: Launch = "auto") -> None:
        super().__init__()
        self.launch: Launch = launch
        self.identity = (*self.identity, launch)

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        if graph.owning_module is not None:
            rewrite(graph.owning_module, launch=_settled(self.launch, {}))

    def uuid(self) -> Any:
        """As `CacheKey.uuid`, and who launches the kernels."""
        return (*super().uuid(), self.launch)


def _identity() -> tuple[object, ...]:
    return "xpu_lora", version("xpu-lora-compile"), _hash_of_sources(), fuel(), forced_kernel(), *instruction_set()


@cache
def _hash_of_sources() -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for source in sorted(file for folder in _HASHED for file in (here / folder).iterdir() if file.is_file()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


def _checked_config(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    if mode is not None and mode not in mode_names():
        raise OptionError("mode", f"one of {', '.join(mode_names())}", repr(mode), _nearest(mode, mode_names()))
    names = [*option_names(), *OPTIONS]
    for name in _checked_type(options):
        if name in OPTIONS:
            raise OptionError("options", "options of Inductor", repr(name), 'Use backend="xpu_lora" for this one.')
        if name.replace("-", "_") not in names:
            raise OptionError("options", "an option of Inductor or of xpu_lora", repr(name), _nearest(name, names))
    try:
        config = config_of(mode, options)
    except RuntimeError as error:
        raise OptionError("options", "values of the right types", str(options), str(error)) from error
    # Of the result, in which every spelling of an option's name has become one.
    for name, value in _SAFE.items():
        if config.get(name, value) != value:
            remedy = "Leave it out: an op that changes a view of a padded product would compute wrong numbers."
            raise OptionError(f"option {name}", repr(value), repr(config[name]), remedy)
    return config


def _checked_type(options: dict[str, Any]) -> dict[str, Any]:
    if isinstance(options, dict) and all(isinstance(name, str) for name in options):
        return options
    raise OptionError("options", "a dict of names and values", repr(options), "Pass names as strings.")


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"Did you mean {close[0]!r}?"
