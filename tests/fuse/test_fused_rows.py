"""Models whose token table is a TrainableRows, or a pyembed.Embedding, with their front end fused."""

import copy
import pickle

import pytest
import torch
from conftest import full
from families import Own, Packed, T, Three, V, build, logits, tokens
from numerics import Largest
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import pyembed
from pyembed.fuse.traced import COMPILED
from pyembed.vocabulary import Rows, TrainableRows

ROWS = [5, 3, 90]


@pytest.fixture(autouse=True)
def distinct():
    """Everything that can be fused is, at any size."""
    with pyembed.plan("distinct"):
        yield


def table_of(model):
    """(the module that holds the table of tokens, its name there)."""
    if isinstance(model, Own):
        return model, "tok"
    table = model.get_input_embeddings()
    return next((m, name) for m in model.modules() for name, child in m._modules.items() if child is table)


def with_rows(model, ids=ROWS):
    """Its table gets rows that train, which differ from the table's."""
    parent, name = table_of(model)
    table = TrainableRows(getattr(parent, name), ids)
    setattr(parent, name, table)
    with torch.no_grad():
        table.rows.add_(torch.randn_like(table.rows))
    return model


def small(norm=nn.LayerNorm, attention=Packed, **options):
    torch.manual_seed(0)
    return with_rows(Own(norm, attention, layers=1, **options).eval())


def batch(*shape, with_own=True):
    """Ids in which each row stands twice, or none does."""
    ids = tokens(*shape)
    ids = ids.masked_fill(torch.isin(ids, torch.tensor(ROWS)), 7)
    if with_own:
        ids.view(-1)[:6] = torch.tensor(ROWS * 2)
    return ids


def run(model, ids):
    """Logits and the gradients of all parameters."""
    model.zero_grad()
    out = logits(model, ids)
    if out.requires_grad:
        out.square().sum().backward()
    return {"logits": out.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, rtol=1e-4):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape and found[name].dtype == x.dtype
        assert ((found[name] - x).abs() <= rtol * x.abs().max() + 1e-6).all(), name


def fuse(model):
    return pyembed.fuse(model, tokens(), gradients=False)


@pytest.mark.parametrize(
    "name",
    [
        "nanoGPT",
        "LLMs-from-scratch",
        *map(full, ("minGPT", "lecture", "GPT2", "Llama", "Mistral", "Qwen3", "GPTNeoX", "GPTJ", "OPT", "Phi3")),
    ],
)
def test_same_results(name):
    model = with_rows(build(name))
    parent, at = table_of(model)
    keys, twin = list(model.state_dict()), copy.deepcopy(model)
    fused = pyembed.fuse(model, tokens())
    assert type(getattr(parent, at)).__name__ == "TrainableRows" and list(model.state_dict()) == keys
    assert fused.modules["token"] == [next(n for n, m in model.named_modules() if m is getattr(parent, at))]
    for ids in (batch(), batch(with_own=False), batch(3, 5)):
        found, expected = run(model, ids), run(twin, ids)
        assert_same(found, expected)
        (rows,) = [x for n, x in found.items() if n.endswith(f"{at}.rows")]
        assert rows.shape[0] == len(ROWS) and not any(n.endswith(f"{at}.weight") for n in found)
    assert fused.calls == {"fused": 3}
    with torch.inference_mode():
        assert_same({"logits": logits(model, ids)}, {"logits": logits(twin, ids)})
    assert fused.calls == {"fused": 4}
    fused.undo()
    assert type(getattr(parent, at)) is TrainableRows
    assert_same(run(model, ids), run(twin, ids), 0.0)


@pytest.mark.parametrize("model", [small, full(lambda: small(attention=Three)), full(lambda: with_rows(build("BERT")))])
def test_by_the_kernels(model):
    """Which alone take segments, as BERT has them."""
    model = model()
    twin = copy.deepcopy(model)
    fused = fuse(model)
    with pyembed.backend("triton"), pyembed.plan("one_pass"):
        assert_same(run(model, batch()), run(twin, batch()))
    assert fused.calls == {"fused": 1}


def test_optimizer_steps_are_seen():
    model = small()
    twin, losses = copy.deepcopy(model), []
    fuse(model)
    for each in (model, twin):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            loss = each(batch()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            each.tok.rows.data.add_(1)  # which no version counts
        losses.append(each(batch()).square().mean().item())
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-3) and len(set(losses)) > 3


class Tied(Own):
    def forward(self, ids):
        return self.tok.linear(self.hidden(ids))


def test_a_tied_head():
    torch.manual_seed(0)
    model = with_rows(Tied(nn.LayerNorm, Packed, layers=1).eval())
    twin = copy.deepcopy(model)
    fused = pyembed.fuse(model, tokens())
    assert_same(run(model, batch()), run(twin, batch()))
    assert fused.calls == {"fused": 1}


def _load(model):
    state = model.state_dict()
    model.load_state_dict(state | {"tok.row_ids": torch.tensor([90, 7, 4]), "tok.rows": 2 * state["tok.rows"]})


def _assign(model):
    state = {name: x.clone() for name, x in model.state_dict().items()} | {"tok.row_ids": torch.tensor([8, 7, 4])}
    model.load_state_dict(state, assign=True)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


CHANGES = {  # name: (what is done to the model, whether it is fused then)
    "nothing": (lambda m: None, True),
    "other row ids": (_load, True),
    "assigned": (_assign, True),
    "new rows": (lambda m: setattr(m.tok, "rows", nn.Parameter(torch.randn_like(m.tok.rows))), True),
    "frozen rows": (lambda m: m.tok.rows.requires_grad_(False), True),
    "a table that trains": (lambda m: m.tok.weight.requires_grad_(True), True),
    "written into the table": (lambda m: m.tok.merge(), True),
    "merged": (lambda m: setattr(m, "tok", m.tok.merge()), False),
    "wrapped again": (lambda m: with_rows(setattr(m, "tok", m.tok.merge()) or m, [1, 2]), False),
    "hook": (lambda m: m.tok.register_forward_hook(lambda module, x, y: 2 * y), False),
    "pre-hook": (lambda m: m.tok.register_forward_pre_hook(lambda module, x: (x[0].clamp(max=5),)), False),
    "forward": (lambda m: setattr(m.tok, "forward", lambda ids: 2 * TrainableRows.forward(m.tok, ids)), False),
    "float64": (lambda m: m.double(), False),
    "bfloat16": (lambda m: m.bfloat16(), False),
    "parametrized": (lambda m: parametrize.register_parametrization(m.tok, "rows", Doubled()), False),
    "other class": (lambda m: setattr(m.tok, "__class__", Thrice), False),
}


class Thrice(TrainableRows):
    def forward(self, input):
        return 3 * super().forward(input)


@pytest.mark.parametrize(
    "name",
    [
        full(name)
        if name in ("nothing", "new rows", "wrapped again", "pre-hook", "float64", "other class", "frozen rows")
        else name
        for name in CHANGES
    ],
)
def test_changes_after_fusing(name):
    """The model gives what it would give unfused."""
    change, is_fused = CHANGES[name]
    model = small()
    twin = copy.deepcopy(model)
    fused = fuse(model)
    for each in (model, twin):
        torch.manual_seed(1)
        change(each)
    assert_same(run(model, batch()), run(twin, batch()))
    assert bool(fused.calls["fused"]) == is_fused, fused.calls


def test_a_monkeypatched_class(monkeypatch):
    model, ids = small(), batch()
    twin = copy.deepcopy(model)
    fused = fuse(model)
    monkeypatch.setattr(TrainableRows, "forward", lambda self, ids: 2 * nn.functional.embedding(ids, self.weight))
    assert_same(run(model, ids), run(twin, ids))
    assert fused.calls == {"tok was changed since it was fused": 1}


def test_ids_of_inference_mode():
    """Whose changes are not counted."""
    model, ids = small(), batch()
    twin = copy.deepcopy(model)
    fused = fuse(model)
    with torch.inference_mode():
        model.tok._sorted = model.tok._sorted.clone()
    assert_same(run(model, ids), run(twin, ids))
    assert fused.calls == {"tok has row ids that were made in inference mode": 1}


@pytest.mark.parametrize("kind", [nn.Embedding, pyembed.Embedding])
def test_a_fused_table_may_be_wrapped(kind):
    """The model's own modules run then, also after rows were looked up fused."""
    torch.manual_seed(0)
    model = Own(nn.LayerNorm, Packed, layers=1).eval()
    model.tok = kind(V, 32)
    twin = copy.deepcopy(model)
    fused = fuse(model)
    model(batch())
    for each in (model, twin):
        torch.manual_seed(1)
        with_rows(each)
    for _ in range(2):
        assert_same(run(model, batch()), run(twin, batch()))
    assert fused.calls == {"fused": 1} and type(model.tok) is TrainableRows
    fused.undo()
    assert_same(run(model, batch()), run(twin, batch()), 0.0)
    assert fuse(model).why_not is None
    assert_same(run(model, batch()), run(twin, batch()))


@pytest.mark.parametrize("alone", [True, False])
def test_rows_that_are_asked_for(alone):
    """By themselves, as soft prompts take them, or of another sum."""
    model, ids = small(), batch()
    model.pos.requires_grad_(False)
    twin, found = copy.deepcopy(model), []
    fuse(model)
    for each in (model, twin):
        rows = each.tok(ids)
        assert rows.requires_grad
        x = rows * 2 if alone else rows + each.pos(torch.arange(9)[None]) - 1
        found.append((x, *torch.autograd.grad(x.square().sum(), each.tok.rows)))
    assert all(map(torch.equal, *found))
    for each in (model, twin):  # of a sum of three, which nothing is proved of
        x = each.tok(ids) + each.pos(torch.arange(9)) + 1
        assert x.requires_grad


class Segments(Own):
    """Whose tables beside that of tokens are frozen."""

    def __init__(self):
        super().__init__(nn.LayerNorm, Packed, layers=1)
        self.seg = nn.Embedding(2, 32)
        self.seg.requires_grad_(False), self.pos.requires_grad_(False)

    def part(self, ids):
        return self.tok(ids) + self.seg(ids % 2)

    def hidden(self, ids):
        x = self.part(ids) + self.pos(torch.arange(ids.shape[1]))
        return self.norm(self.blocks[0](x))


def test_a_part_of_the_sum_that_is_asked_for():
    torch.manual_seed(0)
    model, ids = with_rows(Segments().eval()), batch()
    twin, grads = copy.deepcopy(model), []
    assert fuse(model).modules["segment"] == ["seg"]
    with pyembed.plan("one_pass"):
        for each in (model, twin):
            part = each.part(ids)
            assert part.requires_grad
            grads += torch.autograd.grad(part.square().sum(), each.tok.rows)
    assert torch.equal(*grads)


def test_nothing_of_the_tables_size_is_made():
    torch.manual_seed(0)
    model = with_rows(Own(nn.LayerNorm, Packed, layers=1, rows=5000).eval())
    front = nn.Sequential(model.blocks[0].norm1, model.blocks[0].attention.c_attn)
    fused, ids = fuse(model), batch()
    with Largest() as largest:
        front(model.tok(ids) + model.pos(torch.arange(9))).square().sum().backward()
    assert fused.calls == {"fused": 1} and model.tok.rows.grad.any() and largest.elements < 5000


@pytest.mark.parametrize("shape", [(0, 9), (2, 0), (1, 1)])
def test_least_batches(shape):
    model, found = small(), []
    twin, ids = copy.deepcopy(model), torch.full(shape, 3)
    fuse(model)
    for each in (model, twin):
        block = each.blocks[0]
        out = block.attention.c_attn(block.norm1(each.tok(ids) + each.pos(torch.arange(shape[1]))))
        found.append({"out": out.detach(), "rows": torch.autograd.grad(out.square().sum(), each.tok.rows)[0]})
    assert found[0]["out"].shape == (*shape, 96)
    assert all(torch.allclose(found[0][name], x, 1e-4, 1e-5) for name, x in found[1].items())


def test_a_checkpoint():
    model, ids = small(), batch()
    twin, grads = copy.deepcopy(model), []
    fused = fuse(model)
    for each in (model, twin):
        checkpoint(each, ids, use_reentrant=False).square().sum().backward()
        grads.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert_same(*grads)
    assert fused.calls == {"fused": 2}


def test_padding_idx():
    torch.manual_seed(0)
    model = Own(nn.LayerNorm, Packed, layers=1).eval()
    model.tok = nn.Embedding(V, 32, padding_idx=7)
    with_rows(model)
    model.tok.weight.requires_grad_()
    twin = copy.deepcopy(model)
    pyembed.fuse(model, tokens())
    found, ids = run(model, batch()), batch()
    assert (ids == 7).any() and not found["tok.weight"][7].any() and found["tok.weight"].any()
    assert_same(found, run(twin, ids))


def test_copies_are_not_fused():
    model = small()
    ids, expected = batch(), run(model, batch())
    fused = fuse(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.tok) is TrainableRows and not twin.tok.weight.requires_grad
        assert_same(run(twin, ids), expected, 0.0)
    assert not fused.calls


@pytest.mark.parametrize("change", ["rows", "weight", "ids", "replaced"])
def test_rows_that_changed_before_they_were_asked_for_are_refused(change):
    model = small()
    fuse(model)
    rows = model.tok(batch())
    with torch.no_grad():
        if change == "replaced":
            model.tok.rows = nn.Parameter(2 * model.tok.rows)
        elif change == "ids":
            _load(model)
        else:
            getattr(model.tok, change).add_(1)
    with pytest.raises(RuntimeError, match="tok: rows were asked for after its weight was changed"):
        rows.sum()


def test_what_cannot_is_said():
    model, ids = small(), batch()
    fused = fuse(model)
    with pytest.raises(RuntimeError, match=r"build_table: .* tok has rows of its own beside its table: merge"):
        fused.build_table()
    with pytest.raises(IndexError, match=rf"expected values in \[0, {V}\)"):
        model(ids.masked_fill(ids == 7, V))
    with pyembed.plan("auto"):
        twin = copy.deepcopy(model)
        assert_same(run(model, ids[:, :1]), run(twin, ids[:, :1]))
    assert fused.calls["too few tokens to gain anything"] == 1


def test_graphs_take_the_models_own_modules():
    model, ids = small(), batch()
    fused, twin = fuse(model), copy.deepcopy(model)
    torch._dynamo.reset()
    with pyembed.backend("triton"), pyembed.plan("auto"):
        found = run(torch.compile(model, fullgraph=True, backend="eager"), ids)
    found = {name.removeprefix("_orig_mod."): x for name, x in found.items()}
    assert_same(found, run(twin, ids))
    reason = "tok has rows of its own beside its table"
    assert fused.calls == {f"{COMPILED}: {reason}": 1} and f"own modules into its graphs: {reason}" in str(fused)


def test_functional_call():
    model, ids = small(), batch()
    twin = copy.deepcopy(model)
    fuse(model)
    parameters = {"tok.rows": 3 * model.tok.rows.detach()}
    found, expected = (torch.func.functional_call(each, parameters, (ids,)) for each in (model, twin))
    torch.testing.assert_close(found, expected)


def _positions(model):
    model.pos = TrainableRows(model.pos, [1, 2])


def _subclass(model):
    model.tok.__class__ = Thrice


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_positions, "pos, a TrainableRows, looks up rows of its own beside its table's, which is fused of tokens alone"),
        (_subclass, "tok, a Thrice, could not be proved to return rows of its weight"),
        (lambda m: m.tok.register_forward_hook(lambda *_: None), "tok, a TrainableRows, has hooks"),
        (lambda m: setattr(m.tok, "forward", m.tok.forward), "tok, a TrainableRows, has a patched forward"),
        (lambda m: setattr(m.tok, "max_norm", 1.0), "tok, a TrainableRows, has max_norm"),
        (CHANGES["parametrized"][0], "no nn.Embedding of the model looked up these ids"),
    ],
)
def test_refused_by_name(change, why):
    model = small()
    change(model)
    expected = run(model, batch())
    fused = pyembed.fuse(model, tokens())
    assert why in fused.why_not
    assert_same(run(model, batch()), expected, 0.0)


@pytest.mark.full
@pytest.mark.parametrize("name", ["Gemma", "BART"])
def test_tables_that_multiply_their_rows_are_refused(name):
    with pytest.raises(TypeError, match=r"embedding: expected one that only looks up rows, got a .*ScaledWordEmbedding"):
        with_rows(build(name))


# Of pyembed.Embedding, which takes rows, too


def ours():
    torch.manual_seed(0)
    model = Own(nn.LayerNorm, Packed, layers=1).eval()
    model.tok, model.pos = pyembed.Embedding(V, 32), pyembed.Embedding(T, 32)
    return model


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_our_embedding(backend):
    model = ours()
    with pyembed.backend(backend), pyembed.plan("one_pass" if backend == "triton" else "distinct"):
        twin = copy.deepcopy(model)
        fused = pyembed.fuse(model, tokens())
        assert_same(run(model, batch()), run(twin, batch()))
    assert fused.calls == {"fused": 1}


def test_our_embedding_with_rows():
    """A call with rows is the module's own, of tokens and of positions."""
    model, ids = ours(), batch()
    fused, rows = fuse(model), Rows(torch.randn(2, 32), [5, 3])
    for module in (model.tok, model.pos):
        twin, given = copy.deepcopy(module), ids if module is model.tok else torch.arange(9)
        for found in (module(given, rows), module(given, rows=rows), module(input=given, rows=rows)):
            assert type(found) is torch.Tensor and torch.equal(found, twin(given, rows))
    hidden = model.tok(ids, rows) + model.pos(torch.arange(9))
    twin = copy.deepcopy(model)
    expected = twin.blocks[0].norm1(twin.tok(ids, rows) + twin.pos(torch.arange(9)))
    assert torch.equal(model.blocks[0].norm1(hidden), expected) and not fused.calls["fused"]


@pytest.mark.parametrize("policy", ["clamp", "zero"])
def test_an_id_policy_is_obeyed(policy):
    model = ours()
    twin = copy.deepcopy(model)
    fused = fuse(model)
    ids = batch().masked_fill(batch() == 7, V)
    with pyembed.id_policy(policy):
        assert_same(run(model, ids), run(twin, ids))
    assert fused.calls == {f"tok has the id_policy {policy!r}": 1}
