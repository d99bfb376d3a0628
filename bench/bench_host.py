"""What a call costs the host, over tensors so small that nothing else takes time: bare operators, stock modules, ours.

Wall-clock of the calling thread, without waiting for a GPU. The difference to `operators` is what the modules around them cost.
Where there is none, the way of compiled kernels is timed too, with a driver whose launches do nothing: beside stock modules on
the CPU, whose operators compute, but launch nothing.
"""

import contextlib
from functools import partial

import compiled
import pytest
import torch
import torch.nn.functional as nnf

import pyembed
import pyembed.functional as F
from pyembed.benchmark.cases import Model, Stock
from pyembed.benchmark.peers import check, gradients
from pyembed.benchmark.timing import Variant, Wall, compare

CALLS = 20
GPT = Model("a tiny GPT-2", 64, 32, 2, 1, 0, L=16, head_dim=16)
LLAMA = Model("a tiny Llama", 64, 32, 2, 1, 0, norm="rms", bias=False, kv_heads=1, head_dim=16)


def lookup(ids, device):
    ours = pyembed.Embedding(64, 32, device=device)
    stock = torch.nn.Embedding(64, 32, device=device)
    stock.weight = ours.weight
    return [ours.weight], {
        "operators": lambda: nnf.embedding(ids, ours.weight),
        "stock modules": lambda: stock(ids),
        "functional.embedding": lambda: F.embedding(ids, ours.weight),
        "Embedding": lambda: ours(ids),
    }


def summed(ids, device):
    ours = pyembed.TokenPositionEmbedding(64, 32, 16, device=device)
    token, position = ours.token.weight, ours.position.weight
    stock = [torch.nn.Embedding(*table.shape, device=device) for table in (token, position)]
    stock[0].weight, stock[1].weight = token, position

    def operators():
        return nnf.embedding(ids, token) + nnf.embedding(torch.arange(ids.shape[-1], device=device), position)

    return [token, position], {
        "operators": operators,
        "stock modules": lambda: stock[0](ids) + stock[1](torch.arange(ids.shape[-1], device=device)),
        "functional.embed": lambda: F.embed(ids, token, position),
        "TokenPositionEmbedding": lambda: ours(ids),
    }


def front(model):
    def ways(ids, device):
        stock = Stock(model, 16, device)
        ours, (heads, kv_heads, _) = stock.fused(), model.groups
        token, weight, bias = stock.token.weight, stock.qkv.weight, stock.qkv.bias
        position = stock.position.weight if model.L else None
        norm_weight, norm_bias = stock.norm.weight, getattr(stock.norm, "bias", None)

        def operators():
            hidden = nnf.embedding(ids, token)
            if position is not None:
                hidden = hidden + nnf.embedding(torch.arange(ids.shape[-1], device=device), position)
            if model.norm == "layer":
                normed = nnf.layer_norm(hidden, (32,), norm_weight, norm_bias)
            else:
                normed = nnf.rms_norm(hidden, (32,), norm_weight, 1e-5)
            query, key, value = nnf.linear(normed, weight, bias).view(*ids.shape, -1, 16).split(model.groups, -2)
            if stock.rotary is not None:
                half, cos, sin = 8, stock.cos[: ids.shape[-1]], stock.sin[: ids.shape[-1]]
                query, key = (x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin for x in (query, key))
            return hidden, query, key, value

        def functional():
            return F.embed_qkv(
                ids, token, weight, bias, num_heads=heads, num_kv_heads=kv_heads, position=position, norm=model.norm,
                norm_weight=norm_weight, norm_bias=norm_bias, rotary=stock.rotary,
            )  # fmt: skip

        return list(stock.parameters()), {
            "operators": operators,
            "stock modules": lambda: stock(ids),
            "functional.embed_qkv": functional,
            "EmbeddingQKV": lambda: ours(ids),
        }

    return ways


CASES = {
    "Embedding": lookup,
    "TokenPositionEmbedding": summed,
    "EmbeddingQKV, GPT-2": front(GPT),
    "EmbeddingQKV, Llama": front(LLAMA),
}


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", CASES)
def test_host(record, device, name, trains):
    def run():
        variants, grads = variants_of(device, name, trains)
        check(variants, grads, reference="operators")
        return timed(variants, grads)

    record(run, suite="host", case=name, direction="training" if trains else "forward", tokens=1)


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", CASES)
def test_compiled(record, device, name, trains, pytestconfig, monkeypatch):
    if device.type == "cuda":
        pytest.skip("the kernels' own rows are those of test_host")
    if trains and not pytestconfig.getoption("--full"):
        pytest.skip("a part of --full: Triton compiles a backward's kernels first")

    def run():
        variants, grads = variants_of(device, name, trains, compiled.compiled)
        check(variants, grads, reference="operators")
        monkeypatch.setattr(compiled.Launcher, "runs", False)
        return timed(variants, grads)

    case = f"{name}, by compiled kernels"
    record(run, suite="host", case=case, direction="training" if trains else "forward", tokens=1)


def variants_of(device, name, trains, context=contextlib.nullcontext):
    """Of a case, whose own calls run within `context`, and the gradients of their outputs."""
    parameters, ways = CASES[name](torch.tensor([[5]], device=device), device)
    variants = {way: Variant(lambda call=call: _tuple(call()), parameters) for way, call in ways.items()}
    for way in list(ways)[2:]:
        variants[way].context = context
    return variants, gradients(variants, trains)


def timed(variants, grads):
    many = {way: Variant(partial(calls, v, grads and grads[way]), [], v.context) for way, v in variants.items()}
    found = compare(many, None, Wall(), seconds=1)
    for row in found.values():
        each = {key: seconds / CALLS for key, seconds in row["seconds"]["forward"].items()}
        row["seconds"] = {"forward" if grads is None else "forward+backward": each}
    return found, {}


def calls(variant, grads):
    """CALLS in a row, as a loop over tokens makes them: one alone would find the caches of another variant."""
    with torch.set_grad_enabled(grads is not None):
        for _ in range(CALLS):
            outputs = variant.forward()
            if grads is not None:
                torch.autograd.grad(outputs, variant.parameters, grads)


def _tuple(outputs):
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
