"""The front end as a module: PyTorch's own submodules, so that weights, names and initial values stay, run in one pass."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pyembed.settings as settings

from ..call import Call, DistinctIds, HiddenQKV, Terms, as_table, pad_row
from ..checks import check, check_heads, check_ranges, class_of
from ..ids import apply_policy
from ..modes import local
from ..plans.choice import Plan, choose, extended, weigh
from ..plans.table import nbytes
from ..positions import Sinusoidal, make
from ..rotary import CosSin, Rotary
from ..rotary_of import unlike_halves
from ..rows import Rows
from ..run import run
from . import fits, known
from .keeps_table import KeepsTable
from .parts import dropout_rate

NO_TABLE = "rows are not in the table"


class EmbeddingQKV(KeepsTable):
    """The front end of a transformer: token and position embedding, the first norm and the first QKV projection.

    Equivalent to, with stock modules::

        hidden = dropout(scale * token(ids) + segment(segment_ids) + position(position_ids))
        query, key, value = qkv(norm(hidden)).split(...)            # and .unflatten(-1, (heads, head_dim))
        query, key = rotary(query_norm(query)), rotary(key_norm(key))

    Submodules token (nn.Embedding), position (nn.Embedding, or a table of sines, or None), norm (nn.LayerNorm, nn.RMSNorm
    or None) and qkv (nn.Linear, rows of query, key, value): state_dict keys token.weight, position.weight, norm.weight,
    norm.bias, qkv.weight, qkv.bias. norm: "layer", "rms" or None; bias: of norm and qkv; head_dim: embedding_dim //
    num_heads where None. position="rotary": query and key are turned by a Rotary(head_dim, max_length), or by the one given as
    rotary, which may also go with another kind of position. max_length=None with sines computes them, of any position.
    What else there may be: scale of the token row; num_segments, rows of segment (nn.Embedding, BERT's token types); qk_norm
    "rms" or "layer", of each head (query_norm, key_norm); combine="concat", position row behind token row, 2·embedding_dim
    wide; position_offset, rows of the position table before that of position 0 (OPT has 2); heads_first, query, key and value
    (..., heads, T, head_dim), contiguous; batch_invariant, as in functional.embed_qkv.
    ValueError: a head count or width that does not divide, another name.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        max_length: int | None = 1024,
        position: str | None = "learned",
        norm: str | None = "layer",
        bias: bool = True,
        eps: float = 1e-5,
        dropout: float = 0.0,
        padding_idx: int | None = None,
        rotary: Rotary | None = None,
        scale: float | None = None,
        num_segments: int = 0,
        qk_norm: str | None = None,
        combine: str = "sum",
        position_offset: int = 0,
        heads_first: bool = False,
        batch_invariant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        num_kv_heads = check_heads(num_heads, num_kv_heads)
        sizes = {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim, "max_length": max_length}
        if max_length is None and str(position).startswith("sinusoidal"):
            del sizes["max_length"]
        for name, size in sizes.items():
            if size is None or size < 1:
                raise ValueError(f"{name}: expected a positive number, got {size}")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim: expected a positive number, got {head_dim}")
        pad_row(padding_idx, num_embeddings)
        if head_dim is None and embedding_dim % num_heads:
            raise ValueError(f"embedding_dim: expected a multiple of num_heads ({num_heads}), got {embedding_dim}")
        if num_segments < 0:
            raise ValueError(f"num_segments: expected a number of at least 0, got {num_segments}")
        if position_offset and position != "learned":
            raise ValueError(f"position_offset: expected 0 where position is {position!r}, got {position_offset}")
        head_dim = embedding_dim // num_heads if head_dim is None else head_dim
        self.num_heads, self.num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self.token = nn.Embedding(num_embeddings, embedding_dim, padding_idx, **factory)
        if position == "rotary":
            assert max_length is not None
            position, rotary = None, Rotary(head_dim, max_length, device=device) if rotary is None else rotary
        rows = max_length if max_length is None else max_length + position_offset
        self.register_module("position", make(position, rows, embedding_dim, **factory))
        self.register_module("rotary", fits.fitting(rotary, head_dim))
        self.register_module("segment", nn.Embedding(num_segments, embedding_dim, **factory) if num_segments else None)
        self.register_module("embedding_transform", None)
        self._set(scale, combine, position_offset, heads_first, batch_invariant)
        width = 2 * embedding_dim if combine == "concat" else embedding_dim
        self.register_module("norm", known.make_norm("norm", norm, width, eps, bias, **factory))
        self.qkv = nn.Linear(width, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias, **factory)
        for name in ("query_norm", "key_norm"):
            self.register_module(name, known.make_norm("qk_norm", qk_norm, head_dim, eps, bias, **factory))
        self.dropout = nn.Dropout(dropout)

    def _set(self, scale: float | None, combine: str, position_offset: int, heads_first: bool, batch_invariant: bool) -> None:
        if not isinstance(position_offset, int) or position_offset < 0:
            raise ValueError(f"position_offset: expected an int of at least 0, got {position_offset}")
        if combine not in known.COMBINES:
            raise ValueError(f"combine: expected one of {known.COMBINES}, got {combine!r}")
        if combine == "concat" and (self.position is None or self.segment is not None):
            raise ValueError("combine: expected 'sum' where there are no positions, or segments; got 'concat'")
        if scale is not None and not isinstance(scale, int | float):
            raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
        self._known, self._own_scale = known.Known(), known.OwnScale()
        if scale is not None and not known.is_stock("token", self.token):
            found = self._known.finding("token", self.token)
            if found is not None and found.scale is not None:
                raise ValueError(f"scale: expected None where token multiplies its rows itself, got {scale}")
        self.scale, self.combine, self.position_offset = scale, combine, position_offset
        self.heads_first, self.batch_invariant = heads_first, batch_invariant

    @classmethod
    def from_modules(
        cls,
        token: nn.Embedding,
        position: nn.Embedding | Sinusoidal | None = None,
        norm: nn.Module | None = None,
        *,
        qkv: nn.Module | tuple[nn.Linear, nn.Linear, nn.Linear] | list[nn.Linear],
        num_heads: int,
        num_kv_heads: int | None = None,
        dropout: float | nn.Dropout = 0.0,
        rotary: Rotary | None = None,
        per_head: bool = False,
        scale: float | None = None,
        segment: nn.Embedding | None = None,
        query_norm: nn.Module | None = None,
        key_norm: nn.Module | None = None,
        combine: str = "sum",
        position_offset: int | None = None,
        embedding_transform: nn.Module | None = None,
        heads_first: bool = False,
        batch_invariant: bool = False,
    ) -> "EmbeddingQKV":
        """A front end over modules that a model already has: it holds them, copies nothing, and trains what they hold.

        token, position, segment: nn.Embedding, or a module around one. norm: nn.LayerNorm, nn.RMSNorm, another module or None;
        query_norm and key_norm the same, of a head, or of all heads at once (OLMo-2). qkv: one nn.Linear or Hugging Face Conv1D
        whose output is query, key, value in that order, or a (query, key, value) tuple of these. per_head: the output of one
        module is not all queries, all keys, all values, but those of each head (GPT-NeoX, Bloom) or group of heads (Falcon) in
        turn. num_kv_heads: num_heads where None. dropout: the model's nn.Dropout, whose p and training mode are obeyed, or a
        number, which drops as token.train() and token.eval() say. position_offset: the row of position 0 (RoBERTa:
        padding_idx + 1); None: as position's own forward has it (OPT and BART: 2), else 0. embedding_transform: a module, or
        nn.Sequential of several, between the sum and norm, whose result is hidden: Bloom's word_embeddings_layernorm, ELECTRA's
        embeddings_project. Other arguments as in the constructor.

        What a module computes is proved by value, once for each class, forward and attributes: that of Llama's, Gemma's and
        one's own norms, scaled embeddings (Gemma, BART), tables of positions with an offset. A module that does more (hooks, a
        forward patched on class or instance, adapters, quantised weights, max_norm, scale_grad_by_freq, sparse) or that could
        not be proved is called as it is, by no kernel; explain() says so. A module that the model replaces later (an adapter
        injected into it) is not seen: make the front end afterwards. rotary must say interleaved, and a call's pair be a
        CosSin, where functions apply_rotary… in the file of a module's class, which are tried, turn other columns than
        (i, i + R/2) (Cohere, GLM). TypeError: a module of another kind, or one of positions that takes something else;
        ValueError: widths that do not fit.
        """
        fits.check_tables(token=token, position=position, segment=segment)
        others = {"norm": norm, "query_norm": query_norm, "key_norm": key_norm, "embedding_transform": embedding_transform}
        for name, module in others.items():
            if module is not None and not isinstance(module, nn.Module):
                raise TypeError(f"{name}: expected a module or None, got {class_of(module)}")
        if (query_norm is None) != (key_norm is None):
            raise ValueError("query_norm, key_norm: expected both or neither, got one")
        if isinstance(qkv, tuple | list):
            if len(qkv) != 3 or not all(isinstance(linear, nn.Module) for linear in qkv):
                raise TypeError(f"qkv: {fits.LINEARS}, got ({', '.join(map(class_of, qkv))})")
            qkv = nn.ModuleList(qkv)
        if not isinstance(qkv, nn.Module):
            raise TypeError(f"qkv: {fits.LINEARS}, got {class_of(qkv)}")
        if not isinstance(dropout, nn.Module | int | float):
            raise TypeError(f"dropout: expected a number or an nn.Dropout, got {class_of(dropout)}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.num_heads, self.num_kv_heads = num_heads, check_heads(num_heads, num_kv_heads)
        for name, module in {"token": token, "position": position, "segment": segment, **others, "qkv": qkv}.items():
            self.register_module(name, module)
        self._follows_token = not isinstance(dropout, nn.Module)
        self.dropout = dropout if isinstance(dropout, nn.Module) else nn.Dropout(dropout)
        dropout_rate(self.dropout, True)  # refuses what is none
        self._set(scale, combine, 0, heads_first, batch_invariant)
        self._set_offset(position_offset)
        moves = embedding_transform is not None
        self._head_dim = fits.check_widths(self._modules, self._known, self.num_heads, self.num_kv_heads, combine, moves)
        if per_head:
            if isinstance(qkv, nn.ModuleList):
                raise ValueError("per_head: expected False where query, key and value are three modules, got True")
            self._groups = self.num_kv_heads
        self._unlike_halves = unlike_halves(self.modules())
        self.register_module("rotary", fits.fitting(rotary, self._head_dim, self._unlike_halves))
        self.training = token.training
        if self._follows_token:
            self.dropout.train(token.training)
        return self

    def _set_offset(self, position_offset: int | None) -> None:
        position = self._modules["position"]
        own = None if position is None else self._known.way(position).offset
        if position_offset is not None and (not isinstance(position_offset, int) or position_offset < 0):
            raise ValueError(f"position_offset: expected an int of at least 0, got {position_offset!r}")
        if position_offset and (position is None or isinstance(position, Sinusoidal)):
            raise ValueError(f"position_offset: expected 0 or None where there is no table of positions, got {position_offset}")
        if None not in (own, position_offset) and own != position_offset:
            raise ValueError(f"position_offset: expected {own}, that of position's own forward, or None; got {position_offset}")
        self.position_offset = own or position_offset or 0

    def forward(
        self,
        ids: Tensor,
        position_ids: Tensor | None = None,
        distinct: DistinctIds | None = None,
        rotary: CosSin | tuple[Tensor, Tensor] | None = None,
        segment_ids: Tensor | None = None,
        query_biases: tuple[Tensor, Tensor] | None = None,
        rows: Rows | Sequence[Rows] | None = None,
    ) -> HiddenQKV:
        """ids (..., T), position_ids (T,), (1, T) or like ids, None: 0 … T−1 -> HiddenQKV(hidden (..., T, D), query
        (..., T, num_heads, head_dim), key and value (..., T, num_kv_heads, head_dim)). distinct: as a data loader gives it.
        rotary: (cos, sin) or CosSin of this call's tokens, as in functional.embed_qkv, in place of the module's own, whose
        interleaved a plain pair has too. segment_ids: as position_ids, None: all 0. query_biases: as in functional.embed_qkv.
        rows: as in functional.embed; RuntimeError: the plan "table" is asked for, which knows the rows of the table alone.
        """
        if not isinstance(ids, Tensor):
            raise TypeError(f"ids: expected a Tensor, got {type(ids).__name__}")
        if rows is not None:
            if settings.current.plan == "table":
                raise RuntimeError(f"plan: 'table' cannot run here: {NO_TABLE}")
            return self._run(self._call(ids, position_ids, distinct, rotary, segment_ids, query_biases, rows))
        if self._keeps_table or settings.current.plan == "table":
            found = self._look_up(ids, position_ids, distinct, rotary, segment_ids, query_biases)
            if found is not None:
                return found
            if settings.current.plan == "table":  # there was no memory for it
                with settings.plan("auto"):
                    return self._run(self._call(ids, position_ids, distinct, rotary, segment_ids, query_biases))
        kept = self._current_kept(ids) if self._keeps_folded else None
        call = self._call(ids, position_ids, distinct, rotary, segment_ids, query_biases)
        if kept is not None:
            call = call._replace(kept=kept)
        return run(call) if self._modules["embedding_transform"] is None else self._run(call)

    def _run(self, call: Call) -> HiddenQKV:
        """The call; of rows that a module has transformed, which are a table of their own then."""
        transform = self._modules["embedding_transform"]
        if transform is None:
            return run(call)
        table, index, distinct = as_table(transform(run(Call(call.terms, id_policy=call.id_policy, concat=call.concat))))
        return run(call._replace(terms=Terms(index, table), concat=False, id_policy="trust", distinct=distinct))

    def explain(
        self,
        ids: Tensor,
        position_ids: Tensor | None = None,
        distinct: DistinctIds | None = None,
        rows: Rows | Sequence[Rows] | None = None,
    ) -> Plan:
        """Which plan a call with these arguments would run now, why, and the seconds predicted for each that could run it.

        Of rows, and of a token that is a vocabulary.TrainableRows, the distinct rows in use count, on a GPU as many as a batch
        before had. No call runs and no table is built; its str() is a line to read. On a GPU it else waits for the ids to be
        counted. Errors as in forward.
        """
        ids, position_ids, forced = local(ids), local(position_ids), settings.current.plan
        call = self._call(ids, position_ids, distinct, rows=rows)
        transforms, token = self._modules["embedding_transform"] is not None, extended(call)
        check(Call(call.terms) if transforms else call)
        if call.id_policy == "raise":
            check_ranges(call)
        refused = self._refuses_table() if rows is None else NO_TABLE
        if refused and forced == "table":
            raise RuntimeError(f"plan: 'table' cannot run here: {refused}")
        if token is not None and not transforms:
            return choose(apply_policy(call) if call.id_policy in ("clamp", "zero") else call)
        foreign = self._foreign(token is not None)
        if foreign:
            return Plan("one_pass", f"by the modules themselves, since {foreign}", {})
        if self._packing_costs_more(ids) and not self._keeps_table:
            return Plan("one_pass", f"by the modules: {ids.numel()} tokens do not pay for packing qkv's rows", {})
        if transforms:
            return Plan("one_pass", "embedding_transform is called between sum and norm", {})
        call = self._read_weights(ids, position_ids, None)
        if call.id_policy in ("clamp", "zero"):
            call = apply_policy(call)
        if self._refuses_plans():
            return choose(call)
        looks_up = (self._keeps_table or forced == "table") and not refused and not self._table_failed
        weighed = weigh(call, ids.unique().numel() if distinct is None else distinct.ids.numel(), looks_up)
        if looks_up and forced not in ("one_pass", "distinct"):
            size = nbytes(call, self._table_dtype) / 2**20
            there = self._table is not None and self._table.is_current(ids, position_ids)
            reason = f"a table of {size:,.0f} MiB {'is there' if there else 'would be built first'}"
            return weighed._replace(name="table", reason=reason)
        counted = call._replace(distinct=distinct or DistinctIds(*ids.unique(return_inverse=True)))
        with settings.plan("auto") if forced == "table" else contextlib.nullcontext():  # there was no memory for it
            chosen = choose(counted)
            return chosen._replace(seconds=weighed.seconds) if chosen.reason == weighed.reason else chosen

    def extra_repr(self) -> str:
        usual = {"num_kv_heads": self.num_heads, "scale": None, "combine": "sum", "position_offset": 0, "id_policy": None}
        usual |= {"heads_first": False, "batch_invariant": False}
        more = [f"{name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value]
        return ", ".join([f"num_heads={self.num_heads}", *more])
