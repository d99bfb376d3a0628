"""The handle, and the guard: what was computed before goes to the very tensor that it belongs to, or to nobody."""

import copy
import importlib
import pickle
import sys
import threading
import weakref

import pytest
import torch
from conftest import full
from families import D, HandNorm, Own, OwnNorm, Packed, V, build, logits, tokens
from torch import nn

import pyembed
from pyembed.fuse import Difference, Fused


@pytest.fixture
def model():
    return build("nanoGPT")


@pytest.fixture
def distinct():
    with pyembed.plan("distinct"):
        yield


def run(model, ids, backward=False):
    out = logits(model, ids)
    if not backward:
        return out.detach()
    model.zero_grad()
    out.sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


def close(a, b):
    return torch.allclose(a, b, 1e-4, 1e-5)


def attributes(model):
    return {name: (type(m), dict(m.__dict__), list(m._parameters.items())) for name, m in model.named_modules()}


def test_the_name_is_the_function_and_the_package():
    assert callable(pyembed.fuse) and pyembed.fuse.__name__ == "fuse"
    importlib.import_module("pyembed.fuse")
    exec("import pyembed.fuse\nimport pyembed.fuse.fused")
    assert callable(pyembed.fuse) and sys.modules["pyembed.fuse"].Fused is Fused


def test_handle(model, distinct):
    before, ids = attributes(model), tokens()
    expected = run(model, ids)
    fused = pyembed.fuse(model, ids)
    assert fused.modules["linear"] == ["blocks.0.attention.c_attn"] and fused.modules["position"] == ["pos"]
    assert fused.why_not is None and fused.error[1] < 1e-3 and fused.forward_seconds > 0
    assert close(run(model, ids), expected) and fused.calls == {"fused": 1}
    assert "blocks.0.norm1" in str(fused) and "     1 call fused" in str(fused)
    fused.undo()
    assert attributes(model) == before and torch.equal(run(model, ids), expected) and fused.calls == {"fused": 1}
    with pytest.raises(RuntimeError, match="undone before"):
        fused.undo()
    with pyembed.fuse(model, ids) as again:
        again.undo()
    with pytest.raises(ZeroDivisionError), pyembed.fuse(model, ids):
        _ = 1 / 0
    assert attributes(model) == before


def test_errors(model):
    ids = tokens()
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got int"):
        pyembed.fuse(3, ids)
    with pytest.raises(TypeError, match="ids: expected a batch"):
        pyembed.fuse(model)
    before = attributes(model)
    with pytest.raises(IndexError) as error:
        pyembed.fuse(model, ids + V)
    if hasattr(error.value, "add_note"):
        assert "refused this batch" in error.value.__notes__[0]
    linear = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D))
    fused = pyembed.fuse(linear, ids)
    assert "1, a Linear" in fused.why_not and "nothing is fused" in str(fused)
    fused.undo()
    with pytest.raises(ValueError, match="got none: none of the modules"):
        pyembed.fuse(linear, ids, strict=True)
    assert attributes(model) == before
    with pyembed.fuse(model, ids, gradients=False), pytest.raises(ValueError, match="whose tok is"):
        pyembed.fuse(model, ids)


class Steps(Own):
    """Its results depend on how often it was called, or on random numbers, or there are none."""

    kind, at = "", 0

    def forward(self, ids):
        if self.kind == "state":
            self.at += 1
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device) + self.at)
        for block in self.blocks:
            x = block(x)
        if self.kind == "draws":
            x = nn.functional.dropout(x, 0.5, True)
        return None if self.kind == "none" else self.head(x)


@pytest.mark.parametrize(
    "kind, why",
    [("state", "two forward passes of the model itself over this batch differ"), ("none", "no tensor"), ("meta", "no values")],
)
def test_models_that_cannot_be_verified(kind, why):
    model = Steps(nn.LayerNorm, Packed, layers=1).to("meta" if kind == "meta" else "cpu")
    model.kind = kind
    before = attributes(model)
    ids = tokens().to("meta") if kind == "meta" else tokens()
    fused = pyembed.fuse(model, ids)
    assert why in fused.why_not
    with pytest.raises(ValueError, match=f"can be fused, got none: .*{why}"):
        pyembed.fuse(model, ids, strict=True)
    if kind != "state":
        assert attributes(model) == before


def test_a_model_that_draws_numbers(monkeypatch):
    """Is verified with the same numbers: a wrong result is found."""
    model, fusion = Steps(nn.LayerNorm, Packed, layers=1), sys.modules["pyembed.fuse.fusion"]
    model.kind = "draws"
    before = torch.get_rng_state()
    assert pyembed.fuse(model, tokens()).error[1] < 1e-4 and torch.equal(torch.get_rng_state(), before)
    model, right = copy.deepcopy(model), fusion.Fusion.projected
    monkeypatch.setattr(fusion.Fusion, "projected", lambda self, x, place: 1.01 * right(self, x, place))
    with pytest.raises(Difference):
        pyembed.fuse(model, tokens())


def test_a_wrong_result_undoes_the_fusing(model, monkeypatch):
    """Of outputs, of gradients, and of a bias that no output shows."""
    before, ids, fusion = attributes(model), tokens(), sys.modules["pyembed.fuse.fusion"]
    right = fusion.Fusion._projection
    for field, change in (
        ("bias", lambda b: b + 1e-3),
        ("weight", lambda w: w.detach() + 0 * w),
        ("weight", lambda w: 1.001 * w),
    ):

        def wrong(self, field=field, change=change):
            found = right(self)
            return found._replace(**{field: change(getattr(found, field))})

        monkeypatch.setattr(fusion.Fusion, "_projection", wrong)
        with pytest.raises(Difference, match=r"blocks.0.attention.c_attn.*: expected a difference of at most .*, got"):
            pyembed.fuse(model, ids)
        assert attributes(model) == before


CHANGES = {
    "other ids": lambda model, ids: None,
    "hook": lambda model, ids: model.blocks[0].norm1.register_forward_hook(lambda m, x, y: 2 * y),
    "lookup hook": lambda model, ids: model.tok.register_forward_hook(lambda m, x, y: y.mul_(2)),
    "pre-hook": lambda model, ids: model.blocks[0].register_forward_pre_hook(lambda m, x: (x[0] + 1,)),
    "in-place pre-hook": lambda model, ids: model.blocks[0].register_forward_pre_hook(
        lambda m, x: (x[0].data.mul_(torch.arange(D)), None)[1]
    ),
    "forward": lambda model, ids: setattr(model.blocks[0].norm1, "forward", lambda x: 2 * x),
    "eps": lambda model, ids: setattr(model.blocks[0].norm1, "eps", 3.0),
    "weight": lambda model, ids: nn.init.normal_(model.blocks[0].attention.c_attn.weight),
    "weight.data": lambda model, ids: model.blocks[0].attention.c_attn.weight.data.mul_(3),
    "new weight": lambda model, ids: setattr(model.tok, "weight", nn.Parameter(torch.randn(V, D))),
    "dropout": lambda model, ids: model.drop.train(),
    "new module": lambda model, ids: setattr(model.blocks[0], "norm1", nn.LayerNorm(D)),
    "new first block": lambda model, ids: model.blocks.insert(0, copy.deepcopy(model.blocks[1])),
}


@pytest.mark.parametrize(
    "name",
    [
        full(n) if n in ("new module", "weight", "forward", "new weight", "pre-hook", "lookup hook", "new first block") else n
        for n in CHANGES
    ],
)
def test_changes_after_fusing(name, distinct):
    """The model gives what it would give unfused."""
    model, twin = (Own(HandNorm, Packed, 0.1).eval() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    fused = pyembed.fuse(model, tokens(), gradients=False)
    for each in (model, twin):
        torch.manual_seed(0)
        CHANGES[name](each, tokens())
    results = []
    for each in (model, twin):
        torch.manual_seed(1)
        results.append(run(each, tokens(3, 7, seed=1)))
    assert close(*results)
    is_fused = {"other ids", "weight", "weight.data", "new weight"}
    assert bool(fused.calls["fused"]) == (name in is_fused), fused.calls


def test_a_monkeypatched_class(distinct, monkeypatch):
    model = Own(OwnNorm, Packed).eval()
    fused = pyembed.fuse(model, tokens())
    monkeypatch.setattr(OwnNorm, "forward", lambda self, x: 2 * x)
    found = run(model, tokens())
    assert fused.calls["fused"] == 0 and "blocks.0.norm1 was changed" in str(fused)
    fused.undo()
    assert torch.equal(found, run(model, tokens()))


def test_rows_of_a_weight_that_changed_are_refused(model, distinct):
    with pyembed.fuse(model, tokens()):
        rows = model.tok(tokens())
        with torch.no_grad():
            model.tok.weight.add_(1)
        with pytest.raises(RuntimeError, match="tok: rows were asked for after its weight was changed"):
            rows.sum()


@pytest.mark.parametrize("change", ["weight", "eps", "forward"])
def test_a_norm_that_changed_before_its_result_was_asked_for_is_refused(model, distinct, change):
    with pyembed.fuse(model, tokens(), gradients=False), torch.no_grad():
        norm = model.blocks[0].norm1
        normed = norm(model.tok(tokens()) + model.pos(torch.arange(9)))
        {"weight": lambda: norm.weight.mul_(2), "eps": lambda: setattr(norm, "eps", 2.0)}.get(
            change, lambda: setattr(norm, "forward", lambda x: x)
        )()
        with pytest.raises(RuntimeError, match=r"blocks.0.norm1: its result was asked for after"):
            normed.sum()


def test_the_gradient_of_hidden_alone_is_refused(distinct):
    """It does not pass through hidden in a fused model; what is asked before the norm is right."""
    kept = []

    class Keeps(Own):
        def forward(self, ids):
            x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
            if self.early:
                x.retain_grad()
            kept.append(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model = Keeps(nn.LayerNorm, Packed).eval()
    model.early = False
    fused = pyembed.fuse(model, tokens())
    out = model(tokens())
    assert fused.calls["fused"] == 1
    for ask in (
        lambda x: x.retain_grad(),
        lambda x: x.register_hook(print),
        lambda x: torch.autograd.grad(out.sum(), x),
        torch.autograd.graph.get_gradient_edge,
        lambda x: torch.autograd.graph.register_multi_grad_hook([x], print),
    ):
        with pytest.raises(RuntimeError, match="gradient of the hidden state"):
            ask(kept[-1])
    assert type(pickle.loads(pickle.dumps(kept[-1].detach()))) is torch.Tensor
    with pytest.warns(UserWarning, match="not a leaf"):  # once, PyTorch's own
        assert kept[-1].grad is None
    out.sum().backward(inputs=[kept[-1]])
    with pytest.raises(RuntimeError, match="gradient of the hidden state"):
        _ = kept[-1].grad
    normed = model.blocks[0].norm1(model.tok(tokens()) + model.pos(torch.arange(9)))
    model.blocks[0].attention(normed)
    with pytest.raises(RuntimeError, match="or of its norm"):
        normed.register_hook(print)
    model.early, grads = True, []
    for _ in range(2):
        model(tokens()).sum().backward()
        grads.append(kept[-1].grad)
        fused.undo() if not fused._undone else None
    assert close(*grads)


def test_threads(model, distinct):
    """Calls at the same time do not mix."""
    batches = [tokens(2, 5 + i, seed=i) for i in range(4)]
    expected = [run(model, ids) for ids in batches]
    fused, wrong = pyembed.fuse(model, tokens()), []

    def work(i):
        for _ in range(5):
            if not close(run(model, batches[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and fused.calls["fused"] > 0


def test_misses(distinct):
    """A model that asks for hidden itself is left alone for a while, then tried again."""

    class Late(Own):
        late = False

        def forward(self, ids):
            x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x * 1 if self.late else x)
            return self.head(x)

    model = Late(nn.LayerNorm, Packed, layers=1).eval()
    fused = pyembed.fuse(model, tokens(), gradients=False)
    model.late = True
    with torch.no_grad():
        for _ in range(5):
            model(tokens())
        assert fused._fusion.missed > 3 and "2 calls not fused: projections that were computed" in str(fused)
        model.late = False
        for _ in range(64):
            model(tokens())
    assert fused.calls["fused"] >= 3


def test_what_nobody_takes_is_given_back(model, distinct):
    pyembed.fuse(model, tokens(), gradients=False)
    for norms in (False, True):
        hidden = model.tok(tokens()) + model.pos(torch.arange(9))
        projected = weakref.ref(hidden.tag.outs[0])
        kept = model.blocks[0].norm1(hidden) if norms else hidden
        assert kept.sum().isfinite() and projected() is None


def test_replicas(model, distinct):
    """Of nn.DataParallel: modules of the same classes, with other weights."""

    def replicate(module):
        twin = module._replicate_for_data_parallel()
        twin._modules = {name: child and replicate(child) for name, child in module._modules.items()}
        for name, p in module._parameters.items():
            setattr(twin, name, None if p is None else 2 * p)
        return twin

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in {*twin.parameters()}:
            p.mul_(2)
    fused = pyembed.fuse(model, tokens(), gradients=False)
    assert close(replicate(model)(tokens()), twin(tokens())) and not fused.calls["fused"]


@pytest.mark.parametrize("mode", [torch.inference_mode, full(torch.no_grad), full(torch.enable_grad)])
def test_fused_within_a_mode(mode):
    model = build("nanoGPT")
    with mode():
        ids = tokens()
        want, fused = model(ids), pyembed.fuse(model, ids)
        with pyembed.plan("distinct"):
            assert close(model(ids), want) and fused.calls == {"fused": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, full(torch.float16), full(torch.float64)])
def test_other_dtypes(dtype):
    """Of an RMSNorm whose eps is that of float32, and in float64 another, which is not proved."""
    model = Own(nn.RMSNorm, Packed).to(dtype).eval()
    want = model(tokens())
    fused = pyembed.fuse(model, tokens())
    if dtype == torch.float64:
        assert "none of the modules" in fused.why_not and "blocks.0.norm1, a RMSNorm" in fused.why_not
        return
    with pyembed.plan("distinct"):
        found = model(tokens())
    assert (found - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max() and fused.calls == {"fused": 1}


class NarrowNorm(nn.RMSNorm):
    """As transformers' RMSNorms are: in float32, whatever the dtype."""

    def forward(self, x):
        return self.weight * nn.functional.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)


def test_float64_is_not_what_computes_in_float32():
    norm = lambda width: NarrowNorm(width, eps=1e-5)  # noqa: E731
    for dtype, proved in ((torch.float32, True), (torch.float64, False)):
        fused = pyembed.fuse(Own(norm, Packed).to(dtype), tokens(), gradients=False)
        assert (fused.why_not is None) is proved and (proved or "could be proved" in fused.why_not)
    assert pyembed.fuse(Own(HandNorm, Packed).double(), tokens(), gradients=False).why_not is None


def test_small_calls_are_the_models_own(model):
    """Without a forced plan nothing happens at sizes that cannot gain."""
    fused = pyembed.fuse(model, tokens())
    with torch.no_grad():
        rows = model.tok(tokens(1, 1))
    assert type(rows) is torch.Tensor and type(model.pos(torch.tensor([[3]]))) is torch.Tensor
    model(tokens())
    assert fused.calls == {"too few tokens to gain anything": 2} and "plans are compared from" in fused.plan


def test_second_derivatives_are_refused(model, distinct):
    pyembed.fuse(model, tokens())
    weight = model.blocks[0].norm1.weight
    (grad,) = torch.autograd.grad(model(tokens()).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        grad.sum().backward()
