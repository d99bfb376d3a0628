"""A Call's terms and epilogue as arguments of the kernels. The kernels' side is in tiles.find_rows and store_projected."""

from torch import Tensor

from pyembed.call import Epilogue, Terms, rows_of

from .tuning import dense

# Triton 3.6 cannot compare None with a tuple, so an absent tuple is a tuple of None.
NO_SEGMENT, NO_ROTARY = (None,) * 4, (None,) * 6


def contiguous(part):
    """The same part of a Call with contiguous tensors."""
    return part._make(x.contiguous() if isinstance(x, Tensor) else x for x in part)


def period(terms: Terms) -> int:
    """After how many tokens the positions repeat."""
    ids, position_ids = terms.ids, terms.position_ids
    return position_ids.numel() if position_ids is not None else ids.shape[-1] if ids.dim() else 1


def places(terms: Terms) -> int:
    """Rows of the position table; 0 without one."""
    return 0 if terms.position is None else rows_of(terms.position)


def are_many(terms: Terms) -> bool:
    """Whether computing the terms again costs more than reading hidden back."""
    computed = terms.position is not None and not terms.position.is_floating_point()
    return computed or any(term is not None for term in (terms.segment, terms.scale, terms.seed))


def dropout(terms: Terms) -> tuple[Tensor, float, float] | None:
    """Seed, probability that an element becomes zero, and factor of the others; None without dropout."""
    factor = 0.0 if terms.dropout == 1 else 1 / (1 - terms.dropout)
    return None if terms.seed is None else (terms.seed, terms.dropout, factor)


def terms_arguments(terms: Terms, report: tuple | None = None) -> tuple:
    """The kernels' argument `terms`. report: of tiles.report_absent; without it an absent row gives NaN and nothing more."""
    position_ids, position, segment_ids, segment = dense(terms.position_ids, terms.position, terms.segment_ids, terms.segment)
    number = 1 if segment_ids is None else segment_ids.numel()
    segments = NO_SEGMENT if segment is None else (segment_ids, number, segment, segment.shape[0])
    return position_ids, position, segments, terms.scale, dropout(terms), report


def needs(epilogue: Epilogue, head_dim: int) -> tuple[bool, int]:
    """Whether a wide tile beside it would not fit into registers, and the width of heads that a tile must hold whole (0: any
    part)."""
    exchanges = epilogue.cos is not None and (epilogue.interleaved or 2 * epilogue.cos.shape[-1] != head_dim)
    crowded = exchanges or epilogue.heads_first or epilogue.query_offset is not None
    return crowded, 0 if epilogue.query_norm is None else head_dim


def epilogue_arguments(epilogue: Epilogue, T: int, head_dim: int) -> tuple[tuple, dict[str, int]]:
    """The kernels' argument `epilogue` (head_norm, offset, rotary, length), and their constants HEAD_DIM and HALF.

    T: tokens of a sequence.
    """
    rotary, half = NO_ROTARY, 0
    if epilogue.cos is not None:
        cos, sin, turn_ids = dense(epilogue.cos, epilogue.sin, epilogue.turn_ids)
        rows, width = cos.shape[:-1].numel(), cos.shape[-1]
        rotary = (cos, sin, turn_ids, rows if turn_ids is None else turn_ids.numel(), rows, width)
        half = 0 if epilogue.interleaved else width
    head_norm = None
    if epilogue.query_norm is not None:
        head_norm = (*dense(epilogue.query_norm, epilogue.key_norm), epilogue.head_eps)
    (offset,) = dense(epilogue.query_offset)
    length = T if epilogue.heads_first else None
    by_head = epilogue.cos is not None or head_norm is not None or length is not None
    return (head_norm, offset, rotary, length), {"HEAD_DIM": head_dim if by_head else 0, "HALF": half}
