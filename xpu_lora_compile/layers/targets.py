"""Which modules of a model a rule names, and what to say where one of them cannot carry LoRA."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from xpu_lora_compile.adapters.config import Rule, is_targeted
from xpu_lora_compile.adapters.files import few
from xpu_lora_compile.adapters.names import plain_name
from xpu_lora_compile.errors import AttachError
from xpu_lora_compile.layers import HOSTS, host_of
from xpu_lora_compile.layers.declared import Declared
from xpu_lora_compile.layers.host import Host, has_other_forward


def carriers_in(model: nn.Module, hosts: Sequence[Host] = HOSTS) -> dict[str, tuple[Host, nn.Module]]:
    """Return the modules of a model that can carry LoRA, each with its host, by name."""
    return {name: (host, module) for name, module in model.named_modules() if (host := host_of(module, hosts))}


def find_targets(
    model: nn.Module,
    head: nn.Module | None,
    target_modules: Rule,
    exclude_modules: Rule,
    hosts: Sequence[Host] = HOSTS,
) -> dict[str, tuple[Host, nn.Module]]:
    """Return the modules that the rules name, each with its host, by name.

    Raises:
        AttachError: the rules name no module, or one that no host takes.
    """
    present, carriers = dict(model.named_modules()), carriers_in(model, hosts)

    def is_linear(name: str, module: nn.Module) -> bool:
        # A linear layer that no host takes is named all the same, and then refused.
        host, _ = carriers.get(name, (None, module))
        if host is None:
            return isinstance(module, nn.Linear) or _is_declared(module, hosts)
        return host.site(module).is_plain

    matched = {
        name: module
        for name, module in present.items()
        if is_targeted(
            plain_name(name),
            target_modules,
            exclude_modules,
            plain_linear=module is not head and is_linear(name, module),
        )
    }
    strangers = {name: module for name, module in matched.items() if name not in carriers}
    if strangers:
        raise _cannot_carry(strangers, hosts, plain_ones=len(matched) - len(strangers))
    if not carriers and not matched:
        raise AttachError(
            "attach: model",
            f"a model with {_names(hosts)} modules",
            f"{type(model).__name__}, which has none",
            "If modules of it are linear layers of another class, say so: linear_classes=[MyLinear].",
        )
    if not matched:
        names = sorted({name.rsplit(".", 1)[-1] for name in carriers})
        raise AttachError(
            "attach: target_modules",
            f"names of modules such as {', '.join(names[:12])}",
            f"{target_modules!r}, which matches nothing",
            "Pass some of these names; adapter_config.json has those of an adapter in its target_modules.",
        )
    _refuse_several_names(model, matched)
    return {name: carriers[name] for name in matched}


def _names(hosts: Sequence[Host]) -> str:
    return " or ".join(host.name for host in hosts)


def _is_declared(module: nn.Module, hosts: Sequence[Host]) -> bool:
    """Whether the caller of `attach` says that a module is a linear layer."""
    return any(isinstance(host, Declared) and host.takes_class(type(module)) for host in hosts)


def _refuse_several_names(model: nn.Module, matched: Mapping[str, nn.Module]) -> None:
    """Refuse a module that two parents hold, or one by two names: PEFT gives LoRA to calls by the first name alone."""
    places: dict[int, list[str]] = {}
    for path, parent in model.named_modules():
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append(f"{path}.{key}" if path else key)
    several = [name for name, module in matched.items() if len(places.get(id(module), ())) > 1]
    if several:
        raise AttachError(
            "attach: target_modules",
            "modules with one name each, since PEFT adds LoRA to calls by the first name alone",
            few([" is ".join(places[id(matched[name])]) for name in several]),
            f"Give each name a module of its own, which may share the weight; or exclude_modules={several!r}.",
        )


def find_experts(
    model: nn.Module, target_parameters: Collection[str], hosts: Sequence[Host] = HOSTS
) -> dict[str, tuple[Host, nn.Module, tuple[str, ...]]]:
    """Return the modules with parameters that these names name, and which: by name.

    Those of mixtures of experts carry LoRA each for themselves; the weight of another module is the module.

    Raises:
        AttachError: a name names no parameter that can carry LoRA for itself.
    """
    carriers = carriers_in(model, hosts)
    parameters = [
        (name, parameter) for name, (host, module) in carriers.items() for parameter in host.parameter_sites(module)
    ]
    # To PEFT a weight of one product is that of one expert.
    sites = {name: host.site(module) for name, (host, module) in carriers.items()}
    parameters += [(name, "weight") for name, site in sites.items() if site.kind == "linear" and not site.kernel]
    chosen: set[tuple[str, str]] = set()
    for target in target_parameters:
        # As PEFT looks them up.
        found = [
            (name, parameter)
            for name, parameter in parameters
            if f".{plain_name(name)}.{parameter}".endswith(f".{target}")
        ]
        if not found:
            able = sorted({f"{plain_name(name).rpartition('.')[2]}.{parameter}" for name, parameter in parameters})
            able.sort(key=lambda name: name.endswith(".weight"))
            raise AttachError(
                "attach: target_parameters",
                f"names of parameters such as {', '.join(able[:4])}" if able else "parameters with weights of experts",
                f"{target!r}, which matches none",
                "Pass ends of their names, as target_parameters of adapter_config.json has them."
                if able
                else "Leave it out: this model has none that carry LoRA.",
            )
        chosen.update(found)
    of_module = {
        name: tuple(parameter for parameter in (*host.parameter_sites(module), "weight") if (name, parameter) in chosen)
        for name, (host, module) in carriers.items()
    }
    return {name: (*carriers[name], names) for name, names in of_module.items() if names}


def find_heads(
    model: nn.Module, modules_to_save: Collection[str], hosts: Sequence[Host] = HOSTS
) -> dict[str, tuple[Host, nn.Module]]:
    """Return the modules that can have a weight for each slot, of those that these names name, by name.

    Raises:
        AttachError: a name names no module, or one that has parameters and is no plain `nn.Linear` or `nn.Embedding`.
    """
    carriers, found = carriers_in(model, hosts), {}
    for saved in modules_to_save:
        # As PEFT looks them up.
        tops = [(name, module) for name, module in model.named_modules() if plain_name(name).endswith(saved)]
        if not tops:
            remedy = "Pass names of modules, or their ends, as modules_to_save of adapter_config.json has them."
            raise AttachError(
                "attach: modules_to_save", "names of modules", f"{saved!r}, which matches nothing", remedy
            )
        for top, module in tops:
            for end, part in module.named_modules():
                name = ".".join(filter(None, (top, end)))
                if not part._parameters:
                    continue
                if not (isinstance(part, nn.Linear | nn.Embedding) and name in carriers and _is_plain(part)):
                    got = f"{name} ({type(part).__name__})"
                    remedy = "Leave the name out. PEFT serves adapters with such modules, one at a time."
                    raise AttachError("attach: modules_to_save", "nn.Linear or nn.Embedding modules", got, remedy)
                found[name] = carriers[name]
    _refuse_several_names(model, {name: module for name, (_, module) in found.items()})
    return found


def find_tied(
    model: nn.Module, embedding: nn.Module | None, hosts: Sequence[Host] = HOSTS
) -> dict[str, tuple[Host, nn.Module]]:
    """Return the embedding of a model and the modules that share its weight, by name.

    Raises:
        AttachError: the model names no embedding; or a module that shares the weight can have no rows of its own.
    """
    where, remedy = "attach: trainable_token_indices", "Leave trainable_token_indices out."
    if not isinstance(embedding, nn.Embedding):
        got = f"one whose input embedding is {type(embedding).__name__}"
        raise AttachError(where, "a model with an nn.Embedding", got, remedy)
    weight, carriers = embedding._parameters.get("weight"), carriers_in(model, hosts)
    users = {name: module for name, module in model.named_modules() if module._parameters.get("weight") is weight}
    for name, module in users.items():
        # PEFT leaves the bias of a tied head out.
        has_bias = module._parameters.get("bias") is not None
        if (
            name not in carriers
            or not isinstance(module, nn.Linear | nn.Embedding)
            or has_bias
            or not _is_plain(module)
        ):
            got = f"{name} ({type(module).__name__}{', with a bias' if has_bias else ''})"
            raise AttachError(
                where, "an embedding shared by nn.Embedding and nn.Linear modules without biases", got, remedy
            )
    _refuse_several_names(model, users)
    return {name: carriers[name] for name in users}


def _is_plain(module: nn.Module) -> bool:
    """Whether a weight is numbers, and nothing that stands for them."""
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize > 1


def _of_whole_numbers(module: nn.Module) -> str:
    weight = module._parameters.get("weight")
    return "" if weight is None or weight.is_floating_point() else f" with a weight of {weight.dtype}"


def _cannot_carry(strangers: Mapping[str, nn.Module], hosts: Sequence[Host], plain_ones: int) -> AttachError:
    """Say of what kind the modules are that a rule names and that carry no LoRA, and what to do."""
    if unsized := [name for name, module in strangers.items() if _is_declared(module, hosts)]:
        kind = type(strangers[unsized[0]])
        return AttachError(
            "attach: linear_classes",
            "modules with the whole numbers in_features and out_features as attributes",
            few([f"{name} ({type(strangers[name]).__name__})" for name in unsized]) + " without them",
            f"Give {kind.__name__} these attributes, or leave the modules out: exclude_modules={unsized!r}.",
        )
    hooked = [name for name, module in strangers.items() if has_other_forward(module)]
    computed = [
        name
        for name, module in strangers.items()
        if any(host.takes_class(type(module)) for host in hosts) and "weight" not in module._parameters
    ]
    kinds = [
        f"{name} ({type(module).__name__})"
        + (" with a forward of its own" if name in hooked else "")
        + (" whose weight is computed from others" if name in computed else "")
        + _of_whole_numbers(module)
        + ("" if getattr(module, "max_norm", None) is None else " with max_norm")
        + ("" if getattr(module, "groups", 1) == 1 else f" with groups={module.groups}")
        + ("" if set(getattr(module, "dilation", ())) <= {1} else f" with dilation={module.dilation}")
        for name, module in strangers.items()
    ]
    if hooked:
        remedy = (
            "It may compute something else: take it off with `del module.forward`, attach, and put it back; or leave "
            f"them out: exclude_modules={hooked!r}."
        )
    elif computed:
        remedy = (
            "Make the weight a parameter again: torch.nn.utils.remove_weight_norm(module), "
            "remove_spectral_norm(module) or prune.remove(module, 'weight')."
        )
    else:
        stranger = next(iter(strangers.values()))
        sizes = [size for size in ("in_features", "out_features") if not isinstance(getattr(stranger, size, None), int)]
        # A subclass may compute something else, or the parent may read the weight without a call.
        remedy = f"Leave them out: exclude_modules={list(strangers)!r}." if plain_ones else "Name other modules."
        if not sizes:
            remedy += (
                f" If a {type(stranger).__name__} is a linear layer that its parent calls, say so: "
                f"linear_classes=[{type(stranger).__name__}]."
            )
    wanted = f"plain {_names(hosts)} modules: no subclass with another forward, and no forward of a module's own"
    return AttachError("attach: target_modules", wanted, few(kinds), remedy)
