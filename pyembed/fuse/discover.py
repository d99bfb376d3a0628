"""What is to be fused, found by watching one forward and proved by value: never by the name of a class.

    token (+ segment) (+ position)  ->  norm  ->  linear maps that take its output

The watched pass tells which modules looked up what, and whose input is whose output; trials.py tells what a module computes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..modules import known, trials
from ..modules.proofs import is_patched, prove
from ..modules.trials import RowsFinding
from .fusion import Found


class Nothing(Exception):
    """Why there is nothing to fuse: at which module discovery stopped."""


class Seen(NamedTuple):
    """A call of a module without children. ids: of the rows that it looked up."""

    module: nn.Module
    inputs: tuple[Any, ...]
    out: Any
    ids: Tensor | None
    copy: Tensor | None  # of the rows


@contextlib.contextmanager
def watched(seen: list[Seen]) -> Iterator[None]:
    """Within it, calls are noted."""
    looked_up: list[tuple[Tensor, Tensor]] = []

    class Lookups(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.embedding and len(args) > 1:
                looked_up.append((args[0].clone(), args[1]))
            return func(*args, **(kwargs or {}))

    def note(module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        if not module._modules:
            weight = getattr(module, "weight", None)
            ids = next((ids for ids, table in reversed(looked_up) if table is weight), None)
            looked_up.clear()
            if isinstance(module, nn.Embedding) and (known.is_ours(module) or known.is_own(module)) and len(inputs) == 1:
                ids = inputs[0].clone()  # by operators of its own
            seen.append(Seen(module, inputs, out, ids, out.clone() if ids is not None and isinstance(out, Tensor) else None))

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        with Lookups(), torch.no_grad():
            yield
    finally:
        handle.remove()


def discover(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
    """Nothing: why there is nothing to fuse. Errors of the model's forward pass on."""
    seen: list[Seen] = []
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if any(x.is_meta for x in (*given, *model.parameters())):
        raise Nothing("tensors have no values (meta)")
    with watched(seen):
        try:
            model(*args, **kwargs)
        except Exception as error:
            if hasattr(error, "add_note"):
                error.add_note("pyembed.fuse stopped here: the model's own forward refused this batch. Nothing was changed.")
            raise
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    seen = [call for call in seen if call.module in names]
    integers = [x for x in given if x.dtype in (torch.int32, torch.int64)]
    token = next((c for c in seen if any(_looks_up(c, ids) for ids in integers)), None)
    if token is None or not isinstance(token.module, nn.Embedding):
        raise Nothing("no nn.Embedding of the model looked up these ids")
    norm, lookups, dropouts = _first_norm(seen, token, names)
    place = next(i for i, call in enumerate(seen) if call is norm)
    linears, findings = dict[nn.Module, Any](), []
    others = []
    for call in seen[place + 1 :]:
        if not any(x is norm.out for x in call.inputs):
            continue
        if isinstance(call.module, nn.Dropout):
            dropouts.append(call.module)
        elif call.module not in linears:
            why = why_touched(call.module)
            finding = None if why or len(call.inputs) != 1 else _prove(trials.linear, call.module)
            if finding is None or not finding.casts:
                others.append(f"{names[call.module]}, {_kind(call.module)}" + (f", which {why}" if why else ""))
            else:
                linears[call.module] = finding
    if not linears:
        taken = f" but by {others[0]}" if others else ""
        raise Nothing(f"the output of the first norm, {names[norm.module]}, is taken by no linear map{taken}")
    findings = [*(_finding(role, call, names) for role, call in lookups.items()), _prove(trials.norm, norm.module)]
    modules: dict[str, Any] = {role: call.module for role, call in lookups.items()}
    rows: dict[str, Any] = {role: call.ids for role, call in lookups.items()}
    path, parent = [], model
    for part in names[norm.module].split("."):
        path.append((parent, part, parent._modules[part]))
        parent = parent._modules[part]  # type: ignore[assignment]
    findings = [*findings, *linears.values()]
    return Found(modules, norm.module, [*linears], dropouts, findings, rows, names, path, known.is_own(token.module))  # type: ignore[arg-type]


def _looks_up(call: Seen, ids: Tensor) -> bool:
    return call.ids is not None and call.ids.numel() == ids.numel() and torch.equal(call.ids.flatten(), ids.flatten())


def _first_norm(seen: list[Seen], token: Seen, names: dict[nn.Module, str]) -> tuple[Seen, dict[str, Seen], list[nn.Module]]:
    """The norm of the sum of lookups, which lookups these are, by role, and dropouts before it."""
    tables = [c for c in seen if c.ids is not None and isinstance(c.module, nn.Embedding) and c.module is not token.module]
    sums = list(_sums(token, [c for c in tables if c.copy is not None]))
    dropouts: list[nn.Module] = []
    takers = dict[str, str]()
    for call in seen:
        x = call.inputs[0] if call.inputs and isinstance(call.inputs[0], Tensor) else None
        found = None if x is None else next((roles for roles, total in sums if _equal(total, x)), None)
        if found is None or isinstance(call.module, nn.Identity):
            continue
        if isinstance(call.module, nn.Dropout):
            dropouts.append(call.module)
            continue
        why = why_touched(call.module)
        if len(call.inputs) == 1 and not why and _prove(trials.norm, call.module) is not None:
            return call, found, dropouts
        takers[names[call.module]] = f"{_kind(call.module)}{' that ' if why else ''}{why or ''}"
    if takers:
        every = "; ".join(f"{name}, {what}" for name, what in takers.items())
        raise Nothing(f"none of the modules that take the sum of lookups could be proved to be a LayerNorm or RMSNorm: {every}")
    raise Nothing(
        f"no module takes the rows of {names[token.module]}, or their sum with those of {len(tables)} other tables: something "
        "else happens to them"
    )


def _sums(token: Seen, others: list[Seen]) -> Iterator[tuple[dict[str, Seen], Tensor]]:
    """({role: lookup}, their sum) that embed_qkv can compute, rounded as it does."""
    rows = token.copy
    assert rows is not None
    yield {"token": token}, rows
    tables = [(c, c.copy) for c in others if c.copy is not None and c.copy.shape[-1] == rows.shape[-1]]
    for p, added in tables:
        yield {"token": token, "position": p}, rows + added
    for s, first in tables:
        for p, second in tables:
            if s is not p:
                yield {"token": token, "segment": s, "position": p}, rows + first + second


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _finding(role: str, call: Seen, names: dict[nn.Module, str]) -> Any:
    """Of a lookup. Of positions and segments nn.Embedding's own forward is replaced, which needs no proof."""
    module: Any = call.module
    why = why_touched(module)
    if not why and (module.max_norm is not None or module.scale_grad_by_freq or module.sparse):
        why = "has max_norm, scale_grad_by_freq or sparse"
    finding = RowsFinding(None, False)
    if not why and role != "token" and known.is_own(module):
        why = "looks up rows of its own beside its table's, which is fused of tokens alone: merge() makes it one table"
    if not why and role == "token" and not (known.is_stock("token", module) or known.is_own(module)):
        finding = _prove(trials.rows, module)
        why = None if finding is not None else "could not be proved to return rows of its weight, multiplied by a number or not"
    if why:
        raise Nothing(f"{names[module]}, {_kind(module)}, {why}")
    return finding


def why_touched(module: nn.Module) -> str | None:
    """Why a module does more than its class's forward; None: it does not."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    if "_is_fsdp_managed_module" in module.__dict__:
        return "is managed by FSDP"
    if is_patched(module):
        return "has a patched forward"
    if module._modules:
        return "has modules within"
    if any(type(p) is not nn.Parameter for p in module._parameters.values() if p is not None):
        return "has weights of another kind"
    return None


def _prove(function: Any, module: nn.Module) -> Any:
    proof = prove(function, module)
    return None if proof is None else proof.finding


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    return f"an {name}" if name[0] in "AEIO" else f"a {name}"
