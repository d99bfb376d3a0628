"""The front end as a module: PyTorch's own submodules, so that weights, names and initial values stay, run in one pass."""

import contextlib
import logging
import threading
import warnings

import torch
from torch import Tensor, nn

from . import functional as F
from . import parts, planner, positions, spread, table
from .distinct import DistinctIds
from .reference import HiddenQKV, embed_qkv, split_heads, turned
from .rotary import Rotary, as_rotation

logger = logging.getLogger(__name__)
_building = threading.RLock()  # one table at a time: two would take twice the memory


class EmbeddingQKV(nn.Module):
    """The front end of a transformer: token and position embedding, the first norm and the first QKV projection.

    Equivalent to, with stock modules::

        hidden = dropout(token(ids) + position(position_ids))
        query, key, value = qkv(norm(hidden)).split(...)            # and .unflatten(-1, (heads, head_dim))

    Submodules token (nn.Embedding), position (nn.Embedding, or a table of sines, or None), norm (nn.LayerNorm, nn.RMSNorm
    or None) and qkv (nn.Linear, rows of query, key, value): state_dict keys token.weight, position.weight, norm.weight,
    norm.bias, qkv.weight, qkv.bias. norm: "layer", "rms" or None; bias: of norm and qkv; head_dim: embedding_dim //
    num_heads where None. position="rotary": query and key are turned by a Rotary(head_dim, max_length), or by the one given as
    rotary, which may also go with another kind of position. With dropout > 0 in training the call runs by PyTorch's
    operators, since the kernel has no dropout between its sum and its norm. ValueError: a head count or width that does not
    divide.
    """

    _table, _table_dtype, _keeps_table, _table_failed = None, None, False, False
    _groups = 0

    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        num_heads,
        *,
        num_kv_heads=None,
        head_dim=None,
        max_length=1024,
        position="learned",
        norm="layer",
        bias=True,
        eps=1e-5,
        dropout=0.0,
        padding_idx=None,
        rotary=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        num_kv_heads = F.check_heads(num_heads, num_kv_heads)
        for name, size in {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim, "max_length": max_length}.items():
            if size < 1:
                raise ValueError(f"{name}: expected a positive number, got {size}")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim: expected a positive number, got {head_dim}")
        F.padding_row(padding_idx, num_embeddings)
        if head_dim is None and embedding_dim % num_heads:
            raise ValueError(f"embedding_dim: expected a multiple of num_heads ({num_heads}), got {embedding_dim}")
        head_dim = embedding_dim // num_heads if head_dim is None else head_dim
        self.num_heads, self.num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self.token = nn.Embedding(num_embeddings, embedding_dim, padding_idx, **factory)
        if position == "rotary":
            position, rotary = None, Rotary(head_dim, max_length, device=device) if rotary is None else rotary
        self.register_module("position", positions.make(position, max_length, embedding_dim, **factory))
        self.register_module("rotary", parts.fitting(rotary, head_dim))
        if norm == "layer":
            self.norm = nn.LayerNorm(embedding_dim, eps, bias=bias, **factory)
        elif norm == "rms":
            self.norm = nn.RMSNorm(embedding_dim, eps, **factory)
        elif norm is None:
            self.register_module("norm", None)
        else:
            raise ValueError(f"norm: expected one of {F.NORMS}, got {norm!r}")
        self.qkv = nn.Linear(embedding_dim, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def from_modules(
        cls,
        token,
        position=None,
        norm=None,
        *,
        qkv,
        num_heads,
        num_kv_heads=None,
        dropout=0.0,
        rotary=None,
        per_head=False,
    ):
        """A front end over modules that a model already has: it holds them, copies nothing, and trains what they hold.

        token, position: nn.Embedding. norm: nn.LayerNorm, nn.RMSNorm, Hugging Face's RMSNorm of Llama and its like, or None.
        qkv: one nn.Linear or Hugging Face Conv1D whose output is query, key, value in that order, or a (query, key, value)
        tuple of nn.Linear. per_head: the output of one module is not all queries, all keys, all values, but those of each head
        (GPT-NeoX, Bloom) or group of heads (Falcon) in turn. num_kv_heads: num_heads where None. A module that does more than
        its class in PyTorch (a forward of its own, hooks, max_norm, scale_grad_by_freq, sparse), and any other norm, is called
        as it is, by no kernel; explain() says so. TypeError: a module of another kind; ValueError: widths that do not fit.
        """
        if not isinstance(token, nn.Embedding):
            raise TypeError(f"token: expected an nn.Embedding, got {type(token).__name__}")
        if position is not None and not isinstance(position, nn.Embedding | positions.Sinusoidal):
            raise TypeError(f"position: expected an nn.Embedding or None, got {type(position).__name__}")
        if norm is not None and not isinstance(norm, nn.Module):
            raise TypeError(f"norm: expected a module or None, got {type(norm).__name__}")
        if isinstance(qkv, tuple | list):
            if len(qkv) != 3 or not all(isinstance(linear, nn.Linear) for linear in qkv):
                got = ", ".join(type(linear).__name__ for linear in qkv)
                raise TypeError(f"qkv: expected one module or three nn.Linear (query, key, value), got ({got})")
            widths = [linear.in_features for linear in qkv]
            if len(set(widths)) > 1:
                raise ValueError(f"qkv: expected three of as many inputs, got {widths}")
            qkv = nn.ModuleList(qkv)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.num_heads, self.num_kv_heads = num_heads, F.check_heads(num_heads, num_kv_heads)
        for name, module in {"token": token, "position": position, "norm": norm, "qkv": qkv}.items():
            self.register_module(name, module)
        self.dropout = nn.Dropout(dropout)
        self._head_dim = parts.check_widths(self._modules, self.num_heads, self.num_kv_heads)
        if per_head:
            if isinstance(qkv, nn.ModuleList):
                raise ValueError("per_head: expected False where query, key and value are three modules, got True")
            self._groups = self.num_kv_heads
        self.register_module("rotary", parts.fitting(rotary, self._head_dim))
        return self.train(token.training)

    def forward(
        self,
        ids: Tensor,
        position_ids: Tensor | None = None,
        distinct: DistinctIds | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> HiddenQKV:
        """ids (..., T), position_ids (T,), (1, T) or like ids, None: 0 … T−1 -> HiddenQKV(hidden (..., T, D), query
        (..., T, num_heads, head_dim), key and value (..., T, num_kv_heads, head_dim)). distinct: as a data loader gives it.
        rotary: (cos, sin) of this call's tokens, as transformers passes them, in place of the module's own."""
        if not isinstance(ids, Tensor):
            raise TypeError(f"ids: expected a Tensor, got {type(ids).__name__}")
        if self._keeps_table or planner.forces("table"):
            found = self._look_up(ids, position_ids, distinct, rotary)
            if found is not None:
                return found
            if planner.forces("table"):  # there was no memory for it
                with planner.plan("auto"):
                    return self.forward(ids, position_ids, distinct, rotary)
        if self._drops() or parts.foreign(self._modules) or self._packs_in_vain(ids):
            return self._compose(ids, position_ids, rotary)
        module = self._modules["token"]  # a module's attributes are slow, and a decode step asks for them all
        token, padding_idx = module.weight, module.padding_idx
        position = self._position()
        weight, bias = self._projection()
        norm = self._norm()
        if rotary is None:
            rotary = self._modules["rotary"]
        else:
            F.check_rotary(rotary, ids, self._head_dim)
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "rotary": rotary}
        if position_ids is None and distinct is None and planner.is_trivial(ids, token, weight):
            # PyTorch checks too; the call below says what is wrong.
            with contextlib.suppress(IndexError, RuntimeError, TypeError):
                return embed_qkv(ids, token, weight, bias, position=position, padding_idx=padding_idx, **heads, **norm)
        return F.embed_qkv(
            ids, token, weight, bias, position=position, position_ids=position_ids, padding_idx=padding_idx, distinct=distinct,
            **heads, **norm,
        )  # fmt: skip

    def _compose(self, ids, position_ids, rotary):
        """The call by the modules themselves, one after the other."""
        try:
            return self._call(ids, position_ids, rotary)
        except (IndexError, RuntimeError, TypeError):
            self._check(ids, position_ids)  # says what is wrong, if it is an argument
            if spread.is_distributed(ids, self._modules["token"].weight):
                F.embed(ids, self._modules["token"].weight)  # says which of the two is no DTensor
            raise

    def _packs_in_vain(self, ids):
        """Whether to pack the rows of query, key and value would cost more than one kernel saves."""
        packs = self._groups > 0 or isinstance(self._modules["qkv"], nn.ModuleList)
        return packs and ids.numel() < parts.PACK_TOKENS and planner.is_free()

    def _call(self, ids, position_ids, rotary):
        rotary = self._modules["rotary"] if rotary is None else rotary
        if rotary is not None:
            rotation = self._rotation(ids, position_ids, rotary)
        token, position, norm, qkv, dropout = (self._modules[name] for name in ("token", "position", "norm", "qkv", "dropout"))
        hidden = token(ids)
        if position is not None:
            if position_ids is None:
                position_ids = spread.places(ids)
            hidden = hidden + position(position_ids)
        hidden = dropout(hidden)
        normed = hidden if norm is None else norm(hidden)
        projected = torch.cat([linear(normed) for linear in qkv], -1) if isinstance(qkv, nn.ModuleList) else qkv(normed)
        if self._groups:
            projected = parts.ungroup(projected, -1, self._groups, self._head_dim)
        found = split_heads(hidden, projected, self.num_heads, self.num_kv_heads)
        return found if rotary is None else turned(found, rotation)

    def _rotation(self, ids, position_ids, rotary):
        """What turns the heads of a call, its arguments checked."""
        rotary = self._modules["rotary"] if rotary is None else rotary
        self._check(ids, position_ids)
        F.check_rotary(rotary, ids, self._head_dim)
        return None if rotary is None else as_rotation(rotary, ids, position_ids)

    def explain(self, ids: Tensor, position_ids: Tensor | None = None, distinct: DistinctIds | None = None) -> planner.Plan:
        """Which plan a call with these arguments would run now, why, and the seconds predicted for each that could run it.

        Nothing runs and no table is built; its str() is a line to read. On a GPU it waits for the ids to be counted.
        """
        ids, position_ids = spread.local(ids), spread.local(position_ids)
        self._check(ids, position_ids)
        F.check_distinct(distinct, ids)
        if self._drops():
            return planner.Plan("one_pass", "dropout between sum and norm runs by PyTorch's operators", {})
        foreign = parts.foreign(self._modules)
        if foreign:
            return planner.Plan("one_pass", f"by the modules themselves, since {foreign}", {})
        refused = self._refuses_table()
        if refused and planner.forces("table"):
            raise RuntimeError(f"plan: 'table' cannot run here: {refused}")
        if self._packs_in_vain(ids) and not self._keeps_table:
            return planner.Plan("one_pass", f"by the modules: {ids.numel()} tokens do not pay for packing qkv's rows", {})
        token, position, norm = self._modules["token"].weight, self._position(), self._norm()
        weight, bias = self._projection()
        looks_up = (self._keeps_table or planner.forces("table")) and not refused and not self._table_failed
        known = ids.unique().numel() if distinct is None else distinct.ids.numel()
        products = planner.products_of(token, weight, position, norm["norm_weight"], norm["norm_bias"], bias)
        call = (ids, token, weight, position, position_ids, norm["norm"] is not None, products, known)
        weighed = planner.weigh(*call, looks_up)
        if looks_up and not planner.forces("one_pass", "distinct"):
            size = table.nbytes(token, weight, position, self._table_dtype) / 2**20
            there = self._table is not None and self._table.is_current(ids, position_ids)
            reason = f"a table of {size:,.0f} MiB {'is there' if there else 'would be built first'}"
            return weighed._replace(name="table", reason=reason)
        with planner.plan("auto") if planner.forces("table") else contextlib.nullcontext():  # there was no memory for it
            return planner.choose(*call)._replace(seconds=weighed.seconds)

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
        foreign = parts.foreign(self._modules) or parts.distributed(self._modules)
        if foreign:
            raise RuntimeError(f"table: expected modules that are no more than their weights, but {foreign}")
        self._table = None  # its memory comes first
        token, dtype = self._modules["token"].weight, self._table_dtype
        logger.info("building a table of %s bytes on %s", f"{self.table_nbytes(dtype):,}", token.device)
        weight, bias = self._projection()
        self._table = made = table.Table(self._links(), token, weight, bias, self._position(), **self._norm(), dtype=dtype)
        return made

    def drop_table(self):
        """Gives the table's memory back, and makes it no more."""
        self._table, self._keeps_table, self._table_failed = None, False, False

    def _look_up(self, ids, position_ids, distinct, rotary):
        """The call by the table, made or made anew if need be; None: another plan must run it."""
        forced = planner.forces("table")
        refused = self._refuses_table()
        if refused and forced:
            raise RuntimeError(f"plan: 'table' cannot run here: {refused}")
        if refused or planner.forces("one_pass", "distinct") or self._table_failed:
            return None
        if position_ids is not None or distinct is not None:
            self._check(ids, position_ids)
            F.check_distinct(distinct, ids)
        turns = rotary is not None or self._modules["rotary"] is not None
        rotation = self._rotation(ids, position_ids, rotary) if turns else None
        try:
            found = self._current_table(ids, position_ids)
            if found is None:
                return None
            kernels = planner.uses_triton(found.token)
            if kernels:  # they do not look at ids
                self._check(ids, position_ids)
            return found.look_up(ids, position_ids, self.num_heads, self.num_kv_heads, kernels, rotation)
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

    def _check(self, ids, position_ids):
        F.check_ids(ids, self._modules["token"].weight, self._position(), position_ids, self._modules["rotary"])

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
        foreign = parts.foreign(self._modules) or parts.distributed(self._modules)
        if foreign:
            return foreign
        if not planner.is_plain_eager():
            return "a compiler, autocast, torch.func or forward-mode AD is at work"
        return None

    def _links(self):
        return parts.links(self._modules)

    def _apply(self, fn, recurse=True):
        self._table = None  # its memory need not wait for the next call
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {**self.__dict__, "_table": None}  # a copy makes its own

    def _position(self):
        module = self._modules["position"]
        return None if module is None else module.weight

    def _norm(self):
        return parts.norm_arguments(self._modules["norm"], self._modules["token"].weight.dtype)

    def _drops(self):
        return self.training and self._modules["dropout"].p > 0

    def _projection(self):
        return parts.projection(self._modules["qkv"], self._groups, self._head_dim)
