"""Position tables, against the formulas of their papers."""

import math

import pytest
import torch

from pyembed import positions


@pytest.mark.parametrize("D", [1, 2, 7, 64])
def test_sinusoidal_is_the_papers(D):
    """PE(t, 2i) = sin(t / 10000^(2i/D)), PE(t, 2i+1) = cos(t / 10000^(2i/D)): Vaswani et al. 2017, section 3.5."""
    table = positions.sinusoidal_table(50, D)
    for t in (0, 1, 17, 49):
        for j in range(D):
            angle = t / 10000 ** (2 * (j // 2) / D)
            assert table[t, j].item() == pytest.approx(math.sin(angle) if j % 2 == 0 else math.cos(angle), abs=1e-7)
    assert table.shape == (50, D) and table.abs().max() <= 1


def test_far_positions_keep_their_digits():
    """In float32 the angle of position 100,000 would be off by 4e-3."""
    table = positions.sinusoidal_table(100_001, 4)
    assert table[100_000, 0].item() == pytest.approx(math.sin(100_000), abs=1e-6)


def test_kinds():
    assert positions.make(None, 4, 2) is None
    assert isinstance(positions.make("learned", 4, 2), torch.nn.Embedding)
    fixed = positions.make("sinusoidal", 4, 2)
    assert not fixed.state_dict() and not list(fixed.parameters())
    assert torch.equal(fixed(torch.tensor([3])), fixed.weight[3:])
    with pytest.raises(ValueError, match="position: expected 'learned', 'sinusoidal' or None, got 'fourier'"):
        positions.make("fourier", 4, 2)
