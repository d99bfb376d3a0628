"""The operators under PyTorch's own machinery: schema, fake tensors, autograd, compilation, export."""

import contextlib
import functools
import importlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, full
from numerics import Case
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import pyembed
from pyembed import functional as F
from pyembed.call import FRONT_END, HIDDEN, LEARNED, Call, Epilogue, Norm, Projection, Terms
from pyembed.plans import distinct, one_pass


def draw(*shape, dtype=torch.float32, requires_grad=True):
    return torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=requires_grad)


def inputs(dtype=torch.float32, norm="layer", requires_grad=True):
    """A Call of one head, 3 wide, over tables of 7 tokens and 5 positions, 6 wide."""
    ids = torch.randint(7, (2, 5), device=DEVICE)
    options = {"dtype": dtype, "requires_grad": requires_grad}
    token, weight, bias, position = (draw(*shape, **options) for shape in ((7, 6), (9, 6), (9,), (5, 6)))
    norm_weight, norm_bias = (draw(6, **options) if norm in kinds else None for kinds in (("layer", "rms"), ("layer",)))
    return Call(
        Terms(ids, token, position, padding_idx=2), Norm(norm, norm_weight, norm_bias, 1e-5), Projection(weight, bias, 1, 1)
    )


def with_all_terms(call, **options):
    """The call with segments, dropout, a scale and a second query."""
    segment, second = (draw(*shape, **options) for shape in ((2, 6), (3,)))
    seed = torch.tensor([7], device=DEVICE)
    terms = call.terms._replace(segment=segment, segment_ids=call.terms.ids % 2, seed=seed, scale=2.0, dropout=0.5)
    return call._replace(terms=terms, epilogue=Epilogue(query_offset=second, heads_first=True))


def leaves_of(call):
    """All tensors that may learn."""
    return [x for x in call.values() if isinstance(x, torch.Tensor) and x.requires_grad]


@pytest.mark.parametrize("norm", [full("layer"), "rms", full("none")])
def test_opcheck_embed_qkv(norm):
    opcheck(one_pass.embed_qkv.forward.op, FRONT_END.flatten(inputs(norm=norm)))
    call = inputs(norm=norm, requires_grad=False)
    *outputs, mean, rstd = one_pass.embed_qkv(call, observed=False)
    grads = [torch.randn_like(output) for output in outputs]
    learned = {name: value is not None for name, value in call.named().items() if name in LEARNED}
    norms = {"layer": {"norm_weight", "norm_bias"}, "rms": {"norm_weight"}, "none": set()}[norm]
    assert {name for name in LEARNED if learned[name]} == {"token", "position", "weight", "bias", *norms}
    backward, arguments = one_pass.embed_qkv.backward.op, (mean, rstd, *FRONT_END.flatten(call))
    opcheck(backward, (*grads, *arguments, [learned[name] for name in LEARNED]))
    opcheck(backward, (None, None, *grads[2:], *arguments, [False] * len(LEARNED)))


def with_own_weights(call, **options):
    """The call with query, key and value weights of their own, and biases of some."""
    query, key, value = (draw(3, 6, **options) for _ in range(3))
    own = {"key_weight": key, "value_weight": value, "value_bias": draw(3, **options)}
    return call._replace(projection=call.projection._replace(weight=query, bias=draw(3, **options), **own))


@pytest.mark.parametrize("plan", [one_pass.embed_qkv, full(distinct.distinct_qkv)])
def test_opcheck_own_weights(plan):
    call, options = with_own_weights(inputs()), () if plan is one_pass.embed_qkv else (None, None, None, True)
    call = call._replace(epilogue=Epilogue(query_bias=draw(3)) if not options else Epilogue())
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(plan.forward.op, (*FRONT_END.flatten(call), *options), test_utils=utilities)
    call = with_own_weights(inputs(requires_grad=False), requires_grad=False)
    outputs = plan(call, *options, observed=False)
    grads = [torch.randn_like(output) for output in outputs[:4]]
    needs = [call.named()[name] is not None for name in LEARNED]
    arguments = (*grads, *outputs[4:], *FRONT_END.flatten(call), *options, needs)
    opcheck(plan.backward.op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_embed():
    ids, token, position, *_ = inputs().terms
    segment, seed = draw(2, 6), torch.tensor([7], device=DEVICE)
    every = Terms(ids, token, position, None, segment, ids % 2, seed, 2.0, 0.5, 1)
    for terms in (Terms(ids, token, position), Terms(ids, token, padding_idx=1), every):
        opcheck(one_pass.embed.op, HIDDEN.flatten(Call(terms)))
    given = {"ids": ids, "segment_ids": ids % 2, "seed": seed, "scale": 2.0, "dropout": 0.5, "padding_idx": -1}
    given |= {"grad": torch.randn(2, 5, 6, device=DEVICE), "position_ids": None, "sizes": [7, 5, 2]}
    opcheck(one_pass.embed_backward.op, tuple(given[name] for name in one_pass.embed_backward.names))


def test_opcheck_terms_and_epilogue():
    opcheck(one_pass.embed_qkv.forward.op, FRONT_END.flatten(with_all_terms(inputs())))


@pytest.mark.full
@pytest.mark.skipif(DEVICE == "cuda", reason="the compiled kernels have no float64; the interpreter checks the formulas")
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_gradcheck(norm):
    call = with_all_terms(inputs(torch.float64, norm), dtype=torch.float64)
    call = call._replace(terms=call.terms._replace(padding_idx=-1))
    leaves = leaves_of(call)
    assert len(leaves) == 6 + {"layer": 2, "rms": 1, "none": 0}[norm]

    def function(*_):
        return one_pass.embed_qkv(call, observed=None)[:4]

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_gradcheck_embed():
    ids, token, position, *_ = inputs(torch.float64).terms
    places = torch.randint(5, (2, 5))
    segment, seed = draw(2, 6, dtype=torch.float64), torch.tensor([7])

    def function(token, position, segment):
        terms = Terms(ids, token, position, places, segment, ids % 2, seed, 2.0, 0.5)
        return one_pass.embed(*HIDDEN.flatten(Call(terms)))

    assert torch.autograd.gradcheck(function, (token, position, segment), fast_mode=True)


def test_second_derivatives_are_refused():
    call = inputs()
    _, query, *_ = one_pass.embed_qkv(call, observed=None)
    (grad,) = torch.autograd.grad(query.square().sum(), call.terms.token, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_without_graph_breaks(backend):
    """One graph, also for another sequence length: no recompilation for each."""
    (ids, token, *_), (norm, norm_weight, norm_bias, _), (weight, bias, *_), *_ = inputs()
    options = {"num_heads": 1, "norm": norm, "norm_weight": norm_weight, "norm_bias": norm_bias}
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
    (ids, token, *_), _, (weight, *_), *_ = inputs()

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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kernels_that_are_imported_while_others_are_interpreted():
    """By another thread, say: they are compiled ones nevertheless. In a process that has imported none yet."""
    pytest.importorskip("triton")
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            for name in [name for name in sys.modules if name.startswith("pyembed.kernels")]:
                del sys.modules[name]
            with importlib.import_module("pyembed.kernels.interpreter").running():
                embed = importlib.import_module("pyembed.kernels.embed")
            os._exit(0 if type(embed.embed_kernel).__name__ == "JITFunction" else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_get_one_interpreted_module(monkeypatch):
    """None of them sees the package while another makes it."""
    pytest.importorskip("triton")
    from pyembed.kernels import interpreter

    names = [name for name in sys.modules if name.startswith("pyembed.kernels.interpreted")]
    before = {name: sys.modules.pop(name) for name in names}
    monkeypatch.setattr(interpreter, "load", functools.cache(interpreter.load.__wrapped__))
    monkeypatch.setattr(interpreter, "Path", lambda file: time.sleep(0.1) or Path(file))
    try:
        with ThreadPoolExecutor(2) as pool:
            second = pool.submit(lambda: time.sleep(0.05) or interpreter.load("tuning"))
            first = pool.submit(interpreter.load, "tuning")
        assert first.result() is second.result() is sys.modules["pyembed.kernels.interpreted.tuning"]
    finally:
        sys.modules.update(before)


def test_interpreter_leaves_the_compiler_alone(monkeypatch):
    """After interpreted launches the same process compiles the same kernels."""
    import aot
    import triton
    from pyembed.kernels import embed_qkv, interpreter, tuning

    with pyembed.backend("triton"):
        pyembed.EmbeddingQKV(7, 16, 1)(torch.tensor([[1, 2]]))
    assert type(interpreter.load("embed_qkv").embed_qkv_kernel).__name__ == "InterpretedFunction"
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    token, weight, bias = (torch.empty(shape, **meta) for shape in ((9, 64), (48, 64), (48,)))
    ids, vector = torch.empty(1, 20, dtype=torch.long, device="meta"), torch.empty(64, **meta)
    call = Call(Terms(ids, token), Norm("layer", vector, vector, 1e-5), Projection(weight, bias, 1, 1))
    (launch,) = aot.record(monkeypatch, tuning, tuning.H100, lambda: embed_qkv.embed_qkv(call))
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    assert launch.compile(tuning.H100).asm["cubin"]


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
        pairs = [(x, grad) for x, grad in zip(outputs, case.grads, strict=True) if x.requires_grad]
        torch.autograd.backward(*zip(*pairs, strict=True))
    assert counter.get_total_flops() == (3 if not frozen else 2) * 2 * rows * leaves["weight"].numel()


def test_views_that_are_to_be_negated():
    """Their memory has the other sign: the dispatcher makes it right."""

    def negated(x):
        return x.to(torch.complex64).mul(1j).conj().imag if torch.is_tensor(x) and x.is_floating_point() else x

    arguments = FRONT_END.flatten(inputs())
    tensors = [negated(x) for x in arguments]
    assert tensors[one_pass.embed_qkv.forward.names.index("token")].is_neg()
    with torch.no_grad():
        found, expected = (one_pass.embed_qkv.forward(*given) for given in (tensors, map(plain, tensors)))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def plain(value):
    return value.resolve_neg() if torch.is_tensor(value) else value
