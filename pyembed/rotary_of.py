"""What the rotary module of a model computes, and which columns of a head its model turns together: found by calling them,
since neither names nor attributes prove it."""

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

AXES = (2, 3, 4)  # of a position, in models that read images too


def read_module(module: nn.Module, rows: int, layer_type: str | None, told: bool | None) -> tuple[Tensor, Tensor, bool]:
    """Tables cos and sin (rows, R/2), and interleaved, as Rotary.from_module has them, with its errors.

    rows: at least 2, since at position 0 all tables look alike. told: interleaved as the caller says it."""
    kind, held = type(module).__name__, [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta for tensor in held):
        raise ValueError(f"module: expected one with values, got a {kind} on meta")
    if any(tensor.requires_grad for tensor in held):
        raise ValueError(f"module: expected fixed frequencies, got a {kind} with parameters that want a gradient")
    device = held[0].device if held else torch.device("cpu")
    module, more = copy.deepcopy(module), {} if layer_type is None else {"layer_type": layer_type}  # a call may change it

    def call(places: Tensor) -> Any:
        return module(torch.zeros(1, places.shape[-1], 1, device=device), places.to(device), **more)

    def read(places: Tensor) -> tuple[Tensor, Tensor]:
        try:
            found = call(places[None])
        except Exception as error:
            if "layer_type" in inspect.signature(module.forward).parameters:
                raise ValueError(f"layer_type: expected one that the {kind} knows, got {layer_type!r}") from error
            raise TypeError(f"module: expected one that takes (x, position_ids), got a {kind}: {error!r}") from error
        got = [x for x in found if isinstance(x, Tensor)] if isinstance(found, tuple | list) else []
        shape = (1, len(places), *got[0].shape[-1:]) if got else None
        if len(got) != 2 or any(x.shape != shape or not x.is_floating_point() for x in got):
            shapes = ", ".join(str(tuple(x.shape)) for x in got) or type(found).__name__
            raise TypeError(f"module: expected one that gives (cos, sin), (1, {len(places)}, R) each, got a {kind}: {shapes}")
        first, second = (table[0].to("cpu", torch.float32) for table in got)
        return first, second

    whole = first, second = read(torch.arange(rows, device="cpu"))
    _check_lengths(kind, read, whole)
    for axes in AXES:
        shape = None
        with contextlib.suppress(Exception):
            shape = call(torch.arange(2, device="cpu").expand(axes, 1, 2))[0].shape
        if shape == (1, 2, first.shape[1]):
            raise ValueError(f"module: expected one that takes one position for each token, got a {kind}, which takes {axes}")
    cos, sin = (second, first) if second[0].any() else whole
    size = torch.hypot(cos, sin)
    if sin[0].any() or not size[0, 0] > 0 or not torch.allclose(size, size[0, 0], rtol=0.02):  # bfloat16 may have rounded them
        raise ValueError(f"module: expected cosines and sines, which turn nothing at position 0; a {kind} gives others")
    half, beside = sin.shape[1] // 2, False
    if is_doubled(sin):
        beside = not torch.equal(sin[:, :half], sin[:, half:])
        cos, sin = (table[:, ::2] if beside else table[:, :half] for table in (cos, sin))
    found = ways(type(module), [(first[1], second[1])], cos[1], sin[1])
    return cos, sin, _interleaved(kind, found, beside, told)


def _check_lengths(kind: str, read: Callable[[Tensor], tuple[Tensor, Tensor]], whole: tuple[Tensor, Tensor]) -> None:
    """A position has one angle in all calls: of its place alone, of fewer tokens, and after calls of other lengths."""
    rows = len(whole[0])
    for length in (*(2**i for i in range(rows.bit_length()) if 2**i < rows), rows):
        for places in (torch.arange(length, device="cpu"), torch.tensor([length - 1], device="cpu")):
            for found, table in zip(read(places), whole, strict=True):
                if not torch.allclose(found, table[places], rtol=0, atol=1e-5):
                    raise ValueError(
                        f"module: expected angles that do not change with the length, got a {kind}, whose angles in a call of "
                        f"positions up to {length - 1} differ from those up to {rows - 1}: choose max_length up to the length "
                        "that the model was first trained for, or pass its (cos, sin) at each call"
                    )


def _interleaved(kind: str, found: set[bool | None], beside: bool, told: bool | None) -> bool:
    if found == {None}:
        raise ValueError(
            f"module: expected one whose model turns columns (i, i + R/2) or (2i, 2i+1) forward, got a {kind}, beside which "
            "apply_rotary… turns others"
        )
    if beside and told is False:
        raise ValueError(f"interleaved: expected True, since a {kind} gives equal values side by side; got False")
    if told is not None or beside:
        return beside if told is None else told
    if len(found) == 1:
        return bool(found.pop())
    raise ValueError(
        f"interleaved: expected True or False, since nothing beside {kind} tells which columns are turned together; got None"
    )


def is_doubled(table: Tensor) -> bool:
    """Whether a table of sines has each value twice, and not by chance, as zeros have."""
    half, rest = divmod(table.shape[-1], 2)
    if rest or not table.any():
        return False
    return torch.equal(table[..., :half], table[..., half:]) or torch.equal(table[..., ::2], table[..., 1::2])


def unlike_halves(modules: Iterable[nn.Module]) -> str | None:
    """The class of one of these modules if its model does not turn columns (i, i + R/2); None: nothing says so."""
    angle = torch.tensor([0.3, 1.0, 2.0], device="cpu")
    tables = angle.cos(), angle.sin()
    layouts = [(of(tables[0]), of(tables[1])) for of in (lambda x: x.repeat(2), lambda x: x.repeat_interleave(2))]
    for kind in dict.fromkeys(map(type, modules)):
        if ways(kind, layouts, *tables) - {False}:
            return kind.__name__
    return None


def ways(kind: type, layouts: list[tuple[Tensor, Tensor]], cos: Tensor, sin: Tensor) -> set[bool | None]:
    """How the functions apply_rotary… in the file that defines a class turn heads. True: columns (2i, 2i+1), False:
    (i, i + R/2), by angles of these cosines and sines (R/2,); None: otherwise. Empty: there are no such functions.

    layouts: what the model may give them for one token, (cos, sin) each; in one of them a function has to be right."""
    found = set[bool | None]()
    for file in (vars(sys.modules.get(base.__module__, sys)) for base in kind.__mro__):
        for name in [name for name, value in file.items() if name.startswith("apply_rotary") and callable(value)]:
            each = list[bool | None]()
            for given in layouts:
                with contextlib.suppress(Exception):  # of another signature
                    each.append(_way(file[name], *given, cos, sin))
            if each:
                found.add(next((way for way in each if way is not None), None))
        if found:
            break
    return found


def _way(function: Callable[..., Any], first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> bool | None:
    """One of ways; an exception where the function cannot be called."""
    R, found = 2 * len(cos), list[bool | None]()
    for width in (R, R + 2):  # whether the first columns are turned
        x = torch.linspace(-1.0, 2.0, width, dtype=torch.float32, device="cpu").view(1, 1, 1, width)
        try:
            out = _apply(function, x, first.view(1, 1, -1), second.view(1, 1, -1))
            expected = {interleaved: _turned(x, cos, sin, interleaved) for interleaved in (False, True)}
            found.append(next((way for way, y in expected.items() if torch.allclose(out, y, atol=1e-5)), None))
        except Exception:
            if width == R:
                raise
    return found[0] if len(set(found)) == 1 else None


def _apply(function: Callable[..., Any], x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    try:
        return function(x, first, second)  # GPT-J, Gemma 4
    except Exception:
        return function(x, x, first, second)[0]  # query and key at once


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    turned, rest = x[..., : 2 * len(cos)], x[..., 2 * len(cos) :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pairs = a * cos - b * sin, b * cos + a * sin
    return torch.cat([torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1), rest], -1)
