"""Table gradients: deterministic segment sums of any run length."""

import pytest
import torch
from conftest import DEVICE, DTYPES, examples, full
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_no_worse
from pyembed.kernels.table_grad import CHUNK

from pyembed.plans import operators


def table_grad(rows, ids, size, padding_idx=-1):
    module, running = operators.launcher("embed_grad", rows)
    with running:
        return module.table_grad(rows, ids, size, padding_idx)


def check(rows, ids, size):
    oracle = torch.zeros(size, rows.shape[1], dtype=torch.float64, device=rows.device).index_add_(0, ids, rows.double())
    eager = torch.ops.aten.embedding_dense_backward(rows, ids, size, -1, False)
    ours = table_grad(rows, ids, size)
    assert_no_worse("table gradient", ours, eager, oracle)
    assert torch.equal(ours, table_grad(rows, ids, size))


@pytest.mark.sample
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "ids",
    [
        [5],
        [5] * 64,
        [5] * 65,
        [2] * 63 + [3] * 2 + [4] * 63,
        [1] * 10 + [2] * 300 + [3],
        full(list(range(200))),
        [i // 7 for i in range(200)],
        full([0, 7] * 150),
    ],
    ids=["one", "a chunk", "a chunk and one", "across", "long", "distinct", "sevens", "two"],
)
def test_runs(ids, dtype):
    """Runs that fill, cross and span the chunks at which long runs are cut."""
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    ids = torch.tensor(ids)[order].to(DEVICE)
    check(torch.randn(len(ids), 20).to(dtype).to(DEVICE), ids, 200)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_repeats(dtype):
    """A half-precision sum of ones stops at 256 or 2,048 if it is kept in half precision."""
    grad = table_grad(torch.ones(1000, 8, dtype=dtype, device=DEVICE), torch.full((1000,), 2, device=DEVICE), 4)
    assert (grad[2] == 1000).all() and not grad[[0, 1, 3]].any()


@pytest.mark.sample
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [[5], [5] * 65, [1] * 10 + [2] * 300 + [3]], ids=["one", "a chunk and one", "long"])
def test_sums_are_added_to_what_is_there(ids, dtype):
    """To the rows that ids name, of which one is padding; the others are not touched."""
    g = torch.Generator().manual_seed(1)
    ids = torch.tensor([*ids, 7])[torch.randperm(len(ids) + 1, generator=g)].to(DEVICE)
    rows, there = (torch.randn(n, 20, generator=g).to(dtype).to(DEVICE) for n in (len(ids), 9))
    module, running = operators.launcher("embed_grad", rows)
    with running:
        found = module.table_grad(rows, ids, 9, 7, out=there.clone(), adds=True)
    sums = table_grad(rows.float(), ids, 9, 7)
    torch.testing.assert_close(found, (there.float() + sums).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(found[[0, 4, 6, 7, 8]], there[[0, 4, 6, 7, 8]])


def test_padding_and_unknown_ids():
    ids = torch.tensor([0, 1, 1, 2, -5, 9, 1] + [1] * 100 + [9] * 100, device=DEVICE)
    grad = table_grad(torch.ones(len(ids), 3, device=DEVICE), ids, 3, padding_idx=1)
    assert grad.tolist() == [[1.0] * 3, [0.0] * 3, [1.0] * 3]


@examples(8, full=25)
@given(st.integers(1, 6), st.integers(0, 400), st.integers(1, 30), st.integers(0, 99))
def test_any(size, M, D, seed):
    """Held against what its order of summation may lose at most: in sums so few, eager's error can be 0 by luck."""
    g = torch.Generator().manual_seed(seed)
    rows, ids = torch.randn(M, D, generator=g).to(DEVICE), torch.randint(size, (M,), generator=g).to(DEVICE)
    exact = rows.new_zeros(size, D, dtype=torch.float64).index_add_(0, ids, rows.double())
    magnitude = rows.new_zeros(size, D, dtype=torch.float64).index_add_(0, ids, rows.double().abs())
    longest = CHUNK + M // CHUNK
    wrong = (table_grad(rows, ids, size) - exact).abs()
    assert (wrong <= longest * torch.finfo(rows.dtype).eps * magnitude).all()
