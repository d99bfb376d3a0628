"""What becomes of query and key once they are projected: norms of heads, a second query, heads before tokens."""

import itertools

import pytest
import torch
from conftest import DEVICE, DTYPES
from numerics import WAYS, Case, assert_no_worse, take

import pyembed
from pyembed import functional as F
from pyembed import reference
from pyembed.call import Epilogue
from pyembed.plans import one_pass
from pyembed.rotary import Rotary, turns

PLANS = list(itertools.product(["torch", "triton"], ["one_pass", "distinct"]))


def epilogue_case(dtype, *, norms=False, second=False, first=False, head_dim=16, **options):
    case = Case(dtype, DEVICE, heads=4, kv_heads=2, head_dim=head_dim, **options)
    like = case.parameters["token"]
    if norms:
        case.parameters |= {name: (1 + 0.3 * torch.randn(head_dim)).to(like) for name in ("query_norm", "key_norm")}
    if second:
        case.parameters |= {name: torch.randn(4, head_dim).to(like) for name in ("u", "v")}
    case.options["heads_first"] = first
    grads = [g.transpose(-3, -2) if first and i else g for i, g in enumerate(case.grads)]
    if second:
        grads[1] = torch.stack([grads[1], grads[1].flip(0)])
    case.grads = grads
    return case


def with_biases(function):
    def call(*args, u=None, v=None, **options):
        return function(*args, query_biases=None if u is None else (u, v), **options)

    return call


def assert_right(case, backward=True):
    ours = case.run(with_biases(F.embed_qkv), backward=backward)
    eager = case.run(with_biases(reference.embed_qkv), backward=backward)
    oracle = case.run(with_biases(reference.embed_qkv), torch.float64, backward=backward)
    for name in oracle:
        assert_no_worse(name, ours[name], eager[name], oracle[name])
    return ours


@pytest.mark.sample
@pytest.mark.parametrize("rotary", [None, False, True])
@pytest.mark.parametrize("backend, plan", PLANS)
@pytest.mark.parametrize("norms, second, first", [(True, False, False), (True, False, True), (False, False, True)])
def test_every_plan(norms, second, first, backend, plan, rotary):
    case = epilogue_case(torch.float32, norms=norms, second=second, first=first)
    if rotary is not None:
        case.options["rotary"] = Rotary(16, 24, rotary_dim=8, interleaved=rotary).to(DEVICE)
    with pyembed.backend(backend), pyembed.plan(plan):
        assert_right(case)


@pytest.mark.sample
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("backend, plan", PLANS)
def test_second_query(first, backend, plan):
    """Transformer-XL's q + u and q + v, u and v with gradients."""
    with pyembed.backend(backend), pyembed.plan(plan):
        found = assert_right(epilogue_case(torch.float32, second=True, first=first))
    assert found["query"].shape == ((2, 2, 4, 19, 16) if first else (2, 2, 19, 4, 16)) and found["query"].is_contiguous()


@pytest.mark.usefixtures("triton")
@pytest.mark.sample
@pytest.mark.parametrize("head_dim, interleaved", [(16, None), (32, False), (64, True), (64, False), (24, False), (8, True)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_norms_of_heads(dtype, way, head_dim, interleaved, monkeypatch):
    """Without gradients the epilogue normalises, of any width that a tile can hold; PyTorch does the rest."""
    take(way, monkeypatch)
    case = epilogue_case(dtype, norms=True, first=True, head_dim=head_dim)
    case.options["head_eps"] = 0.3
    if interleaved is not None:
        case.options["rotary"] = Rotary(head_dim, 24, interleaved=interleaved).to(DEVICE)
    fused = []
    monkeypatch.setattr(one_pass, "finish", lambda *a: fused.append(1) or reference.finish(*a))
    case.parameters = {k: p.detach() for k, p in case.parameters.items()}
    with torch.no_grad():
        ours = case.run(F.embed_qkv, backward=False)
    assert bool(fused) == (head_dim in (24, 8))
    monkeypatch.undo()
    eager, oracle = (case.run(reference.embed_qkv, d, backward=False) for d in (None, torch.float64))
    for name in oracle:
        assert_no_worse(name, ours[name], eager[name], oracle[name])


@pytest.mark.usefixtures("triton")
def test_norms_of_heads_are_pytorchs_where_they_learn():
    found = assert_right(epilogue_case(torch.float32, norms=True, B=1, T=3))
    assert found["grad of query_norm"].any() and found["grad of key_norm"].any()


def test_the_operator_has_no_gradient_of_normalised_heads():
    """It is not to be had silently: embed_qkv asks for it only where none is wanted."""
    case = epilogue_case(torch.float32, norms=True)
    case.parameters = p = {k: v.requires_grad_() for k, v in case.parameters.items()}
    call = case.call(epilogue=Epilogue(p["query_norm"], p["key_norm"], head_eps=1e-6))
    for observed in (False, True):
        outputs = one_pass.embed_qkv(call, observed=observed)
        with pytest.raises(RuntimeError, match="no gradient of normalised heads"):
            outputs[1].sum().backward()


@pytest.mark.parametrize("backend, plan", [*PLANS, ("torch", "table"), ("triton", "table")])
@pytest.mark.parametrize("qk_norm", ["rms", "layer", None])
def test_modules(backend, plan, qk_norm):
    """Against the modules themselves, one after the other."""
    torch.manual_seed(0)
    rotary = Rotary(16, 32)
    front = pyembed.EmbeddingQKV(31, 24, 4, num_kv_heads=2, head_dim=16, qk_norm=qk_norm, heads_first=True, rotary=rotary)
    front.to(DEVICE).requires_grad_(plan != "table")
    for p in front.parameters():
        p.data += 0.1 * torch.randn_like(p)
    ids = torch.randint(31, (2, 9), device=DEVICE)
    hidden = front.token(ids) + front.position(torch.arange(9, device=DEVICE))
    heads = front.qkv(front.norm(hidden)).unflatten(-1, (8, 16)).split((4, 2, 2), -2)
    normed = [x if norm is None else norm(x) for x, norm in zip(heads, (front.query_norm, front.key_norm, None), strict=True)]
    epilogue = Epilogue(None, None, None, *turns(rotary.to(DEVICE), ids, None))
    turned = [reference.rotate(x, epilogue) for x in normed[:2]]
    expected = (hidden, *(x.transpose(1, 2) for x in (*turned, normed[2])))
    with pyembed.backend(backend), pyembed.plan(plan):
        found = front(ids)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert ours.is_contiguous()


def test_second_query_of_one_token(triton):
    u, v = (torch.randn(2, 2, device=DEVICE, requires_grad=True) for _ in range(2))
    token, weight = torch.randn(7, 4, device=DEVICE), torch.randn(12, 4, device=DEVICE)
    F.embed_qkv(torch.tensor(3, device=DEVICE), token, weight, num_heads=2, query_biases=(u, v)).query.sum().backward()
    assert torch.equal(u.grad, torch.ones_like(u)) and torch.equal(v.grad, torch.ones_like(v))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_transformer_xl(backend):
    """Both queries at once are those of TransformerXLBias.queries."""
    front = pyembed.EmbeddingQKV(31, 32, 4, position=None, norm=None, heads_first=True).to(DEVICE)
    relative = pyembed.relative.TransformerXLBias(4, 8).to(DEVICE)
    ids = torch.randint(31, (2, 9), device=DEVICE)
    with pyembed.backend(backend):
        plain, found = front(ids), front(ids, query_biases=(relative.u, relative.v))
        with torch.no_grad(), pyembed.plan("table"):
            looked_up = front(ids, query_biases=(relative.u, relative.v))
    for query in (found.query, looked_up.query):
        for ours, theirs in zip(query, relative.queries(plain.query), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    relative(found.query[1], found.key).sum().backward()
    assert relative.v.grad.any()


def test_bad_ends():
    ids, token, weight = torch.tensor([[0, 1]]), torch.randn(3, 4), torch.randn(12, 4)
    norm, pair = torch.ones(4), (torch.zeros(1, 4),) * 2
    bad = {
        "key_norm: expected a Tensor": {"query_norm": norm},
        "query_norm: expected a Tensor": {"key_norm": norm},
        "query_norm: expected shape": {"query_norm": norm[:3], "key_norm": norm},
        "query_norm: expected dtype": {"query_norm": norm.half(), "key_norm": norm},
        "head_eps: expected a number of at least 0, got -1.0": {"head_eps": -1.0},
        "query_biases: expected a pair": {"query_biases": norm},
        "query_biases: expected shape": {"query_biases": (norm, norm)},
        "query_biases: expected None": {"query_biases": pair, "query_norm": norm, "key_norm": norm},
        r"query_biases: expected None .* turned": {"query_biases": pair, "rotary": Rotary(4, 8)},
    }
    for message, options in bad.items():
        with pytest.raises((TypeError, ValueError), match=message):
            F.embed_qkv(ids, token, weight, num_heads=1, **options)
    with pytest.raises(ValueError, match="heads_first: expected False"):
        F.embed_qkv(ids[0, 0], token, weight, num_heads=1, heads_first=True)
    front = pyembed.EmbeddingQKV(3, 4, 1, dtype=torch.float16)
    front.build_table()
    with torch.no_grad(), pytest.raises(TypeError, match=r"query_biases: expected dtype torch\.float16"):
        front(ids, query_biases=pair)
    with pytest.raises(ValueError, match="qk_norm: expected one of"):
        pyembed.EmbeddingQKV(3, 4, 1, qk_norm="batch")
    with pytest.raises(ValueError, match="expected both or neither"):
        pyembed.EmbeddingQKV.from_modules(
            torch.nn.Embedding(3, 4), qkv=torch.nn.Linear(4, 12), num_heads=1, query_norm=torch.nn.RMSNorm(4)
        )
