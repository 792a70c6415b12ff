"""`xpu-lora bench`: that it measures what it says, after checking it, and shows it. Never how fast anything is."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import xpu_lora_compile as xlc
from xpu_lora_compile.adapters.folders import write_adapter
from xpu_lora_compile.adapters.staging import Staged
from xpu_lora_compile.bench import forms, gpu_model, gpu_moe, layer, load, model, moe, ops, show, train
from xpu_lora_compile.bench import measure as measure_module
from xpu_lora_compile.bench.measure import Timing, geometric_mean, measure
from xpu_lora_compile.cli import app
from xpu_lora_compile.errors import BenchError

SMALL = ops.Point("float32", 5, 64, (48, 32), 4, 3)


@pytest.fixture(scope="module")
def run() -> ops.OpsRun:
    done: list[str] = []
    result = ops.run([SMALL, ops.Point("bfloat16", 3, 32, (32,), 4, 3)], "cpu", 0.01, done.append, 2)
    assert done == ["float32 64x48+32 R4 K3 T5", "bfloat16 32x32 R4 K3 T3"]
    return result


def test_every_contender_is_timed_at_every_point(run: ops.OpsRun) -> None:
    names = {*ops.OURS, *ops.PLAIN, "vLLM's form"}
    several = {f"{ops.SEVERAL}2", f"{ops.SEVERAL}2 by as many calls"}
    for result in run.results:
        assert set(result.timings) == names | several
        assert all(timing.median > 0 and timing.runs >= 3 for timing in result.timings.values())
        assert 1e8 < result.bandwidth < 1e13
        assert 0 < result.floor < 10
        assert result.peak_memory > 0
    assert {f"{name} / ours" for name in names - set(ops.OURS)} < set(run.summary)
    assert {f"{name} / one, compiled" for name in several} < set(run.summary)
    assert any(name.startswith("an eager call") for name in run.summary)
    assert "torch" in run.machine


def test_the_summary_compares_the_best_of_ours() -> None:
    def result(**times: float) -> ops.Result:
        named = dict.fromkeys((*ops.PLAIN, "vLLM's form"), times["other"])
        named |= dict(zip(ops.OURS, (times["compiled"], times["eager"]), strict=True))
        return ops.Result(SMALL, {name: Timing(time, 0.0, 3) for name, time in named.items()}, 1e9, 1.0, 0)

    summary = ops.summary([result(compiled=2.0, eager=4.0, other=6.0), result(compiled=9.0, eager=3.0, other=9.0)])
    assert summary["best plain form / ours"] == pytest.approx(3)
    assert summary["best plain form / ours, at the worst point"] == pytest.approx(3)
    assert summary["ours / floor"] == pytest.approx(6**0.5)


@pytest.mark.parametrize("form", ["vllm", "loop", "gather", "dense"])
def test_a_contender_that_computes_something_else_is_not_timed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(forms, form)

    def wrong(output: torch.Tensor, *rest: object) -> None:
        right(output, *rest)
        output[0, -1] += 1

    monkeypatch.setattr(forms, form, wrong)
    with pytest.raises(
        BenchError, match=r"at float32 64x48\+32 R4 K3 T5: wanted an error of at most .* Run `xpu-lora doctor`"
    ):
        ops.run([SMALL], "cpu", 0.01, lambda _: None)


def test_contenders_take_turns_and_the_slow_ones_fewer() -> None:
    order: list[str] = []

    def slow(_: int) -> None:
        order.append("slow")
        time.sleep(0.02)

    timings = measure({"quick": lambda _: order.append("quick"), "slow": slow}, "cpu", seconds=0.1)
    assert timings["quick"].runs == 200
    assert 3 <= timings["slow"].runs <= 5
    assert timings["slow"].median >= 20000
    # Two warm-up runs of each, then each once a round.
    assert order[:4] == ["quick", "quick", "slow", "slow"]
    rounds = [order[4:6], order[6:8], order[8:10]]
    assert all(sorted(names) == ["quick", "slow"] for names in rounds)


def test_no_call_works_on_what_the_one_before_it_has_left_in_the_caches_and_neighbours_change() -> None:
    calls: list[tuple[str, int]] = []
    contenders = {name: lambda number, name=name: calls.append((name, number)) for name in "abc"}
    measure(contenders, "cpu", seconds=1)
    assert [number for _, number in calls] == list(range(len(calls)))
    before_b = {earlier for (earlier, _), (later, _) in itertools.pairwise(calls[6:]) if later == "b"}
    assert {"a", "c"} <= before_b


def test_a_clock_leaves_out_the_prompt() -> None:
    clock = model._Clock()
    clock.times = [0.0, 5.0, 6.0, 8.0]
    assert clock.steps() == [1.0, 2.0]


def test_the_floor_is_of_bytes_that_must_move() -> None:
    operands = ops._Operands(ops.Point("bfloat16", 4, 64, (32,), 4, 1), "cpu")
    assert operands.bytes_moved() == 2 * (4 * (64 + 32) + 4 * 64 + 2 * 4 * 32)


def test_the_suites_have_the_sizes_they_are_said_to_have() -> None:
    assert [str(point) for point in ops.suite("main", ["float32"], [1, 8])] == [
        "float32 4096x4096 R16 K8 T1",
        "float32 4096x4096 R16 K8 T8",
    ]
    wide = ops.suite("wide", ["float32", "bfloat16"], [1, 8, 32, 256])
    assert len(wide) == 2 * 5 * 4 * 4
    assert {point.rank for point in wide} == {8, 64} == {*(8, 64)}
    assert {point.slots for point in wide} == {2, 64}


def test_a_table_and_a_picture_and_json(run: ops.OpsRun, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    show.plot(run.results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    show.save(run, tmp_path / "run.json")
    data = json.loads((tmp_path / "run.json").read_text())
    assert data["results"][0]["point"]["widths"] == [48, 32]
    assert data["summary"] == run.summary


def test_a_layer_is_timed_beside_peft(tmp_path: Path) -> None:
    found = layer.run("float32", [1, 6], 64, 32, 4, 2, 0.01, lambda _: None)
    assert [result.rows for result in found.results] == [1, 6]
    assert {"base alone, compiled", "ours, compiled", "ours, eager", "gather, Inductor", "PEFT"} == set(
        found.results[0].timings
    )


TINY = moe.Sizes(6, 2, 32, 24, 4, 3, "float32")


def test_experts_are_timed_next_to_peft_and_every_form_of_the_base(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    sizes = {"experts": 6, "chosen": 2, "features": 32, "inner": 24, "rank": 4, "slots": 3, "rows": 5, "inputs": 2}
    options = {**sizes, "seconds": 0.01, "threads": 1}
    arguments = ["bench", "moe", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
    ran = CliRunner().invoke(app, [*arguments, "--json", str(file)])
    assert ran.exit_code == 0, ran.output
    data = json.loads(file.read_text())
    assert data["what"] == "float32 E6 top-2 D32 I24 R4 K3, grouped_mm, 2 inputs in turn"
    assert [result["rows"] for result in data["results"]] == [5]
    bases = {moe.BASE, moe.COMPILED_BASE, "base, batched_mm", "base, eager"}
    assert set(data["results"][0]["timings"]) == bases | {moe.EAGER, moe.COMPILED, moe.PEFT}
    assert len(data["summary"]) == 4
    assert "T = 5: ours, the faster / the fastest base" in " ".join(ran.output.split())


def test_the_fastest_base_is_of_any_form() -> None:
    times = {
        moe.BASE: 4.0,
        moe.COMPILED_BASE: 3.0,
        "base, eager": 2.0,
        moe.EAGER: 6.0,
        moe.COMPILED: 5.0,
        moe.PEFT: 60.0,
    }
    found = moe.summary([moe.MoeResult(8, {name: Timing(time, 0.0, 3) for name, time in times.items()})])
    assert list(found.values()) == pytest.approx([10, 1.5, 5 / 3, 2.5])


def test_a_batched_product_that_would_copy_too_much_is_not_timed() -> None:
    assert [moe._copied(moe.SMALL, rows) for rows in (1, 8, 128)] == [False, False, True]


def test_experts_that_compute_something_else_than_peft_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = moe.write_adapters

    def wrong(folder: Path, sizes: moe.Sizes, count: int) -> dict[str, Path]:
        written = right(folder, sizes, count)
        # PEFT gets another adapter than ours.
        monkeypatch.setattr(moe, "peft_model", lambda base, sizes, _: peft_model(base, sizes, written["adapter_1"]))
        return written

    peft_model = moe.peft_model
    monkeypatch.setattr(moe, "write_adapters", wrong)
    with pytest.raises(BenchError, match="bench moe: ours, eager at T4, next to PEFT: wanted an error of at most"):
        moe.run(TINY, [4], 1, 0.01, lambda _: None)


def test_experts_in_graphs_are_those_of_float64_alone_too(tmp_path: Path) -> None:
    layers = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        layers.append(gpu_moe.Layer(TINY, tmp_path / str(number), number, "cpu"))
    inputs, slots = moe.draw(TINY, 5), torch.tensor([0, 2, -1, 1, 0])
    with torch.no_grad(), gpu_moe.serving(layers, slots):
        calls = gpu_moe.contenders(layers, inputs, slots)
        assert set(calls) == {moe.BASE, moe.COMPILED_BASE, moe.EAGER, moe.COMPILED}
        assert set(gpu_moe.contenders_alone(layers, TINY, inputs, slots, {})) == {gpu_moe.ALONE}
        a, _ = layers[1].stacks(moe.DOWN)
        exact = gpu_moe._exact_alone(layers[1], inputs, torch.ones(10, 24), slots)[moe.DOWN]
        a += 1
        changed = gpu_moe._exact_alone(layers[1], inputs, torch.ones(10, 24), slots)[moe.DOWN]
        with pytest.raises(BenchError, match="bench moe: changed: wanted an error"):
            gpu_moe.check("changed", exact, changed)


def test_the_summary_of_graphs_is_of_speeds_and_of_lora_alone() -> None:
    def result(rows: int, vllm: float) -> moe.MoeResult:
        times = {moe.BASE: 9.0, moe.COMPILED_BASE: 8.0, moe.EAGER: 10.0, moe.COMPILED: 16.0, gpu_moe.ALONE: 2.0}
        return moe.MoeResult(
            rows, {name: Timing(time, 0.0, 3) for name, time in (times | {"vLLM, alone": vllm}).items()}
        )

    found = gpu_moe.summary([result(32, 4.0), result(4096, 16.0)])
    assert found["T = 32: speed of ours, eager / base"] == pytest.approx(0.9)
    assert found["T = 32: speed of ours, the faster / the faster base"] == pytest.approx(0.8)
    assert found["vLLM, alone / ours, alone"] == pytest.approx(4)
    assert found["vLLM, alone / ours, alone, at the worst T"] == pytest.approx(2)


def test_the_command_for_ops_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "suite", lambda name, dtypes, rows: [ops.Point(dtypes[0], rows[0], 32, (32,), 4, 3)])
    file = tmp_path / "run.json"
    result = CliRunner().invoke(
        app, ["bench", "ops", "--dtype", "float32", "--rows", "2", "--seconds", "0.01", "--json", str(file)]
    )
    assert result.exit_code == 0, result.output
    assert "best plain form / ours, at the worst point" in result.output
    assert json.loads(file.read_text())["results"][0]["point"]["rows"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["ops", "--dtype", "float8"],
            "wanted float32, bfloat16, float16; got 'float8'. Choose one of these with --dtype.",
        ),
        (["ops", "--rows", "0"], "wanted sizes of at least 1"),
        (["ops", "--device", "tpu"], "wanted cpu, or cuda or xpu where there is one"),
        (["layer", "--json", "no/such/folder/x.json"], "wanted a folder that exists"),
        (["model", "--batch", "-1"], "wanted sizes of at least 1"),
        (["model", "--base", "fp4"], "wanted plain, int8, nf4; got 'fp4'. Choose one of these."),
        (["gpu-model", "--base", "fp4"], "wanted plain, int8, nf4; got 'fp4'. Choose one of these."),
        (["moe", "--form", "sonic"], "wanted grouped_mm, batched_mm, eager; got 'sonic'"),
        (["moe", "--experts", "4"], "wanted at most the 4 experts; got 8"),
        (["moe", "--peers", "."], "wanted --device cuda, where their kernels run; got cpu. Leave it out."),
        (["moe", "--slots", "0"], "wanted sizes of at least 1"),
        (["load", "--device", "xpu"], "wanted cpu, or cuda where there is one; got 'xpu'"),
        (["load", "--device", "cpu", "--shape", "gpt5"], "wanted smollm2, llama-8b; got 'gpt5'"),
        (["load", "--device", "cpu", "--slots", "1"], "wanted at least 2; got 1"),
    ],
)
def test_a_command_that_cannot_be_is_refused_before_anything_runs(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_timed_from_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, emptied = tmp_path / "run.json", 0

    @contextmanager
    def fresh_cache() -> Iterator[None]:
        # In an empty one Inductor also compiles its headers, for longer than all the rest takes.
        nonlocal emptied
        emptied += 1
        yield

    monkeypatch.setattr(model, "fresh_cache", fresh_cache)
    sizes = ["--layers", "1", "--batch", "3", "--new-tokens", "3", "--slots", "2", "--rank", "2", "--runs", "2"]
    ran = CliRunner().invoke(app, ["bench", "model", *sizes, "--json", str(file)])
    assert ran.exit_code == 0, ran.output
    # The first compilation of all, and the first one of each of the two that are compiled.
    assert emptied == 3
    data = json.loads(file.read_text())
    assert set(data["timings"]) == set(data["whole"]) == {"base model", "mixed adapters", "PEFT's adapter_names, eager"}
    # Of 3 tokens the first is the prompt's: 2 steps in each of 2 runs.
    assert all(timing["runs"] == 4 for timing in data["timings"].values())
    assert data["summary"]["logits: greatest difference from PEFT's / greatest logit"] < 1e-4
    assert "decoding: mixed adapters' tokens/s" in ran.output


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50}
    monkeypatch.setitem(gpu_model.SHAPES, "tiny", tiny | {"num_attention_heads": 4, "num_key_value_heads": 2})
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)


TRAIN = ["bench", "train", "--shape", "tiny", "--batch", "4", "--tokens", "5", "--rank", "2", "--rounds", "2"]
TRAIN += ["--adapters", "1", "--adapters", "2", "--slots", "2", "--slots", "5"]


@pytest.mark.usefixtures("tiny_shape")
def test_a_step_of_training_is_timed_beside_peft(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    ran = CliRunner().invoke(app, [*TRAIN, "--json", str(file)])
    assert ran.exit_code == 0, ran.output
    data = json.loads(file.read_text())
    ours = ["ours, 1 adapter", "ours, 2 adapters mixed", "ours, 2 adapters mixed, K5"]
    assert set(data["timings"]) == {"base model", "PEFT, one adapter", *ours}
    for name in ours:
        assert data["summary"][f"{name}: error of gradients against float64"] < 1e-5
        assert data["summary"][f"time of {name} / PEFT's one adapter"] > 0


@pytest.mark.usefixtures("tiny_shape")
def test_gradients_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = train._our_step

    def wrong(*given: Any) -> Any:
        step = own(*given)
        return lambda: {name: gradient * 1.01 for name, gradient in step().items()}

    monkeypatch.setattr(train, "_our_step", wrong)
    ran = CliRunner().invoke(app, TRAIN)
    assert ran.exit_code == 2
    assert "gradients of float64" in ran.output


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.usefixtures("tiny_shape")
def test_loads_are_timed_alone_and_while_a_loop_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    found = load.run("tiny", "bfloat16", 3, 4, 2, 3, "cpu", done.append)
    assert done == ["checked", "compiled", "loaded alone", "decoded alone"]
    assert found.timings.keys() == {load.STEP, load.STEP_MEANWHILE, load.LOAD, load.LOAD_MEANWHILE, load.DROP}
    assert found.timings[load.LOAD].runs == found.timings[load.LOAD_MEANWHILE].runs == 3
    assert found.summary["load, the slowest: GB/s"] <= found.summary["load: GB/s"]
    assert found.summary["steps while adapters are loaded"] == found.timings[load.STEP_MEANWHILE].runs
    assert "bfloat16" in found.what


def test_a_bank_that_holds_other_values_than_the_file_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 6))
    bank = xlc.attach(module, slots=1, max_rank=2)
    write_adapter(tmp_path, bank.sites, 2)
    load._check_values(module, bank, tmp_path, 2)
    store = Staged.store

    def wrongly(staged: Staged, slot: int, *rest: object) -> None:
        store(staged, slot, *rest)  # type: ignore[arg-type]
        module[0].lora_b[slot, 5, 1] += 1

    monkeypatch.setattr(Staged, "store", wrongly)
    with pytest.raises(BenchError, match="bench load: 0: wanted the values of the file"):
        load._check_values(module, bank, tmp_path, 2)


def test_what_fails_in_the_loop_is_raised_where_it_ends() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), load._Loop(fail):
        pass


def test_threads_are_pinned_while_it_measures_and_free_again() -> None:
    threads, cpus = torch.get_num_threads(), os.sched_getaffinity(0)
    with measure_module.pinned(1):
        assert (torch.get_num_threads(), len(os.sched_getaffinity(0))) == (1, 1)
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, cpus)


def test_stderr_is_dropped_only_within_the_block(capfd: pytest.CaptureFixture[str]) -> None:
    with measure_module.without_stderr():
        os.write(2, b"the profiler's")
    os.write(2, b"ours")
    assert capfd.readouterr().err == "ours"


def test_the_overhead_of_an_eager_call_is_told() -> None:
    found = ops.overheads("cpu")
    assert len(found) == 4
    assert all(0 < us < 10_000 for us in found.values())


def test_geometric_mean() -> None:
    assert geometric_mean([2, 8]) == pytest.approx(4)


def test_engines_whose_numbers_differ_are_not_timed() -> None:
    from xpu_lora_compile.bench import vllm

    generator = torch.Generator().manual_seed(0)
    base, with_adapter, foreign = (torch.randn(3, vllm.CHECKED, generator=generator) for _ in range(3))
    mixed = [None, "one", None]
    right = torch.where(torch.tensor([False, True, False])[:, None], with_adapter, base)
    # vLLM's own may give a row without an adapter another's LoRA.
    stock = torch.where(torch.tensor([True, True, False])[:, None], with_adapter, base)
    found = {vllm.BASE: base, vllm.ALONE: base + 0.05, vllm.MIXED: right - 0.05, vllm.STOCK: stock}
    vllm._check(found, mixed, "bfloat16")
    for name, wrong in (
        (vllm.ALONE, base + 0.2),
        (vllm.ALONE, torch.full_like(base, float("nan"))),
        (vllm.MIXED, base),
        (vllm.MIXED, stock),
        (vllm.MIXED, foreign),
    ):
        with pytest.raises(BenchError, match=rf"bench vllm: {name}: wanted an error of at most 1\.0e-01"):
            vllm._check(found | {name: wrong}, mixed, "bfloat16")
    with pytest.raises(BenchError, match=r"at most 1\.0e-04"):
        vllm._check(found, mixed, "float32")
