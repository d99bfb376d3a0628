"""What a vocabulary of some size costs: bytes of table, head, gradients and optimizer state, and the time of a step."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

REPEATS = (3, 50)  # of each part, at least, and at most, within so many
SECONDS = 0.2
STATES = 2  # tensors of AdamW for each parameter


class Cost(NamedTuple):
    """Of V rows: bytes of the table, of the head (0: it is the table), of their gradients, and of AdamW's state; milliseconds,
    None where they were not measured: lookup and head with its loss, each forward and backward, and AdamW's step."""

    size: int
    table: int
    head: int
    gradients: int
    optimizer: int
    lookup_ms: float | None
    head_ms: float | None
    step_ms: float | None

    @property
    def total(self) -> int:
        return self.table + self.head + self.gradients + self.optimizer


def cost(
    size: int,
    width: int,
    *,
    tokens: int = 64,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    measure: bool = True,
) -> Cost:
    """The cost of a vocabulary of size rows of width elements of dtype, trained by AdamW on a batch of so many tokens.

    The head's loss is the cross entropy of all logits, (tokens, size). Times are medians, of this machine.
    TypeError: a number that is not whole. ValueError: one under 1. torch.OutOfMemoryError or RuntimeError: it does not fit the
    device."""
    for name, number in {"size": size, "width": width, "tokens": tokens}.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name}: expected an int, got {number!r}")
        if number < 1:
            raise ValueError(f"{name}: expected a positive number, got {number}")
    table = size * width * dtype.itemsize
    head = 0 if tied else table
    memory = (size, table, head, table + head, STATES * (table + head))
    if not measure:
        return Cost(*memory, None, None, None)
    return Cost(*memory, *_measure(size, width, tokens, tied, dtype, torch.device(device)))


def _measure(size: int, width: int, tokens: int, tied: bool, dtype: torch.dtype, device: torch.device) -> list[float]:
    generator = torch.Generator(device).manual_seed(0)
    factory: Any = {"device": device, "dtype": dtype}
    table = nn.Parameter(torch.empty(size, width, **factory).normal_(0, 0.02, generator=generator))
    head = table if tied else nn.Parameter(table.detach().clone())
    ids = torch.randint(size, (tokens,), device=device, generator=generator)
    hidden = torch.empty(tokens, width, **factory).normal_(generator=generator).requires_grad_()
    optimizer = torch.optim.AdamW([table] if tied else [table, head])

    def lookup() -> None:
        table.grad = None
        F.embedding(ids, table).sum().backward()

    def loss() -> None:
        head.grad = None
        F.cross_entropy(F.linear(hidden, head).float(), ids).backward()

    lookup()
    loss()
    optimizer.step()  # makes the state
    return [_milliseconds(call, device) for call in (lookup, loss, optimizer.step)]


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    seconds: list[float] = []
    while len(seconds) < REPEATS[0] or len(seconds) < REPEATS[1] and sum(seconds) < SECONDS:
        torch.cuda.synchronize() if device.type == "cuda" else None
        start = time.perf_counter()
        call()
        torch.cuda.synchronize() if device.type == "cuda" else None
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3
