"""Which modules of a model hold rows of tokens: its tables, and its heads, which give a logit to each token."""

import gc
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..fuse.sites import is_site
from ..modules import known
from ..modules.embedding import TokenPositionEmbedding
from ..modules.front_end import EmbeddingQKV

Given = Iterable[str | nn.Module] | None
Named = dict[Any, str]  # {module: its name in the model}


class Vocabulary(NamedTuple):
    """tables: modules nn.Embedding; heads: nn.Linear, whose rows of weight and bias are tokens; other: buffers (1, V) that a
    model adds to its logits, as (module, name)."""

    tables: Named
    heads: Named
    other: list[tuple[nn.Module, str]]


def find(model: nn.Module, tables: Given = None, heads: Given = None) -> Vocabulary:
    """The tables and heads of a model, or those given, by name or as modules, with all modules that share their weights.

    Tables: what get_input_embeddings() returns, token of EmbeddingQKV and TokenPositionEmbedding, or the only nn.Embedding.
    Heads: what get_output_embeddings() returns, every nn.Linear that shares a table, or the only one with a table's rows.
    TypeError: a module of another kind. ValueError, which names them: modules among which it cannot tell, others that hold a
    table too and cannot follow, a TrainableRows, and tensors of V elements along a dimension whose meaning is not known.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}
    fused = next((name for module, name in names.items() if is_site(module)), None)
    if fused is not None:
        raise ValueError(f"model: expected one that is not fused, got one whose {fused} is: undo that first")
    found = {module: names[module] for module in _find_tables(model, names, tables)}
    _add_sharing(found, names, nn.Embedding)
    tops = {module: names[module] for module in _find_heads(model, names, found, heads)}
    _add_sharing(found, names, nn.Embedding, tops)
    own = next((module for module in found if known.is_own(module)), None)
    if own is not None:
        raise ValueError(
            f"model: expected tables that hold all their rows, got {found[own]}, a {type(own).__name__}: put what its merge() "
            "returns in its place"
        )
    _add_sharing(tops, names, nn.Linear, found)
    other = [
        (module, name)
        for module in names
        for name, buffer in module._buffers.items()
        if name == "final_logits_bias" and buffer is not None
    ]
    vocabulary = Vocabulary(found, tops, other)
    _check_sharing(vocabulary, names)
    if tables is None and heads is None:
        _check_other_tensors(vocabulary, names)
    return vocabulary


def weights_of(module: Any) -> list[Tensor]:
    return [tensor for tensor in (module._parameters.get("weight"), module._parameters.get("bias")) if tensor is not None]


def _given(argument: str, kind: Any, given: Iterable[str | nn.Module], names: Named) -> list[Any]:
    modules = []
    for one in [given] if isinstance(given, str | nn.Module) else given:
        module: Any = next((m for m, name in names.items() if name == one), None) if isinstance(one, str) else one
        if module not in names:
            raise ValueError(f"{argument}: expected names of the model's modules, got {one!r}")
        if not isinstance(module, kind):
            raise TypeError(f"{argument}: expected nn.{kind.__name__}, got {type(module).__name__} {names[module]}")
        modules.append(module)
    return modules


def _find_tables(model: Any, names: Named, given: Given) -> list[Any]:
    if given is not None:
        return _given("tables", nn.Embedding, given, names)
    if isinstance(model, nn.Embedding):
        return [model]
    if hasattr(model, "get_input_embeddings"):
        module = model.get_input_embeddings()
        if not isinstance(module, nn.Embedding):
            came = f"{type(module).__name__} {names.get(module, '')}".strip()
            raise ValueError(
                f"model: expected an nn.Embedding from get_input_embeddings(), got {came}: name the tables, tables="
            )
        tables = [module]
    else:
        tables = [m._modules["token"] for m in names if isinstance(m, EmbeddingQKV | TokenPositionEmbedding)]
        tables = tables or [module for module in names if isinstance(module, nn.Embedding)]
        if len({id(module.weight) for module in tables}) != 1:
            came = ", ".join(names[module] for module in tables) or "none"
            raise ValueError(f"model: expected one nn.Embedding, got {came}: name those of tokens, tables=(…)")
    rows = tables[0].weight.shape[0]
    alike = [m for m in names if isinstance(m, nn.Embedding) and m.weight is not tables[0].weight and m.weight.shape[0] == rows]
    if alike:
        came = ", ".join(names[module] for module in alike)
        raise ValueError(
            f"model: expected one table of {rows} rows, got {names[tables[0]]} and {came}: name those of tokens, tables=(…)"
        )
    return tables


def _find_heads(model: Any, names: Named, tables: Named, given: Given) -> list[Any]:
    if given is not None:
        return _given("heads", nn.Linear, given, names)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        if not isinstance(head, nn.Linear):
            raise ValueError(f"model: expected an nn.Linear from get_output_embeddings(), got {type(head).__name__}")
        return [head]
    tied = {id(table.weight) for table in tables}
    linears = [module for module in names if isinstance(module, nn.Linear)]
    if any(id(linear.weight) in tied for linear in linears):
        return []  # they are found by what they share
    shapes = {tuple(table.weight.shape) for table in tables}
    alike = [linear for linear in linears if tuple(linear.weight.shape) in shapes and linear.out_features != linear.in_features]
    if len({id(linear.weight) for linear in alike}) > 1:
        came = ", ".join(names[linear] for linear in alike)
        raise ValueError(f"model: expected one head, got {came}: name those that give logits of tokens, heads=(…)")
    return alike


def _add_sharing(found: Named, names: Named, kind: Any, others: Iterable[Any] = ()) -> None:
    shared = {id(module.weight) for module in (*found, *others)}
    found.update({m: name for m, name in names.items() if isinstance(m, kind) and id(m._parameters.get("weight")) in shared})


def _check_sharing(vocabulary: Vocabulary, names: Named) -> None:
    """That no other module holds a table, or a head's weight; a bias may be held under its name by any module."""
    own = {*vocabulary.tables, *vocabulary.heads}
    for module, name in {**vocabulary.tables, **vocabulary.heads}.items():
        weight = module._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.ndim != 2:
            came = "none: it is computed (parametrizations)" if weight is None else f"{type(weight).__name__} of it"
            raise ValueError(f"model: expected {name}.weight to be a 2-D nn.Parameter, got {came}")
        for other in names:
            held = [key for key, value in other._parameters.items() if value is weight]
            if held and (other not in own or held != ["weight"]):
                raise ValueError(
                    f"model: {name}.weight is shared by {names[other]} ({type(other).__name__}), which cannot follow"
                )
        for tensor in weights_of(module):
            if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
                raise ValueError(f"model: expected weights without hooks, got {name} with one, which would not follow")
    for stranger in _holders([module._parameters["weight"] for module in own]):
        if stranger not in names:
            raise ValueError(
                f"model: a table or head is shared by a module outside of it ({type(stranger).__name__}), which would not "
                "follow: give a model that holds both"
            )


def _holders(weights: list[Any]) -> list[nn.Module]:
    """All modules that hold one of these parameters, wherever they are."""
    slots = [holder for holder in gc.get_referrers(*weights) if type(holder) is dict]
    owners = gc.get_referrers(*slots)  # a module's __dict__, or the module where Python keeps none
    dicts = [owner for owner in owners if type(owner) is dict and "_parameters" in owner]
    owners += gc.get_referrers(*dicts) if dicts else []
    held = {id(slot) for slot in slots}
    return [owner for owner in owners if isinstance(owner, nn.Module) and id(owner.__dict__.get("_parameters")) in held]


def _check_other_tensors(vocabulary: Vocabulary, names: Named) -> None:
    """That nothing else has V elements along a dimension: it may be a part of the vocabulary that would not follow."""
    known = {id(tensor) for module in (*vocabulary.tables, *vocabulary.heads) for tensor in weights_of(module)}
    known |= {id(module._buffers[name]) for module, name in vocabulary.other}
    known |= {id(head._buffers.get("bias")) for head in vocabulary.heads}
    widths = {module.weight.shape[1] for module in vocabulary.tables}
    rows = {module.weight.shape[0] for module in vocabulary.tables} - widths
    for module, name in names.items():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in known and rows.intersection(tensor.shape):
                raise ValueError(
                    f"model: {name}.{key} {tuple(tensor.shape)} has as many elements as a table has rows, and may not follow: "
                    "if it is no part of the vocabulary, name what is, tables=(…), heads=(…)"
                )
