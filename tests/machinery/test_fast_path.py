"""pyembed/thin.py: the same bits as the long way, and the long way wherever there is more to it."""

import itertools

import pytest
import torch
from conftest import DEVICE
from torch import nn

import pyembed
import pyembed.functional as F
from pyembed import thin

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="calls on a CPU")
V, D, L, H = 40, 32, 16, 4


@pytest.fixture
def served(monkeypatch):
    """Whether the last call was answered here."""
    seen = []

    def watched(function):
        def call(*args):
            found = function(*args)
            seen.append(found is not None)
            return found

        return call

    for name in ("embedding", "embed", "embed_qkv"):
        monkeypatch.setattr(thin, name, watched(getattr(thin, name)))

    def answer():
        found = any(seen)
        seen.clear()
        return found

    return answer


def fronts(norm="layer", position="learned", bias=True, rotary=None, kv_heads=2):
    torch.manual_seed(0)
    front = pyembed.EmbeddingQKV(
        V, D, H, num_kv_heads=kv_heads, max_length=L, norm=norm, position=position, bias=bias, rotary=rotary, padding_idx=3
    )
    for parameter in front.parameters():
        nn.init.normal_(parameter)
    return front


IDS = [
    torch.tensor([[5]]),
    torch.randint(V, (3, 7), dtype=torch.int32),
    torch.randint(V, (9,)),
    torch.zeros(2, 0, dtype=torch.long),
]


@pytest.mark.parametrize("norm, position", [*itertools.product(["layer", "rms"], ["learned", "sinusoidal", "rotary", None])])
def test_the_same_bits(served, norm, position):
    """With gradients, by module and by function."""
    front = fronts(norm, position)
    for ids, given in itertools.product(IDS, (False, True)):
        places = torch.randint(L, ids.shape) if given and position is not None else None
        found = []
        for long in (False, True):
            front.zero_grad()
            with pyembed.plan("one_pass" if long else "auto"):
                outputs = front(ids, places)
                sum((x * torch.arange(x.numel()).view(x.shape).cos()).sum() for x in outputs).backward()
            assert served() != long, (ids.shape, given)
            found.append([*outputs, *(p.grad for p in front.parameters())])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b), (ids.shape, given)


def test_functions(served):
    front, ids = fronts(), IDS[1]
    token, position = front.token.weight, front.position.weight
    places = torch.randint(L, ids.shape)
    summed = pyembed.TokenPositionEmbedding(V, D, L)
    summed.token.weight, summed.position.weight = token, position
    for call, expected in (
        (lambda: F.embedding(ids, token, 3), front.token(ids)),
        (lambda: F.embed(ids, token, position), front.token(ids) + front.position(torch.arange(7))),
        (lambda: F.embed(ids, token, position, places), front.token(ids) + front.position(places)),
        (lambda: summed(ids, places), front.token(ids) + front.position(places)),
    ):
        assert torch.equal(call(), expected) and served()


def zeros(*shape, **options):
    return torch.zeros(*shape, dtype=torch.int64, **options)


ONE = torch.tensor([[5]])
REFUSED = {
    "an id without a row": ({"ids": torch.tensor([[V]])}, IndexError, "ids: expected values"),
    "a negative id": ({"ids": -ONE}, IndexError, "ids: expected values"),
    "a position without a row": ({"position_ids": ONE + L}, IndexError, "position_ids: expected values"),
    "too long": ({"ids": zeros(1, L + 1)}, IndexError, "sequence length"),
    "floating ids": ({"ids": torch.ones(1, 1)}, TypeError, "ids: expected"),
    "ids on meta": ({"ids": zeros(1, 1, device="meta")}, ValueError, "ids: expected device"),
    "positions that broadcast": ({"ids": zeros(2, 3), "position_ids": zeros(2, 1)}, ValueError, "position_ids: expected shape"),
    "a bias that broadcasts": ({"bias": torch.ones(1)}, ValueError, "bias: expected shape"),
    "a table that broadcasts": ({"position": torch.ones(L, 1)}, ValueError, "position: expected shape"),
    "a table of another dtype": ({"position": torch.ones(L, D).double()}, TypeError, "position: expected dtype"),
    "a weight of another dtype": ({"weight": torch.ones(64, D).double()}, TypeError, "weight: expected dtype"),
    "a negative eps": ({"eps": -1.0}, ValueError, "eps: expected"),
    "a norm of another name": ({"norm": "batch"}, ValueError, "norm: expected"),
    "no norm with a weight": ({"norm": None}, ValueError, "norm_weight"),
    "heads that do not divide": ({"num_heads": 5, "num_kv_heads": 5}, ValueError, "weight: expected a multiple"),
    "a padding_idx without a row": ({"padding_idx": V}, ValueError, "padding_idx"),
    "a turn without a row": (
        {"position": None, "rotary": pyembed.Rotary(8, L), "position_ids": -ONE}, IndexError, "position_ids: expected values"
    ),
    "too many to turn": ({"position": None, "rotary": pyembed.Rotary(8, 4), "ids": zeros(1, 5)}, IndexError, "sequence length"),
    "too wide a turn": ({"rotary": pyembed.Rotary(16, L)}, ValueError, "rotary: expected an even width"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_has_the_long_ways_error(case):
    wrong, error, message = REFUSED[case]
    arguments = {
        "ids": ONE, "token": torch.randn(V, D), "weight": torch.randn(64, D), "bias": torch.randn(64), "num_heads": 4,
        "num_kv_heads": 2, "position": torch.randn(L, D), "norm": "layer", "norm_weight": torch.ones(D),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        F.embed_qkv(**(arguments | wrong))


@pytest.mark.parametrize(
    "position, error, message",
    [
        (torch.ones(1, D), IndexError, "sequence length"),  # a row that PyTorch would broadcast
        (torch.ones(L, 1), ValueError, "position: expected shape"),
        (torch.ones(D), ValueError, "position: expected shape"),
        (torch.ones(L, D).double(), TypeError, "position: expected dtype"),
    ],
)
def test_sums_that_pytorch_would_take(position, error, message):
    with pytest.raises(error, match=message):
        F.embed(zeros(2, 3), torch.randn(V, D), position)


def hooked(front):
    front.norm.register_forward_hook(lambda module, inputs, output: 2 * output)


def with_own_forward(front):
    front.qkv.forward = lambda x: 2 * nn.functional.linear(x, front.qkv.weight, front.qkv.bias)


def subclassed(front):
    front.norm.__class__ = type("Doubled", (nn.LayerNorm,), {"forward": lambda self, x: 2 * nn.LayerNorm.forward(self, x)})


def parametrised(front):
    nn.utils.parametrize.register_parametrization(front.qkv, "weight", nn.Softsign())


def dropping(front):
    front.dropout.p = 0.5


OTHERWISE = {
    "a hook": hooked,
    "a forward of its own": with_own_forward,
    "a subclass": subclassed,
    "a parametrization": parametrised,
    "dropout": dropping,
    "a scale": lambda front: setattr(front, "scale", 2.0),
    "heads first": lambda front: setattr(front, "heads_first", True),
    "batch invariance": lambda front: setattr(front, "batch_invariant", True),
    "max_norm": lambda front: setattr(front.token, "max_norm", 0.5),
    "a policy": lambda front: setattr(front, "id_policy", "clamp"),
    "a table": lambda front: front.requires_grad_(False) and front.build_table(),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_more_than_weights_takes_the_long_way(served, name):
    front, ids = fronts(), torch.tensor([[5, 7]])
    before = front(ids)
    assert served()
    OTHERWISE[name](front)
    after = front(ids)
    assert served() == (name == "a parametrization")  # whose weight, once computed, is one as any other
    same = name in ("batch invariance", "a policy", "a table")
    assert same == all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True))


def test_weights_that_are_no_parameters(served):
    """As replicas of nn.DataParallel have them, and FSDP with its flat parameters: attributes, or buffers."""
    for name in ("token", "position", "norm", "qkv"):
        for register in (setattr, nn.Module.register_buffer):
            front, ids = fronts(), torch.tensor([[5, 7]])
            expected, module = front(ids), getattr(front, name)
            weight = module.weight.detach()
            del module.weight
            register(module, "weight", weight)
            for a, b in zip(front(ids), expected, strict=True):
                assert torch.equal(a, b)


META = {"weight": torch.ones(64, D, device="meta"), "position_ids": zeros(1, 1, device="meta")}
META |= {"position": torch.ones(L, D, device="meta"), "norm_weight": torch.ones(D, device="meta")}


@pytest.mark.parametrize("name", META)
def test_meta_beside_a_cpu(name):
    """PyTorch's operators take some of them, and return what lay in memory."""
    arguments = {"position": torch.randn(L, D), "norm_weight": torch.ones(D), "weight": torch.randn(64, D)} | {name: META[name]}
    with pytest.raises(ValueError, match=f"{name}: expected device cpu"):
        F.embed_qkv(ONE, torch.randn(V, D), num_heads=4, num_kv_heads=2, norm="rms", **arguments)
    if name.startswith("position"):
        arguments = {key: arguments[key] for key in ("position", "position_ids") if key in arguments}
        with pytest.raises(ValueError, match=f"{name}: expected device cpu"):
            F.embed(ONE, torch.randn(V, D), **arguments)


@pytest.mark.parametrize(
    "table", [torch.ones(V, D, dtype=torch.int64), torch.ones(V, D, dtype=torch.complex64)], ids=["int", "complex"]
)
def test_sums_are_of_floats(table):
    assert torch.equal(F.embedding(ONE, table), nn.functional.embedding(ONE, table))
    with pytest.raises(TypeError, match="token: expected a floating dtype"):
        F.embed(ONE, table)


def test_results_may_be_changed_in_place(served):
    turned = fronts(position="rotary")(torch.tensor([[5, 7]]))
    assert served()
    turned.query.mul_(2.0).sum().backward()


@pytest.mark.parametrize("context", [pyembed.plan("distinct"), pyembed.id_policy("zero")])
def test_what_was_asked_for_is_done(served, context):
    front, ids = fronts(), torch.tensor([[5, 7]])
    with context:
        found = front(ids)
    assert not served()
    for a, b in zip(found, front(ids), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_dense_gradient_of_a_large_table_is_the_plans_to_make(served):
    front = pyembed.EmbeddingQKV(50_000, D, H, max_length=L)
    front(torch.tensor([[5]]))
    assert not served()
    with torch.no_grad():
        front(torch.tensor([[5]]))
    assert served()
