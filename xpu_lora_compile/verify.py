"""Whether a compiled model computes what it should, call by call: `print(xlc.verify(model)(inputs))`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from xpu_lora_compile.adapters.bank import NO_ADAPTER
from xpu_lora_compile.errors import KernelError, OptionError, VerificationError
from xpu_lora_compile.kernels.choose import forced_kernel
from xpu_lora_compile.layers import LoraEmbedding, LoraLinear
from xpu_lora_compile.passes import check_environment, rewrite
from xpu_lora_compile.passes.decisions import Decision, decisions_on
from xpu_lora_compile.passes.find_sites import find_sites
from xpu_lora_compile.passes.fuse_base import keep_bases
from xpu_lora_compile.passes.memory import input_storages, storages_of, written_by
from xpu_lora_compile.replay import Eager, Forced, Taps, copy_of, is_close, tensors_in
from xpu_lora_compile.torch_internals import fresh_compilation


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
        returns_the_same: whether the rewritten graphs return what the original ones do, and change their inputs alike,
            once every call has been given right values: nothing beside the calls was changed.
    """

    sites: list[SiteError]
    output_error: float
    unchecked: int
    returns_the_same: bool = True

    def __str__(self) -> str:
        worst = sorted(self.sites, key=lambda site: max(site.rewritten, site.compiled or 0.0), reverse=True)[:5]
        right = sum(site.is_right for site in self.sites)
        difference = f"the results of the model differ by {self.output_error:.2g} of their largest element."
        lines = [f"{len(self.sites)} sites, {right} of them right; {difference}"]
        if self.unchecked:
            lines.append(f"{self.unchecked} sites in subgraphs were not compared.")
        if not self.returns_the_same:
            lines.append("WRONG: the rewritten graph changes something beside these calls.")
        lines.append("Worst errors, as fractions of what rounding allows (rewritten graph, generated code):")
        for site in worst:
            compiled = "-" if site.compiled is None else f"{site.compiled:.3g}"
            wrong = "" if site.is_right else "   WRONG" + ("" if site.reads_the_same else ": it reads something else")
            lines.append(f"  {site.rewritten:8.3g}  {compiled:>8}  {site.place} at {list(site.at)}{wrong}")
        return "\n".join(lines)


def verify(model: Callable[..., Any], *, seed: int = 0, generate_code: bool = True) -> Callable[..., Verification]:
    """Compare a model's compiled LoRA with exact values, call by call: `verify(model)(*args, **kwargs)`.

    Runs the model eagerly and compiled on the same inputs. Where LoRA is attached to it, every slot holds random
    weights meanwhile, and every sequence of the batch a random slot or none; afterwards both are as they were. Each
    call that adds LoRA is compared with its value in float64; what rounding may do is derived, not set.

    Args:
        model: a module or a function. Its inputs and a module's buffers are not changed by the call, and random numbers
            are the same in each run; other state that it keeps should not matter to the next run.
        seed: of the random weights and slots.
        generate_code: check the code that Inductor generates too; by default yes. Its graph returns each call's
            operands and result besides its own results.

    Returns:
        A function of the model's inputs that runs all this and returns a `Verification`.

    Raises:
        VerificationError: by that function: a call is wrong, and is named; or there is no call to compare. Its
            attribute `verification` has the result. Whether a call has any influence is for `explain` to say.
        KernelError: by that function: the kernel "ipex" is forced, which rounds oftener than is allowed here.
        OptionError: something that cannot be called.

    Example:
        >>> import torch
        >>> import xpu_lora_compile as xlc
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
        >>> bank = xlc.attach(model, slots=2, max_rank=2)
        >>> result = xlc.verify(model, generate_code=False)(torch.randn(5, 4))
        >>> [(site.place, site.is_right) for site in result.sites]
        [('0', True), ('1', True)]
    """
    if not callable(model):
        raise OptionError("verify", "a model", type(model).__name__, "Write `verify(model)(inputs)`.")

    def run(*args: Any, **kwargs: Any) -> Verification:
        if forced_kernel() == "ipex":
            raise KernelError(
                "verify",
                "a kernel that rounds once, as the contract says",
                "'ipex', which is forced and rounds oftener",
                "Verify without XPU_LORA_KERNEL=ipex, outside of `force_kernel`.",
            )
        checks: list[_Check] = []

        def backend(module: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
            checks.append(_Check(module, inputs, generate_code))
            return checks[-1].call

        check_environment()
        with (
            fresh_compilation(model) as plain,
            _random_adapters(plain, (args, kwargs), seed),
            torch.random.fork_rng(),
        ):
            torch.manual_seed(seed)
            with _buffers_kept(plain):
                wanted = plain(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            torch.manual_seed(seed)
            with _buffers_kept(plain):
                compiled: Any = torch.compile(cast("Callable[..., Any]", plain), backend=backend)
                got = compiled(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        sites = [site for check in checks for site in check.errors]
        result = Verification(
            sites,
            _difference(got, wanted),
            sum(check.unchecked for check in checks),
            all(check.returns_the_same for check in checks),
        )
        wrong = [site for site in sites if not site.is_right]
        if not (sites or result.unchecked):
            error = VerificationError(
                "verify", "a call that adds LoRA", "none", "Attach LoRA to the model, or call the ops."
            )
            error.verification = result
            raise error
        if wrong or not result.returns_the_same:
            beyond = f"{len(wrong)} of {len(sites)} beyond it, the first one {wrong[0].place}" if wrong else ""
            error = VerificationError(
                "verify",
                "every call that adds LoRA within what rounding allows, and nothing else changed",
                f"{beyond or 'something else changed'}\n{result}",
                "Set XPU_LORA_FUEL to find the rewrite, and XPU_LORA_DUMP to see it.",
            )
            error.verification = result
            raise error
        return result

    return run


def _badness(site: SiteError) -> tuple[bool, float]:
    return not site.reads_the_same, max(site.rewritten, site.compiled or 0.0)


# Of a site whose work no call does.
_LOST = (math.inf, (0, 0))


class _Check:
    """One graph of Dynamo: rewritten and compiled, and each of its calls compared when it runs."""

    def __init__(self, module: GraphModule, inputs: Sequence[Tensor], generate_code: bool) -> None:
        find_sites(module.graph)
        decisions = _decisions(module.graph)
        self.places = [decision.place for decision in decisions]
        self.changed = _changed_inputs(module.graph)
        self.original = copy_of(module)
        # A base product that its LoRA computes would have no value to compare with.
        with keep_bases():
            self.unchecked = len(rewrite(module)) - len(decisions)
        # The calls that do the sites' work, each with the numbers of its sites.
        numbers = {id(decision): number for number, decision in enumerate(decisions)}
        self.work = {
            node.name: [numbers[id(one)] for one in decisions_on(node)]
            for node in module.graph.nodes
            if decisions_on(node)
        }
        self.rewritten = copy_of(module)
        self.module = module
        self.errors: list[SiteError] = []
        self.returns_the_same = True
        self.taps: Taps | None = None
        self.compiled: Callable[..., Any] = module.forward
        if generate_code:
            from xpu_lora_compile.backend import generate_code as compiled

            self.taps = Taps(module, list(self.work))
            self.compiled = compiled(module, inputs, {})

    def call(self, *args: Any) -> Any:
        """Run and compare, and return what the graph returns."""
        state = torch.random.get_rng_state()
        copies, more_copies = self._copies(args), self._copies(args)
        with torch.no_grad():
            eager = Eager(self.original)
            wanted = eager.run(*copies)
            torch.random.set_rng_state(state)
            forced = Forced(self.rewritten, self.work, eager.sites)
            got = forced.run(*more_copies)
        # Results and changed inputs: each call was given right values, so that nothing else may differ.
        pairs = zip(tensors_in((got, more_copies)), tensors_in((wanted, copies)), strict=True)
        self.returns_the_same = self.returns_the_same and all(is_close(one, other) for one, other in pairs)
        torch.random.set_rng_state(state)
        results = self.compiled(*args)
        generated: dict[int, tuple[float, tuple[int, int]]] = {}
        if self.taps is not None:
            results, tapped = self.taps.split(results)
            with torch.no_grad():
                for name, values in tapped.items():
                    generated.update(forced.layouts[name].excesses(*values))
        found = [
            SiteError(
                place,
                forced.excesses.get(number, _LOST)[0],
                None if self.taps is None else generated.get(number, _LOST)[0],
                forced.reads_the_same.get(number, False),
                max(forced.excesses.get(number, _LOST), generated.get(number, (0.0, (0, 0))))[1],
            )
            for number, place in enumerate(self.places)
        ]
        # A graph may run several times; the worst run counts.
        pairs_of_runs = zip(self.errors, found, strict=True) if self.errors else ()
        self.errors = [max(one, other, key=_badness) for one, other in pairs_of_runs] or found
        return results

    def _copies(self, args: tuple[Any, ...]) -> list[Any]:
        return [arg.clone() if at in self.changed else arg for at, arg in enumerate(args)]


@contextmanager
def _buffers_kept(model: object) -> Iterator[None]:
    """Give a module's buffers, running statistics say, their values back when the block ends."""
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)


@contextmanager
def _random_adapters(model: object, inputs: Any, seed: int) -> Iterator[None]:
    """Random weights in every slot, and a random slot or none for each sequence, while the block is open."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    layers = [module for module in modules if isinstance(module, LoraLinear | LoraEmbedding)]
    if not layers:
        yield
        return
    routing = layers[0].lora_routing
    slots, stacks = routing.slots, [(layer.lora_a.clone(), layer.lora_b.clone()) for layer in layers]
    batch = len(slots) if slots is not None else next((len(one) for one in tensors_in(inputs) if one.dim()), 1)
    random = torch.Generator().manual_seed(seed)
    # On accelerators kernels read no further than the rank of a slot.
    ranks = routing.ranks
    kept = None if ranks is None else ranks.clone()
    try:
        with torch.no_grad():
            if ranks is not None:
                ranks.fill_(max(layer.lora_b.shape[-1] for layer in layers))
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
            if ranks is not None and kept is not None:
                ranks.copy_(kept)
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


def _difference(got: Any, wanted: Any) -> float:
    pairs = list(zip(tensors_in(got), tensors_in(wanted), strict=True))
    floats = [
        (one.detach().double(), other.detach().double())
        for one, other in pairs
        if other.is_floating_point() and other.numel()
    ]
    largest = max((float(other.abs().max()) for _, other in floats), default=1.0)
    return max((float((one - other).abs().max()) for one, other in floats), default=0.0) / (largest or 1.0)
