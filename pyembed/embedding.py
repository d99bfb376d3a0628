"""The modules without a projection: nn.Embedding, and its sum with positions."""

from torch import Tensor, nn

from . import functional as F
from . import positions


class Embedding(nn.Embedding):
    """torch.nn.Embedding: same constructor, same weights from the same seed, same state_dict, same result.

    What the kernels do not serve (max_norm, scale_grad_by_freq, sparse, integer tables) runs by PyTorch's operator.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) int32 or int64 -> (..., embedding_dim). IndexError: an id outside the table."""
        plain = self.max_norm is None and not self.scale_grad_by_freq and not self.sparse
        if plain and self.weight.is_floating_point():
            return F.embedding(ids, self.weight, self.padding_idx)
        return super().forward(ids)


class TokenPositionEmbedding(nn.Module):
    """dropout(token(ids) + position(position_ids)): the input of GPT-2 and its like.

    position: "learned" (parameter position.weight), "sinusoidal" (Vaswani et al. 2017; a buffer outside of state_dict) or
    None. max_length: rows of the position table.
    """

    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        max_length,
        position="learned",
        dropout=0.0,
        padding_idx=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.token = Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.position = positions.make(position, max_length, embedding_dim, device, dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """ids (..., T), position_ids (T,), (1, T) or like ids, None: 0 … T−1 -> hidden (..., T, embedding_dim)."""
        position = None if self.position is None else self.position.weight
        return self.dropout(F.embed(ids, self.token.weight, position, position_ids, padding_idx=self.token.padding_idx))
