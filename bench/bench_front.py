"""A transformer's front end: gather, positional add, norm and QKV projection, by every plan and by every peer.

Rows are a model, a number of tokens B × T and a kind of ids; variants run in turn in one process, and are compared with eager
before anything is timed. A training row has its forward, its backward and both; what the forward keeps for the backward
(`saved`) and the most memory of a call (`peak`) are in bytes. `auto` is what a user gets who asks for no plan.
"""

import pytest
import torch

import pyembed
from pyembed.benchmark.cases import MODELS, make_ids
from pyembed.benchmark.peers import BOUND, COMPILERS, PLANS
from pyembed.benchmark.rows import front_end, needed_bytes
from pyembed.plans.table import available

# model, B, T, kind of ids, dtype. With --full also what FULL adds.
SHAPES = [(1, 1), (16, 1), (1, 16), (4, 64), (1, 1024), (8, 256), (8, 1024), (32, 1024)]
CPU = [
    *(("GPT-2 small", B, T, "natural", torch.float32) for B, T in SHAPES),
    ("GPT-2 small", 4, 1024, "uniform", torch.float32),
    ("GPT-2 small", 1, 64, "natural", torch.bfloat16),
    ("character GPT", 64, 256, "natural", torch.float32),
    ("BERT-base", 8, 128, "natural", torch.float32),
    ("Qwen3-0.6B", 2, 512, "natural", torch.float32),
    ("Llama-3.2-1B", 1, 1, "natural", torch.float32),
]
CPU_FULL = [
    *(("GPT-2 small", B, 1024, "natural", torch.float32) for B in (4, 16, 64, 128)),
    ("GPT-2 small", 1, 64, "natural", torch.float16),
    *(("GPT-2 small", 8, 1024, kind, torch.float32) for kind in ("zipf", "uniform")),
    ("Qwen3-0.6B", 1, 1, "natural", torch.float32),
    ("Llama-3.2-1B", 4, 512, "natural", torch.float32),
]
GPU = [
    *(
        (name, B, T, "natural", torch.bfloat16)
        for name in ("GPT-2 small", "Llama-3.2-1B", "Llama-3-8B")
        for B, T in [(1, 1), (64, 1), (4, 1024), (16, 1024)]
    ),
    ("GPT-2 small", 16, 1024, "uniform", torch.bfloat16),
    ("character GPT", 64, 256, "natural", torch.bfloat16),
]
GPU_FULL = [
    *(
        (name, B, T, "natural", torch.bfloat16)
        for name in ("GPT-2 XL", "Llama-2-7B", "Qwen3-0.6B", "BERT-base")
        for B, T in [(1, 1), (64, 1), (32, 512), (128, 512)]
    ),
    *(
        (name, B, T, "natural", torch.bfloat16)
        for name in ("GPT-2 small", "Llama-3.2-1B", "Llama-3-8B")
        for B, T in [(16, 1), (1, 512), (64, 1024), (128, 1024)]
    ),
    *(("Llama-3.2-1B", B, 1024, kind, torch.bfloat16) for B in (16, 128) for kind in ("zipf", "uniform")),
    *(("GPT-2 small", 16, 1024, "natural", dtype) for dtype in (torch.float16, torch.float32)),
]
QUICK, FULL = (GPU, GPU_FULL) if torch.cuda.is_available() else (CPU, CPU_FULL)
# To compile takes most of the time; so many tokens a quick profile compiles for.
COMPILED = {"torch.compile": (1, 1024, 8192) if QUICK is CPU else None, "max-autotune": (1, 16384)}  # None: any
PEERS = ["eager", "torch.compile", BOUND]
MORE = [*COMPILERS, "Liger norm", "FLA norm", "QuACK norm"]


def named(case):
    name, B, T, kind, dtype = case
    return f"{name.replace(' ', '-')}-{B}x{T}-{kind}-{str(dtype)[6:]}"


def described(value):
    return "training" if value is True else "forward" if value is False else None


@pytest.mark.parametrize("trains", [False, True], ids=described)
@pytest.mark.parametrize(
    "case", [*QUICK, *FULL], ids=lambda c: f"{c[0].replace(' ', '-')}-{c[1]}x{c[2]}-{c[3]}-{str(c[4])[6:]}"
)
def test_front_end(record, request, device, tokens, characters, case, trains):
    name, B, T, kind, dtype = case
    model, full = MODELS[name], request.config.getoption("--full")
    if case in FULL and not full:
        pytest.skip("a row of --full")
    if trains and T == 1:
        pytest.skip("a decode step does not train")
    ids = make_ids(kind, model.V, B * T, characters if model.V < 100 else tokens).view(B, T).to(device)
    needed = needed_bytes(model, B * T, dtype.itemsize, trains)
    if needed > available(device):
        pytest.skip(f"it needs about {needed / 2**30:.0f} GiB of memory, {available(device) / 2**30:.0f} GiB are free")
    distinct = ids.unique().numel()
    wanted, spared = {*PEERS, *PLANS, *(MORE if full or device.type == "cuda" else ())}, {}
    for compiler, sizes in COMPILED.items():
        if compiler in wanted and not full and sizes and (B * T not in sizes or trains and compiler == "max-autotune"):
            wanted.remove(compiler)
            spared[compiler] = "a row of --full"

    graphs = device.type == "cuda" and not trains

    def run():
        rows, left_out = front_end(model, ids, dtype, trains, wanted, 20 if full else 1.5, graphs)
        return rows, spared | left_out

    record(
        run, suite="front end", case=f"{name}, {B} × {T}", model=name, tokens=B * T, distinct=distinct, ids=kind,
        dtype=str(dtype)[6:], direction=described(trains), graphs=graphs, shape=[B, T],
    )  # fmt: skip
    pyembed.empty_cache()
