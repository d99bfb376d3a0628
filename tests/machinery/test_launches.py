"""Compiled kernels on the host: a call that repeats a recorded launch (run._Launch) gives what a first call by Triton would."""

import inspect
import threading

import compiled
import numpy
import pytest
import torch
from conftest import DEVICE, full
from pyembed.kernels import launch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import pyembed
import pyembed.functional as F
from pyembed import run
from pyembed.modules import parts

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a device has a driver of its own")
V, D, L, H, KV = 40, 32, 16, 4, 2
N = (H + 2 * KV) * 8


@pytest.fixture(autouse=True)
def without_memory():
    """Calls take the way of compiled kernels, and nothing is remembered of those before."""
    compiled.KINDS.clear()
    compiled.RUNNERS.clear()
    with compiled.compiled():
        yield


@pytest.fixture
def replayed(monkeypatch):
    """Whether no launcher ran since the last question."""
    asked, by_launcher = [], launch._launch
    monkeypatch.setattr(launch, "_launch", lambda *args, **options: asked.append(args) or by_launcher(*args, **options))

    def answer():
        found = not asked
        asked.clear()
        return found

    return answer


def arguments(seed=0, ids=(2, 3), dtype=torch.int64, **others):
    """Of functional.embed_qkv, random ones."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=draw)

    found = {
        "ids": torch.randint(V, ids, generator=draw, dtype=dtype), "token": randn(V, D), "weight": randn(N, D),
        "bias": randn(N), "num_heads": H, "num_kv_heads": KV, "position": randn(L, D), "norm": "layer", "norm_weight": randn(D),
        "norm_bias": randn(D),
    }  # fmt: skip
    return found | {name: make(randn) if inspect.isfunction(make) else make for name, make in others.items()}


def assert_right(call):
    found = F.embed_qkv(**call)
    with pyembed.backend("torch"):
        expected = F.embed_qkv(**call)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    return found


PLACES = torch.tensor([[3, 1, 2], [0, 5, 4]])
TURNS = pyembed.Rotary(8, L)
KINDS = {
    "LayerNorm and positions": {},
    "positions given": {"position_ids": PLACES},
    "RMSNorm, a Rotary by position_ids": {
        "norm": "rms", "norm_bias": None, "position": None, "rotary": TURNS, "position_ids": PLACES, "bias": None,
    },
    "a Rotary from 0 on": {"norm": "rms", "norm_bias": None, "position": None, "rotary": TURNS},
    "cosines and sines": {"position": None, "rotary": lambda randn: tuple(randn(2, 3, 4).repeat(1, 1, 2))},
    "no norm": {"norm": None, "norm_weight": None, "norm_bias": None, "padding_idx": -1},
    "Conv1D's weight": {"weight": lambda randn: randn(D, N).t()},
    "32-bit ids": {"dtype": torch.int32},
}  # fmt: skip


SAMPLE = {  # of KINDS and of OTHERS, which --full has all of
    "LayerNorm and positions", "RMSNorm, a Rotary by position_ids", "an eps on a tensor", "a table that is no block",
    "an address that 16 does not divide",
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind if kind in SAMPLE else full(kind) for kind in KINDS])
def test_the_second_call_is_a_launch(replayed, kind):
    """Of other ids, weights, positions and turns, whose results it makes anew."""
    first = assert_right(arguments(0, **KINDS[kind]))
    assert not replayed()
    kept = [x.clone() for x in first]
    others = dict(KINDS[kind])
    if "position_ids" in others:
        others["position_ids"] = others["position_ids"].flip(0)
    for seed in (1, 2):
        again = assert_right(arguments(seed, **others))
        assert replayed()
        assert not any(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    for a, b in zip(first, kept, strict=True):
        assert torch.equal(a, b)


def test_sums(replayed):
    for seed in range(3):
        call = arguments(seed)
        found = F.embed(call["ids"], call["token"], call["position"])
        assert torch.equal(found, call["token"][call["ids"]] + call["position"][:3])
        assert replayed() == (seed > 0)
    assert torch.equal(F.embedding(call["ids"], call["token"]), call["token"][call["ids"]]) and not replayed()
    assert torch.equal(F.embedding(call["ids"], call["token"]), call["token"][call["ids"]]) and replayed()


OTHERS = {
    "more tokens": {"ids": (2, 4)},
    "as many tokens": {"ids": (3, 2)},
    "eps": {"eps": 0.5},
    "an eps that is no float": {"eps": 1},
    "an eps on a tensor": {"eps": torch.tensor(0.25)},
    "heads": {"num_heads": 6, "num_kv_heads": 1},
    "RMSNorm": {"norm": "rms", "norm_bias": None},
    "no bias": {"bias": None},
    "a longer table": {"position": lambda randn: randn(L + 1, D)},
    "a table that is no block": {"token": lambda randn: randn(V, 2 * D)[:, ::2]},
    "a weight that is none": {"weight": lambda randn: randn(D, N).t()},
    "an address that 16 does not divide": {"weight": lambda randn: randn(N * D + 1)[1:].view(N, D)},
    "position_ids": {"position_ids": PLACES},
    "half": {name: lambda randn, shape=shape: randn(*shape).half() for name, shape in (
        ("token", (V, D)), ("weight", (N, D)), ("bias", (N,)), ("position", (L, D)), ("norm_weight", (D,)), ("norm_bias", (D,))
    )},
}  # fmt: skip


@pytest.mark.parametrize("other", [other if other in SAMPLE else full(other) for other in OTHERS])
def test_another_call_is_looked_at(replayed, other):
    assert_right(arguments())
    assert not replayed()
    call = arguments(1, **OTHERS[other])
    found = F.embed_qkv(**call)
    assert not replayed()
    with pyembed.backend("torch"):
        expected = F.embed_qkv(**(call | {"eps": float(call.get("eps", 1e-5))}))
    tolerance = 2e-2 if other == "half" else 1e-4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert_right(arguments(2))
    assert replayed()


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"num_heads": float(H)}, ValueError, "num_heads: expected a positive int"),
        full({"position": None, "position_ids": PLACES}, ValueError, "position_ids: expected None"),
        full({"position_ids": PLACES[:, :2]}, ValueError, "position_ids: expected shape"),
        full({"position": None, "rotary": TURNS, "weight": None}, TypeError, "weight: expected a Tensor"),
        ({"position": None, "rotary": TURNS, "position_ids": [1]}, TypeError, "position_ids: expected a Tensor"),
        ({"position": None, "rotary": pyembed.Rotary(8, 2)}, IndexError, "sequence length 3"),
        full({"position": [1], "rotary": TURNS}, TypeError, "position: expected a Tensor"),
        full(
            {"weight": lambda randn: randn(N + 1, D), "rotary": TURNS, "bias": None}, ValueError, "weight: expected a multiple"
        ),
    ],
)
def test_what_is_wrong_is_said_after_calls_that_were_right(wrong, error, message):
    for call in ({}, {"position": None}, {"position": None, "rotary": TURNS}):
        assert_right(arguments(0, **call))
    with pytest.raises(error, match=message):
        F.embed_qkv(**arguments(1, **wrong))


def test_one_tensor_in_two_places(replayed):
    """It is two, perhaps, in the next call of the same shapes."""
    table = torch.randn(V, D)
    for _ in range(2):
        assert_right(arguments(token=table, position=table))
        assert not replayed()
    for again in (False, True):
        assert_right(arguments(1, position=torch.randn(V, D)))
        assert replayed() == again
    assert_right(arguments(token=table, position=table))


def test_gradients_are_not_forgotten(replayed):
    first, call = arguments(0), arguments(1)
    for given in (first, call):
        given["weight"].requires_grad_()
    with torch.no_grad():
        assert_right(first)
    assert F.embed_qkv(**call).query.requires_grad and not replayed()
    with torch.no_grad():
        assert not F.embed_qkv(**call).query.requires_grad and replayed()


def test_absent_rows_are_reported(replayed):
    assert_right(arguments(0))
    absent = arguments(1, ids=(2, 3))
    absent["ids"][1, 2] = V
    replayed()
    found = F.embed_qkv(**absent)
    assert replayed() and found.query[1, 2].isnan().all() and not found.query[0].isnan().any()
    with pytest.raises(IndexError, match=rf"ids: expected values in \[0, {V}\).*token 2 of sequence 1"):
        F.embed_qkv(**arguments(2))
    assert_right(arguments(2))
    for _ in range(2):
        assert F.embed_qkv(**absent, id_policy="trust").query[1, 2].isnan().all()
    pyembed.check_ids()


def test_modules(replayed, monkeypatch):
    """Three projections are packed anew before each launch."""
    monkeypatch.setattr(parts, "PACK_TOKENS", 0)
    front = pyembed.EmbeddingQKV(V, D, H, num_kv_heads=KV, max_length=L)
    summed = pyembed.TokenPositionEmbedding(V, D, L)
    linears = tuple(nn.Linear(D, N // (H + 2 * KV) * heads, bias=heads == H) for heads in (H, KV, KV))
    three = pyembed.EmbeddingQKV.from_modules(nn.Embedding(V, D), qkv=linears, num_heads=H, num_kv_heads=KV)
    modules = nn.ModuleList([front, summed, three]).requires_grad_(False)
    for step in range(3):
        for parameter in modules.parameters():
            nn.init.normal_(parameter)
        ids = torch.randint(V, (1, 4))
        for module in modules:
            found = module(ids)
            assert replayed() == (step > 0), module
            with pyembed.backend("torch"):
                torch.testing.assert_close(found, module(ids), rtol=1e-4, atol=1e-4)


def test_the_profiler_sees_the_operator():
    F.embed_qkv(**arguments())
    with torch.profiler.profile() as profile:
        F.embed_qkv(**arguments())
    assert "pyembed::embed_qkv" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("plan", ["one_pass", full("distinct")])
def test_training(plan, monkeypatch):
    """Every launch of a step but the first step's is remembered, and gives the gradients that PyTorch's operators give."""
    names = ("token", "weight", "bias", "position", "norm_weight", "norm_bias")
    asked = []
    run = launch.JITFunction.run
    monkeypatch.setattr(launch.JITFunction, "run", lambda *args, **options: asked.append(args) or run(*args, **options))
    for seed in range(2):
        call = arguments(seed)
        leaves = [call[name].requires_grad_() for name in names]
        grads = []
        for backend in ("triton", "torch"):
            with pyembed.backend(backend), pyembed.plan(plan if backend == "triton" else "one_pass"):
                outputs = F.embed_qkv(**call)
                grads.append(torch.autograd.grad([(x * x.detach().cos()).sum() for x in outputs], leaves))
        for name, a, b in zip(names, *grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
        assert bool(asked) == (seed == 0)
        asked.clear()


def test_memory_is_bounded(monkeypatch):
    """Also that of calls which are refused."""
    monkeypatch.setattr(launch, "KINDS", 2)
    monkeypatch.setattr(run, "SIGNATURES", 2)
    for length in range(1, 7):
        assert_right(arguments(ids=(1, length)))
        assert len(launch._kinds) <= 2 and compiled.count_runners() <= 2
    for length in range(L + 1, L + 7):
        with pytest.raises(IndexError, match=f"sequence length {length}"):
            F.embed_qkv(**arguments(ids=(1, length)))
        assert compiled.count_runners() <= 2


def test_the_last_column_of_a_batch(replayed):
    """As loops over tokens take it."""
    ids, places = torch.randint(V, (4, 6)), torch.arange(6).expand(4, 6)
    for step in range(3):
        call = arguments(step)
        assert_right(call | {"ids": ids[:, step : step + 1], "position_ids": places[:, step : step + 1]})
        assert replayed() == (step > 0)


def test_tables():
    """By the plan "table", whose eps no operator makes a float of Python's."""
    front = pyembed.EmbeddingQKV(V, D, H, max_length=L, eps=numpy.float64(1e-5)).requires_grad_(False)
    with pyembed.plan("table"):
        for _ in range(2):
            ids = torch.randint(V, (2, 3))
            torch.testing.assert_close(front(ids), stock(front, ids), rtol=1e-4, atol=1e-4)


def stock(front, ids):
    with pyembed.backend("torch"), pyembed.plan("one_pass"):
        return front(ids)


def test_a_rotary_that_moved():
    """Outside of its model's tree a front end does not hear of to()."""
    front = pyembed.EmbeddingQKV(V, D, H, max_length=L, position="rotary").requires_grad_(False)
    ids = torch.randint(V, (2, 3))
    expected = front(ids)
    front.rotary.to("meta")
    torch.testing.assert_close(front(ids), expected)


def test_a_gradient_of_many():
    """torch._vmap_internals, as is_grads_batched uses it, over the tables of a call without gradients."""
    ids, tables = torch.randint(V, (2, 3)), torch.randn(4, V, D)
    F.embedding(ids, tables[0])
    assert torch.equal(torch._vmap_internals._vmap(lambda table: F.embedding(ids, table))(tables), tables[:, ids])


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_modes_see_operators(replayed):
    """Of their own thread, also after that of another has begun before and ended since."""
    call = arguments()
    begun, ended = threading.Event(), threading.Event()

    def other():
        with Seen():
            begun.set()
            ended.wait()

    F.embed(call["ids"], call["token"])
    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    with Seen() as seen:
        ended.set()
        thread.join()
        F.embed(call["ids"], call["token"])
    assert "pyembed.embed.default" in seen.names
    replayed()
    F.embed(call["ids"], call["token"])
    assert replayed()


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_tracers_see_operators(pre_dispatch):
    call = arguments()
    F.embed(call["ids"], call["token"])
    graph = make_fx(lambda ids: F.embed(ids, call["token"]), pre_dispatch=pre_dispatch)(call["ids"]).graph
    assert torch.ops.pyembed.embed.default in {node.target for node in graph.nodes}
