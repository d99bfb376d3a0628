"""The modules without a projection: nn.Embedding, and its sum with positions."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting

import pyembed.settings as settings

from ..call import NO_EPILOGUE, NO_NORM, Call, Called, Terms, pad_row, stock_forward
from ..checks import class_of
from ..functional import call_of_embedding, embedding, why_no_kernel
from ..ids import HasIdPolicy
from ..modes import refuse_scripting
from ..plans.choice import Plan, as_if_of_table, why_composed, why_torch
from ..positions import Sinusoidal, make
from ..rows import Rows, with_rows
from ..run import run
from ..settings import policy_of
from .fits import check_tables
from .known import COMBINES, Known, has_own_rows, is_stock, looks_up, place_rows, table_of
from .parts import dropout_rate

if TYPE_CHECKING:
    _Rows = Rows | Sequence[Rows] | None
else:
    _Rows = Any | None  # as TorchScript takes it


class Embedding(nn.Embedding, HasIdPolicy):
    """torch.nn.Embedding: same constructor, same weights from the same seed, same state_dict, same result.

    What the kernels do not serve (max_norm, scale_grad_by_freq, sparse, other dtypes) runs by PyTorch's operator; explain
    says which serves. Rows of a call's own may stand in place of the table's.
    """

    @stock_forward
    def forward(self, input: Tensor, rows: _Rows = None) -> Tensor:
        """input: ids (...) int32 or int64 -> (..., embedding_dim). rows: as in functional.embed, a vocabulary.Rows or several;
        None in TorchScript. IndexError: an id outside the table. ValueError: rows with max_norm, scale_grad_by_freq or sparse.
        Other errors as in functional.embedding, of `ids` and `weight`."""
        if is_scripting():
            if rows is not None:
                raise ValueError("rows: expected None in TorchScript, got rows")
            return nn.functional.embedding(
                input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
            )
        return embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse,
            id_policy=self._id_policy, rows=rows,
        )  # fmt: skip

    def explain(self, ids: Tensor, rows: Rows | Sequence[Rows] | None = None) -> Plan:
        """Which operator a call with these ids and rows would run now, and why: "triton" (pyembed::embed, with rows
        pyembed::gather) or "torch" (aten::embedding).

        Nothing runs. Errors as in forward, but for ids outside the table.
        """
        weight = self.weight
        options = (self.max_norm, self.scale_grad_by_freq, self.sparse, self._policy())
        if rows is None:
            why = why_no_kernel(ids, weight, *options) or why_torch(weight)
        else:
            call = call_of_embedding(ids, weight, self.padding_idx, *options, rows)
            why = why_composed(as_if_of_table(call))
        return Plan("torch", why, {}) if why else Plan("triton", f"a kernel for {weight.dtype}", {})


class TokenPositionEmbedding(HasIdPolicy):
    """dropout(scale·token(ids) + segment(segment_ids) + position(position_ids)): the input of GPT-2, BERT and their like.

    position: "learned" (parameter position.weight), "sinusoidal" or "sinusoidal:" and a convention of positions.CONVENTIONS (a
    buffer outside of state_dict), or None. max_length: rows of the position table; None with sines: they are computed, of any
    position. combine: "sum", or "concat", token row before position row, 2·embedding_dim wide, by PyTorch's operators. scale:
    of the token row (√embedding_dim in Vaswani et al. 2017). num_segments: rows of segment (BERT's token types), 0: none.
    ValueError: another kind, or nothing to concatenate.
    """

    _modules: dict[str, Any]  # read in place of attributes, which are slow
    token: nn.Embedding
    position: nn.Embedding | Sinusoidal | None
    segment: nn.Embedding | None
    dropout: nn.Dropout
    _known: Known
    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_length: int | None,
        position: str | None = "learned",
        combine: str = "sum",
        dropout: float = 0.0,
        padding_idx: int | None = None,
        scale: float | None = None,
        num_segments: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        _check_combine(combine, position is not None, num_segments > 0)
        self.token = Embedding(num_embeddings, embedding_dim, padding_idx, **factory)
        self.register_module("position", make(position, max_length, embedding_dim, **factory))
        self.register_module("segment", Embedding(num_segments, embedding_dim, **factory) if num_segments else None)
        self.dropout = nn.Dropout(dropout)
        self.combine, self.scale, self._known = combine, scale, Known()

    @classmethod
    def from_modules(
        cls,
        token: nn.Embedding,
        position: nn.Embedding | Sinusoidal | None = None,
        *,
        segment: nn.Embedding | None = None,
        dropout: nn.Dropout | None = None,
        combine: str = "sum",
        scale: float | None = None,
    ) -> "TokenPositionEmbedding":
        """The same over modules that a model already has: it holds them, copies nothing, and trains what they hold.

        token, position and segment: nn.Embedding or a module around one, which is called as it is if it does more than look up
        its rows. dropout: the model's, whose p and training mode are obeyed; None: nothing is dropped. TypeError: another
        module; ValueError: as in the constructor.
        """
        check_tables(token=token, position=position, segment=segment)
        if not isinstance(dropout, nn.Module | None):
            raise TypeError(f"dropout: expected an nn.Dropout or None, got {class_of(dropout)}")
        _check_combine(combine, position is not None, segment is not None)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.combine, self.scale, self._known = combine, scale, Known()
        parts = {"token": token, "position": position, "segment": segment}
        for name, module in {**parts, "dropout": nn.Dropout(0.0) if dropout is None else dropout}.items():
            self.register_module(name, module)
        dropout_rate(self.dropout, True)  # refuses what is none
        if position is not None:
            self._known.way(position)  # refuses what takes no positions
        self.training = token.training
        return self

    def _policy(self) -> str:
        own = self._id_policy or getattr(self._modules["token"], "_id_policy", None)
        return settings.current.id_policy if own is None else policy_of(own)

    def forward(
        self,
        ids: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        rows: Rows | Sequence[Rows] | None = None,
    ) -> Tensor:
        """ids (..., T), position_ids and segment_ids (T,), (1, T) or like ids, None: 0 … T−1, and 0 -> hidden (..., T,
        embedding_dim). rows: as in functional.embed."""
        modules, concat = self._modules, self.combine == "concat"
        dropout, table = modules["dropout"], self._table("token")
        positions, segments, rate = self._table("position"), self._table("segment"), 0.0
        if not concat:
            rate = dropout_rate(dropout, dropout.training)
        elif isinstance(positions, Tensor):
            positions = Called(modules["position"], weight=positions)
        padding_idx = None if isinstance(table, Called) else modules["token"].padding_idx
        row = -1 if padding_idx is None else pad_row(padding_idx, table.shape[0])
        terms = Terms(ids, table, positions, position_ids, segments, segment_ids, None, self.scale, rate, row)
        own = modules["token"] if has_own_rows(modules["token"]) else None
        policy = self._policy()
        terms = terms if rows is None and own is None else with_rows(terms, rows, own, policy)
        found = run(Call(terms, NO_NORM, None, NO_EPILOGUE, policy, False, None, concat))
        return dropout(found) if concat else found

    def _table(self, name: str) -> Any:
        """The weight of a part that only looks up its rows; else the part, which is called."""
        module = self._modules[name]
        if module is None or looks_up(name, module) or name == "token" and has_own_rows(module):
            return None if module is None else module.weight
        function = None if name != "position" else partial(place_rows, module, self._known.way(module), offset=0)
        return Called(module, function, table_of(module), has_rows=is_stock(name, module))

    def extra_repr(self) -> str:
        return f"combine={self.combine!r}" + ("" if self.scale is None else f", scale={self.scale}")


def _check_combine(combine: str, has_position: bool, has_segment: bool) -> None:
    if combine not in COMBINES:
        raise ValueError(f"combine: expected one of {COMBINES}, got {combine!r}")
    if combine == "concat" and (not has_position or has_segment):
        raise ValueError("combine: expected 'sum' where there are no positions, or segments; got 'concat'")
