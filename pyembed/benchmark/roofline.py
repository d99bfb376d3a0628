"""How fast a device can be at all, and how far from that a row is.

    python -m pyembed.benchmark.roofline

A row's limit is the larger of two times: the bytes that the computation must move (each input read once, each output written
once) over the rate of a large copy, bytes read plus bytes written, and its floating-point operations over the rate of a large
matrix product of that dtype. Both rates are measured on the device, once a process. What an implementation moves beside that,
or computes twice, is its own affair. A row whose data fits in a cache may beat the limit.
"""

import functools
from typing import NamedTuple

import torch

from .timing import clock

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
SIDES = {"cpu": (256, 2048), "cuda": (8192, 8192)}  # of the square matrices: the first that takes ENOUGH, or the last
ENOUGH = 0.05  # seconds


class Rates(NamedTuple):
    """Of one device and one dtype."""

    copy: float  # bytes a second, read plus written
    flops: float  # a second, of a matrix product


class Work(NamedTuple):
    """What a computation cannot do without."""

    nbytes: float
    flops: float

    def __add__(self, other):
        return Work(self.nbytes + other.nbytes, self.flops + other.flops)

    def seconds(self, rates):
        return max(self.nbytes / rates.copy, self.flops / rates.flops)


def _best(call, timer, repeats=9):
    seconds = []
    for _ in range(1 + repeats):  # the first warms up
        marks = [timer.start()]
        call()
        seconds += timer.seconds([*marks, timer.mark()])
    return min(seconds[-repeats:])


@functools.cache
def measure(device, dtype):
    """The Rates of a torch.device: the best of a few runs."""
    timer = clock(device)
    source = torch.randint(-128, 128, (COPY_BYTES[device.type],), dtype=torch.int8, device=device)
    target = torch.empty_like(source).copy_(source)
    copy = 2 * source.numel() / _best(lambda: target.copy_(source), timer)
    side, largest = SIDES[device.type]
    while True:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        product = functools.partial(torch.matmul, a, b, out=torch.empty_like(a))
        if side == largest or _best(product, timer, repeats=1) >= ENOUGH:
            break
        side *= 2
    flops = 2 * side**3 / _best(product, timer)
    if device.type == "cpu" and dtype.itemsize == 2:  # whose products may as well run in fp32, where that is faster
        flops = max(flops, measure(device, torch.float32).flops)
    return Rates(copy, flops)


def front_end(model, direction, M, distinct, T, itemsize, plan):
    """The Work of a front end of M tokens, `distinct` of them different, T long. plan: "one_pass" multiplies a row per token,
    "distinct" a row per distinct token and position, "table" none; "linear alone" is the product of one_pass and no more."""
    D, N, places = model.D, model.N, T if model.L else 0
    rows = {"distinct": distinct + places, "table": 0}.get(plan, M)
    product = 2 * rows * D * N
    weights = N * D * itemsize
    if plan == "linear alone":
        io = M * (D + N) * itemsize
        forward, backward = Work(io + weights, product), Work(io + M * D * itemsize + 2 * weights, 2 * product)
    else:
        tables = (distinct + places) * D * itemsize
        io = M * (8 + (D + N) * itemsize)  # ids read; hidden, query, key and value written, or their gradients read
        read = (distinct + places) * N * itemsize if plan == "table" else weights
        forward = Work(io + tables + read, product)
        gradients = (model.V + (model.L or 0)) * D * itemsize  # dense, as nn.Embedding has them
        backward = Work(io + tables + gradients + 2 * weights, 2 * product)
    whole = {"forward": forward, "training forward": forward, "backward": backward, "forward+backward": forward + backward}
    return whole[direction]


def lookup(V, D, M, distinct, itemsize, places=0):
    """The Work of rows of a table, (forward, backward), with a row of another table added to each where there are places."""
    rows, tables = M * D * itemsize, (distinct + places) * D * itemsize
    return Work(rows + tables + 8 * M, 0), Work(rows + V * D * itemsize + 8 * M, 0)


def share(model, T, layers=None, decodes=False):
    """The front end's share of a whole model's floating-point operations, forward, at T tokens (decode: one, with T before)."""
    layers, width = layers or model.layers, model.heads * model.head_dim
    front = 2 * model.D * model.N
    attention = 4 * width * (T if decodes else (T + 1) / 2)
    layer = front + 2 * width * model.D + 2 * model.mlp + attention
    return front / (layers * layer + 2 * model.V * model.D)


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        rates = measure(device, dtype)
        print(f"{device.type}, {dtype}: copy {rates.copy / 1e9:,.1f} GB/s, product {rates.flops / 1e12:,.3f} TFLOP/s")
