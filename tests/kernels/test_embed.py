"""Gather and positional add: bit for bit eager's."""

import pytest
import torch
from conftest import DEVICE, DTYPES, examples, full
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_no_worse, guarded

import pyembed
from pyembed import functional as F
from pyembed import reference
from pyembed.call import HIDDEN, Call, Terms
from pyembed.plans import one_pass, operators

pytestmark = pytest.mark.usefixtures("triton")


@pytest.mark.sample
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64] if DEVICE == "cpu" else DTYPES)
@pytest.mark.parametrize("D", [1, 3, 16, 100, 1100])
@pytest.mark.parametrize("position", [True, False])
def test_equals_eager(dtype, D, position):
    token, table = (guarded(torch.randn(n, D).to(dtype).to(DEVICE)) for n in (23, 40))
    ids = guarded(torch.randint(23, (3, 37)).to(DEVICE))
    table = table if position else None
    assert torch.equal(F.embed(ids, token, table), reference.embed(ids, token, table))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (0,), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_ids_of_any_shape(shape, ids_dtype):
    token, table = torch.randn(9, 5, device=DEVICE), torch.randn(6, 5, device=DEVICE)
    ids = torch.randint(9, shape, device=DEVICE).to(ids_dtype)
    assert torch.equal(F.embedding(ids, token), torch.nn.functional.embedding(ids, token))
    assert torch.equal(F.embed(ids, token, table), reference.embed(ids, token, table))


@pytest.mark.sample
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position_ids", [None, "T", full("1T"), "BT"])
@pytest.mark.parametrize("padding_idx", [None, 0, -2])
def test_gradients(dtype, position_ids, padding_idx, device):
    ids = torch.randint(7, (4, 90), device=device)
    shapes = {"T": (90,), "1T": (1, 90), "BT": (4, 90)}
    places = None if position_ids is None else torch.randint(95, shapes[position_ids], device=device)
    token, table = torch.randn(7, 12).to(dtype).to(device), torch.randn(95, 12).to(dtype).to(device)
    grad = torch.randn(4, 90, 12).to(dtype).to(device)
    found = []
    for function, kind in ((F.embed, dtype), (reference.embed, dtype), (reference.embed, torch.float64)):
        leaves = [t.detach().to(kind).requires_grad_() for t in (token, table)]
        function(ids, *leaves, places, padding_idx=padding_idx).backward(grad.to(kind))
        found.append([leaf.grad for leaf in leaves])
    for name, ours, eager, oracle in zip(("token", "position"), *found, strict=True):
        assert_no_worse(name, ours, eager, oracle)


def test_frozen_tables_cost_nothing(device, monkeypatch):
    module, _ = operators.launcher("embed_grad", torch.empty(0, device=device))
    monkeypatch.setattr(module, "table_grad", lambda *a, **k: pytest.fail("the gradient of the token table was computed"))
    token, position = torch.randn(7, 6, device=device), torch.randn(5, 6, device=device, requires_grad=True)
    F.embed(torch.tensor([[1, 2, 1]], device=device), token, position).sum().backward()
    assert position.grad[:, 0].tolist() == [1, 1, 1, 0, 0]


def test_views_that_are_to_be_negated(device):
    """Their memory has the other sign, which no kernel knows."""
    ids, token = torch.tensor([[1, 2, 1]], device=device), torch.randn(7, 6, device=device)
    weight = torch.randn(12, 6, device=device)
    for _ in range(2):
        negated = torch._neg_view(token)
        assert negated.is_neg() and torch.equal(negated, -token)
        assert torch.equal(F.embedding(ids, negated), -token[ids]) and torch.equal(F.embed(ids, negated), -token[ids])
        torch.testing.assert_close(
            F.embed_qkv(ids, negated, weight, num_heads=1).query, F.embed_qkv(ids, -token, weight, num_heads=1).query
        )
        assert torch.equal(F.embed(ids, token), token[ids])


def test_signed_zero_and_infinity_pass(device):
    token = torch.tensor([[-0.0, float("inf")], [float("-inf"), 0.0]], device=device)
    out = F.embedding(torch.tensor([1, 0], device=device), token)
    assert out.tolist() == [[float("-inf"), 0.0], [-0.0, float("inf")]] and out[1, 0].signbit()


def test_golden(device):
    """The sum of a token vector and a position vector, by hand."""
    token = torch.tensor([[0.5, -0.2, 0.1]], device=device)
    position = torch.tensor([[0.1, 0.3, -0.1]], device=device)
    torch.testing.assert_close(
        F.embed(torch.tensor([0], device=device), token, position), torch.tensor([[0.6, 0.1, 0.0]], device=device)
    )


def test_table_beyond_two_gigabytes_of_elements(device):
    pytest.importorskip("numpy")
    if device == "cuda":
        token = torch.zeros(131_080, 16_384, dtype=torch.float16, device=device)
    else:  # a sparse file: a few pages of memory
        import tempfile

        import numpy

        with tempfile.NamedTemporaryFile() as file:
            token = torch.from_numpy(numpy.memmap(file.name, numpy.float16, "w+", shape=(131_080, 16_384)))
    token[131_079, ::7] = 3.0
    assert token.numel() > 2**31
    out = F.embedding(torch.tensor([0, 131_079], device=device), token)
    assert torch.equal(out, token[[0, 131_079]])


@examples(10, full=30)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 30), st.sampled_from(DTYPES), st.integers(0, 99))
def test_any_shape(V, D, M, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    token = torch.randn(V, D, generator=g).to(dtype).to(DEVICE)
    ids = torch.randint(V, (M,), generator=g).to(DEVICE)
    with pyembed.backend("triton"):
        assert torch.equal(F.embedding(ids, token), token[ids])


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_an_id_without_a_row_is_nan_by_the_kernel(bad):
    """On a GPU nothing looks at ids: their rows become NaN there, whichever table lacks them, and no other row."""
    ids, fine = torch.tensor([[0, bad, 2]], device=DEVICE), torch.tensor([[0, 1, 2]], device=DEVICE)
    token, others = torch.randn(3, 6, device=DEVICE), torch.randn(3, 6, device=DEVICE)
    calls = [
        Terms(ids, token),
        Terms(fine, token, position=others, position_ids=ids),
        Terms(fine, token, segment=others, segment_ids=ids),
    ]
    for terms in calls:
        hidden = one_pass.embed(*HIDDEN.flatten(Call(terms, id_policy="trust")))
        assert hidden[0, 1].isnan().all() and hidden[0, ::2].isfinite().all()
