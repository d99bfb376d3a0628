"""The table of a fused front end, for calls without gradients."""

import gc
import sys
import weakref

import pytest
import torch
from conftest import full
from families import build, logits, tokens

import pyembed
from pyembed.fuse import Difference


@pytest.fixture(autouse=True)
def table():
    with pyembed.plan("table"):
        yield


def close(a, b):
    return torch.allclose(a, b, 1e-4, 1e-5)


def run(model, ids):
    with torch.no_grad():
        return logits(model, ids)


@pytest.mark.parametrize("name", ["nanoGPT", "GPT2", *map(full, ("Qwen3", "lecture", "LLMs-from-scratch", "OPT", "BART"))])
def test_same_results(name):
    model, ids = build(name), tokens(3, 7, seed=2)
    want = run(model, ids)
    fused = pyembed.fuse(model, tokens(), gradients=False)
    assert torch.equal(run(model, ids), want) and not fused.calls["fused"]
    size = fused.build_table()
    assert close(run(model, ids), want) and fused.calls["fused"] == fused.calls["fused by the table"] == 1
    assert f"a table of {size:,} bytes" in str(fused) and "1 call fused by the table" in str(fused)
    logits(model, ids).sum().backward()
    assert fused.calls["fused by the table"] == 1
    with pyembed.plan("distinct"):
        assert close(run(model, ids), want) and fused.calls["fused by the table"] == 1 and fused.calls["fused"] == 2
    with torch.inference_mode():
        assert close(logits(model, ids), want) and fused.calls["fused by the table"] == 2


CHANGES = {
    "weight": lambda model: model.blocks[0].attention.c_attn.weight.mul_(2),
    "weight.data": lambda model: model.pos.weight.data.mul_(3),
    "norm": lambda model: model.blocks[0].norm1.weight.add_(1),
    "replaced": lambda model: setattr(model.tok, "weight", torch.nn.Parameter(2 * model.tok.weight)),
    "loaded": lambda model: model.load_state_dict({n: 1.5 * p for n, p in model.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_is_made_anew(change):
    model, ids = build("nanoGPT"), tokens()
    fused = pyembed.fuse(model, ids, gradients=False)
    fused.build_table()
    with torch.no_grad():
        CHANGES[change](model)
    found = run(model, ids)
    assert fused.calls["fused by the table"] == 1
    fused.undo()
    assert close(found, run(model, ids))


def test_is_given_back(monkeypatch):
    model, ids = build("nanoGPT"), tokens()
    fused = pyembed.fuse(model, ids, gradients=False)
    fused.build_table()
    first = weakref.ref(fused._fusion.table)
    fused.drop_table()
    run(model, ids)
    gc.collect()
    assert first() is None and fused.calls["fused"] == 0
    fused.build_table()
    second = weakref.ref(fused._fusion.table)
    module = sys.modules["pyembed.fuse.table"]
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "Table", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
        model.tok.weight.mul_(2)
        with pytest.warns(UserWarning, match="could not be made anew .full."):
            found = run(model, ids)
        assert torch.equal(run(model, ids), found)
    fused.undo()
    gc.collect()
    assert second() is None and torch.equal(run(model, ids), found)
    with pytest.raises(RuntimeError, match="build_table: expected a model whose front end is fused"):
        fused.build_table()


def test_errors(monkeypatch):
    model, ids = build("nanoGPT"), tokens()
    fused = pyembed.fuse(model, ids, gradients=False)
    fused.build_table()
    with pytest.raises(IndexError, match="ids: expected values in"):
        run(model, ids + 97)
    fused.drop_table()
    table = sys.modules["pyembed.plans.table"].Table
    right = table.look_up

    def wrong(self, call, kernels):
        found = right(self, call, kernels)
        return found._replace(query=found.query + 0.01)

    monkeypatch.setattr(table, "look_up", wrong)
    with pytest.raises(Difference, match="c_attn"):
        fused.build_table()
    assert fused._fusion.table is None


@pytest.mark.full
@pytest.mark.parametrize("name, why", [("Gemma", "rows are scaled"), ("BERT", "segments are added"), ("Bloom", "is not")])
def test_refused(name, why):
    fused = pyembed.fuse(build(name), tokens(), gradients=False)
    with pytest.raises(RuntimeError, match=f"build_table: .*{why}"):
        fused.build_table()
