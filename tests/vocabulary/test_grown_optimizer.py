import copy
import math

import pytest
import torch
from torch import nn

from pyembed.vocabulary import grow, grow_optimizer

V, D, NEW = 50, 33, 4
LR = 1e-2


def adafactor_of_transformers(parameters):
    return pytest.importorskip("transformers").Adafactor(parameters, lr=LR, relative_step=False, scale_parameter=False)


OPTIMIZERS = {
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=LR, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=LR, foreach=False, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=LR, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=LR, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=LR),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=LR),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=LR, initial_accumulator_value=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=LR),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=LR, centered=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=LR),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, weight_decay=0.1),
    "SGD dampening": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, dampening=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=LR),  # row statistics (V, 1), column statistics (1, D)
    "Adafactor of transformers": adafactor_of_transformers,  # (V,) and (D,)
}
BY_WHOLE_TENSOR = ("Adafactor", "Adafactor of transformers")


def stepped(make, steps=6):
    """A table and its optimizer after some steps, twice."""
    torch.manual_seed(0)
    table = nn.Embedding(V, D)
    other = copy.deepcopy(table)
    pairs = [(one, make(one.parameters())) for one in (table, other)]
    for _ in range(steps):
        step(pairs, torch.randn(V, D))
    return pairs


def step(pairs, grad):
    for table, optimizer in pairs:
        table.weight.grad = grad[: len(table.weight)].clone()
        optimizer.step()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * ("transformers" in name)) for name in OPTIMIZERS]
)
def test_old_rows_go_on_and_new_ones_start(name):
    make = OPTIMIZERS[name]
    (table, optimizer), (other, reference) = stepped(make)
    grow_optimizer(optimizer, grow(table, NEW))
    new = nn.Parameter(table.weight.detach()[V:].clone())  # by themselves, from the first step on
    fresh = make([new])
    for i in range(4):
        grad = torch.randn(V + NEW, D)
        step([(table, optimizer), (other, reference)], grad)
        new.grad = grad[V:].clone()
        fresh.step()
        assert torch.equal(table.weight.grad, grad)
        assert torch.equal(table.weight[V:], new)
        if name not in BY_WHOLE_TENSOR:
            assert torch.equal(table.weight[:V], other.weight)
        if i == 1:  # saved and loaded, as one does
            states = [copy.deepcopy(o.state_dict()) for o in (optimizer, reference, fresh)]
            optimizer, reference, fresh = make(table.parameters()), make(other.parameters()), make([new])
            for o, state in zip((optimizer, reference, fresh), states, strict=True):
                o.load_state_dict(state)
            grow_optimizer(optimizer)


def test_new_rows_do_not_slow_the_old_ones():
    """Adafactor bounds the update of the whole tensor, of which rows without statistics would take all."""
    (table, optimizer), (other, reference) = stepped(OPTIMIZERS["Adafactor"])
    for one, weight in ((optimizer, table.weight), (reference, other.weight)):
        one.state[weight]["step"].fill_(5000)
    grow_optimizer(optimizer, grow(table, NEW))
    before = other.weight.detach().clone()
    step([(table, optimizer), (other, reference)], torch.randn(V + NEW, D))
    assert (table.weight[:V] - other.weight).norm() < 0.1 * (other.weight - before).norm()


def test_first_update_is_at_most_the_learning_rate():
    """A carried step count makes it 3.15 times as large, and transformers' resizing leaves an optimizer that fails."""
    make = OPTIMIZERS["AdamW"]
    grad = torch.randn(V + NEW, D)
    largest = {}
    for carried in (False, True):
        (table, optimizer), _ = stepped(make)
        optimizer.state[table.weight]["step"].fill_(5000)
        growth = grow(table, NEW)
        grow_optimizer(optimizer, growth)
        if carried:
            del optimizer.state[table.weight]["new_rows"]
            optimizer.param_groups[0]["amsgrad"] = False
        optimizer.param_groups[0]["weight_decay"] = 0.0
        before = table.weight.detach()[V:].clone()
        step([(table, optimizer)], grad)
        largest[carried] = ((table.weight[V:] - before).abs().max() / LR).item()
    assert largest[False] <= 1.0001
    assert largest[True] == pytest.approx(3.15, abs=0.01)


def test_own_steps_end_when_they_make_no_difference():
    make = lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.5, 0.6))  # noqa: E731
    (table, optimizer), (other, reference) = stepped(make)
    grow_optimizer(optimizer, grow(table, NEW))
    steps = 0
    while optimizer.state[table.weight]["new_rows"]:
        step([(table, optimizer), (other, reference)], torch.randn(V + NEW, D))
        assert torch.equal(table.weight[:V], other.weight)
        steps += 1
    assert steps == math.ceil(-25 / math.log2(0.6)) and not optimizer._optimizer_step_pre_hooks
    new = nn.Parameter(table.weight.detach()[V:].clone())
    step([(table, optimizer)], torch.randn(V + NEW, D))
    assert not torch.equal(table.weight[V:], new)


def test_growth_twice_within_padding():
    """Rows that were padding start anew as well; those of the first growth go on."""
    make = OPTIMIZERS["AdamW foreach"]
    (table, optimizer), (other, reference) = stepped(make)
    grow_optimizer(optimizer, grow(table, 2, multiple_of=8))
    news = [nn.Parameter(table.weight.detach()[V : V + 2].clone())]
    fresh = [make(news)]
    for _ in range(2):
        grad = torch.randn(56, D)
        grad[V + len(news) * 2 :] = 0
        step([(table, optimizer), (other, reference)], grad)
        for i, (new, one) in enumerate(zip(news, fresh, strict=True)):
            new.grad = grad[V + 2 * i : V + 2 * i + 2].clone()
            one.step()
            assert torch.equal(table.weight[V + 2 * i : V + 2 * i + 2], new)
        assert torch.equal(table.weight[:V], other.weight)
        if len(news) == 1:
            grow_optimizer(optimizer, grow(table, 2))
            news.append(nn.Parameter(table.weight.detach()[V + 2 : V + 4].clone()))
            fresh.append(make([news[1]]))


def test_schedules_and_other_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, 3))
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "lr": LR}, {"params": model[1].parameters()}], lr=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for grown in (False, True):
        if grown:
            grow_optimizer(optimizer, grow(model, NEW))
        before = model[0].weight.detach().clone()
        model(torch.arange(len(before))).square().sum().backward()
        optimizer.step()
        schedule.step()
        model.zero_grad()
    assert (model[0].weight - before)[V:].abs().max() < 0.51 * LR
    assert optimizer.param_groups[0]["params"] == [model[0].weight] and len(optimizer.state) == 3


def head_with_bias():
    model = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, V))
    model(torch.arange(9)).square().sum().backward()
    return model


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=["SGD", "Adam"])
def test_weight_decay_that_makes_nan_of_padding_is_refused(make):
    model = head_with_bias()
    decayed, plain = make(model.parameters(), lr=LR, weight_decay=0.1), make(model.parameters(), lr=LR)
    growth = grow(model, 1, multiple_of=8)
    with pytest.raises(ValueError, match=rf"got {make.__name__} with weight_decay=0.1: give biases a group without"):
        grow_optimizer(decayed, growth)
    assert len(decayed.param_groups[0]["params"][0]) == V
    grow_optimizer(plain, growth)
    model(torch.arange(9)).logsumexp(-1).sum().backward()
    plain.step()
    assert torch.isneginf(model[1].bias[51:]).all() and model[1].bias[:51].isfinite().all()


def test_decoupled_weight_decay_leaves_padding():
    model = head_with_bias()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    optimizer.step()
    grow_optimizer(optimizer, grow(model, 1, multiple_of=8))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(9)).logsumexp(-1).sum().backward()
        optimizer.step()
    assert torch.isneginf(model[1].bias[51:]).all() and model[1].bias[:51].isfinite().all()


def test_refused_and_as_it_was():
    (table, optimizer), _ = stepped(OPTIMIZERS["AdamW"])
    optimizer.state[table.weight]["blocks"] = torch.zeros(7)
    state, weight = dict(optimizer.state[table.weight]), table.weight
    growth = grow(table, 1)
    with pytest.raises(ValueError, match=r"state by rows or by columns of a parameter \(50, 33\), got blocks \(7,\)"):
        grow_optimizer(optimizer, growth)
    assert optimizer.param_groups[0]["params"] == [weight] and optimizer.state[weight] == state
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got Embedding"):
        grow_optimizer(table, growth)
    with pytest.raises(ValueError, match="SparseAdam"):
        grow_optimizer(torch.optim.SparseAdam(nn.Embedding(3, 2, sparse=True).parameters()), growth)


def test_square_tables_have_rows():
    table = nn.Embedding(8, 8)
    optimizer = torch.optim.AdamW(table.parameters())
    step([(table, optimizer)], torch.randn(8, 8))
    grow_optimizer(optimizer, grow(table, 1))
    assert optimizer.state[table.weight]["exp_avg"].shape == (9, 8)
    optimizer.state[table.weight]["sums"] = torch.zeros(9)
    square = nn.Embedding(9, 9)
    other = torch.optim.AdamW(square.parameters())
    step([(square, other)], torch.randn(9, 9))
    other.state[square.weight]["sums"] = torch.zeros(9)
    with pytest.raises(ValueError, match="got sums"):
        grow_optimizer(other, grow(square, 1))
