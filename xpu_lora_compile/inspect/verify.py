"""Whether a compiled model computes what it should, call by call: `print(xlc.verify(model)(inputs))`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from xpu_lora_compile.adapters.bank import NO_ADAPTER
from xpu_lora_compile.errors import KernelError, OptionError, VerificationError, counted
from xpu_lora_compile.inspect.replay import Eager, Forced, Taps, copy_of, is_close, tensors_in
from xpu_lora_compile.kernels import forced_kernel
from xpu_lora_compile.layers.host import LoraLayer
from xpu_lora_compile.passes import check_environment, rewrite
from xpu_lora_compile.passes.decisions import Decision, decisions_on
from xpu_lora_compile.passes.find_sites import find_sites
from xpu_lora_compile.passes.graph import Rewrite
from xpu_lora_compile.passes.memory import input_storages, storages_of, written_by
from xpu_lora_compile.rows.routing import BatchRouting
from xpu_lora_compile.terminal import wrapped
from xpu_lora_compile.torch_internals import fresh_compilation, is_wrapper


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
        isolation: of each module that LoRA is attached to, how many rows of other sequences changed a bit when one
            sequence was given another adapter: 0 is right. Empty for a batch of one, and for a model without a bank.
    """

    sites: list[SiteError]
    output_error: float
    unchecked: int
    returns_the_same: bool = True
    isolation: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        worst = sorted(self.sites, key=lambda site: max(site.rewritten, site.compiled or 0.0), reverse=True)[:5]
        right = sum(site.is_right for site in self.sites)
        difference = f"the results of the model differ by {self.output_error:.2g} of their largest element."
        lines = [f"{counted(len(self.sites), 'site')}, {right} of them right; {difference}"]
        if self.unchecked:
            lines.append(f"Not compared: {counted(self.unchecked, 'site')} in subgraphs.")
        if not self.returns_the_same:
            lines.append("WRONG: the rewritten graph changes something beside these calls.")
        if self.isolation:
            changed = {name: rows for name, rows in self.isolation.items() if rows}
            kept = f"{len(self.isolation) - len(changed)} of {len(self.isolation)} modules"
            lines.append(f"Isolation: with another adapter for one sequence, other rows keep their bits in {kept}.")
            lines += [f"  LEAK: {name}, {counted(rows, 'row')}" for name, rows in list(changed.items())[:5]]
        else:
            lines.append("Isolation: not checked. It takes an attached model, and inputs of two sequences or more.")
        lines.append("Worst errors, as fractions of what rounding allows (rewritten graph, generated code):")
        lines = [wrapped(line, indent=2) for line in lines]
        for site in worst:
            compiled = "-" if site.compiled is None else f"{site.compiled:.3g}"
            wrong = "" if site.is_right else "   WRONG" + ("" if site.reads_the_same else ": it reads something else")
            figures = f"  {site.rewritten:8.3g}  {compiled:>8}  "
            lines.append(wrapped(f"{figures}{site.place} at {list(site.at)}{wrong}", indent=len(figures)))
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
            _random_adapters(plain, (args, kwargs), seed) as draw,
            torch.random.fork_rng(),
        ):
            torch.manual_seed(seed)
            with _buffers_kept(plain):
                wanted = plain(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            torch.manual_seed(seed)
            with _buffers_kept(plain):
                compiled: Any = torch.compile(cast("Callable[..., Any]", plain), backend=backend)
                got = compiled(*copy.deepcopy(args), **copy.deepcopy(kwargs))

            def again() -> Any:
                torch.manual_seed(seed)
                with _buffers_kept(plain):
                    return plain(*copy.deepcopy(args), **copy.deepcopy(kwargs))

            isolation = _isolation(plain, draw, again)
        sites = [site for check in checks for site in check.errors]
        result = Verification(
            sites,
            _difference(got, wanted),
            sum(check.unchecked for check in checks),
            all(check.returns_the_same for check in checks),
            isolation,
        )
        wrong = [site for site in sites if not site.is_right]
        if not (sites or result.unchecked):
            error = VerificationError(
                "verify", "a call that adds LoRA", "none", "Attach LoRA to the model, or call the ops."
            )
            error.verification = result
            raise error
        if leaks := [name for name, rows in isolation.items() if rows]:
            error = VerificationError(
                "verify",
                "rows that keep their bits when another sequence gets another adapter",
                f"{counted(len(leaks), 'module')} where they change, the first one {leaks[0]}\n{result}",
                "Look at what the model does before that module: it mixes sequences, or their rows change places.",
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
        find_sites(module.graph, Rewrite())
        decisions = _decisions(module.graph)
        self.places = [decision.place for decision in decisions]
        self.changed = _changed_inputs(module.graph)
        self.original = copy_of(module)
        # A base product that its LoRA computes would have no value to compare with.
        self.unchecked = len(rewrite(module, keep_bases=True)) - len(decisions)
        # The calls that do the sites' work, each with the numbers of its sites.
        numbers = {id(decision): number for number, decision in enumerate(decisions)}
        self.work = {
            node.name: [numbers[id(decision)] for decision in decisions_on(node)]
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
        self.returns_the_same = self.returns_the_same and all(
            # A weight of another library's class, which no op of ours writes to, may know few ops.
            is_wrapper(result) or is_close(result, other)
            for result, other in pairs
        )
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
        self.errors = [max(site, other, key=_badness) for site, other in pairs_of_runs] or found
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
def _random_adapters(model: object, inputs: Any, seed: int) -> Iterator[Draw | None]:
    """Random weights in every slot, and a random slot or none for each sequence, while the block is open."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    if not layers:
        yield None
        return
    routings = list(dict.fromkeys(layer.lora_routing for layer in layers))
    before = [(routing, routing.sequence_slots, routing.block, routing.lengths) for routing in routings]
    stacks = [stack for layer in layers for stack in layer.lora_factors]
    tables = [cast("Tensor", layer.lora_pages) for layer in layers if hasattr(layer, "lora_pages")]
    copies = [stack.clone() for stack in (*stacks, *tables)]
    mixes = [(routing.mix_slots, routing.mix_weights) for routing in routings]
    first_size = next((len(tensor) for tensor in tensors_in(inputs) if tensor.dim()), 1)
    random = torch.Generator().manual_seed(seed)
    # On accelerators kernels read no further than the rank of a slot.
    ranks = routings[0].ranks
    kept = None if ranks is None else ranks.clone()
    token = routings[0].mine.set(draw := Draw())
    try:
        with torch.no_grad():
            if ranks is not None:
                ranks.fill_(max(stack.shape[-1] for stack in stacks[1::2]))
            for stack in stacks:
                # The product of both then adds about as much as a linear layer gives.
                stack.copy_(torch.randn(stack.shape, generator=random) / stack.shape[-1] ** 0.5)
            for layer in layers:
                if hasattr(layer, "lora_pages"):
                    # A page for each expert of each slot, or one for several.
                    table = cast("Tensor", layer.lora_pages)[:-1]
                    table.copy_(torch.arange(table.numel()).view(table.shape) % len(layer.lora_factors[0]))
        number, device = layers[0].slot_count, stacks[0].device
        # An adapter first, then none, then the other adapters, in as many rounds as it takes; in any order.
        first, *rest = torch.randperm(number, generator=random).tolist()
        kinds = torch.tensor([first, NO_ADAPTER, *rest])
        for routing, slots, block, lengths in before:
            batch = len(lengths or block.slots_of(routing.part)) if slots is not None else first_size
            chosen = kinds[torch.arange(batch) % len(kinds)][torch.randperm(batch, generator=random)]
            draw.add(routing, chosen.tolist(), lengths, device, number)
            if (several := routing.main.adapters_per_row) > 1:
                # Of as many mixes as there are slots, each of others; the last is that of the base model.
                of_mix = (torch.arange(number)[:, None] + torch.arange(several)) % number
                of_mix = torch.cat([of_mix, torch.full((1, several), NO_ADAPTER)])
                routing.mix_slots = of_mix.to(device)
                routing.mix_weights = torch.randn(of_mix.shape, generator=random).to(device)
        yield draw
    finally:
        routings[0].mine.reset(token)
        for routing, slots, block, lengths in before:
            routing.point(slots, block, lengths)
        for routing, mix in zip(routings, mixes, strict=True):
            routing.mix_slots, routing.mix_weights = mix
        with torch.no_grad():
            if ranks is not None and kept is not None:
                ranks.copy_(kept)
            for stack, copy in zip((*stacks, *tables), copies, strict=True):
                stack.copy_(copy)


class Draw:
    """The slots that were drawn for each sequence, in the place of a `use` block."""

    # Each adapter counts for all tokens.
    active_tokens = prompt = prompts = None

    def __init__(self) -> None:
        self.called: set[str] = set()
        self.read: set[str] = set()
        self._slots: dict[str, list[int]] = {}
        self._routings: dict[str, tuple[BatchRouting, tuple[int, ...] | None, torch.device, int]] = {}

    def add(
        self,
        routing: BatchRouting,
        slots: list[int],
        lengths: tuple[int, ...] | None,
        device: torch.device,
        number: int,
    ) -> None:
        """Have a routing use these slots."""
        self._slots[routing.part] = slots
        self._routings[routing.part] = routing, lengths, device, number
        self._point(routing.part)

    def slots_of(self, part: str) -> list[int]:
        """The slot of each sequence."""
        return self._slots[part]

    @property
    def parts(self) -> tuple[str, ...]:
        """The model, "", and parts of it with rows of their own."""
        return tuple(self._slots)

    @contextmanager
    def changed(self, part: str, sequence: int) -> Iterator[None]:
        """Give one sequence the next adapter, or none, while the block is open."""
        slots = self._slots[part]
        number = self._routings[part][3]
        self._slots[part] = [*slots[:sequence], (slots[sequence] + 2) % (number + 1) - 1, *slots[sequence + 1 :]]
        self._point(part)
        try:
            yield
        finally:
            self._slots[part] = slots
            self._point(part)

    def _point(self, part: str) -> None:
        routing, lengths, device, _ = self._routings[part]
        slots = torch.tensor(self._slots[part])
        tokens = slots if lengths is None else slots.repeat_interleave(torch.tensor(lengths))
        routing.point(tokens.to(device), self, lengths)


def _isolation(model: object, draw: Draw | None, run: Callable[[], Any]) -> dict[str, int]:
    """Of each layer, how many rows of other sequences have other bits once one sequence has another adapter."""
    if draw is None or not isinstance(model, nn.Module):
        return {}
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    found: dict[str, int] = {}
    wanted = _digests(layers, run)
    for part in draw.parts:
        sequences = range(len(draw.slots_of(part)))
        for sequence in sequences[:_SEQUENCES] if len(sequences) > 1 else ():
            with draw.changed(part, sequence):
                got = _digests(layers, run)
            for key, (owners, bits) in wanted.items():
                name, others = key[0], torch.ones(bits.shape, dtype=torch.bool)
                if key in got and owners is not None and key[2] == part:
                    others = owners != sequence
                elif key in got and key[2] != part:
                    # Rows of other parts may well depend on this one.
                    continue
                changed = bits.numel() if key not in got else int((bits != got[key][1])[others].sum())
                found[name] = found.get(name, 0) + changed
    return found


# So many sequences of a batch get another adapter, one after the other.
_SEQUENCES = 4


def _digests(
    layers: Sequence[LoraLayer], run: Callable[[], Any]
) -> dict[tuple[str, int, str], tuple[Tensor | None, Tensor]]:
    """Of each call of a layer: the owner of each row, and a number that other bits of the row would make another."""
    found: dict[tuple[str, int, str], tuple[Tensor | None, Tensor]] = {}
    calls: dict[str, int] = {}

    def note(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        inputs = next(iter((*args, *kwargs.values())))
        owners = layer.lora_routing.owners_of(layer, inputs, layer.lora_features)
        calls[layer.lora_name] = number = calls.get(layer.lora_name, 0) + 1
        count = output.shape[:-1].numel() if owners is None else len(owners)
        bits = output.detach().reshape(count, -1).contiguous()
        whole = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]).long()
        # Odd numbers lose no bit where they wrap around.
        odd = 2 * torch.arange(whole.shape[1], device=whole.device) * 0x9E3779B97F4A7C1 + 1
        found[layer.lora_name, number, layer.lora_routing.part] = owners, (whole * odd).sum(1).cpu()

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


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
        (result.detach().double(), other.detach().double())
        for result, other in pairs
        if other.is_floating_point() and other.numel()
    ]
    largest = max((float(other.abs().max()) for _, other in floats), default=1.0)
    return max((float((result - other).abs().max()) for result, other in floats), default=0.0) / (largest or 1.0)
