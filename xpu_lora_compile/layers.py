"""LoRA in a user's model: its Linear and Embedding modules become ones that add each row's own adapter.

A module keeps its place, its parameters and its names in `state_dict`. Its class changes, and it gains buffers with the
stacked weights of all slots, which move with the model and are not saved with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from xpu_lora_compile.adapters.bank import AdapterBank
from xpu_lora_compile.adapters.checkpoint import REPLACE_CONV1D, Site
from xpu_lora_compile.adapters.config import ALL_LINEAR, Rule, is_targeted, pattern_problem
from xpu_lora_compile.adapters.files import few
from xpu_lora_compile.adapters.names import BaseModel, output_embedding, plain_name
from xpu_lora_compile.adapters.needs import naming, needs_of
from xpu_lora_compile.errors import AttachError
from xpu_lora_compile.generation import follow_generation, generating_methods
from xpu_lora_compile.kernels import preferred_on
from xpu_lora_compile.ops import bgmv_expand, bgmv_shrink, lora_linear
from xpu_lora_compile.ops.lora_linear import add_lora_eagerly
from xpu_lora_compile.rows.routing import Entry, LostRouting, Routing
from xpu_lora_compile.rows.tracing import note_read
from xpu_lora_compile.torch_internals import prepare_for_tracing


class _Unsaid(str):
    """The value of an argument that the caller left out."""

    __slots__ = ()


def attach(
    model: nn.Module,
    *,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    slots: int | None = None,
    max_rank: int | None = None,
    target_modules: str | Collection[str] = _Unsaid(ALL_LINEAR),
    exclude_modules: str | Collection[str] = (),
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> AdapterBank:
    """Make a model ready for adapters, and return the bank that holds them.

    Args:
        model: changed in place; `bank.detach()` undoes it. Outside `bank.use` it computes what it did before. Of what
            torch.compile, DataParallel or DDP returned, the model inside is changed.
        adapters: PEFT folders to load at once, by the names that `use` and `drop` will call them. The arguments below
            that are left out are then read from the folders; where one folder cannot be loaded, the model stays as it
            was.
        slots: K, how many adapters the bank holds at a time; by default 8, or more where `adapters` are more.
        max_rank: R, the highest rank it takes; adapters of lower rank are padded with zeros. By default the highest of
            `adapters`, or 16 without any.
        target_modules: which modules, by PEFT's rules: a list of names or ends of names, a regular expression for the
            whole name, or "all-linear": every `nn.Linear` but the output embedding. By default the modules that
            `adapters` have LoRA on, or "all-linear" without any.
        exclude_modules: modules to leave out, as a list or a regular expression.
        vocab_size: rows of the vocabulary that the adapters were trained with, where the model's has been padded
            since: LoRA on the output embedding then covers the first `vocab_size` logits. By default the most rows
            that one of `adapters` has, or all of the model's without any.
        dtype: of the stored adapters; by default that of each module's weight.

    Raises:
        AttachError: nothing matches, a module that matches is of a kind that carries no LoRA, LoRA is attached
            already, or a number is below 1.
        AdapterError: one of `adapters` cannot be loaded; the error names it.
    """
    model = _unwrapped(model)
    adapters = _check_arguments(
        model, adapters, target_modules, exclude_modules, dtype, slots=slots, max_rank=max_rank, vocab_size=vocab_size
    )
    if any(map(_is_lost, model.modules())):
        detach(model)
    head = output_embedding(model)
    if adapters:
        plain = {
            plain_name(name): module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding) and _is_plain(module)
        }
        needs = needs_of(adapters, {name: _site(module, head) for name, module in plain.items()}, BaseModel.of(model))
        max_rank = max_rank or needs.max_rank
        if isinstance(target_modules, _Unsaid):
            target_modules = "|".join(map(re.escape, needs.modules))
        rows = max((needs.rows[name] for name in needs.modules if plain[name] is head), default=0)
        if head is not None and 0 < rows < head.out_features:
            vocab_size = vocab_size or rows
    modules = _find_targets(model, head, target_modules, exclude_modules)
    if vocab_size is not None and head not in modules.values():
        raise AttachError(
            "attach: vocab_size",
            "an output embedding among target_modules",
            ", ".join(list(modules)[:3]) + ", ...",
            "Name it in target_modules, or leave vocab_size out.",
        )
    sites = {name: _site(module, head, vocab_size) for name, module in modules.items()}
    slots, max_rank = slots or max(8, len(adapters)), max_rank or 16
    prepare_for_tracing()
    # All memory is taken before the first module changes.
    stacks = {name: _empty_stacks(module, sites[name], slots, max_rank, dtype) for name, module in modules.items()}
    routing = Routing(getattr(model, "main_input_name", None))
    layers: dict[str, LoraLinear | LoraEmbedding] = {}
    for name, module in modules.items():
        kind = LoraEmbedding if isinstance(module, nn.Embedding) else LoraLinear
        module.__class__ = kind
        layers[name] = cast("LoraLinear | LoraEmbedding", module)
        layers[name].lora_site, layers[name].lora_name, layers[name].lora_routing = sites[name], name, routing
        for buffer, stack in stacks[name].items():
            module.register_buffer(buffer, stack, persistent=False)
    undo = _hook_entries(model, layers, routing) + _have_parents_call(model, layers)
    bank = AdapterBank(model, layers, routing, slots, max_rank, undo)
    undo += follow_generation(model, bank)
    try:
        for name, folder in adapters.items():
            with naming(name):
                bank.load(name, folder)
    except BaseException:
        bank.detach()
        raise
    return bank


class LoraLinear(nn.Linear):
    """A Linear that adds `B[i] @ A[i] @ x` to the rows of adapter i, one shrink and one expand for the batch.

    Buffers: `lora_a` `[K, R, D]`, `lora_b` `[K, W, R]`, with scaling folded into B; a free slot is all zeros.
    """

    lora_site: Site
    lora_name: str
    lora_routing: Routing
    lora_a: Tensor
    lora_b: Tensor

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, for calls by keyword
        """The base layer's output, with each row's adapter added while a `bank.use` block runs."""
        indices = self.lora_routing.rows_of(self, input, 1)
        if indices is None:
            return super().forward(input)
        # Rows first, so that the op changes the product itself and not a view of it: see `backend._SAFE`.
        rows = input.reshape(-1, input.shape[-1])
        output = super().forward(rows)
        shape = (*input.shape[:-1], output.shape[1])
        columns = min(self.lora_b.shape[1], output.shape[1])
        # What a CPU's kernel does not ask for need not be an input of its graphs.
        ranks = None if rows.device.type == "cpu" else self.lora_routing.ranks
        if add_lora_eagerly(output, rows, self.lora_a, self.lora_b, indices, columns, ranks):
            return output.view(shape)
        if torch.is_grad_enabled() or ranks is not None:
            b = self.lora_b.narrow(1, 0, columns)
            return lora_linear(output, rows, [self.lora_a], [b], indices, [0], ranks=ranks).view(shape)
        hidden = rows.new_empty(
            rows.shape[0], self.lora_a.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32)
        )
        bgmv_shrink(hidden, rows, self.lora_a, indices)
        bgmv_expand(output, hidden, self.lora_b, indices)
        return output.view(shape)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The base weight; a parent that reads it without a call of the layer leaves LoRA out."""
        return _weight_of(self)

    def restore(self) -> None:
        """Become a plain Linear again."""
        _remove(self, nn.Linear)

    def store(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Copy A `[r, D]` and B `[W', r]` into an empty slot."""
        self.lora_a[slot, : a.shape[0]].copy_(a)
        self.lora_b[slot, : b.shape[0], : b.shape[1]].copy_(b)


class LoraEmbedding(nn.Embedding):
    """An Embedding that adds `B[i] @ A[i][:, token]` to the rows of adapter i.

    Buffers: `lora_a` `[K, V, R]`, one row a token; `lora_b` `[K, W, R]`, with scaling folded in.
    """

    lora_site: Site
    lora_name: str
    lora_routing: Routing
    lora_a: Tensor
    lora_b: Tensor

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, for calls by keyword
        """The base layer's output, with each row's adapter added while a `bank.use` block runs."""
        indices = self.lora_routing.rows_of(self, input, 0)
        if indices is None:
            return super().forward(input)
        tokens = input.reshape(-1)
        output = super().forward(tokens)
        # A row without an adapter may read any slot: the op below drops what it computed.
        hidden = self.lora_a[indices.clamp(min=0), tokens]
        bgmv_expand(output, hidden, self.lora_b, indices)
        return output.view(*input.shape, output.shape[1])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The base weight; a parent that reads it without a call of the layer leaves LoRA out."""
        return _weight_of(self)

    def restore(self) -> None:
        """Become a plain Embedding again."""
        _remove(self, nn.Embedding)

    def store(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Copy A `[r, V']` and B `[W, r]` into an empty slot."""
        self.lora_a[slot, : a.shape[1], : a.shape[0]].copy_(a.t())
        self.lora_b[slot, :, : b.shape[1]].copy_(b)


def _empty_stacks(
    module: nn.Linear | nn.Embedding, site: Site, slots: int, rank: int, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Zeros for A and B of every slot, beside the module's weight."""
    a = (rank, site.in_features) if site.kind == "linear" else (site.in_features, rank)
    # The columns of one rank side by side, or the ranks of one column: as the kernel reads B.
    by_rank = preferred_on(module.weight.device.type).stores_b_by_rank
    b = (rank, site.out_features) if by_rank else (site.out_features, rank)
    shapes = {"lora_a": (slots, *a), "lora_b": (slots, *b)}
    # A buffer made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        stacks = {
            name: torch.zeros(shape, dtype=dtype or module.weight.dtype, device=module.weight.device)
            for name, shape in shapes.items()
        }
        return stacks | {"lora_b": stacks["lora_b"].transpose(1, 2)} if by_rank else stacks


def _weight_of(layer: LoraLinear | LoraEmbedding) -> Tensor:
    weight = cast("Tensor", layer._parameters["weight"])
    routing = layer.lora_routing
    if routing.slots is not None:
        if is_compiling():
            note_read(routing, layer, weight)
        else:
            routing.note_read(layer)
    return weight


def _hook_entries(model: nn.Module, layers: Mapping[str, nn.Module], routing: Routing) -> list[Callable[[], None]]:
    """Hook the modules that people call and that hold layers: those that are not one of a list of blocks."""
    entries: dict[str, nn.Module] = {"": model}
    for name in layers:
        parent, path = model, ""
        for key in name.split(".")[:-1]:
            if isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                break
            parent, path = parent.get_submodule(key), f"{path}.{key}" if path else key
            if not isinstance(parent, nn.ModuleList | nn.ModuleDict):
                entries[path] = parent
    embedding = _input_embedding(model)
    routing.entries = entries
    routing.parts = [path for path, module in entries.items() if path and embedding not in list(module.modules())]
    return [handle.remove for path, module in entries.items() for handle in Entry(path, routing).hook(module)]


def _input_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that reads the tokens, where the model is a transformer that says so."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _have_parents_call(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[Callable[[], None]]:
    """Keep PyTorch's transformer layers from reading the weights of layers instead of calling them, for speed."""
    undo: list[Callable[[], None]] = []
    for name, module in model.named_modules():
        if not any(layer.startswith(f"{name}." if name else "") for layer in layers):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            undo.append(partial(setattr, module, "activation_relu_or_gelu", module.activation_relu_or_gelu))
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            undo.append(partial(setattr, module, "use_nested_tensor", module.use_nested_tensor))
            module.use_nested_tensor = False
    return undo


def detach(model: nn.Module) -> None:
    """Take LoRA out of a copied or unpickled model, which belongs to no bank.

    Raises:
        AttachError: the model has no LoRA, or has a bank, whose `detach` does it.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLinear | LoraEmbedding)]
    if not layers or not all(isinstance(layer.lora_routing, LostRouting) for layer in layers):
        got, remedy = (
            ("a model with a bank", "Call `bank.detach()`.") if layers else ("a plain model", "Use it as it is.")
        )
        raise AttachError("detach", "a copy of a model that LoRA was attached to", got, remedy)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Entry):
                    hooks.pop(key)
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_always_called.pop(key, None)
        for name in generating_methods(module):
            vars(module).pop(name)
    for layer in layers:
        layer.restore()


def _remove(module: nn.Module, former: type[nn.Module]) -> None:
    for name in ("lora_a", "lora_b", "lora_routing", "lora_name", "lora_site"):
        delattr(module, name)
    module.__class__ = former


def _site(module: nn.Linear | nn.Embedding, head: nn.Linear | None, vocab_size: int | None = None) -> Site:
    if isinstance(module, nn.Embedding):
        return Site("embedding", module.num_embeddings, module.embedding_dim, padded=True)
    rows = vocab_size if module is head and vocab_size else module.out_features
    return Site("linear", module.in_features, rows, padded=module is head)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of what torch.compile, DataParallel and DDP return."""
    while isinstance(model, nn.Module):
        # The class of torch.compile's wrapper is not public.
        inner = model._modules.get("_orig_mod")
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            break
        model = inner
    return model


def _check_arguments(
    model: nn.Module,
    adapters: Mapping[str, str | os.PathLike[str]] | None,
    target_modules: object,
    exclude_modules: object,
    dtype: torch.dtype | None,
    **numbers: int | None,
) -> dict[str, str | os.PathLike[str]]:
    """Return the adapters, having checked the arguments."""
    if not isinstance(model, nn.Module):
        raise AttachError("attach: model", "a torch.nn.Module", type(model).__name__, "Pass the model itself.")
    for name, number in numbers.items():
        if number is not None and (type(number) is not int or number < 1):
            raise AttachError(f"attach: {name}", "an integer of at least 1", repr(number), "Pass such a number.")
    if adapters is not None and not isinstance(adapters, Mapping):
        remedy = 'Write adapters={"a name": "path/to/folder"}.'
        raise AttachError("attach: adapters", "a mapping of names and folders", type(adapters).__name__, remedy)
    adapters = dict(adapters or {})
    slots = numbers["slots"]
    if slots is not None and slots < len(adapters):
        remedy = f"Pass slots={len(adapters)}, or leave it out."
        raise AttachError("attach: slots", f"a slot for each of {len(adapters)} adapters", str(slots), remedy)
    if hasattr(model, "peft_config"):
        remedy = "Load the model without adapters, or take them off: model = peft_model.unload()."
        raise AttachError("attach: model", "the plain base model", "one that PEFT has wrapped", remedy)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise AttachError(
            "attach: model", "a model with its weights", "one that FSDP has cut up", "Load it without FSDP."
        )
    for name, rule in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        if not isinstance(rule, str | list | tuple | set | frozenset):
            remedy = 'Pass a list such as ["q_proj", "v_proj"].'
            raise AttachError(f"attach: {name}", "a list of names or a string", repr(rule), remedy)
        if isinstance(rule, str) and (problem := pattern_problem(rule)):
            remedy = "Pass a list of names, or an expression that re.compile() takes."
            raise AttachError(f"attach: {name}", "a regular expression", f"{rule!r}: {problem}", remedy)
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise AttachError("attach: dtype", "float32, bfloat16 or float16", str(dtype), "Leave it out for the model's.")
    if any(isinstance(module, LoraLinear | LoraEmbedding) for module in model.modules() if not _is_lost(module)):
        raise AttachError("attach", "a model without LoRA", "one that has it", "Call `bank.detach()` first.")
    return adapters


def _is_lost(module: nn.Module) -> bool:
    return isinstance(getattr(module, "lora_routing", None), LostRouting)


def _find_targets(
    model: nn.Module, head: nn.Module | None, target_modules: Rule, exclude_modules: Rule
) -> dict[str, nn.Linear | nn.Embedding]:
    present = dict(model.named_modules())
    matched = {
        name: module
        for name, module in present.items()
        if is_targeted(
            plain_name(name),
            target_modules,
            exclude_modules,
            plain_linear=isinstance(module, nn.Linear) and module is not head,
        )
    }
    strangers = {name: module for name, module in matched.items() if not _is_plain(module)}
    if strangers:
        raise _cannot_carry(strangers, plain_ones=len(matched) - len(strangers))
    if not matched:
        names = sorted({name.rsplit(".", 1)[-1] for name, module in present.items() if _is_plain(module)})
        conv1d = {name.rsplit(".", 1)[-1] for name, module in present.items() if _is_conv1d(module)}
        if conv1d and isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
            got = f"a model whose layers {few(sorted(conv1d))} are Conv1D"
            raise AttachError("attach: target_modules", "layers that are nn.Linear", got, REPLACE_CONV1D)
        raise AttachError(
            "attach: target_modules",
            f"names of modules such as {', '.join(names[:12]) or 'there are none in this model'}",
            f"{target_modules!r}, which matches nothing",
            "Pass some of these names; adapter_config.json has those of an adapter in its target_modules.",
        )
    return {name: module for name, module in matched.items() if isinstance(module, nn.Linear | nn.Embedding)}


def _cannot_carry(strangers: Mapping[str, nn.Module], plain_ones: int) -> AttachError:
    """Say of what kind the modules are that a rule names and that carry no LoRA, and what to do."""
    hooked = [name for name, module in strangers.items() if "forward" in vars(module)]
    computed = [
        name
        for name, module in strangers.items()
        if type(module) in (nn.Linear, nn.Embedding) and "weight" not in module._parameters
    ]
    kinds = [
        f"{name} ({type(module).__name__})"
        + (" with a forward of its own" if name in hooked else "")
        + (" whose weight is computed from others" if name in computed else "")
        for name, module in strangers.items()
    ]
    if hooked:
        # It may compute something else, or move the weights in and out.
        remedy = (
            "Accelerate puts it there, for device_map= and for offloading: attach and load before "
            "dispatch_model() or cpu_offload(). To take the hooks off: "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True), and then "
            "`for module in model.modules(): vars(module).pop('forward', None)`."
        )
    elif computed:
        remedy = (
            "Make the weight a parameter again: torch.nn.utils.remove_weight_norm(module), "
            "remove_spectral_norm(module) or prune.remove(module, 'weight')."
        )
    elif any(_is_conv1d(module) for module in strangers.values()):
        remedy = REPLACE_CONV1D
    elif plain_ones:
        # A subclass may compute something else, or the parent may read the weight without a call.
        remedy = f"Leave them out: exclude_modules={list(strangers)!r}."
    else:
        remedy = (
            "Name other modules in target_modules. Where a subclass of nn.Linear computes the same as nn.Linear, put "
            "an nn.Linear with its weight and bias in its place before you attach."
        )
    wanted = "plain nn.Linear or nn.Embedding modules: no subclass, no quantized weight, no hooked forward"
    return AttachError("attach: target_modules", wanted, few(kinds), remedy)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of transformers' GPT-2, whose weight is transposed."""
    return type(module).__name__ == "Conv1D"


def _is_plain(module: nn.Module) -> bool:
    return (
        type(module) in (nn.Linear, nn.Embedding)
        and "forward" not in vars(module)
        and isinstance(weight := module._parameters.get("weight"), Tensor)
        and weight.is_floating_point()
        and not hasattr(module, "lora_a")
    )
