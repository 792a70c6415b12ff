"""The native kernel: how it is made, what it does where it cannot be, and what it holds in memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from support import native_driver
from support.native_driver import Driver
from torch import Tensor

import xpu_lora_compile as xlc
from xpu_lora_compile.errors import ContractError, DtypeError, LoraError, SliceError
from xpu_lora_compile.inspect.operands import RandomOperands, poison_unused_slots
from xpu_lora_compile.kernels import compiled, native
from xpu_lora_compile.ops import ADD_LORA, NATIVE_ADD_LORA, reference
from xpu_lora_compile.ops.budget import budget_of

ONE_CALL = """
import torch
import xpu_lora_compile as xlc
from xpu_lora_compile.kernels import compiled, native
torch.set_num_threads(1)
output = torch.zeros(2, 3)
with torch.no_grad():
    xlc.bgmv_expand(output, torch.ones(2, 1), torch.full((1, 3, 1), 5.0), torch.tensor([0, -1]))
assert output.tolist() == [[5.0] * 3, [0.0] * 3], output
print(native.problem() or "native")
"""


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", ONE_CALL],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def library() -> Path:
    """The library that this process runs."""
    assert not native.problem()
    (path,) = (path for path in map(Path, torch.ops.loaded_libraries) if path.name.startswith("native-"))
    return path


# It writes down that it was asked; and where it says so, waits until another has been, too.
QUICK_COMPILER = """#!/bin/sh
test "$1" = --version && exec echo quick
echo >> "$ASKED"
for wait in $(seq ${WAITS:-0}); do test $(wc -l < "$ASKED") -ge 2 && break; sleep 0.1; done
while test "$1" != -o; do shift; done
exec cp "$LIBRARY" "$2"
"""


@pytest.fixture
def quick(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for a compiler that gives out the library made before, for tests of what is done with it."""
    folder = tmp_path_factory.mktemp("quick")
    compiler = folder / "compiler"
    compiler.write_text(QUICK_COMPILER)
    compiler.chmod(0o700)
    return {"CXX": str(compiler), "LIBRARY": str(library), "ASKED": str(folder / "asked")}


def test_two_processes_may_compile_it_at_once_and_a_third_finds_it(tmp_path: Path, quick: dict[str, str]) -> None:
    for process in [start(tmp_path, **quick, WAITS="300"), start(tmp_path, **quick, WAITS="300")]:
        said, errors = process.communicate()
        assert (said, errors) == ("native\n", "")
    assert Path(quick["ASKED"]).read_text() == "\n\n"
    (library,) = (tmp_path / "xpu-lora-compile").iterdir()
    made = library.stat().st_mtime_ns
    assert start(tmp_path, **quick).communicate() == ("native\n", "")
    assert library.stat().st_mtime_ns == made
    assert Path(quick["ASKED"]).read_text() == "\n\n"


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("false", "false could not make it"),
        ("no-such-compiler", "no-such-compiler could not make it"),
        ("", "there is no"),
    ],
)
def test_without_a_compiler_plain_pytorch_runs_and_says_so(tmp_path: Path, compiler: str, reason: str) -> None:
    said, errors = start(tmp_path, CXX=compiler).communicate()
    assert said.startswith(reason)
    assert errors.count("the fast CPU kernel is not used") == 1
    assert "Plain PyTorch runs instead." in errors


# Numbers in a vector at most, by what is left out; flags that this processor has nothing for change nothing.
LANES = {"avx512f": 8, "avx512bf16": 16, "avx": 4}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are for x86")
@pytest.mark.parametrize("without", LANES)
def test_other_processors_get_right_results_too_and_the_same_bits_in_every_batch(tmp_path: Path, without: str) -> None:
    driver, generator = Driver(tmp_path, f"-mno-{without}"), torch.Generator().manual_seed(0)
    assert driver.lanes <= LANES[without]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 0.2), (torch.float16, 0.02)):
        a, b = normal(3, 17, 129).to(dtype), normal(3, 131, 17).to(dtype)
        inputs, base = normal(41, 129).to(dtype), normal(41, 131).to(dtype)
        indices = torch.arange(41) % 4
        exact = reference.lora_linear(base.double(), inputs.double(), [a.double()], [b.double()], indices, [0])
        for weights in (b, b.transpose(1, 2).contiguous().transpose(1, 2)):
            together = base.clone()
            driver.add_lora(together, inputs, a, weights, indices)
            assert (together - exact).abs().max() < allowed * exact.abs().max() / 10, dtype
            for rows in (slice(0, 1), slice(3, 5), slice(2, 9), slice(0, 41, 3)):
                alone = base[rows].clone()
                driver.add_lora(alone, inputs[rows].contiguous(), a, weights, indices[rows].contiguous())
                assert torch.equal(alone, together[rows]), (dtype, rows)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """The kernel with tiles of bfloat16, which are emulated: those of AMX, but on any processor."""
    support = Path(native_driver.__file__).parent
    return Driver(tmp_path_factory.mktemp("tiles"), "-O1", "-DXPU_LORA_EMULATED_TILES", f"-I{support}")


@pytest.mark.parametrize(
    ("rows", "features", "rank", "width"),
    [(41, 129, 17, 131), (5, 31, 1, 15), (70, 64, 64, 32), (140, 96, 33, 544), (3, 1, 2, 1), (9, 576, 16, 1100)],
    ids=lambda size: str(size),
)
def test_tiles_keep_the_budget_and_the_same_bits_in_every_batch(
    tiles: Driver, rows: int, features: int, rank: int, width: int
) -> None:
    normal = partial(RandomOperands(0).normal, dtype=torch.bfloat16)
    a, b = normal(3, rank, features), normal(3, rank, width).transpose(1, 2)
    inputs, base, indices = normal(rows, features), normal(rows, width), torch.arange(rows) % 4
    operands = {"base": base, "inputs": inputs, "lora_a": [a], "lora_b": [b]}
    budget = budget_of("lora_linear", operands | {"lora_indices_tensor": indices, "slice_offsets": [0]})
    # Weights of a slot that no row has, and those of rows without one, are not read.
    indices, unused = indices.where(indices != 1, 3), indices == 1
    a[1], b[1] = torch.nan, torch.nan
    together = base.clone()
    tiles.add_lora(together, inputs, a, b, indices)
    budget.check(together, ~unused[:, None].expand_as(base))
    assert torch.equal(together[indices == 3], base[indices == 3])
    for some in (slice(0, 1), slice(2, 5), slice(0, rows, 3), slice(1, rows)):
        alone = base[some].clone()
        tiles.add_lora(alone, inputs[some].contiguous(), a, b, indices[some].contiguous())
        assert torch.equal(alone, together[some]), some


def test_tiles_take_numbers_that_are_not_finite_and_sums_of_every_size(tiles: Driver) -> None:
    assert tiles.has_tiles
    inputs = torch.tensor([[torch.inf], [torch.nan], [3e38], [1.2345e-30], [-7.0]]).bfloat16()
    a = torch.tensor([1.0, 1.0078125, 0.3]).bfloat16().reshape(1, 3, 1)
    b = torch.ones(1, 3, 20).bfloat16().transpose(1, 2)
    b[:, :, 0] = 0.5
    base, indices = torch.zeros(5, 20).bfloat16(), torch.zeros(5, dtype=torch.int64)
    exact = reference.lora_linear(base.double(), inputs.double(), [a.double()], [b.double()], indices, [0])
    tiles.add_lora(base, inputs, a, b, indices)
    assert torch.equal(base.isnan(), exact.isnan())
    torch.testing.assert_close(base, exact.bfloat16(), rtol=2**-8, atol=0, equal_nan=True)


def test_calls_get_all_threads_or_one(tiles: Driver) -> None:
    """The arguments: how many there are, and how many nanoseconds a call should take, and takes."""
    assert tiles.threads(2, 11_000, 0) == 1
    assert tiles.threads(16, 90_000, 0) == 1
    assert tiles.threads(16, 100_000, 0) == 16
    assert tiles.threads(1, 10**9, 0) == 1


def test_short_calls_after_one_that_waited_for_a_thread_are_done_by_one(tiles: Driver) -> None:
    short, long = 50_000, 10**6
    assert [tiles.threads(2, short, took) for took in (900_000, 2_000_000)] == [2, 2]
    assert tiles.threads(2, long, 10**8) == 2
    assert [tiles.threads(2, short, 10**7) for _ in range(251)] == [1] * 250 + [2]
    assert [tiles.threads(2, long, 10**8) for _ in range(2)] == [2, 2]


SAME_THREADS = """
import os
import torch
from xpu_lora_compile.kernels import native
assert not native.problem()
torch.set_num_threads(4)
product, draw = torch.ones(512, 512), torch.ones
def running():
    product @ product
    return set(os.listdir("/proc/self/task"))
before = running()
operands = draw(16, 700), [draw(4, 8, 700)], [draw(4, 700, 8)], torch.arange(16) % 4, [0], [0], 1.0
assert native.TRY_ADD_LORA([draw(16, 700)], *operands)
after = running()
assert before == after and len(before) >= 4, (before, after)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed in /proc")
def test_no_thread_is_ended_by_a_call_that_could_do_with_fewer() -> None:
    """OpenMP ends those that a region does without, and starts others for the next product: some 800 us."""
    done = subprocess.run([sys.executable, "-c", SAME_THREADS], capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path, quick: dict[str, str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert start(file, **quick, TMPDIR=str(tmp_path)).communicate() == ("native\n", "")
    (made,) = tmp_path.glob("xpu-lora-compile-*/*.so")
    assert compiled.content_hash(made.read_bytes()) in made.name


def test_a_compiler_that_works_is_no_warning() -> None:
    native.warned_problem.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.warned_problem() == ""


# PyTorch 2.11's profiler, about itself.
@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
def test_a_long_batch_takes_no_memory_of_the_size_of_its_products() -> None:
    """T = 4096: not even a hundredth of `[T, W, R]`, by PyTorch's allocator and by the process's own count."""
    rows, features, width, rank, slots = 4096, 512, 2048, 64, 8
    draw = RandomOperands(0)
    inputs, output = draw.normal(rows, features), torch.zeros(rows, width)
    a, b = draw.normal(slots, rank, features), draw.normal(slots, width, rank)
    indices = draw.indices(rows, slots)

    def call() -> None:
        ADD_LORA([output], inputs, [a], [b], indices, [0], [0], 1.0)

    call()
    limit = 4 * rows * width * rank // 100
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.events()) < limit
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    call()
    assert peak_memory() - before < limit
    assert native.scratch_bytes(rows, rank, rank) < limit


def peak_memory() -> int:
    """Bytes, since the count was last cleared."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("slices", [1, 2, 3, 4, 7])
def test_any_number_of_slices_goes_to_any_outputs(slices: int) -> None:
    normal = RandomOperands(slices).normal
    x, indices = normal(5, 6), torch.tensor([0, -1, 1, 2, 1])
    a, b = [normal(2, 3, 6) for _ in range(slices)], [normal(2, 4, 3) for _ in range(slices)]
    to, offsets = [(2, 0, 0, 1, 2, 2, 0)[s] for s in range(slices)], [4 * s for s in range(slices)]
    # Columns that are not side by side are copied, and copied back.
    outputs = [normal(4 * slices, 5).t() for _ in range(3)]
    wanted = [output.clone() for output in outputs]
    for s in range(slices):
        columns = wanted[to[s]][:, offsets[s] : offsets[s] + 4]
        columns += reference.lora_linear(columns * 0, x, [a[s]], [b[s]], indices, [0], 0.5)
    with torch.no_grad():
        NATIVE_ADD_LORA(outputs, x, a, b, indices, to, offsets, 0.5)
    for output, right in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(output, right)


BIG = 2**63 - 1
ADD_SLICES, ADD_PACKED = torch.ops.xpu_lora.native_add_slices, torch.ops.xpu_lora.native_add_packed


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_few_rows_of_many_slots_have_the_bits_of_few_slots(dtype: torch.dtype) -> None:
    draw = RandomOperands(0)
    rows, slots = 12, 300
    used = [7, 0, 299, 7, -1, 300, 7, 41, 2**31 - 1, 299, -(2**31), 0]
    a, b, inputs, base = (draw.normal(*shape) for shape in ((slots, 5, 70), (slots, 90, 5), (rows, 70), (rows, 90)))
    few = sorted({slot for slot in used if 0 <= slot < slots})
    places = [few.index(slot) if slot in few else -1 for slot in used]
    assert slots > 16 * rows >= len(few)
    expected, result = base.clone(), base.clone()
    assert native.TRY_ADD_LORA([expected], inputs, [a[few]], [b[few]], torch.tensor(places), [0], [0], 1.0)
    poison_unused_slots(a, few)
    assert native.TRY_ADD_LORA([result], inputs, [a], [b], torch.tensor(used, dtype=dtype), [0], [0], 1.0)
    assert torch.equal(result, expected)
    assert not torch.equal(result, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(5,), (5, 2), (3, 4, 1)], ids=str)
@pytest.mark.parametrize("layout", ["plain", "vllm's", "strided"])
def test_packed_weights_are_those_of_their_slices(layout: str, widths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of more indices than rows the first count: those behind them would be slots, too."""
    normal = partial(RandomOperands(0).normal, dtype=dtype)
    slices, columns = len(widths), 6 * len(widths) + sum(widths)
    packed = normal(3, 4, columns)
    if layout == "strided":
        packed = packed.transpose(1, 2).contiguous().transpose(1, 2)
    a, b = (
        list(packed[..., : 6 * slices].split(6, -1)),
        list(packed[..., 6 * slices :].transpose(1, 2).split(widths, 1)),
    )
    packed = packed.unsqueeze(1) if layout == "vllm's" else packed
    x, indices = normal(5, 6), torch.tensor([0, -1, 2, 3, 1, 1, 0])
    output = normal(5, sum(widths) + 2)
    offsets = [sum(widths[:s]) for s in range(slices)]
    wanted = reference.lora_linear(output, x, a, b, indices[:5], offsets, 0.5)
    one, other = output.clone(), output.clone()
    ADD_PACKED(one, x, packed, indices, *widths, *[0] * (3 - slices), 0.5)
    torch.testing.assert_close(one, wanted)
    operands = [operand for pair in zip(a, b, strict=True) for operand in pair] + [None] * (6 - 2 * slices)
    ADD_SLICES(other, None, None, x, *operands, indices, *offsets, *[0] * (3 - slices), 0.5)
    assert torch.equal(one, other)
    assert torch.equal(one[:, sum(widths) :], output[:, sum(widths) :])
    for call, weights in ((ADD_PACKED, (packed,)), (ADD_SLICES, operands)):
        several = (None, None) if call is ADD_SLICES else ()
        numbers = (*(offsets if call is ADD_SLICES else widths), *[0] * (3 - slices), 0.5)
        call(one, *several, x, *weights, torch.full((7,), -1), *numbers)
        with pytest.raises(RuntimeError, match="an index for each row"):
            call(one, *several, x, *weights, indices[:4], *numbers)
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("columns", "widths"),
    [
        (6 + 5 + 1, (5, 0, 0)), (6, (0, 0, 0)), (21, (9, 0, 0)), (16, (5, -1, 0)), (18, (5, 0, 1)), (24, (9, 3, 0)),
        (23, (BIG, BIG, 7)),
    ],
    ids=["left-over", "none", "another-slice", "negative", "a-gap", "too-wide", "no-sum"],
)  # fmt: skip
def test_packed_weights_of_other_sizes_are_refused(columns: int, widths: tuple[int, ...]) -> None:
    output, x, indices = torch.zeros(2, 9), torch.ones(2, 6), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="operands that do not fit together"):
        ADD_PACKED(output, x, torch.ones(2, 4, columns), indices, *widths, 1.0)
    with pytest.raises(RuntimeError, match="operands that do not fit together"):
        ADD_PACKED(output.double(), x, torch.ones(2, 4, 6 + 9), indices, 9, 0, 0, 1.0)
    assert not output.any()


def test_a_write_past_the_dispatcher_is_seen_by_autograd() -> None:
    output = torch.zeros(1, 2)
    product = torch.ones(1, 2, requires_grad=True) * output
    with torch.no_grad():
        xlc.bgmv_expand(output, torch.ones(1, 1), torch.ones(1, 2, 1), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_inference_tensors_are_written_to() -> None:
    with torch.inference_mode():
        output = torch.zeros(1, 2)
        xlc.bgmv_expand(output, torch.ones(1, 1), torch.ones(1, 2, 1), torch.tensor([0]))
        assert output.tolist() == [[1.0, 1.0]]


ROWS, INDICES = torch.zeros(2, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "arguments",
    [
        (ROWS, torch.zeros(2, 3), torch.zeros(2, 4, 5), INDICES),
        (ROWS, torch.zeros(3, 3), torch.zeros(2, 4, 3), INDICES),
        (ROWS, torch.zeros(2, 3), torch.zeros(2, 5, 3), INDICES),
        (ROWS, torch.zeros(2, 3), torch.zeros(0, 4, 3), INDICES),
        (ROWS, torch.zeros(2, 3), torch.zeros(2, 2, 4, 3), INDICES),
        (ROWS, torch.zeros(2, 3), torch.zeros(4, 3), INDICES),
        (ROWS, torch.zeros(2, 3), torch.zeros(2, 4, 3), INDICES.float()),
        (ROWS, torch.zeros(2, 3), torch.zeros(2, 4, 3), INDICES[None]),
        (ROWS.double(), torch.zeros(2, 3), torch.zeros(2, 4, 3), INDICES),
        (torch.zeros(1, 4).expand(2, 4), torch.zeros(2, 3), torch.zeros(2, 4, 3), INDICES),
        (ROWS, torch.zeros(2, 3).to_sparse(), torch.zeros(2, 4, 3), INDICES),
        (ROWS, torch.zeros(2, 3, device="meta"), torch.zeros(2, 4, 3), INDICES),
    ],
    ids=[
        "rank", "rows", "too-wide", "no-slots", "second-place", "two-dimensions", "float-indices", "indices-2d",
        "float64", "expanded-output", "sparse", "elsewhere",
    ],
)  # fmt: skip
def test_what_the_contract_does_not_allow_is_refused_before_memory_is_touched(arguments: tuple[Tensor, ...]) -> None:
    """Eager calls have no other check; the error comes from the slow path, with words."""
    output, inputs, weights, indices = arguments
    before = output.clone()
    assert not native.TRY_EXPAND(output, inputs, weights, indices, 0, weights.shape[-2], True)
    assert not native.TRY_SHRINK(output, inputs, weights, indices, 1.0)
    assert not native.TRY_ADD_LORA([output], inputs, [weights], [weights], indices, [0], [0], 1.0)
    assert torch.equal(output, before)


@pytest.mark.parametrize(("offset", "columns"), [(-1, 2), (3, 2), (0, -1), (0, 5), (2**63 - 2, 2), (2**63 - 1, 4)])
def test_columns_outside_the_output_are_refused(offset: int, columns: int) -> None:
    assert not native.TRY_EXPAND(ROWS.clone(), torch.zeros(2, 3), torch.zeros(2, 4, 3), INDICES, offset, columns, True)


@pytest.mark.parametrize(("outputs", "offsets"), [([0, 0], [0, 1]), ([0, 1], [0, 0]), ([0, -1], [0, 0]), ([0], [0])])
def test_slices_that_share_columns_or_have_no_output_are_refused(outputs: list[int], offsets: list[int]) -> None:
    a, b = torch.zeros(2, 1, 3), torch.zeros(2, 2, 1)
    assert not native.TRY_ADD_LORA([ROWS.clone()], torch.zeros(2, 3), [a, a], [b, b], INDICES, outputs, offsets, 1.0)


@pytest.mark.parametrize("offset", [2**63 - 2, 2**63 - 1, -(2**63)])
def test_offsets_whose_end_is_no_number_are_refused_in_words(offset: int) -> None:
    a, b, rows = torch.zeros(2, 1, 3), torch.zeros(2, 2, 1), torch.zeros(2, 3)
    with torch.no_grad():
        with pytest.raises(SliceError, match="a slice inside the output"):
            xlc.bgmv_expand_slice(ROWS.clone(), torch.zeros(2, 1), b, INDICES, offset, 2)
        with pytest.raises(SliceError, match="a slice inside the output"):
            xlc.lora_linear(ROWS, rows, [a], [b], INDICES, [offset])


def test_memory_that_was_freed_is_not_read() -> None:
    """As FSDP frees it: PyTorch raises, and so do we."""
    inputs = torch.zeros(2, 3)
    inputs.untyped_storage().resize_(0)
    assert not native.TRY_SHRINK(ROWS.clone(), inputs, torch.zeros(2, 4, 3), INDICES, 1.0)
    with torch.no_grad(), pytest.raises(LoraError):
        xlc.bgmv_shrink(ROWS.clone(), inputs, torch.zeros(2, 4, 3), INDICES)


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_operands_of_other_kinds_are_refused_in_words() -> None:
    quantized = torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, torch.qint8)
    weights = torch.zeros(2, 4, 3)
    with torch.no_grad():
        with pytest.raises(DtypeError):
            xlc.bgmv_shrink(ROWS.clone(), quantized, weights, INDICES)
        with pytest.raises(ContractError, match="lora_indices_tensor: wanted a dense tensor"):
            xlc.bgmv_shrink(ROWS.clone(), torch.zeros(2, 3), weights, INDICES.to_sparse())
        with pytest.raises(ContractError, match="base: wanted a dense tensor"):
            xlc.lora_linear(ROWS.to_sparse(), torch.zeros(2, 3), [weights], [torch.zeros(2, 4, 4)], INDICES, [0])


def test_an_inference_tensor_is_not_changed_outside_of_inference_mode() -> None:
    with torch.inference_mode():
        output = torch.zeros(1, 2)
    operands = (output, torch.ones(1, 1), torch.ones(1, 2, 1), torch.tensor([0]))
    with torch.no_grad(), pytest.raises(RuntimeError, match="inference tensor"):
        xlc.bgmv_expand(*operands)
    assert output.tolist() == [[0.0, 0.0]]


def test_subnormal_numbers_stay_what_they_are() -> None:
    tiny = torch.full((1, 70), 2.9387e-39, dtype=torch.bfloat16)
    output = tiny.clone()
    with torch.no_grad():
        xlc.bgmv_expand(output, torch.zeros(1, 4), torch.zeros(1, 70, 4, dtype=torch.bfloat16), torch.tensor([0]))
    assert torch.equal(output, tiny)


@pytest.mark.parametrize("damage", ["cut", "replaced"])
def test_a_damaged_library_is_made_anew(tmp_path: Path, quick: dict[str, str], damage: str) -> None:
    """A library that was cut short ends the process that loads it."""
    folder = tmp_path / "xpu-lora-compile"
    assert start(tmp_path, **quick).communicate() == ("native\n", "")
    (library,) = folder.iterdir()
    whole = library.read_bytes()
    library.write_bytes({"cut": whole[:300_000], "replaced": b"no library"}[damage])
    assert start(tmp_path, **quick).communicate() == ("native\n", "")
    # One of the old name, which is whole again.
    assert list(folder.iterdir()) == [library]
    assert library.read_bytes() == whole


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path, quick: dict[str, str]) -> None:
    folder = tmp_path / "xpu-lora-compile"
    folder.mkdir()
    folder.chmod(0o777)
    assert start(tmp_path, **quick).communicate() == ("native\n", "")
    assert list(folder.iterdir()) == []


def test_a_broken_cxx_is_a_reason_and_no_crash(tmp_path: Path) -> None:
    said, errors = start(tmp_path, CXX='g++ "-DX').communicate()
    assert said.startswith('g++ "-DX could not make it: No closing quotation')
    assert "Plain PyTorch runs instead." in errors


def test_the_halves_for_programs_without_python_are_those_of_eager_calls() -> None:
    ops, draw = torch.ops.xpu_lora, RandomOperands(0)
    (a,), (b,) = draw.stacks(8, [6], [4, 2, 3], torch.float32)
    inputs, output, b = draw.normal(5, 8), draw.normal(5, 10), b.transpose(1, 2)
    indices = torch.tensor([2, -1, 0, 1, 0, 7, 7], dtype=torch.int32)
    hidden, wanted_hidden, wanted = torch.full((5, 4), torch.nan), torch.empty(5, 4), output.clone()
    ops.native_shrink(hidden, inputs, a, indices, 0.5)
    assert native.TRY_SHRINK(wanted_hidden, inputs, a, indices[:5], 0.5)
    ops.native_expand(output, hidden, b, indices, 3, 6, True)
    assert native.TRY_EXPAND(wanted, hidden, b, indices[:5], 3, 6, True)
    assert torch.equal(hidden, wanted_hidden)
    assert torch.equal(output, wanted)
    for misfit in (indices[:4], indices.float()):
        with pytest.raises(RuntimeError, match="an index for each row"):
            ops.native_shrink(hidden, inputs, a, misfit, 0.5)
    with pytest.raises(RuntimeError, match="native_expand: operands that do not fit together"):
        ops.native_expand(output, hidden, b, indices, 5, 6, True)


WITHOUT_PYTHON = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
output = torch.zeros(2, 3)
weights = torch.full((1, 3, 1), 5.0)
torch.ops.xpu_lora.native_expand(output, torch.ones(2, 1), weights, torch.tensor([0, -1]), 0, 3, True)
assert output.tolist() == [[5.0] * 3, [0.0] * 3], output
import xpu_lora_compile as xlc
from xpu_lora_compile.kernels import native
torch.ops.xpu_lora.native_expand(output, torch.ones(2, 1), weights, torch.tensor([0, -1]), 0, 3, True)
xlc.bgmv_expand(output, torch.ones(2, 1), weights, torch.tensor([0, -1]))
assert output.tolist() == [[15.0] * 3, [0.0] * 3], output
assert not native.problem()
"""


def test_the_library_defines_the_ops_where_python_has_not_and_python_takes_them_over(library: Path) -> None:
    command = [sys.executable, "-W", "error::UserWarning", "-c", WITHOUT_PYTHON, str(library)]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    assert (done.returncode, done.stderr) == (0, "")
