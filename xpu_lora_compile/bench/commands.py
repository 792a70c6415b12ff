"""The commands `xpu-lora bench ...`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from xpu_lora_compile.command import reported
from xpu_lora_compile.errors import BenchError

bench = typer.Typer(no_args_is_help=True, help="Time our kernels beside their peers, after checking the numbers.")

Json = Annotated[Path | None, typer.Option(help="Write all that was measured as JSON here.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of PyTorch, whatever OMP_NUM_THREADS says.")]
Seconds = Annotated[float, typer.Option(help="For each contender at each point.")]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(help="float32, bfloat16, float16; several times for several. By default the first two."),
]
Rows = Annotated[
    list[int] | None,
    typer.Option(
        help="T; several times for several. By default 1, 8, 32 and 256; of gpu 1, 8, 32, 128, 1024 and 4096."
    ),
]
Rank = Annotated[int, typer.Option(help="R of every adapter.")]
Slots = Annotated[int, typer.Option(help="K, and as many adapters.")]
Base = Annotated[
    str, typer.Option(help="The model's linear layers: plain, int8 (by torchao), or nf4 (4 bits, by bitsandbytes).")
]
Suite = Literal["main", "wide"]


@bench.command("ops")
def bench_ops(
    suite: Annotated[Suite, typer.Option(help="main: 4096x4096; wide: ranks, slots, sizes and qkv slices.")] = "main",
    dtype: Dtypes = None,
    rows: Rows = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or xpu.")] = "cpu",
    seconds: Seconds = 0.3,
    threads: Threads = 2,
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time against T as a PNG here.")] = None,
    adapters_per_row: Annotated[
        int, typer.Option(min=1, help="M; with 2 or more also what M adapters a row add, beside what one adds.")
    ] = 1,
) -> None:
    """Shrink and expand alone: ours, vLLM's and PEFT's ways, plain forms through Inductor, and a floor."""
    from xpu_lora_compile.bench import measure, ops, show

    dtypes, rows = dtype or ["float32", "bfloat16"], rows or [1, 8, 32, 256]
    with reported(), measure.pinned(threads):
        show.check(device, dtypes, rows, json, plot)
        points = ops.suite(suite, dtypes, rows)
        with show.progress(len(points)) as advance:
            run = ops.run(points, device, seconds, advance, adapters_per_row)
        places = {
            f"{result.point}; floor {result.floor:.0f} us, memory {result.peak_memory >> 10} KiB": result.timings
            for result in run.results
        }
        title = f"a step of {ops.LAYERS} layers, by layer"
        show.print_run(run, title, "point", ops.OURS[0], places, json, ours_is_faster=True)
        if plot is not None:
            show.plot(run.results, plot)


@bench.command("gpu")
def bench_gpu(
    rows: Rows = None,
    output: Annotated[list[str] | None, typer.Option(help="a: 4096; b: 4096+1024+1024; c: 14336+14336.")] = None,
    bank: Annotated[
        list[int] | None, typer.Option(min=0, max=3, help="K, R: 0: 8, 16; 1: 32, 16; 2: 8, 64; 3: 64, mixed 8-64.")
    ] = None,
    peers: Annotated[
        Path | None, typer.Option(help="A folder with sources of vLLM, SGLang or LMDeploy; in a checkout.")
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Only these of the peers.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain PyTorch forms, too: seconds more a point.")] = False,
    rounds: Annotated[int, typer.Option(min=2, help="Replays of each graph.")] = 15,
    json: Json = None,
) -> None:
    """Base product and LoRA in a CUDA graph of 12 layers: ours, the base alone, peers, plain forms, launch floors."""
    from xpu_lora_compile.bench import gpu, show

    rows, outputs = rows or [1, 8, 32, 128, 1024, 4096], output or list(gpu.OUTPUTS)
    with reported():
        show.check("cpu", [], rows, json)
        if unknown := [name for name in outputs if name not in gpu.OUTPUTS]:
            raise BenchError("bench gpu: --output", ", ".join(gpu.OUTPUTS), str(unknown), "Choose from these.")
        points = gpu.suite(outputs, bank or list(range(len(gpu.BANKS))), rows)
        with show.progress(len(points)) as advance:
            run = gpu.run(points, peers, peer or [], plain, rounds, advance)
        places = {str(result.point): result.timings for result in run.results}
        floors = " and ".join(f"{floor:.1f}" for floor in run.launch_floors)
        title = f"a layer of {gpu.LAYERS} in a CUDA graph; one and two launches of nothing: {floors} us"
        show.print_run(run, title, "point", gpu.BASE, places, json)


@bench.command("gpu-model")
def bench_gpu_model(
    shape: Annotated[str, typer.Option(help="smollm2, or llama-8b (8 of its layers).")] = "smollm2",
    mode: Annotated[
        str, typer.Option(help="captured (in a CUDA graph), default, dynamic, reduce-overhead, cpp-wrapper or eager.")
    ] = "captured",
    batch: Annotated[int, typer.Option(help="Rows.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each row: 1 to decode, more for a prompt.")] = 1,
    rank: Rank = 16,
    slots: Slots = 8,
    rounds: Annotated[int, typer.Option(min=2, help="Steps of each.")] = 30,
    base: Base = "plain",
    json: Json = None,
) -> None:
    """A step of a model on a GPU, on random weights: mixed adapters, and the base model run in the same way."""
    from xpu_lora_compile.bench import gpu_model, model, show

    with reported():
        show.check("cpu", [], [batch, rank, slots], json)
        with show.progress() as advance:
            run = gpu_model.run(shape, mode, batch, tokens, rank, slots, rounds, "cuda", base, advance)
        show.print_run(run, "a step", "model", model.BASE, {run.what: run.timings}, json)


@bench.command("load")
def bench_load(
    shape: Annotated[str, typer.Option(help="smollm2, or llama-8b (8 of its layers).")] = "llama-8b",
    dtype: Annotated[str, typer.Option(help="Of the adapter's file: float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    batch: Annotated[int, typer.Option(help="Rows.")] = 32,
    rank: Rank = 16,
    slots: Slots = 8,
    loads: Annotated[int, typer.Option(min=2, help="Loads alone, and again while another thread decodes.")] = 50,
    json: Json = None,
) -> None:
    """Adapters into the bank: GB/s from the page cache, and how long a decoding loop in another thread waits."""
    from xpu_lora_compile.bench import load, show

    with reported():
        show.check("cpu", [dtype], [batch, rank, slots], json)
        with show.progress() as advance:
            run = load.run(shape, dtype, batch, rank, slots, loads, device, advance)
        show.print_run(run, run.what, "model", load.STEP, {"": run.timings}, json)


@bench.command("layer")
def bench_layer(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    rows: Rows = None,
    features: Annotated[int, typer.Option(help="D.")] = 4096,
    width: Annotated[int, typer.Option(help="W.")] = 4096,
    rank: Rank = 16,
    slots: Slots = 8,
    seconds: Seconds = 0.5,
    threads: Threads = 2,
    json: Json = None,
) -> None:
    """One linear layer with its base product: ours, PEFT's layer, and the gather form written into the module."""
    from xpu_lora_compile.bench import layer, measure, show

    rows = rows or [1, 8, 32, 256]
    with reported(), measure.pinned(threads):
        show.check("cpu", [dtype], [*rows, features, width, rank, slots], json)
        with show.progress(len(rows)) as advance:
            run = layer.run(dtype, rows, features, width, rank, slots, seconds, advance)
        places = {f"T{result.rows}": result.timings for result in run.results}
        show.print_run(run, run.what, "rows", layer.BASE, places, json)


@bench.command("moe")
def bench_moe(
    device: Annotated[str, typer.Option(help="cpu, or cuda: then in CUDA graphs.")] = "cpu",
    rows: Annotated[
        list[int] | None,
        typer.Option(help="T; several times for several. By default 1, 8 and 128; on cuda 32 and 4096."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="By default float32; on cuda bfloat16.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="E. By default 64; on cuda 128.")] = None,
    chosen: Annotated[int, typer.Option(min=1, help="Experts of each token.")] = 8,
    features: Annotated[int | None, typer.Option(min=1, help="D. By default 512; on cuda 2048.")] = None,
    inner: Annotated[int | None, typer.Option(min=1, help="I. By default 192; on cuda 768.")] = None,
    rank: Rank = 16,
    slots: Slots = 8,
    form: Annotated[
        str, typer.Option(help="experts_implementation of transformers: grouped_mm, batched_mm or eager.")
    ] = "grouped_mm",
    inputs: Annotated[
        int, typer.Option(min=1, help="On a CPU: how many take turns, each with experts of its own.")
    ] = 16,
    peers: Annotated[Path | None, typer.Option(help="On cuda: a folder with sources of vLLM or SGLang.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="On cuda: replays of each graph.")] = 15,
    seconds: Seconds = 1.0,
    threads: Threads = 2,
    json: Json = None,
) -> None:
    """Experts of a mixture with mixed adapters: next to themselves without, and PEFT; on cuda to others' kernels."""
    from xpu_lora_compile.bench import gpu_moe, measure, moe, show

    usual = moe.LARGE if device == "cuda" else moe.SMALL
    sizes = moe.Sizes(
        experts or usual.experts,
        chosen,
        features or usual.features,
        inner or usual.inner,
        rank,
        slots,
        dtype or usual.dtype,
        form,
    )
    with reported(), nullcontext() if device == "cuda" else measure.pinned(threads):
        rows = rows or ([32, 4096] if device == "cuda" else [1, 8, 128])
        show.check(device, [sizes.dtype], [*rows, *sizes.numbers], json)
        moe.check_options(sizes, device, peers)
        with show.progress(len(rows)) as advance:
            if device == "cuda":
                run = gpu_moe.run(sizes, rows, peers, rounds, advance)
            else:
                run = moe.run(sizes, rows, inputs, seconds, advance)
        places = {f"T{result.rows}": result.timings for result in run.results}
        show.print_run(run, run.what, "rows", moe.BASE, places, json)


@bench.command("model")
def bench_model(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch: Annotated[int, typer.Option(help="Rows.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=2, help="For each row, after a prompt of 8 tokens.")] = 32,
    rank: Rank = 16,
    slots: Slots = 4,
    layers: Annotated[int, typer.Option(help="Of SmolLM2-135M's 30.")] = 30,
    runs: Annotated[int, typer.Option(min=2, help="Of each contender, interleaved.")] = 5,
    base: Base = "plain",
    threads: Threads = 2,
    json: Json = None,
) -> None:
    """A model of SmolLM2-135M's shape, decoding with mixed adapters: beside itself without LoRA, and PEFT."""
    from xpu_lora_compile.bench import measure, model, show

    with reported(), measure.pinned(threads):
        show.check("cpu", [dtype], [batch, new_tokens, rank, slots, layers], json)
        with show.progress() as advance:
            run = model.run(dtype, batch, new_tokens, rank, slots, layers, runs, base, advance)
        show.print_run(run, "a decoding step", "model", model.BASE, {run.what: run.timings}, json)


@bench.command("train")
def bench_train(
    shape: Annotated[str, typer.Option(help="smollm2, or llama-8b (8 of its layers).")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Sequences.")] = 8,
    tokens: Annotated[int, typer.Option(help="Of each sequence.")] = 64,
    rank: Rank = 16,
    slots: Annotated[
        list[int] | None,
        typer.Option(help="K, 8 by default. Give more to time the most adapters in banks of these, too."),
    ] = None,
    adapters: Annotated[
        list[int] | None, typer.Option(help="Trained at once: 1, 4 and 8 by default. Beyond --batch, some have no row.")
    ] = None,
    layers: Annotated[int, typer.Option(min=0, help="Of the model; 0 for all.")] = 0,
    rounds: Annotated[int, typer.Option(min=2, help="Steps of each.")] = 10,
    threads: Threads = 2,
    json: Json = None,
) -> None:
    """A step of training, forward and backward: the base model, PEFT's one adapter, and our adapters in one batch."""
    from xpu_lora_compile.bench import measure, show, train

    counts, banks = adapters or [1, 4, 8], slots or [8]
    with reported(), measure.pinned(threads):
        show.check(device, [dtype], [batch, tokens, rank, *banks, *counts], json)
        with show.progress() as advance:
            run = train.run(shape, dtype, device, batch, tokens, rank, banks, counts, layers, rounds, advance)
        show.print_run(run, "a step", "model", train.PEFT, {run.what: run.timings}, json)


@bench.command("vllm")
def bench_vllm(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Requests, all at once.")] = 16,
    rank: Rank = 16,
    slots: Slots = 2,
    layers: Annotated[int, typer.Option(help="Of SmolLM2-135M's 30.")] = 30,
    runs: Annotated[int, typer.Option(min=2, help="Of each contender, interleaved.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="OMP_NUM_THREADS of each engine.")] = 1,
    eager: Annotated[bool, typer.Option("--eager", help="All engines with enforce_eager.")] = False,
    json: Json = None,
) -> None:
    """The engine of vLLM on a CPU, SmolLM2-135M's shape: base model; mixed adapters with the plugin, and without."""
    from xpu_lora_compile.bench import model, show, vllm

    with reported():
        show.check("cpu", [dtype], [batch, rank, slots, layers], json)
        with show.progress() as advance:
            run = vllm.run(dtype, batch, rank, slots, layers, runs, threads, eager, advance)
        show.print_run(run, f"a batch; {run.what}", "workload", model.BASE, run.timings, json)
