"""The front end of a transformer (embedding gather, positional add, norm, QKV projection) in one GPU kernel."""

from . import data, flops, functional, positions, reference, relative
from .distinct import DistinctIds
from .embedding import Embedding, TokenPositionEmbedding
from .ids import check_ids, id_policy
from .memory import empty_cache
from .modules import EmbeddingQKV
from .planner import backend, debug, plan
from .reference import HiddenQKV
from .rotary import Rotary

__version__ = "0.1.0"
__all__ = [
    "DistinctIds",
    "Embedding",
    "EmbeddingQKV",
    "HiddenQKV",
    "Rotary",
    "TokenPositionEmbedding",
    "backend",
    "check_ids",
    "data",
    "debug",
    "empty_cache",
    "flops",
    "functional",
    "id_policy",
    "plan",
    "positions",
    "reference",
    "relative",
]
