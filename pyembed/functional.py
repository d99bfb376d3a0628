"""The public functions: what they compute, by which plan, kernels or not."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import ids as outside
from . import ops, ops_distinct, ops_embed, planner, reference, thin
from .checks import (
    check_distinct,
    check_embed,
    check_embed_qkv,
    check_heads,
    check_integers,
    check_positions,
    check_query_biases,
    check_ranges,
    check_rotary,
    check_shape,
    padding_row,
    places_of,
)
from .distinct import DistinctIds
from .ops import NO_ROTATION
from .reference import HiddenQKV
from .rotary import Rotary
from .spread import over_mesh


def _seed(dropout: float, device: torch.device) -> Tensor | None:
    """Of a call's dropout, drawn from PyTorch's generator: torch.manual_seed, checkpointing and graphs know that one."""
    return torch.randint(2**62, (1,), device=device) if dropout else None


def _check_computed(policy, ids, token, position, position_ids, rotary=None):
    """Positions that PyTorch would take though no row is theirs: it computes any, and counts negative turns from the end."""
    turns = position is None and position_ids is not None and isinstance(rotary, Rotary)
    computed = position is not None and not position.is_floating_point()
    if policy == "raise" and (turns or computed):
        check_ranges(ids, token, position, position_ids, rotary)


def _run(kernel, eager, token, policy, *looked_at):
    """The call by kernel or by eager. Kernels do not look at ids: here that is done where it costs no synchronisation."""
    if policy != "zero" and planner.uses_triton(token):
        if policy == "raise":
            check_ranges(*looked_at)
        return kernel()
    try:
        return eager()
    except (IndexError, RuntimeError):  # PyTorch looks at every id on the CPU anyway: its message lacks what is wrong where
        check_ranges(*looked_at)
        raise


def embedding(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    id_policy: str | None = None,
) -> Tensor:
    """Rows of a table: ids (...) int32 or int64, weight (V, D) -> (..., D), bit for bit torch.nn.functional.embedding's.

    The row padding_idx (negative counts from the end) is returned like any other and gets no gradient. max_norm (which changes
    weight in place), norm_type, scale_grad_by_freq and sparse are PyTorch's, and with them, or over a table of a dtype that has
    no kernel, PyTorch's operator serves, whatever the backend: unkernelled says why. Differentiable any number of times.
    id_policy: what becomes of an id outside [0, V), as pyembed.id_policy has it; None: what the context says, "raise" unless
    it was changed. IndexError: there is one. TypeError, ValueError: other arguments.
    """
    if max_norm is None and not scale_grad_by_freq and not sparse:
        found = thin.embedding(ids, weight, padding_idx, id_policy)
        if found is not None:
            return found
    policy = outside.applied(id_policy)
    if unkernelled(ids, weight, max_norm, scale_grad_by_freq, sparse, policy) is None and planner.uses_triton(weight):
        return embed(ids, weight, padding_idx=padding_idx, id_policy=policy)

    def look_up(ids):
        return torch.nn.functional.embedding(ids, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)

    try:
        if policy == "zero":
            return _zeros_for_absent(look_up, ids, weight, max_norm is not None or scale_grad_by_freq or sparse)
        return look_up(outside.clamped(ids, weight.shape[0]) if policy == "clamp" else ids)
    except (AssertionError, IndexError, RuntimeError):  # PyTorch's message lacks what is wrong where
        padding_row(padding_idx, weight.shape[0])
        check_ranges(ids, weight, None, None)
        raise


def _zeros_for_absent(look_up, ids, weight, has_side_effects):
    """look_up(ids), zeros where there is no row; where looking up has side effects, no other row is looked up instead."""
    if not has_side_effects:
        return outside.rows("zero", look_up, ids, weight.shape[0])
    there = (ids >= 0) & (ids < weight.shape[0])
    return weight.new_zeros(*ids.shape, weight.shape[1]).index_put((there,), look_up(ids[there]))


def unkernelled(ids, weight, max_norm=None, scale_grad_by_freq=False, sparse=False, policy="raise") -> str | None:
    """Why such a lookup has no kernel on any device, so that PyTorch's operator serves it; None: it has one."""
    if isinstance(ids, torch.fx.Proxy) or isinstance(weight, torch.fx.Proxy):
        return "torch.fx traces it"
    check_integers("ids", ids)
    check_shape("token", weight, (None, None), "(num_embeddings, embedding_dim)", optional=False)
    if ids.device != weight.device:
        raise ValueError(f"ids: expected device {weight.device}, that of token; got {ids.device}")
    if max_norm is not None or scale_grad_by_freq or sparse:
        return "max_norm, scale_grad_by_freq and sparse have no kernel"
    if policy == "zero":
        return planner.ZEROS
    for tensor in (ids, weight):
        if is_traceable_wrapper_subclass(tensor):
            return f"a {type(tensor).__name__} brings operators of its own"
    if not planner.takes(weight):
        return f"{weight.dtype} on {weight.device} has no kernel"
    return None


def kept(policy, ids, token, position=None, position_ids=None, segment=None, segment_ids=None, rotary=None):
    """ids, position_ids and segment_ids as the policies "clamp" and "zero" leave them."""
    sizes = places_of(position, rotary).values()
    position_ids = outside.given_places(ids, position_ids, min([*sizes, 2**31]))
    if policy == "zero":
        return ids, position_ids, segment_ids
    places, kinds = None if position is None else reference.rows_of(position), None if segment is None else segment.shape[0]
    given = ((ids, token.shape[0]), (position_ids, places), (segment_ids, kinds))
    return tuple(outside.clamped(x, size) for x, size in given)


def _looking_up(policy):
    return outside.look_up_or_zero if policy == "zero" else reference.look_up


@over_mesh
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
    id_policy: str | None = None,
) -> Tensor:
    """dropout(scale·token[ids] + segment[segment_ids] + position[position_ids]), each term rounded to the table's dtype.

    ids (..., T) int32 or int64, token (V, D), position (L, D) or positions.sinusoidal_steps (2, D), of which rows are computed,
    segment (S, D), BERT's token types -> (..., T, D). position_ids, segment_ids: (T,), (1, T) or like ids; None means 0 … T−1,
    and segment 0. dropout: the probability of an element to become zero, drawn from PyTorch's generator; 0 outside of training.
    Differentiable in token, position and segment. id_policy and errors as in embedding, of positions and segments too.
    """
    if scale is None and segment is None and segment_ids is None and not dropout:
        found = thin.embed(ids, token, position, position_ids, padding_idx, id_policy)
        if found is not None:
            return found
    policy = outside.applied(id_policy)
    check_embed(ids, token, position, position_ids, segment, segment_ids, scale, dropout)
    if policy in ("clamp", "zero"):
        ids, position_ids, segment_ids = kept(policy, ids, token, position, position_ids, segment, segment_ids)
    check_positions(ids, position, position_ids)
    _check_computed(policy, ids, token, position, position_ids)
    padding_idx = padding_row(padding_idx, token.shape[0])

    def kernel():
        row, seed = -1 if padding_idx is None else padding_idx, _seed(dropout, ids.device)
        tables = (token, position, position_ids, segment, segment_ids)
        return ops_embed.embed(ids, *tables, seed, scale, float(dropout), row, policy != "trust")

    def eager():
        return reference.embed(
            ids, token, position, position_ids, padding_idx=padding_idx, scale=scale, segment=segment, segment_ids=segment_ids,
            dropout=dropout, look_up=_looking_up(policy),
        )  # fmt: skip

    return _run(kernel, eager, token, policy, ids, token, position, position_ids, None, segment, segment_ids)


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
    scale: float | None = None,
    segment: Tensor | None = None,
    segment_ids: Tensor | None = None,
    dropout: float = 0.0,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    head_eps: float = 1e-6,
    query_biases: tuple[Tensor, Tensor] | None = None,
    heads_first: bool = False,
    id_policy: str | None = None,
    batch_invariant: bool = False,
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
    batch_invariant: a token's results have the same bits alone and at any place of any batch, by one order of sums for all
    (slower where another would suit better). Else that holds by the kernels, within a plan, among calls of up to 16, 32, 256,
    1,023 or more tokens. RuntimeError: torch.export, or torch.compile with fullgraph, of PyTorch's operators.
    Under autocast, weight and bias are cast to its dtype, which query, key and value have, and hidden and the norm keep theirs.
    id_policy and errors as in embed.
    """
    others = (distinct, scale, segment, segment_ids, query_norm, key_norm, query_biases)
    usual = head_eps >= 0 and not (dropout or heads_first or batch_invariant)
    if usual and not any(other is not None for other in others):
        num_kv_heads = check_heads(num_heads, num_kv_heads)
        groups, affine = (num_heads, num_kv_heads, num_kv_heads), (norm, norm_weight, norm_bias, eps)
        places = (position, position_ids, rotary)
        found = thin.embed_qkv(ids, token, weight, bias, groups, *places, *affine, padding_idx, id_policy)
        if found is not None:
            return found
    policy = outside.applied(id_policy)
    cast = planner.autocast_dtype(token) if isinstance(token, Tensor) else None
    check_embed_qkv(
        cast, ids, token, position, position_ids, segment, segment_ids, scale, dropout, weight, bias, num_heads, num_kv_heads,
        norm, norm_weight, norm_bias, eps, query_norm, key_norm, head_eps, heads_first,
    )  # fmt: skip
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    head_dim = weight.shape[0] // (num_heads + 2 * num_kv_heads)
    first, second = check_query_biases(query_biases, token, num_heads, head_dim, query_norm, rotary)
    check_rotary(rotary, ids, head_dim)
    check_distinct(distinct, ids)
    turn_ids = position_ids
    if policy in ("clamp", "zero"):
        distinct = None  # of ids as they came
        ids, position_ids, segment_ids = kept(policy, ids, token, position, position_ids, segment, segment_ids, rotary)
    check_positions(ids, position, position_ids, rotary)
    _check_computed(policy, ids, token, position, position_ids, rotary)
    padding_idx = padding_row(padding_idx, token.shape[0])

    if query_biases is not None:
        bias, second = reference.biases_of(weight, bias, first, second)
    row = -1 if padding_idx is None else padding_idx
    places = None if position is None else position_ids
    arguments = (ids, token, weight, bias, position, places, norm_weight, norm_bias)
    options = (num_heads, num_kv_heads, norm or "none", eps, row)
    rotation = NO_ROTATION if rotary is None else outside.rotation(policy, rotary, ids, turn_ids)
    # What comes after the projection, and the part of it that PyTorch's operators do where a kernel does not.
    ends = {"query_norm": query_norm, "key_norm": key_norm, "head_eps": head_eps, "second": second, "heads_first": heads_first}
    ends["rotation"] = None if rotary is None else rotation
    reports = policy != "trust"

    def kernel():
        terms = (segment, segment_ids, _seed(dropout, ids.device))
        scalars = (scale, float(dropout))
        if cast == torch.bfloat16 and not token.is_cuda:
            raise TypeError(f"autocast: {planner.NO_BF16}")
        w, b, more = (t if t is None or cast is None else t.to(cast) for t in (weight, bias, second))
        front = (ids, token, w, b, *arguments[4:], *terms)
        fits = cast is None and planner.normalises_heads(head_dim, token, weight, bias, position, segment, *affine)
        if query_norm is None or fits:
            last = (*rotation, query_norm, key_norm, head_eps, heads_first, reports, batch_invariant)
            return HiddenQKV(*ops.embed_qkv(*front, more, *options, *scalars, *last)[:4])
        last = (*NO_ROTATION, None, None, 0.0, False, reports, batch_invariant)
        return reference.finish(HiddenQKV(*ops.embed_qkv(*front, None, *options, *scalars, *last)[:4]), **ends)

    def once_each():
        known = (None, None) if distinct is None else (distinct.ids, distinct.inverse.reshape(-1))
        turns = planner.uses_triton(token) and query_norm is None and second is None
        given = (*known, planner.uses_triton(token), *(rotation if turns else NO_ROTATION), reports)
        *outputs, count = ops_distinct.distinct_qkv(*arguments, *options, *given)
        planner.saw(token, count, ids.numel())
        return reference.finish(HiddenQKV(*outputs[:4]), **{**ends, "rotation": None if turns else ends["rotation"]})

    def eager():
        if batch_invariant and torch.compiler.is_compiling():
            raise RuntimeError("batch_invariant: expected the kernels or no compiler, which orders PyTorch's sums as it likes")
        found = reference.embed_qkv(
            ids, token, weight, bias, num_heads=num_heads, num_kv_heads=num_kv_heads, position=position,
            position_ids=position_ids, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
            padding_idx=padding_idx, scale=scale, segment=segment, segment_ids=segment_ids, dropout=dropout,
            look_up=_looking_up(policy),
            linear=reference.invariant_linear if batch_invariant else torch.nn.functional.linear,
        )  # fmt: skip
        return reference.finish(found, **ends)

    affine = (norm_weight, norm_bias, query_norm, key_norm, second)
    products = planner.products_of(token, weight, position, norm_weight, norm_bias, bias)
    known = None if distinct is None else distinct.ids.numel()
    refused = planner.refuses(token, position, scale, segment, dropout, policy, batch_invariant)
    if planner.choose(ids, token, weight, position, places, norm is not None, products, known, refused).name == "distinct":
        kernel = eager = once_each
    return _run(kernel, eager, token, policy, ids, token, position, position_ids, rotary, segment, segment_ids)
