"""The fused front end within graphs of torch.compile, by the kernels in Triton's interpreter."""

import contextlib
import copy

import pytest
import torch
from conftest import full
from families import FAMILIES, OWN, Own, OwnNorm, Packed, Three, build, logits, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyembed
from pyembed.fuse import traced
from pyembed.fuse.traced import COMPILED, FUSED

IN_A_BUFFER = ("Gemma", "Gemma2", "Gemma3")  # the number that rows are multiplied by
NOT_FUSED = ("Olmo2", "Bloom")
MASKS = ("BERT", "RoBERTa", "ModernBERT", "BART")  # later tokens count too


@pytest.fixture(autouse=True)
def kernels():
    torch._dynamo.reset()
    with pyembed.backend("triton"):
        yield


def own(attention=Packed, dropout=0.1):
    return Own(OwnNorm, attention, dropout, tied=True).eval()


def fuse(model, ids):
    with pyembed.backend("auto"):  # sooner than by the interpreter
        return pyembed.fuse(model, ids, gradients=False)


def close(a, b):
    return a.shape == b.shape and bool(((a - b).abs() <= 1e-4 * b.abs().max() + 1e-6).all())


def nodes(graph):
    return [str(node.target) for node in graph.graph.nodes]


@pytest.mark.full
@pytest.mark.parametrize(
    "name, backend",
    [(name, "eager") for name in (*OWN, *FAMILIES) if name not in NOT_FUSED]
    + [(name, "inductor") for name in ("nanoGPT", "GPT2", "Llama")],
)
def test_families(name, backend):
    """As many graphs as without fusing, for three lengths; one call of the kernels in each."""
    model, ids, graphs = build(name), tokens(), []
    options = {} if name in OWN or name in MASKS[:3] else {"use_cache": False}
    twin = copy.deepcopy(model)
    fused = fuse(model, ids)

    def keep(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    counts = []
    for each in (model, twin):
        torch._dynamo.reset()
        graphs.clear()
        compiled = torch.compile(each, fullgraph=True, backend=keep)
        with torch.no_grad():
            for length in (9, 8, 7) if backend == "eager" else (9,):
                assert close(logits(compiled, ids[:, :length], **options), logits(twin, ids[:, :length], **options))
        counts.append(len(graphs))
        if each is model and name not in IN_A_BUFFER:
            assert all(nodes(graph).count("pyembed.embed_qkv.default") == 1 for graph in graphs)
    reason = "rows of tokens are multiplied by a number in a tensor, of which a graph would not see the changes"
    what = f"{COMPILED}: {reason}" if name in IN_A_BUFFER else FUSED
    assert fused.calls == {what: counts[1]} and len(set(counts)) == 1
    assert f" {what}" in str(fused).replace("not fused: ", "")


def front(m, ids):
    return m.tok(ids) + m.pos(torch.arange(ids.shape[1]))


def rest(m, x):
    return m.blocks[0].attention(m.blocks[0].norm1(x))


def whole(m, ids):
    return m(ids)


def changed(m, ids):
    x = front(m, ids)
    x[0].mul_(2)
    return rest(m, x)


def changed_by_another_name(m, ids):
    x = front(m, ids)
    x.view(-1).mul_(2)
    return rest(m, x)


def changed_by_data(m, ids):
    x = front(m, ids)
    x.data.mul_(2)
    return rest(m, x)


def changed_in_a_list(m, ids):
    x = front(m, ids)
    torch._foreach_mul_([x[0]], 2.0)
    return rest(m, x)


def changed_alone_in_a_list(m, ids):
    x = front(m, ids)
    torch._foreach_mul_([x], 2.0)
    return x, rest(m, x)


def rows_changed(m, ids):
    rows = m.tok(ids)
    rows.mul_(2)
    x = rows + m.pos(torch.arange(ids.shape[1]))
    return x, rest(m, x)


def part_changed(m, ids):
    rows = m.tok(ids)
    rows[:, 1:].data.mul_(2)
    x = rows + m.pos(torch.arange(ids.shape[1]))
    return x, rest(m, x)


def methods_in_python(m, ids):
    x = front(m, ids)
    found = [*x.split(16, -1), x**2, 1 - x, x.norm(), x.unflatten(-1, (4, 8)), nn.functional.pad(x, (1, 1))]
    return *found, rest(m, x)


def norm_changed(m, ids):
    normed = m.blocks[0].norm1(front(m, ids))
    normed[0] = 0
    return m.blocks[0].attention(normed)


def weight_changed(m, ids):
    x = front(m, ids)
    with torch.no_grad():
        m.blocks[0].norm1.weight.mul_(1.5)
    return rest(m, x)


def ids_changed(m, ids):
    ids = ids.clone()
    rows = m.tok(ids)
    ids.fill_(5)
    return rest(m, rows + m.pos(torch.arange(ids.shape[1])))


def lookups_without_gradients(m, ids):
    with torch.no_grad():
        x = front(m, ids)
    return rest(m, x)


def detached(m, ids):
    return rest(m, front(m, ids).detach())


def asked_twice(m, ids):
    x = front(m, ids)
    normed = m.blocks[0].norm1(x)
    first = m.blocks[0].attention.c_attn(normed)
    first.add_(1)
    return first, m.blocks[0].attention.c_attn(normed), rest(m, x), normed, x


def only_hidden(m, ids):
    return front(m, ids)


def block_in_a_checkpoint(m, ids):
    return checkpoint(m.blocks[0], front(m, ids), use_reentrant=False)


def all_in_a_checkpoint(m, ids):
    return checkpoint(lambda i: rest(m, front(m, i)), ids, use_reentrant=False)


def called_twice(m, ids):
    return m(ids) + m(ids.flip(0))


def graph_break(m, ids):
    x = front(m, ids)
    torch._dynamo.graph_break()
    return rest(m, x)


def changed_between_graphs(m, ids):
    x = front(m, ids)
    torch._dynamo.graph_break()
    with torch.no_grad():
        m.blocks[0].norm1.weight.mul_(1.5)
    torch._dynamo.graph_break()
    return rest(m, x)


# How often the front end is fused: without gradients, with.
HARD = [
    (whole, 1, 1),
    (called_twice, 2, 2),
    (all_in_a_checkpoint, 1, 1),
    (asked_twice, 1, 1),
    (lookups_without_gradients, 1, 0),
    *((f, 0, 0) for f in (rows_changed, methods_in_python, part_changed)),
    *((f, 0, 0) for f in (changed, changed_by_another_name, changed_by_data, changed_in_a_list)),
    (changed_alone_in_a_list, 0, 0),
    *((f, 0, 0) for f in (norm_changed, detached)),
    *((f, 0, 0) for f in (block_in_a_checkpoint, graph_break)),
    (only_hidden, 0, None),  # weights that nothing uses have gradients of zeros then, not None
    (weight_changed, 0, None),  # autograd refuses a backward through what was changed, as in eager mode
    (changed_between_graphs, 0, None),
    (ids_changed, 0, None),
]


def in_graphs(function, times, grads):
    """What was computed before is handed out for the very tensor that it belongs to, once; else the model's own modules."""
    model, ids, found = own(), tokens(), []
    twin = copy.deepcopy(model)
    fused = fuse(model, ids)
    for each in (model, twin):
        run = lambda i, m=each: function(m, i)  # noqa: E731  which is another one for each
        if each is model:
            breaks = function in (graph_break, changed_between_graphs)
            run = torch.compile(run, fullgraph=not breaks, backend="aot_eager")
        with torch.set_grad_enabled(grads), pyembed.backend("triton" if each is model else "auto"):
            out = run(ids)
        out = out if isinstance(out, tuple) else (out,)
        if grads:
            sum(x.square().sum() for x in out).backward()
            out += tuple(p.grad for p in each.parameters() if p.grad is not None)
        found.append(out)
    assert len(found[0]) == len(found[1]) and all(map(close, *found))
    assert fused.calls[FUSED] == times


CASES = [(function, times[grads], grads) for function, *times in HARD for grads in (False, True) if times[grads] is not None]


@pytest.mark.parametrize(
    "function, times, grads",
    [case if case[0] is asked_twice and not case[2] else full(*case) for case in CASES],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_hard_cases(function, times, grads):
    in_graphs(function, times, grads)


def test_gradients():
    in_graphs(lambda m, ids: m.blocks[0].attention.c_attn(m.blocks[0].norm1(front(m, ids))), 1, True)


def _replace_weight(m, fused):
    m.blocks[0].norm1.weight = nn.Parameter(m.blocks[0].norm1.weight * 3)


def _change_weight(m, fused):
    with torch.no_grad():
        m.blocks[0].attention.c_attn.weight.mul_(3)


def _replace_linear(m, fused):
    m.blocks[0].attention.c_attn = copy.deepcopy(m.blocks[1].attention.c_attn)


def _replace_forward(m, fused):
    norm = m.blocks[0].norm1
    norm.forward = lambda x: 2 * x


def _undo(m, fused):
    fused.undo()


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [None, True])
def test_graph_breaks(dynamic):
    """What one graph knew of its results is of no use to another, and makes no more graphs of it."""
    model, ids, counts = own(), tokens(), []
    twin = copy.deepcopy(model)
    fuse(model, ids)
    for each in (model, twin):
        torch._dynamo.reset()
        graphs = []
        compiled = torch.compile(graph_break, backend=lambda g, i, graphs=graphs: graphs.append(g) or g, dynamic=dynamic)
        with torch.no_grad():
            for length in (9, 8, 7, 5):
                assert close(compiled(each, ids[:, :length]), graph_break(twin, ids[:, :length]))
        counts.append(len(graphs))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("change", [_undo, *map(full, (_replace_weight, _change_weight, _replace_linear, _replace_forward))])
def test_changes_after_compiling(change):
    model, ids = own(), tokens()
    fused = fuse(model, ids)
    compiled = torch.compile(lambda i: rest(model, front(model, i)), fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(ids)
        assert fused.calls == {FUSED: 1}
        change(model, fused)
        found = compiled(ids)
        with pyembed.plan("one_pass"), pyembed.backend("torch"):
            assert close(found, rest(model, front(model, ids)))


def test_returned_tensors():
    """Are plain ones, which hold no projections."""
    model, ids = own(), tokens()
    fuse(model, ids)
    compiled = torch.compile(lambda i: (front(model, i), model.tok(i)), fullgraph=True, backend="eager")
    with torch.no_grad():
        for found, expected in zip(compiled(ids), (front(model, ids), model.tok(ids)), strict=True):
            assert type(found) is torch.Tensor and torch.equal(found, expected) and not vars(found)


def test_backs_off(monkeypatch):
    """After projections that nobody took, graph after graph."""
    monkeypatch.setattr(traced, "MISSES", 1)
    model, ids = own(), tokens()
    fused = fuse(model, ids)
    for _ in range(traced.MISSES + 1):
        torch._dynamo.reset()
        torch.compile(lambda i: front(model, i), fullgraph=True, backend="eager")(ids)
    assert [why for why in fused.calls if "were not taken" in why] == [*fused.calls] and fused.calls.total() == 1


def positions_first(m, ids):
    positions = m.pos(torch.arange(ids.shape[1]))
    x = m.tok(ids) + positions
    torch._dynamo.graph_break()
    return rest(m, x)


def test_begins_anew(monkeypatch):
    """What is decided for a frame is the same when Dynamo traces it again, also where it is the last that is tried."""
    monkeypatch.setattr(traced, "MISSES", 1)
    model, ids = own(), tokens()
    fuse(model, ids)
    compiled = torch.compile(lambda i: positions_first(model, i), backend="eager", dynamic=False)
    with torch.no_grad():
        for length in (9, 8):
            assert close(compiled(ids[:, :length]), positions_first(model, ids[:, :length]))


@pytest.mark.parametrize("role", ["token", full("position"), full("norm"), full("linear")])
def test_other_modules_of_its_class(role):
    """Made by type(module)(...), they are not of the fusion."""
    model, ids = own(), tokens()
    fused = fuse(model, ids)
    block = model.blocks[0]
    if role in ("token", "position"):
        name = {"token": "tok", "position": "pos"}[role]
        setattr(model, name, type(getattr(model, name))(*getattr(model, name).weight.shape))
    elif role == "norm":
        block.norm1 = type(block.norm1)(32)
    else:
        block.attention.c_attn = type(block.attention.c_attn)(32, 96)
    with torch.no_grad():
        found = torch.compile(lambda i: rest(model, front(model, i)), fullgraph=True, backend="eager")(ids)
        with pyembed.backend("auto"):
            assert close(found, rest(model, front(model, ids)))
    assert not fused.calls[FUSED]


def reason(model, ids=None, mode=None):
    """What is counted for a graph that begins there."""
    ids = tokens() if ids is None else ids
    fused = fuse(model, ids)
    torch._dynamo.reset()
    with mode or contextlib.nullcontext():
        torch.compile(lambda i: front(model, i), fullgraph=True, backend="eager")(ids)
    return next(iter(fused.calls), FUSED).removeprefix(f"{COMPILED}: ")


def test_reasons():
    assert reason(own(), mode=pyembed.backend("auto")) == "kernels are for GPUs, and the table is on cpu"
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        assert reason(own()).startswith("torch.autograd.grad may be called in graphs")
    assert reason(own(), mode=pyembed.plan("distinct")) == "pyembed.plan('distinct') is set"
    assert reason(own(), mode=torch.autocast("cpu", torch.bfloat16)).startswith("Triton's interpreter has no bfloat16")


@pytest.mark.full
@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_a_size_that_is_not_known(on_a_gpu, monkeypatch):
    if on_a_gpu:  # where few tokens are fused
        monkeypatch.setattr(traced, "why_torch", lambda token: None)
    model, ids = own(), tokens()
    fused = fuse(model, ids)
    torch._dynamo.decorators.mark_unbacked(ids, 0)
    compiled = torch.compile(lambda i: front(model, i), fullgraph=True, backend="eager")
    with torch.no_grad(), pyembed.backend("auto" if on_a_gpu else "triton"):
        assert close(compiled(ids), front(model, ids))
    assert fused.calls[f"{COMPILED}: the number of ids is not known to the compiler"] == 1


@pytest.mark.full
def test_hooks():
    model = own()
    fused = fuse(model, tokens())
    model.blocks[0].norm1.register_forward_hook(lambda m, i, out: out * 2)
    found = torch.compile(model, fullgraph=True, backend="eager")(tokens())
    assert [*fused.calls] == [f"{COMPILED}: blocks.0.norm1 has hooks"]
    fused.undo()
    assert close(found, model(tokens()))


def test_on_a_gpu(monkeypatch):
    """Where nothing is forced: one projection, few tokens, no gradients."""
    monkeypatch.setattr(traced, "why_torch", lambda token: None)
    monkeypatch.setattr(traced, "FEW", 18)
    with pyembed.backend("auto"):
        assert "with gradients there are too many tokens" in reason(own())
        with torch.no_grad():
            assert reason(own()) == FUSED and reason(own(), tokens(3)) == "it has more than 18 tokens"
            assert "would be copied together" in reason(own(Three))


@pytest.mark.parametrize("dynamic", [True, full(None)])
def test_lengths_on_a_gpu(dynamic, monkeypatch):
    """A graph of any length up to the limit, and another beyond it."""
    monkeypatch.setattr(traced, "why_torch", lambda token: None)
    monkeypatch.setattr(traced, "FEW", 14)
    model = own()
    fused = fuse(model, tokens())
    compiled = torch.compile(lambda i: front(model, i), fullgraph=True, backend="eager", dynamic=dynamic)
    with torch.no_grad(), pyembed.backend("auto"):
        for length in (7, 6, 5, 9, 8):
            ids = tokens(2, 12)[:, :length]
            assert close(compiled(ids), front(model, ids))
    assert {why: n for why, n in fused.calls.items() if "graph" in why} == {f"{COMPILED}: it has more than 14 tokens": 1}


def test_report():
    model = own()
    fused = fuse(model, tokens())
    assert "torch.compile takes the fused front end into its graphs\n" in str(fused) + "\n"
    with pyembed.backend("auto"):
        assert "takes the model's own modules into its graphs: kernels are for GPUs" in str(fused)
    fused.undo()
    assert "into its graphs: the fusing is undone" in str(fused)
