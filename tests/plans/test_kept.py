"""The folded weight that a front end keeps: the bits of a fresh fold, never of weights that have changed."""

import copy
import gc
import pickle
import threading
import weakref
from types import SimpleNamespace

import compiled
import pytest
import torch
from numerics import Case
from test_table import module_of
from torch import nn

import pyembed
from pyembed import kept
from pyembed.call import Projection
from pyembed.modules import keeps_table, parts
from pyembed.plans import operators

IDS = torch.tensor([[1, 3, 5, 0, 3]])
pytestmark = pytest.mark.usefixtures("triton")


@pytest.fixture(autouse=True)
def folds(monkeypatch):
    """A 1 per launch of fold_kernel, for any number of tokens; by small tiles, which the interpreter has done sooner."""
    monkeypatch.setattr(parts, "PACK_TOKENS", 0)
    tuning, _ = operators.launcher("tuning", IDS)
    monkeypatch.setattr(tuning, "way", lambda *_: "folded")
    monkeypatch.setattr(tuning, "embed_qkv_folded", lambda *_: tuning.Tiles(16, 64, 16, 4, 2))
    monkeypatch.setattr(tuning, "fold", lambda weight: {"BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4})
    launcher, _ = operators.launcher("embed_qkv", IDS)
    launcher.configure.cache_clear()
    fold_kernel = operators.launcher("embed_qkv_folded", IDS)[0].fold_kernel
    calls, run = [], fold_kernel.run
    monkeypatch.setattr(fold_kernel, "run", lambda *a, **k: (calls.append(1), run(*a, **k)))
    yield calls
    launcher.configure.cache_clear()


@pytest.fixture
def operands(monkeypatch):
    """A function: a call -> the folded weight, shift and residual that its product is given, which is not computed."""
    launcher, _ = operators.launcher("embed_qkv", IDS)
    found = []
    monkeypatch.setattr(launcher.embed_qkv_folded_kernel, "run", lambda *a, **k: found.append([a[3].base, *a[4:6]]))

    def of(call, module):
        call(module)
        used = found[-1]
        found.clear()
        return [each for each in used if each is not None]

    return of


@pytest.fixture
def unsampled(monkeypatch):
    """As on a GPU: no element is compared."""
    monkeypatch.setattr(kept, "_spread", lambda tensor: torch.empty(0))


def front(**variant):
    module = module_of(Case(torch.float32, "cpu", V=7, D=16, T=5, heads=1, head_dim=16, **variant))
    module.keep_folded()
    return module


def called(module, *args, **options):
    with torch.no_grad(), pyembed.plan("one_pass"):
        return module(IDS, *args, **options)


def folded_anew(module, *args, **options):
    """The same call by a module that keeps nothing."""
    other = copy.copy(module)
    other.keep_folded(False)
    return called(other, *args, **options)


def same(first, second):
    return all(map(torch.equal, first, second))


def in_inference_mode(module):
    with torch.inference_mode():
        module.qkv.weight.mul_(2)


def step(kind, **options):
    def edit(module):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        kind(module.parameters(), lr=0.5, **options).step()

    return edit


def under_no_grad(edit):
    def edited(module):
        with torch.no_grad():
            edit(module)

    return edited


COUNTED = {
    "in place": lambda m: nn.init.normal_(m.qkv.weight),
    "copy_": under_no_grad(lambda m: m.qkv.bias.copy_(m.qkv.bias + 1)),
    "norm in place": under_no_grad(lambda m: m.norm.weight.mul_(3.0)),
    "norm's bias in place": under_no_grad(lambda m: m.norm.bias.mul_(3.0)),
    "inference mode": in_inference_mode,
    "SGD": step(torch.optim.SGD),
    "SGD, fused": step(torch.optim.SGD, fused=True),
    "AdamW, foreach": step(torch.optim.AdamW, foreach=True),
    "AdamW, fused": step(torch.optim.AdamW, fused=True),
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "load_state_dict, assign": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
    "replaced parameter": lambda m: setattr(m.qkv, "weight", nn.Parameter(m.qkv.weight * 2)),
    "replaced module": lambda m: setattr(m, "norm", nn.RMSNorm(16, eps=1e-5)),
    ".double()": lambda m: m.double(),
    ".data assigned": lambda m: setattr(m.qkv.weight, "data", m.qkv.weight * 2),
}
UNCOUNTED = {
    ".data": lambda m: m.qkv.weight.data.mul_(2),
    ".data, a bias element": lambda m: m.qkv.bias.data[5].fill_(9.0),
    ".data, a norm weight's element": lambda m: m.norm.weight.data[3].fill_(9.0),
    "NumPy": lambda m: m.qkv.weight.detach().numpy().__imul__(2),
}


def assert_seen(edit, folds, operands):
    module = front()
    first = operands(called, module)
    assert all(again is made for again, made in zip(operands(called, module), first, strict=True)) and len(folds) == 1
    first = [made.clone() for made in first]
    edit(module)
    after = operands(called, module)
    assert len(folds) == 2
    assert same(after, operands(folded_anew, module)) and not same(after, first)


@pytest.mark.parametrize("edit", COUNTED)
def test_never_stale_by_what_is_counted(edit, folds, operands, unsampled):
    assert_seen(COUNTED[edit], folds, operands)


@pytest.mark.parametrize("edit", UNCOUNTED)
def test_never_stale_where_a_cpu_can_look(edit, folds, operands):
    assert_seen(UNCOUNTED[edit], folds, operands)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_same_bits(norm, folds):
    module = front(norm=norm)
    first, second = called(module), called(module)
    assert len(folds) == 1 and same(first, second) and same(first, folded_anew(module)) and len(folds) == 2


def test_memory_at_the_same_address(folds, operands, unsampled):
    """Another storage, as an allocator gives it that had this memory back."""
    module, memory = front(), torch.randn(48, 16).numpy()
    module.qkv.weight.data = torch.from_numpy(memory)
    operands(called, module)
    memory *= 2
    module.qkv.weight.data = torch.from_numpy(memory)
    gc.collect()  # the interpreter's own references
    assert same(operands(called, module), operands(folded_anew, module)) and len(folds) == 3


def test_a_replica_keeps_nothing(operands):
    """DataParallel's, which share the module's attributes, on other devices."""
    module = front()
    operands(called, module)
    module.build_table()
    replica = module._replicate_for_data_parallel()
    assert replica._kept is None and not replica._keeps_folded and replica._table is None
    assert module._kept is not None and module._table is not None


def test_what_does_not_matter_folds_no_more(folds, unsampled):
    """Other ids, the token table, another model's optimizer; NaN, which is not equal to itself."""
    module = front()
    with torch.no_grad():
        module.qkv.weight[3, 3] = float("nan")
    called(module)
    with torch.no_grad():
        module.token.weight.mul_(2)
    step(torch.optim.AdamW, fused=True)(nn.Linear(2, 2))
    assert torch.equal(called(module).hidden, folded_anew(module).hidden) and len(folds) == 2


def test_parameters_of_one_call(folds, operands):
    """torch.func.functional_call, and the module's own afterwards."""
    module = front()
    own = operands(called, module)
    others = {name: parameter * 2 for name, parameter in module.named_parameters()}
    with torch.no_grad(), pyembed.plan("one_pass"):
        found = operands(lambda module: torch.func.functional_call(module, others, (IDS,)), module)
    assert same(operands(called, module), own) and len(folds) == 3
    module.load_state_dict(others)
    assert same(operands(folded_anew, module), found)


def test_a_change_while_it_folds(folds, operands, monkeypatch):
    """The weights are looked at before they are read: what was read before a change is not taken for what came after it."""
    module, cat = front(), Projection.cat
    parts = [nn.Linear(16, 16) for _ in range(3)]
    module = pyembed.EmbeddingQKV.from_modules(module.token, None, module.norm, qkv=tuple(parts), num_heads=1)
    module.keep_folded()

    def changed_meanwhile(projection):
        found = cat(projection)
        with torch.no_grad():
            parts[0].weight.mul_(2)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Projection, "cat", changed_meanwhile)
        called(module)
    assert same(operands(called, module), operands(folded_anew, module))


def conv1d(module):
    transformers = pytest.importorskip("transformers")
    linear = transformers.pytorch_utils.Conv1D(48, 16)
    nn.init.normal_(linear.weight)
    return linear, {}


def per_head(module):
    return nn.Linear(16, 48), {"per_head": True}


def three(module):
    return tuple(nn.Linear(16, 16, bias=place != 1) for place in range(3)), {}


@pytest.mark.parametrize("make", [conv1d, per_head, three])
def test_other_projections(make, folds, operands, monkeypatch):
    """Weights that are views, rearranged, or put together at each call: these are put together once."""
    base, cats, cat = front(), [], Projection.cat
    monkeypatch.setattr(Projection, "cat", lambda projection: (cats.append(1), cat(projection))[1])
    qkv, options = make(base)
    module = pyembed.EmbeddingQKV.from_modules(base.token, base.position, base.norm, qkv=qkv, num_heads=1, **options)
    module.keep_folded()
    first = operands(called, module)
    assert same(operands(called, module), first) and len(folds) == 1 and len(cats) == (make is three)
    assert same(operands(folded_anew, module), first)
    weight = (qkv[1] if isinstance(qkv, tuple) else qkv).weight
    with torch.no_grad():
        weight.mul_(2)
    after = operands(called, module)
    assert same(after, operands(folded_anew, module)) and not same(after, first)


def test_pairs_lie_side_by_side_in_it(folds):
    """It is another one where rotary turns move the rows of pairs."""
    module, turns = front(), (torch.randn(5, 8).cos(), torch.randn(5, 8).sin())
    turns = tuple(torch.cat([x, x], -1) for x in turns)
    for rotary in (None, turns, None):
        assert same(called(module, rotary=rotary), folded_anew(module, rotary=rotary))
    called(module)
    assert len(folds) == 6


def test_biases_of_one_call_are_kept_out(folds):
    module = front()
    plain = called(module)
    for _ in range(2):
        biases = torch.randn(1, 16), torch.randn(1, 16)
        assert same(called(module, query_biases=biases), folded_anew(module, query_biases=biases))
    assert same(called(module), plain) and len(folds) == 5


def test_nothing_is_kept_where_gradients_are_wanted(folds):
    module = front(bias=False)
    with pyembed.plan("one_pass"):
        for _ in range(2):
            assert module(IDS).query.requires_grad
        assert len(folds) == 2 and module._kept is None
        module.requires_grad_(False)
        module.token.weight.requires_grad_()
        module(IDS).query.sum().backward()
        assert len(folds) == 3 and module._kept is None and module.token.weight.grad.abs().sum() > 0
        module.requires_grad_(False)
        assert same(module(IDS), module(IDS)) and len(folds) == 4


def test_it_outlives_inference_mode(folds):
    module = front()
    with torch.inference_mode(), pyembed.plan("one_pass"):
        first = module(IDS)
    assert same(called(module), first) and len(folds) == 1


def test_autocast(folds):
    """Products of another dtype have no folded weight, and take none."""
    module = front()
    called(module)
    with torch.autocast("cpu", torch.float16):
        assert same(called(module), folded_anew(module))
        assert called(module).query.dtype == torch.float16
    assert len(folds) == 1


def test_its_memory_is_given_back(operands):
    """Told so, or moved; a copy has none, and makes its own."""
    module = front()
    for drop in (lambda: module.keep_folded(False), lambda: module.cpu()):
        module.keep_folded()
        operands(called, module)
        values = [weakref.ref(value) for value in module._kept._values["folded"][1]]
        drop()
        gc.collect()
        assert all(value() is None for value in values)
    expected = operands(called, module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other._kept is None and other._keeps_folded
        found = operands(called, other)
        assert same(found, expected) and found[0] is not expected[0]


def test_what_cannot_be_kept_is_refused():
    module = front()
    nn.utils.parametrizations.weight_norm(module.qkv)
    with pytest.raises(RuntimeError, match="keep_folded: expected plain parameters, got a computed weight of"):
        module.keep_folded()
    with torch.inference_mode():
        made_there = pyembed.EmbeddingQKV(11, 8, 2)
    with pytest.raises(RuntimeError, match="keep_folded: expected weights that count their changes"):
        made_there.keep_folded()


def test_weights_that_count_no_changes_are_folded_at_each_call(folds, operands):
    module = front()
    with torch.inference_mode():
        module.qkv.weight = nn.Parameter(module.qkv.weight.clone(), requires_grad=False)
    for scale in (1, 2):
        with torch.inference_mode():
            module.qkv.weight.mul_(scale)
            assert same(operands(called, module), operands(folded_anew, module))
    assert len(folds) == 4 and module._kept is None


def test_few_tokens_pay_for_no_look_at_the_weights(operands, monkeypatch):
    module = front()
    monkeypatch.setattr(parts, "PACK_TOKENS", 6)
    operands(called, module)
    assert module._kept is None


def test_a_captured_graph_folds_in_each_replay(folds, operands, monkeypatch):
    module = front()
    called(module)
    monkeypatch.setattr(keeps_table, "is_captured", lambda tensor: True)
    called(module)
    assert len(folds) == 2


def test_a_stream_takes_what_was_made_on_it(monkeypatch):
    """What another stream makes may not be finished."""
    linear, stream = nn.Linear(2, 2), SimpleNamespace(cuda_stream=7)
    values = kept.Kept(kept.Sources("test", [(linear._parameters, "weight", linear.weight)]))
    values._device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    made = values.get("folded", None, object)
    assert values.get("folded", None, object) is made
    stream.cuda_stream = 8
    assert values.get("folded", None, object) is not made


def test_threads(folds):
    """Of several that come at once each has a result of the weights as they are."""
    module, found = front(), []
    expected = folded_anew(module)

    def call():
        with torch.no_grad():
            found.append(module(IDS))

    threads = [threading.Thread(target=call) for _ in range(4)]
    with pyembed.plan("one_pass"):  # once: the setting is the process's
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4 and all(same(each, expected) for each in found)


def test_a_compilers_graph_follows_the_weights(folds):
    """It folds at each call, whatever was kept before."""
    module = front()
    expected = called(module)
    traced = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert same(called(traced), expected) and len(folds) == 2
    module.qkv.weight.data.mul_(2)
    found = called(traced)
    assert same(found, folded_anew(module)) and not same(found, expected)


def test_a_compiled_optimizer():
    """Its fused step changes weights and no version."""
    linear = nn.Linear(2, 2)
    linear(torch.ones(1, 2)).sum().backward()
    sources = kept.Sources("test", [(linear._parameters, name, value) for name, value in linear._parameters.items()])
    sources._samples.clear()
    optimizer = torch.optim.AdamW(linear.parameters(), fused=True)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        sources._stepped = False
        assert sources.are_unchanged()
        step()
        assert not sources.are_unchanged()


@pytest.mark.full
def test_launches_are_not_repeated_over_it(monkeypatch):
    """A call that is one launch is repeated with other inputs: not this one, which has inputs that no call shows."""
    monkeypatch.setattr(compiled.tuning, "way", lambda *_: "folded")
    module = front()
    with compiled.compiled():
        for _ in range(2):
            for _ in range(3):
                assert same(called(module), folded_anew(module))
            nn.init.normal_(module.qkv.weight)


@pytest.mark.gpu
def test_replays_follow_the_weights():
    module = pyembed.EmbeddingQKV(1000, 256, 4, position=None, device="cuda", dtype=torch.bfloat16)
    module.keep_folded()
    ids = torch.randint(1000, (8, 1024), device="cuda")
    with torch.no_grad(), pyembed.plan("one_pass"):
        first = [module(ids) for _ in range(3)][-1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = module(ids)
        module.qkv.weight.mul_(2)
        graph.replay()
        torch.cuda.synchronize()
        assert same(found, module(ids)) and not same(found, first)
