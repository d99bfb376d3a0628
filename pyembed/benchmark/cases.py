"""What is measured: widths of published models, the stock modules that people have for them, and ids."""

import dataclasses
import pydoc_data.topics
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import nn

import pyembed

from ..data import get_encoding


@dataclasses.dataclass(frozen=True)
class Model:
    """Widths of one model: of its front end, and as much of the rest as its FLOPs ask for."""

    name: str
    V: int
    D: int
    heads: int
    layers: int
    mlp: int  # weights of a layer's MLP
    L: int | None = None  # rows of a learned position table; None: rotary
    kv_heads: int | None = None
    head_dim: int = 64
    norm: str = "layer"
    bias: bool = True
    qk_norm: bool = False
    segments: int = 0

    @property
    def groups(self):
        """Heads of query, key and value."""
        return self.heads, self.kv_heads or self.heads, self.kv_heads or self.heads

    @property
    def N(self):
        return sum(self.groups) * self.head_dim


def _llama(name, V, D, heads, layers, hidden, **more):
    return Model(name, V, D, heads, layers, 3 * D * hidden, norm="rms", bias=False, **more)


MODELS = {
    model.name: model
    for model in (
        Model("character GPT", 65, 384, 6, 6, 2 * 384 * 1536, L=256),
        Model("GPT-2 small", 50257, 768, 12, 12, 2 * 768 * 3072, L=1024),
        Model("GPT-2 XL", 50257, 1600, 25, 48, 2 * 1600 * 6400, L=1024),
        Model("BERT-base", 30522, 768, 12, 12, 2 * 768 * 3072, L=512, segments=2),
        _llama("Qwen3-0.6B", 151936, 1024, 16, 28, 3072, kv_heads=8, head_dim=128, qk_norm=True),
        _llama("Llama-3.2-1B", 128256, 2048, 32, 16, 8192, kv_heads=8),
        _llama("Llama-3-8B", 128256, 4096, 32, 32, 14336, kv_heads=8, head_dim=128),
        _llama("Llama-2-7B", 32000, 4096, 32, 32, 11008, head_dim=128),
    )
}


class Stock(nn.Module):
    """What a user has today: stock modules one after the other, heads turned as transformers writes it."""

    def __init__(self, model, length, device=None, dtype=None):
        super().__init__()
        self.model, factory = model, {"device": device, "dtype": dtype}
        norm = nn.LayerNorm if model.norm == "layer" else nn.RMSNorm
        self.token = nn.Embedding(model.V, model.D, **factory)
        self.position = nn.Embedding(model.L, model.D, **factory) if model.L else None
        self.segment = nn.Embedding(model.segments, model.D, **factory) if model.segments else None
        self.rotary = None if model.L else pyembed.Rotary(model.head_dim, length, device=device)
        if self.rotary is not None:  # a model makes these once, for all its layers
            for name, table in (("cos", self.rotary.cos), ("sin", self.rotary.sin)):
                self.register_buffer(name, table[:, None].repeat(1, 1, 2).to(dtype or torch.float32), persistent=False)
        self.norm, self.qkv = norm(model.D, eps=1e-5, **factory), nn.Linear(model.D, model.N, bias=model.bias, **factory)
        self.query_norm, self.key_norm = (nn.RMSNorm(model.head_dim, **factory) if model.qk_norm else None for _ in range(2))
        for table in (self.token, self.position, self.segment):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids):
        hidden = self.token(ids)
        if self.segment is not None:
            hidden = hidden + self.segment(torch.zeros_like(ids))
        if self.position is not None:
            hidden = hidden + self.position(torch.arange(ids.shape[-1], device=ids.device))
        heads = self.qkv(self.norm(hidden)).view(*ids.shape, -1, self.model.head_dim)
        query, key, value = heads.split(self.model.groups, -2)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary is not None:
            cos, sin = self.cos[: ids.shape[-1]], self.sin[: ids.shape[-1]]
            half = query.shape[-1] // 2
            query, key = (x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin for x in (query, key))
        return hidden, query, key, value

    def fused(self):
        """Our front end over the same modules."""
        heads, kv_heads, _ = self.model.groups
        return pyembed.EmbeddingQKV.from_modules(
            self.token, self.position, self.norm, qkv=self.qkv, num_heads=heads, num_kv_heads=kv_heads, rotary=self.rotary,
            segment=self.segment, query_norm=self.query_norm, key_norm=self.key_norm,
        )  # fmt: skip


class Layer(nn.Module):
    """The rest of a GPT-2 layer, from query, key and value on."""

    def __init__(self, D):
        super().__init__()
        self.proj, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, hidden, query, key, value):
        heads = (x.transpose(1, 2) for x in (query, key, value))
        mixed = nnf.scaled_dot_product_attention(*heads, is_causal=True)
        hidden = hidden + self.proj(mixed.transpose(1, 2).flatten(2))
        return hidden + self.down(nnf.gelu(self.up(self.norm(hidden))))


class GPT(nn.Module):
    """A whole model of GPT-2's kind around a front end, its head tied to the token table as GPT-2's is."""

    def __init__(self, front, layers):
        super().__init__()
        self.front, self.heads = front, front.model.groups
        D = front.model.D
        self.first, self.last = Layer(D), nn.LayerNorm(D)
        self.rest = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(D), "qkv": nn.Linear(D, 3 * D), "layer": Layer(D)}) for _ in range(layers - 1)
        )

    def forward(self, ids):
        hidden = self.first(*self.front(ids))
        for block in self.rest:
            heads = block["qkv"](block["norm"](hidden)).unflatten(-1, (sum(self.heads), -1)).split(self.heads, -2)
            hidden = block["layer"](hidden, *heads)
        return (nnf.linear(self.last(hidden), self.front.token.weight),)


def read_text(path=None):
    """Of a UTF-8 file without WikiText's marks; by default Python's own manual."""
    text = Path(path).read_text(encoding="utf-8") if path else "\n".join(pydoc_data.topics.topics.values())
    for raw, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "")):
        text = text.replace(raw, plain)
    return text


def tokens_of(text):
    """A text in GPT-2's tokens."""
    return torch.tensor(get_encoding("gpt2").encode_ordinary(text))


def characters_of(text):
    """A text in its 65 most frequent characters, as a character model numbers them."""
    known = sorted(sorted(set(text), key=text.count, reverse=True)[:65])
    number = {character: i for i, character in enumerate(known)}
    return torch.tensor([number[character] for character in text[:100_000] if character in number])


def make_ids(kind, V, count, text):
    """(count,) ids below V. "natural": text's tokens, numbered by how often they come where V has fewer rows than GPT-2;
    "zipf": of frequencies 1 / rank; "uniform"; "half": uniform, but every second is one token."""
    generator = torch.Generator().manual_seed(0)
    if kind == "natural":
        text = text.repeat(-(-count // len(text)))[:count]
        if int(text.max()) < V:
            return text.clone()  # of no longer text's storage
        values, inverse, counts = text.unique(return_inverse=True, return_counts=True)
        ranks = torch.empty_like(values)
        ranks[counts.argsort(descending=True, stable=True)] = torch.arange(len(values))
        return ranks[inverse] % V
    if kind == "zipf":
        order = torch.randperm(V, generator=generator)
        return order[torch.multinomial(1 / torch.arange(1.0, V + 1), count, replacement=True, generator=generator)]
    ids = torch.randint(V, (count,), generator=generator)
    if kind == "half":
        ids[::2] = V // 2
    return ids
