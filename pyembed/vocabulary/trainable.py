"""A few rows of a table that train, while the table stays frozen and uncopied: gist tokens (Mu et al. 2023), control tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..call import STOCK_FORWARDS
from ..modes import refuse_scripting
from ..rows import check_row_ids, own_rows, slots_of, write

__all__ = ["TrainableRows"]
_STOCK = nn.Embedding.forward


class TrainableRows(nn.Embedding):
    """Stands where embedding stood: ids (...) -> (..., D), of which the ids `rows` take rows that train.

    weight: the embedding's own parameter (V, D), not copied, and frozen from here on. rows: parameter (R, D), at first the
    table's rows. Equal to the whole table whose other rows are frozen, without weight decay on those; gradient and optimizer
    state are (R, D). EmbeddingQKV and TokenPositionEmbedding over it, and pyembed.fuse of its model, compute the rows by every
    plan but "table". The embedding may be of a fused model, which then runs its own modules. state_dict: weight, rows and
    row_ids, which the module that merge() returns loads too.
    TypeError: no nn.Embedding, or one with a forward or a weight of its own kind. ValueError: no ids, one twice, padding_idx
    among them, or an embedding with hooks, an id_policy, max_norm, scale_grad_by_freq or sparse. IndexError: an id outside the
    table. The embedding then is as it was.
    """

    row_ids: Tensor
    _sorted: Tensor
    _order: Tensor
    __prepare_scriptable__ = refuse_scripting

    def __init__(self, embedding: nn.Embedding, rows: Any) -> None:
        if not isinstance(embedding, nn.Embedding) or isinstance(embedding, TrainableRows):
            raise TypeError(f"embedding: expected an nn.Embedding, got {type(embedding).__name__}")
        kind: Any = type(embedding)
        own = getattr(kind, "_pyembed_base", kind).forward  # of one that pyembed.fuse has given another class
        if own is not _STOCK and own not in STOCK_FORWARDS or "forward" in embedding.__dict__:
            raise TypeError(f"embedding: expected one that only looks up rows, got a {type(embedding).__name__}")
        weight: Any = embedding._parameters.get("weight")
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            came = "one that is computed" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
            raise TypeError(f"embedding: expected a floating nn.Parameter as its weight, got {came}")
        if any(getattr(embedding, f"_{when}_hooks") for when in ("forward", "forward_pre", "backward", "backward_pre")):
            raise ValueError("embedding: expected one without hooks, which would not follow: remove them first")
        if getattr(embedding, "_id_policy", None) is not None:
            raise ValueError(f"embedding: expected one without an id_policy of its own, got {embedding._id_policy!r}")
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            raise ValueError("embedding: expected one without max_norm, scale_grad_by_freq and sparse")
        with torch.device("cpu"):  # values are looked at, also of a module that is made without memory
            ids = check_row_ids("rows", rows, embedding.num_embeddings)
        if embedding.padding_idx is not None and embedding.padding_idx in ids.tolist():
            raise ValueError(f"rows: expected ids that may train, got {embedding.padding_idx}, which is padding_idx")
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = embedding.padding_idx, None, embedding.norm_type
        self.scale_grad_by_freq = self.sparse = False
        self._required_grad, ids = weight.requires_grad, ids.to(weight.device)
        self.weight, self.rows = weight, nn.Parameter(weight.detach().index_select(0, ids))
        self.register_buffer("row_ids", ids)
        ascending, order = ids.sort()
        self.register_buffer("_sorted", ascending, persistent=False)
        self.register_buffer("_order", order, persistent=False)
        self.train(embedding.training)
        weight.requires_grad_(False)  # last: nothing fails after it

    @own_rows
    def forward(self, input: Tensor) -> Tensor:
        """input: ids (...) int32 or int64 -> (..., D). IndexError: an id outside the table."""
        flat, (ids, order, rows) = input.reshape(-1), self.own()
        found = F.embedding(flat, self.weight, self.padding_idx)
        return write(found, slots_of(flat, ids, order), rows).view(*input.shape, found.shape[1])

    def own(self) -> tuple[Tensor, Tensor, Tensor]:
        """Its ids (R,), ascending, the row of each (R,), and rows (R, D)."""
        return self._sorted, self._order, self.rows

    def linear(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """The tied head: hidden (..., D), bias (V,) -> logits (..., V), by the table and, for their ids, by the rows.

        An nn.Linear that shares the table knows nothing of the rows."""
        logits = F.linear(hidden, self.weight, bias)
        own = F.linear(hidden, self.rows, None if bias is None else bias.index_select(0, self.row_ids))
        return logits.index_copy(-1, self.row_ids, own)

    def merge(self) -> nn.Embedding:
        """An nn.Embedding over the same parameter, into which the rows were written; it loads this module's state_dict too."""
        with torch.no_grad():
            self.weight.index_copy_(0, self.row_ids, self.rows)
        merged = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=self.weight)
        merged.weight = self.weight.requires_grad_(self._required_grad)
        merged.register_load_state_dict_pre_hook(_load_merged)
        return merged.train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        name, errors = f"{prefix}row_ids", others[-1]
        if name in state_dict and _checked_ids(name, state_dict[name], self.weight, errors, self.padding_idx) is None:
            return
        super()._load_from_state_dict(state_dict, prefix, *others)
        for name, tensor in zip(("_sorted", "_order"), self.row_ids.sort(), strict=True):
            held = getattr(self, name)
            if held.device == tensor.device:  # in place, so that a CUDA graph that reads it sees them
                held.copy_(tensor)
            else:
                setattr(self, name, tensor)

    def reset_parameters(self) -> None:
        """The rows as the table has them."""
        with torch.no_grad():
            self.rows.copy_(self.weight.index_select(0, self.row_ids))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={self.rows.shape[0]}"


def _load_merged(module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """A state_dict of TrainableRows as one of nn.Embedding: its rows are written into its weight or, where that is missing,
    into the module's own."""
    weight_name, *names = (f"{prefix}{name}" for name in ("weight", "rows", "row_ids"))
    if not all(name in state_dict for name in names):
        return  # PyTorch says that one is too much
    *_, missing, _, errors = others
    rows, given = (state_dict.pop(name) for name in names)
    missing += [weight_name] * (weight_name not in state_dict)
    weight: Any = state_dict.get(weight_name, module.weight)
    ids = _checked_ids(names[1], given, weight, errors)
    if ids is None:
        return
    expected = (len(ids), weight.shape[1])
    if tuple(rows.shape) != expected:
        errors.append(f"{names[0]}: expected a shape {expected} for the ids of {names[1]}, got {tuple(rows.shape)}")
        return
    state_dict[weight_name] = weight.detach().index_copy(0, ids.to(weight.device), rows.to(weight))


def _checked_ids(name: str, ids: Any, weight: Tensor, errors: list[str], padding_idx: int | None = None) -> Tensor | None:
    """Ids of a state_dict; None: they are none, which is added to the errors that load_state_dict raises."""
    if getattr(ids, "is_meta", False):
        return ids
    try:
        ids = check_row_ids(name, ids, weight.shape[0])
        if padding_idx is not None and padding_idx in ids.tolist():
            raise ValueError(f"{name}: expected ids that may train, got {padding_idx}, which is padding_idx")
    except (IndexError, TypeError, ValueError) as error:
        errors.append(str(error))
        return None
    return ids
