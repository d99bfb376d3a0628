"""TrainableRows: what it does not stand for is refused, before anything is changed; and what it loads."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import pyembed
from pyembed.vocabulary import TrainableRows, grow, report

V, D = 11, 4
IDS = torch.arange(V)


def table(**options):
    torch.manual_seed(0)
    return nn.Embedding(V, D, **options)


def trained(ids=(9, 3), **options):
    token = TrainableRows(table(**options), list(ids))
    with torch.no_grad():
        token.rows.copy_(torch.arange(1.0, 1 + token.rows.numel()).view_as(token.rows))
    return token


def _hooked(embedding):
    embedding.register_forward_hook(lambda module, x, y: 2 * y)


def _parametrized(embedding):
    parametrize.register_parametrization(embedding, "weight", nn.Identity())


def _integers(embedding):
    embedding.weight = nn.Parameter(torch.ones(V, D, dtype=torch.int8), requires_grad=False)


def _buffer(embedding):
    weight = embedding.weight.detach()
    del embedding.weight
    embedding.register_buffer("weight", weight)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (_hooked, ValueError, "embedding: expected one without hooks, which would not follow"),
        (lambda e: e.register_forward_pre_hook(lambda *_: None), ValueError, "without hooks"),
        (_parametrized, TypeError, "embedding: expected a floating nn.Parameter as its weight, got one that is computed"),
        (_buffer, TypeError, "got one that is computed"),
        (_integers, TypeError, "got a Parameter of torch.int8"),
        (lambda e: setattr(e, "forward", e.forward), TypeError, "embedding: expected one that only looks up rows"),
    ],
)
def test_what_more_than_looks_up_rows_is_refused(change, kind, text):
    embedding = table()
    change(embedding)
    before = embedding.weight.requires_grad
    with pytest.raises(kind, match=text):
        TrainableRows(embedding, [3])
    assert embedding.weight.requires_grad is before


def test_an_id_policy_is_refused():
    """Which this module has none of."""
    embedding = pyembed.Embedding(V, D)
    embedding.id_policy = "clamp"
    with pytest.raises(ValueError, match="embedding: expected one without an id_policy of its own, got 'clamp'"):
        TrainableRows(embedding, [3])
    embedding.id_policy = None
    assert torch.equal(TrainableRows(embedding, [3])(IDS), embedding(IDS))


def test_the_table_is_frozen_last(monkeypatch):
    """An error on the way, as one of memory, leaves the embedding as it was."""
    embedding = table()
    monkeypatch.setattr(torch.Tensor, "sort", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        TrainableRows(embedding, [3])
    assert embedding.weight.requires_grad


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([3, 3], "row_ids: expected each id once, got 3 2 times"),
        ([3, V], rf"row_ids: expected ids in \[0, {V}\), got {V}"),
        ([-1, 3], rf"row_ids: expected ids in \[0, {V}\), got -1"),
        ([3.0, 5.0], "row_ids: expected ids .* of integers"),
        ([3, 2], "row_ids: expected ids that may train, got 2, which is padding_idx"),
        ([3, 5, 7], "size mismatch"),
    ],
)
def test_ids_that_do_not_fit_are_not_loaded(ids, text):
    """The module then is as it was, and so is one within a model."""
    token = trained(padding_idx=2)
    before = token(IDS)
    for module, prefix in ((token, ""), (nn.Sequential(token), "0.")):
        state = {name: x.clone() for name, x in module.state_dict().items()} | {f"{prefix}row_ids": torch.tensor(ids)}
        with pytest.raises(RuntimeError, match=text):
            module.load_state_dict(state, strict=False)
        assert torch.equal(token(IDS), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_module_without_memory_loads(assign):
    """As transformers loads models."""
    state = trained().state_dict()
    with torch.device("meta"):
        empty = TrainableRows(nn.Embedding(V, D), [0, 1])
    if not assign:
        empty = empty.to_empty(device="cpu")
    empty.load_state_dict(state, assign=assign)
    assert torch.equal(empty(IDS), trained()(IDS))


def test_loaded_in_place():
    """A CUDA graph reads what is at the same place."""
    token = trained()
    places = [x.data_ptr() for x in token.own()]
    token.load_state_dict(trained([1, 8]).state_dict())
    assert [x.data_ptr() for x in token.own()] == places and torch.equal(token(IDS), trained([1, 8])(IDS))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), ()])
def test_ids_of_any_shape(shape):
    token, ids = trained(), torch.full(shape, 9)
    assert torch.equal(token(ids), token.rows[0].expand(*shape, D))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_is_refused():
    with pytest.raises(
        RuntimeError, match=r"torch.jit.script: expected modules that TorchScript can compile, got TrainableRows"
    ):
        torch.jit.script(nn.Sequential(trained()))


def merged():
    return trained([0, 1]).merge()


def test_rows_alone_load_into_the_merged_module():
    """As a file of what was trained has them; a key that lacks its other is not dropped."""
    state = {name: x for name, x in trained().state_dict().items() if name != "weight"}
    module = nn.Sequential(merged())
    expected = module[0].weight.detach().index_copy(0, torch.tensor([9, 3]), state["rows"])
    given = {f"0.{name}": x for name, x in state.items()}
    found = module.load_state_dict(given, strict=False)
    assert found.missing_keys == ["0.weight"] and not found.unexpected_keys and torch.equal(module[0].weight, expected)
    assert set(given) == {"0.rows", "0.row_ids"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) .*\"0.weight\""):
        module.load_state_dict(given)
    for name in ("rows", "row_ids"):
        with pytest.raises(RuntimeError, match=rf"Unexpected key\(s\) .*\"{name}\""):
            merged().load_state_dict({"weight": expected, name: state[name]})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"row_ids": torch.tensor([3, 3])}, "row_ids: expected each id once"),
        ({"row_ids": torch.tensor([3, V])}, rf"row_ids: expected ids in \[0, {V}\)"),
        ({"rows": torch.zeros(3, D)}, r"rows: expected a shape \(2, 4\) for the ids of row_ids, got \(3, 4\)"),
    ],
)
def test_rows_that_do_not_fit_are_not_merged(change, text):
    with pytest.raises(RuntimeError, match=text):
        merged().load_state_dict(trained().state_dict() | change, strict=False)


def test_loading_of_another_dtype():
    module = merged()
    given = trained(dtype=torch.float64)
    module.load_state_dict(given.state_dict())
    assert torch.equal(module(IDS), given(IDS).float())
    module = merged()
    module.load_state_dict({name: x for name, x in given.state_dict().items() if name != "weight"}, strict=False)
    assert torch.equal(module(given.row_ids), given.rows.float())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.head = table(), nn.Linear(D, V, bias=False)

    def forward(self, ids):
        return self.head(self.token(ids))


def test_growth_and_report_want_one_table():
    """The table's rows at the ids of others are stale."""
    model = Model()
    model.token = TrainableRows(model.token, [3, 9])
    state = {name: x.clone() for name, x in model.state_dict().items()}
    for call in (lambda: grow(model, 2), lambda: report(model), lambda: grow(model, 2, tables=["token"], heads=["head"])):
        with pytest.raises(ValueError, match=r"got token, a TrainableRows: put what its merge\(\) returns in its place"):
            call()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    model.token = copy.deepcopy(model.token).merge()
    assert grow(model, 2).size == V + 2
