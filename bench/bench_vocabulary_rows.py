"""Rows that train beside a frozen table, and rows that are no words: forward and backward, beside what is done without them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timing import Variant, clock, compare
from torch import nn

from pyembed.functional import embed
from pyembed.vocabulary import Rows, TrainableRows

R = 16


@pytest.mark.parametrize(("V", "D", "M"), [(50_257, 768, 4096)], ids=lambda n: str(n))
def test_rows_that_train(record, device, V, D, M):
    table = nn.Embedding(V, D, device=device)
    masked = nn.Embedding(V, D, device=device)
    ids, grad = torch.randint(V, (M,), device=device), torch.randn(M, D, device=device)
    ids[::8] = torch.arange(V - R, V, device=device).repeat(M // 8 // R + 1)[: len(ids[::8])]
    mask = torch.zeros(V, 1, device=device).index_fill_(0, torch.arange(V - R, V, device=device), 1.0)
    ours = TrainableRows(table, range(V - R, V))
    rows = nn.Parameter(torch.randn(R, D, device=device))

    def two_tables(ids):
        slot = ids - (V - R)
        return torch.where((slot >= 0).unsqueeze(-1), F.embedding(slot.clamp(min=0), rows), F.embedding(ids, table.weight))

    @torch.enable_grad()
    def step(call, weight, after=None):
        call(ids).backward(grad)
        if after is not None:
            weight.grad.mul_(after)
        weight.grad = None

    def run():
        variants = {
            "pyembed": partial(step, ours, ours.rows),
            "two tables": partial(step, two_tables, rows),
            "gradient mask": partial(step, masked, masked.weight, mask),
        }
        variants = {name: Variant(call, []) for name, call in variants.items()}
        return compare(variants, None, clock(device), seconds=3), {}

    record(run, suite="vocabulary", direction="forward", case=f"{R} rows train, {M:,} tokens, {V:,} × {D:,}, with backward")


@pytest.mark.parametrize(("B", "T", "D", "each"), [(4, 1024, 768, 576)], ids=lambda n: str(n))
def test_rows_that_are_no_words(record, device, B, T, D, each):
    V = 50_257
    weight = torch.randn(V, D, device=device)
    ids, grad = torch.randint(1, V, (B, T), device=device), torch.randn(B, T, D, device=device)
    ids[:, 8 : 8 + each] = 0
    rows = torch.randn(B * each, D, device=device, requires_grad=True)

    def masked_scatter():
        return F.embedding(ids, weight).masked_scatter((ids == 0).unsqueeze(-1), rows)

    def cumsum_where():
        taken = (ids == 0).view(-1)
        slot = (taken.cumsum(0) - 1).clamp(0)
        return torch.where(taken.view(B, T, 1), F.embedding(slot.view(B, T), rows), F.embedding(ids, weight))

    @torch.enable_grad()
    def step(call):
        call().backward(grad)
        rows.grad = None

    def run():
        calls = {
            "pyembed": lambda: embed(ids, weight, rows=Rows(rows, 0)),
            "masked_scatter": masked_scatter,
            "cumsum + where": cumsum_where,
        }
        variants = {name: Variant(partial(step, call), []) for name, call in calls.items()}
        return compare(variants, None, clock(device), seconds=3), {}

    record(run, suite="vocabulary", direction="forward", case=f"{each} rows in each of {B} × {T:,}, with backward")
