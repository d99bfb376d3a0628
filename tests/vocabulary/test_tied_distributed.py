"""A table tied to its head, in torch.distributed: two processes train as one does with PyTorch's own modules."""

import copy

import processes
import pytest
import torch
import torch.nn.functional as nnf
from processes import whole
from torch import nn
from torch.distributed.fsdp import fully_shard

import pyembed
from pyembed import tied
from pyembed.vocabulary import linear_cross_entropy

V, D, B, T = 64, 16, 4, 8


class Stock(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.layer = nn.Embedding(V, D), nn.Linear(D, D)

    def forward(self, ids, target):
        hidden = self.layer(self.token(ids)).tanh()
        return nnf.cross_entropy(nnf.linear(hidden, self.token.weight).flatten(0, 1), target.flatten())


class Ours(Stock):
    def __init__(self):
        super().__init__()
        self.token = pyembed.Embedding(V, D)

    def forward(self, ids, target):
        return linear_cross_entropy(self.layer(self.token(ids)).tanh(), self.token.weight, target)


def steps(wrap, rank, n, monkeypatch):
    one, several, added = Stock(), Ours(), []
    several.load_state_dict(one.state_dict())
    wrapped = wrap(copy.deepcopy(several))
    monkeypatch.setattr(tied, "add_rows", lambda *args, add=tied.add_rows: added.append(1) or add(*args))
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (one, wrapped)]
    rows = slice(rank * B // n, (rank + 1) * B // n)
    for _ in range(3):
        ids, target = torch.randint(V, (2, B, T))
        for model, part in ((one, slice(None)), (wrapped, rows)):
            model.zero_grad()
            model(ids[part], target[part]).backward()
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(wrapped.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(whole(ours), theirs, rtol=1e-5, atol=1e-6)
    assert len(added) == 2


def ddp_and_fsdp(rank, n, folder):
    for wrap in (nn.parallel.DistributedDataParallel, fully_shard):
        with pytest.MonkeyPatch.context() as monkeypatch:
            steps(wrap, rank, n, monkeypatch)


@pytest.mark.full
def test_equals_one_process(tmp_path, monkeypatch):
    processes.run([ddp_and_fsdp], 2, tmp_path, monkeypatch)
