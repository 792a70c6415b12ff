"""What a line of Python does with a weight that it has read."""

from __future__ import annotations

import dis
from types import CodeType, FrameType

# What is the same with LoRA and without.
_HARMLESS = {"dtype", "device", "shape", "ndim", "size", "dim", "is_cuda", "is_floating_point", "requires_grad", "grad"}
_HARMLESS |= {"numel", "is_meta", "layout", "stride", "nelement", "element_size", "itemsize", "nbytes"}

_known: dict[tuple[CodeType, int], bool] = {}


def only_looks(frame: FrameType) -> bool:
    """Whether the attribute that a frame is reading is asked for its dtype, device or shape and no more."""
    place = frame.f_code, frame.f_lasti
    if place not in _known:
        later = (
            instruction for instruction in dis.get_instructions(frame.f_code) if instruction.offset > frame.f_lasti
        )
        following = next(later, None)
        reads = following is not None and following.opname in ("LOAD_ATTR", "LOAD_METHOD")
        _known[place] = reads and following is not None and following.argval in _HARMLESS
    return _known[place]
