"""What a call is to compute, as one value that goes whole through checks, plans, operators and launchers.

    hidden = dropout(scale · token[ids] + segment[segment_ids] + position[position_ids])    Terms
    query, key, value = heads of norm(hidden) · weightᵀ + bias                              Norm, Projection
    query, key = rotary(norm of each head)                                                  Epilogue

To add a term: its fields at the end of Terms, with a row of LOOKUPS and TABLES where it looks up a table; its formula in
reference.py; its lines in the kernels (arguments.py, tiles.py, embed_grad.py); its argument in functional.py. Operators,
gradients, checks of ids, id policies and sharding go over the fields by name.
"""

import operator
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .kept import Kept

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


class HiddenQKV(NamedTuple):
    """What a front end hands to its transformer: the residual stream and the first layer's projections."""

    hidden: Tensor  # (..., T, D)
    query: Tensor  # (..., T, H, d_h)
    key: Tensor  # (..., T, H_kv, d_h)
    value: Tensor  # (..., T, H_kv, d_h)


class DistinctIds(NamedTuple):
    """Which ids a batch has, as torch.unique(ids, return_inverse=True) finds them."""

    ids: Tensor  # (U,) ascending
    inverse: Tensor  # like the batch's ids: the place of each among the distinct ones


for _kind in (HiddenQKV, DistinctIds):  # torch.export writes their names
    pytree._register_namedtuple(_kind, serialized_type_name=f"pyembed.{_kind.__name__}")


class Called:
    """In a Call in place of a weight: a module that must be called, because it does more than apply its weight.

    function: what to call, by default the module. weight: by which shapes, devices and dtypes are checked; None: nothing is
    checked. has_rows: whether ids must name rows of weight; else the module alone knows which it takes.
    """

    def __init__(
        self,
        module: nn.Module,
        function: Callable[..., Tensor] | None = None,
        weight: Tensor | None = None,
        has_rows: bool = True,
    ):
        self.module, self.function, self.weight = module, function or module, weight
        self.has_rows = has_rows and weight is not None

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)

    def in_table(self, ids: Tensor) -> Tensor:
        """ids, of which all must name rows of weight where it has_rows."""
        return ids


STOCK_FORWARDS = list[Any]()  # of modules of ours that do no more than look up rows of their weight


def stock_forward(forward: Any) -> Any:
    """Marks the forward of such a module, which need not be called."""
    STOCK_FORWARDS.append(forward)
    return forward


class Terms(NamedTuple):
    """The terms of hidden; None: the term is absent."""

    ids: Tensor  # (..., T) int32 or int64
    token: Tensor  # (V, D)
    position: Tensor | None = None  # (L, D), or int64 (2, D): positions.sinusoidal_steps, which have a row for any position
    position_ids: Tensor | None = None  # (T,), (1, T) or like ids; None: 0 … T−1
    segment: Tensor | None = None  # (S, D)
    segment_ids: Tensor | None = None  # (T,), (1, T) or like ids; None: all 0
    seed: Tensor | None = None  # (1,) int64 of the kernels' dropout, drawn for each call
    scale: float | None = None  # of the token row
    dropout: float = 0.0  # probability that an element becomes zero
    padding_idx: int = -1  # row of token without a gradient; −1: none

    @property
    def length(self) -> int:
        """T: tokens of a sequence."""
        return self.ids.shape[-1] if self.ids.dim() else 1


class Norm(NamedTuple):
    """LayerNorm, RMSNorm or none, with statistics in at least fp32."""

    kind: str = "none"  # "layer", "rms", "none", or "called": weight is a Called
    weight: Tensor | None = None  # (D,)
    bias: Tensor | None = None  # (D,)
    eps: float = 0.0


class Projection(NamedTuple):
    """The linear map to query, key and value: N = (num_heads + 2·num_kv_heads)·head_dim outputs."""

    weight: Tensor  # (N, D), rows of query, then key, then value; or of query alone, where key and value have their own
    bias: Tensor | None  # (N,), or of query alone
    num_heads: int
    num_kv_heads: int  # 0: query alone, which is then the whole product
    key_weight: Tensor | None = None  # (H_kv·d_h, D)
    value_weight: Tensor | None = None
    key_bias: Tensor | None = None  # (H_kv·d_h,)
    value_bias: Tensor | None = None

    @property
    def groups(self) -> tuple[int, int, int]:
        """Heads of query, key and value."""
        return self.num_heads, self.num_kv_heads, self.num_kv_heads

    @property
    def own(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """Weight and bias of query, key and value, where each has its own; else none."""
        weight, bias, _, _, key_weight, value_weight, key_bias, value_bias = self
        if key_weight is None or value_weight is None:
            return ()
        return (weight, bias), (key_weight, key_bias), (value_weight, value_bias)

    def cat(self) -> tuple[Tensor, Tensor | None]:
        """One weight and bias of all, where each has its own."""
        weights, biases = zip(*self.own, strict=True)
        if all(bias is None for bias in biases):
            return torch.cat(weights), None
        return torch.cat(weights), torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in self.own])

    @property
    def rows(self) -> int:
        """N."""
        return sum(weight.shape[0] for weight, _ in self.own) or self.weight.shape[0]


class Epilogue(NamedTuple):
    """Steps that are applied to query, key and value after the projection."""

    query_norm: Tensor | None = None  # (d_h,) weight of an RMSNorm of each head, before it turns
    key_norm: Tensor | None = None
    query_offset: Tensor | None = None  # (H·d_h,) added to query for a second query, behind the first
    cos: Tensor | None = None  # (rows, R/2), or (..., T, R/2) of each token, float32: rotary turns of query and key
    sin: Tensor | None = None
    turn_ids: Tensor | None = None  # (T,), (1, T) or like ids: rows of cos and sin; None: token m takes row m % rows
    interleaved: bool = False  # pairs (2i, 2i+1); else (i, i + R/2)
    head_eps: float = 0.0
    heads_first: bool = False  # (..., h, T, d_h)
    query_bias: Tensor | None = None  # (H·d_h,) added to query before all else

    def split_turns(self) -> tuple["Epilogue", "Epilogue"]:
        """What a kernel does that can only rotate heads, and what PyTorch's operators apply afterwards."""
        if self.query_norm is not None or self.query_offset is not None:  # which come before the turn
            return Epilogue(), self
        return self._replace(heads_first=False), Epilogue(heads_first=self.heads_first)


NO_NORM, NO_EPILOGUE = Norm(), Epilogue()


class Call(NamedTuple):
    """A whole call. Without a projection it is hidden alone."""

    terms: Terms
    norm: Norm = NO_NORM
    projection: Projection | None = None
    epilogue: Epilogue = NO_EPILOGUE
    id_policy: str = "raise"
    batch_invariant: bool = False  # one order of sums for any number of tokens
    distinct: DistinctIds | None = None  # of ids, where a data loader found them
    concat: bool = False  # position rows stand beside token rows, 2·D wide; by PyTorch's operators alone
    kept: Kept | None = None  # where what the norm's and the projection's weights give may be kept for later calls

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        assert self.projection is not None
        return self.projection.rows // sum(self.projection.groups)

    def empty_outputs(self) -> tuple[Tensor, ...]:
        """hidden, query, key, value, mean (M,) or (0,), rstd (M,) or (0,): what the kernels fill and a fake call returns.

        Query, key and value have the dtype of weight, which differs from token's under autocast.
        """
        assert self.projection is not None
        (ids, token, *_), kind, (weight, _, heads, kv_heads, *_) = self.terms, self.norm.kind, self.projection
        shape, M, wide = tuple(ids.shape), ids.numel(), torch.promote_types(token.dtype, torch.float32)
        width, qkv = weight.shape[0] // (heads + 2 * kv_heads), list[Tensor]()
        for n in (heads, kv_heads, kv_heads):
            own = (*shape[:-1], n, *shape[-1:], width) if self.epilogue.heads_first else (*shape, n, width)
            second = self.epilogue.query_offset is not None and not qkv
            qkv.append(weight.new_empty((2, *own) if second else own))
        statistics = (token.new_empty(M if kind in kinds else 0, dtype=wide) for kinds in (("layer",), ("layer", "rms")))
        return token.new_empty(*shape, token.shape[1]), *qkv, *statistics

    def packed(self) -> "Call":
        """With one weight and one bias of query, key and value, as kernels take them."""
        projection, added = self.projection, self.epilogue.query_bias
        if projection is None or added is None and projection.key_weight is None:
            return self
        weight, bias, heads, kv_heads, *_ = projection
        kept = self.kept
        if projection.own:
            weight, bias = projection.cat() if kept is None else kept.get("packed", weight.dtype, projection.cat)
        if added is not None:
            kept = None  # the bias is this call's own
            added = torch.nn.functional.pad(added, (0, weight.shape[0] - added.numel()))
            bias = added if bias is None else bias + added
        epilogue = self.epilogue if added is None else self.epilogue._replace(query_bias=None)
        return self._replace(projection=Projection(weight, bias, heads, kv_heads), epilogue=epilogue, kept=kept)

    def unpacked(self, grads: dict[str, Tensor], needs: set[str]) -> dict[str, Tensor]:
        """Gradients by name, those of the weight and bias of packed() among them -> of this call's fields in needs, each with
        memory of its own."""
        assert self.projection is not None
        found, rows = dict(grads), [heads * self.head_dim for heads in self.projection.groups]
        if "query_bias" in needs and "bias" in grads:
            found["query_bias"] = grads["bias"][: rows[0]].clone()
        if self.projection.own:
            for packed in ("weight", "bias"):
                parts = grads[packed].split(rows) if packed in grads else ()
                for name, part in zip((packed, f"key_{packed}", f"value_{packed}"), parts, strict=False):
                    if name in needs:
                        found[name] = part.clone()
        return found

    def wants_grad(self) -> bool:
        """Whether a gradient of it may be asked for."""
        return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in self.values())

    def named(self) -> dict[str, Any]:
        """Every field of the parts by its name as an operator's argument."""
        return dict(zip(NAMES, self.values(), strict=True))

    def values(self) -> tuple[Any, ...]:
        """The fields of all parts, and the options of operators, in the order of NAMES."""
        terms, norm, projection, epilogue, policy, invariant, *_ = self
        return terms + norm + (projection or _NO_PROJECTION) + epilogue + (policy != "trust", invariant)


_NO_PROJECTION = (None,) * len(Projection._fields)
PARTS: tuple[Any, ...] = (Terms, Norm, Projection, Epilogue)


def _schema_types() -> Iterator[tuple[str, str]]:
    """Each field's name as an argument of an operator and its type as PyTorch's schemas write it.

    The norm's fields have its name before them, since weight and bias are the projection's.
    """
    types = {Tensor: "Tensor", float: "float", bool: "bool", int: "SymInt", str: "str"}
    for part in PARTS:
        for field, hint in typing.get_type_hints(part).items():
            kind, *optional = typing.get_args(hint) or (hint,)
            yield f"norm_{field}" if part is Norm else field, types[kind] + "?" * len(optional)
    yield "reports", "bool"  # whether ids without a row are to raise an error
    yield "batch_invariant", "bool"


SCHEMA = dict(_schema_types())
NAMES = tuple(SCHEMA)


class Lookup(NamedTuple):
    """Which part of a Call has a field of ids and one of the table whose rows they name, and what messages call both."""

    part: str
    ids: str
    table: str
    ids_name: str
    table_name: str


LOOKUPS = (
    Lookup("terms", "ids", "token", "ids", "token"),
    Lookup("terms", "position_ids", "position", "position_ids", "position"),
    Lookup("terms", "segment_ids", "segment", "segment_ids", "segment"),
    Lookup("epilogue", "turn_ids", "cos", "position_ids", "rotary"),
)
BY_PLACE = ("position", "cos")  # tables whose row is the token's place in its sequence where no ids are given; of others row 0
# What a backward by kernels has gradients of; the norms of heads are PyTorch's where a gradient is wanted.
TABLES = ("token", "position", "segment")
PROJECTING = ("weight", "bias", "query_offset", "query_bias", "key_weight", "value_weight", "key_bias", "value_bias")
LEARNED = (*TABLES, "norm_weight", "norm_bias", *PROJECTING)


def _sources(output: str, own: bool) -> tuple[str, ...]:
    if output == "hidden":
        return TABLES
    weights = ("weight", "bias") if output == "query" or not own else (f"{output}_weight", f"{output}_bias")
    return (*TABLES, "norm_weight", "norm_bias", *weights, *(("query_offset", "query_bias") if output == "query" else ()))


# Of LEARNED, what hidden, query, key and value depend on; [True]: where key and value have weights of their own.
SOURCES = [tuple(_sources(output, own) for output in HiddenQKV._fields) for own in (False, True)]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics and sums are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class PaddingError(ValueError, AssertionError):
    """padding_idx is no row of its table: PyTorch raises an AssertionError."""


def pad_row(padding_idx: int | None, rows: int) -> int:
    """padding_idx as Terms have it: counted from the table's beginning, −1 for None. PaddingError: no row of the table."""
    if padding_idx is None:
        return -1
    if type(padding_idx) is not int:  # NumPy's, or in a Tensor, as PyTorch takes them too
        if isinstance(padding_idx, bool) or not hasattr(padding_idx, "__index__"):
            raise TypeError(f"padding_idx: expected an int, got {type(padding_idx).__name__}")
        padding_idx = operator.index(padding_idx)
    if not -rows <= padding_idx < rows:
        raise PaddingError(f"padding_idx: expected a row in [{-rows}, {rows}), got {padding_idx}")
    return padding_idx + rows if padding_idx < 0 else padding_idx


def places(ids: Tensor) -> Tensor:
    """0 … T−1 for ids (..., T): (T,), or () for a single id; of a DTensor one like ids."""
    if type(ids) is not Tensor and not torch.compiler.is_compiling():
        return torch.ones_like(ids).cumsum(ids.dim() - 1) - 1  # in shards, cumsum(-1) is wrong in torch 2.13
    return torch.arange(ids.shape[-1] if ids.dim() else 1, device=ids.device).view(ids.shape[-1:])


def rows_of(table: Tensor | Called) -> int | None:
    """How many rows a table has; positions.sinusoidal_steps have one for any position below 2³¹ − 1. None: the module that is
    called alone knows."""
    weight = table.weight if isinstance(table, Called) else table
    if weight is None or isinstance(table, Called) and not table.has_rows:
        return None
    return weight.shape[0] if weight.is_floating_point() else 2**31 - 1


def as_table(rows: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor, DistinctIds]:
    """Rows (..., D) -> a table of them, ids that name them, and the same as DistinctIds. index: the row of each token; None:
    each row once, in order."""
    flat = torch.arange(rows.shape[:-1].numel(), device=rows.device)
    index = flat.view(rows.shape[:-1]) if index is None else index
    return rows.reshape(-1, rows.shape[-1]), index, DistinctIds(flat, index)


class Layout:
    """Fields of a Call as named arguments of an operator, so that a graph which shows it can be read.

    Tensors come first: DTensor's cache of sharding decisions ignores what stands before the first number.
    """

    def __init__(self, *fields: str):
        self.names = tuple(sorted(fields, key=lambda name: "Tensor" not in SCHEMA[name]))  # stable
        self.schema = ", ".join(f"{SCHEMA[name]} {name}" for name in self.names)
        self._places = tuple(map(NAMES.index, self.names))

    def flatten(self, call: Call) -> tuple[Any, ...]:
        """The call's fields, in the order of names."""
        values = call.values()
        return tuple([values[place] for place in self._places])

    def rebuild(self, flat: Sequence[Any]) -> Call:
        """The Call of these fields; those that the layout lacks are None, as is a projection without a weight."""
        named = dict.fromkeys(NAMES) | dict(zip(self.names, flat, strict=True))
        values = iter(named.values())
        terms, norm, projection, epilogue = (part(*(next(values) for _ in part._fields)) for part in PARTS)
        policy = "raise" if named["reports"] else "trust"
        has_projection = projection.weight is not None
        return Call(terms, norm, projection if has_projection else None, epilogue, policy, bool(named["batch_invariant"]))


HIDDEN = Layout(*Terms._fields, "reports")
FRONT_END = Layout(*NAMES)
