"""bgmv_shrink, bgmv_expand_slice -> their internal twins, which check nothing and cost little to call."""

from __future__ import annotations

from torch.fx import Graph

from xpu_lora_compile.ops import BGMV_EXPAND_SLICE, BGMV_SHRINK, EXPAND_SLICE, SHRINK
from xpu_lora_compile.passes.editing import arguments_of, calls_to, replace


def lower(graph: Graph) -> None:
    """Replace the public ops that are left by internal ones: their fakes checked each call while tracing.

    Before:
        bgmv_shrink(output, inputs, a, indices, scaling)
        bgmv_expand_slice(output, inputs, b, indices, offset, size, add)

    After:
        shrink(output, inputs, a, indices, scaling)
        expand_slice(output, inputs, b, indices, offset, size, add)

    Left alone: `bgmv_expand` that `resolve_width` could not settle, and `lora_linear`, which carries gradients.

    Runs on: graphs of Dynamo and of `torch.export`, before functionalization.
    """
    for public, internal in ((BGMV_SHRINK, SHRINK), (BGMV_EXPAND_SLICE, EXPAND_SLICE)):
        for call in calls_to(graph, public):
            replace(call, internal, tuple(arguments_of(call, public)))
