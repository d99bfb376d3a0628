"""The same bits again: of a call that is repeated, and of a token in any batch."""

import pytest
import torch
from aot import record
from conftest import CUDA, DEVICE, DTYPES, full
from numerics import Case

import pyembed
from pyembed import functional as F
from pyembed import reference

ROUTES = [("torch", "one_pass"), ("torch", "distinct"), ("triton", "one_pass"), ("triton", "distinct")]


@pytest.mark.parametrize("T", [8, full(60)])
@pytest.mark.parametrize("strict", [full(False), True])
@pytest.mark.parametrize("backend, plan", ROUTES)
def test_repeatable(backend, plan, strict, T):
    """Forward and backward, also where PyTorch is told to refuse what is not."""
    case = Case(DTYPES[-1] if CUDA else torch.float32, DEVICE, B=4, T=T, V=5, position_ids="BT")
    torch.use_deterministic_algorithms(strict)
    try:
        with pyembed.backend(backend), pyembed.plan(plan):
            first, second = case.run(F.embed_qkv), case.run(F.embed_qkv)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_strictness_changes_no_bits():
    """What PyTorch fills then (fresh memory) is written by us anyway."""
    case = Case(torch.float32, DEVICE, B=4, T=60, V=5)
    with pyembed.backend("triton"):
        plain = case.run(F.embed_qkv)
        torch.use_deterministic_algorithms(True)
        try:
            strict = case.run(F.embed_qkv)
        finally:
            torch.use_deterministic_algorithms(False)
    for name in plain:
        assert torch.equal(plain[name], strict[name]), name


# The interpreter multiplies by NumPy, whose float32 products depend on a row's place.
INVARIANT = [("torch", dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
INVARIANT += [("triton", dtype) for dtype in (DTYPES if CUDA else [torch.float64])]


def front_end(dtype, norm, D=40, N=63, rotary=False, V=50):
    g = torch.Generator().manual_seed(3)
    token, position, weight, bias, gamma = (
        torch.randn(shape, generator=g).to(dtype).to(DEVICE) for shape in ((V, D), (400, D), (N, D), (N,), (D,))
    )
    call = {"num_heads": 3, "position": position, "norm": norm, "norm_weight": None if norm is None else gamma}
    if rotary:
        call |= {"num_heads": 1, "rotary": pyembed.Rotary(20, 400, device=DEVICE)}

    def run(ids, position_ids):
        return F.embed_qkv(
            ids, token, weight[: 60 if rotary else N], bias[: 60 if rotary else N], position_ids=position_ids, **call
        )

    return run, call


@pytest.mark.sample
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("backend, dtype", INVARIANT)
def test_batch_invariant(backend, dtype, norm, rotary):
    """A token alone, among 7, and among 300, at any place: the tiles that would change with the number do not."""
    run, call = front_end(dtype, norm, rotary=rotary)
    call["batch_invariant"] = True
    g = torch.Generator().manual_seed(4)
    ids, places = (torch.randint(50, (300,), generator=g).to(DEVICE) for _ in range(2))
    with pyembed.backend(backend), torch.no_grad():
        whole = run(ids, places)
        for start, count in ((0, 1), (17, 1), (299, 1), (3, 7), (31, 20), (60, 40)):
            part = slice(start, start + count)
            for name, alone, among in zip(whole._fields, run(ids[part], places[part]), whole, strict=True):
                assert torch.equal(alone, among[part]), f"{name} of tokens {start} to {start + count}"


@pytest.mark.parametrize("dtype", [torch.float32] if CUDA else [torch.float32, torch.float64])
@pytest.mark.parametrize("D, N", [(64, 639), (771, 639), (17, 9), (33, 9), (257, 63), (1025, 117)])
def test_batch_invariant_wide(D, N, dtype):
    """Rows that memory aligns otherwise, and a batch of 4,096."""
    run, call = front_end(dtype, "layer", D=D, N=N)
    call["batch_invariant"] = True
    ids, places = torch.randint(50, (4096,), device=DEVICE), torch.randint(400, (4096,), device=DEVICE)
    with torch.no_grad():
        whole = run(ids, places)
        for part in (slice(4095, 4096), slice(1001, 1008), slice(5, 6)):
            for alone, among in zip(run(ids[part], places[part]), whole, strict=True):
                assert torch.equal(alone, among[part])


@pytest.mark.parametrize("M", [(33, 256), (17, 32), (1, 16)])
def test_classes_of_sizes(M):
    """Without being asked for, rows keep their bits among calls of one class of sizes."""
    run, _ = front_end(torch.float32, "layer")
    ids, places = torch.randint(50, (M[1],), device=DEVICE), torch.randint(400, (M[1],), device=DEVICE)
    with pyembed.backend("triton"), torch.no_grad():
        assert torch.equal(run(ids, places).query[: M[0]], run(ids[: M[0]], places[: M[0]]).query)


def test_batch_invariance_is_right_and_refuses_what_it_cannot_keep():
    case = Case(torch.float32, DEVICE)
    case.check(lambda *a, **k: F.embed_qkv(*a, **k, batch_invariant=True))
    front = pyembed.EmbeddingQKV(31, 16, 2, max_length=12, batch_invariant=True).to(DEVICE)
    ids = torch.randint(31, (2, 9), device=DEVICE)
    assert "batch_invariant=True" in repr(front) and "batch_invariant" in front.explain(ids).reason
    with pyembed.plan("distinct"), pytest.raises(RuntimeError, match="cannot run here: batch_invariant"):
        front(ids)
    with torch.no_grad(), pyembed.plan("table"), pytest.raises(RuntimeError, match="cannot run here: batch_invariant"):
        front(ids)
    front.token.register_forward_hook(lambda *a: None)
    with pytest.raises(RuntimeError, match="batch_invariant: expected modules that are no more than their weights, but"):
        front(ids)


def test_batch_invariance_under_a_compiler():
    """By the kernels; PyTorch's operators are left out of a graph, or refused where there must be one alone."""
    case = Case(torch.float64, DEVICE)

    def step(ids):
        return F.embed_qkv(ids, **case.parameters, **case.options, batch_invariant=True).query

    torch._dynamo.reset()
    with pyembed.backend("torch"):
        assert torch.equal(torch.compile(step, backend="eager")(case.ids), step(case.ids))
        torch._dynamo.reset()
        with pytest.raises(Exception, match="batch_invariant: expected the kernels or no compiler"):
            torch.compile(step, backend="eager", fullgraph=True)(case.ids)
    with pyembed.backend("triton"):
        assert torch.equal(torch.compile(step, backend="eager", fullgraph=True)(case.ids), step(case.ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_tiles(dtype, monkeypatch):
    """One configuration for any number of tokens, of which there are several otherwise."""
    pytest.importorskip("triton")
    from pyembed.kernels import embed_qkv, tuning

    from pyembed.call import Call, Norm, Projection, Terms

    meta = {"dtype": dtype, "device": "meta"}
    tables = (torch.empty(shape, **meta) for shape in ((99, 768), (2304, 768)))
    token, weight = tables
    gamma = torch.empty(768, **meta)

    def tiles(M, invariant):
        ids = torch.empty(1, M, dtype=torch.long, device="meta")
        norm, projection = Norm("rms", gamma, None, 1e-5), Projection(weight, None, 12, 12)
        call = Call(Terms(ids, token), norm, projection, batch_invariant=invariant)
        launches = record(monkeypatch, tuning, tuning.H100, lambda: embed_qkv.embed_qkv(call))
        return tuple((launch.kernel.__name__, *compiled_in(launch), *launch.options.values()) for launch in launches)

    def compiled_in(launch):
        return [launch.constants[(i,)] for i, parameter in enumerate(launch.kernel.params) if parameter.is_constexpr]

    sizes = (1, 17, 33, 257, 1024, 5000)
    assert len({tiles(M, True) for M in sizes}) == 1
    assert len({tiles(M, False) for M in sizes}) > 1


def test_batch_invariant_modules():
    """Three projections, and few tokens: what would run by the modules does not."""
    linears = [torch.nn.Linear(16, 16, device=DEVICE) for _ in range(3)]
    token, norm = torch.nn.Embedding(31, 16, device=DEVICE), torch.nn.LayerNorm(16, device=DEVICE)
    front = pyembed.EmbeddingQKV.from_modules(token, None, norm, qkv=linears, num_heads=2, batch_invariant=True)
    ids = torch.randint(31, (40, 9), device=DEVICE)
    whole = front(ids)
    for row in (0, 7, 39):
        for alone, among in zip(front(ids[row : row + 1]), whole, strict=True):
            assert torch.equal(alone, among[row : row + 1])


def test_invariant_linear():
    """Its results are F.linear's, and so are its gradients."""
    x, weight, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 15, 8), (6, 8), (6,)))
    ours, theirs = reference.invariant_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(out, (x, weight, bias), grad) for out in (ours, theirs)))
    assert reference.invariant_linear(x[:0], weight, bias).shape == (0, 15, 6)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["one_pass", "distinct"])
def test_250_runs(plan):
    case = Case(torch.bfloat16, DEVICE, B=8, T=512, V=2000, D=768, heads=12, head_dim=64)
    with pyembed.plan(plan):
        first = case.run(F.embed_qkv)
        for _ in range(249):
            for name, again in case.run(F.embed_qkv).items():
                assert torch.equal(first[name], again), name
