"""Which implementation runs a call."""

import contextlib
import importlib.util

import torch

_backend = "auto"
BACKENDS = ("auto", "triton", "torch")
HAS_TRITON = importlib.util.find_spec("triton") is not None
_COMPILED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def backend(name):
    """Within it, calls run by Triton kernels ("triton"), by PyTorch's own operators ("torch"), or as fits ("auto").

    "auto" takes the kernels on a GPU and PyTorch on a CPU. "triton" with CPU tensors runs the kernels in Triton's
    interpreter: right, and slow. ValueError: another name. The setting is the process's, as torch.backends' are.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def uses_triton(token):
    """Whether a call over this table runs in Triton. RuntimeError, TypeError: it was asked to and cannot."""
    if _backend == "torch":
        return False
    if _backend == "auto":
        return token.is_cuda and token.dtype in _COMPILED_DTYPES and HAS_TRITON
    if not HAS_TRITON:
        raise RuntimeError("backend: 'triton' needs the package triton, which is not installed (pip install triton)")
    if token.dtype not in _COMPILED_DTYPES and token.is_cuda:
        raise TypeError(f"token: the kernels take float32, float16 or bfloat16, got {token.dtype}")
    return True
