"""Rows of two tables in one pass, and calls by kernels over them."""

import pytest
import torch
from conftest import DEVICE, DTYPES
from numerics import assert_no_worse, guarded
from torch.library import opcheck

import pyembed
from pyembed.call import LOOKUPS, Call, Projection, Terms
from pyembed.plans import choice, gathered
from pyembed.rows import with_rows
from pyembed.run import run
from pyembed.vocabulary import Rows, TrainableRows

pytestmark = pytest.mark.usefixtures("triton")
V, R = 23, 5
REST = ["gather_backward", "find_used"]


def inputs(dtype, D, M=(3, 37)):
    """keys, token, own; a third of the tokens take rows of own, some twice."""
    keys = torch.randint(V, M)
    keys = torch.where(torch.rand(M) < 0.67, keys, V + keys % R)
    return guarded(keys.int().to(DEVICE)), *(guarded(torch.randn(n, D).to(dtype).to(DEVICE)) for n in (V, R))


def expected(keys, token, own, scale, padding_idx=-1):
    rows = torch.embedding(token, keys.clamp(max=V - 1), padding_idx)
    rows = rows if scale is None else rows * scale
    return torch.where((keys < V).unsqueeze(-1), rows, own[(keys - V).clamp(min=0)])


@pytest.mark.sample
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64] if DEVICE == "cpu" else DTYPES)
@pytest.mark.parametrize("D", [1, 16, 100, 1100])
@pytest.mark.parametrize("scale", [None, 3.3])
def test_equals_eager(dtype, D, scale):
    given = inputs(dtype, D)
    given[2][0] = -0.0
    found = gathered.gather(*given, scale, -1)
    assert torch.equal(found, expected(*given, scale)) and torch.equal(found.signbit(), expected(*given, scale).signbit())
    given[0][1, 3] = -1
    found = gathered.gather(*given, scale, -1)
    assert found[1, 3].isnan().all() and found.isnan().sum() == D


@pytest.mark.sample
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_idx", [-1, 2])
@pytest.mark.parametrize("frozen", ["", "token", "own"])
def test_gradients(dtype, padding_idx, frozen):
    keys, *tables = inputs(dtype, 12)
    grad, results = torch.randn(*keys.shape, 12, device=DEVICE).to(dtype), []
    for function, kind in ((gathered.gather, dtype), (expected, dtype), (expected, torch.float64)):
        leaves = [x.detach().to(kind).requires_grad_(name != frozen) for name, x in zip(("token", "own"), tables, strict=True)]
        function(keys, *leaves, 3.3, padding_idx).backward(grad.to(kind))
        results.append([leaf.grad for leaf in leaves])
    for name, ours, eager, oracle in zip(("token", "own"), *results, strict=True):
        assert (ours is None) == (name == frozen)
        if ours is not None:
            assert_no_worse(name, ours, eager, oracle)


@pytest.mark.parametrize("frozen", ["", "token", "own"])
def test_second_gradients(frozen):
    """Of what the gradient of a square's sum gives."""
    keys, *tables = inputs(torch.float64, 3, (2, 4))
    keys[1], found = 2, []  # the row without a gradient
    for function in (gathered.gather, expected):
        leaves = [x.detach().requires_grad_() for name, x in zip(("token", "own"), tables, strict=True) if name != frozen]
        given = iter(leaves)
        both = [x if name == frozen else next(given) for name, x in zip(("token", "own"), tables, strict=True)]
        factor = torch.linspace(-1, 2, 24, dtype=torch.float64, device=DEVICE).view(2, 4, 3).requires_grad_()
        rows = function(keys, *both, 3.3, 2)
        grads = torch.autograd.grad((rows.pow(3) * factor).sum(), leaves, create_graph=True)
        factors = (torch.linspace(1, 2, x.numel(), dtype=x.dtype, device=DEVICE).view_as(x) for x in grads)
        loss = sum((x * y).sum() for x, y in zip(grads, factors, strict=True))
        found.append(torch.autograd.grad(loss, [*leaves, factor]))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


def streams_of(*streams):
    """Arguments of find_keys: (placeholder, R), or ids by which the rows are found, each with its number in reports."""
    placeholders, sizes, values, orders = [], [], [], []
    for stream in streams:
        by_rank = isinstance(stream, tuple)
        ids, order = torch.tensor([] if by_rank else stream, dtype=torch.long, device=DEVICE).sort()
        for items, item in zip(
            (placeholders, sizes, values, orders),
            (stream[0], stream[1], ids, order) if by_rank else (-1, len(stream), ids, order),
            strict=True,
        ):
            items.append(item)
    return placeholders, sizes, values, orders, [len(LOOKUPS) + 1 + n for n in range(len(streams))]


@pytest.mark.sample(2)
@pytest.mark.parametrize("M", [1, 7, 512, 1300])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kinds", ["rank", "id", "both", "twice", "id then rank"])
def test_keys(M, dtype, kinds):
    """Streams against a loop over the tokens; a later one comes first."""
    torch.manual_seed(M)
    ids = torch.randint(V, (M,))
    ids[torch.rand(M) < 0.3] = 4
    by_id = [9, 3, V + 7, -5, 4, 0, 11][: 4 if kinds == "id then rank" else 7]
    ids[M // 2] = V + 7
    streams = {
        "rank": [(4, int((ids == 4).sum())), [V + 7]],
        "id": [by_id],
        "both": [(4, int((ids == 4).sum())), (V + 7, 1), [3, 9]],
        "twice": [by_id, [9, V + 7]],
        "id then rank": [by_id, (4, int((ids == 4).sum()))],
    }[kinds]
    wanted = []
    for m, each in enumerate(ids.tolist()):
        key, start = each, V
        for stream in streams:
            if isinstance(stream, tuple) and each == stream[0]:
                key = start + int((ids[:m] == each).sum())
            elif isinstance(stream, list) and each in stream:
                key = start + stream.index(each)
            start += stream[1] if isinstance(stream, tuple) else len(stream)
        wanted.append(key)
    found = gathered.find_keys(ids.to(DEVICE, dtype), V, *streams_of(*streams), False, True)
    assert found.tolist() == wanted and found.dtype == torch.int32
    used, index, count = gathered.find_used(found, start)
    assert used[: int(count)].tolist() == sorted(set(wanted)) and (used[int(count) :] == -1).all()
    assert used[index].tolist() == wanted


def test_keys_of_ids_without_a_row():
    """Only ids that no stream takes are told of, or clamped."""
    ids = torch.tensor([[3, -7, V + 1], [V + 4, 4, -9]], device=DEVICE)
    streams = streams_of([V + 1], (-7, 1))
    assert gathered.find_keys(ids, V, *streams, False, False).tolist() == [[3, V + 1, V], [-1, 4, -1]]
    assert gathered.find_keys(ids, V, *streams, True, True).tolist() == [[3, V + 1, V], [V - 1, 4, 0]]
    with pytest.raises(IndexError, match=rf"ids: expected values in \[0, {V}\), .* token table; got {V + 4} for token 0 of"):
        gathered.find_keys(ids, V, *streams, False, True)
        pyembed.check_ids()
    used, index, count = gathered.find_used(gathered.find_keys(ids, V, *streams, False, False), V + 2)
    assert used.tolist() == [3, 4, V, V + 1, -1, -1] and index.tolist() == [0, 3, 2, -1, 1, -1] and count == 4
    empty = gathered.find_keys(ids[:0], V, *streams, False, True)
    assert empty.shape == (0, 3) and [len(x) for x in gathered.find_used(empty, V + 2)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("size", "text"),
    [(2, "2: .* row is in batch row 1"), (1, "1: .* in batch row 1"), (5, "5: batch row 0 has 1"), (0, "0: .* in batch row 0")],
)
@pytest.mark.parametrize("T", [6, 700])
def test_wrong_counts_are_told_of(size, text, T):
    """As ids without a row are: without waiting, by the argument's name, with both numbers and the first batch row."""
    ids = torch.zeros(2, T, dtype=torch.long, device=DEVICE)
    ids[0, T - 1] = ids[1, 0] = ids[1, 3] = 9
    streams = streams_of([7], (9, size))
    match = rf"rows\[1\]: expected as many rows as there are placeholders, 3; got {text}.*, in a call on {DEVICE}"
    with pytest.raises(ValueError, match=match):
        gathered.find_keys(ids, V, *streams, False, True)
        pyembed.check_ids()
    found = gathered.find_keys(ids, V, *streams, False, False)
    assert torch.equal(found == -1, ids == 9) and (found[ids != 9] == 0).all()


@pytest.mark.parametrize("name", ["gather", "find_keys", *(pytest.param(name, marks=pytest.mark.full) for name in REST)])
def test_operators(name):
    keys, token, own = inputs(torch.float32, 2, (1, 3))
    arguments = {
        "gather": (keys, token.clone().requires_grad_(), own.clone().requires_grad_(), 2.0, 1),
        "gather_backward": (torch.randn(1, 3, 2, device=DEVICE), keys, 2.0, 1, V, [V, R]),
        "find_keys": (keys, V, *streams_of([V, V + 1], (-9, 0)), True, True),
        "find_used": (keys, V + R),
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


def test_each_row_in_use_is_projected_once(monkeypatch):
    seen, run = [], gathered.distinct.front_end
    monkeypatch.setattr(gathered.distinct, "front_end", lambda *given: seen.append(given) or run(*given))
    weight, own = torch.randn(V, 16, device=DEVICE), torch.randn(3, 16, device=DEVICE)
    ids = torch.tensor([[3, 99, 7, 3, 3, 7], [99, 99, 5, 8, 5, 5]], device=DEVICE)
    with pyembed.plan("distinct"):
        found = pyembed.functional.embed_qkv(ids, weight, weight[:3], num_heads=1, rows=Rows(own, 99))
    ((call, *_, count),) = seen
    assert count.item() == 4 + 3 and call.terms.token[:7].equal(torch.cat([weight[[3, 5, 7, 8]], own]))
    assert found.hidden[ids == 99].equal(own)


@pytest.mark.parametrize("trains", [False, True])
def test_what_the_planner_weighs(trains, monkeypatch):
    """A table of the rows in use, of which one by rank is each token's own; it has gradients where either of the two has."""
    seen, weight, own = [], torch.randn(V, 16, device=DEVICE), torch.randn(2, 16, device=DEVICE, requires_grad=trains)
    monkeypatch.setattr(choice, "weigh", lambda call, distinct: seen.append((call.terms.token, distinct)))
    monkeypatch.setattr(choice, "_count_now", lambda ids, token: ids.unique().numel() if token is weight else None)
    terms = with_rows(Terms(torch.tensor([[3, V, V, 3, 3]], device=DEVICE), weight), Rows(own, V))
    choice.weigh_now(Call(terms, projection=Projection(weight, None, 1, 1)))
    ((table, distinct),) = seen
    assert table.shape == (4, 16) and distinct == 4 and table.requires_grad == trains


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
@pytest.mark.parametrize("projects", [False, True])
def test_counts_that_nobody_reads(projects, count, monkeypatch):
    """As on a GPU: the call tells of it late, and results of the tokens are NaN."""
    for module in ("rows", "run", "checks"):
        monkeypatch.setattr(f"pyembed.{module}.can_read", lambda tensor: False)
    weight, own, ids = torch.randn(V, 16, device=DEVICE), torch.randn(count, 16, device=DEVICE), torch.tensor([3, V, V])

    def call(policy="raise"):
        options = dict(rows=Rows(own, V), id_policy=policy)
        if not projects:
            return pyembed.functional.embed(ids.to(DEVICE), weight, **options)
        with pyembed.plan("distinct"):
            found = pyembed.functional.embed_qkv(ids.to(DEVICE), weight, weight[:3], num_heads=1, **options)
            return torch.cat([x.flatten(1) for x in found], -1)

    place = f"batch row 0 has 2, in a call on {DEVICE}" if count > 2 else "in batch row 0"
    with pytest.raises(ValueError, match=f"rows: expected as many rows as there are placeholders, 2; got {count}: .*{place}"):
        call()
        pyembed.check_ids()
    if count:  # nothing stands in no ids, which the host knows
        with pytest.raises(ValueError, match=f"placeholders, 0; got {count}: batch row 0 has 0$"):
            pyembed.functional.embed(ids[:0].to(DEVICE), weight, rows=Rows(own, V))
    found = call("trust")
    assert found[0].isfinite().all() and found[1:].isnan().all() and torch.equal(found[0, :16], weight[3])


def test_ids_without_a_row(device, monkeypatch):
    weight, own = torch.randn(V, 16, device=device), torch.randn(1, 16, device=device)
    ids = torch.tensor([[3, -7], [V + 1, 4]], device=device)
    with pytest.raises(IndexError, match=rf"ids: expected values in \[0, {V}\), the rows of (the )?token.*; got {V + 1}"):
        pyembed.functional.embed(ids, weight, rows=Rows(own, -7))
        pyembed.check_ids()
    for module in ("rows", "run", "checks"):  # so that the kernel tells, as on a GPU
        monkeypatch.setattr(f"pyembed.{module}.can_read", lambda tensor: False)
    for projects in (False, True):
        with pytest.raises(IndexError, match=rf"got {V + 1} for token 0 of sequence 1"), pyembed.plan("distinct"):
            if projects:
                pyembed.functional.embed_qkv(ids, weight, weight[:3], num_heads=1, rows=Rows(own, -7))
            else:
                pyembed.functional.embed(ids, weight, rows=Rows(own, -7))
            pyembed.check_ids()
