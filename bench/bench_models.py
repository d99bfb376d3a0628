"""Whole models, stock against fused, in one run and interleaved: `python bench/bench_models.py [--models "GPT2;Llama"]`.

Of each model a stock and a fused one with the same weights take turns over a text in GPT-2's tokens: training step (forward,
backward), prefill and decode without gradients, and prefill by a table (fused.build_table). A ratio above 1 means that the
fused one is faster; it is the median over pairs of runs, and beside it stand the quartiles. "fused calls" says in how many of
the calls the front end ran fused: where it cannot gain, the model's own modules run, as they do in graphs of torch.compile on a
CPU, whose rows follow (both models compiled). Last, both are trained from one seed, every step fused, and the largest
difference of losses is printed.
"""

import argparse
import copy
import platform
import pydoc_data.topics
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn

import pyembed
from pyembed.benchmark.peers import compiler_missing

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from families import Own, OwnNorm, Packed

transformers.logging.set_verbosity_error()
V = 50257
WIDE = {"hidden_size": 768, "num_attention_heads": 12, "vocab_size": V, "intermediate_size": 2048}
GROUPED = {**WIDE, "num_key_value_heads": 4, "head_dim": 64}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
MODELS = {  # name: (configuration of transformers, or NanoGPT, and arguments)
    "nanoGPT": ("NanoGPT", {"n_layer": 12}),
    "nanoGPT, one layer": ("NanoGPT", {"n_layer": 1}),
    "GPT2": ("GPT2Config", {"n_layer": 12, **NO_DROPOUT}),
    "GPT2, one layer": ("GPT2Config", {"n_layer": 1, **NO_DROPOUT}),
    "Llama": ("LlamaConfig", {**GROUPED, "num_hidden_layers": 12}),
    "Llama, one layer": ("LlamaConfig", {**GROUPED, "num_hidden_layers": 1}),
    "Qwen3": ("Qwen3Config", {**GROUPED, "num_hidden_layers": 12}),
}
SHAPES = {"decode": [(1, 1), (8, 1)], "prefill": [(1, 256), (4, 256), (8, 512)], "train": [(4, 256), (8, 512)]}


class NanoGPT(Own):
    """A model of nanoGPT's shape that is called as those of transformers are."""

    def __init__(self, n_layer, n_embd=768, n_head=12):
        attention = partial(Packed, n_head, width=n_embd)
        super().__init__(OwnNorm, attention, 0.0, True, n_layer, V, 1024, n_embd)
        nn.init.normal_(self.tok.weight, std=0.02)
        nn.init.normal_(self.pos.weight, std=0.02)

    def forward(self, ids, labels=None, use_cache=False, logits_to_keep=0):
        logits = self.head(self.hidden(ids)[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss, logits)


def build(name, **more):
    kind, arguments = MODELS[name]
    torch.manual_seed(0)
    if kind == "NanoGPT":
        return NanoGPT(**{**arguments, **more})
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**arguments, **more))


def run(model, ids, what):
    """Seconds of one call."""
    began = time.perf_counter()
    if what == "train":
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)
    else:
        with torch.no_grad():
            model(ids, use_cache=what == "decode", logits_to_keep=1)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(stock, model, fused, ids, what, pairs, by=""):
    """One row: medians of seconds and of the ratio. by: what else is said of it."""
    for each in (stock, model):
        run(each, ids, what)
    fused.calls.clear()
    seconds = []
    for pair in range(pairs):
        turn = (stock, model) if pair % 2 else (model, stock)  # who is second finds the memory warm
        found = {id(each): run(each, ids, what) for each in turn}
        seconds.append((found[id(stock)], found[id(model)]))
    ratios = statistics.quantiles([a / b for a, b in seconds], n=4, method="inclusive")
    a, b = (statistics.median(column) * 1e3 for column in zip(*seconds, strict=True))
    ran = f"{fused.calls['fused']}/{pairs}"
    print(
        f"  {by + what:17}{ids.shape[0]:3} x {ids.shape[1]:<5}{a:10.2f} ms{b:10.2f} ms{ratios[1]:8.3f}  "
        f"({ratios[0]:.3f} to {ratios[2]:.3f})  fused calls {ran}",
        flush=True,
    )


def losses(model, text, steps, shape):
    """Of a training run."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        starts = torch.randint(len(text) - shape[1], (shape[0],), generator=generator).tolist()
        ids = torch.stack([text[start : start + shape[1]] for start in starts])
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=";".join(MODELS), help="names, separated by ';'")
    parser.add_argument("--pairs", type=int, default=7, help="of runs; decode takes ten times as many")
    parser.add_argument("--steps", type=int, default=200, help="of the training runs whose losses are compared")
    parser.add_argument("--what", default=",".join(SHAPES))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="rows under torch.compile")
    parser.add_argument("--largest", type=int, default=8 * 512, help="tokens of a batch; shapes that have more are left out")
    arguments = parser.parse_args()
    for option, allowed, separator in (("models", MODELS, ";"), ("what", SHAPES, ",")):
        for name in getattr(arguments, option).split(separator):
            if name not in allowed:
                parser.error(f"--{option}: expected of {separator.join(allowed)}, got {name!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoded = pyembed.data.get_encoding("gpt2").encode("\n".join(pydoc_data.topics.topics.values()), allowed_special="all")
    text = torch.tensor(encoded, device=device)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, pyembed {pyembed.__version__}")
    for name in arguments.models.split(";"):
        model = build(name).to(device).eval()
        stock = copy.deepcopy(model)
        fused = pyembed.fuse(model, text[:16].view(2, 8))
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, error {fused.error[1]:.1e}")
        print("                                 stock        fused   ratio")
        shapes = [(what, B, T) for what in arguments.what.split(",") for B, T in SHAPES[what] if arguments.largest >= B * T]
        for what, B, T in shapes:
            pairs = arguments.pairs * (10 if what == "decode" else 1)
            compare(stock, model, fused, text[: B * T].view(B, T), what, pairs)
        fused.build_table()
        for what, B, T in shapes:
            if what == "prefill":
                compare(stock, model, fused, text[: B * T].view(B, T), what, arguments.pairs, "table, ")
        fused.drop_table()
        if arguments.compile and compiler_missing(torch.device(device)) is None:
            stock, model = (torch.compile(each, fullgraph=True) for each in (stock, model))
            for what, B, T in shapes:
                if what != "decode":  # whose cache is made anew in every call
                    compare(stock, model, fused, text[: B * T].view(B, T), what, arguments.pairs, "compiled ")
            torch._dynamo.reset()
        del stock, model
    for name in ("nanoGPT, one layer", "GPT2, one layer") if arguments.steps else ():
        curves = []
        for fuses in (False, True):
            model = build(name, n_embd=128, n_head=4).to(device)
            fused = pyembed.fuse(model, text[:16].view(2, 8)) if fuses else None
            with pyembed.plan("distinct"):
                curves.append(losses(model, text, arguments.steps, (4, 128)))
        difference = max(abs(a - b) for a, b in zip(*curves, strict=True))
        print(
            f"{name}, losses of {arguments.steps} steps: {curves[0][0]:.3f} to {curves[0][-1]:.3f}, largest difference "
            f"{difference:.1e}, fused calls {fused.calls['fused']}"
        )


if __name__ == "__main__":
    main()
