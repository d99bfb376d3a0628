"""Rows of two tables in one pass, and calls by kernels over them."""

import pytest
import torch
from conftest import DEVICE, DTYPES
from numerics import assert_no_worse, guarded
from torch.library import opcheck

import pyembed
from pyembed.call import Call, Projection, Terms
from pyembed.plans import choice, gathered
from pyembed.rows import with_rows
from pyembed.run import run
from pyembed.vocabulary import Rows, TrainableRows

pytestmark = pytest.mark.usefixtures("triton")
V, R = 23, 5


def inputs(dtype, D, M=(3, 37)):
    """ids, slot, token, own; a third of the tokens take rows of own, some twice."""
    ids, slot = (guarded(torch.randint(n, shape).to(DEVICE)) for n, shape in ((V, M), (R, (M[0] * M[1],))))
    slot[torch.rand(slot.shape, device=DEVICE) < 0.67] = -1
    return ids, slot, *(guarded(torch.randn(n, D).to(dtype).to(DEVICE)) for n in (V, R))


def expected(ids, slot, token, own, scale, padding_idx=-1):
    rows = torch.embedding(token, ids.flatten(), padding_idx)
    rows = rows if scale is None else rows * scale
    return torch.where((slot < 0)[:, None], rows, own[slot.clamp(min=0)]).view(*ids.shape, -1)


@pytest.mark.sample
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64] if DEVICE == "cpu" else DTYPES)
@pytest.mark.parametrize("D", [1, 16, 100, 1100])
@pytest.mark.parametrize("scale", [None, 3.3])
def test_equals_eager(dtype, D, scale):
    given = inputs(dtype, D)
    given[3][0] = -0.0
    found = gathered.gather(*given, scale, -1, True)
    assert torch.equal(found, expected(*given, scale)) and torch.equal(found.signbit(), expected(*given, scale).signbit())


@pytest.mark.sample
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_idx", [-1, 2])
@pytest.mark.parametrize("frozen", ["", "token", "own"])
def test_gradients(dtype, padding_idx, frozen):
    ids, slot, *tables = inputs(dtype, 12)
    grad, results = torch.randn(*ids.shape, 12, device=DEVICE).to(dtype), []
    for function, kind in ((None, dtype), (expected, dtype), (expected, torch.float64)):
        leaves = [x.detach().to(kind).requires_grad_(name != frozen) for name, x in zip(("token", "own"), tables, strict=True)]
        call = (ids, slot, *leaves, 3.3, padding_idx)
        (gathered.gather(*call, True) if function is None else function(*call)).backward(grad.to(kind))
        results.append([leaf.grad for leaf in leaves])
    for name, ours, eager, oracle in zip(("token", "own"), *results, strict=True):
        assert (ours is None) == (name == frozen)
        if ours is not None:
            assert_no_worse(name, ours, eager, oracle)


@pytest.mark.parametrize("frozen", ["", "token", "own"])
def test_second_gradients(frozen):
    """Of what the gradient of a square's sum gives."""
    ids, slot, *tables = inputs(torch.float64, 3, (2, 4))
    ids, slot[1], found = torch.full_like(ids, 2), -1, []  # the row without a gradient
    for function in (lambda *x: gathered.gather(*x, True), expected):
        leaves = [x.detach().requires_grad_() for name, x in zip(("token", "own"), tables, strict=True) if name != frozen]
        given = iter(leaves)
        both = [x if name == frozen else next(given) for name, x in zip(("token", "own"), tables, strict=True)]
        factor = torch.linspace(-1, 2, 24, dtype=torch.float64, device=DEVICE).view(2, 4, 3).requires_grad_()
        rows = function(ids, slot, *both, 3.3, 2)
        grads = torch.autograd.grad((rows.pow(3) * factor).sum(), leaves, create_graph=True)
        factors = (torch.linspace(1, 2, x.numel(), dtype=x.dtype, device=DEVICE).view_as(x) for x in grads)
        loss = sum((x * y).sum() for x, y in zip(grads, factors, strict=True))
        found.append(torch.autograd.grad(loss, [*leaves, factor]))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", ["gather", pytest.param("gather_backward", marks=pytest.mark.full)])
def test_operators(name):
    ids, slot, token, own = inputs(torch.float32, 2, (1, 3))
    arguments = {
        "gather": (ids, slot, token.clone().requires_grad_(), own.clone().requires_grad_(), 2.0, 1, True),
        "gather_backward": (torch.randn(1, 3, 2, device=DEVICE), ids, slot, 2.0, 1, [V, R]),
    }
    opcheck(getattr(gathered, name).op, arguments[name])


@pytest.mark.sample
@pytest.mark.parametrize("plan", ["auto", "one_pass", "distinct"])
@pytest.mark.parametrize("module", [False, True])
def test_front_end(plan, module):
    """Rows by rank and by id, beside rows that train, against the composition in float64."""
    torch.manual_seed(3)
    ids = torch.tensor([[3, 99, 7, 3], [99, 99, 5, 8]], device=DEVICE)
    front = pyembed.EmbeddingQKV(V, 16, 2, max_length=9, scale=4.0, device=DEVICE)
    if module:
        front.token = TrainableRows(front.token, [7, 3])
    streams = [Rows(torch.randn(n, 16, device=DEVICE, requires_grad=True), place) for n, place in ((3, 99), (2, [100, 5]))]
    leaves = [p for p in front.parameters() if p.requires_grad] + [each.rows for each in streams]
    results = []
    for kind, backend in ((torch.float32, "triton"), (torch.float32, "torch"), (torch.float64, "torch")):
        front.to(kind)
        given = [each._replace(rows=each.rows.detach().to(kind).requires_grad_()) for each in streams]
        leaves = [p for p in front.parameters() if p.requires_grad] + [each.rows for each in given]
        with pyembed.backend(backend), pyembed.plan(plan if backend == "triton" else "one_pass"):
            found = front(ids, rows=given)
            if backend == "triton":
                assert front.explain(ids, rows=given).name == ("distinct" if plan == "distinct" else "one_pass")
        loss = sum((x * torch.linspace(-1, 2, x.numel(), device=DEVICE).view_as(x)).sum() for x in found)
        results.append([*found, *torch.autograd.grad(loss, leaves)])
    for n, (ours, eager, oracle) in enumerate(zip(*results, strict=True)):
        assert_no_worse(str(n), ours, eager, oracle)


@pytest.mark.parametrize("trains", [False, True])
def test_what_the_planner_weighs(trains, monkeypatch):
    """On a GPU: a table of all tokens' rows, which has gradients where either of the two has."""
    seen, weight, own = [], torch.randn(V, 16, device=DEVICE), torch.randn(2, 16, device=DEVICE, requires_grad=trains)
    monkeypatch.setattr(choice, "weigh", lambda call, distinct: seen.append((call.terms.token, distinct)))
    terms = with_rows(Terms(torch.tensor([[3, V, V]], device=DEVICE), weight), Rows(own, V))
    choice.weigh_now(Call(terms, projection=Projection(weight, None, 1, 1)))
    ((table, distinct),) = seen
    assert table.shape == (3, 16) and distinct == 3 and table.requires_grad == trains


def test_hidden_alone(monkeypatch):
    """By one kernel where nothing is added."""
    alone = []
    monkeypatch.setattr("pyembed.run.run", lambda call: alone.append(call) or run(call))
    weight, own = torch.randn(V, 16, device=DEVICE), torch.randn(2, 16, device=DEVICE)
    ids, position = torch.tensor([[3, V, V]], device=DEVICE), torch.randn(9, 16, device=DEVICE)
    found = pyembed.functional.embed(ids, weight, rows=Rows(own, V))
    assert torch.equal(found, torch.stack([weight[3], *own])[None]) and not alone
    assert torch.equal(pyembed.functional.embed(ids, weight, position, rows=Rows(own, V)), found + position[:3])
    assert len(alone) == 1
    token = TrainableRows(torch.nn.Embedding(V, 16, device=DEVICE), [3])
    module = pyembed.TokenPositionEmbedding.from_modules(token, scale=2.0)
    with torch.no_grad():
        token.rows.add_(1)
    assert torch.equal(module(ids[:, :1]), token.rows[None] * 2)
    assert torch.equal(pyembed.functional.embed(ids, weight[:4], rows=Rows(own[:0], 77), id_policy="clamp")[0, 1], weight[3])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_counts_that_nobody_reads(count, monkeypatch):
    """As on a GPU: results of the tokens are NaN."""
    monkeypatch.setattr("pyembed.rows.can_read", lambda tensor: False)
    weight, own = torch.randn(V, 16, device=DEVICE), torch.randn(count, 16, device=DEVICE)
    found = pyembed.functional.embed(torch.tensor([3, V, V], device=DEVICE), weight, rows=Rows(own, V))
    assert torch.equal(found[0], weight[3]) and found[1:].isnan().all()


def test_ids_without_a_row(device, monkeypatch):
    weight, own = torch.randn(V, 16, device=device), torch.randn(1, 16, device=device)
    ids = torch.tensor([[3, -7], [V + 1, 4]], device=device)
    with pytest.raises(IndexError, match=rf"ids: expected values in \[0, {V}\), the rows of (the )?token.*; got {V + 1}"):
        pyembed.functional.embed(ids, weight, rows=Rows(own, -7))
        pyembed.check_ids()
    monkeypatch.setattr("pyembed.run._must_check", lambda call: False)  # so that the kernel tells
    match = rf"got {V + 1} for token 0 of sequence 1"
    with pytest.raises(IndexError, match=match):
        gathered.gather(ids, torch.tensor([-1, 0, -1, -1], device=device), weight, own, None, -1, True)
        pyembed.check_ids()
