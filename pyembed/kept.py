"""What is computed from weights and kept between calls, and how a change of the weights is noticed.

A kept value belongs to the modules and tensors that it was made from. Before each call it is held against them: the same
objects, at the same address, with the same version (PyTorch counts in-place changes), and stepped by no optimizer (PyTorch does
not count what fused ones do). What else it does not count, changes through `.data`, NumPy or DLPack, by torch.distributed, the
replay of a CUDA graph or another process, is looked for on the CPU, in whole vectors and in 64 elements of a larger weight: a
change of a whole tensor is seen, one of a single row or element mostly is not.
"""

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

WHOLE = 4096  # elements of a vector up to which all of them are compared
SAMPLES = 64  # elements of a larger weight that are compared: each costs a cache line, and few rows of a head lie between two
Value = TypeVar("Value")
Links = list[tuple[dict[str, Any], str, Any]]


class Sources:
    """Objects that a kept value was made from, as they were when this was made: before they were read.

    links: (dict, key, value) of every object that a user can replace or change, tensors among them. unsampled: tensors of which
    the owner compares elements itself. RuntimeError, which begins with name: inference tensors, which count no changes.
    """

    def __init__(self, name: str, links: Links, unsampled: Iterable[Tensor] = ()) -> None:
        self.tensors = [value for _, _, value in links if isinstance(value, Tensor)]
        if any(tensor.is_inference() for tensor in self.tensors):
            raise RuntimeError(f"{name}: expected weights that count their changes, got tensors made in inference mode")
        self._links, self._stepped = links, False
        _see_optimizers()
        _sources.add(self)
        # The address of memory that was freed may come again; the storage that had it does not.
        self._stamps = [
            (tensor, tensor._version, tensor.data_ptr(), StorageWeakRef(tensor.untyped_storage())) for tensor in self.tensors
        ]
        apart = set(map(id, unsampled))
        on_cpu = [tensor for tensor in self.tensors if tensor.is_cpu and id(tensor) not in apart]  # where a look costs no wait
        self._samples = [(view, view.clone()) for view in (bits(_spread(tensor)) for tensor in on_cpu)]

    def are_unchanged(self) -> bool:
        """Whether they still are what they were, as far as can be seen."""
        if self._stepped:
            return False
        for holder, key, value in self._links:
            if holder.get(key) is not value:
                return False
        for tensor, version, address, storage in self._stamps:
            if tensor._version != version or tensor.data_ptr() != address or storage.expired():
                return False
        return all(torch.equal(view, copy) for view, copy in self._samples)


_sources = weakref.WeakSet[Sources]()  # that an optimizer may step


@functools.cache
def _see_optimizers() -> None:
    """From the first kept value on, PyTorch tells of every optimizer's step."""
    register_optimizer_step_post_hook(_after_step)


@torch._disable_dynamo  # type: ignore[attr-defined]  # compiled, it would not run at each step
def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"] if tensor.requires_grad}
    for sources in list(_sources):
        if any(id(tensor) in stepped for tensor in sources.tensors):
            sources._stepped = True


class Kept:
    """Values that one front end's weights give, each kept until they change: a new Kept is made then."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self._device = next((tensor.device for tensor in sources.tensors), torch.device("cpu"))
        self._values: dict[str, tuple[Any, Any]] = {}

    def get(self, name: str, how: Any, make: Callable[[], Value]) -> Value:
        """make(), or what it gave for the same name, how, and stream of the GPU, on which alone it is known to be finished."""
        key = how, torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else None
        found = self._values.get(name)
        if found is None or found[0] != key:
            self._values.pop(name, None)  # its memory comes first
            self._values[name] = found = key, make()
        return found[1]


def _spread(tensor: Tensor) -> Tensor:
    """A short vector whole; of others SAMPLES elements, each of another row and column, from one end to the other."""
    if tensor.numel() == 0 or tensor.dim() == 1 and len(tensor) <= WHOLE:
        return tensor.detach()
    count = min(SAMPLES, *tensor.shape)
    step = sum(size // count * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((count,), (step,), tensor.storage_offset())


def bits(tensor: Tensor) -> Tensor:
    """To compare NaN with itself."""
    return tensor.detach().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
