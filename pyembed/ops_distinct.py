"""The `distinct` plan's operators, and the calls of the plans that need none."""

import torch
from torch import Tensor

from . import distinct
from .direct import operator
from .ids import report_of
from .ops import (
    fake_grads,
    grads_like,
    kernels_for,
    needs_of,
    packed,
    projected_shapes,
    refuse_double_backward,
    refuse_tangents,
    rotation_of,
    rows_of,
    turned_back,
    unpacked,
)


def count_distinct(ids: Tensor, size: int) -> Tensor:
    """How many distinct rows of a table of `size` rows the ids on a GPU name: (1,) there."""
    module, running = kernels_for("distinct", ids)
    with running:
        return module.find(ids, size)[1]


def look_up(ids, token, position, position_ids, projected, shift, norm, eps, heads, factor, rotation, reports):
    """A call by a table, as kernels/triton/expand.py has it; without gradients, so no operator is needed."""
    module, running = kernels_for("expand", token)
    report = report_of(token.device, ids.shape, reports)
    with running:
        return module.look_up(ids, token, position, position_ids, projected, shift, norm, eps, heads, factor, rotation, report)


@operator("pyembed::distinct_qkv")
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
    reports: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> hidden, query, key, value, mean and rstd as embed_qkv; projected (·, N), of distinct positions and then of tokens;
    rows of the token table and each token's index (M,) among them, empty where they were given; count (1,) of the rows in use,
    where that is known to the device alone. kernels: by Triton, else by PyTorch's operators (without mean or
    rotary turns)."""
    heads = (num_heads, num_kv_heads, num_kv_heads)
    arguments = (ids, token, weight, bias, position, position_ids, norm_weight, norm_bias, heads, norm, eps, rows, index)
    if kernels:
        module, running = kernels_for("distinct", token)
        with running:
            rotary = rotation_of(cos, sin, turn_ids, interleaved)
            report = report_of(token.device, ids.shape, reports)
            *results, found_rows, found_index, count = module.forward(*arguments, rotary, report)
    else:
        hidden, qkv, rstd, projected, found_rows, found_index = distinct.forward(*arguments)
        results = hidden, *qkv, rstd.new_empty(0), rstd, projected
        count = ids.new_empty(0, dtype=torch.int32)
    found = (found_rows, found_index) if rows is None else (ids.new_empty(0), ids.new_empty(0))
    return *results, *found, count


@distinct_qkv.register_fake
def _(
    ids, token, weight, bias, position, position_ids, norm_weight, norm_bias, num_heads, num_kv_heads, norm, eps, padding_idx,
    rows, index, kernels, cos, sin, turn_ids, interleaved, reports,
):  # fmt: skip
    M, N, dtype, wide = ids.numel(), weight.shape[0], torch.int32 if kernels else torch.int64, distinct.wide_dtype(token.dtype)
    size = torch.library.get_ctx().new_dynamic_size
    found = ids.new_empty(0), ids.new_empty(0)
    if rows is None:
        used = torch.sym_min(M, token.shape[0]) if kernels else size()
        found = ids.new_empty(used, dtype=dtype if kernels else ids.dtype), ids.new_empty(M, dtype=dtype)
    return (
        token.new_empty(*ids.shape, token.shape[1]),
        *(token.new_empty(shape) for shape in projected_shapes(ids, weight, num_heads, num_kv_heads)),
        token.new_empty(M if norm == "layer" and kernels else 0, dtype=wide),
        token.new_empty(M if norm != "none" else 0, dtype=wide),
        token.new_empty(size(), N, dtype=wide if token.dtype == torch.float16 else None),
        *found,
        ids.new_empty(1 if kernels else 0, dtype=torch.int32),
    )


@operator("pyembed::distinct_qkv_backward")
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
    grad_hidden, *grads = rows_of(ids, grad_hidden, grad_query, grad_key, grad_value)
    tensors = (ids, token, weight, position, position_ids, norm_weight, norm_bias)
    options = ((num_heads, num_kv_heads, num_kv_heads), norm, padding_idx, needs)
    if kernels:
        module, running = kernels_for("distinct_grad", token)
        with running:
            found = module.backward(grad_hidden, grads, *tensors, mean, rstd, projected, rows, index, count, *options)
    else:
        found = distinct.backward(grad_hidden, grads, *tensors, rstd, projected, rows, index, *options)
    return packed(found, needs, grads_like(token, weight, position, norm_weight, norm_bias), token)


@distinct_qkv_backward.register_fake
def _(
    grad_hidden, grad_query, grad_key, grad_value, ids, token, weight, position, position_ids, norm_weight, norm_bias, *others
):  # fmt: skip
    return fake_grads(token, others[-1], grads_like(token, weight, position, norm_weight, norm_bias))


def _distinct_setup(ctx, inputs, output):
    ids, token, weight, _, position, position_ids, norm_weight, norm_bias, *ctx.heads = inputs[:10]
    ctx.norm, _, ctx.padding_idx, *given, ctx.kernels = inputs[10:16]
    *turns, ctx.interleaved, _ = inputs[16:]
    *_, mean, rstd, projected, rows, index, count = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd, projected, rows, index, count)
    found = (rows, index) if given[0] is None else given
    tensors = (ids, token, weight, position, position_ids, norm_weight, norm_bias, mean, rstd, projected, *found, count)
    ctx.save_for_backward(*turns, *tensors)


def _distinct_backward(ctx, grad_hidden, *grads):
    refuse_tangents(grad_hidden, *grads)
    needs = needs_of(ctx, grads[:3])
    if grad_hidden is None and all(grad is None for grad in grads[:3]):
        return unpacked(ctx, [None] * 6, needs)
    grads, saved = turned_back(ctx, grads[:3])
    options = (*ctx.heads, ctx.norm, ctx.padding_idx, ctx.kernels, needs)
    return unpacked(ctx, distinct_qkv_backward(grad_hidden, *grads, *saved, *options), needs)


distinct_qkv.register_autograd(_distinct_backward, setup_context=_distinct_setup)


distinct_qkv_backward.register_autograd(refuse_double_backward)
