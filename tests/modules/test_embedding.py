"""Embedding is nn.Embedding: its promises, kept by PyTorch's operator and by the kernels, and PyTorch's own samples."""

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import CUDA, DEVICE
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn.utils import parametrizations, parametrize

import pyembed
from pyembed import functional as F
from pyembed.call import TABLES, Terms
from pyembed.plans import choice, one_pass, operators

BACKENDS = ["torch", "triton"]
IDS = torch.tensor([[0, 5, 5], [1, 2, 5]], device=DEVICE)
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
OTHERS = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
cpu_only = pytest.mark.skipif(CUDA, reason="the compiled kernels have no float64")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with pyembed.backend(request.param):
        yield request.param


def pair(num_embeddings=6, embedding_dim=3, seed=0, **options):
    """Our module and PyTorch's from the same seed."""
    made = []
    for kind in (pyembed.Embedding, nn.Embedding):
        torch.manual_seed(seed)
        made.append(kind(num_embeddings, embedding_dim, **options).to(DEVICE))
    return made


def assert_same_call(ours, theirs, ids, backward=True, **tolerance):
    """Outputs bit for bit, gradients to rounding (bit for bit where PyTorch serves) and of one layout, and the weight after."""
    out, expected = ours(ids), theirs(ids)
    assert torch.equal(out, expected) and out.dtype == expected.dtype and out.stride() == expected.stride()
    assert out.requires_grad == expected.requires_grad and torch.equal(ours.weight, theirs.weight)
    if backward:
        grad = torch.randn_like(expected)
        for module, result in ((ours, out), (theirs, expected)):
            module.zero_grad()
            result.backward(grad)
        mine, his = ours.weight.grad, theirs.weight.grad
        assert mine.layout == his.layout and mine.shape == his.shape
        exact = {"rtol": 0, "atol": 0} if ours.explain(ids).name == "torch" else tolerance
        torch.testing.assert_close(mine.to_dense(), his.to_dense(), **exact)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": 5},
        {"padding_idx": -6},
        {"max_norm": 0.5},
        {"max_norm": 1.0, "norm_type": 1.0},
        {"max_norm": 0.7, "norm_type": float("inf"), "padding_idx": 1},
        {"scale_grad_by_freq": True},
        {"sparse": True},
        {"sparse": True, "padding_idx": 0},
        {"sparse": True, "scale_grad_by_freq": True, "padding_idx": 0, "max_norm": 1.0},
        {"norm_type": 1.0},
        {"_freeze": True},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64, "padding_idx": 2},
    ],
    ids=str,
)
def test_is_torchs(options, backend):
    ours, theirs = pair(**options)
    assert isinstance(ours, nn.Embedding) and torch.equal(ours.weight, theirs.weight)
    assert repr(ours) == repr(theirs) and ours.weight.requires_grad == theirs.weight.requires_grad
    for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
        assert getattr(ours, name) == getattr(theirs, name)
    for ids in (IDS, IDS.flip(0)):
        refuses = options.get("sparse") and options.get("scale_grad_by_freq")  # PyTorch has no such gradient
        assert_same_call(ours, theirs, ids, backward=not (refuses or options.get("_freeze")))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (4,), (2, 1, 3, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_shape(shape, dtype, backend):
    assert_same_call(*pair(), torch.randint(6, shape, dtype=dtype, device=DEVICE))


def test_ids_and_gradients_of_any_stride(backend):
    ours, theirs = pair()
    for ids in (IDS.t(), IDS[:, ::2], IDS[:1].expand(4, 3)):
        assert_same_call(ours, theirs, ids)
    for module in (ours, theirs):
        module.zero_grad()
        module(IDS).sum().backward()  # an expanded gradient of stride 0
        module(IDS).transpose(0, 2).sum(1).square().sum().backward()  # it adds up
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("rows, width", [(0, 3), (4, 0), (1, 1), (0, 0)])
def test_empty_and_least_tables(rows, width, backend):
    ids = torch.zeros(2 if rows else 0, dtype=torch.long, device=DEVICE)
    ours, theirs = (kind(rows, width, _weight=torch.ones(rows, width)).to(DEVICE) for kind in (pyembed.Embedding, nn.Embedding))
    assert_same_call(ours, theirs, ids)


@pytest.mark.parametrize("dtype", INTEGERS + OTHERS)
def test_tables_of_any_dtype(dtype, backend):
    table = torch.arange(-9, 9, device=DEVICE).view(6, 3).to(dtype)
    ours, theirs = (kind.from_pretrained(table) for kind in (pyembed.Embedding, nn.Embedding))
    assert ours.explain(IDS).name == ("triton" if CUDA and dtype == torch.bfloat16 and backend == "triton" else "torch")
    bits = torch.uint8 if dtype.itemsize == 1 else None
    out, expected = ours(IDS), theirs(IDS)
    assert out.dtype == dtype
    assert torch.equal(out.view(bits), expected.view(bits)) if bits else torch.equal(out, expected)


def test_a_table_that_is_a_view(backend):
    base = torch.randn(3, 12, device=DEVICE)
    ours, theirs = (kind.from_pretrained(base.t()[::2], freeze=False) for kind in (pyembed.Embedding, nn.Embedding))
    assert_same_call(ours, theirs, IDS)


def test_from_pretrained():
    table = torch.randn(6, 3)
    options = {"padding_idx": -1, "max_norm": 3.0, "norm_type": 1.0, "scale_grad_by_freq": True, "sparse": True}
    ours, theirs = (kind.from_pretrained(table, freeze=False, **options) for kind in (pyembed.Embedding, nn.Embedding))
    assert type(ours) is pyembed.Embedding and repr(ours) == repr(theirs) and ours.weight.requires_grad
    assert ours.weight.data_ptr() == table.data_ptr() and ours.weight[-1].abs().sum() > 0  # the row padding_idx is kept
    assert not pyembed.Embedding.from_pretrained(table).weight.requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda kind: kind(6, 3, padding_idx=6),
        lambda kind: kind(6, 3, padding_idx=-7),
        lambda kind: kind(6, 3, _weight=torch.ones(3, 6)),
        lambda kind: kind(-1, 3),
        lambda kind: kind.from_pretrained(torch.ones(6)),
    ],
)
def test_constructors_refuse_alike(make):
    with pytest.raises(Exception) as theirs:
        make(nn.Embedding)
    with pytest.raises(theirs.type) as ours:
        make(pyembed.Embedding)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"sparse": True}, {"dtype": torch.bfloat16}], ids=str)
def test_ids_without_a_row(options, backend):
    ours, _ = pair(**options)
    with pytest.raises(ValueError, match=r"padding_idx: expected a row in \[-6, 6\), got 6"):
        F.embedding(IDS, ours.weight, 6)
    if CUDA:
        return
    for wrong in (6, -1):
        with pytest.raises(IndexError, match=rf"ids: expected values in \[0, 6\), the rows of weight; got {wrong} at \(1,\)"):
            ours(torch.tensor([0, wrong]))
    for wrong in (IDS.short(), IDS.float(), IDS.bool(), [1, 2], None):
        with pytest.raises(TypeError, match="ids: expected"):
            ours(wrong)
        with pytest.raises(TypeError, match="ids: expected"):
            ours.explain(wrong)


WEIGHT = torch.arange(18.0, device=DEVICE).view(6, 3)
WRONG_CALLS = [  # (what F.embedding is given, its message)
    ({"ids": IDS.float()}, "^ids: expected dtype torch.int32 or torch.int64, got torch.float32$"),
    ({"ids": IDS.float(), "max_norm": 1.0}, "^ids: expected dtype .* got torch.float32$"),
    ({"ids": IDS.bool()}, "^ids: expected dtype .* got torch.bool$"),
    ({"ids": IDS.short(), "sparse": True}, "^ids: expected dtype .* got torch.int16$"),
    ({"ids": [1, 2]}, "^ids: expected a Tensor, got list$"),
    ({"ids": None}, "^ids: expected a Tensor, got NoneType$"),
    ({"weight": WEIGHT.tolist()}, "^weight: expected a Tensor, got list$"),
    ({"weight": None}, "^weight: expected a Tensor, got NoneType$"),
    ({"weight": WEIGHT[0, 0]}, r"^weight: .*'weight' must be 2-D; got \(\)$"),
    ({"weight": WEIGHT[0]}, r"^weight: .*'weight' must be 2-D; got \(3,\)$"),
    ({"weight": WEIGHT[None]}, r"^weight: .*'weight' must be 2-D; got \(1, 6, 3\)$"),
    ({"weight": WEIGHT[None], "padding_idx": 0}, r"^weight: .*'weight' must be 2-D; got \(1, 6, 3\)$"),
    ({"weight": WEIGHT[None], "max_norm": 1.0}, r"^weight: .*'weight' must be 2-D; got \(1, 6, 3\)$"),
    ({"padding_idx": 6}, r"^padding_idx: expected a row in \[-6, 6\), got 6$"),
    ({"padding_idx": -7, "sparse": True}, r"^padding_idx: expected a row in \[-6, 6\), got -7$"),
    ({"padding_idx": 1.0}, "^padding_idx: expected an int, got float$"),
    ({"padding_idx": "1"}, "^padding_idx: expected an int, got str$"),
    ({"padding_idx": True}, "^padding_idx: expected an int, got bool$"),
    ({"padding_idx": 1.0, "max_norm": 1.0}, "^padding_idx: expected an int, got float$"),
]
WRONG_ROWS = [
    ({"ids": IDS + 1}, r"^ids: expected values in \[0, 6\), the rows of weight; got 6 at \(0, 1\)$"),
    ({"ids": IDS - 1, "padding_idx": 1}, r"^ids: expected values in \[0, 6\), the rows of weight; got -1 at \(0, 0\)$"),
    ({"ids": IDS + 1, "max_norm": 1.0}, r"^ids: expected values in \[0, 6\), the rows of weight; got 6 at \(0, 1\)$"),
    ({"weight": WEIGHT[:0]}, r"^ids: expected values in \[0, 0\), the rows of weight; got 0 at \(0, 0\)$"),
]


@pytest.mark.parametrize("changes, message", WRONG_CALLS if CUDA else WRONG_CALLS + WRONG_ROWS)
def test_errors_are_named_and_of_torchs_class(changes, message, backend):
    """`except` clauses that were written for PyTorch's function catch them, and those for this library's documented classes."""
    given = {"ids": IDS, "weight": WEIGHT.clone()} | changes
    with pytest.raises(Exception) as theirs:
        (lambda ids, **others: nn.functional.embedding(ids, **others))(**given)
    for _ in range(2):  # the second time a call like it may be known
        with pytest.raises(theirs.type, match=message) as ours:
            F.embedding(**given)
        assert isinstance(ours.value, TypeError | ValueError | IndexError)
        assert str(pickle.loads(pickle.dumps(ours.value))) == str(ours.value)
    if set(changes) <= {"ids", "weight"} and isinstance(given["weight"], torch.Tensor):
        module = pyembed.Embedding(6, 3, device=DEVICE)
        module.weight = nn.Parameter(given["weight"])
        with pytest.raises(theirs.type, match=message):
            module(given["ids"])


@pytest.mark.parametrize("padding_idx", [np.int64(1), torch.tensor(1), -5])
def test_whole_numbers_of_other_types_are_padding_rows(padding_idx, backend):
    weight = WEIGHT.clone().requires_grad_()
    F.embedding(IDS, weight, padding_idx).sum().backward()
    assert weight.grad[:, 0].tolist() == [1, 0, 1, 0, 0, 3]


def test_devices_that_differ(backend):
    with pytest.raises(ValueError, match=r"^ids: expected device meta, that of weight; got cpu$") as error:
        F.embedding(IDS.cpu(), WEIGHT.to("meta"))
    assert isinstance(error.value, RuntimeError)  # as PyTorch's "Expected all tensors to be on the same device"


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_errors(fullgraph, backend):
    """Of a graph's compiler, or named as they are without one."""
    torch._dynamo.reset()
    compiled = torch.compile(F.embedding, backend="eager", fullgraph=fullgraph)
    for changes, message in ({"ids": IDS.float()}, "ids: expected dtype"), ({"weight": WEIGHT[None]}, "must be 2-D"):
        with pytest.raises(RuntimeError, match=message):
            compiled(**{"ids": IDS, "weight": WEIGHT} | changes)


def test_padding_row(backend):
    """Zero from the start and after reset_parameters, returned like any other, and no step of an optimizer moves it."""
    ours, _ = pair(padding_idx=5)
    ours.reset_parameters()
    assert not ours.weight[5].any() and ours.weight[4].all()
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    with torch.no_grad():
        ours.weight[5] = 7.0
    before = ours.weight.detach().clone()
    assert (ours(IDS)[0, 1] == 7.0).all()
    ours(IDS).square().sum().backward()
    optimizer.step()
    moved = (ours.weight != before).any(1)
    assert moved.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    "twin_of",
    [
        copy.deepcopy,
        copy.copy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: loaded(saved(module)),
    ],
    ids=["deepcopy", "copy", "pickle", "save"],
)
def test_copies(twin_of, backend):
    ours, _ = pair(padding_idx=5, max_norm=2.0)
    twin = twin_of(ours)
    assert type(twin) is pyembed.Embedding and repr(twin) == repr(ours)
    assert_same_call(twin, ours, IDS, backward=False)


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


def loaded(file):
    """A whole module, its class and no other code among what may be loaded."""
    with torch.serialization.safe_globals([pyembed.Embedding]):
        return torch.load(file, weights_only=True)


def test_state_dicts_are_exchanged():
    ours, theirs = pair()
    other = nn.Embedding(6, 3)
    assert list(ours.state_dict()) == list(other.state_dict()) == ["weight"]
    ours.load_state_dict(torch.load(saved(other.state_dict()), weights_only=True))
    assert torch.equal(ours.weight.cpu(), other.weight)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict(nn.Embedding(7, 3).state_dict())


def test_meta(backend):
    with torch.device("meta"):
        ours = pyembed.Embedding(6, 3, padding_idx=1)
    out = ours(IDS.to("meta"))
    assert ours.weight.is_meta and out.is_meta and out.shape == (2, 3, 3)
    out.sum().backward()
    assert ours.weight.grad.is_meta and ours.weight.grad.shape == (6, 3)
    theirs = nn.Embedding(6, 3, padding_idx=1).to(DEVICE)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()), assign=True)
    assert_same_call(ours, theirs, IDS)
    empty = pyembed.Embedding(6, 3, padding_idx=1, device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    empty.reset_parameters()
    torch.manual_seed(3)
    assert torch.equal(empty.weight, nn.Embedding(6, 3, padding_idx=1).weight)


def test_init_reaches_it():
    """As models initialise theirs: by isinstance, within apply."""

    def init(module):
        if isinstance(module, nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02)

    models = [nn.Sequential(module) for module in pair()]
    for model in models:
        torch.manual_seed(1)
        model.apply(init)
    assert torch.equal(models[0][0].weight, models[1][0].weight) and models[0][0].weight.abs().max() < 0.1


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_tied_weights(padding_idx, backend):
    """A language model's head of the same weight: the gradients of both uses add up, that of the padding row is the head's."""
    grads = []
    for module in pair(padding_idx=padding_idx):
        head = nn.Linear(3, 6, bias=False)
        head.weight = module.weight
        nn.functional.cross_entropy(head(module(IDS).tanh()).flatten(0, 1), IDS.roll(-1).flatten()).backward()
        assert head.weight.grad is module.weight.grad
        grads.append(module.weight.grad)
    torch.testing.assert_close(*grads)
    assert grads[0][2].any()


def doubled(module):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(module, "weight", Doubled())
    return module


@pytest.mark.parametrize("how", [doubled, parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights(how, backend):
    """Computed once a call: spectral_norm takes a step of its iteration at each access."""
    made = []
    for module in pair():
        torch.manual_seed(2)
        made.append(how(module))
    ours, theirs = made
    for _ in range(3):
        out, expected = ours(IDS), theirs(IDS)
        assert torch.equal(out, expected)
    for result in (out, expected):
        result.square().sum().backward()
    for (name, mine), (other, his) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(mine.grad, his.grad, msg=name)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_hooks_and_keywords(backend):
    ours, theirs = pair()
    for module in (ours, theirs):
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(0),))
        module.register_forward_hook(lambda module, inputs, output: output * 3)
    assert_same_call(ours, theirs, IDS)
    assert torch.equal(pair(seed=1)[0](input=IDS), pair(seed=1)[1](input=IDS))


def test_changes_between_forward_and_backward(backend):
    """Of the table: none of the backward's business. Of the ids: refused, as PyTorch does."""
    for module in pair():
        module.zero_grad()
        out = module(IDS)
        with torch.no_grad():
            module.weight.zero_()
        out.sum().backward()
        assert module.weight.grad[:, 0].tolist() == [1, 1, 1, 0, 0, 3]
        ids = IDS.clone()
        out = module(ids)
        ids.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_outputs_may_be_changed_in_place(backend):
    grads = []
    for module in pair():
        rows = module(IDS)
        rows *= 3.0
        rows.square().sum().backward()
        grads.append(module.weight.grad)
    torch.testing.assert_close(*grads)


def test_frozen_or_without_gradients(backend):
    for module in pair():
        with torch.no_grad():
            assert not module(IDS).requires_grad
        with torch.inference_mode():
            assert module(IDS).is_inference()
        assert module.requires_grad_(False)(IDS).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend):
    ours, theirs = pair()
    with torch.autocast(DEVICE, dtype):
        assert_same_call(ours, theirs, IDS)
        assert ours(IDS).dtype == torch.float32


def test_deterministic_algorithms(backend):
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_call(*pair(), IDS)
    finally:
        torch.use_deterministic_algorithms(False)


# Derivatives of derivatives, and derivatives that are not reverse mode's


@pytest.mark.parametrize("padding_idx", [None, 5, -6])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_double_backward(padding_idx, shape, backend):
    """A gradient penalty: the second derivatives reach the incoming gradient, the padding row's are zero; and the third."""
    ids = IDS if shape else IDS[0, 1]
    results = []
    for module in pair(padding_idx=padding_idx):
        torch.manual_seed(4)
        nn.init.normal_(module.weight)  # of the padding row too
        scale = torch.randn(*shape, 3, device=DEVICE, requires_grad=True)
        (grad,) = torch.autograd.grad((module(ids).square() * scale).sum(), module.weight, create_graph=True)
        second = torch.autograd.grad((grad.pow(3) + grad).sum(), (module.weight, scale), create_graph=True)
        third = torch.autograd.grad(second[0].square().sum() + second[1].square().sum(), (module.weight, scale))
        results.append((grad, *second, *third))
    for name, ours, theirs in zip(("first", *("second",) * 2, *("third",) * 2), *results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@cpu_only
@pytest.mark.sample
@pytest.mark.parametrize("position_ids", [None, [2, 0, 2], [[0, 1, 1], [4, 3, 0]]])
@pytest.mark.parametrize("wanted", ["both", "token", "position"])
def test_double_backward_of_a_sum(position_ids, wanted):
    """Which of the tables wants a gradient, and the positions of every form."""
    position_ids = None if position_ids is None else torch.tensor(position_ids)
    tables = {"token": torch.randn(6, 2, dtype=torch.float64), "position": torch.randn(5, 2, dtype=torch.float64)}
    leaves = [name for name in tables if wanted in (name, "both")]

    def function(*values):
        given = tables | dict(zip(leaves, values, strict=True))
        return F.embed(IDS, given["token"], given["position"], position_ids).pow(2)

    with pyembed.backend("triton"):
        assert gradgradcheck(function, [tables[name].clone().requires_grad_() for name in leaves], fast_mode=True)


def test_double_backward_of_no_ids():
    """PyTorch's own fails on a shape with two unknowns."""
    ours, _ = pair()
    with pyembed.backend("triton"):
        out = ours(IDS[:0])
        (grad,) = torch.autograd.grad(out.square().sum(), ours.weight, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), ours.weight)
    assert not grad.any() and not second.any() and second.shape == (6, 3)


def test_double_backward_of_a_sum_with_padding():
    results = []
    for name in BACKENDS:
        torch.manual_seed(0)
        leaves = [torch.randn(n, 3, device=DEVICE, requires_grad=True) for n in (6, 4)]
        with pyembed.backend(name):
            grads = torch.autograd.grad(F.embed(IDS, *leaves, padding_idx=5).pow(3).sum(), leaves, create_graph=True)
            results.append(torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), leaves))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_opcheck_of_the_backward():
    grad = torch.randn(2, 3, 4, device=DEVICE, requires_grad=True)
    tables = dict.fromkeys(TABLES)
    scaled = Terms(IDS, **tables, segment_ids=IDS % 2, scale=2.0, padding_idx=5)
    dropped = Terms(IDS, **tables, position_ids=IDS[0], seed=torch.tensor([3], device=DEVICE), dropout=0.5)
    for terms, sizes in ((scaled, [6, 5, 2]), (dropped, [0, 6, 0])):
        fields = terms._asdict()
        arguments = [fields[name] for name in one_pass.embed.names if name in fields and name not in TABLES]
        opcheck(one_pass.embed_backward.op, (grad, *arguments, sizes))


def test_batched_gradients(backend):
    """autograd's own vmap over the backward, as vectorised Jacobians use it."""
    found = []
    for module in pair(padding_idx=5):
        grads = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        found.append(torch.autograd.grad(module(IDS), module.weight, grads, is_grads_batched=True)[0])
    torch.testing.assert_close(*found)


TRANSFORMS = {
    "grad": lambda f, w, t: torch.func.grad(lambda w: f(IDS, w).pow(2).sum())(w),
    "grad of grad": lambda f, w, t: torch.func.grad(
        lambda w: torch.func.grad(lambda w: f(IDS, w).pow(3).sum())(w).pow(2).sum()
    )(w),
    "vjp": lambda f, w, t: torch.func.vjp(lambda w: f(IDS, w), w)[1](torch.ones(2, 3, 3, device=DEVICE))[0],
    "jvp": lambda f, w, t: torch.func.jvp(lambda w: f(IDS, w), (w,), (t,))[1],
    "jacfwd": lambda f, w, t: torch.func.jacfwd(lambda w: f(IDS, w))(w),
    "jacrev": lambda f, w, t: torch.func.jacrev(lambda w: f(IDS, w))(w),
    "hessian": lambda f, w, t: torch.func.hessian(lambda w: f(IDS, w).pow(3).sum())(w),
    "vmap over ids": lambda f, w, t: torch.func.vmap(f, (0, None))(IDS, w),
    "vmap over tables": lambda f, w, t: torch.func.vmap(f, (None, 0))(IDS, torch.stack([w, t])),
    "vmap over both": lambda f, w, t: torch.func.vmap(f)(IDS, torch.stack([w, t])),
    "gradients of each sample": lambda f, w, t: torch.func.vmap(
        torch.func.grad(lambda w, ids: f(ids, w).pow(2).sum()), (None, 0)
    )(w, IDS),
    "functional.jvp": lambda f, w, t: torch.autograd.functional.jvp(lambda w: f(IDS, w), w, t)[1],
    "functional.hessian": lambda f, w, t: torch.autograd.functional.hessian(
        lambda w: f(IDS, w).pow(3).sum(), w, vectorize=True
    ),
}


@pytest.mark.sample
@pytest.mark.parametrize("padding_idx", [None, 5])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, padding_idx, backend):
    weight, tangent = torch.randn(2, 6, 3, device=DEVICE)
    ours, theirs = (
        TRANSFORMS[name](lambda ids, w, f=function: f(ids, w, padding_idx), weight, tangent)
        for function in (F.embedding, nn.functional.embedding)
    )
    torch.testing.assert_close(ours, theirs)
    assert theirs.abs().sum() > 0


def test_forward_mode(backend):
    """A dual weight's tangent is looked up like the weight: a zero in its place would go unnoticed."""
    ours, _ = pair()
    tangent = torch.randn_like(ours.weight)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(ours.weight.detach(), tangent)
        assert ours.explain(IDS).name == "torch"
        out = forward_ad.unpack_dual(torch.func.functional_call(ours, {"weight": dual}, IDS))
    assert torch.equal(out.primal, ours.weight[IDS]) and torch.equal(out.tangent, tangent[IDS])
    front = pyembed.EmbeddingQKV(6, 4, 2, max_length=3).to(DEVICE)
    weight, tangent = front.token.weight.detach(), torch.randn(6, 4, device=DEVICE)

    def query(weight):
        return torch.func.functional_call(front, {"token.weight": weight}, (IDS,)).query

    step = 1e-3
    numerical = (query(weight + step * tangent) - query(weight - step * tangent)) / (2 * step)
    torch.testing.assert_close(torch.func.jvp(query, (weight,), (tangent,))[1], numerical, rtol=1e-2, atol=1e-2)
    with forward_ad.dual_level():  # after calls without it
        dual = forward_ad.make_dual(weight, tangent)
        torch.testing.assert_close(forward_ad.unpack_dual(query(dual)).tangent, numerical, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("order", [1, 2])
def test_forward_mode_over_an_older_graph(order, backend):
    """Right by PyTorch's operator, refused by the kernels: no tangent is lost unseen."""
    ours, _ = pair()
    primal, tangent = torch.randn(2, 2, 3, 3, device=DEVICE)
    out = ours(IDS)
    if order == 2:
        primal, tangent = torch.randn(2, 6, 3, device=DEVICE)
        grad = torch.randn(2, 3, 3, device=DEVICE, requires_grad=True)
        (out,) = torch.autograd.grad(out, ours.weight, grad, create_graph=True)

    def backward(incoming):
        return torch.autograd.grad(out, ours.weight if order == 1 else grad, incoming, retain_graph=True)[0]

    expected = backward(tangent)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(primal, tangent)
        if backend == "torch":
            torch.testing.assert_close(forward_ad.unpack_dual(backward(dual)).tangent, expected)
        else:
            with pytest.raises(RuntimeError, match="no forward mode: run the forward within it too"):
                backward(dual)
        torch.testing.assert_close(backward(tangent), expected)


def test_vmap_over_ids_without_a_row(backend):
    ours, _ = pair()
    if not CUDA:
        with pytest.raises(IndexError):
            torch.func.vmap(ours)(IDS + 5)


@pytest.mark.parametrize("name", ["jvp", "grad", "vmap over ids"])
def test_compiled_transforms(name, backend):
    weight, tangent = torch.randn(2, 6, 3, device=DEVICE)
    expected = TRANSFORMS[name](nn.functional.embedding, weight, tangent)
    torch._dynamo.reset()
    compiled = torch.compile(lambda w, t: TRANSFORMS[name](F.embedding, w, t), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(weight, tangent), expected)


# Tracers


@pytest.mark.parametrize("options", [{}, {"padding_idx": 5}, {"max_norm": 1.0}, {"sparse": True}], ids=str)
def test_compiles(options, backend):
    ours, theirs = pair(**options)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(IDS), theirs(IDS))
    if not options.get("sparse"):  # PyTorch does not trace sparse gradients either
        for module in (compiled, theirs):
            module(IDS).square().sum().backward()
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [{}, {"padding_idx": 5}, {"max_norm": 1.0}], ids=str)
@pytest.mark.parametrize(
    "trace",
    [
        lambda module: torch.fx.symbolic_trace(nn.Sequential(module)),
        lambda module: torch.jit.script(module),
        lambda module: torch.jit.trace(module, (IDS,)),
        lambda module: torch.export.export(module, (IDS,)).module(),
    ],
    ids=["fx", "script", "trace", "export"],
)
def test_traces(trace, options, backend):
    ours, theirs = pair(**options)
    if options.get("max_norm"):
        theirs(IDS), ours(IDS)
    assert torch.equal(trace(ours)(IDS), theirs(IDS))


def test_nested_ids(backend):
    """Tensors with operators of their own go where PyTorch's operator goes."""
    ours, theirs = pair()
    ids = torch.nested.nested_tensor([IDS[0], IDS[1, :2]], layout=torch.jagged)
    assert "NestedTensor" in ours.explain(ids).reason
    out, expected = ours(ids), theirs(ids)
    assert out.is_nested and torch.equal(out.values(), expected.values())
    if not CUDA:
        with pytest.raises(IndexError):
            ours(ids + 5)


def test_a_table_of_another_tensor_class(backend):
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    rows = torch.randn(6, 3, device=DEVICE)
    ours = pyembed.Embedding(6, 3, _weight=two_tensor.TwoTensor(rows, rows + 1))
    out = ours(IDS)
    assert "TwoTensor" in ours.explain(IDS).reason
    assert torch.equal(out.a, rows[IDS]) and torch.equal(out.b, rows[IDS] + 1)


# Which operator serves


@pytest.mark.parametrize(
    "options, name, why",
    [
        ({}, "triton", "a kernel for torch.float32"),
        ({"dtype": torch.float16, "padding_idx": 1}, "triton", "a kernel for torch.float16"),
        ({"max_norm": 1.0}, "torch", "max_norm"),
        ({"scale_grad_by_freq": True}, "torch", "scale_grad_by_freq"),
        ({"sparse": True}, "torch", "sparse"),
        ({"_weight": torch.ones(6, 3, dtype=torch.int8), "_freeze": True}, "torch", "torch.int8 on .* has no kernel"),
    ],
    ids=str,
)
def test_explain_says_what_runs(options, name, why, monkeypatch):
    calls = []
    launcher = operators.launcher
    monkeypatch.setattr(operators, "launcher", lambda *a: calls.append(a) or launcher(*a))
    module = pyembed.Embedding(6, 3, **options).to(DEVICE)
    with pyembed.backend("triton"):
        plan = module.explain(IDS)
        assert plan.name == name and re.search(why, plan.reason)
        assert not calls
        module(IDS)
    assert bool(calls) == (name == "triton")


def test_explain_names_the_setting(monkeypatch):
    module = pyembed.Embedding(6, 3).to(DEVICE)
    if not CUDA:
        assert str(module.explain(IDS)) == "torch: kernels are for GPUs, and the table is on cpu"
    with pyembed.backend("torch"):
        assert module.explain(IDS) == ("torch", "pyembed.backend('torch') is set", {})
    with pyembed.backend("triton"):
        seen = torch.func.vmap(lambda ids: (ids, seen_by.append(module.explain(ids)))[0])
        seen_by = []
        seen(IDS)
        assert seen_by[0].name == "torch" and "torch.func" in seen_by[0].reason
        monkeypatch.setattr(choice, "HAS_TRITON", False)
        with pytest.raises(RuntimeError, match="needs the package triton"):
            module.explain(IDS)


# PyTorch's own samples


@pytest.fixture(scope="module")
def module_info():
    pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
    from torch.testing._internal import common_modules

    (info,) = (info for info in common_modules.module_db if info.module_cls is nn.Embedding)
    return info


@pytest.fixture(scope="module")
def op_info():
    pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
    from torch.testing._internal import common_methods_invocations

    (info,) = (info for info in common_methods_invocations.op_db if info.name == "nn.functional.embedding")
    return info


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_module_samples(module_info, dtype, backend):
    """Forward, factory arguments, gradients of contiguous and other inputs, copies, other devices, and gradcheck twice over."""
    assert dtype in module_info.dtypes or dtype in (torch.float16, torch.bfloat16)
    count = 0
    for sample in module_info.module_inputs_func(module_info, device=DEVICE, dtype=dtype, requires_grad=True, training=True):
        made = sample.constructor_input
        ours, theirs = pair(*made.args, **made.kwargs, device=DEVICE, dtype=dtype)
        (ids,) = sample.forward_input.args
        # 1,536 ids on four rows: sums of halves differ by the order of summation
        loose = {"rtol": 2e-2, "atol": 2e-1} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-4}
        assert_same_call(ours, theirs, ids, **loose)
        assert_same_call(pickle.loads(pickle.dumps(ours)).eval(), theirs.eval(), ids.contiguous(), backward=False)
        assert repr(ours) == repr(theirs) and ours.to("meta")(ids.to("meta")).shape == (*ids.shape, ours.embedding_dim)
        count += 1
        if dtype == torch.float64 and not CUDA and ids.numel() < 100:
            weight = theirs.weight.detach().requires_grad_()
            for check in (gradcheck, gradgradcheck):
                assert check(lambda w, ids=ids: F.embedding(ids, w), (weight,), fast_mode=True)
    assert count >= 2


def test_torchs_module_errors(module_info, backend):
    errors = module_info.module_error_inputs_func(
        module_info, device=DEVICE, dtype=torch.float32, requires_grad=False, training=True
    )
    for error in errors:
        made, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
        with pytest.raises(error.error_type, match=r"^ids: expected|negative dimension"):  # with what is wrong where
            pyembed.Embedding(*made.args, **made.kwargs)(*given.args, **given.kwargs)
    assert errors


@pytest.mark.sample(2)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_operator_samples(op_info, dtype, requires_grad, strided, backend):
    assert op_info.supports_dtype(dtype, DEVICE)
    count = 0
    for sample in op_info.sample_inputs(DEVICE, dtype, requires_grad=requires_grad):
        sample = sample.noncontiguous() if strided else sample
        (ids,), results = sample.args, []
        for function in (op_info.op, lambda weight, ids, **options: F.embedding(ids, weight, **options)):
            weight = sample.input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            with torch.set_grad_enabled(requires_grad or not sample.kwargs.get("max_norm")):
                out = function(weight, ids, **sample.kwargs)
            grad = None
            if out.requires_grad:
                (grad,) = torch.autograd.grad(out, weight, torch.ones_like(out) / 3)
                grad = grad.to_dense()
            results.append((out.detach(), weight.detach(), grad))
        (expected, table, theirs), (found, ours_table, ours) = results
        assert torch.equal(found, expected) and torch.equal(ours_table, table), sample
        torch.testing.assert_close(ours, theirs)
        count += 1
    assert count >= (3 if requires_grad else 9)


@cpu_only
def test_torchs_operator_derivatives(op_info, backend):
    """Reverse, forward, forward over reverse and batched, as PyTorch checks its operators."""
    for sample in op_info.sample_inputs(DEVICE, torch.float64, requires_grad=True):

        def function(weight, ids=sample.args[0], options=sample.kwargs):
            return F.embedding(ids, weight, **options)

        more = {"fast_mode": True, "check_batched_grad": True}
        assert gradcheck(function, (sample.input,), check_forward_ad=True, check_batched_forward_grad=True, **more)
        assert gradgradcheck(function, (sample.input,), check_fwd_over_rev=True, **more)


def test_torchs_operator_errors(op_info, backend):
    """The same calls are refused, in the same words, by an error that is also of this library's class."""
    errors = list(op_info.error_inputs(DEVICE))
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type, match=f"^weight: .*{error.error_regex}") as ours:
            F.embedding(*sample.args, sample.input, **sample.kwargs)
        assert isinstance(ours.value, ValueError)
    assert errors
