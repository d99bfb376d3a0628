"""The front end on a CPU, at GPT-2 small's widths and a character model's, against stock modules: `auto`, and the plan `table`.

    python -m pytest bench/bench_plans.py --benchmark-json=plans.json [--text FILE]

Ours and stock modules run in turn in one process; extra_info holds stock's median and the ratio stock / ours (above 1: ours
is faster). Results are compared before anything is timed. Times are wall-clock seconds of a forward, or forward and backward;
those of `table` are without building it. bench/report.py makes tables of the JSON.
"""

import statistics
import time

import pytest
import torch
from torch import nn

import pyembed

GPT2 = {"V": 50257, "L": 1024, "D": 768, "heads": 12}
CHARACTERS = {"V": 65, "L": 256, "D": 384, "heads": 6}
SHAPES = [(1, 1), (16, 1), (1, 16), (4, 64), (1, 1024), (8, 256), (8, 1024), (32, 1024)]


class Stock(nn.Module):
    """What a user has today: nn.Embedding twice, nn.LayerNorm, nn.Linear, and the split into heads."""

    def __init__(self, V, L, D, heads, dtype):
        super().__init__()
        self.heads = heads
        self.token, self.position = nn.Embedding(V, D, dtype=dtype), nn.Embedding(L, D, dtype=dtype)
        self.norm, self.qkv = nn.LayerNorm(D, dtype=dtype), nn.Linear(D, 3 * D, dtype=dtype)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids):
        hidden = self.token(ids) + self.position(torch.arange(ids.shape[1]))
        heads = self.qkv(self.norm(hidden)).view(*ids.shape, 3 * self.heads, -1)
        return hidden, *heads.split(self.heads, -2)

    def fused(self):
        return pyembed.EmbeddingQKV.from_modules(self.token, self.position, self.norm, qkv=self.qkv, num_heads=self.heads)


class StockRotary(nn.Module):
    """The same of a Llama of that width: nn.RMSNorm, no biases, grouped heads, and turns as transformers writes them."""

    def __init__(self, V, L, D, heads, dtype):
        super().__init__()
        self.heads, self.kv_heads, self.rotary = heads, heads // 3, pyembed.Rotary(D // heads, L)
        self.token, self.norm = nn.Embedding(V, D, dtype=dtype), nn.RMSNorm(D, dtype=dtype)
        self.qkv = nn.Linear(D, D + 2 * D // 3, bias=False, dtype=dtype)

    def forward(self, ids):
        hidden = self.token(ids)
        heads = self.qkv(self.norm(hidden)).view(*ids.shape, self.heads + 2 * self.kv_heads, -1)
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), -2)
        cos, sin = (table[: ids.shape[1], None].repeat(1, 1, 2) for table in (self.rotary.cos, self.rotary.sin))
        half = query.shape[-1] // 2
        query, key = (x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin for x in (query, key))
        return hidden, query, key, value

    def fused(self):
        return pyembed.EmbeddingQKV.from_modules(
            self.token, None, self.norm, qkv=self.qkv, num_heads=self.heads, num_kv_heads=self.kv_heads, rotary=self.rotary
        )


def direction(trains):
    return "forward+backward" if trains else "forward"


def step(module, ids, grads):
    """Seconds of one call, with grads of its backward too; to free the last results and gradients is not counted."""
    module.zero_grad()
    with torch.set_grad_enabled(grads is not None):
        start = time.perf_counter()
        outputs = tuple(module(ids))
        if grads is not None:
            torch.autograd.backward(outputs, grads)
        return time.perf_counter() - start


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        tolerance = 2e-2 if b.dtype.itemsize == 2 else 1e-4
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def compare(benchmark, case, widths, ids, trains, dtype=torch.float32, plan="auto", kind=Stock):
    torch.manual_seed(0)
    stock = kind(**widths, dtype=dtype)
    ours = stock.fused()
    with pyembed.plan(plan):
        with torch.set_grad_enabled(trains):
            chosen = ours.explain(ids)
            expected, found = stock(ids), ours(ids)
        assert_close(found, expected)
        grads = [torch.randn_like(output) for output in expected] if trains else None
        del expected, found
        rounds = 7 if trains or ids.numel() > 4096 else 21 if ids.numel() > 100 else 401
        mine, theirs = [], []
        benchmark.pedantic(
            lambda: mine.append(step(ours, ids, grads)),
            setup=lambda: theirs.append(step(stock, ids, grads)),
            rounds=rounds,
            warmup_rounds=1,
        )
    median, stock_median = statistics.median(mine[1:]), statistics.median(theirs[1:])
    benchmark.extra_info.update(
        case=case, direction=direction(trains), tokens=ids.numel(), distinct=ids.unique().numel(), plan=chosen.name,
        dtype=str(dtype), median=median, stock_median=stock_median, ratio=stock_median / median,
    )  # fmt: skip
    print(f"\n{benchmark.name}: {chosen.name}, {stock_median / median:.2f} times as fast as stock modules")


@pytest.mark.parametrize("trains", [False, True], ids=direction)
@pytest.mark.parametrize("B, T", SHAPES)
def test_auto(benchmark, tokens, B, T, trains):
    compare(benchmark, f"GPT-2 small, {B} × {T}", GPT2, tokens[: B * T].view(B, T), trains)


@pytest.mark.parametrize("trains", [False, True], ids=direction)
def test_auto_on_uniformly_random_ids(benchmark, trains):
    ids = torch.randint(50257, (32, 1024), generator=torch.Generator().manual_seed(0))
    compare(benchmark, "GPT-2 small, 32 × 1024 uniformly random ids", GPT2, ids, trains)


@pytest.mark.parametrize("trains", [False, True], ids=direction)
@pytest.mark.parametrize("B, T", [(1, 1), (8, 256), (8, 1024)])
def test_rotary(benchmark, tokens, B, T, trains):
    compare(benchmark, f"Llama of that width, rotary, {B} × {T}", GPT2, tokens[: B * T].view(B, T), trains, kind=StockRotary)


@pytest.mark.parametrize("B, T", [(1, 1), (16, 1), (1, 1024), (32, 1024)])
def test_table(benchmark, tokens, B, T):
    compare(benchmark, f"GPT-2 small, {B} × {T}, table built before", GPT2, tokens[: B * T].view(B, T), False, plan="table")


@pytest.mark.parametrize("trains", [False, True], ids=direction)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bit(benchmark, tokens, dtype, trains):
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    compare(benchmark, f"GPT-2 small, 2 × 256, {name}", GPT2, tokens[:512].view(2, 256), trains, dtype)


@pytest.mark.parametrize("trains", [False, True], ids=direction)
def test_character_model(benchmark, characters, trains):
    compare(benchmark, "character model, 64 × 256", CHARACTERS, characters[: 64 * 256].view(64, 256), trains)
