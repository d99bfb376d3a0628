"""Calls on a CPU whose time is Python's: PyTorch's operators, and as little as can be around them.

A decode step is a dozen operators of some microseconds, so what a module does before the first one counts. Here are the usual
calls alone. Each function returns None where its arguments want the long way: kernels or a plan were asked for, a compiler is
at work, there are other options, the call is large, or it is wrong, and the long way says how.
"""

import torch
from torch import Tensor, nn

from . import ids as outside
from . import planner
from .checks import check_rotary
from .reference import HiddenQKV
from .rotary import Rotary, Rotation, as_rotation, rotate

_PLAIN = (Tensor, nn.Parameter)  # no subclass, which may bring operators of its own
_REFUSALS = (IndexError, RuntimeError, TypeError, AttributeError)


def serves(ids, token, id_policy):
    """Whether PyTorch's operators run a lookup, and nothing is to be looked at first."""
    return (
        type(ids) is Tensor
        and type(token) in _PLAIN
        and ids.is_cpu
        and token.is_cpu
        and planner.is_by_torch()
        and outside.applied(id_policy) in ("raise", "trust")
        and not torch.compiler.is_compiling()
    )


def embed(ids, token, position, position_ids, padding_idx, id_policy):
    """functional.embed's hidden, of a token's row and a position's."""
    if not serves(ids, token, id_policy):
        return None
    try:
        return _sum(ids, token, position, position_ids, padding_idx)
    except _REFUSALS:
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
    return type(tensor) in _PLAIN and tensor.dtype == token.dtype and tensor.is_cpu


def _are_like(position_ids, ids):
    plain = type(position_ids) is Tensor and position_ids.is_cpu
    return plain and (position_ids.shape == ids.shape or position_ids.shape == ids.shape[-1:])


def embed_qkv(
    ids, token, weight, bias, groups, position, position_ids, rotary, norm, norm_weight, norm_bias, eps, padding_idx, id_policy
):  # fmt: skip
    """functional.embed_qkv, of the arguments that most models have. groups: heads of query, key and value; rotary: a Rotary."""
    if not (planner.is_free() and serves(ids, token, id_policy)):
        return None
    for tensor in (weight, bias, norm_weight, norm_bias):
        if tensor is not None and not _is_alike(tensor, token):
            return None
    try:
        if not planner.is_small(ids, token, weight):
            return None
        total = sum(groups)
        if bias is not None and bias.shape != weight.shape[:1] or not eps >= 0:
            return None
        hidden = _sum(ids, token, position, None if position is None and rotary is not None else position_ids, padding_idx)
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
        turned, value = torch.split_with_sizes(heads, (groups[0] + groups[1], groups[2]), -2)
        query, key = torch.split_with_sizes(rotate(turned, rotation), groups[:2], -2)  # half the operators of one by one
        return HiddenQKV(hidden, query, key, value)
    except _REFUSALS:
        return None


def _rotation(rotary, ids, position_ids, head_dim):
    if type(rotary) is not Rotary or not rotary.cos.is_cpu:
        return None
    check_rotary(rotary, ids, head_dim)
    if position_ids is None:
        return as_rotation(rotary, ids, None)
    if not _are_like(position_ids, ids):
        return None
    places = position_ids.reshape(-1)  # looked up, where indexing would count negative ones from the end
    return Rotation(torch.embedding(rotary.cos, places), torch.embedding(rotary.sin, places), None, rotary.interleaved)


def front_end(front, ids, position_ids):
    """EmbeddingQKV.forward, of stock modules without hooks."""
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
    # A module's attributes are slow; these are its own, computed by nothing, since its class is PyTorch's.
    weights, projection, gamma = token._parameters, qkv._parameters, norm._parameters
    places = None if position is None else position._parameters["weight"]
    kind, eps = ("layer", norm.eps) if type(norm) is nn.LayerNorm else ("rms", norm.eps)
    table = weights["weight"]
    eps = torch.finfo(table.dtype).eps if eps is None else eps
    groups = (front.num_heads, front.num_kv_heads, front.num_kv_heads)
    return embed_qkv(
        ids, table, projection["weight"], projection["bias"], groups, places, position_ids,
        modules["rotary"], kind, gamma["weight"], gamma.get("bias"), eps, token.padding_idx, front._id_policy,
    )  # fmt: skip


def _looks_up(module):
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def _is_plain(module, *kinds):
    """Whether it is of just that class, and calls nothing else."""
    state = module.__dict__
    return type(module) in kinds and not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )
