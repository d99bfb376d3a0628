"""One buffer for the two gradients of a table that is a head's weight too.

A backward comes to the head first, whose gradient (V, D) is dense, and to the lookup last, whose gradient is a few rows.
Autograd would add two dense ones. Here the head's waits in a node that autograd runs after the lookup's, since it is older, and
the lookup adds its rows to it. In any other order, and beside lookups that know nothing of it, the sum is the same.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.compiler import is_compiling
from torch.utils.weak import WeakTensorKeyDictionary

from .modes import TENSORS, is_plain_eager, is_recorded


class Waiting:
    """Where gradients of a head's weight wait, in the graphs of the lookups that hold this."""

    def __init__(self, weight: Tensor) -> None:
        # Of each backward that is at work. Autograd alone holds them, so that one that fails leaves nothing behind.
        self.buffers: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self.stream = _stream(weight)
        self.weight = _Wait.apply(weight, self.buffers)  # itself, for a head: what its gradient passes

    def is_of(self, weight: Tensor) -> bool:
        """Whether gradients that pass it arrive where the weight's do now, which a change in place moves, and in the order of
        one stream, since backwards run in the streams of their forwards."""
        edge = get_gradient_edge(weight)
        is_same = self.weight.grad_fn.next_functions[0] == (edge.node, edge.output_nr)
        return is_same and self.stream == _stream(weight)

    def buffer(self) -> Tensor | None:
        """The gradient that waits in the backward at work, if any."""
        found = self.buffers.get(torch._C._current_graph_task_id())
        if found is not None:
            found._fix_weakref()  # type: ignore[attr-defined]  # its Python object may have been autograd's alone
        return found


def _stream(weight: Tensor) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(weight.device) if weight.is_cuda else None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, buffers: Any) -> Tensor:
        ctx.buffers = buffers
        ctx.set_materialize_grads(False)
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        ctx.buffers.pop(torch._C._current_graph_task_id(), None)  # lookups that are still to come have a gradient of their own
        return grad, None


_heads = WeakTensorKeyDictionary()  # {weight of a head: a weak reference to its Waiting, or None}


def of(weight: Tensor) -> Waiting | None:
    """The Waiting of a weight, in a graph that is alive; None: there is none."""
    reference = _heads.get(weight) if _heads else None
    return None if reference is None else reference()


def before_lookup(weight: Tensor) -> Waiting | None:
    """To be called before the node of a lookup is made, which must hold the result. None: no head has had this weight."""
    if not _heads or not weight.requires_grad or type(weight) not in TENSORS or weight not in _heads:
        return None
    found = of(weight)
    if found is None or not found.is_of(weight):
        found = Waiting(weight)
        _heads[weight] = weakref.ref(found)
    return found


def before_head(weight: Tensor) -> Waiting | None:
    """To be called before the node of a head is made. None: no lookup waits for its gradient."""
    if not weight.requires_grad or not torch.is_grad_enabled():
        return None
    found = of(weight)
    if found is None:
        _heads.setdefault(weight, None)  # for the lookups to come
    return found if found is not None and found.is_of(weight) else None


def hand_over(waiting: Waiting | None, gradient: Tensor | None) -> Tensor | None:
    """What the backward of a head that passes waiting.weight returns as its gradient. gradient (V, D): a tensor that nothing
    else refers to."""
    if waiting is None or gradient is None or torch.is_grad_enabled() or not gradient.is_contiguous():  # as kernels add to it
        return gradient
    before = waiting.buffer()
    if before is None:
        waiting.buffers[torch._C._current_graph_task_id()] = gradient
        return gradient
    before.add_(gradient)  # to that of another head
    return None


def buffer(waiting: Waiting | None) -> Tensor | None:
    """In the backward of a lookup: the gradient (V, D) that waits, to add rows to and return None; None: return a gradient."""
    return None if waiting is None else waiting.buffer()


def add_rows(into: Tensor, ids: Tensor, rows: Tensor, padding_idx: int = -1) -> None:
    """into (V, D), on a CPU, gets rows (M, D) more at ids (M,), in a fixed order; nothing in the row padding_idx."""
    kept = into[padding_idx].clone() if padding_idx >= 0 else None
    into.index_add_(0, ids, rows)
    if kept is not None:
        into[padding_idx] = kept


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int, waiting: Waiting) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.options = weight.shape[0], padding_idx, False, False
        ctx.waiting = waiting
        return torch.embedding(weight, ids, padding_idx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (ids,), into = ctx.saved_tensors, buffer(ctx.waiting)
        if into is None:
            return torch.ops.aten.embedding_backward(grad, ids, *ctx.options), None, None, None
        add_rows(into, ids.reshape(-1), grad.reshape(ids.numel(), grad.shape[-1]), ctx.options[1])
        return None, None, None, None


def look_up(weight: Tensor, ids: Tensor, padding_idx: int = -1) -> Tensor:
    """torch.embedding, whose gradient on a CPU is added to that of a head."""
    # A compiler does not trace what follows the third of these; the first is the least that a call without gradients pays.
    if weight.requires_grad and torch.is_grad_enabled() and not is_compiling() and _heads and weight.is_cpu:
        waiting = before_lookup(weight) if is_plain_eager() and not is_recorded() else None
        if waiting is not None:
            return _LookUp.apply(weight, ids, padding_idx, waiting)
    return torch.embedding(weight, ids, padding_idx)
