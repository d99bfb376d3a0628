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


def _statistics(token):
    return torch.promote_types(token.dtype, torch.float32)


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
    norm: str,
    eps: float,
    padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> hidden (..., D), qkv (..., N), mean (M,) or (0,), rstd (M,) or (0,)."""
    module, running = _kernels("embed_qkv", token)
    with running:
        return module.embed_qkv(ids, token, weight, bias, position, position_ids, norm, norm_weight, norm_bias, eps)


@embed_qkv.register_fake
def _(ids, token, weight, bias, position, position_ids, norm_weight, norm_bias, norm, eps, padding_idx):
    statistics = _statistics(token)
    return (
        token.new_empty(*ids.shape, token.shape[1]),
        token.new_empty(*ids.shape, weight.shape[0]),
        token.new_empty(ids.numel() if norm == "layer" else 0, dtype=statistics),
        token.new_empty(ids.numel() if norm != "none" else 0, dtype=statistics),
    )


@torch.library.custom_op("pyembed::embed_qkv_backward", mutates_args=())
def embed_qkv_backward(
    grad_hidden: Tensor | None,
    grad_qkv: Tensor | None,
    ids: Tensor,
    token: Tensor,
    weight: Tensor,
    position: Tensor | None,
    position_ids: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    padding_idx: int,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (token, weight, bias, position, norm_weight, norm_bias), empty where `needs` says no."""
    module, running = _kernels("embed_grad", token)
    M = ids.numel()
    with running:
        grads = module.embed_qkv_backward(
            None if grad_hidden is None else grad_hidden.reshape(M, token.shape[1]),
            None if grad_qkv is None else grad_qkv.reshape(M, weight.shape[0]),
            ids, token, weight, position, position_ids, norm_weight, norm_bias, mean, rstd, padding_idx, needs,
        )  # fmt: skip
    return _packed(grads, needs, _grad_shapes(token, weight, position, norm_weight, norm_bias), token)


@embed_qkv_backward.register_fake
def _(
    grad_hidden, grad_qkv, ids, token, weight, position, position_ids, norm_weight, norm_bias, mean, rstd, padding_idx, needs
):
    shapes = _grad_shapes(token, weight, position, norm_weight, norm_bias)
    return [token.new_empty(shape if need else (0,)) for need, shape in zip(needs, shapes, strict=True)]


def _grad_shapes(token, weight, position, norm_weight, norm_bias):
    optional = [() if t is None else t.shape for t in (position, norm_weight, norm_bias)]
    return [token.shape, weight.shape, (weight.shape[0],), *optional]


def _packed(grads, needs, shapes, token):
    """An operator returns tensors only: an empty one for a gradient that is not wanted, zeros for one that nothing reached."""
    return [
        token.new_empty(0) if not need else token.new_zeros(shape) if grad is None else grad
        for grad, need, shape in zip(grads, needs, shapes, strict=True)
    ]


def _needs(ctx, grad_qkv):
    """Which of token, weight, bias, position, norm_weight, norm_bias want a gradient; hidden's reaches the tables alone."""
    _, *needed = ctx.needs_input_grad
    token, weight, bias, position, _, norm_weight, norm_bias = needed[:7]
    reached = grad_qkv is not None
    return [token, weight and reached, bias and reached, position, norm_weight and reached, norm_bias and reached]


def _unpacked(grads, needs):
    """The gradients in the order of the operators' inputs."""
    token, weight, bias, position, norm_weight, norm_bias = (
        grad if need else None for grad, need in zip(grads, needs, strict=True)
    )
    return None, token, weight, bias, position, None, norm_weight, norm_bias, None, None, None


def _embed_qkv_setup(ctx, inputs, output):
    ids, token, weight, _, position, position_ids, norm_weight, norm_bias, _, _, ctx.padding_idx = inputs
    *_, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(ids, token, weight, position, position_ids, norm_weight, norm_bias, mean, rstd)


def _embed_qkv_backward(ctx, grad_hidden, grad_qkv, _mean, _rstd):
    if grad_hidden is None and grad_qkv is None:
        return (None,) * 11
    needs = _needs(ctx, grad_qkv)
    return _unpacked(embed_qkv_backward(grad_hidden, grad_qkv, *ctx.saved_tensors, ctx.padding_idx, needs), needs)


embed_qkv.register_autograd(_embed_qkv_backward, setup_context=_embed_qkv_setup)


@torch.library.custom_op("pyembed::distinct_qkv", mutates_args=(), device_types="cpu")
def distinct_qkv(
    ids: Tensor,
    token: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    position_ids: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    eps: float,
    padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> hidden (..., D), qkv (..., N), rstd (M,) or (0,), projected (P + U, N) of distinct positions and tokens."""
    return distinct.forward(ids, token, weight, bias, position, position_ids, norm_weight, norm_bias, norm, eps)


@distinct_qkv.register_fake
def _(ids, token, weight, bias, position, position_ids, norm_weight, norm_bias, norm, eps, padding_idx):
    M, N = ids.numel(), weight.shape[0]
    rows = torch.library.get_ctx().new_dynamic_size()
    return (
        token.new_empty(*ids.shape, token.shape[1]),
        token.new_empty(*ids.shape, N),
        token.new_empty(M if norm != "none" else 0, dtype=_statistics(token)),
        token.new_empty(rows, N),
    )


@torch.library.custom_op("pyembed::distinct_qkv_backward", mutates_args=(), device_types="cpu")
def distinct_qkv_backward(
    grad_hidden: Tensor | None,
    grad_qkv: Tensor | None,
    ids: Tensor,
    token: Tensor,
    weight: Tensor,
    position: Tensor | None,
    position_ids: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    rstd: Tensor,
    projected: Tensor,
    norm: str,
    padding_idx: int,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (token, weight, bias, position, norm_weight, norm_bias), empty where `needs` says no."""
    M = ids.numel()
    grads = distinct.backward(
        None if grad_hidden is None else grad_hidden.reshape(M, token.shape[1]),
        None if grad_qkv is None else grad_qkv.reshape(M, weight.shape[0]),
        ids, token, weight, position, position_ids, norm_weight, norm_bias, rstd, projected, norm, padding_idx, needs,
    )  # fmt: skip
    return _packed(grads, needs, _grad_shapes(token, weight, position, norm_weight, norm_bias), token)


@distinct_qkv_backward.register_fake
def _(
    grad_hidden,
    grad_qkv,
    ids,
    token,
    weight,
    position,
    position_ids,
    norm_weight,
    norm_bias,
    rstd,
    projected,
    norm,
    padding_idx,
    needs,
):
    shapes = _grad_shapes(token, weight, position, norm_weight, norm_bias)
    return [token.new_empty(shape if need else (0,)) for need, shape in zip(needs, shapes, strict=True)]


def _distinct_setup(ctx, inputs, output):
    ids, token, weight, _, position, position_ids, norm_weight, norm_bias, ctx.norm, _, ctx.padding_idx = inputs
    *_, rstd, projected = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd, projected)
    ctx.save_for_backward(ids, token, weight, position, position_ids, norm_weight, norm_bias, rstd, projected)


def _distinct_backward(ctx, grad_hidden, grad_qkv, _rstd, _projected):
    if grad_hidden is None and grad_qkv is None:
        return (None,) * 11
    needs = _needs(ctx, grad_qkv)
    grads = distinct_qkv_backward(grad_hidden, grad_qkv, *ctx.saved_tensors, ctx.norm, ctx.padding_idx, needs)
    return _unpacked(grads, needs)


distinct_qkv.register_autograd(_distinct_backward, setup_context=_distinct_setup)
