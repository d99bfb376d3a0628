"""Time and memory of several variants of one computation, in turn in one process.

CPU: wall-clock, a quick call right after an untimed one of its own. CUDA: events around the work, the L2 cache overwritten
before each, forward passes replayed from a CUDA graph (peers.capture_all; all of a row, or none). A row goes on until its
seconds are spent; median and quartiles are over rounds. "waited" is the share of a variant's time in which threads of this
process were ready and another program had the core: where that is much, even times that hardly spread mean nothing.
"""

import contextlib
import ctypes
import dataclasses
import gc
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import pyembed

ROUNDS = (3, 401)  # at least, at most
QUICK = 0.05  # seconds: a call that takes less may find caches as the variant before it left them


@dataclasses.dataclass
class Variant:
    """One way to compute a row: `forward()` gives a tuple of tensors; in training, gradients of `parameters` are wanted."""

    forward: Callable[[], Sequence[Tensor]]
    parameters: list[Tensor]
    context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    checked: bool = True  # whether it gives the row's results; a bound gives less
    graph: torch.cuda.CUDAGraph | None = None


class Wall:
    """The clock of a CPU."""

    mark = staticmethod(time.perf_counter)

    def start(self):
        return self.mark()

    def seconds(self, marks):
        return [b - a for a, b in itertools.pairwise(marks)]


class Events:
    """The clock of a CUDA device: marks are events in its queue, read when all is done."""

    def __init__(self, device):
        self.cache = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self):
        self.cache.zero_()
        return self.mark()

    def seconds(self, marks):
        marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def clock(device):
    return Events(device) if device.type == "cuda" else Wall()


def step(variant, grads, clock):
    """Marks before, between and after: [start, forward] or, with grads, [start, forward, backward]."""
    with variant.context(), torch.set_grad_enabled(grads is not None):
        marks = [clock.start()]
        outputs = variant.graph.replay() if variant.graph else variant.forward()
        marks.append(clock.mark())
        if grads is not None:
            torch.autograd.grad(outputs, variant.parameters, grads, allow_unused=True)
            marks.append(clock.mark())
    return marks


def results(variant, grads):
    """Outputs, and with grads every parameter's gradient."""
    with variant.context(), torch.set_grad_enabled(grads is not None):
        outputs = tuple(variant.forward())
        if grads is None:
            return outputs
        found = torch.autograd.grad(outputs, variant.parameters, grads)
    return *(output.detach() for output in outputs), *found


def assert_close(found, expected):
    """Each tensor within 2 % in 16 bits, 1e-4 in fp32, of what is expected, or of its largest element."""
    for a, b in zip(found, expected, strict=True):
        tolerance = 2e-2 if b.dtype.itemsize == 2 else 1e-4
        largest = b.abs().amax().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)


def capture(variant, pool):
    """The variant with its forward as a CUDA graph, in a pool of memory that graphs share: nobody reads what they write."""
    with variant.context(), torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                variant.forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            variant.forward()
    return dataclasses.replace(variant, graph=graph)


def compare(variants, grads, timer, seconds, tell=lambda done: None):
    """{variant: {"rounds": of each, "waited": share, "seconds": {direction: {"median", "q1", "q3"}}}}, in turn, in each round
    in another order, since a variant may leave the caches in a state that suits the next. Each has run before.

    grads: {variant: gradients of its outputs}; None: a forward without them. seconds: in all. tell(done): is called with the
    share of them that is spent."""
    directions = ["forward"] if grads is None else ["training forward", "backward", "forward+backward"]
    grads = dict.fromkeys(variants) if grads is None else grads
    found, waits = {name: [] for name in variants}, dict.fromkeys(variants, 0.0)
    rounds, end, shuffler = 0, time.perf_counter() + seconds, random.Random(0)
    while rounds < ROUNDS[0] or rounds < ROUNDS[1] and time.perf_counter() < end:
        for name in shuffler.sample([*variants], len(variants)):
            variant = variants[name]
            if isinstance(timer, Wall) and found[name] and found[name][-1][-1] < QUICK:
                step(variant, grads[name], timer)
            before = waiting_seconds()
            parts = timer.seconds(step(variant, grads[name], timer))
            waits[name] += max(0.0, waiting_seconds() - before)
            found[name].append(parts if len(parts) == 1 else [*parts, sum(parts)])
        rounds += 1
        tell(min(1.0, max(1 - (end - time.perf_counter()) / seconds if seconds else 1.0, rounds / ROUNDS[1])))
    columns = {name: zip(directions, zip(*rows, strict=True), strict=True) for name, rows in found.items()}
    waited = {name: waits[name] / sum(row[-1] for row in rows) for name, rows in found.items()}
    return {
        name: {"rounds": rounds, "waited": waited[name], "seconds": {d: _quartiles(column) for d, column in those}}
        for name, those in columns.items()
    }


def waiting_seconds():
    """For which threads of this process were ready and had no core, in sum, since they began; 0: this system does not say."""
    try:
        threads = [f"/proc/self/task/{thread}/schedstat" for thread in os.listdir("/proc/self/task")]
        return sum(int(Path(thread).read_text().split()[1]) for thread in threads) / 1e9
    except (OSError, IndexError, ValueError):  # another system, or a thread that ended
        return 0.0


def _quartiles(seconds):
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def saved_bytes(variant):
    """What a forward pass keeps for its backward: storages other than its parameters' and its results'."""
    kept = {}

    def pack(tensor):
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a tensor without memory of its own
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with variant.context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = variant.forward()
    for tensor in (*variant.parameters, *outputs):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def peak_bytes(variant, grads, device):
    """Most memory that one call takes beyond what was taken before it; None: this system does not say. On a CPU it is resident
    memory, which pages and the C library make uncertain by some MiB."""
    timer = Wall()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(dataclasses.replace(variant, graph=None), grads, timer)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    pyembed.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps of freed memory
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak of resident memory is then counted anew
        before = _status("VmRSS")
        step(variant, grads, timer)
        return max(_status("VmHWM") - before, 0)
    except (AttributeError, KeyError, OSError):
        return None


def _status(key):
    with open("/proc/self/status") as file:
        return int(dict(line.split(":", 1) for line in file)[key].split()[0]) * 1024
