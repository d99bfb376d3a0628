"""What arguments must be. Every error names the argument, what was expected and what came.

check looks at types, shapes, dtypes and devices of a Call, once for all calls that are alike in these; check_ranges looks at
the values of ids, where that costs no synchronisation.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .call import BY_PLACE, LOOKUPS, PROJECTING, TABLES, Call, Called, DistinctIds, Norm, Projection, rows_of, wide_dtype
from .modes import autocast_dtype, can_read

NORMS = ("layer", "rms", None)


# What PyTorch's operators raise for the same arguments is a base too, so that code that was written for them catches it.
class TensorTypeError(TypeError, RuntimeError):
    """A tensor of another dtype."""


class TensorValueError(ValueError, RuntimeError):
    """A tensor of another shape, or on another device."""


class EmptyTableError(IndexError, RuntimeError):
    """A table has no rows, and an id wants one."""


def check(call: Call) -> None:
    """A whole call, but for the values of ids."""
    fields = call.named()
    _check_terms(call, fields)
    if call.projection is not None:
        _check_front_end(call, call.projection)
    _check_alike(fields)
    _check_positions(call)
    check_distinct(call.distinct, call.terms.ids)


def class_of(value: Any) -> str:
    """Its class with the module that it comes from, since many libraries have an Embedding; PyTorch's as nn.Embedding."""
    kind = type(value)
    if kind.__module__.startswith("torch.nn.modules."):
        return f"nn.{kind.__qualname__}"
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def check_integers(name: str, ids: Any) -> None:
    """ids of one of the dtypes that PyTorch takes."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(ids).__name__}")
    if ids.layout not in (torch.strided, torch.jagged):
        raise TensorTypeError(f"{name}: expected a dense Tensor, got one of layout {ids.layout}: take {name}.to_dense()")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TensorTypeError(f"{name}: expected dtype torch.int32 or torch.int64, got {ids.dtype}")


def check_shape(name: str, tensor: Any, shape: tuple[int | None, ...], meaning: str, optional: bool = True) -> None:
    """shape holds None where any size will do."""
    if isinstance(tensor, Called) or tensor is None and optional:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, tensor.shape, strict=True)):
        wanted = str(tuple("any" if size is None else size for size in shape)).replace("'", "")
        raise TensorValueError(f"{name}: expected shape {wanted}, {meaning}; got {tuple(tensor.shape)}")


def check_heads(num_heads: int, num_kv_heads: int | None) -> int:
    """num_kv_heads, num_heads where it is None."""
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    for name, heads in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if not isinstance(heads, int) or heads < 1:
            raise ValueError(f"{name}: expected a positive int, got {heads!r}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads: expected a multiple of num_kv_heads ({num_kv_heads}), got {num_heads}")
    return num_kv_heads


def _check_terms(call: Call, fields: dict[str, Any]) -> None:
    """What hidden is the sum of, and all ids."""
    terms, scale, dropout = call.terms, call.terms.scale, call.terms.dropout
    for lookup in LOOKUPS:
        ids = fields[lookup.ids]
        if ids is not None or lookup.ids == "ids":
            check_integers(lookup.ids_name, ids)
            has_places = terms.position is not None or call.epilogue.cos is not None
            if ids.is_nested and (ids.layout is not torch.jagged or has_places):
                raise TensorTypeError(
                    f"{lookup.ids_name}: expected a Tensor that is not nested, got sequences of different lengths: pad them "
                    "(positions.from_attention_mask), or put them behind one another (positions.from_cu_seqlens)"
                )
    check_shape("token", terms.token, (None, None), "(num_embeddings, embedding_dim)", optional=False)
    width = None if isinstance(terms.token, Called) else terms.token.shape[1]
    if isinstance(terms.position, Tensor) and terms.position.dtype == torch.int64:
        check_shape("position", terms.position, (2, width), "steps and beginnings, as positions.sinusoidal_steps has them")
    for name in TABLES:
        if not (name == "position" and call.concat):
            check_shape(name, fields[name], (None, width), "(rows, embedding_dim of token)")
    for lookup in LOOKUPS:
        table, given = fields[lookup.table], fields[lookup.ids]
        if given is not None and table is None:
            raise ValueError(f"{lookup.ids}: expected None where there is no table of {lookup.table}s, got a Tensor")
        # Without position_ids the length is compared; without other ids all are 0.
        used = given.numel() if given is not None else lookup.table not in BY_PLACE
        if table is not None and used and terms.ids.numel() and rows_of(table) == 0:
            raise EmptyTableError(f"{lookup.table_name}: expected a row for each of {lookup.ids_name}, got a table of 0 rows")
    if not isinstance(dropout, int | float):
        raise TypeError(f"dropout: expected a number, got {type(dropout).__name__}")
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")


def _check_front_end(call: Call, projection: Projection) -> None:
    """Norm, projection and epilogue."""
    token = call.terms.token
    weight, bias, num_heads, num_kv_heads, *_ = projection
    width = None if isinstance(token, Called) else token.shape[1]
    check_heads(num_heads, num_kv_heads or num_heads)  # no key heads: all of weight's outputs are one tensor
    if call.norm.kind != "called":
        _check_norm(call.norm, width)
    if isinstance(weight, Called):
        check_epilogue(call, None)
        return
    if projection.own:
        head_dim = weight.shape[0] // num_heads
        for part, (heads, (own_weight, own_bias)) in enumerate(zip(projection.groups, projection.own, strict=True)):
            rows, meaning = heads * head_dim, "(heads·head_dim, embedding_dim of token)"
            check_shape(f"qkv.{part}.weight", own_weight, (rows, width), meaning, optional=False)
            check_shape(f"qkv.{part}.bias", own_bias, (rows,), "the rows of its weight")
    else:
        check_shape("weight", weight, (None, width), "(query, key and value rows, embedding_dim of token)", optional=False)
        check_shape("bias", bias, (weight.shape[0],), "the rows of weight")
        total = num_heads + 2 * num_kv_heads
        if weight.shape[0] % total:
            raise ValueError(f"weight: expected a multiple of num_heads + 2·num_kv_heads = {total} rows, got {weight.shape[0]}")
    check_epilogue(call, call.head_dim)
    query_norm, key_norm, *_ = call.epilogue
    check_shape("query_norm", query_norm, (call.head_dim,), "head_dim", optional=key_norm is None)
    check_shape("key_norm", key_norm, (call.head_dim,), "head_dim", optional=query_norm is None)


def check_epilogue(call: Call, head_dim: int | None) -> None:
    """What comes after the projection, but for the weights of norms: rotary turns fit the heads and stand where ids do.

    head_dim: None where the projection is a module, which alone knows it."""
    ids, cos = call.terms.ids, call.epilogue.cos
    if not call.epilogue.head_eps >= 0:
        raise ValueError(f"head_eps: expected a number of at least 0, got {call.epilogue.head_eps}")
    if call.epilogue.heads_first and ids.dim() == 0:
        raise ValueError("heads_first: expected False for ids of shape (), which have no length to come behind heads; got True")
    if cos is None:
        return
    if cos.device != ids.device:
        raise TensorValueError(f"rotary: expected device {ids.device}, that of ids; got {cos.device}")
    width = 2 * cos.shape[-1]
    if head_dim is not None and (width > head_dim or head_dim % 2):
        raise ValueError(f"rotary: expected an even width up to an even head_dim ({head_dim}), got {width}")


def _check_norm(norm: Norm, width: int | None) -> None:
    kind = None if norm.kind == "none" else norm.kind
    check_shape("norm_weight", norm.weight, (width,), "embedding_dim of token")
    check_shape("norm_bias", norm.bias, (width,), "embedding_dim of token")
    if kind not in NORMS:
        raise ValueError(f"norm: expected one of {NORMS}, got {kind!r}")
    if kind is None and norm.weight is not None or kind != "layer" and norm.bias is not None:
        raise ValueError(f"norm_weight, norm_bias: norm {kind!r} takes no such parameter, got one")
    if not norm.eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {norm.eps}")


def _check_alike(fields: dict[str, Any]) -> None:
    """All tensors on the table's device, all floating ones of its dtype, or cast to another for a product."""
    token = _tensor(fields["token"])
    if isinstance(fields["token"], Called) and (token is None or _brings_weights(fields["token"])):
        return
    if not token.is_floating_point():
        raise TensorTypeError(f"token: expected a floating dtype, got {token.dtype}")
    cast, names = autocast_dtype(token), {"turn_ids": "position_ids"}
    if fields["key_weight"] is not None:
        parts = (f"qkv.{part}.{name}" for name in ("weight", "bias") for part in range(3))
        names |= zip(("weight", "key_weight", "value_weight", "bias", "key_bias", "value_bias"), parts, strict=True)
    for name, value in fields.items():
        if name in ("cos", "sin", "seed") or not isinstance(value, Tensor):
            continue
        projects, name = name in PROJECTING, names.get(name, name)
        if value.device != token.device:
            raise TensorValueError(f"{name}: expected device {token.device}, that of token; got {value.device}")
        dtypes = {token.dtype}
        if "norm" in name:
            dtypes.add(wide_dtype(token.dtype))
        if name == "position":
            dtypes.add(torch.int64)  # positions.sinusoidal_steps
        if projects and cast:
            dtypes |= {torch.float32, torch.float16, torch.bfloat16}  # which the product casts
        if not name.endswith("ids") and value.dtype not in dtypes:
            raise TensorTypeError(f"{name}: expected dtype {token.dtype}, that of token; got {value.dtype}")
    weight, bias = fields["norm_weight"], fields["norm_bias"]
    if isinstance(weight, Tensor) and bias is not None and weight.dtype != bias.dtype:
        raise TensorTypeError(f"norm_bias: expected dtype {weight.dtype}, that of norm_weight; got {bias.dtype}")
    for name, value in fields.items():
        if isinstance(value, Called) and not _brings_weights(value):
            _check_devices({"weight": "qkv", "norm_weight": "norm"}.get(name, name), value, token.device)


def _check_devices(name: str, called: Called, device: torch.device) -> None:
    for key, tensor in (*called.module.named_parameters(), *called.module.named_buffers()):
        if tensor.device != device:
            raise TensorValueError(f"{name}.{key}: expected device {device}, that of token; got {tensor.device}")


def _brings_weights(called: Called) -> bool:
    """Whether what runs before the forward may bring the weights from another device, as accelerate's offloading does."""
    return any("forward" in part.__dict__ or part._forward_pre_hooks for part in called.module.modules())


def _tensor(value: Any) -> Any:
    return value.weight if isinstance(value, Called) else value


def _check_positions(call: Call) -> None:
    """Shapes of ids beside ids, and tables long enough for 0 … T−1."""
    terms, epilogue = call.terms, call.epilogue
    for _, _, name, tensor in _lookups(call):
        if tensor is not terms.ids:
            _check_like_ids(name, tensor, terms.ids)
    for name, table, ids in (("position", terms.position, terms.position_ids), ("rotary", epilogue.cos, epilogue.turn_ids)):
        if table is None or ids is not None or call.id_policy in ("clamp", "zero"):
            continue
        rows = rows_of(table) if name == "position" else table.shape[-2] if table.dim() > 1 else 1
        if rows is not None and rows < terms.length:
            needs = f"sequence length {terms.length} needs positions up to {terms.length - 1}"
            raise IndexError(f"ids: {needs}, {name} has {rows} rows")


def _lookups(call: Call) -> Iterator[tuple[Any, str, str, Tensor]]:
    """(table, its name, name of ids, ids) of the tables that the call looks up by given ids."""
    for lookup in LOOKUPS:
        part = getattr(call, lookup.part)
        ids, table = getattr(part, lookup.ids), getattr(part, lookup.table)
        if ids is not None and table is not None:
            yield table, lookup.table_name, lookup.ids_name, ids


def _check_like_ids(name: str, tensor: Tensor, ids: Tensor) -> None:
    """Only shapes of equal rank are compared: comparing others would add a guard to a graph for any number of tokens."""
    shapes = tuple(ids.shape[-1:]), (1,) * (ids.dim() - 1) + tuple(ids.shape[-1:]), tuple(ids.shape)
    if not any(len(shape) == tensor.dim() and shape == tuple(tensor.shape) for shape in shapes):
        wanted = " or ".join(dict.fromkeys(map(str, shapes)))
        raise TensorValueError(f"{name}: expected shape {wanted} for ids {tuple(ids.shape)}, got {tuple(tensor.shape)}")


def check_query_biases(query_biases: Any, call: Call, head_dim: int) -> None:
    """A pair (H, d_h) of biases, in a call that is right but for them."""
    if call.epilogue.query_norm is not None or call.epilogue.cos is not None:
        raise ValueError("query_biases: expected None where heads are normalised or turned (which comes first?), got a pair")
    if not isinstance(query_biases, tuple | list) or len(query_biases) != 2:
        raise TypeError(f"query_biases: expected a pair of Tensors or None, got {type(query_biases).__name__}")
    token, projection = _tensor(call.terms.token), call.projection
    assert projection is not None
    for bias in query_biases:
        check_shape("query_biases", bias, (projection.num_heads, head_dim), "(num_heads, head_dim)", optional=False)
        if bias.device != token.device:
            raise TensorValueError(f"query_biases: expected device {token.device}, that of token; got {bias.device}")
        if bias.dtype != token.dtype:
            raise TensorTypeError(f"query_biases: expected dtype {token.dtype}, that of token; got {bias.dtype}")


def check_ranges(call: Call) -> None:
    """IndexError that names the first id outside its table, its place and the table's size; where looking costs no wait."""
    if can_read(call.terms.ids):
        compare_ranges(call)


def compare_ranges(call: Call) -> None:
    """check_ranges of ids that are known to be readable."""
    for table, of, name, ids in _lookups(call):
        rows = rows_of(table)
        if rows is not None:
            check_range(name, table.in_table(ids) if isinstance(table, Called) else ids, of, rows)


def check_range(name: str, ids: Tensor, table: str, size: int) -> None:
    if ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if low < 0 or high >= size:
        place, kind = tuple(((ids < 0) | (ids >= size)).nonzero()[0].tolist()), IndexError if size else EmptyTableError
        raise kind(f"{name}: expected values in [0, {size}), the rows of {table}; got {ids[place].item()} at {place}")


def check_distinct(distinct: DistinctIds | None, ids: Tensor) -> None:
    """distinct matches ids: shapes always, values where looking costs no synchronisation."""
    if distinct is None:
        return
    if not isinstance(distinct, DistinctIds):
        raise TypeError(f"distinct: expected a DistinctIds, got {type(distinct).__name__}")
    for name, tensor, shape in (("distinct.ids", distinct.ids, (None,)), ("distinct.inverse", distinct.inverse, ids.shape)):
        check_integers(name, tensor)
        check_shape(name, tensor, tuple(shape), "sorted ids, and the place of each of the batch's ids among them")
        if tensor.device != ids.device:
            raise TensorValueError(f"{name}: expected device {ids.device}, that of ids; got {tensor.device}")
    if not can_read(ids):
        return
    if distinct.ids.numel() > 1 and not (distinct.ids[1:] > distinct.ids[:-1]).all():
        raise ValueError("distinct.ids: expected each id once, in ascending order, as torch.unique gives them")
    check_range("distinct.inverse", distinct.inverse, "distinct.ids", distinct.ids.numel())
    same = distinct.ids.index_select(0, distinct.inverse.reshape(-1)) == ids.reshape(-1)
    if not same.all():
        first = int(same.logical_not().nonzero()[0])
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), ids.shape))
        found = distinct.ids[distinct.inverse.reshape(-1)[first]].item()
        raise ValueError(f"distinct: expected the ids of this batch, {ids[place].item()} at {place}; got {found}")
