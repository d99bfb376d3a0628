"""What launchers take, and how their kernels take it: the terms that hidden is the sum of, and the projection's epilogue."""

from typing import NamedTuple

from torch import Tensor

from .tuning import dense

# Triton 3.6 cannot compare a tuple that holds None with None: its parts are None instead.
NO_SEGMENT, NO_TURNS = (None,) * 4, (None,) * 6


class Terms(NamedTuple):
    """Of hidden = dropout(scale·token[ids] + segment[segment_ids] + position[places]); what is None is no part of it."""

    position: Tensor | None = None  # (L, D), or int64 (2, D), which tiles.wave takes: any place has a row
    position_ids: Tensor | None = None  # (T,) or (M,): each token's place; None: its place in the sequence
    segment: Tensor | None = None  # (S, D)
    segment_ids: Tensor | None = None  # (T,) or (M,); None: all are 0
    scale: float | None = None
    seed: Tensor | None = None  # (1,) int64, of the dropout
    probability: float = 0.0  # that an element is dropped
    report: tuple | None = None  # of tiles.report_absent; None: a row that is absent is NaN, and nothing more

    def period(self, T):
        """After how many tokens positions begin anew."""
        return T if self.position_ids is None else self.position_ids.numel()

    @property
    def places(self):
        """Rows of the position table."""
        if self.position is None:
            return 0
        return self.position.shape[0] if self.position.is_floating_point() else 2**31 - 1

    @property
    def are_many(self):
        """Whether they cost more than to read hidden back."""
        computed = self.position is not None and not self.position.is_floating_point()
        return computed or any(term is not None for term in (self.segment, self.scale, self.seed))

    @property
    def dropout(self):
        factor = 0.0 if self.probability == 1 else 1 / (1 - self.probability)
        return None if self.seed is None else (self.seed, self.probability, factor)

    def arguments(self):
        """As kernels take them: see tiles.find_rows."""
        position_ids, position, segment_ids, segment = dense(self.position_ids, self.position, self.segment_ids, self.segment)
        number = 1 if segment_ids is None else segment_ids.numel()
        segment = NO_SEGMENT if segment is None else (segment_ids, number, segment, segment.shape[0])
        return position_ids, position, segment, self.scale, self.dropout, self.report


class Epilogue(NamedTuple):
    """What becomes of query and key once they are projected."""

    query_norm: Tensor | None = None  # (d_h,) RMSNorm of each head
    key_norm: Tensor | None = None
    head_eps: float = 0.0
    second: Tensor | None = None  # (n,) added to query for a second one; not with rotary
    rotary: tuple | None = None  # cos, sin (rows, R/2), each token's row (T,) or (M,) or None, whether pairs are neighbours
    heads_first: bool = False  # (..., h, T, d_h)

    def shapes(self, ids_shape, heads, head_dim):
        """Shapes of query, key and value."""
        shapes = []
        for h in heads:
            own = (*ids_shape[:-1], h, *ids_shape[-1:], head_dim) if self.heads_first else (*ids_shape, h, head_dim)
            shapes.append((2, *own) if self.second is not None and not shapes else own)
        return shapes

    def needs(self, head_dim):
        """Whether it needs registers beyond those of a bias, and the width of heads that a tile must hold whole."""
        apart = self.rotary is not None and not self.rotary[3]  # pairs that do not stand side by side
        return apart or self.heads_first or self.query_norm is not None, head_dim if self.query_norm is not None else 0

    def arguments(self, T, head_dim):
        """As kernels take it, and the layout that is compiled in: see tiles.find_pairs."""
        rotary, half = NO_TURNS, 0
        if self.rotary is not None:
            cos, sin, ids, interleaved = self.rotary
            rotary = (*dense(cos, sin, ids), cos.shape[0] if ids is None else ids.numel(), *cos.shape)
            half = 0 if interleaved else cos.shape[1]
        head_norm = None if self.query_norm is None else (*dense(self.query_norm, self.key_norm), self.head_eps)
        (second,) = dense(self.second)
        length = T if self.heads_first else None
        needed = any(part is not None for part in (head_norm, self.rotary, length))
        return (head_norm, second, rotary, length), {"HEAD_DIM": head_dim if needed else 0, "HALF": half}


PLAIN = Epilogue()
