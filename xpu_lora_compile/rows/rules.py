"""For each op of ATen: the owners of its result, given those of its operands.

A rule takes a `Step` and returns owners for each result, compressed, or one for all. An op without a rule gives
UNKNOWN, which any real owner overrules where the two meet again: in the sum of a residual connection, say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from xpu_lora_compile.rows.owners import (
    GUESS,
    MIXED,
    SHARED,
    UNKNOWN,
    Owned,
    along,
    compress,
    constant,
    fold,
    merge,
)
from xpu_lora_compile.torch_internals import name_of

aten = torch.ops.aten


@dataclass
class Step:
    """One call of an op, and what is known of its operands.

    Attributes:
        batch: the number of sequences.
        packed: whether tokens of several sequences lie in a row, kept apart by a mask that no rule sees: what attends
            to others then belongs to whom asks.
        by_data: whether this step puts rows in an order that depends on values.
        from_sizes: whether a tensor was computed in this call from sizes and constants of the code.
    """

    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    results: list[Tensor]
    known: Callable[[Tensor], Owned | None]
    batch: int
    packed: bool = False
    by_data: bool = field(default=False)
    from_sizes: Callable[[Tensor], bool] = lambda tensor: False

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by the name that the op's schema gives it."""
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                if position < len(self.args):
                    return self.args[position]
                return self.kwargs.get(name, argument.default_value if argument.has_default_value() else default)
        return default

    def owners(self, tensor: Tensor) -> Tensor:
        """The owners of an operand, compressed."""
        owned = self.known(tensor)
        return constant(SHARED, tensor.dim()) if owned is None or not tensor.numel() else owned.owners

    def varies(self, tensor: Tensor) -> bool:
        """Whether the values of an operand depend on the inputs."""
        owned = self.known(tensor)
        return owned is not None and owned.varies

    def may_change(self, index: Tensor) -> bool:
        """Whether an index may have other values in another call: by the inputs, or since the model keeps it."""
        return self.varies(index) or not (self.known(index) is not None or self.from_sizes(index))

    @property
    def tensors(self) -> list[Tensor]:
        """All operands that are tensors."""
        leaves, _ = tree_flatten((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


Rule = Callable[[Step], "Tensor | list[Tensor]"]
_Function = TypeVar("_Function", bound=Rule)
RULES: dict[str, Rule] = {}
# Of other libraries, by the name of the op with its namespace.
LIBRARY_RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[_Function], _Function]:
    """Register a rule for these ops of ATen, in place or not."""

    def register(function: _Function) -> _Function:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def library_rule(names: str) -> Callable[[_Function], _Function]:
    """Register a rule for these ops of other libraries, none of which is imported."""

    def register(function: _Function) -> _Function:
        LIBRARY_RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def library_op(target: Any) -> torch._ops.OpOverload | None:
    """Return which of these ops a call in a graph is of, by its name or by that of its overload; None of another."""
    func = getattr(target, "default", None) if isinstance(target, torch._ops.OpOverloadPacket) else target
    is_known = isinstance(func, torch._ops.OpOverload) and f"{func.namespace}::{name_of(func)}" in LIBRARY_RULES
    return func if is_known else None


def rule_for(func: Any) -> Rule | None:
    """The rule of an op; None where there is none."""
    if func.namespace == "xpu_lora":
        return lora
    if func.namespace not in ("aten", "prims"):
        return LIBRARY_RULES.get(f"{func.namespace}::{name_of(func)}")
    name = name_of(func)
    found = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if found is None and torch.Tag.pointwise in func.tags:
        return pointwise
    return found


@rule(
    """
    where masked_fill _to_copy clone dropout native_dropout lift_fresh detach alias contiguous tril triu
    nan_to_num bernoulli fill zero uniform normal exponential lerp addcmul addcdiv clamp isin bucketize
    _fused_dropout rand_like randn_like polar native_batch_norm _native_batch_norm_legit
    _native_batch_norm_legit_no_training cudnn_batch_norm _batch_norm_with_update batch_norm angle complex _conj
    imag real cdouble to abs _prelu_kernel prelu rrelu_with_noise log_sigmoid_forward log_sigmoid
    """
)
def pointwise(step: Step) -> Tensor:
    """Elements of all operands meet where they are broadcast to."""
    return merge([step.owners(tensor) for tensor in step.tensors if tensor.dim() <= step.results[0].dim()])


@rule("copy")
def copied(step: Step) -> Tensor:
    """Nothing is left of what a tensor was before it is written over; constants become whose place it is."""
    target, source = step.argument("self"), step.argument("src")
    given = step.owners(source) if isinstance(source, Tensor) else constant(SHARED, 0)
    if not bool((given >= 0).any()):
        return merge([step.owners(target), given])
    return given.view((1,) * (target.dim() - given.dim()) + given.shape)


@rule("zeros_like ones_like empty_like full_like new_zeros new_empty new_ones new_full")
def filled(step: Step) -> Tensor:
    """A constant that has a place for each sequence is guessed to be theirs."""
    result, like = step.results[0], step.tensors[0]
    if result.shape == like.shape:
        owners = step.owners(like)
        return torch.where((owners >= 0) & (owners < GUESS), owners + GUESS, owners.clamp(min=SHARED))
    return factory(step)


@rule("zeros ones empty full")
def factory(step: Step) -> Tensor:
    """As `filled`, of a shape that was computed."""
    result = step.results[0]
    if result.dim() > 2 and result.shape[0] == step.batch and list(result.shape).count(step.batch) == 1:
        return along(0, result.dim(), step.batch) + GUESS
    return constant(SHARED, result.dim())


@rule("view _unsafe_view reshape _reshape_alias flatten unflatten reshape_copy view_copy")
def regrouped(step: Step) -> Tensor:
    """The same elements in the same order, in other dimensions."""
    source = step.tensors[0]
    return regroup(step.owners(source), source.shape, step.results[0].shape)


def regroup(owners: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Owners of a tensor that was reshaped; only dimensions along which they change are laid out in full."""
    old, new = list(old), list(new)
    full, target, at, to = [], [], 0, 0
    while at < len(old) or to < len(new):
        first_at, first_to = at, to
        left = right = 1
        # The fewest dimensions of both that hold as many elements.
        while True:
            if at < len(old) and (left <= right or to >= len(new)):
                left *= old[at]
                at += 1
            elif to < len(new):
                right *= new[to]
                to += 1
            if left == right and at > first_at and to > first_to:
                break
            if at >= len(old) and to >= len(new):
                break
        if all(owners.shape[d] == 1 for d in range(first_at, at)):
            full += [1] * (at - first_at)
            target += [1] * (to - first_to)
        else:
            full += old[first_at:at]
            target += new[first_to:to]
    return compress(owners.expand(full).reshape(target))


@rule(
    """
    permute transpose t numpy_T expand expand_copy squeeze unsqueeze slice select narrow split split_with_sizes
    unbind chunk diagonal unfold movedim swapaxes tensor_split view_as_real view_as_complex repeat_interleave
    broadcast_to unsafe_chunk unsafe_split tile repeat flip roll pixel_shuffle pixel_unshuffle rot90 _reshape_copy
    unsafe_split_with_sizes
    """
)
def rearranged(step: Step) -> list[Tensor]:
    """The same op on the owners of all elements."""
    source = step.tensors[0]
    name = name_of(step.func)
    if "complex" in name or "as_real" in name:
        owners = fold(step.owners(source), [-1])[..., 0] if "as_complex" in name else step.owners(source).unsqueeze(-1)
        return [owners]
    owners = step.owners(source)
    if name.endswith("_") and owners.dim() != source.dim():
        # The operand has been changed by now.
        return [getattr(aten, name[:-1])(owners, *step.args[1:])]
    if len(step.tensors) > 1:
        # repeat_interleave by a tensor of counts.
        counts = step.tensors[1]
        step.by_data |= step.varies(counts)
        if is_fake(counts):
            return [constant(UNKNOWN, step.results[0].dim())]
    if int(owners.numel()) == 1:
        value = int(owners)
        if value == SHARED and (guess := _guess(step, source)) is not None:
            return [guess]
        return [constant(value, result.dim()) for result in step.results]
    out = step.func(*replaced(step, {id(source): owners.expand(source.shape)}), **_without_dtype(step.kwargs))
    return [compress(result) for result in (out if isinstance(out, tuple | list) else [out])]


def _guess(step: Step, source: Tensor) -> Tensor | None:
    """A shared tensor that is repeated once for each sequence."""
    name = name_of(step.func)
    result = step.results[0]
    if name not in ("expand", "repeat", "repeat_interleave", "broadcast_to", "tile", "expand_copy"):
        return None
    new = result.dim() - source.dim()
    grown = [at for at in range(result.dim()) if at < new or source.shape[at - new] == 1]
    found = [at for at in grown if result.shape[at] == step.batch]
    return along(found[0], result.dim(), step.batch) + GUESS if len(found) == 1 else None


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no values to look at."""
    return tensor.is_meta or hasattr(tensor, "fake_mode")


def replaced(step: Step, by: dict[int, Tensor]) -> Any:
    """The positional arguments, with tensors exchanged by identity; others move to the CPU."""

    def exchange(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return by[id(leaf)] if id(leaf) in by else leaf.detach().to("cpu")

    return tree_map(exchange, tuple(step.args))


def _without_dtype(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in ("dtype", "device", "layout", "pin_memory")}


@rule("cat concat concatenate stack hstack vstack")
def joined(step: Step) -> Tensor:
    """Each part keeps its owners."""
    tensors, result = step.argument("tensors"), step.results[0]
    dimension = step.argument("dim", 0) % result.dim()
    parts = [tensor for tensor in tensors if tensor.dim() == result.dim() or "stack" in name_of(step.func)]
    owners = [step.owners(part) for part in parts]
    if "stack" in name_of(step.func):
        owners = [indices.unsqueeze(dimension) for indices in owners]
        sizes = [1] * len(parts)
    else:
        sizes = [part.shape[dimension] for part in parts]
    width = [max(indices.shape[at] for indices in owners) for at in range(result.dim())]
    full = [
        indices.expand([size if at == dimension else width[at] for at in range(result.dim())])
        for indices, size in zip(owners, sizes, strict=True)
    ]
    return compress(torch.cat(full, dimension))


@rule("constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d")
def padded(step: Step) -> Tensor:
    """Padding belongs to the sequence that it lies beside, where the owners do not change along it."""
    source, result = step.tensors[0], step.results[0]
    owners = step.owners(source)
    given = list(step.argument("pad", step.argument("padding")) or [])
    padded_dims = {result.dim() - 1 - at // 2 for at, size in enumerate(given) if size}
    changed = [at for at in range(result.dim()) if at in padded_dims and owners.shape[at] > 1]
    if not changed:
        return owners
    if "constant" in name_of(step.func):
        full = owners.expand([source.shape[at] if at in changed else owners.shape[at] for at in range(owners.dim())])
        pads = list(step.argument("pad"))
        for at in range(result.dim()):
            if at not in changed and 2 * (result.dim() - at) <= len(pads):
                pads[2 * (result.dim() - at) - 2 : 2 * (result.dim() - at)] = [0, 0]
        return compress(torch.constant_pad_nd(full, pads, SHARED))
    return fold(owners, changed)


def _dims(step: Step, source: Tensor) -> list[int]:
    dims = step.argument("dim", None)
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(source.dim()))
    return [dims] if isinstance(dims, int) else list(dims)


@rule(
    """
    sum mean amax amin max min var std var_mean std_mean prod any all argmax argmin logsumexp norm
    linalg_vector_norm median nansum nanmean mode count_nonzero aminmax
    """
)
def reduced(step: Step) -> Tensor:
    """What is reduced becomes one; two tensors (`max(a, b)`) meet elementwise."""
    source = step.tensors[0]
    if len(step.tensors) > 1:
        return pointwise(step)
    owners = fold(step.owners(source), _dims(step, source))
    if step.results[0].dim() == source.dim():
        return owners
    gone = {dim % source.dim() for dim in _dims(step, source)} if source.dim() else set()
    kept = [at for at in range(source.dim()) if at not in gone]
    return owners.permute(*kept, *sorted(gone)).reshape([owners.shape[at] for at in kept])


@rule(
    """
    softmax _softmax log_softmax _log_softmax cumsum cumprod sort argsort topk kthvalue logcumsumexp glu cummax
    cummin _safe_softmax _weight_norm msort
    """
)
def along_a_dimension(step: Step) -> Tensor | list[Tensor]:
    """Elements along one dimension meet, and as many or fewer come back."""
    source = step.tensors[0]
    if not source.dim():
        return step.owners(source)
    dimension = step.argument("dim", -1)
    owners = fold(step.owners(source), [dimension if isinstance(dimension, int) else -1])
    if name_of(step.func) not in ("sort", "argsort", "topk", "msort"):
        return owners
    # Whole numbers in another order, those of experts, say which rows are picked, and are not computed from several.
    picked = torch.where(owners == MIXED, UNKNOWN, owners)
    return [owners if result.is_floating_point() else picked for result in step.results]


@rule("native_layer_norm layer_norm _fused_rms_norm rms_norm")
def normalised(step: Step) -> Tensor:
    """The last dimensions meet; weight and bias, if they belong to anyone, meet them."""
    source, shape = step.argument("input"), step.argument("normalized_shape")
    return _with_weights(step, fold(step.owners(source), range(-len(shape), 0)))


@rule("native_group_norm group_norm instance_norm")
def normalised_by_group(step: Step) -> list[Tensor]:
    """All but the first dimension meet; weight and bias, if they belong to anyone, meet them."""
    source = step.tensors[0]
    owners = _with_weights(step, fold(step.owners(source), range(1, source.dim())))
    return [owners.reshape([-1] + [1] * (result.dim() - 1)) for result in step.results]


def _with_weights(step: Step, owners: Tensor) -> Tensor:
    """The owners, met by those of all other operands: of parameters nobody."""
    others = [step.owners(tensor) for tensor in step.tensors[1:]]
    values = [fold(other, range(other.dim())).reshape([1] * owners.dim()) for other in others if other.numel()]
    return merge([owners, *values])


def attend(step: Step, asking: Tensor, *asked: Tensor) -> Tensor:
    """Owners of what is computed by one from others: in a packed row, of the one that asks, where it has an owner."""
    if not step.packed:
        return merge([asking, *asked])
    others = merge(list(asked)) if asked else asking
    full, other = torch.broadcast_tensors(asking, others)
    return compress(torch.where(full >= 0, full, other))


@rule(
    """
    mm bmm matmul dot mv _grouped_mm _scaled_mm _int_mm _weight_int4pack_mm _weight_int8pack_mm
    _weight_int4pack_mm_for_cpu _weight_int4pack_mm_with_scales_and_zeros
    """
)
def product(step: Step) -> Tensor:
    """Rows of the left operand meet columns of the right one."""
    left, right = step.tensors[:2]
    name = name_of(step.func)
    if "grouped" in name or "pack" in name:
        return fold(step.owners(left), [-1])
    a, b = step.owners(left), step.owners(right)
    if left.dim() == 1 or right.dim() == 1:
        value = merge([fold(a, range(a.dim())).reshape([1]), fold(b, range(b.dim())).reshape([1])])
        vector = fold(b, range(b.dim())).reshape([1] * (left.dim() - 1))
        rows = merge([fold(a, [-1]).squeeze(-1), vector]) if left.dim() > 1 else value.reshape(())
        return rows if step.results[0].dim() else value.reshape(())
    return attend(step, fold(a, [-1]), fold(b, [-2]))


@rule("addmm baddbmm addbmm addmv")
def product_and_sum(step: Step) -> Tensor:
    """A product, and what it is added to."""
    added, left, right = step.tensors[:3]
    inner = attend(step, fold(step.owners(left), [-1]), fold(step.owners(right), [-2]))
    return merge([inner, step.owners(added)])


@rule("linear mkldnn_linear _linear_pointwise wrapped_linear")
def linear(step: Step) -> Tensor:
    """The features of each row meet."""
    return fold(step.owners(step.tensors[0]), [-1])


@library_rule("bitsandbytes::gemm_4bit bitsandbytes::gemv_4bit mslk::bf16i4bf16_rowwise mslk::bf16i4bf16_shuffled")
def quantized_linear(step: Step) -> Tensor:
    """As `linear`; weight, scales and bias, if they belong to anyone, meet each row."""
    return _with_weights(step, fold(step.owners(step.tensors[0]), [-1]))


@library_rule(
    """
    bitsandbytes::int8_linear_matmul bitsandbytes::int8_scaled_mm bitsandbytes::int8_mixed_scaled_mm
    mslk::f8i4bf16_rowwise mslk::f8i4bf16_shuffled mslk::f8f8bf16_rowwise fbgemm::f8f8bf16_rowwise
    """
)
def scaled_linear(step: Step) -> list[Tensor]:
    """As `linear`: what else depends on the rows are their scales, and which columns have outliers in any of them."""
    owners = fold(step.owners(step.tensors[0]), [-1])
    same = step.results[0].shape[:-1] == step.tensors[0].shape[:-1]
    return [owners if same else constant(UNKNOWN, 2), *(constant(MIXED, sub.dim()) for sub in step.results[1:])]


@library_rule("bitsandbytes::int8_vectorwise_quant")
def quantized_by_row(step: Step) -> list[Tensor]:
    """The numbers of each row meet in its scale; all rows say which columns have outliers."""
    owners = fold(step.owners(step.tensors[0]), [-1])
    scales = owners.reshape(-1) if step.results[1].dim() == 1 else owners
    return [owners, scales, *(constant(MIXED, columns.dim()) for columns in step.results[2:])]


@library_rule("bitsandbytes::int8_mm_dequant bitsandbytes::int8_vectorwise_dequant")
def dequantized_by_row(step: Step) -> Tensor:
    """The numbers stay in their places."""
    return step.owners(step.tensors[0])


@rule("convolution _convolution mkldnn_convolution cudnn_convolution conv1d conv2d conv3d")
def convolved(step: Step) -> Tensor:
    """Channels and neighbours meet; the first dimension stays."""
    source = step.tensors[0]
    if source.dim() < step.argument("weight").dim():
        return fold(step.owners(source), range(source.dim()))
    return fold(step.owners(source), range(1, source.dim()))


@rule(
    """
    max_pool1d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d upsample_nearest1d upsample_nearest2d
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa upsample_linear1d
    grid_sampler_2d im2col col2im adaptive_max_pool2d upsample_nearest3d upsample_trilinear3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d grid_sampler _fft_r2c _fft_c2r _fft_c2c
    """
)
def pooled(step: Step) -> Tensor:
    """Neighbours meet along all dimensions but the first."""
    source = step.tensors[0]
    name = name_of(step.func)
    if "_fft" in name:
        return fold(step.owners(source), step.argument("dim"))
    missing = step.results[0].dim() - source.dim()
    owners = fold(step.owners(source), range(1 if source.dim() > 2 or missing > 0 else 0, source.dim()))
    return owners if not missing else owners.reshape([owners.shape[0]] + [1] * (step.results[0].dim() - 1))


@rule(
    """
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention scaled_dot_product_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _flash_attention_forward
    _scaled_dot_product_attention_math _efficient_attention_forward
    _scaled_dot_product_fused_attention_overrideable
    """
)
def attention(step: Step) -> list[Tensor]:
    """Each query meets all keys and values of its head, and its row of a mask."""
    query, key, value = step.tensors[:3]
    asking = fold(step.owners(query), [-1])
    asked = []
    for other in (key, value):
        owners = fold(step.owners(other), [-1, -2])
        # Queries may have several times as many heads as keys.
        apart = [at for at in range(other.dim() - 2) if other.shape[at] != query.shape[at]]
        asked.append(fold(owners, apart))
    for name in ("attn_mask", "attn_bias"):
        mask = step.argument(name)
        if mask is not None:
            asked.append(fold(step.owners(mask), [-1]))
    # The op whose mask is named so has heads behind the queries.
    bias = step.argument("bias")
    if bias is not None:
        asked.append(fold(step.owners(bias), range(1, bias.dim())))
    owners = attend(step, asking, *asked)
    return [owners if result.dim() == query.dim() else constant(SHARED, result.dim()) for result in step.results]


@rule("_native_multi_head_attention _transformer_encoder_layer_fwd")
def whole_layer(step: Step) -> list[Tensor]:
    """All but the batch, the first dimension, meet."""
    owners = fold(step.owners(step.tensors[0]), [1, 2])
    return [owners if result.dim() == 3 else constant(SHARED, result.dim()) for result in step.results]


@rule("mkldnn_rnn_layer _cudnn_rnn miopen_rnn")
def recurrent(step: Step) -> list[Tensor]:
    """Steps and features meet: the batch is the second dimension."""
    owners = fold(step.owners(step.tensors[0]), [0, 2])
    return [owners if result.dim() == 3 else constant(SHARED, result.dim()) for result in step.results]


@rule("embedding")
def looked_up(step: Step) -> Tensor:
    """A table's row belongs to the one that asks for it."""
    table, indices = step.tensors[:2]
    owners = step.owners(indices).unsqueeze(-1)
    return owners if int(step.owners(table).max()) < 0 else constant(UNKNOWN, owners.dim())


@rule("index index_select gather take_along_dim masked_select _unsafe_index take")
def gathered(step: Step) -> Tensor:
    """Rows that an index picks: their owners are the source's; where it has none, the index's."""
    source, result = step.tensors[0], step.results[0]
    indices = step.tensors[1:]
    name = name_of(step.func)
    owners = step.owners(source)
    if int(owners.max()) < 0 and not bool((owners == MIXED).any()):
        value = int(owners.min())
        asked = [step.owners(index) for index in indices]
        whole = merge([constant(value, 1), *(fold(owners, range(owners.dim())).reshape(1) for owners in asked)])
        if name == "gather":
            return merge([constant(value, source.dim()), *asked])
        if name in ("index", "_unsafe_index"):
            return _by_index_owners(step, asked, value)
        return whole.reshape([1] * result.dim())
    # Along which dimensions are rows picked, and do their owners change there?
    if name in ("index", "_unsafe_index"):
        picked = step.argument("indices")
        dims: list[tuple[int, Tensor]] = []
        at = 0
        for index in picked:
            spans = max(1, index.dim()) if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
            if index is not None:
                dims += [(at + offset, index) for offset in range(spans)]
            at += spans
    elif name in ("masked_select", "take"):
        dims = [(at, indices[0]) for at in range(source.dim())]
    else:
        dims = [(step.argument("dim", 0) % max(1, source.dim()), indices[0])]
    matter = [(at, index) for at, index in dims if owners.shape[at] > 1]
    step.by_data |= any(step.may_change(index) for _, index in matter)
    if not matter and name in ("gather", "index_select", "take_along_dim"):
        return owners
    if any(is_fake(index) for _, index in (matter or dims)):
        if matter:
            return constant(UNKNOWN, result.dim())
        if len(dims) == 1 and dims[0][1].dim() == 1 and dims[0][1].dtype not in (torch.bool, torch.uint8):
            return owners
        return fold(owners, range(owners.dim())).reshape([1] * result.dim())
    full = owners.expand(source.shape)
    return compress(step.func(*replaced(step, {id(source): full}), **_without_dtype(step.kwargs)))


def _by_index_owners(step: Step, asked: list[Tensor], value: int) -> Tensor:
    """Owners of `table[i, j, ...]`: those of the indices, at the place where their dimensions went."""
    result, picked = step.results[0], step.argument("indices")
    places = [at for at, index in enumerate(picked) if index is not None]
    tensors = [index for index in picked if index is not None]
    owners = merge([constant(value, 1), *asked])
    if any(index.dtype in (torch.bool, torch.uint8) for index in tensors):
        return fold(owners, range(owners.dim())).reshape([1] * result.dim())
    dimensions = max(index.dim() for index in tensors)
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    owners = owners.reshape((1,) * (dimensions - owners.dim()) + owners.shape) if owners.dim() < dimensions else owners
    shape = [1] * first + list(owners.shape) + [1] * (result.dim() - first - owners.dim())
    return owners.reshape(shape)


@rule("nonzero argwhere")
def found(step: Step) -> Tensor:
    """Places of what is not zero: the owner of each is the owner of what was found there."""
    source = step.tensors[0]
    owners = step.owners(source)
    step.by_data |= step.varies(source)
    if is_fake(source) or owners.numel() == 1 or not source.dim():
        return constant(int(owners.flatten()[0]) if owners.numel() == 1 else UNKNOWN, 2)
    places = source.detach().to("cpu").nonzero(as_tuple=True)
    return compress(owners.expand(source.shape)[places].unsqueeze(-1))


# Writes by an index of tensors, by name.
_PUTS = ("index_put", "_index_put_impl", "_unsafe_index_put")


@rule(
    """
    scatter scatter_add scatter_reduce index_add index_copy index_put _index_put_impl masked_scatter
    _unsafe_index_put slice_scatter select_scatter index_fill diagonal_scatter
    put index_reduce
    """
)
def written(step: Step) -> Tensor:
    """What is written into a tensor belongs to whom it belonged to; a place that nobody owned goes to the writer."""
    target, *rest = step.tensors
    name = name_of(step.func).removesuffix("_")
    owners = step.owners(target)
    last = {**dict.fromkeys(_PUTS, "values"), "masked_scatter": "source"}
    source = step.argument(last.get(name, "src"), step.argument("source"))
    if not isinstance(source, Tensor):
        # A number is written where an index says.
        asked = [step.owners(index) for index in rest if index.dim() == target.dim()]
        return merge([owners, *(fold(owners, [step.argument("dim", 0)]) for owners in asked)])
    if not source.numel():
        return owners
    given = step.owners(source)
    is_owned = bool(((owners >= 0) & (owners < GUESS)).all())
    if not bool(((given >= 0) & (given < GUESS) | (given == MIXED)).any()):
        # Nobody's rows: they become whose place it is; a guess is not good for places that others are put in.
        if is_owned:
            return owners
        unknown = bool((given == UNKNOWN).any()) or bool((owners >= GUESS).any())
        return merge([owners.clamp(max=GUESS - 1), constant(UNKNOWN, owners.dim())]) if unknown else owners
    owners = torch.where(owners >= GUESS, SHARED, owners)
    dims = _written_dims(step, name, target)
    indices = [tensor for tensor in rest if tensor is not source]
    moves = any(owners.shape[at] > 1 for at in dims) or any(
        given.shape[at - target.dim() + given.dim()] > 1 for at in dims if at - target.dim() + given.dim() >= 0
    )
    unread = any(is_fake(index) for index in indices)
    # Rows of one sequence alone that are written into nobody's places leave the others nobody's.
    is_part = given.numel() == 1 and not is_owned and not unread
    if not moves and not is_part and given.dim() == owners.dim():
        # Whatever the index says, rows stay with their owners.
        return merge([owners, given])
    step.by_data |= any(step.may_change(index) for index in indices)
    if unread:
        step.by_data = True
        return constant(UNKNOWN, target.dim())
    before = owners.expand(target.shape).clone()
    over = {id(target): torch.full_like(before, SHARED), id(source): given.expand(source.shape).contiguous()}
    new = _plain_write(step, name, replaced(step, over))
    if is_owned and bool(((new == SHARED) | (new == before)).all()):
        return owners
    return compress(merge([before, new]))


def _written_dims(step: Step, name: str, target: Tensor) -> list[int]:
    """The dimensions along which an index says where something is written."""
    if name in _PUTS:
        # By tensors, which may be masks: take all.
        return list(range(target.dim()))
    if name == "masked_scatter":
        return list(range(target.dim()))
    dimension = step.argument("dim", 0)
    return [dimension % max(1, target.dim())] if isinstance(dimension, int) else list(range(target.dim()))


def _plain_write(step: Step, name: str, args: Any) -> Tensor:
    """The owners of the source where they are written, SHARED elsewhere."""
    target: Tensor = args[0]
    result: Tensor
    is_put = name in _PUTS
    if (step.argument("accumulate") and not is_put) or step.argument("reduce") not in (None, "none"):
        # Which of them meet in a place is not looked at.
        return torch.full_like(target, UNKNOWN)
    if name in ("scatter_add", "scatter_reduce", "index_add", "index_reduce"):
        result = _accumulated(target, name, step.argument("dim"), args[2], args[3])
    elif name == "scatter":
        result = target.scatter(step.argument("dim"), args[2], args[3])
    elif name == "index_copy":
        result = target.index_copy(step.argument("dim"), args[2], args[3])
    elif is_put and step.argument("accumulate"):
        places = torch.arange(target.numel()).view(target.shape)
        places = places[tuple(slice(None) if index is None else index for index in args[1])]
        source = args[2].expand(places.shape).reshape(-1)
        result = _accumulated(target.view(-1), "scatter_add", 0, places.reshape(-1), source).view(target.shape)
    elif is_put:
        result = aten.index_put.default(target, args[1], args[2])
    elif name == "masked_scatter":
        result = target.masked_scatter(args[1], args[2])
    else:
        result = step.func(*args, **_without_dtype(step.kwargs))
    return result


def _accumulated(target: Tensor, name: str, dimension: int, index: Tensor, source: Tensor) -> Tensor:
    """The owner of what is added up in each place."""
    for owner in (MIXED, UNKNOWN):
        if bool((source == owner).any()):
            return torch.full_like(target, owner)
    if name.startswith("index"):
        # `index_reduce` warns that it is in beta.
        index = index.view([-1 if at == dimension % source.dim() else 1 for at in range(source.dim())])
        index = index.expand(source.shape)
    highest, lowest = torch.full_like(target, SHARED), torch.full_like(target, GUESS)
    highest.scatter_reduce_(dimension, index, source, "amax")
    lowest.scatter_reduce_(dimension, index, torch.where(source < 0, GUESS, source), "amin")
    return torch.where(highest < 0, SHARED, torch.where(lowest == highest, highest, MIXED))


@rule("histc bincount searchsorted one_hot unique _unique2 unique_dim unique_consecutive")
def counted(step: Step) -> Tensor | list[Tensor]:
    """Counts of values belong to all; `one_hot` has its own dimension for them."""
    if name_of(step.func).endswith("one_hot"):
        return step.owners(step.tensors[0]).unsqueeze(-1)
    step.by_data = True
    return [constant(UNKNOWN, result.dim()) for result in step.results]


@rule("as_strided as_strided_copy _nested_view_from_buffer")
def strided(step: Step) -> Tensor:
    """Only where all elements have one owner."""
    owners = step.owners(step.tensors[0])
    return constant(int(owners) if owners.numel() == 1 else UNKNOWN, step.results[0].dim())


@rule("arange linspace scalar_tensor eye _local_scalar_dense item tril_indices triu_indices")
def numbers(step: Step) -> list[Tensor]:
    """Made from sizes."""
    return [constant(SHARED, result.dim()) for result in step.results]


@rule("cdist _cdist_forward _euclidean_dist")
def distances(step: Step) -> Tensor:
    """Each row of one meets each row of the other."""
    left, right = step.tensors[:2]
    return attend(step, fold(step.owners(left), [-1]), fold(step.owners(right), [-1]).transpose(-1, -2))


def lora(step: Step) -> Tensor:
    """Our own ops: rows of the output stay whose they are."""
    tensors = step.tensors
    return merge([step.owners(tensors[0]), fold(step.owners(tensors[1]), [-1])])
