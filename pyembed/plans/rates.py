"""Matrix product and memory rates of a device, measured once per process: for the planner's cost model and product_dtype."""

import functools
import mmap
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Rates(NamedTuple):
    """Rates of a device, per second."""

    flops: float  # floating-point operations of a matrix product
    gather: float  # bytes, read plus written, of a gather of rows into memory that was written before
    fresh: float  # bytes written to memory that is allocated before the write and freed after it


def _best_of(call: Callable[[], object], synchronise: Callable[[], None], repeats: int) -> float:
    """Seconds of the fastest call."""
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


FRESH_BYTES = 32 << 20
NOMINAL = {"cpu": Rates(2e11, 1e10, 2e9), "cuda": Rates(5e14, 2e12, 2e12)}


def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of a device for a dtype. The first call measures them: 0.3 s on a CPU, some ms on a GPU.

    NOMINAL ones if memory runs out; under torch.use_deterministic_algorithms, since measured ones differ from run to run, and
    with them the plan that the planner picks; and within the capture of a CUDA graph, if none were measured before."""
    if torch.are_deterministic_algorithms_enabled():
        return NOMINAL[device.type]
    if device.type == "cuda" and (device, dtype) not in _measured and torch.cuda.is_current_stream_capturing():
        return NOMINAL[device.type]  # a measurement waits for the device
    with _measuring:
        return _measure(device, dtype)


_measuring = threading.RLock()  # one thread at a time: two would slow each other down


_measured: set[tuple[torch.device, torch.dtype]] = set()


@functools.cache
def _measure(device: torch.device, dtype: torch.dtype) -> Rates:
    _measured.add((device, dtype))
    try:
        return _time(device, dtype)
    except torch.OutOfMemoryError:
        return NOMINAL[device.type]


def _fresh() -> torch.Tensor:
    """(FRESH_BYTES,) uint8 in pages fresh from the operating system, never memory that malloc has kept."""
    return torch.frombuffer(mmap.mmap(-1, FRESH_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def _time(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measured rates, each from the fastest of a few repeats, since other processes may slow some down."""
    cuda = device.type == "cuda"
    M, K, N, rows = (8192, 4096, 4096, 16_384) if cuda else (256, 768, 1024, 4096)
    synchronise = functools.partial(torch.cuda.synchronize, device) if cuda else lambda: None
    best = functools.partial(_best_of, synchronise=synchronise, repeats=9)
    with torch.no_grad():
        a, b = (torch.full(shape, 0.5, dtype=dtype, device=device) for shape in ((M, K), (K, N)))
        table, out = (torch.zeros(rows, 2048, dtype=dtype, device=device) for _ in range(2))
        index = torch.arange(rows, device=device).mul_(1021).remainder_(rows)  # a permutation, without torch's random generator
        nbytes = out.numel() * out.element_size()
        new = functools.partial(torch.empty_like, out) if cuda else _fresh
        product = best(lambda: a @ b)
        gather = best(lambda: torch.index_select(table, 0, index, out=out))
        fresh = _best_of(lambda: new().zero_().zero_(), synchronise, repeats=5)
    return Rates(2 * M * K * N / product, 2 * nbytes / gather, new().nbytes / fresh)


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype for matrix products: fp32 instead of a 16-bit dtype on a CPU where that is faster (no 16-bit matrix units)."""
    if device.type != "cpu" or dtype.itemsize != 2:
        return dtype
    return dtype if measure(device, dtype).flops > measure(device, torch.float32).flops else torch.float32
