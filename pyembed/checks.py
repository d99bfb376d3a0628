"""What arguments must be. Every error names the argument, what was expected and what came."""

import functools

import torch
from torch import Tensor

from . import planner
from .direct import PLAIN, is_heard
from .distinct import DistinctIds
from .ids import given_places
from .reference import rows_of
from .rotary import Rotary

NORMS = ("layer", "rms", None)
PASSED = 4096  # calls that a check remembers: more than a training run has shapes


def remembered(check):
    """check(*arguments), which looks at shapes, dtypes and devices of Tensors alone: not again at those that it has passed."""
    passed = set()

    @functools.wraps(check)
    def call(*arguments):
        key = None if is_heard() else _signature(arguments)  # sizes are Tensors while torch.jit traces
        if key is None:
            check(*arguments)
        elif key not in passed:
            check(*arguments)
            if len(passed) >= PASSED:
                passed.clear()
            passed.add(key)

    return call


def _signature(arguments):
    """All that shapes, dtypes and devices say of them; None: there is a value of another class, or of a subclass."""
    signature = []
    for value in arguments:
        if value is None or type(value) in (bool, int, str, torch.dtype):
            signature.append((type(value), value))  # True is 1 as a key
        elif type(value) in PLAIN:
            signature.append((value.shape, value.dtype, value.device))
        elif type(value) is float:
            signature.append(value)
        else:
            return None
    return tuple(signature)


def check_integers(name: str, ids: Tensor):
    """ids of one of the dtypes that PyTorch takes."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype torch.int32 or torch.int64, got {ids.dtype}")


def check_shape(name: str, tensor: Tensor | None, shape: tuple, meaning: str, optional=True):
    """shape holds None where any size will do."""
    if tensor is None and optional:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, tensor.shape, strict=True)):
        wanted = str(tuple("any" if size is None else size for size in shape)).replace("'", "")
        raise ValueError(f"{name}: expected shape {wanted}, {meaning}; got {tuple(tensor.shape)}")


def check_alike(token: Tensor, ids: Tensor | None, cast: torch.dtype | None = None, **others: Tensor | None):
    """All tensors on the table's device, all floating ones of its dtype, or cast to another for a product."""
    if not token.is_floating_point():
        raise TypeError(f"token: expected a floating dtype, got {token.dtype}")
    for name, tensor in {"ids": ids, **others}.items():
        if tensor is None:
            continue
        if tensor.device != token.device:
            raise ValueError(f"{name}: expected device {token.device}, that of token; got {tensor.device}")
        dtypes = {token.dtype}
        if "norm" in name:
            dtypes.add(torch.promote_types(token.dtype, torch.float32))
        if name == "position":
            dtypes.add(torch.int64)  # positions.sinusoidal_steps
        if name in ("weight", "bias") and cast:
            dtypes |= {torch.float32, torch.float16, torch.bfloat16}  # which the product casts
        if not name.endswith("ids") and tensor.dtype not in dtypes:
            raise TypeError(f"{name}: expected dtype {token.dtype}, that of token; got {tensor.dtype}")
    weight, bias = others.get("norm_weight"), others.get("norm_bias")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"norm_bias: expected dtype {weight.dtype}, that of norm_weight; got {bias.dtype}")


def places_of(position: Tensor | None, rotary) -> dict[str, int]:
    """Rows of the tables that positions look up."""
    tables = {"position": position, "rotary": rotary.cos if isinstance(rotary, Rotary) else None}
    return {name: rows_of(table) for name, table in tables.items() if table is not None}


def check_positions(ids: Tensor, position: Tensor | None, position_ids: Tensor | None, rotary=None):
    tables = places_of(position, rotary)
    if not tables:
        if position_ids is not None:
            raise ValueError("position_ids: expected None where there is no table of positions, got a Tensor")
        return
    T = ids.shape[-1] if ids.dim() else 1
    if position_ids is None:
        for name, rows in tables.items():
            if rows < T:
                raise IndexError(f"ids: sequence length {T} needs positions up to {T - 1}, {name} has {rows} rows")
        return
    _check_like_ids("position_ids", position_ids, ids)


def _check_like_ids(name: str, tensor: Tensor, ids: Tensor):
    shapes = {tuple(ids.shape), tuple(ids.shape[-1:]), (1,) * (ids.dim() - 1) + tuple(ids.shape[-1:])}
    if tuple(tensor.shape) not in shapes:
        wanted = " or ".join(map(str, sorted(shapes, key=len)))
        raise ValueError(f"{name}: expected shape {wanted} for ids {tuple(ids.shape)}, got {tuple(tensor.shape)}")


def check_terms(ids: Tensor, token: Tensor, position, position_ids, segment, segment_ids, scale, dropout):
    """What hidden is the sum of."""
    check_integers("ids", ids)
    check_shape("token", token, (None, None), "(num_embeddings, embedding_dim)", optional=False)
    if isinstance(position, Tensor) and position.dtype == torch.int64:
        check_shape("position", position, (2, token.shape[1]), "steps and beginnings, as positions.sinusoidal_steps has them")
    check_shape("position", position, (None, token.shape[1]), "(max_length, embedding_dim of token)")
    check_shape("segment", segment, (None, token.shape[1]), "(segments, embedding_dim of token)")
    for name, tensor in (("position_ids", position_ids), ("segment_ids", segment_ids)):
        if tensor is not None:
            check_integers(name, tensor)
    if segment_ids is not None:
        if segment is None:
            raise ValueError("segment_ids: expected None where there is no table of segments, got a Tensor")
        _check_like_ids("segment_ids", segment_ids, ids)
    for name, table, given in (("token", token, ids), ("position", position, position_ids)):
        if table is not None and given is not None and table.shape[0] == 0 and given.numel() and ids.numel():
            of = "ids" if given is ids else "position_ids"
            raise IndexError(f"{name}: expected a row for each of {of}, got a table of 0 rows")
    if segment is not None and segment.shape[0] == 0 and ids.numel():
        raise IndexError("segment: expected a row for each of segment_ids (None: row 0), got a table of 0 rows")
    if not isinstance(dropout, int | float):
        raise TypeError(f"dropout: expected a number, got {type(dropout).__name__}")
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")


@remembered
def check_embed(ids, token, position, position_ids, segment, segment_ids, scale, dropout):
    """functional.embed's arguments, but for position_ids' shape."""
    check_terms(ids, token, position, position_ids, segment, segment_ids, scale, dropout)
    check_alike(token, ids, position=position, position_ids=position_ids, segment=segment, segment_ids=segment_ids)


@remembered
def check_embed_qkv(
    cast, ids, token, position, position_ids, segment, segment_ids, scale, dropout, weight, bias, num_heads, num_kv_heads, norm,
    norm_weight, norm_bias, eps, query_norm, key_norm, head_eps, heads_first,
):  # fmt: skip
    """functional.embed_qkv's, but for position_ids' shape, rotary, distinct, query_biases. cast: autocast's dtype, or None."""
    check_terms(ids, token, position, position_ids, segment, segment_ids, scale, dropout)
    D = token.shape[1]
    check_shape("weight", weight, (None, D), "(query, key and value rows, embedding_dim of token)", optional=False)
    N = weight.shape[0]
    check_shape("bias", bias, (N,), "the rows of weight")
    check_shape("norm_weight", norm_weight, (D,), "embedding_dim of token")
    check_shape("norm_bias", norm_bias, (D,), "embedding_dim of token")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {NORMS}, got {norm!r}")
    if norm is None and norm_weight is not None or norm != "layer" and norm_bias is not None:
        raise ValueError(f"norm_weight, norm_bias: norm {norm!r} takes no such parameter, got one")
    num_kv_heads = check_heads(num_heads, num_kv_heads)
    for name, value in (("eps", eps), ("head_eps", head_eps)):
        if not value >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {value}")
    total = num_heads + 2 * num_kv_heads
    if N % total:
        raise ValueError(f"weight: expected a multiple of num_heads + 2·num_kv_heads = {total} rows, got {N}")
    check_shape("query_norm", query_norm, (N // total,), "head_dim", optional=key_norm is None)
    check_shape("key_norm", key_norm, (N // total,), "head_dim", optional=query_norm is None)
    check_alike(
        token, ids, cast, position=position, position_ids=position_ids, segment=segment, segment_ids=segment_ids, weight=weight,
        bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, query_norm=query_norm, key_norm=key_norm,
    )  # fmt: skip
    if heads_first and ids.dim() == 0:
        raise ValueError("heads_first: expected False for ids of shape (), which have no length to come behind heads; got True")


def check_rotary(rotary, ids: Tensor, head_dim: int):
    """A Rotary, or cosines and sines of each token, that fits the heads."""
    if rotary is None:
        return
    if isinstance(rotary, Rotary):
        width, cos = rotary.rotary_dim, rotary.cos
    elif isinstance(rotary, tuple | list) and len(rotary) == 2 and all(isinstance(t, Tensor) for t in rotary):
        (cos, sin), T = rotary, ids.shape[-1] if ids.dim() else 1
        width = cos.shape[-1] if cos.dim() else 0
        shapes = {(*ids.shape, width), (T, width), (*(1,) * (ids.dim() - 1), T, width)}
        if cos.shape != sin.shape or tuple(cos.shape) not in shapes:
            wanted = " or ".join(map(str, sorted(shapes, key=len)))
            raise ValueError(f"rotary: expected cos and sin of shape {wanted}, got {tuple(cos.shape)} and {tuple(sin.shape)}")
        if not cos.is_floating_point() or cos.requires_grad or sin.requires_grad:
            raise ValueError("rotary: expected floating cos and sin that want no gradient: none is computed")
    else:
        raise TypeError(f"rotary: expected a pyembed.Rotary or a (cos, sin) pair of Tensors, got {type(rotary).__name__}")
    if width % 2 or width == 0 or width > head_dim or head_dim % 2:
        raise ValueError(f"rotary: expected an even width up to an even head_dim ({head_dim}), got {width}")
    if cos.device != ids.device:
        raise ValueError(f"rotary: expected device {ids.device}, that of ids; got {cos.device}")


def _check_range(name: str, ids: Tensor | None, table: str, size: int):
    """IndexError that names the first id without a row, its place and the table's size. CPU tensors only: it looks."""
    if ids is None or ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if low < 0 or high >= size:
        place = tuple(((ids < 0) | (ids >= size)).nonzero()[0].tolist())
        raise IndexError(f"{name}: expected values in [0, {size}), the rows of {table}; got {ids[place].item()} at {place}")


def check_distinct(distinct: DistinctIds | None, ids: Tensor):
    """What a loader counted belongs to these ids: shapes always, values where looking costs no synchronisation."""
    if distinct is None:
        return
    if not isinstance(distinct, DistinctIds):
        raise TypeError(f"distinct: expected a DistinctIds, got {type(distinct).__name__}")
    for name, tensor, shape in (("distinct.ids", distinct.ids, (None,)), ("distinct.inverse", distinct.inverse, ids.shape)):
        check_integers(name, tensor)
        check_shape(name, tensor, tuple(shape), "sorted ids, and the place of each of the batch's ids among them")
        if tensor.device != ids.device:
            raise ValueError(f"{name}: expected device {ids.device}, that of ids; got {tensor.device}")
    if not planner.looks(ids):
        return
    if distinct.ids.numel() > 1 and not (distinct.ids[1:] > distinct.ids[:-1]).all():
        raise ValueError("distinct.ids: expected each id once, in ascending order, as torch.unique gives them")
    _check_range("distinct.inverse", distinct.inverse, "distinct.ids", distinct.ids.numel())
    same = distinct.ids.index_select(0, distinct.inverse.reshape(-1)) == ids.reshape(-1)
    if not same.all():
        first = int(same.logical_not().nonzero()[0])
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), ids.shape))
        found = distinct.ids[distinct.inverse.reshape(-1)[first]].item()
        raise ValueError(f"distinct: expected the ids of this batch, {ids[place].item()} at {place}; got {found}")


def padding_row(padding_idx: int | None, rows: int) -> int | None:
    """padding_idx, counted from the table's beginning."""
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < rows:
        raise ValueError(f"padding_idx: expected a row in [{-rows}, {rows}), got {padding_idx}")
    return padding_idx % rows


def check_heads(num_heads: int, num_kv_heads: int | None) -> int:
    """num_kv_heads, num_heads where it is None."""
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    for name, heads in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if not isinstance(heads, int) or heads < 1:
            raise ValueError(f"{name}: expected a positive int, got {heads!r}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads: expected a multiple of num_kv_heads ({num_kv_heads}), got {num_heads}")
    return num_kv_heads


def check_front_end(
    ids: Tensor, token: Tensor, position: Tensor | None, position_ids: Tensor | None, rotary=None, segment=None,
    segment_ids=None, policy="raise",
):  # fmt: skip
    """A front end's ids: types, devices and shapes, and values too where the policy is "raise" and looking costs no wait."""
    check_terms(ids, token, position, position_ids, segment, segment_ids, None, 0.0)
    check_alike(token, ids, position_ids=position_ids, segment_ids=segment_ids)
    if policy in ("clamp", "zero"):
        position_ids = given_places(ids, position_ids, min([*places_of(position, rotary).values(), 2**31]))
    check_positions(ids, position, position_ids, rotary)
    if policy == "raise":
        check_ranges(ids, token, position, position_ids, rotary, segment, segment_ids)


def check_ranges(ids, token, position, position_ids, rotary=None, segment=None, segment_ids=None):
    if planner.looks(ids):
        _check_range("ids", ids, "token", token.shape[0])
        for name, rows in places_of(position, rotary).items():
            _check_range("position_ids", position_ids, name, rows)
        if segment is not None:
            _check_range("segment_ids", segment_ids, "segment", segment.shape[0])


def check_query_biases(query_biases, token: Tensor, num_heads: int, head_dim: int, query_norm, rotary) -> tuple:
    """The two of them, or two None."""
    if query_biases is None:
        return None, None
    if query_norm is not None or rotary is not None:
        raise ValueError("query_biases: expected None where heads are normalised or turned (which comes first?), got a pair")
    if not isinstance(query_biases, tuple | list) or len(query_biases) != 2:
        raise TypeError(f"query_biases: expected a pair of Tensors or None, got {type(query_biases).__name__}")
    for bias in query_biases:
        check_shape("query_biases", bias, (num_heads, head_dim), "(num_heads, head_dim)", optional=False)
        check_alike(token, None, query_biases=bias)
    return query_biases
