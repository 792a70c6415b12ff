"""What compiles an artifact, and with what it is linked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor import config

import xpu_lora_compile as xlc
from xpu_lora_compile.kernels import compiled

GXX = shutil.which("g++")


def _file_of(name: str) -> str:
    command = [GXX or "g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()  # noqa: S603


@pytest.mark.skipif(GXX is None or not Path(_file_of("libstdc++.a")).is_absolute(), reason="g++ with libstdc++.a")
def test_a_compiler_that_has_a_static_cxx_library_alone_makes_a_file_that_loads(tmp_path: Path) -> None:
    """Else the code has a second libstdc++ in it, and loading it throws std::bad_cast, or ends the process."""
    wrapper = tmp_path / "g++"
    wrapper.write_text(
        f"""#!/bin/bash
for argument in "$@"; do
  [ "$argument" = -print-file-name=libstdc++.so ] && exec echo libstdc++.so
  [ "$argument" = -shared ] && exec {GXX} -static-libstdc++ "$@"
done
exec {GXX} "$@"
"""
    )
    wrapper.chmod(0o755)
    assert compiled.cxx_library([str(wrapper)]) == ["-l:libstdc++.so.6"]
    assert not compiled.cxx_library([GXX or ""])
    model = nn.Sequential(nn.Linear(4, 5)).eval().requires_grad_(False)
    xlc.attach(model, slots=2, max_rank=4)
    x = torch.randn(3, 4)
    with config.patch({"cpp.cxx": (None, str(wrapper))}):
        file = xlc.export(model, tmp_path / "a.pt2", (x,))
    torch.testing.assert_close(xlc.load_artifact(file)(x, adapters=[None] * 3), model(x))
