"""How much of a whole model's step the front end is: GPT-2 small's widths, 12 layers, and 1 as a draft model may have.

A front end is one layer's first projection and what comes before it, so a deep model gains little by it; report.py puts beside
these times the share of the floating-point operations that it has in each of the published models.
"""

from functools import partial

import pytest
import torch

from pyembed.benchmark.cases import GPT, MODELS, Stock, make_ids
from pyembed.benchmark.peers import check, gradients, with_module
from pyembed.benchmark.timing import Variant, clock, compare

MODEL = MODELS["GPT-2 small"]


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("layers", [1, 12])
def test_step(record, device, tokens, layers, trains):
    B, T = (8, 1024) if device.type == "cuda" else (1, 256) if layers > 1 else (4, 256)
    ids = make_ids("natural", MODEL.V, B * T, tokens).view(B, T).to(device)

    def run():
        torch.manual_seed(0)
        stock = GPT(Stock(MODEL, T), layers).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        ours = with_module(stock, "front", stock.front.fused())
        ways = {"stock modules": stock, "EmbeddingQKV": ours}
        variants = {way: Variant(partial(model, ids), list(stock.parameters())) for way, model in ways.items()}
        grads = gradients(variants, trains)
        check(variants, grads, reference="stock modules")
        return compare(variants, grads, clock(device), seconds=4), {}

    record(
        run, suite="step", case=f"a model of {layers} layer{'s' if layers > 1 else ''}, {B} × {T}", layers=layers, tokens=B * T,
        direction="training" if trains else "forward",
    )  # fmt: skip
