"""Calls whose time is Python's: by kernels as replays.py has them, on a CPU by PyTorch's operators with little around them.

A decode step is a dozen operators of some microseconds, so what a module does before the first one counts. Here are the usual
calls alone. Each function returns None where its arguments want the long way: there are other options, a compiler is at work,
or another plan may be better; and where a CPU's operators raise, since the long way says what is wrong.
"""

import torch
from torch import Tensor, nn

from . import checks, planner, replays
from . import ids as outside
from .direct import PLAIN
from .reference import HiddenQKV
from .rotary import Rotary, Rotation, as_rotation, rotate

_RAISED = (IndexError, RuntimeError, TypeError, ValueError, AttributeError)  # by what is wrong


def _is_usual(ids, token, id_policy):
    return (
        type(ids) is Tensor
        and type(token) in PLAIN
        and outside.applied(id_policy) in ("raise", "trust")
        and not torch.compiler.is_compiling()
    )


def _on_cpu(ids, token):
    return ids.is_cpu and token.is_cpu and not planner.asks_for_kernels()


def embedding(ids, weight, padding_idx, id_policy):
    """functional.embedding, of a table of any dtype and a call of any size."""
    if not _is_usual(ids, weight, id_policy):
        return None
    if not _on_cpu(ids, weight):
        return replays.embed(ids, weight, None, None, padding_idx, id_policy) if planner.takes(weight) else None
    try:
        return _sum(ids, weight, None, None, padding_idx)
    except _RAISED:
        return None


def embed(ids, token, position, position_ids, padding_idx, id_policy):
    """functional.embed's hidden, of a token's row and a position's, in a call of any size."""
    if not (_is_usual(ids, token, id_policy) and token.is_floating_point()):
        return None
    if not _on_cpu(ids, token):
        return replays.embed(ids, token, position, position_ids, padding_idx, id_policy)
    try:
        return _sum(ids, token, position, position_ids, padding_idx)
    except _RAISED:
        return None


def _sum(ids, token, position, position_ids, padding_idx):
    if padding_idx is None:
        padding_idx = -1
    elif not 0 <= padding_idx < token.shape[0]:
        return None
    if position is None:
        return torch.embedding(token, ids, padding_idx) if position_ids is None else None
    L, D = position.shape
    if not _is_alike(position, token) or token.shape[1] != D:  # PyTorch would promote, or broadcast
        return None
    if position_ids is None:
        T = ids.shape[-1]
        return torch.embedding(token, ids, padding_idx) + position[:T] if T <= L else None
    if not _are_like(position_ids, ids):
        return None
    return torch.embedding(token, ids, padding_idx) + torch.embedding(position, position_ids)


def _is_alike(tensor, token):
    return type(tensor) in PLAIN and tensor.dtype == token.dtype and tensor.is_cpu


def _are_like(position_ids, ids):
    plain = type(position_ids) is Tensor and position_ids.is_cpu
    return plain and (position_ids.shape == ids.shape or position_ids.shape == ids.shape[-1:])


def embed_qkv(
    ids, token, weight, bias, groups, position, position_ids, rotary, norm, norm_weight, norm_bias, eps, padding_idx, id_policy
):  # fmt: skip
    """functional.embed_qkv of few tokens, or in one pass of many. groups: heads of query, key and value."""
    if not (_is_usual(ids, token, id_policy) and token.is_floating_point()):
        return None
    if not _on_cpu(ids, token):
        places, affine = (position, position_ids, rotary), (norm, norm_weight, norm_bias, eps)
        return replays.embed_qkv(ids, token, weight, bias, groups, *places, affine, padding_idx, id_policy)
    if not planner.is_free():
        return None
    for tensor in (weight, bias, norm_weight, norm_bias):
        if tensor is not None and not _is_alike(tensor, token):
            return None
    try:
        total = sum(groups)
        if not planner.is_small(ids, token, weight) or bias is not None and bias.shape != weight.shape[:1] or not eps >= 0:
            return None
        places = None if position is None and isinstance(rotary, Rotary) else position_ids
        hidden = _sum(ids, token, position, places, padding_idx)
        if hidden is None:
            return None
        if norm == "layer":
            normed = torch.layer_norm(hidden, token.shape[1:], norm_weight, norm_bias, eps)
        elif norm_bias is None and (norm == "rms" or norm is None and norm_weight is None):
            normed = hidden if norm is None else torch.rms_norm(hidden, token.shape[1:], norm_weight, eps)
        else:
            return None
        heads = nn.functional.linear(normed, weight, bias).view(*ids.shape, total, weight.shape[0] // total)
        if rotary is None:
            return HiddenQKV(hidden, *torch.split_with_sizes(heads, groups, -2))
        rotation = _rotation(rotary, ids, position_ids, heads.shape[-1])
        if rotation is None:
            return None
        query, key, _ = groups
        turned = rotate(heads.narrow(-2, 0, query + key), rotation)  # half the operators of one by one
        value = heads.narrow(-2, query + key, key)
        return HiddenQKV(hidden, turned.narrow(-2, 0, query), turned.narrow(-2, query, key), value)
    except _RAISED:
        return None


def _rotation(rotary, ids, position_ids, head_dim):
    checks.check_rotary(rotary, ids, head_dim)
    if not isinstance(rotary, Rotary):
        return as_rotation(rotary, ids, None) if all(type(table) is Tensor for table in rotary) else None
    if position_ids is None:
        return as_rotation(rotary, ids, None)
    if not _are_like(position_ids, ids):
        return None
    places = position_ids.reshape(-1)  # looked up, where indexing would count negative ones from the end
    return Rotation(torch.embedding(rotary.cos, places), torch.embedding(rotary.sin, places), None, rotary.interleaved)


def front_end(front, ids, position_ids, rotary):
    """EmbeddingQKV.forward, of stock modules without hooks."""
    if type(ids) is not Tensor:
        return None
    modules = front._modules
    token, position, norm, qkv = modules["token"], modules["position"], modules["norm"], modules["qkv"]
    if (
        modules["segment"] is not None
        or modules["query_norm"] is not None
        or front._keeps_table
        or front.batch_invariant
        or front.heads_first
        or front.scale is not None
        or front.position_offset
        or front.combine != "sum"
        or front._groups
        or norm is None
        or not (_is_plain(token, nn.Embedding) and _is_plain(norm, nn.LayerNorm, nn.RMSNorm) and _is_plain(qkv, nn.Linear))
        or not (position is None or _is_plain(position, nn.Embedding) and position.padding_idx is None and _looks_up(position))
        or not _looks_up(token)
        or token.training
        and modules["dropout"].p
    ):
        return None
    table = token._parameters["weight"]
    eps = torch.finfo(table.dtype).eps if norm.eps is None else norm.eps
    return embed_qkv(
        ids, table, qkv._parameters["weight"], qkv._parameters["bias"],
        (front.num_heads, front.num_kv_heads, front.num_kv_heads),
        None if position is None else position._parameters["weight"], position_ids,
        front._own_rotary(table.device) if rotary is None else rotary,
        "layer" if type(norm) is nn.LayerNorm else "rms", norm._parameters["weight"], norm._parameters.get("bias"), eps,
        token.padding_idx, front._id_policy,
    )  # fmt: skip


def _looks_up(module):
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def _is_plain(module, *kinds):
    """Whether it is of just that class, calls nothing else, and holds its weight as a parameter: attributes are slow."""
    state = module.__dict__
    return (
        type(module) in kinds
        and "weight" in state["_parameters"]
        and not (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        )
    )
