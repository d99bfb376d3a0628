"""The operators and functions of DTensors: ids in shards of the batch or the sequence, all else whole on every rank.

Each rank runs its own ids alone; in the backward the gradients of the weights are summed over ranks, as data parallelism does.
"""

import copy

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding

from . import spread
from .reference import HiddenQKV
from .rotary import Rotary


def call(function, arguments):
    """functional.embed or embed_qkv of DTensors: ids (..., T), whole or in shards of any of their dimensions, all else whole.

    Weights in shards are gathered. position_ids and rotary's pair may be Tensors, the same on every rank. Returns DTensors,
    sharded as ids are. TypeError: weights of one kind and ids of the other.
    """
    ids = arguments["ids"]
    if not isinstance(ids, DTensor):
        name, value = next((name, value) for name, value in arguments.items() if isinstance(value, DTensor))
        raise TypeError(
            f"{name}: expected a Tensor, as ids is, got a DTensor {value.placements}. FSDP gathers weights in the "
            "forward of the module that fully_shard was given: all that the front end holds must be in that one"
        )
    mesh, placements, last = ids.device_mesh, ids.placements, ids.dim() - 1
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"ids: expected placements Shard or Replicate, got {placements}")
    if arguments.get("query_biases") is not None:
        raise TypeError("query_biases: expected None with ids that are a DTensor, got a pair")
    rotary, position_ids = arguments.get("rotary"), arguments.get("position_ids")
    heads_first = arguments.pop("heads_first", False)
    held = {name: _whole(name, value, ids) for name, value in arguments.items()}
    counts = arguments.get("position") is not None or isinstance(rotary, Rotary)
    if position_ids is None and counts and any(p.is_shard(last) for p in placements):
        position_ids = torch.arange(ids.shape[-1], device=ids.device)
    if position_ids is not None:
        held["position_ids"] = _share(position_ids, ids, 0)
    if arguments.get("segment_ids") is not None:
        held["segment_ids"] = _share(arguments["segment_ids"], ids, 0)
    if isinstance(rotary, tuple | list):
        held["rotary"] = tuple(_share(table, ids, 1) for table in rotary)
    elif isinstance(rotary, Rotary):
        held["rotary"] = copy.copy(rotary)
        held["rotary"]._buffers = {name: spread.local(table) for name, table in rotary.named_buffers()}
    if any(p.is_shard() for p in placements):
        held.pop("distinct", None)
    found = function(**held | {"ids": ids.to_local()})

    def spread_out(x):
        shape = torch.Size((*ids.shape, *x.shape[ids.dim() :]))
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x.contiguous(), mesh, placements, run_check=False, shape=shape, stride=strides)

    if not isinstance(found, tuple):
        return spread_out(found)
    hidden, *heads = map(spread_out, found)
    return HiddenQKV(hidden, *(x.transpose(-3, -2).contiguous() if heads_first else x for x in heads))


def _whole(name, value, ids):
    """A weight as every rank needs it; its gradient is summed over ranks that have different ids."""
    if not isinstance(value, Tensor) or name in ("ids", "position_ids", "segment_ids"):
        return value
    if not isinstance(value, DTensor):
        if value.requires_grad:
            raise TypeError(f"{name}: expected a DTensor, as ids is, got a Tensor that wants a gradient")
        return value
    if value.device_mesh != ids.device_mesh:
        raise ValueError(f"{name}: expected a DTensor on {ids.device_mesh}, that of ids; got one on {value.device_mesh}")
    grads = [Partial() if placement.is_shard() else Replicate() for placement in ids.placements]
    return value.redistribute(placements=[Replicate()] * len(grads)).to_local(grad_placements=grads)


def _share(x, ids, trailing):
    """This rank's part of x, whose dimensions but the last `trailing` are the last ones of ids, or 1."""
    layouts = _layouts(x.shape[: x.dim() - trailing], ids)
    if isinstance(x, DTensor):
        return x.redistribute(placements=layouts).to_local()
    return distribute_tensor(x, ids.device_mesh, layouts, src_data_rank=None).to_local()


def _layouts(shape, ids, placements=None):
    """Where x of this shape, broadcast against ids, lies when ids lie at their placements."""
    found = []
    for placement in ids.placements if placements is None else placements:
        dim = len(shape) + placement.dim - len(ids.shape) if placement.is_shard() else -1
        follows = dim >= 0 and shape[dim] == ids.shape[placement.dim]
        found.append(Shard(dim) if follows else Replicate())
    return found


def _alone(ids, counts, statistics=False, alike=False):
    """Placements of ids, on one dimension of their mesh, where each rank needs nothing of the others; tables are whole.

    alike: every rank must run the whole.
    counts: places are 0 … T−1 of whole sequences. statistics: some tensors have M rows in the order of the flattened ids, and
    must not be moved where a rank's rows are none of a whole's."""
    dims = range(0 if alike else ids.ndim - counts)
    if statistics and ids.mesh.ndim == 1:
        dims = [p.dim for p in ids.placements if p.is_shard() and p.dim in dims]
    elif statistics:
        dims = [dim for dim in dims if dim == 0 and ids.shape[0] % ids.mesh.size() == 0]
    return [Replicate(), *map(Shard, dims)]


def _follows(x, ids, placement):
    return None if x is None else _layouts(x.shape, ids, [placement])[0]


def _tables(*tensors):
    return [None if tensor is None else Replicate() for tensor in tensors]


def _terms(ids, p, token, position, position_ids, segment, segment_ids, seed):
    places, kinds = (_follows(x, ids, p) for x in (position_ids, segment_ids))
    return [*_tables(token, position), places, *_tables(segment), kinds, *_tables(seed)]


@register_sharding(torch.ops.pyembed.embed.default)
def _shard_embed(ids, token, position, position_ids, segment, segment_ids, seed, *scalars):
    placements = _alone(ids, position is not None and position_ids is None, alike=seed is not None)
    return [
        ([p], [p, *_terms(ids, p, token, position, position_ids, segment, segment_ids, seed), *[None] * 4]) for p in placements
    ]


@register_sharding(torch.ops.pyembed.embed_backward.default)
def _shard_embed_backward(grad, ids, position_ids, segment_ids, seed, scale, dropout, rows, places, *others):
    placements = _alone(ids, places > 0 and position_ids is None, alike=seed is not None)
    follow = (position_ids, segment_ids)
    return [([_sums(p)] * 3, [p, p, *(_follows(x, ids, p) for x in follow), *_tables(seed), *[None] * 6]) for p in placements]


def _sums(placement):
    return Partial() if placement.is_shard() else Replicate()


@register_sharding(torch.ops.pyembed.embed_qkv.default)
def _shard_embed_qkv(ids, token, weight, bias, position, position_ids, norm_weight, norm_bias, segment, segment_ids, *others):
    seed, second, *_, cos, sin, turn_ids, _, query_norm, key_norm, _, heads_first, _, _ = others
    first, last, turns = [token, weight, bias, position], [norm_weight, norm_bias, segment], [cos, sin, turn_ids]
    alike = seed is not None or second is not None or heads_first
    placements = _alone(ids, position is not None and position_ids is None, statistics=True, alike=alike)
    if cos is not None:
        placements = [p for p in placements if p.is_replicate() or p.dim == 0 and _turn_by_place(cos, turn_ids, ids.shape)]
    return [
        (
            [p] * 4 + [Shard(0) if p.is_shard() else p] * 2,
            [
                p,
                *_tables(*first),
                _follows(position_ids, ids, p),
                *_tables(*last),
                _follows(segment_ids, ids, p),
                *_tables(seed, second),
                *[None] * 7,
                *_tables(*turns),
                None,
                *_tables(query_norm, key_norm),
                *[None] * 4,
            ],
        )
        for p in placements
    ]


def _turn_by_place(cos, turn_ids, shape):
    """Whether rows of turns are those of one sequence, out of several."""
    return len(shape) > 1 and (cos if turn_ids is None else turn_ids).shape[0] == shape[-1]


@register_sharding(torch.ops.pyembed.turn_back.default)
def _shard_turn_back(grad, cos, sin, turn_ids, interleaved):
    dims = [0] if _turn_by_place(cos, turn_ids, grad.shape[:-2]) else []
    return [([p], [p, *_tables(cos, sin, turn_ids), None]) for p in (Replicate(), *map(Shard, dims))]


@register_sharding(torch.ops.pyembed.embed_qkv_backward.default)
def _shard_embed_qkv_backward(hidden, query, key, value, ids, token, weight, position, position_ids, *others):
    norm_weight, norm_bias, segment, segment_ids, seed, _, rstd, *_ = others
    placements = _alone(ids, position is not None and position_ids is None, statistics=True, alike=seed is not None)
    if ids.mesh.ndim == 1:  # as the forward ran
        placements = [p for p in placements if p.is_shard() == rstd.placements[0].is_shard()]
    found = []
    for p in placements:
        grads = [None if grad is None else p for grad in (hidden, query, key, value)]
        tables = [*_tables(token, weight, position), _follows(position_ids, ids, p), *_tables(norm_weight, norm_bias, segment)]
        tables += [_follows(segment_ids, ids, p), *_tables(seed)]
        found.append(([_sums(p)] * 7, [*grads, p, *tables, *[Shard(0) if p.is_shard() else p] * 2, *[None] * 6]))
    return found
