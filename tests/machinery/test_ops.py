"""The operators under PyTorch's own machinery: schema, fake tensors, autograd, compilation, export."""

import subprocess
import sys

import pytest
import torch
from conftest import DEVICE, full
from numerics import Case
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import pyembed
from pyembed import functional as F
from pyembed import ops, ops_embed

NO_TERMS = (None,) * 4  # no segment, its ids, no dropout's seed, no second query
# No scale, dropout, rotation, norms of heads; heads behind tokens; absent rows are reported.
END = (None, 0.0, *F.NO_ROTATION, None, None, 0.0, False, True, False)


def inputs(dtype=torch.float32, norm="layer", requires_grad=True):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=requires_grad)

    ids = torch.randint(7, (2, 5), device=DEVICE)
    norm_weight, norm_bias = draw(6) if norm != "none" else None, draw(6) if norm == "layer" else None
    return (
        ids,
        draw(7, 6),
        draw(9, 6),
        draw(9),
        draw(5, 6),
        None,
        norm_weight,
        norm_bias,
        *NO_TERMS,
        1,
        1,
        norm,
        1e-5,
        2,
        *END,
    )


@pytest.mark.parametrize("norm", [full("layer"), "rms", full("none")])
def test_opcheck_embed_qkv(norm):
    opcheck(ops.embed_qkv.op, inputs(norm=norm))
    args = inputs(norm=norm, requires_grad=False)
    *outputs, mean, rstd = ops.embed_qkv(*args)
    grads = [torch.randn_like(output) for output in outputs]
    ids, token, weight, _, position, position_ids, norm_weight, norm_bias, *_ = args
    needs = [True, True, True, True, norm_weight is not None, norm_bias is not None]
    tensors = (ids, token, weight, position, position_ids, norm_weight, norm_bias, None, None, None, mean, rstd)
    opcheck(ops.embed_qkv_backward.op, (*grads, *tensors, 1, 1, 2, None, 0.0, [*needs, False]))
    opcheck(ops.embed_qkv_backward.op, (None, None, *grads[2:], *tensors, 1, 1, 2, None, 0.0, [False] * 7))


def test_opcheck_embed():
    ids, token, _, _, position, *_ = inputs()
    segment, seed = torch.randn(2, 6, device=DEVICE, requires_grad=True), torch.tensor([7], device=DEVICE)
    opcheck(ops_embed.embed.op, (ids, token, position, None, None, None, None, None, 0.0, -1, True))
    opcheck(ops_embed.embed.op, (ids, token, None, None, None, None, None, None, 0.0, 1, True))
    opcheck(ops_embed.embed.op, (ids, token, position, None, segment, ids % 2, seed, 2.0, 0.5, 1, True))
    grad = torch.randn(2, 5, 6, device=DEVICE)
    opcheck(ops_embed.embed_backward.op, (grad, ids, None, ids % 2, seed, 2.0, 0.5, 7, 5, 2, -1))


def test_opcheck_terms_and_epilogue():
    args = list(inputs())
    segment, second = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((2, 6), (3,)))
    args[8:12] = segment, args[0] % 2, torch.tensor([7], device=DEVICE), second
    args[17:19], args[-3] = (2.0, 0.5), True
    opcheck(ops.embed_qkv.op, tuple(args))


@pytest.mark.full
@pytest.mark.skipif(DEVICE == "cuda", reason="the compiled kernels have no float64; the interpreter checks the formulas")
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_gradcheck(norm):
    ids, token, weight, bias, position, _, norm_weight, norm_bias, *_ = inputs(torch.float64, norm)
    segment, second = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 6), (3,)))
    terms = (segment, ids % 2, torch.tensor([7]))
    leaves = [t for t in (token, weight, bias, position, norm_weight, norm_bias, segment, second) if t is not None]

    def function(*_):
        arguments = (ids, token, weight, bias, position, None, norm_weight, norm_bias, *terms, second, 1, 1, norm, 1e-5, -1)
        arguments += (2.0, 0.5, *END[2:-3], True, True, False)
        return ops.embed_qkv(*arguments)[:4]

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_gradcheck_embed():
    ids, token, _, _, position, *_ = inputs(torch.float64)
    places = torch.randint(5, (2, 5))
    segment, seed = torch.randn(2, 6, dtype=torch.float64, requires_grad=True), torch.tensor([7])

    def function(token, position, segment):
        return ops_embed.embed(ids, token, position, places, segment, ids % 2, seed, 2.0, 0.5, -1, True)

    assert torch.autograd.gradcheck(function, (token, position, segment), fast_mode=True)


def test_second_derivatives_are_refused():
    args = inputs()
    _, query, *_ = ops.embed_qkv(*args)
    (grad,) = torch.autograd.grad(query.square().sum(), args[1], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_without_graph_breaks(backend):
    """One graph, also for another sequence length: no recompilation for each."""
    ids, token, weight, bias, _, _, norm_weight, norm_bias, *_ = inputs()
    options = {"num_heads": 1, "norm": "layer", "norm_weight": norm_weight, "norm_bias": norm_bias}
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def step(ids, position):
        out = F.embed_qkv(ids, token, weight, bias, position=position, **options)
        return out.hidden.sum() + out.query.sum() * 2

    torch._dynamo.reset()
    with pyembed.backend(backend):
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
        wide = torch.randn(40, 6, device=DEVICE)
        for T in (5, 9, 12):
            ids = torch.randint(7, (2, T), device=DEVICE)
            torch.testing.assert_close(compiled(ids, wide), step(ids, wide))
    assert len(graphs) == 1


def test_compiled_gradients():
    ids, token, weight, *_ = inputs()

    def step(token, weight):
        out = F.embed_qkv(ids, token, weight, num_heads=1, norm="rms")
        return out.key.square().sum() + out.hidden.sum()

    torch._dynamo.reset()
    with pyembed.backend("triton"):
        eager = torch.autograd.grad(step(token, weight), (token, weight))
        compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(token, weight), (token, weight))
    torch.testing.assert_close(compiled, eager)


def test_exports_as_one_node():
    module = pyembed.EmbeddingQKV(7, 6, 1, max_length=20).to(DEVICE)
    ids = torch.randint(7, (2, 5), device=DEVICE)
    with pyembed.backend("triton"):
        exported = torch.export.export(module, (ids,), dynamic_shapes={"ids": {0: torch.export.Dim("batch")}})
        targets = [node.target for node in exported.graph.nodes if "pyembed" in str(node.target)]
        assert targets == [torch.ops.pyembed.embed_qkv.default]
        many = ids.repeat(3, 1)
        torch.testing.assert_close(exported.module()(many), module(many))


def test_import_without_triton():
    """A machine without triton (a Mac) imports the package and runs by PyTorch; asking for the kernels says what lacks."""
    program = """
import sys, importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else real(name, *a)
sys.modules["triton"] = None
import torch, pyembed
module = pyembed.EmbeddingQKV(7, 6, 1)
module(torch.zeros(1, 3, dtype=torch.long)).query.sum().backward()
try:
    with pyembed.backend("triton"):
        module(torch.zeros(1, 3, dtype=torch.long))
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install triton" in done.stdout


def test_interpreter_leaves_the_compiler_alone(monkeypatch):
    """After interpreted launches the same process compiles the same kernels."""
    import aot
    import triton
    from pyembed.kernels import embed_qkv, interpreter, tuning
    from pyembed.kernels.arguments import Terms

    with pyembed.backend("triton"):
        pyembed.EmbeddingQKV(7, 16, 1)(torch.tensor([[1, 2]]))
    assert type(interpreter.load("embed_qkv").embed_qkv_kernel).__name__ == "InterpretedFunction"
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    arguments = [torch.empty(shape, **meta) for shape in ((9, 64), (48, 64), (48,))]
    ids, vector = torch.empty(1, 40, dtype=torch.long, device="meta"), torch.empty(64, **meta)
    (launch,) = aot.record(
        monkeypatch, tuning, tuning.H100,
        lambda: embed_qkv.embed_qkv(ids, *arguments, Terms(), "layer", vector, vector, 1e-5, (1, 1, 1)),
    )  # fmt: skip
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    assert launch.compile(90).asm["cubin"]


@pytest.mark.parametrize("plan", ["one_pass", "distinct"])
def test_double_backward_is_refused(plan):
    """By name, with the way out."""
    case = Case(torch.float32, "cpu", heads=1)
    token = case.parameters["token"].requires_grad_()
    with pyembed.plan(plan), pyembed.backend("triton"):
        out = F.embed_qkv(case.ids, **case.parameters, **case.options)
        (grad,) = torch.autograd.grad(out.query.square().sum(), token, create_graph=True)
    with pytest.raises(RuntimeError, match="no gradients of gradients by this plan: run the forward within"):
        grad.square().sum().backward()


@pytest.mark.parametrize("plan", ["one_pass", "distinct"])
def test_tangents_of_an_older_graph_are_refused(plan):
    """Forward mode that begins after the forward: the operators' backward would lose it unseen."""
    case = Case(torch.float32, DEVICE, heads=1)
    token = case.parameters["token"].requires_grad_()
    with pyembed.plan(plan), pyembed.backend("triton"):
        query = F.embed_qkv(case.ids, **case.parameters, **case.options).query
    with torch.autograd.forward_ad.dual_level():
        grad = torch.autograd.forward_ad.make_dual(torch.ones_like(query), torch.ones_like(query))
        with pytest.raises(RuntimeError, match="no forward mode"):
            torch.autograd.grad(query, token, grad)


@pytest.mark.sample
@pytest.mark.parametrize("plan, rows", [("one_pass", 2 * 19), ("distinct", 19 + 31)])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("token", "position", "norm_weight", "norm_bias")])
def test_flops_of_the_plan(plan, rows, frozen):
    """FlopCounterMode counts the products that run: of every token, or of the positions and as many rows as may be distinct."""
    case = Case(torch.float32, DEVICE)
    leaves = {k: p.detach().requires_grad_(k not in frozen) for k, p in case.parameters.items()}
    with pyembed.plan(plan), pyembed.backend("triton"), FlopCounterMode(display=False) as counter:
        outputs = F.embed_qkv(case.ids, **leaves, **case.options)
        torch.autograd.backward(list(outputs), case.grads)
    assert counter.get_total_flops() == (3 if not frozen else 2) * 2 * rows * leaves["weight"].numel()


def test_views_that_are_to_be_negated():
    """Their memory has the other sign: the dispatcher makes it right."""

    def negated(x):
        return x.to(torch.complex64).mul(1j).conj().imag if torch.is_tensor(x) and x.is_floating_point() else x

    tensors = [negated(x) for x in inputs()]
    assert tensors[1].is_neg()
    with torch.no_grad():
        for a, b in zip(ops.embed_qkv(*tensors), ops.embed_qkv(*map(plain, tensors)), strict=True):
            torch.testing.assert_close(a, b)


def plain(value):
    return value.resolve_neg() if torch.is_tensor(value) else value
