"""A caching allocator for large CPU results.

PyTorch maps fresh pages for each large result, and the page faults of the first write cost several times the write itself.
Here the storages of large results are kept, and a later result of the same size reuses one that nothing else refers to, by
PyTorch's count of references and by Python's. They are PyTorch's own, and as large as their results, which can so be resized,
shared and saved like any other tensor. Unused storages hold at most KEEP_BYTES together; empty_cache() frees them.
"""

import math
import os
import sys
import threading

import torch

SMALL_BYTES = 4 << 20  # the C library's malloc reuses smaller blocks by itself
KEEP_BYTES = 1 << 30
_storages: list[torch.UntypedStorage] = []  # those in use and those kept, the one that was used last at the end
_lock = threading.Lock()
_counts_references = hasattr(torch._C, "_storage_Use_Count") and getattr(sys, "_is_gil_enabled", lambda: True)()


def _idle() -> list[torch.UntypedStorage]:
    """Storages that this list alone refers to. Forgets those that another process may see, and those that were made small."""
    _storages[:] = [storage for storage in _storages if storage.nbytes() >= SMALL_BYTES and not storage.is_shared()]
    (unused,) = [sys.getrefcount(storage) for storage in [torch.UntypedStorage(0)]]
    alone = [storage for storage in _storages if sys.getrefcount(storage) <= unused]  # enough in torch 2.13
    return [storage for storage in alone if torch._C._storage_Use_Count(storage._cdata) == 1]


def _storage(size: int) -> torch.UntypedStorage:
    """One of so many bytes that nothing else refers to."""
    found = next((storage for storage in _idle() if storage.nbytes() == size), None)
    if found is None:
        found = torch.UntypedStorage(size, device="cpu")
    _storages[:] = [*(storage for storage in _storages if storage is not found), found]
    return found


def empty(*shape: int, dtype: torch.dtype, has_room: bool = False) -> torch.Tensor:
    """torch.empty on the CPU; a tensor of at least SMALL_BYTES may reuse memory that nothing else refers to.

    has_room: its storage may be a quarter larger, so that it serves tensors of other sizes too: of what no user sees."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < SMALL_BYTES or not _counts_references:
        return torch.empty(shape, dtype=dtype, device="cpu")
    step = 1 << size.bit_length() - 3 if has_room else 1
    with _lock:
        storage = _storage(-(-size // step) * step)
        # Not a view: autograd refuses in-place changes of views made under no_grad or in a custom Function.
        strides = [math.prod(shape[axis:]) for axis in range(1, len(shape) + 1)]
        tensor = torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, strides)
        _trim(KEEP_BYTES)
        return tensor


def empty_each(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """empty for each of these shapes."""
    return [empty(*shape, dtype=dtype) for shape in shapes]


def _after_fork() -> None:
    """The child starts anew: at the fork another thread of the parent may have held the lock, or been taking memory."""
    global _lock
    _lock = threading.Lock()
    _storages.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def empty_cache() -> None:
    """Frees the CPU memory that is kept for reuse and that no tensor uses. (For GPU memory: torch.cuda.empty_cache.)"""
    with _lock:
        _trim(0)


def _trim(limit: int) -> None:
    """Drops idle storages, those not used for longest first, until they hold at most `limit` bytes."""
    idle = _idle()
    excess = sum(storage.nbytes() for storage in idle) - limit
    while idle and excess > 0:
        dropped = idle.pop(0)
        excess -= dropped.nbytes()
        _storages[:] = [storage for storage in _storages if storage is not dropped]
