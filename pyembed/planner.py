"""Which implementation runs a call: the backend, and the plan by a small cost model.

one_pass  every token is projected: the fused kernel on a GPU, PyTorch's composition on a CPU
distinct  each distinct token and position is projected once, then gathered: less matrix work, one more pass over memory
"""

import contextlib
import functools
import importlib.util
import time
from typing import NamedTuple

import torch

_backend = "auto"
_plan = "auto"
BACKENDS = ("auto", "triton", "torch")
PLANS = ("auto", "one_pass", "distinct")
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


@contextlib.contextmanager
def plan(name):
    """Within it, embed_qkv runs by this plan: "one_pass", "distinct", or the cheaper one by prediction ("auto").

    All plans agree to rounding. "distinct" runs on CPU tensors; RuntimeError where it cannot. ValueError: another name.
    The setting is the process's.
    """
    global _plan
    if name not in PLANS:
        raise ValueError(f"plan: expected one of {PLANS}, got {name!r}")
    before, _plan = _plan, name
    try:
        yield
    finally:
        _plan = before


def uses_triton(token):
    """Whether a call over this table runs in Triton. RuntimeError, TypeError: it was asked to and cannot."""
    if _backend == "torch":
        return False
    if _backend == "auto":
        return token.is_cuda and token.dtype in _COMPILED_DTYPES and HAS_TRITON
    if not HAS_TRITON:
        raise RuntimeError("backend: 'triton' needs the package triton, which is not installed (pip install triton)")
    if token.dtype == torch.bfloat16 and token.device.type == "cpu":
        raise TypeError("token: Triton's interpreter has no bfloat16 arithmetic; take float32 or float16, or a GPU")
    if token.dtype not in _COMPILED_DTYPES and token.is_cuda:
        raise TypeError(f"token: the kernels take float32, float16 or bfloat16, got {token.dtype}")
    return True


class Plan(NamedTuple):
    """The plan of a call, why, and the seconds predicted for each plan that was weighed."""

    name: str
    reason: str
    seconds: dict[str, float]


LEAST_FLOPS = 1e9  # of the product over all tokens, forward: below it no plan can save what weighing them costs
FIXED_SECONDS = 1e-3  # of `distinct`: finding the distinct rows, its smaller operators, its operator's own cost


@functools.cache
def rates(dtype):
    """FLOP/s of a matrix product and bytes/s of a gather on this CPU, measured once a process: the best of three."""
    a, b, table = torch.randn(512, 768).to(dtype), torch.randn(768, 1024).to(dtype), torch.randn(4096, 1024).to(dtype)
    rows = torch.randint(4096, (4096,))

    def best(call):
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    out = torch.empty_like(table)
    moved = 2 * table.numel() * table.element_size()
    return 2 * 512 * 768 * 1024 / best(lambda: a @ b), moved / best(lambda: torch.index_select(table, 0, rows, out=out))


def is_trivial(ids, weight):
    """Whether a call is too small for any plan but PyTorch's composition, so that nothing need be weighed or checked first."""
    if torch.compiler.is_compiling() or ids.is_cuda or _plan != "auto" or _backend == "triton":
        return False
    return 2.0 * ids.numel() * weight.numel() < LEAST_FLOPS


def _is_plain_eager():
    """No compiler, autocast, torch.func transform or forward-mode AD is at work: an operator of our own would miss them."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
    return not transformed


def choose(ids, token, weight, position, position_ids, trains):
    """The Plan of an embed_qkv call. trains: whether a backward pass may follow. RuntimeError: a forced plan cannot run."""
    if _plan == "one_pass":
        return Plan("one_pass", "forced", {})
    here = not token.is_cuda and not token.is_meta and _backend != "triton" and _is_plain_eager()
    if _plan == "distinct":
        if not here:
            raise RuntimeError(
                f"plan: 'distinct' runs eagerly on CPU tensors by PyTorch's operators, not on {token.device} here"
            )
        return Plan("distinct", "forced", {})
    if not here:
        return Plan("one_pass", "the other plans have no kernel here", {})
    M, (N, D) = ids.numel(), weight.shape
    if is_trivial(ids, weight):
        return Plan("one_pass", f"{M} tokens are too few for another plan to save time", {})
    T = ids.shape[-1] if ids.dim() else 1
    places = 0 if position is None else T if position_ids is None else position_ids.unique().numel()
    distinct = ids.unique().numel()
    flops, bandwidth = rates(token.dtype)
    product = (3 if trains else 1) * 2.0 * N * D / flops
    passes = (3 if trains else 1) * token.element_size() / bandwidth
    seconds = {
        "one_pass": M * product + M * (2 * D + N) * passes,
        "distinct": (distinct + places) * product + (M * (2 * D + 2 * N) + N * D) * passes + FIXED_SECONDS,
    }
    name = min(seconds, key=seconds.get)
    return Plan(name, f"{M} tokens have {distinct} distinct ids and {places} positions", seconds)
