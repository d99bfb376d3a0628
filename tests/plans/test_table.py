"""The `table` plan: the same answer from projected rows, never from stale ones."""

import copy
import pickle
import threading
import time
import warnings

import pytest
import torch
from numerics import Case, assert_no_worse
from torch import nn

import pyembed
from pyembed import functional as F
from pyembed import reference
from pyembed.modules import keeps_table
from pyembed.plans import table
from pyembed.plans.choice import Plan

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VARIANTS = [
    {},
    {"norm": "rms"},
    {"norm": None},
    {"position": None},
    {"position": None, "norm": None, "bias": False},
    {"norm": "rms", "position": None, "bias": False, "heads": 4, "kv_heads": 1},
    {"affine": False, "bias": False},
    {"position_ids": "T"},
    {"position_ids": "1T"},
    {"position_ids": "BT", "B": 3},
    {"T": None},
    {"T": 1, "B": 9},
    {"V": 1},
    {"scale": 1e-4},
    {"scale": 300.0},
    {"ids_dtype": torch.int32},
    {"B": 7, "T": 31},
    {"B": 7, "T": 31, "position_ids": "T"},
    {"B": 7, "T": 31, "position_ids": "BT"},
    {"B": 0, "T": 5},
]


def module_of(case, dtype=None):
    """An EmbeddingQKV over a case's parameters."""
    p = {k: None if v is None else v.detach().to(dtype or v.dtype) for k, v in case.parameters.items()}
    V, D = p["token"].shape
    token = nn.Embedding(V, D, _weight=p["token"])
    position = None if p["position"] is None else nn.Embedding(*p["position"].shape, _weight=p["position"])
    norm = None
    if case.options["norm"] == "layer":
        norm = nn.LayerNorm(D, eps=1e-5, elementwise_affine=p["norm_weight"] is not None, dtype=p["token"].dtype)
    elif case.options["norm"] == "rms":
        norm = nn.RMSNorm(D, eps=1e-5, elementwise_affine=p["norm_weight"] is not None, dtype=p["token"].dtype)
    qkv = nn.Linear(D, p["weight"].shape[0], bias=p["bias"] is not None, dtype=p["token"].dtype)
    with torch.no_grad():
        for module, weight, bias in ((norm, "norm_weight", "norm_bias"), (qkv, "weight", "bias")):
            for name, value in (("weight", p[weight]), ("bias", p[bias])):
                if value is not None:
                    getattr(module, name).copy_(value)
    heads = {k: case.options[k] for k in ("num_heads", "num_kv_heads")}
    return pyembed.EmbeddingQKV.from_modules(token, position, norm, qkv=qkv, **heads)


def looked_up(module, case):
    with torch.no_grad(), pyembed.plan("table"):
        return module(case.ids, case.position_ids)


@pytest.mark.sample
@pytest.mark.parametrize("dtype, backend", [*((d, "torch") for d in DTYPES), *((d, "triton") for d in DTYPES[:2])])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants(dtype, backend, variant):
    case = Case(dtype, "cpu", **variant)
    eager, oracle = (case.run(reference.embed_qkv, d, backward=False) for d in (None, torch.float64))
    with pyembed.backend(backend):
        found = looked_up(module_of(case), case)._asdict()
    assert torch.equal(found["hidden"], eager["hidden"])
    for name in oracle:
        assert_no_worse(name, found[name], eager[name], oracle[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", [{}, {"position": None}, {"scale": 1e-4}, {"norm": None}, {"B": 7, "T": 31}], ids=str)
def test_half_storage(dtype, variant):
    """The error is the storage's rounding of two entries, as build_table says, and hidden is exact."""
    case = Case(torch.float32, "cpu", **variant)
    module = module_of(case)
    error = module.build_table(dtype)
    assert 0 < error <= torch.finfo(dtype).eps
    assert module.table_nbytes(dtype) * 2 == module.table_nbytes() == 2 * module._table.projected.nbytes
    expected = reference_of(module, case)
    for backend in ("torch", "triton"):
        with torch.no_grad(), pyembed.backend(backend):
            found = module(case.ids)
        assert torch.equal(found.hidden, expected.hidden)
        for name in ("query", "key", "value"):
            exact = getattr(expected, name)
            wrong = (getattr(found, name) - exact).abs().amax()
            assert 0 < wrong <= 4 * torch.finfo(dtype).eps * exact.abs().amax()


def reference_of(module, case):
    with pyembed.plan("one_pass"), torch.no_grad():
        return module(case.ids, case.position_ids)


EDITS = {
    "in place": lambda m: nn.init.normal_(m.qkv.weight),
    "an element in place": lambda m: m.token.weight.__setitem__((3, 5), 7.0),
    "bias in place": lambda m: m.qkv.bias.add_(1.0),
    "norm in place": lambda m: m.norm.bias.mul_(3.0),
    "optimizer": lambda m: optimise(m),
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "load_state_dict, assign": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
    "replaced parameter": lambda m: setattr(m.qkv, "weight", nn.Parameter(m.qkv.weight * 2)),
    "replaced module": lambda m: setattr(m, "norm", nn.RMSNorm(m.norm.normalized_shape, eps=1e-5)),
    "eps": lambda m: setattr(m.norm, "eps", 0.5),
    ".to()": lambda m: m.to(torch.float64),
    ".double().float()": lambda m: m.double().float().qkv.weight.data.mul_(2),
    ".data assigned": lambda m: setattr(m.position.weight, "data", m.position.weight * 2),
    ".data, in place": lambda m: m.qkv.weight.data.mul_(2),
    ".data, a weight row": lambda m: m.qkv.weight.data[17].zero_(),
    ".data, a weight column": lambda m: m.qkv.weight.data[:, 3].zero_(),
    ".data, a token's row": lambda m: m.token.weight.data[3].mul_(2),
    ".data, a position's row": lambda m: m.position.weight.data[2].add_(1),
    ".data, a bias element": lambda m: m.qkv.bias.data[5].fill_(9.0),
    ".data, another bias element": lambda m: m.qkv.bias.data[-2].fill_(9.0),
    ".data, a norm weight's element": lambda m: m.norm.weight.data[3].fill_(9.0),
    "NumPy": lambda m: m.token.weight.detach().numpy().__imul__(2),
    "inference mode": lambda m: in_inference_mode(m),
}


def optimise(module):
    with torch.enable_grad(), pyembed.plan("one_pass"):
        module(torch.tensor([[1, 3]])).query.square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()


def in_inference_mode(module):
    with torch.inference_mode():
        module.qkv.weight.mul_(2)


@pytest.mark.parametrize("by", ["plan", "auto"])
@pytest.mark.parametrize("edit", EDITS)
def test_never_stale(edit, by):
    case = Case(torch.float32, "cpu", V=11)
    module = module_of(case)
    with torch.no_grad():
        before = looked_up(module, case)
        built = module._table
        with pyembed.plan("table" if by == "plan" else "auto"):
            assert module(case.ids) is not None and module._table is built  # no change, no work
            EDITS[edit](module)
            after = module(case.ids)
        assert module._table is not None and module._table is not built
        expected = reference_of(module, case)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for found, exact in zip(after, expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_nan_weights_do_not_rebuild():
    case = Case(torch.float32, "cpu")
    module = module_of(case)
    with torch.no_grad():
        module.qkv.weight.fill_(float("nan"))
    looked_up(module, case)
    built = module._table
    looked_up(module, case)
    assert module._table is built


def test_never_under_autograd():
    case = Case(torch.float32, "cpu")
    module = module_of(case)
    with pyembed.plan("table"), pytest.raises(RuntimeError, match="plan: 'table' cannot run here: gradients are wanted"):
        module(case.ids)
    module.build_table()
    assert module(case.ids).query.requires_grad  # "auto"
    module.requires_grad_(False)
    with pyembed.plan("table"):
        assert not module(case.ids).query.requires_grad


def test_dropout_and_other_machinery_refuse():
    case = Case(torch.float32, "cpu")
    module = module_of(case)
    module.dropout = nn.Dropout(0.5)
    module.train()
    with torch.no_grad(), pyembed.plan("table"):
        with pytest.raises(RuntimeError, match=r"dropout .* call eval\(\)"):
            module(case.ids)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="cannot run here"):
            module.eval()(case.ids)
    with pyembed.plan("table"), pytest.raises(RuntimeError, match="plan: 'table' needs a module"):
        F.embed_qkv(case.ids, module.token.weight, module.qkv.weight, num_heads=3)


def test_auto_builds_none(monkeypatch):
    module = module_of(case := Case(torch.float32, "cpu"))
    with torch.no_grad():
        module(case.ids)
        assert module._table is None
        module.build_table()
        monkeypatch.setattr(reference, "embed_qkv", None)
        module(case.ids)
        module.drop_table()
        assert module._table is None and not module._keeps_table


def test_bytes_are_reported_first(caplog, monkeypatch):
    module = module_of(Case(torch.float32, "cpu", V=11, T=19, D=40, heads=3, head_dim=7))
    assert module.table_nbytes() == (11 + 24) * 63 * 4
    monkeypatch.setattr(table.Table, "_build", lambda *a: pytest.fail("built") if "8,820" not in caplog.text else None)
    monkeypatch.setattr(table.Table, "error", 0.0, raising=False)
    with caplog.at_level("INFO", "pyembed.modules.keeps_table"):
        module.build_table()


def test_a_table_that_would_not_fit_raises(monkeypatch):
    module = module_of(case := Case(torch.float32, "cpu"))
    monkeypatch.setattr(table, "available", lambda device: 100)
    monkeypatch.setattr(table.Table, "_build", lambda *a: pytest.fail("allocated"))
    with pytest.raises(torch.OutOfMemoryError, match=r"table: expected at most the 100 bytes that cpu has left, got [\d,]+"):
        looked_up(module, case)
    assert table.available(torch.device("cpu")) == 100


@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory", "CUDA out of memory"])
def test_out_of_memory_falls_back_and_says_so_once(monkeypatch, message):
    module = module_of(case := Case(torch.float32, "cpu"))
    attempts = []

    def fail(self, *args):
        attempts.append(1)
        raise (torch.OutOfMemoryError if "CUDA" in message else RuntimeError)(message)

    monkeypatch.setattr(table.Table, "_build", fail)
    with pytest.warns(UserWarning, match="table of .* bytes could not be made") as said:
        first = looked_up(module, case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = looked_up(module, case)
    assert len(said) == len(attempts) == 1
    assert torch.equal(first.query, second.query) and torch.equal(first.query, reference_of(module, case).query)
    monkeypatch.undo()
    module.build_table()
    assert module._table is not None


def test_auto_does_not_raise_when_a_new_table_does_not_fit(monkeypatch):
    module = module_of(case := Case(torch.float32, "cpu"))
    module.build_table()
    monkeypatch.setattr(table, "available", lambda device: 100)
    with torch.no_grad():
        module.qkv.weight.mul_(2)
        with pytest.warns(UserWarning, match="could not be made .*expected at most the 100 bytes"):
            found = module(case.ids)
    assert torch.equal(found.query, reference_of(module, case).query)


def test_bad_arguments():
    module = module_of(case := Case(torch.float32, "cpu", V=31))
    for dtype in (torch.float64, torch.int8, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=r"dtype: expected torch\.float16, torch\.bfloat16 or None"):
            module.build_table(dtype)
    module.build_table()
    with torch.no_grad():
        bad = case.ids.clone()
        bad[1, 2] = 31
        with pytest.raises(IndexError, match=r"ids: expected values in \[0, 31\).* got 31 at \(1, 2\)"):
            module(bad)
        with pytest.raises(IndexError, match=r"position_ids: expected values in \[0, 24\)"):
            module(case.ids, torch.full((19,), 24))
        with pytest.raises(TypeError, match="ids: expected dtype"):
            module(case.ids.float())
        with pytest.raises(IndexError, match="sequence length 25"):
            module(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="dtype: expected one that holds entries"):
        with torch.no_grad():
            module.position = None
            module.norm = None
            module.token.weight.fill_(1e9)
        module.build_table(torch.float16)


def test_computed_weights_are_refused():
    module = module_of(case := Case(torch.float32, "cpu"))
    nn.utils.parametrizations.weight_norm(module.qkv)
    with pytest.raises(RuntimeError, match="table: expected plain parameters, got a computed weight of ParametrizedLinear"):
        looked_up(module, case)
    with torch.inference_mode():
        made_there = pyembed.EmbeddingQKV(11, 8, 2)
    with pytest.raises(RuntimeError, match="tensors made in inference mode"):
        made_there.build_table()


def test_copies_make_their_own():
    module = module_of(case := Case(torch.float32, "cpu"))
    expected = looked_up(module, case)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other._table is None
        assert all(torch.equal(a, b) for a, b in zip(looked_up(other, case), expected, strict=True))
    assert set(module.state_dict()) == {"token.weight", "position.weight", "norm.weight", "norm.bias", "qkv.weight", "qkv.bias"}


def test_three_projections_and_conv1d():
    """A (query, key, value) tuple and a transposed weight: the table is held against what the user can change."""
    case = Case(torch.float32, "cpu")
    module = module_of(case)
    linears = [nn.Linear(40, 21) for _ in range(3)]

    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(40, 63)), nn.Parameter(torch.randn(63))

        def forward(self, x):
            return x @ self.weight + self.bias

    for qkv, weight in ((tuple(linears), linears[1].weight), (conv := Conv1D(), conv.weight)):
        front = pyembed.EmbeddingQKV.from_modules(module.token, module.position, module.norm, qkv=qkv, num_heads=3)
        with torch.no_grad():
            for edit in (lambda: None, lambda w=weight: w.mul_(2), lambda w=weight: w.data.mul_(2)):
                edit()
                for found, exact in zip(looked_up(front, case), reference_of(front, case), strict=True):
                    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
            built = front._table
            looked_up(front, case)
            assert front._table is built


def test_explain():
    module = module_of(case := Case(torch.float32, "cpu"))
    with torch.no_grad():
        assert module.explain(case.ids).name == "one_pass" and "table" not in module.explain(case.ids).seconds
        with pyembed.plan("table"):
            assert "would be built first" in module.explain(case.ids).reason
        module.build_table()
        plan = module.explain(case.ids)
    assert plan.name == "table" and "is there" in plan.reason and plan.seconds.keys() == {"one_pass", "distinct", "table"}
    assert module.explain(case.ids).name == "one_pass"  # gradients are wanted
    with pyembed.plan("table"), pytest.raises(RuntimeError, match="gradients are wanted and a table has none"):
        module.explain(case.ids)
    assert Plan("a", "b", {"c": 2e-3}).__str__() == "a: b (predicted: c 2 ms)"


def test_threads_share_one_table(monkeypatch):
    """While a weight changes, no call fails or reads a table that is half made, and no two threads make one at a time."""
    module = module_of(case := Case(torch.float32, "cpu", B=1))
    module.build_table()
    failures, making = [], []

    class Slow(table.Table):
        def _build(self, *arguments):
            making.append(self)
            assert len(making) == 1
            time.sleep(0.002)
            super()._build(*arguments)
            making.clear()

    monkeypatch.setattr(keeps_table, "Table", Slow)

    def call():
        try:
            with torch.no_grad():
                for _ in range(40):
                    module(case.ids)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        with torch.no_grad():
            module.qkv.weight.add_(0.0)
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("break_it", ["out of range", "computed"])
def test_auto_serves_where_no_table_can_be_made_anew(break_it):
    module = module_of(case := Case(torch.float32, "cpu", position=None))
    with torch.no_grad():
        module.build_table(torch.float16)
        if break_it == "computed":
            torch.nn.utils.parametrize.register_parametrization(module.qkv, "weight", torch.nn.Identity())
        else:
            module.qkv.weight.mul_(1e6)
        with pytest.warns(UserWarning, match="a table of .* bytes could not be made"):
            first = module(case.ids)
        again = module(case.ids)  # and says so once
        assert module.explain(case.ids).name == "one_pass"
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_distinct_ids_are_checked():
    module = module_of(case := Case(torch.float32, "cpu"))
    module.build_table()
    rows, inverse = case.ids.unique(return_inverse=True)
    with torch.no_grad():
        module(case.ids, distinct=pyembed.DistinctIds(rows, inverse))
        with pytest.raises(ValueError, match="distinct: expected the ids of this batch"):
            module(case.ids, distinct=pyembed.DistinctIds(rows, inverse.flip(1)))


def test_another_default_device():
    module = module_of(case := Case(torch.float32, "cpu", B=4, T=40))
    module.build_table()
    with torch.no_grad(), torch.device("meta"):
        assert module(case.ids).query.device.type == "cpu"
