"""LoRA on layers of transformers with weights in 8 bits: the classes themselves, which run on a GPU alone."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations import compressed_tensors, fbgemm_fp8, finegrained_fp8

from xpu_lora_compile.layers import host_of


@pytest.mark.parametrize(
    "kind",
    [finegrained_fp8.FP8Linear, fbgemm_fp8.FbgemmFp8Linear, compressed_tensors.CompressedTensorsFP8Linear],
    ids=lambda kind: kind.__name__,
)
def test_the_classes_are_known_by_name(kind: type[torch.nn.Linear]) -> None:
    layer = kind(32, 16, bias=False) if kind is fbgemm_fp8.FbgemmFp8Linear else kind(32, 16)
    host = host_of(layer)
    assert host is not None
    assert host.name == "FP8 of transformers"
    assert host.dtype(layer) is None
    assert (host.site(layer).in_features, host.site(layer).out_features) == (32, 16)


def test_a_subclass_that_computes_something_else_is_not_taken() -> None:
    layer = finegrained_fp8.FP8GroupedLinear(32, 16, 2)
    assert host_of(layer) is None
