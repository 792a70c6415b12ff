"""Who launches the Triton kernels, an op or Inductor: the same bits, and what each costs the host. On a CUDA device.

Layers with the widths of Llama 8B (two by default), LoRA on every linear, mixed adapters. Parts:

bits    what the layers return in every mode of Inductor, against the graph of opaque ops compiled in the same way
time    microseconds of the host per call of a layer, and launches per layer, against the layers without LoRA
aoti    a `.pt2` of them: made, loaded and compared
graphs  how many graphs T = 1 to 2000 takes

    python benchmarks/visible.py bits time graphs aoti
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import linear, silu

import xpu_lora_compile as xlc
from xpu_lora_compile.backend import generate_code
from xpu_lora_compile.passes import Launch

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
SLOTS, RANK = 8, 16


class Layer(nn.Module):
    """The linears of a layer, without attention: q, k, v of one input, one more, gate and up of one, down."""

    def __init__(self, hidden: int, inner: int, keys: int, seed: int) -> None:
        super().__init__()
        self.widths = {"q": hidden, "k": keys, "v": keys, "o": hidden, "gate": inner, "up": inner, "down": hidden}
        sources = {name: inner if name == "down" else hidden for name in self.widths}
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=DEVICE) * scale).to(DTYPE)

        for name, width in self.widths.items():
            features = sources[name]
            self.register_buffer(f"w_{name}", normal(width, features, scale=features**-0.5))
            self.register_buffer(f"a_{name}", normal(SLOTS, RANK, features, scale=features**-0.5))
            # As a bank stores it.
            self.register_buffer(f"b_{name}", normal(SLOTS, RANK, width, scale=RANK**-0.5).transpose(1, 2))
        self.register_buffer(
            "ranks", torch.tensor([RANK, 4, 8, RANK, 1, RANK, 0, 12], dtype=torch.int32, device=DEVICE)
        )

    def projected(self, name: str, x: Tensor, indices: Tensor | None) -> Tensor:
        """One linear with its LoRA; without indices without."""
        base = linear(x, getattr(self, f"w_{name}"))
        if indices is None:
            return base
        a, b = getattr(self, f"a_{name}"), getattr(self, f"b_{name}")
        return xlc.lora_linear(base, x, [a], [b], indices, [0], 0.5, self.ranks)

    def forward(self, x: Tensor, indices: Tensor | None) -> Tensor:
        """`[T, hidden]` to the same."""
        q, k, v = (self.projected(name, x, indices) for name in "qkv")
        y = x + self.projected("o", q + torch.cat([k, v] * (q.shape[1] // (2 * k.shape[1])), 1), indices)
        return y + self.projected(
            "down", silu(self.projected("gate", y, indices)) * self.projected("up", y, indices), indices
        )


class Layers(nn.Module):
    """Several, one after the other."""

    def __init__(self, count: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(*sizes, seed) for seed in range(count))

    def forward(self, x: Tensor, indices: Tensor | None) -> Tensor:
        """As `Layer.forward`."""
        for layer in self.layers:
            x = layer(x, indices)
        return x


def compiled(model: Any, launch: Launch, config: dict[str, Any], **options: Any) -> Any:
    """The model with its base products apart, so that both forms round alike."""

    def backend(module: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        xlc.rewrite(module, keep_bases=True, launch=launch)
        return generate_code(module, inputs, config)

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, **options)


def batch(rows: int, hidden: int) -> tuple[Tensor, Tensor]:
    """Rows, and for each a slot or none."""
    generator = torch.Generator(DEVICE).manual_seed(rows)
    x = torch.randn(rows, hidden, generator=generator, device=DEVICE).to(DTYPE)
    return x, torch.randint(-1, SLOTS + 1, (rows,), generator=generator, device=DEVICE)


MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "dynamic": ({}, {"dynamic": True}),
    "cpp_wrapper": ({"cpp_wrapper": True}, {}),
    "reduce-overhead": ({"triton.cudagraphs": True}, {}),
}


# Without LoRA; opaque ops, with base products apart or computed by them; launches by Inductor.
FORMS = ("base", "op", "op fused", "inductor")


def compared(one: Tensor, other: Tensor) -> tuple[bool, float]:
    """Whether two results have the same bits, and their largest difference."""
    same = torch.equal(one.view(torch.int16), other.view(torch.int16))
    return same, (one.float() - other.float()).abs().max().item()


def bits(model: Layers, hidden: int, modes: Sequence[str]) -> None:
    """Compare the results of both forms, compiled in each mode."""
    for mode in modes:
        config, options = MODES[mode]
        sizes = (3, 32, 200) if mode in ("default", "dynamic") else (32,)
        found: dict[str, dict[int, Tensor]] = {"op": {}, "inductor": {}}
        for form, results in found.items():
            call = compiled(model, form, config, **options)
            start = time.perf_counter()
            for rows in sizes:
                x, indices = batch(rows, hidden)
                if mode == "dynamic":
                    torch._dynamo.mark_dynamic(x, 0)
                    torch._dynamo.mark_dynamic(indices, 0)
                for _ in range(4 if mode == "reduce-overhead" else 1):
                    results[rows] = call(x, indices).clone()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        for rows in sizes:
            same, difference = compared(found["inductor"][rows], found["op"][rows])
            print(f"bits  {mode:16} T={rows:<5} equal={same} difference={difference:.3g} ({seconds:.1f} s)", flush=True)


def launches(call: Callable[[], Any]) -> int:
    """How many kernels one call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")


def host_us(call: Callable[[], Any], repeats: int = 60) -> float:
    """Median time of the host until a call returns, the device idle before."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times[10:])


def wall_us(call: Callable[[], Any], repeats: int = 60) -> float:
    """Median time of a call with its synchronisation."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[10:])


def time_modes(model: Layers, hidden: int, rows: Sequence[int], modes: Sequence[str], forms: Sequence[str]) -> None:
    """Print what each form costs the host in each mode."""
    count = len(model.layers)
    for mode in modes:
        config, options = MODES[mode]
        for t in rows:
            x, indices = batch(t, hidden)
            for form in forms:
                start = time.perf_counter()
                if form == "op fused":
                    torch._dynamo.reset()
                    call = torch.compile(
                        model, backend="xpu_lora", options={**config, "xpu_lora.launch": "op"}, **options
                    )
                else:
                    call = compiled(model, "op" if form == "base" else form, config, **options)
                run = lambda: call(x, None if form == "base" else indices)  # noqa: B023, E731
                for _ in range(5):
                    run()
                torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                print(
                    f"time  {mode:16} T={t:<5} {form:9} host {host_us(run) / count:7.1f} us/layer, "
                    f"wall {wall_us(run) / count:7.1f} us/layer, "
                    f"{launches(run) / count:5.1f} launches/layer (compiled in {seconds:.1f} s)",
                    flush=True,
                )


def aoti(model: Layers, hidden: int) -> None:
    """Export the layers for any T, compile them ahead of time, load them, and compare."""
    x, indices = batch(32, hidden)
    start = time.perf_counter()
    with torch.no_grad():
        rows = torch.export.Dim("rows", min=2, max=4096)
        program = torch.export.export(model, (x, indices), dynamic_shapes=({0: rows}, {0: rows}))
        xlc.rewrite(program)
        calls = [str(node.target) for node in program.graph.nodes if "xpu_lora" in str(node.target)]
        print(f"aoti  {len(calls)} calls, of {sorted(set(calls))}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path = torch._inductor.aoti_compile_and_package(
                program, package_path=str(Path(folder) / "layers.pt2"), inductor_configs={"shape_padding": False}
            )
            print(f"aoti  packaged in {time.perf_counter() - start:.1f} s", flush=True)
            loaded = torch._inductor.aoti_load_package(path)
            for t in (2, 32, 64, 65, 500):
                x, indices = batch(t, hidden)
                wanted = compiled(model, "op", {})(x, indices)
                same, difference = compared(loaded(x, indices), wanted)
                print(f"aoti  T={t:<5} equal={same} difference={difference:.3g}", flush=True)
            x, indices = batch(32, hidden)
            run = lambda: loaded(x, indices)  # noqa: E731
            count = len(model.layers)
            print(f"aoti  host {host_us(run) / count:.1f} us/layer, wall {wall_us(run) / count:.1f} us/layer")


def graphs(hidden: int) -> None:
    """With narrow layers: it is graphs that are counted."""
    model = Layers(1, (256, 512, 128))
    call = compiled(model, "inductor", {})
    counters = torch._dynamo.utils.counters
    counters.clear()
    sizes = [1, 2, 3, 5, 16, 63, 64, 65, 66, 127, 128, 255, 500, 511, 512, 513, 1023, 1024, 1025, 1999, 2000]
    wrong = []
    for t in sizes:
        x, indices = batch(t, 256)
        got = call(x, indices)
        if t == 1:
            continue
        before = counters["stats"]["unique_graphs"]
        if t in (2, 65, 2000):
            print(f"graphs until T={t}: {before}", flush=True)
        wanted = model(x, indices).float()
        # Eager code rounds in between.
        if not torch.allclose(got.float(), wanted, atol=0.1, rtol=0.05):
            wrong.append((t, (got.float() - wanted).abs().max().item()))
    print(f"graphs T = 1 to 2000: {counters['stats']['unique_graphs']}, wrong at {wrong}", flush=True)


def main() -> None:
    """Run the parts that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["bits", "time", "aoti", "graphs"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[32])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--sizes", type=int, nargs=3, default=[4096, 14336, 1024], help="hidden, inner, keys")
    given = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    model, hidden = Layers(given.layers, given.sizes), given.sizes[0]
    runs = {
        "bits": lambda: bits(model, hidden, given.modes),
        "time": lambda: time_modes(model, hidden, given.rows, given.modes, given.forms),
        "graphs": lambda: graphs(hidden),
        "aoti": lambda: aoti(model, hidden),
    }
    with torch.no_grad():
        for part in given.parts:
            runs[part]()


if __name__ == "__main__":
    main()
