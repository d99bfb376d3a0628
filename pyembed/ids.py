"""What becomes of an id that has no row in its table: an error that names it, another row, a row of zeros, or NaN unsaid.

A GPU's kernels do not wait for the host, nor it for them, so there an error comes late: the kernel makes the token's results
NaN, notes the first such token in the device's memory and raises a flag in the host's, which every later call reads.
"""

import contextlib
import ctypes
import threading

import torch
from torch import Tensor, nn

from . import reference
from .rotary import Rotary, Rotation, as_rotation

POLICIES = ("raise", "clamp", "zero", "trust")
TABLES = (("ids", "token"), ("position_ids", "position"), ("segment_ids", "segment"), ("position_ids", "rotary"))
NOTHING = 2**63 - 1
BITS = 29  # of a word, behind the token's number: see kernels/triton/tiles.py
_policy = "raise"


@contextlib.contextmanager
def id_policy(name):
    """Within it, what calls do with ids, positions and segments outside of their tables; a module's own id_policy goes first.

    "raise"  IndexError that names the first one. On a CPU at once. On a GPU without any waiting: its results are NaN, and the
             next call or backward of this library on that device, or pyembed.check_ids(), raises; the process goes on.
    "clamp"  The nearest row serves, and gets the gradient.
    "zero"   A row of zeros serves (a rotary position turns nothing), by PyTorch's operators: this policy has no kernel.
    "trust"  None is looked for: on a GPU its results are NaN and nobody says so.

    What runs by PyTorch's operators on a GPU (see explain) under "raise" or "trust" ends in PyTorch's device-side assertion.
    ValueError: another name. The setting is the process's.
    """
    global _policy
    before, _policy = _policy, checked(name)
    try:
        yield
    finally:
        _policy = before


def checked(name):
    if name not in POLICIES:
        raise ValueError(f"id_policy: expected one of {POLICIES}, got {name!r}")
    return name


def applied(own: str | None) -> str:
    """The policy of a call whose module or argument has its own, or None."""
    return _policy if own is None else checked(own)


class HasIdPolicy(nn.Module):
    """A module with an id_policy of its own, or None: that of the context."""

    __jit_unused_properties__ = ("id_policy",)
    _id_policy = None

    @property
    def id_policy(self) -> str | None:
        return self._id_policy

    @id_policy.setter
    def id_policy(self, name: str | None):
        self._id_policy = None if name is None else checked(name)

    def _policy(self):
        return applied(self._id_policy)


class _Report:
    """What the kernels on one device tell of absent rows."""

    def __init__(self, device):
        self.device, self._lock = device, threading.Lock()
        with torch.inference_mode(False):  # tensors made in it could not be cleared outside
            self.words = torch.full((len(TABLES), 5), NOTHING, dtype=torch.int64, device=device)
            self.flag = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        self._raised = ctypes.c_int32.from_address(self.flag.data_ptr())  # reads in 0.1 µs, where a tensor takes 1

    def look(self):
        if self._raised.value:
            self._fail()

    def _fail(self):
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return  # a later call will
            torch.cuda.synchronize(self.device)
        with self._lock, torch.inference_mode(False):
            found = [(words[0] >> BITS, table, words) for table, words in enumerate(self.words.tolist())]
            self.words.fill_(NOTHING)
            self.flag.zero_()
        token, table, words = min(found)
        if words[0] == NOTHING:
            return  # another thread was first
        a, b, c, d, length = (word & (1 << BITS) - 1 for word in words)
        value, size = a | b << BITS | (c & 63) << 2 * BITS, d | c >> 6 << BITS
        value -= 2**64 if value >= 2**63 else 0
        name, of = TABLES[table]
        raise IndexError(
            f"{name}: expected values in [0, {size}), the rows of {of}; got {value} for token {token % length} of sequence "
            f"{token // length}, in a call on {self.device}"
        )


_reports = {}


def report_of(device: torch.device, shape: tuple, raises: bool):
    """Where the kernels of a call report absent rows, as tiles.report_absent takes it. raises: it is going to be read."""
    report = _reports.get((device, raises))
    if report is None:
        report = _reports.setdefault((device, raises), _Report(device))
    return report.words, report.flag, shape[-1] if shape else 1


def look(device: torch.device):
    """IndexError: a kernel on this device is known to have met an absent row."""
    report = _reports.get((device, True))
    if report is not None:
        report.look()


def check_ids():
    """Waits for the GPUs and raises IndexError if a call before this one had an id without a row, under the policy "raise"."""
    for (device, raises), report in list(_reports.items()):
        if raises:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            report.look()


def given_places(ids: Tensor, position_ids: Tensor | None, size: int | None) -> Tensor | None:
    """position_ids, or 0 … T−1 where a table of that size has not so many rows."""
    T = ids.shape[-1] if ids.dim() else 1
    if position_ids is not None or size is None or size >= T:
        return position_ids
    return torch.arange(T, device=ids.device) if ids.dim() else torch.zeros_like(ids)


def clamped(ids, position_ids, segment_ids, rows, places, kinds):
    """The three, each within its table of so many rows; None: there is no such table."""
    position_ids = given_places(ids, position_ids, places)
    given = ((ids, rows), (position_ids, places), (segment_ids, kinds))
    return tuple(x if x is None or not size else x.clamp(0, size - 1) for x, size in given)


def rows(policy, look_up, ids: Tensor, size: int) -> Tensor:
    """look_up(ids) -> (..., D), under the policy "zero" zeros where an id is outside [0, size)."""
    if policy != "zero":
        return look_up(ids)
    absent = (ids < 0) | (ids >= size)
    return look_up(ids.masked_fill(absent, 0)).masked_fill(absent.unsqueeze(-1), 0)


def look_up_or_zero(ids, table, padding_idx=None, dtype=None):
    """reference.look_up under the policy "zero"."""
    return rows("zero", lambda ids: reference.look_up(ids, table, padding_idx, dtype), ids, reference.rows_of(table))


def rotation(policy, rotary, ids: Tensor, position_ids: Tensor | None) -> Rotation:
    """as_rotation; under the policy "zero" an absent row turns nothing."""
    if policy != "zero" or position_ids is None or not isinstance(rotary, Rotary):
        return as_rotation(rotary, ids, position_ids)
    place, size = position_ids.reshape(-1), rotary.cos.shape[0]
    cos, sin = (rows(policy, table.__getitem__, place, size) for table in (rotary.cos, rotary.sin))
    return Rotation(cos.masked_fill(((place < 0) | (place >= size)).unsqueeze(-1), 1.0), sin, None, rotary.interleaved)
