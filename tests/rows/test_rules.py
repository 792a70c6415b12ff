"""The owners that `Watch` gives agree with what a change of one sequence shows, for each op and for chains of ops."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as f
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from xpu_lora_compile.rows.owners import GUESS, MIXED, SHARED, UNKNOWN, along
from xpu_lora_compile.rows.watch import Watch

EXAMPLES = int(os.environ.get("XPU_LORA_TEST_EXAMPLES", "120"))
Function = Callable[[Tensor], Tensor]

B, T, D = 3, 4, 6


def weights(*shape: int) -> Tensor:
    """Constants: the same in each call, with the values 0.1, 0.2, ... in some order."""
    count = 1
    for size in shape:
        count *= size
    return ((torch.arange(count) * 7 % 11).float() / 10 - 0.5).view(shape)


def tokens(x: Tensor) -> Tensor:
    """Whole numbers from 0 to 4 that depend on the values, `[B, T]`."""
    return (x[..., 0].abs() * 10).long() % 5


# In place.


def write_through_a_view(x: Tensor) -> Tensor:
    y = x * 1
    y[:, 1:3].add_(1).mul_(x[:, :2])
    return y


def write_through_a_view_of_a_view(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.transpose(0, 1)[1].copy_(x[:, 2])
    return y


def write_rows_in_other_places(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape)
    y[0].copy_(x[2])
    y[1:] = x[:2]
    return y


def write_and_read_an_older_view(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape)
    view = y.view(-1)
    y[0] = x[1]
    y[1] = x[0]
    return view


def write_over(x: Tensor) -> Tensor:
    y = x * 1
    y[0] = x[1]
    return y


def write_with_out(x: Tensor) -> Tensor:
    y = torch.empty(x.shape)
    torch.mul(x, 2, out=y)
    return y


def write_with_out_of_rows(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape)
    torch.add(x[2], 1, out=y[0])
    return y


def fill_a_buffer(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0] + 1, *x.shape[1:])
    y[:-1] = x
    y[-1] = x[0]
    return y


def zero_then_write(x: Tensor) -> Tensor:
    y = x * 1
    y.zero_()
    y[1] += x[2]
    return y


def index_put_rows(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape)
    y[torch.tensor([2, 0, 1])] = x
    return y


def index_put_accumulated(x: Tensor) -> Tensor:
    return torch.zeros(x.shape).index_put((torch.tensor([0, 0, 1]),), x, accumulate=True)


def index_put_by_data(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape)
    y[x.sum((1, 2)).argsort()] = x
    return y


def masked_put(x: Tensor) -> Tensor:
    y = x * 1
    y[y > 0] = 3.0
    return y


def mixture_of_experts(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    result = torch.zeros_like(flat)
    choice = flat.sum(-1) > 0
    for number, expert in enumerate((weights(D, D), -weights(D, D))):
        (places,) = torch.where(choice == bool(number))
        result.index_add_(0, places, flat[places] @ expert)
    return result.view(x.shape)


def images_in_a_text(x: Tensor) -> Tensor:
    mask = (x[..., :1] > 0).expand_as(x)
    return x.masked_scatter(mask, x.flip(0) * 2)


def rope(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1])[:, None] * torch.arange(x.shape[2] // 2)
    angles = torch.cat([angles, angles], -1)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def conv_over_the_batch(x: Tensor) -> Tensor:
    return f.conv1d(x.permute(1, 2, 0), weights(5, D, 2))


def lstm(x: Tensor, batch_first: bool) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = torch.nn.LSTM(x.shape[2], 3, batch_first=batch_first)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    return layer(x)[0]


def transformer_layer(x: Tensor, batch_first: bool) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(x.shape[2], 2, 8, batch_first=batch_first).eval().requires_grad_(False)
    return layer(x)


OPS: dict[str, Function] = {
    # Views and orders.
    "view": lambda x: x.view(-1, D),
    "view all": lambda x: x.view(-1),
    "view in pairs": lambda x: x.view(B * T // 2, 2, D),
    "view over rows": lambda x: x.view(2, -1),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(-1, (2, 3)),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose and reshape": lambda x: x.transpose(0, 1).reshape(-1, D),
    "reshape without a transpose": lambda x: x.transpose(0, 1).reshape(B, T, D),
    "T": lambda x: x[:, 0].T,
    "movedim": lambda x: x.movedim(0, -1),
    "swapaxes": lambda x: x.swapaxes(0, 2),
    "mT": lambda x: x.mT,
    "flip": lambda x: x.flip(0),
    "flip tokens": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 0),
    "roll tokens": lambda x: x.roll(1, 1),
    "roll flattened": lambda x: x.roll(1),
    "rot90": lambda x: x.rot90(1, (0, 1)),
    "select": lambda x: x[1],
    "slice": lambda x: x[1:],
    "slice backwards": lambda x: x[::2],
    "narrow": lambda x: x.narrow(0, 1, 2),
    "diagonal": lambda x: x.diagonal(0, 0, 1),
    "diag_embed": lambda x: x.diag_embed(),
    "unfold": lambda x: x.unfold(0, 2, 1),
    "unfold tokens": lambda x: x.unfold(1, 2, 1),
    "as_strided": lambda x: x.as_strided((B, T, D), (D, B * D, 1)),
    "as_strided as it was": lambda x: x.as_strided((B, T, D), (T * D, D, 1)),
    "view_as_complex": lambda x: torch.view_as_complex(x.view(B, T, 3, 2)).real,
    "contiguous": lambda x: x.permute(1, 0, 2).contiguous(),
    "expand": lambda x: x[:, :1].expand(B, 5, D),
    "expand one row": lambda x: x[1:2].expand(B, T, D),
    "expand in front": lambda x: x.expand(2, B, T, D),
    "broadcast_to": lambda x: x[0].broadcast_to(B, T, D),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "repeat one row": lambda x: x[2].repeat(B, 1, 1),
    "tile": lambda x: x.tile(2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "repeat_interleave by counts": lambda x: x.repeat_interleave(torch.tensor([2, 0, 1]), 0),
    "repeat_interleave by data": lambda x: x.repeat_interleave(tokens(x)[:, 0] % 2 + 1, 0),
    "repeat_interleave flattened": lambda x: x.repeat_interleave(2),
    "pixel_shuffle": lambda x: f.pixel_shuffle(x.view(B, 4, 2, 3), 2),
    "pixel_unshuffle": lambda x: f.pixel_unshuffle(x.view(B, 1, 4, 6), 2),
    "channel_shuffle": lambda x: f.channel_shuffle(x.view(B, 4, 2, 3), 2),
    "split": lambda x: x.split(2)[0],
    "split in unequal parts": lambda x: x.split([1, 2])[1],
    "chunk": lambda x: x.chunk(3)[2],
    "unbind": lambda x: x.unbind()[1],
    "tensor_split": lambda x: x.tensor_split(2)[1],
    "hsplit": lambda x: x.hsplit(2)[1],
    # Joined.
    "cat": lambda x: torch.cat([x, x * 2]),
    "cat in another order": lambda x: torch.cat([x[1:], x[:1]]),
    "cat of features": lambda x: torch.cat([x, x.flip(0)], -1),
    "cat with a constant": lambda x: torch.cat([weights(1, T, D), x]),
    "cat of a row and the rest": lambda x: torch.cat([x[:, :1], x[:, 1:].flip(1)], 1),
    "stack": lambda x: torch.stack([x, x]),
    "stack in the middle": lambda x: torch.stack([x, x.flip(0)], 1),
    "stack of rows": lambda x: torch.stack([x[2], x[0], x[1]]),
    "hstack": lambda x: torch.hstack([x, x]),
    "vstack": lambda x: torch.vstack([x[0], x[2]]),
    "dstack": lambda x: torch.dstack([x, x.roll(1, 0)]),
    "column_stack": lambda x: torch.column_stack([x[:, 0], x[:, 1]]),
    "block_diag": lambda x: torch.block_diag(x[0], x[1]),
    "meshgrid": lambda x: torch.meshgrid(x[:, 0, 0], x[:, 1, 0], indexing="ij")[0],
    "cartesian_prod": lambda x: torch.cartesian_prod(x[:, 0, 0], x[:, 1, 0]),
    "pad": lambda x: f.pad(x, (1, 1)),
    "pad tokens": lambda x: f.pad(x, (0, 0, 1, 0)),
    "pad rows": lambda x: f.pad(x, (0, 0, 0, 0, 1, 0)),
    "pad away": lambda x: f.pad(x, (0, 0, 0, 0, -1, 1)),
    "pad reflected": lambda x: f.pad(x, (1, 1), mode="reflect"),
    "pad replicated": lambda x: f.pad(x, (1, 1), mode="replicate"),
    "pad circular": lambda x: f.pad(x.permute(1, 2, 0), (1, 0), mode="circular"),
    # Indices.
    "index": lambda x: x[torch.arange(B).roll(1)],
    "index of tokens": lambda x: x[:, torch.tensor([3, 0])],
    "index of pairs": lambda x: x[torch.tensor([0, 1, 2]), torch.tensor([3, 1, 0])],
    "index apart": lambda x: x[torch.tensor([2, 1]), :, torch.tensor([0, 1])],
    "index by a mask": lambda x: x[x[..., 0] > 0],
    "index by a mask of rows": lambda x: x[torch.tensor([True, False, True])],
    "index by data": lambda x: x[x.sum((1, 2)).argsort()],
    "index of a table": lambda x: weights(5, 3)[tokens(x)],
    "index of a table of two": lambda x: weights(5, 5, 2)[tokens(x), tokens(x.flip(0))],
    "index of columns of a table": lambda x: weights(2, 5, 3)[:, tokens(x)],
    "index of a table apart": lambda x: weights(5, 2, 5)[tokens(x), :, tokens(x)],
    "index of a table by a mask": lambda x: weights(T, D)[x[1, :, 0] > 0],
    "index of the last token": lambda x: x[torch.arange(B), tokens(x)[:, 0] % T],
    "index_select": lambda x: x.index_select(0, torch.arange(B).clamp(min=1)),
    "index_select of a table": lambda x: weights(5, 3).index_select(0, tokens(x).flatten()),
    "index_select by data": lambda x: x.index_select(0, x.sum((1, 2)).argsort()),
    "gather": lambda x: x.gather(0, torch.arange(B).roll(1)[:, None, None].expand(B, T, D)),
    "gather of tokens": lambda x: x.gather(1, (tokens(x) % T)[..., None].expand(B, T, D)),
    "gather by data": lambda x: x.gather(0, x.argsort(0)),
    "gather by data of others": lambda x: x.gather(1, (tokens(x.flip(0)) % T)[..., None].expand(B, T, D)),
    "gather of a table": lambda x: weights(B, 5).gather(1, tokens(x)),
    "take_along_dim": lambda x: x.take_along_dim(x.argsort(1), 1),
    "take": lambda x: x.take(torch.tensor([0, 30, 60])),
    "take by data": lambda x: x.take(tokens(x)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: (x > 0).nonzero(),
    "argwhere": lambda x: torch.argwhere(x > 0),
    "embedding": lambda x: f.embedding(tokens(x), weights(5, 3)),
    "embedding of a table of the batch": lambda x: f.embedding(torch.tensor([[1, 0], [2, 2]]), x[:, 0]),
    "embedding_bag": lambda x: f.embedding_bag(tokens(x), weights(5, 3)),
    "one_hot": lambda x: f.one_hot(tokens(x), 5),
    "bucketize": lambda x: torch.bucketize(x, weights(5).sort()[0]),
    "searchsorted": lambda x: torch.searchsorted(weights(5).sort()[0], x),
    "isin": lambda x: torch.isin(x, x[1]),
    # Written.
    "scatter": lambda x: torch.zeros(x.shape).scatter(0, torch.tensor([2, 0, 1])[:, None, None].expand(B, T, D), x),
    "scatter tokens": lambda x: torch.zeros(x.shape).scatter(1, x.argsort(1), x),
    "scatter by data": lambda x: torch.zeros(x.shape).scatter(0, x.argsort(0), x),
    "scatter a number": lambda x: torch.zeros(B, T, 5).scatter(2, tokens(x)[..., None], 1.0),
    "scatter a number over rows": lambda x: torch.zeros(B, T).scatter(0, tokens(x) % B, 1.0),
    "scatter_add": lambda x: torch.zeros(2, T, D).scatter_add(0, torch.zeros(B, T, D, dtype=torch.int64), x),
    "scatter_reduce": lambda x: x.scatter_reduce(1, (x > 0).long(), x, "amax"),
    "scatter_reduce of rows": lambda x: x.scatter_reduce(0, (x > 0).long(), x, "sum"),
    "index_add": lambda x: torch.zeros(B, T, D).index_add(0, torch.tensor([1, 1, 0]), x),
    "index_add onto a sequence": lambda x: x.index_add(0, torch.tensor([1]), x[:1]),
    "index_copy": lambda x: x.index_copy(0, torch.tensor([0]), x[2:]),
    "index_fill": lambda x: x.index_fill(1, tokens(x)[0, :1] % T, 0.0),
    "index_put": index_put_rows,
    "index_put accumulated": index_put_accumulated,
    "index_put by data": index_put_by_data,
    "index_put by a mask": masked_put,
    "masked_scatter": lambda x: x.masked_scatter(torch.ones(B, T, D, dtype=torch.bool), x.flip(0)),
    "masked_scatter of a part": images_in_a_text,
    "slice_scatter": lambda x: x.slice_scatter(x[:1] * 2, 0, 1, 2),
    "select_scatter": lambda x: x.select_scatter(x[0], 0, 2),
    "diagonal_scatter": lambda x: x[:, :3, 0].diagonal_scatter(x[2, :3, 1]),
    "put": lambda x: x.put(torch.tensor([0, 1]), x[2, 0, :2]),
    "through a view": write_through_a_view,
    "through a view of a view": write_through_a_view_of_a_view,
    "in other places": write_rows_in_other_places,
    "an older view": write_and_read_an_older_view,
    "over": write_over,
    "with out": write_with_out,
    "with out, of rows": write_with_out_of_rows,
    "into a buffer": fill_a_buffer,
    "after zero_": zero_then_write,
    "in place": lambda x: (x * 1).relu_().add_(1).mul_(x),
    "transpose_": lambda x: (x * 1).transpose_(0, 1),
    "squeeze_ and unsqueeze_": lambda x: (x * 1).unsqueeze_(0).squeeze_(0),
    "masked_fill": lambda x: x.masked_fill(x.flip(0) > 0, 0.0),
    "masked_fill of one's own": lambda x: x.masked_fill(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, 1.0),
    "where of others": lambda x: torch.where(x > 0, x, x.flip(0)),
    "tril": lambda x: x.tril(),
    "clamp": lambda x: x.clamp(x[:1], None),
    "lerp": lambda x: x.lerp(x.roll(1, 0), 0.5),
    # Reductions.
    "sum": lambda x: x.sum(),
    "sum of features": lambda x: x.sum(-1),
    "sum of tokens": lambda x: x.sum(1, keepdim=True),
    "sum of rows": lambda x: x.sum(0),
    "mean": lambda x: x.mean((1, 2)),
    "mean of rows": lambda x: x.mean((0, 2), keepdim=True),
    "max": lambda x: x.max(1)[0],
    "max of rows": lambda x: x.max(0)[1],
    "max of two": lambda x: torch.max(x, x.flip(0)),
    "amax": lambda x: x.amax(0),
    "argmax": lambda x: x.argmax(-1),
    "argmax of rows": lambda x: x.argmax(0),
    "argmax of all": lambda x: x.argmax(),
    "var": lambda x: x.var(-1),
    "var_mean": lambda x: torch.var_mean(x, 0)[1],
    "norm": lambda x: x.norm(dim=-1),
    "norm of all": lambda x: x.norm(),
    "logsumexp": lambda x: x.logsumexp(1),
    "prod": lambda x: x.prod(1),
    "any": lambda x: (x > 0).any(0),
    "all": lambda x: (x > -1).all(-1),
    "median": lambda x: x.median(0)[0],
    "quantile": lambda x: x.quantile(0.5, 0),
    "aminmax": lambda x: torch.aminmax(x, dim=0)[0],
    "count_nonzero": lambda x: (x > 0).count_nonzero(0),
    "std of rows": lambda x: x.std(0),
    "cross": lambda x: torch.cross(x[..., :3], x[..., 3:], -1),
    "diff": lambda x: x.diff(dim=0),
    "trapezoid": lambda x: torch.trapezoid(x, dim=0),
    # Along a dimension.
    "softmax": lambda x: x.softmax(-1),
    "softmax of rows": lambda x: x.softmax(0),
    "log_softmax": lambda x: x.log_softmax(1),
    "cumsum": lambda x: x.cumsum(1),
    "cumsum of rows": lambda x: x.cumsum(0),
    "cumprod": lambda x: x.cumprod(0),
    "cummax": lambda x: x.cummax(0)[0],
    "logcumsumexp": lambda x: x.logcumsumexp(0),
    "glu": lambda x: f.glu(x),
    "glu of tokens": lambda x: f.glu(x, 1),
    "sort": lambda x: x.sort(1)[0],
    "sort of rows": lambda x: x.sort(0)[0],
    "sort, descending": lambda x: x.sort(0, True)[0],
    "sort, stable": lambda x: torch.sort(x, dim=0, stable=True)[0],
    "argsort": lambda x: x.argsort(0),
    "argsort, stable": lambda x: x.argsort(dim=0, stable=True),
    "topk": lambda x: x.topk(2, 0)[0],
    "kthvalue": lambda x: x.kthvalue(1, 0)[0],
    "msort": lambda x: x.msort(),
    "renorm": lambda x: x.renorm(2, 0, 0.5),
    "normalize": lambda x: f.normalize(x, dim=0),
    "gumbel": lambda x: f.softmin(x, 0),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: tokens(x).unique_consecutive(),
    "bincount": lambda x: tokens(x).flatten().bincount(minlength=5),
    "histc": lambda x: x.histc(4),
    # Products.
    "linear": lambda x: f.linear(x, weights(5, D), weights(5)),
    "linear over rows": lambda x: f.linear(x.permute(1, 2, 0), weights(5, B)),
    "matmul": lambda x: x @ weights(D, 5),
    "matmul from the left": lambda x: weights(5, T) @ x,
    "matmul of rows with each other": lambda x: x[:, 0] @ x[:, 0].T,
    "matmul of a vector": lambda x: x @ weights(D),
    "matmul of its own vector": lambda x: x @ x[1, 0],
    "bmm": lambda x: x.bmm(x.mT),
    "bmm of others": lambda x: x.bmm(x.flip(0).mT),
    "mm": lambda x: x.view(-1, D).mm(weights(D, 5)),
    "mm of all tokens": lambda x: x.view(-1, D).mm(x.view(-1, D).T),
    "mv": lambda x: x[:, 0].mv(weights(D)),
    "mv of rows": lambda x: x[:, 0].T.mv(weights(B)),
    "dot": lambda x: x[0, 0].dot(x[1, 0]),
    "outer": lambda x: torch.outer(x[:, 0, 0], x[:, 0, 1]),
    "addmm": lambda x: torch.addmm(x[:, 0, :5], x[:, 1], weights(D, 5)),
    "addmm of others": lambda x: torch.addmm(x[0, 0, :5], x[:, 1], weights(D, 5)),
    "baddbmm": lambda x: torch.baddbmm(x[..., :T], x, x.mT),
    "einsum": lambda x: torch.einsum("btd,bsd->bts", x, x),
    "einsum over rows": lambda x: torch.einsum("btd,bsd->ts", x, x),
    "einsum of rows with each other": lambda x: torch.einsum("btd,ctd->bc", x, x),
    "einsum, time first": lambda x: torch.einsum("btd,de->tbe", x, weights(D, 5)),
    "tensordot": lambda x: torch.tensordot(x, weights(D, 5), 1),
    "tensordot over rows": lambda x: torch.tensordot(x, x, ([0, 1], [0, 1])),
    "bilinear": lambda x: f.bilinear(x, x, weights(2, D, D)),
    "kron": lambda x: torch.kron(x[:, 0], weights(2, 2)),
    "cdist": lambda x: torch.cdist(x, x),
    "cdist of rows": lambda x: torch.cdist(x[:, 0], x[:, 1]),
    "cosine_similarity": lambda x: f.cosine_similarity(x, x.flip(0), -1),
    "matrix_power": lambda x: x[..., :T].matrix_power(2),
    "inverse": lambda x: torch.linalg.inv(x[..., :T] + 5 * torch.eye(T)),
    # Attention and recurrences.
    "attention": lambda x: f.scaled_dot_product_attention(x, x, x),
    "attention of heads": lambda x: f.scaled_dot_product_attention(*[x.view(B, T, 2, 3).transpose(1, 2)] * 3),
    "attention across rows": lambda x: f.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3),
    "attention to others": lambda x: f.scaled_dot_product_attention(x, x.flip(0), x),
    "attention to values of others": lambda x: f.scaled_dot_product_attention(x, x, x.flip(0)),
    "attention with a mask of others": lambda x: f.scaled_dot_product_attention(x, x, x, x.flip(0)[..., :T]),
    "attention of heads with a mask": lambda x: f.scaled_dot_product_attention(*[x[:, None]] * 3, x[:, None, :, :T]),
    "attention of heads with a mask of others": lambda x: f.scaled_dot_product_attention(
        *[x[:, None]] * 3, x.flip(0)[:, None, :, :T]
    ),
    "attention of grouped heads": lambda x: f.scaled_dot_product_attention(
        x.view(B, T, 2, 3).transpose(1, 2), x[:, None, :, :3], x[:, None, :, 3:], enable_gqa=True
    ),
    "attention by hand": lambda x: (x @ x.mT / 2).softmax(-1) @ x,
    "transformer layer": lambda x: transformer_layer(x, batch_first=True),
    "transformer layer, time first": lambda x: transformer_layer(x, batch_first=False),
    "lstm": lambda x: lstm(x, batch_first=True),
    "lstm, time first": lambda x: lstm(x, batch_first=False),
    "rope": rope,
    # Convolutions, pooling, norms.
    "conv1d": lambda x: f.conv1d(x.mT, weights(5, D, 2)),
    "conv1d without a batch": lambda x: f.conv1d(x[:, 0], weights(5, B, 2)),
    "conv1d over the batch": conv_over_the_batch,
    "conv2d": lambda x: f.conv2d(x.view(B, 1, T, D), weights(2, 1, 2, 2), stride=2),
    "conv_transpose1d": lambda x: f.conv_transpose1d(x.mT, weights(D, 5, 2)),
    "conv1d in groups": lambda x: f.conv1d(x.mT, weights(D, 1, 2), groups=D),
    "conv1d in groups of the batch": lambda x: f.conv1d(x[:, :, 0][None], weights(B, 1, 2), groups=B),
    "max_pool1d": lambda x: f.max_pool1d(x, 2),
    "max_pool1d without a batch": lambda x: f.max_pool1d(x[:, 0], 2),
    "avg_pool1d over rows": lambda x: f.avg_pool1d(x.permute(1, 2, 0), 2),
    "max_pool2d": lambda x: f.max_pool2d(x.view(B, 1, T, D), 2),
    "max_pool2d of rows": lambda x: f.max_pool2d(x, 2),
    "avg_pool2d": lambda x: f.avg_pool2d(x.view(B, 1, T, D), 2),
    "avg_pool2d without a batch": lambda x: f.avg_pool2d(x.permute(1, 0, 2), 2),
    "avg_pool3d": lambda x: f.avg_pool3d(x.view(B, 1, T, 2, 3), (2, 1, 1)),
    "adaptive_avg_pool1d": lambda x: f.adaptive_avg_pool1d(x, 2),
    "adaptive_avg_pool2d": lambda x: f.adaptive_avg_pool2d(x.view(B, 1, T, D), 2),
    "adaptive_max_pool1d": lambda x: f.adaptive_max_pool1d(x, 2),
    "interpolate": lambda x: f.interpolate(x, scale_factor=2),
    "interpolate bilinear": lambda x: f.interpolate(x[:, None], scale_factor=2, mode="bilinear"),
    "grid_sample": lambda x: f.grid_sample(weights(B, 1, 4, 4), x.view(B, T, 3, 2), align_corners=False),
    "im2col": lambda x: f.unfold(x.view(B, 1, T, D), 2),
    "col2im": lambda x: f.fold(x.view(B, T, D), (4, 3), (2, 2)),
    "fft": lambda x: torch.fft.rfft(x).real,
    "fft of rows": lambda x: torch.fft.fft(x, dim=0).real,
    "stft": lambda x: torch.stft(x.flatten(1), 4, return_complex=True, window=torch.ones(4)).real,
    "layer_norm": lambda x: f.layer_norm(x, (D,)),
    "layer_norm of all": lambda x: f.layer_norm(x, (B, T, D)),
    "layer_norm after a transpose": lambda x: f.layer_norm(x.permute(1, 2, 0), (B,)),
    "rms_norm": lambda x: f.rms_norm(x, (D,)),
    "group_norm": lambda x: f.group_norm(x, 2),
    "group_norm over rows": lambda x: f.group_norm(x.transpose(0, 1), 1),
    "instance_norm": lambda x: f.instance_norm(x),
    "batch_norm": lambda x: f.batch_norm(x, weights(T) + 1, weights(T) ** 2 + 1),
    "batch_norm while training": lambda x: f.batch_norm(x, None, None, training=True),
    "batch_norm of rows as channels": lambda x: f.batch_norm(x.transpose(0, 1), None, None, training=True),
    "local_response_norm": lambda x: f.local_response_norm(x, 2),
    "alpha_dropout": lambda x: f.dropout(x, 0.0, True),
    "prelu": lambda x: f.prelu(x, weights(T)),
    "rrelu": lambda x: f.rrelu(x),
    "vmap": lambda x: torch.vmap(lambda row: row * 2)(x),
    "vmap over tokens": lambda x: torch.vmap(lambda row: row.flip(0), in_dims=1)(x),
    # Mixed and met.
    "a residual": lambda x: x + x.flip(1),
    "a residual of others": lambda x: x + x.flip(0),
    "a residual of an index": lambda x: x + x[torch.tensor([2, 0, 1])],
    "a product with a mean of all": lambda x: x * x.mean(),
    "a bias of rows": lambda x: x + x[:1],
    "zeros_like": lambda x: torch.zeros_like(x) + x,
    "zeros_like of others": lambda x: torch.zeros_like(x) + x.flip(0),
    "zeros for each sequence": lambda x: torch.zeros(B, T, D) + x.flip(0),
    "a constant for each sequence": lambda x: weights(1, T, D).expand(B, T, D) * x.roll(1, 0),
    "queries for each sequence": lambda x: weights(2, D).repeat(B, 1, 1) @ x.mT,
    "queries for each sequence of others": lambda x: weights(2, D).repeat(B, 1, 1) @ x.flip(0).mT,
    "as many as sequences by accident": lambda x: weights(B, D) + x[1, 0],
    "as many zeros as sequences by accident": lambda x: torch.zeros(B, D) + x[1, 0],
    "as many copies as sequences by accident": lambda x: (weights(1, D).expand(B, D) * 2) + x[2, 0],
    "mixture of experts": mixture_of_experts,
    "to": lambda x: x.to(torch.float64).to(torch.bfloat16).float(),
    "cast to bits": lambda x: x.view(torch.int32),
    "clone": lambda x: x.clone().detach(),
    "polar": lambda x: torch.polar(x.abs(), x).real,
    "complex": lambda x: torch.complex(x, x.flip(0)).abs(),
    "heaviside": lambda x: torch.heaviside(x, x),
    "rand_like": lambda x: torch.ones_like(x).cumsum(0) + x,
}


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))


def owners_by_watch(function: Function, x: Tensor, *, fake: bool = False) -> Tensor | None:
    """The owners of a function's result, in its shape; None where an index that the model computes decides them.

    Args:
        fake: run on tensors without values, as is done while Dynamo traces.
    """
    watch = Watch(len(x))
    mode = FakeTensorMode() if fake else nullcontext()
    x = mode.from_tensor(x) if isinstance(mode, FakeTensorMode) else x.clone()
    watch.own(x, along(0, x.dim(), len(x)))
    try:
        with mode, watch:
            result = function(x)
    except (DataDependentOutputException, DynamicOutputShapeException):
        # What cannot be run on fake tensors is not followed.
        return None
    owned = watch.known(result)
    watch.forget()
    if owned is None:
        return torch.full(result.shape, SHARED)
    return None if owned.by_data else owned.owners.expand(result.shape).clone()


def strangers(function: Function, x: Tensor, owners: Tensor) -> list[str]:
    """Where a change of one sequence is seen in what belongs to another one, or to nobody."""
    before, found = function(x.clone()), []
    for sequence in range(len(x)):
        for seed in (1, 2):
            changed = x.clone()
            changed[sequence] = 2 * torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed))
            after = function(changed)
            if after.shape != before.shape:
                # As many rows as the data say: all that can be told is that there must be no owners.
                found += [f"its size depends on {sequence}"] if bool((owners >= 0).any() and len(owners)) else []
                continue
            moved = (after != before) & ~(after.isnan() & before.isnan())
            may = (owners == sequence) | (owners == sequence + GUESS) | (owners == MIXED) | (owners == UNKNOWN)
            wrong = owners[moved & ~may]
            found += (
                [f"{len(wrong)} elements of {sorted(set(wrong.tolist()))} depend on {sequence}"] if len(wrong) else []
            )
    return found


# The rules of these say a sequence that it is not, or none: each is a fault, and none is refused.
# A row belongs to whose content it is. Others may have a say in which content, or in statistics of all.
WRONG = {
    "index of a table by a mask": "how many rows there are depends on a sequence",
    "gather by data of others": "the owner of the index is not looked at",
    "index_fill": "the owner of the index is not looked at",
    "grid_sample": "only the image's owner counts, not that of the places",
    "batch_norm while training": "the statistics are those of all sequences",
}
WRONG_WHILE_TRACING = {
    **{name: why for name, why in WRONG.items() if name != "index of a table by a mask"},
    "a residual of an index": "a real owner overrules what an index without values has picked",
}


def cases(wrong: dict[str, str]) -> list[object]:
    marks = {name: [pytest.mark.xfail(strict=True, reason=reason)] for name, reason in wrong.items()}
    return [pytest.param(name, marks=marks.get(name, [])) for name in OPS]


@pytest.mark.parametrize("name", cases(WRONG))
def test_what_a_sequence_changes_is_its_own(name: str) -> None:
    owners = owners_by_watch(OPS[name], inputs())
    assert owners is None or not strangers(OPS[name], inputs(), owners)


@pytest.mark.parametrize("name", cases(WRONG_WHILE_TRACING))
def test_what_a_sequence_changes_is_its_own_while_tracing(name: str) -> None:
    """Without values, less may be known, but nothing wrong."""
    owners = owners_by_watch(OPS[name], inputs(), fake=True)
    assert owners is None or not strangers(OPS[name], inputs(), owners)


USUAL = [
    *("view", "view in pairs", "flatten", "permute", "transpose and reshape", "unsqueeze", "movedim", "contiguous"),
    *(
        "expand",
        "repeat",
        "repeat_interleave",
        "split",
        "chunk",
        "cat",
        "cat of features",
        "stack",
        "pad",
        "pad tokens",
    ),
    *("index", "index of tokens", "index_select", "gather", "gather of tokens", "embedding", "index of a table"),
    *("sum of features", "mean", "max", "argmax", "softmax", "cumsum", "sort", "layer_norm", "rms_norm", "group_norm"),
    *("linear", "matmul", "matmul from the left", "bmm", "mm", "einsum", "einsum, time first", "attention"),
    *("attention of heads", "conv1d", "conv2d", "max_pool1d", "avg_pool2d", "interpolate", "rope", "where"),
    *("a residual", "tril", "in place", "through a view", "roll tokens", "flip tokens", "unfold tokens"),
    *("transformer layer", "lstm", "batch_norm", "instance_norm", "one_hot", "flip", "roll", "roll flattened"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["eager", "tracing"])
@pytest.mark.parametrize("name", USUAL)
def test_the_owners_of_usual_ops_are_known(name: str, fake: bool) -> None:
    """Otherwise nothing would be wrong where all is unknown."""
    if fake and name in ("index", "index_select", "gather"):
        # Which rows an index picks is not known without its values.
        assert bool((owners_by_watch(OPS[name], inputs(), fake=True) == UNKNOWN).all())
        return
    owners = owners_by_watch(OPS[name], inputs(), fake=fake)
    assert owners is not None
    assert bool(((owners >= 0) & (owners < GUESS)).any())
    assert set(owners.unique().tolist()) <= {SHARED, 0, 1, 2}


MIXING = [
    *("sum", "softmax of rows", "mean of rows", "a residual of others", "sort of rows", "fft of rows"),
    *("attention across rows", "mm of all tokens", "argmax of rows", "cumsum of rows", "layer_norm of all"),
]


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_sequences_is_known_to_be_mixed(name: str) -> None:
    assert bool((owners_by_watch(OPS[name], inputs()) == MIXED).any())


# Chains of ops. Each takes a tensor of any shape, another one of the chain, and two numbers.

Link = Callable[[Tensor, Tensor, int, int], Tensor]


def dimension(x: Tensor, number: int) -> int:
    return number % x.dim()


def cut(x: Tensor, a: int, b: int) -> Tensor:
    at = dimension(x, a)
    return x.narrow(at, b % x.shape[at], 1 + (x.shape[at] - 1 - b % x.shape[at]) // 2)


LINKS: dict[str, Link] = {
    "flatten two": lambda x, _, a, __: x.flatten(a % (x.dim() - 1), a % (x.dim() - 1) + 1),
    "flatten all": lambda x, *_: x.flatten(),
    "split a dimension": lambda x, _, a, b: x.unflatten(dimension(x, a), (2 + b % 2, -1)),
    "view over": lambda x, _, a, b: x.reshape(x.shape[dimension(x, a)], -1),
    "view in another order": lambda x, *_: x.reshape(x.shape[::-1]),
    "transpose": lambda x, _, a, b: x.transpose(dimension(x, a), dimension(x, b)),
    "unsqueeze": lambda x, _, a, __: x.unsqueeze(dimension(x, a)),
    "select": lambda x, _, a, b: x.select(dimension(x, a), b % x.shape[dimension(x, a)]),
    "cut": lambda x, _, a, b: cut(x, a, b),
    "every other": lambda x, *_: x[::2],
    "flip": lambda x, _, a, __: x.flip(dimension(x, a)),
    "roll": lambda x, _, a, b: x.roll(b, dimension(x, a)),
    "repeat_interleave": lambda x, _, a, __: x.repeat_interleave(2, dimension(x, a)),
    "repeat": lambda x, _, a, __: x.repeat([2 if at == dimension(x, a) else 1 for at in range(x.dim())]),
    "expand": lambda x, _, a, b: x.unsqueeze(dimension(x, a)).expand(
        [*x.shape[: dimension(x, a)], 2 + b % 2, *x.shape[dimension(x, a) :]]
    ),
    "cat": lambda x, y, a, __: torch.cat([x, y], dimension(x, a)),
    "stack": lambda x, y, a, __: torch.stack([x, y], dimension(x, a)),
    "pad": lambda x, _, a, b: f.pad(x, [0, 0] * (a % x.dim()) + [b % 2, 1]),
    "unfold": lambda x, _, a, __: x.unfold(dimension(x, a), 2, 1),
    "index": lambda x, _, a, b: x.index_select(
        dimension(x, a), (torch.arange(x.shape[dimension(x, a)]) * (1 + b)) % x.shape[dimension(x, a)]
    ),
    "index of a table": lambda x, *_: weights(5, 2)[(x * 10).long() % 5],
    "sum": lambda x, _, a, __: x.sum(dimension(x, a)),
    "mean, kept": lambda x, _, a, __: x.mean(dimension(x, a), keepdim=True),
    "amax": lambda x, _, a, __: x.amax(dimension(x, a)),
    "softmax": lambda x, _, a, __: x.softmax(dimension(x, a)),
    "cumsum": lambda x, _, a, __: x.cumsum(dimension(x, a)),
    "sort": lambda x, _, a, __: x.sort(dimension(x, a))[0],
    "norm": lambda x, *_: f.layer_norm(x, x.shape[-1:]),
    "linear": lambda x, *_: f.linear(x, weights(3, x.shape[-1])),
    "linear from the left": lambda x, *_: weights(3, x.shape[-2]) @ x,
    "matmul": lambda x, y, *_: x.mT.mT @ y.mT,
    "attention": lambda x, y, *_: f.scaled_dot_product_attention(x, y, y),
    "conv": lambda x, *_: f.conv1d(x, weights(2, x.shape[-2], 2)),
    "pool": lambda x, *_: f.max_pool1d(x, 2),
    "add": lambda x, y, *_: x + y,
    "multiply": lambda x, y, *_: x * y,
    "add a constant": lambda x, _, a, __: x + weights(*x.shape[dimension(x, a) :]),
    "add zeros": lambda x, *_: x + torch.zeros(x.shape),
    "where": lambda x, y, *_: torch.where(x > 0, x, y),
    "masked_fill": lambda x, y, *_: x.masked_fill(y > 0, 0.5),
    "relu": lambda x, *_: x.relu(),
    "in place": lambda x, y, *_: (x * 1).add_(y),
}
Step = tuple[str, int, int, int, int]
STEPS = st.tuples(
    st.sampled_from(sorted(LINKS)), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)
)


def fitting(steps: list[Step], x: Tensor) -> list[Step]:
    """The steps whose shapes fit, each after those before it."""
    found: list[Step] = []
    for step in steps:
        try:
            result = chain([*found, step])(x)
        except (RuntimeError, IndexError, ZeroDivisionError):
            continue
        if result.dim() and 0 < result.numel() < 2000 and result.is_floating_point():
            found.append(step)
    return found


def chain(steps: list[Step]) -> Function:
    """A function that runs one step after the other, mostly on the last result."""

    def run(x: Tensor) -> Tensor:
        values = [x]
        for name, back, other, a, b in steps:
            source = values[-1] if back else values[-1 - (a + b) % len(values)]
            values.append(LINKS[name](source, values[other % len(values)], a, b))
        return values[-1]

    return run


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(st.lists(STEPS, min_size=2, max_size=4), st.booleans(), st.integers(2, 4), st.integers(1, 4))
def test_what_a_sequence_changes_is_its_own_after_chains_of_ops(
    steps: list[Step], fake: bool, batch: int, length: int
) -> None:
    x = torch.randn(batch, length, 4, generator=torch.Generator().manual_seed(0))
    # See "a residual of an index" above.
    followed = [step for step in steps if not (fake and step[0] == "index")]
    run = chain(fitting(followed, x))
    owners = owners_by_watch(run, x, fake=fake)
    assert owners is None or not strangers(run, x, owners)
