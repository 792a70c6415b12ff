"""What a CUDA device alone can show: captured graphs, PyTorch's CUDA graphs, tensors of over 2**31 elements."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import BF16, DEVICE, I32, same_bits
from torch import Tensor, nn

import xpu_lora_compile as xlc
from xpu_lora_compile.kernels import force_kernel, triton_launch
from xpu_lora_compile.ops import ADD_LORA, LINEAR_WITH_LORA, ROUTE_TILES, reference

pytestmark = pytest.mark.skipif(
    DEVICE.type != "cuda" or bool(triton_launch.problem("cuda")),
    reason="it needs a CUDA device (XPU_LORA_TEST_DEVICE=cuda) and Triton",
)

K, R, D, WIDTHS = 4, 16, 384, (256, 96)


def normal(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=DEVICE, dtype=dtype)


class Layer:
    """Two projections of one input with LoRA on both, in memory that stays where it is."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.x = normal(rows, D, seed=1) / 4
        self.weights = [normal(width, D, seed=2 + s) / 4 for s, width in enumerate(WIDTHS)]
        self.biases = [normal(width, seed=5 + s) for s, width in enumerate(WIDTHS)]
        self.a = [torch.zeros(K, R, D, dtype=BF16, device=DEVICE) for _ in WIDTHS]
        self.b = [torch.zeros(K, R, width, dtype=BF16, device=DEVICE).transpose(1, 2) for width in WIDTHS]
        self.indices = torch.full((rows,), -1, device=DEVICE)
        self.ranks = torch.zeros(K, dtype=I32, device=DEVICE)

    def change(self, step: int) -> None:
        """Other rows, and in one slot another adapter, of another rank; NaN where nobody may look."""
        generator = torch.Generator().manual_seed(step)
        self.x.copy_(torch.randn(self.rows, D, generator=generator) / 4)
        most = [K + 1, 1, 0][step % 3]
        self.indices.copy_(torch.randint(-1, most + 1, (self.rows,), generator=generator))
        slot, rank = step % K, int(torch.randint(R + 1, (), generator=generator))
        self.ranks[slot] = rank
        for stack in (*self.a, *(b.transpose(1, 2) for b in self.b)):
            stack[slot, :rank] = torch.randn(rank, stack.shape[2], generator=generator).to(stack) / 4
            stack[slot, rank:] = torch.nan

    def prepared(self) -> dict[str, Tensor]:
        return {"tiles": ROUTE_TILES(self.indices, K), "ranks": self.ranks}

    def add_lora(self) -> list[Tensor]:
        outputs = [nn.functional.linear(self.x, *pair) for pair in zip(self.weights, self.biases, strict=True)]
        ADD_LORA(outputs, self.x, self.a, self.b, self.indices, [0, 1], [0, 0], 0.5, **self.prepared())
        return outputs

    def linear_with_lora(self) -> list[Tensor]:
        lora = (self.a, self.b, self.indices, [0, 1], [0, 0], 0.5)
        results: list[Tensor] = LINEAR_WITH_LORA(self.x, self.weights, self.biases, *lora, **self.prepared())
        return results

    def check(self, results: list[Tensor], what: str) -> None:
        """Against float64; two roundings to bfloat16 of values up to 16 or so."""
        for s, result in enumerate(results):
            base = self.x.double() @ self.weights[s].double().t() + self.biases[s].double()
            a, b = self.a[s].double().nan_to_num(), self.b[s].double().nan_to_num()
            exact = reference.lora_linear(base.cpu(), self.x.cpu(), [a.cpu()], [b.cpu()], self.indices.cpu(), [0], 0.5)
            error = (result.cpu().double() - exact).abs()
            allowed = 2**-7 * (exact.abs() + base.cpu().abs()) + 2**-10
            assert bool((error <= allowed).all()), f"{what}, output {s}: {(error / allowed).max()} of what is allowed"


@pytest.mark.parametrize("rows", [1, 8, 40, 300])
@pytest.mark.parametrize("op", ["add_lora", "linear_with_lora"])
def test_a_captured_graph_replays_with_other_rows_and_other_adapters(op: str, rows: int) -> None:
    layer = Layer(rows)
    call: Callable[[], list[Tensor]] = getattr(layer, op)
    with torch.no_grad(), force_kernel("triton"):
        layer.change(0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        for step in range(100):
            layer.change(step)
            for result in results:
                result.fill_(torch.nan)
            graph.replay()
            layer.check(results, f"step {step}")
            eager = call()
            # In one kernel or two streams, the same sums.
            assert all(map(same_bits, results, eager)), f"step {step}"


MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "dynamic": ({}, {"dynamic": True}),
    "cpp_wrapper": ({"cpp_wrapper": True}, {}),
    "reduce-overhead": ({"triton.cudagraphs": True}, {}),
}


@pytest.mark.parametrize("mode", MODES)
def test_what_inductor_launches_has_the_bits_of_the_op(mode: str) -> None:
    """With base products apart, so that both round alike."""
    from xpu_lora_compile.backend import generate_code

    config, options = MODES[mode]
    for rows in (40,) if mode == "cpp_wrapper" else (3, 40, 300):
        layer = Layer(rows)
        layer.change(0)

        def function(x: Tensor, indices: Tensor, layer: Layer = layer) -> list[Tensor]:
            bases = [nn.functional.linear(x, *pair) for pair in zip(layer.weights, layer.biases, strict=True)]
            pairs = zip(bases, layer.a, layer.b, strict=True)
            return [xlc.lora_linear(base, x, [a], [b], indices, [0], 0.3, layer.ranks) for base, a, b in pairs]

        def compiled(launch: Any, layer: Layer = layer, function: Any = function) -> list[Tensor]:
            def backend(module: Any, inputs: Any) -> Any:
                xlc.rewrite(module, keep_bases=True, launch=launch)
                return generate_code(module, inputs, config)

            torch._dynamo.reset()
            call: Any = torch.compile(function, backend=backend, **options)
            for _ in range(3):
                results = [result.clone() for result in call(layer.x, layer.indices)]
            return results

        with torch.no_grad(), force_kernel("triton"):
            assert all(map(same_bits, compiled("inductor"), compiled("op")))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from support.peft_folders import save_adapter

    top = tmp_path_factory.mktemp("adapters")
    lora: dict[str, dict[str, Any]] = {
        "pirate": {"target_modules": ["q_proj", "v_proj"], "r": 4},
        "haiku": {"target_modules": ["k_proj", "down_proj"], "r": 2},
        "telegram": {"target_modules": "all-linear", "r": 3},
    }
    return {name: save_adapter(top / name, seed=seed, **lora[name]) for seed, name in enumerate(lora)}


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_model_with_cuda_graphs_follows_its_bank(mode: str, folders: dict[str, Path]) -> None:
    """Adapters are loaded, dropped and swapped between the calls of one compiled model; each equals eager."""
    from support.peft_folders import tiny_llama

    torch._dynamo.reset()
    model = tiny_llama().requires_grad_(False).to(device=DEVICE, dtype=BF16)
    bank = xlc.attach(model, slots=3, max_rank=4)
    tokens = torch.randint(70, (4, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    compiled = torch.compile(model, backend="xpu_lora", mode=mode)
    chance = random.Random(0)
    counter = torch._dynamo.utils.counters
    seen = 0
    for step in range(20):
        absent = [name for name in folders if name not in bank.names]
        if absent and chance.random() < 0.7:
            name = chance.choice(absent)
            bank.load(name, folders[name])
        elif bank.names:
            bank.drop(chance.choice(bank.names))
        names = [chance.choice([None, *bank.names]) for _ in range(len(tokens))]
        with torch.no_grad(), bank.use(names):
            expected = model(tokens, use_cache=False).logits.float()
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(tokens, use_cache=False).logits.float().clone()
        torch.testing.assert_close(got, expected, atol=6e-2, rtol=6e-2, msg=lambda text, n=names: f"{n}: {text}")
        # The first calls warm up, record, and replay.
        if step == 2:
            seen = counter["stats"]["unique_graphs"]
    assert counter["stats"]["unique_graphs"] == seen, "a change of adapters compiled again"


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_block_does_not_wait_for_the_device_and_verify_leaves_its_bank_as_it_was(folders: dict[str, Path]) -> None:
    from support.peft_folders import tiny_llama

    torch._dynamo.reset()
    model = tiny_llama().requires_grad_(False).to(DEVICE)
    bank = xlc.attach(model, slots=3, max_rank=4)
    bank.load("pirate", folders["pirate"])
    bank.load("haiku", folders["haiku"])
    tokens = torch.randint(70, (3, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    # With a cache, which keeps transformers from looking at values.
    results = []
    with torch.no_grad():
        for names in (["pirate", None, "haiku"], ["haiku", "haiku", None]):
            with bank.use(names):
                results.append(model(tokens).logits)
        # torch raises where the host would wait for the device.
        torch.cuda.set_sync_debug_mode("error")
        try:
            with bank.use(["pirate", None, "haiku"]):
                again = model(tokens).logits
            bank.drop("haiku")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, results[0])
    assert not torch.equal(results[0], results[1])
    # Their slots' ranks have been written by now, and every slot is filled meanwhile.
    assert xlc.verify(model)(tokens, use_cache=False).sites
    with torch.no_grad(), bank.use(["pirate", None, None]):
        torch.testing.assert_close(model(tokens).logits[0], results[0][0])


@pytest.mark.parametrize("rank", [16, 33, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(dtype: torch.dtype, rank: int) -> None:
    """Of what LoRA adds: whose base, of another kernel, is the same here. Eager, and compiled for any T."""
    rows, slots = 2100, 5
    x, base = normal(rows, 1000, dtype=dtype, seed=1), normal(rows, 200, dtype=dtype, seed=2)
    a = normal(slots, rank, 1000, dtype=dtype, seed=3) / 8
    b = normal(slots, rank, 200, dtype=dtype, seed=4).transpose(1, 2)
    indices = (torch.arange(rows) % (slots + 2) - 1).to(DEVICE)

    def function(base: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        return xlc.lora_linear(base * 1, x, [a], [b], indices, [0], 0.5)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="xpu_lora", dynamic=True)
    with torch.no_grad(), force_kernel("triton"):
        together = function(base, x, indices)
        batches = [
            slice(0, 1),
            slice(7, 8),
            slice(3, 19),
            slice(2, 66),
            slice(0, 200),
            slice(1, 700),
            slice(0, None, 2),
        ]
        for one in [*batches, slice(None)]:
            for called in (function, compiled):
                assert same_bits(called(base[one], x[one], indices[one]), together[one]), (one, called is compiled)


@pytest.mark.parametrize("rank", [8, 16])
def test_a_row_has_the_same_bits_in_every_batch_of_a_product_with_lora_inside(rank: int) -> None:
    """From one row to as many as one kernel takes; LoRA changes no bit of rows without an adapter."""
    widths = (256, 96)
    x, weights = normal(16, 512, seed=1), [normal(width, 512, seed=2) for width in widths]
    a = [normal(3, rank, 512, seed=3 + s) / 8 for s in (0, 1)]
    b = [normal(3, rank, width, seed=5).transpose(1, 2) for width in widths]
    indices = torch.tensor([0, -1, 2, 1] * 4, device=DEVICE)

    def run(rows: slice) -> list[Tensor]:
        lora = (a, b, indices[rows], [0, 1], [0, 0], 0.5)
        tiles = ROUTE_TILES(indices[rows], 3)
        results: list[Tensor] = LINEAR_WITH_LORA(x[rows], weights, [None, None], *lora, tiles=tiles)
        return results

    with torch.no_grad(), force_kernel("triton"):
        together = run(slice(None))
        for rows in (slice(0, 1), slice(1, 2), slice(2, 5), slice(0, 8), slice(0, 16, 3)):
            for got, whole in zip(run(rows), together, strict=True):
                assert same_bits(got, whole[rows])


def needs(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"it needs {gigabytes} GiB of free memory, not {free / 2**30:.0f}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it needs two CUDA devices")
@pytest.mark.parametrize("rows", [3, 40, 600])
def test_operands_need_not_be_on_the_current_device(rows: int) -> None:
    x, weight = normal(rows, D, seed=1) / 4, normal(256, D, seed=2) / 4
    a, b = normal(K, R, D, seed=3) / 4, normal(K, R, 256, seed=4).transpose(1, 2) / 4
    indices = torch.arange(rows, device=DEVICE) % (K + 1) - 1

    def results(device: torch.device) -> list[Tensor]:
        # By way of the host: a copy from device to device would let each read the other's memory.
        there = [one.cpu().to(device) for one in (x, weight, a, b, indices)]
        lora = ([there[2]], [there[3]], there[4], [0], [0], 0.5)
        (added,) = LINEAR_WITH_LORA(there[0], [there[1]], [None], *lora, tiles=ROUTE_TILES(there[4], K))
        hidden, base = torch.zeros(rows, R, device=device), added.clone()
        xlc.bgmv_shrink(hidden, there[0], there[2], there[4], 0.5)
        xlc.bgmv_expand(base, hidden, there[3], there[4], add_inputs=True)
        linear = xlc.lora_linear(added, there[0], [there[2]], [there[3]], there[4], [0], 0.5)
        return [one.cpu() for one in (added, hidden, base, linear)]

    with torch.cuda.device(0), torch.no_grad():
        for here, there in zip(results(torch.device("cuda", 0)), results(torch.device("cuda", 1)), strict=True):
            assert same_bits(here, there)


def test_an_output_of_more_than_2_to_the_31_elements() -> None:
    needs(14)
    rows, width = 2**16 + 1, 2**15 + 64
    x, indices = normal(rows, 32) / 4, torch.full((rows,), -1, device=DEVICE)
    some = [0, 1, rows // 2, rows - 2, rows - 1]
    indices[some] = torch.tensor([0, 1, 0, 1, 0], device=DEVICE)
    a, b = normal(2, 8, 32, seed=1), normal(2, 8, width, seed=2).transpose(1, 2)
    output = torch.ones(rows, width, dtype=BF16, device=DEVICE)
    assert output.numel() > 2**31
    with torch.no_grad(), force_kernel("triton"):
        ADD_LORA([output], x, [a], [b], indices, [0], [0], 0.5, tiles=ROUTE_TILES(indices, 2))
        expected = reference.lora_linear(
            torch.ones(len(some), width), x[some].cpu(), [a.cpu()], [b.cpu()], indices[some].cpu(), [0], 0.5
        )
        torch.testing.assert_close(output[some].cpu().float(), expected, atol=2**-7, rtol=2**-7)
        assert bool((output[2 : rows // 2] == 1).all())


def test_a_stack_of_more_than_2_to_the_31_elements() -> None:
    """A of 2**17 + 1 slots; only the first and the last are used."""
    needs(12)
    slots, rank, features = 2**17 + 1, 16, 1024
    a = torch.empty(slots, rank, features, dtype=BF16, device=DEVICE)
    a.fill_(torch.nan)
    assert a.numel() > 2**31
    a[0], a[-1] = normal(rank, features, seed=1), normal(rank, features, seed=2)
    b = torch.full((slots, rank, 32), torch.nan, dtype=BF16, device=DEVICE)
    b[0], b[-1] = normal(rank, 32, seed=3), normal(rank, 32, seed=4)
    b = b.transpose(1, 2)
    x = normal(4, features, seed=5) / 32
    indices = torch.tensor([0, slots - 1, slots, -1], device=DEVICE)
    # What `linear_with_lora` computes first is 0 here.
    weight = torch.zeros(32, features, dtype=BF16, device=DEVICE)
    expected = reference.lora_linear(
        torch.zeros(4, 32),
        x.cpu(),
        [a[[0, -1]].cpu()],
        [b[[0, -1]].cpu()],
        torch.tensor([0, 1, 2, -1]),
        [0],
        0.5,
    )
    with torch.no_grad(), force_kernel("triton"):
        tiles = ROUTE_TILES(indices, slots)
        output = torch.zeros(4, 32, dtype=BF16, device=DEVICE)
        ADD_LORA([output], x, [a], [b], indices, [0], [0], 0.5, tiles=tiles)
        (result,) = LINEAR_WITH_LORA(x, [weight], [None], [a], [b], indices, [0], [0], 0.5, tiles=tiles)
    for got in (output, result):
        torch.testing.assert_close(got.cpu().float(), expected, atol=2**-6, rtol=2**-6)
