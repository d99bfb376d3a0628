"""Rows that stand in place of token rows: patches of an image by rank, soft prompts by id.

The table is looked up for all tokens and the other rows are written over that, so the gradient of rows is (R, D), and nothing
of the table's size is made. On the CPU only the tokens concerned are touched; on a GPU, where their number is not known to
the host, a row is looked up for every token and one of the two is chosen. By the plan `distinct` the same is done for the
distinct rows alone, which then are a table of their own.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .call import Call, Called, Terms, as_table
from .checks import check_integers
from .modes import can_read, is_plain_eager


class Rows(NamedTuple):
    """rows (R, D), of the table's dtype and device, for the tokens that placeholder names.

    placeholder: one id, whose n-th occurrence, row-major over the batch, takes row n (by rank, as masked_scatter does); or R
    ids, of which the r-th takes row r wherever it stands (by id: soft prompts). They may lie outside the table.
    """

    rows: Tensor  # (R, D)
    placeholder: int | Sequence[int]


OWN_ROWS = list[Any]()  # forwards of token modules some of whose ids take rows of the module's own, beside its weight


def own_rows(forward: Any) -> Any:
    """Marks the forward of such a module: own() gives the ids, ascending, the row of each, and the rows (R, D)."""
    OWN_ROWS.append(forward)
    return forward


def slots_of(flat: Tensor, ids: Tensor, order: Tensor) -> Tensor:
    """Which row each of flat (M,) takes, (M,) int64, −1: none. ids (R,) ascending, R > 0; order (R,): the row of each."""
    place = torch.searchsorted(ids, flat.to(ids.dtype)).clamp_(max=ids.numel() - 1)
    return torch.where(ids.index_select(0, place) == flat, order.index_select(0, place), -1)


def write(found: Tensor, slot: Tensor, own: Tensor, in_order: bool = False) -> Tensor:
    """found (M, D), changed in place where that costs less, with the row of own (R, D) that slot (M,) names, where it is not
    negative. in_order: the n-th that takes a row takes row n."""
    taken = slot >= 0
    if not can_read(slot):
        chosen = F.embedding(slot.clamp(min=0), own if own.shape[0] else own.new_zeros(1, own.shape[1]))
        return torch.where(taken.unsqueeze(-1), chosen, found)
    places = taken.nonzero().view(-1)
    return found.index_copy_(0, places, own if in_order else F.embedding(slot.index_select(0, places), own))


class Extended(Called):
    """In a Call in place of a token table: rows of the table and, for some tokens, of own, in the table's place."""

    def __init__(self, terms: Terms, own: Tensor, slot: Tensor, in_order: bool) -> None:
        """own (R, D), slot (M,): as in write. terms: of the table or module beside it, its scale and padding_idx."""
        token: Any = terms.token
        is_called = isinstance(token, Called)
        self.table = None if is_called else token  # (V, D)
        self.own, self.slot, self.in_order = own, slot, in_order
        self._token, self._scale, self._padding_idx = token, terms.scale, terms.padding_idx
        weight = token.weight if is_called else token
        module, has_rows = (token.module, token.has_rows) if is_called else (nn.Module(), True)
        super().__init__(module, self._of_all, weight, has_rows)

    def _of_all(self, ids: Tensor) -> Tensor:
        """Rows (..., D) of all tokens. ids: of the table, any for tokens that take a row of own."""
        return self._rows_at(ids, self.slot, self.in_order)

    def _rows_at(self, ids: Tensor, slot: Tensor, in_order: bool = False) -> Tensor:
        # (M, D) from the first, and no view: autograd copies the gradient of a view that is written to.
        if self.table is None:
            found = self._token(ids)
            found = found.reshape(-1, found.shape[-1]).clone()  # it may be something that the module keeps
        else:
            found = torch.embedding(self.table, ids.reshape(-1), self._padding_idx)
        found = found if self._scale is None else found * self._scale
        return write(found, slot, self.own, in_order).view(*ids.shape, found.shape[-1])

    def arguments(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float | None, int]:
        """ids, slot, table, own, of at least one row, scale and padding_idx, as the operator pyembed::gather takes them."""
        assert self.table is not None
        own = self.own if self.own.shape[0] else self.own.new_zeros(1, self.own.shape[1])
        scale = None if self._scale is None else float(self._scale)
        return ids, self.slot, self.table, own, scale, self._padding_idx

    def plain(self, call: Call) -> Call:
        """The call as if all rows were the table's, by which plans are chosen as far as values do not matter."""
        token: Any = self.table
        return call._replace(terms=call.terms._replace(token=token, scale=None))

    def find(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """ids (U,) and slot (U,) of the distinct rows that the call uses, and index (M,), the place of each token's among them.
        Its ids lie in the table where they count."""
        assert self.table is not None
        ids, V = call.terms.ids.reshape(-1), self.table.shape[0]
        if call.distinct is not None:  # by id: the same ids take the same rows
            used, index = call.distinct.ids, call.distinct.inverse.reshape(-1)
            return used, self.slot.new_full((used.numel(),), -1).scatter_(0, index.long(), self.slot), index
        keys, index = torch.unique(torch.where(self.slot < 0, ids, self.slot + V), return_inverse=True)
        return keys.masked_fill(keys >= V, 0), torch.where(keys < V, -1, keys - V), index

    def small(self, call: Call, found: tuple[Tensor, Tensor, Tensor]) -> Call:
        """The call over a table (U, D) of the rows that find found."""
        ids, slot, index = found
        table, index, distinct = as_table(self._rows_at(ids, slot), index.view(call.terms.ids.shape))
        terms = call.terms._replace(ids=index, token=table, scale=None, padding_idx=-1)
        return call._replace(terms=terms, distinct=distinct)


def check_row_ids(name: str, ids: Any, size: int | None = None) -> Tensor:
    """Ids (R,) int64 on the CPU, each once, in [0, size) where a size is given. Errors name the argument `name`."""
    given = torch.as_tensor(ids).cpu() if not isinstance(ids, range) else torch.arange(ids.start, ids.stop, ids.step)
    if given.numel() == 0:
        raise ValueError(f"{name}: expected at least one id, got none")
    if given.dim() != 1 or given.dtype.is_floating_point or given.dtype == torch.bool:
        raise TypeError(f"{name}: expected ids (R,) of integers, got {given.dtype} {tuple(given.shape)}")
    values, counts = given.long().unique(return_counts=True)
    if counts.max() > 1:
        raise ValueError(f"{name}: expected each id once, got {int(values[counts > 1][0])} {int(counts.max())} times")
    if size is not None and (values[0] < 0 or values[-1] >= size):
        raise IndexError(f"{name}: expected ids in [0, {size}), got {int(values[0] if values[0] < 0 else values[-1])}")
    return given.long()


def call_with_rows(call: Call, rows: "Rows | Sequence[Rows] | None", module: Any = None) -> Call:
    """with_rows of a call's terms. ValueError: distinct ids, which know no rows."""
    if call.distinct is not None and rows is not None:
        raise ValueError("distinct: expected None where rows stand in place of token rows, got distinct ids")
    return call._replace(terms=with_rows(call.terms, rows, module))


def with_rows(terms: Terms, rows: "Rows | Sequence[Rows] | None", module: Any = None) -> Terms:
    """Terms whose token rows are the table's and those of module, a token with rows of its own, times scale, and these rows,
    unscaled, at their placeholders."""
    check_integers("ids", terms.ids)
    flat = terms.ids.reshape(-1)
    parts: list[Tensor] = []  # not list[Tensor](), which a compiler does not know
    slot = torch.full_like(flat, -1, dtype=torch.long)
    if module is not None:
        ids, order, mine = module.own()
        slot, parts = slots_of(flat, ids, order), [mine if terms.scale is None else mine * terms.scale]
    streams = [] if rows is None else _checked(rows, terms)
    in_table, start = flat, sum(map(len, parts))
    for name, stream in streams:
        found, mine = _find(name, stream, terms.ids)
        slot, in_table = torch.where(found < 0, slot, found + start), in_table.masked_fill(found >= 0, 0)
        parts.append(mine)
        start += mine.shape[0]
    if not parts:
        return terms
    own = parts[0] if len(parts) == 1 else torch.cat(parts)
    in_order = module is None and len(streams) == 1 and isinstance(streams[0][1].placeholder, int)
    token: Any = Extended(terms, own, slot, in_order)
    return terms._replace(ids=in_table.view(terms.ids.shape), token=token, scale=None, padding_idx=-1)


def _checked(rows: Any, terms: Terms) -> list[tuple[str, Rows]]:
    given = [rows] if isinstance(rows, Rows) else rows
    if not isinstance(given, list | tuple) or not all(isinstance(each, Rows) for each in given):
        raise TypeError(f"rows: expected a pyembed.vocabulary.Rows or several, got {type(rows).__name__}")
    streams = [("rows" if isinstance(rows, Rows) else f"rows[{n}]", each) for n, each in enumerate(given)]
    table = terms.token.weight if isinstance(terms.token, Called) else terms.token
    seen: dict[int, str] = {}
    for name, (own, placeholder) in streams:
        if not isinstance(own, Tensor) or own.dim() != 2 or table is not None and own.shape[1] != table.shape[1]:
            got = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
            raise ValueError(f"{name}: expected a Tensor (R, {'D' if table is None else table.shape[1]}), got {got}")
        if table is not None and (own.dtype != table.dtype or own.device != table.device):
            expected, got = f"{table.dtype} on {table.device}", f"{own.dtype} on {own.device}"
            raise TypeError(f"{name}: expected {expected}, as the table has; got {got}")
        is_ranked = isinstance(placeholder, int) and not isinstance(placeholder, bool)
        ids = [placeholder] if is_ranked else _placed(name, placeholder, terms.ids.device)[0]
        if not is_ranked and len(ids) != own.shape[0]:
            raise ValueError(f"{name}: expected as many placeholder ids as rows, {own.shape[0]}; got {len(ids)}")
        for each in ids:
            other = seen.setdefault(each, name)
            if other is not name:
                raise ValueError(f"{name}.placeholder: expected ids that no other rows have, got {each}, which {other} has")
    return streams


_Placed = tuple[list[int], Tensor, Tensor]


def _placed(name: str, placeholder: Any, device: torch.device) -> _Placed:
    """Placeholder ids (R,), the same ascending, on the device, and the row of each. Of ints they are found once."""
    is_known = isinstance(placeholder, range) or isinstance(placeholder, list | tuple) and set(map(type, placeholder)) == {int}
    if is_known and torch.compiler.is_compiling():
        return _constant(name, tuple(placeholder), device)
    if not is_known or not is_plain_eager():
        return _sort(name, placeholder, device)
    return _sorted(name, placeholder if isinstance(placeholder, range) else tuple(placeholder), device)


def _sort(name: str, placeholder: Any, device: torch.device) -> _Placed:
    with torch.inference_mode(False):
        ids = check_row_ids(f"{name}.placeholder", placeholder)
        values, order = ids.sort()
        return ids.tolist(), values.to(device), order.to(device)


_sorted = functools.lru_cache(64)(_sort)


@torch.compiler.assume_constant_result
def _constant(name: str, placeholder: tuple[int, ...], device: torch.device) -> _Placed:
    return _sort(name, placeholder, device)


def _find(name: str, stream: Rows, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(slot (M,), rows) of a stream, as write takes them."""
    rows, placeholder = stream
    flat = ids.reshape(-1)
    if not isinstance(placeholder, int):
        _, values, order = _placed(name, placeholder, flat.device)
        return slots_of(flat, values, order), rows
    taken = flat == placeholder
    rank = taken.cumsum(0) - 1
    if can_read(ids):
        _check_count(name, taken, rows.shape[0], ids)
    else:  # nobody waits to hear of it: the tokens' results are NaN
        wrong = taken.sum() != rows.shape[0]
        rows = torch.where(wrong, torch.nan, rows if rows.shape[0] else rows.new_zeros(1, rows.shape[1]))
        rank = rank.clamp(max=rows.shape[0] - 1)
    return torch.where(taken, rank, -1), rows


def _check_count(name: str, taken: Tensor, rows: int, ids: Tensor) -> None:
    count = int(taken.sum())
    if count == rows:
        return
    rank = taken.cumsum(0)
    length = ids.shape[-1] if ids.dim() else 1
    if count > rows:
        where = f"the first without a row is in batch row {int((rank > rows).nonzero()[0]) // length}"
    else:
        first = int(rank[length - 1]) if rank.numel() else 0
        where = f"batch row 0 has {first}"
    raise ValueError(f"{name}: expected as many rows as there are placeholders, {count}; got {rows}: {where}")
