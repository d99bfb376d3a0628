"""The vocabulary of a model: it grows, tokens that were never trained are found, and what a text becomes is shown.

growth.py       grow: more rows for tables and heads
optimizer.py    grow_optimizer: an optimizer's state follows
tables.py       which modules these are
head.py         linear_cross_entropy: the loss of a head, in chunks of tokens
untrained.py    report: tokens that were never trained
pieces.py       pieces and traps of a text; languages.py: one text in many languages
encodings.py    what an encoding has for each id
cost.py         what a vocabulary costs
trainable.py    TrainableRows: a few rows train, the table stays
commands.py, pictures.py    the command line
"""

from ..rows import Rows
from .cost import Cost, cost
from .growth import Growth, grow
from .head import linear_cross_entropy
from .optimizer import grow_optimizer
from .pieces import Piece, Trap, cost_of_languages, pieces, traps
from .trainable import TrainableRows
from .untrained import Indicator, Report, report

__all__ = [
    "Cost",
    "Growth",
    "Indicator",
    "Piece",
    "Report",
    "Rows",
    "TrainableRows",
    "Trap",
    "cost",
    "cost_of_languages",
    "grow",
    "grow_optimizer",
    "linear_cross_entropy",
    "pieces",
    "report",
    "traps",
]
