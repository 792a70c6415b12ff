"""Artifacts and the C++ program that serves them: each is made once for all processes of pytest-xdist."""

from __future__ import annotations

import fcntl
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import xpu_lora_compile as xlc


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The file of this name, made by the first process that asks."""
    folder = factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / name
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(path)
    return path


def edited(artifact: Path, copy: Path, **changes: Any) -> Path:
    """A copy of an artifact whose manifest says something else; None leaves a field as it is."""
    with zipfile.ZipFile(artifact) as source, zipfile.ZipFile(copy, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("xpu_lora/manifest.json"):
                content = json.dumps(json.loads(content) | changes).encode()
            target.writestr(entry, content)
    return copy


def admitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any, args: tuple[Tensor, ...], **options: Any
) -> None:
    """The model gets as far as the compiler, which this test does not ask."""
    from xpu_lora_compile.artifacts import package

    class ReachedError(Exception):
        pass

    def compile_into(*_: Any) -> Path:
        raise ReachedError

    with monkeypatch.context() as patch:
        patch.setattr(package, "compile_into", compile_into)
        with pytest.raises(ReachedError):
            xlc.export(model, tmp_path / "a.pt2", args, **options)


def save_plain_adapter(
    folder: Path, modules: dict[str, tuple[tuple[int, int], tuple[int, int]]], *, seed: int = 0, **config: Any
) -> Path:
    """Write an adapter for modules that PEFT need not know: the shapes of A and B of each; of embeddings as PEFT's."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (a, b) in modules.items():
        parts = ("lora_embedding_A", "lora_embedding_B") if name == "words" else ("lora_A.weight", "lora_B.weight")
        for part, shape in zip(parts, (a, b), strict=True):
            tensors[f"base_model.model.{name}.{part}"] = torch.randn(shape, generator=generator)
    return save_files(folder, tensors, {"target_modules": sorted(modules), **config})


def save_files(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """Write both files of an adapter."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6, **config}))
    return folder


class Tagger(nn.Module):
    """No transformer: words and features -> a convolution over time -> scores, and a summary of each sequence."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words = nn.Embedding(30, 12)
            self.mix = nn.Conv1d(12, 12, 3, padding=1)
            self.hidden = nn.Linear(15, 20)
            self.scores = nn.Linear(20, 7, bias=False)
            self.summary = nn.Linear(20, 5)

    def forward(self, inputs: dict[str, Tensor], *, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """Words `[B, T]` and features `[B, T, 3]` -> scores `[B, T, 7]` and a summary `[B, 5]`."""
        words = self.words(inputs["words"])
        mixed = self.mix(words.transpose(1, 2)).transpose(1, 2)
        # A layer in a layout of its own: time first.
        joined = torch.cat([mixed, inputs["features"]], -1).transpose(0, 1)
        hidden = torch.relu(self.hidden(joined) * scale)
        return self.scores(hidden).transpose(0, 1), {"summary": self.summary(hidden.mean(0))}
