"""What hidden is the sum of: segments, scale, computed sines and dropout, under every backend."""

import pytest
import torch
import torch.nn.functional as tf
from conftest import DEVICE, DTYPES, full
from numerics import WAYS, Case, assert_no_worse, take
from torch.utils.checkpoint import checkpoint

import pyembed
from pyembed import functional as F
from pyembed import positions, reference
from pyembed.call import HiddenQKV, Norm
from pyembed.plans import operators

BACKENDS = ["torch", "triton"]
SEGMENTS = {"like ids": (2, 19), "a row": (1, 19), "T": (19,), "none": None}


def with_segments(case, ids="like ids"):
    token, shape, g = case.parameters["token"], SEGMENTS[ids], torch.Generator().manual_seed(1)
    case.parameters["segment"] = torch.randn(3, token.shape[1], generator=g).to(token)
    case.options["segment_ids"] = None if shape is None else torch.randint(3, shape, generator=g).to(DEVICE)
    return case


@pytest.mark.usefixtures("triton")
@pytest.mark.sample
@pytest.mark.parametrize("ids", SEGMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments(dtype, ids):
    with_segments(Case(dtype, DEVICE), ids).check(F.embed_qkv)


@pytest.mark.usefixtures("triton")
@pytest.mark.sample
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(dtype, norm):
    case = with_segments(Case(dtype, DEVICE, norm=norm, padding_idx=3))
    case.options["scale"] = 40**0.5
    case.check(F.embed_qkv)


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_without_a_row(backend):
    ids, kinds = torch.tensor([[4, 0, 1]], device=DEVICE), torch.tensor([[3, 1, -1]], device=DEVICE)
    token, segment = torch.randn(5, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    there = torch.tensor([[[0.0], [1.0], [0.0]]], device=DEVICE)
    expected = {"clamp": token[ids] + segment[kinds.clamp(0, 2)], "zero": token[ids] + there * segment[1]}
    weight = torch.randn(12, 8, device=DEVICE)
    for policy, hidden in expected.items():
        with pyembed.backend(backend), pyembed.id_policy(policy):
            assert torch.equal(F.embed(ids, token, segment=segment, segment_ids=kinds), hidden)
            found = F.embed_qkv(ids, token, weight, num_heads=1, segment=segment, segment_ids=kinds)
        assert torch.equal(found.hidden, hidden)


def test_segment_ids_without_segments_are_refused():
    for position in ("learned", "rotary"):
        with pytest.raises(ValueError, match="segment_ids: expected None where there is no table of segments"):
            pyembed.EmbeddingQKV(9, 16, 2, position=position)(torch.tensor([[1]]), segment_ids=torch.tensor([[0]]))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("norm", ["layer", full("rms"), None])
def test_many_terms_of_many_programs(norm, monkeypatch):
    """Programs that share rows read back what each of them wrote."""
    module, _ = operators.launcher("embed_qkv", torch.empty(0, device=DEVICE))
    monkeypatch.setattr(module.tuning, "runs", lambda M, N, tiles, device, resident: 3)
    take("few", monkeypatch)
    with_segments(Case(torch.float32, DEVICE, norm=norm)).check(F.embed_qkv)


@pytest.mark.usefixtures("triton")
def test_many_terms_of_rows_too_wide_to_be_held(monkeypatch):
    module, _ = operators.launcher("embed_grad", torch.empty(0, device=DEVICE))
    monkeypatch.setattr(module.tuning, "rows", lambda D, dtype: (1, 16, 4))
    case = with_segments(Case(torch.float32, DEVICE, T=5, heads=1, padding_idx=3, position_ids="BT"), "none")
    case.options["scale"] = 40**0.5
    case.check(F.embed_qkv)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("norm", [full("layer"), "rms"])
def test_many_terms_of_many_tokens(norm, monkeypatch):
    """The kernel for many tokens, here with few."""
    take("folded", monkeypatch)
    case = with_segments(Case(torch.float16, DEVICE, norm=norm, position=None))
    case.options["scale"] = 3.0
    case.check(F.embed_qkv)


@pytest.mark.parametrize("convention", positions.CONVENTIONS)
@pytest.mark.parametrize("width", [1, 2, 3, 24, 33])
def test_sines_without_a_table(convention, width):
    """The same rows as the table's, at any position: against float64, whose own angle is right to 1e-16 of itself."""
    steps = positions.sinusoidal_steps(width, convention=convention).to(DEVICE)
    table = positions.sinusoidal_table(3000, width, convention=convention).to(DEVICE)
    ids, places = (
        torch.zeros(1, 7, dtype=torch.long, device=DEVICE),
        torch.tensor([0, 1, 2, 99, 1023, 2048, 2999], device=DEVICE),
    )
    for backend, error in (("torch", 6e-8), ("triton", 2.5e-7)):
        with pyembed.backend(backend):
            rows = F.embed(ids, torch.zeros(1, width, device=DEVICE), steps, places)[0]
        assert (rows - table[places]).abs().max() <= error
        assert rows.abs().max() <= 1
    far = reference.sinusoids(steps, torch.tensor([10**9], device=DEVICE), torch.float32)
    with pyembed.backend("triton"):
        rows = F.embed(ids[:, :1], torch.zeros(1, width, device=DEVICE), steps, torch.tensor([10**9], device=DEVICE))[0]
    torch.testing.assert_close(rows, far, rtol=0, atol=2.5e-7)


@pytest.mark.usefixtures("triton")
def test_sines_in_the_front_end():
    case = Case(torch.float32, DEVICE, position=None, position_ids="BT")
    del case.parameters["position"]
    case.options |= {"position": positions.sinusoidal_steps(40).to(DEVICE), "scale": 40**0.5}
    ours, eager = case.run(F.embed_qkv), case.run(reference.embed_qkv)
    oracle = case.run(reference.embed_qkv, torch.float64)
    for name in oracle:  # float64's sines keep more digits than those of fp32, whose error is one rounding more
        assert_no_worse(name, ours[name], eager[name], oracle[name], floor=4.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_modules_without_a_table_of_positions(backend):
    """Any length, half precision and to_empty included, and no parameter more."""
    torch.manual_seed(0)
    with_table = pyembed.EmbeddingQKV(11, 16, 2, position="sinusoidal", max_length=64)
    without = pyembed.EmbeddingQKV(11, 16, 2, position="sinusoidal", max_length=None)
    without.load_state_dict(with_table.state_dict())
    ids = torch.randint(11, (2, 64))
    with pyembed.backend(backend):
        for ours, theirs in zip(without(ids[:, :9]), with_table(ids[:, :9]), strict=True):
            torch.testing.assert_close(ours, theirs)
        place = torch.tensor([10**6])
        assert without(ids[:1, :1], place).hidden.isfinite().all()
        without.half()
        assert without(ids[:, :9]).hidden.dtype == torch.float16
    assert "computed" in str(without.explain(ids))
    with pyembed.plan("distinct"), pytest.raises(RuntimeError, match="'distinct' cannot run here: positions are computed"):
        without(ids)
    moved = pyembed.EmbeddingQKV(11, 16, 2, position="sinusoidal", max_length=None, device="meta").to_empty(device="cpu")
    assert torch.equal(moved.position.weight, without.position.weight)


# Dropout.


def masked(mask, probability):
    """reference.embed_qkv with a given mask in place of a random one."""

    def function(ids, token, weight, bias=None, *, dropout, norm=None, norm_weight=None, norm_bias=None, **options):
        terms = {
            k: options.pop(k, None) for k in ("position", "position_ids", "padding_idx", "scale", "segment", "segment_ids")
        }
        hidden = reference.embed(ids, token, **terms) * mask / (1 - probability)
        normed = reference.normalise(hidden, Norm(norm or "none", norm_weight, norm_bias, 1e-5))
        heads, kv_heads = options["num_heads"], options["num_kv_heads"]
        qkv = tf.linear(normed, weight, bias).unflatten(-1, (heads + 2 * kv_heads, -1))
        return HiddenQKV(hidden, *qkv.split((heads, kv_heads, kv_heads), -2))

    return function


@pytest.mark.usefixtures("triton")
@pytest.mark.sample
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_forward_and_backward(dtype, norm, way, monkeypatch):
    """What was dropped shows in hidden, as zeros; everything else follows from that mask, gradients too."""
    take(way, monkeypatch)
    case = with_segments(Case(dtype, DEVICE, padding_idx=2, norm=norm))
    case.options["scale"] = 2.0
    assert case.run(F.embed_qkv, backward=False)["hidden"].all(), "a sum of 0 does not show whether it was dropped"
    case.options["dropout"] = 0.25
    torch.manual_seed(3)
    ours = case.run(F.embed_qkv)
    mask = (ours["hidden"] != 0).to(dtype)
    assert 0.6 < mask.float().mean() < 0.9
    eager, oracle = case.run(masked(mask, 0.25)), case.run(masked(mask.double(), 0.25), torch.float64)
    for name in oracle:
        assert_no_worse(name, ours[name], eager[name], oracle[name])


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("rows, probability", [(100, 0.1), full(100, 0.5), full(1000, 0.1), full(1000, 0.5)])
def test_dropout_is_nn_dropouts(rows, probability):
    """Keep rate, mean and variance over many elements, and no row, column or call that follows another."""
    ids, token = torch.zeros(1, rows, dtype=torch.long, device=DEVICE), torch.ones(1, 1024, device=DEVICE)
    torch.manual_seed(0)
    first, second = (F.embed(ids, token, dropout=probability)[0] for _ in range(2))
    keep, n = 1 - probability, first.numel()
    sigma = (keep * probability / n) ** 0.5
    for drawn in (first, second):
        kept = (drawn != 0).double()
        assert abs(kept.mean() - keep) < 5 * sigma
        torch.testing.assert_close(drawn.unique().cpu(), torch.tensor([0.0, 1 / keep]))
        assert abs(drawn.double().mean() - 1) < 5 * sigma / keep
        assert abs(drawn.double().var() - probability / keep) < 0.01 * probability / keep
        for axis in (0, 1):  # of rows and of columns, kept in turn as often as by chance
            rate = kept.mean(axis)
            assert abs(rate.var() * kept.shape[axis] / (keep * probability) - 1) < 0.25
        for shift in (1, 2, 4, 8, 256):
            for axis in (0, 1):
                both = (kept * kept.roll(shift, axis)).mean()
                assert abs(both - keep**2) < 6 * sigma, (shift, axis)
    assert abs(((first != 0) & (second != 0)).double().mean() - keep**2) < 6 * sigma


@pytest.mark.sample
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_by_seed_and_checkpoint(backend):
    front = pyembed.EmbeddingQKV(11, 64, 4, dropout=0.5).to(DEVICE)
    ids = torch.randint(11, (2, 6), device=DEVICE)

    def loss(*, saves):
        torch.manual_seed(5)
        front.zero_grad()
        run = (lambda ids: checkpoint(front, ids, use_reentrant=False)) if saves else front
        outputs = run(ids)
        sum(x.square().sum() for x in outputs).backward()
        return [outputs.hidden.detach(), *(p.grad.clone() for p in front.parameters())]

    with pyembed.backend(backend):
        plain, again, saved = loss(saves=False), loss(saves=False), loss(saves=True)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, again, saved, strict=True))
        assert (plain[0] == 0).any() and not torch.equal(plain[0], front(ids).hidden)
        front.eval()
        assert not (front(ids).hidden == 0).any()


@pytest.mark.usefixtures("triton")
def test_dropout_of_all_and_of_none():
    ids, token = torch.tensor([[0, 1]], device=DEVICE), torch.randn(2, 8, device=DEVICE, requires_grad=True)
    assert torch.equal(F.embed(ids, token, dropout=1.0), torch.zeros(1, 2, 8, device=DEVICE))
    state = torch.get_rng_state()
    assert torch.equal(F.embed(ids, token, dropout=0.0), F.embed(ids, token))
    assert torch.equal(state, torch.get_rng_state()), "without dropout no number is drawn"
    (grad,) = torch.autograd.grad(F.embed(ids, token, dropout=1.0).sum(), token)
    assert not grad.any()


def test_dropout_compiles():
    front = pyembed.EmbeddingQKV(11, 16, 2, dropout=0.5).to(DEVICE)
    ids = torch.randint(11, (2, 6), device=DEVICE)
    with pyembed.backend("triton"):
        compiled = torch.compile(front, fullgraph=True, backend="aot_eager")
        first, second = compiled(ids).hidden, compiled(ids).hidden
    assert (first == 0).any() and not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("combine", ["sum", "concat"])
def test_token_position_embedding(backend, combine):
    """scale, segments and dropout of the sum alone."""
    options = {"combine": combine, "scale": 2.0}
    module = pyembed.TokenPositionEmbedding(11, 8, 16, num_segments=0 if combine == "concat" else 2, **options)
    ids, kinds = torch.randint(11, (2, 5)), torch.randint(2, (2, 5))
    rows, places = module.token(ids) * 2.0, module.position(torch.arange(5))
    with pyembed.backend(backend):
        if combine == "sum":
            assert torch.equal(module(ids, segment_ids=kinds), rows + module.segment(kinds) + places)
        else:
            assert torch.equal(module(ids), torch.cat([rows, places.expand_as(rows)], -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norms_bias_alone_has_a_gradient(backend):
    case = Case(torch.float32, DEVICE)
    del case.parameters["norm_weight"]
    with pyembed.backend(backend), pyembed.plan("one_pass"):
        assert case.check(F.embed_qkv)["grad of norm_bias"].any()


def test_modules_called_check_their_arguments_too():
    """PyTorch would broadcast these, or never look."""
    three = tuple(torch.nn.Linear(16, 16) for _ in range(3))
    tables = torch.nn.Embedding(9, 16), torch.nn.Embedding(9, 16)
    concat = pyembed.EmbeddingQKV(9, 16, 2, combine="concat", heads_first=True)
    ids = torch.zeros(2, 3, dtype=torch.long)
    for front in (pyembed.EmbeddingQKV.from_modules(*tables, qkv=three, num_heads=2), concat):
        with pytest.raises(ValueError, match="segment_ids: expected None"):
            front(ids, segment_ids=ids)
        for shape in ((2, 1), (2, 1, 1, 3)):
            with pytest.raises(ValueError, match="position_ids: expected shape"):
                front(ids, torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"heads_first: expected False for ids of shape \(\)"):
        concat(ids[0, 0])


def test_hooks_of_positions_with_an_offset():
    front = pyembed.EmbeddingQKV(7, 6, 2, max_length=5, position_offset=2)
    front.position.register_forward_hook(lambda module, args, output: output * 0)
    assert torch.equal(front(torch.tensor([[1, 2]])).hidden, front.token.weight[None, 1:3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "terms, why",
    [
        ({"scale": 2.0}, "token rows are scaled"),
        ({"segment": torch.randn(2, 4), "segment_ids": None}, "segments are added"),
        ({"dropout": 0.5}, "dropout comes between sum and norm"),
    ],
    ids=["scale", "segment", "dropout"],
)
def test_distinct_refuses(terms, why, backend):
    """Terms that it does not compute."""
    terms = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in terms.items()}
    ids, token, weight = (
        torch.tensor([[0, 1]], device=DEVICE),
        torch.randn(3, 4, device=DEVICE),
        torch.randn(12, 4, device=DEVICE),
    )
    with (
        pyembed.backend(backend),
        pyembed.plan("distinct"),
        pytest.raises(RuntimeError, match=f"'distinct' cannot run here: {why}"),
    ):
        F.embed_qkv(ids, token, weight, num_heads=1, **terms)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_terms(backend):
    ids, token, segment = torch.tensor([[0, 1]]), torch.randn(3, 4), torch.randn(2, 4)
    bad = {
        "segment_ids: expected None": {"segment_ids": ids},
        "segment_ids: expected shape": {"segment": segment, "segment_ids": torch.tensor([0, 1, 1])},
        "segment_ids: expected dtype": {"segment": segment, "segment_ids": torch.tensor([0.0, 1.0])},
        r"segment_ids: expected values in \[0, 2\).*got 2": {"segment": segment, "segment_ids": torch.tensor([0, 2])},
        "segment: expected shape": {"segment": segment[:, :3]},
        "segment: expected a row for each": {"segment": segment[:0]},
        "position_ids: expected values": {
            "position": positions.sinusoidal_steps(4),
            "position_ids": torch.tensor([0, -1]),
        },
        "segment: expected dtype": {"segment": segment.double()},
        "scale: expected a number": {"scale": torch.tensor(2.0)},
        r"dropout: expected a probability in \[0, 1\], got 1.5": {"dropout": 1.5},
        "position: expected shape": {"position": torch.zeros(3, 4, dtype=torch.long)},
    }
    with pyembed.backend(backend):
        for message, options in bad.items():
            with pytest.raises((TypeError, ValueError, IndexError), match=message):
                F.embed(ids, token, **options)
            with pytest.raises((TypeError, ValueError, IndexError), match=message):
                F.embed_qkv(ids, token, torch.randn(12, 4), num_heads=1, **options)
    with pytest.raises(ValueError, match="combine: expected 'sum'"):
        pyembed.EmbeddingQKV(3, 4, 1, position=None, combine="concat")
    for offset, position in ((2, "rotary"), (-1, "learned")):
        with pytest.raises(ValueError, match="position_offset: expected"):
            pyembed.EmbeddingQKV(3, 4, 1, position=position, position_offset=offset)
