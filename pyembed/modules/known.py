"""Modules whose forward is known: what they compute from which weights, so that a front end need not call them."""

from typing import Any

import torch
from torch import Tensor, nn

from ..call import Norm, wide_dtype
from ..modes import has_process_group, is_dtensor
from ..rotary import Rotary

NAMES = ("token", "position", "segment", "norm", "qkv", "query_norm", "key_norm")
COMBINES = ("sum", "concat")
_STOCK = (nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Linear)


def is_conv1d(qkv: Any) -> bool:
    """Hugging Face's Conv1D, a linear map of weight (D, N)."""
    return type(qkv).__name__.removeprefix("Parametrized") == "Conv1D" and getattr(qkv.weight, "ndim", 0) == 2


def is_llama_norm(norm: nn.Module) -> bool:
    """Hugging Face's RMSNorm of Llama and of the models that copied it: weight, and variance_epsilon."""
    return "variance_epsilon" in norm.__dict__ and "RMSNorm" in type(norm).__name__


def is_gemma_norm(norm: nn.Module) -> bool:
    """Hugging Face's RMSNorm of Gemma 1 to 3: rows are multiplied by 1 + weight, in fp32."""
    return type(norm).__name__ in ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")


def position_offset(position: nn.Module | None) -> int:
    """Rows of a table of positions before that of position 0, as OPT's and BART's have."""
    learned = isinstance(position, nn.Embedding) and "LearnedPositionalEmbedding" in type(position).__name__
    return getattr(position, "offset", 0) if learned else 0


def scales_itself(token: nn.Module) -> bool:
    """Gemma's and BART's token embeddings multiply their rows by embed_scale. Those with more weights do more."""
    named = "ScaledWordEmbedding" in type(token).__name__ and hasattr(token, "embed_scale")
    return named and len(list(token.parameters())) == 1


class OwnScale:
    """embed_scale of such a token embedding as a number. BART's is one; Gemma's is a tensor, rounded to its rows' dtype, and
    read again only after a change, since reading it synchronises with a GPU."""

    seen: Tensor | None = None
    state: tuple[int, torch.dtype] | None = None
    value = 1.0

    def __init__(self, token: nn.Module) -> None:
        self.of(token)

    def of(self, token: Any) -> float:
        """embed_scale of token, as it is now."""
        scale = token.embed_scale
        if not isinstance(scale, torch.Tensor):
            return float(scale)
        if torch.compiler.is_compiling() or scale.is_meta:
            return self.value
        state = (scale._version, token.weight.dtype)
        if self.seen is not scale or self.state != state:  # held, so that no other tensor can come to its address
            self.seen, self.state, self.value = scale, state, scale.to(token.weight.dtype).item()
        return self.value


def is_stock(module: nn.Module) -> bool:
    """Whether its class computes what PyTorch's does."""
    kind = type(module)
    return (
        kind in _STOCK
        or getattr(kind.forward, "is_stock", False)
        or any(kind.forward is stock.forward for stock in _STOCK if issubclass(kind, stock))
    )


def _is_known(name: str, part: nn.Module) -> bool:
    """Whether it is one of transformers' whose forward is known."""
    if "norm" in name:
        return is_llama_norm(part) or is_gemma_norm(part)
    known = {"qkv": is_conv1d, "position": position_offset, "token": scales_itself}
    return name in known and bool(known[name](part))


def foreign(modules: dict[str, Any]) -> str | None:
    """Why the parts must be called, since their weights are not all that they do; None: they are."""
    for name in NAMES:
        module = modules[name]
        if module is None:
            continue
        if isinstance(module, nn.Embedding):
            if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
                return f"{name} has max_norm, scale_grad_by_freq or sparse"
            if name != "token" and module.padding_idx is not None:
                return f"{name} has a padding_idx"
        for part in module if isinstance(module, nn.ModuleList) else (module,):
            if part._forward_pre_hooks or part._forward_hooks or part._backward_pre_hooks or part._backward_hooks:
                return f"{name} has hooks"
            if not (is_stock(part) or _is_known(name, part)) or "forward" in part.__dict__:
                return f"{name}, a {type(part).__name__}, has a forward of its own"
    query, key = modules["query_norm"], modules["key_norm"]
    if query is not None and not (_is_rms(query) and _is_rms(key) and _eps(query) == _eps(key)):
        return "query_norm and key_norm are not RMSNorms with weights and the same eps"
    return None


def _is_rms(norm: Any) -> bool:
    return not isinstance(norm, nn.LayerNorm) and norm.weight is not None


def _eps(norm: Any) -> float | None:
    return norm.variance_epsilon if is_llama_norm(norm) else norm.eps


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
    """Why no table can be kept of weights that are spread over devices; None: they are not."""
    for name in NAMES if has_process_group() else ():
        for part in () if modules[name] is None else modules[name].modules():
            if getattr(part, "_is_fsdp_managed_module", False) or any(map(is_dtensor, part.parameters(recurse=False))):
                return f"{name}'s weights are spread over devices (FSDP, DTensor)"
    return None


def norm_of(norm: Any, dtype: torch.dtype) -> Norm:
    """The Norm that a module which is not foreign computes over rows of dtype."""
    if norm is None:
        return Norm()
    kind, weight = "layer" if isinstance(norm, nn.LayerNorm) else "rms", norm.weight
    if is_gemma_norm(norm):
        weight = 1.0 + weight.to(wide_dtype(dtype))
    eps = _eps(norm)
    eps = torch.finfo(dtype).eps if eps is None else float(eps)  # as torch.nn.functional.rms_norm has it
    return Norm(kind, weight, getattr(norm, "bias", None), eps)


def projection(qkv: Any, groups: int = 0, head_dim: int = 0) -> tuple[Tensor, Tensor | None]:
    """Weight (N, D), rows of query, key, value, and bias (N,) or None of qkv, whatever holds them.

    groups: in so many groups of heads, each its queries, its key and its value, lie the rows of qkv; 0: they lie as returned.
    TypeError: another kind of module."""
    if isinstance(qkv, nn.Linear):
        weight, bias = qkv.weight, qkv.bias
    elif is_conv1d(qkv):
        weight, bias = qkv.weight.t(), qkv.bias
    elif isinstance(qkv, nn.ModuleList):
        weights, biases = zip(*((linear.weight, linear.bias) for linear in qkv), strict=True)
        if len({w.device for w in weights}) > 1:
            raise ValueError(f"qkv: expected weights on one device, got {', '.join(str(w.device) for w in weights)}")
        zeros = (w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True))
        return torch.cat(weights), None if all(bias is None for bias in biases) else torch.cat(tuple(zeros))
    else:
        raise TypeError(f"qkv: expected an nn.Linear, a Hugging Face Conv1D or three nn.Linear, got {type(qkv).__name__}")
    if not groups:
        return weight, bias
    return ungroup(weight, 0, groups, head_dim), None if bias is None else ungroup(bias, 0, groups, head_dim)


def ungroup(x: Tensor, dim: int, groups: int, head_dim: int) -> Tensor:
    """Columns or rows of (queries, key, value) of each group in turn -> those of all queries, all keys, all values."""
    x = x.unflatten(dim, (groups, -1, head_dim))
    axis = dim + 1 if dim >= 0 else dim - 1
    return torch.cat([part.flatten(axis - 1, axis + 1) for part in x.split([x.shape[axis] - 2, 1, 1], axis)], dim)


def check_widths(modules: dict[str, Any], num_heads: int, num_kv_heads: int, combine: str) -> int:
    """The width of a head. ValueError: parts that do not fit each other."""
    token, position, segment, norm, qkv, *head_norms = (modules[name] for name in NAMES)
    D, (weight, _) = token.embedding_dim, projection(qkv)
    width = D if combine == "sum" else D + position.weight.shape[1]
    if weight.shape[1] != width:
        raise ValueError(f"qkv: expected {width} inputs, the width of token; got {weight.shape[1]}")
    for name, table in (("position", position), ("segment", segment)):
        if table is not None and table.weight.shape[1] != D and combine == "sum":
            raise ValueError(f"{name}: expected {D} columns, the width of token; got {table.weight.shape[1]}")
    _check_norm("norm", norm, width, "the width of token")
    heads = (num_heads, num_kv_heads, num_kv_heads)
    head_dim, rest = divmod(weight.shape[0], sum(heads))
    if rest:
        raise ValueError(
            f"qkv: expected a multiple of num_heads + 2·num_kv_heads ({num_heads} + 2·{num_kv_heads}) outputs, got "
            f"{weight.shape[0]}"
        )
    rows = [projection(linear)[0].shape[0] for linear in qkv] if isinstance(qkv, nn.ModuleList) else None
    if rows and rows != [h * head_dim for h in heads]:
        raise ValueError(f"qkv: expected outputs of query, key and value in the ratio {heads}, got {rows}")
    for name, head_norm in zip(("query_norm", "key_norm"), head_norms, strict=True):
        _check_norm(name, head_norm, head_dim, "head_dim")
    return head_dim


def _check_norm(name: str, norm: nn.Module | None, width: int, meaning: str) -> None:
    shape = getattr(norm, "normalized_shape", getattr(getattr(norm, "weight", None), "shape", (width,)))
    if tuple(shape) != (width,):
        raise ValueError(f"{name}: expected normalized_shape {(width,)}, {meaning}; got {tuple(shape)}")


def fitting(rotary: Any, head_dim: int) -> Rotary | None:
    """rotary, if it may turn heads of this width."""
    if rotary is not None and not isinstance(rotary, Rotary):
        raise TypeError(
            f"rotary: expected a pyembed.Rotary or None, got {type(rotary).__name__}: take pyembed.Rotary("
            "head_dim, max_length, inv_freq=its inv_freq), or pass its (cos, sin) at each call"
        )
    if rotary is not None and (rotary.rotary_dim > head_dim or head_dim % 2):
        raise ValueError(f"rotary: expected a rotary_dim up to an even head_dim ({head_dim}), got {rotary.rotary_dim}")
    return rotary


def place_rows(position: Any, position_ids: Tensor, offset: int) -> Tensor:
    """Rows of a module of positions, of which that of position 0 is row `offset`."""
    if is_stock(position):
        return position(position_ids + offset if offset else position_ids)
    if not position_offset(position):
        return position(position_ids)
    # OPT's and BART's, whose forward takes something else than positions.
    if position._forward_hooks or position._forward_pre_hooks:
        raise RuntimeError(f"position: expected no hooks on a {type(position).__name__}, which is not called; got some")
    return nn.functional.embedding(position_ids + offset, position.weight, position.padding_idx)


def links(modules: dict[str, Any]) -> list[tuple[dict[str, Any], str, Any]]:
    """(dict, key, value) of all that a table depends on. RuntimeError: a weight that is computed at every access."""
    qkv = modules["qkv"]
    found = [(modules, name, modules[name]) for name in NAMES]
    if isinstance(qkv, nn.ModuleList):
        found += [(qkv._modules, name, module) for name, module in qkv._modules.items()]
    for module in [module for _, _, module in found if module is not None]:
        for name in ("weight", "bias", "eps", "variance_epsilon"):
            homes = (module._parameters, module._buffers, module.__dict__)
            home = next((home for home in homes if name in home), None)
            if home is module.__dict__ and "eps" not in name or home is None and hasattr(type(module), name):
                raise RuntimeError(f"table: expected plain parameters, got a computed {name} of {type(module).__name__}")
            if home is not None:
                found.append((home, name, home[name]))
    return found


def called_projection(qkv: nn.Module, normed: Tensor, groups: int, head_dim: int) -> Tensor:
    """Query, key and value of all heads, behind one another, by calling the module or modules that project."""
    projected = torch.cat([linear(normed) for linear in qkv], -1) if isinstance(qkv, nn.ModuleList) else qkv(normed)
    return ungroup(projected, -1, groups, head_dim) if groups else projected
