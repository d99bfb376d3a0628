"""The `one_pass` plan: hidden, and the whole front end, each by one fused kernel, as the operators pyembed::embed and
pyembed::embed_qkv. embed is differentiable any number of times, embed_qkv once."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..call import HIDDEN, LOOKUPS, PROJECTING, SCHEMA, TABLES, Call, Called, Epilogue, HiddenQKV, Terms
from ..modes import autocast_dtype
from ..reference import finish
from .operators import FrontEnd, Operator, into_of, launch, launcher, refuse_tangents, result_types, save_inputs, saved_inputs


def with_seed(call: Call) -> Call:
    """Dropout's seed from PyTorch's generator, which torch.manual_seed, checkpointing and CUDA graphs know."""
    terms = call.terms
    seed = torch.randint(2**62, (1,), device=terms.ids.device) if terms.dropout else None
    return call._replace(terms=terms._replace(seed=seed, dropout=float(terms.dropout)))


def hidden(call: Call, observed: bool) -> Tensor:
    """hidden (..., T, D) of a call without a projection."""
    return embed(*HIDDEN.flatten(with_seed(call)), observed=observed)


def front_end(call: Call, observed: bool) -> HiddenQKV:
    """The whole call; what the kernel's epilogue cannot do follows by PyTorch's operators."""
    call, rest = with_seed(_cast(call)), None
    if call.epilogue.query_norm is not None and not normalises_heads(call):
        call, rest = call._replace(epilogue=Epilogue()), call.epilogue
    outputs = embed_qkv(call, observed=observed, grads=call.wants_grad())
    found = HiddenQKV._make(outputs[: len(HiddenQKV._fields)])
    return found if rest is None else finish(found, rest)


def kernel_of(call: Call) -> Callable[[Call], tuple[Tensor, ...]] | None:
    """The single kernel that runs such calls without gradients: call -> hidden, query, key, value, mean, rstd; or hidden.

    None: a seed is drawn, a weight is cast, or operators follow."""
    if call.terms.dropout or call.projection is not None and autocast_dtype(call.terms.token) is not None:
        return None
    if call.epilogue.query_norm is not None and not normalises_heads(call):
        return None
    return launch_hidden if call.projection is None else embed_qkv.without_gradients


def _cast(call: Call) -> Call:
    """Under autocast weights, biases and the second query's offset have its dtype, hidden and the norm keep theirs."""
    projection, epilogue, dtype = call.projection, call.epilogue, autocast_dtype(call.terms.token)
    if dtype is None or projection is None:
        return call

    def cast(part: Any) -> Any:
        return part._replace(**{name: x.to(dtype) for name in PROJECTING if (x := getattr(part, name, None)) is not None})

    return call._replace(projection=cast(projection), epilogue=cast(epilogue))


def normalises_heads(call: Call) -> bool:
    """Whether the kernel's epilogue can normalise heads: of a width that tiles have, and no gradient is wanted."""
    head_dim = call.head_dim
    is_tile = 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0
    called = isinstance(call.epilogue.query_norm, Called)
    return is_tile and not call.wants_grad() and not called and autocast_dtype(call.terms.token) is None


launch_hidden = partial(launch, "embed", "embed")


def _empty_embed(ids: Tensor, token: Tensor, *others: Any) -> Tensor:
    return token.new_empty(*ids.shape, token.shape[1])


embed = Operator("embed", f"({HIDDEN.schema}) -> Tensor", lambda *fields: launch_hidden(HIDDEN.rebuild(fields)), _empty_embed)


# The backward is not given tables, which may have changed since the forward, but their sizes.
_WITHOUT_TABLES = tuple(name for name in HIDDEN.names if name not in (*TABLES, "reports"))
_FIELDS = ", ".join(f"{SCHEMA[name]} {name}" for name in _WITHOUT_TABLES)
_BACKWARD_SCHEMA = f"(Tensor grad, {_FIELDS}, SymInt[] sizes) -> ({result_types(TABLES)})"


def _terms(fields: Iterable[Any]) -> Terms:
    """Terms without tables."""
    values: dict[str, Any] = dict.fromkeys(TABLES) | dict(zip(_WITHOUT_TABLES, fields, strict=True))
    return Terms(**values)


def _run_embed_backward(grad: Tensor, *arguments: Any, into: Tensor | None = None) -> tuple[Tensor, ...]:
    """Gradients of tables of these sizes; 0: not wanted. into: what that of the token table is added to."""
    *fields, sizes = arguments
    module, running = launcher("embed_grad", grad)
    with running:
        found = module.embed_backward(grad, _terms(fields), dict(zip(TABLES, sizes, strict=True)), into)
    return tuple(found[name] if size else grad.new_empty(0, grad.shape[-1]) for name, size in zip(TABLES, sizes, strict=True))


def _empty_embed_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, sizes = arguments
    return tuple(grad.new_empty(size, grad.shape[-1]) for size in sizes)


embed_backward = Operator("embed_backward", _BACKWARD_SCHEMA, _run_embed_backward, _empty_embed_backward)


def _save_embed(ctx: Any, inputs: Any, output: Any) -> None:
    named = dict(zip(embed.names, inputs, strict=True))
    ctx.sizes = [0 if named[name] is None else named[name].shape[0] for name in TABLES]
    save_inputs(ctx, tuple(named[name] for name in _WITHOUT_TABLES))


def _differentiate_embed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_tangents(grad)
    wanted, (fields, _) = dict(zip(embed.names, ctx.needs_input_grad, strict=True)), saved_inputs(ctx)
    sizes = [size if wanted[name] else 0 for name, size in zip(TABLES, ctx.sizes, strict=True)]
    into = into_of(ctx) if wanted["token"] else None
    run = embed_backward if into is None else partial(_run_embed_backward, into=into)
    found = dict(zip(TABLES, run(grad, *fields, sizes), strict=True))
    wanted["token"] &= into is None
    return tuple(found[name] if needed else None for name, needed in wanted.items())


embed.register_autograd(_save_embed, _differentiate_embed, "token")


def _save_embed_backward(ctx: Any, inputs: Any, output: Any) -> None:
    _, *fields, ctx.sizes = inputs
    save_inputs(ctx, tuple(fields))


def _differentiate_embed_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """The backward is linear in grad: its transpose sums and drops, as the forward did, what comes for its gradients."""
    refuse_tangents(*grads)
    fields, _ = saved_inputs(ctx)
    terms, sizes = _terms(fields), dict(zip(TABLES, ctx.sizes, strict=True))
    tables: dict[str, Any] = dict(zip(TABLES, grads, strict=True))
    if not sizes["token"]:
        terms, tables["token"] = terms._replace(ids=torch.zeros_like(terms.ids)), grads[0].new_zeros(1, grads[0].shape[1])
    elif terms.padding_idx >= 0:
        rows = torch.arange(sizes["token"], device=grads[0].device)
        tables["token"] = tables["token"].masked_fill((rows == terms.padding_idx)[:, None], 0.0)
    for lookup in LOOKUPS:
        if lookup.table in TABLES and lookup.table != "token" and not sizes[lookup.table]:
            tables[lookup.table] = tables[lookup.ids] = None
    call = Call(terms._replace(**tables, padding_idx=-1), id_policy="trust")
    found = embed(*HIDDEN.flatten(call))
    return found, *(None for _ in fields), None


embed_backward.register_autograd(_save_embed_backward, _differentiate_embed_backward)


def _run_embed_qkv_backward(
    call: Call, grads: Any, statistics: Any, options: Any, needs: set[str], into: Tensor | None
) -> dict[str, Tensor]:
    module, running = launcher("embed_grad", call.terms.token)
    with running:
        return module.embed_qkv_backward(call, grads, *statistics, needs, into)


embed_qkv = FrontEnd(
    "embed_qkv", "", "mean rstd", partial(launch, "embed_qkv", "embed_qkv"), _run_embed_qkv_backward, Call.empty_outputs
)
