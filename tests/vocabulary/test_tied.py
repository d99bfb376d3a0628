"""A table that is a head's weight too: its gradient is right in every kind of backward, and one buffer where that can be."""

import copy
import gc
import threading

import pytest
import torch
import torch.nn.functional as nnf
from conftest import DEVICE, full
from families import Own, Packed, tokens
from numerics import Largest
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyembed
from pyembed import functional as F
from pyembed import tied
from pyembed.vocabulary import linear_cross_entropy

V, D, T = 40, 8, 12


def stock_loss(hidden, weight, target, bias=None, reduction="mean"):
    return nnf.cross_entropy(nnf.linear(hidden, weight, bias), target, reduction=reduction)


STOCK, OURS = (nnf.embedding, stock_loss), (F.embedding, linear_cross_entropy)


def make(dtype=torch.float64):
    """A weight that a head has had, ids and targets."""
    torch.manual_seed(0)
    weight = torch.randn(V, D, dtype=dtype).requires_grad_()
    ids, target = torch.randint(V, (2, T))
    linear_cross_entropy(torch.randn(1, D, dtype=dtype), weight, target[:1])
    return weight, ids, target


def layer(hidden):
    """Something between the lookup and the head that has a backward."""
    return hidden.tanh() * 2


@pytest.fixture
def added(monkeypatch):
    """Addresses of the gradients of heads to which lookups added theirs."""
    found = []

    def spy(waiting, buffer=tied.buffer):
        into = buffer(waiting)
        found.extend([] if into is None else [into.data_ptr()])
        return into

    monkeypatch.setattr(tied, "buffer", spy)
    return found


def same(function):
    """function(weight, ids, target, look_up, loss_of) -> tensors: alike by ours and by PyTorch's operators. Returns ours."""
    weight, ids, target = make()
    other = weight.detach().clone().requires_grad_()
    ours = function(weight, ids, target, *OURS)
    torch.testing.assert_close(ours, function(other, ids, target, *STOCK), rtol=1e-10, atol=1e-12)
    return ours


def backward(weight, *losses):
    for loss in losses:
        loss.backward()
    return weight.grad


def test_one_buffer(added):
    weight, ids, target = make()
    with Largest() as made:
        linear_cross_entropy(layer(F.embedding(ids, weight)), weight, target, chunk=4).backward()
    assert made.sizes[V * D] == 1 and made.elements == V * D and added == [weight.grad.data_ptr()]
    weight.grad = None
    with Largest() as made:
        linear_cross_entropy(layer(nnf.embedding(ids, weight)), weight, target, chunk=4).backward()
    assert made.sizes[V * D] > 1 and len(added) == 1  # as this shows what it is to count


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_same_gradient(padding_idx, dtype, added):
    def run(weight, ids, target, look_up, loss_of):
        ids[:4] = 3
        ids = ids.to(dtype)
        return backward(weight, loss_of(layer(look_up(ids, weight, padding_idx)), weight, target))

    same(run)
    assert added


def test_gradients_are_added_up_over_steps(added):
    def run(weight, ids, target, look_up, loss_of):
        for _ in range(2):
            loss_of(layer(look_up(ids, weight)), weight, target).backward()
        return weight.grad

    same(run)
    assert len(added) == 2


def test_two_graphs_at_once(added):
    def run(weight, ids, target, look_up, loss_of):
        losses = [loss_of(layer(look_up(x, weight)), weight, target) for x in (ids, ids.flip(0), ids[:1].expand(T))]
        return backward(weight, losses[1], losses[0] + losses[2])

    same(run)
    assert len(added) == 3


def test_several_heads_and_lookups(added):
    def run(weight, ids, target, look_up, loss_of):
        hidden = layer(look_up(ids, weight) + look_up(target, weight) + nnf.embedding(ids, weight))
        return backward(weight, loss_of(hidden, weight, target) + 3 * loss_of(layer(hidden), weight, ids))

    same(run)
    assert len(added) == 2


def test_a_lookup_alone_has_a_dense_gradient(added):
    def run(weight, ids, target, look_up, loss_of):
        hidden = look_up(ids, weight)
        loss = loss_of(hidden, weight, target)  # in the graph, but not in what is differentiated
        return backward(weight, layer(hidden).square().sum()), loss.detach()

    ours, _ = same(run)
    assert ours.layout == torch.strided and not added


def test_a_head_alone(added):
    def run(weight, ids, target, look_up, loss_of):
        hidden = look_up(ids, weight)
        return backward(weight, loss_of(hidden.detach(), weight, target))

    same(run)
    assert not added


@pytest.mark.parametrize("wanted", ["weight", "scale", "both"])
def test_gradients_of_some_inputs(wanted, added):
    """A gradient that nobody wants is not kept."""
    held = []

    def run(weight, ids, target, look_up, loss_of):
        scale = torch.ones(D, dtype=weight.dtype, requires_grad=True)
        hidden = look_up(ids, weight) * scale
        held.append(tied.of(weight))
        loss = loss_of(layer(hidden), weight, target)
        inputs = {"weight": [weight], "scale": [scale], "both": [weight, scale]}[wanted]
        return torch.autograd.grad(loss, inputs)

    same(run)
    assert not held[0].buffers and bool(added) == (wanted != "scale")


def test_second_derivatives_are_refused():
    def run(weight, ids, target, look_up, loss_of):
        hidden = look_up(ids, weight)
        loss = loss_of(layer(hidden), weight, target)
        return torch.autograd.grad(loss, [weight, hidden], create_graph=True)

    for gradient in same(run):
        with pytest.raises(RuntimeError, match="linear_cross_entropy: it has no second derivatives"):
            gradient.sum().backward()


def test_second_derivatives_of_the_lookup():
    def run(weight, ids, target, look_up, loss_of):
        (first,) = torch.autograd.grad(look_up(ids, weight).pow(3).sum(), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)

    same(run)


def test_one_backward_of_mean_and_any_of_none(added):
    weight, ids, target = make()
    loss = linear_cross_entropy(layer(F.embedding(ids, weight)), weight, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: expected one backward, got another"):
        loss.backward()

    def run(weight, ids, target, look_up, loss_of):
        losses = loss_of(layer(look_up(ids, weight)), weight, target, reduction="none")
        losses[3].backward(retain_graph=True)
        losses.backward(torch.arange(T, dtype=weight.dtype))
        return weight.grad

    same(run)
    assert len(added) == 3


def test_weights_that_are_no_leaves(added):
    """A change in place gives the tensor another history, whose gradient is not that of the lookup before."""

    def run(weight, ids, target, look_up, loss_of, changes=True):
        table = weight * 1.5
        loss_of(table[:1], table, target[:1])
        hidden = layer(look_up(ids, table))
        if changes:
            table.mul_(2)
        return backward(weight, loss_of(hidden, table, target))

    same(run)
    assert not added
    same(lambda *args: run(*args, changes=False))
    assert len(added) == 1


@pytest.mark.parametrize("streams, together", [([1, 1, 1], 1), ([1, 1, 2], 0), ([1, 2, 2], 1), ([1, 2, 1], 0)])
def test_streams(streams, together, added, monkeypatch):
    """What runs in another stream would have to be waited for: of two lookups and a head those in the head's stream share."""

    def run(weight, ids, target, look_up, loss_of):
        def within(stream, function, *args):
            monkeypatch.setattr(tied, "_stream", lambda weight: stream)
            return function(*args)

        hidden = within(streams[0], look_up, ids, weight) + within(streams[1], look_up, target, weight)
        return backward(weight, within(streams[2], loss_of, layer(hidden), weight, target))

    same(run)
    assert bool(added) == together


def test_the_head_reads_the_weight_as_it_is_now():
    def run(weight, ids, target, look_up, loss_of):
        hidden = look_up(ids, weight)
        weight.data = weight.data * 2
        loss = loss_of(layer(hidden), weight, target)
        return backward(weight, loss), loss.detach()

    same(run)


def test_hooks_see_the_sum_once(added):
    seen = []

    def run(weight, ids, target, look_up, loss_of):
        weight.register_hook(lambda grad: seen.append(grad.clone()) or grad * 2)
        weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
        return backward(weight, loss_of(layer(look_up(ids, weight)), weight, target))

    same(run)
    assert len(added) == 1 and len(seen) == 4
    torch.testing.assert_close(seen[:2], seen[2:])


@pytest.mark.parametrize("what", ["lookup", "layer", "head"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints(what, use_reentrant):
    def run(weight, ids, target, look_up, loss_of):
        def kept(name, function, *args):
            return checkpoint(function, *args, use_reentrant=use_reentrant) if name == what else function(*args)

        scale = torch.ones((), dtype=weight.dtype, requires_grad=True)  # by which a reentrant checkpoint knows of gradients
        hidden = kept("lookup", lambda scale: look_up(ids, weight) * scale, scale)
        loss = kept("head", lambda x: loss_of(x, weight, target), kept("layer", layer, hidden))
        return backward(weight, loss)

    same(run)


def test_threads(added):
    """Backwards at once, through one weight, keep their gradients apart."""
    weight, ids, target = make()
    found, barrier = {}, threading.Barrier(4)

    def work(n):
        losses = [linear_cross_entropy(layer(F.embedding((ids + n) % V, weight)), weight, target) for _ in range(20)]
        barrier.wait()
        found[n] = [torch.autograd.grad(loss, weight)[0] for loss in losses]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, grads in found.items():
        (right,) = torch.autograd.grad(stock_loss(layer(nnf.embedding((ids + n) % V, weight)), weight, target), weight)
        for grad in grads:
            torch.testing.assert_close(grad, right, rtol=1e-10, atol=1e-12)
    assert len(found) == 4 and len(added) == 80


def test_a_lookup_that_autograd_runs_last(added):
    """As that of a new thread, whose nodes count from 0, so that autograd takes them for older ones."""

    def run(weight, ids, target, look_up, loss_of):
        others = look_up(ids, weight), []  # by which the node where gradients wait is of this thread
        thread = threading.Thread(target=lambda: others[1].append(look_up(target, weight)))
        thread.start()
        thread.join()
        return backward(weight, loss_of(layer(others[1][0]), weight, ids))

    same(run)
    assert not added


def test_nothing_outlives_the_graph():
    weight, ids, target = make()
    loss = linear_cross_entropy(layer(F.embedding(ids, weight)), weight, target)
    assert tied.of(weight) is not None

    def fail(grad):
        raise KeyError("in the middle of a backward")

    hidden = F.embedding(ids, weight)
    hidden.register_hook(fail)
    other = linear_cross_entropy(hidden, weight, target)
    with pytest.raises(KeyError):
        other.backward()
    loss.backward()  # another backward over the same weight is its own
    torch.testing.assert_close(weight.grad, same_gradient(weight, ids, target))
    del loss, other, hidden
    gc.collect()
    assert tied.of(weight) is None


def test_a_backward_that_fails_leaves_no_gradient_behind():
    """Also where graphs of steps overlap, as those of a loop that goes on after an error do."""
    weight, ids, target = make()
    held, kept = None, []
    for _ in range(4):
        hidden = F.embedding(ids, weight)
        hidden.register_hook(lambda grad: kept.append(len(tied.of(weight).buffers)) or grad.no_such_attribute)
        held = hidden, linear_cross_entropy(layer(hidden), weight, target)
        with pytest.raises(AttributeError):
            held[1].backward()
    assert kept == [1] * 4
    torch.ones((), requires_grad=True).backward()  # autograd drops what a failed backward left
    assert not tied.of(weight).buffers


def same_gradient(weight, ids, target):
    return torch.autograd.grad(stock_loss(layer(nnf.embedding(ids, weight)), weight, target), weight)[0]


def front(plan):
    parts = nn.Embedding(T, D), nn.LayerNorm(D), nn.Linear(D, 3 * D)

    def run(ids, table):
        position, norm, qkv = (part.to(table.device) for part in parts)
        token = nn.Embedding(V, D)
        token.weight = table
        with pyembed.plan(plan):
            hidden, *heads = pyembed.EmbeddingQKV.from_modules(token, position, norm, qkv=qkv, num_heads=2)(ids.view(2, -1))
        return hidden.view(T, D) + sum(x.reshape(T, D) * n for n, x in enumerate(heads, 1))

    return run


def module(ids, table):
    token = pyembed.Embedding(V, D)
    token.weight = table
    return token(ids)


def sum_of_tables(ids, table):
    token = pyembed.Embedding(V, D, padding_idx=2)
    token.weight = table
    return pyembed.TokenPositionEmbedding.from_modules(token, nn.Embedding(T, D).to(table.device), scale=3.0)(ids)


LOOKUPS = {"Embedding": module, "TokenPositionEmbedding": sum_of_tables}
LOOKUPS |= {plan: front(plan) for plan in ("one_pass", "distinct")}


CASES = [("torch", name) for name in LOOKUPS]
CASES += [("triton", "Embedding"), ("triton", "distinct"), full("triton", "one_pass"), full("triton", "TokenPositionEmbedding")]


@pytest.mark.parametrize("backend, name", CASES)
def test_lookups_of_ours(name, backend, added):
    if backend == "triton":
        pytest.importorskip("triton")
    device = DEVICE if backend == "triton" else "cpu"
    weight, ids, target = (x.detach().to(device) for x in make(torch.float32))
    ids[:5], weight = 2, nn.Parameter(weight)
    grads = []
    for _ in range(3):  # the others after a head had the weight
        weight.grad = None
        torch.manual_seed(1)
        with pyembed.backend(backend):
            linear_cross_entropy(layer(LOOKUPS[name](ids, weight)), weight, target).backward()
        grads.append(weight.grad)
    assert added == [grads[1].data_ptr(), grads[2].data_ptr()]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(grads[1], grads[2])


class Trunk(Own):
    def forward(self, ids):
        return self.hidden(ids)


@pytest.mark.parametrize("backend, plan", [("torch", "distinct"), full("triton", "one_pass")])
def test_a_fused_model(backend, plan, added):
    torch.manual_seed(0)
    stock, ids = Trunk(nn.LayerNorm, Packed, tied=True).train(), tokens()
    model = copy.deepcopy(stock)
    pyembed.fuse(model, ids)
    for _ in range(2):
        for each in (stock, model):
            each.zero_grad()
            with pyembed.backend(backend), pyembed.plan(plan):
                linear_cross_entropy(each(ids)[:, :-1], each.tok.weight, ids[:, 1:]).backward()
        for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert added == [model.tok.weight.grad.data_ptr()]


def test_sixteen_bits(added):
    """A frequent token's many small gradients are not lost to the few digits of the sum."""
    weight, ids, target = make(torch.bfloat16)
    many = ids[:1].expand(2000)
    hidden = F.embedding(many, weight)
    loss = linear_cross_entropy(hidden[:T], weight, target)
    (loss + hidden.float().mul(1e-3).sum()).backward()
    double = weight.detach().double().requires_grad_()
    looked = nnf.embedding(many, double)
    (stock_loss(looked[:T], double, target) + looked.mul(1e-3).sum()).backward()
    assert added == [weight.grad.data_ptr()]
    torch.testing.assert_close(weight.grad.double(), double.grad, rtol=2**-6, atol=2**-8)
