"""Under autocast: PyTorch's dtype rule for each operator, by every backend; gradients have the dtypes of their tensors."""

import contextlib

import pytest
import torch
from conftest import CUDA, DEVICE
from numerics import Case, assert_no_worse

import pyembed
from pyembed import functional as F
from pyembed import reference

LOW = torch.bfloat16 if CUDA else torch.float16  # the interpreter's product has no bf16
BACKENDS = ["torch", "triton"]


def autocast(dtype=LOW, **options):
    return torch.autocast(DEVICE, dtype=dtype, **options)


def graded(case, inside):
    """run() for Case.run, its backward within autocast or after it."""

    def run(*args, **kwargs):
        with autocast():
            out = F.embed_qkv(*args, **kwargs)
        return out

    ours = {k: None if p is None else p.detach().requires_grad_() for k, p in case.parameters.items()}
    outputs = run(case.ids, **ours, position_ids=case.position_ids, **case.options)
    leaves = [p for p in ours.values() if p is not None]
    with autocast() if inside else contextlib.nullcontext():
        found = torch.autograd.grad(list(outputs), leaves, [g.to(o.dtype) for g, o in zip(case.grads, outputs, strict=True)])
    return outputs, dict(zip([k for k, p in ours.items() if p is not None], found, strict=True))


@pytest.mark.sample(2)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "variant", [{}, {"norm": "rms"}, {"norm": None}, {"position": None, "bias": False}, {"affine": False}], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_functional(backend, variant, inside):
    """hidden in the table's dtype, bit for bit; query, key and value in autocast's; no worse than PyTorch's under autocast."""
    case = Case(torch.float32, DEVICE, **variant)
    with pyembed.backend(backend):
        outputs, grads = graded(case, inside)
    oracle = case.run(reference.embed_qkv, torch.float64)

    def eager(*args, **kwargs):
        with autocast():
            return reference.embed_qkv(*args, **kwargs)

    leaves = {k: None if p is None else p.detach().requires_grad_() for k, p in case.parameters.items()}
    stock = eager(case.ids, **leaves, **case.options)
    named = {k: p for k, p in leaves.items() if p is not None}
    given = [g.to(o.dtype) for g, o in zip(case.grads, stock, strict=True)]
    theirs = dict(zip(named, torch.autograd.grad(list(stock), list(named.values()), given), strict=True))
    assert torch.equal(outputs.hidden, stock.hidden) and outputs.hidden.dtype == torch.float32
    for name, ours, expected in zip(outputs._fields, outputs, stock, strict=True):
        assert ours.dtype == (torch.float32 if name == "hidden" else LOW)
        assert_no_worse(name, ours, expected, oracle[name])
    for name, ours in grads.items():
        assert ours.dtype == torch.float32
        assert_no_worse(f"grad of {name}", ours, theirs[name], oracle[f"grad of {name}"])


@pytest.mark.sample
@pytest.mark.parametrize("plan", ["one_pass", "distinct"])
def test_a_backward_within_it_of_a_forward_outside(plan):
    """Loses no digit: an operator's products have the dtypes of what it was given."""
    case = Case(torch.float32, DEVICE)
    leaves = {k: p.detach().requires_grad_() for k, p in case.parameters.items()}
    with pyembed.backend("triton"), pyembed.plan(plan):
        outputs = F.embed_qkv(case.ids, **leaves, **case.options)
        outside = torch.autograd.grad(list(outputs), list(leaves.values()), case.grads, retain_graph=True)
        with autocast():
            within = torch.autograd.grad(list(outputs), list(leaves.values()), case.grads)
    for name, ours, theirs in zip(leaves, within, outside, strict=True):
        assert torch.equal(ours, theirs), name


def options(name):
    head = torch.ones(8, device=DEVICE) * 1.25
    return {
        "rotary": {"rotary": pyembed.Rotary(8, 40, device=DEVICE)},
        "pair": {"rotary": tuple(torch.rand(2, 19, 4, device=DEVICE).repeat(1, 1, 2))},
        "norms": {"query_norm": head, "key_norm": head},
        "biases": {"query_biases": tuple(torch.randn(2, 8, device=DEVICE) for _ in range(2))},
        "first": {"heads_first": True, "scale": 2.0},
        "invariant": {"batch_invariant": True},
    }[name]


@pytest.mark.parametrize("name", ["rotary", "pair", "norms", "biases", "first", "invariant"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_epilogues(backend, name):
    torch.manual_seed(0)
    case = Case(torch.float32, DEVICE, heads=2, head_dim=8)
    call = {**case.parameters, **case.options, **options(name)}
    with autocast(), torch.no_grad():
        expected = reference.embed_qkv(case.ids, **{k: v for k, v in call.items() if k != "batch_invariant"})
        with pyembed.backend(backend):
            found = F.embed_qkv(case.ids, **call)
    for field, ours, theirs in zip(found._fields, found, expected, strict=True):
        assert ours.dtype == theirs.dtype, field
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("build", ["stock", "llama"])
def test_modules(backend, build):
    """A front end gives what its modules give one after the other, dtypes too; also where qkv itself has 16 bits."""
    torch.manual_seed(0)
    llama = {"norm": "rms", "bias": False, "position": "rotary", "num_kv_heads": 1}
    front = pyembed.EmbeddingQKV(31, 16, 2, max_length=12, **(llama if build == "llama" else {})).to(DEVICE)
    ids = torch.randint(31, (2, 9), device=DEVICE)
    for qkv in (torch.float32, LOW):
        front.qkv.to(qkv)
        with autocast():
            hidden = front.token(ids) if build == "llama" else front.token(ids) + front.position.weight[:9]
            projected = front.qkv(front.norm(hidden))
            with pyembed.backend(backend):
                found = front(ids)
        assert found.hidden.dtype == torch.float32 and torch.equal(found.hidden, hidden)
        assert found.value.dtype == projected.dtype == LOW
        value = projected.unflatten(-1, (-1, 8))[..., -front.num_kv_heads :, :]
        torch.testing.assert_close(found.value, value, rtol=1e-2, atol=1e-2)
        sum(out.float().sum() for out in found).backward()
        assert front.token.weight.grad.dtype == torch.float32 and front.qkv.weight.grad.dtype == qkv
        front.zero_grad()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_autocast_leaves_alone(backend):
    """Lookups, sums, float64, and regions where it is off."""
    ids = torch.randint(31, (2, 9), device=DEVICE)
    sums = pyembed.TokenPositionEmbedding(31, 16, 12).to(DEVICE)
    front = pyembed.EmbeddingQKV(31, 16, 2, max_length=12).to(DEVICE)
    with pyembed.backend(backend):
        plain, alone = front(ids), sums(ids)
        with autocast():
            assert torch.equal(sums(ids), alone) and sums.token(ids).dtype == torch.float32
            with autocast(enabled=False):
                assert torch.equal(front(ids).query, plain.query)
            if not CUDA:
                assert front.double()(ids).query.dtype == torch.float64
    with pytest.raises(TypeError, match=r"weight: expected dtype torch.float32, that of token; got"):
        front.float().qkv.to(LOW)
        front(ids)


@pytest.mark.skipif(CUDA, reason="of the interpreter")
def test_bf16_is_refused_by_the_interpreter():
    """Its products would be garbage: also where the table has another dtype."""
    front, ids = pyembed.EmbeddingQKV(31, 16, 2, max_length=12), torch.randint(31, (2, 9))
    with pyembed.backend("triton"), autocast(torch.bfloat16), pytest.raises(TypeError, match="no bfloat16 arithmetic"):
        front(ids)


def test_plans():
    """The others are for one dtype: explain says so, and a table is not asked."""
    front = pyembed.EmbeddingQKV(31, 16, 2, max_length=12).to(DEVICE).eval()
    ids = torch.randint(31, (2, 9), device=DEVICE)
    with torch.no_grad():
        front.build_table()
        with autocast():
            assert front(ids).query.dtype == LOW
            assert front.explain(ids).name == "one_pass"
            with pyembed.plan("distinct"), pytest.raises(RuntimeError, match="'distinct' cannot run here: autocast is on"):
                F.embed_qkv(ids, front.token.weight, front.qkv.weight, num_heads=2)
            with pyembed.plan("table"), pytest.raises(RuntimeError, match="autocast"):
                front(ids)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend):
    torch._dynamo.reset()
    case = Case(torch.float32, DEVICE)

    def step(ids):
        with autocast():
            return F.embed_qkv(ids, **case.parameters, **case.options)

    with pyembed.backend(backend):
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(case.ids)
        for ours, eager in zip(found, step(case.ids), strict=True):
            assert ours.dtype == eager.dtype
            torch.testing.assert_close(ours, eager)
