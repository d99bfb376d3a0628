"""What of PyTorch's machinery is at work: compilers, tracers, transforms, autocast."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import settings
from .call import MaybeTensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


TENSORS = (Tensor, nn.Parameter)  # no subclass, which may bring operators of its own


def is_traced() -> bool:
    """Whether tensors are fake, proxies or functional ones: without values."""
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (modes.FAKE, modes.PROXY, modes.FUNCTIONAL))


def is_recorded() -> bool:
    """Whether torch.jit.trace records what runs, to replay it with ids of other values and lengths."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """What looks at the example that is traced, and belongs to no replay."""
    state, set_state = torch._C._get_tracing_state(), getattr(torch._C, "_set_tracing_state")  # noqa: B009  not in its stubs
    set_state(None)
    try:
        yield
    finally:
        set_state(state)


def refuse_scripting(module: nn.Module) -> NoReturn:
    """The __prepare_scriptable__ of modules whose forward is more than TorchScript knows."""
    raise RuntimeError(
        f"torch.jit.script: expected modules that TorchScript can compile, got {type(module).__name__}, which it cannot: take "
        "torch.jit.trace, torch.export or torch.compile"
    )


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work, for which our operators have no rules."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_plain_eager() -> bool:
    """No compiler, tracer, torch.func transform or forward-mode AD is at work."""
    return not (torch.compiler.is_compiling() or is_traced() or is_transformed())


def is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph records what runs over it, to repeat it over other values."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def can_read(tensor: Tensor) -> bool:
    """Whether a check may look at the values of this tensor: where that costs no synchronisation, or within debug()."""
    here = tensor.device.type == "cpu" or settings.current.debug and tensor.is_cuda
    if not here or torch.compiler.is_compiling() or is_traceable_wrapper_subclass(tensor):
        return False
    return not (is_traced() or is_transformed() or is_recorded())


def autocast_dtype(token: Tensor) -> torch.dtype | None:
    """The dtype that products over this table have under autocast; None: autocast is off, or leaves them alone."""
    kind = token.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind) or token.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def has_process_group() -> bool:
    """Whether there is a process group of torch.distributed, without which there are no DTensors."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_dtensor(value: object) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor; to be asked where there is a process group, since it imports torch.distributed.tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def brings_operators(value: object) -> bool:
    """Whether it is a tensor of another kind, as quantised weights are; a DTensor has its own way."""
    if not isinstance(value, Tensor) or type(value) in TENSORS:
        return False
    function = type(value).__torch_function__
    is_usual = function is torch._C._disabled_torch_function_impl
    is_usual = is_usual or getattr(function, "__func__", None) is getattr(Tensor.__torch_function__, "__func__", 0)
    if is_usual and not is_traceable_wrapper_subclass(value):
        return False
    return not (has_process_group() and is_dtensor(value))


def local(tensor: MaybeTensor) -> MaybeTensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if has_process_group() and is_dtensor(tensor) else tensor
