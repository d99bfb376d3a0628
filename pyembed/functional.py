"""The public functions. Every argument check and every error message of the library lives here."""

import torch
from torch import Tensor

from . import ops, ops_distinct, planner, reference
from .distinct import DistinctIds
from .reference import HiddenQKV
from .rotary import Rotary, as_rotation

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
        dtypes = {token.dtype}
        if "norm" in name:
            dtypes.add(torch.promote_types(token.dtype, torch.float32))
        if name == "position":
            dtypes.add(torch.int64)  # positions.sinusoidal_steps
        if not name.endswith("ids") and tensor.dtype not in dtypes:
            raise TypeError(f"{name}: expected dtype {token.dtype}, that of token; got {tensor.dtype}")


def _check_positions(ids: Tensor, position: Tensor | None, position_ids: Tensor | None, rotary=None):
    tables = [("position", position), ("rotary", rotary.cos if isinstance(rotary, Rotary) else None)]
    tables = [(name, _places(table)) for name, table in tables if table is not None]
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
    _check_like_ids("position_ids", position_ids, ids)


def _places(position: Tensor) -> int:
    """Rows of a table of positions; those that are computed never end."""
    return position.shape[0] if position.is_floating_point() else 2**31 - 1


def _check_like_ids(name: str, tensor: Tensor, ids: Tensor):
    shapes = {tuple(ids.shape), tuple(ids.shape[-1:]), (1,) * (ids.dim() - 1) + tuple(ids.shape[-1:])}
    if tuple(tensor.shape) not in shapes:
        wanted = " or ".join(map(str, sorted(shapes, key=len)))
        raise ValueError(f"{name}: expected shape {wanted} for ids {tuple(ids.shape)}, got {tuple(tensor.shape)}")


def _check_terms(ids: Tensor, token: Tensor, position, position_ids, segment, segment_ids, scale, dropout):
    """What hidden is the sum of."""
    check_integers("ids", ids)
    _check_shape("token", token, (None, None), "(num_embeddings, embedding_dim)", optional=False)
    if isinstance(position, Tensor) and position.dtype == torch.int64:
        _check_shape("position", position, (2, token.shape[1]), "steps and beginnings, as positions.sinusoidal_steps has them")
    _check_shape("position", position, (None, token.shape[1]), "(max_length, embedding_dim of token)")
    _check_shape("segment", segment, (None, token.shape[1]), "(segments, embedding_dim of token)")
    for name, tensor in (("position_ids", position_ids), ("segment_ids", segment_ids)):
        if tensor is not None:
            check_integers(name, tensor)
    if segment_ids is not None:
        if segment is None:
            raise ValueError("segment_ids: expected None where there is no table of segments, got a Tensor")
        _check_like_ids("segment_ids", segment_ids, ids)
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")


def _seed(dropout: float, device: torch.device) -> Tensor | None:
    """Of a call's dropout, drawn from PyTorch's generator: torch.manual_seed, checkpointing and graphs know that one."""
    return torch.randint(2**62, (1,), device=device) if dropout else None


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


def check_ids(
    ids: Tensor, token: Tensor, position: Tensor | None, position_ids: Tensor | None, rotary=None, segment=None,
    segment_ids=None,
):  # fmt: skip
    """A front end's ids: types, devices and shapes, and values where looking costs no synchronisation."""
    _check_terms(ids, token, position, position_ids, segment, segment_ids, None, 0.0)
    _check_alike(token, ids, position_ids=position_ids, segment_ids=segment_ids)
    _check_positions(ids, position, position_ids, rotary)
    _check_ranges(ids, token, position, position_ids, rotary, segment, segment_ids)


def _check_ranges(ids, token, position, position_ids, rotary=None, segment=None, segment_ids=None):
    if planner.looks(ids):
        _check_range("ids", ids, "token", token.shape[0])
        if position is not None:
            _check_range("position_ids", position_ids, "position", _places(position))
        if isinstance(rotary, Rotary):
            _check_range("position_ids", position_ids, "rotary", rotary.cos.shape[0])
        if segment is not None:
            _check_range("segment_ids", segment_ids, "segment", segment.shape[0])


def _run(kernel, eager, token, *looked_at):
    """The call by kernel or by eager. Kernels do not look at ids: here that is done where it costs no synchronisation."""
    if planner.uses_triton(token):
        _check_ranges(*looked_at)
        return kernel()
    try:
        found = eager()
    except IndexError:  # PyTorch looks at every id on the CPU anyway: only its message lacks what is wrong where
        _check_ranges(*looked_at)
        raise
    return found


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows of a table: ids (...) int32 or int64, weight (V, D) -> (..., D), bit for bit torch.nn.functional.embedding's.

    The row padding_idx (negative counts from the end) is returned like any other and gets no gradient.
    IndexError: an id outside [0, V), on the CPU at once; on a GPU its row is NaN. TypeError, ValueError: other arguments.
    """
    return embed(ids, weight, padding_idx=padding_idx)


def embed(
    ids: Tensor,
    token: Tensor,
    position: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    padding_idx: int | None = None,
    scale: float | None = None,
    segment: Tensor | None = None,
    segment_ids: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """dropout(scale·token[ids] + segment[segment_ids] + position[position_ids]), each term rounded to the table's dtype.

    ids (..., T) int32 or int64, token (V, D), position (L, D) or positions.sinusoidal_steps (2, D), of which rows are computed,
    segment (S, D), BERT's token types -> (..., T, D). position_ids, segment_ids: (T,), (1, T) or like ids; None means 0 … T−1,
    and segment 0. dropout: the probability of an element to become zero, drawn from PyTorch's generator; 0 outside of training.
    Differentiable in token, position and segment. Errors as in embedding.
    """
    _check_terms(ids, token, position, position_ids, segment, segment_ids, scale, dropout)
    _check_alike(token, ids, position=position, position_ids=position_ids, segment=segment, segment_ids=segment_ids)
    _check_positions(ids, position, position_ids)
    padding_idx = padding_row(padding_idx, token.shape[0])

    def kernel():
        row, seed = -1 if padding_idx is None else padding_idx, _seed(dropout, ids.device)
        return ops.embed(ids, token, position, position_ids, segment, segment_ids, seed, scale, float(dropout), row)

    def eager():
        return reference.embed(
            ids, token, position, position_ids, padding_idx=padding_idx, scale=scale, segment=segment, segment_ids=segment_ids,
            dropout=dropout,
        )  # fmt: skip

    return _run(kernel, eager, token, ids, token, position, position_ids, None, segment, segment_ids)


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
    scale: float | None = None,
    segment: Tensor | None = None,
    segment_ids: Tensor | None = None,
    dropout: float = 0.0,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    head_eps: float = 1e-6,
    query_biases: tuple[Tensor, Tensor] | None = None,
    heads_first: bool = False,
) -> HiddenQKV:
    """The front end of a transformer: gather, positional add, norm and QKV projection.

    ids (..., T) int32 or int64; token (V, D); weight (N, D) and bias (N,), rows of query, then key, then value, with
    N = (num_heads + 2·num_kv_heads)·head_dim; norm "layer" (LayerNorm, Ba et al. 2016), "rms" (RMSNorm, Zhang and Sennrich
    2019) or None, with norm_weight (D,) and norm_bias (D,); position, position_ids, scale, segment, segment_ids and dropout of
    hidden as in embed.
    Returns hidden (..., T, D), the residual stream, rounded to the table's dtype; query (..., T, num_heads, head_dim); key
    and value (..., T, num_kv_heads, head_dim), or (..., num_heads, T, head_dim) and so on, contiguous, where heads_first.
    fp32 statistics and accumulation. distinct: the batch's distinct ids, where a data loader found them; the plan of that name
    then need not. ValueError: they are not those of ids (values are compared on the CPU, on a GPU within pyembed.debug()).
    query_norm, key_norm: weights (head_dim,) of an RMSNorm of each head with head_eps, before it turns (Qwen3, Gemma 3).
    rotary: turns query and key, in fp32 by the kernels: a Rotary, by position_ids, or cosines and sines (T, R), (1, T, R) or
    (..., T, R) of each token, half behind half, as transformers passes them; they get no gradient.
    query_biases: two of (num_heads, head_dim), Transformer-XL's u and v: query is (2, …), q + u and q + v.
    Differentiable once in every floating argument. All tensors share one dtype (float32, float16, bfloat16; float64 on the
    CPU) and one device. fp32 products on a GPU use tf32 where torch.backends.cuda.matmul says so.
    Errors as in embedding.
    """
    _check_terms(ids, token, position, position_ids, segment, segment_ids, scale, dropout)
    D = token.shape[1]
    _check_shape("weight", weight, (None, D), "(query, key and value rows, embedding_dim of token)", optional=False)
    N = weight.shape[0]
    _check_shape("bias", bias, (N,), "the rows of weight")
    _check_shape("norm_weight", norm_weight, (D,), "embedding_dim of token")
    _check_shape("norm_bias", norm_bias, (D,), "embedding_dim of token")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {NORMS}, got {norm!r}")
    if norm is None and norm_weight is not None or norm != "layer" and norm_bias is not None:
        raise ValueError(f"norm_weight, norm_bias: norm {norm!r} takes no such parameter, got one")
    num_kv_heads = check_heads(num_heads, num_kv_heads)
    for name, value in (("eps", eps), ("head_eps", head_eps)):
        if not value >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {value}")
    total = num_heads + 2 * num_kv_heads
    head_dim = N // total
    if N % total:
        raise ValueError(f"weight: expected a multiple of num_heads + 2·num_kv_heads = {total} rows, got {N}")
    first, second = check_query_biases(query_biases, num_heads, head_dim, query_norm, rotary)
    _check_shape("query_norm", query_norm, (head_dim,), "head_dim", optional=key_norm is None)
    _check_shape("key_norm", key_norm, (head_dim,), "head_dim", optional=query_norm is None)
    _check_alike(
        token, ids, position=position, position_ids=position_ids, segment=segment, segment_ids=segment_ids, weight=weight,
        bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, query_norm=query_norm, key_norm=key_norm, u=first, v=second,
    )  # fmt: skip
    _check_positions(ids, position, position_ids, rotary)
    check_rotary(rotary, ids, head_dim)
    if heads_first and ids.dim() == 0:
        raise ValueError("heads_first: expected False for ids of shape (), which have no length to come behind heads; got True")
    padding_idx = padding_row(padding_idx, token.shape[0])
    check_distinct(distinct, ids)

    if query_biases is not None:
        bias, second = reference.biases_of(weight, bias, first, second)
    row = -1 if padding_idx is None else padding_idx
    places = None if position is None else position_ids
    arguments = (ids, token, weight, bias, position, places, norm_weight, norm_bias)
    options = (num_heads, num_kv_heads, norm or "none", eps, row)
    rotation = NO_ROTATION if rotary is None else as_rotation(rotary, ids, position_ids)
    # What comes after the projection, and the part of it that PyTorch's operators do where a kernel does not.
    ends = {"query_norm": query_norm, "key_norm": key_norm, "head_eps": head_eps, "second": second, "heads_first": heads_first}
    ends["rotation"] = None if rotary is None else rotation

    def kernel():
        terms = (segment, segment_ids, _seed(dropout, ids.device))
        scalars = (scale, float(dropout))
        if query_norm is None or planner.normalises_heads(head_dim, token, weight, bias, position, segment, *affine):
            last = (*rotation, query_norm, key_norm, head_eps, heads_first)
            return HiddenQKV(*ops.embed_qkv(*arguments, *terms, second, *options, *scalars, *last)[:4])
        last = (*NO_ROTATION, None, None, 0.0, False)
        return reference.finish(HiddenQKV(*ops.embed_qkv(*arguments, *terms, None, *options, *scalars, *last)[:4]), **ends)

    def once_each():
        known = (None, None) if distinct is None else (distinct.ids, distinct.inverse.reshape(-1))
        turns = planner.uses_triton(token) and query_norm is None and second is None
        given = (*known, planner.uses_triton(token), *(rotation if turns else NO_ROTATION))
        *outputs, count = ops_distinct.distinct_qkv(*arguments, *options, *given)
        planner.saw(token, count, ids.numel())
        return reference.finish(HiddenQKV(*outputs[:4]), **{**ends, "rotation": None if turns else ends["rotation"]})

    def eager():
        found = reference.embed_qkv(
            ids, token, weight, bias, num_heads=num_heads, num_kv_heads=num_kv_heads, position=position,
            position_ids=position_ids, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
            padding_idx=padding_idx, scale=scale, segment=segment, segment_ids=segment_ids, dropout=dropout,
        )  # fmt: skip
        return reference.finish(found, **ends)

    affine = (norm_weight, norm_bias, query_norm, key_norm, second)
    products = planner.products_of(token, weight, position, norm_weight, norm_bias, bias)
    known = None if distinct is None else distinct.ids.numel()
    refused = planner.refuses(position, scale, segment, dropout)
    if planner.choose(ids, token, weight, position, places, norm is not None, products, known, refused).name == "distinct":
        kernel = eager = once_each
    return _run(kernel, eager, token, ids, token, position, position_ids, rotary, segment, segment_ids)


def check_query_biases(query_biases, num_heads: int, head_dim: int, query_norm, rotary) -> tuple:
    """The two of them, or two None."""
    if query_biases is None:
        return None, None
    if query_norm is not None or rotary is not None:
        raise ValueError("query_biases: expected None where heads are normalised or turned (which comes first?), got a pair")
    if not isinstance(query_biases, tuple | list) or len(query_biases) != 2:
        raise TypeError(f"query_biases: expected a pair of Tensors or None, got {type(query_biases).__name__}")
    for bias in query_biases:
        _check_shape("query_biases", bias, (num_heads, head_dim), "(num_heads, head_dim)", optional=False)
    return query_biases
