"""What may come between lookups and projections: the model gives what it would give unfused."""

import contextlib

import pytest
import torch
from conftest import full
from families import D, Own, Packed, tokens
from torch import nn

import pyembed


def close(a, b):
    return torch.allclose(a, b, 1e-4, 1e-5)


class Removed:
    def __init__(self, handle):
        self.close = handle.remove


class Odd(nn.Module):
    """What may come between lookups and projections, by name."""

    def __init__(self, between):
        super().__init__()
        self.inner, self.between = Own(nn.LayerNorm, Packed).eval(), between

    def forward(self, ids, extra=None):
        inner = self.inner
        tok, pos = inner.tok(ids), inner.pos(torch.arange(ids.shape[1]))
        x = self.between(inner, tok, pos, ids) if extra is not None else tok + pos
        for block in inner.blocks:
            x = block(x)
        return inner.head(x)


def _shape_of_a_part(inner, tok, pos, ids):
    part = tok[:, :, -1]
    assert part.shape == ids.shape and part.requires_grad == tok.requires_grad
    return tok + pos


def _part_in_place(inner, tok, pos, ids):
    part = tok[:, 1:]
    part.mul_(2)
    return tok + pos


def _part_read(inner, tok, pos, ids):
    return tok + pos + tok[..., None, 0] + tok[:, -1:].detach()


def _clones(inner, tok, pos, ids):
    return (tok + pos).clone()


def _adds_twice(inner, tok, pos, ids):
    return tok + pos + pos


def _tok_in_place(inner, tok, pos, ids):
    tok.mul_(2)
    return tok + pos


def _pos_data(inner, tok, pos, ids):
    pos.data.mul_(2)
    return tok + pos


def _ids_in_place(inner, tok, pos, ids):
    ids += 1
    return tok + pos


def _sum_in_place(inner, tok, pos, ids):
    kept = tok
    tok += pos
    return kept


def _hidden_in_place(inner, tok, pos, ids):
    x = tok + pos
    x.mul_(torch.arange(D))
    return x


def _hidden_numpy(inner, tok, pos, ids):
    x = tok + pos
    x.detach().numpy()[..., 0] += 1  # a constant added to all would be lost in the norm
    return x


def _other_sum(inner, tok, pos, ids):
    return torch.add(tok, pos, alpha=2)


def _another_lookup(inner, tok, pos, ids):
    return tok + inner.tok(torch.zeros_like(ids))


def _normed_in_place(inner, tok, pos, ids):
    x = tok + pos
    normed = inner.blocks[0].norm1(x)
    normed.mul_(2)
    return x + inner.blocks[0].attention(normed)


def _normed_data(inner, tok, pos, ids):
    x = tok + pos
    normed = inner.blocks[0].norm1(x)
    normed.data[0] = 0
    return x + inner.blocks[0].attention(normed)


def _residual_in_place(inner, tok, pos, ids):
    x = tok + pos
    normed = inner.blocks[0].norm1(x)
    x += inner.blocks[0].attention(normed)
    return x + inner.blocks[0].mlp(normed)


def _residual_numpy(inner, tok, pos, ids):
    x = tok + pos
    normed = inner.blocks[0].norm1(x)
    attended = inner.blocks[0].attention(normed)
    if not torch.is_grad_enabled():  # which would change what autograd keeps
        x.detach().numpy()[..., ::2] = 0
    return x + attended + inner.blocks[0].mlp(normed)


def _foreach(inner, tok, pos, ids):
    x = tok + pos
    if not torch.is_grad_enabled():
        torch._foreach_mul_([x], [torch.arange(D, dtype=x.dtype)])
    return x


def _gradient_hook_of_the_norm(inner, tok, pos, ids):
    normed = inner.blocks[0].norm1(tok + pos)
    if torch.is_grad_enabled():
        normed.register_hook(lambda grad: 3 * grad)
    return inner.blocks[0].attention(normed)


def _backward_hook(inner, tok, pos, ids):
    seen = []
    with contextlib.closing(Removed(inner.blocks[0].register_full_backward_hook(lambda m, grads, _: seen.append(grads[0])))):
        out = inner.blocks[0](tok + pos)
    if torch.is_grad_enabled():
        out.sum().backward(retain_graph=True)
        inner.zero_grad()
        out = out + seen[0]
    return out


def _norm_twice(inner, tok, pos, ids):
    x = tok + pos
    one, two = inner.blocks[0].norm1(x), inner.blocks[0].norm1(x)
    return x + inner.blocks[0].attention(one) - inner.blocks[0].attention(two) + inner.blocks[0].attention(one)


def _autograd_function(inner, tok, pos, ids):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    return Double.apply(tok + pos)


def _weight_between(inner, tok, pos, ids):
    x = tok + pos
    with torch.no_grad():
        inner.blocks[0].attention.c_attn.weight.mul_(2)
    return x


def _no_grad_norm(inner, tok, pos, ids):
    x = tok + pos
    with torch.no_grad():
        attended = inner.blocks[0].attention(inner.blocks[0].norm1(x))
    return x + attended


BETWEEN = [value for name, value in list(globals().items()) if name.startswith("_") and callable(value) and name[1] != "_"]


OFTEN = (
    _adds_twice,
    _pos_data,
    _hidden_in_place,
    _hidden_numpy,
    _normed_data,
    _norm_twice,
    _weight_between,
    _residual_numpy,
    _backward_hook,
)


@pytest.fixture(autouse=True)
def distinct():
    with pyembed.plan("distinct"):
        yield


@pytest.mark.parametrize("between", [f if f in OFTEN else full(f) for f in BETWEEN], ids=lambda f: f.__name__)
def test_what_comes_between(between):
    """Values and gradients are those of the unfused model."""
    results = []
    for fuses in (True, False):
        torch.manual_seed(0)
        model = Odd(between)
        if fuses:
            pyembed.fuse(model, tokens(), gradients=False)
        leaves = [p for p in model.parameters()]
        with torch.no_grad():
            results.append((model(tokens(2, 7, seed=3), 1),))
        if between in (_ids_in_place, _weight_between, _residual_in_place):  # which autograd refuses
            continue
        out = model(tokens(2, 7, seed=3), 1)
        grads = torch.autograd.grad(out, leaves, torch.randn_like(out), allow_unused=True)
        results[-1] += (out, *grads)
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None) and (found is None or close(found, expected))
