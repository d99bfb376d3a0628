"""The kernels as PyTorch operators (torch.ops.pyembed.*): implementation, fake and autograd, one idiom for all.

CUDA tensors run the compiled kernels, CPU tensors the same kernels in Triton's interpreter. Kernels are imported at the
first call, so that `import pyembed` works where triton is missing.
"""

import contextlib
import functools
import importlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import distinct
from . import ids as outside
from .direct import operator


def kernels_for(name, tensor):
    """A module of pyembed.kernels for this tensor's device, and the context its launches need. IndexError: the kernels that ran
    before met an id without a row; on a CPU, those of this call."""
    if is_compiled(tensor):
        outside.look(tensor.device)
        return kernels(name), _as_given("cuda")
    return kernels("interpreter").load(name), _interpreting(tensor.device)


def is_compiled(tensor):
    return tensor.is_cuda


@functools.cache
def kernels(name):
    return importlib.import_module(f"pyembed.kernels.{name}")


def _as_given(device_type):
    """Products within an operator have the dtypes that it was given."""
    casts = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if casts else contextlib.nullcontext()


@contextlib.contextmanager
def _interpreting(device):
    try:
        with kernels("interpreter").running(), _as_given(device.type):
            yield
    except BaseException:
        outside.forget(device)
        raise
    outside.look(device)


def terms_of(position, position_ids, segment=None, segment_ids=None, seed=None, scale=None, dropout=0.0, report=None):
    return kernels("arguments").Terms(position, position_ids, segment, segment_ids, scale, seed, dropout, report)


def refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "pyembed has no gradients of gradients by this plan: run the forward within pyembed.backend('torch') and "
        "pyembed.plan('one_pass')"
    )


def refuse_tangents(*grads):
    """Of a graph made before forward-mode AD began; the operators would lose them unseen."""
    tangents = (forward_ad.unpack_dual(grad).tangent for grad in grads if grad is not None)
    if forward_ad._current_level >= 0 and any(tangent is not None for tangent in tangents):
        raise RuntimeError(
            "pyembed's backward has no forward mode: run the forward within it too, or within pyembed.backend('torch')"
        )


def projected_shapes(ids, weight, num_heads, num_kv_heads):
    """Shapes of query, key and value."""
    head_dim = weight.shape[0] // (num_heads + 2 * num_kv_heads)
    return [(*ids.shape, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]


@operator("pyembed::embed_qkv")
def embed_qkv(
    ids: Tensor,
    token: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    segment: Tensor | None,
    segment_ids: Tensor | None,
    seed: Tensor | None,
    second: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    norm: str,
    eps: float,
    padding_idx: int,
    scale: float | None,
    dropout: float,
    cos: Tensor | None,
    sin: Tensor | None,
    turn_ids: Tensor | None,
    interleaved: bool,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    head_eps: float,
    heads_first: bool,
    reports: bool,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Terms and epilogue are those of kernels/triton/arguments.py; query_norm and key_norm have no backward. weight, bias and
    second may have another dtype, that of query, key and value. reports: whether absent rows are to raise an error.
    -> hidden (..., D), query (..., H, d_h), key and value (..., H_kv, d_h), mean (M,) or (0,), rstd (M,) or (0,)."""
    module, running = kernels_for("embed_qkv", token)
    heads, rotary = (num_heads, num_kv_heads, num_kv_heads), rotation_of(cos, sin, turn_ids, interleaved)
    report = outside.report_of(token.device, ids.shape, reports)
    terms = terms_of(position, position_ids, segment, segment_ids, seed, scale, dropout, report)
    epilogue = kernels("arguments").Epilogue(query_norm, key_norm, head_eps, second, rotary, heads_first)
    with running:
        return module.embed_qkv(
            ids, token, weight, bias, terms, norm, norm_weight, norm_bias, eps, heads, epilogue, batch_invariant=batch_invariant
        )


@embed_qkv.register_fake
def _(
    ids, token, weight, bias, position, position_ids, norm_weight, norm_bias, segment, segment_ids, seed, second, num_heads,
    num_kv_heads, norm, *others,
):  # fmt: skip
    statistics, heads_first = distinct.wide_dtype(token.dtype), others[-3]
    shapes = projected_shapes(ids, weight, num_heads, num_kv_heads)
    if heads_first:
        shapes = [(*shape[:-3], shape[-2], shape[-3], shape[-1]) for shape in shapes]
    if second is not None:
        shapes[0] = (2, *shapes[0])
    return (
        token.new_empty(*ids.shape, token.shape[1]),
        *(weight.new_empty(shape) for shape in shapes),
        token.new_empty(ids.numel() if norm == "layer" else 0, dtype=statistics),
        token.new_empty(ids.numel() if norm != "none" else 0, dtype=statistics),
    )


@operator("pyembed::embed_qkv_backward")
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
    segment: Tensor | None,
    segment_ids: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_heads: int,
    num_kv_heads: int,
    padding_idx: int,
    scale: float | None,
    dropout: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (token, weight, bias, position, norm_weight, norm_bias, segment), empty where `needs` says no."""
    module, running = kernels_for("embed_grad", token)
    grad_hidden, *grads = rows_of(ids, grad_hidden, grad_query, grad_key, grad_value)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    terms = terms_of(position, position_ids, segment, segment_ids, seed, scale, dropout)
    with running:
        found = module.embed_qkv_backward(
            grad_hidden, grads, ids, token, weight, terms, norm_weight, norm_bias, mean, rstd, heads, padding_idx, needs
        )
    return packed(found, needs, grads_like(token, weight, position, norm_weight, norm_bias, segment), token)


@embed_qkv_backward.register_fake
def _(
    grad_hidden, grad_query, grad_key, grad_value, ids, token, weight, position, position_ids, norm_weight, norm_bias, segment,
    *others,
):  # fmt: skip
    return fake_grads(token, others[-1], grads_like(token, weight, position, norm_weight, norm_bias, segment))


def rows_of(ids, *grads):
    """Gradients as matrices, a row per token; None stays None."""
    M = ids.numel()
    return [None if g is None else g.reshape(M, -1 if M else g.shape[ids.dim() :].numel()) for g in grads]


def like_of(tensor, token):
    return ((), token.dtype) if tensor is None else (tensor.shape, tensor.dtype)


def grads_like(token, weight, *optional):
    """(shape, dtype) of the gradients of token, weight and bias, and of what is optional."""
    bias = (weight.shape[0],), weight.dtype
    return [like_of(token, token), like_of(weight, token), bias, *(like_of(t, token) for t in optional)]


def fake_grads(token, needs, likes):
    wanted = zip(needs, likes, strict=True)
    return tuple(token.new_empty(shape if need else (0,), dtype=dtype) for need, (shape, dtype) in wanted)


def packed(grads, needs, likes, token):
    """An operator returns tensors only: an empty one for a gradient that is not wanted, zeros for one that nothing reached."""
    return tuple(
        token.new_empty(0, dtype=dtype) if not need else token.new_zeros(shape, dtype=dtype) if grad is None else grad
        for grad, need, (shape, dtype) in zip(grads, needs, likes, strict=True)
    )


WEIGHTS = (1, 2, 3, 4, 6, 7)  # of the operators' inputs: token, weight, bias, position, norm_weight, norm_bias


def needs_of(ctx, grads_qkv, places=WEIGHTS):
    """Which of these inputs want a gradient; hidden's reaches the tables alone."""
    reached = any(grad is not None for grad in grads_qkv)
    return [ctx.needs_input_grad[place] and (reached or place in (1, 4, 8)) for place in places]


def unpacked(ctx, grads, needs, places=WEIGHTS):
    """The gradients in the order of the operators' inputs."""
    found = [None] * len(ctx.needs_input_grad)
    for place, grad, need in zip(places, grads, needs, strict=True):
        found[place] = grad if need else None
    return tuple(found)


NO_ROTATION = (None, None, None, False)  # of the operators' arguments


def rotation_of(cos, sin, turn_ids, interleaved):
    return None if cos is None else (cos, sin, turn_ids, interleaved)


@operator("pyembed::turn_back")
def turn_back(grad: Tensor, cos: Tensor, sin: Tensor, turn_ids: Tensor | None, interleaved: bool) -> Tensor:
    """The gradient (..., h, d_h) of turned heads -> of the heads before."""
    module, running = kernels_for("rotary", grad)
    with running:
        return module.turn_back(grad, (cos, sin, turn_ids, interleaved))


@turn_back.register_fake
def _(grad, cos, sin, turn_ids, interleaved):
    return grad.new_empty(grad.shape)


def turned_back(ctx, grads):
    """The gradients of query, key and value as projected, and what else the forward saved."""
    cos, sin, turn_ids, *saved = ctx.saved_tensors
    if cos is not None:
        query, key, value = grads
        turned = (None if g is None else turn_back(g, cos, sin, turn_ids, ctx.interleaved) for g in (query, key))
        grads = *turned, value
    return grads, saved


def _embed_qkv_setup(ctx, inputs, output):
    ids, token, weight, _, position, position_ids, norm_weight, norm_bias, *terms, second = inputs[:12]
    *ctx.heads, _, _, ctx.padding_idx, ctx.scale, ctx.dropout = inputs[12:19]
    *turns, ctx.interleaved, query_norm, _, _, ctx.heads_first, _, _ = inputs[19:]
    ctx.has_second, ctx.has_head_norm = second is not None, query_norm is not None
    *_, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*turns, ids, token, weight, position, position_ids, norm_weight, norm_bias, *terms, mean, rstd)


def _embed_qkv_backward(ctx, grad_hidden, *grads):
    refuse_tangents(grad_hidden, *grads)
    if ctx.has_head_norm:
        raise RuntimeError("pyembed::embed_qkv has no gradient of normalised heads: pyembed.functional.embed_qkv has")
    grads, grad_second, places = grads[:3], None, (*WEIGHTS, 8)
    needs = needs_of(ctx, grads, places)
    if grad_hidden is None and all(grad is None for grad in grads):
        return unpacked(ctx, [None] * 7, needs, places)
    if ctx.heads_first:
        grads = [None if g is None else g.transpose(-3, -2) for g in grads]
    if ctx.has_second and grads[0] is not None:
        grad_second = grads[0][1].reshape(-1, grads[0].shape[-2:].numel()).sum(0) if ctx.needs_input_grad[11] else None
        grads = [grads[0].sum(0), *grads[1:]]
    grads, saved = turned_back(ctx, grads)
    found = embed_qkv_backward(grad_hidden, *grads, *saved, *ctx.heads, ctx.padding_idx, ctx.scale, ctx.dropout, needs)
    return unpacked(ctx, [*found, grad_second], [*needs, True], (*places, 11))


embed_qkv.register_autograd(_embed_qkv_backward, setup_context=_embed_qkv_setup)

for _operator in (embed_qkv_backward, turn_back):
    _operator.register_autograd(refuse_double_backward)
