"""The fused front end within a graph of torch.compile.

While Dynamo traces a model, looked-up rows, hidden and its norm are tensors of the class Rows, whose note says what they are:
as in eager mode, the proved sum of lookups is the fused call, and its projections are handed out for the very tensor that they
belong to. The model's own modules are traced too, so that a graph has the guards that it would have without fusing; nobody
reads their results, so the compiler drops them. Nothing of this module runs when the graph does.
"""

import itertools
import weakref
from collections import Counter
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.comptime import comptime
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

import pyembed.settings as settings

from ..modes import autocast_dtype
from ..plans.choice import NO_BF16, why_torch
from .fusion import MISSED, Fusion, Stock
from .waiting import ADDS, INDICES, METADATA, READERS, is_identity

FUSED = "fused in a compiler's graph"  # counts graphs, as does the next
COMPILED = "a compiler's graph takes the model's own modules"
FEW = 32  # tokens up to which a GPU's kernel is one launch
MISSES = 8  # frames in a row whose projections nobody took, after which none is tried
UNKNOWN = -1  # version of a tensor of inference mode, whose changes are not counted
KEPT = 256  # traces of which something is remembered


class Note(NamedTuple):
    """number: of a trace of a front end; versions: of the ids of rows, or of the weights of outs; version: of the tensor."""

    number: str  # no int, which Dynamo might take for one that varies
    fusion: Any
    versions: tuple[int, ...]
    rows: Any = None  # {role: ids} of looked-up rows and their sums
    outs: Any = None  # projections of hidden
    is_normed: bool = False
    mode: Any = None  # in which outs were computed
    version: Any = None


class Rows(Tensor):
    """See above. Operators that were not proved take it as a plain tensor; there is none outside of a trace."""

    note: Note | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func not in METADATA:
                if len(args) == 2 and not kwargs and func in ADDS and type(args[0]) is Rows and type(args[1]) is Rows:
                    found = _add(args[0], args[1])
                    if found is not None:
                        return found
                if type(args[0]) is Rows and is_identity(func, args, kwargs):
                    return args[0]
                if func is Tensor.__getitem__ and type(args[0]) is Rows and _is_view(args[1]):
                    note = args[0].note
                    if note is not None and note.rows is not None:  # BART looks at the shape of a part of its rows
                        return _noted(func(*args), note._replace(rows=None))
                if func not in ADDS and func not in READERS or kwargs:  # it may change what it is given
                    for x in tree_leaves((args, kwargs)):
                        if type(x) is Rows and x.note is not None:
                            _forget(x.note.number)
                if isinstance(func, FunctionType):  # which Dynamo calls of plain tensors only
                    args = [plain(x) if type(x) is Rows else x for x in args]
                    kwargs = {name: plain(x) if type(x) is Rows else x for name, x in kwargs.items()}
            return func(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Dynamo calls it where a tensor leaves the graph, which is a plain one from there on, without a note."""
        object.__setattr__(self, "__class__", Tensor)


def _is_view(index: Any) -> bool:
    return all(type(i) in INDICES for i in (index if type(index) is tuple else (index,)))


def _method(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.note is not None:
            _forget(self.note.number)
        return getattr(plain(self), name)(*args, **kwargs)

    return method


for _name in ("dim_order", "istft", "lu", "norm", "split", "stft", "unflatten", "unique", "unique_consecutive"):
    setattr(Rows, _name, _method(_name))  # methods in Python, which Dynamo does not find in a subclass of Tensor


def look_up(fusion: Fusion, role: str, ids: Any, rows: Tensor) -> Tensor:
    """Of the lookup of a role, whose own forward has given rows: rows or, where they are all, hidden."""
    if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting() or type(ids) is not Tensor:
        if role == "token":
            count(fusion.key, "it is no graph of Dynamo's")
        return rows
    key, is_token = fusion.key, role == "token"
    if not _has_known_size(ids):
        if is_token:
            count(key, "the number of ids is not known to the compiler")
        return rows
    is_few = True
    if is_token and _serves_few(key) and ids.numel() > FEW:  # a branch, which a compiler guards where sizes are symbols
        is_few = False
    number = _begin(key, is_few) if is_token else _latest(key)
    if number is None or ids.dtype not in (torch.int32, torch.int64) or ids.dim() == 0:
        return rows
    _begin_scope(number)
    if len(fusion.found.lookups) == 1:
        hidden = _run(fusion, number, {role: ids})
        return rows if hidden is None else hidden
    versions = _versions(number, [ids])
    if UNKNOWN in versions:
        ids = ids.clone()
    return _noted(rows, Note(number, fusion, versions, {role: ids}))


def normed(fusion: Fusion, x: Any, found: Tensor) -> Tensor:
    """The norm of x, which its own forward has found, with what was computed before."""
    note = x.note
    if note is None or note.outs is None or note.is_normed or not _holds(fusion, note, x):
        return found
    x.note = None
    return _noted(found, note._replace(is_normed=True))


def projected(fusion: Fusion, x: Any, place: int, found: Tensor) -> Tensor:
    """A projection of x, which its own forward has found: the one that was computed before, once."""
    note = x.note
    if note is None or not note.is_normed or not _holds(fusion, note, x) or not _take(note.number, fusion.key, place):
        return found
    return note.outs[place]


def plain(x: Any) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return x.view(x.shape)


def _noted(x: Tensor, note: Note) -> Any:
    found: Any = x.as_subclass(Rows)
    found.note = note._replace(version=_versions(note.number, [x]))
    return found


def _add(a: Any, b: Any) -> Any:
    """The sum of rows, if it is the proved one; else None."""
    one, other = a.note, b.note
    if one is None or other is None or one.rows is None or other.rows is None or one.number != other.number:
        return None
    fusion = one.fusion
    rows = fusion.joined(one.rows, other.rows)
    if rows is None or a.dtype != b.dtype or not _is_here(one.number) or _is_forgotten(one.number):
        return None
    versions = _versions(one.number, [a, b, *one.rows.values(), *other.rows.values()])
    if versions != one.version + other.version + one.versions + other.versions:
        return None
    if len(rows) < len(fusion.found.lookups):
        return _noted(a + b, Note(one.number, fusion, _versions(one.number, [*rows.values()]), rows))
    return _run(fusion, one.number, rows)


def _run(fusion: Fusion, number: str, rows: dict[str, Tensor]) -> Any:
    versions = _versions(number, fusion.parameters())
    if UNKNOWN in versions:
        return None
    hidden, *outs = fusion.parts(rows)
    return _noted(hidden, Note(number, fusion, versions, None, outs, False, _mode(hidden)))


def _holds(fusion: Fusion, note: Note, x: Any) -> bool:
    """Whether outs still are what the modules would compute here."""
    if note.fusion is not fusion or note.mode != _mode(x) or not _is_here(note.number):
        return False
    if note.version != _versions(note.number, [x]):
        return False
    return not _is_forgotten(note.number) and _versions(note.number, fusion.parameters()) == note.versions


def _mode(x: Any) -> Any:
    kind = x.device.type
    return torch.is_grad_enabled(), torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


# What Python remembers of a trace. While it traces, Dynamo calls functions with assume_constant_result, and gives those of
# comptime a context, by which they read local variables (number, x, ids) by name.


class _Trace:
    """scope: a weak reference to the graph, or the part of one (a checkpoint's), where it began; attempt: of Dynamo's, in which
    it did; is_here: whether the last look was from that scope; is_forgotten: whether hidden, or rows, may have been changed;
    versions: seen since they were asked for; taken: places of projections."""

    scope: Any = None
    attempt: Any = None
    is_here = is_forgotten = False

    def __init__(self) -> None:
        self.versions, self.taken = list[int](), set[int]()


_traces, _numbers = dict[str, _Trace](), itertools.count()
_fusions = weakref.WeakValueDictionary[int, Fusion]()
_last = dict[int, str | None]()  # by fusion
_missed = Counter[int]()  # by fusion, frames since projections were taken
_looked = dict[str, bool]()  # the last answer of _look_at_size
_tried = dict[int, tuple[Any, int]]()  # by fusion: the last frame, and what was missed before it


def _attempt() -> tuple[Any, int]:
    """Which frame Dynamo traces, and how often it has begun anew."""
    context = torch._guards.CompileContext.get()
    return weakref.ref(context), context.attempt


def _trace(number: str) -> _Trace:
    if number not in _traces and len(_traces) >= KEPT:
        del _traces[next(iter(_traces))]
    return _traces.setdefault(number, _Trace())


def register(fusion: Fusion) -> None:
    _fusions[fusion.key] = fusion


def why_not(fusion: Fusion) -> str | None:
    """Why graphs take the model's own modules; None: they take the fused front end, of few tokens on a GPU."""
    token = fusion.token._parameters["weight"]
    try:
        fusion.check_modules(token.device)
        why = why_torch(token)
    except (Stock, RuntimeError, TypeError) as error:
        return str(error)
    finding = fusion.found.findings[0]
    if fusion.found.has_own:
        return f"{fusion.found.names[fusion.token]} has rows of its own beside its table"
    if why is not None:
        return why
    if token.is_cpu and autocast_dtype(token) is not None:
        return NO_BF16
    if torch.is_grad_enabled() and getattr(torch._dynamo.config, "trace_autograd_ops", False):
        return "torch.autograd.grad may be called in graphs, and would give too small a gradient of hidden"
    if settings.current.plan not in ("auto", "one_pass"):
        return f"pyembed.plan({settings.current.plan!r}) is set"
    if finding is not None and isinstance(getattr(fusion.token, finding.scale or "", None), Tensor):
        return "rows of tokens are multiplied by a number in a tensor, of which a graph would not see the changes"
    if settings.current.backend == "triton":
        return None
    if len(fusion.found.linears) > 1:
        return "weights of several projections would be copied together at each call"
    return "with gradients there are too many tokens to gain anything" if torch.is_grad_enabled() else None


@torch.compiler.assume_constant_result
def count(key: int, why: str) -> None:
    fusion = _fusions.get(key)
    if fusion is not None:
        fusion.calls[f"{COMPILED}: {why}"] += 1


@torch.compiler.assume_constant_result
def _serves_few(key: int) -> bool:
    return settings.current.backend == "auto" and why_not(_fusions[key]) is None


@torch.compiler.assume_constant_result
def _begin(key: int, is_few: bool) -> str | None:
    """The number of a new trace; None: the model's own modules are taken."""
    frame, attempt = _attempt()
    if _tried.get(key, (None, 0))[0] != frame:  # Dynamo may trace it anew, and must find the same then
        _tried[key] = frame, _missed[key]
        _missed[key] += 1
    why = why_not(_fusions[key]) if is_few else f"it has more than {FEW} tokens"
    if why is None and _tried[key][1] >= MISSES:
        why = MISSED
    if why is not None:
        count(key, why)
        _last[key] = None
        return None
    _last[key] = number = str(next(_numbers))
    _trace(number).attempt = frame, attempt
    return number


@torch.compiler.assume_constant_result
def _latest(key: int) -> str | None:
    number = _last.get(key)
    return None if number is None or _trace(number).attempt != _attempt() else number


@torch.compiler.assume_constant_result
def _take(number: str, key: int, place: int) -> bool:
    trace, fusion = _trace(number), _fusions[key]
    if place in trace.taken:
        return False
    trace.taken.add(place)
    _missed.pop(key, None)
    fusion.calls[FUSED] += len(trace.taken) == len(fusion.found.linears)
    return True


@torch.compiler.assume_constant_result
def _forget(number: str) -> None:
    _trace(number).is_forgotten = True


@torch.compiler.assume_constant_result
def _is_forgotten(number: str) -> bool:
    return _trace(number).is_forgotten


@torch.compiler.assume_constant_result
def _seen(number: str) -> tuple[int, ...]:
    trace = _trace(number)
    found, trace.versions = tuple(trace.versions), []
    return found


@torch.compiler.assume_constant_result
def _is_size_known() -> bool:
    return _looked["size is known"]


@torch.compiler.assume_constant_result
def _was_here(number: str) -> bool:
    return _trace(number).is_here


def _versions(number: str, tensors: list[Tensor]) -> tuple[int, ...]:
    """How often each was changed in place, at this line of the trace. The names number and x are read by comptime."""
    for x in tensors:  # noqa: B007  read by _look_at_version
        comptime(_look_at_version)
    return _seen(number)


def _begin_scope(number: str) -> None:
    comptime(_look_at_scope)


def _has_known_size(ids: Tensor) -> bool:
    """Whether guards may ask for it: not where it is known to the running graph alone."""
    comptime(_look_at_size)
    return _is_size_known()


def _is_here(number: str) -> bool:
    """Whether the part of the graph that is traced is the one where the trace began."""
    comptime(_compare_scope)
    return _was_here(number)


def _trace_of(ctx: Any) -> _Trace:
    return _trace(ctx.get_local("number").as_python_constant())


def _look_at_version(ctx: Any) -> None:
    x = ctx.get_local("x")
    fake, users = x.as_fake(), x.as_proxy().node.users
    in_lists = sum("_foreach" in str(user.target) for user in users)  # which Dynamo does not count as changes
    _trace_of(ctx).versions.append(UNKNOWN if fake.is_inference() else fake._version + in_lists)


def _look_at_scope(ctx: Any) -> None:
    trace = _trace_of(ctx)
    trace.scope = trace.scope or weakref.ref(ctx.graph())


def _look_at_size(ctx: Any) -> None:
    _looked["size is known"] = not any(map(free_unbacked_symbols, ctx.get_local("ids").as_fake().shape))


def _compare_scope(ctx: Any) -> None:
    trace = _trace_of(ctx)
    trace.is_here = trace.scope is not None and trace.scope() is ctx.graph()
