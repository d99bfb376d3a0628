"""What a module computes, proved by value: its forward runs at random parameters and inputs, and results and gradients are
compared with a formula. The name of a class proves nothing.

A finding holds while the module's class, its forward, its attributes and the dtypes of its weights are those of the proof. What
is not proved is called as it is.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..call import wide_dtype
from ..modes import is_plain_eager

EPS = (1e-5, 1e-6, 1e-12, 1e-8, torch.finfo(torch.float32).eps)  # that a norm may have in its code
COLUMNS = 4  # of random tables, which have all rows of the module's
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)
_OWN = frozenset(nn.Module().__dict__)


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


class PositionFinding(NamedTuple):
    """How a module of positions is called, and whether it returns rows of its weight."""

    by_keyword: bool  # forward(anything, position_ids=…)
    offset: int | None  # the row of position 0; None: it computes something else


class Proof:
    """A finding, and what it depends on. finding: None where nothing could be proved."""

    def __init__(self, module: nn.Module, finding: Any) -> None:
        self.finding, self._kind, self._forward = finding, type(module), type(module).forward
        self._names = [name for name, value in module.__dict__.items() if name not in _OWN and _is_plain(value)]
        self._size, self._weights = len(module.__dict__), list(module._parameters)
        self._values, self._dtypes = self._read(module)

    def holds(self, module: nn.Module) -> bool:
        """Whether module still is as it was when the proof was made."""
        kind = type(module)
        if kind is not self._kind or kind.forward is not self._forward:
            return False
        return len(module.__dict__) == self._size and self._read(module) == (self._values, self._dtypes)

    def _read(self, module: nn.Module) -> tuple[list[Any], list[Any]]:
        state, parameters = module.__dict__, module._parameters
        weights = [parameters.get(name) for name in self._weights]
        dtypes = [None if weight is None else weight.dtype for weight in weights]
        return [state.get(name) for name in self._names], [len(parameters), *dtypes]


def prove(function: Callable[[nn.Module], Any], module: nn.Module) -> Proof | None:
    """A Proof by one of the functions below, of the forward of the module's class; None: values cannot be looked at now."""
    if not is_plain_eager() or torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None
    finding = None
    is_alone = not module._modules or is_parametrized(module) and len(module._modules) == 1
    is_simple = all(name in _OWN or _is_plain(value) or isinstance(value, Tensor) for name, value in module.__dict__.items())
    if is_alone and (is_simple or is_patched(module)):
        devices = {p.device for p in module.parameters() if p.is_cuda}
        with (
            torch.random.fork_rng([device.index for device in devices]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.device("cpu"),
        ):
            try:
                finding = function(module)
            except Exception:  # whatever it takes, it is something else
                finding = None
    return Proof(module, finding)


def is_patched(module: nn.Module) -> bool:
    """Whether more than its class's forward runs, hooks aside."""
    return "forward" in module.__dict__ or type(module).__call__ is not nn.Module.__call__


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or type(value) is tuple and all(map(_is_plain, value))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters by name, as its forward finds them."""
    names = [*module._parameters, *getattr(module, "parametrizations", ())]
    return {name: weight for name in names if (weight := getattr(module, name)) is not None}


def _random(*shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    """Numbers around 1 of a generator of their own: that of the process does not move."""
    generator = torch.Generator("cpu").manual_seed(1 + sum(shape))
    return (1 + torch.randn(*shape, generator=generator, device="cpu") / 2).to(device, dtype)


def _call(module: nn.Module, tensors: dict[str, Tensor], *inputs: Any, training: bool = False, **changes: Any) -> Any:
    """forward(inputs) of a shallow copy whose parameters, buffers and attributes are these: no hook runs, and nothing of the
    module changes. Inputs are positional but for a last dict of keyword arguments."""
    kind: Any = type(module).__mro__[1] if is_parametrized(module) else type(module)
    twin = kind.__new__(kind)
    held = {**dict.fromkeys(module._parameters), **tensors}
    buffers = {name: changes.pop(name, torch.tensor(1.7)) for name in module._buffers}
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update(training=training, _parameters=held, _buffers=buffers, _modules={}, **changes)
    *positional, last = inputs
    keywords = last if isinstance(last, dict) else {}
    return kind.forward(twin, *positional, *(() if keywords else (last,)), **keywords)


def _agree(one: Callable[..., Tensor], other: Callable[..., Tensor], tensors: list[Tensor], rtol: float = 1e-4) -> bool:
    """Whether two functions have the same values and gradients."""
    found = []
    for function in (one, other):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, _random(*out.shape, device=out.device).to(out.dtype), allow_unused=True)
        found.append((out, *grads))
    return all(
        a is None and b is None
        or a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype
        and bool(((a - b).abs() <= rtol * (b.abs() + b.abs().amax(-1, keepdim=True) / 8)).all())
        for a, b in zip(*found, strict=True)
    )  # fmt: skip


def norm(module: nn.Module) -> NormFinding | None:
    """Whether it is a LayerNorm or an RMSNorm over the last axis, in the dtype in use, in training and in inference."""
    held = weights_of(module)
    names, parameters = list(held), list(held.values())
    if len(names) > 2 or module._buffers or len({p.shape for p in parameters}) > 1 or any(p.dim() != 1 for p in parameters):
        return None
    D = parameters[0].shape[0] if parameters else 16
    device = parameters[0].device if parameters and parameters[0].is_cuda else "cpu"
    dtype = parameters[0].dtype if parameters else torch.float32
    rows = 4 ** torch.arange(-11.0, 6.0, 2)[:, None]  # small ones tell eps, shifted ones tell the mean
    x = torch.stack([rows * (_random(len(rows), D) - 1), rows * _random(len(rows), D)]).to(device)
    weights = [_random(D, device=device) + place for place in range(len(names))]
    numbers = [name for name, value in module.__dict__.items() if isinstance(value, float) and name not in _OWN]

    def run(x: Tensor, *weights: Tensor, training: bool = False, **changes: Any) -> Tensor:
        return _call(module, dict(zip(names, weights, strict=True)), x, training=training, **changes)

    for finding, eps, changes in _norms(names, numbers):

        def formula(x: Tensor, *weights: Tensor, finding: NormFinding = finding, eps: float = eps) -> Tensor:
            return _norm(x, finding, eps, dict(zip(names, weights, strict=True)))

        if not bool((run(x, *weights, **changes) - formula(x, *weights)).abs().amax() < 1e-2):
            continue

        def trains(*tensors: Tensor, changes: Any = changes) -> Tensor:
            return run(*tensors, training=True, **changes)

        def infers(*tensors: Tensor, changes: Any = changes) -> Tensor:
            return run(*tensors, **changes)

        if not (_agree(trains, formula, [x, *weights]) and _agree(infers, formula, [x, *weights])):
            continue
        used = [tensor.to(dtype) for tensor in (x, *weights)]
        wide = [tensor.to(wide_dtype(dtype)) for tensor in used]
        return finding if _close(run(*used, **changes), formula(*wide), dtype) else None
    return None


def _norms(names: list[str], numbers: list[str]) -> Iterator[tuple[NormFinding, float, dict[str, Any]]]:
    """Formulas that a module with these parameters and numbers may have; the attribute that is eps gets another value."""
    roles: list[tuple[str | None, str | None]] = [(None, None)] if not names else [(names[0], None)]
    if len(names) == 2:
        roles = [(names[0], names[1]), (names[1], names[0])]
    for kind in ("rms", "layer") if len(names) < 2 else ("layer",):
        for weight, bias in roles:
            for one_plus in (False, True) if weight else (False,):
                for name in numbers:
                    yield NormFinding(kind, weight, bias, one_plus, name), 3e-5, {name: 3e-5}
                for eps in EPS:
                    yield NormFinding(kind, weight, bias, one_plus, eps), eps, {}


def _norm(x: Tensor, finding: NormFinding, eps: float, weights: dict[str, Tensor]) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if finding.kind == "layer" else x
    found = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if finding.weight is not None:
        found = found * (weights[finding.weight] + finding.one_plus)
    return found if finding.bias is None else found + weights[finding.bias]


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether a result is the expected one but for three roundings, at least of float32."""
    error, eps = (found.to(expected.dtype) - expected).abs(), max(torch.finfo(dtype).eps, 1e-5)
    return found.dtype == dtype and bool((error <= 3 * eps * (expected.abs() + 0.1)).all())


def linear(module: nn.Module) -> bool | None:
    """False: x·weightᵀ + bias, as nn.Linear; True: x·weight + bias, as Hugging Face's Conv1D; None: something else."""
    named = weights_of(module)
    if not {"weight"} <= named.keys() <= {"weight", "bias"} or named["weight"].dim() != 2 or module._buffers:
        return None
    names = sorted(named, reverse=True)
    weights, (rows, columns) = [_random(*named[name].shape) - 1 for name in names], named["weight"].shape

    def trains(x: Tensor, *weights: Tensor) -> Tensor:
        return _call(module, dict(zip(names, weights, strict=True)), x, training=True)

    def infers(x: Tensor, *weights: Tensor) -> Tensor:
        return _call(module, dict(zip(names, weights, strict=True)), x)

    for transposed, width in ((False, columns), (True, rows)):

        def formula(x: Tensor, weight: Tensor, *bias: Tensor, transposed: bool = transposed) -> Tensor:
            return F.linear(x, weight.t() if transposed else weight, *bias)

        tensors = [_random(2, 3, width) - 1, *weights]
        try:
            if _agree(trains, formula, tensors, 1e-3) and _agree(infers, formula, tensors, 1e-3):
                return transposed
        except RuntimeError:  # of widths that do not fit
            continue
    return None


def rows(module: nn.Module) -> RowsFinding | None:
    """Whether a token embedding's forward returns its rows, multiplied by a number or not, and refuses ids outside of it."""
    if not isinstance(module, nn.Embedding) or set(module._parameters) != {"weight"}:
        return None
    V, dtype = module.num_embeddings, module.weight.dtype
    table, ids = _random(V, COLUMNS, dtype=dtype), torch.randperm(V, generator=torch.Generator().manual_seed(0))[None]
    held = [*module._buffers, *(name for name, value in module.__dict__.items() if isinstance(value, Tensor))]
    numbers = [name for name, value in module.__dict__.items() if isinstance(value, float) and name not in _OWN]
    given = torch.tensor(3.3007)  # which 16 bits round

    def run(table: Tensor, ids: Tensor = ids, **changes: Any) -> Tensor:
        return _call(module, {"weight": table}, ids, **changes)

    if _accepts(lambda: run(table, torch.tensor([-1]))) or _accepts(lambda: run(table, torch.tensor([V]))):
        return None
    candidates: list[tuple[RowsFinding, float, dict[str, Any]]] = [(RowsFinding(None, False), 1.0, {})]
    for name in held:
        candidates += [(RowsFinding(name, False), given.item(), {name: given})]
        candidates += [(RowsFinding(name, True), given.to(dtype).item(), {name: given})]
    candidates += [(RowsFinding(name, False), given.item(), {name: given.item()}) for name in numbers]
    for finding, number, changes in candidates:

        def formula(table: Tensor, number: float = number) -> Tensor:
            return F.embedding(ids, table, module.padding_idx) * number

        def scaled(table: Tensor, changes: Any = changes) -> Tensor:
            return run(table, **changes)

        # Bits: 3.3007 and its rounding are nearer to each other than a tolerance can tell.
        if torch.equal(scaled(table), formula(table)) and _agree(scaled, formula, [table]):
            return finding
    return None


def _accepts(function: Callable[[], Any]) -> bool:
    try:
        function()
    except (IndexError, RuntimeError):
        return False
    return True


def positions(module: nn.Module) -> PositionFinding | None:
    """How a module of positions is called, and which of its rows a position has; None: it takes no positions."""
    if not isinstance(module, nn.Embedding) or set(module._parameters) != {"weight"}:
        return None
    by_keyword = "position_ids" in inspect.signature(type(module).forward).parameters
    R = module.num_embeddings
    table = _random(R, COLUMNS, dtype=module.weight.dtype)

    def run(ids: Tensor, table: Tensor = table) -> Tensor:
        inputs = (ids[None], {"position_ids": ids}) if by_keyword else (ids,)
        return _call(module, {"weight": table}, *inputs).reshape(*ids.shape, -1)

    start = (table == run(torch.tensor([0]))).all(-1).nonzero()
    if len(start) == 1:
        offset = int(start)
        ids = torch.arange(R - offset).flip(0)

        def look_up(table: Tensor) -> Tensor:
            return F.embedding(ids + offset, table, module.padding_idx)

        exact = torch.equal(run(ids), look_up(table)) and not _accepts(lambda: run(torch.tensor([R - offset])))
        if exact and _agree(lambda t: run(ids, t), look_up, [table]):
            return PositionFinding(by_keyword, offset)
    ids = torch.arange(min(R, 8) - 2)  # a row depends on its position alone, and differs from the others
    straight, turned = run(ids), run(ids.flip(0))
    if torch.equal(straight.flip(0), turned) and len(straight.unique(dim=0)) == len(ids) > 1:
        return PositionFinding(by_keyword, None)
    return None
