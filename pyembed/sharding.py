"""Calls and operators of DTensors: ids in shards of the batch or the sequence, all else whole on every rank.

Each rank runs its own ids alone; in the backward the gradients of the weights are summed over ranks, as data parallelism does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding

from .call import FRONT_END, HIDDEN, LEARNED, LOOKUPS, SCHEMA, TABLES, Call, HiddenQKV
from .modes import local
from .plans import one_pass

Shardings = list[tuple[list[Placement], list[Placement | None]]]  # of results, and of arguments
STATISTICS = ("mean", "rstd")
IDS = tuple(lookup.ids for lookup in LOOKUPS)


def localise(call: Call) -> tuple[Call, Callable[[Any], Any]]:
    """A call of DTensors -> this rank's part of it, and a function that makes DTensors, sharded as ids are, of its results.

    ids (..., T) are whole or in shards of any of their dimensions, all else is whole; weights in shards are gathered.
    Other ids, cosines and sines may be Tensors, the same on every rank. TypeError: weights of one kind and ids of the other.
    """
    fields, ids = call.named(), call.terms.ids
    if not isinstance(ids, DTensor):
        name, value = next((name, value) for name, value in fields.items() if isinstance(value, DTensor))
        raise TypeError(
            f"{name}: expected a Tensor, as ids is, got a DTensor {value.placements}. FSDP gathers weights in the "
            "forward of the module that fully_shard was given: all that the front end holds must be in that one"
        )
    mesh, placements, last = ids.device_mesh, ids.placements, ids.dim() - 1
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"ids: expected placements Shard or Replicate, got {placements}")
    if fields["query_offset"] is not None:
        raise TypeError("query_biases: expected None with ids that are a DTensor, got a pair")
    heads_first, fields["heads_first"] = fields["heads_first"], False
    if fields["position_ids"] is None and fields["position"] is not None and any(p.is_shard(last) for p in placements):
        fields["position_ids"] = torch.arange(ids.shape[-1], device=ids.device)
    turns_by_token = fields["turn_ids"] is None
    own: dict[str, Any] = {"ids": ids.to_local()}
    for name, value in fields.items():
        if name in IDS[1:] and value is not None:
            own[name] = _share(value, ids, 0)
        elif name in ("cos", "sin") and value is not None:
            own[name] = _share(value, ids, 1) if turns_by_token else local(value)
        elif name not in IDS:
            own[name] = _whole(name, value, ids)
    fields |= own
    distinct = None if any(p.is_shard() for p in placements) else call.distinct
    part = FRONT_END.rebuild([fields[name] for name in FRONT_END.names])
    part = part._replace(id_policy=call.id_policy, distinct=distinct, concat=call.concat)

    def spread(x: Tensor) -> DTensor:
        shape = torch.Size((*ids.shape, *x.shape[ids.dim() :]))
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x.contiguous(), mesh, placements, run_check=False, shape=shape, stride=strides)

    def gather(found: Any) -> Any:
        if isinstance(found, Tensor):
            return spread(found)
        hidden, *heads = map(spread, found)
        return HiddenQKV(hidden, *(x.transpose(-3, -2).contiguous() if heads_first else x for x in heads))

    return part, gather


def _whole(name: str, value: Any, ids: DTensor) -> Any:
    """A weight as every rank needs it; its gradient is summed over ranks that have different ids."""
    if not isinstance(value, Tensor):
        return value
    if not isinstance(value, DTensor):
        if value.requires_grad:
            raise TypeError(f"{name}: expected a DTensor, as ids is, got a Tensor that wants a gradient")
        return value
    if value.device_mesh != ids.device_mesh:
        raise ValueError(f"{name}: expected a DTensor on {ids.device_mesh}, that of ids; got one on {value.device_mesh}")
    grads = [Partial() if placement.is_shard() else Replicate() for placement in ids.placements]
    return value.redistribute(placements=[Replicate()] * len(grads)).to_local(grad_placements=grads)


def _share(x: Tensor, ids: DTensor, trailing: int) -> Tensor:
    """This rank's part of x, whose dimensions but the last `trailing` are the last ones of ids, or 1."""
    layouts = _layouts(x.shape[: x.dim() - trailing], ids)
    if isinstance(x, DTensor):
        return x.redistribute(placements=layouts).to_local()
    return distribute_tensor(x, ids.device_mesh, layouts, src_data_rank=None).to_local()


def _layouts(shape: torch.Size, ids: Any, placements: Sequence[Placement] | None = None) -> list[Placement]:
    """Where x of this shape, broadcast against ids, lies when ids lie at their placements."""
    found: list[Placement] = []
    for placement in ids.placements if placements is None else placements:
        dim = len(shape) + placement.dim - len(ids.shape) if isinstance(placement, Shard) else -1
        follows = dim >= 0 and shape[dim] == ids.shape[dim - len(shape)]
        found.append(Shard(dim) if follows else Replicate())
    return found


def _dims(fields: dict[str, Any], needs_alone: bool = True) -> list[Placement]:
    """Placements of ids, on one dimension of their mesh, where each rank needs nothing of the others; tables are whole."""
    ids = fields["ids"]
    if fields["seed"] is not None:  # dropout counts elements of the whole
        return [Replicate()]
    counts = fields["position"] is not None and fields["position_ids"] is None  # 0 … T−1 of whole sequences
    dims = list(range(ids.ndim - counts))
    if needs_alone:
        # Statistics have M rows in the order of the flattened ids, which must be a rank's own.
        if ids.mesh.ndim == 1:
            dims = [p.dim for p in ids.placements if p.is_shard() and p.dim in dims]
        else:
            dims = [dim for dim in dims if dim == 0 and ids.shape[0] % ids.mesh.size() == 0]
    if fields.get("query_offset") is not None or fields.get("heads_first"):
        dims = []
    if fields.get("cos") is not None:
        dims = [dim for dim in dims if dim == 0 and _turns_by_place(fields)]
    return [Replicate(), *map(Shard, dims)]


def _turns_by_place(fields: dict[str, Any]) -> bool:
    """Whether rows of turns are those of one sequence, out of several."""
    cos, turn_ids, shape = fields["cos"], fields["turn_ids"], fields["ids"].shape
    rows = cos.shape[:-1] if turn_ids is None else turn_ids.shape
    return len(shape) > 1 and rows.numel() == shape[-1]


def _placed(fields: dict[str, Any], placement: Placement) -> dict[str, Placement | None]:
    """Where each field lies when ids lie there; None for what is no tensor."""
    found: dict[str, Placement | None] = {}
    for name, value in fields.items():
        is_tensor = "Tensor" in SCHEMA[name] and value is not None
        found[name] = Replicate() if is_tensor else None
        if is_tensor and name in IDS:
            found[name] = placement if name == "ids" else _layouts(value.shape, fields["ids"], [placement])[0]
    return found


def _rows(placement: Placement) -> Placement:
    """Of a tensor with a row for each token."""
    return Shard(0) if placement.is_shard() else placement


def _sums(placement: Placement) -> Placement:
    return Partial() if placement.is_shard() else Replicate()


@register_sharding(torch.ops.pyembed.embed.default)
def _shard_embed(*arguments: Any) -> Shardings:
    fields = dict(zip(HIDDEN.names, arguments, strict=True))
    return [([p], [*_placed(fields, p).values()]) for p in _dims(fields, needs_alone=False)]


@register_sharding(torch.ops.pyembed.embed_backward.default)
def _shard_embed_backward(grad: Any, *arguments: Any) -> Shardings:
    names = [name for name in HIDDEN.names if name not in (*TABLES, "reports")]
    *values, sizes = arguments
    fields = dict(zip(names, values, strict=True))
    by_name = dict(zip(TABLES, sizes, strict=True))
    wanted = fields | {"position": by_name["position"] or None}
    return [([_sums(p)] * len(TABLES), [p, *_placed(fields, p).values(), None]) for p in _dims(wanted, needs_alone=False)]


@register_sharding(torch.ops.pyembed.embed_qkv.default)
def _shard_embed_qkv(*arguments: Any) -> Shardings:
    fields = dict(zip(FRONT_END.names, arguments, strict=True))
    outputs = one_pass.embed_qkv.outputs
    return [
        ([_rows(p) if name in STATISTICS else p for name in outputs], [*_placed(fields, p).values()]) for p in _dims(fields)
    ]


@register_sharding(torch.ops.pyembed.embed_qkv_backward.default)
def _shard_embed_qkv_backward(*arguments: Any) -> Shardings:
    named = dict(zip(one_pass.embed_qkv.backward.names, arguments, strict=True))
    fields = {name: named[name] for name in FRONT_END.names}
    placements = _dims(fields)
    if fields["ids"].mesh.ndim == 1:  # as the forward ran
        placements = [p for p in placements if p.is_shard() == named["rstd"].placements[0].is_shard()]
    found = []
    for p in placements:
        placed = dict.fromkeys(named) | _placed(fields, p) | dict.fromkeys(STATISTICS, _rows(p))
        placed |= {name: p for name, value in named.items() if name.startswith("grad_") and value is not None}
        found.append(([_sums(p)] * len(LEARNED), list(placed.values())))
    return found
