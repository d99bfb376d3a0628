"""Rows of a table alone: nn.Embedding's lookup, its gradient, and the sum of token and position rows.

The gradient is dense, as nn.Embedding's is: all V rows are written. `half`: uniformly random ids, but every second one is the
same token. Beside ours run aten, Inductor and Liger's experimental embedding, where they run.
"""

import functools
import importlib

import pytest
import torch
import torch.nn.functional as nnf

import pyembed
import pyembed.functional as F
from pyembed.benchmark import roofline
from pyembed.benchmark.cases import make_ids
from pyembed.benchmark.peers import PEERS, capture_all, check, compiled, compiler_missing, gradients, reason_of
from pyembed.benchmark.timing import Variant, clock, compare, peak_bytes, saved_bytes

KINDS = ["natural", "uniform", "half"]
CPU = [(50257, 768, 8, 1024, torch.float32)]
GPU = [(50257, 768, 16, 1024, torch.bfloat16), (128256, 4096, 16, 1024, torch.bfloat16)]
CASES = GPU if torch.cuda.is_available() else CPU


def _liger(ids, weight):
    if not weight.is_cuda:
        raise ImportError("its kernels want a GPU")
    return importlib.import_module("liger_kernel.ops").LigerEmbeddingFunction.apply(weight, ids)


def checked_row(ways, ids, parameters, trains, works, seconds=2):
    """(rows, left_out) of {name: function of ids and parameters -> tensor}; works: by direction."""
    device, dtype = ids.device, parameters[0].dtype
    torch.compiler.reset()
    variants, left_out = {}, {}
    for name, way in ways.items():
        variant = Variant(lambda way=way: (way(ids, *parameters),), parameters)
        try:
            if name == "torch.compile" and compiler_missing(device):
                raise RuntimeError(compiler_missing(device))
            with torch.set_grad_enabled(trains):
                variant.forward()
        except Exception as error:  # whatever another library does on this machine
            if name not in PEERS:
                raise
            left_out[name] = reason_of(error)
            continue
        variants[name] = variant
    grads = gradients(variants, trains)
    left_out |= check(variants, grads)
    rows = {name: {"saved": saved_bytes(v) if trains else None} for name, v in variants.items()}
    for name, row in rows.items():
        row["peak"] = peak_bytes(variants[name], grads and grads[name], device)
    if device.type == "cuda" and not trains:
        left_out |= capture_all(variants)
    found = compare(variants, grads, clock(device), seconds)
    rates = roofline.measure(device, dtype)
    rows = {name: rows[name] for name in variants}
    for name, row in rows.items():
        row |= found[name]
        row["limit"] = {direction: works[direction].seconds(rates) for direction in row["seconds"]}
    return rows, left_out


def works_of(forward, backward):
    return {"forward": forward, "training forward": forward, "backward": backward, "forward+backward": forward + backward}


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("V, D, B, T, dtype", CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_embedding(record, device, tokens, V, D, B, T, dtype, kind, trains):
    ids = make_ids(kind, V, B * T, tokens).view(B, T).to(device)
    distinct = ids.unique().numel()

    def run():
        torch.manual_seed(0)
        module = pyembed.Embedding(V, D, device=device, dtype=dtype)
        ways = {"eager": nnf.embedding, "torch.compile": compiled(lambda ids, w: nnf.embedding(ids, w)), "Liger": _liger}
        ways["ours"] = lambda ids, _: module(ids)
        works = works_of(*roofline.lookup(V, D, B * T, distinct, dtype.itemsize))
        return checked_row(ways, ids, [module.weight], trains, works)

    record(
        run, suite="embedding", case=f"Embedding({V}, {D}), {B} × {T}, {kind} ids", tokens=B * T, distinct=distinct, ids=kind,
        dtype=str(dtype)[6:], direction="training" if trains else "forward",
    )  # fmt: skip


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("V, D, B, T, dtype", CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_embed(record, device, tokens, V, D, B, T, dtype, trains):
    ids = make_ids("natural", V, B * T, tokens).view(B, T).to(device)
    distinct = ids.unique().numel()

    def stock(ids, token, position):
        return nnf.embedding(ids, token) + nnf.embedding(torch.arange(ids.shape[-1], device=ids.device), position)

    def run():
        torch.manual_seed(0)
        draw = functools.partial(torch.randn, device=device, dtype=dtype)
        tables = [draw(V, D).requires_grad_(), draw(T, D).requires_grad_()]
        ways = {"eager": stock, "torch.compile": compiled(stock), "ours": F.embed}
        forward, backward = roofline.lookup(V, D, B * T, distinct, dtype.itemsize, places=T)
        backward += roofline.Work(T * D * dtype.itemsize, 0)
        return checked_row(ways, ids, tables, trains, works_of(forward, backward))

    record(
        run, suite="embedding", case=f"token + position, ({V}, {D}), {B} × {T}", tokens=B * T, distinct=distinct, ids="natural",
        dtype=str(dtype)[6:], direction="training" if trains else "forward",
    )  # fmt: skip
