"""What a module computes, found by trying it: its forward runs at random parameters and inputs of many magnitudes, ranks and
modes, and results and gradients are compared with a formula. The name of a class proves nothing.

norm, linear, rows, positions: each takes a module and returns a finding, or None where the formula is not the module's.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..call import wide_dtype

EPS = (1e-5, 1e-6, 1e-12, 1e-8, torch.finfo(torch.float32).eps)  # that a norm may have in its code
COLUMNS = 4  # of random tables, which have all rows of the module's
NUMBERS = (3.3007, -0.37, 250.0)  # that an attribute is given; the first is rounded by 16 bits
OWN = frozenset(nn.Module().__dict__)  # attributes that every module has


class NormFinding(NamedTuple):
    """weight·(x − mean)/√(var + eps) + bias, or the same without mean: names of parameters, and of the attribute of eps."""

    kind: str  # "layer" or "rms"
    weight: str | None
    bias: str | None
    one_plus: bool  # rows are multiplied by 1 + weight
    eps: str | float


class RowsFinding(NamedTuple):
    """Rows of the weight, multiplied by a number."""

    scale: str | None  # the attribute or buffer that holds it
    rounds: bool  # to the weight's dtype, before it multiplies


class LinearFinding(NamedTuple):
    """x·weightᵀ + bias, as nn.Linear; or x·weight + bias, as Hugging Face's Conv1D."""

    transposed: bool
    casts: bool  # under autocast as nn.Linear does


class PositionFinding(NamedTuple):
    """How a module of positions is called, and whether it returns rows of its weight."""

    by_keyword: bool  # forward(anything, position_ids=…)
    offset: int | None  # the row of position 0; None: it computes something else


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters by name, as its forward finds them."""
    names = [*module._parameters, *getattr(module, "parametrizations", ())]
    return {name: weight for name in names if (weight := getattr(module, name)) is not None}


def _random(*shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu", seed: int = 0) -> Tensor:
    """Normal numbers of a generator of their own: that of the process does not move."""
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32).to(device, dtype)


class _Changes(Exception):
    """A forward changed the module, so that a call has effects."""


def _call(module: nn.Module, tensors: dict[str, Tensor], *inputs: Any, training: bool = False, **changes: Any) -> Any:
    """forward(inputs) of a copy whose parameters, buffers and attributes are these: no hook runs, and nothing of the module
    changes. Inputs are positional but for a last dict of keyword arguments."""
    kind: Any = type(module).__mro__[1] if is_parametrized(module) else type(module)
    twin = kind.__new__(kind)
    buffers = {name: changes.pop(name, torch.tensor(1.7, dtype=torch.float32)) for name in module._buffers}
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("forward", None)
    twin.__dict__.update(training=training, _buffers=buffers, _modules={}, **changes)
    twin.__dict__["_parameters"] = {**dict.fromkeys(module._parameters), **tensors}
    before, held = dict(twin.__dict__), [x for x in (*buffers.values(), *twin.__dict__.values()) if isinstance(x, Tensor)]
    versions = [x._version for x in held]
    *positional, last = inputs
    keywords = last if isinstance(last, dict) else {}
    out = kind.forward(twin, *positional, *(() if keywords else (last,)), **keywords)
    after = twin.__dict__
    if before.keys() != after.keys() or any(after[name] is not value for name, value in before.items()):
        raise _Changes
    if [x._version for x in held] != versions or any(buffers[name] is not x for name, x in twin._buffers.items()):
        raise _Changes
    return out


Function = Callable[..., Tensor]


def _near(a: Tensor, b: Tensor, rtol: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a - b).abs() <= rtol * (b.abs() + b.abs().amax(-1, keepdim=True) / 8)).all())


def _agree(one: Function, other: Function, tensors: list[Tensor], rtol: float = 1e-4) -> bool:
    """Whether two functions have the same values and gradients, and the same values where none are recorded."""
    found = []
    for function in (one, other):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, _random(*out.shape, device=out.device).to(out.dtype), allow_unused=True)
        with torch.no_grad():
            found.append((out, *grads, function(*tensors)))
    pairs = list(zip(*found, strict=True))
    return all((a is None) == (b is None) for a, b in pairs) and all(a is None or _near(a, b, rtol) for a, b in pairs)


def _same_ranks(one: Function, other: Function, x: Tensor, rtol: float) -> bool:
    """Whether two functions of x (a, b, D) have the same values for other ranks, and are not finite for the same inputs."""
    with torch.no_grad():
        shapes = (x.unsqueeze(0), x[0], x[0, 0], x[:, :1])
        if not all(_near(one(part), other(part), rtol) for part in shapes):
            return False
        odd = x.clone()
        odd[0, 0, 0], odd[0, 1, 0] = torch.nan, torch.inf
        return torch.equal(one(odd).isnan(), other(odd).isnan())


def norm(module: nn.Module) -> NormFinding | None:
    """Whether it is a LayerNorm or an RMSNorm over the last axis, in the dtype in use, in training and in inference."""
    held = weights_of(module)
    names, parameters = list(held), list(held.values())
    if len(names) > 2 or module._buffers or any(isinstance(value, Tensor) for value in module.__dict__.values()):
        return None
    if len({p.shape for p in parameters}) > 1 or any(p.dim() != 1 for p in parameters):
        return None
    D = parameters[0].shape[0] if parameters else (*getattr(module, "normalized_shape", ()), 16)[0]
    device = parameters[0].device if parameters and parameters[0].is_cuda else "cpu"
    dtype = parameters[0].dtype if parameters else torch.float32
    if D < 2:
        return None
    rows = 4.0 ** torch.arange(-11, 9, 2)[:, None]  # small ones tell eps, shifted ones tell the mean
    x = torch.stack([rows * _random(len(rows), D), rows * (1 + _random(len(rows), D) / 2)]).to(device)
    weights = [_random(D, device=device, seed=place) for place in range(len(names))]
    numbers = [name for name, value in module.__dict__.items() if isinstance(value, float) and name not in OWN]

    def run(x: Tensor, *weights: Tensor, training: bool = False, **changes: Any) -> Tensor:
        return _call(module, dict(zip(names, weights, strict=True)), x, training=training, **changes)

    def formula(finding: NormFinding, eps: float) -> Function:
        return lambda x, *weights: _norm(x, finding, eps, dict(zip(names, weights, strict=True)))

    for finding in _norms(names, numbers):
        tried: list[tuple[float, dict[str, Any]]] = [(eps, {str(finding.eps): eps}) for eps in (3e-5, 2e-9, 0.7)]
        if not isinstance(finding.eps, str):
            tried = [(finding.eps, {})]
        eps, changes = tried[0]
        if not _near(run(x, *weights, **changes), formula(finding, eps)(x, *weights), 1e-2):
            continue
        for eps, changes in tried:
            expected = formula(finding, eps)
            for training in (True, False):

                def found(*tensors: Tensor, changes: Any = changes, training: bool = training) -> Tensor:
                    return run(*tensors, training=training, **changes)

                if not all(_agree(found, expected, [x, *(w * size for w in weights)]) for size in (1.0, 60.0, 0.02)):
                    return None
            ranks = [lambda x, f=f: f(x, *weights) for f in (found, expected)]
            if not _same_ranks(ranks[0], ranks[1], x, 1e-4):
                return None
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                if not _near(found(x, *weights), expected(x, *weights), 2e-2):
                    return None
            used = [tensor.to(dtype) for tensor in (x.clamp(-64, 64), *weights)]
            if not _close(found(*used), expected(*[tensor.to(wide_dtype(dtype)) for tensor in used]), dtype):
                return None
        return finding
    return None


def _norms(names: list[str], numbers: list[Any]) -> Iterator[NormFinding]:
    """Formulas that a module with these parameters and numbers may have."""
    roles: list[tuple[str | None, str | None]] = [(None, None)] if not names else [(names[0], None)]
    if len(names) == 2:
        roles = [(names[0], names[1]), (names[1], names[0])]
    for kind in ("rms", "layer") if len(names) < 2 else ("layer",):
        for weight, bias in roles:
            for one_plus in (False, True) if weight else (False,):
                for eps in (*numbers, *EPS):
                    yield NormFinding(kind, weight, bias, one_plus, eps)


def _norm(x: Tensor, finding: NormFinding, eps: float, weights: dict[str, Tensor]) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if finding.kind == "layer" else x
    found = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if finding.weight is not None:
        found = found * (weights[finding.weight] + finding.one_plus)
    return found if finding.bias is None else found + weights[finding.bias]


def _rounding(dtype: torch.dtype, least: float) -> float:
    """Of a dtype in use: at least this, but in float64, which is no dtype of what computes in float32."""
    eps = torch.finfo(dtype).eps
    return 16 * eps if dtype == torch.float64 else max(eps, least)


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether a result is the expected one but for three roundings."""
    error, eps = (found.to(expected.dtype) - expected).abs(), _rounding(dtype, 1e-5)
    return found.dtype == dtype and bool((error <= 3 * eps * (expected.abs() + 0.1)).all())


def linear(module: nn.Module) -> LinearFinding | None:
    """Whether it is a linear map of its last axis, in the dtype in use, in training and in inference."""
    named = weights_of(module)
    if not {"weight"} <= named.keys() <= {"weight", "bias"} or named["weight"].dim() != 2 or module._buffers:
        return None
    if any(isinstance(value, Tensor) for value in module.__dict__.values()):
        return None
    names, dtype = sorted(named, reverse=True), named["weight"].dtype
    weights, (rows, columns) = [_random(*named[name].shape) for name in names], named["weight"].shape

    def run(x: Tensor, *weights: Tensor, training: bool = False) -> Tensor:
        return _call(module, dict(zip(names, weights, strict=True)), x, training=training)

    for transposed, width in ((False, columns), (True, rows)):

        def formula(x: Tensor, weight: Tensor, *bias: Tensor, transposed: bool = transposed) -> Tensor:
            return F.linear(x, weight.t() if transposed else weight, *bias)

        x = _random(2, 3, width)
        try:
            if not _near(run(x, *weights), formula(x, *weights), 1e-2):
                continue
        except RuntimeError:  # of widths that do not fit
            continue
        for training in (True, False):

            def found(*tensors: Tensor, training: bool = training) -> Tensor:
                return run(*tensors, training=training)

            if not _agree(found, formula, [x, *weights], 1e-3):
                return None
            large = [3e4 * x, *weights]
            if not _near(found(*large), formula(*large), 1e-3):
                return None
        if not _same_ranks(lambda x: found(x, *weights), lambda x: formula(x, *weights), x, 1e-3):
            return None
        used, sizes = [tensor.to(dtype) for tensor in (x, *weights)], formula(*[tensor.abs() for tensor in (x, *weights)])
        exact = formula(*[tensor.to(wide_dtype(dtype)) for tensor in used])
        with torch.no_grad():
            error = (found(*used).to(exact.dtype) - exact).abs() if found(*used).dtype == dtype else torch.inf
            with torch.autocast("cpu", torch.bfloat16):
                casts = _near(found(x, *weights), formula(x, *weights), 0.1)
        near = bool((torch.as_tensor(error) <= 4 * _rounding(dtype, 1e-6) * sizes).all())
        return LinearFinding(transposed, casts) if near else None
    return None


def rows(module: nn.Module) -> RowsFinding | None:
    """Whether a token embedding's forward returns its rows, multiplied by a number or not, and refuses ids outside of it."""
    if not isinstance(module, nn.Embedding) or set(module._parameters) != {"weight"}:
        return None
    V, D, dtype = module.num_embeddings, module.embedding_dim, module.weight.dtype
    held = [*module._buffers, *(name for name, value in module.__dict__.items() if isinstance(value, Tensor))]
    numbers = [name for name, value in module.__dict__.items() if isinstance(value, float) and name not in OWN]
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    ids = torch.cat([ids, ids[: min(V, 8)]])[None]
    table = _random(V, COLUMNS, dtype=dtype)
    whole = _random(V + D, dtype=dtype).as_strided((V, D), (1, 1))  # rows as wide as the module's, in little memory

    def run(table: Tensor, ids: Tensor = ids, **changes: Any) -> Tensor:
        return _call(module, {"weight": table}, ids, **changes)

    if any(_accepts(run, table, torch.tensor([outside])) for outside in (-1, V, -2, -100, V + 1000, 2**40)):
        return None
    if len(held) > 1:  # one may be the number; of others nothing is known
        return None
    candidates = [RowsFinding(name, rounds) for name in held for rounds in (False, True)]
    candidates += [RowsFinding(name, False) for name in numbers if not held] + [RowsFinding(None, False)] * (not held)
    for finding in candidates:
        if all(_scales(module, run, finding, number, (table, whole), ids, held) for number in NUMBERS):
            return finding
    return None


def _scales(module: Any, run: Any, finding: RowsFinding, number: float, tables: Any, ids: Tensor, held: list[str]) -> bool:
    """Whether rows are multiplied by the attribute of the finding, where that is this number."""
    (table, whole), factor = tables, 1.0 if finding.scale is None else number
    given = torch.tensor(number, dtype=torch.float32)
    changes = {} if finding.scale is None else {finding.scale: given if held else number}
    if finding.scale in held:
        factor = (given.to(table.dtype) if finding.rounds else given).item()

    def expected(table: Tensor, ids: Tensor = ids) -> Tensor:
        return F.embedding(ids, table, module.padding_idx) * factor

    few = ids[:, :5]
    with torch.no_grad():
        if not torch.equal(run(whole, few, **changes), expected(whole, few)):
            return False
        for part in (ids[0], ids[0, 0], few.expand(2, 3, -1)):
            if not torch.equal(run(table, part, **changes), expected(table, part)):
                return False
    # Bits: a number and its rounding are nearer to each other than a tolerance can tell.
    for training in (True, False):

        def found(table: Tensor, training: bool = training) -> Tensor:
            return run(table, training=training, **changes)

        large = table * (30.0 if table.dtype == torch.float16 else 1e3)
        if not torch.equal(found(large), expected(large)):
            return False
        if number == NUMBERS[0] and not _agree(found, expected, [table]):
            return False
    return True


def _accepts(function: Callable[..., Any], *arguments: Any) -> bool:
    try:
        function(*arguments)
    except (IndexError, RuntimeError):
        return False
    return True


def positions(module: nn.Module) -> PositionFinding | None:
    """How a module of positions is called, and which of its rows a position has; None: it takes no positions."""
    if not isinstance(module, nn.Embedding) or set(module._parameters) != {"weight"}:
        return None
    by_keyword = "position_ids" in inspect.signature(type(module).forward).parameters
    R, is_simple = module.num_embeddings, not module._buffers
    is_simple = is_simple and not any(isinstance(value, Tensor) for value in module.__dict__.values())
    table = _random(R, COLUMNS, dtype=module.weight.dtype)

    def run(ids: Tensor, table: Tensor = table, training: bool = False) -> Tensor:
        flat = ids.reshape(-1)
        inputs = (flat[None], {"position_ids": flat}) if by_keyword else (ids,)
        return _call(module, {"weight": table}, *inputs, training=training).reshape(*ids.shape, -1)

    start = (table == run(torch.tensor([0]))).all(-1).nonzero()
    if len(start) == 1 and is_simple:
        offset = int(start)
        ids = torch.arange(R - offset).flip(0)
        ids = torch.cat([ids, ids[:3]])

        def look_up(table: Tensor, ids: Tensor = ids) -> Tensor:
            return F.embedding(ids + offset, table, module.padding_idx)

        exact = not any(_accepts(run, torch.tensor([outside])) for outside in (R - offset, R + 1000, 2**40))
        for below in (-1, -100):  # which may count from the end, as indexing does
            row = table[below + offset] if below + offset >= -R else None
            exact = exact and (
                not _accepts(run, torch.tensor([below])) or row is not None and torch.equal(run(torch.tensor([below]))[0], row)
            )
        for part in (ids, ids[None], ids[:2].expand(2, 3, -1)) if exact else ():
            exact = exact and torch.equal(run(part), look_up(table, part))
        exact = exact and torch.equal(run(ids, 1e3 * table), look_up(1e3 * table))
        for training in (True, False):
            exact = exact and _agree(lambda t, training=training: run(ids, t, training), look_up, [table])
        if exact:
            return PositionFinding(by_keyword, offset)
    ids = torch.arange(min(R, 8) - 2)  # a row depends on its position alone, and differs from the others
    straight, turned = run(ids), run(ids.flip(0))
    if torch.equal(straight.flip(0), turned) and len(straight.unique(dim=0)) == len(ids) > 1:
        return PositionFinding(by_keyword, None)
    return None
