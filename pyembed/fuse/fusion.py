"""One fused front end: when it runs, and what it computes.

Every module that is touched stays exact for any input by itself: what was computed before is handed out only for the very
tensor that it belongs to, unchanged, under unchanged weights and the same modes; else the module's own forward runs. Results
travel with tensors, never with a module, so that threads, nested calls and recomputation cannot mix.
"""

import contextlib
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyembed.settings as settings

from ..call import NO_EPILOGUE, Call, Norm, Projection, Terms, pad_row, wide_dtype
from ..checks import check_ranges
from ..ids import HasIdPolicy
from ..memory import SMALL_BYTES
from ..modes import autocast_dtype, is_captured, is_plain_eager, is_recorded
from ..modules import known
from ..modules.proofs import Proof
from ..plans.choice import LEAST_FLOPS, LEAST_TOKENS, as_if_of_table, choose, refuses, why_composed, why_torch
from ..plans.table import Table
from ..rows import with_rows
from ..run import run
from .table import KeptTable
from .waiting import Hidden, Tag, Waiting, state_of

BY_TABLE = "fused by the table"  # of calls
SMALL = "too few tokens to gain anything"
MISSED = "projections that were computed before were not taken: what lies between asks for hidden itself"
MISSES = 3  # results in a row that nobody took, after which fusing is tried at every RETRY-th call
RETRY = 64
TABLE_GAINS = 8  # so many times fewer tokens gain by a table
_keys = itertools.count()


class Found(NamedTuple):
    """What discovery proved. names: of modules in the model, by what they are; findings: of trials.py."""

    lookups: dict[str, Any]  # nn.Embedding: "token", and "segment" and "position" if there are any
    norm: Any
    linears: list[Any]
    dropouts: list[Any]
    findings: list[Any]  # of the lookups, the norm and the linear maps, in this order
    rows: dict[str, Tensor]  # what the lookups were given
    names: dict[nn.Module, str]
    path: list[tuple[nn.Module, str, nn.Module]]  # (parent, name, child) from the model to the norm
    has_own: bool = False  # whether tokens have rows of their own beside their table (vocabulary.TrainableRows)

    @property
    def modules(self) -> list[nn.Module]:
        """All but dropouts, in the order of findings."""
        return [*self.lookups.values(), self.norm, *self.linears]


class Stock(Exception):
    """Why a call runs by the model's own modules."""


class Fusion:
    """See above. calls: how many front ends ran fused, and how often each reason kept one from it."""

    def __init__(self, found: Found) -> None:
        self.found, self.calls, self.missed = found, Counter[str](), 0
        self.trial = False  # whether it is verified now, at any size
        self.hint = False  # whether the last lookup of tokens waits: then those of positions shall, too
        self.proofs: list[Proof | None] = []  # None: of a lookup by PyTorch's own forward
        self.classes: list[type] = []  # of found.modules
        self.table: KeptTable | None = None
        self.key = next(_keys)  # among all fusions
        self._scale = known.OwnScale()
        self.token = found.lookups["token"]
        count = len(found.lookups)
        self.norm_finding, self.linear_findings = found.findings[count], found.findings[count + 1 :]
        self.rows = [m.weight.shape[f.transposed] for m, f in zip(found.linears, self.linear_findings, strict=True)]
        sizes = sorted(self.rows)
        # Three maps in the ratio of query, key and value each have an output of their own; else one output is cut.
        self.is_qkv = len(sizes) == 3 and sizes[0] == sizes[1] and sizes[2] % sizes[0] == 0
        self.order = sorted(range(len(self.rows)), key=lambda i: -self.rows[i]) if self.is_qkv else [*range(len(self.rows))]

    # When

    def is_small(self, ids: Tensor) -> bool:
        """Whether so few tokens cannot save what looking further costs."""
        if self.trial or settings.current.plan != "auto" or settings.current.backend == "triton":
            return False
        table, count = self.token._parameters["weight"], ids.numel()
        if table is None or not ids.is_cpu:
            return count < LEAST_TOKENS
        least = LEAST_FLOPS if self.table is None or torch.is_grad_enabled() else LEAST_FLOPS / TABLE_GAINS
        if count < 2 or 2.0 * count * sum(self.rows) * table.shape[1] >= least:
            return count < 2
        return not (torch.is_grad_enabled() and table.requires_grad and table.numel() * table.element_size() >= SMALL_BYTES)

    def check(self, ids: Tensor) -> None:
        """Stock: a module is not as it was proved, or something wants to see what happens inside."""
        if not is_plain_eager() or is_recorded() or known.has_global_hooks():
            raise Stock("a transform, tracer, fake tensors or global hooks are at work")
        for parent, name, child in self.found.path:  # a compiler that begins there takes no tensor of another class
            if parent._modules.get(name) is not child or child._compiled_call_impl is not None:
                raise Stock(f"{self.found.names[child]} is compiled, or was replaced")
        self.check_modules(ids.device)

    def check_modules(self, device: torch.device) -> None:
        """Stock: as above, whatever runs them."""
        token = self.token._parameters["weight"]
        for module, kind, proof in zip(self.found.modules, self.classes, self.proofs, strict=True):
            name, own = self.found.names[module], module.__dict__
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
                raise Stock(f"{name} has hooks")
            if "_is_fsdp_managed_module" in own:
                raise Stock(f"{name} is managed by FSDP, which spreads its weights over devices")
            if type(module) is not kind or not (only_looks_up(module) if proof is None else proof.holds(module)):
                raise Stock(f"{name} was changed since it was fused")
            for p in module._parameters.values():
                if p is not None and (type(p) is not nn.Parameter or p.is_inference() or p.is_meta):
                    raise Stock(f"{name} has weights of another kind")
                if p is not None and (p.device != device or token is None or p.dtype != token.dtype):
                    raise Stock("weights have several dtypes or devices")
        if self.found.has_own and any(table.is_inference() for table in self.tables("token")):
            raise Stock(f"{self.found.names[self.token]} has row ids that were made in inference mode")
        for role, module in self.found.lookups.items():
            policy = module._policy() if isinstance(module, HasIdPolicy) else "raise"
            if policy not in ("raise", "trust"):
                raise Stock(f"{self.found.names[module]} has the id_policy {policy!r}")
            trains = torch.is_grad_enabled() and module.weight.requires_grad
            if role != "token" and module.padding_idx is not None and trains:
                raise Stock(f"{self.found.names[module]} has a row without a gradient (padding_idx)")
        if token is None or autocast_dtype(token) is not None and token.dtype.itemsize == 2:
            raise Stock("under autocast the norm of 16-bit rows has another dtype")
        if any(m.training and m.p > 0 for m in self.found.dropouts):
            raise Stock("dropout is at work between the lookups and the projections")

    # What

    def look_up(self, role: str, module: nn.Embedding, ids: Any, stock: Callable[[Any], Tensor]) -> Tensor:
        """Rows that wait to be summed; where there is nothing to sum, hidden. stock: the module's own forward."""
        if type(ids) is not Tensor or ids.dtype not in (torch.int32, torch.int64) or ids.dim() == 0:
            return stock(ids)
        try:
            if role == "token" and self.missed >= MISSES and not self.trial:
                self.missed += 1
                if self.missed % RETRY:
                    raise Stock(MISSED)
            self.check(ids)
            with _counted():
                ids = ids.clone()  # it is read later
                if len(self.found.lookups) == 1:
                    return self._run({"token": ids})
                weight, tables, scale = module.weight, self.tables(role), self.factor() if role == "token" else None
                versions, has_own = [x._version for x in tables], role == "token" and self.found.has_own

                def compute() -> Tensor:
                    changed = [x._version for x in tables] != versions
                    if changed or has_own and any(x is not y for x, y in zip(self.tables(role), tables, strict=True)):
                        name = self.found.names[module]
                        raise RuntimeError(f"{name}: rows were asked for after its weight was changed: look them up again")
                    rows = stock(ids) if has_own else F.embedding(ids, weight, module.padding_idx)
                    return rows if scale is None else rows * scale

                if role == "token":
                    self.hint = True
                shape = (*ids.shape, weight.shape[1])
                return Waiting.make(shape, weight, weight.dtype, compute, Tag(self, {role: ids}), tables)
        except Stock as why:
            self.calls[str(why)] += role == "token"
            return stock(ids)

    def add(self, a: Waiting, b: Waiting) -> Tensor | None:
        """The sum of waiting rows: waiting too, or hidden where all are in it; None: it is another sum than was proved."""
        assert a.tag is not None and b.tag is not None
        rows, roles = self.joined(a.tag.rows, b.tag.rows), self.found.lookups
        if rows is None or a.dtype != b.dtype:
            return None
        ids = rows["token"]
        if len(rows) < len(roles):
            first, second = a.compute, b.compute
            anchors = [table for role in rows for table in self.tables(role)]
            with _counted():
                return Waiting.make((*ids.shape, a.shape[-1]), a, a.dtype, lambda: first() + second(), Tag(self, rows), anchors)
        try:
            self.check(ids)
            with _counted():
                return self._run(rows)
        except Stock as why:
            self.calls[str(why)] += 1
            return None

    def joined(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """{role: ids} of a sum of rows with these; None: embed_qkv adds in another order, or shapes are others."""
        roles = self.found.lookups
        rows = {role: (one | other)[role] for role in roles if role in one or role in other}
        if one.keys() & other.keys() or "token" not in rows:
            return None
        shape = rows["token"].shape
        if any(x.shape not in (shape, shape[-1:], (1,) * (len(shape) - 1) + shape[-1:]) for x in rows.values()):
            return None
        if len(rows) < len(roles):
            return None if "position" in rows else rows  # which embed_qkv adds last
        return rows if len(rows) < 3 or len(one) == 2 or len(other) == 2 else None

    def tables(self, role: str) -> list[Tensor]:
        """What rows of a role are taken of: a weight, and beside it ids of other rows, the row of each, and rows."""
        module = self.found.lookups[role]
        return [module.weight, *(module.own() if role == "token" and self.found.has_own else ())]

    def factor(self) -> float | None:
        """By which rows of tokens are multiplied; None: by 1, as BART's are."""
        found = self._scale.of(self.token, self.found.findings[0])
        return None if found == 1.0 else found

    def call(self, rows: dict[str, Tensor]) -> Call:
        """rows: {role: ids}."""
        tables = {role: module.weight for role, module in self.found.lookups.items()}
        token, norm, kind = tables["token"], self.found.norm, self.norm_finding
        segment, position = tables.get("segment"), tables.get("position")
        row = -1 if self.token.padding_idx is None else pad_row(self.token.padding_idx, token.shape[0])
        scale, position_ids = self.factor(), rows.get("position")
        terms = Terms(rows["token"], token, position, position_ids, segment, rows.get("segment"), None, scale, 0.0, row)
        if self.found.has_own:
            terms = with_rows(terms, None, self.token)
        weight: Any = None if kind.weight is None else getattr(norm, kind.weight)
        bias: Any = None if kind.bias is None else getattr(norm, kind.bias)
        if kind.one_plus:
            weight = 1.0 + weight.to(wide_dtype(weight.dtype))
            bias = None if bias is None else bias.to(weight.dtype)
        eps = getattr(norm, kind.eps) if isinstance(kind.eps, str) else kind.eps
        return Call(terms, Norm(kind.kind, weight, bias, float(eps)), self._projection(), NO_EPILOGUE, "raise")

    def _projection(self) -> Projection:
        parts = []
        for i in self.order:
            linear = self.found.linears[i]
            weight = linear.weight.t() if self.linear_findings[i].transposed else linear.weight
            parts.append((weight, getattr(linear, "bias", None)))
        if self.is_qkv:
            (query, query_bias), (key, key_bias), (value, value_bias) = parts
            heads = query.shape[0] // key.shape[0]
            return Projection(query, query_bias, heads, 1, key, value, key_bias, value_bias)
        if len(parts) == 1:
            return Projection(*parts[0], 1, 0)
        bias = None
        if any(b is not None for _, b in parts):
            bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in parts])
        return Projection(torch.cat([w for w, _ in parts]), bias, 1, 0)

    def call_of_no_ids(self) -> Call:
        return self.call({role: ids[..., :0] for role, ids in self.found.rows.items()})

    def _run(self, rows: dict[str, Tensor]) -> Tensor:
        call = self.call(rows)
        table = None if self.trial else self._current_table(call)
        why = None if self.trial or table is not None else why_not(call)
        if why is not None:
            raise Stock(why)
        hidden, *outs = self._computed(call, table)
        parameters = self.parameters()
        versions = [p._version for p in parameters]
        hidden.tag = Tag(self, None, outs, (parameters, versions), state_of(hidden.device.type), table is not None)
        hidden.version, hidden.taken, hidden.pending = hidden._version, False, None
        hidden.__class__ = Hidden
        self.missed += 1
        return hidden

    def _current_table(self, call: Call) -> Table | None:
        """That shall serve a call; None: another plan, or the model's own modules."""
        if self.table is None or settings.current.plan in ("one_pass", "distinct") or refuses(call):
            return None
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()) or is_captured(call.terms.token):
            return None
        check_ranges(call)
        return self.table.current(call)

    def parts(self, rows: dict[str, Tensor], table: Table | None = None) -> list[Any]:
        """Hidden and the projections, plain tensors."""
        return self._computed(self.call(rows), table)

    def _computed(self, call: Call, table: Table | None) -> list[Any]:
        with self._forced(call):
            kernels = table is not None and why_torch(call.terms.token) is None
            hidden, query, key, value = run(call) if table is None else table.look_up(call, kernels)
        if self.is_qkv:
            outs = dict(zip(self.order, (query, key, value), strict=True))
            return [hidden, *(outs[i].flatten(-2) for i in range(3))]
        whole = query.flatten(-2)
        if len(self.rows) == 1:
            return [hidden, whole]
        return [hidden, *(part.contiguous() for part in whole.split(self.rows, -1))]

    def _forced(self, call: Call) -> contextlib.AbstractContextManager[None]:
        """In a trial the plan that fusing is for, even if it does not pay at this size."""
        if not self.trial:
            return contextlib.nullcontext()
        if not self.token.weight.is_cpu:
            return settings.plan("auto")
        call = as_if_of_table(call)
        return settings.plan("one_pass" if refuses(call) or why_composed(call) is None else "distinct")

    def parameters(self) -> list[Any]:
        return [p for module in self.found.modules for p in module._parameters.values() if p is not None]

    def holds(self, tag: Tag, device: str) -> bool:
        """Whether nothing that the projections depend on has changed since."""
        return tag.state == state_of(device) and self._has(tag.weights)

    def _has(self, weights: tuple[list[Any], list[int]]) -> bool:
        """Whether these are its parameters, at these versions."""
        parameters = self.parameters()
        if len(parameters) != len(weights[0]):
            return False
        return all(p is q and p._version == v for p, q, v in zip(parameters, *weights, strict=True))

    def normed(self, x: Any, stock: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The norm of such a hidden: waiting, with its projections; None: of another tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            tag, x.tag = x.tag, None
            wants, device, version = x.requires_grad, x.device.type, x._version
        same = tag is not None and tag.fusion is self and version == x.version
        if not same or not self.holds(tag, device):
            return None
        norm, place, weights = self.found.norm, len(self.found.lookups), tag.weights

        def compute() -> Tensor:
            x.pending = None
            with torch._C.DisableTorchFunctionSubclass():
                now = x._version
            if now != version or not self._has(weights) or not self.proofs[place].holds(norm):  # type: ignore[union-attr]
                name = self.found.names[norm]
                raise RuntimeError(f"{name}: its result was asked for after what it depends on was changed: call it again")
            return stock(x)

        with _counted():
            found = Waiting.make(x.shape, x, x.dtype, compute, tag, [x, *norm.parameters()])
        x.taken, x.pending = wants, weakref.ref(found)
        return found

    def projected(self, x: Waiting, place: int) -> Tensor | None:
        """The projection that travels with x, once; None: it must be computed."""
        tag = x.tag
        if tag is None or tag.fusion is not self or tag.outs is None or not x.is_untouched():
            return None
        if not self.holds(tag, x.device.type):
            return None
        found, tag.outs[place] = tag.outs[place], None
        if found is not None:
            x.taken = x.taken or found.requires_grad
            if not any(out is not None for out in tag.outs):
                self.calls["fused"] += 1
                if tag.by_table:
                    self.calls[BY_TABLE] += 1
            self.missed = 0
        return found


def only_looks_up(module: Any) -> bool:
    """Whether nn.Embedding's own forward, which the fused call replaces, is PyTorch's and looks up rows."""
    options = module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    own = module._pyembed_base.forward
    is_own = module._pyembed_place != "token" or own is known.FORWARDS[nn.Embedding] or known.is_ours_forward(own)
    is_own = is_own or known.is_own_forward(own)
    return is_own and nn.Embedding.forward is known.FORWARDS[nn.Embedding] and not (options or "forward" in module.__dict__)


def why_not(call: Call) -> str | None:
    """Why the model's own modules are as fast; None: they are not."""
    if settings.current.plan == "table":
        return "pyembed.plan('table') is set, and there is no table that can serve: see build_table"
    try:
        plan, composed = choose(call), why_composed(as_if_of_table(call))
    except (RuntimeError, TypeError) as error:  # a plan or backend that was asked for cannot run
        return str(error)
    if plan.name == "one_pass" and composed is not None:
        return f"nothing to gain here: {plan.reason}"
    return None


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    """Tensors of inference mode do not count their changes: what is made here is made outside of it."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
