"""The modules without a projection: nn.Embedding, and its sum with positions."""

import torch
from torch import Tensor, nn

from . import functional as F
from . import planner, positions

COMBINES = ("sum", "concat")


class Embedding(nn.Embedding):
    """torch.nn.Embedding: same constructor, same weights from the same seed, same state_dict, same result.

    What the kernels do not serve (max_norm, scale_grad_by_freq, sparse, other dtypes) runs by PyTorch's operator; explain
    says which serves.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input: ids (...) int32 or int64 -> (..., embedding_dim). IndexError: an id outside the table."""
        if torch.jit.is_scripting():
            return nn.functional.embedding(
                input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
            )
        return F.embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )

    def explain(self, ids: Tensor) -> planner.Plan:
        """Which operator a call with these ids would run now, "triton" (pyembed::embed) or "torch" (aten::embedding), and why.

        Nothing runs. Errors as in forward, but for ids outside the table.
        """
        weight = self.weight
        why = F.unkernelled(ids, weight, self.max_norm, self.scale_grad_by_freq, self.sparse) or planner.why_torch(weight)
        return planner.Plan("torch", why, {}) if why else planner.Plan("triton", f"a kernel for {weight.dtype}", {})


class TokenPositionEmbedding(nn.Module):
    """dropout(scale·token(ids) + position(position_ids)): the input of GPT-2 and its like.

    position: "learned" (parameter position.weight), "sinusoidal" or "sinusoidal:" and a convention of positions.CONVENTIONS (a
    buffer outside of state_dict), or None. max_length: rows of the position table. combine: "sum", or "concat", token row
    before position row, 2·embedding_dim wide. scale: of the token row (√embedding_dim in Vaswani et al. 2017), by PyTorch's
    operators as "concat" is; None: no product at all. ValueError: another kind, or nothing to concatenate.
    """

    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        max_length,
        position="learned",
        combine="sum",
        dropout=0.0,
        padding_idx=None,
        scale=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if combine not in COMBINES:
            raise ValueError(f"combine: expected one of {COMBINES}, got {combine!r}")
        if combine == "concat" and position is None:
            raise ValueError("position: expected a kind where combine is 'concat', got None")
        self.token = Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.position = positions.make(position, max_length, embedding_dim, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.combine, self.scale = combine, scale

    def forward(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """ids (..., T), position_ids (T,), (1, T) or like ids, None: 0 … T−1 -> hidden (..., T, embedding_dim)."""
        position = None if self.position is None else self.position.weight
        if self.combine == "sum" and self.scale is None:
            return self.dropout(F.embed(ids, self.token.weight, position, position_ids, padding_idx=self.token.padding_idx))
        F.check_ids(ids, self.token.weight, position, position_ids)
        rows = self.token(ids) if self.scale is None else self.token(ids) * self.scale
        if position is None:
            return self.dropout(rows)
        if position_ids is None:
            position_ids = positions.from_offset(0, ids.shape[-1], ids.device) if ids.dim() else torch.zeros_like(ids)
        places = F.embedding(position_ids, position)
        both = rows + places if self.combine == "sum" else torch.cat([rows, places.expand_as(rows)], -1)
        return self.dropout(both)

    def extra_repr(self):
        return f"combine={self.combine!r}" + ("" if self.scale is None else f", scale={self.scale}")
