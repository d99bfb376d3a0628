"""run.py's memory of calls stays small and fast, and what modules and arguments say is read anew in every call."""

import re
import warnings

import pytest
import torch
from conftest import DEVICE
from torch import nn

import pyembed
from pyembed import functional as F
from pyembed import run

V, D, L = 11, 8, 40


def count():
    """Signatures that are remembered."""
    return sum(len(runners) for kind in run._kinds.values() for runners in kind.runners.values())


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(run, "_kinds", {})


@pytest.mark.parametrize("kind", ["TokenPositionEmbedding", "EmbeddingQKV"])
def test_a_decode_over_columns_of_a_batch_is_one_signature(kind):
    """`ids[:, step : step + 1]` has other strides and another address in each step, and a batch that grows other strides."""
    module = pyembed.TokenPositionEmbedding(V, D, L) if kind != "EmbeddingQKV" else pyembed.EmbeddingQKV(V, D, 2, max_length=L)
    module = module.to(DEVICE).requires_grad_(False)
    counts = set()
    for length in range(3, 20):
        ids = torch.randint(V, (2, length), device=DEVICE)
        position_ids = torch.full((2, length), length, device=DEVICE)[:, -1:]
        module(ids[:, -1:], position_ids)
        counts.add(count())
    assert len(counts) == 1


def test_signatures_under_one_key_are_bounded():
    for rows in range(3, 3 + 3 * run.UNDER_ONE_KEY):
        F.embed(torch.tensor([2], device=DEVICE), torch.randn(3, D, device=DEVICE), torch.randn(rows, D, device=DEVICE))
    assert count() == run.UNDER_ONE_KEY


def test_many_tables_are_all_remembered():
    """A recommender looks up ids of one shape in dozens of tables."""
    ids, tables = torch.tensor([2], device=DEVICE), [torch.randn(rows, D, device=DEVICE) for rows in range(3, 43)]
    counts = []
    for _ in range(2):
        for table in tables:
            assert torch.equal(F.embed(ids, table), table[ids])
        counts.append(count())
    assert counts == [len(tables)] * 2


def test_one_tensor_in_two_places():
    """Of a table of positions and a Rotary the ids are one tensor; a call with two tensors is another signature."""
    front = pyembed.EmbeddingQKV(V, D, 2, max_length=L, rotary=pyembed.Rotary(4, L)).to(DEVICE).requires_grad_(False)
    ids = torch.randint(V, (2, 3), device=DEVICE)
    counts = set()
    for first in range(5):
        places = torch.arange(first, first + 3, device=DEVICE)
        with pyembed.plan("distinct"):
            expected = front(ids, places)
        for got, wanted in zip(front(ids, places), expected, strict=True):
            torch.testing.assert_close(got, wanted)
        counts.add(count())
    assert len(counts) == 1
    table, other = torch.randn(2, 5, D, device=DEVICE)
    near = torch.arange(4, device=DEVICE)
    for _ in range(2):
        assert torch.equal(F.embed(near, table, table), 2 * table[:4])
        assert torch.equal(F.embed(near, table, other), table[:4] + other[:4])


@pytest.mark.parametrize("kind", ["TokenPositionEmbedding", "EmbeddingQKV", "scaled"])
def test_a_padding_row_that_is_set_later(kind):
    if kind == "TokenPositionEmbedding":
        module = pyembed.TokenPositionEmbedding(V, D, L)
    else:
        module = pyembed.EmbeddingQKV(V, D, 2, max_length=L, scale=2.0 if kind == "scaled" else None)
    module, ids = module.to(DEVICE), torch.tensor([V - 1, 0], device=DEVICE)
    for padding_idx in (None, -1, V - 1, -V):
        module.token.padding_idx = padding_idx
        module.zero_grad()
        found = module(ids)
        (found if kind == "TokenPositionEmbedding" else found.hidden).sum().backward()
        grad, row = module.token.weight.grad, None if padding_idx is None else padding_idx % V
        assert [bool(grad[i].any()) for i in (V - 1, 0)] == [row != V - 1, row != 0]
    module.token.padding_idx = V
    with pytest.raises(ValueError, match=rf"padding_idx: expected a row in \[-{V}, {V}\), got {V}"):
        module(ids)


@pytest.mark.skipif(DEVICE == "cuda", reason="PyTorch's operators assert on a GPU")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_tables_of_integers(dtype):
    """They have rows like any other, and are no steps of computed sines."""
    table, ids = torch.arange(5 * D).view(5, D).to(dtype), torch.tensor([7, 1])
    assert torch.equal(F.embedding(ids, table, id_policy="clamp"), table[[4, 1]])
    assert torch.equal(F.embedding(ids, table, id_policy="zero"), torch.stack([table[0] * 0, table[1]]))
    with pytest.raises(IndexError, match=r"ids: expected values in \[0, 5\), the rows of weight; got 7 at \(0,\)"):
        F.embedding(ids, table)


@pytest.mark.parametrize("token", [None, "a", 3, [1.0]])
def test_a_table_that_is_no_tensor(token):
    ids, weight = torch.tensor([0], device=DEVICE), torch.randn(12, D, device=DEVICE)
    for name, call in (
        ("weight", lambda: F.embedding(ids, token)),
        ("token", lambda: F.embed(ids, token)),
        ("token", lambda: F.embed(ids, token, padding_idx=0)),
        ("token", lambda: F.embed_qkv(ids, token, weight, num_heads=2)),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected a Tensor, got {type(token).__name__}"):
            call()


@pytest.mark.skipif(DEVICE == "cuda", reason="autocast of a CPU")
def test_query_biases_beside_a_weight_of_autocasts_dtype():
    ids, token, weight = torch.randint(V, (2, 3)), torch.randn(V, D), torch.randn(24, D, dtype=torch.bfloat16)
    pair = torch.randn(2, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.embed_qkv(ids, token, weight, num_heads=2).query
        found = F.embed_qkv(ids, token, weight, num_heads=2, query_biases=pair).query
    torch.testing.assert_close(found, torch.stack([plain + u.to(plain.dtype) for u in pair]), atol=0.05, rtol=0.02)
    token, linears = nn.Embedding(V, D), [nn.Linear(D, D) for _ in range(3)]  # so few tokens that these are called
    front = pyembed.EmbeddingQKV.from_modules(token, None, None, qkv=tuple(linears), num_heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert [x.dtype for x in front(ids, query_biases=pair)[1:]] == [torch.bfloat16] * 3


class OwnNorm(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def test_query_biases_of_modules_that_are_called():
    token, norm, linears = nn.Embedding(V, D), OwnNorm(D), [nn.Linear(D, D) for _ in range(3)]
    front = pyembed.EmbeddingQKV.from_modules(token, None, norm, qkv=tuple(linears), num_heads=2).to(DEVICE)
    ids, pair = torch.randint(V, (2, 3), device=DEVICE), [torch.randn(2, 4, device=DEVICE) for _ in range(2)]
    query = linears[0](norm(token(ids))).view(2, 3, 2, 4)
    torch.testing.assert_close(front(ids, query_biases=tuple(pair)).query, torch.stack([query + u for u in pair]))
    with pytest.raises(ValueError, match=r"query_biases: expected shape \(2, 4\), \(num_heads, head_dim\); got \(2, 3\)"):
        front(ids, query_biases=(pair[0][:, :3], pair[1]))


def test_modules_side_by_side_are_called():
    """A hook of the positions, and another module in place of the dropout."""
    module, ran = pyembed.TokenPositionEmbedding(V, D, L, combine="concat").to(DEVICE), []
    module.position.register_forward_hook(lambda *_: ran.append(1))
    module.dropout = nn.Identity()
    ids = torch.randint(V, (2, 3), device=DEVICE)
    expected = torch.cat([module.token.weight[ids], module.position.weight[:3].expand(2, 3, D)], -1)
    assert torch.equal(module(ids), expected) and ran


@pytest.mark.parametrize(
    "asked, named",
    [
        ({"plan": "distinct"}, r"pyembed\.plan\('distinct'\) has no effect"),
        ({"backend": "triton"}, r"pyembed\.backend\('triton'\) has no effect"),
        ({"backend": "torch"}, None),  # which is what runs
        ({}, None),
    ],
    ids=str,
)
def test_what_was_asked_for_and_has_no_effect_is_said_once(asked, named, monkeypatch):
    monkeypatch.setattr(run, "_warned", [])
    front = pyembed.EmbeddingQKV(V, D, 2).to(DEVICE)
    front.token.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (3, 4, 5):
            ids = torch.zeros(2, length, dtype=torch.long, device=DEVICE)
            with pyembed.plan(asked.get("plan", "auto")), pyembed.backend(asked.get("backend", "auto")):
                front(ids)
    found = [str(each.message) for each in caught if "has no effect" in str(each.message)]
    assert len(found) == (named is not None)
    if named:
        assert re.match(named, found[0]) and "explain(ids)" in found[0]
