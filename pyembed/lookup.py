"""The gather and positional add as PyTorch operators: pyembed::embed and its backward, differentiable any number of times."""

import contextlib
import importlib

import torch
from torch import Tensor
from torch.autograd import forward_ad


def kernels_of(name, tensor):
    """A module of pyembed.kernels for this tensor's device, and the context its launches need."""
    if tensor.is_cuda:
        return importlib.import_module(f"pyembed.kernels.{name}"), contextlib.nullcontext()
    interpreter = importlib.import_module("pyembed.kernels.interpreter")
    return interpreter.load(name), interpreter.running()


@torch.library.custom_op("pyembed::embed", mutates_args=())
def embed(ids: Tensor, token: Tensor, position: Tensor | None, position_ids: Tensor | None, padding_idx: int) -> Tensor:
    module, running = kernels_of("embed", token)
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
    module, running = kernels_of("embed_grad", grad)
    grad = grad.reshape(ids.numel(), grad.shape[-1])
    empty = grad.new_empty(0, grad.shape[-1])
    with running:
        token = module.table_grad(grad, ids.reshape(-1), rows, padding_idx) if rows else empty
        position = module.position_grad(grad, tuple(ids.shape), position_ids, places) if places else empty.clone()
        return token, position


@embed_backward.register_fake
def _(grad, ids, position_ids, rows, places, padding_idx):
    return grad.new_empty(rows, grad.shape[-1]), grad.new_empty(places, grad.shape[-1])


def _refuse_tangents(*grads):
    """Of a graph made before forward-mode AD began; the operators would lose them unseen."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(grad).tangent is not None for grad in grads):
        raise RuntimeError(
            "pyembed's backward has no forward mode: run the forward within it too, or within pyembed.backend('torch')"
        )


def _embed_setup(ctx, inputs, output):
    ids, token, position, position_ids, ctx.padding_idx = inputs
    ctx.rows, ctx.places = token.shape[0], 0 if position is None else position.shape[0]
    ctx.save_for_backward(ids, position_ids)


def _embed_backward(ctx, grad):
    ids, position_ids = ctx.saved_tensors
    _refuse_tangents(grad)
    _, needs_token, needs_position, *_ = ctx.needs_input_grad
    token, position = embed_backward(
        grad, ids, position_ids, ctx.rows if needs_token else 0, ctx.places if needs_position else 0, ctx.padding_idx
    )
    return None, token if needs_token else None, position if needs_position else None, None, None


embed.register_autograd(_embed_backward, setup_context=_embed_setup)


def _embed_backward_setup(ctx, inputs, output):
    _, ids, position_ids, ctx.rows, ctx.places, ctx.padding_idx = inputs
    ctx.save_for_backward(ids, position_ids)


def _embed_double_backward(ctx, token, position):
    """embed_backward is linear in grad: its transpose gathers what comes for the tables' gradients."""
    _refuse_tangents(token, position)
    ids, position_ids = ctx.saved_tensors
    if not ctx.rows:
        ids, token = torch.zeros_like(ids), token.new_zeros(1, token.shape[1])
    elif ctx.padding_idx >= 0:
        token = token.masked_fill((torch.arange(ctx.rows, device=token.device) == ctx.padding_idx)[:, None], 0.0)
    return embed(ids, token, position if ctx.places else None, position_ids, -1), None, None, None, None, None


embed_backward.register_autograd(_embed_double_backward, setup_context=_embed_backward_setup)
