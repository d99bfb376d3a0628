"""How the cost grows with the number of tokens, on a CPU at GPT-2 small's widths: every way to run the front end, side by side.

    python -m pytest -s bench/bench_scaling.py --benchmark-json=scaling.json [--text FILE]

Variants run in turn in one process, each right after an untimed call of its own, as a model meets it that runs one of them
again and again; extra_info holds their medians in seconds and the ratios eager / variant (above 1: faster than eager).
pytest-benchmark's own column is a whole round of all of them. Outputs, and in training all gradients, are compared with
eager's before anything is timed.
"""

import os
import shutil
import statistics
import sys

import pytest
import torch
from bench_plans import GPT2, Stock, assert_close, direction, step

import pyembed
from pyembed.table import available

T = 1024
FORWARD_TOKENS = (1024, 4096, 16384, 65536, 131072)
TRAINING_TOKENS = (1024, 4096, 16384, 65536)
MANY_TOKENS = 16384  # from here on few rounds are enough
ROW_BYTES = 4 * 4 * GPT2["D"]  # of a token's results: hidden, query, key, value
HELD_ROWS = {False: 5, True: 10}  # so many times its results a call takes at its peak, with room to spare
CASES = [(M, trains) for trains, sizes in ((False, FORWARD_TOKENS), (True, TRAINING_TOKENS)) for M in sizes]


def find_compiler():
    """Path of the C++ compiler that torch.compile would call; None: there is none."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def make_variants(stock, trains):
    """{name: (module, plan)}, all over the weights of stock."""
    torch.compiler.reset()  # its cache is per code object, and falls back to eager when it is full
    variants = {"eager": (stock, "auto")}
    if find_compiler():
        variants["torch.compile"] = torch.compile(stock, dynamic=False, fullgraph=True), "auto"
    for plan in ("one_pass", "distinct", "table")[: 2 if trains else 3]:
        ours = pyembed.EmbeddingQKV.from_modules(
            stock.token, stock.position, stock.norm, qkv=stock.qkv, num_heads=GPT2["heads"]
        )
        variants[plan] = ours, plan
    return variants


def run(variant, ids, grads):
    """Seconds of one call."""
    module, plan = variant
    with pyembed.plan(plan):
        return step(module, ids, grads)


def results(variant, ids, grads):
    """Outputs, and with grads every parameter's gradient, over its largest element."""
    module, plan = variant
    module.zero_grad()
    with pyembed.plan(plan), torch.set_grad_enabled(grads is not None):
        outputs = tuple(module(ids))
        if grads is None:
            return outputs
        torch.autograd.backward(outputs, grads)
    gradients = [parameter.grad / parameter.grad.abs().amax() for parameter in module.parameters()]
    return *(output.detach() for output in outputs), *gradients


def check(variants, ids, grads):
    """Every variant gives what eager gives; each has then run once, so that it is compiled and has its table."""
    expected = results(variants["eager"], ids, grads)
    for name in list(variants)[1:]:
        assert_close(results(variants[name], ids, grads), expected)


@pytest.mark.parametrize("M, trains", CASES, ids=[f"{M}-{direction(trains)}" for M, trains in CASES])
def test_scaling(benchmark, tokens, M, trains):
    needed, room = HELD_ROWS[trains] * M * ROW_BYTES, available(torch.device("cpu"))
    if needed > room:
        pytest.skip(f"{M:,} tokens need about {needed / 2**30:.0f} GiB of memory, {room / 2**30:.0f} GiB are free")
    ids = tokens.repeat(-(-M // len(tokens)))[:M].view(-1, T)
    torch.manual_seed(0)
    variants = make_variants(Stock(**GPT2, dtype=torch.float32), trains)
    widths = [(GPT2["D"],)] + [(GPT2["heads"], GPT2["D"] // GPT2["heads"])] * 3
    grads = [torch.randn(*ids.shape, *width) for width in widths] if trains else None
    check(variants, ids, grads)
    seconds = {name: [] for name in variants}

    def one_round():
        for name, variant in variants.items():
            run(variant, ids, grads)  # takes caches and reused memory over from the variant before
            seconds[name].append(run(variant, ids, grads))

    benchmark.pedantic(one_round, rounds=5 if M >= MANY_TOKENS else 9, warmup_rounds=1)
    pyembed.empty_cache()
    if benchmark.stats is None:  # --benchmark-disable: correctness alone
        return
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    ratio = {name: median["eager"] / value for name, value in median.items()}
    benchmark.extra_info.update(
        tokens=M, distinct=ids.unique().numel(), direction=direction(trains), median=median, ratio=ratio,
        repeated=len(tokens) < M,
    )  # fmt: skip
    if "torch.compile" not in variants:
        benchmark.extra_info["left_out"] = {"torch.compile": "no C++ compiler is installed (g++ or clang++, or CXX)"}
    print(f"\n{benchmark.name}: " + ", ".join(f"{name} {median[name]:.4g} s ({ratio[name]:.2f}×)" for name in variants))
