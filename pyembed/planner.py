"""Which implementation runs a call: the backend, and the plan by a small cost model.

one_pass  every token is projected: the fused kernel on a GPU, PyTorch's composition on a CPU
distinct  each distinct token and position is projected once, then gathered: less matrix work, one more pass over memory
table     every row of the vocabulary was projected before: gathers alone, for inference
"""

import contextlib
import importlib.util
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from . import memory, ops_distinct, rates, spread

_backend = "auto"
_plan = "auto"
_debug = False
BACKENDS = ("auto", "triton", "torch")
PLANS = ("auto", "one_pass", "distinct", "table")
HAS_TRITON = importlib.util.find_spec("triton") is not None
_COMPILED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETED_DTYPES = (torch.float32, torch.float16, torch.float64)


@contextlib.contextmanager
def backend(name):
    """Within it, calls run by Triton kernels ("triton"), by PyTorch's own operators ("torch"), or as fits ("auto").

    "auto" takes the kernels on a GPU and PyTorch on a CPU. "triton" with CPU tensors runs the kernels in Triton's
    interpreter: right, and slow. ValueError: another name. The setting is the process's, as torch.backends' are.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


@contextlib.contextmanager
def plan(name):
    """Within it, embed_qkv and EmbeddingQKV run by this plan: "one_pass", "distinct", "table", or "auto", the cheapest by
    prediction.

    All plans agree to rounding. "table" is for an EmbeddingQKV without gradients, and builds its table at the first call, which
    stays until drop_table(); "auto" uses a table that is there and builds none. RuntimeError, at the call: the plan cannot run
    it. ValueError: another name. The setting is the process's.
    """
    global _plan
    if name not in PLANS:
        raise ValueError(f"plan: expected one of {PLANS}, got {name!r}")
    before, _plan = _plan, name
    try:
        yield
    finally:
        _plan = before


def is_free():
    """Whether neither a plan nor the kernels were asked for."""
    return _plan == "auto" and _backend != "triton"


def runs_one_pass(ids):
    """Whether nothing need be weighed before a call by a kernel."""
    return _plan == "one_pass" or _plan == "auto" and (not ids.is_cuda or ids.numel() < LEAST_TOKENS)


def asks_for_kernels():
    """Whether they are to run on a CPU too."""
    return _backend == "triton"


def forces(*names):
    """Whether the plan asked for is one of these."""
    return _plan in names


@contextlib.contextmanager
def debug():
    """Within it, calls on a GPU look at ids and at given distinct ids as calls on a CPU do, and wait for the device."""
    global _debug
    before, _debug = _debug, True
    try:
        yield
    finally:
        _debug = before


def looks(tensor):
    """Whether a check may look at the values of this tensor: where that costs no synchronisation, or one was asked for."""
    here = tensor.device.type == "cpu" or _debug and tensor.is_cuda
    if not here or torch.compiler.is_compiling() or is_traceable_wrapper_subclass(tensor):
        return False
    return not is_traced() and not is_transformed()


NO_BF16 = "Triton's interpreter has no bfloat16 arithmetic; take float32 or float16, or a GPU"


def takes(token):
    """Whether a table of this dtype has a kernel on its device."""
    return token.dtype in (_INTERPRETED_DTYPES if token.device.type == "cpu" else _COMPILED_DTYPES)


def uses_triton(token):
    """Whether a call over this table runs in Triton. RuntimeError, TypeError: it was asked to and cannot."""
    return why_torch(token) is None


def why_torch(token):
    """Why PyTorch's operators run a call over this table; None: Triton does. Errors as in uses_triton."""
    if _backend == "torch":
        return "pyembed.backend('torch') is set"
    if _backend == "auto" and not token.is_cuda:
        return f"kernels are for GPUs, and the table is on {token.device}"
    if _backend == "auto" and not (HAS_TRITON and takes(token)):
        return f"{token.dtype} has no kernel" if HAS_TRITON else "triton is not installed"
    if is_transformed():
        return "torch.func and forward-mode AD are PyTorch's operators' alone"
    if not HAS_TRITON:
        raise RuntimeError("backend: 'triton' needs the package triton, which is not installed (pip install triton)")
    if token.dtype == torch.bfloat16 and token.device.type == "cpu":
        raise TypeError(f"token: {NO_BF16}")
    if not takes(token) and not token.is_meta:
        raise TypeError(f"token: the kernels take float32, float16 or bfloat16, got {token.dtype}")
    return None


class Plan(NamedTuple):
    """The plan of a call, why, and the seconds predicted for each plan that could run it (empty: nothing was weighed)."""

    name: str
    reason: str
    seconds: dict[str, float]

    def __str__(self):
        costs = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in self.seconds.items())
        return f"{self.name}: {self.reason}" + (f" (predicted: {costs})" if costs else "")


LEAST_FLOPS = 1e9  # of the product over all tokens, forward: below it no plan can save what weighing them costs
LEAST_TOKENS = 1024  # of a call on a GPU, for the same reason
LAUNCH_SECONDS = 1e-5  # of a kernel of ours on a GPU, the host's part included
FIXED_SECONDS = 1e-3  # of `distinct` on a CPU: finding the distinct rows, its smaller operators, its operator's own cost
KEPT_BYTES = 32 << 20  # of a tensor: up to here the C library keeps memory itself, and it is not fresh
SCATTERED = 1.5  # times a gather's: what a backward's sums by id take
MARGIN = 1.25  # by which `distinct` must be predicted to win: a prediction is no better than that
LAUNCHES = {"one_pass": (2, 12), "distinct": (8, 26), "table": (1, 1)}  # of a forward, of a forward and backward


def is_trivial(ids, token, weight):
    """Whether a call is too small for any plan but PyTorch's composition, so that nothing need be weighed or checked first."""
    if torch.compiler.is_compiling() or ids.is_cuda or ids.is_meta or not is_free() or spread.is_distributed(ids):
        return False
    return is_small(ids, token, weight)


def is_small(ids, token, weight):
    """Whether a call has so little to compute, and no dense gradient of a large table to make: to fill fresh memory with zeros
    costs more than all else."""
    if token.requires_grad and torch.is_grad_enabled() and token.numel() * token.element_size() >= memory.SMALL_BYTES:
        return False
    return 2.0 * ids.numel() * weight.numel() < LEAST_FLOPS


def is_plain_eager():
    """No compiler, tracer, torch.func transform or forward-mode AD is at work, which our operators would miss."""
    return not (torch.compiler.is_compiling() or is_traced() or is_transformed())


def autocast_dtype(token):
    """The dtype that products over this table have under autocast; None: autocast is off, or leaves them alone."""
    kind = token.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind) or token.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def is_traced():
    """Whether tensors are fake, proxies or functional ones: without values."""
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (modes.FAKE, modes.PROXY, modes.FUNCTIONAL))


def is_transformed():
    """Whether torch.func or forward-mode AD is at work: an operator's rules are for reverse mode alone, and its tangents 0."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


ZEROS = "id_policy 'zero' is PyTorch's operators' alone"


def refuses(token, position, scale, segment, dropout, policy="raise", batch_invariant=False):
    """Why `distinct` and `table` cannot serve a hidden of these terms; None: they can."""
    if autocast_dtype(token) is not None:
        return "autocast is on"
    if batch_invariant:
        return "batch_invariant wants one order of sums"
    if policy == "zero":
        return ZEROS
    if dropout:
        return "dropout comes between sum and norm"
    if position is not None and not position.is_floating_point():
        return "positions are computed, not looked up"
    if scale is not None:
        return "token rows are scaled"
    return None if segment is None else "segments are added"


def normalises_heads(head_dim, *tensors):
    """Whether the kernel's epilogue can normalise heads: of a width that tiles have, and no gradient is wanted."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return not wanted and 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0


def choose(ids, token, weight, position, position_ids, normed, products, known=None, refused=None):
    """The Plan of an embed_qkv call. normed: whether it has a norm. products: matrix products of its forward, 1, and of the
    backward that may follow, 0 to 2; None: none follows. known: how many ids are distinct, where that is given. refused: why
    one_pass alone can run it. RuntimeError: a forced plan cannot run."""
    if _plan == "one_pass":
        return Plan("one_pass", "forced", {})
    if _plan == "table":
        raise RuntimeError("plan: 'table' needs a module to keep it: expected an EmbeddingQKV, got a function call")
    if refused:
        if _plan == "distinct":
            raise RuntimeError(f"plan: 'distinct' cannot run here: {refused}")
        return Plan("one_pass", refused, {})
    kernels = uses_triton(token)
    runs = not token.is_meta and (token.is_cuda or is_plain_eager())
    if _plan == "distinct":
        if not runs or token.is_cuda and not kernels:
            raise RuntimeError(
                f"plan: 'distinct' cannot run here: on {token.device} it needs the kernels"
                + ("" if token.is_cuda else ", or no compiler, exporter, torch.func or forward-mode AD")
            )
        return Plan("distinct", "forced", {})
    compiles = torch.compiler.is_compiling()  # whose graph shall serve any number of tokens
    if token.is_cuda and not compiles and ids.numel() < LEAST_TOKENS or not token.is_cuda and is_trivial(ids, token, weight):
        return Plan("one_pass", f"{ids.numel()} tokens are too few for another plan to save time", {})
    if not runs or kernels and not token.is_cuda or token.is_cuda and (not kernels or compiles):
        return Plan("one_pass", "the other plans do not run here", {})
    if token.is_cuda and known is None and not torch.are_deterministic_algorithms_enabled() and not is_traced():
        known = _seen_distinct(ids, token)
    elif known is None and not token.is_cuda:
        known = ids.unique().numel()
    if known is None:
        return Plan("one_pass", "how many ids are distinct is not known yet", {})
    return weigh(ids, token, weight, position, position_ids, normed, products, known)


def products_of(token, weight, position, norm_weight, norm_bias, bias=None):
    """Matrix products of the backward that may follow a call, one for the weight and one for what lies before it; None: no
    gradient is wanted."""
    if not torch.is_grad_enabled():
        return None
    before = any(t is not None and t.requires_grad for t in (token, position, norm_weight, norm_bias))
    wanted = before or weight.requires_grad or bias is not None and bias.requires_grad
    return before + weight.requires_grad if wanted else None


def weigh(ids, token, weight, position, position_ids, normed, products, distinct, has_table=False):
    """The cheapest plan, by the seconds that each is predicted to take; `distinct` must promise a MARGIN.

    A product counts its FLOPs at the device's rate, everything else the bytes that it moves: one_pass reads rows and writes
    hidden, normed rows and the projection (into fresh memory, on a CPU), distinct and table gather their projections too, and
    a backward of distinct reads every gradient, whatever it is for.
    """
    M, (N, D), size = ids.numel(), weight.shape, token.element_size()
    T = ids.shape[-1] if ids.dim() else 1
    places = 0 if position is None else T if position_ids is None else min(position_ids.numel(), position.shape[0])
    rate = rates.measure(token.device, token.dtype)
    product = rates.measure(token.device, rates.product_dtype(token.device, token.dtype))
    trains = products is not None
    passes, least = 1 + (products or 0), 1 + max(products, 1) if trains else 1
    work = passes * 2.0 * N * D
    gather, fresh = size / rate.gather, size / rate.fresh
    grad = token.numel() * size if trains and token.requires_grad else 0  # the dense gradient of the table
    rows, width = distinct + places, (1 + normed) * D + N
    if token.is_cuda:  # the caching allocator has no fresh memory, and the fused kernel keeps its normed rows to itself
        launches = {name: counts[trains] * LAUNCH_SECONDS for name, counts in LAUNCHES.items()}
        seconds = {"one_pass": M * work / rate.flops + passes * M * width * gather + grad / rate.gather}
    else:
        launches = {"one_pass": 0.0, "distinct": FIXED_SECONDS, "table": 0.0}
        new = fresh if M * N * size > KEPT_BYTES else gather
        seconds = {"one_pass": M * work / rate.flops + passes * M * (D * gather + width * new) + grad / rate.fresh}
    moved = rows * (3 * D + N) + M * (2 * D + 2 * N) + N * D
    moved *= least * SCATTERED if trains else 1
    seconds["distinct"] = rows * work / product.flops + moved * gather + 2 * grad / rate.gather
    if has_table:
        seconds["table"] = M * (2 * D + 2 * N) * gather
    seconds = {name: value + launches[name] for name, value in seconds.items()}
    handicapped = {name: value * MARGIN if name == "distinct" else value for name, value in seconds.items()}
    name = min(handicapped, key=handicapped.get)
    wins = "" if name == min(seconds, key=seconds.get) else f"; distinct must promise to be {MARGIN} times as fast"
    return Plan(name, f"{M} tokens have {distinct} distinct ids and {places} positions{wins}", seconds)


class _Seen:
    """How many distinct ids a batch on a GPU had, as it becomes known: copied to the host behind the kernels, never awaited."""

    def __init__(self):
        self.tokens = self.distinct = self.pending = None
        self.calls, self.expected = 0, {}

    def look(self, count, tokens):
        """count (1,) on the device, of a batch of that many tokens."""
        if not tokens or self.pending is not None or torch.cuda.is_current_stream_capturing():
            return
        with torch.cuda.device(count.device):
            host = torch.empty(1, dtype=count.dtype, device="cpu", pin_memory=True)
            host.copy_(count, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending = host, event, tokens

    def expect(self, tokens):
        """Distinct ids among so many tokens, from the last batch seen: their number grows with the tokens' to the 0.64
        (Heaps' law, fitted to WikiText-2 in GPT-2's tokens). None: nothing was seen yet."""
        if self.pending is not None and not torch.cuda.is_current_stream_capturing() and self.pending[1].query():
            (host, _, self.tokens), self.pending = self.pending, None
            self.distinct = int(host)
        if self.distinct is None:
            return None
        return min(tokens, round(self.distinct * (tokens / self.tokens) ** 0.64))


_seen = WeakTensorKeyDictionary()
KEPT_CALLS = 256  # whose expectations are kept for a checkpoint to compute its forward anew by the same plan
LOOK_EVERY = 16  # calls by one_pass from one count of distinct ids to the next


def _table_of(token):
    return token if token._base is None else token._base  # a DTensor's own tensor is a new view at each call


def _seen_distinct(ids, token):
    """What is known of the ids that this table is called with, without waiting; now and then they are counted."""
    seen = _seen.setdefault(_table_of(token), _Seen())
    call = ids.data_ptr(), ids.shape
    if torch._C._current_graph_task_id() != -1:  # within a backward, where a checkpoint must do as its forward did
        return seen.expected.get(call)
    seen.expected.pop(call, None)
    seen.expected[call] = found = seen.expect(ids.numel())
    if len(seen.expected) > KEPT_CALLS:
        del seen.expected[next(iter(seen.expected))]
    if seen.pending is None and seen.calls % LOOK_EVERY == 0 and not torch.cuda.is_current_stream_capturing():
        seen.look(ops_distinct.count_distinct(ids, token.shape[0]), ids.numel())
    seen.calls += 1
    return found


def saw(token, count, tokens):
    """A call by `distinct` counted its ids: count (1,) on the device, out of so many tokens."""
    if count.is_cuda and not torch.compiler.is_compiling():
        _seen.setdefault(_table_of(token), _Seen()).look(count, tokens)
