"""Large results of the CPU, in memory that is used again once nothing refers to it.

Every call of a stock operator maps fresh pages for a large result, and touching those first costs several times what writing
them does. Here a result lives in a buffer of its own; when the last tensor over it is gone (Python's reference count of the
buffer says so), a later call takes the buffer. What is kept unused is bounded by KEEP_BYTES, and empty_cache() gives it back.
"""

import math
import mmap
import os
import sys
import threading

import torch

SMALL_BYTES = 4 << 20  # below it the C library keeps memory by itself
KEEP_BYTES = 1 << 30
_buffers: list[mmap.mmap] = []
_lock = threading.Lock()
_counts_references = getattr(sys, "_is_gil_enabled", lambda: True)()


def _idle():
    """The buffers that no tensor refers to: those with no more references than one that never had a tensor."""
    (unused,) = [sys.getrefcount(buffer) for buffer in [bytearray()]]
    return [buffer for buffer in _buffers if sys.getrefcount(buffer) <= unused]


def pages(size: int) -> mmap.mmap:
    """Memory that the system has just given, which the C library's may not be: it keeps what was freed. A forked process has
    its own."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """torch.empty on the CPU; a large tensor may take over a buffer that no tensor refers to any more."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < SMALL_BYTES or not _counts_references:
        return torch.empty(shape, dtype=dtype, device="cpu")
    with _lock:
        fitting = [buffer for buffer in _idle() if size <= len(buffer) <= size * 5 // 4]
        buffer = min(fitting, key=len, default=None)
        if buffer is None:
            buffer = pages(size)
            _buffers.append(buffer)
        flat = torch.frombuffer(buffer, dtype=dtype, count=count)
        # No view of it, which its user could not change in place.
        tensor = torch.empty(0, dtype=dtype, device="cpu").set_(flat.untyped_storage(), 0, shape)
        del buffer, fitting, flat
        _keep(KEEP_BYTES)
        return tensor


def empty_each(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """empty for each of these shapes."""
    return [empty(*shape, dtype=dtype) for shape in shapes]


def _after_fork():
    """The child leaves its parent's buffers alone: another thread may have held the lock, or been about to take one."""
    global _lock
    _lock = threading.Lock()
    _buffers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def empty_cache():
    """Gives back to the system what no tensor uses."""
    with _lock:
        _keep(0)


def _keep(limit: int):
    """Drops idle buffers, the longest kept first, until they hold no more than limit bytes."""
    idle = _idle()
    excess = sum(map(len, idle)) - limit
    while idle and excess > 0:
        excess -= len(idle[0])
        _buffers.remove(idle.pop(0))
