"""grow(model, new): more rows for a model's tables and heads."""

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .tables import Given, Vocabulary, find, weights_of

CHUNK = 2**24  # elements that are summed at once: many small sums take longer, and all rows of a bf16 table in fp32 much memory
SAMPLED_ROWS = 4096  # of which "sample" takes the covariance
COVARIANCE = 1e-5  # Hewitt 2021
SIZE = "unpadded_vocab_size"  # in a configuration, and in a module that has none: ids in use where there are more rows


class Change(NamedTuple):
    """One parameter's: old (weakly), new; rows of new tokens start to stop, before which all are as they were."""

    old: "weakref.ref[nn.Parameter]"
    new: nn.Parameter
    start: int
    stop: int

    def __repr__(self) -> str:
        return f"<{tuple(self.new.shape)} {self.new.dtype}, rows {self.start} to {self.stop} are new>"


class Growth(NamedTuple):
    """ids: of the new tokens. size: ids in use. rows: {module: (rows before, rows now)}; those from size on are padding.
    changes: what grow_optimizer needs."""

    ids: range
    size: int
    rows: dict[str, tuple[int, int]]
    changes: tuple[Change, ...]


def grow(
    model: nn.Module,
    new: int = 0,
    init: Literal["mean", "sample"] = "mean",
    *,
    texts: Sequence[str] | None = None,
    encoding: Any = "gpt2",
    multiple_of: int = 1,
    size: int | None = None,
    untrained: Collection[int] = (),
    generator: torch.Generator | None = None,
    tables: Given = None,
    heads: Given = None,
) -> Growth:
    """Adds rows for new tokens to a model's tables and heads, tied or not, in place: old rows keep their bits.

    model: a table (nn.Embedding), or any module with one; tables and heads name them where it does not tell (tables.find).
    new: how many tokens; they get the ids from size on. size: ids in use, where there are more rows; by default what an earlier
    growth left in model.config, or all rows. Rows that are there already, as padding, are filled before any are added.
    init: "mean" of the rows in use, of table and head each; "sample": drawn from a normal distribution with that mean and 1e-5
    of the covariance (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021) of at most 4,096 rows,
    by generator, by default one with seed 0: the global one does not move. Rows that a table's dtype would make equal are drawn
    again, wider. untrained: ids of rows to leave out, beside that of padding_idx (report finds some).
    texts: the new tokens' texts; each row becomes the mean of the rows of the tokens into which encoding (its name, or
    an object with encode) splits it. Biases of heads: the means.
    multiple_of: the number of rows becomes one. Rows that are padding, of heads, get no probability: a bias of −inf. A head
    that has no bias gets a buffer "bias" of zeros and −inf, which is not in its state_dict: after loading a padded model call
    grow(model), which makes it again. config.vocab_size becomes the number of rows, by which transformers loads a model and
    counts its logits; config.unpadded_vocab_size is size where there is padding. A label smoothing over all logits is infinite.

    Parameters are replaced by larger ones, whose gradients follow: an optimizer must be told, grow_optimizer(optimizer,
    growth). Old logits stay up to rounding. It takes the time of copying the tables, and as much memory beside them.

    ValueError: new is negative, a text that comes twice or has no tokens, an encoding with more tokens than size, an unknown
    init, a model of which tables.find says why not. TypeError: an argument of another type. After an error, also one of memory,
    the model is as it was.
    """
    new = _whole("new", new, 0)
    multiple_of = _whole("multiple_of", multiple_of, 1)
    if init not in ("mean", "sample"):
        raise ValueError(f"init: expected 'mean' or 'sample', got {init!r}")
    if texts is not None:
        texts = _check_texts(texts, new)
        new = len(texts)
    vocabulary = find(model, tables, heads)
    modules = {**vocabulary.tables, **vocabulary.heads}
    size = _size_of(model, modules, size)
    pieces = None if texts is None else split(texts, encoding, size)
    mask = torch.ones(size, dtype=torch.bool)
    mask[[_whole("untrained", id, 0, size - 1) for id in untrained]] = False
    draw = _Draw(init, generator, pieces)
    with torch.no_grad():
        made: dict[int, nn.Parameter] = {}
        for module in modules:
            _grow_module(module, made, new, size, multiple_of, mask, draw, module in vocabulary.heads)
        return _commit(model, vocabulary, made, size, new)


def split(texts: Sequence[str], encoding: Any, size: int) -> list[list[int]]:
    """The ids of each text's tokens. ValueError: there are none, or some from size on."""
    if isinstance(encoding, str):
        from ..data import get_encoding

        encoding = get_encoding(encoding)
    count = getattr(encoding, "n_vocab", None) or (len(encoding) if hasattr(encoding, "__len__") else 0)
    if count > size:
        raise ValueError(f"encoding: expected one of at most {size:,} tokens, the ids in use, got one of {count:,}")
    encode = getattr(encoding, "encode_ordinary", None)
    if encode is None:  # a tokenizer of transformers
        encode = lambda text: encoding.encode(text, add_special_tokens=False)  # noqa: E731
    pieces = [list(encode(text)) for text in texts]
    for text, ids in zip(texts, pieces, strict=True):
        if not ids or max(ids) >= size:
            raise ValueError(f"texts: expected texts of one or more tokens under {size:,}, got {text!r} of {ids}")
    return pieces


def _whole(argument: str, value: Any, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument}: expected an integer, got {value!r}")
    if int(value) < least or most is not None and int(value) > most:
        raise ValueError(f"{argument}: expected {least} {'or more' if most is None else f'to {most}'}, got {value}")
    return int(value)


def _check_texts(texts: Any, new: int) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"texts: expected a list of str, got {texts!r}")
    twice = next((text for i, text in enumerate(texts) if text in texts[:i]), None)
    if twice is not None:
        raise ValueError(f"texts: expected texts that differ, got {twice!r} twice")
    if new not in (0, len(texts)):
        raise ValueError(f"new: expected 0 or the number of texts, {len(texts)}, got {new}")
    return list(texts)


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of a model of transformers and its parts."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config: Any = module.__dict__.get("config")
        for one in (config, config.get_text_config() if hasattr(config, "get_text_config") else None):
            if hasattr(one, "vocab_size"):
                found[id(one)] = one
    return list(found.values())


def _size_of(model: nn.Module, modules: Iterable[Any], given: int | None) -> int:
    rows = {module.weight.shape[0] for module in modules}
    if given is not None:
        return _whole("size", given, 1, min(rows))
    known = {getattr(holder, SIZE) for holder in (*_configs(model), *modules) if getattr(holder, SIZE, None)}
    if len(known) == 1:
        return _whole(f"config.{SIZE}", known.pop(), 1, min(rows))
    if len(rows) > 1:
        raise ValueError(f"size: expected the number of ids in use where tables and heads have {sorted(rows)} rows, got None")
    return rows.pop()


class _Draw:
    """The rows of new tokens."""

    def __init__(self, init: str, generator: torch.Generator | None, pieces: list[list[int]] | None) -> None:
        self.init, self.pieces = init, pieces
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

    def fill(self, tensor: Tensor, old: Tensor, mask: Tensor, count: int) -> None:
        """old (size, …), in use where mask is True, is copied to the first rows of tensor, and count rows are made after it."""
        size, made = len(old), slice(len(old), len(old) + count)
        if self.pieces is not None or not count:
            tensor[:size] = old
            for row, ids in zip(tensor[made], self.pieces or (), strict=True):
                row.copy_(_exact(old[ids]).mean(0))
            return
        mean = _copy(old, tensor, mask)
        tensor[made] = mean if self.init == "mean" or old.ndim == 1 else self._sample(old, mask, mean, count)

    def _sample(self, old: Tensor, mask: Tensor, mean: Tensor, count: int) -> Tensor:
        generator, used = self.generator, mask.nonzero().flatten()
        if len(used) > SAMPLED_ROWS:
            picked = torch.randperm(len(used), generator=generator, device=generator.device)[:SAMPLED_ROWS]
            used = used[picked.to(used.device)]
        rows = _exact(old[used.to(old.device)])
        rows -= rows.mean(0)
        sizes, scale = (count, len(rows)), math.sqrt(COVARIANCE / max(len(used) - 1, 1))
        for _ in range(40):
            normal = torch.randn(sizes, generator=generator, device=generator.device, dtype=rows.dtype).to(rows.device)
            drawn = (mean + scale * (normal @ rows)).to(old.dtype)
            if len(drawn.unique(dim=0)) == count:
                return drawn
            scale *= 2
        raise ValueError("init: expected rows that differ for 'sample', got a table whose rows are all alike; take 'mean'")


def _exact(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _copy(old: Tensor, tensor: Tensor, mask: Tensor) -> Tensor:
    """Copies old to the first rows of tensor. -> the mean of those where mask is True, in float32 at least."""
    if not mask.any():
        raise ValueError("untrained: expected fewer than all ids in use, got all of them")
    step = max(1, CHUNK // max(1, old[0].numel()))
    total = torch.zeros(old.shape[1:], dtype=torch.float64, device=old.device)
    for rows, copy, kept in zip(old.split(step), tensor[: len(old)].split(step), mask.split(step), strict=True):
        copy.copy_(rows)
        total += _exact(rows if kept.all() else rows[kept.to(rows.device)]).sum(0)
    return total.div_(mask.sum().item()).to(torch.float64 if old.dtype == torch.float64 else torch.float32)


def _grow_module(
    module: Any, made: dict[int, nn.Parameter], new: int, size: int, multiple_of: int, mask: Tensor, draw: _Draw, is_head: bool
) -> None:
    """Makes the larger weight and bias, by the old one's id."""
    padding_idx = getattr(module, "padding_idx", None)
    if padding_idx is not None and padding_idx < size:
        mask = mask.clone()
        mask[padding_idx] = False
    for old in weights_of(module):
        if id(old) in made:
            continue
        rows = max(len(old), size + new)
        rows = -(-rows // multiple_of) * multiple_of
        tensor = old.new_empty((rows, *old.shape[1:]))
        draw.fill(tensor, old.detach()[:size], mask, new)
        tensor[size + new :] = -math.inf if old.ndim == 1 else 0.0
        made[id(old)] = _like(old, tensor, size)


def _like(old: Any, tensor: Tensor, size: int) -> nn.Parameter:
    """A parameter of these values, with the old one's attributes and gradient."""
    parameter: Any = nn.Parameter(tensor, requires_grad=old.requires_grad)
    parameter.__dict__.update(old.__dict__)
    if old.grad is not None:
        parameter.grad = torch.zeros_like(tensor)
        parameter.grad[:size] = old.grad[:size] if not old.grad.is_sparse else old.grad.to_dense()[:size]
    return parameter


def _commit(model: nn.Module, vocabulary: Vocabulary, made: dict[int, nn.Parameter], size: int, new: int) -> Growth:
    """Puts the new parameters where the old ones were. All or nothing."""
    modules: dict[Any, str] = {**vocabulary.tables, **vocabulary.heads}
    before = {module: module.weight.shape[0] for module in modules}
    after = {module: made[id(module.weight)].shape[0] for module in modules}
    sets: list[Callable[[], Callable[[], None]]] = []  # each sets something, and returns what takes it back
    for module in model.modules():
        for name, old in module._parameters.items():
            if id(old) in made and old is not None:
                sets.append(_setter(module._parameters, name, made[id(old)]))
    olds: dict[int, Any] = {id(tensor): tensor for module in modules for tensor in weights_of(module)}
    changes = [Change(weakref.ref(tensor), made[key], size, size + new) for key, tensor in olds.items()]
    for module in modules:
        name = "num_embeddings" if module in vocabulary.tables else "out_features"
        sets.append(_setter(module.__dict__, name, after[module]))
        if module in vocabulary.heads and module._parameters.get("bias") is None:
            sets += _padding_bias(module, after[module], size + new)
    for module, name in vocabulary.other:
        sets.append(_setter(module._buffers, name, _longer(module._buffers[name], max(after.values()), size)))
    sets += _sizes(model, {before[module]: after[module] for module in modules}, size + new, modules)  # heads come last
    undo = []
    try:
        for set_ in sets:
            undo.append(set_())
    except BaseException:
        for take_back in reversed(undo):
            take_back()
        raise
    rows = {name: (before[module], after[module]) for module, name in modules.items()}
    return Growth(range(size, size + new), size + new, rows, tuple(changes))


MISSING = object()


def _setter(holder: dict[str, Any], key: str, value: Any) -> Callable[[], Callable[[], None]]:
    def set_() -> Callable[[], None]:
        before = holder.get(key, MISSING)
        if value is MISSING:
            holder.pop(key, None)
        else:
            holder[key] = value
        return lambda: holder.pop(key, None) if before is MISSING else holder.__setitem__(key, before)

    return set_


def _padding_bias(head: Any, rows: int, size: int) -> list[Callable[[], Callable[[], None]]]:
    """What makes the buffer that a head without bias has where it has padding, and takes it away where it has none."""
    if rows == size:
        if "bias" not in head._buffers:
            return []
        return [_setter(head._buffers, "bias", MISSING), _setter(head._parameters, "bias", None)]
    bias = head.weight.new_zeros(rows)
    bias[size:] = -math.inf
    persistent = set(head._non_persistent_buffers_set) | {"bias"}
    return [
        _setter(head._parameters, "bias", MISSING),
        _setter(head._buffers, "bias", bias),
        _setter(head.__dict__, "_non_persistent_buffers_set", persistent),
    ]


def _longer(bias: Any, rows: int, size: int) -> Tensor:
    longer = bias.new_zeros((*bias.shape[:-1], rows))
    longer[..., :size] = bias[..., :size]
    return longer


def _sizes(model: nn.Module, rows: dict[int, int], size: int, modules: Iterable[Any]) -> list[Callable[[], Callable[[], None]]]:
    """What sets the numbers of tokens that a model and its configurations know. rows: {rows before: rows now}."""
    configs = _configs(model)
    sets = []
    for holder in (*configs, *model.modules()):
        for key, value in holder.__dict__.items():
            if key.endswith("vocab_size") and key != SIZE and type(value) is int and value in rows:
                sets.append(_setter(holder.__dict__, key, rows[value]))
    for holder in configs or modules:
        if size < max(rows.values()) or hasattr(holder, SIZE):
            sets.append(_setter(holder.__dict__, SIZE, size if size < max(rows.values()) else None))
    return sets
