"""What a loss does not reach gets no gradient, None as PyTorch's modules leave it: by zeros AdamW would decay it."""

import pytest
import torch
from conftest import DEVICE
from stock import outputs_of, stock
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyembed
from pyembed import relative
from pyembed.modules import parts

V, D, L = 11, 16, 12
IDS = torch.tensor([[0, 5, 5, 2, 1], [1, 2, 5, 10, 9]], device=DEVICE)


class Shifted(nn.LayerNorm):
    """So that the modules are called."""

    def forward(self, x):
        return super().forward(x) + 1


def three(*biases, norm=nn.LayerNorm, kv_heads=4, **options):
    linears = tuple(nn.Linear(D, n, bias=b) for n, b in zip((D, 4 * kv_heads, 4 * kv_heads), biases, strict=True))
    tables, heads = (nn.Embedding(V, D), nn.Embedding(L, D)), {"num_heads": 4, "num_kv_heads": kv_heads}
    return pyembed.EmbeddingQKV.from_modules(*tables, norm(D), qkv=linears, **heads, **options)


class Conv1D(nn.Module):
    """Hugging Face's."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.nf = nn.Parameter(torch.empty(D, D)), nn.Parameter(torch.empty(D)), D

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, D), self.weight).view(x.shape)


def three_conv1d():
    linears = Conv1D(), Conv1D(), Conv1D()
    return pyembed.EmbeddingQKV.from_modules(nn.Embedding(V, D), norm=nn.LayerNorm(D), qkv=linears, num_heads=4)


def front(**options):
    return pyembed.EmbeddingQKV(V, D, 4, **{"max_length": L, **options})


MODULES = {
    "three": lambda: three(True, True, True),
    "three, biases on some": lambda: three(True, False, True, kv_heads=2, segment=nn.Embedding(2, D)),
    "three, turned": lambda: three(False, False, False, norm=nn.RMSNorm, rotary=pyembed.Rotary(4, L), heads_first=True),
    "three, heads normed": lambda: three(
        True, True, True, query_norm=nn.RMSNorm(4, 1e-6), key_norm=nn.RMSNorm(4, 1e-6), rotary=pyembed.Rotary(4, L)
    ),
    "three, called": lambda: three(True, True, True, norm=Shifted),
    "three, as Conv1D": lambda: three_conv1d(),
    "one": front,
    "one, heads normed": lambda: front(position="rotary", norm="rms", qk_norm="rms", num_segments=2, bias=False),
    "sum": lambda: pyembed.TokenPositionEmbedding(V, D, L, num_segments=2, scale=2.0),
    "concat": lambda: pyembed.TokenPositionEmbedding(V, D, L, combine="concat"),
}
WAYS = [
    ("auto", "auto", 256),
    ("torch", "one_pass", 0),
    ("torch", "distinct", 0),
    ("triton", "one_pass", 0),
    ("triton", "distinct", 0),
]
LOSSES = [
    ("hidden",),
    ("query",),
    ("key",),
    ("value",),
    ("hidden", "value"),
    ("query", "key"),
    ("hidden", "query", "key", "value"),
]


def make(name):
    torch.manual_seed(0)
    module = MODULES[name]().to(DEVICE)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.fixture(params=WAYS, ids=lambda way: "-".join(map(str, way)))
def way(request, monkeypatch):
    """A backend and a plan, and whether few tokens call the modules."""
    backend, plan, tokens = request.param
    monkeypatch.setattr(parts, "PACK_TOKENS", tokens)
    with pyembed.backend(backend):
        yield plan


def loss_of(outputs, used):
    """With other gradients for each element; of a module without a projection, hidden is all there is."""
    g = torch.Generator().manual_seed(1)
    losses = [(x * torch.randn(x.shape, generator=g).to(x)).sum() for x in outputs]
    chosen = [loss for name, loss in zip(("hidden", "query", "key", "value"), losses, strict=False) if name in used]
    return sum(chosen)


def grads_of(module, loss, inputs=()):
    """{name: gradient or None}; also of inputs."""
    named = {**dict(module.named_parameters()), **dict(enumerate(inputs))}
    for parameter in named.values():
        parameter.grad = None
    loss.backward()
    return {name: parameter.grad for name, parameter in named.items()}


def assert_same(found, expected):
    assert {name for name, grad in found.items() if grad is None} == {name for name, grad in expected.items() if grad is None}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def plan_for(name, module, plan):
    """one_pass where no other can run it."""
    return "one_pass" if name in ("sum", "concat", "three, called") or module.segment is not None else plan


@pytest.mark.sample
@pytest.mark.parametrize("used", LOSSES, ids="+".join)
@pytest.mark.parametrize("name", MODULES)
def test_parameters_without_a_gradient(name, used, way):
    module = make(name)
    used = ("hidden",) if name in ("sum", "concat") else used
    expected = grads_of(module, loss_of(stock(module, IDS), used))
    with pyembed.plan(plan_for(name, module, way)):
        for _ in range(2):  # a first call, and one like it
            assert_same(grads_of(module, loss_of(outputs_of(module(IDS)), used)), expected)


FROZEN = {
    "tables": ("token", "position", "segment"),
    "all but key": ("token", "position", "segment", "norm", "qkv.0", "qkv.2", "query_norm", "key_norm"),
    "all but value's bias": ("token", "position", "norm", "qkv.0", "qkv.1", "qkv.2.weight"),
    "key": ("qkv.1",),
    "all but norm": ("token", "position", "segment", "qkv", "query_norm", "key_norm"),
}


@pytest.mark.sample
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("name", ["three", "three, biases on some", "three, turned", "three, heads normed", "one"])
def test_results_of_frozen_parameters(name, frozen, way):
    """They want a gradient where those of PyTorch's modules do: else a backward would run for nothing."""
    module = make(name)
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(not key.startswith(FROZEN[frozen]))
    expected = stock(module, IDS)
    wanted = [x.requires_grad for x in expected]
    with pyembed.plan(plan_for(name, module, way)):
        for _ in range(2):
            found = module(IDS)
            assert [x.requires_grad for x in found] == wanted
    if any(wanted):
        used = tuple(name for name, wants in zip(found._fields, wanted, strict=True) if wants)
        assert_same(grads_of(module, loss_of(found, used)), grads_of(module, loss_of(expected, used)))


def test_a_step_of_adamw(way):
    """With a weight decay, and a loss of query and value."""
    ours, theirs = make("three"), make("three")
    with pyembed.plan(way):
        for module, forward in ((ours, ours), (theirs, lambda ids: stock(theirs, ids))):
            optimizer = torch.optim.AdamW(module.parameters(), 0.1, weight_decay=0.5)
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(outputs_of(forward(IDS)), ("query", "value")).backward()
                optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-3)


@pytest.mark.sample
@pytest.mark.parametrize("kind", ["retained", "twice", "reentrant", "not reentrant", "accumulated"])
def test_backward_again(kind, way):
    """Nothing is remembered from one backward to the next: first of query, then of key."""
    module, expected = make("three"), {}
    unused = torch.zeros((), requires_grad=True)  # else a reentrant checkpoint takes it that no gradient is wanted

    def run():
        if "reentrant" in kind:
            return checkpoint(lambda ids, _: module(ids), IDS, unused, use_reentrant=kind == "reentrant")
        return module(IDS)

    with pyembed.plan(way):
        found = [loss_of(stock(module, IDS), (used,)) for used in ("query", "key")]
        expected = [grads_of(module, loss) for loss in found]
        if kind in ("retained", "twice"):
            outputs = run()
            losses = [loss_of(outputs, (used,)) for used in ("query", "key")]
            for loss, grads in zip(losses, expected, strict=True):
                module.zero_grad()
                loss.backward(retain_graph=True)
                assert_same({name: p.grad for name, p in module.named_parameters()}, grads)
            if kind == "twice":
                loss.backward()
                doubled = {name: None if grad is None else 2 * grad for name, grad in expected[1].items()}
                assert_same({name: p.grad for name, p in module.named_parameters()}, doubled)
        elif kind == "accumulated":
            module.zero_grad()
            for used in ("query", "key"):
                loss_of(run(), (used,)).backward()
            both = {
                name: b if a is None else a if b is None else a + b
                for (name, a), b in zip(expected[0].items(), expected[1].values(), strict=True)
            }
            assert_same({name: p.grad for name, p in module.named_parameters()}, both)
        else:
            for used, grads in zip(("query", "key"), expected, strict=True):
                found = grads_of(module, loss_of(run(), (used,)))
                if kind == "reentrant":  # whose own backward runs with gradients of zeros: PyTorch's leaves them too
                    found = {name: None if grads[name] is None and not grad.any() else grad for name, grad in found.items()}
                assert_same(found, grads)


def test_gradients_have_memory_of_their_own(way):
    module = make("three")
    with pyembed.plan(way):
        loss_of(module(IDS), ("query", "key", "value")).backward()
    for parameter in module.qkv.parameters():
        assert parameter.grad.untyped_storage().nbytes() == parameter.nbytes


def test_weights_that_change_before_the_backward(way):
    """An error, as by PyTorch's modules, not gradients of other weights."""
    module = make("three")
    with pyembed.plan(way):
        loss = loss_of(module(IDS), ("query", "key"))
    with torch.no_grad():
        module.qkv[1].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd_grad_says_what_is_unused(way):
    module = make("three")
    with pyembed.plan(way):
        query = module(IDS).query.sum()
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(query, [module.qkv[0].weight, module.qkv[1].weight], retain_graph=True)
    found = torch.autograd.grad(query, [module.qkv[0].weight, module.qkv[1].weight, module.qkv[2].bias], allow_unused=True)
    assert [grad is None for grad in found] == [False, True, True]


@pytest.mark.sample
@pytest.mark.parametrize("name", ["three", "one"])
def test_query_biases_without_a_gradient(name, way):
    """Transformer-XL's u and v: of a loss of key they are no part."""
    module, relatives = make(name), relative.TransformerXLBias(4, 4).to(DEVICE)
    pair = [nn.init.normal_(bias) for bias in (relatives.u, relatives.v)]
    with pyembed.plan(way):
        for used in (("key",), ("hidden",), ("query", "value")):
            expected = grads_of(module, loss_of(stock(module, IDS, query_biases=pair), used), pair)
            assert_same(grads_of(module, loss_of(module(IDS, query_biases=tuple(pair)), used), pair), expected)


@pytest.mark.sample
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("inside", [False, True])
def test_under_a_compiler(inside, backend, monkeypatch):
    """With the loss in the graph, as without a compiler; outside of it PyTorch's own modules get zeros too."""
    monkeypatch.setattr(parts, "PACK_TOKENS", 0)
    module = make("three")
    torch._dynamo.reset()

    def loss_of(outputs):
        return outputs[1].sin().sum() + outputs[3].square().sum()

    def compiled(forward):
        if inside:
            return torch.compile(lambda ids: loss_of(forward(ids)), backend="aot_eager", fullgraph=True)(IDS)
        return loss_of(torch.compile(forward, backend="aot_eager", fullgraph=True)(IDS))

    expected = grads_of(module, compiled(lambda ids: stock(module, ids)))
    with pyembed.backend(backend):
        assert_same(grads_of(module, compiled(module)), expected)
    assert (expected["qkv.1.weight"] is None) == inside


def test_second_derivatives(monkeypatch):
    """By PyTorch's operators: of query's gradient, which key's weight is no part of."""
    monkeypatch.setattr(parts, "PACK_TOKENS", 0)
    module, found = make("three"), []
    for outputs in (module(IDS), stock(module, IDS)):
        (grad,) = torch.autograd.grad(outputs[1].pow(3).sum(), module.token.weight, create_graph=True)
        found.append(grads_of(module, grad.pow(2).sum()))
    assert found[0]["qkv.1.weight"] is None
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-2)


def test_hooks_of_unused_parameters(monkeypatch):
    """By PyTorch's operators they do not run; by the kernels and distinct they are called with None, as PyTorch calls those
    of any operator's inputs."""
    monkeypatch.setattr(parts, "PACK_TOKENS", 0)
    module, seen = make("three"), []
    module.qkv[1].weight.register_hook(seen.append)
    module.qkv[0].weight.register_hook(lambda grad: 2 * grad)
    expected = grads_of(module, loss_of(stock(module, IDS), ("query",)))
    for plan, calls in (("one_pass", []), ("distinct", [None])):
        with pyembed.plan(plan):
            assert_same(grads_of(module, loss_of(module(IDS), ("query",))), expected)
        assert seen == calls
