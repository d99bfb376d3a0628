"""The kinds of position that a front end adds to its tokens."""

import torch
from torch import nn


def sinusoidal_table(max_length: int, embedding_dim: int, base: float = 10_000.0) -> torch.Tensor:
    """(max_length, embedding_dim) float32: sin(t·base^(−2i/D)) in column 2i, cos in column 2i+1, as in Vaswani et al. 2017.

    Angles in float64. An odd width ends with a sine.
    """
    frequency = base ** (-torch.arange(0, embedding_dim, 2, dtype=torch.float64) / embedding_dim)
    angle = torch.outer(torch.arange(max_length, dtype=torch.float64), frequency)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[:, :embedding_dim].float()


class Sinusoidal(nn.Module):
    """A fixed table of positions; `weight` (max_length, embedding_dim) is a buffer that state_dict leaves out."""

    def __init__(self, max_length: int, embedding_dim: int, device=None, dtype=None):
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        self.register_buffer("weight", sinusoidal_table(max_length, embedding_dim).to(device, dtype), persistent=False)

    def forward(self, position_ids):
        return nn.functional.embedding(position_ids, self.weight)

    def extra_repr(self):
        return ", ".join(map(str, self.weight.shape))


def make(kind: str | None, max_length: int, embedding_dim: int, device=None, dtype=None) -> nn.Module | None:
    """The module behind position="learned" | "sinusoidal" | None. ValueError: another kind."""
    if kind is None:
        return None
    if kind == "learned":
        return nn.Embedding(max_length, embedding_dim, device=device, dtype=dtype)
    if kind == "sinusoidal":
        return Sinusoidal(max_length, embedding_dim, device=device, dtype=dtype)
    raise ValueError(f"position: expected 'learned', 'sinusoidal' or None, got {kind!r}")
