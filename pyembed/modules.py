"""The front end as a module: PyTorch's own submodules, so that weights, names and initial values stay, run in one pass."""

import contextlib
import functools

import torch
from torch import Tensor, nn

from . import checks, parts, planner, positions, spread, table, thin
from . import functional as F
from . import ids as outside
from .distinct import DistinctIds
from .embedding import COMBINES
from .lookup import KeepsTable
from .reference import HiddenQKV, finish, rows_of, split_heads
from .rotary import Rotary


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
        scale=None,
        num_segments=0,
        qk_norm=None,
        combine="sum",
        position_offset=0,
        heads_first=False,
        batch_invariant=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        num_kv_heads = checks.check_heads(num_heads, num_kv_heads)
        sizes = {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim, "max_length": max_length}
        if max_length is None and str(position).startswith("sinusoidal"):
            del sizes["max_length"]
        for name, size in sizes.items():
            if size is None or size < 1:
                raise ValueError(f"{name}: expected a positive number, got {size}")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim: expected a positive number, got {head_dim}")
        checks.padding_row(padding_idx, num_embeddings)
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
            position, rotary = None, Rotary(head_dim, max_length, device=device) if rotary is None else rotary
        rows = max_length if max_length is None else max_length + position_offset
        self.register_module("position", positions.make(position, rows, embedding_dim, **factory))
        self.register_module("rotary", parts.fitting(rotary, head_dim))
        self.register_module("segment", nn.Embedding(num_segments, embedding_dim, **factory) if num_segments else None)
        self._set(scale, combine, position_offset, heads_first, batch_invariant)
        width = 2 * embedding_dim if combine == "concat" else embedding_dim
        self.register_module("norm", parts.make_norm("norm", norm, width, eps, bias, **factory))
        self.qkv = nn.Linear(width, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias, **factory)
        for name in ("query_norm", "key_norm"):
            self.register_module(name, parts.make_norm("qk_norm", qk_norm, head_dim, eps, bias, **factory))
        self.dropout = nn.Dropout(dropout)

    def _set(self, scale, combine, position_offset, heads_first, batch_invariant):
        if not isinstance(position_offset, int) or position_offset < 0:
            raise ValueError(f"position_offset: expected an int of at least 0, got {position_offset}")
        if combine not in COMBINES:
            raise ValueError(f"combine: expected one of {COMBINES}, got {combine!r}")
        if combine == "concat" and (self.position is None or self.segment is not None):
            raise ValueError("combine: expected 'sum' where there are no positions, or segments; got 'concat'")
        if scale is not None and not isinstance(scale, int | float):
            raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
        self._own_scale = parts.OwnScale(self.token) if parts.scales_itself(self.token) else None
        if scale is not None and self._own_scale is not None:
            raise ValueError(f"scale: expected None where token multiplies its rows itself, got {scale}")
        self.scale, self.combine, self.position_offset = scale, combine, position_offset
        self.heads_first, self.batch_invariant = heads_first, batch_invariant

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
        scale=None,
        segment=None,
        query_norm=None,
        key_norm=None,
        combine="sum",
        heads_first=False,
        batch_invariant=False,
    ):
        """A front end over modules that a model already has: it holds them, copies nothing, and trains what they hold.

        token, position, segment: nn.Embedding, or Gemma's and BART's, with scale or `offset`. norm: nn.LayerNorm, nn.RMSNorm
        or Hugging Face's RMSNorm of Llama, Gemma and their like, or None; query_norm and key_norm the same, of a head.
        qkv: one nn.Linear or Hugging Face Conv1D whose output is query, key, value in that order, or a (query, key, value)
        tuple of nn.Linear. per_head: the output of one module is not all queries, all keys, all values, but those of each head
        (GPT-NeoX, Bloom) or group of heads (Falcon) in turn. num_kv_heads: num_heads where None. Other arguments as in the
        constructor. A module that does more than its class in PyTorch (a forward of its own, hooks, max_norm,
        scale_grad_by_freq, sparse), and any other norm, is called as it is, by no kernel; explain() says so. TypeError: a
        module of another kind; ValueError: widths that do not fit.
        """
        if not isinstance(token, nn.Embedding):
            raise TypeError(f"token: expected an nn.Embedding, got {type(token).__name__}")
        if position is not None and not isinstance(position, nn.Embedding | positions.Sinusoidal):
            raise TypeError(f"position: expected an nn.Embedding or None, got {type(position).__name__}")
        if segment is not None and not isinstance(segment, nn.Embedding):
            raise TypeError(f"segment: expected an nn.Embedding or None, got {type(segment).__name__}")
        norms = {"norm": norm, "query_norm": query_norm, "key_norm": key_norm}
        for name, module in norms.items():
            if module is not None and not isinstance(module, nn.Module):
                raise TypeError(f"{name}: expected a module or None, got {type(module).__name__}")
        if (query_norm is None) != (key_norm is None):
            raise ValueError("query_norm, key_norm: expected both or neither, got one")
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
        self.num_heads, self.num_kv_heads = num_heads, checks.check_heads(num_heads, num_kv_heads)
        for name, module in {"token": token, "position": position, "segment": segment, **norms, "qkv": qkv}.items():
            self.register_module(name, module)
        self.dropout = nn.Dropout(dropout)
        self._set(scale, combine, parts.position_offset(position), heads_first, batch_invariant)
        self._head_dim = parts.check_widths(self._modules, self.num_heads, self.num_kv_heads, combine)
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
        segment_ids: Tensor | None = None,
        query_biases: tuple[Tensor, Tensor] | None = None,
    ) -> HiddenQKV:
        """ids (..., T), position_ids (T,), (1, T) or like ids, None: 0 … T−1 -> HiddenQKV(hidden (..., T, D), query
        (..., T, num_heads, head_dim), key and value (..., T, num_kv_heads, head_dim)). distinct: as a data loader gives it.
        rotary: (cos, sin) of this call's tokens, as transformers passes them, in place of the module's own. segment_ids: as
        position_ids, None: all 0. query_biases: as in functional.embed_qkv."""
        if distinct is None and segment_ids is None and query_biases is None:
            found = thin.front_end(self, ids, position_ids, rotary)
            if found is not None:
                return found
        if not isinstance(ids, Tensor):
            raise TypeError(f"ids: expected a Tensor, got {type(ids).__name__}")
        policy = self._policy()
        call = (position_ids, rotary, segment_ids, query_biases)
        if self._keeps_table or planner.forces("table"):
            found = self._look_up(ids, distinct, *call)
            if found is not None:
                return found
            if planner.forces("table"):  # there was no memory for it
                with planner.plan("auto"):
                    return self.forward(ids, position_ids, distinct, *call[1:])
        if self._foreign() or self._packs_in_vain(ids):
            return self._compose(ids, *call)
        module = self._modules["token"]  # a module's attributes are slow, and a decode step asks for them all
        token, padding_idx = module.weight, module.padding_idx
        position = self._position()
        weight, bias = self._projection()
        options = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, **self._norm(token), **self._extras(token)}
        if rotary is None:
            rotary = self._own_rotary(token.device)
        else:
            checks.check_rotary(rotary, ids, self._head_dim)
        arguments = {"position": position, "padding_idx": padding_idx, "rotary": rotary, **options}
        return F.embed_qkv(
            ids, token, weight, bias, position_ids=position_ids, distinct=distinct, segment_ids=segment_ids,
            query_biases=query_biases, id_policy=policy, **arguments,
        )  # fmt: skip

    def _compose(self, ids, *call):
        """The call by the modules themselves, one after the other."""
        if any(getattr(t, "is_meta", False) for t in (ids, call[0], call[2])):
            self._check(ids, call[0], call[2])  # PyTorch would return meta tensors unasked
        try:
            return self._call(ids, *call)
        except (IndexError, RuntimeError, TypeError):
            self._check(ids, call[0], call[2])  # says what is wrong, if it is an argument
            parts.check_devices(self._modules)
            if spread.is_distributed(ids, self._modules["token"].weight):
                F.embed(ids, self._modules["token"].weight, id_policy="clamp")  # says which of the two is no DTensor
            raise

    def _packs_in_vain(self, ids):
        """Whether to pack the rows of query, key and value would cost more than one kernel saves."""
        packs = self._groups > 0 or isinstance(self._modules["qkv"], nn.ModuleList)
        return packs and planner.is_free() and not self.batch_invariant and parts.packs_in_vain(ids, self._modules["token"])

    def _call(self, ids, position_ids, rotary, segment_ids, query_biases):
        rotary = self._own_rotary(ids.device) if rotary is None else rotary
        rotation = None if rotary is None else self._rotation(ids, position_ids, rotary)
        if position_ids is not None or segment_ids is not None:  # PyTorch would broadcast, or never look
            self._check_shapes(ids, position_ids, segment_ids)
        ids, position_ids, segment_ids = self._kept(ids, position_ids, segment_ids)
        token, position, norm, qkv = (self._modules[name] for name in ("token", "position", "norm", "qkv"))
        policy = self._policy()
        if position_ids is not None and (self.position_offset or isinstance(position, positions.Sinusoidal)):
            self._check(ids, position_ids)  # a negative one would have a row
        hidden = outside.rows(policy, token, ids, token.weight.shape[0])
        if self.scale is not None:
            hidden = hidden * self.scale
        if self._modules["segment"] is not None:
            kinds = torch.zeros_like(ids) if segment_ids is None else segment_ids
            hidden = hidden + outside.rows(policy, self.segment, kinds, self.segment.weight.shape[0])
        if position is not None:
            if position_ids is None:
                position_ids = spread.places(ids)
            look_up = functools.partial(parts.place_rows, position, offset=self.position_offset)
            rows = outside.rows(policy, look_up, position_ids, rows_of(self._position()))
            concat = self.combine == "concat"
            hidden = torch.cat([hidden, rows.expand_as(hidden)], -1) if concat else hidden + rows
        hidden = nn.functional.dropout(hidden, self.dropout.p) if self._drops() else hidden
        normed = hidden if norm is None else norm(hidden)
        projected = torch.cat([linear(normed) for linear in qkv], -1) if isinstance(qkv, nn.ModuleList) else qkv(normed)
        if self._groups:
            projected = parts.ungroup(projected, -1, self._groups, self._head_dim)
        return self._finish(split_heads(hidden, projected, self.num_heads, self.num_kv_heads), rotation, query_biases)

    def _finish(self, found, rotation, query_biases):
        """What follows the projection, by PyTorch's operators."""
        second = None
        if self.heads_first and found.hidden.dim() == 1:
            raise ValueError("heads_first: expected ids with a length to come behind heads, got shape ()")
        if query_biases is not None:
            first, second = checks.check_query_biases(
                query_biases, found.hidden, self.num_heads, self._head_dim, self._modules["query_norm"], rotation
            )
            found, second = found._replace(query=found.query + first), second - first
        if self._modules["query_norm"] is not None:
            found = found._replace(query=self.query_norm(found.query), key=self.key_norm(found.key))
        return finish(found, second=second, rotation=rotation, heads_first=self.heads_first)

    def _rotation(self, ids, position_ids, rotary):
        """What turns the heads of a call, its arguments checked."""
        rotary = self._own_rotary(ids.device) if rotary is None else rotary
        self._check(ids, position_ids)
        checks.check_rotary(rotary, ids, self._head_dim)
        return None if rotary is None else outside.rotation(self._policy(), rotary, ids, position_ids)

    def explain(self, ids: Tensor, position_ids: Tensor | None = None, distinct: DistinctIds | None = None) -> planner.Plan:
        """Which plan a call with these arguments would run now, why, and the seconds predicted for each that could run it.

        Nothing runs and no table is built; its str() is a line to read. On a GPU it waits for the ids to be counted. Errors as
        in forward.
        """
        ids, position_ids = spread.local(ids), spread.local(position_ids)
        self._check(ids, position_ids)
        checks.check_distinct(distinct, ids)
        ids, position_ids, _ = self._kept(ids, position_ids, None)
        refused = self._refuses_table()
        if refused and planner.forces("table"):
            raise RuntimeError(f"plan: 'table' cannot run here: {refused}")
        foreign = self._foreign()
        if foreign:
            return planner.Plan("one_pass", f"by the modules themselves, since {foreign}", {})
        if self._packs_in_vain(ids) and not self._keeps_table:
            return planner.Plan("one_pass", f"by the modules: {ids.numel()} tokens do not pay for packing qkv's rows", {})
        token, position = self._modules["token"].weight, self._position()
        norm = self._norm(token)
        weight, bias = self._projection()
        looks_up = (self._keeps_table or planner.forces("table")) and not refused and not self._table_failed
        known = ids.unique().numel() if distinct is None else distinct.ids.numel()
        products = planner.products_of(token, weight, position, norm["norm_weight"], norm["norm_bias"], bias)
        call = (ids, token, weight, position, position_ids, norm["norm"] is not None, products, known)
        if self._refuses_plans():
            return planner.choose(*call, self._refuses_plans())
        weighed = planner.weigh(*call, looks_up)
        if looks_up and not planner.forces("one_pass", "distinct"):
            size = table.nbytes(token, weight, position, self._table_dtype) / 2**20
            there = self._table is not None and self._table.is_current(ids, position_ids)
            reason = f"a table of {size:,.0f} MiB {'is there' if there else 'would be built first'}"
            return weighed._replace(name="table", reason=reason)
        with planner.plan("auto") if planner.forces("table") else contextlib.nullcontext():  # there was no memory for it
            chosen = planner.choose(*call)
            return chosen._replace(seconds=weighed.seconds) if chosen.reason == weighed.reason else chosen

    def extra_repr(self):
        usual = {"num_kv_heads": self.num_heads, "scale": None, "combine": "sum", "position_offset": 0, "id_policy": None}
        usual |= {"heads_first": False, "batch_invariant": False}
        more = [f"{name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value]
        return ", ".join([f"num_heads={self.num_heads}", *more])
