"""Custom operators whose calls go around PyTorch's dispatcher where nobody listens there.

Of some 30 arguments it takes 0.1 ms on the host, 0.5 ms with gradients: far more than a decode step's kernels.
"""

import functools

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

PLAIN = (Tensor, nn.Parameter)  # no subclass, which may bring operators of its own
_NONE = type(None)
SCALARS = (_NONE, int, float, bool, str)
_KINDS = {"Tensor": PLAIN, "Optional[Tensor]": (*PLAIN, _NONE), "Optional[float]": (float, _NONE), "List[bool]": (list,)}
_KINDS |= {kind.__name__: (kind,) for kind in SCALARS[1:]}
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # as torch.autograd.grad(is_grads_batched=True) has gradients


def is_heard():
    """Whether a compiler, tracer, dispatch mode, torch.func, forward-mode AD or profiler is at work, which see operators.

    A TorchFunctionMode, which torch.set_default_device is too, and a bare ExecutionTraceObserver are not asked."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._ops._len_torch_dispatch_stack_pre_dispatch()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
        or torch.autograd.profiler._is_profiler_enabled  # of all threads
    )


def is_strange(tensor):
    """Whether its memory does not hold its elements as they are."""
    return tensor.is_meta or tensor.is_neg() or tensor._is_zerotensor() or _is_batched(tensor)


class Operator:
    """A function of which torch.library.custom_op makes an operator, `op`, with the same rules for calls around that."""

    def __init__(self, name, run):
        functools.update_wrapper(self, run)
        self._definition = torch.library.custom_op(name, mutates_args=())(run)
        self.op = functools.reduce(getattr, name.split("::"), torch.ops).default
        self._run, self._function = run, None
        self._kinds = [_KINDS[str(argument.type)] for argument in self.op._schema.arguments]

    def __call__(self, *args, **kwargs):
        if kwargs or len(args) != len(self._kinds) or is_heard():
            return self.op(*args, **kwargs)
        wants_grad, grads = False, torch.is_grad_enabled()
        for value, kinds in zip(args, self._kinds, strict=True):
            of = type(value)
            if of not in kinds:  # an int for a float, or a Tensor: Triton would compile another kernel
                return self.op(*args)
            if of in PLAIN:
                if is_strange(value):
                    return self.op(*args)
                wants_grad = wants_grad or grads and value.requires_grad
        return self._function.apply(*args) if wants_grad else self._run(*args)

    def register_fake(self, fake):
        return self._definition.register_fake(fake)

    def register_autograd(self, backward, *, setup_context=None):
        """As custom_op's, for functions whose inputs and outputs are no lists of Tensors."""
        self._definition.register_autograd(backward, setup_context=setup_context)

        def forward(ctx, *args):
            outputs = self._run(*args)
            if setup_context is not None:
                setup_context(ctx, args, outputs)
            return outputs

        functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self.__name__, (torch.autograd.Function,), functions)


def operator(name):
    """A decorator: the function, whose annotations are its schema, as an Operator."""
    return functools.partial(Operator, name)
