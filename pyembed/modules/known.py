"""Modules whose forward is known: what they compute from which weights, so that a front end need not call them.

A class of PyTorch is known by its identity and its own forward, any other by a proof (proofs.py), never by its name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from ..call import STOCK_FORWARDS, Norm, Projection, wide_dtype
from ..kept import Links
from ..modes import TENSORS, autocast_dtype, brings_operators, has_process_group, is_dtensor, is_recorded
from ..rows import OWN_ROWS
from . import trials
from .proofs import Proof, is_patched, prove
from .trials import PositionFinding

NAMES = ("token", "position", "segment", "norm", "qkv", "query_norm", "key_norm")
HEAD_NORMS = ("query_norm", "key_norm")
COMBINES = ("sum", "concat")
TRIES = 16  # of one part's module; one that changes more often is called
# The forward of each class of PyTorch, if nothing had replaced it when this file was imported.
FORWARDS: dict[Any, Any] = {
    kind: kind.forward if kind.forward.__module__.startswith("torch.nn.modules.") else None
    for kind in (nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Linear, nn.Dropout)
}
_PROVERS: dict[str, Callable[[nn.Module], Any]] = {
    "token": trials.rows, "position": trials.positions, "norm": trials.norm, "qkv": trials.linear,
    "query_norm": trials.norm, "key_norm": trials.norm,
}  # fmt: skip
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    **dict.fromkeys(("token", "position", "segment"), (nn.Embedding,)),
    **dict.fromkeys(("norm", *HEAD_NORMS), (nn.LayerNorm, nn.RMSNorm)),
    "qkv": (nn.Linear,),
}


def is_stock(name: str, module: nn.Module) -> bool:
    """Whether what stands for the part `name` computes what PyTorch's class does."""
    return not is_patched(module) and _inherits(name, module)


def _inherits(name: str, module: nn.Module) -> bool:
    """Whether the forward of its class is PyTorch's, or ours."""
    kind: Any = type(module)
    for stock in _KINDS[name]:
        if kind.forward is FORWARDS[stock] and issubclass(kind, stock):
            return True
    return is_ours(module)


def is_ours(module: nn.Module) -> bool:
    """Whether it is one of our modules that look up rows."""
    return is_ours_forward(type(module).forward)


def is_ours_forward(own: Any) -> bool:
    """Whether a class's forward is that of one of them."""
    return any(own is forward for forward in STOCK_FORWARDS)  # a compiler does not find a function in a set


def is_own(module: nn.Module) -> bool:
    """Whether it is a token of ours with rows of its own beside its weight."""
    return is_own_forward(type(module).forward)


def is_own_forward(own: Any) -> bool:
    """Whether a class's forward is that of one of them."""
    return any(own is forward for forward in OWN_ROWS)


def has_own_rows(module: nn.Module) -> bool:
    """Whether it is that, and nothing else happens."""
    if not is_own(module) or is_patched(module):
        return False
    has_hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return not has_hooks and all(type(weight) in TENSORS for weight in module._parameters.values())


class Known:
    """What the modules of one front end were proved to compute."""

    def __init__(self) -> None:
        self.proofs: dict[str, Proof] = {}
        self._tries: dict[str, int] = {}

    def finding(self, name: str, module: nn.Module, place: str = "") -> Any:
        """Of a module that is not PyTorch's: what a proof found, made now if need be; None: nothing. place: among several."""
        proof, tries = self.proofs.get(name + place), self._tries.get(name + place, 0)
        if proof is None or not proof.holds(module):
            if name not in _PROVERS or tries == TRIES:
                return None
            proof = prove(_PROVERS[name], module)
            if proof is None:
                return None
            self.proofs[name + place], self._tries[name + place] = proof, tries + 1
        return proof.finding

    def found(self, name: str, place: str = "") -> Any:
        """The finding that was looked for last; None: the module is PyTorch's."""
        proof = self.proofs.get(name + place)
        return None if proof is None else proof.finding

    def way(self, position: nn.Module) -> PositionFinding:
        """How a module of positions, or the one within a wrapper, is called. TypeError: it takes no positions."""
        core = next((part for part in position.modules() if isinstance(part, nn.Embedding)), position)
        if _inherits("position", core):
            return PositionFinding(False, None)
        found = self.finding("position", core)
        if found is None:
            raise TypeError(
                f"position: expected a module whose forward looks up rows by position, got a {type(core).__name__}, whose "
                "forward takes something else"
            )
        return found

    def is_transposed(self, place: str = "") -> bool:
        """Whether qkv's weight is (D, N), as that of Hugging Face's Conv1D."""
        found = self.found("qkv", place)
        return found is not None and found.transposed

    def __getstate__(self) -> dict[str, Any]:
        return {"proofs": {}, "_tries": {}}  # of other objects


def looks_up(name: str, module: nn.Module) -> bool:
    """Fast path: whether an embedding returns rows of its weight, and nothing else happens."""
    state, kind = module.__dict__, type(module)
    if kind.forward is not FORWARDS[nn.Embedding] and not is_ours(module) or is_patched(module):
        return False
    if state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]:
        return False
    if (_module._global_forward_hooks or _module._global_forward_pre_hooks) and has_global_hooks():
        return False
    if not isinstance(module, nn.Embedding):
        return True
    changes = module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    return not changes and (name == "token" or module.padding_idx is None)


def parts_of(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(place, module): one, or the three that project."""
    if isinstance(module, nn.ModuleList):
        return [(f".{place}", part) for place, part in enumerate(module)]
    return [("", module)]


def table_of(module: nn.Module | None) -> Tensor | None:
    """The weight of an embedding, or of the first one within a wrapper, such as an adapter's."""
    if module is None:
        return None
    if isinstance(module, nn.Embedding):
        return module.weight
    tables: Any = (part for part in module.modules() if isinstance(part, nn.Embedding) or is_ours(part))
    return next((part.weight for part in tables), None)


def foreign(modules: dict[str, Any], known: Known, offset: int = 0, names: tuple[str, ...] = NAMES) -> str | None:
    """Why the parts must be called, since their weights are not all that they do; None: they are."""
    if has_global_hooks():
        return "global module hooks are registered"
    for name in names:
        module = modules[name]
        if module is None:
            continue
        if isinstance(module, nn.Embedding):
            if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
                return f"{name} has max_norm, scale_grad_by_freq or sparse"
            if name != "token" and module.padding_idx is not None and _trains_row(module, name, offset):
                return f"{name} has a padding_idx"
        for place, part in parts_of(name, module):
            if part._forward_pre_hooks or part._forward_hooks or part._backward_pre_hooks or part._backward_hooks:
                return f"{name} has hooks"
            if is_patched(part):
                return f"{name}, a {type(part).__name__}, has a patched forward"
            if not _inherits(name, part):
                found = known.finding(name, part, place)
                if (
                    found is None
                    or name == "token"
                    and not _can_scale(part, found)
                    or name == "position"
                    and found.offset != offset
                ):
                    return f"{name}, a {type(part).__name__}, has a forward of its own"
                if name == "qkv" and not found.casts and autocast_dtype(linear_weights(part, known, place)[0]) is not None:
                    return f"qkv, a {type(part).__name__}, has another dtype under autocast than an nn.Linear"
                if name == "norm" and not _fits(part, table_of(modules["token"])):
                    return "norm's weight has another dtype than token's rows"
            for weight in part._parameters.values():
                if type(weight) not in TENSORS and brings_operators(weight):
                    return f"{name}'s weight is a {type(weight).__name__}, which brings operators of its own"
    return None


def has_global_hooks() -> bool:
    """Whether hooks of all modules would run; those that PyTorch's FlopCounterMode registers only keep track."""
    hooks = (*_module._global_forward_hooks.values(), *_module._global_forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != "torch.utils.module_tracker" for hook in hooks)


def _fits(norm: nn.Module, table: Any) -> bool:
    """Whether its weights have the dtype of the rows, or the wider one."""
    return all(p.dtype in (table.dtype, wide_dtype(table.dtype)) for p in norm.parameters())


def _trains_row(module: nn.Embedding, name: str, offset: int) -> bool:
    """Whether a row without a gradient can be looked up in training."""
    assert module.padding_idx is not None
    skipped = name == "position" and module.padding_idx < offset
    return not skipped and module.weight.requires_grad and torch.is_grad_enabled()


def unlike_norms(modules: dict[str, Any], known: Known, head_dim: int) -> str | None:
    """Why the norms of heads must be called, though what they compute is known; None: the kernels' epilogue has them."""
    query, key = (norm_of(name, modules[name], torch.float32, known) for name in HEAD_NORMS)
    if query.kind != "rms" or key.kind != "rms" or query.weight is None or key.weight is None or query.eps != key.eps:
        return "query_norm and key_norm are not RMSNorms with weights and the same eps"
    if query.weight.shape != (head_dim,):
        return "query_norm and key_norm are over all heads at once"
    return None


def make_norm(name: str, kind: str | None, width: int, eps: float, bias: bool, **factory: Any) -> nn.Module | None:
    """The module behind "layer" | "rms" | None. ValueError: another kind."""
    if kind == "layer":
        return nn.LayerNorm(width, eps, bias=bias, **factory)
    if kind == "rms":
        return nn.RMSNorm(width, eps, **factory)
    if kind is not None:
        raise ValueError(f"{name}: expected one of ('layer', 'rms', None), got {kind!r}")
    return None


def distributed(modules: dict[str, Any]) -> str | None:
    """Why nothing can be kept of weights that are spread over devices; None: they are not."""
    for name in NAMES if has_process_group() else ():
        for part in () if modules[name] is None else modules[name].modules():
            if getattr(part, "_is_fsdp_managed_module", False) or any(map(is_dtensor, part.parameters(recurse=False))):
                return f"{name}'s weights are spread over devices (FSDP, DTensor)"
    return None


def norm_of(name: str, norm: Any, dtype: torch.dtype, known: Known) -> Norm:
    """The Norm that a module which is not foreign computes over rows of dtype."""
    if norm is None:
        return Norm()
    if is_stock(name, norm):
        # Where eps is None, torch.nn.functional.rms_norm takes that of the dtype in which it computes.
        eps = torch.finfo(wide_dtype(dtype)).eps if norm.eps is None else float(norm.eps)
        return Norm("layer" if isinstance(norm, nn.LayerNorm) else "rms", norm.weight, getattr(norm, "bias", None), eps)
    kind, weight_name, bias_name, one_plus, eps = known.found(name)
    weight, bias = (None if each is None else getattr(norm, each) for each in (weight_name, bias_name))
    if one_plus:
        assert weight is not None
        weight = 1.0 + weight.to(wide_dtype(dtype))
        bias = None if bias is None else bias.to(weight.dtype)
    return Norm(kind, weight, bias, getattr(norm, eps) if isinstance(eps, str) else eps)


def _scale_tensor(token: nn.Module, found: Any) -> Tensor | None:
    """What holds the number by which a token embedding multiplies its rows, where that is a tensor."""
    value = None if found.scale is None else getattr(token, found.scale)
    return value if isinstance(value, Tensor) else None


def _can_scale(token: nn.Module, found: Any) -> bool:
    """Whether the number that multiplies rows can be read: not from a compiler's tensor, nor from one without memory."""
    scale = _scale_tensor(token, found)
    if scale is None:
        return isinstance(getattr(token, found.scale), float) if found.scale else True
    readable = type(scale) in (Tensor, nn.Buffer) and not scale.is_meta and scale.numel() == 1
    return readable and not (scale.requires_grad or torch.compiler.is_compiling() or is_recorded())


class OwnScale:
    """The number by which a token embedding multiplies its rows, as it is now. Reading a tensor on a GPU waits for it, so it is
    read again only after a change that PyTorch counts; it counts none of a tensor that was made in inference mode."""

    _seen: tuple[Tensor, int | None] | None = None
    _value = 1.0

    def of(self, token: Any, found: Any) -> float | None:
        """found: its RowsFinding, or None."""
        if found is None or found.scale is None:
            return None
        scale = _scale_tensor(token, found)
        if scale is None:
            return float(getattr(token, found.scale))
        version = None if scale.is_inference() else scale._version
        if scale.is_cpu or version is None or self._seen is None or self._seen[0] is not scale or self._seen[1] != version:
            self._seen, self._value = (scale, version), scale.item()
        return torch.tensor(self._value, dtype=token.weight.dtype, device="cpu").item() if found.rounds else self._value


def linear_weights(qkv: Any, known: Known, place: str = "") -> tuple[Tensor, Tensor | None]:
    """Weight (N, D) and bias (N,) or None of one linear map."""
    weight = qkv.weight.t() if known.is_transposed(place) and not is_stock("qkv", qkv) else qkv.weight
    return weight, getattr(qkv, "bias", None)


def projection_of(
    weights: list[tuple[Tensor, Tensor | None]], num_heads: int, num_kv_heads: int, groups: int = 0, head_dim: int = 0
) -> Projection:
    """Of weight and bias of qkv, or of its three modules.

    groups: of heads, each its queries, its key and its value, in which the rows of qkv lie; 0: they lie as returned."""
    (weight, bias), *others = weights
    if others:
        (key_weight, key_bias), (value_weight, value_bias) = others
        return Projection(weight, bias, num_heads, num_kv_heads, key_weight, value_weight, key_bias, value_bias)
    if groups:
        weight, bias = ungroup(weight, 0, groups, head_dim), None if bias is None else ungroup(bias, 0, groups, head_dim)
    return Projection(weight, bias, num_heads, num_kv_heads)


def ungroup(x: Tensor, dim: int, groups: int, head_dim: int) -> Tensor:
    """Columns or rows of (queries, key, value) of each group in turn -> those of all queries, all keys, all values."""
    x = x.unflatten(dim, (groups, -1, head_dim))
    axis = dim + 1 if dim >= 0 else dim - 1
    return torch.cat([part.flatten(axis - 1, axis + 1) for part in x.split([x.shape[axis] - 2, 1, 1], axis)], dim)


def place_rows(position: Any, way: PositionFinding, position_ids: Tensor, offset: int) -> Tensor:
    """Rows of a module of positions that is called this way. offset: the row of position 0, where it does not add its own."""
    if offset and way.offset is None:
        position_ids = position_ids + offset
    if not way.by_keyword:
        return position(position_ids)
    flat = position_ids.reshape(-1)
    return position(flat.unsqueeze(0), position_ids=flat).view(*position_ids.shape, -1)


def links(modules: dict[str, Any], known: Known, names: tuple[str, ...] = NAMES, of: str = "table") -> Links:
    """(dict, key, value) of all that what is computed from these modules depends on. RuntimeError, which begins with `of`: a
    weight that is computed at every access."""
    found: Links = [(modules, name, modules[name]) for name in names]
    proofs: dict[str, Any] = known.proofs
    found += [(proofs, name, proof) for name, proof in proofs.items()]
    if isinstance(modules["qkv"], nn.ModuleList):
        found += [(modules["qkv"]._modules, name, module) for name, module in modules["qkv"]._modules.items()]
    for module in [value for _, _, value in found if isinstance(value, nn.Module)]:
        plain = {name: value for name, value in module.__dict__.items() if isinstance(value, int | float | None)}
        plain.pop("training")
        found += [(module.__dict__, name, value) for name, value in plain.items()]  # an eps is among them
        for name in {"weight", "bias", *module._parameters, *module._buffers, *getattr(module, "parametrizations", ())}:
            home = next((home for home in (module._parameters, module._buffers) if name in home), None)
            if home is not None:
                found.append((home, name, home[name]))
            elif name in module.__dict__ or hasattr(type(module), name):
                raise RuntimeError(f"{of}: expected plain parameters, got a computed {name} of {type(module).__name__}")
    return found


def over_heads(norm: nn.Module, head_dim: int, x: Tensor) -> Tensor:
    """A norm of heads x (..., h, head_dim), or of all of them at once (OLMo-2)."""
    whole = tuple(getattr(norm, "normalized_shape", getattr(getattr(norm, "weight", None), "shape", ()))) != (head_dim,)
    return norm(x.flatten(-2)).view(x.shape) if whole and x.shape[-2] > 1 else norm(x)


def called_projection(qkv: nn.Module, normed: Tensor, groups: int, head_dim: int) -> Any:
    """Query, key and value of all heads, behind one another, by calling the module that projects; or of three modules, a tuple
    of what each gives."""
    if isinstance(qkv, nn.ModuleList):
        return tuple([linear(normed) for linear in qkv])
    return ungroup(qkv(normed), -1, groups, head_dim) if groups else qkv(normed)
