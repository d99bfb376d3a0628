"""PyTorch's machinery around the modules: compilers, export, checkpoints, computed and tied weights, profiler, devices, graphs
of a GPU, torch.func. Each is held against the composition of PyTorch's own modules, or against the call without it."""

import copy
import functools
import io
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import DEVICE, full
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import pyembed
from pyembed import functional as F
from pyembed import reference, rotary
from pyembed.call import Call, Epilogue, Norm, Projection, Terms
from pyembed.modules import parts
from pyembed.plans import choice, one_pass, operators

BACKENDS = ["torch", "triton"]
RUNS = [(backend, plan) for backend in BACKENDS for plan in ("one_pass", "distinct")]
OF_EACH = [  # a plan is EmbeddingQKV's alone
    *((name, backend, "one_pass") for name in ("Embedding", "TokenPositionEmbedding") for backend in BACKENDS),
    *(("EmbeddingQKV", *run) for run in RUNS),
]
IDS = torch.tensor([[0, 5, 5, 2, 1], [1, 2, 5, 10, 9]], device=DEVICE)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")


def three_projections():
    linears = tuple(nn.Linear(8, 8) for _ in range(3))
    return pyembed.EmbeddingQKV.from_modules(nn.Embedding(11, 8), norm=nn.LayerNorm(8), qkv=linears, num_heads=2)


MODULES = {
    "Embedding": lambda: pyembed.Embedding(11, 8, padding_idx=2),
    "TokenPositionEmbedding": lambda: pyembed.TokenPositionEmbedding(11, 8, 64, num_segments=2, scale=2.0),
    "EmbeddingQKV": lambda: pyembed.EmbeddingQKV(11, 8, 2, max_length=64),
    "rotary": lambda: pyembed.EmbeddingQKV(11, 8, 2, max_length=64, position="rotary", norm="rms", heads_first=True),
    "three projections": three_projections,
}


def make(name, seed=0):
    torch.manual_seed(seed)
    return MODULES[name]().to(DEVICE)


def draw_ids(*shape):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def tensors(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def backward(outputs, seed=1):
    g = torch.Generator().manual_seed(seed)
    outputs = tensors(outputs)
    torch.autograd.backward(outputs, [torch.randn(x.shape, generator=g).to(x) for x in outputs])


def results(module, call):
    """Outputs of call(), and the gradients of module's parameters for random ones of them."""
    module.zero_grad()
    outputs = call()
    backward(outputs)
    return [x.detach() for x in tensors(outputs)] + [p.grad for p in module.parameters()]


def assert_equal(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def stock(front, ids=IDS):
    """What an EmbeddingQKV of learned positions or None stands for, by PyTorch's modules."""
    hidden = front.token(ids)
    if front.position is not None:
        hidden = hidden + front.position(torch.arange(ids.shape[-1], device=ids.device))
    return hidden, *front.qkv(front.norm(hidden)).unflatten(-1, (-1, front._head_dim)).split(front.num_heads, -2)


# Compilers

LARGE = ("rotary", "three projections")  # graphs, whose forward alone is compiled


@pytest.mark.sample
@pytest.mark.parametrize("dynamic, most", [(None, 2), (True, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [full(name) if name in ("Embedding", "three projections") else name for name in MODULES])
def test_one_graph_serves_every_length(name, backend, dynamic, most, monkeypatch):
    """fullgraph: no break. By default a second length makes sizes symbols; no other compiles anything, few tokens or many."""
    monkeypatch.setattr(parts, "PACK_TOKENS", 20)
    module, graphs, trains = make(name), [], dynamic is None and name not in LARGE

    def counting(graph, inputs):
        compiled = lookup_backend("aot_eager" if trains else "eager")(graph, inputs)
        graphs.append(graph)
        return compiled

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=counting)
    with pyembed.backend(backend), torch.set_grad_enabled(trains):
        for T in (5, 9, 17):
            ids = draw_ids(2, T)
            found = results(module, functools.partial(compiled, ids)) if trains else tensors(compiled(ids))
        expected = results(module, functools.partial(module, ids)) if trains else tensors(module(ids))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert len(graphs) == most


@needs_compiler
@pytest.mark.parametrize("backend", [full("torch"), "triton"])
def test_inductor(backend):
    module = make("EmbeddingQKV")
    torch._dynamo.reset()
    with pyembed.backend(backend):
        compiled = torch.compile(module, fullgraph=True)
        for found, expected in zip(*(results(module, lambda f=f: f(IDS)) for f in (compiled, module)), strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)


def test_a_compiler_is_not_told_how_many_tokens(monkeypatch):
    """On a GPU too: nothing in the choice of a plan looks at a length."""

    class Tokens:
        is_cuda, is_meta, dtype, requires_grad = True, False, torch.float32, False
        device = torch.device("cuda")

        def numel(self):
            raise AssertionError("a graph would be for one length")

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    call = Call(Terms(Tokens(), Tokens()), Norm("layer"), Projection(Tokens(), None, 1, 1))
    with pyembed.backend("torch"):
        assert choice.choose(call).name == "one_pass"
    monkeypatch.setattr(choice, "HAS_TRITON", True)
    assert choice.choose(call).name == "one_pass"


def test_fake_tensors_of_a_gpu():
    """As estimators of memory and time use them, also where there is no GPU."""
    with FakeTensorMode(), torch.no_grad():
        token, weight = torch.empty(11, 8, device="cuda"), torch.empty(24, 8, device="cuda")
        ids = torch.empty(4, 512, dtype=torch.long, device="cuda")
        found = F.embed_qkv(ids, token, weight, num_heads=2)
    assert found.query.shape == (4, 512, 2, 4) and found.query.is_cuda


# Export

LENGTH = {0: Dim("batch"), 1: Dim("length", max=64)}


@pytest.mark.sample
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, strict", [*((name, False) for name in MODULES), ("EmbeddingQKV", True)])
def test_exports_for_every_length(name, backend, strict, monkeypatch):
    """And is written and read again, HiddenQKV as it was."""
    monkeypatch.setattr(parts, "PACK_TOKENS", 20)
    module = make(name).eval()
    key = "input" if name == "Embedding" else "ids"
    with pyembed.backend(backend):
        exported = torch.export.export(module, (IDS,), dynamic_shapes={key: LENGTH}, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    ids, read = draw_ids(3, 17), torch.export.load(file).module()
    with pyembed.backend(backend):
        expected = module(ids)
    found = read(ids)
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected, **CLOSE)


class Front(nn.Module):
    """Every module by PyTorch's operators and by the kernels, so that one compilation does for all."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(make(name) for name in ("Embedding", "TokenPositionEmbedding", "EmbeddingQKV"))

    def forward(self, ids):
        found = []
        for backend in BACKENDS:
            with pyembed.backend(backend):
                found.append([part(ids) for part in self.parts])
        return found


@pytest.mark.full
@needs_compiler
def test_aot_inductor(tmp_path):
    """A package holds the kernels as operators of Python: where pyembed is not imported it is refused, by their name."""
    module, path = Front().eval(), str(tmp_path / "front.pt2")
    with torch.no_grad():
        exported = torch.export.export(module, (IDS,), dynamic_shapes={"ids": LENGTH})
        torch._inductor.aoti_compile_and_package(exported, package_path=path)
        loaded, ids = torch._inductor.aoti_load_package(path), draw_ids(3, 17)
        torch.testing.assert_close(loaded(ids), module(ids), **CLOSE)
    program = f"import torch; torch._inductor.aoti_load_package({path!r})"
    alone = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert alone.returncode and "Could not find schema for pyembed::embed" in alone.stderr


# Checkpoints

CHECKPOINTED = {
    "sum": lambda: pyembed.TokenPositionEmbedding(11, 8, 16, dropout=0.5),
    "concat": lambda: pyembed.TokenPositionEmbedding(11, 8, 16, combine="concat", dropout=0.5),
    "front": lambda: pyembed.EmbeddingQKV(11, 8, 2, max_length=16, dropout=0.5),
    "rotary": MODULES["rotary"],
}


@pytest.mark.sample
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "name, backend, plan",
    [
        *((name, backend, "one_pass") for name in ("sum", "concat", "front") for backend in BACKENDS),
        *(("rotary", backend, "distinct") for backend in BACKENDS),
        ("front", "auto", "auto"),
    ],
)
def test_checkpoint(name, backend, plan, use_reentrant):
    """Outputs and gradients bit for bit, dropout's mask too: its seed is drawn from the generator that a checkpoint rewinds."""
    module = CHECKPOINTED[name]().to(DEVICE)
    drops = name != "rotary"
    unused = torch.zeros((), requires_grad=True)  # else a reentrant checkpoint takes it that no gradient is wanted

    def call(checkpointed, **options):
        torch.manual_seed(3)
        if not checkpointed:
            return module(IDS)
        return checkpoint(lambda ids, _: module(ids), IDS, unused, use_reentrant=use_reentrant, **options)

    with pyembed.backend(backend), pyembed.plan(plan):
        plain = results(module, lambda: call(False))
        assert_equal(results(module, lambda: call(True)), plain)
        if drops:
            other = results(module, lambda: call(True, preserve_rng_state=False))
            assert not all(torch.equal(a, b) for a, b in zip(other, plain, strict=True))


def test_selective_checkpoint(monkeypatch):
    """What a policy saves is not computed twice."""
    module, ran, launcher = make("EmbeddingQKV"), [], operators.launcher
    for plans in (operators, one_pass):
        monkeypatch.setattr(plans, "launcher", lambda name, tensor: ran.append(name) or launcher(name, tensor))
    saved = functools.partial(create_selective_checkpoint_contexts, [torch.ops.pyembed.embed_qkv.default])
    with pyembed.backend("triton"):
        plain = results(module, lambda: module(IDS))
        for options, times in (({}, 2), ({"context_fn": saved}, 1)):
            ran.clear()
            assert_equal(results(module, lambda o=options: checkpoint(module, IDS, use_reentrant=False, **o)), plain)
            assert ran == ["embed_qkv"] * times + ["embed_grad"]


def test_a_checkpoint_keeps_its_plan():
    """Between forward and backward a GPU may have counted other ids: their recomputation must not take that for news."""
    token, seen = torch.zeros(11, 8, requires_grad=True), choice._DistinctCount()
    choice._counts[token], seen.calls = seen, 1
    seen.tokens, seen.distinct = 100, 7
    found = []

    def forward(ids, token):
        found.append(choice._expected_distinct(ids, token))
        return token[ids]

    first, second = torch.arange(5), torch.arange(6)
    outputs = [checkpoint(forward, ids, token, use_reentrant=False) for ids in (first, second)]
    seen.tokens, seen.distinct = 10, 9
    torch.autograd.backward([x.sum() for x in outputs])
    assert sorted(found[2:]) == sorted(found[:2]) and found[0] != choice._expected_distinct(first, token)


# Gradients and weights


@pytest.mark.parametrize("name, backend, plan", [*OF_EACH[1:-1:2], *(full(*each) for each in (*OF_EACH[:-1:2], OF_EACH[-1]))])
def test_gradients_add_up(name, backend, plan):
    """Over batches, and over two backward passes of one graph."""
    module, others = make(name), draw_ids(3, 4)
    with pyembed.backend(backend), pyembed.plan(plan):
        first, second = (results(module, lambda ids=ids: module(ids)) for ids in (IDS, others))
        count = len(list(module.parameters()))
        module.zero_grad()
        for ids in (IDS, others):
            backward(module(ids))
        assert_equal(
            [p.grad for p in module.parameters()], [a + b for a, b in zip(first[-count:], second[-count:], strict=True)]
        )
        module.zero_grad()
        outputs = tensors(module(IDS))
        grads = [torch.randn_like(x) for x in outputs]
        for _ in range(2):
            torch.autograd.backward(outputs, grads, retain_graph=True)
        twice = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        torch.autograd.backward(outputs, grads)
        assert_equal(twice, [2 * p.grad for p in module.parameters()])


class Doubled(nn.Module):
    calls = 0

    def forward(self, weight):
        Doubled.calls += 1
        return 2 * weight


def doubled(module):
    parametrize.register_parametrization(module, "weight", Doubled())


COMPUTED = [
    *((doubled, part, "learned") for part in ("token", "position", "norm", "qkv")),
    *((parametrizations.weight_norm, part, "learned") for part in ("token", "qkv")),
    *((parametrizations.spectral_norm, "token", position) for position in ("learned", "rotary")),
    (torch.nn.utils.weight_norm, "qkv", "learned"),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("backend, plan", [("auto", "auto"), ("torch", "distinct"), ("triton", "one_pass")])
@pytest.mark.parametrize("how, part, position", COMPUTED, ids=lambda x: getattr(x, "__name__", x))
def test_computed_weights(how, part, position, backend, plan):
    """Computed once a call, as by the modules: spectral_norm takes a step of its iteration each time."""
    ours, theirs = fronts = [make_front(position) for _ in range(2)]
    for front in fronts:
        torch.manual_seed(2)
        how(getattr(front, part))
    Doubled.calls = 0
    with pyembed.backend(backend), pyembed.plan(plan):
        found = results(ours, lambda: ours(IDS))
    assert Doubled.calls == (how is doubled)
    expected = results(theirs, lambda: turned(theirs, stock(theirs)))
    torch.testing.assert_close(found, expected, **CLOSE)


def make_front(position="learned", **options):
    torch.manual_seed(0)
    front = pyembed.EmbeddingQKV(11, 8, 2, max_length=16, position=position, **options)
    nn.init.normal_(front.norm.weight)
    return front.to(DEVICE)


def turned(front, outputs):
    if front.rotary is None:
        return outputs
    hidden, query, key, value = outputs
    cos, sin, turn_ids, interleaved = rotary.turns(front.rotary, IDS, None)
    epilogue = Epilogue(cos=cos, sin=sin, turn_ids=turn_ids, interleaved=interleaved)
    return hidden, *(reference.rotate(x, epilogue) for x in (query, key)), value


@pytest.mark.parametrize("part", ["token", "norm", "qkv"])
def test_no_table_of_weights_that_are_computed_since(part):
    """And of the weights themselves again, when the parametrization is gone."""
    front = make_front()
    front.build_table()
    with torch.no_grad():
        doubled(getattr(front, part))
        with pytest.warns(UserWarning, match="other plans serve"):
            found = front(IDS)
        torch.testing.assert_close(tuple(found), stock(front), **CLOSE)
        parametrize.remove_parametrizations(getattr(front, part), "weight")
        torch.testing.assert_close(tuple(front(IDS)), stock(front), **CLOSE)


class LanguageModel(nn.Module):
    """Its head has the table of its front end."""

    def __init__(self, name, padding_idx):
        super().__init__()
        if name == "Embedding":
            self.front = pyembed.Embedding(11, 8, padding_idx)
        elif name == "TokenPositionEmbedding":
            self.front = pyembed.TokenPositionEmbedding(11, 8, 16, padding_idx=padding_idx)
        else:
            self.front = pyembed.EmbeddingQKV(11, 8, 2, max_length=16, padding_idx=padding_idx)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.token.weight

    @property
    def token(self):
        return getattr(self.front, "token", self.front)

    def forward(self, ids, by_modules=False):
        if isinstance(self.front, pyembed.EmbeddingQKV):
            hidden, query, key, value = stock(self.front, ids) if by_modules else self.front(ids)
            return self.head(hidden + (query * key * value).flatten(-2))
        if not by_modules:
            return self.head(self.front(ids))
        hidden = nn.Embedding.forward(self.token, ids)
        if self.front is not self.token:
            hidden = hidden + self.front.position(torch.arange(ids.shape[-1], device=ids.device))
        return self.head(hidden)


@pytest.mark.sample
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("name, backend, plan", OF_EACH)
def test_tied_weights(name, backend, plan, padding_idx):
    """The gradients of both uses add up, in a copy and in a model that read the state_dict too; both stay tied."""
    torch.manual_seed(0)
    theirs = LanguageModel(name, padding_idx).to(DEVICE)
    copied, read = copy.deepcopy(theirs), LanguageModel(name, padding_idx).to(DEVICE)
    read.load_state_dict(theirs.state_dict())
    expected = results(theirs, lambda: theirs(IDS, by_modules=True))
    for model in (copied, read):
        assert model.head.weight is model.token.weight and model.token.weight is not theirs.token.weight
        state = model.state_dict()
        names = [name for name, value in state.items() if value.data_ptr() == model.head.weight.data_ptr()]
        assert len(names) == 2 and list(state) == list(theirs.state_dict())
        with pyembed.backend(backend), pyembed.plan(plan):
            torch.testing.assert_close(results(model, lambda m=model: m(IDS)), expected, **CLOSE)


# Profiler


@pytest.mark.parametrize(
    "name, plan, operators",
    [
        ("Embedding", "one_pass", ["embed", "embed_backward"]),
        full("TokenPositionEmbedding", "one_pass", ["embed", "embed_backward"]),
        full("EmbeddingQKV", "one_pass", ["embed_qkv", "embed_qkv_backward"]),
        ("rotary", "one_pass", ["embed_qkv", "embed_qkv_backward"]),
        ("EmbeddingQKV", "distinct", ["distinct_qkv", "distinct_qkv_backward"]),
        full("rotary", "distinct", ["distinct_qkv", "distinct_qkv_backward"]),
    ],
)
def test_profiler_has_one_range_for_each_operator(name, plan, operators):
    module = make(name)
    with pyembed.backend("triton"), pyembed.plan(plan), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            backward(module(IDS))
    ranges = Counter(event.name for event in profiler.events() if event.name.startswith("pyembed::"))
    assert ranges == Counter([f"pyembed::{operator}" for operator in operators] * 2)


# Devices


def elsewhere(tensor):
    return tensor.to("meta")


def arguments_of(function):
    places = torch.arange(5, device=DEVICE)
    tables = {name: torch.randn(shape, 8, device=DEVICE) for name, shape in (("token", 11), ("position", 16), ("segment", 2))}
    given = {"ids": IDS, **tables, "position_ids": places, "segment_ids": IDS % 2}
    if function is F.embedding:
        return {"ids": IDS, "weight": tables["token"]}
    if function is F.embed_qkv:
        shapes = {
            "weight": (24, 8),
            "bias": (24,),
            "norm_weight": (8,),
            "norm_bias": (8,),
            "query_norm": (4,),
            "key_norm": (4,),
        }
        given |= {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items()}
    return given


ELSEWHERE = [(f, name) for f in (F.embedding, F.embed, F.embed_qkv) for name in arguments_of(f)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function, name", ELSEWHERE, ids=lambda x: getattr(x, "__name__", x))
def test_another_device_is_named(function, name, backend):
    given = arguments_of(function)
    given[name] = elsewhere(given[name])
    options = {"num_heads": 2, "norm": "layer"} if function is F.embed_qkv else {}
    named = (
        "ids" if name in ("token", "weight") and function is not F.embed_qkv or name == "token" else name
    )  # it is the measure
    with pyembed.backend(backend), pytest.raises(ValueError, match=rf"^{named}: expected device \w+.*; got \w+"):
        function(**given, **options)


def pair_of_rotary(cos, sin):
    table = torch.randn(5, 4, device=DEVICE)
    return {"rotary": (elsewhere(table) if cos else table, elsewhere(table) if sin else table)}


def pair_of_biases(first, second):
    bias = torch.randn(2, 4, device=DEVICE)
    return {"query_biases": (elsewhere(bias) if first else bias, elsewhere(bias) if second else bias)}


def distinct_of(ids, inverse):
    found = torch.unique(IDS, return_inverse=True)
    return {
        "distinct": pyembed.DistinctIds(*(elsewhere(x) if away else x for x, away in zip(found, (ids, inverse), strict=True)))
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", [pair_of_rotary, pair_of_biases, distinct_of])
@pytest.mark.parametrize("which", [(True, False), (False, True)])
def test_half_of_a_pair_elsewhere_is_named(pair, which, backend):
    given, tables = pair(*which), arguments_of(F.embed_qkv)
    front = pyembed.EmbeddingQKV(11, 8, 2, position=None, norm="rms").to(DEVICE)
    calls = (
        lambda: F.embed_qkv(IDS, tables["token"], tables["weight"], num_heads=2, **given),
        lambda: front(IDS, **given),
    )
    for call in calls:
        with pyembed.backend(backend), pytest.raises(ValueError, match=rf"^{next(iter(given))}.*: expected .*device"):
            call()


HELD = {
    "EmbeddingQKV": ("token", "position", "norm", "qkv"),
    "segments": ("segment", "query_norm", "key_norm"),
    "concat": ("token", "position", "norm", "qkv"),
    "hooked": ("position", "norm", "qkv"),
    "three projections": ("norm", "qkv", "qkv.0", "qkv.1", "qkv.2"),
    "sum": ("token", "position", "segment"),
    "behind": ("token", "position"),
}


def of_parts(name):
    if name == "three projections":
        return make(name)
    if name in ("sum", "behind"):
        options = {"num_segments": 2} if name == "sum" else {"combine": "concat"}
        return pyembed.TokenPositionEmbedding(11, 8, 16, **options).to(DEVICE)
    options = {"segments": {"num_segments": 2, "norm": "rms", "qk_norm": "rms"}, "concat": {"combine": "concat"}}.get(name, {})
    front = pyembed.EmbeddingQKV(11, 8, 2, max_length=16, **options).to(DEVICE)
    if name == "hooked":
        front.norm.register_forward_hook(lambda module, inputs, output: output)
    return front


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, part", [(name, part) for name, held in HELD.items() for part in held])
def test_a_part_elsewhere_is_named(name, part, backend):
    module = of_parts(name)
    module.get_submodule(part).to("meta")
    named = {"token": "ids", "qkv": "(qkv|weight)"}.get(part, part.partition(".")[0])
    with pyembed.backend(backend), pytest.raises(ValueError, match=rf"^{named}\S*: expected .*device.*got .*\w+"):
        module(IDS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*HELD, "Embedding", "sparse", "table"])
def test_ids_elsewhere_are_named(name, backend):
    """Also where PyTorch's operator would return a tensor of meta, and by a table."""
    if name in ("Embedding", "sparse"):
        module, given = pyembed.Embedding(11, 8, sparse=name == "sparse").to(DEVICE), {"input": IDS}
    else:
        module, given = of_parts("EmbeddingQKV" if name == "table" else name), {"ids": IDS}
        tables = {"position_ids": module.position, "segment_ids": module.segment}
        given |= {argument: IDS % 2 for argument, table in tables.items() if table is not None}
    if name == "table":
        module.build_table()
    for argument in given:
        named = argument.replace("input", "ids")
        with (
            pyembed.backend(backend),
            torch.no_grad(),
            pytest.raises(ValueError, match=f"^{named}: expected device .*; got meta"),
        ):
            module(**given | {argument: elsewhere(given[argument])})


def test_a_rotary_comes_back_from_meta():
    """It follows token there, and has its values again when token is back."""
    front, expected = make_front("rotary"), make_front("rotary").rotary.cos
    front.rotary.to("meta")
    with torch.no_grad():
        torch.testing.assert_close(tuple(front(IDS)), turned(front, stock(front)), **CLOSE)
    assert torch.equal(front.rotary.cos, expected)


# Graphs of a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["one_pass", "distinct"])
@pytest.mark.parametrize("name", ["Embedding", "TokenPositionEmbedding", "EmbeddingQKV", "rotary"])
def test_a_cuda_graph_serves_other_ids(name, plan):
    """Forward and backward in one graph, into gradients that stay where they are; replayed with ids that it has not seen."""
    module = make(name)
    ids, seen = torch.full((4, 200), 3, device=DEVICE), draw_ids(4, 200)
    shapes = [x.shape for x in tensors(module(ids))]
    grads = [torch.randn(shape, device=DEVICE) for shape in shapes]

    def step():
        module.zero_grad(set_to_none=True)
        outputs = tensors(module(ids))
        torch.autograd.backward(outputs, grads)
        return outputs + [p.grad for p in module.parameters()]

    with pyembed.plan(plan):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for other in (seen, seen.flip(1)):
            ids.copy_(other)
            graph.replay()
            found = [x.detach().clone() for x in captured]
            assert_equal(found, [x.detach() for x in step()])


@pytest.mark.gpu
def test_a_cuda_graph_drops_anew():
    """A replay advances the generator, so that its mask is another."""
    module = pyembed.EmbeddingQKV(11, 8, 2, max_length=16, dropout=0.5).to(DEVICE)
    with torch.no_grad():
        module(IDS)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = module(IDS).hidden
        masks = []
        for _ in range(2):
            graph.replay()
            masks.append(hidden == 0)
    assert masks[0].any() and not torch.equal(*masks)


# torch.func


def joined(outputs):
    """One tensor of all outputs of a front end, of one for each token."""
    hidden, *heads = tensors(outputs)
    return torch.cat([hidden, *(x.flatten(-2) for x in heads)], -1)


class Fronts(nn.Module):
    """A module, or what it stands for."""

    def __init__(self, name, by_modules):
        super().__init__()
        self.front = make_front() if name == "EmbeddingQKV" else pyembed.TokenPositionEmbedding(11, 8, 16).to(DEVICE)
        self.by_modules = by_modules

    def forward(self, ids):
        if not self.by_modules:
            return joined(self.front(ids))
        if isinstance(self.front, pyembed.EmbeddingQKV):
            return joined(stock(self.front, ids))
        places = torch.arange(ids.shape[-1], device=ids.device)
        return nn.Embedding.forward(self.front.token, ids) + self.front.position(places)


def dual(f, p, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f({k: forward_ad.make_dual(p[k], t[k]) for k in p}, IDS)).tangent


def by_tuples(transform):
    """torch.autograd.functional's transforms take tuples."""
    return lambda f, p, t: transform(lambda *v: f(dict(zip(p, v, strict=True)), IDS), tuple(p.values()), tuple(t.values()))[1]


def batched(f, p, t):
    leaves = {k: v.clone().requires_grad_() for k, v in p.items()}
    out = f(leaves, IDS)
    grads = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return torch.autograd.grad(out, list(leaves.values()), grads, is_grads_batched=True)


TRANSFORMS = {
    "grad": lambda f, p, t: torch.func.grad(lambda p: f(p, IDS).pow(2).sum())(p),
    "vjp": lambda f, p, t: torch.func.vjp(lambda p: f(p, IDS), p)[1](f(p, IDS).detach().sin())[0],
    "jvp": lambda f, p, t: torch.func.jvp(lambda p: f(p, IDS), (p,), (t,))[1],
    "jacrev": lambda f, p, t: torch.func.jacrev(lambda p: f(p, IDS)[1, 3])(p),
    "jacfwd": lambda f, p, t: torch.func.jacfwd(lambda p: f(p, IDS)[1, 3])(p),
    "forward over reverse": lambda f, p, t: torch.func.jvp(torch.func.grad(lambda p: f(p, IDS).pow(3).sum()), (p,), (t,))[1],
    "vmap over ids": lambda f, p, t: torch.func.vmap(f, (None, 0))(p, IDS),
    "vmap over weights": lambda f, p, t: torch.func.vmap(f, (0, None))({k: torch.stack([p[k], t[k]]) for k in p}, IDS),
    "gradients of each sample": lambda f, p, t: torch.func.vmap(
        torch.func.grad(lambda p, ids: f(p, ids).pow(2).sum()), (None, 0)
    )(p, IDS),
    "dual": dual,
    "batched gradients": batched,
    "functional.jvp": by_tuples(torch.autograd.functional.jvp),
    "functional.hvp": by_tuples(lambda f, v, t: torch.autograd.functional.hvp(lambda *v: f(*v).pow(3).sum(), v, t)),
}
TWICE = ("functional.jvp", "functional.hvp")  # they differentiate a gradient, which the kernels of EmbeddingQKV refuse
REFUSALS = "plan: 'distinct' cannot run here|no gradients of gradients by this plan"


@pytest.mark.sample
@pytest.mark.parametrize("name, backend, plan", [*OF_EACH[2:], ("EmbeddingQKV", "auto", "auto")])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, name, backend, plan):
    """The stock modules' result, or a refusal: where `distinct` is forced, and second derivatives by its operator."""
    found = []
    for by_modules in (False, True):
        torch.manual_seed(0)
        module = Fronts(name, by_modules)
        values = {key: p.detach() for key, p in module.named_parameters()}
        tangents = {key: torch.randn_like(p) for key, p in values.items()}
        apply = functools.partial(
            TRANSFORMS[transform], lambda p, ids, m=module: functional_call(m, p, (ids,)), values, tangents
        )
        with pyembed.backend(backend), pyembed.plan(plan):
            qkv = name == "EmbeddingQKV" and not by_modules
            refused = plan == "distinct" and transform != "batched gradients" or backend == "triton" and transform in TWICE
            if qkv and refused:
                with pytest.raises(RuntimeError, match=REFUSALS):
                    apply()
                return
            found.append(apply())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_compiled_module_loses_no_tangent():
    """Compiled before forward mode began, and run within it."""
    front = make_front()
    value, tangent = front.token.weight.detach(), torch.randn(11, 8, device=DEVICE)

    def query(weight):
        return functional_call(front, {"token.weight": weight}, (IDS,)).query

    expected = torch.func.jvp(lambda w: functional_call(front, {"token.weight": w}, (IDS,)).query, (value,), (tangent,))[1]
    torch._dynamo.reset()
    with pyembed.backend("triton"):
        compiled = torch.compile(query, backend="eager", fullgraph=True)
        compiled(value)
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(value, tangent))).tangent
    torch.testing.assert_close(found, expected, **CLOSE)
