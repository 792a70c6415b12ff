"""Records and plays ops of its own on the CPU, with a double of CUDA's driver, and prints what became of it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from xpu_lora_compile.kernels import compiled, replay

SCHEMAS = {
    "add_scaled": "(Tensor(a!) output, Tensor input, float scale) -> ()",
    "add_columns": "(Tensor(a!)[] outputs, Tensor input) -> ()",
    "product": "(Tensor input, Tensor weight, Tensor? bias, float scale) -> Tensor",
    "written_first": "(Tensor input, Tensor weight) -> Tensor",
    "products": "(Tensor input, Tensor[] weights) -> Tensor[]",
    "made": "(Tensor input, SymInt slots) -> (Tensor tiles)",
    "sorts": "(Tensor(a!) output, Tensor input) -> ()",
    "fails": "(Tensor(a!) output, Tensor input, bool fail) -> ()",
    "other_kernel": "(Tensor(a!) output, Tensor input) -> ()",
}
KINDS = {"output": "*fp32", "input": "*fp32", "count": "i32", "block": "constexpr", "scale": "fp32"}
calls = 0


def opened(folder: Path) -> tuple[Any, Any]:
    """The double, and the library that plays."""
    double, library = folder / "double.so", folder / "replay.so"
    compiler = compiled.found_compiler()
    source = Path(__file__).with_suffix(".cpp")
    subprocess.run([*compiler, "-O1", "-shared", "-fPIC", "-o", str(double), str(source)], check=True)  # noqa: S603
    names = ", ".join(f'"{name}"' for name in SCHEMAS)
    flags = ["-O0", "-DREPLAY_KEY=CPU", f'-DREPLAY_DRIVER="{double}"', f'-DREPLAY_TORCH="{double}"']
    loaded = compiled.build(
        library, [Path(replay.__file__).with_suffix(".cpp")], [*flags, f"-DREPLAY_OPS={names}"], compiler
    )
    torch.ops.load_library(loaded)
    return ctypes.CDLL(str(double)), replay.open_library(loaded)


def launch(output: Tensor, source: Tensor, scale: float, warps: int = 1, kinds: Any = KINDS) -> None:
    """As Triton launches a kernel; then the tape hears of it."""
    count = output.numel()
    operands = (output, source, count, 64, scale)
    addresses = [ctypes.c_void_p(output.data_ptr()), ctypes.c_void_p(source.data_ptr())]
    values = [*addresses, ctypes.c_int32(count), ctypes.c_float(scale)]
    pointers = (ctypes.c_void_p * 4)(*(ctypes.addressof(value) for value in values))
    config = (ctypes.c_uint32 * 16)(-(-count // 32), 1, 1, 32 * warps, 1, 1)
    double.add_scaled(pointers, config)
    function = ctypes.cast(double.add_scaled, ctypes.c_void_p).value
    about = SimpleNamespace(num_warps=warps, num_ctas=1, shared=0, target=SimpleNamespace(warp_size=32))
    kernel = SimpleNamespace(function=function, metadata=about, src=SimpleNamespace(signature=kinds))
    if (tape := replay.current_tape()) is not None:
        tape.launch(kernel, (-(-count // 32),), operands)


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        global calls
        calls += 1
        return function(*args)

    return run


def add_scaled(output: Tensor, source: Tensor, scale: float) -> None:
    if source.dtype != torch.float32:
        return
    hidden = torch.empty(output.shape, dtype=torch.float32, device=output.device)
    ctypes.memset(hidden.data_ptr(), 0, hidden.numel() * 4)
    launch(hidden, source, 0.0)
    launch(output, source, scale)


def add_columns(outputs: list[Tensor], source: Tensor) -> None:
    for number, output in enumerate(outputs):
        launch(output[1], source, number + 1.0)


def product(source: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    result = torch.nn.functional.linear(source, weight, bias)
    launch(result, result, scale)
    return result


def written_first(source: Tensor, weight: Tensor) -> Tensor:
    result = source.new_empty(len(source), len(weight))
    ctypes.memset(result.data_ptr(), 0, result.numel() * 4)
    # What is played does not have this memset: so let the kernel write it.
    launch(result, result, -1.0)
    torch.addmm(result, source, weight.t(), out=result)
    return result


def products(source: Tensor, weights: list[Tensor]) -> list[Tensor]:
    results = [torch.nn.functional.linear(source, weight) for weight in weights]
    launch(results[0], results[0], 1.0)
    return results


def made(source: Tensor, slots: int) -> Tensor:
    result = torch.empty(source.shape, dtype=torch.float32, device=source.device)
    launch(result, result, -1.0)
    launch(result, source, 1.0 * slots)
    return result


def sorts(output: Tensor, source: Tensor) -> None:
    launch(output, source.sort().values, 1.0)


def fails(output: Tensor, source: Tensor, fail: bool) -> None:
    if fail:
        raise ValueError("as it was told")
    launch(output, source, 1.0)


def other_kernel(output: Tensor, source: Tensor) -> None:
    launch(output, source, 1.0, kinds=KINDS | {"count": "i64"})


def python_calls(function: Callable[[], object]) -> int:
    before = calls
    function()
    return calls - before


def report(fact: str, said: object) -> None:
    print(f"{fact}: {said}")  # noqa: T201


def outcome(function: Callable[[], object]) -> str:
    """Whether a call was recorded: Python ran once, and not for the second."""
    first, second = python_calls(function), python_calls(function)
    return "recorded" if (first, second) == (1, 0) else f"Python ran {first} and {second} times"


def main() -> None:
    ops = torch.ops.xpu_lora
    torch.manual_seed(0)
    x = torch.randn(70)

    def many() -> None:
        for _ in range(4):
            output = torch.zeros(70)
            ops.add_scaled(output, torch.randn(70), 2.0)

    report("Python runs once for operands alike", f"{python_calls(many)} of 4 calls")
    output = torch.ones(70)
    ops.add_scaled(output, x, 2.0)
    report("results are those of the operands given", torch.equal(output, 1 + 2 * x))

    # Two outputs of one tensor, whose distance no shape tells.
    right = []
    for distance in (2, 3):
        whole = torch.zeros(distance + 2, 64)
        ops.add_columns([whole[:2], whole[distance:]], x[:64].clone())
        right.append(torch.equal(whole[1], x[:64]) and torch.equal(whole[distance + 1], 2 * x[:64]))
    report("views keep their place in operands whose memory they share", all(right))

    right = []

    def with_bias() -> None:
        for _ in range(3):
            source, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
            exact = 1.5 * torch.nn.functional.linear(source, weight, bias)
            right.append(torch.allclose(ops.product(source, weight, bias, 0.5), exact))

    report("a base product is recorded with its bias", f"{python_calls(with_bias)} of 3 calls, {all(right)}")
    report("none in place of a tensor", outcome(lambda: ops.product(torch.ones(3, 4), torch.ones(5, 4), None, 0.5)))
    right = []

    def in_order() -> None:
        for _ in range(3):
            source, weight = torch.randn(3, 4), torch.randn(5, 4)
            right.append(torch.allclose(ops.written_first(source, weight), source @ weight.t()))

    report("a product is added to what was written", f"{python_calls(in_order)} of 3 calls, {all(right)}")
    shapes: list[Any] = []

    def lists() -> None:
        for _ in range(3):
            results = ops.products(torch.randn(3, 4), [torch.randn(5, 4), torch.randn(4, 4)])
            shapes[:] = [tuple(result.shape) for result in results]

    report("a list of tensors comes back", f"{python_calls(lists)} of 3 calls, {shapes}")

    report("a tensor that was allocated comes back", outcome(lambda: ops.made(torch.ones(9), 3)))
    weight = torch.randn(6, 4)
    ops.products(torch.ones(3, 4), [weight, weight])
    others = [torch.randn(6, 4), torch.randn(6, 4)]
    twice, once = ops.products(torch.ones(3, 4), others)
    exact = [torch.ones(3, 4) @ other.t() for other in others]
    report("one tensor in two places", torch.allclose(twice, 2 * exact[0]) and torch.allclose(once, exact[1]))
    report("another number of rows", outcome(lambda: ops.add_scaled(torch.ones(71), torch.ones(71), 2.0)))
    apart = torch.ones(140)[::2]
    report("other strides", outcome(lambda: ops.add_scaled(apart, x, 2.0)))
    shifted = torch.ones(71)[1:]
    report("another alignment", outcome(lambda: ops.add_scaled(shifted, x, 2.0)))
    report("another factor", outcome(lambda: ops.add_scaled(torch.ones(70), x, 2.5)))
    report("another dtype", outcome(lambda: ops.product(torch.ones(3, 4), torch.ones(6, 4), torch.ones(6), 0.5)))

    right = []

    def unknown() -> None:
        for _ in range(4):
            output, source = torch.zeros(8), torch.randn(8)
            ops.sorts(output, source)
            right.append(torch.equal(output, source.sort().values))

    report("an op that is not recorded", f"{python_calls(unknown)} of 4 calls, {all(right)}")
    try:
        ops.fails(torch.zeros(8), torch.ones(8), True)
    except ValueError:
        output = torch.zeros(8)
        ops.fails(output, torch.ones(8), False)
        report("an error", f"raised, and the next call is right: {torch.equal(output, torch.ones(8))}")

    def again() -> None:
        for _ in range(2):
            ops.add_scaled(torch.ones(70), x, 2.0)

    double.set_capturing(1)
    report("while a graph is captured", f"{python_calls(again)} of 2 calls")
    double.set_capturing(0)
    with replay.paused():
        report("in a block that wants Python", f"{python_calls(again)} of 2 calls")

    def with_gradients() -> None:
        for _ in range(2):
            ops.add_scaled(torch.ones(70), x.clone().requires_grad_(), 2.0)

    report("operands with gradients", f"{python_calls(with_gradients)} of 2 calls")

    def of_others() -> None:
        for _ in range(2):
            ops.other_kernel(torch.ones(70), x)

    report("a kernel with other parameters", f"{python_calls(of_others)} of 2 calls")
    wrong: list[int] = []

    def work(seed: int) -> None:
        for size in [*range(1, 60)] * 3:
            source = torch.full((size,), float(seed))
            output = torch.zeros(size)
            ops.add_scaled(output, source, 2.0)
            if not torch.equal(output, 2 * source):
                wrong.append(size)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report("four threads", not wrong)
    output = torch.zeros(2)
    for number in range(4200):
        output.zero_()
        ops.add_scaled(output, torch.ones(2), float(number))
        if output[1] != number:
            wrong.append(number)
    report("more shapes than are kept", f"{not wrong}, at most {max(4096, replay.count())}")
    replay.forget()
    report("after forget", outcome(lambda: ops.add_scaled(torch.ones(70), x, 2.0)))


if __name__ == "__main__":
    double, library = opened(Path(sys.argv[1]))
    replay.library_for = lambda _: library
    replay.library = lambda: library
    fragment = torch.library.Library("xpu_lora", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        fragment.define(name + schema)
        fragment.impl(name, replay.recorded(counted(globals()[name])), "CompositeExplicitAutograd")
        fragment.impl(name, torch.library.fallthrough_kernel, "Autograd")
    main()
