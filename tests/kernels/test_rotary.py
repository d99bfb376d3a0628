"""Rotary positions: every layout under every plan and backend, against the formula of the paper."""

import copy
import math
import pickle

import pytest
import torch
from conftest import DEVICE
from numerics import WAYS, Case
from torch import nn

import pyembed
from pyembed import functional as F
from pyembed import reference
from pyembed.call import FRONT_END, LEARNED, Call, Epilogue, Norm, Projection, Terms
from pyembed.plans import one_pass, operators
from pyembed.reference import rotate
from pyembed.rotary import Rotary, turns

LAYOUTS = {
    "half": {"head_dim": 8},
    "interleaved": {"head_dim": 8, "interleaved": True},
    "part, half": {"head_dim": 12, "rotary_dim": 4},
    "part, in eights": {"head_dim": 32, "rotary_dim": 16},
    "part, interleaved": {"head_dim": 10, "rotary_dim": 6, "interleaved": True},
    "scaled": {"head_dim": 64, "scale": 1.3, "base": 500.0},
}
PLANS = [("torch", "one_pass"), ("torch", "distinct"), ("triton", "one_pass"), ("triton", "distinct")]


def rotary_of(layout, rows=60):
    return Rotary(max_length=rows, **LAYOUTS[layout]).to(DEVICE)


def turned_by(rotary, ids, position_ids=None):
    """An Epilogue that does no more than turn."""
    return Epilogue(None, None, None, *turns(rotary, ids, position_ids))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_papers(layout):
    """Pair i of head x at position t turns by t·base^(−2i/R): Su et al. 2021, equation 15."""
    rotary, options = rotary_of(layout), LAYOUTS[layout]
    width, R, base = options["head_dim"], options.get("rotary_dim", options["head_dim"]), options.get("base", 10_000.0)
    x = torch.randn(2, 50, 3, width, dtype=torch.float64)
    found = rotate(x, turned_by(rotary, torch.zeros(2, 50, dtype=torch.long)))
    for t in (0, 1, 17, 49):
        for i in range(R // 2):
            a, b = (2 * i, 2 * i + 1) if options.get("interleaved") else (i, i + R // 2)
            turn = complex(math.cos(t * base ** (-2 * i / R)), math.sin(t * base ** (-2 * i / R))) * options.get("scale", 1.0)
            for head in range(3):
                expected = complex(x[1, t, head, a], x[1, t, head, b]) * turn
                assert abs(expected - complex(found[1, t, head, a], found[1, t, head, b])) < 1e-6
    assert torch.equal(found[..., R:], x[..., R:])


@pytest.mark.sample
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend, plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_plan(layout, backend, plan, dtype):
    case = Case(dtype, DEVICE, heads=4, kv_heads=2, head_dim=LAYOUTS[layout]["head_dim"], norm="rms", position=None)
    case.options["rotary"] = rotary_of(layout)
    with pyembed.backend(backend), pyembed.plan(plan):
        case.check(F.embed_qkv)


@pytest.mark.sample
@pytest.mark.parametrize("position_ids", ["T", "1T", "BT"])
@pytest.mark.parametrize("position", [None, "learned"])
@pytest.mark.parametrize("backend, plan", PLANS)
def test_positions_as_they_come(position_ids, position, backend, plan):
    """Alone, and beside a table of additive positions."""
    case = Case(torch.float32, DEVICE, B=3, head_dim=8, position="learned", position_ids=position_ids, norm="layer")
    case.parameters["position"] = case.parameters["position"] if position else None
    case.options["rotary"] = rotary_of("half")
    with pyembed.backend(backend), pyembed.plan(plan):
        case.check(F.embed_qkv)


@pytest.mark.sample
@pytest.mark.parametrize("shape", [(19,), (1, 19), (2, 19)], ids=["T", "1T", "BT"])
@pytest.mark.parametrize("backend, plan", PLANS)
def test_cosines_and_sines_as_transformers_passes_them(shape, backend, plan):
    case = Case(torch.float32, DEVICE, head_dim=8, position=None)
    angle = torch.randn(*shape, 4, device=DEVICE)
    angle = torch.cat([angle, angle], -1)
    case.options["rotary"] = (angle.cos(), angle.sin())
    with pyembed.backend(backend), pyembed.plan(plan):
        case.check(F.embed_qkv)
        plain = F.embed_qkv(case.ids, **case.parameters, **case.options | {"rotary": None})
        found = F.embed_qkv(case.ids, **case.parameters, **case.options)
    x, c, s = plain.query, angle.cos()[..., None, :], angle.sin()[..., None, :]
    torch.testing.assert_close(found.query, x * c + torch.cat([-x[..., 4:], x[..., :4]], -1) * s)
    assert torch.equal(found.value, plain.value) and torch.equal(found.hidden, plain.hidden)  # bit for bit


def halves(x):
    return torch.cat([x, x], -1)


def sides(x):
    return x.repeat_interleave(2, -1)


def once(x):
    return x


PAIRS = {  # how a model lays its cosines out, and which columns it turns together
    "Llama": (halves, {}),
    "GLM": (halves, {"interleaved": True}),
    "Cohere": (sides, {"interleaved": True}),
    "GPT-OSS": (once, {"doubled": False}),
    "GPT-J": (once, {"interleaved": True, "doubled": False}),
}


def turned(x, angle, interleaved):
    """x (B, T, h, d) float64, angle (B, T, R/2): the paper's rotation by complex numbers."""
    half = angle.shape[-1]
    columns = torch.arange(2 * half).view(half, 2) if interleaved else torch.arange(2 * half).view(2, half).t()
    pairs = torch.view_as_complex(x[..., columns].contiguous()) * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    x = x.clone()
    x[..., columns] = torch.view_as_real(pairs)
    return x


def unreadable(monkeypatch):
    """As on a GPU, where no value is looked at."""
    monkeypatch.setattr("pyembed.rotary.can_read", lambda tensor: False)


@pytest.mark.sample
@pytest.mark.parametrize("can_read", [True, False])
@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("backend, plan", PLANS)
def test_layouts_of_a_pair(layout, backend, plan, can_read, monkeypatch):
    """Where the values stand and which columns are pairs are two matters; against the formula in float64."""
    if not can_read:
        unreadable(monkeypatch)
    lay_out, told = PAIRS[layout]
    case = Case(torch.float32, DEVICE, head_dim=10, position=None)
    angle = torch.randn(2, 19, 3, dtype=torch.float64, device=DEVICE)
    pair = pyembed.CosSin(lay_out(angle.cos()).float(), lay_out(angle.sin()).float(), **told)
    double = {k: v if v is None else v.double() for k, v in case.parameters.items()}
    expected = reference.embed_qkv(case.ids, **double, **case.options)
    with pyembed.backend(backend), pyembed.plan(plan):
        found = F.embed_qkv(case.ids, **case.parameters, **case.options, rotary=pair)
    for name in ("query", "key"):
        oracle = turned(getattr(expected, name), angle, told.get("interleaved", False))
        torch.testing.assert_close(getattr(found, name).double(), oracle, rtol=1e-4, atol=1e-4)


WRONG = {  # a layout, what is said of it, and what a CPU answers
    "Cohere, unsaid": (sides, None, "second half repeats the first, got others: pass pyembed.CosSin"),
    "Cohere, as half-split": (sides, {"interleaved": False}, "second half repeats the first"),
    "GPT-OSS, unsaid": (once, None, "second half repeats the first, got others: .*doubled=False"),
    "GPT-J, as doubled": (once, {"interleaved": True}, "side by side or half behind half, got others"),
    "Llama, as once": (halves, {"doubled": False}, "each value once where doubled=False, got each twice"),
    "Cohere, as once": (sides, {"interleaved": True, "doubled": False}, "each value once where doubled=False"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_pair_laid_out_otherwise(name, monkeypatch):
    """An error at every call, also after right ones of its shape; where nothing can be read, nothing that looks right."""
    lay_out, told, message = WRONG[name]
    ids, token, weight = torch.zeros(2, 5, dtype=torch.long), torch.randn(3, 6), torch.randn(24, 6)
    angle = torch.randn(2, 5, 4)
    cos, sin = lay_out(angle.cos()), lay_out(angle.sin())
    wrong = (cos, sin) if told is None else pyembed.CosSin(cos, sin, **told)
    right = pyembed.CosSin(halves(cos[..., ::2]), halves(sin[..., ::2]))
    for _ in range(2):
        F.embed_qkv(ids, token, weight, num_heads=1, rotary=right)
        with pytest.raises(ValueError, match=f"rotary: expected .*{message}"):
            F.embed_qkv(ids, token, weight, num_heads=1, rotary=wrong)
    if told is None or told.get("doubled", True):
        unreadable(monkeypatch)
        assert F.embed_qkv(ids, token, weight, num_heads=1, rotary=wrong).query.isnan().any()


def test_position_zero_has_every_layout():
    """Its angles are 0: nothing is turned, whatever is said of the pair."""
    ids, token, weight = torch.tensor([[2]]), torch.randn(3, 6), torch.randn(24, 6)
    expected = F.embed_qkv(ids, token, weight, num_heads=1)
    for interleaved in (False, True):
        for doubled in (False, True):
            pair = pyembed.CosSin(torch.ones(1, 4), torch.zeros(1, 4), interleaved, doubled)
            for a, b in zip(F.embed_qkv(ids, token, weight, num_heads=1, rotary=pair), expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["GLM", "Cohere"])
def test_a_pair_under_a_compiler(layout):
    """Made outside of the graph or within it, and never right for the wrong layout."""
    lay_out, told = PAIRS[layout]
    front = pyembed.EmbeddingQKV(11, 16, 2, position=None, norm="rms")
    ids, angle = torch.randint(11, (2, 5)), torch.randn(2, 5, 4)
    pair = pyembed.CosSin(lay_out(angle.cos()), lay_out(angle.sin()), **told)
    compiled = torch.compile(lambda cos, sin: front(ids, rotary=pyembed.CosSin(cos, sin, **told)), backend="aot_eager")
    for a, b in zip(compiled(pair.cos, pair.sin), front(ids, rotary=pair), strict=True):
        torch.testing.assert_close(a, b)
    outside = torch.compile(lambda rotary: front(ids, rotary=rotary), backend="aot_eager")
    torch.testing.assert_close(outside(pair).query, front(ids, rotary=pair).query)
    assert outside((sides(angle.cos()), sides(angle.sin()))).query.isnan().any()
    leaves, spec = torch.utils._pytree.tree_flatten(pair)
    spec = torch.utils._pytree.treespec_loads(torch.utils._pytree.treespec_dumps(spec))  # as torch.export stores it
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), pyembed.CosSin)


@pytest.mark.parametrize("plan", ["one_pass", "table"])
def test_a_plain_pair_turns_as_the_front_ends_own(plan):
    """Where a front end has a Rotary that turns neighbours, a plain pair is laid out either way; a CosSin says it itself."""
    front = pyembed.EmbeddingQKV(11, 16, 2, position=None, norm="rms", rotary=Rotary(8, 9, interleaved=True))
    ids, (cos, sin) = torch.randint(11, (2, 9)), (front.rotary.cos, front.rotary.sin)
    with torch.no_grad(), pyembed.plan(plan):
        expected = front(ids)
        for lay_out in (halves, sides):
            torch.testing.assert_close(front(ids, rotary=(lay_out(cos), lay_out(sin))), expected)
        other = front(ids, rotary=pyembed.CosSin(halves(cos), halves(sin)))
        front.rotary.interleaved = False
        torch.testing.assert_close(other, front(ids))


def in_inference_mode(front, ids):
    """The first call in it must leave nothing behind that training cannot use."""
    with torch.inference_mode():
        front(ids)
    return front


@pytest.mark.sample
@pytest.mark.parametrize("plan", ["one_pass", "distinct"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_training_after_inference_mode(backend, plan):
    ids = torch.randint(11, (2, 5), device=DEVICE)

    def front_of(rotary):
        norm, qkv = nn.RMSNorm(16, device=DEVICE), nn.Linear(16, 48, device=DEVICE)
        return pyembed.EmbeddingQKV.from_modules(
            nn.Embedding(11, 16, device=DEVICE), None, norm, qkv=qkv, num_heads=4, rotary=rotary
        )

    with torch.inference_mode():
        made, moved = Rotary(4, 9, device=DEVICE), Rotary(4, 9, inv_freq=torch.tensor([1.0, 0.1])).half().to(DEVICE)
    with torch.device("meta"):
        on_meta = Rotary(4, 9)
    with pyembed.backend(backend), pyembed.plan(plan):
        for rotary in (made, moved, on_meta):
            front = in_inference_mode(front_of(rotary), ids)
            sum(x.square().sum() for x in front(ids)).backward()
            assert front.qkv.weight.grad.any()


@pytest.mark.sample
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("way, norm", [("folded", "layer"), ("folded", "rms"), ("rows", "layer"), ("few", "layer")])
def test_blocks_of_tokens(layout, first, way, norm):
    """Tiles that begin within a sequence."""
    check_blocks(layout, first, way, norm)


@pytest.mark.parametrize("way", WAYS)
def test_groups_of_both_halves_alternate(way):
    """Within a tile, where a half of a head has several groups of eight columns."""
    check_blocks("scaled", False, way, "layer")


def check_blocks(layout, first, way, norm):
    head_dim = LAYOUTS[layout]["head_dim"]
    case = Case(torch.float32, DEVICE, B=3, T=50, D=24, heads=2, kv_heads=1, head_dim=head_dim, norm=norm)
    epilogue = turned_by(rotary_of(layout), case.ids)._replace(heads_first=first)
    module, running = operators.launcher("embed_qkv", case.ids)
    with running:
        outputs = module.embed_qkv(case.call(epilogue=epilogue), way=way)
    doubles = {name: p if p is None else p.double() for name, p in case.parameters.items()}
    expected = reference.embed_qkv(case.ids, **doubles, **case.options)
    expected = (rotate(expected.query, epilogue), rotate(expected.key, epilogue), expected.value)
    for ours, right in zip(outputs[1:4], expected, strict=True):
        ours = ours.transpose(-3, -2) if first else ours
        torch.testing.assert_close(ours, right.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("plan", ["one_pass", "distinct"])
def test_gradcheck(plan):
    case = Case(torch.float64, "cpu", V=5, T=4, D=6, heads=1, head_dim=4)
    leaves = {k: p.detach().requires_grad_() for k, p in case.parameters.items() if p is not None}

    def function(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        return tuple(F.embed_qkv(case.ids, **given, **case.options, rotary=rotary_of("half_of_four")))

    LAYOUTS["half_of_four"] = {"head_dim": 4}
    try:
        with pyembed.plan(plan), pyembed.backend("triton"):
            assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)
    finally:
        del LAYOUTS["half_of_four"]


@pytest.mark.sample
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_prefill_and_decode_are_one_shot(backend, position):
    """Token by token, at position_ids of its own, each step gives what the whole sequence gives there; and by a table."""
    front = pyembed.EmbeddingQKV(11, 16, 4, max_length=9, position=position, rotary=Rotary(4, 9)).to(DEVICE)
    ids = torch.randint(11, (2, 9), device=DEVICE)
    with pyembed.backend(backend), torch.no_grad():
        whole = front(ids)
        for plan in ("one_pass", "table"):
            with pyembed.plan(plan):
                for t in range(9):
                    step = front(ids[:, t : t + 1], torch.tensor([t], device=DEVICE))
                    for a, b in zip(step, whole, strict=True):
                        torch.testing.assert_close(a, b[:, t : t + 1])


def test_packed_is_separate():
    front = pyembed.EmbeddingQKV(11, 16, 4, max_length=9, position="rotary").to(DEVICE)
    first, second = (torch.randint(11, (n,), device=DEVICE) for n in (4, 7))
    places = torch.cat([torch.arange(4), torch.arange(7)]).to(DEVICE)
    packed = front(torch.cat([first, second]), places)
    for i, whole in enumerate(packed):
        torch.testing.assert_close(whole, torch.cat([front(first)[i], front(second)[i]]))


def test_module(monkeypatch):
    front = pyembed.EmbeddingQKV(11, 16, 4, position="rotary", max_length=7)
    assert set(front.state_dict()) == {"token.weight", "norm.weight", "norm.bias", "qkv.weight", "qkv.bias"}
    ids = torch.randint(11, (2, 5))
    expected = front(ids)
    for twin in (copy.deepcopy(front), pickle.loads(pickle.dumps(front)), front.half().float()):
        assert torch.equal(twin.rotary.cos, Rotary(4, 7).cos)  # .half() costs the tables nothing
    torch.testing.assert_close(front(ids), expected, rtol=2e-2, atol=2e-2)
    empty = pyembed.EmbeddingQKV(11, 16, 4, position="rotary", max_length=7, device="meta").to_empty(device="cpu")
    assert torch.equal(empty.rotary.sin, Rotary(4, 7).sin)
    angle = torch.randn(5, 2).repeat(1, 2)
    own = front(ids, rotary=(angle.cos(), angle.sin()))
    by_hand = reference.embed_qkv(
        ids, front.token.weight, front.qkv.weight, front.qkv.bias, num_heads=4, norm="layer", norm_weight=front.norm.weight,
        norm_bias=front.norm.bias, rotary=(angle.cos(), angle.sin()),
    )  # fmt: skip
    for a, b in zip(own, by_hand, strict=True):
        torch.testing.assert_close(a, b)
    dropping = pyembed.EmbeddingQKV(11, 16, 4, position="rotary", dropout=1e-9)
    torch.testing.assert_close(dropping(ids), dropping.eval()(ids))
    with torch.device("meta"):
        front = pyembed.EmbeddingQKV(11, 16, 4, position="rotary", max_length=7)
    assert torch.equal(front.to_empty(device="cpu").rotary.cos, empty.rotary.cos)


def test_given_frequencies():
    """Linear scaling by given inverse frequencies is the turn of a position that much smaller."""
    slow = Rotary(8, 40, inv_freq=10_000.0 ** (-torch.arange(0, 8, 2) / 8) / 4)
    torch.testing.assert_close(slow.cos[::4], Rotary(8, 10).cos)
    assert Rotary(8, 200_000).sin[150_000, 0].item() == pytest.approx(math.sin(150_000), abs=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_against_transformers(interleaved):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x, rotary = torch.randn(2, 7, 3, 8), Rotary(8, 7, interleaved=interleaved)
    found = rotate(x, turned_by(rotary, torch.zeros(2, 7, dtype=torch.long)))
    if interleaved:
        expected = gptj.apply_rotary_pos_emb(x, rotary.sin[None], rotary.cos[None])
    else:
        cos, sin = (t.repeat(1, 2)[None] for t in (rotary.cos, rotary.sin))
        expected, _ = llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(found, expected)


def test_operators():
    """The forward turns heads, the backward turns their gradients back."""
    case = Case(torch.float32, DEVICE, heads=1, head_dim=8)
    case.parameters = {name: p.requires_grad_() for name, p in case.parameters.items()}
    call = case.call(epilogue=turned_by(rotary_of("half"), case.ids))
    arguments = FRONT_END.flatten(call)
    operator = one_pass.embed_qkv
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.forward.op, arguments, test_utils=utilities)
    *_, mean, rstd = (x.detach() for x in operator.forward.op(*arguments))
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    given = (*case.grads, mean, rstd, *arguments, [call.named()[name] is not None for name in LEARNED])
    torch.library.opcheck(operator.backward.op, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "rotary, error, message",
    [
        (lambda: Rotary(8, 5, rotary_dim=3), ValueError, r"rotary_dim: expected an even number up to head_dim \(8\), got 3"),
        (lambda: Rotary(8, 5, rotary_dim=10), ValueError, r"rotary_dim: expected an even number .* got 10"),
        (lambda: Rotary(8, 0), ValueError, "max_length: expected a positive number, got 0"),
        (lambda: Rotary(8, 5, inv_freq=torch.ones(3)), ValueError, r"inv_freq: expected shape \(4,\).* got \(3,\)"),
        (lambda: Rotary(16, 9), ValueError, r"rotary: expected an even width up to an even head_dim \(8\), got 16"),
        (lambda: Rotary(8, 4), IndexError, "sequence length 5 needs positions up to 4, rotary has 4 rows"),
        (lambda: Rotary(8, 5, inv_freq=[1.0] * 4), TypeError, "inv_freq: expected a Tensor, got list"),
        (lambda: Rotary(8, 5, inv_freq=torch.ones(4, device="meta")), ValueError, "inv_freq: expected frequencies, .* meta"),
        (lambda: pyembed.CosSin(torch.ones(5, 8), torch.ones(5, 8), 1), TypeError, "interleaved and doubled .* got 1 and True"),
        (lambda: pyembed.CosSin(torch.ones(5, 8), 0.0), TypeError, "rotary: expected a pyembed.Rotary or .* got CosSin"),
        (lambda: "rope", TypeError, r"rotary: expected a pyembed.Rotary or a \(cos, sin\) pair of Tensors, got str"),
        (lambda: (torch.ones(5, 7),) * 2, ValueError, r"rotary: expected an even width .* got 7"),
        (lambda: (torch.ones(4, 8),) * 2, ValueError, r"rotary: expected cos and sin of shape .* got \(4, 8\) and \(4, 8\)"),
        (lambda: (torch.ones(5, 8), torch.ones(8)), ValueError, r"rotary: expected cos and sin .* and \(8,\)"),
        (lambda: (torch.ones(5, 8, requires_grad=True),) * 2, ValueError, "that want no gradient: none is computed"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_wrong_arguments(rotary, error, message, backend):
    ids, token, weight = torch.zeros(2, 5, dtype=torch.long), torch.randn(3, 6), torch.randn(24, 6)
    with pytest.raises(error, match=message), pyembed.backend(backend):
        F.embed_qkv(ids, token, weight, num_heads=1, rotary=rotary())


def test_places_without_a_row():
    ids, token, weight = torch.zeros(2, 5, dtype=torch.long), torch.randn(3, 6), torch.randn(24, 6)
    for backend in ("torch", "triton"):
        with pytest.raises(IndexError, match=r"position_ids: .* \[0, 9\), the rows of rotary; got 9"), pyembed.backend(backend):
            F.embed_qkv(ids, token, weight, num_heads=1, rotary=Rotary(8, 9), position_ids=torch.full((5,), 9))
    for wrong, error in ((nn.Linear(2, 2), TypeError), (Rotary(8, 9), ValueError)):
        with pytest.raises(error, match="rotary: expected a"):
            pyembed.EmbeddingQKV(3, 16, 4, rotary=wrong)


@pytest.mark.parametrize("plan", ["few", "rows", "folded", "distinct"])
def test_a_place_without_a_row_is_nan_by_the_kernel(plan):
    """On a GPU nothing looks at ids: their heads become NaN there, and no other row's."""
    ids, token, weight = (t.to(DEVICE) for t in (torch.tensor([[0, 0, 0, 3]]), torch.randn(3, 6), torch.randn(24, 6)))
    epilogue = turned_by(Rotary(8, 4).to(DEVICE), ids, torch.tensor([[1, 4, -1, 1]], device=DEVICE))
    module, running = operators.launcher("distinct" if plan == "distinct" else "embed_qkv", ids)
    norm = Norm("rms", torch.ones(6, device=DEVICE), None, 1e-5)
    call = Call(Terms(ids, token), norm, Projection(weight, None, 1, 1), epilogue)
    with running:
        results = module.forward(call) if plan == "distinct" else module.embed_qkv(call, way=plan)
    query = results[1]
    assert query[0, 0].isfinite().all() and query[0, 1:].isnan().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(8,), (1, 8)], ids=str)
def test_a_single_id_with_its_own_pair(shape, backend):
    """ids of shape (), whose pair may be too."""
    token, weight, angle = torch.randn(3, 6), torch.randn(24, 6), torch.rand(4)
    pair = tuple(x.repeat(2).view(shape) for x in (angle.cos(), angle.sin()))
    with pyembed.backend(backend):
        query = F.embed_qkv(torch.tensor(2), token, weight, num_heads=1, rotary=pair).query
    x = torch.view_as_complex((token[2] @ weight[:8].T).view(2, 4).T.contiguous())
    expected = torch.view_as_real(x * torch.polar(torch.ones(4), angle)).T.reshape(1, 8)
    torch.testing.assert_close(query, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [6, 300])
def test_too_few_rows_never_wrap_around(tokens):
    """Two sequences of 6 tokens are three of 4: where rows lack, nothing may be taken for another token's."""
    front = pyembed.EmbeddingQKV(11, 16, 4, position="rotary", max_length=tokens * 2 // 3)
    ids = torch.zeros(2, tokens, dtype=torch.long)
    with pytest.raises(IndexError, match=r"rotary has .* rows"):
        front(ids)
    for shape, message in (((tokens * 2 // 3, 4), "expected cos and sin of shape"), ((tokens, 3), "expected an even width")):
        with pytest.raises(ValueError, match=f"rotary: {message}"):
            front(ids, rotary=(torch.ones(shape),) * 2)
    with pytest.raises(IndexError, match="rotary: expected rows for"):
        reference.embed_qkv(ids, torch.randn(3, 6), torch.randn(24, 6), num_heads=1, rotary=Rotary(8, tokens * 2 // 3))
