"""Rows that train beside a frozen table, and rows that are no words: forward and backward, beside what is done without them."""

import pytest
import torch
import torch.nn.functional as nnf
from torch import nn

from pyembed.benchmark.peers import check, gradients
from pyembed.benchmark.timing import Variant, clock, compare
from pyembed.functional import embed
from pyembed.vocabulary import Rows, TrainableRows

R, V, D = 16, 50_257, 768


def measured(variants, reference, device):
    """(rows, left out), after all have given what `reference` gives."""
    grads = gradients(variants, True)
    left_out = check(variants, grads, reference)
    return compare(variants, grads, clock(device), seconds=3), left_out


@pytest.mark.parametrize("M", [4096])
def test_rows_that_train(record, device, M):
    def run():
        table, first = nn.Embedding(V, D, device=device), V - R
        ids = torch.randint(V, (M,), device=device)
        ids[::8] = torch.randint(first, V, (len(ids[::8]),), device=device)
        masked, rows = nn.Embedding(V, D, _weight=table.weight.detach().clone()), nn.Parameter(table.weight[first:].clone())
        mask = (torch.arange(V, device=device) >= first).unsqueeze(-1)
        masked.weight.register_hook(lambda grad: grad.mul_(mask))
        ours = TrainableRows(table, range(first, V))

        def two_tables():
            slot = ids - first
            own = nnf.embedding(slot.clamp(min=0), rows)
            return (torch.where((slot >= 0).unsqueeze(-1), own, nnf.embedding(ids, table.weight)),)

        variants = {
            "two tables": Variant(two_tables, [rows]),
            "pyembed": Variant(lambda: (ours(ids),), [ours.rows]),
            # Not compared: its gradient is of the whole table.
            "gradient mask": Variant(lambda: (masked(ids),), [masked.weight], checked=False),
        }
        return measured(variants, "two tables", device)

    record(run, suite="vocabulary", direction="training", case=f"{R} rows train, {M:,} tokens, {V:,} × {D:,}")


@pytest.mark.parametrize("B, T, each", [(4, 1024, 576)])
def test_rows_that_are_no_words(record, device, B, T, each):
    def run():
        weight = torch.randn(V, D, device=device)
        ids = torch.randint(1, V, (B, T), device=device)
        ids[:, 8 : 8 + each] = 0
        rows = torch.randn(B * each, D, device=device, requires_grad=True)

        def cumsum_where():
            taken = ids == 0
            slot = (taken.view(-1).cumsum(0) - 1).clamp(0).view(B, T)
            return (torch.where(taken.unsqueeze(-1), nnf.embedding(slot, rows), nnf.embedding(ids, weight)),)

        calls = {
            "masked_scatter": lambda: (nnf.embedding(ids, weight).masked_scatter((ids == 0).unsqueeze(-1), rows),),
            "cumsum + where": cumsum_where,
            "pyembed": lambda: (embed(ids, weight, rows=Rows(rows, 0)),),
        }
        return measured({name: Variant(call, [rows]) for name, call in calls.items()}, "masked_scatter", device)

    record(run, suite="vocabulary", direction="training", case=f"{each} rows in each of {B} × {T:,}")
