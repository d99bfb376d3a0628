"""What our modules stand for, by PyTorch's operators and the modules' own parts, one after the other."""

import torch
from torch import nn

import pyembed


def stock(module, ids, position_ids=None, query_biases=None):
    """Outputs of a TokenPositionEmbedding, or of an EmbeddingQKV, as a list."""
    places = torch.arange(ids.shape[-1], device=ids.device) if position_ids is None else position_ids
    hidden = nn.functional.embedding(ids, module.token.weight)
    if module.scale is not None:
        hidden = hidden * module.scale
    if module.segment is not None:
        hidden = hidden + module.segment(torch.zeros_like(ids))
    if module.position is not None:
        rows = module.position(places)
        hidden = torch.cat([hidden, rows.expand_as(hidden)], -1) if module.combine == "concat" else hidden + rows
    hidden = module.dropout(hidden)
    if isinstance(module, pyembed.TokenPositionEmbedding):
        return [hidden]
    normed = hidden if module.norm is None else module.norm(hidden)
    counts = (module.num_heads, module.num_kv_heads, module.num_kv_heads)
    if isinstance(module.qkv, nn.ModuleList):
        heads = [linear(normed).unflatten(-1, (n, -1)) for linear, n in zip(module.qkv, counts, strict=True)]
    else:
        heads = list(module.qkv(normed).unflatten(-1, (sum(counts), -1)).split(counts, -2))
    if module.query_norm is not None:
        heads[:2] = module.query_norm(heads[0]), module.key_norm(heads[1])
    if query_biases is not None:
        heads[0] = torch.stack([heads[0] + bias for bias in query_biases])
    if module.rotary is not None:
        heads[:2] = [turned(x, module.rotary, places) for x in heads[:2]]
    return [hidden, *(x.transpose(-3, -2) if module.heads_first else x for x in heads)]


def turned(x, rotary, places):
    """Pairs of columns as complex numbers, times e^(i·position·frequency)."""
    half = rotary.rotary_dim // 2
    turn = torch.polar(torch.ones((), dtype=torch.double), places[..., None, None] * rotary.inv_freq).to(x.device)
    pairs, rest = x[..., : 2 * half].double(), x[..., 2 * half :]
    pairs = pairs.unflatten(-1, (half, 2)) if rotary.interleaved else pairs.unflatten(-1, (2, half)).transpose(-1, -2)
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    pairs = pairs.flatten(-2) if rotary.interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat([pairs.to(x.dtype), rest], -1)


def outputs_of(found):
    """A module's result as a list."""
    return [found] if isinstance(found, torch.Tensor) else list(found)
