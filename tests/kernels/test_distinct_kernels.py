"""The kernels of the `distinct` plan, compiled on a GPU and interpreted without one."""

import pytest
import torch
from conftest import DEVICE, DTYPES, full
from numerics import Case

import pyembed
from pyembed import functional as F
from pyembed.call import FRONT_END
from pyembed.plans import operators
from pyembed.plans.distinct import distinct_qkv

VARIANTS = [
    full({}),
    full({"norm": "rms"}),
    full({"norm": None}),
    full({"position": None}),
    {"norm": "rms", "position": None, "bias": False, "heads": 4, "kv_heads": 1},
    full({"affine": False, "bias": False}),
    full({"position_ids": "T"}),
    full({"position_ids": "1T"}),
    {"position_ids": "BT", "B": 3},  # fewer tables' rows than tokens: all of them are projected
    {"position_ids": "T", "B": 1},  # more rows than tokens: those of position_ids are
    full({"padding_idx": 3}),
    {"T": None},
    full({"T": 1, "B": 9}),
    full({"B": 1, "T": 45}),
    full({"V": 1}),
    full({"D": 33, "head_dim": 5}),
    full({"scale": 1e-4}),
    full({"scale": 300.0}),
    full({"ids_dtype": torch.int32}),
    full({"B": 5, "T": 60, "V": 90}),
]


@pytest.fixture(autouse=True)
def forced():
    with pyembed.backend("triton"), pyembed.plan("distinct"):
        yield


def kernels(name="distinct"):
    return operators.launcher(name, torch.empty(0, device=DEVICE))


@pytest.mark.sample
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants(dtype, variant):
    Case(dtype, DEVICE, **variant).check(F.embed_qkv)


@pytest.mark.parametrize("norm", ["layer", full("rms"), full(None)])
@pytest.mark.parametrize("dtype", [torch.float32, full(torch.float16)])
@pytest.mark.parametrize("position_ids", [full(None), "BT"])
def test_rows_too_wide_to_be_held(position_ids, dtype, norm, monkeypatch):
    """Tables' rows are prepared and their gradients finished in parts, of which the last is not full."""
    module, _ = kernels("distinct_grad")
    monkeypatch.setattr(module.tuning, "rows", lambda D, dtype: (2, 16, 4))
    case = Case(dtype, DEVICE, T=5, V=9, heads=1, norm=norm, padding_idx=3, position_ids=position_ids)
    case.parameters["token"] += 2.0
    first, second = case.check(F.embed_qkv), case.run(F.embed_qkv)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_many_shares_of_a_dot(monkeypatch):
    """More blocks of columns than their sum takes at a time."""
    module, _ = kernels("distinct_grad")
    monkeypatch.setattr(module.tuning, "stream", lambda N, dtype: (4, 16))
    Case(torch.float32, DEVICE, T=5, V=9, D=24, head_dim=32).check(F.embed_qkv)


@pytest.mark.parametrize("dtype, D, transposed", [(DTYPES[0], 40, False), (DTYPES[0], 33, True), (DTYPES[-1], 40, True)])
def test_without_tma(dtype, D, transposed, monkeypatch):
    """On an A100, which has no descriptors; 33: rows that do not start at multiples of 16 bytes; a weight as Conv1D's."""
    module, _ = kernels("tuning")
    monkeypatch.setattr(module, "device_of", lambda tensor: module.DEVICES[80])
    monkeypatch.setattr(module, "TensorDescriptor", None)
    case = Case(dtype, DEVICE, B=3, D=D, head_dim=5)
    if transposed:
        case.parameters["weight"] = case.parameters["weight"].t().contiguous().t()
    case.check(F.embed_qkv)


@pytest.mark.parametrize("V, M", [(31, 50), (2048, 300), (2049, 300), (50257, 5000), (5, 3)])
def test_find(V, M):
    ids = torch.randint(V, (M,), device=DEVICE)
    ids[:2] = torch.tensor([V - 1, 0], device=DEVICE)
    module, running = kernels()
    with running:
        rows, count, slots = module.find(ids, V)
    expected, inverse = ids.unique(return_inverse=True)
    assert rows.shape == (min(M, V),) and int(count) == len(expected)
    assert torch.equal(rows[: len(expected)].long(), expected) and torch.equal(slots[ids].long(), inverse)


def test_find_leaves_out_what_has_no_row():
    ids = torch.tensor([4, -1, 9, 4, 10, 2], device=DEVICE)
    places = torch.tensor([0, 0, 0, 0, 0, 7], device=DEVICE)
    module, running = kernels()
    with running:
        rows, count, _ = module.find(ids, 10, places, 5)
    assert rows[: int(count)].tolist() == [4, 9]


@pytest.mark.full
@pytest.mark.skipif(DEVICE == "cuda", reason="the compiled kernels have no float64; the interpreter checks the formulas")
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_gradcheck(norm):
    case = Case(torch.float64, DEVICE, V=5, T=4, D=6, heads=1, head_dim=2, norm=norm)
    leaves = {k: p.detach().requires_grad_() for k, p in case.parameters.items() if p is not None}

    def function(*tensors):
        return tuple(F.embed_qkv(case.ids, **dict(zip(leaves, tensors, strict=True)), **case.options))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("needed", ["weight", *map(full, ("token", "bias", "position", "norm_weight", "norm_bias"))])
def test_single_parameter_trained(needed):
    """What is not trained gets no gradient, and the one that is, the same bits as when all are."""
    case = Case(torch.float32, DEVICE)
    everything = case.run(F.embed_qkv)
    leaves = {k: p.detach().requires_grad_(k == needed) for k, p in case.parameters.items()}
    torch.autograd.backward(F.embed_qkv(case.ids, **leaves, **case.options)[0 if needed == "none" else 1 :], case.grads[1:])
    with_hidden = {k: p.detach().requires_grad_(k == needed) for k, p in case.parameters.items()}
    torch.autograd.grad(list(F.embed_qkv(case.ids, **with_hidden, **case.options))[1:], with_hidden[needed], case.grads[1:])
    assert all((leaf.grad is None) == (name != needed) for name, leaf in leaves.items())
    if needed not in ("token", "position"):  # hidden's gradient reaches the tables alone
        assert torch.equal(leaves[needed].grad, everything[f"grad of {needed}"])


@pytest.mark.parametrize("used", ["hidden", "query", full("key"), full("value")])
def test_single_output_used(used):
    case = Case(torch.float32, DEVICE)
    grads = []
    for name in ("distinct", "one_pass"):
        leaves = {k: p.detach().requires_grad_() for k, p in case.parameters.items()}
        with pyembed.plan(name):
            out = F.embed_qkv(case.ids, **leaves, **case.options)
        out[out._fields.index(used)].backward(case.grads[out._fields.index(used)])
        grads.append({k: p.grad for k, p in leaves.items()})
    for name, ours in grads[0].items():
        assert (ours is None) == (grads[1][name] is None), name
        if ours is not None:
            torch.testing.assert_close(ours, grads[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T, V", [(20, 1), full(60, 5)])
def test_repeatable(T, V):
    case = Case(torch.float32, DEVICE, B=4, T=T, V=V)
    first, second = case.run(F.embed_qkv), case.run(F.embed_qkv)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("given", [False, True])
def test_opcheck(given):
    case = Case(torch.float32, DEVICE, heads=1)
    case.parameters = {k: v.requires_grad_() for k, v in case.parameters.items()}
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    found = case.ids.unique(return_inverse=True)
    found = (torch.nn.functional.pad(found[0], (0, 3)), found[1].view(-1), torch.tensor([len(found[0])], dtype=torch.int32))
    given = [x.to(DEVICE) for x in found] if given else [None] * 3
    arguments = (*FRONT_END.flatten(case.call()), *given, True)
    torch.library.opcheck(distinct_qkv.forward.op, arguments, test_utils=utilities)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
def test_empty(shape):
    case = Case(torch.float32, DEVICE, T=5)
    leaves = {k: p.detach().requires_grad_() for k, p in case.parameters.items()}
    outputs = F.embed_qkv(torch.zeros(shape, dtype=torch.long, device=DEVICE), **leaves, **case.options)
    assert outputs.query.shape == (*shape, 3, 7) and outputs.hidden.shape == (*shape, 40)
    sum(o.sum() for o in outputs).backward()
    assert all(not p.grad.any() for p in leaves.values())


def test_given_distinct_ids():
    case = Case(torch.float32, DEVICE)
    distinct = pyembed.DistinctIds(*case.ids.unique(return_inverse=True))
    given = case.run(lambda *a, **k: F.embed_qkv(*a, distinct=distinct, **k))
    for name, tensor in case.run(F.embed_qkv).items():
        assert torch.equal(given[name], tensor), name


def test_unknown_ids_are_nan_rows_and_get_no_gradient():
    """Where nothing looks at ids, as on a GPU; the gradients of their rows go to no other token."""
    case = Case(torch.float32, DEVICE)
    case.options["id_policy"] = "trust"
    case.ids = case.ids.clone()
    case.ids[0, 3], case.ids[1, 5] = 0, 0
    grads = case.grads
    case.grads = [g.clone() for g in grads]
    for grad in case.grads:
        grad[0, 3], grad[1, 5] = 0.0, 0.0
    clean, case.grads = case.run(F.embed_qkv), grads
    case.ids[0, 3], case.ids[1, 5] = 31, -1
    found = case.run(F.embed_qkv)
    for name in ("hidden", "query", "key", "value"):
        lost = found[name].isnan()
        assert lost[0, 3].all() and lost[1, 5].all() and lost.sum() == 2 * found[name][0, 0].numel(), name
        assert not clean[name].isnan().any()
    torch.testing.assert_close(found["grad of token"], clean["grad of token"])


@pytest.mark.gpu
@pytest.mark.parametrize("trains", [False, True])
def test_one_cuda_graph_serves_other_ids(trains):
    """The whole forward and backward in a graph, replayed with ids of which more are distinct: nothing asks the host."""
    case = Case(DTYPES[-1], DEVICE, B=8, T=128, V=999, D=64, heads=2, head_dim=32)
    leaves = {k: p.detach().requires_grad_(trains) for k, p in case.parameters.items()}
    ids = case.ids.clone().fill_(3)

    def step():
        outputs = F.embed_qkv(ids, **leaves, **case.options)
        return [*outputs, *(torch.autograd.grad(list(outputs), list(leaves.values()), case.grads) if trains else ())]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    ids.copy_(case.ids)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_no_synchronisation():
    case = Case(torch.float32, DEVICE)
    expected = case.run(F.embed_qkv)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = case.run(F.embed_qkv)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
