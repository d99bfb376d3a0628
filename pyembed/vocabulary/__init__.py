"""The vocabulary of a model: it grows, is reported on, and shows its traps.

growth.py       grow: more rows for tables and heads
optimizer.py    grow_optimizer: an optimizer's state follows
tables.py       which modules these are
head.py         linear_cross_entropy: the loss of a head, in chunks of tokens
"""

from .growth import Growth, grow
from .head import linear_cross_entropy
from .optimizer import grow_optimizer

__all__ = [
    "Growth",
    "grow",
    "grow_optimizer",
    "linear_cross_entropy",
]
