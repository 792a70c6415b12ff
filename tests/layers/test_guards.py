"""What Dynamo checks at each call of a compiled model because of LoRA: little, and enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import xpu_lora_compile as xlc

ROWS = torch.ones(2, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.down(self.up(inputs).relu())
        return output


def attached(blocks: int, rank: int = 2) -> tuple[nn.Sequential, xlc.AdapterBank]:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(blocks)])
    bank = xlc.attach(model, slots=2, max_rank=rank)
    with torch.no_grad():
        for name, stack in model.named_buffers():
            stack.copy_(torch.randn_like(stack))
            assert "lora_" in name
    bank._slots[:], bank._ranks[:] = ["one", "two"], [rank, rank]
    return model, bank


@contextmanager
def serving(bank: xlc.AdapterBank) -> Iterator[None]:
    with bank.use(["one", "two"]), torch.no_grad():
        yield


def guards_of(blocks: int) -> Counter[str]:
    found: Counter[str] = Counter()

    def keep(guards: Any) -> list[bool]:
        found.update(guard.guard_type for guard in guards if "_modules" in guard.name)
        found.update("of a function" for guard in guards if "__mro__" in guard.name)
        found.update("of the routing" for guard in guards if guard.name.endswith("lora_routing"))
        return [True for _ in guards]

    model, bank = attached(blocks)
    torch._dynamo.reset()
    with serving(bank):
        torch.compile(model, backend="eager", fullgraph=True, options={"guard_filter_fn": keep})(ROWS)
    return found


def test_a_further_layer_brings_guards_in_c_of_itself_and_of_its_tensors_alone() -> None:
    few, many = guards_of(2), guards_of(3)
    more = {kind: number - few[kind] for kind, number in many.items() if number != few[kind]}
    assert more.pop("TENSOR_MATCH") == 8
    # The block and two layers.
    assert more.pop("ID_MATCH") >= 2
    assert not more.keys() & {"DUPLICATE_INPUT", "of a function", "of the routing"}, more


def test_blocks_of_one_class_share_a_graph_outside_of_all_use_blocks() -> None:
    model, _ = attached(3)
    torch._dynamo.reset()
    counter = CompileCounter()
    blocks = [torch.compile(block, backend=counter) for block in model]
    with torch.no_grad():
        for block in blocks:
            block(ROWS)
    assert counter.frame_count == 1


@pytest.fixture
def compiled() -> tuple[nn.Sequential, xlc.AdapterBank, CompileCounter, Any]:
    model, bank = attached(2)
    torch._dynamo.reset()
    counter = CompileCounter()
    run = torch.compile(model, backend=counter, fullgraph=True)
    with serving(bank):
        run(ROWS)
        run(ROWS)
    assert counter.frame_count == 1
    return model, bank, counter, run


def check_compiled_anew(model: nn.Sequential, counter: CompileCounter, run: Any, rows: Tensor = ROWS) -> None:
    torch.testing.assert_close(run(rows), model(rows))
    assert counter.frame_count == 2


def test_a_layer_of_another_model_is_noticed(compiled: Any) -> None:
    model, bank, counter, run = compiled
    other, _ = attached(2, rank=2)
    with serving(bank):
        # No block of the other model is open.
        model[1].up = other[1].up
        check_compiled_anew(model, counter, run)


def test_another_routing_of_one_layer_is_noticed(compiled: Any) -> None:
    model, bank, counter, run = compiled
    other, _ = attached(2)
    with serving(bank):
        model[1].down.lora_routing = other[1].down.lora_routing
        check_compiled_anew(model, counter, run)


@pytest.mark.parametrize("by", ["assignment", "the dict of buffers"])
def test_a_stack_of_another_size_is_noticed(compiled: Any, by: str) -> None:
    model, bank, counter, run = compiled
    layer = model[1].up
    with serving(bank):
        for name, dimension in (("lora_a", 1), ("lora_b", 2)):
            stack = torch.cat([getattr(layer, name)] * 2, dimension)
            if by == "assignment":
                setattr(layer, name, stack)
            else:
                layer._buffers[name] = stack
        check_compiled_anew(model, counter, run)


def test_a_stack_of_another_dtype_is_noticed(compiled: Any) -> None:
    model, bank, counter, run = compiled
    with serving(bank):
        model[0].down.lora_a = model[0].down.lora_a.to(torch.bfloat16)
        check_compiled_anew(model, counter, run)


def test_a_model_that_has_moved_to_another_dtype_is_noticed(compiled: Any) -> None:
    model, bank, counter, run = compiled
    model.double()
    with serving(bank):
        check_compiled_anew(model, counter, run, ROWS.double())


def test_a_stack_of_the_same_kind_is_read_without_compiling(compiled: Any) -> None:
    model, bank, counter, run = compiled
    with serving(bank):
        model[0].up.lora_b = -model[0].up.lora_b
        torch.testing.assert_close(run(ROWS), model(ROWS))
    assert counter.frame_count == 1


def test_a_detached_model_is_noticed(compiled: Any) -> None:
    model, bank, counter, run = compiled
    bank.detach()
    with torch.no_grad():
        check_compiled_anew(model, counter, run)
