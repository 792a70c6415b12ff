"""Flat forms of the Triton kernels, whose arguments are single pointers and numbers: what Inductor can launch itself.

Inductor takes no tuples of pointers. For each structure of a kernel's tuples (how many slices, which of them share an
output) there is one flat form, whose text is generated here: it packs its arguments into tuples and hands them to the
kernel of `triton_kernels` or `triton_backward`, which Triton then compiles as a function inside of it. So there is one
text of each kernel.
"""

# Triton ships no types.
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import inspect
import linecache
from functools import cache
from typing import Any, TypeAlias

import triton
import triton.language as tl

from xpu_lora_compile.kernels.triton_launch import kernel_named

# Of an operand: "one" for an argument, "constant" for one that Triton compiles in, "none" for None. Of a tuple, for
# each element: the position of its argument among the tuple's, and whether another argument shifts it.
Shape: TypeAlias = str | tuple[tuple[int, bool], ...]

# What the text of a form names, besides its kernel.
_GLOBALS = {"triton": triton, "tl": tl}


@cache
def flat_form(kernel: str, shapes: tuple[Shape, ...]) -> Any:
    """Return the kernel that takes the operands of these shapes one by one: compiled by Triton, or interpreted.

    Args:
        kernel: its name.
        shapes: of each of its parameters.
    """
    whole = kernel_named(kernel)
    parameters = inspect.signature(whole.fn).parameters
    name = _name_of(kernel, dict(zip(parameters, shapes, strict=True)))
    taken: list[str] = []
    handed: list[str] = []
    for parameter, shape in zip(parameters.values(), shapes, strict=True):
        if shape == "none":
            handed.append("None")
        elif isinstance(shape, str):
            is_constant = shape == "constant" or "constexpr" in str(parameter.annotation)
            taken.append(f"{parameter.name}: tl.constexpr" if is_constant else parameter.name)
            handed.append(parameter.name)
        else:
            starts = [f"{parameter.name}_from_{s}" if is_shifted else "" for s, (_, is_shifted) in enumerate(shape)]
            taken += [f"{parameter.name}_{at}" for at in sorted({at for at, _ in shape})]
            taken += filter(None, starts)
            elements = [f"{parameter.name}_{at}" for at, _ in shape]
            sums = (" + ".join(filter(None, pair)) for pair in zip(elements, starts, strict=True))
            handed.append(f"({', '.join(sums)},)")
    text = f"def {name}({', '.join(taken)}):\n    {kernel}({', '.join(handed)})\n"
    # Triton reads a kernel's text from where it was written.
    file = f"<{__name__} {name}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    scope = {**_GLOBALS, "__name__": __name__, kernel: whole}
    exec(compile(text, file, "exec"), scope)  # noqa: S102
    return triton.jit(scope[name], do_not_specialize=list(getattr(whole, "do_not_specialize", None) or ()))


def _name_of(kernel: str, shapes: dict[str, Shape]) -> str:
    """A name of its own for each structure: `expand_kernel_0_1_2_flat`, with `s` behind an element that is shifted."""
    tuples = dict.fromkeys(
        "_".join(f"{at}{'s' if is_shifted else ''}" for at, is_shifted in shape)
        for shape in shapes.values()
        if isinstance(shape, tuple)
    )
    absent = [f"without_{name}" for name, shape in shapes.items() if shape == "none"]
    return "_".join([kernel, *tuples, *absent, "flat"])
