"""A caching allocator for large CPU results.

PyTorch maps fresh pages for each large result, and the page faults of the first write cost several times the write itself.
Here each large result has a buffer, which a later call reuses once no tensor refers to it (by Python's reference count of the
buffer). Unused buffers hold at most KEEP_BYTES together; empty_cache() frees them.
"""

import math
import mmap
import os
import sys
import threading

import torch

SMALL_BYTES = 4 << 20  # the C library's malloc reuses smaller blocks by itself
KEEP_BYTES = 1 << 30
_buffers: list[mmap.mmap] = []  # those in use and those kept, oldest first
_lock = threading.Lock()
_counts_references = getattr(sys, "_is_gil_enabled", lambda: True)()


def _idle() -> list[mmap.mmap]:
    """Buffers that no tensor refers to: those with no more references than an object that only a list holds."""
    (unused,) = [sys.getrefcount(buffer) for buffer in [bytearray()]]
    return [buffer for buffer in _buffers if sys.getrefcount(buffer) <= unused]


def pages(size: int) -> mmap.mmap:
    """Zeroed pages straight from the operating system, never memory that malloc has kept. Private: copied on fork."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """torch.empty on the CPU; a tensor of at least SMALL_BYTES may reuse a buffer that no other tensor refers to."""
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
        # Not a view of flat: autograd refuses in-place changes of views made under no_grad or in a custom Function.
        strides = [math.prod(shape[axis:]) for axis in range(1, len(shape) + 1)]
        tensor = torch.empty(0, dtype=dtype, device="cpu").set_(flat.untyped_storage(), 0, shape, strides)
        del buffer, fitting, flat
        _trim(KEEP_BYTES)
        return tensor


def empty_each(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """empty for each of these shapes."""
    return [empty(*shape, dtype=dtype) for shape in shapes]


def _after_fork() -> None:
    """The child starts anew: at the fork another thread of the parent may have held the lock, or been taking a buffer."""
    global _lock
    _lock = threading.Lock()
    _buffers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def empty_cache() -> None:
    """Frees the CPU buffers that are kept for reuse and that no tensor uses. (For GPU memory: torch.cuda.empty_cache.)"""
    with _lock:
        _trim(0)


def _trim(limit: int) -> None:
    """Drops idle buffers, oldest first, until they hold at most `limit` bytes."""
    idle = _idle()
    excess = sum(map(len, idle)) - limit
    while idle and excess > 0:
        excess -= len(idle[0])
        _buffers.remove(idle.pop(0))
