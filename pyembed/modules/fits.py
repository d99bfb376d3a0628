"""Whether the modules that a front end is made of are what they must be, and fit each other."""

from typing import Any

from torch import nn

from ..checks import class_of
from ..rotary import Rotary
from .known import HEAD_NORMS, NAMES, Known, is_stock, linear_weights, parts_of, table_of

LINEARS = (
    "expected one nn.Linear, Hugging Face Conv1D or other module with in_features and out_features, of all heads, or a "
    "(query, key, value) tuple of these"
)


def check_tables(**tables: Any) -> None:
    """TypeError: an argument of this name is no embedding, nor around one; only token must be there."""
    for name, table in tables.items():
        if table is None and name != "token" or isinstance(table, nn.Module) and table_of(table) is not None:
            continue
        raise TypeError(f"{name}: expected an nn.Embedding{' or None' * (name != 'token')}, got {class_of(table)}")


def check_widths(modules: dict[str, Any], known: Known, num_heads: int, num_kv_heads: int, combine: str, moves: bool) -> int:
    """The width of a head. moves: whether a module between sum and norm may change the width. TypeError: a module that does not
    say its widths; ValueError: parts that do not fit each other."""
    token, _, _, norm, qkv, *head_norms = (modules[name] for name in NAMES)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    inputs, outputs = zip(*(_widths(part, known, place) for place, part in parts_of("qkv", qkv)), strict=True)
    width = inputs[0]
    if len(set(inputs)) > 1:
        raise ValueError(f"qkv: expected three of as many inputs, got {list(inputs)}")
    tables = {name: table_of(modules[name]) for name in ("token", "position", "segment")}
    columns = {name: table.shape[1] for name, table in tables.items() if table is not None}
    D = columns.get("token") if isinstance(token, nn.Embedding) else None  # a wrapper may project its rows
    for name in ("position", "segment"):
        if D is not None and columns.get(name, D) != D and combine == "sum":
            raise ValueError(f"{name}: expected {D} columns, the width of token; got {columns[name]}")
    total = None if D is None else D if combine == "sum" else D + columns["position"]
    if total not in (None, width) and not moves:
        raise ValueError(f"qkv: expected {total} inputs, the width of token; got {width}")
    _check_norm("norm", norm, known, (width,), "the width of token")
    head_dim, rest = divmod(sum(outputs), sum(heads))
    if rest:
        raise ValueError(
            f"qkv: expected a multiple of num_heads + 2·num_kv_heads ({num_heads} + 2·{num_kv_heads}) outputs, got "
            f"{sum(outputs)}"
        )
    if len(outputs) > 1 and list(outputs) != [h * head_dim for h in heads]:
        raise ValueError(f"qkv: expected outputs of query, key and value in the ratio {heads}, got {list(outputs)}")
    for name, head_norm, count in zip(HEAD_NORMS, head_norms, heads[:2], strict=True):
        _check_norm(name, head_norm, known, (head_dim, count * head_dim), "head_dim, or that of all heads")
    return head_dim


def _widths(linear: Any, known: Known, place: str) -> tuple[int, int]:
    """Inputs and outputs of a linear map."""
    if is_stock("qkv", linear) or known.finding("qkv", linear, place) is not None:
        N, D = linear_weights(linear, known, place)[0].shape
        return D, N
    inputs, outputs = getattr(linear, "in_features", None), getattr(linear, "out_features", None)
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        raise TypeError(f"qkv: {LINEARS}, got {class_of(linear)}")
    return inputs, outputs


def _check_norm(name: str, norm: nn.Module | None, known: Known, widths: tuple[int, ...], meaning: str) -> None:
    if norm is None:
        return
    is_known = is_stock(name, norm)
    found = None if is_known else known.finding(name, norm)
    if not is_known and found is None:
        return  # it alone knows
    weight = getattr(norm, "weight" if found is None else found.weight or "weight", None)
    shape = tuple(getattr(norm, "normalized_shape", widths[:1])) if weight is None else tuple(weight.shape)
    if shape not in [(width,) for width in widths]:
        raise ValueError(f"{name}: expected normalized_shape {(widths[0],)}, {meaning}; got {shape}")


def fitting(rotary: Any, head_dim: int, unlike_halves: str | None = None) -> Rotary | None:
    """rotary, if it may turn heads of this width, in the model of a class unlike_halves."""
    if rotary is not None and not isinstance(rotary, Rotary):
        raise TypeError(
            f"rotary: expected a pyembed.Rotary or None, got {class_of(rotary)}: take pyembed.Rotary.from_module(it, "
            "max_length), or pass its (cos, sin) at each call"
        )
    if rotary is not None and (rotary.rotary_dim > head_dim or head_dim % 2):
        raise ValueError(f"rotary: expected a rotary_dim up to an even head_dim ({head_dim}), got {rotary.rotary_dim}")
    if rotary is not None and unlike_halves and not rotary.is_told:
        raise ValueError(
            f"rotary: expected one that is told interleaved=True or False, since the model of a {unlike_halves} does not turn "
            "columns (i, i + R/2); got None"
        )
    return rotary
