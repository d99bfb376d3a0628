"""linear_cross_entropy: against PyTorch's cross_entropy of whole logits in float64, values, gradients and memory."""

import pytest
import torch
import torch.nn.functional as nnf
from conftest import DEVICE, full
from numerics import Largest, assert_no_worse
from torch.utils._python_dispatch import TorchDispatchMode

from pyembed.functional import embedding
from pyembed.vocabulary import head, linear_cross_entropy

V, D, SHAPE = 40, 8, (3, 7)


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, device=DEVICE, dtype=dtype) for shape in ((*SHAPE, D), (V, D), (V,)))
    target = torch.randint(30, SHAPE, device=DEVICE)
    target[0, 2:5] = -100
    return [x.requires_grad_() for x in (hidden, weight, bias)], target


def expected(leaves, target, size=None, replaced=None, **options):
    """By whole logits, in float64: the loss, and the leaves that it was computed from."""
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    weight = doubles[1]
    if replaced is not None:
        rows = replaced[1].detach().double().requires_grad_()
        weight, doubles = weight.detach().index_copy(0, replaced[0], rows), [*doubles, rows]
    logits = nnf.linear(doubles[0], weight, doubles[2])[..., :size]
    return nnf.cross_entropy(logits.movedim(-1, 1), target, **options), doubles


def check(leaves, target, found, right, doubles):
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(right)
    ours = torch.autograd.grad(found, leaves, grad.to(found.dtype), allow_unused=True)
    others = torch.autograd.grad(right, doubles, grad, allow_unused=True)
    for our, other in zip(ours, others, strict=True):
        torch.testing.assert_close(None if our is None else our.double(), other, rtol=1e-4, atol=1e-6)


@pytest.mark.sample
@pytest.mark.parametrize("chunk", [1, 4, 21, None])
@pytest.mark.parametrize("size", [None, 30])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ours", [True, False])
def test_is_cross_entropy(chunk, size, label_smoothing, reduction, ours, monkeypatch):
    if not ours:  # by PyTorch's operators, as under autocast
        monkeypatch.setattr(head, "_is_plain", lambda *_: False)
    leaves, target = inputs()
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    hidden, weight, bias = leaves
    found = linear_cross_entropy(hidden, weight, target, bias, size=size, chunk=chunk, **options)
    check(leaves, target, found, *expected(leaves, target, size, **options))


@pytest.mark.sample
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype, product", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
def test_error(dtype, product, label_smoothing, reduction, monkeypatch):
    """No worse than whole logits by PyTorch in the same dtype, over several chunks."""
    monkeypatch.setattr(head, "product_dtype", lambda *_: product)
    torch.manual_seed(0)
    n, size = 512, 300
    hidden, weight, bias = (torch.randn(shape, device=DEVICE) for shape in ((n, D), (size, D), (size,)))
    target = (torch.rand(n, device=DEVICE) ** 3 * size).long()
    target[5:9] = -100
    grad = torch.randn(n if reduction == "none" else (), device=DEVICE)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}

    def run(loss_of, as_dtype):
        leaves = [x.to(dtype).to(as_dtype).requires_grad_() for x in (hidden, weight, bias)]
        loss = loss_of(*leaves)
        return loss.detach(), *torch.autograd.grad(loss, leaves, grad.to(loss.dtype))

    def whole(hidden, weight, bias):
        logits = nnf.linear(hidden, weight, bias)
        return nnf.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, **options)

    found = run(lambda h, w, b: linear_cross_entropy(h, w, target, b, chunk=64, **options), dtype)
    results = zip(("loss", "hidden", "weight", "bias"), found, run(whole, dtype), run(whole, torch.float64), strict=True)
    for name, ours, eager, oracle in results:
        assert_no_worse(name, ours, eager, oracle)


def test_fp16_takes_gradients_of_a_scaled_loss():
    """They are computed from the incoming gradient, without which those of a mean over many tokens would be zero."""
    (hidden, weight, _), _ = inputs(torch.float16)
    many, target = hidden.detach().repeat(60, 40, 1).requires_grad_(), torch.randint(V, (180, 280), device=DEVICE)
    (linear_cross_entropy(many, weight, target) * 2**14).backward()
    double = many.detach().double().requires_grad_()
    (nnf.cross_entropy(nnf.linear(double, weight.detach().double()).movedim(-1, 1), target) * 2**14).backward()
    torch.testing.assert_close(many.grad.double(), double.grad, rtol=0.02, atol=0.02)


def test_no_logits_and_one_gradient():
    """Forward and backward make one tensor of the weight's size, its gradient, and logits of a chunk at a time."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(2000, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    with Largest() as made:
        (3 * linear_cross_entropy(hidden, weight, torch.randint(2000, (64,)), chunk=16)).backward()
    assert made.sizes[2000 * 64] == 1 and made.sizes[16 * 2000] == 1 and made.elements == 2000 * 64
    assert sum(count for size, count in made.sizes.items() if size > 2 * 64 * 64) == 2


@pytest.mark.parametrize("label_smoothing", [0.0, full(0.1)])
def test_replaced_rows(label_smoothing):
    (hidden, weight, bias), target = inputs()
    weight.requires_grad_(False)
    ids, rows = torch.tensor([3, 29, 0], device=DEVICE), torch.randn(3, D, device=DEVICE, requires_grad=True)
    target[1, :3] = ids
    options = {"label_smoothing": label_smoothing}
    found = linear_cross_entropy(hidden, weight, target, bias, replaced=(ids, rows), chunk=4, **options)
    right, (h, _, b, r) = expected([hidden, weight, bias], target, replaced=(ids, rows), **options)
    check([hidden, bias, rows], target, found, right, [h, b, r])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_waits_for_values(reduction, monkeypatch):
    """No operator, forward or backward, that a host would have to wait for on a GPU."""
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(head, "can_read", lambda _: False)  # as on a GPU
    leaves, target = inputs()
    hidden, weight, bias = leaves
    with Watch():
        options = {"reduction": reduction, "label_smoothing": 0.1, "size": 30, "chunk": 4}
        loss = linear_cross_entropy(hidden, weight, target, bias, **options)
        torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    assert "addmm_" in seen and waits.isdisjoint(seen)


def test_neither_logits_nor_the_table_are_copied():
    """Forward and backward, with rows that stand in the place of a frozen table's."""
    torch.manual_seed(0)
    table, hidden = torch.randn(500, 64), torch.randn(64, 64, requires_grad=True)
    ids, rows = torch.tensor([1, 2]), torch.randn(2, 64, requires_grad=True)
    with Largest() as largest:
        linear_cross_entropy(hidden, table, torch.randint(500, (64,)), replaced=(ids, rows), chunk=16).backward()
    assert 16 * 500 <= largest.elements < 2 * 16 * 500 and rows.grad.any()


def test_padding_has_no_probability():
    """Its rows get no gradient, and a large one of them changes nothing."""
    (hidden, weight, bias), target = inputs()
    with torch.no_grad():
        weight[30:] *= 1000
    linear_cross_entropy(hidden, weight, target, bias, size=30).backward()
    assert weight.grad[:30].any() and not weight.grad[30:].any() and not bias.grad[30:].any()


@pytest.mark.parametrize("ignore_index", [3, 35, 10**6, -1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_targets(ignore_index, reduction):
    """Whichever number stands for them: a token, a padded row, or none."""
    leaves, target = inputs()
    target[target == -100] = ignore_index
    options = {"ignore_index": ignore_index, "reduction": reduction}
    hidden, weight, bias = leaves
    found = linear_cross_entropy(hidden, weight, target, bias, size=30, chunk=4, **options)
    check(leaves, target, found, *expected(leaves, target, 30, **options))


def test_only_ignored_targets():
    """The mean of no losses is no number, and has no gradient, as PyTorch's."""
    leaves, target = inputs()
    hidden, weight, bias = leaves
    found = linear_cross_entropy(hidden, weight, torch.full_like(target, -100), bias, chunk=4)
    assert found.isnan() and not any(grad.any() for grad in torch.autograd.grad(found, leaves))


def test_some_gradients():
    """Of what is frozen there is none."""
    leaves, target = inputs()
    hidden, weight, bias = leaves
    right, doubles = expected(leaves, target)
    for wanted in ((0,), (1,), (2,), (0, 2)):
        for n, x in enumerate(leaves):
            x.requires_grad_(n in wanted)
        found = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, bias, chunk=4), [leaves[n] for n in wanted])
        others = torch.autograd.grad(right, [doubles[n] for n in wanted], retain_graph=True)
        for our, other in zip(found, others, strict=True):
            torch.testing.assert_close(our.double(), other, rtol=1e-4, atol=1e-6)


def test_tied_table_and_head():
    """Both gradients are summed into the one parameter."""
    (_, weight, _), target = inputs()
    ids = torch.randint(V, SHAPE, device=DEVICE)
    linear_cross_entropy(nnf.embedding(ids, weight), weight, target).backward()
    double = weight.detach().double().requires_grad_()
    nnf.cross_entropy(nnf.linear(nnf.embedding(ids, double), double).movedim(-1, 1), target).backward()
    torch.testing.assert_close(weight.grad.double(), double.grad, rtol=1e-4, atol=1e-6)


def test_compilers_know_nothing_of_tied_tables():
    """A head's weight in a graph, and a graph's lookup beside a head."""
    (_, weight, _), target = inputs()
    ids, target = torch.randint(V, SHAPE, device=DEVICE), target.clamp(min=0)
    (right,) = torch.autograd.grad(linear_cross_entropy(embedding(ids, weight).tanh(), weight, target), weight)
    look_up = torch.compile(lambda ids: embedding(ids, weight).tanh(), backend="aot_eager", fullgraph=True)
    step = torch.compile(lambda ids: linear_cross_entropy(look_up(ids), weight, target), backend="aot_eager", fullgraph=True)
    for loss in (linear_cross_entropy(look_up(ids), weight, target), step(ids)):
        torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], right, rtol=1e-4, atol=1e-5)


def test_a_frozen_weight():
    (hidden, weight, _), target = inputs()
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, target).backward()
    assert hidden.grad.any() and weight.grad is None
    weight.requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(embedding(target.clamp(min=0), weight), weight, target).requires_grad


def test_under_autocast():
    (hidden, weight, _), target = inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, target)
    right, _ = expected([hidden, weight, torch.zeros(V, device=DEVICE)], target)
    torch.testing.assert_close(found.double(), right, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("size, tokens", [(1, 2**24), (50_257, 256), (2**16, 256), (2**13, 2048), (2**25, 256)])
def test_chunks(size, tokens):
    """64 MiB of logits in fp32, and at least 256 tokens, however many rows there are."""
    assert head.chunk_of(size) == tokens


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_of_no_columns(reduction):
    leaves, target = inputs()
    leaves = [x.detach()[..., :0].clone().requires_grad_() for x in leaves[:2]] + leaves[2:]
    found = linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], reduction=reduction)
    check(leaves, target, found, *expected(leaves, target, reduction=reduction))


def test_no_token():
    (hidden, weight, bias), target = inputs()
    for reduction, right in (("sum", 0.0), ("mean", torch.nan)):
        found = linear_cross_entropy(hidden[:0], weight, target[:0], bias, reduction=reduction)
        torch.testing.assert_close(found, torch.tensor(right, device=DEVICE), equal_nan=True)


TWICE = (torch.tensor([1, 1]), torch.zeros(2, D))


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"hidden": [1.0]}, TypeError, "hidden: expected a Tensor, got list"),
        ({"weight": torch.zeros(V, D + 1)}, ValueError, "hidden, weight: expected"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target: expected int64 of shape \(3, 7\)"),
        ({"target": torch.full(SHAPE, 35), "size": 30}, IndexError, "target: expected ids below 30 .* got 35"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected shape \(40,\)"),
        ({"size": V + 1}, ValueError, "size: expected 1 to 40"),
        ({"replaced": TWICE}, ValueError, "replaced: expected ids from 0 to 39, each once"),
        ({"replaced": (torch.tensor([V]), torch.zeros(1, D))}, ValueError, "replaced: expected ids from 0 to 39"),
        ({"replaced": (torch.tensor([1]), torch.zeros(2, D))}, ValueError, "replaced: expected"),
        ({"chunk": 0}, ValueError, "chunk: expected a positive int or None, got 0"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected a number from 0 to 1, got 1.5"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing: expected a number from 0 to 1, got -0.1"),
        ({"bias": 3.0}, TypeError, "bias: expected a Tensor or None, got float"),
    ],
)
def test_bad_input(wrong, error, message):
    (hidden, weight, bias), target = inputs()
    right = {"hidden": hidden, "weight": weight, "target": target, "bias": bias}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**{name: x.cpu() for name, x in right.items()}, **wrong})
