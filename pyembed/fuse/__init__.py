"""fuse(model, ids): the front end of a model that exists, by one call of pyembed, in place, proved, and undone as easily.

fused.py     fuse and its handle
discover.py  which modules are the front end: one watched forward
fusion.py    when a fused front end runs, and what it computes
sites.py     the classes that its modules have meanwhile
waiting.py   the tensors that pass between them
traced.py    the same within a graph of torch.compile
table.py     its table, for calls without gradients
verify.py    whether the model still computes what it did
load.py      a model by name, for the command line

`pyembed.fuse` is the function; this package is imported as `from pyembed.fuse import …`.
"""

from .fused import Fused, fuse
from .verify import Difference

__all__ = ["Difference", "Fused", "fuse"]
