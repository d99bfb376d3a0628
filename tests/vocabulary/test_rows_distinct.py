"""Rows beside a table by the plan `distinct`: each distinct row, of the table or not, is projected once."""

import copy

import pytest
import torch
from numerics import Largest
from test_rows import IDS, STREAMS, D, V, front_end, loss_of, scattered, table
from torch import nn

import pyembed
from pyembed import run
from pyembed.call import DistinctIds
from pyembed.plans import choice
from pyembed.vocabulary import Rows, TrainableRows

CASES = STREAMS | {"no token": [(2, [77, 78]), (0, V)], "all tokens": [(IDS.numel(), -1)], "no rows": [(0, V)]}


def case(name, dtype=torch.float64):
    """Its rows and ids."""
    torch.manual_seed(2)
    ids = IDS
    if name == "outside the table":
        ids = ids.masked_fill(ids == 3, -200).masked_fill(ids == 100, 4000).masked_fill(ids == 0, -1)
    if name == "all tokens":
        ids = torch.full_like(ids, -1)
    return [Rows(torch.randn(n, D, dtype=dtype, requires_grad=True), place) for n, place in CASES[name]], ids


def make(norm="layer", position=True, token=None, **options):
    torch.manual_seed(1)
    token = table(torch.float64) if token is None else token
    parts = [nn.LayerNorm(D) if norm == "layer" else nn.RMSNorm(D) if norm == "rms" else None]
    parts = [None if part is None else part.double() for part in (nn.Embedding(9, D) if position else None, *parts)]
    return pyembed.EmbeddingQKV.from_modules(token, *parts, qkv=nn.Linear(D, 3 * D).double(), num_heads=2, **options)


def by_modules(front, ids, streams, weight=None):
    """Stock modules over the rows that masked_scatter writes."""
    hidden = scattered(ids, front.token.weight if weight is None else weight, streams, front.scale)
    if front.position is not None:
        hidden = hidden + front.position.weight[: ids.shape[1]]
    return hidden, *front.qkv(hidden if front.norm is None else front.norm(hidden)).chunk(3, -1)


def compare(found, expected, leaves, theirs=None):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.reshape(y.shape), y)
    theirs = leaves if theirs is None else theirs
    grads = [torch.autograd.grad(loss_of([x.reshape(y.shape) for x, y in zip(found, expected, strict=True)]), leaves)]
    grads.append(torch.autograd.grad(loss_of(expected), theirs))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


@pytest.fixture
def runs(monkeypatch):
    """The tables that the plan `distinct` was called with."""
    tables, front = [], run.distinct.front_end

    def noted(call, *others, **options):
        tables.append(call.terms.token)
        return front(call, *others, **options)

    monkeypatch.setattr(run.distinct, "front_end", noted)
    return tables


@pytest.mark.parametrize("options", [{}, {"norm": "rms", "scale": 4.0}, {"norm": None}, {"position": False}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_masked_scatter(name, options, runs):
    streams, ids = case(name)
    ours = make(**options)
    with pyembed.plan("distinct"):
        assert ours.explain(ids, rows=streams).name == "distinct"
        found = ours(ids, rows=streams)
    (used,) = runs
    in_place = sum((ids == place).sum() for each, place in streams if isinstance(place, int))
    taken = torch.isin(ids, torch.tensor([p for _, place in streams for p in ([place] if isinstance(place, int) else place)]))
    by_id = sum((ids == each).any() for _, place in streams if not isinstance(place, int) for each in place)
    assert len(used) == ids[~taken].unique().numel() + in_place + by_id
    compare(found, by_modules(ours, ids, streams), [*ours.parameters(), *(each.rows for each in streams)])


@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("name", [None, "by rank", "both", "outside the table"])
@pytest.mark.parametrize("plan", ["one_pass", "distinct"])
def test_rows_that_train(plan, name, scale, runs):
    """Beside others, which stand before them where a placeholder is among their ids, and alone; only theirs are scaled."""
    streams, ids = ([], IDS) if name is None else case(name)
    token = TrainableRows(table(torch.float64), [99, 3, 7])
    with torch.no_grad():
        token.rows.add_(1)
    ours, full = make(token=token, scale=scale), copy.deepcopy(token).merge().weight
    with pyembed.plan(plan), Largest() as largest:
        assert ours.explain(ids, rows=streams or None).name == plan
        found = ours(ids, rows=streams or None)
        largest_forward = largest.elements
    assert len(runs) == (plan == "distinct") and largest_forward < V * D
    others = [p for p in ours.parameters() if p is not token.rows and p.requires_grad] + [each.rows for each in streams]
    expected = by_modules(ours, ids, streams, full)
    own = torch.autograd.grad(loss_of(expected), full, retain_graph=True)[0][[99, 3, 7]]
    rebuilt = loss_of([x.reshape(y.shape) for x, y in zip(found, expected, strict=True)])
    torch.testing.assert_close(torch.autograd.grad(rebuilt, token.rows, retain_graph=True)[0], own)
    compare(found, expected, others)


def test_distinct_ids_of_rows_that_train(runs):
    token = TrainableRows(table(torch.float64), [99, 3])
    with torch.no_grad():
        token.rows.add_(1)
    ours, stock = make(token=token), make(token=copy.deepcopy(token).merge())
    ids, inverse = torch.cat([IDS.flatten(), torch.tensor([55])]).unique(return_inverse=True)  # one more than the batch has
    distinct = DistinctIds(ids, inverse[:-1].view(IDS.shape))
    with pyembed.plan("distinct"):
        found = ours(IDS, distinct=distinct)
        with pytest.raises(ValueError, match="expected the ids of this batch"):
            ours(IDS + 1, distinct=distinct)
    for x, y in zip(found, stock(IDS), strict=True):
        torch.testing.assert_close(x, y)
    assert len(runs) == 1


def test_frozen_tables_get_nothing():
    """Nothing as large as the table is made, forward or backward."""
    front = front_end(nn.Embedding(5000, D).requires_grad_(False))
    rows = Rows(torch.randn(3, D, requires_grad=True), 99)
    with pyembed.plan("distinct"), Largest() as largest:
        loss_of(front(IDS, rows=rows)).backward()
    assert rows.rows.grad.shape == (3, D) and largest.elements <= 3 * D * D


@pytest.mark.parametrize("cheap", ["one_pass", "distinct"])
def test_the_planner_weighs_the_rows_in_use(cheap, monkeypatch, runs):
    counts, weigh = [], choice.weigh

    def noted(call, distinct, *others):
        counts.append((distinct, tuple(call.terms.token.shape)))
        return weigh(call, distinct, *others)._replace(name=cheap)

    monkeypatch.setattr(choice, "weigh", noted)
    monkeypatch.setattr(choice, "LEAST_FLOPS", 0.0)
    monkeypatch.setattr(run, "_kinds", {})  # calls like these may have been too small before
    streams, ids = case("both")
    ours = make()
    plan = ours.explain(ids, rows=streams)
    assert plan.name == cheap and set(plan.seconds) == {"one_pass", "distinct"}
    for _ in range(2):  # the second is known
        found = ours(ids, rows=streams)
    assert len(runs) == 2 * (cheap == "distinct") and counts == [(10, (10, D))] * 3
    compare(found, by_modules(ours, ids, streams), [each.rows for each in streams])


@pytest.mark.parametrize("policy", ["raise", "trust", "clamp"])
def test_ids_beyond_the_table_are_no_rows(policy):
    """V would be the first of the other rows, were it not looked at before."""
    front, rows = make(), Rows(torch.randn(3, D, dtype=torch.float64), 99)
    for bad in (V, -1):
        ids = IDS.masked_fill(IDS == 7, bad)
        with pyembed.plan("distinct"), pyembed.id_policy(policy):
            if policy != "clamp":
                with pytest.raises(IndexError, match=rf"ids: expected values in \[0, {V}\), the rows of token; got {bad}"):
                    front(ids, rows=rows)
                continue
            found = front(ids, rows=rows)
        assert torch.equal(found.hidden, front(ids.clamp(0, V - 1), rows=rows).hidden)


def test_plans_that_cannot():
    streams, ids = case("both")
    ours = make(dropout=0.5)
    with pytest.raises(RuntimeError, match="plan: 'distinct' cannot run here: dropout"), pyembed.plan("distinct"):
        ours(ids, rows=streams)
    with pytest.raises(RuntimeError, match="plan: 'table' cannot run here: rows are not in the table"), pyembed.plan("table"):
        ours.explain(ids, rows=streams)
    with pytest.raises(RuntimeError, match="plan: 'table' needs a module"), pyembed.plan("table"):
        pyembed.functional.embed_qkv(ids, ours.token.weight, ours.qkv.weight, num_heads=2, rows=streams)


def test_functional_and_second_kinds_of_projection(runs):
    """Grouped heads, rotary turns, heads first, three weights."""
    streams, ids = case("both")
    weight, kv = torch.randn(2 * D, D, dtype=torch.float64), [torch.randn(D // 2, D, dtype=torch.float64) for _ in range(2)]
    token = table(torch.float64).weight
    options = dict(num_heads=2, num_kv_heads=1, norm="rms", rotary=pyembed.Rotary(D // 2, 9), heads_first=True)
    found = {}
    for plan in ("one_pass", "distinct"):
        with pyembed.plan(plan):
            found[plan] = pyembed.functional.embed_qkv(ids, token, weight[: 2 * D], rows=streams, **options)
    for x, y in zip(found["one_pass"], found["distinct"], strict=True):
        torch.testing.assert_close(x, y)
    linears = [nn.Linear(D, n).double() for n in (D, *(len(each) for each in kv))]
    ours = pyembed.EmbeddingQKV.from_modules(table(torch.float64), qkv=tuple(linears), num_heads=2, num_kv_heads=1)
    with pyembed.plan("distinct"):
        query, key, value = ours(ids, rows=streams)[1:]
    hidden = scattered(ids, ours.token.weight, streams, None)
    for x, linear in zip((query, key, value), linears, strict=True):
        torch.testing.assert_close(x.flatten(-2), linear(hidden))
    assert len(runs) == 2


@pytest.mark.parametrize("name", ["by rank", "by id", pytest.param("rows that train", marks=pytest.mark.full)])
def test_one_graph(name):
    """A compiler takes rows in; whether there are as many as placeholders its graph asserts."""
    streams, ids = ([], IDS) if name == "rows that train" else case(name)
    ours = make(token=TrainableRows(table(torch.float64), [3]) if not streams else None)
    torch.compiler.reset()
    compiled = torch.compile(lambda ids: ours(ids, rows=streams or None), backend="eager", fullgraph=True)
    expected = ours(ids, rows=streams or None)
    compare(compiled(ids), expected, [*(each.rows for each in streams), ours.qkv.weight])
    if name == "by rank":
        with pytest.raises(RuntimeError, match=r"rows\[0\]: expected as many as there are placeholders"):
            compiled(ids.masked_fill(ids == streams[0].placeholder, 1))


def test_a_trace_serves_other_ids():
    weight, rows, ids = table().weight.detach(), torch.randn(3, D), IDS[:1].repeat(2, 1)

    def look_up(ids, rows):
        return pyembed.functional.embed(ids, weight, rows=[Rows(rows, 99), Rows(rows[:2], [5, 7])])

    traced = torch.jit.trace(look_up, (IDS, rows), check_trace=False)
    for given in (IDS, IDS.flip(1), IDS.roll(1, 1)):
        assert torch.equal(traced(given, rows), look_up(given, rows))
    assert torch.equal(traced(ids, rows).isnan().all(-1), ids == 99)  # TorchScript drops what is only asserted


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_serves_other_ids(strict):
    class LookUp(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = table()

        def forward(self, ids, rows):
            return pyembed.functional.embed(ids, self.token.weight, rows=[Rows(rows, 99), Rows(rows[:2], [7, 5])])

    module, rows = LookUp(), torch.randn(3, D)
    exported = torch.export.export(module, (IDS, rows), strict=strict).module()
    for given in (IDS, IDS.flip(1)):
        assert torch.equal(exported(given, rows), module(given, rows))
    with pytest.raises(RuntimeError, match=r"rows\[0\]: expected as many as there are placeholders 99"):
        exported(IDS.masked_fill(IDS == 99, 1), rows)
