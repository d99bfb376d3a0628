"""TokenPositionEmbedding over the modules of a model that exists."""

import pytest
import torch
from conftest import DEVICE
from torch import nn

import pyembed


class Offset(nn.Embedding):
    """As OPT's, whose first two rows belong to no position."""

    def forward(self, ids):
        return super().forward(ids + 2)


class OfLengths(nn.Embedding):
    """What takes something else than positions."""

    def forward(self, lengths, device):
        return super().forward(torch.arange(lengths.max(), device=device))


class Wrapper(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, ids):
        return 2 * self.base(ids)


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("position", [nn.Embedding, Offset])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.filterwarnings("ignore:.*has no effect on this call")
def test_from_modules(wraps, position, backend):
    token, segment, position = nn.Embedding(11, 8, padding_idx=1), nn.Embedding(2, 8), position(9, 8)
    token = Wrapper(token) if wraps else token
    model = nn.ModuleList([token, position, segment]).to(DEVICE)
    sums = pyembed.TokenPositionEmbedding.from_modules(token, position, segment=segment)
    assert sums.token is token and sums.position is position and sums.segment is segment
    ids, segments = torch.randint(11, (2, 5), device=DEVICE), torch.randint(2, (2, 5), device=DEVICE)
    with pyembed.backend(backend):
        found = sums(ids, segment_ids=segments)
    expected = token(ids) + position(torch.arange(5, device=DEVICE)) + segment(segments)
    torch.testing.assert_close(found, expected)
    incoming, weights = torch.randn_like(found), list(model.parameters())
    ours, theirs = (torch.autograd.grad(out, weights, incoming) for out in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_dropout_is_the_models():
    token, dropout = nn.Embedding(11, 8), nn.Dropout(0.5)
    sums, ids = pyembed.TokenPositionEmbedding.from_modules(token, dropout=dropout), torch.arange(11)
    assert (sums(ids) == 0).any()
    dropout.eval()
    assert torch.equal(sums(ids), token(ids))
    assert torch.equal(pyembed.TokenPositionEmbedding.from_modules(token)(ids), token(ids))


def test_a_part_may_be_replaced():
    sums, ids = pyembed.TokenPositionEmbedding(11, 8, 9), torch.arange(9)
    sums.token = nn.Embedding(11, 8, padding_idx=3)
    assert torch.equal(sums(ids), sums.token(ids) + sums.position(ids))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"token": nn.Linear(8, 8)}, TypeError, "token: expected an nn.Embedding, got nn.Linear"),
        ({"token": None}, TypeError, "token: expected an nn.Embedding, got NoneType"),
        ({"position": 9}, TypeError, "position: expected an nn.Embedding or None, got int"),
        ({"position": OfLengths(9, 8)}, TypeError, "position: expected a module whose forward looks up rows by position"),
        ({"segment": nn.Linear(8, 8)}, TypeError, "segment: expected an nn.Embedding or None, got nn.Linear"),
        ({"dropout": 0.1}, TypeError, "dropout: expected an nn.Dropout or None, got float"),
        ({"dropout": nn.AlphaDropout()}, RuntimeError, "dropout: expected an nn.Dropout without hooks"),
        ({"combine": "concat"}, ValueError, "combine: expected 'sum' where there are no positions"),
        ({"combine": "mean"}, ValueError, "combine: expected one of"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_from_modules_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        pyembed.TokenPositionEmbedding.from_modules(**({"token": nn.Embedding(11, 8)} | arguments))
