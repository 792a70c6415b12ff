"""Which modules of a model a rule names, and what to say where one of them cannot carry LoRA."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from xpu_lora_compile.adapters.checkpoint import REPLACE_CONV1D
from xpu_lora_compile.adapters.config import ALL_LINEAR, Rule, is_targeted
from xpu_lora_compile.adapters.files import few
from xpu_lora_compile.adapters.names import plain_name
from xpu_lora_compile.errors import AttachError
from xpu_lora_compile.layers import HOSTS, host_of
from xpu_lora_compile.layers.host import Host


def carriers_in(model: nn.Module) -> dict[str, tuple[Host, nn.Module]]:
    """Return the modules of a model that can carry LoRA, each with its host, by name."""
    return {name: (host, module) for name, module in model.named_modules() if (host := host_of(module))}


def find_targets(
    model: nn.Module, head: nn.Module | None, target_modules: Rule, exclude_modules: Rule
) -> dict[str, tuple[Host, nn.Module]]:
    """Return the modules that the rules name, each with its host, by name.

    Raises:
        AttachError: the rules name no module, or one that no host takes.
    """
    present, carriers = dict(model.named_modules()), carriers_in(model)

    def is_linear(name: str, module: nn.Module) -> bool:
        # A linear layer that no host takes is named all the same, and then refused.
        host, _ = carriers.get(name, (None, module))
        return isinstance(module, nn.Linear) if host is None else host.site(module).kind == "linear"

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
        raise _cannot_carry(strangers, plain_ones=len(matched) - len(strangers))
    if not matched:
        names = sorted({name.rsplit(".", 1)[-1] for name in carriers})
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
    return {name: carriers[name] for name in matched}


def _cannot_carry(strangers: Mapping[str, nn.Module], plain_ones: int) -> AttachError:
    """Say of what kind the modules are that a rule names and that carry no LoRA, and what to do."""
    hooked = [name for name, module in strangers.items() if "forward" in vars(module)]
    computed = [
        name
        for name, module in strangers.items()
        if any(host.takes_class(type(module)) for host in HOSTS) and "weight" not in module._parameters
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
    names = " or ".join(host.name for host in HOSTS)
    wanted = f"plain {names} modules: no subclass, no quantized weight, no hooked forward"
    return AttachError("attach: target_modules", wanted, few(kinds), remedy)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of transformers' GPT-2, whose weight is transposed."""
    return type(module).__name__ == "Conv1D"
