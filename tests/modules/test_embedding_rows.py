"""Embedding with rows that stand in place of its table's."""

import io
import pickle

import pytest
import torch
from conftest import DEVICE, full
from torch import nn

import pyembed
from pyembed import functional as F
from pyembed.plans import gathered
from pyembed.vocabulary import Rows

V, D = 11, 3
IDS = torch.tensor([[0, 5, 5], [1, 2, 9]], device=DEVICE)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with pyembed.backend(request.param):
        yield request.param


def table(**options):
    torch.manual_seed(0)
    return pyembed.Embedding(V, D, **options).to(DEVICE)


def some(count=2, **options):
    torch.manual_seed(1)
    return torch.randn(count, D, device=DEVICE, requires_grad=True, **options)


def by_hand(ids, weight, rows, placeholder, padding_idx=None):
    taken = torch.isin(ids, torch.as_tensor(placeholder, device=DEVICE))
    found = nn.functional.embedding(ids.masked_fill(taken, 0), weight, padding_idx)
    if isinstance(placeholder, int):
        return found.masked_scatter(taken.unsqueeze(-1), rows)
    for row, each in zip(rows, placeholder, strict=True):
        found = torch.where((ids == each).unsqueeze(-1), row, found)
    return found


@pytest.mark.sample(2)
@pytest.mark.parametrize("padding_idx", [None, 0, 5])
@pytest.mark.parametrize("placeholder", [5, [9, 5], [-4, 77]])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_values_and_gradients(placeholder, padding_idx, dtype, backend):
    module, rows = table(padding_idx=padding_idx), some()
    ids = IDS if placeholder != [-4, 77] else IDS.masked_fill(IDS == 5, 77).masked_fill(IDS == 9, -4)
    ids = ids.to(dtype)
    results = [
        by_hand(ids, module.weight, rows, placeholder, padding_idx),
        module(ids, Rows(rows, placeholder)),
        module(ids, rows=[Rows(rows, placeholder)]),
        F.embedding(ids, module.weight, padding_idx, rows=Rows(rows, placeholder)),
    ]
    grad = torch.randn_like(results[0])
    expected, *others = [(x, *torch.autograd.grad(x, (module.weight, rows), grad)) for x in results]
    for other in others:
        assert torch.equal(other[0], expected[0])
        torch.testing.assert_close(other, expected)


def test_twice_differentiable(backend):
    weight, rows = table().weight.detach().clone().requires_grad_(), some()
    grad, seconds = torch.ones_like(weight[IDS], requires_grad=True), []
    for out in (F.embedding(IDS, weight, rows=Rows(rows, 5)), by_hand(IDS, weight, rows, 5)):
        found = torch.autograd.grad(out, (weight, rows), grad, create_graph=True)
        seconds += torch.autograd.grad(sum(x.square().sum() for x in found), grad)
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"max_norm": 1.0}, "max_norm"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
        ({"sparse": True, "max_norm": 1.0}, "max_norm, sparse"),
    ],
    ids=str,
)
def test_options_are_refused(options, names, backend):
    """Before max_norm has changed the table."""
    module, rows = table(**options), Rows(some(), 5)
    before = module.weight.detach().clone()
    for call in (lambda: module(IDS, rows), lambda: module.explain(IDS, rows)):
        with pytest.raises(ValueError, match=f"rows: expected None with max_norm.*, got rows with {names}$"):
            call()
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"ids": IDS.float()}, TypeError, "ids: expected dtype"),
        ({"ids": 3}, TypeError, "ids: expected a Tensor, got int"),
        ({"ids": IDS.masked_fill(IDS == 2, V)}, IndexError, rf"in \[0, {V}\), the rows of weight; got {V} at \(1, 1\)"),
        ({"weight": torch.zeros(V, D, dtype=torch.int8)}, TypeError, "weight: expected a floating dtype where rows are given"),
        ({"padding_idx": V}, ValueError, "padding_idx: expected a row"),
        ({"rows": some()}, TypeError, "rows: expected a pyembed.vocabulary.Rows or several, got Tensor"),
        ({"rows": Rows(some(3), 5)}, ValueError, "placeholders, 2; got 3"),
        ({"rows": Rows(some(dtype=torch.float16), 5)}, TypeError, "float32"),
    ],
)
def test_errors(change, kind, text, backend):
    if DEVICE != "cpu" and "placeholders" in text:
        pytest.skip("nobody waits for the count")
    given = {"ids": IDS, "weight": table().weight, "padding_idx": None, "rows": Rows(some(), 5)} | change
    if isinstance(given["weight"], torch.Tensor):
        given["weight"] = given["weight"].to(DEVICE)
    with pytest.raises(kind, match=text):
        F.embedding(**given)


def test_id_policies(backend):
    ids, rows = torch.tensor([V, 5, -1, 2], device=DEVICE), Rows(some(1), 5)
    module, zero = table(), torch.zeros(D, device=DEVICE)
    for policy, first in (("clamp", module.weight[V - 1]), ("zero", zero)):
        last = module.weight[0] if policy == "clamp" else zero
        expected = torch.stack([first, rows.rows[0], last, module.weight[2]])
        module.id_policy = policy
        assert torch.equal(module(ids, rows), expected)
        module.id_policy = None
        with pyembed.id_policy(policy):
            assert torch.equal(module(ids, rows), expected)
            assert ("zero" in module.explain(ids, rows).reason) is (policy == "zero")


@pytest.mark.parametrize("placeholder", [V + 3, [V + 3], -1])
def test_no_policy_touches_placeholders_outside_the_table(placeholder, backend):
    outside = placeholder if isinstance(placeholder, int) else placeholder[0]
    ids, rows = torch.tensor([V, outside, 2], device=DEVICE), Rows(some(1), placeholder)
    module = table()
    for policy, first in (("clamp", module.weight[V - 1]), ("zero", torch.zeros(D, device=DEVICE))):
        expected = torch.stack([first, rows.rows[0], module.weight[2]])
        assert torch.equal(F.embedding(ids, module.weight, rows=rows, id_policy=policy), expected)


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("placeholder", [2**32 + 5, [2**32 + 5], 5 - 2**32])
def test_placeholders_that_int32_does_not_hold(placeholder, blind, backend, monkeypatch):
    """They are no ids of the call, also where their last 32 bits are those of one."""
    if blind:
        monkeypatch.setattr("pyembed.rows.can_read", lambda ids: False)
    module, ids = table(), torch.tensor([5, 1], dtype=torch.int32, device=DEVICE)
    count = 0 if isinstance(placeholder, int) else 1
    assert torch.equal(module(ids, Rows(some(count), placeholder)), module(ids))


def test_explain_says_what_runs(monkeypatch):
    calls, launcher = [], gathered.launcher
    monkeypatch.setattr(gathered, "launcher", lambda *a: calls.append(a[0]) or launcher(*a))
    module, rows = table(), Rows(some(), 5)
    for name in ("torch", "triton"):
        calls.clear()
        with pyembed.backend(name):
            assert module.explain(IDS, rows).name == name and not calls
            module(IDS, rows)
        assert calls == ["keys", "gather"] * (name == "triton")
    with pytest.raises(TypeError, match="rows: expected a pyembed"):
        module.explain(IDS, 3)


@pytest.mark.parametrize("backend", ["triton", full("torch")], indirect=True)
def test_compiles(backend):
    module, rows = table(), some()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for given in (None, Rows(rows, [9, 5])):
        assert torch.equal(compiled(IDS, given), module(IDS, given))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_graphs_without_rows():
    """Of torch.fx and TorchScript serve calls without rows, and refuse others."""
    module, rows = table(padding_idx=5), Rows(some(), 5)
    scripted, traced = torch.jit.script(module), torch.fx.symbolic_trace(module)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    for graph in (scripted, torch.jit.load(file), traced, pickle.loads(pickle.dumps(traced))):
        assert torch.equal(graph(IDS), module(IDS))
        with pytest.raises((ValueError, torch.jit.Error), match="rows: expected None in"):
            graph(IDS, rows)


def test_front_ends_still_know_it():
    """As a module that only looks up its rows, also after a call with rows."""
    module, linear = table(), nn.Linear(D, 3 * D).to(DEVICE)
    module(IDS, Rows(some(), 5))
    front = pyembed.EmbeddingQKV.from_modules(module, qkv=linear, num_heads=1)
    assert "by the modules" not in front.explain(IDS).reason and torch.equal(front(IDS).hidden, module(IDS))
    both = pyembed.TokenPositionEmbedding.from_modules(module)
    for found in (front(IDS, rows=Rows(some(), 5)).hidden, both(IDS, rows=Rows(some(), 5))):
        assert torch.equal(found, module(IDS, Rows(some(), 5)))
