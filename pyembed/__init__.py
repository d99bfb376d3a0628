"""The front end of a transformer (embedding gather, positional add, norm, QKV projection) in one GPU kernel."""

from . import data, flops, functional, positions, reference, relative, vocabulary
from .call import DistinctIds, HiddenQKV
from .fuse import fuse
from .ids import check_ids
from .memory import empty_cache
from .modules.embedding import Embedding, TokenPositionEmbedding
from .modules.front_end import EmbeddingQKV
from .rotary import CosSin, Rotary
from .settings import backend, debug, id_policy, plan

__version__ = "0.2.0"
__all__ = [
    "CosSin",
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
    "fuse",
    "id_policy",
    "plan",
    "positions",
    "reference",
    "relative",
    "vocabulary",
]
