"""What an EmbeddingQKV keeps while its weights are unchanged: a table, when it is built and calls by it; a folded weight."""

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pyembed.settings as settings

from ..call import NO_NORM, Call, DistinctIds, Epilogue, HiddenQKV, Projection
from ..checks import check, check_epilogue, check_query_biases, check_ranges
from ..ids import apply_policy
from ..kept import Kept, Sources
from ..modes import is_captured, is_plain_eager, is_recorded, refuse_scripting
from ..plans.choice import refuses, why_torch
from ..plans.table import DoesNotFit, Table, nbytes
from ..reference import finish, with_query_biases
from . import known, parts
from .parts import HoldsParts

logger = logging.getLogger(__name__)
_building = threading.RLock()  # one table at a time: two would take twice the memory


class KeepsTable(HoldsParts):
    """A front end that may keep a table, or its projection's weight with the norm folded in."""

    _kept: Kept | None = None
    _keeps_folded = False
    _table: Table | None = None
    _table_dtype: torch.dtype | None = None
    _keeps_table = _table_failed = False
    __prepare_scriptable__ = refuse_scripting

    def table_nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes that build_table(dtype) takes: (V + L)·N elements. TypeError as there."""
        self._check_table_dtype(dtype)
        call = self._call_of_no_ids()
        return nbytes(call._replace(terms=call.terms._replace(token=self._modules["token"].weight)), dtype)

    def _call_of_no_ids(self) -> Call:
        """A Call for the weights alone."""
        foreign = self._foreign()
        if foreign:
            raise RuntimeError(f"table: expected modules that are no more than their weights, but {foreign}")
        return self._read_weights(torch.empty(0, dtype=torch.long, device=self._modules["token"].weight.device), None, None)

    @torch.no_grad()
    def build_table(self, dtype: torch.dtype | None = None) -> float:
        """Projects every token and position now, so that calls without gradients only gather, under "auto" and "table".

        The first call after a weight changed (in place, replaced, loaded, moved, by an optimizer) makes it anew, until
        drop_table(). Changes that PyTorch does not count (through `.data`, NumPy or DLPack, by torch.distributed, the replay of
        a CUDA graph or another process) are looked for in samples on a CPU and not seen on a GPU.
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
    def _make_table(self) -> Table:
        call, dtype = self._call_of_no_ids(), self._table_dtype
        refused = known.distributed(self._modules)
        if refused:
            raise RuntimeError(f"table: expected modules that are no more than their weights, but {refused}")
        refused = refuses(call._replace(terms=call.terms._replace(dropout=0.0), id_policy="raise", batch_invariant=False))
        if refused:
            raise RuntimeError(f"table: expected token and position rows as they are, but {refused}")
        self._table = None  # its memory comes first
        logger.info("building a table of %s bytes on %s", f"{nbytes(call, dtype):,}", call.terms.token.device)
        self._table = made = Table(known.links(self._modules, self._known), call, dtype)
        return made

    def drop_table(self) -> None:
        """Gives the table's memory back, and makes it no more."""
        self._table, self._keeps_table, self._table_failed = None, False, False

    def keep_folded(self, keep: bool = True) -> None:
        """Keeps, between calls without gradients, what the kernel for many tokens else computes at each: the norm folded into
        the projection's weight, from the first such call on. keep=False gives the memory back.

        It takes N·D elements of the weight's dtype and 2·N of float32, and N·D more where query, key and value have weights of
        their own, which are kept as one. The first call after a change of the norm or of qkv makes it anew; which changes are
        not seen says build_table. In a compiler's graph, during the capture of a CUDA graph and with query_biases a call folds
        by itself. RuntimeError: modules that must be called, weights that are computed (parametrizations), made in inference
        mode or spread over devices.
        """
        if keep:
            self._new_kept()
        self._kept, self._keeps_folded = None, keep

    def _new_kept(self) -> Kept:
        refused = self._foreign() or known.distributed(self._modules)
        if refused:
            raise RuntimeError(f"keep_folded: expected modules that are no more than their weights, but {refused}")
        return Kept(Sources("keep_folded", known.links(self._modules, self._known, ("norm", "qkv"), "keep_folded")))

    def _current_kept(self, ids: Tensor) -> Kept | None:
        """What was kept of these weights, or a new, empty Kept, before they are read; None: this call keeps nothing."""
        if not is_plain_eager() or is_recorded() or torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return None
        if ids.numel() < parts.PACK_TOKENS:
            return None  # neither packed nor folded, and a look at the weights takes its time
        if is_captured(self._modules["token"].weight):
            return None  # its replays read the weights as they are then
        kept = self._kept
        if kept is None or not kept.sources.are_unchanged():
            self._kept = kept = None  # its memory comes first
            with contextlib.suppress(RuntimeError):  # weights of which nothing can be kept: they are folded at each call
                self._kept = kept = self._new_kept()
        return kept

    def _look_up(
        self,
        ids: Tensor,
        position_ids: Tensor | None,
        distinct: DistinctIds | None,
        rotary: Any,
        segment_ids: Tensor | None,
        query_biases: Any,
    ) -> HiddenQKV | None:
        """The call by the table, made or made again if need be; None: another plan must run it."""
        call = None if self._foreign() else self._call_by_table(ids, position_ids, distinct, segment_ids)
        refused = self._refuses_table(call)
        if refused and settings.current.plan == "table":
            raise RuntimeError(f"plan: 'table' cannot run here: {refused}")
        if call is None or refused or settings.current.plan in ("one_pass", "distinct") or self._table_failed:
            return None
        if rotary is not None or self._modules["rotary"] is not None:
            call = self._with_turns(call, rotary)
        if distinct is not None or any(x is not None for x in (position_ids, segment_ids, call.epilogue.cos)):
            self._check(call)
        given, call = call, apply_policy(call) if call.id_policy == "clamp" else call
        try:
            found = self._current_table(call)
            if found is None:
                return None
            kernels = why_torch(found.token) is None
            if kernels:  # they do not look at ids
                self._check(given)
            if query_biases is None:
                return found.look_up(call, kernels)
            check_query_biases(query_biases, given, self._head_dim)
            plain = found.look_up(call._replace(epilogue=Epilogue()), kernels)
            return finish(plain, with_query_biases(call, *query_biases).epilogue)
        except (AttributeError, IndexError, RuntimeError, TypeError):
            self._check(given)  # says what is wrong, if it is an argument
            raise

    def _call_by_table(self, ids: Tensor, position_ids: Tensor | None, distinct: Any, segment_ids: Tensor | None) -> Call:
        """A Call without the weights of norm and projection, which the table holds."""
        terms = self._terms(ids, position_ids, segment_ids)
        none: Any = None
        projection = Projection(none, None, self.num_heads, self.num_kv_heads)
        return Call(terms, NO_NORM, projection, self._epilogue(terms.token), self._policy(), self.batch_invariant, distinct)

    def _check(self, call: Call) -> None:
        """A call by the table, whose weights are not looked at."""
        check(call._replace(projection=None))
        check_epilogue(call, self._head_dim)
        if call.id_policy == "raise":
            check_ranges(call)

    def _current_table(self, call: Call) -> Table | None:
        """The table, made if need be; None: it could not be, which is said once."""
        found = self._table
        if found is not None and found.is_current(call.terms.ids, call.terms.position_ids):
            return found
        with _building:
            found = self._table  # another thread may have made it meanwhile
            if found is not None and found.is_current(call.terms.ids, call.terms.position_ids) or self._table_failed:
                return found
            try:
                made = self._make_table()
                self._keeps_table = True
                return made
            except (RuntimeError, ValueError) as error:
                out_of_memory = isinstance(error, torch.OutOfMemoryError) and not isinstance(error, DoesNotFit)
                if settings.current.plan == "table" and not out_of_memory:
                    raise
                self._keeps_table = self._table_failed = True
                warnings.warn(
                    f"pyembed: a table of {self.table_nbytes(self._table_dtype):,} bytes could not be made ({error}): other "
                    "plans serve until the next build_table()", stacklevel=5,
                )  # fmt: skip
                return None

    def _check_table_dtype(self, dtype: torch.dtype | None) -> None:
        own = getattr(known.table_of(self._modules["token"]), "dtype", torch.float32)
        if dtype not in (None, own, torch.float16, torch.bfloat16) or dtype and dtype.itemsize > own.itemsize:
            raise TypeError(f"dtype: expected torch.float16, torch.bfloat16 or None for {own}, got {dtype}")

    def _refuses_plans(self) -> str | None:
        """Why one_pass alone can run a call; None: other plans can."""
        return refuses(self._call_by_table(torch.empty(0), None, None, None))

    def _refuses_table(self, call: Call | None = None) -> str | None:
        """Why no table can serve a call now; None: one can. call: where it was read already, of modules that are known."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return "gradients are wanted and a table has none; call it within torch.no_grad()"
        if self._modules["embedding_transform"] is not None:
            return "embedding_transform comes between sum and norm"
        if self._rate():
            return "dropout comes between sum and norm; call eval()"
        refused = refuses(call) if call is not None else self._foreign() or self._refuses_plans()
        refused = refused or known.distributed(self._modules)
        if refused:
            return refused
        return "a compiler, tracer, torch.func or forward-mode AD is at work" if is_recorded() or not is_plain_eager() else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepsTable":
        self._table = self._kept = None  # their memory need not wait for the next call
        return super()._apply(fn, recurse)

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # of a device of its own
        replica.drop_table()
        replica.keep_folded(False)
        return replica

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None, "_kept": None}  # a copy makes its own
