"""Which implementation runs."""

import contextlib
import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import CUDA
from torch._subclasses.fake_tensor import FakeTensorMode

import pyembed
from pyembed import functional as F
from pyembed import run, settings
from pyembed.call import Call, Norm, Projection, Terms
from pyembed.plans import choice, distinct, operators, rates


def runs_triton(monkeypatch, token):
    calls = []
    run._kinds.clear()  # else a launch may be repeated
    launcher = operators.launcher
    monkeypatch.setattr(operators, "launcher", lambda *a: calls.append(a) or launcher(*a))
    F.embedding(torch.tensor([0], device=token.device), token)
    monkeypatch.undo()
    return bool(calls)


def test_backend(monkeypatch):
    cpu = torch.randn(3, 2)
    assert not runs_triton(monkeypatch, cpu)
    with pyembed.backend("triton"):
        assert runs_triton(monkeypatch, cpu)
        with pyembed.backend("torch"):
            assert not runs_triton(monkeypatch, cpu)
        assert runs_triton(monkeypatch, cpu)
    assert not runs_triton(monkeypatch, cpu)
    if CUDA:
        assert runs_triton(monkeypatch, cpu.cuda()) and not runs_triton(monkeypatch, cpu.double().cuda())


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError), pyembed.backend("triton"):
        raise KeyError
    assert settings.current.backend == "auto"


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match=r"backend: expected one of \('auto', 'triton', 'torch'\), got 'cuda'"),
        pyembed.backend("cuda"),
    ):
        pass


@pytest.mark.gpu
def test_kernels_refuse_float64():
    with pyembed.backend("triton"), pytest.raises(TypeError, match=r"token: .* got torch.float64"):
        F.embed(torch.tensor([0], device="cuda"), torch.randn(3, 2, dtype=torch.float64, device="cuda"))


NORM = Norm("layer", eps=1e-5)


def chosen(ids, V=50257, D=768, N=2304, trains=False, position=None, dtype=torch.float32):
    token, weight = torch.empty(1, dtype=dtype).expand(V, D), torch.empty(1, dtype=dtype).expand(N, D)
    if trains:
        token, weight = token.requires_grad_(), weight.requires_grad_()
    return choice.choose(call_of(ids, token, weight, position))


def call_of(ids, token, weight, position=None, bias=None, norm=NORM):
    return Call(Terms(ids, token, position), norm, Projection(weight, bias, 1, 1))


@pytest.fixture
def steady(monkeypatch):
    """The rates of some CPU: 150 GFLOP/s, 20 GB/s."""
    monkeypatch.setattr(choice, "measure", lambda device, dtype: rates.Rates(150e9, 20e9, 20e9))


def test_plan_follows_what_repeats(steady):
    repeats, unlike = torch.arange(32768).remainder(5000).view(32, 1024), torch.arange(32768).view(32, 1024)
    for trains in (False, True):
        plan = chosen(repeats, trains=trains)
        assert plan.name == "distinct" and plan.seconds["distinct"] < plan.seconds["one_pass"] and "5000" in plan.reason
        assert chosen(unlike, trains=trains).name == "one_pass"
    assert chosen(repeats[:1, :1]).name == "one_pass"
    with pyembed.plan("one_pass"):
        assert chosen(repeats) == ("one_pass", "pyembed.plan('one_pass') is set", {})
    with pyembed.plan("distinct"):
        assert chosen(unlike).name == "distinct"
    with pyembed.backend("triton"):
        plan = chosen(repeats)  # in the interpreter "auto" shows the one kernel
        assert plan.name == "one_pass" and "run only where pyembed.plan asks" in plan.reason


def test_each_batch_runs_by_the_plan_for_its_ids(steady, monkeypatch):
    """Calls of one shape, of which some repeat ids; each gives what PyTorch's composition gives."""
    by_distinct, front_end = [], distinct.front_end
    monkeypatch.setattr(distinct, "front_end", lambda *a, **k: by_distinct.append(1) or front_end(*a, **k))
    token, weight = torch.randn(1024, 384), torch.randn(1536, 384)
    unlike = torch.arange(1024)[None]
    for ids, repeats in ((unlike, False), (unlike % 3, True), (unlike.flip(1), False), (unlike % 2, True)):
        found = F.embed_qkv(ids, token, weight, num_heads=4, norm="rms")
        assert bool(by_distinct) == repeats
        by_distinct.clear()
        with pyembed.plan("one_pass"):
            torch.testing.assert_close(found, F.embed_qkv(ids, token, weight, num_heads=4, norm="rms"), rtol=1e-4, atol=1e-3)


def test_rates_are_measured_once(monkeypatch):
    monkeypatch.setattr(rates, "_measure", functools.cache(rates._measure.__wrapped__))
    before = torch.get_rng_state()
    found = rates.measure(torch.device("cpu"), torch.float32)
    assert 1e9 < found.flops < 1e14 and 1e8 < found.gather < 1e13 and 1e8 < found.fresh < 1e13
    assert rates.measure(torch.device("cpu"), torch.float32) is found
    assert torch.equal(torch.get_rng_state(), before)  # the user's random numbers stay what they are


def test_threads_share_rates_that_one_measures_alone(monkeypatch):
    """Two that measure at once would slow each other down, and the plans of a process would depend on it."""
    at_work, most = [], []

    def time_slowly(device, dtype):
        at_work.append(dtype)
        most.append(len(at_work))
        time.sleep(0.05)
        at_work.remove(dtype)
        return rates.Rates(float(len(most)), 1.0, 1.0)

    monkeypatch.setattr(rates, "_measure", functools.cache(rates._measure.__wrapped__))
    monkeypatch.setattr(rates, "_time", time_slowly)
    cpu, dtypes = torch.device("cpu"), [torch.float32, torch.float32, torch.float16, torch.float16]
    with ThreadPoolExecutor(4) as pool:
        single, again, half, half_again = pool.map(lambda dtype: rates.measure(cpu, dtype), dtypes)
    assert single is again and half is half_again and len(most) == 2 and max(most) == 1


def test_nothing_is_measured_within_a_capture(monkeypatch):
    """Which a wait for the device would end with an error; a call with given distinct ids is weighed there too."""
    capturing, measured = [True], rates.Rates(1e15, 3e12, 3e12)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(rates, "_measure", functools.cache(rates._measure.__wrapped__))
    monkeypatch.setattr(rates, "_measured", set())
    monkeypatch.setattr(rates, "_time", lambda device, dtype: measured if not capturing[0] else pytest.fail("it measured"))
    device = torch.device("cuda", 0)
    assert rates.measure(device, torch.bfloat16) == rates.NOMINAL["cuda"]
    for capturing[0] in (False, True):
        assert rates.measure(device, torch.bfloat16) is measured


def test_small_calls_that_fill_a_large_gradient(steady):
    """One token of training zeroes the gradient of the whole table: in memory that is used again, that costs less."""
    assert chosen(torch.tensor([[5]])).name == "one_pass"
    token, weight = torch.empty(50257, 768).requires_grad_(), torch.empty(2304, 768)
    slow_to_get = rates.Rates(150e9, 20e9, 3e9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "measure", lambda device, dtype: slow_to_get)
        plan = choice.choose(call_of(torch.tensor([[5]]), token, weight.requires_grad_()))
        assert plan.name == "distinct" and plan.seconds["one_pass"] > 0.04
        with torch.no_grad():
            plan = choice.choose(call_of(torch.tensor([[5]]), token, weight))
            assert plan.name == "one_pass" and "too few" in plan.reason  # nothing was weighed


def test_frozen_parameters_are_weighed():
    """What a backward need not compute does not count for `distinct`."""
    token, weight = (torch.zeros(4, 3) for _ in range(2))
    ids = torch.tensor([0])
    assert choice.backward_products(call_of(ids, token, weight)) is None
    weight.requires_grad_()
    assert choice.backward_products(call_of(ids, token, weight)) == 1
    token.requires_grad_()
    assert choice.backward_products(call_of(ids, token, weight)) == 2
    frozen, trained = (ids, token.detach(), weight.detach()), torch.zeros(3).requires_grad_()
    assert choice.backward_products(call_of(*frozen, bias=trained)) == 0
    assert choice.backward_products(call_of(*frozen, position=trained)) == 1
    assert choice.backward_products(call_of(*frozen, norm=NORM._replace(weight=trained))) == 1
    assert choice.backward_products(call_of(*frozen, norm=NORM._replace(bias=trained))) == 1
    with torch.no_grad():
        assert choice.backward_products(call_of(ids, token, weight)) is None


def test_a_small_promise_is_not_enough(steady):
    ids = torch.arange(4096)[None]
    call = call_of(ids, torch.empty(1).expand(50257, 768), torch.empty(1).expand(2304, 768))
    few = choice.weigh(call, 2000)
    for rows in range(2000, 4096, 64):
        plan = choice.weigh(call, rows)
        assert (plan.name == "distinct") == (plan.seconds["distinct"] * choice.MARGIN < plan.seconds["one_pass"])
    assert few.name == "distinct" and plan.name == "one_pass"


def test_deterministic_plans_go_by_fixed_rates(monkeypatch):
    monkeypatch.setattr(rates, "_measure", None)
    torch.use_deterministic_algorithms(True)
    try:
        assert rates.measure(torch.device("cpu"), torch.float32) == rates.NOMINAL["cpu"]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fake_tensors_have_no_ids_to_look_at(backend):
    with FakeTensorMode(), pyembed.backend(backend):
        front = pyembed.EmbeddingQKV(5000, 768, 12)
        assert front(torch.zeros(2, 512, dtype=torch.long)).query.shape == (2, 512, 12, 64)


def test_what_repeats_on_a_gpu_is_learned_without_waiting(monkeypatch):
    ready, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: empty(*size, **options))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    event = type("Event", (), {"record": lambda self: None, "query": lambda self: bool(ready)})
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    seen = choice._DistinctCount()
    seen.look(torch.tensor([0]), 0)  # an empty batch says nothing
    assert seen.expect(1000) is None
    seen.look(torch.tensor([3251]), 16384)
    assert seen.expect(16384) is None  # on its way
    seen.look(torch.tensor([1]), 1)  # nothing piles up behind it
    ready.append(True)
    assert seen.expect(16384) == 3251
    assert abs(seen.expect(65536) / 7892 - 1) < 0.03  # WikiText-2's count
    assert seen.expect(10) <= 10
    seen.look(torch.tensor([100]), 65536)
    assert seen.expect(65536) == 100
    seen.look(torch.tensor([90]), 65536)
    others = [lambda: seen.expect(65536)]  # another thread finds the count, between this one's two looks at it
    event.query = lambda self: [other() for other in [others.pop() for _ in others]] or True
    assert seen.expect(65536) == 90


def test_plan_refuses():
    with pytest.raises(ValueError, match=r"plan: expected one of .* got 'tables'"), pyembed.plan("tables"):
        pass
    with (
        pyembed.plan("distinct"),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="plan: 'distinct' cannot run here: autocast is on"),
    ):
        F.embed_qkv(torch.tensor([0]), torch.randn(3, 2), torch.randn(6, 2), num_heads=1)
    assert settings.current.plan == "auto"


def test_other_machinery_keeps_pytorchs_composition(steady):
    """Under torch.func or forward-mode AD an operator of our own would give no tangent."""
    repeats = torch.arange(32768).remainder(5000).view(32, 1024)
    seen = []
    torch.func.jvp(lambda x: seen.append(chosen(repeats).name) or x, (torch.ones(1),), (torch.ones(1),))
    with torch.autograd.forward_ad.dual_level():
        seen.append(chosen(repeats).name)
    assert seen == ["one_pass", "one_pass"] and chosen(repeats).name == "distinct"


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not say what is resident")
def test_fresh_memory_is_fresh():
    """Also where the C library keeps enough freed memory: what is measured is the first touch of a page."""

    def resident():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

    blocks = [torch.ones(25_000) for _ in range(1000)]  # 100 MB of the heap
    blocks = blocks[-1:]  # which is not given back
    for _ in range(2):
        tensor = rates._fresh()
        before = resident()
        tensor.zero_()
        assert resident() - before > 0.9 * rates.FRESH_BYTES
        del tensor
    assert blocks
