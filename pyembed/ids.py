"""What becomes of an id that has no row in its table: an error that names it, another row, a row of zeros, or NaN unsaid.

A GPU's kernels do not wait for the host, nor it for them, so there an error comes late: the kernel makes the token's results
NaN and notes one such token in the host's memory, which every later call by a kernel reads.
"""

import contextlib
import ctypes
import threading

import torch
from torch import Tensor, nn

from . import reference, spread
from .rotary import Rotary, Rotation, as_rotation

POLICIES = ("raise", "clamp", "zero", "trust")
TABLES = (("ids", "token"), ("position_ids", "position"), ("segment_ids", "segment"), ("position_ids", "rotary"))
_policy = "raise"


@contextlib.contextmanager
def id_policy(name):
    """Within it, what calls do with ids, positions and segments outside of their tables; a module's own id_policy goes first.

    "raise"  IndexError that names the first one. On a CPU at once. On a GPU without any waiting: its results are NaN, and the
             next call or backward by a kernel of ours on that device, or pyembed.check_ids(), raises and names the one that
             came first there; the process goes on.
    "clamp"  The nearest row serves, and gets the gradient.
    "zero"   A row of zeros serves (a rotary position turns nothing), by PyTorch's operators: this policy has no kernel.
    "trust"  None is looked for: by the kernels its results are NaN and nobody says so. PyTorch's operators look anyway.

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
        raise ValueError(f"id_policy: expected one of {POLICIES} (a module's may be None), got {name!r}")
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
        """What becomes of ids without a row, as pyembed.id_policy has it; None, the default: what the context says."""
        return self._id_policy

    @id_policy.setter
    def id_policy(self, name: str | None):
        self._id_policy = None if name is None else checked(name)

    def _policy(self):
        return applied(self._id_policy)


class _Report:
    """What the kernels on one device tell of absent rows: see tiles.report_absent."""

    def __init__(self, device):
        self.device, self._lock = device, threading.Lock()
        with torch.inference_mode(False):  # tensors made in it could not be changed outside
            self.words = torch.zeros(6, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self._came = ctypes.c_int64.from_address(self.words.data_ptr())  # reads in 0.1 µs, where a tensor takes 1

    def look(self):
        if self._came.value:
            self._fail()

    def clear(self):
        with torch.inference_mode(False):
            self.words.zero_()

    def _fail(self):
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return  # a later call will
            torch.cuda.synchronize(self.device)
        with self._lock:
            came, table, value, token, size, length = self.words.tolist()
            self.clear()
        if came:  # another thread may have been first
            name, of = TABLES[table]
            raise IndexError(
                f"{name}: expected values in [0, {size}), the rows of {of}; got {value} for token {token % length} of sequence "
                f"{token // length}, in a call on {self.device}"
            )


_reports = {}


def report_of(device: torch.device, shape: tuple, raises: bool):
    """Where the kernels of a call over ids of this shape report absent rows. raises: somebody is going to look."""
    reports = _reports.get(device)
    if reports is None:
        reports = _reports.setdefault(device, (_Report(device), _Report(device)))
    return reports[raises].words, shape[-1] if shape else 1


def forget(device: torch.device):
    """After another error than that of an absent row."""
    if device in _reports:
        _reports[device][True].clear()


def look(device: torch.device):
    """IndexError: a kernel on this device is known to have met an absent row."""
    if device in _reports:
        _reports[device][True].look()


def check_ids():
    """Waits for the GPUs and raises IndexError if a call before this one had an id without a row, under the policy "raise"."""
    for device in list(_reports):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        look(device)


def given_places(ids: Tensor, position_ids: Tensor | None, size: int | None) -> Tensor | None:
    """position_ids, or 0 … T−1 where a table of that size has not so many rows."""
    T = ids.shape[-1] if ids.dim() else 1
    return spread.places(ids) if position_ids is None and size is not None and size < T else position_ids


def clamped(ids: Tensor | None, size: int | None) -> Tensor | None:
    """ids within a table of so many rows; None: there is no such table, or it has none."""
    return ids.clamp(0, size - 1) if ids is not None and size else ids


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
    """as_rotation; under the policy "clamp" the nearest row serves, under "zero" an absent one turns nothing."""
    if policy not in ("clamp", "zero") or not isinstance(rotary, Rotary):
        return as_rotation(rotary, ids, position_ids)
    size = rotary.cos.shape[0]
    position_ids = given_places(ids, position_ids, size)
    if policy == "clamp" or position_ids is None:
        return as_rotation(rotary, ids, clamped(position_ids, size))
    place = position_ids.reshape(-1)
    cos, sin = (rows(policy, table.__getitem__, place, size) for table in (rotary.cos, rotary.sin))
    return Rotation(cos.masked_fill(((place < 0) | (place >= size)).unsqueeze(-1), 1.0), sin, None, rotary.interleaved)
