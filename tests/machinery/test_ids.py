"""Ids, positions and segments outside of their tables: what each policy makes of them, at once on a CPU and late on a GPU."""

import copy
import pickle

import pytest
import torch
from conftest import DEVICE, full
from numerics import Case

import pyembed
from pyembed import checks, reference, run, settings
from pyembed import functional as F
from pyembed import ids as outside
from pyembed.call import LOOKUPS
from pyembed.plans import operators

BAD = [-1, 31, 2**31, 2**40, -(2**63), 2**63 - 1]
ROUTES = [("torch", "auto"), ("triton", "one_pass"), ("triton", "distinct"), ("torch", "distinct")]


@pytest.fixture(params=ROUTES, ids="-".join)
def route(request):
    backend, plan = request.param
    if DEVICE == "cuda" and backend == "torch":
        pytest.skip("PyTorch's operators assert on a GPU")
    with pyembed.backend(backend), pyembed.plan(plan):
        yield plan


@pytest.fixture
def unseen(monkeypatch):
    """No check looks at ids before the kernels do, as on a GPU and within a compiled graph."""
    for module in (checks, F, run):
        monkeypatch.setattr(module, "can_read", lambda tensor: False)
    monkeypatch.setattr(run, "_kinds", {})  # those of other tests look
    with pyembed.backend("triton"):
        yield
    outside.forget(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"))  # what the test left unread


def raises_once(call, match):
    """An error that names the id: at once on a CPU, on a GPU at the next look; and nothing after it."""
    with pytest.raises(IndexError, match=match):
        call()
        pyembed.check_ids()
    pyembed.check_ids()


def table(rows=31, width=6):
    return torch.randn(rows, width, device=DEVICE)


@pytest.mark.parametrize("bad", BAD)
def test_kernels_report_an_id(bad, unseen):
    """Its value, of 64 bits, its place and its table's size."""
    ids = torch.randint(31, (3, 70), device=DEVICE)
    ids[1, 65] = bad
    match = (
        rf"ids: expected values in \[0, 31\), the rows of the token table; got {bad} for token 65 of sequence 1, "
        f"in a call on {DEVICE}"
    )
    raises_once(lambda: F.embedding(ids, table()), match)
    F.embedding(ids.clamp(0, 30), table())


@pytest.mark.parametrize("plan", ["one_pass", "distinct"])
@pytest.mark.parametrize("name, of", [(lookup.ids_name, lookup.table_name) for lookup in LOOKUPS])
def test_kernels_report_every_table(name, of, plan, unseen):
    case = Case(torch.float32, DEVICE, heads=2, head_dim=8)
    rotary = pyembed.Rotary(8, 20, device=DEVICE)
    good = {name: torch.randint(2, (2, 19), device=DEVICE) for name in ("position_ids", "segment_ids")}
    more = {"ids": {}, "segment_ids": {"segment": table(2, 40)}, "position_ids": {}}[name]
    if name == "segment_ids" and plan == "distinct":
        pytest.skip("segments are for one_pass alone")
    call = {"position_ids": good["position_ids"], **more}
    call |= {"segment_ids": good["segment_ids"]} if more else {}
    call |= {"rotary": rotary} if of == "rotary" else {}
    ids = case.ids.clone()
    place = 22 if of == "rotary" else 24  # the table of positions has 24 rows, that of turns 20
    broken = {"ids": ids, **call}[name]
    broken[1, 4] = {"ids": -3, "segment_ids": 2, "position_ids": place}[name]
    with pyembed.plan(plan):
        match = (
            rf"{name}: expected values in \[0, \d+\), the rows of the {of} table; got {broken[1, 4]} for token 4 of sequence"
        )
        raises_once(lambda: F.embed_qkv(ids, **case.parameters, **case.options, **call), match)


def test_size_of_the_table_is_told(unseen):
    ids = torch.tensor([5], device=DEVICE)
    raises_once(lambda: F.embedding(ids, table(5)), r"in \[0, 5\)")
    raises_once(lambda: F.embedding(ids[0], table(1)), r"in \[0, 1\).* got 5 for token 0 of sequence 0")


def test_results_of_a_bad_id_are_nan_and_no_others(unseen):
    """Under trust too, where nothing is said of it."""
    case = Case(torch.float32, DEVICE)
    case.ids[1, 5] = 31
    with pyembed.id_policy("trust"):
        out = F.embed_qkv(case.ids, **case.parameters, **case.options)
        pyembed.check_ids()
    for output in out:
        assert output[1, 5].isnan().all() and output.isnan().sum() == output[1, 5].numel()


def test_a_compiled_graph_raises(unseen):
    """Nothing can look at ids while it is traced: its operators do when they run."""
    torch._dynamo.reset()
    step = torch.compile(lambda ids, weight: F.embedding(ids, weight) * 2, fullgraph=True, backend="aot_eager")
    weight = table()
    step(torch.tensor([3, 30], device=DEVICE), weight)
    raises_once(lambda: step(torch.tensor([3, 31], device=DEVICE), weight), "got 31 for token 1 of sequence 0")
    step(torch.tensor([3, 30], device=DEVICE), weight)


def test_a_backward_raises_what_its_forward_met(unseen):
    """The host reads the flag with every operator of ours, backwards too; here another call's kernel raised it."""
    weight = table().requires_grad_()
    out = F.embedding(torch.tensor([1], device=DEVICE), weight)
    words = outside.report_of(weight.device, True)
    words.copy_(torch.tensor([1, 1, 9, 4, 8, 3]))
    with pytest.raises(IndexError, match=r"position_ids.*\[0, 8\).*got 9 for token 1 of sequence 1"):
        out.sum().backward()
    assert not words.any()


def test_the_first_of_several_launches_stays(unseen, monkeypatch):
    """The host may look long after: what came later changes nothing, and the next error begins anew."""
    with monkeypatch.context() as patch:
        for module in (operators, run):
            patch.setattr(module, "look", lambda device: None)
        F.embedding(torch.tensor([2**29], device=DEVICE), table(5))
        F.embedding(torch.tensor([-1], device=DEVICE), table(70))
    raises_once(lambda: pyembed.check_ids(), r"in \[0, 5\).* got 536870912 for token 0 of sequence 0")
    raises_once(lambda: F.embedding(torch.tensor([-1], device=DEVICE), table(70)), r"in \[0, 70\).* got -1 for")


def test_another_error_leaves_no_report(unseen, monkeypatch):
    """It is not blamed on the next call."""
    kernels, _ = operators.launcher("embed", table())
    launch = kernels.embed

    def failing(*args):
        launch(*args)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "embed", failing)
        with pytest.raises(MemoryError):
            F.embedding(torch.tensor([31]), table().cpu())
    F.embedding(torch.tensor([30]), table().cpu())


def clamp_case(case):
    """The case with ids and positions within their tables."""
    fine = copy.copy(case)
    fine.ids = case.ids.clamp(0, 30)
    if case.position_ids is not None:
        fine.position_ids = case.position_ids.clamp(0, 23)
    return fine


def broken_case(**options):
    case = Case(torch.float32, DEVICE, heads=2, head_dim=8, **options)
    case.ids[0, 0], case.ids[1, 3], case.ids[1, 18] = -4, 31, 2**40
    if case.position_ids is not None:
        case.position_ids.view(-1)[[2, 7]] = torch.tensor([-1, 24], device=DEVICE)
    return case


@pytest.mark.sample
@pytest.mark.parametrize("position_ids", ["BT", "T", None])
def test_clamp(route, position_ids):
    """Results and gradients are those of the nearest rows, to the last bit."""
    case = broken_case(position_ids=position_ids)
    expected = clamp_case(case).run(F.embed_qkv)
    with pyembed.id_policy("clamp"):
        found = case.run(F.embed_qkv)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("position_ids", [None, "T", "BT"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_zero(backend, position_ids):
    """As if each table had one row more, of zeros, that learns nothing."""
    case = broken_case(position_ids=position_ids)
    wide = copy.copy(case)
    wide.parameters = dict(case.parameters)
    for name, ids in (("token", "ids"), ("position", "position_ids")):
        rows = case.parameters[name]
        wide.parameters[name] = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        given = getattr(case, ids)
        if given is not None:
            setattr(wide, ids, given.where((given >= 0) & (given < len(rows)), len(rows)))
    expected = wide.run(reference.embed_qkv)
    with pyembed.backend(backend), pyembed.id_policy("zero"):
        found = case.run(F.embed_qkv)
    for name in expected:
        want = expected[name][:-1] if name in ("grad of token", "grad of position") else expected[name]
        torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-5)


def test_zero_turns_nothing():
    """A head whose rotary position has no row stays as it is."""
    case = Case(torch.float32, DEVICE, heads=2, head_dim=8, position=None, position_ids="BT")
    call = {**case.parameters, **case.options, "position_ids": case.position_ids, "id_policy": "zero"}
    case.position_ids[1, 2] = 99
    turned = F.embed_qkv(case.ids, **call, rotary=pyembed.Rotary(8, 24, device=DEVICE))
    del call["position_ids"]
    plain = F.embed_qkv(case.ids, **call)
    torch.testing.assert_close(turned.query[1, 2], plain.query[1, 2])
    assert not torch.allclose(turned.query[1, 3], plain.query[1, 3])


@pytest.mark.parametrize("policy", ["clamp", "zero"])
def test_sequences_longer_than_the_table_of_positions(policy):
    """The same for positions that nobody gave."""
    ids, token, position = torch.randint(5, (2, 7), device=DEVICE), table(5), table(4)
    places = torch.arange(7, device=DEVICE)
    found = F.embed(ids, token, position, id_policy=policy)
    rows = position[places.clamp(max=3)] * (1.0 if policy == "clamp" else (places < 4)[:, None])
    assert torch.equal(found, token[ids] + rows)
    with pytest.raises(IndexError, match="sequence length 7 needs positions up to 6, position has 4 rows"):
        F.embed(ids, token, position)


def modules():
    torch.manual_seed(0)
    linears = [torch.nn.Linear(16, 16) for _ in range(3)]
    token, position = torch.nn.Embedding(31, 16), torch.nn.Embedding(12, 16)
    hooked = torch.nn.Embedding(31, 16)
    hooked.register_forward_hook(lambda *a: None)
    yield "front end", pyembed.EmbeddingQKV(31, 16, 2, max_length=12, num_segments=2)
    yield "rotary", pyembed.EmbeddingQKV(31, 16, 2, position="rotary", max_length=12)
    packed = torch.nn.Linear(16, 48)
    yield "called as they are", pyembed.EmbeddingQKV.from_modules(hooked, position, qkv=packed, num_heads=2)
    yield "three projections", pyembed.EmbeddingQKV.from_modules(token, position, qkv=linears, num_heads=2)
    yield "concat", pyembed.EmbeddingQKV(31, 16, 2, max_length=12, combine="concat")
    yield "sum", pyembed.TokenPositionEmbedding(31, 16, 12, num_segments=2)
    yield "beside", pyembed.TokenPositionEmbedding(31, 16, 12, combine="concat")
    yield "sines", pyembed.TokenPositionEmbedding(31, 16, None, "sinusoidal")


@pytest.mark.skipif(DEVICE == "cuda", reason="PyTorch's operators assert on a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name, module", list(modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_modules(name, module, backend):
    """Their own policy goes before that of the context; clamp and zero never raise, and agree with what they say."""
    ids, places = torch.randint(31, (2, 9)), torch.randint(12, (2, 9))
    broken, off = ids.clone(), places.clone()
    broken[0, 1], off[1, 2] = 31, -1 if name == "sines" else 12
    with pyembed.backend(backend), torch.no_grad():
        for bad in ((broken, places), (ids, off)):
            with pytest.raises(IndexError, match=r"expected values in \[0, (31|12|2147483647)\)"):
                module(*bad)
        module.id_policy = "clamp"
        with pyembed.id_policy("raise"):
            found = module(broken, off)
        module.id_policy = None
        expected = module(broken.clamp(0, 30), off.clamp(0, 11 if name != "sines" else None))
        torch.testing.assert_close(found, expected)
        with pyembed.id_policy("zero"):
            zeros = module(broken, off)
        hidden = zeros if isinstance(zeros, torch.Tensor) else zeros.hidden
        alone = module(ids, places)
        alone = alone if isinstance(alone, torch.Tensor) else alone.hidden
        fine = torch.ones(2, 9, dtype=torch.bool)
        fine[0, 1] = fine[1, 2] = False
        torch.testing.assert_close(hidden[fine], alone[fine])
        if name in ("beside", "concat"):
            assert not hidden[0, 1, :16].any() and not hidden[1, 2, 16:].any() and hidden[0, 1, 16:].all()
        elif name != "rotary":
            kind = 0 if getattr(module, "segment", None) is None else module.segment.weight[0]
            torch.testing.assert_close(hidden[1, 2], module.token.weight[ids[1, 2]] + kind)


def test_table_plan():
    module = pyembed.EmbeddingQKV(31, 16, 2, max_length=12).to(DEVICE).eval()
    ids = torch.randint(31, (2, 9), device=DEVICE)
    broken = ids.clone()
    broken[1, 2] = 99
    with torch.no_grad(), pyembed.plan("table"), pyembed.backend("triton"):
        raises_once(lambda: module(broken), "got 99")
        module.id_policy = "clamp"
        torch.testing.assert_close(module(broken), module(broken.clamp(0, 30)))
        module.id_policy = "zero"
        with pytest.raises(RuntimeError, match="'table' cannot run here: id_policy 'zero'"):
            module(broken)


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"sparse": True}, {"dtype": torch.float64}], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_embedding(backend, options):
    torch.manual_seed(0)
    module = pyembed.Embedding(31, 8, **options).to(DEVICE)
    ids = torch.tensor([[3, 31], [-1, 5]], device=DEVICE)
    with pyembed.backend(backend):
        module.id_policy = "clamp"
        assert torch.equal(module(ids), module(torch.tensor([[3, 30], [0, 5]], device=DEVICE)))
        module.id_policy = "zero"
        assert "zero" in module.explain(ids).reason or options
        out = module(ids)
        assert not out[0, 1].any() and not out[1, 0].any() and out[0, 0].all() and out[1, 1].all()
        out.sum().backward()
        grad = module.weight.grad.to_dense()
        assert grad.count_nonzero() == 2 * 8 and grad[3].all() and grad[5].all()


def test_explain_says_what_zero_costs():
    module = pyembed.EmbeddingQKV(31, 16, 2, max_length=12)
    module.id_policy = "zero"
    ids = torch.tensor([[1, 99]])
    assert module.explain(ids) == ("one_pass", "id_policy 'zero' is PyTorch's operators' alone", {})
    module.id_policy = "clamp"
    assert module.explain(ids).name == "one_pass"
    module.id_policy = None
    with pytest.raises(IndexError, match="got 99"):
        module.explain(ids)


def test_settings_are_checked_and_kept():
    with pytest.raises(ValueError, match=r"id_policy: expected one of .*'raise'.* got 'ignore'"):
        pyembed.id_policy("ignore").__enter__()
    module = pyembed.Embedding(3, 2)
    for value in ("ignore", 1, ""):
        with pytest.raises(ValueError, match="id_policy: expected one of"):
            module.id_policy = value
    module.id_policy = "clamp"
    assert copy.deepcopy(module).id_policy == pickle.loads(pickle.dumps(module)).id_policy == "clamp"
    with pyembed.id_policy("zero"):
        with pyembed.id_policy("trust"):
            assert settings.policy_of(None) == "trust"
        assert settings.policy_of(None) == "zero"
    assert settings.policy_of(None) == "raise"


@pytest.mark.skipif(DEVICE == "cuda", reason="PyTorch's operators assert on a GPU")
@pytest.mark.sample
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("policy", [p if p in ("clamp", "zero") else full(p) for p in settings.ID_POLICIES])
@pytest.mark.parametrize("kind", ["segments", "rotary", "hidden"])
def test_compiled_policies(kind, policy, backend):
    """One graph of each, which does as eager does."""
    torch.manual_seed(0)
    ids, places = torch.randint(31, (2, 9)), torch.randint(12, (2, 9))
    if policy in ("clamp", "zero"):
        ids[0, 1], places[1, 2] = 31, -1
    modules = {
        "segments": lambda: pyembed.EmbeddingQKV(31, 16, 2, max_length=12, num_segments=2),
        "rotary": lambda: pyembed.EmbeddingQKV(31, 16, 2, position="rotary", max_length=12),
        "hidden": lambda: pyembed.TokenPositionEmbedding(31, 16, 12),
    }
    torch._dynamo.reset()
    module = modules[kind]()
    module.id_policy = policy
    with pyembed.backend(backend), torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, places), module(ids, places))


def test_clamp_takes_each_tables_nearest_row():
    """A place that one table has and the other has not, both ways round."""
    torch.manual_seed(0)
    for rows, turns in ((24, 20), (20, 24)):
        position, token, weight = table(rows), table(31), table(6, 6)
        rotary = pyembed.Rotary(2, turns, device=DEVICE)
        ids, place = torch.tensor([[3, 4]], device=DEVICE), torch.tensor([[5, 22]], device=DEVICE)
        weight = torch.eye(6, device=DEVICE)
        with pyembed.backend("torch"):
            found = F.embed_qkv(
                ids, token, weight, num_heads=1, position=position, position_ids=place, rotary=rotary, id_policy="clamp"
            )
            hidden = F.embed(ids, token, position, place.clamp(max=rows - 1))
            near = place.clamp(max=turns - 1)
            expected = F.embed_qkv(
                hidden.new_tensor([[0, 1]]).long(), hidden[0], weight, num_heads=1, rotary=rotary, position_ids=near
            )
        torch.testing.assert_close(found.query, expected.query)
        front = pyembed.EmbeddingQKV(31, 6, 3, max_length=rows, rotary=rotary).to(DEVICE)
        front.id_policy = "clamp"
        front.token.register_forward_hook(lambda *a: None)
        by_modules = front(ids, place)
        front.token._forward_hooks.clear()
        torch.testing.assert_close(front(ids, place), by_modules)


@pytest.mark.parametrize("plan", ["one_pass", "distinct"])
def test_clamp_counts_anew_what_a_loader_counted(plan):
    case = Case(torch.float32, DEVICE)
    case.ids[0, 2] = 31
    given = pyembed.DistinctIds(*case.ids.unique(return_inverse=True))
    with pyembed.plan(plan), pyembed.id_policy("clamp"):
        found = F.embed_qkv(case.ids, **case.parameters, **case.options, distinct=given)
        expected = F.embed_qkv(case.ids.clamp(max=30), **case.parameters, **case.options)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("policy", settings.ID_POLICIES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_table_without_rows(backend, policy):
    """Has no nearest one either."""
    empty, ids = table(0), torch.tensor([0], device=DEVICE)
    with pyembed.backend(backend):
        for call in (
            lambda: F.embedding(ids, empty, id_policy=policy),
            lambda: F.embed(ids, empty, id_policy=policy),
            lambda: F.embed(ids, table(3), empty, ids, id_policy=policy),
        ):
            with pytest.raises(
                IndexError, match=r"(token|position): expected a row for each of|ids: expected values in \[0, 0\)"
            ):
                call()


def test_zero_touches_no_other_row():
    """max_norm, scale_grad_by_freq and sparse see the ids that have rows."""
    ids = torch.tensor([0, 9, 9], device=DEVICE)
    counted = pyembed.Embedding(5, 3, scale_grad_by_freq=True).to(DEVICE)
    bounded = pyembed.Embedding(5, 3, max_norm=1.0).to(DEVICE)
    spare = pyembed.Embedding(5, 3, sparse=True).to(DEVICE)
    before = bounded.weight.detach().clone().mul_(10)
    bounded.weight.data.copy_(before)
    with pyembed.id_policy("zero"):
        counted(ids).sum().backward()
        assert torch.equal(counted.weight.grad[0], torch.ones(3, device=DEVICE))
        assert not bounded(ids[1:]).any() and torch.equal(bounded.weight.detach(), before)
        spare(ids[1:]).sum().backward()
        assert spare.weight.grad is None or spare.weight.grad._nnz() == 0


@pytest.mark.parametrize("norm", ["layer", None])
def test_a_bad_id_outside_of_the_loss_spoils_no_gradient(norm, unseen):
    case = Case(torch.float32, DEVICE, norm=norm)
    case.ids[1, 5] = 31
    leaves = {k: None if p is None else p.detach().requires_grad_() for k, p in case.parameters.items()}
    out = F.embed_qkv(case.ids, **leaves, **case.options, id_policy="trust")
    out.query[0].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in leaves.values() if p is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["one_pass", "distinct"])
def test_a_gpu_goes_on_after_a_bad_id(plan):
    """No synchronisation before the error, NaN until then, and the process works afterwards: 50 times."""
    case = Case(torch.bfloat16, DEVICE, B=8, T=256, V=999, D=64, heads=2, head_dim=32)
    fine = F.embed_qkv(case.ids, **case.parameters, **case.options)
    broken = case.ids.clone()
    broken[3, 7] = 999
    with pyembed.plan(plan):
        for _ in range(50):
            torch.cuda.set_sync_debug_mode("error")
            try:
                out = F.embed_qkv(broken, **case.parameters, **case.options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert out.query[3, 7].isnan().all() and out.hidden.isnan().sum() == 64
            with pytest.raises(IndexError, match="got 999 for token 7 of sequence 3"):
                F.embed_qkv(case.ids, **case.parameters, **case.options)
            again = F.embed_qkv(case.ids, **case.parameters, **case.options)
            torch.testing.assert_close(again.query, fine.query)


@pytest.mark.gpu
def test_a_graph_reports_what_it_replays():
    ids, weight = torch.zeros(4, 8, dtype=torch.long, device=DEVICE), table()
    F.embedding(ids, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = F.embedding(ids, weight)
    ids[2, 5] = -5
    graph.replay()
    with pytest.raises(IndexError, match="got -5 for token 5 of sequence 2"):
        pyembed.check_ids()
    ids.fill_(3)
    graph.replay()
    pyembed.check_ids()
    assert torch.equal(out, weight[ids])


def test_a_table_brings_its_own_policy():
    """A pyembed.Embedding within a front end: it is stock to it, and the front end's own policy goes first."""
    token = pyembed.Embedding(31, 16)
    token.id_policy = "clamp"
    front = pyembed.EmbeddingQKV.from_modules(token, qkv=torch.nn.Linear(16, 48), num_heads=2).to(DEVICE)
    sums = pyembed.TokenPositionEmbedding(31, 16, 12).to(DEVICE)
    sums.token.id_policy = "clamp"
    bad, near = torch.tensor([[3, 99]], device=DEVICE), torch.tensor([[3, 30]], device=DEVICE)
    assert "modules" not in front.explain(bad).reason
    assert torch.equal(front(bad).query, front(near).query) and torch.equal(sums(bad), sums(near))
    front.id_policy = sums.id_policy = "zero"
    assert not front(bad).hidden[0, 1].any()
    assert torch.equal(sums(bad)[0, 1], sums.position.weight[1])


NESTED = [torch.tensor([1, 2]), torch.tensor([3])]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: torch.eye(3, dtype=torch.long).to_sparse(),
            r"ids: expected a dense Tensor, .* torch.sparse_coo: take ",
        ),
        (lambda: torch.eye(3, dtype=torch.long).to_sparse_csr(), "ids: expected a dense Tensor, .* torch.sparse_csr"),
        (lambda: torch.nested.nested_tensor(NESTED, layout=torch.jagged), "ids: expected a Tensor that is not nested, .*: pad"),
        (lambda: torch.nested.nested_tensor(NESTED), "ids: expected a Tensor that is not nested, .*: pad"),
    ],
    ids=["coo", "csr", "jagged", "nested"],
)
def test_ids_of_another_layout_are_refused(make, message, backend):
    """By our own words, whatever looks at them first."""
    front, sums = pyembed.EmbeddingQKV(31, 16, 2).to(DEVICE), pyembed.TokenPositionEmbedding(31, 16, 12).to(DEVICE)
    ids = make().to(DEVICE)
    with pyembed.backend(backend):
        for call in (front, sums, lambda ids: F.embed(ids, front.token.weight, front.position.weight)):
            with pytest.raises(TypeError, match=message):
                call(ids)
        with pytest.raises(TypeError, match=f"position_{message}"):
            front(torch.zeros(2, 2, dtype=torch.long, device=DEVICE), ids)
