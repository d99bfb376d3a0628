"""The largest and the smallest: tables and results of more than 2³¹ elements, widths of one, no token, no row."""

import contextlib
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, full
from numerics import Case, assert_no_worse
from test_table import looked_up, module_of

import pyembed
from pyembed import functional as F
from pyembed import reference

ROOT = Path(__file__).parents[2]
BACKENDS, PLANS, NORMS = ["torch", "triton"], ["one_pass", "distinct", "table"], ["layer", "rms", None]
ONE = {"B": 1, "T": 1, "V": 1, "D": 1, "heads": 1, "head_dim": 1}
SMALLEST = {
    "a row": {"V": 1},
    "a column": {"D": 1},
    "a head of one": {"heads": 1, "head_dim": 1},
    "one of everything": ONE,
    "one of everything, a scalar": ONE | {"T": None},
    "no sequence": {"B": 0},
    "no length": {"T": 0},
    "no row": {"B": 0, "V": 3},
    "no row, no position": {"T": 0, "V": 3},
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs files with holes, and Linux's limits")
@pytest.mark.parametrize("dtype", ["float32", full("float16")])
@pytest.mark.parametrize("ids_dtype", ["int32", full("int64")])
def test_tables_beyond_two_to_the_31_elements(dtype, ids_dtype, tmp_path):
    command = [sys.executable, str(ROOT / "tests/helpers/far_rows.py"), str(tmp_path), dtype, ids_dtype]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:] or f"ended by signal {-found.returncode}"


def smallest(name, norm):
    case = Case(torch.float32, DEVICE, norm=norm, **SMALLEST[name])
    if case.parameters["token"].shape[1] == 1:  # of one sign: test_distinct says what is lost where two rows cancel
        for table in ("token", "position"):
            case.parameters[table].abs_()
    if name.startswith("no row"):
        case.parameters["token"] = case.parameters["token"][:0]
    if "no position" in name:
        case.parameters["position"] = case.parameters["position"][:0]
    return case


@pytest.mark.sample
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend, plan", list(itertools.product(BACKENDS, PLANS)))
@pytest.mark.parametrize("size", SMALLEST)
def test_smallest(size, backend, plan, norm):
    case = smallest(size, norm)
    with pyembed.backend(backend), pyembed.plan(plan):
        if plan != "table":
            if case.parameters["token"].shape[1] == 1:  # else a norm's gradient is nothing but rounding
                case.options["eps"] = 1.0
            found = case.check(F.embed_qkv)
        else:
            found = looked_up(module_of(case), case)._asdict()
            eager, oracle = (case.run(reference.embed_qkv, d, backward=False) for d in (None, torch.float64))
            for name in oracle:
                assert_no_worse(name, found[name], eager[name], oracle[name])
    assert not any(grad.any() for name, grad in found.items() if "grad" in name and "no " in size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SMALLEST)
def test_smallest_rows(size, backend):
    """The gathers alone, with positions, segments and dropout."""
    case = smallest(size, None)
    token, position = (case.parameters[name].detach().requires_grad_() for name in ("token", "position"))
    segment = token.detach()[:1].requires_grad_()
    with pyembed.backend(backend):
        for function, tables in (
            (lambda f: f.embedding(case.ids, token), (token,)),
            (lambda f: f.embed(case.ids, token, position), (token, position)),
            (lambda f: f.embed(case.ids, token, position, segment=segment), (token, position, segment)),
        ):
            ours, eager = function(F), function(reference)
            assert torch.equal(ours, eager)
            grad = torch.randn(ours.shape).to(DEVICE)
            for mine, theirs in zip(*(torch.autograd.grad(x, tables, grad) for x in (ours, eager)), strict=True):
                torch.testing.assert_close(mine, theirs)
        assert not F.embed(case.ids, token, position, dropout=1.0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_for_an_id(backend):
    ids, token, some = torch.zeros(1, 2, dtype=torch.long, device=DEVICE), torch.ones(0, 4), torch.ones(3, 4)
    token, some, weight = (t.to(DEVICE) for t in (token, some, torch.ones(12, 4)))
    with pyembed.backend(backend), pyembed.debug():
        for call in (lambda: F.embedding(ids, token), lambda: F.embed_qkv(ids, token, weight, num_heads=1)):
            with pytest.raises(
                IndexError,
                match=r"token: expected a row for each of ids, got a table of 0 rows|ids: expected values in \[0, 0\)",
            ):
                call()
        with pytest.raises(IndexError, match="sequence length 2 needs positions up to 1, position has 0 rows"):
            F.embed(ids, some, token)
        with pytest.raises(IndexError, match="segment: expected a row for each"):
            F.embed(ids, some, segment=token)


# What takes real memory: about 30 GiB of a GPU's at most, and so one test at a time, whatever number of processes runs tests.

NEEDED = 32 << 30


@contextlib.contextmanager
def alone(path):
    """Within it this process has the file at `path`, for which every other one that asks for it waits."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, even if the process dies
        yield


def wait_for_memory(needed, seconds=120):
    """Whether the GPU comes to have so many bytes free, of which other processes' tests may hold some for a while."""
    end = time.monotonic() + seconds
    while True:
        free, total = torch.cuda.mem_get_info()
        if free >= needed or total < needed or time.monotonic() > end:
            return free >= needed
        time.sleep(1)


@pytest.fixture
def most_of_a_gpu(tmp_path_factory):
    with alone(tmp_path_factory.getbasetemp().parent / "most_of_a_gpu"):
        torch.cuda.empty_cache()
        if not wait_for_memory(NEEDED):
            pytest.skip(f"needs {NEEDED >> 30} GiB of a GPU's memory, of which {torch.cuda.mem_get_info()[0] >> 30} are free")
        yield
        torch.cuda.empty_cache()


def test_one_process_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    entered, order = threading.Event(), []

    def other():
        entered.wait()
        with alone(tmp_path / "file"):
            order.append("the other")

    thread = threading.Thread(target=other)
    thread.start()
    with alone(tmp_path / "file"):
        entered.set()
        thread.join(0.1)
        order.append("this one")
    thread.join()
    assert order == ["this one", "the other"]


@pytest.mark.parametrize(
    "free, total, found, turns", [([40], 80, True, 0), ([10, 10, 40], 80, True, 2), ([10], 80, False, 5), ([10], 24, False, 0)]
)
def test_memory_is_waited_for(free, total, found, turns, monkeypatch):
    """Until the deadline; not at all on a GPU that has never so much."""
    now, left = [0], list(free)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (left.pop(0) if left[1:] else left[0], total))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    assert wait_for_memory(32, 4) == found and now == [turns]


@pytest.mark.gpu
@pytest.mark.usefixtures("most_of_a_gpu")
@pytest.mark.parametrize("plan", ["one_pass", "distinct"])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_a_gpus_table_beyond_two_to_the_31_elements(plan, ids_dtype):
    """Forward, and backward into a dense gradient of as many elements."""
    D, g = 1024, torch.Generator("cuda").manual_seed(0)
    V = 2**31 // D + 1000
    token = torch.zeros(V, D, dtype=torch.float16, device="cuda")
    token[-1000:] = torch.randn(1000, D, generator=g, device="cuda")
    token.requires_grad_()
    ids = torch.randint(V - 1000, V, (4, 300), generator=g, device="cuda", dtype=ids_dtype)
    weight = torch.randn(192, D, generator=g, device="cuda").mul_(D**-0.5).half().requires_grad_()
    few = token.detach()[-1000:].clone().requires_grad_()
    found = []
    for table, rows in ((token, ids), (few, ids - (V - 1000))):
        with pyembed.backend("triton"), pyembed.plan(plan):
            outputs = F.embed_qkv(rows, table, weight, num_heads=1, norm="layer")
            assert torch.equal(F.embedding(rows, table), outputs.hidden)
        assert torch.equal(outputs.hidden, reference.embedding(rows, table))
        grads = [torch.linspace(-1, 1, x.numel(), device="cuda").to(x.dtype).view(x.shape) for x in outputs]
        found.append((*outputs, *torch.autograd.grad(outputs, (weight, table), grads)))
    *ours, grad = found[0]
    *theirs, few_grad = found[1]
    assert not grad[:-1000].any()
    for mine, expected in zip((*ours, grad[-1000:]), (*theirs, few_grad), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("most_of_a_gpu")
@pytest.mark.parametrize("plan", ["one_pass", "distinct"])
@pytest.mark.parametrize("heads, width", [(32, 64), (1, 2048)], ids=["query", "hidden"])
def test_a_gpus_results_beyond_two_to_the_31_elements(plan, heads, width):
    """M·N and M·D: the last tokens are those of a call with them alone, and so are the gradients that come by them alone."""
    D, M, last, g = width, 2**20 + 100, 90, torch.Generator("cuda").manual_seed(0)
    token, weight = (torch.randn(n, D, generator=g, device="cuda").mul_(n**-0.5).half() for n in (50, 64 * (heads + 2)))
    ids = torch.randint(50, (M,), generator=g, device="cuda")
    found = []
    for rows in (ids, ids[-last:]):
        leaves = [t.clone().requires_grad_() for t in (token, weight)]
        with pyembed.backend("triton"), pyembed.plan(plan):
            outputs = F.embed_qkv(rows, *leaves, num_heads=heads, num_kv_heads=1, norm="rms")
            ends = [x[-last:] for x in outputs]
            grads = [torch.linspace(-1, 1, x.numel(), device="cuda").to(x.dtype).view(x.shape) for x in ends]
            found.append([*ends, *torch.autograd.grad(ends, leaves, grads)])
        if len(rows) == M:
            assert max(x.numel() for x in outputs) > 2**31
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * theirs.abs().max().item())
