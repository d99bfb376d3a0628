"""The `table` plan, for inference: every row of the vocabulary and of the position table is projected once, then gathered.

With centred rows as in distinct_cpu.py, entry r of the table is γ⊙(r − mean(r))·Wᵀ; a call sums two entries and applies rstd
and W·β + b. Where no position is added rstd depends on the token alone, and an entry is the finished projection.

A table is held against its sources before each call, as kept.py says. Of the token and the position table one element of every
row that the call uses is compared on the CPU, so that a change of a row is seen there which PyTorch does not count.
"""

import math

import torch
from torch import Tensor

from ..call import Call, HiddenQKV, Norm, Projection, Terms, wide_dtype
from ..kept import Links, Sources, bits
from ..memory import empty
from ..reference import finish
from .distinct_cpu import FEW, Batch, Parts, centred, expand, inverse_deviation, project, shift
from .operators import launch

CHUNK = 4096  # rows that are projected at a time
COLUMN = 1 / math.pi  # of a table that is compared


def nbytes(call: Call, dtype: torch.dtype | None = None) -> int:
    """Bytes of the table: (V + L)·N elements of dtype, by default that of the weights."""
    token, position, projection = call.terms.token, call.terms.position, call.projection
    assert projection is not None
    rows = token.shape[0] + (0 if position is None else position.shape[0])
    return rows * projection.rows * (dtype or token.dtype).itemsize


def available(device: torch.device) -> float:
    """Bytes that a new tensor could take; infinity where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


class DoesNotFit(torch.OutOfMemoryError):
    """Known before anything was allocated."""


class Table:
    """Projected rows of one front end: (L + V, N), positions first.

    links: (dict, key, value) of every object that a user can replace or change, tensors among them. call: of any ids, with the
    weights that derive from these.
    dtype: of the entries. error: largest rounding of an entry to a narrower dtype, relative to the largest entry.
    DoesNotFit, torch.OutOfMemoryError: no memory. ValueError: entries exceed dtype's range. RuntimeError: inference tensors.
    """

    shift: Tensor | None  # None: entries have it
    _columns: list[tuple[Tensor, Tensor]]  # (view, copy) of the tables on a CPU, compared by row; elsewhere none

    def __init__(self, links: Links, call: Call, dtype: torch.dtype | None = None) -> None:
        projection = call.packed().projection
        assert projection is not None
        (_, self.token, self.position, *_), self.norm, token = call.terms, call.norm, call.terms.token
        self.dtype = token.dtype if dtype is None else dtype
        size, room = nbytes(call, self.dtype), available(token.device)
        if size > room:
            raise DoesNotFit(f"table: expected at most the {room:,.0f} bytes that {token.device} has left, got {size:,}")
        tables = [table for table in (self.token, self.position) if table is not None]
        self._sources = Sources("table", links, tables)
        columns = [bits(table[:, int(table.shape[1] * COLUMN)]) for table in tables if table.is_cpu]
        self._columns = [(column, column.clone()) for column in columns]
        try:
            with torch.no_grad():
                self._build(projection.weight, projection.bias)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "memory" not in str(error):
                raise
            raise torch.OutOfMemoryError(str(error)) from error  # the CPU's allocator has no type of its own

    def _build(self, weight: Tensor, bias: Tensor | None) -> None:
        kind, norm_weight, norm_bias, eps = self.norm
        tables = [table for table in (self.position, self.token) if table is not None and len(table)]
        places = 0 if self.position is None else self.position.shape[0]
        wide, N = wide_dtype(self.token.dtype), weight.shape[0]
        self.projected = self.token.new_empty(places + self.token.shape[0], N, dtype=self.dtype)
        added = shift(weight, bias, norm_bias)
        self.unit, largest, lost, start = 1.0, 0.0, 0.0, 0
        if self.dtype == torch.float16 and self.position is not None:
            # No entry exceeds the product of two norms (Cauchy, Schwarz): a power of two that brings all of them into range.
            longest = [centred(t, kind).norm(dim=1).amax().item() for t in (*tables, weight)]
            scale = 1.0 if norm_weight is None else norm_weight.abs().amax().item()
            bound = max(max(longest[:-1], default=0.0) * longest[-1] * scale, 1e-30)
            self.unit = 2.0 ** math.floor(15 - math.log2(bound)) if math.isfinite(bound) else 1.0
        for table in tables:
            for rows in table.split(CHUNK):
                used = centred(rows, kind)
                rstd = None if kind == "none" else used.square().mean(1, keepdim=True).add_(eps).rsqrt_()
                if norm_weight is not None:
                    used *= norm_weight
                exact = project(used, weight, torch.empty(len(rows), N, dtype=wide, device=rows.device))
                if self.position is None:
                    exact = exact.add_(added) if rstd is None else torch.addcmul(added, exact, rstd)
                exact *= self.unit
                entries = self.projected[start : start + len(rows)].copy_(exact)
                start += len(rows)
                if self.dtype.itemsize < wide.itemsize:
                    largest = max(largest, exact.abs().amax().item())
                    lost = max(lost, exact.sub_(entries).abs().amax().item())
        if not math.isfinite(lost):
            raise ValueError(f"dtype: expected one that holds entries up to {largest:.3g}, got {self.dtype}")
        self._tokens, self._positions = self.projected[places:], self.projected[:places] if places else None
        # Without positions nothing is left to be applied.
        self.norm, self.shift = (Norm(), None) if self.position is None else (Norm(kind, eps=eps), added)
        # In place of the weight in calls: N rows, and nothing in them.
        self._rows = self.token.new_empty(N, 0)
        self.error = lost / largest if largest else 0.0

    def is_current(self, ids: Tensor, position_ids: Tensor | None) -> bool:
        """Whether the table still is what its sources give, as far as this call's rows go."""
        if not self._sources.are_unchanged():
            return False
        if not self._columns:
            return True
        (view, copy), *positions = self._columns
        rows = ids.reshape(-1)
        if not torch.equal(view.index_select(0, rows), copy.index_select(0, rows)):
            return False
        if not positions or ids.numel() == 0:
            return True
        places = slice(ids.shape[-1] if ids.dim() else 1) if position_ids is None else position_ids.reshape(-1)
        return all(torch.equal(view[places], copy[places]) for view, copy in positions)

    def look_up(self, call: Call, kernels: bool) -> HiddenQKV:
        """The front end of call's ids (..., T) and epilogue. IndexError: an id or position without a row. kernels: by Triton,
        which reports absent rows where it is not on a CPU."""
        terms, projection = call.terms, call.projection
        assert projection is not None
        if self.position is not None and terms.position_ids is None and terms.length > self.position.shape[0]:
            raise IndexError("position")
        terms = terms._replace(token=self.token, position=self.position)
        call = call._replace(terms=terms, norm=self.norm, projection=projection._replace(weight=self._rows, bias=None))
        if not kernels:
            return finish(self._gather(call), call.epilogue)
        fused, rest = call.epilogue.split_turns()
        found = launch("expand", "look_up", call._replace(epilogue=fused), self.projected, self.shift, 1 / self.unit)
        return finish(HiddenQKV(*found), rest)

    def _gather(self, call: Call) -> HiddenQKV:
        """By PyTorch's operators, without the epilogue."""
        (ids, _, _, position_ids, *_), projection = call.terms, call.projection
        assert projection is not None
        flat, shape, D, N = ids.reshape(-1), ids.shape, self.token.shape[1], self.projected.shape[1]
        if flat.numel() <= FEW or self.token.is_cuda:
            hidden, qkv = self._gather_few(flat, call.terms.length, position_ids)
            return _split(hidden, qkv, shape, projection)
        dtype, M = self.token.dtype, flat.numel()
        batch = Batch(Terms(ids, self.token), max(D, N), index=flat)
        places, positions = self.position, self._positions
        if position_ids is not None and position_ids.numel() < M:
            assert places is not None and positions is not None
            places, positions = (table.index_select(0, position_ids.reshape(-1)) for table in (places, positions))
        elif position_ids is not None:
            batch.place_index = position_ids.reshape(-1)
        hidden, qkv = empty(*shape, D, dtype=dtype), empty(*shape, N, dtype=dtype)
        rstd = self.token.new_empty(0 if self.norm.kind == "none" else M, dtype=wide_dtype(dtype))
        parts: Parts = [(self._tokens, positions, self.shift, qkv.view(M, N))]
        expand(batch, self.token, places, parts, hidden.view(M, D), rstd, self.norm, self.unit)
        return _split(hidden, qkv, shape, projection)

    def _gather_few(self, flat: Tensor, T: int, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """hidden (M, D) and qkv (M, N) without blocks: for a few tokens the number of operators is what counts."""
        hidden, x = self.token.index_select(0, flat), self._tokens.index_select(0, flat)
        if self.position is None or not len(flat):
            return hidden, x.to(hidden.dtype)
        assert self._positions is not None and self.shift is not None
        if x.dtype != self.shift.dtype:
            x = x.to(self.shift.dtype)
        rows = slice(T) if position_ids is None else position_ids.reshape(-1)
        for out, positions in ((hidden, self.position), (x, self._positions)):
            added = positions[rows]
            (out if len(flat) == len(added) else out.view(-1, *added.shape)).add_(added)
        if self.norm.kind == "none":
            x = torch.add(self.shift, x, alpha=1 / self.unit)
        else:
            scale = inverse_deviation(hidden, self.norm.kind, self.norm.eps)
            x = torch.addcmul(self.shift, x, scale, value=1 / self.unit)
        return hidden, x if x.dtype == hidden.dtype else x.to(hidden.dtype)


def _split(hidden: Tensor, qkv: Tensor, shape: torch.Size, projection: Projection) -> HiddenQKV:
    """hidden (M, D) and qkv (M, N) as results for ids of this shape."""
    groups = projection.groups
    heads = qkv.view(*shape, sum(groups), qkv.shape[-1] // sum(groups))
    return HiddenQKV(hidden.view(*shape, hidden.shape[-1]), *torch.split_with_sizes(heads, groups, -2))
