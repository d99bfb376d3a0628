"""pyembed.fuse and the handle that it returns."""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import pyembed.settings as settings

from ..modules.known import is_stock
from ..modules.proofs import Proof
from ..plans.choice import LEAST_FLOPS, LEAST_TOKENS, as_if_of_table, refuses
from . import traced
from .discover import Nothing, discover
from .fusion import BY_TABLE, SMALL, Found, Fusion, why_not
from .sites import LinearSite, NormSite, RowsSite, TokenSite, is_site, site_class
from .table import KeptTable
from .verify import Difference, at_rest, by_modules, compare, front_end, noisy, observe

ROLES = ("token", "segment", "position", "norm", "linear")


def fuse(model: nn.Module, *args: Any, gradients: bool = True, strict: bool = False, **batch: Any) -> "Fused":
    """Lets the front end of a model run by one call of pyembed, in place: embedding lookups, their sum, the first norm and the
    linear maps that take its output.

    args, batch: any small batch as the model's forward takes it, with ids (..., T) int32 or int64 on the model's device. The
    model runs on it a few times in eval mode: once watched, to find which modules these are; then with and without fusing, and
    with backward unless gradients is False, and every output and gradient is compared. Modules are proved by value at random
    parameters (modules/trials.py), never by their class. What could not be proved is left as it is, and the handle says why.
    The table of tokens may be a vocabulary.TrainableRows, whose rows then get their gradients from the fused call; where one
    is put in its place or merged afterwards, the model's own modules run.

    Fused calls run where the planner expects a gain (a decode step does not); at other times, and for any input that was not
    foreseen (hooks, dropout, other weights, torch.func), the model's own modules run. torch.compile takes the fused front end
    into its graphs where kernels run it: on a GPU for at most 32 tokens without gradients and one projection, where a gain is
    predicted, not measured; within pyembed.backend("triton") always; never with rows of a TrainableRows. torch.export takes the
    model's own modules. Keys of state_dict, types' names and attributes stay; a copy or a pickle of the model is not fused.
    Errors where the unfused model has none: the gradient of hidden_states[0] by itself, since projections do not pass through
    it; gradients of gradients; a tensor between lookups and projections that is read after what it depends on was changed, or
    by C++ code that Python does not see. Not seen in a graph: ids that are changed by .data between the lookups of one sum.

    strict: ValueError where there is nothing to fuse. TypeError: no nn.Module, or no tensor. ValueError: it is fused already.
    RuntimeError (verify.Difference): a result differs by more than rounding explains; the model is then as it was. Errors of
    the model's own forward pass on.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not args and not batch:
        raise TypeError(
            "ids: expected a batch that the model takes, as fuse(model, ids) or fuse(model, input_ids=ids), got none"
        )
    fused = next((name for name, module in model.named_modules() if is_site(module)), None)
    if fused is not None:
        raise ValueError(f"model: expected one that is not fused, got one whose {fused} is: undo that first")
    with at_rest(model), torch.inference_mode(False):  # whose tensors could not be used with gradients
        args, batch = tree_map_only(torch.Tensor, lambda x: x.clone() if x.is_inference() else x, (args, batch))
        try:
            found = discover(model, args, batch)
            _check_shapes(found)
        except Nothing as why:
            if strict:
                raise ValueError(_NOTHING.format(why)) from None
            return Fused(model, None, str(why))
        handle = _verified(model, Fusion(found), args, batch, gradients)
        if strict and handle.why_not is not None:
            raise ValueError(_NOTHING.format(handle.why_not))
        return handle


_NOTHING = "model: expected a front end that can be fused, got none: {}"


def _check_shapes(found: Found) -> None:
    shape = found.rows["token"].shape
    for role, ids in found.rows.items():
        if len(shape) == 0 or ids.shape not in (shape, shape[-1:], (1,) * (len(shape) - 1) + shape[-1:]):
            raise Nothing(f"{found.names[found.lookups[role]]} looked up ids {tuple(ids.shape)} beside {tuple(shape)}")


def _verified(model: nn.Module, fusion: Fusion, args: Any, batch: Any, gradients: bool) -> "Fused":
    times, runs = [], []
    for _ in range(2):  # the first may compile or load something
        began = time.perf_counter()
        runs.append(observe(model, args, batch, False))
        times.append(time.perf_counter() - began)
    seconds, stock = min(times), runs[1]
    if not stock:
        return Fused(model, None, "the model's forward returns no tensor that could be compared")
    try:
        compare(runs[0], stock)
    except Difference as difference:
        return Fused(model, None, f"two forward passes of the model itself over this batch differ: {difference}")
    modes = (False, True) if gradients else (False,)
    expected = [(stock if not mode else observe(model, args, batch, True)) for mode in modes]
    with noisy(fusion.found):
        noise = [observe(model, args, batch, mode) for mode in modes]
    fusion.trial = True
    handle = Fused(model, fusion, None, seconds)
    try:
        front_end(fusion, fusion.found.rows, gradients)
        handle._install()
        for mode, before, around in zip(modes, expected, noise, strict=True):
            ran = fusion.calls["fused"]
            worst = compare(observe(model, args, batch, mode), before, around)
            if fusion.calls["fused"] == ran:
                why = next(
                    iter(fusion.calls.keys() - {"fused"}), "what lies between lookups and projections asks for their values"
                )
                if not ran:
                    handle.undo()
                    return Fused(model, None, f"the fused front end did not run: {why}")
                handle.not_in_training = why
            if worst[1] >= handle.error[1]:
                handle.error = worst
    except BaseException:
        handle._restore()
        raise
    finally:
        fusion.trial, fusion.missed = False, 0
        fusion.calls.clear()
    with torch.no_grad():
        handle._forecast()
    return handle


class Fused:
    """A model whose front end is fused, or that could not be. print() it for a report.

    modules: {what it is: names in the model}; why_not: why nothing was fused, or None; error: the tensor that came nearest to
    its budget when the model was verified, and its largest difference from the unfused model; forward_seconds: of the unfused
    model on the batch, measured; share: of its front end in them, measured on a CPU; saved_seconds: of them, that fusing saves
    there; plan: what runs for such a batch without gradients, and why; not_in_training: why it never runs fused with gradients,
    or None; calls: counts of fused calls since, under "fused", and of each reason why one was not; where that is a compiler, of
    its graphs.
    """

    def __init__(self, model: nn.Module, fusion: Fusion | None, why_not: str | None, seconds: float = 0.0) -> None:
        self.model, self.why_not, self.forward_seconds, self.saved_seconds = model, why_not, seconds, 0.0
        self.error, self.plan, self.share = ("", 0.0), "", 0.0
        self.not_in_training: str | None = None
        self.modules: dict[str, list[str]] = {}
        self.calls: Counter[str] = Counter() if fusion is None else fusion.calls
        self._fusion, self._undone = fusion, False
        if fusion is not None:
            found = fusion.found
            self.modules = {role: [found.names[module]] for role, module in found.lookups.items()}
            self.modules |= {"norm": [found.names[found.norm]], "linear": [found.names[m] for m in found.linears]}

    def _install(self) -> None:
        fusion = self._fusion
        assert fusion is not None
        found = fusion.found
        sites: list[tuple[Any, Any]] = [(TokenSite if role == "token" else RowsSite, role) for role in found.lookups]
        sites += [(NormSite, "norm"), *((LinearSite, place) for place in range(len(found.linears)))]
        classes = [site_class(m, site, fusion, place) for m, (site, place) in zip(found.modules, sites, strict=True)]
        fusion.classes = classes
        looks_up = [found.has_own or role != "token" or is_stock("token", module) for role, module in found.lookups.items()]
        stock = looks_up + [False] * (1 + len(found.linears))
        for module, kind in zip(found.modules, classes, strict=True):
            module.__class__ = kind
        every = zip(found.modules, found.findings, stock, strict=True)
        fusion.proofs = [None if stock else Proof(module, finding) for module, finding, stock in every]

    def _restore(self) -> None:
        for module in () if self._fusion is None else self._fusion.found.modules:
            if is_site(module):
                module.__class__ = type(module)._pyembed_base  # type: ignore[attr-defined]
        if self._fusion is not None:
            self._fusion.table = None
        self._undone = True

    def build_table(self) -> int:
        """Projects every row of the vocabulary and of the positions now, so that calls without gradients only gather.

        Returns the bytes that this takes, (V + L)·N elements. undo() and drop_table() give them back. The first call after a
        weight has changed makes it anew; which changes are not seen says EmbeddingQKV.build_table. The table is held against
        the modules before it serves. fused.calls counts its calls under "fused", and under "fused by the table".

        RuntimeError: nothing is fused; rows that are multiplied by a number, or segments (Gemma, BERT); a TrainableRows;
        weights that are spread over devices. torch.OutOfMemoryError: it would not fit. Difference: it would give other results.
        """
        fusion = self._fusion
        if fusion is None or self._undone:
            raise RuntimeError(
                f"build_table: expected a model whose front end is fused, got one where it is not: {self._state()}"
            )
        if fusion.found.has_own:
            name = fusion.found.names[fusion.token]
            raise RuntimeError(
                f"build_table: expected token and position rows as they are, but {name} has rows of its own beside its table: "
                "merge() makes it one table"
            )
        kept = KeptTable(fusion.call_of_no_ids, {module: fusion.found.names[module] for module in fusion.found.modules})
        with torch.no_grad():
            table = kept.current(fusion.call(fusion.found.rows))
            front_end(fusion, fusion.found.rows, False, table)
        fusion.table = kept
        return kept.nbytes

    def drop_table(self) -> None:
        """Gives the table's memory back, and makes it no more."""
        if self._fusion is not None:
            self._fusion.table = None

    def undo(self) -> None:
        """The model as it was before, to the last attribute. RuntimeError: it was undone before, or a module has changed its
        class since (a parametrization), which must be taken back first."""
        if self._undone:
            raise RuntimeError("undo: expected a fused model, got one that was undone before")
        if self._fusion is not None:
            for module, kind in zip(self._fusion.found.modules, self._fusion.classes, strict=True):
                if type(module) is not kind:
                    name = self._fusion.found.names[module]
                    raise RuntimeError(f"undo: expected {name} as it was fused, got one whose class was changed since")
        self._restore()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Fused, (self.model, None, "this is a copy, and a copy of a fused model is not fused")

    def __enter__(self) -> "Fused":
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._undone:
            self.undo()

    def _in_graphs(self) -> str:
        assert self._fusion is not None
        with torch.no_grad():
            why = "the fusing is undone" if self._undone else traced.why_not(self._fusion)
        if why is not None:
            return f"the model's own modules into its graphs: {why}"
        forced = settings.current.backend == "triton"
        return "the fused front end into its graphs" + ("" if forced else f" of at most {traced.FEW} tokens without gradients")

    def _forecast(self) -> None:
        """Fills plan, saved_seconds and share for the batch that was given."""
        fusion = self._fusion
        assert fusion is not None
        rows = fusion.found.rows
        ids, D = rows["token"], fusion.token.weight.shape[1]
        call = fusion.call(rows)
        refused = refuses(as_if_of_table(call))
        why: str | None
        if fusion.is_small(ids):
            least = LEAST_TOKENS if ids.is_cuda else math.ceil(LEAST_FLOPS / (2.0 * sum(fusion.rows) * D))
            too_few = f"{SMALL} ({ids.numel():,}; plans are compared from {least:,} on)"
            why = refused if ids.is_cpu and refused else too_few
        else:
            why = why_not(call)
        self.plan = "fused" if why is None else f"the model's own modules: {why}"
        if refused or not ids.is_cpu:
            return
        stock = _least_seconds(lambda: by_modules(fusion.found, rows, fusion.factor()))
        self.share = min(1.0, stock / self.forward_seconds)
        if self.plan == "fused":
            self.saved_seconds = max(0.0, min(stock, self.forward_seconds) - _least_seconds(lambda: fusion.parts(rows)))

    def _state(self) -> str:
        """In one line, what was done to the model."""
        name = type(self.model).__name__
        if self.why_not is not None:
            return f"{name}: nothing is fused: {self.why_not}"
        return f"{name}: the front end {'was fused and is undone' if self._undone else 'is fused'}"

    def __str__(self) -> str:
        fusion = self._fusion
        if fusion is None:
            return self._state()
        size = " x ".join(map(str, fusion.found.rows["token"].shape))
        tensor, error = self.error
        lines = [self._state()]
        lines += [f"  {role:10}{', '.join(self.modules[role])}" for role in ROLES if role in self.modules]
        lines += [f"  verified  hidden has the unfused model's bits; nearest to its error budget: {tensor}, off by {error:.1e}"]
        lines += [f"  ids {size}: {self.plan}"]
        if self.share:
            gain = self.saved_seconds / self.forward_seconds
            nothing = "fusing saved none of it here" if self.plan == "fused" else "no more than that can be gained"
            expect = f"fusing saves about {gain:.1%} of it" if gain else nothing
            milliseconds = self.forward_seconds * 1e3
            lines += [f"  the front end takes about {self.share:.1%} of a forward of {milliseconds:.3g} ms: {expect}"]
        if self.not_in_training:
            lines += [f"  with gradients the model's own modules run: {self.not_in_training}"]
        for module in fusion.found.dropouts:
            if module.p > 0:
                lines += [
                    f"  in training the model's own modules run: {fusion.found.names[module]} is a dropout of p={module.p:g}"
                ]
        lines += [f"  torch.compile takes {self._in_graphs()}"]
        if fusion.table is not None:
            lines += [f"  a table of {fusion.table.nbytes:,} bytes serves calls without gradients"]
        for why, count in self.calls.items():
            is_graph = why == traced.FUSED or why.startswith(traced.COMPILED)
            what = why if why in ("fused", BY_TABLE, traced.FUSED) else f"not fused: {why}"
            lines += [f"  {count:6,} {'graph' if is_graph else 'call'}{'s' * (count > 1)} {what}"]
        return "\n".join(lines)

    __repr__ = __str__


def _least_seconds(call: Callable[[], Any], repeats: int = 3) -> float:
    """Of a few calls, the fastest: other processes slow some down."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
