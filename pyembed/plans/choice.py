"""Which implementation runs a call: kernels or PyTorch's operators, and by which plan.

one_pass  every token is projected: the fused kernel on a GPU, PyTorch's composition on a CPU
distinct  each distinct token and position is projected once, then gathered: less matrix work, one more pass over memory
table     every row of the vocabulary was projected before: gathers alone, for inference
"""

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import pyembed.settings as settings

from ..call import TABLES, Call, Called
from ..memory import SMALL_BYTES
from ..modes import (
    autocast_dtype,
    brings_operators,
    has_process_group,
    is_dtensor,
    is_plain_eager,
    is_recorded,
    is_traced,
    is_transformed,
)
from ..rows import Extended
from .operators import launcher
from .rates import measure, product_dtype

HAS_TRITON = importlib.util.find_spec("triton") is not None
_COMPILED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETED_DTYPES = (torch.float32, torch.float16, torch.float64)
NO_BF16 = "Triton's interpreter has no bfloat16 arithmetic; take float32 or float16, or a GPU"
ZEROS = "id_policy 'zero' is PyTorch's operators' alone"


def takes(token: Tensor) -> bool:
    """Whether a table of this dtype has a kernel on its device."""
    return token.dtype in (_INTERPRETED_DTYPES if token.device.type == "cpu" else _COMPILED_DTYPES)


def why_torch(token: Tensor) -> str | None:
    """Why PyTorch's operators run a call over this table; None: kernels do. RuntimeError, TypeError: kernels were asked for and
    cannot run."""
    backend = settings.current.backend
    if backend == "torch":
        return "pyembed.backend('torch') is set"
    if backend == "auto" and not token.is_cuda:
        return f"kernels are for GPUs, and the table is on {token.device}"
    if backend == "auto" and not (HAS_TRITON and takes(token)):
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


def why_composed(call: Call) -> str | None:
    """Why PyTorch's composition (reference.py) runs a call by the plan one_pass; None: the fused kernel does."""
    if call.id_policy == "zero":
        return ZEROS
    if call.concat:
        return "positions stand beside token rows"
    if calls_modules(call):
        return "modules that do more than apply their weights are called"
    return _why_strange(call) or why_torch(call.terms.token)


def calls_modules(call: Call) -> bool:
    """Whether a module is called in place of a weight; one that follows the projection does not count."""
    return any(isinstance(value, Called) for value in (*call.terms, *call.norm, *(call.projection or ())))


def extended(call: Call) -> Extended | None:
    """Its token, where that is a table beside other rows, and nothing else is called in place of a weight."""
    token = call.terms.token
    if not isinstance(token, Extended) or token.table is None:
        return None
    is_distributed = has_process_group() and is_dtensor(token.table)
    return None if is_distributed or calls_modules(token.plain(call)) else token


def as_if_of_table(call: Call) -> Call:
    """The call as if all rows were its table's, where it is extended."""
    own = extended(call)
    return call if own is None else own.plain(call)


def _why_strange(call: Call) -> str | None:
    strange = next((value for value in call.values() if brings_operators(value)), None)
    return None if strange is None else f"a {type(strange).__name__} brings operators of its own"


def refuses(call: Call) -> str | None:
    """Why `distinct` and `table` cannot run a call; None: they can."""
    terms = call.terms
    if autocast_dtype(terms.token) is not None:
        return "autocast is on"
    if call.batch_invariant:
        return "batch_invariant wants one order of sums"
    if call.id_policy == "zero":
        return ZEROS
    if terms.dropout:
        return "dropout comes between sum and norm"
    if terms.position is not None and not terms.position.is_floating_point():
        return "positions are computed, not looked up"
    if terms.scale is not None:
        return "token rows are scaled"
    added = [name for name in TABLES if name not in ("token", "position") and getattr(terms, name) is not None]
    return f"{added[0]}s are added" if added else None


class Plan(NamedTuple):
    """The plan of a call, why, and the seconds predicted for each plan that could run it (empty: nothing was weighed)."""

    name: str
    reason: str
    seconds: dict[str, float]

    def __str__(self) -> str:
        costs = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in self.seconds.items())
        return f"{self.name}: {self.reason}" + (f" (predicted: {costs})" if costs else "")


LEAST_FLOPS = 1e9  # of the product over all tokens, forward: below it no plan can save what weighing them costs
LEAST_TOKENS = 1024  # of a call on a GPU, for the same reason
LAUNCH_SECONDS = 1e-5  # of a kernel of ours on a GPU, the host's part included
FIXED_SECONDS = 1e-3  # of `distinct` on a CPU: finding the distinct rows, its smaller operators, its operator's own cost
CACHED_BYTES = 32 << 20  # of a tensor: up to this size the C library reuses memory, which then is not fresh
SCATTERED = 1.5  # times a gather's: what a backward's sums by id take
MARGIN = 1.25  # by which `distinct` must be predicted to win: a prediction is no better than that
LAUNCHES = {"one_pass": (2, 12), "distinct": (8, 26), "table": (1, 1)}  # of a forward, of a forward and backward


def _is_small(call: Call, kernels: bool) -> bool:
    """Whether a call has so little to compute, and no dense gradient of a large table to make (filling fresh memory with zeros
    would cost more than all else), that no plan can save time."""
    assert call.projection is not None
    token = call.terms.token
    if token.is_cuda:
        return call.terms.ids.numel() < LEAST_TOKENS
    if kernels or token.is_meta:
        return False
    if token.requires_grad and torch.is_grad_enabled() and token.numel() * token.element_size() >= SMALL_BYTES:
        return False
    return 2.0 * call.terms.ids.numel() * call.projection.rows * token.shape[1] < LEAST_FLOPS


def settle(call: Call) -> Plan | None:
    """The Plan of a call as far as it does not depend on the values of ids; None: it does, so weigh the plans at each call.

    RuntimeError: a forced plan cannot run."""
    call = as_if_of_table(call)
    plan, token, ids = settings.current.plan, call.terms.token, call.terms.ids
    if plan == "one_pass":
        return Plan("one_pass", "pyembed.plan('one_pass') is set", {})
    if plan == "table":
        raise RuntimeError("plan: 'table' needs a module to keep it: expected an EmbeddingQKV, got a function call")
    refused = refuses(call) or _why_strange(call)
    if refused:
        if plan == "distinct":
            raise RuntimeError(f"plan: 'distinct' cannot run here: {refused}")
        return Plan("one_pass", refused, {})
    kernels = why_torch(token) is None
    runs = not token.is_meta and (token.is_cuda or is_plain_eager())
    if plan == "distinct":
        if not runs or token.is_cuda and not kernels:
            raise RuntimeError(
                f"plan: 'distinct' cannot run here: on {token.device} it needs the kernels"
                + ("" if token.is_cuda else ", or no compiler, exporter, torch.func or forward-mode AD")
            )
        return Plan("distinct", "pyembed.plan('distinct') is set", {})
    compiles = torch.compiler.is_compiling() or is_recorded()  # whose graph shall serve any number of tokens
    if not compiles and _is_small(call, kernels):
        return Plan("one_pass", f"{ids.numel()} tokens are too few for another plan to save time", {})
    if not runs or kernels != token.is_cuda or compiles:
        return Plan("one_pass", _why_not_weighed(token, compiles, kernels), {})
    return None


def _why_not_weighed(token: Tensor, compiles: bool, kernels: bool) -> str:
    """Why "auto" takes one_pass without a look at the ids."""
    if compiles:
        return "the graph of a compiler or tracer serves any ids, so that none are counted"
    if token.is_cuda and not kernels:
        return f"on a GPU the other plans need the kernels, which do not run: {why_torch(token)}"
    if kernels and not token.is_meta:
        return "in Triton's interpreter the other plans run only where pyembed.plan asks for them"
    return "tensors have no values (meta), or a transform (torch.func, forward-mode AD) is at work"


def choose(call: Call) -> Plan:
    """The Plan of a call now. On a GPU the number of distinct ids is that of a batch before: nothing waits for this one's."""
    return settle(call) or weigh_now(call)


def weigh_now(call: Call) -> Plan:
    """The cheapest plan for these ids, of a call that settle leaves open."""
    own, ids, token = extended(call), call.terms.ids, call.terms.token
    if own is not None:
        if why_composed(own.plain(call)) is not None:
            return weigh_rows(call, own, own.find(call)[0].numel())
        assert own.table is not None
        distinct = _count_now(own.ids, own.table)
        by_rank = sum(stream.size for stream in own.streams if stream.values is None)
        return _NOT_KNOWN if distinct is None else weigh_rows(call, own, min(ids.numel(), distinct + by_rank))
    distinct = _count_now(ids, token) if call.distinct is None else call.distinct.ids.numel()
    return _NOT_KNOWN if distinct is None else weigh(call, distinct)


_NOT_KNOWN = Plan("one_pass", "how many ids are distinct is not known yet", {})


def _count_now(ids: Tensor, token: Tensor) -> int | None:
    """How many of ids are distinct, on a GPU as far as it is known without waiting."""
    if not token.is_cuda:
        return ids.unique().numel()
    if torch.are_deterministic_algorithms_enabled() or is_traced():
        return None
    return _expected_distinct(ids, token)


def weigh_rows(call: Call, own: Extended, count: int) -> Plan:
    """weigh of a call over a table of so many rows, in use."""
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (own.table, own.own))
    table = own.own.new_empty(count, own.own.shape[1]).requires_grad_(trains)  # without values
    return weigh(call._replace(terms=call.terms._replace(token=table, scale=None)), count)


def backward_products(call: Call) -> int | None:
    """Matrix products of the backward that may follow a call, one for the weight and one for what lies before it; None: no
    gradient is wanted."""
    if not torch.is_grad_enabled():
        return None
    assert call.projection is not None
    (weight, bias, *_, key_weight, value_weight, key_bias, value_bias), terms, norm = call.projection, call.terms, call.norm
    before, weights, biases = (
        any(x is not None and x.requires_grad for x in tensors)
        for tensors in (
            (terms.token, terms.position, norm.weight, norm.bias),
            (weight, key_weight, value_weight),
            (bias, key_bias, value_bias),
        )
    )
    return before + weights if before or weights or biases else None


def weigh(call: Call, distinct: int, has_table: bool = False) -> Plan:
    """The cheapest plan, by the seconds that each is predicted to take; `distinct` must promise a MARGIN.

    A product counts its FLOPs at the device's rate, everything else the bytes that it moves: one_pass reads rows and writes
    hidden, normed rows and the projection (into fresh memory, on a CPU), distinct and table gather their projections too, and
    a backward of distinct reads every gradient, whatever it is for.
    """
    assert call.projection is not None
    ids, token, position, position_ids, *_ = call.terms
    M, N, D, size = ids.numel(), call.projection.rows, token.shape[1], token.element_size()
    T, normed, products = call.terms.length, call.norm.kind != "none", backward_products(call)
    places = 0 if position is None else T if position_ids is None else min(position_ids.numel(), position.shape[0])
    rate = measure(token.device, token.dtype)
    product = measure(token.device, product_dtype(token.device, token.dtype))
    trains = products is not None
    passes, least = 1 + (products or 0), 1 + max(products, 1) if products is not None else 1
    work = passes * 2.0 * N * D
    gather, fresh = size / rate.gather, size / rate.fresh
    grad = token.numel() * size if trains and token.requires_grad else 0  # the dense gradient of the table
    rows, width = distinct + places, (1 + normed) * D + N
    if token.is_cuda:  # the caching allocator has no fresh memory, and the fused kernel keeps its normed rows to itself
        launches = {name: counts[trains] * LAUNCH_SECONDS for name, counts in LAUNCHES.items()}
        seconds = {"one_pass": M * work / rate.flops + passes * M * width * gather + grad / rate.gather}
    else:
        launches = {"one_pass": 0.0, "distinct": FIXED_SECONDS, "table": 0.0}
        new = fresh if M * N * size > CACHED_BYTES else gather
        seconds = {"one_pass": M * work / rate.flops + passes * M * (D * gather + width * new) + grad / rate.fresh}
    moved: float = rows * (3 * D + N) + M * (2 * D + 2 * N) + N * D
    moved *= least * SCATTERED if trains else 1
    seconds["distinct"] = rows * work / product.flops + moved * gather + 2 * grad / rate.gather
    if has_table:
        seconds["table"] = M * (2 * D + 2 * N) * gather
    seconds = {name: value + launches[name] for name, value in seconds.items()}
    handicapped = {name: value * MARGIN if name == "distinct" else value for name, value in seconds.items()}
    name = min(handicapped, key=handicapped.__getitem__)
    wins = "" if name == min(seconds, key=seconds.__getitem__) else f"; distinct must promise to be {MARGIN} times as fast"
    return Plan(name, f"{M} tokens have {distinct} distinct ids and {places} positions{wins}", seconds)


class _DistinctCount:
    """How many distinct ids the last batch of a table on a GPU had: copied to the host asynchronously, never waited for."""

    tokens = calls = 0
    distinct: int | None = None
    pending: tuple[Tensor, torch.cuda.Event, int] | None = None

    def __init__(self) -> None:
        self.expected: dict[tuple[int, torch.Size], int | None] = {}

    def look(self, count: Tensor, tokens: int) -> None:
        """count (1,) on the device, of a batch of that many tokens."""
        if not tokens or self.pending is not None or torch.cuda.is_current_stream_capturing():
            return
        with torch.cuda.device(count.device):
            host = torch.empty(1, dtype=count.dtype, device="cpu", pin_memory=True)
            host.copy_(count, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending = host, event, tokens

    def expect(self, tokens: int) -> int | None:
        """Distinct ids among so many tokens, from the last batch seen: estimated as proportional to tokens ** 0.64
        (Heaps' law, fitted to WikiText-2 in GPT-2's tokens). None: nothing was seen yet."""
        pending = self.pending  # another thread may take it meanwhile
        if pending is not None and not torch.cuda.is_current_stream_capturing() and pending[1].query():
            host, _, self.tokens = pending
            self.distinct, self.pending = int(host), None
        if self.distinct is None:
            return None
        return min(tokens, round(self.distinct * (tokens / self.tokens) ** 0.64))


_counts = WeakTensorKeyDictionary()
EXPECTATIONS = 256  # kept of past calls, so that a checkpoint computes its forward again by the same plan
COUNT_EVERY = 16  # calls by one_pass


def _table_of(token: Tensor) -> Tensor:
    return token if token._base is None else token._base  # a DTensor's own tensor is a new view at each call


def _count_distinct(ids: Tensor, size: int) -> Tensor:
    """How many distinct rows of a table of `size` rows the ids on a GPU name: (1,) there."""
    module, running = launcher("distinct", ids)
    with running:
        return module.find(ids, size)[1]


def _expected_distinct(ids: Tensor, token: Tensor) -> int | None:
    """What is known of the ids that this table is called with, without waiting; now and then they are counted."""
    count = _counts.setdefault(_table_of(token), _DistinctCount())
    call = ids.data_ptr(), ids.shape
    if torch._C._current_graph_task_id() != -1:  # within a backward, where a checkpoint must do as its forward did
        return count.expected.get(call)
    count.expected.pop(call, None)
    count.expected[call] = found = count.expect(ids.numel())
    if len(count.expected) > EXPECTATIONS:
        count.expected.pop(next(iter(count.expected)), None)
    if count.pending is None and count.calls % COUNT_EVERY == 0 and not torch.cuda.is_current_stream_capturing():
        count.look(_count_distinct(ids, token.shape[0]), ids.numel())
    count.calls += 1
    return found


def remember_count(token: Tensor, count: Tensor, tokens: int) -> None:
    """A call by `distinct` counted its ids: count (1,) on the device, out of so many tokens."""
    if count.is_cuda and not torch.compiler.is_compiling():
        _counts.setdefault(_table_of(token), _DistinctCount()).look(count, tokens)
