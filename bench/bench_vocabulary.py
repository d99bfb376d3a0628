"""Growth of a vocabulary: 24 rows more for one table, beside a copy of it.

transformers' resize_token_embeddings with mean_resizing, its default, which draws rows from the covariance, is measured with
--full: it takes half a minute a call.
"""

import gc
from functools import partial

import pytest
import torch
from torch import nn

from pyembed.benchmark.timing import Variant, clock, compare
from pyembed.vocabulary import grow

NEW = 24


def model_of(V, D):
    """A model of transformers that is hardly more than its table."""
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(vocab_size=V, n_embd=D, n_layer=0, n_head=1, n_positions=1, bos_token_id=0, eos_token_id=0))


@pytest.mark.parametrize(("V", "D"), [(50_257, 768), (128_256, 2_048)], ids=lambda n: str(n))
def test_growth(record, device, request, V, D):
    weight = nn.Parameter(torch.empty(V, D, device=device).normal_(0, 0.02), requires_grad=False)

    def copy():
        larger = weight.new_empty(V + NEW, D)
        larger[:V] = weight

    def ours(init):
        table = nn.Embedding(1, D, _weight=weight[:1])
        table.weight, table.num_embeddings = weight, V
        grow(table, NEW, init)

    def theirs(model):
        model.wte.weight = nn.Parameter(weight.detach(), requires_grad=False)  # whose data is replaced
        model.wte.num_embeddings = model.config.vocab_size = V
        model.resize_token_embeddings(V + NEW)

    def run():
        gc.collect()
        variants = {"a copy": copy, 'grow, "mean"': lambda: ours("mean"), 'grow, "sample"': lambda: ours("sample")}
        if request.config.getoption("--full"):
            variants["transformers, mean_resizing"] = partial(theirs, model_of(V, D).to(device))
        variants = {name: Variant(call, []) for name, call in variants.items()}
        return compare(variants, None, clock(device), seconds=3), {}

    record(run, suite="vocabulary", case=f"growth by {NEW} rows, {V:,} × {D:,}", direction="forward")
