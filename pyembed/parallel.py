"""Tensor parallelism of the front end: attention heads, and optionally the vocabulary, are sharded over the ranks of a mesh.

Each rank runs the library's operators on its shards. Communication in a step of M tokens: all-reduce of the gradients of
min(M, V) token rows, of positions and of the norm's parameters; with a sharded vocabulary also of M rows before the norm.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn.utils import parametrize

from . import settings, sharding  # noqa: F401  sharding: registers the operators
from .call import Call, DistinctIds, Epilogue, HiddenQKV, MaybeTensor, Norm, Projection, Terms, as_table, pad_row
from .checks import check, check_integers, check_ranges
from .functional import embedding
from .modes import local
from .modules import known
from .modules.front_end import EmbeddingQKV
from .plans.choice import Plan
from .run import run

Layout = Shard | Replicate


class ColwiseQKV(ParallelStyle):
    """Tensor parallelism of an EmbeddingQKV: parallelize_module(front, mesh, ColwiseQKV()), with a 1-D mesh of n ranks.

    Each rank returns its heads of all tokens, query (..., T, num_heads / n, head_dim), key and value (..., T, num_kv_heads / n,
    head_dim), and the whole hidden (..., T, D), whose gradient must be the same on every rank.

    input_layouts: Shard(dim) if each rank passes its shard of ids (and of position_ids of ids' shape), all of the same size;
    they are gathered. hidden_layouts: Shard(dim) to return this rank's shard of hidden. use_local_output=False: DTensors.
    shard_vocabulary: each rank holds only its rows of the token table; the embedded tokens are all-reduced before the norm.

    Parameters become DTensors: tie weights afterwards. A packed projection is stored as three DTensors (query, key, value),
    which each call concatenates. state_dict packs them again and must be called on every rank; load_state_dict takes DTensors
    or the whole tensors of a single process. Dropout masks agree if the ranks' generators do. The `table` plan cannot run.

    TypeError: the module is not an EmbeddingQKV. ValueError: a mesh of several dimensions, heads or rows that cannot be split
    over the ranks, submodules that do more than their stock forward (hooks, own classes).
    """

    def __init__(
        self,
        *,
        shard_vocabulary: bool = False,
        input_layouts: Layout | None = None,
        hidden_layouts: Layout | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        for name, layout in {"input_layouts": input_layouts, "hidden_layouts": hidden_layouts}.items():
            if not isinstance(layout, Shard | Replicate | None):
                raise TypeError(f"{name}: expected Shard, Replicate or None, got {layout!r}")
        self.shard_vocabulary, self.use_local_output = shard_vocabulary, use_local_output
        self.input_layouts, self.hidden_layouts = input_layouts or Replicate(), hidden_layouts or Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        n = device_mesh.size()
        if not isinstance(module, EmbeddingQKV):
            raise TypeError(f"module: expected an EmbeddingQKV, got {type(module).__name__}")
        if device_mesh.ndim != 1:
            raise ValueError(f"device_mesh: expected one dimension, got {device_mesh.ndim}")
        if module.num_kv_heads % n:
            raise ValueError(f"num_kv_heads: expected a multiple of the mesh's size ({n}), got {module.num_kv_heads}")
        token, qkv, rows = module.token, module.qkv, module.token.num_embeddings
        if self.shard_vocabulary and -(-rows // n) * (n - 1) >= rows:
            raise ValueError(f"num_embeddings: expected rows for each of {n} ranks, got {rows}")
        foreign = module._foreign() or known.distributed(module._modules)
        if not foreign and (module._calls_head_norms() or module.embedding_transform is not None):
            foreign = "query_norm and key_norm, or embedding_transform, are called"
        if foreign:
            raise ValueError(f"module: expected modules that are no more than their weights, but {foreign}")
        self._spread(token, device_mesh, Shard(0) if self.shard_vocabulary else Replicate())
        for part in (module.position, module.segment, module.norm, module.query_norm, module.key_norm):
            if part is not None:
                self._spread(part, device_mesh, Replicate())
        if isinstance(qkv, nn.ModuleList) or module._groups:
            for place, linear in known.parts_of("qkv", qkv):
                self._spread(linear, device_mesh, Shard(0), {"weight": Shard(int(module._known.is_transposed(place)))})
        else:
            heads = module.num_heads, module.num_kv_heads, module.num_kv_heads
            self._split(module, device_mesh, [count * module._head_dim for count in heads])
        module.drop_table()
        module.keep_folded(False)
        vars(module).update(_style=self, _mesh=device_mesh)
        module.__class__ = type(f"Colwise{type(module).__name__}", (_Colwise, type(module)), {})
        return module

    def _spread(self, part: nn.Module, mesh: DeviceMesh, layout: Layout, layouts: dict[str, Layout] | None = None) -> None:
        for name, parameter in list(part.named_parameters(recurse=False)):
            placements = [(layouts or {}).get(name, layout)]
            found = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=self.src_data_rank)
            part.register_parameter(name, nn.Parameter(found, parameter.requires_grad))
        part.register_load_state_dict_pre_hook(_distribute_loaded)

    def _split(self, module: EmbeddingQKV, mesh: DeviceMesh, widths: list[int]) -> None:
        qkv, dims = module.qkv, {"weight": 1 if module._known.is_transposed() else 0, "bias": 0}
        for name in [name for name, _ in qkv.named_parameters(recurse=False)]:
            parametrize.register_parametrization(qkv, name, _Rows(widths, dims[name], mesh, self.src_data_rank), unsafe=True)
        qkv.register_state_dict_post_hook(_pack_saved)
        qkv.register_load_state_dict_pre_hook(_distribute_loaded)


class _Rows(nn.Module):
    """A parametrization: a packed weight or bias is stored as three sharded DTensors (query, key, value); reading it gives
    this rank's shards of the three, concatenated."""

    def __init__(self, widths: list[int], dim: int, mesh: DeviceMesh, src: int | None) -> None:
        super().__init__()
        self.widths, self.dim = widths, dim
        self._distribute = functools.partial(distribute_tensor, device_mesh=mesh, placements=[Shard(dim)], src_data_rank=src)

    def right_inverse(self, packed: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._distribute(part.contiguous()) for part in packed.detach().split(self.widths, self.dim))

    def forward(self, *shares: Tensor) -> Tensor:
        return torch.cat([local(share) for share in shares], self.dim)


def _pack_saved(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """state_dict hook: packs the three DTensors again, so that the keys are those without a mesh."""
    for name, held in module.parametrizations.items():
        shares = [state.pop(f"{prefix}parametrizations.{name}.original{i}") for i in range(3)]
        mesh = shares[0].device_mesh
        packed = torch.cat([share.full_tensor() for share in shares], held[0].dim)
        state[prefix + name] = DTensor.from_local(packed, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _distribute_loaded(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """load_state_dict hook: shards the given tensors, whole or sharded otherwise, as this module's parameters are."""
    for name, held in module.parametrizations.items() if parametrize.is_parametrized(module) else ():
        packed = state.pop(prefix + name, None)
        if packed is not None:
            packed = packed.full_tensor() if isinstance(packed, DTensor) else packed
            for i, share in enumerate(packed.split(held[0].widths, held[0].dim)):
                state[f"{prefix}parametrizations.{name}.original{i}"] = share.contiguous()
    for name, own in module.named_parameters():
        given = state.get(prefix + name)
        if isinstance(own, DTensor) and isinstance(given, Tensor) and not isinstance(given, DTensor):
            state[prefix + name] = distribute_tensor(given, own.device_mesh, own.placements, src_data_rank=None)


class _Colwise(EmbeddingQKV):
    """Mixin that ColwiseQKV puts before the class of the EmbeddingQKV."""

    _style: ColwiseQKV
    _mesh: DeviceMesh

    def forward(
        self, ids, position_ids=None, distinct=None, rotary=None, segment_ids=None, query_biases=None, rows=None
    ) -> HiddenQKV:
        check_integers("ids", ids)
        refused = self._refuses_table() if settings.current.plan == "table" else None
        if refused:
            raise RuntimeError(f"plan: 'table' cannot run here: {refused}")
        if query_biases is not None:
            raise TypeError("query_biases: expected None under ColwiseQKV, got a pair")
        if rows is not None:
            raise TypeError("rows: expected None under ColwiseQKV, got some")
        foreign = self._foreign()
        if foreign:
            raise RuntimeError(f"ColwiseQKV: expected modules that are no more than their weights, but {foreign}")
        ids, position_ids = self._gathered("ids", ids, ids), self._gathered("position_ids", position_ids, ids)
        segment_ids = self._gathered("segment_ids", segment_ids, ids)
        call = self._read_weights(ids, position_ids, segment_ids)._replace(distinct=distinct)
        if rotary is not None or self._modules["rotary"] is not None:
            call = self._with_turns(call, rotary)
        if self._style.shard_vocabulary:
            self._check_whole(call)
            table, index, distinct = as_table(self._rows(ids, call.terms.token, self._mesh.get_group()))
            call = call._replace(terms=call.terms._replace(ids=index, token=table, padding_idx=-1), distinct=distinct)
        if call.terms.dropout:
            table, index, distinct = as_table(run(Call(call.terms, id_policy=call.id_policy)))
            call = call._replace(terms=Terms(index, table), distinct=distinct)
        return self._laid_out(run(call))

    def _check_whole(self, call: Call) -> None:
        """ids against the whole vocabulary, of which this rank holds a part."""
        call = call._replace(terms=call.terms._replace(token=self._modules["token"].weight))
        check(call)
        if call.id_policy == "raise":
            check_ranges(call)

    def _laid_out(self, found: HiddenQKV) -> HiddenQKV:
        """The outputs in the style's layouts."""
        style, mesh, n, rank = self._style, self._mesh, self._mesh.size(), self._mesh.get_local_rank()
        layout, hidden = style.hidden_layouts, found.hidden
        if isinstance(layout, Shard):
            size, rest = divmod(hidden.shape[layout.dim], n)
            if rest:
                raise ValueError(f"hidden_layouts: expected a multiple of {n} in dimension {layout.dim}, got {hidden.shape}")
            hidden = hidden.narrow(layout.dim, rank * size, size)
        else:
            hidden = _Once.apply(hidden, rank)
        found = found._replace(hidden=hidden)
        if style.use_local_output:
            return found
        layouts = (layout, *(Shard(found.query.dim() - (3 if self.heads_first else 2)) for _ in range(3)))
        pairs = zip(found, layouts, strict=True)
        return HiddenQKV(*(DTensor.from_local(x, mesh, [layout], run_check=False) for x, layout in pairs))

    def _gathered(self, name: str, x: MaybeTensor, ids: Tensor) -> MaybeTensor:
        """The whole of x (ids, or a tensor like them), all-gathered if this rank has a shard of it."""
        layout, mesh = self._style.input_layouts, self._mesh
        if isinstance(x, DTensor):
            if x.device_mesh != mesh:
                raise ValueError(f"{name}: expected a DTensor on {mesh}, got one on {x.device_mesh}")
            return x.full_tensor()
        if x is None or not isinstance(layout, Shard) or isinstance(ids, DTensor):
            return x
        dim = layout.dim % ids.dim() - ids.dim()
        if x.dim() < -dim or x.shape[dim] != ids.shape[dim]:
            return x
        return DTensor.from_local(x, mesh, [Shard(x.dim() + dim)], run_check=False).full_tensor()

    def _rows(self, ids: Tensor, table: Tensor, group: Any) -> Tensor:
        """(..., D): the row of each id, from the rank that holds it."""
        V, n = self._modules["token"].num_embeddings, self._mesh.size()
        start = self._mesh.get_local_rank() * -(-V // n)
        row = pad_row(self._modules["token"].padding_idx, V) - start
        padding = row if 0 <= row < len(table) else None
        policy = self._policy()
        index = (ids.clamp(0, V - 1) if policy == "clamp" else ids) - start
        others = (index < 0) | (index >= len(table))
        if policy in ("raise", "trust"):
            others &= (ids >= 0) & (ids < V)  # an id outside the vocabulary fails the check on every rank
        rows = embedding(index.masked_fill(others, 0), table, padding, id_policy="trust" if policy == "trust" else "raise")
        rows = rows.masked_fill(others[..., None], 0)
        return _Sum.apply(rows, None, group, True)

    def explain(
        self, ids: Tensor, position_ids: Tensor | None = None, distinct: DistinctIds | None = None, rows: Any = None
    ) -> Plan:
        if rows is not None:
            raise TypeError("rows: expected None under ColwiseQKV, got some")
        if self._style.shard_vocabulary and settings.current.plan not in ("distinct", "table"):
            self._check_whole(self._read_weights(ids, position_ids, None))
            return Plan("one_pass", "the vocabulary is sharded: rows are all-reduced, then each token is projected", {})
        return super().explain(ids, position_ids, distinct)

    def _packing_costs_more(self, ids: Tensor) -> bool:
        return False

    def _terms(self, ids: Tensor, position_ids: Tensor | None, segment_ids: Tensor | None) -> Terms:
        terms = super()._terms(ids, position_ids, segment_ids)
        table = local(terms.token)
        if not self._style.shard_vocabulary:
            rows = ids if ids.numel() < table.shape[0] else None
            table = _Sum.apply(table, rows, self._mesh.get_group(), False)
        return terms._replace(token=table, segment=self._summed(terms.segment))

    def _position(self) -> Tensor | None:
        return self._summed(super()._position())

    def _norm(self, token: Tensor) -> Norm:
        norm = super()._norm(token)
        return norm._replace(weight=self._summed(norm.weight), bias=self._summed(norm.bias))

    def _epilogue(self, token: Tensor) -> Epilogue:
        epilogue = super()._epilogue(token)
        norms = self._summed(epilogue.query_norm), self._summed(epilogue.key_norm)
        return epilogue._replace(query_norm=norms[0], key_norm=norms[1])

    def _projection(self) -> Projection:
        """This rank's rows of weight and bias: its heads of query, key and value."""
        qkv, n = self._modules["qkv"], self._mesh.size()
        found: list[Any] = []
        for place, linear in known.parts_of("qkv", qkv):
            weight, bias = (local(getattr(linear, name)) for name in ("weight", "bias"))
            found.append((weight.t() if self._known.is_transposed(place) else weight, bias))
        return known.projection_of(found, self.num_heads // n, self.num_kv_heads // n, self._groups // n, self._head_dim)

    def _summed(self, value: MaybeTensor) -> MaybeTensor:
        return _Sum.apply(local(value), None, self._mesh.get_group(), False) if isinstance(value, Tensor) else value


class _Sum(torch.autograd.Function):
    """The identity, or with `summed` an all-reduce; the gradient is all-reduced. rows: ids of the only rows whose gradient may
    be non-zero, so that only these are communicated; None: all rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor | None, group: Any, summed: bool) -> Tensor:
        ctx.set_materialize_grads(False)  # what the loss does not reach, on every rank alike
        ctx.rows, ctx.group = rows, group
        return _sum(x, group) if summed else x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        if ctx.rows is None:
            return _sum(grad, ctx.group), None, None, None
        rows = ctx.rows.reshape(-1).clamp(0, grad.shape[0] - 1)
        grad[rows] = _sum(grad[rows], ctx.group)  # a repeated row is written repeatedly, with equal values
        return grad, None, None, None


def _sum(x: Tensor, group: Any) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))


class _Once(torch.autograd.Function):
    """The identity of a tensor that every rank has; its gradient is kept on rank 0 and zero on the others, to count once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int) -> Tensor:
        ctx.rank = rank
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad if ctx.rank == 0 else torch.zeros_like(grad), None
