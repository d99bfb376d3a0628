"""What an EmbeddingQKV does with a table: makes it, keeps it while it is true, and answers calls from it."""

import logging
import threading
import warnings

import torch

from . import checks, parts, planner, table
from .holder import HoldsParts

logger = logging.getLogger(__name__)
_building = threading.RLock()  # one table at a time: two would take twice the memory


class KeepsTable(HoldsParts):
    """A front end that may keep a table."""

    _table, _table_dtype, _keeps_table, _table_failed = None, None, False, False

    def table_nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes that build_table(dtype) takes: (V + L)·N elements. TypeError as there."""
        self._check_table_dtype(dtype)
        return table.nbytes(self._modules["token"].weight, self._projection()[0], self._position(), dtype)

    @torch.no_grad()
    def build_table(self, dtype: torch.dtype | None = None) -> float:
        """Projects every token and position now, so that calls without gradients only gather, under "auto" and "table".

        The first call after a weight changed (in place, replaced, loaded, moved) makes it anew, until drop_table(). Changes
        through `.data` or NumPy, which PyTorch does not count, are looked for in samples on a CPU and not seen on a GPU.
        dtype: of the entries, torch.float16 or torch.bfloat16 to halve an fp32 model's table; hidden stays exact.
        Returns the largest error of an entry that this made, relative to the largest entry (0.0: none).
        torch.OutOfMemoryError: it would not fit, before anything is allocated. RuntimeError: weights that are computed
        (parametrizations) or of inference mode. TypeError: another dtype. ValueError: entries beyond the dtype's range.
        """
        self._check_table_dtype(dtype)
        with _building:
            self._table_dtype, self._table_failed = dtype, False
            made = self._make_table()
            self._keeps_table = True
            return made.error

    @torch.no_grad()
    def _make_table(self):
        foreign = self._foreign() or parts.distributed(self._modules)
        if foreign:
            raise RuntimeError(f"table: expected modules that are no more than their weights, but {foreign}")
        token, terms = self._modules["token"].weight, (self._position(), self._scale(), self._modules["segment"])
        refused = planner.refuses(token, *terms, False)
        if refused:
            raise RuntimeError(f"table: expected token and position rows as they are, but {refused}")
        self._table = None  # its memory comes first
        dtype = self._table_dtype
        logger.info("building a table of %s bytes on %s", f"{self.table_nbytes(dtype):,}", token.device)
        weight, bias = self._projection()
        self._table = made = table.Table(self._links(), token, weight, bias, self._position(), **self._norm(token), dtype=dtype)
        return made

    def drop_table(self):
        """Gives the table's memory back, and makes it no more."""
        self._table, self._keeps_table, self._table_failed = None, False, False

    def _look_up(self, ids, distinct, position_ids, rotary, segment_ids, query_biases):
        """The call by the table, made or made anew if need be; None: another plan must run it."""
        forced = planner.forces("table")
        refused = self._refuses_table()
        if refused and forced:
            raise RuntimeError(f"plan: 'table' cannot run here: {refused}")
        if refused or planner.forces("one_pass", "distinct") or self._table_failed:
            return None
        if position_ids is not None or distinct is not None:
            self._check(ids, position_ids)
            checks.check_distinct(distinct, ids)
        if segment_ids is not None:
            self._check(ids, position_ids, segment_ids)
        turns = rotary is not None or self._modules["rotary"] is not None
        rotation = self._rotation(ids, position_ids, rotary) if turns else None
        ids, position_ids, _ = self._kept(ids, position_ids, segment_ids)
        ends = self._modules["query_norm"] is not None or query_biases is not None or self.heads_first
        try:
            found = self._current_table(ids, position_ids)
            if found is None:
                return None
            kernels = planner.uses_triton(found.token)
            if kernels:  # they do not look at ids
                self._check(ids, position_ids)
            reports = self._policy() != "trust"
            call = (ids, position_ids, self.num_heads, self.num_kv_heads, kernels, reports)
            if ends:
                return self._finish(found.look_up(*call), rotation, query_biases)
            return found.look_up(*call, rotation)
        except (AttributeError, IndexError, RuntimeError, TypeError):
            self._check(ids, position_ids)  # says what is wrong, if it is an argument
            raise

    def _current_table(self, ids, position_ids):
        """The table, made if need be; None: it could not be, which is said once."""
        found = self._table
        if found is not None and found.is_current(ids, position_ids):
            return found
        with _building:
            found = self._table  # another thread may have made it meanwhile
            if found is not None and found.is_current(ids, position_ids) or self._table_failed:
                return found
            try:
                made = self._make_table()
                self._keeps_table = True
                return made
            except (RuntimeError, ValueError) as error:
                out_of_memory = isinstance(error, torch.OutOfMemoryError) and not isinstance(error, table.DoesNotFit)
                if planner.forces("table") and not out_of_memory:
                    raise
                self._keeps_table = self._table_failed = True
                warnings.warn(
                    f"pyembed: a table of {self.table_nbytes(self._table_dtype):,} bytes could not be made ({error}): other "
                    "plans serve until the next build_table()", stacklevel=5,
                )  # fmt: skip
                return None

    def _check_table_dtype(self, dtype):
        own = self._modules["token"].weight.dtype
        if dtype not in (None, own, torch.float16, torch.bfloat16) or dtype and dtype.itemsize > own.itemsize:
            raise TypeError(f"dtype: expected torch.float16, torch.bfloat16 or None for {own}, got {dtype}")

    def _refuses_table(self):
        """Why no table can serve a call now; None: one can."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return "gradients are wanted and a table has none; call it within torch.no_grad()"
        if self._drops():
            return "dropout comes between sum and norm; call eval()"
        refused = self._foreign() or self._refuses_plans() or parts.distributed(self._modules)
        if refused:
            return refused
        if not planner.is_plain_eager():
            return "a compiler, torch.func or forward-mode AD is at work"
        return None

    def _links(self):
        return parts.links(self._modules)

    def _apply(self, fn, recurse=True):
        self._table = None  # its memory need not wait for the next call
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, "_table": None}  # a copy makes its own
