"""The table of a fused front end, for calls without gradients: every row of vocabulary and positions, projected once."""

import threading
import warnings
from collections.abc import Callable

import torch
from torch import nn

from ..call import Call
from ..kept import Links
from ..plans.choice import refuses
from ..plans.table import Table, nbytes


class KeptTable:
    """Made anew by the first call after a weight has changed. call_of_no_ids: a call of the front end, as it is then. names: of
    its modules. torch.OutOfMemoryError: it would not fit. RuntimeError: a front end, or weights, of which none can be made."""

    def __init__(self, call_of_no_ids: Callable[[], Call], names: dict[nn.Module, str]) -> None:
        self._call_of_no_ids, self._names, self._making, self._failed = call_of_no_ids, names, threading.RLock(), False
        self._table: Table | None = None
        self._make()

    @property
    def nbytes(self) -> int:
        """Bytes that its entries take."""
        return nbytes(self._call_of_no_ids())

    def _make(self) -> Table:
        self._table = None  # its memory comes first
        call = self._call_of_no_ids()
        refused = refuses(call)
        if refused:
            raise RuntimeError(f"build_table: expected token and position rows as they are, but {refused}")
        links: Links = []
        for module, of in self._names.items():
            for name, p in module._parameters.items():
                if p is not None and (type(p) is not nn.Parameter or getattr(module, "_is_fsdp_managed_module", False)):
                    raise RuntimeError(f"build_table: expected weights that one device holds, got {of}.{name}")
                links.append((module._parameters, name, p))
        with torch.no_grad():
            self._table = made = Table(links, call)
        return made

    def current(self, call: Call) -> Table | None:
        """For a call that wants no gradient, whose ids were checked; None: it could not be made anew, which is said once."""
        with self._making:
            found = self._table
            if found is not None and found.is_current(call.terms.ids, call.terms.position_ids) or self._failed:
                return found
            try:
                return self._make()
            except (RuntimeError, ValueError) as error:
                self._failed = True
                warnings.warn(f"pyembed: the table could not be made anew ({error}): other plans serve", stacklevel=8)
                return None
