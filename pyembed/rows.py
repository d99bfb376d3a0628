"""Rows that stand in place of token rows: patches of an image by rank, soft prompts by id.

The table is looked up for all tokens and the other rows are written over that, so the gradient of rows is (R, D), and nothing
of the table's size is made. On the CPU only the tokens concerned are touched; on a GPU, where their number is not known to
the host, a row is looked up for every token and one of the two is chosen. By the plan `distinct` the same is done for the
distinct rows alone, which then are a table of their own. Kernels: plans/gathered.py.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from . import tied
from .call import Call, Called, Terms, as_table
from .checks import check_integers
from .modes import can_read, is_plain_eager, is_recorded, is_transformed


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
    place = torch.searchsorted(ids, flat.to(ids.dtype).contiguous()).clamp_(max=ids.numel() - 1)
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


class Stream(NamedTuple):
    """Tokens that take rows of own: one id by rank, or ids by which the rows are found."""

    number: int  # −1: rows that a module keeps for ids of its table; 0: the argument is `rows`; n + 1: rows[n]
    size: int  # R, of its rows, which stand in own behind those of the streams before it
    placeholder: int = -1  # by rank
    values: Tensor | None = None  # (R,) ids, ascending, by id
    order: Tensor | None = None  # (R,) the row of each


class Extended(Called):
    """In a Call in place of a token table: rows of the table and, for some tokens, of own, in the table's place."""

    def __init__(self, terms: Terms, own: Tensor, streams: list[Stream], clamps: bool) -> None:
        """own (R, D): the rows of all streams, of which a later one comes first where an id is of two. terms: of the table or
        module beside it, its scale and padding_idx, and the ids. clamps: whether ids outside the table take its nearest row."""
        token: Any = terms.token
        is_called = isinstance(token, Called)
        self.table = None if is_called else token  # (V, D)
        self.own, self.streams, self.ids, self._length = own, streams, terms.ids.reshape(-1), terms.length
        self._slot: Tensor | None = None
        self._clamps = clamps
        self._token, self._scale, self._padding_idx = token, terms.scale, terms.padding_idx
        weight = token.weight if is_called else token
        module, has_rows = (token.module, token.has_rows) if is_called else (nn.Module(), True)
        super().__init__(module, self._of_all, weight, has_rows)

    @property
    def slot(self) -> Tensor:
        """Which row of own each token takes, (M,) int64; −1: none. ValueError: a stream has more or fewer rows than
        placeholders; where values may not be read, its tokens have −2."""
        if self._slot is None:  # kernels have keys instead
            first, *others = self.streams
            ids = self.ids
            if first.number < 0 and self._clamps and self.table is not None and self.table.shape[0]:
                ids = ids.clamp(0, self.table.shape[0] - 1)
            slot, start = _find(first, ids, self._length), first.size
            for stream in others:
                found = _find(stream, self.ids, self._length)
                slot = torch.where(found == -1, slot, torch.where(found < 0, found, found + start))
                start += stream.size
            self._slot = slot
        return self._slot

    def in_table(self, ids: Tensor) -> Tensor:
        """ids (..., T), 0 for those of tokens that take rows of own but for a module's, which are of the table too."""
        if self.streams[-1].number < 0:
            return ids
        return ids.reshape(-1).masked_fill(self.slot != -1, 0).view(ids.shape)

    def _of_all(self, ids: Tensor) -> Tensor:
        """Rows (..., D) of all tokens. ids: of the table, any for tokens that take a row of own."""
        in_order = len(self.streams) == 1 and self.streams[0].values is None
        found = self._rows_at(self.in_table(ids), self.slot, in_order)
        if can_read(ids) or all(stream.values is not None for stream in self.streams):
            return found
        return found.masked_fill((self.slot < -1).view(ids.shape).unsqueeze(-1), torch.nan)

    def _rows_at(self, ids: Tensor, slot: Tensor, in_order: bool = False) -> Tensor:
        # (M, D) from the first, and no view: autograd copies the gradient of a view that is written to.
        if self.table is None:
            found = self._token(ids)
            found = found.reshape(-1, found.shape[-1]).clone()  # it may be something that the module keeps
        else:
            found = tied.look_up(self.table, ids.reshape(-1), self._padding_idx)
        found = found if self._scale is None else found * self._scale
        return write(found, slot, self.own, in_order).view(*ids.shape, found.shape[-1])

    def tables(self) -> tuple[Tensor, Tensor, float | None, int]:
        """table, own, of at least one row, scale and padding_idx, as the operator pyembed::gather takes them."""
        assert self.table is not None
        own = self.own if self.own.shape[0] else self.own.new_zeros(1, self.own.shape[1])
        return self.table, own, None if self._scale is None else float(self._scale), self._padding_idx

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
    return call._replace(terms=with_rows(call.terms, rows, module, call.id_policy))


def with_rows(terms: Terms, rows: "Rows | Sequence[Rows] | None", module: Any = None, policy: str = "raise") -> Terms:
    """Terms whose token rows are the table's and those of module, a token with rows of its own, times scale, and these rows,
    unscaled, at their placeholders. policy: the call's id policy, which a module's rows obey as the table's do."""
    check_integers("ids", terms.ids)
    parts: list[Tensor] = []  # not list[Tensor](), which a compiler does not know
    streams: list[Stream] = []
    if module is not None:
        values, order, mine = module.own()
        _check_kind("token.rows", mine, module.weight)
        streams, parts = [Stream(-1, mine.shape[0], -1, values, order)], [mine if terms.scale is None else mine * terms.scale]
    for n, (mine, placeholder) in enumerate([] if rows is None else _checked(rows, terms)):
        number = 0 if isinstance(rows, Rows) else n + 1
        if isinstance(placeholder, int):
            streams.append(Stream(number, mine.shape[0], placeholder))
        else:
            by_id = _placed(_name(number), placeholder, terms.ids.device)[1:]
            streams.append(Stream(number, mine.shape[0], -1, *by_id))
        parts.append(mine)
    if not parts:
        return terms
    extended = Extended(terms, parts[0] if len(parts) == 1 else torch.cat(parts), streams, policy == "clamp")
    if _can_count(terms.ids) or is_recorded():  # counts are compared; a trace must not keep this example's slots
        extended.slot  # noqa: B018
    token: Any = extended
    return terms._replace(token=token, scale=None, padding_idx=-1)


def _name(number: int) -> str:
    return f"rows[{number - 1}]" if number else "rows"


def _check_kind(name: str, own: Tensor, table: Tensor) -> None:
    if own.dtype != table.dtype or own.device != table.device:
        expected, got = f"{table.dtype} on {table.device}", f"{own.dtype} on {own.device}"
        raise TypeError(f"{name}: expected {expected}, as the table has; got {got}")


def _checked(rows: Any, terms: Terms) -> "Sequence[Rows]":
    given = [rows] if isinstance(rows, Rows) else rows
    if not isinstance(given, list | tuple) or not all(isinstance(each, Rows) for each in given):
        raise TypeError(f"rows: expected a pyembed.vocabulary.Rows or several, got {type(rows).__name__}")
    table = terms.token.weight if isinstance(terms.token, Called) else terms.token
    seen: dict[int, str] = {}
    for n, (own, placeholder) in enumerate(given):
        name = _name(0 if isinstance(rows, Rows) else n + 1)
        if not isinstance(own, Tensor) or own.dim() != 2 or table is not None and own.shape[1] != table.shape[1]:
            got = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
            raise ValueError(f"{name}: expected a Tensor (R, {'D' if table is None else table.shape[1]}), got {got}")
        if table is not None:
            _check_kind(name, own, table)
        is_ranked = isinstance(placeholder, int) and not isinstance(placeholder, bool)
        ids = [placeholder] if is_ranked else _placed(name, placeholder, terms.ids.device)[0]
        if not is_ranked and len(ids) != own.shape[0]:
            raise ValueError(f"{name}: expected as many placeholder ids as rows, {own.shape[0]}; got {len(ids)}")
        for each in ids:
            other = seen.setdefault(each, name)
            if other is not name:
                raise ValueError(f"{name}.placeholder: expected ids that no other rows have, got {each}, which {other} has")
    return given


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
    with _disable_current_modes():  # in which torch.export makes tensors without values
        return _sort(name, placeholder, device)


def _find(stream: Stream, ids: Tensor, length: int) -> Tensor:
    """Which row of its stream each of ids (M,) takes, as in Extended.slot. length: T."""
    number, rows, placeholder, values, order = stream
    if values is not None and order is not None:
        return slots_of(ids, values, order)
    taken = ids.long() == placeholder  # which need not fit into the dtype of ids, and would wrap
    rank = taken.cumsum(0)
    if _can_count(ids):
        count = int(rank[-1]) if rank.numel() else 0
        if count != rows:
            place = int((rank > rows).nonzero()[0]) if count > rows else int(taken[:length].sum())
            raise wrong_count(number, count, rows, place, length)
        return torch.where(taken, rank - 1, -1)
    is_right = taken.sum() == rows
    if not is_transformed():  # where there is NaN alone; else PyTorch's masked_scatter tells in the same way
        torch._assert_async(is_right, f"{_name(number)}: expected as many as there are placeholders {placeholder}, got {rows}")
    return torch.where(taken, torch.where(is_right, rank - 1, -2), -1)


def _can_count(ids: Tensor) -> bool:
    """Whether it costs no waiting to know how often an id stands in ids; in none it stands nowhere."""
    return can_read(ids) or not torch.compiler.is_compiling() and ids.numel() == 0


def wrong_count(number: int, count: int, rows: int, place: int, length: int, where: str = "") -> ValueError:
    """The error of a placeholder that stands `count` times where there are so many rows. number: of the Stream. place: of the
    first token without a row, else how often it stands in the first sequence. length: tokens of a sequence."""
    first = f"the first without a row is in batch row {place // length}" if count > rows else f"batch row 0 has {place}"
    text = f"{_name(number)}: expected as many rows as there are placeholders, {count}; got {rows}: {first}{where}"
    return ValueError(text)
