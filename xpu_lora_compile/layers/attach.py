"""LoRA in a user's model: its modules that can carry LoRA become ones that add each row's own adapter.

A module keeps its place, its parameters and its names in `state_dict`. Its class changes, and it gains buffers with the
stacked weights of all slots, which move with the model and are not saved with it.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from xpu_lora_compile.adapters.bank import AdapterBank
from xpu_lora_compile.adapters.checkpoint import ModuleSizes
from xpu_lora_compile.adapters.config import ALL_LINEAR, BIASES, pattern_problem
from xpu_lora_compile.adapters.names import BaseModel, output_embedding, plain_name
from xpu_lora_compile.adapters.needs import naming, needs_of
from xpu_lora_compile.errors import AttachError, LoraError, UnmatchedTensorError
from xpu_lora_compile.generation import follow_generation, generating_methods
from xpu_lora_compile.layers import HOSTS
from xpu_lora_compile.layers.declared import Declared
from xpu_lora_compile.layers.experts import Experts, become_layer, count_pages, empty_pages
from xpu_lora_compile.layers.extras import ExtraLayer, empty_extras, extra_class, room_of
from xpu_lora_compile.layers.host import Host, LoraLayer, empty_b, have_hook_call
from xpu_lora_compile.layers.peft import UNTAKEN, attach_live, checked_live, is_peft_model, taken_over, untaken_in_call
from xpu_lora_compile.layers.several import several_class
from xpu_lora_compile.layers.targets import carriers_in, find_experts, find_heads, find_targets, find_tied
from xpu_lora_compile.rows.routing import BatchRouting, Entry, LostRouting
from xpu_lora_compile.torch_internals import ONCE_IT_RAN, free_memory, prepare_for_tracing


class _Unsaid(str):
    """The value of an argument that the caller left out."""

    __slots__ = ()


def attach(
    model: nn.Module,
    *,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    slots: int | None = None,
    max_rank: int | None = None,
    adapters_per_row: int = 1,
    target_modules: str | Collection[str] = _Unsaid(ALL_LINEAR),
    exclude_modules: str | Collection[str] = (),
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
    linear_classes: Collection[type[nn.Module]] = (),
    use_dora: bool | None = None,
    lora_bias: bool | None = None,
    bias: str | None = None,
    modules_to_save: Collection[str] | None = None,
    trainable_token_indices: int | None = None,
    target_parameters: Collection[str] | None = None,
    expert_pages: int | None = None,
) -> AdapterBank:
    """Make a model ready for adapters, and return the bank that holds them.

    Args:
        model: changed in place; `bank.detach()` undoes it. Outside `bank.use` it computes what it did before. Of what
            torch.compile, DataParallel or DDP returned, the model inside is changed. A PeftModel goes on taking its
            adapters from PEFT; then `slots`, `max_rank`, `dtype` and room are by default what its adapters have, and
            modules are PEFT's.
        adapters: PEFT folders to load at once, by the names that `use` and `drop` will call them. The arguments below
            that are left out are then read from the folders; where one folder cannot be loaded, the model stays as it
            was.
        slots: K, how many adapters the bank holds at a time; by default 8, or more where `adapters` are more.
        max_rank: R, the highest rank it takes; adapters of lower rank are padded with zeros. By default the highest of
            `adapters`, or 16 without any.
        adapters_per_row: M, how many adapters `use` may name for a sequence, with weights. With 1, the default, it
            takes names alone, and no layer computes with a weight.
        target_modules: which modules, by PEFT's rules: a list of names or ends of names, a regular expression for the
            whole name, or "all-linear": every `nn.Linear` but the output embedding. By default the modules that
            `adapters` have LoRA on, or "all-linear" without any.
        exclude_modules: modules to leave out, as a list or a regular expression.
        vocab_size: rows of the vocabulary that the adapters were trained with, where the model's has been padded
            since: LoRA on the output embedding then covers the first `vocab_size` logits. By default the most rows
            that one of `adapters` has, or all of the model's without any.
        dtype: of the stored adapters, to which those of files are rounded; PEFT keeps float32. By default that in
            which each module computes: of its weight, or where that is quantized, what the module or its bias says, or
            most of the model's numbers have.
        linear_classes: further classes of modules that map `[..., in_features]` to `[..., out_features]`, have both
            numbers as attributes, and are called by their parents.
        use_dora: whether slots have room for DoRA, which costs a gather and a product for each module. This and the
            next four are PEFT's names; by default they are what `adapters` have, or nothing without any.
        lora_bias: whether slots have room for biases of B.
        bias: "lora_only" or "all": slots have room for other values of the biases of the modules that carry LoRA.
        modules_to_save: modules for which each slot has room for a weight of its own, by their names or the ends of
            these: heads, embeddings, or modules that hold such, as `["classifier"]`. They carry LoRA, too.
        trainable_token_indices: for how many tokens at most each slot has room for rows of its own, in the embedding
            and what is tied to it.
        target_parameters: PEFT's name for parameters that hold the weights of all experts of a mixture, as
            `["mlp.experts.gate_up_proj"]`: the ends of their names. By default those that `adapters` have LoRA on, or
            none without any.
        expert_pages: P, for how many experts each mixture has room, of all slots together: an adapter takes one for
            each expert that it changes. By default one for each expert of each slot.

    Raises:
        AttachError: nothing matches, a module that matches is of a kind that carries no LoRA, LoRA is attached
            already, or a number is below 1.
        AdapterError: one of `adapters` cannot be loaded; the error names it.
    """
    model = _unwrapped(model)
    _check_classes(linear_classes)
    if is_peft_model(model) and all(map(_is_lost, _layers_in(model))):
        if _layers_in(model):
            detach(model)
        return attach_live(
            model,
            attach,
            adapters=adapters,
            slots=slots,
            max_rank=max_rank,
            target_modules=None if isinstance(target_modules, _Unsaid) else target_modules,
            exclude_modules=exclude_modules,
            vocab_size=vocab_size,
            dtype=dtype,
            linear_classes=linear_classes,
            use_dora=use_dora,
            lora_bias=lora_bias,
            bias=bias,
            modules_to_save=modules_to_save,
            trainable_token_indices=trainable_token_indices,
            target_parameters=target_parameters,
            expert_pages=expert_pages,
            adapters_per_row=adapters_per_row,
        )
    adapters = _check_arguments(
        model,
        adapters,
        target_modules,
        exclude_modules,
        dtype,
        slots=slots,
        max_rank=max_rank,
        vocab_size=vocab_size,
        expert_pages=expert_pages,
        adapters_per_row=adapters_per_row,
    )
    _check_room(use_dora, lora_bias, bias, modules_to_save)
    if isinstance(target_parameters, str):
        remedy = f"Pass a list: [{target_parameters!r}]."
        raise AttachError("attach: target_parameters", "a list of names", repr(target_parameters), remedy)
    if trainable_token_indices is not None and not (
        type(trainable_token_indices) is int and trainable_token_indices >= 0
    ):
        got, remedy = repr(trainable_token_indices), "Write trainable_token_indices=4 for adapters with up to 4."
        raise AttachError("attach: trainable_token_indices", "the most tokens of one adapter", got, remedy)
    given_rank, needed_ranks = max_rank, dict[str, int]()
    if any(map(_is_lost, model.modules())):
        detach(model)
    hosts = (*HOSTS, Declared(tuple(linear_classes))) if linear_classes else HOSTS
    head = output_embedding(model)
    if adapters:
        plain = {plain_name(name): carrier for name, carrier in carriers_in(model, hosts).items()}
        able = {
            name: _site(host, module, head) for name, (host, module) in plain.items() if not isinstance(host, Experts)
        }
        try:
            needs = needs_of(adapters, able, BaseModel.of(model, hosts))
        except UnmatchedTensorError as error:
            _say_why_not(model, head, hosts, str(error))
            raise
        needed_ranks |= needs.experts_ranks
        max_rank = max_rank or needs.max_rank
        target_parameters = needs.parameters if target_parameters is None else target_parameters
        if isinstance(target_modules, _Unsaid):
            target_modules = "|".join(map(re.escape, needs.modules))
        for name in needs.modules:
            _, module = plain[name]
            if module is head and 0 < needs.rows[name] < able[name].out_features:
                vocab_size = vocab_size or needs.rows[name]
        use_dora = needs.use_dora if use_dora is None else use_dora
        lora_bias = needs.lora_bias if lora_bias is None else lora_bias
        bias = needs.bias if bias is None else bias
        modules_to_save = needs.modules_to_save if modules_to_save is None else modules_to_save
        if trainable_token_indices is None:
            trainable_token_indices = needs.trainable_token_indices
    slots, max_rank = slots or max(8, len(adapters)), max_rank or 16
    by_parameter = find_experts(model, target_parameters or (), hosts)
    mixtures = {name: found for name, found in by_parameter.items() if isinstance(found[0], Experts)}
    no_modules = bool(by_parameter) and target_modules == ""
    targets = {} if no_modules else find_targets(model, head, target_modules, exclude_modules, hosts)
    targets |= {name: (host, module) for name, (host, module, _) in by_parameter.items() if name not in mixtures}
    for name in [name for name, (host, _) in targets.items() if isinstance(host, Experts)]:
        host, module = targets.pop(name)
        mixtures[name] = host, module, tuple(host.parameter_sites(module))
    highest = given_rank or max(needed_ranks.values(), default=16)
    ranks_of_experts = {
        parameter: given_rank or needed_ranks.get(parameter, highest)
        for *_, parameters in mixtures.values()
        for parameter in parameters
    }
    heads = find_heads(model, modules_to_save or (), hosts)
    embeddings = find_tied(model, _input_embedding(model), hosts) if trainable_token_indices else {}
    all_targets = targets | heads | embeddings
    targets = {name: all_targets[name] for name, _ in model.named_modules() if name in all_targets}
    has_biases = bool(lora_bias), bias in ("lora_only", "all")
    sites = {
        name: replace(
            _site(host, module, head, vocab_size),
            room=room_of(
                host, module, bool(use_dora), *has_biases, is_head=name in heads, has_tokens=name in embeddings
            ),
        )
        for name, (host, module) in targets.items()
    }
    if adapters_per_row > 1:
        _check_several(sites, mixtures)
    if vocab_size is not None and not any(site.kind == "linear" and site.padded for site in sites.values()):
        raise AttachError(
            "attach: vocab_size",
            "an output embedding among target_modules",
            ", ".join(list(targets)[:3]) + ", ...",
            "Name it in target_modules, or leave vocab_size out.",
        )
    prepare_for_tracing()
    carriers = targets | {name: (host, module) for name, (host, module, _) in mixtures.items()}
    _check_devices({name: host.device(module) for name, (host, module) in carriers.items()})
    _check_memory(carriers, sites, mixtures, slots, max_rank, ranks_of_experts, expert_pages, dtype)
    # All memory is taken before the first module changes.
    stacks = {
        name: _empty_stacks(
            host,
            module,
            sites[name],
            slots,
            max_rank,
            dtype or host.dtype(module) or _dtype_of(model),
            trainable_token_indices or 0,
        )
        for name, (host, module) in targets.items()
    }
    pages = {
        name: empty_pages(
            cast("Experts", host),
            module,
            {parameter: ranks_of_experts[parameter] for parameter in parameters},
            slots,
            expert_pages,
            dtype or host.dtype(module) or _dtype_of(model),
        )
        for name, (host, module, parameters) in mixtures.items()
    }
    routing = BatchRouting(getattr(model, "main_input_name", None))
    layers: dict[str, LoraLayer] = {}
    classes = {name: host.layer(module) for name, (host, module) in targets.items()}
    if adapters_per_row > 1:
        classes = {name: several_class(kind, name) for name, kind in classes.items()}
    for name, (host, module) in targets.items():
        module.__class__ = extra_class(classes[name]) if sites[name].room else classes[name]
        have_hook_call(module)
        if isinstance(module, ExtraLayer):
            module.lora_host = host
        layers[name] = layer = cast("LoraLayer", module)
        layer.lora_site, layer.lora_name, layer.lora_routing = sites[name], name, routing
        for buffer, stack in stacks[name].items():
            layer.register_buffer(buffer, stack, persistent=False)
    for name, (host, module, parameters) in mixtures.items():
        become_layer(cast("Experts", host), module, pages[name], parameters)
        have_hook_call(module)
        layers[name] = layer = cast("LoraLayer", module)
        layer.lora_site, layer.lora_name, layer.lora_routing = host.site(module), name, routing
    layers = {name: layers[name] for name, _ in model.named_modules() if name in layers}
    undo = _hook_entries(model, layers, routing) + _have_parents_call(model, layers)
    bank = AdapterBank(model, layers, routing, slots, max_rank, hosts, undo, adapters_per_row)
    undo += follow_generation(model, bank)
    try:
        for name, folder in adapters.items():
            with naming(name):
                bank.load(name, folder)
    except BaseException:
        bank.detach()
        raise
    return bank


def _check_several(sites: Mapping[str, ModuleSizes], mixtures: Collection[str]) -> None:
    """Refuse room for more than A and B: what PEFT makes of several such adapters depends on their order."""
    if mixtures:
        raise AttachError(
            "attach: adapters_per_row",
            "modules of which a row has one input, where a row may have several adapters",
            f"LoRA on experts, of {next(iter(mixtures))}",
            "Leave adapters_per_row out; or leave out target_parameters, and adapters on experts.",
        )
    if roomy := [name for name, site in sites.items() if site.room]:
        raise AttachError(
            "attach: adapters_per_row",
            "slots for A and B alone, where a row may have several adapters",
            f"room for more, on {roomy[0]} and other modules" if len(roomy) > 1 else f"room for more, on {roomy[0]}",
            "Leave adapters_per_row out; or leave out use_dora, lora_bias, bias, modules_to_save and "
            "trainable_token_indices, and adapters that have these.",
        )


def _say_why_not(model: nn.Module, head: nn.Module | None, hosts: Sequence[Host], text: str) -> None:
    """Raise AttachError where a text names modules that carry no LoRA for what they are, and not for their class."""
    able = carriers_in(model, hosts)
    strangers = [
        plain_name(name)
        for name, module in model.named_modules()
        if name not in able and any(host.takes_class(type(module)) for host in hosts)
    ]
    named = [name for name in strangers if name in text]
    if named:
        find_targets(model, head, "|".join(map(re.escape, named)), (), hosts)


def _empty_stacks(
    host: Host, module: nn.Module, site: ModuleSizes, slots: int, rank: int, dtype: torch.dtype, tokens: int
) -> dict[str, Tensor]:
    """Zeros for A and B of every slot, where the module computes."""
    device, a = host.device(module), host.layer(module).shape_of_a(site, rank)
    # A buffer made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        stacks = {"lora_a": torch.zeros(slots, *a, dtype=dtype, device=device)}
        stacks["lora_b"] = empty_b(slots, site.out_features, rank, dtype, device)
        return stacks | empty_extras(host, module, site, slots, tokens, dtype)


def _check_memory(
    carriers: Mapping[str, tuple[Host, nn.Module]],
    sites: Mapping[str, ModuleSizes],
    mixtures: Mapping[str, tuple[Host, nn.Module, tuple[str, ...]]],
    slots: int,
    rank: int,
    ranks_of_experts: Mapping[str, int],
    pages: int | None,
    dtype: torch.dtype | None,
) -> None:
    """Refuse what there is no memory for, before any of it is taken."""
    wanted: dict[torch.device, int] = {}
    of_experts = 0
    for name, (host, module) in carriers.items():
        size, device = (dtype or host.dtype(module) or torch.float32).itemsize, host.device(module)
        if name in sites:
            values = slots * rank * (sites[name].in_features + sites[name].out_features)
        else:
            found = host.parameter_sites(module)
            chosen = {parameter: found[parameter] for parameter in mixtures[name][2]}
            count = count_pages(slots, next(iter(chosen.values())).experts, pages)
            values = count * sum(
                ranks_of_experts[parameter] * (site.in_features + site.out_features)
                for parameter, site in chosen.items()
            )
            of_experts += values * size
        wanted[device] = wanted.get(device, 0) + values * size
    for device, size in wanted.items():
        free = free_memory(device)
        if free is not None and size > free:
            remedy = "Attach with fewer slots, a lower max_rank, or fewer target_modules."
            if of_experts > size // 2:
                remedy = (
                    "An adapter takes a page for each expert that it changes: attach with fewer of them, "
                    "expert_pages=..., with fewer slots, or with a lower max_rank."
                )
            got = f"{slots} slots of {size / slots / 1e9:.2f} GB each, {size / 1e9:.2f} GB in all"
            raise AttachError("attach: model", f"room in the {free / 1e9:.2f} GB that {device} has free", got, remedy)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype that most numbers of a model have, of those that models compute in."""
    counts = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 0)
    for value in (*model.parameters(), *model.buffers()):
        if value.dtype in counts:
            counts[value.dtype] += value.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def _check_devices(devices: Mapping[str, torch.device]) -> None:
    """Refuse modules on several devices: a batch has one row of slots, on one of them."""
    by_device = {device: name for name, device in devices.items()}
    if len(by_device) > 1:
        raise AttachError(
            "attach: model",
            "modules that compute on one device",
            ", ".join(f"{name} on {device}" for device, name in by_device.items()),
            "Name the modules of one device in target_modules, or load the model onto one: "
            'device_map={"": device}, with offloading to the CPU where it has to be.',
        )


def _hook_entries(model: nn.Module, layers: Mapping[str, nn.Module], routing: BatchRouting) -> list[Callable[[], None]]:
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
    """Take LoRA out of a copied or unpickled model, which belongs to no bank; or out of one that PEFT has loaded.

    Raises:
        AttachError: the model has no LoRA, or has a bank, whose `detach` does it.
    """
    if bank := taken_over(model):
        bank.detach()
        return
    layers = _layers_in(model)
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


def _site(host: Host, module: nn.Module, head: nn.Module | None, vocab_size: int | None = None) -> ModuleSizes:
    site = host.site(module)
    if module is not head or site.kind != "linear":
        return site
    return replace(site, out_features=vocab_size or site.out_features, padded=True)


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


def _check_classes(classes: object) -> None:
    if not (
        isinstance(classes, list | tuple | set | frozenset)
        and all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in classes)
    ):
        raise AttachError(
            "attach: linear_classes", "a list of classes of modules", repr(classes), "Write linear_classes=[MyLinear]."
        )


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
    if hasattr(model, "peft_config") and not _layers_in(model):
        remedy = "Attach to the whole PeftModel; or take PEFT off the model: model = peft_model.unload()."
        raise AttachError("attach: model", "a PeftModel, or a plain model", "a model with PEFT's layers inside", remedy)
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
    if not all(map(_is_lost, _layers_in(model))):
        raise AttachError("attach", "a model without LoRA", "one that has it", "Call `bank.detach()` first.")
    return adapters


def _check_room(use_dora: object, lora_bias: object, bias: object, modules_to_save: object) -> None:
    for name, switch in (("use_dora", use_dora), ("lora_bias", lora_bias)):
        if switch is not None and not isinstance(switch, bool):
            raise AttachError(f"attach: {name}", "True or False", repr(switch), f"Write {name}=True.")
    if bias is not None and bias not in BIASES:
        raise AttachError("attach: bias", f"one of {', '.join(BIASES)}", repr(bias), "Write bias='lora_only'.")
    if modules_to_save is not None and not (
        isinstance(modules_to_save, list | tuple | set | frozenset)
        and all(isinstance(name, str) and name for name in modules_to_save)
    ):
        remedy = 'Pass a list such as ["score"].'
        raise AttachError("attach: modules_to_save", "a list of names", repr(modules_to_save), remedy)


def _take_over_what_is_compiled() -> Callable[[], None] | None:
    """Return what has a bank serve the PeftModel in a call of which the backend is asked for code; None without one.

    The backend gets a graph when Dynamo has read PEFT's Python, and made guards of names and numbers that it found. So
    that graph runs once, as it is, and the model is taken over after it.
    """
    model = untaken_in_call()
    try:
        return None if model is None else partial(_take_over, checked_live(model).model)
    except LoraError as error:
        _say_untaken(cast("nn.Module", model), error)
        return None


def _take_over(model: nn.Module) -> None:
    if _layers_in(model) or model in UNTAKEN:
        return
    try:
        attach(model)
    except LoraError as error:
        _say_untaken(model, error)


def _say_untaken(model: nn.Module, error: LoraError) -> None:
    UNTAKEN.add(model)
    warnings.warn(
        f"the backend xpu_lora compiles what PEFT computes, and recompiles as PEFT does: {error}", stacklevel=2
    )


ONCE_IT_RAN.append(_take_over_what_is_compiled)


def _layers_in(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _is_lost(module: nn.Module) -> bool:
    return isinstance(getattr(module, "lora_routing", None), LostRouting)
