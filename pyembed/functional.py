"""The public functions: each builds a Call and runs it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import settings, tied
from .call import NO_EPILOGUE, NO_NORM, Call, Called, DistinctIds, Epilogue, HiddenQKV, Norm, Projection, Terms, pad_row
from .checks import TensorValueError, check, check_heads, check_integers, check_query_biases, check_range, check_shape
from .modes import TENSORS, can_read
from .plans.choice import ZEROS, takes, why_torch
from .reference import with_query_biases
from .rotary import Pair, Rotary, turns
from .rows import Rows, call_with_rows, with_rows
from .run import run
from .settings import policy_of

__all__ = ["embed", "embed_qkv", "embedding"]


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
    rows: Rows | Sequence[Rows] | None = None,
) -> Tensor:
    """Rows of a table: ids (...) int32 or int64, weight (V, D) -> (..., D), bit for bit torch.nn.functional.embedding's.

    The row padding_idx (negative counts from the end) is returned like any other and gets no gradient. max_norm (which changes
    weight in place), norm_type, scale_grad_by_freq and sparse are PyTorch's, and with them, or over a table of a dtype that has
    no kernel, PyTorch's operator runs, whatever the backend. Differentiable any number of times.
    id_policy: what happens to an id outside [0, V), as pyembed.id_policy has it; None: what the context says, "raise" unless
    it was changed. IndexError: there is one. TypeError, ValueError: other arguments. An error is also of the class that
    torch.nn.functional.embedding raises there: RuntimeError for a dtype, shape or device, AssertionError for padding_idx.
    rows, as in embed, are served beside padding_idx and id_policy. ValueError: with max_norm, scale_grad_by_freq or sparse.
    """
    policy = settings.current.id_policy if id_policy is None else policy_of(id_policy)
    if rows is not None:
        return _embedding_with_rows(ids, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, policy, rows)
    has_options, call = max_norm is not None or scale_grad_by_freq or sparse, None
    if not has_options and _is_plain_lookup(ids, weight, padding_idx, policy):
        row = -1 if padding_idx is None else padding_idx
        if ids.is_cpu and settings.current.backend != "triton":
            try:
                return tied.look_up(weight, ids, row)
            except (IndexError, RuntimeError, TypeError):  # below is said what is wrong
                pass
        elif takes(weight) and why_torch(weight) is None:
            call = Call(Terms(ids, weight, None, None, None, None, None, None, 0.0, row), id_policy=policy)
    if call is None:
        why = why_no_kernel(ids, weight, max_norm, scale_grad_by_freq, sparse, policy)
        if why is None and why_torch(weight) is None:
            call = Call(Terms(ids, weight, padding_idx=pad_row(padding_idx, weight.shape[0])), id_policy=policy)
    if call is not None:
        try:
            return run(call)
        except (IndexError, TypeError, ValueError):  # names the table `token`
            why_no_kernel(ids, weight, max_norm, scale_grad_by_freq, sparse, policy)
            _check_rows(ids, weight, policy)
            raise

    count = weight.shape[0]

    def look_up(ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)

    try:
        if policy != "zero":
            return look_up(ids.clamp(0, count - 1) if policy == "clamp" and count else ids)
        absent = (ids < 0) | (ids >= count)
        if has_options:  # which have side effects, so no other row is looked up in place of an absent one
            return weight.new_zeros(*ids.shape, weight.shape[1]).index_put((~absent,), look_up(ids[~absent]))
        return look_up(ids.masked_fill(absent, 0)).masked_fill(absent.unsqueeze(-1), 0)
    except (AssertionError, IndexError, RuntimeError, TypeError):  # PyTorch's message lacks what is wrong where
        pad_row(padding_idx, count)
        _check_rows(ids, weight, policy)
        raise


def call_of_embedding(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None,
    max_norm: float | None,
    scale_grad_by_freq: bool,
    sparse: bool,
    policy: str,
    rows: Rows | Sequence[Rows],
) -> Call:
    """What embedding with rows is to compute. Errors: those of embedding, but for ids outside the table."""
    options = {"max_norm": max_norm is not None, "scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
    if any(options.values()):
        given = ", ".join(name for name, is_given in options.items() if is_given)
        raise ValueError(f"rows: expected None with max_norm, scale_grad_by_freq or sparse, got rows with {given}")
    why_no_kernel(ids, weight, None, False, False, policy)  # says what is wrong with ids and weight
    if not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating dtype where rows are given, got {weight.dtype}")
    return Call(with_rows(Terms(ids, weight, padding_idx=pad_row(padding_idx, weight.shape[0])), rows), id_policy=policy)


def _embedding_with_rows(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    sparse: bool,
    policy: str,
    rows: Any,
) -> Tensor:
    if isinstance(rows, torch.fx.Proxy):  # of a module that torch.fx traces as a whole: its graph takes no rows
        ids = ids_without_rows(ids, rows)
        return embedding(ids, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, id_policy=policy)
    call = call_of_embedding(ids, weight, padding_idx, max_norm, scale_grad_by_freq, sparse, policy, rows)
    try:
        return run(call)
    except IndexError:  # names the table `token`
        table: Any = call.terms.token
        _check_rows(table.in_table(ids) if isinstance(table, Called) else ids, weight, policy)
        raise


def ids_without_rows(ids: Tensor, rows: Any) -> Any:
    """In a graph of torch.fx: ids. ValueError: rows were given."""
    if isinstance(rows, torch.fx.Proxy):
        return rows.tracer.create_proxy("call_function", ids_without_rows, (ids, rows), {})
    if rows is not None:
        raise ValueError(f"rows: expected None in a graph of torch.fx, got {type(rows).__name__}")
    return ids


def _check_rows(ids: Tensor, weight: Tensor, policy: str) -> None:
    rows = weight.shape[0]
    if (policy in ("raise", "trust") or rows == 0) and can_read(ids):
        check_range("ids", ids, "weight", rows)


def _is_plain_lookup(ids: Tensor, weight: Tensor, padding_idx: int | None, policy: str) -> bool:
    """Fast path: whether a lookup is no more than one operator."""
    return (
        type(ids) is Tensor
        and type(weight) in TENSORS
        and ids.is_cpu == weight.is_cpu
        and policy in ("raise", "trust")
        and (padding_idx is None or type(padding_idx) is int and weight.dim() == 2 and 0 <= padding_idx < weight.shape[0])
        and not torch.compiler.is_compiling()
    )


def why_no_kernel(
    ids: Tensor, weight: Tensor, max_norm: float | None, scale_grad_by_freq: bool, sparse: bool, policy: str
) -> str | None:
    """Why such a lookup has no kernel on any device, so that PyTorch's operator runs it; None: it has one."""
    if isinstance(ids, torch.fx.Proxy) or isinstance(weight, torch.fx.Proxy):
        return "torch.fx traces it"
    check_integers("ids", ids)
    check_shape("weight", weight, (None, None), "(num_embeddings, embedding_dim): 'weight' must be 2-D", optional=False)
    if ids.device != weight.device:
        raise TensorValueError(f"ids: expected device {weight.device}, that of weight; got {ids.device}")
    if max_norm is not None or scale_grad_by_freq or sparse:
        return "max_norm, scale_grad_by_freq and sparse have no kernel"
    if policy == "zero":
        return ZEROS
    for tensor in (ids, weight):
        if is_traceable_wrapper_subclass(tensor):
            return f"a {type(tensor).__name__} brings operators of its own"
    if not takes(weight):
        return f"{weight.dtype} on {weight.device} has no kernel"
    return None


def _row(padding_idx: int | None, table: Tensor) -> int:
    if padding_idx is not None:
        check_shape("token", table, (None, None), "(num_embeddings, embedding_dim)", optional=False)
    return -1 if padding_idx is None else pad_row(padding_idx, table.shape[0])


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
    rows: Rows | Sequence[Rows] | None = None,
) -> Tensor:
    """dropout(scale·token[ids] + segment[segment_ids] + position[position_ids]), each term rounded to the table's dtype.

    ids (..., T) int32 or int64, token (V, D), position (L, D) or positions.sinusoidal_steps (2, D), of which rows are computed,
    segment (S, D), BERT's token types -> (..., T, D). position_ids, segment_ids: (T,), (1, T) or like ids; None means 0 … T−1,
    and segment 0. dropout: the probability of an element to become zero, drawn from PyTorch's generator; 0 outside of training.
    Differentiable in token, position and segment. id_policy and errors as in embedding, of positions and segments too.
    rows: one or several vocabulary.Rows, which stand, unscaled, in place of the token rows of their placeholders. ValueError:
    there are not as many as placeholders. On a GPU a later call raises it, as of ids, and these tokens' results are NaN; where
    PyTorch's operators run there or a compiler's graph does, they assert (RuntimeError); under torch.func there is NaN alone.
    """
    policy = settings.current.id_policy if id_policy is None else policy_of(id_policy)
    row = -1 if padding_idx is None else _row(padding_idx, token)
    terms = Terms(ids, token, position, position_ids, segment, segment_ids, None, scale, dropout, row)
    terms = terms if rows is None else with_rows(terms, rows)
    return run(Call(terms, NO_NORM, None, NO_EPILOGUE, policy))


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
    rotary: Rotary | Pair | None = None,
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
    rows: Rows | Sequence[Rows] | None = None,
) -> HiddenQKV:
    """The front end of a transformer: gather, positional add, norm and QKV projection.

    ids (..., T) int32 or int64; token (V, D); weight (N, D) and bias (N,), rows of query, then key, then value, with
    N = (num_heads + 2·num_kv_heads)·head_dim; norm "layer" (LayerNorm, Ba et al. 2016), "rms" (RMSNorm, Zhang and Sennrich
    2019) or None, with norm_weight (D,) and norm_bias (D,); position, position_ids, scale, segment, segment_ids and dropout of
    hidden as in embed.
    Returns hidden (..., T, D), the residual stream, rounded to the table's dtype; query (..., T, num_heads, head_dim); key
    and value (..., T, num_kv_heads, head_dim), or (..., num_heads, T, head_dim) and so on, contiguous, where heads_first.
    Statistics and accumulation are in fp32. distinct: the batch's distinct ids, where a data loader found them already.
    ValueError: they are not those of ids (values are compared on the CPU, on a GPU within pyembed.debug()).
    query_norm, key_norm: weights (head_dim,) of an RMSNorm of each head with head_eps, before it turns (Qwen3, Gemma 3).
    rotary: turns query and key, in fp32 by the kernels: a Rotary, by position_ids, or cosines and sines (T, R), (1, T, R) or
    (..., T, R) of each token, half behind half, as most of transformers passes them, to turn columns (i, i + R/2); a CosSin
    says what else a pair may be. They get no gradient. ValueError: values laid out otherwise (they are looked at on the CPU,
    on a GPU within pyembed.debug(); elsewhere query and key become NaN).
    query_biases: two of (num_heads, head_dim), Transformer-XL's u and v: query is (2, …), q + u and q + v.
    Differentiable once in every floating argument. All tensors share one dtype (float32, float16, bfloat16; float64 on the
    CPU) and one device. fp32 products on a GPU use tf32 where torch.backends.cuda.matmul says so.
    batch_invariant: a token's results have the same bits alone and at any place of any batch, by one order of sums for all
    (slower where another would suit better). Else that holds by the kernels, within a plan, among calls of up to 16 or 32
    tokens, and of more as far as kernels/triton/tuning.py takes the same kernels for them, and tiles of one depth.
    RuntimeError: torch.export, or torch.compile with fullgraph, of PyTorch's operators.
    Under autocast, weight and bias are cast to its dtype, which query, key and value have, and hidden and the norm keep theirs.
    id_policy, rows and errors as in embed.
    """
    if num_kv_heads == 0:
        check_heads(num_heads, num_kv_heads)
    epilogue = NO_EPILOGUE
    if rotary is not None or query_norm is not None or key_norm is not None or heads_first or not head_eps >= 0:
        epilogue = Epilogue(query_norm, key_norm, None, *turns(rotary, ids, position_ids), head_eps, heads_first)
    row = -1 if padding_idx is None else _row(padding_idx, token)
    if position is None and epilogue.turn_ids is not None:
        position_ids = None  # which the rotary tables alone look up
    call = Call(
        Terms(ids, token, position, position_ids, segment, segment_ids, None, scale, dropout, row),
        Norm("none" if norm is None else norm, norm_weight, norm_bias, eps),
        Projection(weight, bias, num_heads, num_heads if num_kv_heads is None else num_kv_heads),
        epilogue,
        settings.current.id_policy if id_policy is None else policy_of(id_policy),
        batch_invariant,
        distinct,
    )
    if query_biases is not None:
        check(call)
        check_query_biases(query_biases, call, call.head_dim)
        call = with_query_biases(call, *query_biases)
    if rows is not None:
        call = call_with_rows(call, rows)
    return run(call)
