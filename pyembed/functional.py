"""The public functions. Every argument check and every error message of the library lives here."""

import torch
from torch import Tensor

from . import ops, planner, reference
from .distinct import DistinctIds
from .reference import HiddenQKV
from .rotary import Rotary, as_rotation
from .spread import over_mesh

NORMS = ("layer", "rms", None)
NO_ROTATION = (None, None, None, False)


def check_integers(name: str, ids: Tensor):
    """ids of one of the dtypes that PyTorch takes."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype torch.int32 or torch.int64, got {ids.dtype}")


def _check_shape(name: str, tensor: Tensor | None, shape: tuple, meaning: str, optional=True):
    """shape holds None where any size will do."""
    if tensor is None and optional:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, tensor.shape, strict=True)):
        wanted = str(tuple("any" if size is None else size for size in shape)).replace("'", "")
        raise ValueError(f"{name}: expected shape {wanted}, {meaning}; got {tuple(tensor.shape)}")


def _check_alike(token: Tensor, ids: Tensor, **others: Tensor | None):
    """All tensors on the table's device, all floating ones of its dtype."""
    if not token.is_floating_point():
        raise TypeError(f"token: expected a floating dtype, got {token.dtype}")
    for name, tensor in {"ids": ids, **others}.items():
        if tensor is None:
            continue
        if tensor.device != token.device:
            raise ValueError(f"{name}: expected device {token.device}, that of token; got {tensor.device}")
        dtypes = {token.dtype, torch.promote_types(token.dtype, torch.float32)} if name.startswith("norm") else {token.dtype}
        if name not in ("ids", "position_ids") and tensor.dtype not in dtypes:
            raise TypeError(f"{name}: expected dtype {token.dtype}, that of token; got {tensor.dtype}")


def _check_positions(ids: Tensor, position: Tensor | None, position_ids: Tensor | None, rotary=None):
    tables = [("position", position), ("rotary", rotary.cos if isinstance(rotary, Rotary) else None)]
    tables = [(name, table.shape[0]) for name, table in tables if table is not None]
    if not tables:
        if position_ids is not None:
            raise ValueError("position_ids: expected None where there is no table of positions, got a Tensor")
        return
    T = ids.shape[-1] if ids.dim() else 1
    if position_ids is None:
        for name, rows in tables:
            if rows < T:
                raise IndexError(f"ids: sequence length {T} needs positions up to {T - 1}, {name} has {rows} rows")
        return
    shapes = {tuple(ids.shape), tuple(ids.shape[-1:]), (1,) * (ids.dim() - 1) + tuple(ids.shape[-1:])}
    if tuple(position_ids.shape) not in shapes:
        wanted = " or ".join(map(str, sorted(shapes, key=len)))
        raise ValueError(f"position_ids: expected shape {wanted} for ids {tuple(ids.shape)}, got {tuple(position_ids.shape)}")


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
        _check_shape(name, tensor, tuple(shape), "sorted ids, and the place of each of the batch's ids among them")
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


def check_ids(ids: Tensor, token: Tensor, position: Tensor | None, position_ids: Tensor | None, rotary=None):
    """A front end's ids: types, devices and shapes, and values where looking costs no synchronisation."""
    check_integers("ids", ids)
    if position_ids is not None:
        check_integers("position_ids", position_ids)
    _check_alike(token, ids, position_ids=position_ids)
    _check_positions(ids, position, position_ids, rotary)
    _check_ranges(ids, token, position, position_ids, rotary)


def _check_ranges(ids, token, position, position_ids, rotary=None):
    if planner.looks(ids):
        _check_range("ids", ids, "token", token.shape[0])
        if position is not None:
            _check_range("position_ids", position_ids, "position", position.shape[0])
        if isinstance(rotary, Rotary):
            _check_range("position_ids", position_ids, "rotary", rotary.cos.shape[0])


def _run(kernel, eager, token, ids, position, position_ids, rotary=None):
    """The call by kernel or by eager. Kernels do not look at ids: here that is done where it costs no synchronisation."""
    if planner.uses_triton(token):
        _check_ranges(ids, token, position, position_ids, rotary)
        return kernel()
    try:
        return eager()
    except IndexError:  # PyTorch looks at every id on the CPU anyway: only its message lacks what is wrong where
        _check_ranges(ids, token, position, position_ids, rotary)
        raise


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows of a table: ids (...) int32 or int64, weight (V, D) -> (..., D), bit for bit torch.nn.functional.embedding's.

    The row padding_idx (negative counts from the end) is returned like any other and gets no gradient.
    IndexError: an id outside [0, V), on the CPU at once; on a GPU its row is NaN. TypeError, ValueError: other arguments.
    """
    return embed(ids, weight, padding_idx=padding_idx)


@over_mesh
def embed(
    ids: Tensor,
    token: Tensor,
    position: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """token[ids] + position[position_ids], rounded to the table's dtype.

    ids (..., T) int32 or int64, token (V, D), position (L, D) -> (..., T, D). position_ids: (T,), (1, T) or like ids;
    None means 0 … T−1. Differentiable in token and position. Errors as in embedding.
    """
    check_integers("ids", ids)
    _check_shape("token", token, (None, None), "(num_embeddings, embedding_dim)", optional=False)
    _check_shape("position", position, (None, token.shape[1]), "(max_length, embedding_dim of token)")
    if position_ids is not None:
        check_integers("position_ids", position_ids)
    _check_alike(token, ids, position=position, position_ids=position_ids)
    _check_positions(ids, position, position_ids)
    padding_idx = padding_row(padding_idx, token.shape[0])
    return _run(
        lambda: ops.embed(ids, token, position, position_ids, -1 if padding_idx is None else padding_idx),
        lambda: reference.embed(ids, token, position, position_ids, padding_idx=padding_idx),
        token, ids, position, position_ids,
    )  # fmt: skip


@over_mesh
def embed_qkv(
    ids: Tensor,
    token: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    position: Tensor | None = None,
    position_ids: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    padding_idx: int | None = None,
    distinct: DistinctIds | None = None,
    rotary: Rotary | tuple[Tensor, Tensor] | None = None,
) -> HiddenQKV:
    """The front end of a transformer: gather, positional add, norm and QKV projection.

    ids (..., T) int32 or int64; token (V, D); weight (N, D) and bias (N,), rows of query, then key, then value, with
    N = (num_heads + 2·num_kv_heads)·head_dim; position (L, D) with position_ids as in embed; norm "layer" (LayerNorm, Ba
    et al. 2016), "rms" (RMSNorm, Zhang and Sennrich 2019) or None, with norm_weight (D,) and norm_bias (D,).
    Returns hidden (..., T, D), the residual stream, rounded to the table's dtype; query (..., T, num_heads, head_dim); key
    and value (..., T, num_kv_heads, head_dim). fp32 statistics and accumulation. distinct: the batch's distinct ids, where a
    data loader found them; the plan of that name then need not. ValueError: they are not those of ids (values are compared on
    the CPU, on a GPU within pyembed.debug()).
    rotary: turns query and key, in fp32 by the kernels: a Rotary, by position_ids, or cosines and sines (T, R), (1, T, R) or
    (..., T, R) of each token, half behind half, as transformers passes them; they get no gradient.
    Differentiable once in every floating argument. All tensors share one dtype (float32, float16, bfloat16; float64 on the
    CPU) and one device. fp32 products on a GPU use tf32 where torch.backends.cuda.matmul says so.
    Errors as in embedding.
    """
    check_integers("ids", ids)
    _check_shape("token", token, (None, None), "(num_embeddings, embedding_dim)", optional=False)
    D = token.shape[1]
    _check_shape("position", position, (None, D), "(max_length, embedding_dim of token)")
    _check_shape("weight", weight, (None, D), "(query, key and value rows, embedding_dim of token)", optional=False)
    N = weight.shape[0]
    _check_shape("bias", bias, (N,), "the rows of weight")
    _check_shape("norm_weight", norm_weight, (D,), "embedding_dim of token")
    _check_shape("norm_bias", norm_bias, (D,), "embedding_dim of token")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {NORMS}, got {norm!r}")
    if norm is None and norm_weight is not None or norm != "layer" and norm_bias is not None:
        raise ValueError(f"norm_weight, norm_bias: norm {norm!r} takes no such parameter, got one")
    if position_ids is not None:
        check_integers("position_ids", position_ids)
    _check_alike(
        token,
        ids,
        position=position,
        position_ids=position_ids,
        weight=weight,
        bias=bias,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
    )
    _check_positions(ids, position, position_ids, rotary)
    num_kv_heads = check_heads(num_heads, num_kv_heads)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    if N % (num_heads + 2 * num_kv_heads):
        raise ValueError(
            f"weight: expected a multiple of num_heads + 2·num_kv_heads = {num_heads + 2 * num_kv_heads} rows, got {N}"
        )
    check_rotary(rotary, ids, N // (num_heads + 2 * num_kv_heads))
    padding_idx = padding_row(padding_idx, token.shape[0])
    check_distinct(distinct, ids)

    row = -1 if padding_idx is None else padding_idx
    places = None if position is None else position_ids
    arguments = (ids, token, weight, bias, position, places, norm_weight, norm_bias)
    options = (num_heads, num_kv_heads, norm or "none", eps, row)
    rotation = NO_ROTATION if rotary is None else as_rotation(rotary, ids, position_ids)

    def kernel():
        return HiddenQKV(*ops.embed_qkv(*arguments, *options, *rotation)[:4])

    def once_each():
        known = (None, None) if distinct is None else (distinct.ids, distinct.inverse.reshape(-1))
        kernels = planner.uses_triton(token)
        *outputs, count = ops.distinct_qkv(*arguments, *options, *known, kernels, *(rotation if kernels else NO_ROTATION))
        planner.saw(token, count, ids.numel())
        found = HiddenQKV(*outputs[:4])
        return found if kernels or rotary is None else reference.turned(found, rotation)

    def eager():
        return reference.embed_qkv(
            ids, token, weight, bias, num_heads=num_heads, num_kv_heads=num_kv_heads, position=position,
            position_ids=position_ids, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
            padding_idx=padding_idx, rotary=rotary,
        )  # fmt: skip

    products = planner.products_of(token, weight, position, norm_weight, norm_bias, bias)
    known = None if distinct is None else distinct.ids.numel()
    if planner.choose(ids, token, weight, position, places, norm is not None, products, known).name == "distinct":
        kernel = eager = once_each
    return _run(kernel, eager, token, ids, position, position_ids, rotary)
