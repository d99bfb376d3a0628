"""Fast paths for small calls, where Python's overhead dominates, give what the general way gives: same bits, same errors.

EmbeddingQKV reads stock modules directly (parts.HoldsParts._is_plain, _read_plain), functional.embedding runs PyTorch's
operator without a look at the arguments (functional._is_plain_lookup), and a call like one before it is neither checked nor
planned again (run.run), whatever may have changed since.
"""

import contextlib
import copy
import itertools

import pytest
import torch
from conftest import DEVICE
from torch import nn

import pyembed
import pyembed.functional as F
from pyembed import positions, reference, run
from pyembed.modules import parts
from pyembed.plans import distinct_cpu, operators

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="calls on a CPU")
V, D, L, H = 40, 32, 16, 4
READERS = ("_read_plain", "_read_weights", "_read_modules")


@pytest.fixture(autouse=True)
def without_memory(monkeypatch):
    monkeypatch.setattr(run, "_kinds", {})


@pytest.fixture
def readers(monkeypatch):
    """By which functions the modules were read since the last question."""
    seen = []

    def watched(name):
        function = getattr(parts.HoldsParts, name)
        return lambda self, *args: seen.append(name) or function(self, *args)

    for name in READERS:
        monkeypatch.setattr(parts.HoldsParts, name, watched(name))

    def answer():
        found = list(seen)
        seen.clear()
        return found

    return answer


@pytest.fixture
def is_plain_lookup(monkeypatch):
    """What functional._is_plain_lookup answered since the last question."""
    seen, function = [], F._is_plain_lookup
    monkeypatch.setattr(F, "_is_plain_lookup", lambda *args: seen.append(function(*args)) or seen[-1])

    def answer():
        found = list(seen)
        seen.clear()
        return found

    return answer


@pytest.fixture
def remembered(monkeypatch):
    """Whether all calls since the last question ran as calls before them."""
    seen, run_first = [], run._run_first
    monkeypatch.setattr(run, "_run_first", lambda *args: seen.append(args) or run_first(*args))

    def answer():
        found = not seen
        seen.clear()
        return found

    return answer


def read_by(patch, reader):
    """From here on modules are read by this function or one that is more general."""
    if reader != "_read_plain":
        patch.setattr(parts.HoldsParts, "_is_plain", lambda self: False)
    if reader == "_read_modules":
        patch.setattr(parts.HoldsParts, "_foreign", lambda *_: "a test asks for it")


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
def test_the_same_bits(norm, position, readers, monkeypatch):
    """With gradients, in a first and in a second call, by each way to read the modules, and by a plan that was forced."""
    front = fronts(norm, position)
    for ids, given in itertools.product(IDS, (False, True)):
        places, found = torch.randint(L, ids.shape) if given and position is not None else None, []
        for reader, plan in (*((reader, "auto") for reader in READERS), ("_read_plain", "one_pass")):
            with monkeypatch.context() as patch, pyembed.plan(plan):
                read_by(patch, reader)
                for _ in range(2):
                    front.zero_grad()
                    outputs = front(ids, places)
                    sum((x * torch.arange(x.numel()).view(x.shape).cos()).sum() for x in outputs).backward()
                    found.append([*outputs, *(p.grad for p in front.parameters())])
            # Sines are a module of ours, which the fast reading leaves to the general one.
            of_sines = reader == "_read_plain" and position == "sinusoidal"
            assert readers() == ["_read_weights" if of_sines else reader] * 2
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert torch.equal(a, b), (ids.shape, given)


def test_functions(is_plain_lookup):
    """Twice each: the second sum runs as the first one was found to."""
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
        for _ in range(2):
            assert torch.equal(call(), expected)
    assert is_plain_lookup() == [True, True]


def zeros(*shape, **options):
    return torch.zeros(*shape, dtype=torch.int64, **options)


ONE = torch.tensor([[5]])
REFUSED = {
    "an id without a row": ({"ids": torch.tensor([[V]])}, IndexError, "ids: expected values"),
    "a negative id": ({"ids": -ONE}, IndexError, "ids: expected values"),
    "a position without a row": ({"position_ids": ONE + L}, IndexError, "position_ids: expected values"),
    "too long": ({"ids": zeros(1, L + 1)}, IndexError, "sequence length"),
    "floating ids": ({"ids": torch.ones(1, 1)}, TypeError, "ids: expected"),
    "ids that are a number": ({"ids": 5}, TypeError, "ids: expected a Tensor, got int"),
    "no ids": ({"ids": None}, TypeError, "ids: expected a Tensor, got NoneType"),
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


@pytest.mark.sample
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_in_every_call(case, backend):
    """In a first call, again in a second one, and after calls that were right."""
    wrong, error, message = REFUSED[case]
    arguments = {
        "ids": ONE, "token": torch.randn(V, D), "weight": torch.randn(64, D), "bias": torch.randn(64), "num_heads": 4,
        "num_kv_heads": 2, "position": torch.randn(L, D), "norm": "layer", "norm_weight": torch.ones(D),
    }  # fmt: skip
    right = [arguments]
    if "position_ids" in wrong or isinstance(wrong.get("ids"), torch.Tensor):
        fits = {"ids": zeros(*wrong.get("ids", ONE).shape[:1], wrong.get("position_ids", ONE).shape[-1])}
        right.append(arguments | wrong | fits | {"position_ids": zeros(*fits["ids"].shape)})
    with pyembed.backend(backend):
        for before in ([], [], right):
            for call in before:
                F.embed_qkv(**call)
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
    for _ in range(2):
        with pytest.raises(error, match=message):
            F.embed(zeros(2, 3), torch.randn(V, D), position)
        F.embed(zeros(2, 3), torch.randn(V, D), torch.randn(L, D))


def message_of(call):
    with pytest.raises((IndexError, RuntimeError, TypeError, ValueError)) as caught:
        call()
    return caught.type, str(caught.value)


CALLS = {
    "an id without a row": (torch.tensor([[5, V]]),),
    "a negative id": (torch.tensor([[5, -1]]),),
    "a position without a row": (ONE, ONE + L),
    "a negative position": (ONE, -ONE),
    "too long": (zeros(1, L + 1),),
    "floating ids": (torch.ones(1, 1),),
    "ids of 16 bits": (torch.ones(1, 1, dtype=torch.int16),),
    "a list": ([[5]],),
    "ids on meta": (zeros(1, 1, device="meta"),),
    "positions on meta": (ONE, zeros(1, 1, device="meta")),
    "floating positions": (ONE, torch.ones(1, 1)),
    "positions that broadcast": (zeros(2, 3), zeros(2, 1)),
}


@pytest.mark.parametrize("position", ["learned", "rotary", None])
@pytest.mark.parametrize("case", CALLS)
def test_modules_have_the_same_errors(case, position, monkeypatch):
    """In a first call and after a right one."""
    if case == "too long" and position is None:
        pytest.skip("nothing has a length")
    front, found = fronts(position=position), []
    for reader in ("_read_plain", "_read_weights"):
        with monkeypatch.context() as patch:
            read_by(patch, reader)
            for _ in range(2):
                found.append(message_of(lambda: front(*CALLS[case])))
                front(ONE)
    assert len(set(found)) == 1 and ("expected" in found[0][1] or case == "too long")


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


OTHERWISE = {  # the change, and by what the module is read then
    "a hook": (hooked, "_read_modules"),
    "a forward of its own": (with_own_forward, "_read_modules"),
    "a subclass": (subclassed, "_read_modules"),
    "max_norm": (lambda front: setattr(front.token, "max_norm", 0.5), "_read_modules"),
    "positions with a padding_idx": (lambda front: setattr(front.position, "padding_idx", 0), "_read_modules"),
    "a parametrization": (parametrised, "_read_weights"),
    "a scale": (lambda front: setattr(front, "scale", 2.0), "_read_weights"),
    "dropout": (dropping, "_read_plain"),
    "heads first": (lambda front: setattr(front, "heads_first", True), "_read_plain"),
    "batch invariance": (lambda front: setattr(front, "batch_invariant", True), "_read_plain"),
    "a policy": (lambda front: setattr(front, "id_policy", "clamp"), "_read_plain"),
    "a table": (lambda front: front.requires_grad_(False) and front.build_table(), None),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_more_than_weights_is_read_by(name, readers, monkeypatch):
    """The general reading gives the same bits, and what changed shows."""
    front, ids = fronts(), torch.tensor([[5, 7]])
    before = front(ids)
    assert readers() == ["_read_plain"]
    change, reader = OTHERWISE[name]
    change(front)
    readers()
    torch.manual_seed(1)
    after = front(ids)
    assert readers() == ([] if reader is None else [reader])
    same = name in ("batch invariance", "a policy", "a table", "positions with a padding_idx")
    assert same == all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True))
    read_by(monkeypatch, "_read_weights")
    torch.manual_seed(1)
    for a, b in zip(front(ids), after, strict=True):
        assert torch.equal(a, b)


def test_weights_that_are_no_parameters(readers):
    """As replicas of nn.DataParallel have them, and FSDP with its flat parameters: attributes, or buffers."""
    weights = [(name, "weight") for name in ("token", "position", "norm", "qkv")] + [("norm", "bias"), ("qkv", "bias")]
    for (name, weight), register in itertools.product(weights, (setattr, nn.Module.register_buffer)):
        front, ids = fronts(), torch.tensor([[5, 7]])
        expected, module = front(ids), getattr(front, name)
        value = getattr(module, weight).detach()
        delattr(module, weight)
        register(module, weight, value)
        for a, b in zip(front(ids), expected, strict=True):
            assert torch.equal(a, b), (name, weight)
        assert weight == "bias" or readers() == ["_read_plain", "_read_weights"]
        readers()


META = {"weight": torch.ones(64, D, device="meta"), "position_ids": zeros(1, 1, device="meta")}
META |= {"position": torch.ones(L, D, device="meta"), "norm_weight": torch.ones(D, device="meta")}


@pytest.mark.parametrize("name", META)
def test_meta_beside_a_cpu(name):
    """PyTorch's operators take some of them, and return what lay in memory."""
    right = {"position": torch.randn(L, D), "norm_weight": torch.ones(D), "weight": torch.randn(64, D)}
    arguments, options = right | {name: META[name]}, {"num_heads": 4, "num_kv_heads": 2, "norm": "rms"}
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name}: expected device cpu"):
            F.embed_qkv(ONE, torch.randn(V, D), **options, **arguments)
        F.embed_qkv(ONE, torch.randn(V, D), **options, **(right | ({"position_ids": ONE} if name == "position_ids" else {})))
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


def test_results_may_be_changed_in_place():
    front = fronts(position="rotary")
    ids = torch.tensor([[5, 7]])
    for name in pyembed.HiddenQKV._fields:
        changed, plain = getattr(front(ids), name).mul_(2.0), getattr(front(ids), name)
        assert torch.equal(changed, 2.0 * plain)
        found, expected = (torch.autograd.grad(x.square().sum(), front.token.weight)[0] for x in (changed, 2.0 * plain))
        torch.testing.assert_close(found, expected)


class Ids(torch.Tensor):
    """A subclass, which may bring operators of its own."""


LOOKUPS = {  # arguments, and whether PyTorch's operator runs at once; None: it is not asked
    "ids of 64 bits": ({}, True),
    "ids of 32 bits": ({"ids": IDS[1]}, True),
    "no ids": ({"ids": IDS[3]}, True),
    "one id": ({"ids": torch.tensor(5)}, True),
    "a padding_idx": ({"padding_idx": 5}, True),
    "trust": ({"id_policy": "trust"}, True),
    "doubles": ({"weight": torch.randn(V, D, dtype=torch.float64)}, True),
    "a padding_idx from the end": ({"padding_idx": -1}, False),
    "clamp": ({"id_policy": "clamp"}, False),
    "zero": ({"id_policy": "zero"}, False),
    "a subclass": ({"ids": ONE.as_subclass(Ids)}, False),
    "max_norm": ({"max_norm": 100.0}, None),
    "frequencies": ({"scale_grad_by_freq": True}, None),
    "sparse": ({"sparse": True}, None),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups(name, is_plain_lookup):
    """Bits and gradients of torch.nn.functional.embedding."""
    given, expected = LOOKUPS[name]
    arguments = {"ids": torch.tensor([[5, 39, 5]]), "weight": torch.randn(V, D)} | given
    arguments["weight"] = arguments["weight"].detach().requires_grad_()
    ids, weight = arguments["ids"], arguments["weight"]
    ours = F.embedding(**arguments)
    stock = {key: value for key, value in arguments.items() if key not in ("ids", "id_policy")}
    theirs = nn.functional.embedding(ids, **stock)
    assert is_plain_lookup() == ([] if expected is None else [expected]) and torch.equal(ours, theirs)
    if ours.numel():
        grad = torch.randn(ours.shape, dtype=ours.dtype)
        grads = [torch.autograd.grad(x, weight, grad)[0].to_dense() for x in (ours, theirs)]
        assert torch.equal(*grads)


def test_lookups_by_kernels(is_plain_lookup, monkeypatch):
    """Bits and gradients of PyTorch's, before and after it."""
    weight, launched, launcher = torch.randn(V, D, requires_grad=True), [], operators.launcher
    monkeypatch.setattr(operators, "launcher", lambda *args: launched.append(args) or launcher(*args))
    for backend in ("auto", "triton", "torch", "triton", "auto"):
        for given in ({}, {"padding_idx": 5}, {"padding_idx": 5 - V}):
            launched.clear()
            with pyembed.backend(backend):
                found = F.embedding(ONE, weight, **given)
                assert len(launched) == (backend == "triton")
            (grad,) = torch.autograd.grad(found.square().sum(), weight)
            assert torch.equal(found, weight[ONE]) and grad.any() == (not given)
    is_plain_lookup()
    with pyembed.id_policy("clamp"):
        assert torch.equal(F.embedding(ONE + V, weight), weight[V - 1 :][None]) and is_plain_lookup() == [False]


WRONG_LOOKUPS = {
    "an id without a row": {"ids": torch.tensor([5, V])},
    "a negative id": {"ids": torch.tensor([[-1]])},
    "an id beyond 32 bits": {"ids": torch.tensor([2**40])},
    "floating ids": {"ids": torch.ones(1)},
    "ids of 16 bits": {"ids": torch.ones(1, dtype=torch.int16)},
    "a list": {"ids": [5]},
    "a number": {"ids": 5},
    "ids on meta": {"ids": zeros(1, device="meta")},
    "a table on meta": {"weight": torch.ones(V, D, device="meta")},
    "a table of no dimension": {"weight": torch.ones(()), "padding_idx": 0},
    "a table of one dimension": {"weight": torch.ones(V)},
    "a table of three dimensions": {"weight": torch.ones(V, D, 2)},
    "a table without rows": {"weight": torch.ones(0, D)},
    "a list for a table": {"weight": [[1.0]]},
    "a padding_idx beyond": {"padding_idx": V},
    "a padding_idx before": {"padding_idx": -V - 1},
    "another policy": {"id_policy": "ignore"},
}


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("case", WRONG_LOOKUPS)
def test_wrong_lookups_have_the_same_errors(case, backend, monkeypatch):
    """Also after a right one."""
    right = {"ids": ONE, "weight": torch.randn(V, D)}
    arguments = right | WRONG_LOOKUPS[case]
    with pyembed.backend(backend):
        fast = [message_of(lambda: F.embedding(**arguments))]
        F.embedding(**right)
        fast.append(message_of(lambda: F.embedding(**arguments)))
        monkeypatch.setattr(F, "_is_plain_lookup", lambda *args: False)
        assert {*fast} == {message_of(lambda: F.embedding(**arguments))} and "expected" in fast[0][1]


# A call like one before it


def randn(*shape):
    return torch.randn(shape, requires_grad=True)


def draw_ids(size, *shape):
    return torch.randint(size, shape)


def of_embed(**others):
    return "embed", {"token": randn(V, D)} | others


def of_qkv(**others):
    given = {"token": randn(V, D), "weight": randn(64, D), "bias": randn(64), "num_heads": 4, "num_kv_heads": 2}
    return "embed_qkv", given | {"norm": "layer", "norm_weight": randn(D), "norm_bias": randn(D)} | others


def turning(**others):
    return of_qkv(norm="rms", norm_bias=None, bias=None, **others)


def angles(*shape):
    angle = torch.cat([torch.randn(*shape, 4)] * 2, -1)
    return angle.cos(), angle.sin()


KINDS = {
    "a sum": lambda: of_embed(position=randn(L, D)),
    "a sum with positions": lambda: of_embed(position=randn(L, D), position_ids=draw_ids(L, 2, 5), padding_idx=3),
    "every term": lambda: of_embed(
        position=randn(L, D), segment=randn(2, D), segment_ids=draw_ids(2, 2, 5), scale=3.0, dropout=0.5
    ),
    "computed sines": lambda: of_embed(position=positions.sinusoidal_steps(D), position_ids=draw_ids(99, 5)),
    "LayerNorm": lambda: of_qkv(position=randn(L, D)),
    "positions given": lambda: of_qkv(position=randn(L, D), position_ids=draw_ids(L, 1, 5), eps=0.1),
    "no norm": lambda: of_qkv(norm=None, norm_weight=None, norm_bias=None, padding_idx=-1),
    "a Rotary": lambda: turning(rotary=pyembed.Rotary(8, L)),
    "a Rotary by position_ids": lambda: turning(rotary=pyembed.Rotary(8, L), position_ids=draw_ids(L, 2, 5)),
    "cosines and sines": lambda: turning(rotary=angles(5)),
    "of each token": lambda: turning(rotary=angles(2, 5), heads_first=True),
    "norms of heads": lambda: turning(query_norm=randn(8), key_norm=randn(8), rotary=pyembed.Rotary(8, L)),
    "two queries": lambda: of_qkv(query_biases=(randn(4, 8), randn(4, 8))),
    "a weight of other strides": lambda: of_qkv(weight=torch.randn(D, 64).t().requires_grad_()),
    "terms and projection": lambda: of_qkv(segment=randn(2, D), scale=0.5, dropout=0.5),
}
DROPPING = ("every term", "terms and projection")  # whose mask is another by the kernels


def by_kernels(plan, kinds, by_default):
    for kind in kinds:
        yield pytest.param(kind, "triton", plan, marks=() if kind in by_default else pytest.mark.full)


@pytest.mark.parametrize(
    "kind, backend, plan",
    [
        *((kind, "auto", "auto") for kind in KINDS),
        *((kind, "auto", "distinct") for kind in list(KINDS)[4:-1]),
        *by_kernels("one_pass", [kind for kind in KINDS if kind not in DROPPING], ("a sum", "positions given")),
        *by_kernels("distinct", ("LayerNorm", "a Rotary by position_ids"), ()),
    ],
)
def test_a_call_like_one_before(kind, backend, plan, remembered):
    """Of other ids and values: the reference's results and gradients, by PyTorch's operators to the last bit."""
    for seed in range(3):
        torch.manual_seed(seed)
        (name, arguments), ids, found = KINDS[kind](), draw_ids(V, 2, 5), []
        pairs = [x for value in arguments.values() for x in (value if isinstance(value, tuple) else (value,))]
        leaves = [x for x in pairs if isinstance(x, torch.Tensor) and x.requires_grad]
        for functions in (F, reference):
            with pyembed.backend(backend), pyembed.plan(plan):
                torch.manual_seed(seed)
                outputs = getattr(functions, name)(ids, **arguments)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            grads = torch.autograd.grad(sum((x * x.detach().cos()).sum() for x in outputs), leaves)
            found.append([*outputs, *grads])
        assert remembered() == (seed > 0)
        for ours, theirs in zip(*found, strict=True):
            if (backend, plan) == ("auto", "auto"):
                assert torch.equal(ours, theirs)
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def stock(front, ids, places=None):
    """What a front end of learned positions stands for, by its modules."""
    places = torch.arange(ids.shape[-1]) if places is None else places
    hidden = front.token(ids) * (1.0 if front.scale is None else front.scale)
    hidden = front.dropout(hidden if front.position is None else hidden + front.position(places + front.position_offset))
    normed = hidden if front.norm is None else front.norm(hidden)
    heads = front.qkv(normed).unflatten(-1, (-1, 8)).split((front.num_heads, front.num_kv_heads, front.num_kv_heads), -2)
    return hidden, *(x.transpose(-3, -2) if front.heads_first else x for x in heads)


def assert_stock(front, ids, close=torch.equal):
    """In two calls, with gradients where they are wanted; as dropout draws them from one seed."""
    for _ in range(2):
        found = []
        for function in (front, lambda ids: stock(front, ids)):
            front.zero_grad()
            torch.manual_seed(2)
            outputs = function(ids)
            loss = sum((x * torch.arange(x.numel()).view(x.shape).cos().to(x)).sum() for x in outputs)
            if loss.requires_grad:
                loss.backward()
            found.append([*outputs, *(p.grad for p in front.parameters() if p.grad is not None)])
        for ours, theirs in zip(*found, strict=True):
            assert ours.requires_grad == theirs.requires_grad and ours.dtype == theirs.dtype and close(ours, theirs)


def on(name, value):
    """A change of an attribute, by its path within the front end."""
    *path, last = name.split(".")

    def change(front):
        for part in path:
            front = getattr(front, part)
        setattr(front, last, value() if callable(value) else value)

    return change


def in_place(front):
    with torch.no_grad():
        for parameter in front.parameters():
            parameter.mul_(-1.5).add_(0.25)


def patched(name):
    def change(front):
        module = getattr(front, name)
        forward = type(module).forward
        module.forward = lambda *inputs: 2 * forward(module, *inputs)

    return change


def with_hook(name, register):
    hooks = {
        "register_forward_hook": lambda module, inputs, output: 2 * output,
        "register_forward_pre_hook": lambda module, inputs: (2 * inputs[0],),
        "register_full_backward_hook": lambda module, grads, outputs: tuple(None if x is None else 3 * x for x in grads),
        "register_full_backward_pre_hook": lambda module, grads: tuple(3 * x for x in grads),
    }
    return lambda front: getattr(getattr(front, name), register)(hooks[register])


CHANGES = {
    "values in place": in_place,
    "a new parameter": on("token.weight", lambda: nn.Parameter(torch.randn(V, D))),
    "new data": on("qkv.weight.data", lambda: torch.randn(64, D)),
    "a longer table": on("token", lambda: nn.Embedding(V + 3, D)),
    "another padding_idx": on("token.padding_idx", 5),
    "no padding_idx": on("token.padding_idx", None),
    "doubles": lambda front: front.double(),
    "half": lambda front: front.half(),
    "frozen": lambda front: front.requires_grad_(False),
    "a frozen table": lambda front: front.token.requires_grad_(False),
    "a frozen projection": lambda front: front.qkv.requires_grad_(False),
    "another norm": on("norm", lambda: nn.RMSNorm(D, 0.1)),
    "no norm": on("norm", None),
    "another eps": on("norm.eps", 0.5),
    "no positions": on("position", None),
    "no bias": lambda front: front.qkv.register_parameter("bias", None),
    "a scale": on("scale", 2.0),
    "dropout": on("dropout.p", 0.5),
    "dropout in eval mode": lambda front: on("dropout.p", 0.5)(front.eval()),
    "heads first": on("heads_first", True),
    "other heads": lambda front: [on("num_heads", 6)(front), on("num_kv_heads", 1)(front)],
    "max_norm": on("token.max_norm", 1.0),
    "frequencies": on("token.scale_grad_by_freq", True),
    "a hooked projection": with_hook("qkv", "register_forward_hook"),
    "a hooked table": with_hook("token", "register_forward_hook"),
    "hooked inputs": with_hook("qkv", "register_forward_pre_hook"),
    "hooked gradients": with_hook("qkv", "register_full_backward_hook"),
    "hooked gradients of outputs": with_hook("norm", "register_full_backward_pre_hook"),
    **{f"another forward of {name}": patched(name) for name in ("token", "position", "norm", "qkv")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_shows_in_the_next_call(change):
    """And is gone in a call by what was there before."""
    front, ids = fronts(), torch.tensor([[5, 7, 5], [3, 0, 39]])
    before = copy.deepcopy(front)
    assert_stock(front, ids)
    CHANGES[change](front)
    assert_stock(front, ids)
    assert_stock(before, ids)


def equals_stock(front, ids, **tolerance):
    for _ in range(2):
        found, expected = front(ids), stock(front, ids)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad
            assert ours.is_inference() == theirs.is_inference()
            torch.testing.assert_close(ours, theirs, **tolerance)


EXACT, CLOSE = {"rtol": 0, "atol": 0}, {"rtol": 1e-4, "atol": 1e-4}
CONTEXTS = {
    "no_grad": (torch.no_grad, EXACT),
    "inference_mode": (torch.inference_mode, EXACT),
    "autocast to bfloat16": (lambda: torch.autocast("cpu", torch.bfloat16), EXACT),
    "autocast to float16": (lambda: torch.autocast("cpu", torch.float16), EXACT),
    "kernels": (lambda: pyembed.backend("triton"), CLOSE),
    "PyTorch's operators": (lambda: pyembed.backend("torch"), EXACT),
    "distinct": (lambda: pyembed.plan("distinct"), CLOSE),
    "one_pass": (lambda: pyembed.plan("one_pass"), EXACT),
    "clamp": (lambda: pyembed.id_policy("clamp"), EXACT),
    "zero": (lambda: pyembed.id_policy("zero"), EXACT),
    "trust": (lambda: pyembed.id_policy("trust"), EXACT),
    "debug": (pyembed.debug, EXACT),
}


@pytest.mark.sample
@pytest.mark.parametrize("first", CONTEXTS)
@pytest.mark.parametrize("second", CONTEXTS)
def test_what_was_asked_for_is_done(first, second, remembered, monkeypatch):
    """Each context in turn, and none between: nothing found in one serves another."""
    front, ids, ways = fronts(), torch.tensor([[5, 7]]), []
    launcher, forward = operators.launcher, distinct_cpu.forward
    monkeypatch.setattr(operators, "launcher", lambda *args: ways.append("kernels") or launcher(*args))
    monkeypatch.setattr(distinct_cpu, "forward", lambda *args: ways.append("distinct") or forward(*args))
    for name in (None, first, None, second, first):
        context, tolerance = (contextlib.nullcontext, EXACT) if name is None else CONTEXTS[name]
        ways.clear()
        with context():
            equals_stock(front, ids, **tolerance)
        assert ways == ([name] * 2 if name in ("kernels", "distinct") else [])
    remembered()
    front(ids)
    with CONTEXTS[first][0]():
        front(ids)
        assert remembered()


@pytest.mark.sample
@pytest.mark.parametrize(
    "backend, plan", [("auto", "auto"), ("auto", "distinct"), ("triton", "one_pass"), ("triton", "distinct")]
)
@pytest.mark.parametrize("by_modules", [False, True])
def test_ids_are_looked_at_in_every_call(backend, plan, by_modules, remembered):
    """Also where the earlier ones were right, and again after those that were not; policies apply to each call."""
    if by_modules and (backend, plan) != ("auto", "auto"):
        pytest.skip("modules that are called run by no other plan")
    front, ids = fronts(), torch.tensor([[5, 7]])
    if by_modules:
        front.norm.register_forward_hook(lambda *args: None)
    with pyembed.backend(backend), pyembed.plan(plan):
        good = [x.detach().clone() for x in front(ids)]
        for wrong, places, message in (
            ([[5, V]], None, rf"^ids: expected values in \[0, {V}\), the rows of token; got {V} at \(0, 1\)$"),
            ([[-1, 7]], None, r"^ids: .* got -1 at \(0, 0\)$"),
            ([[5, 7]], [[0, L]], rf"^position_ids: expected values in \[0, {L}\), the rows of position; got {L} at \(0, 1\)$"),
        ):
            places = None if places is None else torch.tensor(places)
            if places is not None:
                front(ids, places.clamp(max=L - 1))
            remembered()
            with pytest.raises(IndexError, match=message):
                front(torch.tensor(wrong), places)
            assert remembered()
            for a, b in zip(front(ids), good, strict=True):
                assert torch.equal(a, b)
        for own in (False, True):
            front.id_policy = "clamp" if own else None
            with contextlib.nullcontext() if own else pyembed.id_policy("clamp"):
                for wrong, near in ([[5, 7]], [[5, 7]]), ([[5, V]], [[5, V - 1]]), ([[-1, 7]], [[0, 7]]):
                    for a, b in zip(front(torch.tensor(wrong)), front(torch.tensor(near)), strict=True):
                        assert torch.equal(a, b)
        front.id_policy = None
        with pytest.raises(IndexError, match=f"got {V}"):
            front(torch.tensor([[5, V]]))
        if plan != "distinct":
            with pyembed.id_policy("zero"):
                front(ids)
                assert torch.equal(front(torch.tensor([[V, 7]])).hidden[0, 0], front.position.weight[0])


@pytest.mark.parametrize("backend, plan", [("auto", "auto"), ("auto", "distinct"), ("triton", "one_pass")])
def test_gradients_come_and_go(backend, plan, remembered):
    """By the grad mode, and by what is frozen meanwhile: the composition's in every call."""
    front, ids = fronts(), torch.tensor([[5, 7]])
    contexts = {"no_grad": torch.no_grad, "grad": torch.enable_grad, "inference_mode": torch.inference_mode}
    for step, name in enumerate(("no_grad", "grad", "inference_mode", "grad", "frozen", "grad", "no_grad", "frozen")):
        front.requires_grad_(name != "frozen")
        with contexts.get(name, torch.enable_grad)():
            results = []
            for function in (front, lambda ids: stock(front, ids)):
                with pyembed.backend(backend), pyembed.plan(plan):
                    outputs = function(ids)
                front.zero_grad()
                loss = sum((x * x.detach().cos()).sum() for x in outputs)
                assert loss.requires_grad == (name == "grad") and outputs[1].is_inference() == (name == "inference_mode")
                if name == "grad":
                    loss.backward()
                results.append([*outputs, *(p.grad for p in front.parameters() if p.grad is not None)])
        assert remembered() == (step in (3, 5, 6, 7))
        torch.testing.assert_close(*results, **CLOSE)


REFUSED_BY_DISTINCT = {
    "a scale": on("scale", 2.0),
    "dropout": dropping,
    "batch_invariant": on("batch_invariant", True),
    "'zero'": on("id_policy", "zero"),
    "positions are computed": on("position", lambda: positions.Sinusoidal(None, D)),
    "autocast": None,
}


@pytest.mark.parametrize("name", REFUSED_BY_DISTINCT)
def test_a_plan_refuses_in_every_call(name):
    """Also after calls that it could run, which it can again then."""
    front, ids, change = fronts(), torch.tensor([[5, 7]]), REFUSED_BY_DISTINCT[name]
    before = copy.deepcopy(front)
    if change is not None:
        change(front)
    with pyembed.plan("distinct"):
        good = before(ids)
        with torch.autocast("cpu", enabled=change is None):
            for _ in range(2):
                with pytest.raises(RuntimeError, match="plan: 'distinct' cannot run here: "):
                    front(ids)
        for a, b in zip(before(ids), good, strict=True):
            assert torch.equal(a, b)


def test_given_distinct_ids_are_looked_at_in_every_call():
    front, ids, others = fronts(), torch.tensor([[5, 7, 5]]), torch.tensor([[7, 9, 9]])
    for plan in ("auto", "distinct"):
        with pyembed.plan(plan):
            for x in (ids, others):
                equal = front(x, distinct=pyembed.DistinctIds(*x.unique(return_inverse=True)))
                torch.testing.assert_close(tuple(equal), stock(front, x), **CLOSE)
            with pytest.raises(ValueError, match="distinct: expected the ids of this batch, 7 at"):
                front(others, distinct=pyembed.DistinctIds(*ids.unique(return_inverse=True)))


def test_devices_are_looked_at_in_every_call():
    """Of modules that are called too, whose weights no signature holds."""
    for name, register in itertools.product(("position", "norm", "qkv"), (False, True)):
        front, ids = fronts(), torch.tensor([[5, 7]])
        if register:
            getattr(front, name).register_forward_hook(lambda *args: None)
        front(ids), front(ids)
        getattr(front, name).to("meta")
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"^({name}|norm_|weight).*: expected device cpu, that of token; got meta"):
                front(ids)


def test_one_table_in_two_places(remembered):
    """As many rows as positions, then two tables: the second is no first one's."""
    table, ids = torch.randn(V, D), torch.randint(V, (2, 3))
    for token, position in ((table, table), (table, torch.randn(V, D)), (torch.randn(V, D), table), (table, table)):
        for _ in range(2):
            assert torch.equal(F.embed(ids, token, position), token[ids] + position[:3])


def test_a_dense_gradient_of_a_large_table_is_the_plans_to_make(monkeypatch):
    """The plans are weighed in every call that wants one, in no other."""
    weighed, weigh_now = [], run.weigh_now
    monkeypatch.setattr(run, "weigh_now", lambda call: weighed.append(call) or weigh_now(call))
    front = pyembed.EmbeddingQKV(50_000, D, H, max_length=L)
    for count in (1, 2, 3):
        front(torch.tensor([[5]]))
        assert len(weighed) == count
        with torch.no_grad():
            front(torch.tensor([[5]]))
        assert len(weighed) == count
