"""report(model): which tokens of a vocabulary were never trained.

S. Land and M. Bartolo, "Fishing for Magikarp: Automatically Detecting Under-trained Tokens in Large Language Models", 2024:
rows of tokens that training did not see stay alike. Rows that are known to be unused show whether, and where, that can be seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .encodings import CATEGORIES, FINE, bytes_of, categorize, load, never_used, readable
from .tables import find

LEAST_AUC = 0.9
SIGMAS = 4  # by so many standard deviations an AUC must be above that of chance, 0.5
MISSED = 0.05  # of the known rows may be on the other side of a cut
REACH = 0.25  # of the way from the known rows to the median of the rest: how far a cut may be
WIDE = 0.3  # of that way: what is a gap
CHUNK = 2**24


@dataclass
class Indicator:
    """A number for each row, by which rows that were not trained may differ.

    auc: the probability that a known-unused row is further on the side of untrained rows than another row; used: whether that
    is enough to tell (at least 0.9, and no chance); cut: the value beyond which a row looks untrained; lower: whether that is
    below it; misleads: never used, the norm of a table that is the head too. values: (V,) float32."""

    name: str
    lower: bool
    misleads: bool
    values: Tensor
    auc: float
    used: bool
    cut: float
    known: float  # medians
    rest: float

    def beyond(self) -> Tensor:
        return self.values <= self.cut if self.lower else self.values >= self.cut


@dataclass
class Report:
    """rows, width: of the table; tied: whether it is the head too. known: ids that are known to be unused. categories: of every
    id, a key of CATEGORIES. untrained: ids whose rows look untrained, for each category; None: cannot tell, why says why."""

    rows: int
    width: int
    tied: bool
    encoding: Any
    known: list[int]
    categories: list[str]
    indicators: list[Indicator]
    why: str | None
    looks: Tensor = field(repr=False)  # (V,) bool

    @property
    def untrained(self) -> list[int] | None:
        """Tokens that text can have and whose rows look untrained, worst first: the dangerous ones. None: cannot tell."""
        if self.why is not None:
            return None
        known = set(self.known)
        ids = [i for i in self.looks.nonzero().flatten().tolist() if self.categories[i] == FINE and i not in known]
        return sorted(ids, key=self._worst)

    def _worst(self, id: int) -> float:
        signs = [(one, 1.0 if one.lower else -1.0) for one in self.indicators if one.used]
        return sum(sign * (one.values[id].item() - one.cut) / (abs(one.known - one.rest) or 1.0) for one, sign in signs)

    def counts(self) -> dict[str, tuple[int, int | None]]:
        """{category: (ids, how many of them look untrained; None: cannot tell)}"""
        found: dict[str, tuple[int, int | None]] = {}
        for category in CATEGORIES:
            mask = torch.tensor([one == category for one in self.categories])
            found[category] = int(mask.sum()), None if self.why is not None else int((mask & self.looks).sum())
        return found

    def text(self, id: int) -> str | None:
        data = None if self.encoding is None else bytes_of(self.encoding, id)
        return None if data is None else readable(data)

    def as_dict(self) -> dict[str, Any]:
        """What --json prints."""
        untrained = self.untrained
        return {
            "rows": self.rows,
            "width": self.width,
            "tied": self.tied,
            "encoding": None if self.encoding is None else self.encoding.name,
            "known_unused": self.known,
            "indicators": [
                {
                    "name": one.name,
                    "untrained_is": "lower" if one.lower else "higher",
                    "median_of_known": one.known,
                    "median_of_rest": one.rest,
                    "auc": None if math.isnan(one.auc) else one.auc,
                    "used": one.used,
                    "cut": one.cut if one.used else None,
                }
                for one in self.indicators
            ],
            "cannot_tell": self.why,
            "categories": {name: {"ids": ids, "look_untrained": looks} for name, (ids, looks) in self.counts().items()},
            "untrained": None if untrained is None else [{"id": id, "text": self.text(id)} for id in untrained],
        }


@torch.no_grad()
def report(
    model: nn.Module | Tensor | str | Path,
    head: Tensor | None = None,
    *,
    encoding: Any = None,
    unused: Iterable[int] = (),
) -> Report:
    """Which rows of a vocabulary look as if they were never trained.

    model: a table (V, D), with head, (V, D) or None where the table is the head too; a module that has both
    (tables.find); or a .safetensors file. encoding: a name for data.get_encoding, or a tiktoken.Encoding; None: every id counts
    as text. unused: ids known to be unused, beside those that the encoding tells: ids that it has no token for, and bytes that
    UTF-8 never has.

    Indicators: the norm of the table's row, where the head is another matrix (else it misleads), and the cosine of the head's
    row to the mean of the rows known to be unused (of a known row: to the mean of the others). A row looks untrained where each
    indicator that tells the known rows from the rest says so, or where it is 0. Where none does, Report.why says that it cannot
    tell. That a row is untrained is a guess: a prompt that asks the model to repeat the token confirms it.

    TypeError, ValueError: no table, tables of other shapes, a head beside a module or a file, which have their own, an encoding
    of more tokens than rows, an id out of range, values that are not finite, a file that is no safetensors file or does not
    tell which its table is (read_tables).
    """
    if head is not None and not isinstance(model, Tensor):
        raise ValueError(f"head: expected None beside a module or a file, got a {type(head).__name__}: give the table")
    if isinstance(model, str | Path):
        model, head = read_tables(model)
    if isinstance(model, nn.Module):
        model, head = _weights(model)
    table = _check_table("model", model)
    if head is not None and _check_table("head", head).shape != table.shape:
        raise ValueError(f"head: expected the table's shape {tuple(table.shape)}, got {tuple(head.shape)}")
    rows, width = table.shape
    encoder = None if encoding is None else load(encoding)
    if encoder is not None and encoder.n_vocab > rows:
        raise ValueError(f"encoding: expected at most the {rows:,} tokens that there are rows for, got {encoder.n_vocab:,}")
    known = set() if encoder is None else set(never_used(encoder, rows))
    for id in unused:
        if isinstance(id, bool) or not isinstance(id, Integral) or not 0 <= id < rows:
            raise ValueError(f"unused: expected ids from 0 to {rows - 1}, got {id!r}")
        known.add(int(id))
    categories = [FINE] * rows if encoder is None else categorize(encoder, rows)
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[sorted(known)] = True
    indicators, zero = _indicators(table.cpu(), None if head is None else head.cpu(), mask)
    use = [one for one in indicators if one.used]
    looks = zero.clone()
    if use:
        looks |= torch.stack([one.beyond() for one in use]).all(0)
    why = None if use else _why_not(int((mask & ~zero).sum()), indicators)
    return Report(rows, width, head is None, encoder, sorted(known), categories, indicators, why, looks)


def _why_not(known: int, indicators: list[Indicator]) -> str:
    if known < 2:
        return f"{known or 'no'} row{'s' * (known != 1)} known to be unused: name some, unused"
    found = ", ".join(f"{one.name} {one.auc:.2f}" for one in indicators if not one.misleads)
    least = max(LEAST_AUC, 0.5 + SIGMAS * _chance(known))
    if least > 1:
        return f"{known} rows known to be unused are too few: name more, unused"
    return f"nothing tells the {known} rows known to be unused from the rest: AUC {found}, of at least {least:.2f}"


def _chance(known: int) -> float:
    """Standard deviation of the AUC of so few rows among many that are no different."""
    return math.sqrt(1 / (12 * max(known, 1)))


def _check_table(argument: str, table: Any) -> Tensor:
    if not isinstance(table, Tensor):
        raise TypeError(f"{argument}: expected a tensor (V, D), a module or a file, got {type(table).__name__}")
    if table.ndim != 2 or not table.is_floating_point() or 0 in table.shape:
        raise ValueError(f"{argument}: expected floats (V, D), got {table.dtype} {tuple(table.shape)}")
    return table.detach()


def _weights(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    found = find(model)
    table = next(iter(found.tables)).weight
    heads = [module.weight for module in found.heads]
    if not heads and not isinstance(model, nn.Embedding):
        raise ValueError(
            "model: expected one with a head, nn.Linear, got none: give the table, or model.get_input_embeddings()"
        )
    return table, next((head for head in heads if head is not table), None)


def _indicators(table: Tensor, head: Tensor | None, known: Tensor) -> tuple[list[Indicator], Tensor]:
    norms, cosines = torch.empty(len(table)), torch.empty(len(table))
    top = table if head is None else head
    total = torch.zeros(table.shape[1], dtype=torch.float64)
    step = max(1, CHUNK // table.shape[1])
    parts = [(a, min(a + step, len(table))) for a in range(0, len(table), step)]
    for a, b in parts:
        norms[a:b] = table[a:b].float().norm(dim=1)
        total += top[a:b][known[a:b]].double().sum(0)
    zero = torch.zeros(len(table), dtype=torch.bool)
    for a, b in parts:
        rows = top[a:b].float()
        zero[a:b] = (rows == 0).all(1)
        others = total.float() - rows * known[a:b, None]  # of a known row: the sum of the others
        cosines[a:b] = torch.cosine_similarity(rows, others.expand_as(rows), dim=1)
    if not (norms.isfinite().all() and cosines.isfinite().all()):
        raise ValueError("model: expected finite rows, got NaN or infinity")
    masks = known & ~zero, ~known & ~zero
    return [_judge("norm", True, head is None, norms, *masks), _judge("cosine", False, False, cosines, *masks)], zero


def _judge(name: str, lower: bool, misleads: bool, values: Tensor, known: Tensor, rest: Tensor) -> Indicator:
    of_known, of_rest = values[known], values[rest]
    nan = math.nan
    if not len(of_known) or not len(of_rest):
        return Indicator(name, lower, misleads, values, nan, False, nan, nan, nan)
    auc = _auc(-of_known, -of_rest) if lower else _auc(of_known, of_rest)
    used = not misleads and len(of_known) > 1 and auc >= max(LEAST_AUC, 0.5 + SIGMAS * _chance(len(of_known)))
    cut = _cut(of_known.quantile(1 - MISSED if lower else MISSED), of_rest)
    return Indicator(name, lower, misleads, values, auc, used, cut, of_known.median().item(), of_rest.median().item())


def _cut(edge: Tensor, rest: Tensor) -> float:
    """The edge of the known rows; where a wide gap is near, its middle: rows like the known ones are on their side."""
    far = edge + REACH * (rest.median() - edge)
    between = rest[(rest > torch.minimum(edge, far)) & (rest < torch.maximum(edge, far))]
    values = torch.cat([edge[None], between, far[None]]).sort().values
    gaps = values.diff()
    widest = gaps.argmax()
    is_gap = gaps[widest] > WIDE * (far - edge).abs()
    return (values[widest : widest + 2].mean() if is_gap else edge).item()


def _auc(higher: Tensor, lower: Tensor) -> float:
    """The probability that one of the first is above one of the second; equal ones count half (Mann and Whitney 1947)."""
    lower = lower.sort().values
    below, up_to = torch.searchsorted(lower, higher), torch.searchsorted(lower, higher, right=True)
    return ((below + up_to).double().mean() / (2 * len(lower))).item()


# Files

TABLES = ("wte", "embed_tokens", "word_embeddings", "tok_embeddings", "embed_in", "token_embedding", "shared", "token")
HEADS = ("lm_head", "embed_out", "output", "cls.predictions.decoder", "head", "unembed")


def read_tables(path: str | Path, table: str | None = None, head: str | None = None) -> tuple[Tensor, Tensor | None]:
    """The table and the head, None where there is none, of a .safetensors file: those named, or those that bear a usual name.

    ImportError: safetensors is not installed. ValueError: no such file, none of this format, or tensors that do not tell."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("files need safetensors: pip install safetensors") from error
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            table = _choose("table", shapes, table, TABLES)
            head = _choose("head", {name: shape for name, shape in shapes.items() if name != table}, head, HEADS, shapes[table])
            return file.get_tensor(table), None if head is None else file.get_tensor(head)
    except OSError as error:
        raise ValueError(f"file: cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ValueError(f"file: expected a safetensors file, got {path}: {error}") from error


def _choose(what: str, shapes: Any, given: str | None, usual: tuple[str, ...], like: tuple[int, ...] | None = None) -> Any:
    if given is not None:
        if given not in shapes:
            raise ValueError(f"{what}: expected one of the file's tensors, {', '.join(list(shapes)[:20])}, got {given!r}")
        return given
    ends = tuple(f".{name}.weight" for name in usual)
    found = [name for name, shape in shapes.items() if f".{name}".endswith(ends) and len(shape) == 2 and like in (None, shape)]
    if like is None and not found:
        found = [name for name, shape in shapes.items() if len(shape) == 2]  # a file of one matrix
    if len(found) == 1:
        return found[0]
    if like is not None and not found:
        return None
    came = ", ".join(f"{name} {shapes[name]}" for name in found[:20]) or "no matrix"
    raise ValueError(f"{what}: expected one tensor, got {came}: name it, {what}")
