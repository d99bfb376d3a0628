"""A front end's modules as a Call: their weights where these are all that they do, else the modules themselves."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

import pyembed.settings as settings

from ..call import NO_EPILOGUE, Call, Called, DistinctIds, Epilogue, Norm, Projection, Terms, pad_row, wide_dtype
from ..checks import check, check_query_biases
from ..ids import HasIdPolicy
from ..plans.choice import why_torch
from ..reference import with_query_biases
from ..rotary import CosSin, Rotary, Turns, turns
from ..rows import call_with_rows
from ..settings import policy_of
from . import known
from .known import FORWARDS, HEAD_NORMS, NAMES, Known, OwnScale
from .proofs import is_patched

CALL = nn.Module.__call__
PACK_TOKENS = 256  # below so many, packing a projection's rows costs more than one kernel saves


class HoldsParts(HasIdPolicy):
    """A front end's modules, by the names of NAMES, dropout and rotary; most are None."""

    _modules: dict[str, Any]  # read in place of attributes, which are slow
    token: nn.Embedding  # or a module around one, as in all that follow
    position: nn.Module | None
    segment: nn.Embedding | None
    embedding_transform: nn.Module | None
    norm: nn.Module | None
    qkv: nn.Module
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    rotary: Rotary | None
    dropout: nn.Module
    num_heads: int
    num_kv_heads: int
    _head_dim: int
    _groups = position_offset = 0
    scale: float | None = None
    combine, heads_first, batch_invariant = "sum", False, False
    _known: Known
    _own_scale: OwnScale
    _follows_token = False  # whether dropout is switched with token
    _unlike_halves: str | None = None  # rotary_of.unlike_halves of the modules

    def _call(
        self,
        ids: Tensor,
        position_ids: Tensor | None = None,
        distinct: DistinctIds | None = None,
        rotary: Any = None,
        segment_ids: Tensor | None = None,
        query_biases: Any = None,
        rows: Any = None,
    ) -> Call:
        """What forward(...) is to compute."""
        if distinct is None and segment_ids is None and query_biases is None and self._is_plain():
            call = self._read_plain(ids, position_ids, rotary)
            return call if rows is None else call_with_rows(call, rows)
        token = self._modules["token"]
        own = token if known.has_own_rows(token) else None
        if self._foreign(own is not None) or self._packing_costs_more(ids):
            call, own = self._read_modules(ids, position_ids, segment_ids), None
        else:
            call = self._read_weights(ids, position_ids, segment_ids)
        if distinct is not None:
            call = call._replace(distinct=distinct)
        if rotary is not None or self._modules["rotary"] is not None:
            call = self._with_turns(call, rotary)
        if query_biases is not None:
            if self._modules["embedding_transform"] is not None:
                raise ValueError("query_biases: expected None where there is an embedding_transform, got a pair")
            check(call)
            check_query_biases(query_biases, call, self._head_dim)
            call = with_query_biases(call, *query_biases)
        return call if rows is None and own is None else call_with_rows(call, rows, own)

    def _with_turns(self, call: Call, rotary: Any) -> Call:
        """rotary: a CosSin or (cos, sin) of this call; None: the front end's own."""
        terms = call.terms
        cos, sin, turn_ids, interleaved = self._turns(terms.ids, terms.position_ids, rotary)
        if terms.position is None and turn_ids is not None:
            terms = terms._replace(position_ids=None)  # which the rotary tables alone look up
        epilogue = call.epilogue._replace(cos=cos, sin=sin, turn_ids=turn_ids, interleaved=interleaved)
        return call._replace(terms=terms, epilogue=epilogue)

    def _turns(self, ids: Tensor, position_ids: Tensor | None, rotary: Any) -> Turns:
        """A plain pair is laid out and turns as the front end's own Rotary does."""
        if rotary is None:
            return turns(self._own_rotary(ids.device), ids, position_ids)
        own = self._modules["rotary"]
        is_told = isinstance(rotary, CosSin) or isinstance(rotary, Rotary) and rotary.is_told
        if own is None and self._unlike_halves and not is_told:
            raise ValueError(
                "rotary: expected a pyembed.CosSin(cos, sin, interleaved=…), which says which columns are pairs, since the "
                f"model of a {self._unlike_halves} does not turn (i, i + R/2); got a {type(rotary).__name__}"
            )
        return turns(rotary, ids, position_ids, own is not None and own.interleaved)

    def _is_plain(self) -> bool:
        """Fast path: stock modules without hooks or further options, whose weights are plain parameters."""
        modules = self._modules
        token, position, norm, qkv = modules["token"], modules["position"], modules["norm"], modules["qkv"]
        return (
            not (_module._global_forward_hooks or _module._global_forward_pre_hooks)
            and self.combine == "sum"
            and self.scale is None
            and not (self.position_offset or self._groups)
            and modules["segment"] is None
            and modules["query_norm"] is None
            and _is_plain(qkv, nn.Linear)
            and _is_plain(norm, nn.LayerNorm, nn.RMSNorm)
            and _is_plain(token, nn.Embedding)
            and _only_looks_up(token)
            and (
                position is None
                or _is_plain(position, nn.Embedding)
                and _only_looks_up(position)
                and position.padding_idx is None
            )
        )

    def _read_plain(self, ids: Tensor, position_ids: Tensor | None, rotary: Any) -> Call:
        modules: dict[str, Any] = self._modules
        token, position, norm, qkv = modules["token"], modules["position"], modules["norm"], modules["qkv"]
        table, padding_idx, linear, affine, eps = (
            token._parameters["weight"], token.padding_idx, qkv._parameters, norm._parameters, norm.eps,
        )  # fmt: skip
        epilogue = Epilogue(heads_first=True) if self.heads_first else NO_EPILOGUE
        if rotary is not None or modules["rotary"] is not None:
            epilogue = Epilogue(None, None, None, *self._turns(ids, position_ids, rotary), 0.0, self.heads_first)
            if position is None and epilogue.turn_ids is not None:
                position_ids = None  # which the rotary tables alone look up
        position = None if position is None else position._parameters["weight"]
        dropout = self._rate()
        row = -1 if padding_idx is None else pad_row(padding_idx, table.shape[0])
        eps = torch.finfo(wide_dtype(table.dtype)).eps if eps is None else float(eps)
        return Call(
            Terms(ids, table, position, position_ids, None, None, None, None, dropout, row),
            Norm("layer" if type(norm) is nn.LayerNorm else "rms", affine["weight"], affine.get("bias"), eps),
            Projection(linear["weight"], linear["bias"], self.num_heads, self.num_kv_heads),
            epilogue,
            settings.current.id_policy if self._id_policy is None else self._id_policy,
            self.batch_invariant,
        )

    def _read_weights(self, ids: Tensor, position_ids: Tensor | None, segment_ids: Tensor | None) -> Call:
        """Of modules that are no more than their weights."""
        terms = self._terms(ids, position_ids, segment_ids)
        norm, epilogue = self._norm(terms.token), self._epilogue(terms.token)
        return Call(terms, norm, self._projection(), epilogue, self._policy(), self.batch_invariant)

    def _terms(self, ids: Tensor, position_ids: Tensor | None, segment_ids: Tensor | None) -> Terms:
        token, segment = self._modules["token"], self._modules["segment"]
        table, segments = token.weight, None if segment is None else segment.weight
        row = pad_row(token.padding_idx, table.shape[0])
        return Terms(ids, table, self._position(), position_ids, segments, segment_ids, None, self._scale(), self._rate(), row)

    def _epilogue(self, token: Tensor) -> Epilogue:
        """Without rotary turns. token: its weight."""
        if self._modules["query_norm"] is None:
            return Epilogue(heads_first=self.heads_first)
        if self._calls_head_norms():
            norms = self._called_head_norms()
            return Epilogue(*norms, heads_first=self.heads_first)
        query, key = (known.norm_of(name, self._modules[name], token.dtype, self._known) for name in HEAD_NORMS)
        return Epilogue(query.weight, key.weight, head_eps=query.eps, heads_first=self.heads_first)

    def _calls_head_norms(self) -> bool:
        """Whether the norms of heads are called, after whatever computes the rest."""
        modules, own = self._modules, self._known
        if modules["query_norm"] is None:
            return False
        return bool(known.foreign(modules, own, names=HEAD_NORMS) or known.unlike_norms(modules, own, self._head_dim))

    def _called_head_norms(self) -> tuple[Any, Any]:
        query, key = (self._modules[name] for name in HEAD_NORMS)
        if query is None:
            return None, None
        called = (Called(norm, partial(known.over_heads, norm, self._head_dim)) for norm in (query, key))
        return next(called), next(called)

    def _read_modules(self, ids: Tensor, position_ids: Tensor | None, segment_ids: Tensor | None) -> Call:
        """The modules themselves, to be called one after the other."""
        called: Any = Called  # which stands where a field is declared a Tensor
        token, position, segment, norm, qkv, *_ = (self._modules[name] for name in NAMES)
        rows = segments = None
        if position is not None:
            way = self._known.way(position)
            place = partial(known.place_rows, position, way, offset=self.position_offset)
            has_rows = known.is_stock("position", position) or way.offset is not None
            rows = called(position, place, self._position(), has_rows=has_rows)
        if segment is not None:
            segments = called(segment, weight=known.table_of(segment), has_rows=known.is_stock("segment", segment))
        token = called(token, weight=known.table_of(token), has_rows=self._has_rows(token))
        terms = Terms(ids, token, rows, position_ids, segments, segment_ids, None, self.scale, self._rate())
        norms = self._called_head_norms()
        project = partial(known.called_projection, qkv, groups=self._groups, head_dim=self._head_dim)
        return Call(
            terms,
            Norm() if norm is None else Norm("called", called(norm)),
            Projection(called(qkv, project), None, self.num_heads, self.num_kv_heads),
            Epilogue(*norms, heads_first=self.heads_first),
            self._policy(),
            concat=self.combine == "concat",
        )

    def _has_rows(self, token: nn.Module) -> bool:
        """Whether an id must be a row of its table: one with a forward of its own may take others."""
        return known.is_stock("token", token) or not is_patched(token) and self._known.finding("token", token) is not None

    def _policy(self) -> str:
        """Its own, or its token table's, where that is a pyembed.Embedding with one."""
        token = self._modules["token"]
        return policy_of(self._id_policy or (token._id_policy if isinstance(token, HasIdPolicy) else None))

    def _foreign(self, but_token: bool = False) -> str | None:
        """Why the modules must be called; None: their weights say all, or all but token does."""
        found = "positions stand beside token rows" if self.combine == "concat" else None
        names = tuple(name for name in NAMES if name not in HEAD_NORMS and not (but_token and name == "token"))
        found = found or known.foreign(self._modules, self._known, self.position_offset, names)
        own = None if found or self.scale is None else self._known.found("token")
        if own is not None and own.scale is not None:
            found = "both scale and token multiply its rows"
        if found and self.batch_invariant:
            raise RuntimeError(f"batch_invariant: expected modules that are no more than their weights, but {found}")
        return found

    def _packing_costs_more(self, ids: Tensor) -> bool:
        """Whether packing the rows of query, key and value into one weight would cost more than one product saves; in a graph
        for any number of tokens: whether no kernel would use it."""
        packs = self._groups > 0 or isinstance(self._modules["qkv"], nn.ModuleList)
        is_free = settings.current.plan == "auto" and settings.current.backend != "triton"
        if not packs or not is_free or self.batch_invariant:
            return False
        table = known.table_of(self._modules["token"])
        by_torch = torch.compiler.is_compiling() and (table is None or why_torch(table) is not None)
        return by_torch or not torch.compiler.is_exporting() and ids.numel() < PACK_TOKENS

    def _position(self) -> Tensor | None:
        module = self._modules["position"]
        table = known.table_of(module)
        return table[self.position_offset :] if self.position_offset and table is not None else table

    def _norm(self, token: Tensor) -> Norm:
        return known.norm_of("norm", self._modules["norm"], token.dtype, self._known)

    def _own_rotary(self, device: torch.device) -> Rotary | None:
        """On ids' device: a front end that is no submodule of its model is not reached by model.to()."""
        rotary = self._modules["rotary"]
        if rotary is not None and rotary._buffers["cos"].device != device:
            rotary.to_empty(device=device)  # which fills its tables, also those that were on meta
        return rotary

    def _scale(self) -> float | None:
        token = self._modules["token"]
        own = None if known.is_stock("token", token) else self._own_scale.of(token, self._known.found("token"))
        return self.scale if own is None else own

    def _rate(self) -> float:
        """Of dropout now. One that came as a number is switched with its front end or, where that is no submodule of its model
        and not reached by model.train(), with token; or alone."""
        dropout, training = self._modules["dropout"], self._modules["dropout"].training
        if self._follows_token and training == self.training:
            training = self._modules["token"].training
        return dropout_rate(dropout, training)

    def _projection(self) -> Projection:
        parts = known.parts_of("qkv", self._modules["qkv"])
        found = [known.linear_weights(part, self._known, place) for place, part in parts]
        return known.projection_of(found, self.num_heads, self.num_kv_heads, self._groups, self._head_dim)


def _is_plain(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether it is of just that class, calls nothing else, and holds weight and bias as parameters: attributes are slow."""
    kind: Any = type(module)
    if module is None or kind not in kinds or kind.forward is not FORWARDS[kind] or kind.__call__ is not CALL:
        return False
    state = module.__dict__
    parameters = state["_parameters"]
    if "weight" not in parameters or kind in (nn.Linear, nn.LayerNorm) and "bias" not in parameters:
        return False
    hooks = state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]
    return not (hooks or "forward" in state or torch.compiler.is_compiling() and is_patched(module))


def _only_looks_up(module: nn.Embedding) -> bool:
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def dropout_rate(dropout: Any, training: bool) -> float:
    """Probability with which this module, an nn.Dropout, drops now. RuntimeError: it does something else."""
    kind = type(dropout)
    if kind is nn.Identity:
        return 0.0
    state = dropout.__dict__
    is_hooked = state["_forward_hooks"] or state["_forward_pre_hooks"]
    if kind is not nn.Dropout or kind.forward is not FORWARDS[kind] or "forward" in state or is_hooked:
        raise RuntimeError(f"dropout: expected an nn.Dropout without hooks or a forward of its own, got {kind.__name__}")
    return dropout.p if training else 0.0
