"""What `--peers` does without sources of anyone. That their kernels compute what ours do, the benchmark checks."""

import enum
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from xpu_lora_compile.bench import peer_sources, peers
from xpu_lora_compile.errors import BenchError


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_peers_is_an_error_that_says_how_to_get_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        BenchError, match=r"a folder that holds vllm, sglang or lmdeploy; got .*python -m zipfile -e WHEEL DIR"
    ):
        peers.find(tmp_path / name)


@pytest.mark.parametrize("package", ["vllm", "sglang", "lmdeploy"])
def test_sources_laid_out_otherwise_are_an_error_that_names_what_is_missing(tmp_path: Path, package: str) -> None:
    (tmp_path / package / "lora").mkdir(parents=True)
    before = list(sys.meta_path)
    with pytest.raises(BenchError, match=rf"{package}: wanted .*{package}/.*lora.*Give the sources of"):
        peers.find(tmp_path)
    assert sys.meta_path == before
    assert package not in sys.modules


def test_slices_of_lower_rank_are_packed_without_gaps() -> None:
    first, second = torch.arange(8.0).view(2, 2, 2), -torch.arange(8.0).view(2, 2, 2)
    packed = peers._packed([first, second], [2, 1])
    assert packed[0].tolist() == [[0, 1], [2, 3], [0, -1], [-2, -3]]
    assert packed[1, :2].tolist() == [[4, 5], [-4, -5]]


class Colour(str, enum.Enum):
    RED = "red"


class Part(peer_sources._Model):
    sizes: dict[str, int] = lambda: {"one": 1}  # type: ignore[assignment]
    colour: Colour = Colour.RED


class Whole(peer_sources._Model):
    name: str
    part: Part
    colours: list[Colour] | None = None
    most: int | None = None


@pytest.mark.parametrize(
    ("raw", "colours", "sizes"),
    [
        ({"name": "a", "part": {}}, None, {"one": 1}),
        ({"name": "a", "part": {"sizes": {"two": 2}}, "colours": ["red"]}, [Colour.RED], {"two": 2}),
    ],
    ids=["defaults", "given"],
)
def test_a_table_is_read_without_pydantic(raw: dict[str, Any], colours: Any, sizes: dict[str, int]) -> None:
    whole = Whole.model_validate(raw)
    assert (whole.name, whole.colours, whole.most) == ("a", colours, None)
    assert whole.part.model_dump() == {"sizes": sizes, "colour": Colour.RED}
    assert all(isinstance(one, Colour) for one in whole.colours or [])


def test_stand_ins_for_third_parties_are_gone_once_modules_are_loaded() -> None:
    before = {name: sys.modules.get(name) for name in ("msgspec", "pydantic", "transformers")}
    with peer_sources._third_parties():
        assert importlib.import_module("msgspec").Struct
    assert {name: sys.modules.get(name) for name in before} == before
