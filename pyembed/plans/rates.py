"""How fast a device is: measured once a process, for the planner's cost model and for the choice of a product's dtype."""

import functools
import time
from typing import NamedTuple

import torch

from ..memory import pages


class Rates(NamedTuple):
    """What a device does in a second."""

    flops: float  # of a matrix product
    gather: float  # bytes read and written by a gather of rows into memory that was used before
    fresh: float  # bytes written into memory that was just allocated, and then given back


def _best_of(call, synchronise, repeats):
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
    """The rates of one device for one dtype: 0.3 s on a CPU, some ms on a GPU, once.

    Under torch.use_deterministic_algorithms, and where there is no memory to measure with, they are nominal: what is measured
    differs from run to run, and so may a plan that goes by it."""
    if torch.are_deterministic_algorithms_enabled():
        return NOMINAL[device.type]
    return _measure(device, dtype)


@functools.cache
def _measure(device, dtype):
    try:
        return _time(device, dtype)
    except torch.OutOfMemoryError:
        return NOMINAL[device.type]


def _fresh():
    """A tensor that nobody has written to since the system gave its memory."""
    return torch.frombuffer(pages(FRESH_BYTES), dtype=torch.uint8)


def _time(device, dtype):
    """The best of a few repeats."""
    cuda = device.type == "cuda"
    M, K, N, rows = (8192, 4096, 4096, 16_384) if cuda else (256, 768, 1024, 4096)
    synchronise = functools.partial(torch.cuda.synchronize, device) if cuda else lambda: None
    best = functools.partial(_best_of, synchronise=synchronise, repeats=9)  # another process may stand in the way of some
    with torch.no_grad():
        a, b = (torch.full(shape, 0.5, dtype=dtype, device=device) for shape in ((M, K), (K, N)))
        table, out = (torch.zeros(rows, 2048, dtype=dtype, device=device) for _ in range(2))
        index = torch.arange(rows, device=device).mul_(1021).remainder_(rows)  # no draw from the user's generator
        nbytes = out.numel() * out.element_size()
        new = functools.partial(torch.empty_like, out) if cuda else _fresh
        product = best(lambda: a @ b)
        gather = best(lambda: torch.index_select(table, 0, index, out=out))
        fresh = _best_of(lambda: new().zero_().zero_(), synchronise, repeats=5)
    return Rates(2 * M * K * N / product, 2 * nbytes / gather, new().nbytes / fresh)


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which to multiply: fp32 for 16-bit numbers where that is faster, as on a CPU without units for them."""
    if device.type != "cpu" or dtype.itemsize != 2:
        return dtype
    return dtype if measure(device, dtype).flops > measure(device, torch.float32).flops else torch.float32
