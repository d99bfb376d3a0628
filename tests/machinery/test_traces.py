"""torch.jit: a trace is a replay of PyTorch's operators or of one of ours, right for ids of any values and lengths."""

import warnings

import pytest
import torch
from conftest import DEVICE, full
from stock import outputs_of, stock
from torch import nn

import pyembed
from pyembed.modules import parts
from pyembed.plans import choice

V, D, L = 11, 8, 12
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


def front(**options):
    return pyembed.EmbeddingQKV(V, D, 2, **{"max_length": L, **options})


def three_projections():
    linears = tuple(nn.Linear(D, D) for _ in range(3))
    tables = nn.Embedding(V, D), nn.Embedding(L, D)
    return pyembed.EmbeddingQKV.from_modules(*tables, nn.LayerNorm(D), qkv=linears, num_heads=2)


class Positions(nn.Embedding):
    """A forward that is proved: OPT's."""

    def forward(self, ids):
        return super().forward(ids + 2)


def with_an_offset():
    return pyembed.EmbeddingQKV.from_modules(
        nn.Embedding(V, D), Positions(L + 2, D), nn.LayerNorm(D), qkv=nn.Linear(D, 3 * D), num_heads=2
    )


MODULES = {
    "sum": lambda: pyembed.TokenPositionEmbedding(V, D, L, num_segments=2, scale=2.0, dropout=0.5),
    "concat": lambda: pyembed.TokenPositionEmbedding(V, D, L, combine="concat"),
    "front": lambda: front(dropout=0.5),
    "sines": lambda: front(position="sinusoidal"),
    "rotary": lambda: front(position="rotary", norm="rms", heads_first=True, qk_norm="rms"),
    "partly rotary": lambda: front(position=None, rotary=pyembed.Rotary(4, L, rotary_dim=2, interleaved=True)),
    "three projections": three_projections,
    "with an offset": with_an_offset,
}


def draw(seed, *shape, with_places=False):
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(size, shape, generator=g).to(DEVICE) for size in (V, L)]
    return tuple(drawn if with_places else drawn[:1])


def gradients(module, outputs):
    """Of all parameters, for random gradients of the outputs."""
    g = torch.Generator().manual_seed(9)
    grads = [torch.randn(x.shape, generator=g).to(x) for x in outputs]
    return torch.autograd.grad(outputs, list(module.parameters()), grads, allow_unused=True)


def check(name, with_places, grads):
    """Against other values, batches and lengths, and their gradients; the tracer's own check passes."""
    torch.manual_seed(0)
    module = MODULES[name]().to(DEVICE).eval()
    with torch.set_grad_enabled(grads):
        example = draw(0, 2, 5, with_places=with_places)
        module(*example)
        traced = torch.jit.trace(module, example, check_trace=True)
        for seed, shape in enumerate([(2, 5), (2, 9), (3, 1)], 1):
            given = draw(seed, *shape, with_places=with_places)
            found, expected = outputs_of(traced(*given)), stock(module, *given)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            if grads:
                torch.testing.assert_close(gradients(module, found), gradients(module, expected), rtol=1e-3, atol=1e-4)


@pytest.mark.sample
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("with_places", [False, True])
@pytest.mark.parametrize(
    "backend, plan", [("auto", "auto"), ("torch", "distinct"), ("triton", "one_pass"), ("triton", "distinct")]
)
@pytest.mark.parametrize("name", MODULES)
def test_a_trace_serves_other_ids(name, backend, plan, with_places, grads):
    with pyembed.backend(backend), pyembed.plan("one_pass" if name in ("sum", "concat") else plan):
        check(name, with_places, grads)


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("name", ["front", "rotary", "three projections"])
def test_a_trace_weighs_no_plans(name, grads, monkeypatch):
    """As a large call would: by the ids and rates of the moment."""
    monkeypatch.setattr(choice, "LEAST_FLOPS", 0)
    monkeypatch.setattr(choice, "LEAST_TOKENS", 0)
    monkeypatch.setattr(parts, "PACK_TOKENS", 0)
    check(name, False, grads)


@pytest.mark.sample
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("policy", ["raise", "clamp"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("position", ["learned", "rotary", "sinusoidal"])
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU an absent row is NaN at first")
def test_a_trace_has_no_row_beyond_a_table(position, rows, policy, backend):
    """Nothing wraps around or is broadcast: not eight tokens over a table of one row, nor over two tables of four."""
    module = front(position=position, max_length=rows).eval()
    module.id_policy = policy
    ids = torch.randint(V, (2, 8))
    with torch.no_grad(), pyembed.backend(backend):
        traced = torch.jit.trace(module, (ids[:, :1],))
        if policy == "clamp":
            places = torch.arange(8).clamp(max=rows - 1)
            torch.testing.assert_close(list(traced(ids)), stock(module, ids, places), rtol=1e-4, atol=1e-5)
            return
        for given in (ids, ids[:, : rows + 1], torch.full((1, 1), V)):
            with pytest.raises(RuntimeError, match=r"out of range|expected values in"):
                traced(given)


def test_a_trace_follows_the_weights():
    """Also where there is a table of their projections."""
    module, (ids,) = front().to(DEVICE).eval(), draw(0, 2, 5)
    module.build_table()
    with torch.no_grad():
        module(ids)
        traced = torch.jit.trace(module, (ids,))
        module.qkv.weight.mul_(2.0)
        torch.testing.assert_close(list(traced(ids)), stock(module, ids), rtol=1e-4, atol=1e-5)
        with (
            pyembed.plan("table"),
            pytest.raises(RuntimeError, match=r"a compiler, tracer, torch.func or forward-mode AD is at"),
        ):
            torch.jit.trace(module, (ids,))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_trace_drops_anew(backend):
    module, (ids,) = pyembed.TokenPositionEmbedding(V, D, L, dropout=0.5).to(DEVICE), draw(0, 2, 5)
    with pyembed.backend(backend):
        traced = torch.jit.trace(module, (ids,), check_trace=False)
        first, second = traced(ids), traced(ids)
    assert not torch.equal(first == 0, second == 0)


def test_what_looks_at_the_example_is_no_part_of_the_trace():
    """Else it would warn of values that it takes for constants, and of graphs that differ from trace to trace."""
    module = with_an_offset()
    module._known.proofs.clear()  # so that it is proved again, while the tracer is at work
    (ids,) = draw(0, 2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, (ids,))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not kinds & {"aten::aminmax", "aten::randn", "aten::unique_dim", "aten::_unique2"}
    with pytest.raises(IndexError, match=r"ids: expected values in \[0, 11\), the rows of token; got 11 at \(0, 3\)"):
        torch.jit.trace(module, (ids.index_fill(1, torch.tensor(3), V),))


def test_batch_invariance_is_not_traced():
    """Its products, of 32 rows each, would be as many as in the example."""
    module, (ids,) = front(batch_invariant=True), draw(0, 2, 5)
    with pyembed.backend("torch"), pytest.raises(RuntimeError, match=r"batch_invariant: expected .* no tracer"):
        torch.jit.trace(module, (ids,))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        MODULES["sum"],
        MODULES["front"],
        three_projections,
        lambda: pyembed.relative.ALiBi(2),
        full(lambda: pyembed.relative.T5Bias(2)),
    ],
)
def test_scripting_is_refused(make, inside):
    """In words; an Embedding is compiled, in test_embedding."""
    module = make()
    with pytest.raises(
        RuntimeError, match=f"^torch.jit.script: expected modules .* got {type(module).__name__}, .* torch.jit.trace"
    ):
        torch.jit.script(nn.Sequential(module) if inside else module)
