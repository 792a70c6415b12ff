"""The Triton kernels as Inductor launches them: flat forms, in the interpreter on a CPU, against the opaque ops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import BF16, DEVICE, F16, F32, I32, same_bits
from torch import Tensor

from xpu_lora_compile.inspect.operands import RandomOperands
from xpu_lora_compile.kernels import force_kernel, triton_launch, triton_visible
from xpu_lora_compile.kernels.sizes import FEW, MANY, tuned_rows_for
from xpu_lora_compile.ops import (
    ADD_LORA,
    EXPAND_SLICE,
    ROUTE_TILES,
    SHRINK,
    TRITON_ADD_LORA,
    TRITON_EXPAND_SLICE,
    TRITON_ROUTE_TILES,
    TRITON_SHRINK,
)

pytestmark = pytest.mark.skipif(
    bool(triton_launch.problem(DEVICE.type)),
    reason=f"no Triton for {DEVICE.type}: {triton_launch.problem(DEVICE.type)}",
)

K, D = 4, 70


@dataclass(frozen=True)
class Shape:
    """A call.

    Attributes:
        widths: columns of each output.
        slices: for each its output, its first column there, W and R.
        T: rows.
        inputs: dtype of the rows and outputs.
        a: dtype of each A.
        b: dtype of each B.
        ranks: whether the ranks of the slots are given.
    """

    widths: tuple[int, ...]
    slices: tuple[tuple[int, int, int, int], ...]
    T: int = 9
    inputs: torch.dtype = BF16
    a: torch.dtype = BF16
    b: tuple[torch.dtype, ...] = ()
    ranks: bool = True


SHAPES = {
    "one": Shape((33,), ((0, 0, 33, 3),)),
    "one-without-ranks": Shape((33,), ((0, 0, 33, 3),), ranks=False),
    "one-shifted": Shape((40,), ((0, 7, 33, 3),)),
    "two-of-one": Shape((70,), ((0, 0, 40, 3), (0, 40, 30, 20))),
    "three-of-one": Shape((96,), ((0, 0, 40, 3), (0, 48, 24, 3), (0, 72, 24, 5))),
    "three-of-three": Shape((40, 24, 24), ((0, 0, 40, 3), (1, 0, 24, 3), (2, 0, 24, 3)), ranks=False),
    "four-of-two": Shape((70, 33), ((0, 0, 40, 3), (0, 40, 30, 3), (1, 0, 16, 3), (1, 16, 17, 3))),
    "outputs-out-of-order": Shape((33, 40), ((1, 0, 40, 3), (0, 0, 33, 3))),
    "float32": Shape((40, 24), ((0, 0, 40, 3), (1, 0, 24, 40)), inputs=F32, a=F32),
    "float32-rows": Shape((40,), ((0, 0, 40, 3),), inputs=F32),
    "mixed-dtypes": Shape((40, 24), ((0, 0, 40, 3), (1, 0, 24, 3)), a=F16, b=(BF16, F32)),
    "shared-columns": Shape((40,), ((0, 0, 30, 3), (0, 10, 30, 3))),
    "one-row": Shape((33,), ((0, 0, 33, 3),), T=1),
    "many-rows": Shape((40, 24), ((0, 0, 40, 3), (1, 0, 24, 3)), T=70),
    "no-rows": Shape((33,), ((0, 0, 33, 3),), T=0),
}


class Call:
    """The tensors of a shape; weights of slots that no row uses, and beyond a slot's rank, are NaN."""

    def __init__(self, shape: Shape) -> None:
        random = RandomOperands(0, DEVICE)
        b = shape.b or (shape.a,) * len(shape.slices)
        self.x = random.normal(shape.T, D, dtype=shape.inputs, scale=0.5)
        self.bases = [random.normal(shape.T, width, dtype=shape.inputs) for width in shape.widths]
        self.a = [random.normal(K, r, D, dtype=shape.a, scale=0.5) for *_, r in shape.slices]
        self.b = [random.normal(K, r, w, dtype=b[s]).transpose(1, 2) for s, (*_, w, r) in enumerate(shape.slices)]
        which = torch.tensor([0, 2, -1, K, 3, 0, 2, 2, K + 3])
        self.indices = which.repeat(-(-shape.T // 9))[: shape.T].to(DEVICE)
        self.ranks = torch.tensor([2, 0, 3, 1], dtype=I32, device=DEVICE) if shape.ranks else None
        for stack in (*self.a, *(b.transpose(1, 2) for b in self.b)):
            stack[1] = torch.nan
            if self.ranks is not None:
                for slot, rank in enumerate(self.ranks.tolist()):
                    stack[slot, rank:] = torch.nan
        self.places = [output for output, *_ in shape.slices], [offset for _, offset, *_ in shape.slices]

    def opaque(self) -> list[Tensor]:
        outputs = [base.clone() for base in self.bases]
        tiles = ROUTE_TILES(self.indices, K)
        with torch.no_grad(), force_kernel("triton"):
            ADD_LORA(outputs, self.x, self.a, self.b, self.indices, *self.places, 0.75, tiles=tiles, ranks=self.ranks)
        return outputs

    def visible(self, tuned_rows: int) -> list[Tensor]:
        outputs = [base.clone() for base in self.bases]
        tiles = TRITON_ROUTE_TILES(self.indices, K, tuned_rows)
        more = (*self.places, 0.75, tuned_rows, tiles)
        TRITON_ADD_LORA(outputs, self.x, self.a, self.b, self.indices, *more, ranks=self.ranks)
        return outputs


@pytest.mark.sweep
@pytest.mark.parametrize("tuned", ["T", "few", "many"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_flat_forms_have_the_bits_of_the_opaque_op(shape: Shape, tuned: str) -> None:
    call = Call(shape)
    tuned_rows = {"T": shape.T, "few": FEW, "many": MANY}[tuned]
    expected, got = call.opaque(), call.visible(tuned_rows)
    # In the interpreter numpy's sums depend on the shape of a product.
    if tuned == "T" or not triton_launch.is_interpreting():
        assert all(map(same_bits, got, expected))
    torch.testing.assert_close(got, expected)
    assert shape.T == 0 or not any(map(same_bits, got, call.bases))


def launched(call: Call, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flat forms that a call launches, by name."""
    names: list[str] = []
    real = triton_visible._flat_form

    def named(kernel: str, shapes: tuple[Any, ...]) -> Any:
        names.append(real(kernel, shapes).fn.__name__)
        return real(kernel, shapes)

    monkeypatch.setattr(triton_visible, "_flat_form", named)
    call.visible(MANY)
    return names


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ("one", ["shrink_kernel_0_flat", "expand_kernel_0_flat"]),
        ("one-without-ranks", ["shrink_kernel_0_without_ranks_flat", "expand_kernel_0_without_ranks_flat"]),
        ("one-shifted", ["shrink_kernel_0_flat", "expand_kernel_0s_0_flat"]),
        ("three-of-one", ["shrink_kernel_0_1_2_flat", "expand_kernel_0_0s_0s_0_1_2_flat"]),
        ("four-of-two", ["shrink_kernel_0_1_2_3_flat", "expand_kernel_0_0s_2_2s_0_1_2_3_flat"]),
        # One by one, since the kernels take slices that are stored alike.
        ("mixed-dtypes", ["shrink_kernel_0_flat", "expand_kernel_0_flat"] * 2),
        (
            "shared-columns",
            ["shrink_kernel_0_flat", "expand_kernel_0_flat", "shrink_kernel_0_flat", "expand_kernel_0s_0_flat"],
        ),
        ("no-rows", []),
    ],
)  # fmt: skip
def test_a_call_is_two_launches_of_one_form_a_structure(
    shape: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    routed, *rest = launched(Call(SHAPES[shape]), monkeypatch) or ["route_kernel_flat"]
    assert (routed, rest) == ("route_kernel_flat", names)


def test_the_same_structure_is_the_same_kernel() -> None:
    from xpu_lora_compile.kernels.triton_flat import flat_form

    shapes, _ = triton_visible._flattened((torch.empty(1), (1, 2), 0.5, None))
    again, _ = triton_visible._flattened((torch.empty(3), (7, 7), 2.0, None))
    assert shapes == again == ("one", ((0, False), (1, False)), "constant", "none")
    route = ("one",) * 9
    assert flat_form("route_kernel", route) is flat_form("route_kernel", tuple(map(str, route)))


def test_scaling_is_compiled_in() -> None:
    """Handed on as a number it would be float64 in Inductor's signature, and all after it, too."""
    shapes, _ = triton_visible._flattened((0.5, 1, True))
    assert shapes == ("constant", "one", "one")


@pytest.mark.parametrize("rows", [0, 1, 9, 64, 70])
@pytest.mark.parametrize("tuned_rows", [1, FEW, MANY])
def test_a_table_of_any_height_has_every_row_once(rows: int, tuned_rows: int) -> None:
    indices = (torch.arange(rows) % (K + 2) - 1).to(DEVICE)
    table = TRITON_ROUTE_TILES(indices, K, tuned_rows)
    count, height = table.shape[0], table.shape[1] - 1
    assert height == triton_launch.tile_rows(tuned_rows, K)
    flat = table.flatten().tolist() if rows else []
    found = {t: code for at, code in enumerate(flat[:count]) if code != -2
             for t in flat[count + at * height :][:height] if t >= 0}  # fmt: skip
    wanted = {t: index if 0 <= index < K else -1 for t, index in enumerate(indices.tolist())}
    assert found == wanted


@pytest.mark.parametrize("tuned_rows", [9, FEW, MANY])
@pytest.mark.parametrize("output", [F32, BF16])
def test_a_shrink_alone_has_the_bits_of_the_opaque_op(output: torch.dtype, tuned_rows: int) -> None:
    call = Call(SHAPES["one-without-ranks"])
    expected, got = (torch.full((9, 5), 7.0, dtype=output, device=DEVICE) for _ in range(2))
    with torch.no_grad(), force_kernel("triton"):
        SHRINK(expected, call.x, call.a[0], call.indices, 0.75)
    tiles = TRITON_ROUTE_TILES(call.indices, K, tuned_rows)
    TRITON_SHRINK(got, call.x, call.a[0], call.indices, 0.75, tuned_rows, tiles)
    assert same_bits(got, expected)
    assert (got[:, 3:] == 7).all()


@pytest.mark.parametrize("tuned_rows", [9, FEW, MANY])
@pytest.mark.parametrize("add", [True, False])
def test_an_expand_alone_has_the_bits_of_the_opaque_op(add: bool, tuned_rows: int) -> None:
    call = Call(SHAPES["one-without-ranks"])
    hidden = RandomOperands(1, DEVICE).normal(9, 3, dtype=F32)
    expected, got = (torch.full((9, 40), 7.0, dtype=BF16, device=DEVICE) for _ in range(2))
    with torch.no_grad(), force_kernel("triton"):
        EXPAND_SLICE(expected, hidden, call.b[0], call.indices, 4, 33, add)
    tiles = TRITON_ROUTE_TILES(call.indices, K, tuned_rows)
    TRITON_EXPAND_SLICE(got, hidden, call.b[0], call.indices, 4, add, tuned_rows, tiles)
    assert same_bits(got, expected)
    assert (got[:, :4] == 7).all()
    assert (got[:, 37:] == 7).all()


@pytest.mark.parametrize("op", ["route", "add_lora", "shrink", "expand"])
def test_the_ops_are_what_their_schemas_say(op: str) -> None:
    call = Call(SHAPES["three-of-one"])
    tiles = TRITON_ROUTE_TILES(call.indices, K, 9)
    outputs, hidden = [base.clone() for base in call.bases], torch.zeros(9, 3, device=DEVICE)
    a, b = (torch.nan_to_num(stack) for stack in (call.a[0], call.b[0]))
    more = (call.indices, *call.places, 0.75, 9, tiles, call.ranks)
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "route": (TRITON_ROUTE_TILES, (call.indices, K, 9)),
        "add_lora": (TRITON_ADD_LORA, (outputs, call.x, call.a, call.b, *more)),
        "shrink": (TRITON_SHRINK, (hidden, call.x, a, call.indices, 0.75, 9, tiles)),
        "expand": (TRITON_EXPAND_SLICE, (outputs[0], hidden, b, call.indices, 0, True, 9, tiles)),
    }
    torch.library.opcheck(*calls[op], test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_sizes_are_tuned_for_t_where_it_is_known() -> None:
    assert [tuned_rows_for(rows) for rows in (0, 1, 64, 65, 4096)] == [0, 1, 64, 65, 4096]


# What Inductor makes of the ops, without a GPU; in a process that compiles instead of interpreting.


def said_by_the_driver(what: str, folder: Path, *others: str) -> dict[str, Any]:
    if DEVICE.type != "cpu":
        pytest.skip("it needs no device")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    script = Path(__file__).parents[1] / "support" / "visible_driver.py"
    command = [sys.executable, str(script), what, *others]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_a_triton_without_dependent_launches_compiles_every_kernel(tmp_path: Path) -> None:
    compiled = said_by_the_driver("without_overlap", tmp_path)
    assert compiled == {"route_kernel": True, "shrink_kernel": True, "expand_kernel": True}


@pytest.fixture(scope="module", params=["cuda", "xpu"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return said_by_the_driver(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
def test_inductor_launches_two_kernels_a_call_and_one_for_the_routing(written: dict[str, Any], sizes: str) -> None:
    """Of a packed product, two products of one input, and another: three calls."""
    report = written[sizes]
    assert report["launches"] == report["runs"] == 1 + 2 * 3
    assert report["python"] == []


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
def test_inductor_copies_nothing_and_plans_all_memory(written: dict[str, Any], sizes: str) -> None:
    report = written[sizes]
    assert report["copies"] == []
    # The table of tiles, and the rank vectors of three calls.
    assert report["allocations"] == 1 + 3


def test_grids_follow_a_symbolic_t(written: dict[str, Any]) -> None:
    def is_symbolic(grids: Sequence[str]) -> list[bool]:
        return [any(character.isalpha() for character in grid) for grid in grids]

    assert not any(is_symbolic(written["static"]["grids"]))
    # That of the routing has a program a slot.
    assert is_symbolic(written["dynamic"]["grids"]) == [False, *[True] * 6]


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
def test_triton_compiles_the_text_that_inductor_has_copied(written: dict[str, Any], sizes: str) -> None:
    compiled = written[sizes]["compiled"]
    assert sorted(compiled) == [
        "expand_kernel_0_0s_0s_0_1_2_flat",
        "expand_kernel_0_1_flat",
        "expand_kernel_0_flat",
        "route_kernel_flat",
        "shrink_kernel_0_1_2_flat",
        "shrink_kernel_0_1_flat",
        "shrink_kernel_0_flat",
    ]
    assert all(compiled.values())


def test_triton_is_not_loaded_by_the_package() -> None:
    statement = "import sys, xpu_lora_compile; assert not [name for name in sys.modules if name.startswith('triton')]"
    assert find_spec("triton")
    subprocess.run([sys.executable, "-c", statement], check=True)  # noqa: S603
