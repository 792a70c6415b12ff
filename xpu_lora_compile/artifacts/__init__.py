"""A model with swappable adapters as one file, served without Python: `export` writes it, `load_artifact` reads it.

    attached model --export--> served.pt2: code, base weights, the kernels' library, a manifest
                                    |                           |
                        load_artifact, in Python     xpu_lora_served.h, in C++

In the file the slot of each sequence is an input, `lora_slots`, and each stack of adapters is a constant with a name,
whose memory the loader owns: to swap an adapter is to write there.
"""

from xpu_lora_compile.artifacts.export import export
from xpu_lora_compile.artifacts.served import Served, load_artifact

__all__ = ["Served", "export", "load_artifact"]
