"""Tensors of a fused model between its lookups and its first projections.

Waiting   stands for a tensor whose values nobody has asked for: rows of a table, sums of rows, the output of the norm. Its
          shape, dtype and device are known; any operator but a proved one gets its value, computed then, with its gradients.
Hidden    the sum of all rows, a plain tensor with its values, which the projections that were computed with it travel on.

Both are seen by the functions of PyTorch that Python calls. C++ that reads a Waiting without them raises an error.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_get: Any = Tensor  # whose properties have a __get__
METADATA = {getattr(_get, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda")}
METADATA |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, torch.is_floating_point}
METADATA |= {_get.is_sparse.__get__, _get.is_quantized.__get__, _get.is_nested.__get__, _get.is_mps.__get__, Tensor.nelement}
ADDS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
ADDS_IN_PLACE = {Tensor.add_, Tensor.__iadd__}
READERS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.addmm}  # results alias nothing
ASKS_GRADIENT = {Tensor.retain_grad, Tensor.register_hook, torch.autograd.grad, _get.grad_fn.__get__}
INDICES = (int, slice, type(None), type(...))  # of a view


class Tag:
    """What was computed before, for one tensor. fusion: whose; rows: {role: ids} of a sum; outs: projections by place, computed
    under these weights and this state, by a table or not."""

    def __init__(
        self, fusion: Any, rows: Any = None, outs: Any = None, weights: Any = None, state: Any = None, by_table: bool = False
    ) -> None:
        self.fusion, self.rows, self.outs, self.weights, self.state = fusion, rows, outs, weights, state
        self.by_table = by_table


def state_of(device: str) -> tuple[Any, ...]:
    """What decides how operators run and what autograd keeps: within a checkpoint it is another than outside. Inference mode is
    not in it: what waits is made outside of it, so that its changes are counted, and it records no gradients either way."""
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), autocast, hooks, torch._C._len_torch_dispatch_stack()


def _same(x: Any) -> Any:
    return x


@contextlib.contextmanager
def _as_then(state: tuple[Any, ...], device: str) -> Iterator[None]:
    """Grad mode and autocast of a state, and no hook of a checkpoint that was entered since."""
    grad, autocast, *_ = state
    casts = torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None)
    if not grad:
        with torch.no_grad(), casts:
            yield
        return
    with torch.inference_mode(False), torch.enable_grad(), casts, torch.autograd.graph.saved_tensors_hooks(_same, _same):
        yield


class _Refused(torch.autograd.Function):
    """The gradient of a Waiting that C++ took without asking for its value."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], *anchors: Tensor) -> Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_REFUSED)


_REFUSED = (
    "pyembed.fuse: a tensor of the fused front end was given to C++ code (a torch.autograd.Function?) before its values were "
    "asked for: pass x + 0, or undo the fusing"
)


class Waiting(Tensor):
    """See above. compute() gives its value; anchors: tensors that it depends on, of which one may want a gradient."""

    compute: Callable[[], Tensor]
    settled: Tensor | None
    version: int | None
    tag: Tag | None
    state: tuple[Any, ...]
    taken = False  # whether projections of it were handed out, to which its own gradient does not lead

    @staticmethod
    def make(shape: Any, like: Tensor, dtype: torch.dtype, compute: Any, tag: Tag, anchors: list[Tensor]) -> "Waiting":
        def new() -> Any:
            return torch.Tensor._make_wrapper_subclass(Waiting, shape, dtype=dtype, device=like.device)

        wants = [x for x in anchors if x.requires_grad] if torch.is_grad_enabled() else []
        found = _Refused.apply(new, *wants) if wants else new()
        found.compute, found.settled, found.version, found.tag = compute, None, None, tag
        found.state = state_of(like.device.type)
        return found

    def value(self) -> Tensor:
        """The tensor it stands for."""
        if self.settled is None:
            with torch._C.DisableTorchFunctionSubclass():
                device = self.device.type
            with _as_then(self.state, device):
                self.settled = self.compute()
            self.version = None if self.settled.is_inference() else self.settled._version
        return self.settled

    def is_untouched(self) -> bool:
        """Whether its value still is what was computed, if it was."""
        return self.settled is None or self.version is not None and self.settled._version == self.version

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if len(args) == 2 and not kwargs and (func in ADDS or func in ADDS_IN_PLACE):
            found = _add(*args)
            if found is not None:
                if func in ADDS_IN_PLACE and isinstance(args[0], Waiting):
                    args[0].settled, args[0].version, args[0].tag = found, None, None  # as other names of it see the sum
                return found
        if args and type(args[0]) is Waiting and is_identity(func, args, kwargs or {}):
            return args[0]
        if func is Tensor.__getitem__ and type(args[0]) is Waiting:
            found = _view(*args)
            if found is not None:
                return found
        if func not in READERS:
            if func in ASKS_GRADIENT:
                _refuse_gradient(func, args, kwargs or {})
            for x in args:
                if type(x) is Waiting and x.tag is not None and x.tag.rows is None:
                    x.tag = None
        args, kwargs = tree_map_only(Waiting, Waiting.value, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:  # by _Refused.apply
            return args[0]
        raise RuntimeError(_REFUSED)


def _view(x: Waiting, index: Any) -> Waiting | None:
    """A part of rows that wait, which waits too: BART looks at the shape of one. None: it is no view, or has values."""
    if x.settled is not None or x.tag is None or x.tag.rows is None:
        return None
    if not all(type(i) in INDICES for i in (index if type(index) is tuple else (index,))):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        shape, dtype = x.shape, x.dtype
    part = torch.empty(shape, device="meta")[index]
    return Waiting.make(part.shape, x, dtype, lambda: x.value()[index], Tag(x.tag.fusion), [x])


def is_identity(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call returns its very input: dropout that does nothing, a move to where it is."""
    if func is F.dropout:
        given = dict(zip(("p", "training"), args[1:3], strict=False)) | kwargs
        return not (given.get("training", True) and given.get("p", 0.5) > 0)
    if func is Tensor.to and kwargs.keys() <= {"device", "dtype"}:
        wanted = [*args[1:], *kwargs.values()]
        return bool(wanted) and all(x == args[0].device or x is args[0].dtype for x in wanted)
    return func is Tensor.contiguous and not kwargs and len(args) == 1


def _add(a: Any, b: Any) -> Tensor | None:
    """The sum of rows that are looked up now, if it is a proved one."""
    if type(a) is not Waiting or type(b) is not Waiting or a.settled is not None or b.settled is not None:
        return None
    one, other = a.tag, b.tag
    if one is None or other is None or one.rows is None or other.rows is None or one.fusion is not other.fusion:
        return None
    return one.fusion.add(a, b)


class Hidden(Tensor):
    """See above. tag: None once anything but its shape was asked for. taken: whether its projections were handed out, so that
    a gradient of it alone would lack their part. pending: its norm, which waits, and gets its value before this changes."""

    tag: Tag | None
    version: int
    taken: bool
    pending: weakref.ref[Waiting] | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Waiting in types:  # which gives its value first
            return NotImplemented
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in METADATA:
                return func(*args, **kwargs)
            if func in ASKS_GRADIENT:
                _refuse_gradient(func, args, kwargs)
            hidden = [x for x in tree_leaves((args, kwargs)) if type(x) is Hidden]
            if not (hidden and is_identity(func, args, kwargs)):
                may_change = bool(kwargs) or func not in ADDS and func not in READERS  # or alias it
                for x in hidden:
                    if type(x) is Hidden:  # it may stand there twice
                        x.forget(may_change)
            if func in (Tensor.__reduce_ex__, Tensor.__deepcopy__, Tensor.__repr__):
                args = (args[0].as_subclass(Tensor), *args[1:])
            found = func(*args, **kwargs)
            if func == _get.grad.__get__ and found is not None and args[0].taken:  # of backward(inputs=...)
                raise RuntimeError(_NO_GRADIENT)
            return found

    def forget(self, may_change: bool) -> None:
        """That it is what was computed; its norm gets its value first, if anybody still holds it."""
        self.tag, waits = None, None if self.pending is None else self.pending()
        if waits is None or may_change:
            self.pending = None
        if waits is not None and may_change and waits.settled is None:
            waits.value()
        if self.pending is None and not self.taken:
            self.__class__ = Tensor  # type: ignore[assignment]


def _refuse_gradient(func: Any, args: Any, kwargs: Any) -> None:
    of = args[1:2] or (kwargs.get("inputs"),) if func is torch.autograd.grad else args[:1]
    tensors = of[0] if of and isinstance(of[0], tuple | list) else of
    if any(isinstance(x, Hidden | Waiting) and x.taken for x in tensors):
        raise RuntimeError(_NO_GRADIENT)


_NO_GRADIENT = (
    "pyembed.fuse: in a fused model the gradient of the hidden state before the first layer, or of its norm, does not pass "
    "through this tensor, since the projections are computed from the tables: undo the fusing for this"
)
