"""The classes that the modules of a fused front end have: their own, with a forward before theirs that hands out what was
computed. Each module has one to itself, so that neither its attributes nor its state_dict change, and a copy or a pickle of it
is the module as it was before."""

import copyreg
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import known
from . import traced
from .fusion import SMALL, Fusion
from .waiting import Hidden, Waiting

_compiling = torch.compiler.is_compiling


class Site:
    """fusion: of which this module is a part; base: its own class."""

    _pyembed_fusion: Any
    _pyembed_base: Any
    _pyembed_place: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        found: Any = super().__reduce_ex__(protocol)
        return (copyreg._reconstructor, (self._pyembed_base, object, None), *found[2:])  # type: ignore[attr-defined]


class TokenSite(Site):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super().forward  # type: ignore[misc]
        if _compiling():
            rows, fusion = stock(*args, **kwargs), self._pyembed_fusion
            is_other = kwargs or len(args) != 1 or fusion.token is not self
            return rows if is_other else traced.look_up(fusion, "token", args[0], rows)
        if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
            return stock(*args, **kwargs)
        fusion = self._pyembed_fusion
        fusion.hint = False
        if fusion.token is not self:
            return stock(*args)
        if fusion.is_small(args[0]):
            fusion.calls[SMALL] += 1
            return stock(*args)
        return fusion.look_up("token", fusion.token, args[0], stock)


class RowsSite(nn.Embedding):
    """Of positions and segments: between the module's class and nn.Embedding, so that an offset is added before."""

    def forward(self, input: Tensor, *rows: Any, **more: Any) -> Any:
        stock: Any = super().forward
        if rows or more:  # a pyembed.Embedding takes rows
            return stock(input, *rows, **more)
        fusion: Fusion = self._pyembed_fusion  # type: ignore[assignment]
        role: str = self._pyembed_place  # type: ignore[assignment]
        if fusion.found.lookups[role] is not self:
            return stock(input)
        if _compiling():
            return traced.look_up(fusion, role, input, stock(input))
        if not (fusion.hint or fusion.trial):
            return stock(input)
        return fusion.look_up(role, self, input, stock)


class NormSite(Site):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super().forward  # type: ignore[misc]
        fusion, compiling = self._pyembed_fusion, _compiling()
        kind = traced.Rows if compiling else Hidden
        if kwargs or len(args) != 1 or type(args[0]) is not kind or fusion.found.norm is not self:
            return stock(*args, **kwargs)
        if compiling:
            return traced.normed(fusion, args[0], stock(traced.plain(args[0])))
        found = fusion.normed(args[0], stock)
        return stock(*args) if found is None else found


class LinearSite(Site):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super().forward  # type: ignore[misc]
        fusion, place, compiling = self._pyembed_fusion, self._pyembed_place, _compiling()
        kind = traced.Rows if compiling else Waiting
        if kwargs or len(args) != 1 or type(args[0]) is not kind or fusion.found.linears[place] is not self:
            return stock(*args, **kwargs)
        if compiling:
            return traced.projected(fusion, args[0], place, stock(traced.plain(args[0])))
        found = fusion.projected(args[0], place)
        return stock(*args) if found is None else found


def site_class(module: nn.Module, site: type, fusion: Fusion, place: Any) -> type:
    """The class of a module of a fusion."""
    base = type(module)
    bases: tuple[type, ...] = (site, base)
    if site is RowsSite:
        bases = (Site, RowsSite) if base is nn.Embedding else (Site, base, RowsSite)
        if known.is_ours(module):
            bases = (Site, RowsSite, base)
    own = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    traced.register(fusion)
    more = {"_pyembed_fusion": fusion, "_pyembed_base": base, "_pyembed_place": place}
    return type(base.__name__, bases, own | more)


def is_site(module: nn.Module) -> bool:
    return isinstance(module, Site)
