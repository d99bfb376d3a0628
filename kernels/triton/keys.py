"""Which row each token takes where some take rows of another table (own) than the token table: one number, its key.

key = id                      of a row of the token table, in [0, V)
key = V + start + order[r]    where id = values[r]: rows by id, as soft prompts and rows that train
key = V + start + rank        where id = placeholder: rows by rank, whose n-th occurrence takes row n
key = −1                      without a row: its results are NaN
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyembed.call import LOOKUPS

from . import tuning
from .distinct import find
from .launch import launch, on_device
from .tiles import report_absent

BLOCK = 512  # tokens of a program
WRONG = tl.constexpr(-2)  # the key, until the last stream, of a placeholder that has too many or too few rows
OWN = tl.constexpr(len(LOOKUPS) - 1)  # the number of a first stream by id whose ids are the table's: rows that a module keeps


@triton.jit
def count_kernel(ids, counts, placeholder, M, BLOCK_M: tl.constexpr):
    """counts (programs,) int32: how often each program's ids (M,) are the placeholder."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = (tl.load(ids + m, mask=m < M, other=0) == placeholder) & (m < M)
    tl.store(counts + tl.program_id(0), tl.sum(here.to(tl.int32), 0))


@triton.jit
def keys_kernel(
    ids,  # (M,)
    keys,  # (M,) out, and in where this is not the FIRST stream
    by_id,  # values (R,), ascending, and order (R,): the row of each; None, None: by rank
    by_rank,  # placeholder, counts of count_kernel, and the number by which a report names the stream
    report,  # as in tiles.report_absent
    shape,  # M, V, start, R
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    CLAMP: tl.constexpr,  # other ids outside the table take its nearest row
    BLOCK_M: tl.constexpr,
):
    M, V, start, R = shape
    values, order = by_id
    placeholder, counts, TABLE = by_rank
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(ids + m, mask=m < M, other=0).to(tl.int64)
    if FIRST:
        key = row
        if CLAMP:
            key = tl.minimum(tl.maximum(row, 0), V - 1)
        key = tl.where((key >= 0) & (key < V), key, -1)
    else:
        key = tl.load(keys + m, mask=m < M, other=0).to(tl.int64)
    if values is not None:
        sought = tl.where(TABLE == OWN, key, row)  # a module's rows are of ids as they are clamped
        low = tl.zeros((BLOCK_M,), tl.int64)
        high = low + R
        reach = R
        while reach > 0:  # the first of values that is not below the id, by halving
            middle = (low + high) // 2
            below = tl.load(values + middle, mask=middle < R, other=0) < sought
            open = low < high
            low = tl.where(open & below, middle + 1, low)
            high = tl.where(open & (below == 0), middle, high)
            reach = reach // 2
        taken = (m < M) & (low < R) & (tl.load(values + low, mask=low < R, other=0) == sought)
        key = tl.where(taken, tl.load(order + low, mask=taken, other=0) + start + V, key)
    else:
        taken = (m < M) & (row == placeholder)
        total, before = sum_counts(counts, tl.num_programs(0))
        rank = (before + tl.cumsum(taken.to(tl.int32), 0)).to(tl.int64) - 1
        key = tl.where(taken, tl.where(total == R, rank + start + V, WRONG), key)
        report_count(report, TABLE, ids, placeholder, m, taken & (rank == R), total, R, BLOCK_M)
    if LAST:
        report_absent(report, 0, row, m, (m < M) & (key == -1), V)
        key = tl.maximum(key, -1)
    tl.store(keys + m, key.to(keys.dtype.element_ty), mask=m < M)


@triton.jit
def sum_counts(counts, programs):
    """The sum of all programs' counts, and of those before this one."""
    total = tl.zeros((1024,), tl.int32)
    before = tl.zeros((1024,), tl.int32)
    for p0 in range(0, programs, 1024):
        p = p0 + tl.arange(0, 1024)
        count = tl.load(counts + p, mask=p < programs, other=0)
        total += count
        before += tl.where(p < tl.program_id(0), count, 0)
    return tl.sum(total, 0), tl.sum(before, 0)


@triton.jit
def report_count(report, TABLE, ids, placeholder, m, first, total, R, BLOCK_M: tl.constexpr):
    """Reports that a placeholder stands `total` times where there are R rows: of more the first token without a row; of fewer
    how often it stands in the first sequence, in the place of a token."""
    length = report[1]
    found = m * 0
    if (total < R) & (tl.program_id(0) == 0):
        for t0 in range(0, length, BLOCK_M):
            t = t0 + tl.arange(0, BLOCK_M)
            found += (tl.load(ids + t, mask=t < length, other=0) == placeholder) & (t < length)
    told = tl.where(total > R, m, tl.sum(found, 0))
    here = tl.where(total > R, first, (m == 0) & (total < R))
    report_absent(report, TABLE, m * 0 + total, told, here, R)


@triton.jit
def index_kernel(keys, slots, index, M, BLOCK_M: tl.constexpr):
    """index (M,): slots[keys], −1 where a key is."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tl.load(keys + m, mask=m < M, other=-1)
    tl.store(index + m, tl.load(slots + key, mask=key >= 0, other=-1), mask=m < M)


def find_keys(
    ids: Tensor,
    size: int,
    placeholders: list[int],
    rows: list[int],
    values: list[Tensor],
    orders: list[Tensor],
    tables: list[int],
    clamp: bool,
    report: tuple,
) -> Tensor:
    """Keys like ids (..., T), of a token table of `size` rows and of one or more streams, of which a later one comes first.

    rows: of each stream, whose own rows stand in order. values, orders: of streams by id, of others empty, which then are by
    rank, of one of placeholders. tables: what reports name a stream by, or OWN. report: of tiles.report_absent.
    """
    total = size + sum(rows)
    keys, start, M = ids.new_empty(ids.shape, dtype=torch.int32 if total < 2**31 else torch.int64), 0, ids.numel()
    if M == 0:
        return keys
    (ids,) = tuning.dense(ids)
    grid = (tuning.cdiv(M, BLOCK),)
    with on_device(ids):
        for n, (placeholder, R, *by_id, table) in enumerate(zip(placeholders, rows, values, orders, tables, strict=True)):
            counts = None
            if by_id[0].numel() == 0:
                by_id, counts = (None, None), ids.new_empty(grid, dtype=torch.int32)
                launch(count_kernel, grid)(ids, counts, placeholder, M, BLOCK_M=BLOCK, num_warps=4)
            launch(keys_kernel, grid)(
                ids, keys, tuple(by_id), (placeholder, counts, table), report, (M, size, start, R), FIRST=n == 0,
                LAST=n == len(rows) - 1, CLAMP=clamp, BLOCK_M=BLOCK, num_warps=4,
            )  # fmt: skip
            start += R
    return keys


def find_used(keys: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct keys (min(M, size),) of keys (..., T) below size, ascending, then −1; the place (M,) of each token's among
    them, −1 without a row; and count (1,) of the keys in use. All int32."""
    M = keys.numel()
    used, index = (keys.new_full((n,), -1, dtype=torch.int32) for n in (min(M, size), M))
    if M == 0:
        return used, index, keys.new_zeros(1, dtype=torch.int32)
    found, count, slots = find(keys, size, rows=used)
    with on_device(keys):
        launch(index_kernel, (tuning.cdiv(M, BLOCK),))(keys, slots, index, M, BLOCK_M=BLOCK, num_warps=4)
    return found, index, count
