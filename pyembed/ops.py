"""The kernels as PyTorch operators (torch.ops.pyembed.*): implementation, fake and autograd, one idiom for all.

CUDA tensors run the compiled kernels, CPU tensors the same kernels in Triton's interpreter. Kernels are imported at the
first call, so that `import pyembed` works where triton is missing.
"""

import contextlib
import importlib

import torch
from torch import Tensor

from . import distinct


def _kernels(name, tensor):
    """A module of pyembed.kernels for this tensor's device, and the context its launches need."""
    if tensor.is_cuda:
        return importlib.import_module(f"pyembed.kernels.{name}"), contextlib.nullcontext()
    interpreter = importlib.import_module("pyembed.kernels.interpreter")
    return interpreter.load(name), interpreter.running()


@torch.library.custom_op("pyembed::embed", mutates_args=())
def embed(ids: Tensor, token: Tensor, position: Tensor | None, position_ids: Tensor | None, padding_idx: int) -> Tensor:
    module, running = _kernels("embed", token)
    with running:
        return module.embed(ids, token, position, position_ids)


@embed.register_fake
def _(ids, token, position, position_ids, padding_idx):
    return token.new_empty(*ids.shape, token.shape[1])


@torch.library.custom_op("pyembed::embed_backward", mutates_args=())
def embed_backward(
    grad: Tensor, ids: Tensor, position_ids: Tensor | None, rows: int, places: int, padding_idx: int
) -> tuple[Tensor, Tensor]:
    """Gradients of a token table of `rows` rows and a position table of `places` rows; 0 rows: not wanted."""
    module, running = _kernels("embed_grad", grad)
    grad = grad.reshape(ids.numel(), grad.shape[-1])
    empty = grad.new_empty(0, grad.shape[-1])
    with running:
        token = module.table_grad(grad, ids.reshape(-1), rows, padding_idx) if rows else empty
        position = module.position_grad(grad, tuple(ids.shape), position_ids, places) if places else empty.clone()
        return token, position


@embed_backward.register_fake
def _(grad, ids, position_ids, rows, places, padding_idx):
    return grad.new_empty(rows, grad.shape[-1]), grad.new_empty(places, grad.shape[-1])


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "pyembed has no gradients of gradients by this plan: run the forward within pyembed.backend('torch') and "
        "pyembed.plan('one_pass')"
    )


def _embed_setup(ctx, inputs, output):
    ids, token, position, position_ids, ctx.padding_idx = inputs
    ctx.rows, ctx.places = token.shape[0], 0 if position is None else position.shape[0]
    ctx.save_for_backward(ids, position_ids)


def _embed_backward(ctx, grad):
    ids, position_ids = ctx.saved_tensors
    _, needs_token, needs_position, *_ = ctx.needs_input_grad
    token, position = embed_backward(
        grad, ids, position_ids, ctx.rows if needs_token else 0, ctx.places if needs_position else 0, ctx.padding_idx
    )
    return None, token if needs_token else None, position if needs_position else None, None, None


embed.register_autograd(_embed_backward, setup_context=_embed_setup)


def _projected_shapes(ids, weight, num_heads, num_kv_heads):
    """Shapes of query, key and value."""
    head_dim = weight.shape[0] // (num_heads + 2 * num_kv_heads)
    return [(*ids.shape, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]


@torch.library.custom_op("pyembed::embed_qkv", mutates_args=())
def embed_qkv(
    ids: Tensor,
    token: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    norm: str,
    eps: float,
    padding_idx: int,
    cos: Tensor | None,
    sin: Tensor | None,
    turn_ids: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """cos, sin (rows, R/2), turn_ids (T,) or (M,) and interleaved are those of rotary.Rotation.
    -> hidden (..., D), query (..., H, d_h), key and value (..., H_kv, d_h), mean (M,) or (0,), rstd (M,) or (0,)."""
    module, running = _kernels("embed_qkv", token)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    with running:
        return module.embed_qkv(
            ids, token, weight, bias, position, position_ids, norm, norm_weight, norm_bias, eps, heads,
            rotary=_rotation(cos, sin, turn_ids, interleaved),
        )  # fmt: skip


@embed_qkv.register_fake
def _(
    ids, token, weight, bias, position, position_ids, norm_weight, norm_bias, num_heads, num_kv_heads, norm, eps, padding_idx,
    cos, sin, turn_ids, interleaved,
):  # fmt: skip
    statistics = distinct.wide_dtype(token.dtype)
    return (
        token.new_empty(*ids.shape, token.shape[1]),
        *(token.new_empty(shape) for shape in _projected_shapes(ids, weight, num_heads, num_kv_heads)),
        token.new_empty(ids.numel() if norm == "layer" else 0, dtype=statistics),
        token.new_empty(ids.numel() if norm != "none" else 0, dtype=statistics),
    )


@torch.library.custom_op("pyembed::embed_qkv_backward", mutates_args=())
def embed_qkv_backward(
    grad_hidden: Tensor | None,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    ids: Tensor,
    token: Tensor,
    weight: Tensor,
    position: Tensor | None,
    position_ids: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_heads: int,
    num_kv_heads: int,
    padding_idx: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (token, weight, bias, position, norm_weight, norm_bias), empty where `needs` says no."""
    module, running = _kernels("embed_grad", token)
    grad_hidden, *grads = _rows(ids, grad_hidden, grad_query, grad_key, grad_value)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    with running:
        found = module.embed_qkv_backward(
            grad_hidden, grads, ids, token, weight, position, position_ids, norm_weight, norm_bias, mean, rstd, heads,
            padding_idx, needs,
        )  # fmt: skip
    return _packed(found, needs, _grads_like(token, weight, position, norm_weight, norm_bias), token)


def _rows(ids, *grads):
    """Gradients as matrices, a row per token; None stays None."""
    M = ids.numel()
    return [None if g is None else g.reshape(M, -1 if M else g.shape[ids.dim() :].numel()) for g in grads]


def _grads_like(token, weight, position, norm_weight, norm_bias):
    """(shape, dtype) of the gradients of token, weight, bias, position, norm_weight and norm_bias."""
    optional = [((), token.dtype) if t is None else (t.shape, t.dtype) for t in (position, norm_weight, norm_bias)]
    return [*((t.shape, t.dtype) for t in (token, weight)), ((weight.shape[0],), weight.dtype), *optional]


@embed_qkv_backward.register_fake
def _fake_grads(grad_hidden, grad_query, grad_key, grad_value, ids, token, weight, position, position_ids, *others):
    norm_weight, norm_bias, *_, needs = others
    likes = zip(needs, _grads_like(token, weight, position, norm_weight, norm_bias), strict=True)
    return tuple(token.new_empty(shape if need else (0,), dtype=dtype) for need, (shape, dtype) in likes)


def _packed(grads, needs, likes, token):
    """An operator returns tensors only: an empty one for a gradient that is not wanted, zeros for one that nothing reached."""
    return tuple(
        token.new_empty(0, dtype=dtype) if not need else token.new_zeros(shape, dtype=dtype) if grad is None else grad
        for grad, need, (shape, dtype) in zip(grads, needs, likes, strict=True)
    )


def _needs(ctx, grads_qkv):
    """Which of token, weight, bias, position, norm_weight, norm_bias want a gradient; hidden's reaches the tables alone."""
    _, token, weight, bias, position, _, norm_weight, norm_bias, *_ = ctx.needs_input_grad
    reached = any(grad is not None for grad in grads_qkv)
    return [token, weight and reached, bias and reached, position, norm_weight and reached, norm_bias and reached]


def _unpacked(ctx, grads, needs):
    """The gradients in the order of the operators' inputs."""
    token, weight, bias, position, norm_weight, norm_bias = (
        grad if need else None for grad, need in zip(grads, needs, strict=True)
    )
    first = (None, token, weight, bias, position, None, norm_weight, norm_bias)
    return *first, *(None,) * (len(ctx.needs_input_grad) - len(first))


def _rotation(cos, sin, turn_ids, interleaved):
    return None if cos is None else (cos, sin, turn_ids, interleaved)


@torch.library.custom_op("pyembed::turn_back", mutates_args=())
def turn_back(grad: Tensor, cos: Tensor, sin: Tensor, turn_ids: Tensor | None, interleaved: bool) -> Tensor:
    """The gradient (..., h, d_h) of turned heads -> of the heads before."""
    module, running = _kernels("rotary", grad)
    with running:
        return module.turn_back(grad, (cos, sin, turn_ids, interleaved))


@turn_back.register_fake
def _(grad, cos, sin, turn_ids, interleaved):
    return grad.new_empty(grad.shape)


def _turned_back(ctx, grads):
    """The gradients of query, key and value as projected, and what else the forward saved."""
    cos, sin, turn_ids, *saved = ctx.saved_tensors
    if cos is not None:
        query, key, value = grads
        turned = (None if g is None else turn_back(g, cos, sin, turn_ids, ctx.interleaved) for g in (query, key))
        grads = *turned, value
    return grads, saved


def _embed_qkv_setup(ctx, inputs, output):
    ids, token, weight, _, position, position_ids, norm_weight, norm_bias, *ctx.heads, _, _, ctx.padding_idx = inputs[:13]
    *turns, ctx.interleaved = inputs[13:]
    *_, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*turns, ids, token, weight, position, position_ids, norm_weight, norm_bias, mean, rstd)


def _embed_qkv_backward(ctx, grad_hidden, *grads):
    needs = _needs(ctx, grads[:3])
    if grad_hidden is None and all(grad is None for grad in grads[:3]):
        return _unpacked(ctx, [None] * 6, needs)
    grads, saved = _turned_back(ctx, grads[:3])
    found = embed_qkv_backward(grad_hidden, *grads, *saved, *ctx.heads, ctx.padding_idx, needs)
    return _unpacked(ctx, found, needs)


embed_qkv.register_autograd(_embed_qkv_backward, setup_context=_embed_qkv_setup)


def count_distinct(ids: Tensor, size: int) -> Tensor:
    """How many distinct rows of a table of `size` rows the ids on a GPU name: (1,) there."""
    module, running = _kernels("distinct", ids)
    with running:
        return module.find(ids, size)[1]


def look_up(ids, token, position, position_ids, projected, shift, norm, eps, heads, factor, rotation):
    """A call by a table, as kernels/triton/expand.py has it; without gradients, so no operator is needed."""
    module, running = _kernels("expand", token)
    with running:
        return module.look_up(ids, token, position, position_ids, projected, shift, norm, eps, heads, factor, rotation)


@torch.library.custom_op("pyembed::distinct_qkv", mutates_args=())
def distinct_qkv(
    ids: Tensor,
    token: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    norm: str,
    eps: float,
    padding_idx: int,
    rows: Tensor | None,
    index: Tensor | None,
    kernels: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    turn_ids: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> hidden, query, key, value, mean and rstd as embed_qkv; projected (·, N), of distinct positions and then of tokens;
    rows of the token table and each token's index (M,) among them, empty where they were given; count (1,) of the rows in use,
    where that is known to the device alone. kernels: by Triton, else by PyTorch's operators (without mean or
    rotary turns)."""
    heads = (num_heads, num_kv_heads, num_kv_heads)
    arguments = (ids, token, weight, bias, position, position_ids, norm_weight, norm_bias, heads, norm, eps, rows, index)
    if kernels:
        module, running = _kernels("distinct", token)
        with running:
            rotary = _rotation(cos, sin, turn_ids, interleaved)
            *results, found_rows, found_index, count = module.forward(*arguments, rotary)
    else:
        hidden, qkv, rstd, projected, found_rows, found_index = distinct.forward(*arguments)
        results = hidden, *qkv, rstd.new_empty(0), rstd, projected
        count = ids.new_empty(0, dtype=torch.int32)
    found = (found_rows, found_index) if rows is None else (ids.new_empty(0), ids.new_empty(0))
    return *results, *found, count


@distinct_qkv.register_fake
def _(
    ids, token, weight, bias, position, position_ids, norm_weight, norm_bias, num_heads, num_kv_heads, norm, eps, padding_idx,
    rows, index, kernels, cos, sin, turn_ids, interleaved,
):  # fmt: skip
    M, N, dtype, wide = ids.numel(), weight.shape[0], torch.int32 if kernels else torch.int64, distinct.wide_dtype(token.dtype)
    size = torch.library.get_ctx().new_dynamic_size
    found = ids.new_empty(0), ids.new_empty(0)
    if rows is None:
        used = torch.sym_min(M, token.shape[0]) if kernels else size()
        found = ids.new_empty(used, dtype=dtype if kernels else ids.dtype), ids.new_empty(M, dtype=dtype)
    return (
        token.new_empty(*ids.shape, token.shape[1]),
        *(token.new_empty(shape) for shape in _projected_shapes(ids, weight, num_heads, num_kv_heads)),
        token.new_empty(M if norm == "layer" and kernels else 0, dtype=wide),
        token.new_empty(M if norm != "none" else 0, dtype=wide),
        token.new_empty(size(), N, dtype=wide if token.dtype == torch.float16 else None),
        *found,
        ids.new_empty(1 if kernels else 0, dtype=torch.int32),
    )


@torch.library.custom_op("pyembed::distinct_qkv_backward", mutates_args=())
def distinct_qkv_backward(
    grad_hidden: Tensor | None,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    ids: Tensor,
    token: Tensor,
    weight: Tensor,
    position: Tensor | None,
    position_ids: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    projected: Tensor,
    rows: Tensor,
    index: Tensor,
    count: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norm: str,
    padding_idx: int,
    kernels: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (token, weight, bias, position, norm_weight, norm_bias), empty where `needs` says no."""
    grad_hidden, *grads = _rows(ids, grad_hidden, grad_query, grad_key, grad_value)
    tensors = (ids, token, weight, position, position_ids, norm_weight, norm_bias)
    options = ((num_heads, num_kv_heads, num_kv_heads), norm, padding_idx, needs)
    if kernels:
        module, running = _kernels("distinct_grad", token)
        with running:
            found = module.backward(grad_hidden, grads, *tensors, mean, rstd, projected, rows, index, count, *options)
    else:
        found = distinct.backward(grad_hidden, grads, *tensors, rstd, projected, rows, index, *options)
    return _packed(found, needs, _grads_like(token, weight, position, norm_weight, norm_bias), token)


distinct_qkv_backward.register_fake(_fake_grads)


def _distinct_setup(ctx, inputs, output):
    ids, token, weight, _, position, position_ids, norm_weight, norm_bias, *ctx.heads = inputs[:10]
    ctx.norm, _, ctx.padding_idx, *given, ctx.kernels = inputs[10:16]
    *turns, ctx.interleaved = inputs[16:]
    *_, mean, rstd, projected, rows, index, count = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd, projected, rows, index, count)
    found = (rows, index) if given[0] is None else given
    tensors = (ids, token, weight, position, position_ids, norm_weight, norm_bias, mean, rstd, projected, *found, count)
    ctx.save_for_backward(*turns, *tensors)


def _distinct_backward(ctx, grad_hidden, *grads):
    needs = _needs(ctx, grads[:3])
    if grad_hidden is None and all(grad is None for grad in grads[:3]):
        return _unpacked(ctx, [None] * 6, needs)
    grads, saved = _turned_back(ctx, grads[:3])
    options = (*ctx.heads, ctx.norm, ctx.padding_idx, ctx.kernels, needs)
    return _unpacked(ctx, distinct_qkv_backward(grad_hidden, *grads, *saved, *options), needs)


distinct_qkv.register_autograd(_distinct_backward, setup_context=_distinct_setup)

for _operator in (embed_backward, embed_qkv_backward, distinct_qkv_backward, turn_back):
    _operator.register_autograd(_no_double_backward)
