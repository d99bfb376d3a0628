"""hidden as a PyTorch operator: pyembed::embed and its backward, differentiable any number of times."""

import torch
from torch import Tensor

from .direct import operator
from .ids import report_of
from .ops import kernels_for, refuse_tangents, terms_of


@operator("pyembed::embed")
def embed(
    ids: Tensor,
    token: Tensor,
    position: Tensor | None,
    position_ids: Tensor | None,
    segment: Tensor | None,
    segment_ids: Tensor | None,
    seed: Tensor | None,
    scale: float | None,
    dropout: float,
    padding_idx: int,
    reports: bool,
) -> Tensor:
    """The terms are those of kernels/triton/arguments.py. reports: absent rows are to raise an error."""
    module, running = kernels_for("embed", token)
    report = report_of(token.device, ids.shape, reports)
    with running:
        return module.embed(ids, token, terms_of(position, position_ids, segment, segment_ids, seed, scale, dropout, report))


@embed.register_fake
def _(ids, token, *others):
    return token.new_empty(*ids.shape, token.shape[1])


@operator("pyembed::embed_backward")
def embed_backward(
    grad: Tensor,
    ids: Tensor,
    position_ids: Tensor | None,
    segment_ids: Tensor | None,
    seed: Tensor | None,
    scale: float | None,
    dropout: float,
    rows: int,
    places: int,
    kinds: int,
    padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tables of so many tokens, positions and segments; 0: not wanted. No table is asked for: it may have changed
    since the forward."""
    module, running = kernels_for("embed_grad", grad)
    terms, sizes = terms_of(None, position_ids, None, segment_ids, seed, scale, dropout), (rows, places, kinds)
    with running:
        found = module.embed_backward(grad.reshape(ids.numel(), grad.shape[-1]), ids, terms, padding_idx, sizes)
    return tuple(grad.new_empty(0, grad.shape[-1]) if g is None else g for g in found)


@embed_backward.register_fake
def _(grad, ids, position_ids, segment_ids, seed, scale, dropout, rows, places, kinds, padding_idx):
    return tuple(grad.new_empty(size, grad.shape[-1]) for size in (rows, places, kinds))


def _embed_setup(ctx, inputs, output):
    ids, token, position, position_ids, segment, segment_ids, seed, ctx.scale, ctx.dropout, ctx.padding_idx, _ = inputs
    ctx.sizes = [0 if table is None else table.shape[0] for table in (token, position, segment)]
    ctx.save_for_backward(ids, position_ids, segment_ids, seed)


def _embed_backward(ctx, grad):
    refuse_tangents(grad)
    needs = [ctx.needs_input_grad[place] for place in (1, 2, 4)]
    sizes = [size if need else 0 for size, need in zip(ctx.sizes, needs, strict=True)]
    found = embed_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.dropout, *sizes, ctx.padding_idx)
    token, position, segment = (g if need else None for g, need in zip(found, needs, strict=True))
    return None, token, position, None, segment, *(None,) * 6


embed.register_autograd(_embed_backward, setup_context=_embed_setup)


def _embed_backward_setup(ctx, inputs, output):
    _, *tensors, ctx.scale, ctx.dropout, ctx.rows, ctx.places, ctx.kinds, ctx.padding_idx = inputs
    ctx.save_for_backward(*tensors)


def _embed_double_backward(ctx, token, position, segment):
    """embed_backward is linear in grad: its transpose sums and drops, as the forward did, what comes for its gradients."""
    refuse_tangents(token, position, segment)
    ids, position_ids, segment_ids, seed = ctx.saved_tensors
    if not ctx.rows:
        ids, token = torch.zeros_like(ids), token.new_zeros(1, token.shape[1])
    elif ctx.padding_idx >= 0:
        token = token.masked_fill((torch.arange(ctx.rows, device=token.device) == ctx.padding_idx)[:, None], 0.0)
    position, position_ids = (position, position_ids) if ctx.places else (None, None)
    segment, segment_ids = (segment, segment_ids) if ctx.kinds else (None, None)
    found = embed(ids, token, position, position_ids, segment, segment_ids, seed, ctx.scale, ctx.dropout, -1, False)
    return found, *(None,) * 10


embed_backward.register_autograd(_embed_double_backward, setup_context=_embed_backward_setup)
