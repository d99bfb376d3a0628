"""Rows that stand in place of token rows: patches of an image by rank, soft prompts by id.

The table is looked up for all tokens and the other rows are written over that, so the gradient of rows is (R, D), and nothing
of the table's size is made. On the CPU only the tokens concerned are touched; on a GPU, where their number is not known to
the host, a row is looked up for every token and one of the two is chosen.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .call import Call, Called, Terms
from .modes import can_read


class Rows(NamedTuple):
    """rows (R, D), of the table's dtype and device, for the tokens that placeholder names.

    placeholder: one id, whose n-th occurrence, row-major over the batch, takes row n (by rank, as masked_scatter does); or R
    ids, of which the r-th takes row r wherever it stands (by id: soft prompts). They may lie outside the table.
    """

    rows: Tensor  # (R, D)
    placeholder: int | Sequence[int]


class Slots(NamedTuple):
    """For each of M tokens: whether it takes a row, and which."""

    taken: Tensor  # (M,) bool
    slot: Tensor | None  # (M,) int64 in [0, R); None: the n-th that takes a row takes row n
    wrong: Tensor | None = None  # () bool, on the device: there are more or fewer of them than rows


def slots_of(flat: Tensor, ids: Tensor, order: Tensor) -> Slots:
    """flat (M,); ids (R,) ascending, R > 0; order (R,): the row of each."""
    place = torch.searchsorted(ids, flat.to(ids.dtype)).clamp_(max=ids.numel() - 1)
    return Slots(ids.index_select(0, place) == flat, order.index_select(0, place))


def write(found: Tensor, slots: Slots, rows: Tensor) -> Tensor:
    """found (M, D), changed in place where that costs less, with rows (R, D) at the tokens that take one."""
    if not can_read(slots.taken):
        assert slots.slot is not None
        own = F.embedding(slots.slot, rows if rows.shape[0] else rows.new_zeros(1, rows.shape[1]))
        if slots.wrong is not None:  # which nobody waits to hear of: the tokens' results are NaN
            own = torch.where(slots.wrong, torch.nan, own)
        return torch.where(slots.taken.unsqueeze(-1), own, found)
    places = slots.taken.nonzero().view(-1)
    return found.index_copy_(0, places, rows if slots.slot is None else F.embedding(slots.slot.index_select(0, places), rows))


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


def call_with_rows(call: Call, rows: Rows | Sequence[Rows]) -> Call:
    """with_rows of a call's terms. ValueError: distinct ids, which know no rows."""
    if call.distinct is not None:
        raise ValueError("distinct: expected None where rows stand in place of token rows, got distinct ids")
    return call._replace(terms=with_rows(call.terms, rows))


def with_rows(terms: Terms, rows: Rows | Sequence[Rows]) -> Terms:
    """Terms whose token rows are the table's, times scale, and these rows, unscaled, at their placeholders."""
    token: Any = terms.token  # a Tensor or a Called
    streams, ids, scale = _checked(rows, terms), terms.ids, terms.scale
    flat, taken, found = ids.reshape(-1), None, []
    for name, stream in streams:
        slots = _find(name, stream, ids)
        taken = slots.taken if taken is None else taken | slots.taken
        found.append((slots, stream.rows))
    if taken is None:
        return terms
    in_table = flat.masked_fill(taken, 0).view(ids.shape)

    def look_up(clean: Tensor) -> Tensor:
        is_called = isinstance(token, Called)  # whose result may be a view of something that the module keeps
        hidden = token(clean).clone() if is_called else torch.embedding(token, clean, terms.padding_idx)
        if scale is not None:
            hidden = hidden * scale
        flat = hidden.reshape(-1, hidden.shape[-1])
        for slots, own in found:
            flat = write(flat, slots, own)
        return flat.view(hidden.shape)

    weight = token.weight if isinstance(token, Called) else token
    module = token.module if isinstance(token, Called) else nn.Module()
    called: Any = Called(module, look_up, weight, token.has_rows if isinstance(token, Called) else True)
    return terms._replace(ids=in_table, token=called, scale=None, padding_idx=-1)


def _checked(rows: Any, terms: Terms) -> list[tuple[str, Rows]]:
    given = [rows] if isinstance(rows, Rows) else rows
    if not isinstance(given, list | tuple) or not all(isinstance(each, Rows) for each in given):
        raise TypeError(f"rows: expected a pyembed.vocabulary.Rows or several, got {type(rows).__name__}")
    streams = [("rows" if isinstance(rows, Rows) else f"rows[{n}]", each) for n, each in enumerate(given)]
    table, seen = terms.token.weight if isinstance(terms.token, Called) else terms.token, dict[int, str]()
    for name, (own, placeholder) in streams:
        if not isinstance(own, Tensor) or own.dim() != 2 or table is not None and own.shape[1] != table.shape[1]:
            got = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
            raise ValueError(f"{name}: expected a Tensor (R, {'D' if table is None else table.shape[1]}), got {got}")
        if table is not None and (own.dtype != table.dtype or own.device != table.device):
            expected, got = f"{table.dtype} on {table.device}", f"{own.dtype} on {own.device}"
            raise TypeError(f"{name}: expected {expected}, as the table has; got {got}")
        is_ranked = isinstance(placeholder, int) and not isinstance(placeholder, bool)
        ids = [placeholder] if is_ranked else check_row_ids(f"{name}.placeholder", placeholder).tolist()
        if not is_ranked and len(ids) != own.shape[0]:
            raise ValueError(f"{name}: expected as many placeholder ids as rows, {own.shape[0]}; got {len(ids)}")
        for each in ids:
            other = seen.setdefault(each, name)
            if other is not name:
                raise ValueError(f"{name}.placeholder: expected ids that no other rows have, got {each}, which {other} has")
    return streams


def _find(name: str, stream: Rows, ids: Tensor) -> Slots:
    rows, placeholder = stream
    flat = ids.reshape(-1)
    if not isinstance(placeholder, int):
        own = check_row_ids(f"{name}.placeholder", placeholder)
        values, order = own.sort()
        return slots_of(flat, values.to(flat.device), order.to(flat.device))
    taken = flat == placeholder
    if can_read(ids):
        _check_count(name, taken, rows.shape[0], ids)
        return Slots(taken, None)
    wrong = taken.sum() != rows.shape[0]
    return Slots(taken, (taken.cumsum(0) - 1).clamp(0, max(rows.shape[0] - 1, 0)), wrong)


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
