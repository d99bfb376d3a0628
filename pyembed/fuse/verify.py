"""Whether a fused model still computes what it did: outputs, gradients, and the front end by itself.

What rounding explains is measured, not assumed: the unfused model runs once more with its first projections changed by one unit
in the last place of their largest value, forward and backward, and a difference may be MARGIN times what that makes of it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..plans.table import Table
from .fusion import Found, Fusion

MARGIN = 16.0
ULPS = 32.0  # of a tensor's largest value, which a difference may have at the front end itself


class Difference(RuntimeError):
    """A tensor of the fused model differs by more than rounding explains."""


Tensors = dict[str, Tensor]


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and PyTorch's generators as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng([index for index in devices if index is not None]):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def tensors_of(value: Any, name: str = "output") -> Tensors:
    """Floating tensors by name, of whatever a model returns."""
    if isinstance(value, Tensor):
        return {name: value} if value.is_floating_point() else {}
    if isinstance(value, dict):
        items = [(str(key), x) for key, x in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(i), x) for i, x in enumerate(value)]
    elif dataclasses.is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        return {}
    return {n: x for key, each in items for n, x in tensors_of(each, f"{name}.{key}").items()}


def _random(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)


def observe(model: nn.Module, args: Any, kwargs: Any, gradients: bool) -> Tensors:
    """Outputs of one forward, and gradients of all parameters for random gradients of the outputs; at rest."""
    torch.manual_seed(0)  # of models that draw numbers
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        found = tensors_of(model(*args, **kwargs))
        if not gradients:
            return found
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        reached = [(x, _random(x, i)) for i, x in enumerate(found.values()) if x.requires_grad]
        grads = _gradients(reached, [*named.values()])
    found = {name: x.detach() for name, x in found.items()}
    return found | {f"gradient of {name}": g.to_dense() for name, g in zip(named, grads, strict=True) if g is not None}


def _gradients(reached: list[tuple[Tensor, Tensor]], wanted: list[Tensor]) -> Sequence[Tensor | None]:
    """Of wanted; reached: tensors and their incoming gradients."""
    if not reached or not wanted:
        return [None] * len(wanted)
    outputs, incoming = zip(*reached, strict=True)
    return torch.autograd.grad(outputs, wanted, incoming, allow_unused=True)


@contextlib.contextmanager
def noisy(found: Found) -> Iterator[None]:
    """Within it, the first projections are changed as rounding might."""

    def noise(x: Tensor, seed: int) -> Tensor:
        largest = x.detach().abs().amax() * torch.finfo(x.dtype).eps if x.numel() else 0.0
        return _random(x, seed).clamp(-1, 1) * largest

    def change(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        out = out + noise(out, 1)
        if out.requires_grad:
            out.register_hook(lambda grad: grad + noise(grad, 2))
        return out

    handles = [linear.register_forward_hook(change) for linear in found.linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compare(found: Tensors, stock: Tensors, noise: Tensors | None = None) -> tuple[str, float]:
    """The tensor that is nearest to its budget and its error. Difference: one is over it, or missing."""
    worst, share, largest = "", -1.0, 0.0
    if found.keys() != stock.keys():
        raise Difference(f"expected the tensors {sorted(stock)}, got {sorted(found)}")
    for name, expected in stock.items():
        got, eps = found[name], torch.finfo(expected.dtype).eps
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise Difference(f"{name}: expected {expected.dtype} {tuple(expected.shape)}, got {got.dtype} {tuple(got.shape)}")
        if expected.numel() == 0:
            continue
        odd = ~expected.isfinite()
        if not torch.equal(got[odd].nan_to_num(), expected[odd].nan_to_num()) or not got[~odd].isfinite().all():
            raise Difference(f"{name}: expected NaN and infinities where the model before has them")
        size = _largest(expected)
        budget = ULPS * eps * size if noise is None else MARGIN * (_largest(noise[name] - expected) + eps * size)
        error = _largest(got - expected)
        if not error <= budget:
            raise Difference(f"{name}: expected a difference of at most {budget:.2e} from the model before, got {error:.2e}")
        if error / (budget or 1.0) > share:
            worst, share, largest = name, error / (budget or 1.0), error
    return worst, largest


def _largest(x: Tensor) -> float:
    """Of finite values; others are compared by themselves."""
    return float(x.nan_to_num(0.0, 0.0, 0.0).abs().amax()) if x.numel() else 0.0


def front_end(fusion: Fusion, rows: dict[str, Tensor], gradients: bool, table: Table | None = None) -> None:
    """Hidden, the projections and their gradients by the fused call against the modules themselves: a bias of keys has no
    gradient in a whole model, and a constant added to hidden is lost in a LayerNorm. Difference: bits of hidden, or others."""
    found = fusion.found
    parameters = {f"{found.names[m]}.{name}": p for m in found.modules for name, p in m.named_parameters(recurse=False)}
    wanted = {name: p for name, p in parameters.items() if p.requires_grad} if gradients else {}
    results = []
    for fused in (False, True):
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            hidden, *outs = fusion.parts(rows, table) if fused else by_modules(found, rows, fusion.factor())
            tensors = {"hidden": hidden} | {found.names[m]: out for m, out in zip(found.linears, outs, strict=True)}
            reached = [(x, _random(x, i)) for i, x in enumerate(tensors.values()) if x.requires_grad]
            grads = _gradients(reached, [*wanted.values()])
        results.append(
            {name: x.detach() for name, x in tensors.items()}
            | {f"gradient of {name}": g for name, g in zip(wanted, grads, strict=True) if g is not None}
        )
    stock, ours = results
    if not torch.equal(ours["hidden"], stock["hidden"]):
        raise Difference(f"hidden: expected the same bits as before, got {_largest(ours['hidden'] - stock['hidden']):.2e} off")
    compare(ours, stock)


def by_modules(found: Found, rows: dict[str, Tensor], scale: float | None) -> list[Tensor]:
    """Hidden and the projections by the modules."""
    looked_up = {
        role: F.embedding(ids, found.lookups[role].weight, found.lookups[role].padding_idx) for role, ids in rows.items()
    }
    if found.has_own:
        kind: Any = type(found.lookups["token"])
        looked_up["token"] = getattr(kind, "_pyembed_base", kind).forward(found.lookups["token"], rows["token"])
    hidden = looked_up["token"] if scale is None else looked_up["token"] * scale
    for role in ("segment", "position"):
        hidden = hidden + looked_up[role] if role in looked_up else hidden
    normed = found.norm(hidden)
    return [hidden, *(linear(normed) for linear in found.linears)]
