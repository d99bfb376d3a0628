"""The vocabulary of a model: it grows, is reported on, and shows its traps.

growth.py       grow: more rows for tables and heads
optimizer.py    grow_optimizer: an optimizer's state follows
tables.py       which modules these are
"""

from .growth import Growth, grow
from .optimizer import grow_optimizer

__all__ = [
    "Growth",
    "grow",
    "grow_optimizer",
]
