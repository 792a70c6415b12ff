"""`--peers` where there are no sources. That the kernels of peers compute what ours do, the benchmark checks."""

import ast
import enum
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import peers
from benchmarks.peers import experts, sources
from xpu_lora_compile.bench.peers import experts_peers_of, peers_of
from xpu_lora_compile.cli import app
from xpu_lora_compile.errors import BenchError

ROOT = Path(__file__).parents[2]


def test_the_wheel_has_the_package_alone_and_the_package_has_no_peers() -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[tool.hatch.build.targets.wheel]\npackages = ["xpu_lora_compile"]\n\n' in settings
    for file in (ROOT / "xpu_lora_compile").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert not [base for base in node.bases if ast.unparse(base) in ("Peer", "peers.Peer")], file
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "benchmarks" not in ast.unparse(node), file


def test_an_install_without_the_repository_says_which_peers_are_missing_and_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.peers", None)
    result = CliRunner().invoke(app, ["bench", "gpu", "--peers", str(tmp_path)])
    said = " ".join(result.output.split())
    assert result.exit_code == 2
    assert "benchmarks/peers, which calls vLLM's, SGLang's and LMDeploy's kernels and is in no wheel; got" in said
    assert "In a checkout of the repository, run: python -m xpu_lora_compile.cli bench gpu --peers DIR." in said


def test_a_folder_without_peers_of_experts_is_an_error_that_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"a folder that holds vllm or sglang; got .*python -m zipfile -e WHEEL DIR"):
        experts_peers_of(tmp_path)


def test_pairs_are_in_blocks_of_one_expert_for_each_slot_and_in_buckets_of_both() -> None:
    index, slots = torch.tensor([[1, 0], [1, 2], [0, 1]]), torch.tensor([1, -1, 1])
    ids, codes, padded = experts._blocks(index, slots, 2, 3, 2)
    assert padded.tolist() == [0, 4]
    # Of slot 1: expert 0 has pairs 1 and 4, and expert 1 has 0 and 5.
    assert ids[1, :4].tolist() == [1, 4, 0, 5]
    assert set(ids[0].tolist()) == {6}
    assert codes[1, :3].tolist() == [0, 1, -1]
    flat, buckets, length = experts._buckets(index, slots, 2, 3, 4)
    assert flat.tolist() == [1, 4, 6, 6, 0, 5, 6, 6, 2, 3, 6, 6]
    assert buckets.tolist() == [3, 4, -1]
    assert length.tolist() == [12]


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_peers_is_an_error_that_says_how_to_get_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        BenchError, match=r"a folder that holds vllm, sglang or lmdeploy; got .*python -m zipfile -e WHEEL DIR"
    ):
        peers_of(tmp_path / name)


@pytest.mark.parametrize("package", ["vllm", "sglang", "lmdeploy"])
def test_sources_laid_out_otherwise_are_an_error_that_names_what_is_missing(tmp_path: Path, package: str) -> None:
    (tmp_path / package / "lora").mkdir(parents=True)
    before = list(sys.meta_path)
    with pytest.raises(BenchError, match=rf"{package}: wanted .*{package}/.*lora.*Give the sources of"):
        peers_of(tmp_path)
    assert sys.meta_path == before
    assert package not in sys.modules


def test_slices_of_lower_rank_are_packed_without_gaps() -> None:
    first, second = torch.arange(8.0).view(2, 2, 2), -torch.arange(8.0).view(2, 2, 2)
    packed = peers._packed([first, second], [2, 1])
    assert packed[0].tolist() == [[0, 1], [2, 3], [0, -1], [-2, -3]]
    assert packed[1, :2].tolist() == [[4, 5], [-4, -5]]


class Colour(str, enum.Enum):
    RED = "red"


class Part(sources._Model):
    sizes: dict[str, int] = lambda: {"one": 1}  # type: ignore[assignment]
    colour: Colour = Colour.RED


class Whole(sources._Model):
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
    assert all(isinstance(colour, Colour) for colour in whole.colours or [])


def test_fields_and_dataclasses_without_pydantic(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "pydantic"}
    for name in kept:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pydantic" else real(name))
    with sources._third_parties():
        field, made = (
            importlib.import_module("pydantic").Field,
            importlib.import_module("pydantic.dataclasses").dataclass,
        )
    assert (field(default=None, gt=0), field(min_length=1), field(default_factory=dict)()) == (None, None, {})

    @made(frozen=True, config={"strict": True})
    class Tile:
        rows: int

    assert Tile(3).rows == 3


def test_stand_ins_for_third_parties_are_gone_once_modules_are_loaded() -> None:
    before = {name: sys.modules.get(name) for name in ("msgspec", "pydantic", "transformers")}
    with sources._third_parties():
        assert importlib.import_module("msgspec").Struct
    assert {name: sys.modules.get(name) for name in before} == before
