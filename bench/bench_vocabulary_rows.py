"""Rows that train beside a frozen table, rows that are no words, and a head tied to its table: forward and backward, beside
what is done without them.

PEFT runs where it is installed, torch.compile where there is a compiler. --full: a table of 128,256 rows too.
"""

import functools

import pytest
import torch
import torch.nn.functional as nnf
from torch import nn

import pyembed
from pyembed.benchmark import cases
from pyembed.benchmark.peers import check, compiled, compiler_missing, gradients, reason_of
from pyembed.benchmark.timing import Variant, clock, compare, peak_bytes
from pyembed.functional import embed, embedding
from pyembed.vocabulary import Rows, TrainableRows, linear_cross_entropy
from pyembed.vocabulary.head import chunk_of

R, V, D = 16, 50_257, 768
PLANS = ("one_pass", "distinct", "auto")


def measured(variants, reference, device, makers=(), memory=False):
    """(rows, left out), after all have given what `reference` gives. makers: {peer: a function that builds its Variant}.
    memory: measure that too."""
    left_out = {}
    for name, make in dict(makers).items():
        try:
            variants[name] = make()
            variants[name].forward()
        except Exception as error:  # whatever another library does on this machine
            variants.pop(name, None)
            left_out[name] = reason_of(error)
    grads = gradients(variants, True)
    left_out |= check(variants, grads, reference)
    peaks = {name: {"peak": peak_bytes(variant, grads[name], device)} for name, variant in variants.items() if memory}
    rows = compare(variants, grads, clock(device), seconds=3)
    return {name: found | peaks.get(name, {}) for name, found in rows.items()}, left_out


def compiled_or_not(function, parameters, device):
    def make():
        missing = compiler_missing(device)
        if missing:
            raise RuntimeError(missing)
        torch.compiler.reset()
        return Variant(compiled(function), parameters)

    return make


@pytest.mark.parametrize("size", [V, 128_256])
@pytest.mark.parametrize("M", [4096])
def test_rows_that_train(record, device, request, M, size):
    if size != V and not request.config.getoption("--full"):
        pytest.skip("another size of table: only with --full")

    def run():
        table, first = nn.Embedding(size, D, device=device), size - R
        ids = torch.randint(size, (M,), device=device)
        ids[::8] = torch.randint(first, size, (len(ids[::8]),), device=device)
        masked, rows = nn.Embedding(size, D, _weight=table.weight.detach().clone()), nn.Parameter(table.weight[first:].clone())
        mask = (torch.arange(size, device=device) >= first).unsqueeze(-1)
        masked.weight.register_hook(lambda grad: grad.mul_(mask))
        ours = TrainableRows(table, range(first, size))

        def two_tables():
            slot = ids - first
            own = nnf.embedding(slot.clamp(min=0), rows)
            return (torch.where((slot >= 0).unsqueeze(-1), own, nnf.embedding(ids, table.weight)),)

        def peft():
            from peft import TrainableTokensConfig, inject_adapter_in_model

            config = TrainableTokensConfig(target_modules=["token"], token_indices=[*range(first, size)])
            plain = nn.Embedding(size, D, _weight=table.weight)
            layer = inject_adapter_in_model(config, nn.ModuleDict({"token": plain}))["token"]
            return Variant(lambda: (layer(ids),), [layer.trainable_tokens_delta["default"]])

        variants = {
            "two tables": Variant(two_tables, [rows]),
            "pyembed": Variant(lambda: (ours(ids),), [ours.rows]),
            # Not compared: its gradient is of the whole table.
            "gradient mask": Variant(lambda: (masked(ids),), [masked.weight], checked=False),
        }
        makers = {"PEFT": peft, "torch.compile": compiled_or_not(two_tables, [rows], device)}
        return measured(variants, "two tables", device, makers)

    record(run, suite="vocabulary", direction="training", case=f"{R} rows train, {M:,} tokens, {size:,} × {D:,}")


@pytest.mark.parametrize("B, T, each", [(4, 1024, 576)])
def test_rows_that_are_no_words(record, device, B, T, each):
    def run():
        weight = torch.randn(V, D, device=device)
        ids = torch.randint(1, V, (B, T), device=device)
        ids[:, 8 : 8 + each] = 0
        rows = torch.randn(B * each, D, device=device, requires_grad=True)

        def cumsum_where():
            taken = ids == 0
            slot = (taken.view(-1).cumsum(0) - 1).clamp(0).view(B, T)
            return (torch.where(taken.unsqueeze(-1), nnf.embedding(slot, rows), nnf.embedding(ids, weight)),)

        calls = {
            "masked_scatter": lambda: (nnf.embedding(ids, weight).masked_scatter((ids == 0).unsqueeze(-1), rows),),
            "cumsum + where": cumsum_where,
            "pyembed": lambda: (embed(ids, weight, rows=Rows(rows, 0)),),
        }
        makers = {"torch.compile": compiled_or_not(cumsum_where, [rows], device)}
        return measured({name: Variant(call, [rows]) for name, call in calls.items()}, "masked_scatter", device, makers)

    record(run, suite="vocabulary", direction="training", case=f"{each} rows in each of {B} × {T:,}")


@pytest.mark.parametrize("kind", ["a soft prompt", "patches", "rows that train"])
@pytest.mark.parametrize("B, T, each", [(8, 1024, 576)])
def test_front_ends(record, device, tokens, kind, B, T, each):
    """GPT-2 small's widths over tokens of text: a soft prompt of R ids, an image's patches, or R ids whose rows train."""

    def run():
        table = nn.Embedding(V + R, D, device=device).requires_grad_(False)
        position, norm, qkv = (part.to(device) for part in (nn.Embedding(T, D), nn.LayerNorm(D), nn.Linear(D, 3 * D)))
        ids, options = cases.make_ids("natural", V, B * T, tokens).view(B, T).to(device), {}
        first, count = (8, each) if kind == "patches" else (0, R)
        ids[:, first : first + count] = V if kind == "patches" else torch.arange(V, V + R, device=device)
        rows = nn.Parameter(torch.randn(B * each if kind == "patches" else R, D, device=device))
        if kind == "rows that train":
            token = TrainableRows(table, range(V, V + R))
            token.rows = rows
        else:
            token, options = table, {"rows": Rows(rows, V if kind == "patches" else range(V, V + R))}
        front = pyembed.EmbeddingQKV.from_modules(token, position, norm, qkv=qkv, num_heads=12)
        parameters = [rows, *(p for part in (position, norm, qkv) for p in part.parameters())]

        def operators():
            if kind == "patches":
                hidden = nnf.embedding(ids, table.weight).masked_scatter((ids == V).unsqueeze(-1), rows)
            else:
                own = nnf.embedding((ids - V).clamp(min=0), rows)
                hidden = torch.where((ids >= V).unsqueeze(-1), own, nnf.embedding(ids, table.weight))
            hidden = hidden + position.weight[:T]
            return hidden, *(x.unflatten(-1, (12, -1)) for x in qkv(norm(hidden)).chunk(3, -1))

        variants = {"operators": Variant(operators, parameters)}
        for plan in PLANS:
            variants[plan] = Variant(
                functools.partial(front, ids, **options), parameters, functools.partial(pyembed.plan, plan)
            )
        return measured(variants, "operators", device, {"torch.compile": compiled_or_not(operators, parameters, device)})

    record(run, suite="vocabulary", direction="training", case=f"front end, {kind}, {B} × {T:,}, {D:,}")


@pytest.mark.parametrize("M", [1024])
def test_a_tied_head(record, device, tokens, M):
    """GPT-2 small's table, which is its head's weight too: a lookup, a norm and the loss, without the layers between."""

    def run():
        weight, norm = nn.Embedding(V, D, device=device).weight, nn.LayerNorm(D, device=device)
        ids = cases.make_ids("natural", V, M + 1, tokens).to(device)
        ids, target = ids[:-1], ids[1:]
        parameters = [weight, *norm.parameters()]

        def whole():
            return (nnf.cross_entropy(nnf.linear(norm(nnf.embedding(ids, weight)), weight), target),)

        def pytorchs():
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_of(V), chunking_method=None)
            loss = functools.partial(nnf.linear_cross_entropy, options=options)
            return Variant(lambda: (loss(norm(nnf.embedding(ids, weight)), weight, target),), parameters)

        def ours(look_up):
            return Variant(lambda: (linear_cross_entropy(norm(look_up(ids, weight)), weight, target),), parameters)

        variants = {
            "cross_entropy": Variant(whole, parameters),
            "pyembed, nn.Embedding": ours(nnf.embedding),
            "pyembed": ours(embedding),
        }
        makers = {"F.linear_cross_entropy": pytorchs, "torch.compile": compiled_or_not(whole, parameters, device)}
        return measured(variants, "cross_entropy", device, makers, memory=True)

    record(run, suite="vocabulary", direction="training", case=f"a tied head, {M:,} tokens, {V:,} × {D:,}", tokens=M)
