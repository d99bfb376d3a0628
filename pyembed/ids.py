"""What happens to an id that has no row in its table: an error that names it, the nearest row, a row of zeros, or NaN.

A GPU's kernels do not wait for the host, nor it for them, so there an error comes late: the kernel makes the token's results
NaN and notes one such token in the host's memory, which every later call by a kernel reads.
"""

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor, nn

from .call import BY_PLACE, LOOKUPS, Call, Called, MaybeTensor, places, rows_of
from .rows import wrong_count
from .settings import checked_policy, policy_of


class HasIdPolicy(nn.Module):
    """A module with an id_policy of its own, or None: that of the context."""

    __jit_unused_properties__ = ("id_policy",)
    _id_policy: str | None = None

    @property
    def id_policy(self) -> str | None:
        """What happens to ids without a row, as pyembed.id_policy has it; None, the default: what the context says."""
        return self._id_policy

    @id_policy.setter
    def id_policy(self, name: str | None) -> None:
        self._id_policy = None if name is None else checked_policy(name)

    def _policy(self) -> str:
        return policy_of(self._id_policy)


class _Report:
    """What the kernels on one device tell of absent rows: see tiles.report_absent."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._lock = device, threading.Lock()
        with torch.inference_mode(False):  # tensors made in it could not be changed outside
            self.words = torch.zeros(6, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self._count = ctypes.c_int64.from_address(self.words.data_ptr())  # reads in 0.1 µs, where a tensor takes 1

    def look(self) -> None:
        if self._count.value:
            self._fail()

    def clear(self) -> None:
        with torch.inference_mode(False):
            self.words.zero_()

    def _fail(self) -> None:
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return  # a later call will
            torch.cuda.synchronize(self.device)
        with self._lock:
            count, table, value, token, size, length = self.words.tolist()
            self.clear()
        if count:  # another thread may have been first
            if table >= len(LOOKUPS):
                raise wrong_count(table - len(LOOKUPS), value, size, token, length, f", in a call on {self.device}")
            *_, name, of = LOOKUPS[table]
            raise IndexError(
                f"{name}: expected values in [0, {size}), the rows of the {of} table; got {value} for token {token % length} "
                f"of sequence {token // length}, in a call on {self.device}"
            )


_reports: dict[torch.device, tuple[_Report, _Report]] = {}


def report_of(device: torch.device, raises: bool) -> Tensor:
    """(6,) int64 in the host's memory, where kernels report absent rows and wrong counts of rows. raises: whether a later call
    reads it and raises."""
    reports = _reports.get(device)
    if reports is None:
        reports = _reports.setdefault(device, (_Report(device), _Report(device)))
    return reports[raises].words


def forget(device: torch.device) -> None:
    """Drop what was reported, after another error than those."""
    if device in _reports:
        _reports[device][True].clear()


def look(device: torch.device) -> None:
    """IndexError: an earlier kernel on this device met an id outside its table. ValueError: fewer or more rows than
    placeholders."""
    if device in _reports:
        _reports[device][True].look()


def check_ids() -> None:
    """Waits for the GPUs and raises what calls before this one had to tell, under any policy but "trust".

    IndexError: an id without a row, under the policy "raise". ValueError: not as many rows as placeholders."""
    for device in list(_reports):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        look(device)


def apply_policy(call: Call) -> Call:
    """The call as the policies "clamp" and "zero" leave it: positions beyond a table are written out, ids are clamped.

    Under "zero" rotary rows are looked up here, since an absent one turns nothing: cosine 1, sine 0."""
    parts: dict[str, Any] = {"terms": call.terms, "epilogue": call.epilogue}
    for lookup in LOOKUPS:
        part = parts[lookup.part]
        ids, table = getattr(part, lookup.ids), getattr(part, lookup.table)
        if lookup.table in BY_PLACE:
            ids = _written_out(call.terms.ids, ids, table)
        parts[lookup.part] = part._replace(**{lookup.ids: _clamped(ids, table) if call.id_policy == "clamp" else ids})
    terms, epilogue = parts["terms"], parts["epilogue"]
    turn_ids = epilogue.turn_ids
    if call.id_policy == "zero" and turn_ids is not None and epilogue.cos is not None and epilogue.sin is not None:
        absent = ((turn_ids < 0) | (turn_ids >= epilogue.cos.shape[0])).reshape(-1)
        rows = turn_ids.reshape(-1).masked_fill(absent, 0)
        cos, sin = (
            table.index_select(0, rows).masked_fill(absent.unsqueeze(-1), value).view(*turn_ids.shape, -1)
            for table, value in ((epilogue.cos, 1.0), (epilogue.sin, 0.0))
        )
        epilogue = epilogue._replace(cos=cos, sin=sin, turn_ids=None)
    return call._replace(terms=terms, epilogue=epilogue, distinct=None)  # which is of ids as they came


def write_out(call: Call) -> Call:
    """The call with positions 0 … T−1 written out, so that a trace of it looks up, and misses, those of any length."""
    terms, epilogue, own = call.terms, call.epilogue, places(call.terms.ids)
    if terms.position is not None and terms.position_ids is None:
        terms = terms._replace(position_ids=own)
    if epilogue.cos is not None and epilogue.turn_ids is None and epilogue.cos.dim() == 2:
        epilogue = epilogue._replace(turn_ids=own)
    return call._replace(terms=terms, epilogue=epilogue)


def _written_out(ids: Tensor, position_ids: Tensor | None, table: Tensor | Called | None) -> Tensor | None:
    """position_ids, or 0 … T−1 where a table has fewer rows."""
    T = ids.shape[-1] if ids.dim() else 1
    rows = None if table is None else rows_of(table)
    is_short = position_ids is None and rows is not None and rows < T and getattr(table, "ndim", 2) == 2
    return places(ids) if is_short else position_ids


def _clamped(ids: MaybeTensor, table: Tensor | Called | None) -> MaybeTensor:
    """ids within a table; where it has no rows they stay."""
    rows = None if table is None else rows_of(table)
    return ids.clamp(0, rows - 1) if ids is not None and rows else ids
