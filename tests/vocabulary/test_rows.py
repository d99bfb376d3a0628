"""Rows that train beside a frozen table, and rows that are no words."""

import copy

import pytest
import torch
import torch.nn.functional as F
from numerics import Largest
from torch import nn

import pyembed
from pyembed import rows as rows_module
from pyembed.vocabulary import Rows, TrainableRows

V, D = 101, 16
IDS = torch.tensor([[3, 99, 7, 3, 0, 100], [99, 99, 5, 100, 1, 2]])


def table(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return nn.Embedding(V, D, dtype=dtype, **options)


def front_end(token, **options):
    torch.manual_seed(1)
    parts = nn.Embedding(9, D), nn.LayerNorm(D), nn.Linear(D, 3 * D)
    parts = [part.to(token.weight.dtype) for part in parts]
    return pyembed.EmbeddingQKV.from_modules(token, *parts[:2], qkv=parts[2], num_heads=2, **options)


def loss_of(outputs):
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs)


@pytest.mark.parametrize("ids", [[99, 3, 100], range(98, 101), torch.tensor([3])])
def test_trains_as_a_table_whose_other_rows_are_frozen(ids):
    stock = table(torch.float64)
    bias = torch.randn(V, dtype=torch.float64)
    ours = TrainableRows(copy.deepcopy(stock), ids)
    rows = torch.as_tensor(list(ids))
    others = torch.ones(V, dtype=torch.bool).index_fill(0, rows, False)
    start = stock.weight.detach().clone()
    mine = torch.optim.AdamW(ours.parameters(), lr=0.1, weight_decay=0.1)
    theirs = torch.optim.AdamW(stock.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        results = []
        for module in (ours, stock):
            hidden = module(IDS)
            logits = ours.linear(hidden, bias) if module is ours else F.linear(hidden, stock.weight, bias)
            results.append((hidden, logits))
            loss_of((hidden, logits)).backward()
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y)
        torch.testing.assert_close(ours.rows.grad, stock.weight.grad[rows])
        assert ours.weight.grad is None
        mine.step(), theirs.step(), mine.zero_grad(), theirs.zero_grad()
        with torch.no_grad():
            stock.weight[others] = start[others]
    assert not torch.equal(ours.rows, start[rows])
    merged = ours.merge()
    assert type(merged) is nn.Embedding and merged.weight is ours.weight and merged.weight.requires_grad
    torch.testing.assert_close(merged.weight, stock.weight)


def test_shares_the_table_and_makes_nothing_of_its_size():
    embedding = nn.Embedding(5000, D)
    ours = TrainableRows(embedding, [3, 99])
    assert ours.weight is embedding.weight and not embedding.weight.requires_grad
    optimizer = torch.optim.AdamW(ours.parameters())
    with Largest() as largest:
        loss_of(ours(IDS)).backward()
        optimizer.step()
        loss_of(ours(IDS)).backward()
    assert ours.rows.grad.shape == (2, D) and IDS.numel() * D <= largest.elements < 5000


def test_front_end_sees_the_rows():
    token = TrainableRows(table(torch.float64), [99, 3])
    ours = front_end(token)
    with torch.no_grad():  # equal to the table's at first, when a proof by value could not tell them
        before = ours(IDS)
        token.rows.add_(1)
    full = copy.deepcopy(token).merge()
    stock = front_end(full)
    outputs, expected = ours(IDS), stock(IDS)
    for x, y in zip(outputs, expected, strict=True):
        torch.testing.assert_close(x, y)
    assert not torch.allclose(outputs.hidden, before.hidden)
    loss_of(outputs).backward(), loss_of(expected).backward()
    torch.testing.assert_close(token.rows.grad, full.weight.grad[[99, 3]])
    with pytest.raises(RuntimeError, match="table"), pyembed.plan("table"):
        ours(IDS)


def test_what_its_own_ids_are_is_asked_in_one_place():
    """A class of its own that says otherwise is right wherever it stands."""

    class First(TrainableRows):
        def own(self):
            return (*(x[:1] for x in super().own()[:2]), self.rows)

    token = First(table(torch.float64), [3, 99])
    with torch.no_grad():
        token.rows.add_(1)
    assert torch.equal(token(IDS)[0, 1], token.weight[99]) and not torch.equal(token(IDS)[0, 0], token.weight[3])
    torch.testing.assert_close(front_end(token)(IDS).hidden, token(IDS) + front_end(token).position.weight[: IDS.shape[1]])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position, self.norm, self.qkv = table(), nn.Embedding(9, D), nn.LayerNorm(D), nn.Linear(D, 3 * D)

    def forward(self, ids):
        return self.qkv(self.norm(self.token(ids) + self.position(torch.arange(ids.shape[1]))))


@pytest.mark.parametrize("when", ["before", "after", "merged", "merged after"])
def test_fused_models_compute_the_rows(when):
    """Rows that train from before the model is fused; from after, and merged after, its own modules run."""
    model, ids = Model(), IDS[:1, 1:3]
    fused = pyembed.fuse(model, ids) if when == "after" else None
    model.token = TrainableRows(model.token, [3, 99])
    with torch.no_grad():
        model.token.rows.add_(1)
    full = copy.deepcopy(model)
    full.token = full.token.merge()
    if when == "merged":
        model.token = model.token.merge()
    fused = pyembed.fuse(model, ids) if fused is None else fused
    if when == "merged after":
        model.token = model.token.merge()
    with fused, pyembed.plan("distinct"):
        found, expected = model(ids), full(ids)
        torch.testing.assert_close(found, expected)
        assert fused.why_not is None and bool(fused.calls["fused"]) is (when in ("before", "merged"))
        if "merged" not in when:
            own, theirs = loss_of(found), loss_of(expected)
            own.backward(), theirs.backward()
            torch.testing.assert_close(model.token.rows.grad, full.token.weight.grad[[3, 99]])


def test_state_dict_holds_the_rows_once_and_loads_into_the_merged_module():
    ours = TrainableRows(table(), [99, 3])
    with torch.no_grad():
        ours.rows.normal_()
    state = {name: x.clone() for name, x in ours.state_dict().items()}
    assert list(state) == ["weight", "rows", "row_ids"]
    other = TrainableRows(table(), [5, 6])
    other.load_state_dict(state)
    assert torch.equal(other(IDS), ours(IDS))
    merged = TrainableRows(table(), [5, 6]).merge()
    merged.load_state_dict(state)
    assert torch.equal(merged(IDS), ours(IDS))


@pytest.mark.parametrize(
    ("ids", "kind", "text"),
    [
        ([4, 7, 4], ValueError, "each id once, got 4 2 times"),
        ([4, -1], IndexError, rf"in \[0, {V}\), got -1"),
        ([V], IndexError, rf"in \[0, {V}\), got {V}"),
        ([], ValueError, "got none"),
        ([0.5], TypeError, "integers"),
        ([5, 2], ValueError, "padding_idx"),
    ],
)
def test_bad_ids(ids, kind, text):
    embedding = table(padding_idx=2)
    with pytest.raises(kind, match=text):
        TrainableRows(embedding, ids)
    assert embedding.weight.requires_grad


def scattered(ids, weight, streams, scale):
    """What transformers' models do: scale, then masked_scatter; by id one row after the other."""
    taken = torch.zeros_like(ids, dtype=torch.bool)
    for _, placeholder in streams:
        taken |= torch.isin(ids, torch.as_tensor(placeholder))
    hidden = F.embedding(ids.masked_fill(taken, 0), weight) * (1.0 if scale is None else scale)
    for rows, placeholder in streams:
        if isinstance(placeholder, int):
            hidden = hidden.masked_scatter((ids == placeholder).unsqueeze(-1), rows)
        else:
            for row, each in zip(rows, placeholder, strict=True):
                hidden = torch.where((ids == each).unsqueeze(-1), row, hidden)
    return hidden


STREAMS = {
    "by rank": [(3, 99)],
    "by id": [(2, [100, 7])],
    "both": [(3, 99), (2, [100, 7]), (1, 5)],
    "outside the table": [(2, -200), (2, [4000, -1])],
}


@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("name", STREAMS)
def test_rows_are_those_of_masked_scatter(name, scale):
    weight = table(torch.float64).weight
    ids = IDS
    if name == "outside the table":
        ids = ids.masked_fill(ids == 3, -200).masked_fill(ids == 100, 4000).masked_fill(ids == 0, -1)
    streams = [Rows(torch.randn(n, D, dtype=torch.float64, requires_grad=True), place) for n, place in STREAMS[name]]
    position = torch.randn(9, D, dtype=torch.float64)
    hidden = pyembed.functional.embed(ids, weight, position, scale=scale, rows=streams)
    expected = scattered(ids, weight, streams, scale) + position[: ids.shape[1]]
    torch.testing.assert_close(hidden, expected)
    leaves = [weight, *(each.rows for each in streams)]
    for x, y in zip(*(torch.autograd.grad(loss_of(h), leaves) for h in (hidden, expected)), strict=True):
        torch.testing.assert_close(x, y)


def test_modules_take_rows():
    rows = Rows(torch.randn(3, D, dtype=torch.float64, requires_grad=True), 99)
    ours = front_end(table(torch.float64))
    found = ours(IDS, rows=rows)
    hidden = scattered(IDS, ours.token.weight, [rows], None) + ours.position.weight[: IDS.shape[1]]
    query, key, value = ours.qkv(ours.norm(hidden)).chunk(3, -1)
    for x, y in zip(found, (hidden, query, key, value), strict=True):
        torch.testing.assert_close(x.reshape(y.shape), y)
    module = pyembed.TokenPositionEmbedding(V, D, 9, dtype=torch.float64)
    hidden = scattered(IDS, module.token.weight, [rows], None) + module.position.weight[: IDS.shape[1]]
    torch.testing.assert_close(module(IDS, rows=[rows]), hidden)
    with pytest.raises(RuntimeError, match="rows are not in the table"), pyembed.plan("table"):
        ours(IDS, rows=rows)


@pytest.mark.parametrize(
    ("rows", "kind", "text"),
    [
        (Rows(torch.zeros(2, D), 99), ValueError, "placeholders, 3; got 2: the first without a row is in batch row 1"),
        (Rows(torch.zeros(5, D), 99), ValueError, "placeholders, 3; got 5: batch row 0 has 1"),
        (Rows(torch.zeros(3, D + 1), 99), ValueError, rf"\(R, {D}\), got \(3, {D + 1}\)"),
        (Rows(torch.zeros(3, D).half(), 99), TypeError, "float32 on cpu, as the table has; got torch.float16"),
        (Rows(torch.zeros(3, D), [99, 7]), ValueError, "as many placeholder ids as rows, 3; got 2"),
        (Rows(torch.zeros(2, D), [7, 7]), ValueError, "each id once, got 7"),
        ([Rows(torch.zeros(3, D), 99), Rows(torch.zeros(1, D), [99])], ValueError, r"got 99, which rows\[0\] has"),
        (torch.zeros(3, D), TypeError, "expected a pyembed.vocabulary.Rows or several, got Tensor"),
    ],
)
def test_bad_rows(rows, kind, text):
    with pytest.raises(kind, match=text):
        pyembed.functional.embed(IDS, table().weight, rows=rows)


def test_rows_that_train_of_another_dtype():
    token = TrainableRows(table(), [3])
    token.weight.data = token.weight.data.bfloat16()
    with pytest.raises(TypeError, match=r"token.rows: expected torch.bfloat16 on cpu, as the table has; got torch.float32"):
        pyembed.TokenPositionEmbedding.from_modules(token)(IDS)


def test_placeholders_are_looked_at_once(monkeypatch):
    """Those that are ints; what was found in inference mode serves training too."""
    seen, check = [], rows_module.check_row_ids
    monkeypatch.setattr(rows_module, "check_row_ids", lambda *given: seen.append(given[1]) or check(*given))
    rows_module._sorted.cache_clear()
    weight, rows = table().weight, torch.randn(2, D, requires_grad=True)
    for placeholder in ([99, 7], (99, 7), range(99, 101), [99, 8]):
        for mode in (torch.inference_mode, torch.enable_grad):
            with mode():
                found = pyembed.functional.embed(IDS, weight, rows=Rows(rows, placeholder))
        torch.testing.assert_close(found, scattered(IDS, weight, [Rows(rows, placeholder)], None))
        found.sum().backward()
    assert seen == [(99, 7), range(99, 101), (99, 8)]
    for _ in range(2):
        with pytest.raises(TypeError, match="integers"):
            pyembed.functional.embed(IDS, weight, rows=Rows(rows, [99.0, 7.0]))


@pytest.mark.parametrize("function", [pyembed.functional.embed, pyembed.functional.embedding])
@pytest.mark.parametrize("placeholder", [99, -7])
def test_other_ids_must_still_be_in_the_table(placeholder, function):
    """The error names the id that is wrong, not a placeholder outside the table."""
    ids = IDS.masked_fill(IDS == 5, V).masked_fill(IDS == 99, placeholder)
    with pytest.raises(IndexError, match=rf"in \[0, {V}\), .*; got {V} at \(1, 2\)"):
        function(ids, table().weight, rows=Rows(torch.zeros(3, D), placeholder))


@pytest.mark.parametrize("count", [0, 2, 3, 4])
def test_counts_that_nobody_reads(count, monkeypatch):
    """As in a compiler's graph or on a GPU: PyTorch's operators assert, on a GPU without waiting."""
    monkeypatch.setattr(rows_module, "can_read", lambda tensor: False)
    weight, own = table().weight, torch.randn(count, D)
    ids = torch.tensor([[3, V, V, 4, V]])
    if count != 3:
        with pytest.raises(RuntimeError, match=f"rows: expected as many as there are placeholders {V}, got {count}"):
            pyembed.functional.embed(ids, weight, rows=Rows(own, V))
        return
    found = pyembed.functional.embed(ids, weight, rows=Rows(own, V))
    assert torch.equal(found[ids == V], own) and torch.equal(found[ids != V], F.embedding(ids[ids != V], weight))


@pytest.mark.parametrize("count", [0, 2, 3, 4])
def test_counts_under_a_transform(count):
    """Where nothing can be asserted the tokens' results are NaN, and others are right."""
    weight, own = table().weight, torch.randn(count, D)
    ids = torch.tensor([[3, V, V, 4, V], [V, 5, V, V, 0]])
    found = torch.func.vmap(lambda ids: pyembed.functional.embed(ids, weight, rows=Rows(own, V)))(ids)
    taken = ids == V
    assert torch.equal(found[~taken], F.embedding(ids[~taken], weight))
    assert torch.equal(found[taken], own.repeat(2, 1)) if count == 3 else found[taken].isnan().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("blind", [False, True])
def test_ids_are_clamped_to_rows_that_train(backend, blind, monkeypatch):
    """As to any other row of the table, but not to the placeholders of a call."""
    if backend == "triton":
        pytest.importorskip("triton")
    if blind:
        monkeypatch.setattr(rows_module, "can_read", lambda ids: False)
    token, ids = TrainableRows(table(), [V - 1, 0, 7]), torch.tensor([V + 3, -1, V, 7, 5])
    with torch.no_grad():
        token.rows.add_(1)
    whole = token.weight.index_copy(0, token.row_ids, token.rows.detach())
    for rows in (None, Rows(torch.ones(1, D), [1])):
        for front in (pyembed.TokenPositionEmbedding.from_modules(token), front_end(token)):
            with pyembed.backend(backend), pyembed.id_policy("clamp"):
                found, expected = front(ids, rows=rows), whole[ids.clamp(0, V - 1)]
            if isinstance(found, tuple):
                found, expected = found.hidden, expected + front.position.weight[:5]
            assert torch.equal(found, expected)


def test_distinct_ids_know_no_rows():
    front, ids = front_end(table()), torch.tensor([[3, V]])
    distinct = pyembed.call.DistinctIds(*ids.unique(return_inverse=True))
    with pytest.raises(ValueError, match="distinct: expected None where rows"):
        front(ids, distinct=distinct, rows=Rows(torch.zeros(1, D), V))


@pytest.mark.parametrize("module", [False, True])
def test_no_gradient_is_copied(module):
    """As autograd does where a view is written to."""
    weight, rows = table().weight, torch.randn(3, D, requires_grad=True)
    hooked = table()
    hooked.register_forward_hook(lambda *_: None)
    found = front_end(hooked)(IDS, rows=Rows(rows, 99)).hidden if module else None
    found = pyembed.functional.embed(IDS, weight, scale=2.0, rows=Rows(rows, 99)) if found is None else found
    names, waiting = set(), [found.grad_fn]
    while waiting:
        node = waiting.pop()
        names.add(node.name())
        waiting += [each for each, _ in node.next_functions if each is not None]
    assert "IndexCopyBackward0" in names and "CopySlices" not in names
