"""Checks that run on several gloo processes at once, and what they compare with one process."""

import multiprocessing
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import DTensor

import pyembed

V, D, B, T, DEADLINE = 13, 16, 4, 4, 240
INTERPRETED = {2: [("triton", "one_pass")], 4: []}  # four interpreters on a few cores take too long


def run(checks, processes, folder, monkeypatch):
    """Every check, a function of (rank, processes, folder), in turn on as many processes. Fails with the first errors."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(["pyembed.parallel", "torch.distributed.fsdp", "torch.distributed.checkpoint"])
    spawned = mp.start_processes(_work, (processes, str(folder), checks), processes, join=False, start_method="forkserver")
    end = time.monotonic() + DEADLINE
    try:
        while any(process.is_alive() for process in spawned.processes) and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        for process in spawned.processes:
            process.kill()
    results = [folder / f"{check.__name__}.{rank}" for check in checks for rank in range(processes)]
    errors = [f"{result.name}\n{result.read_text()}" for result in results if result.exists() and result.stat().st_size]
    errors += [f"{result.name} was not reached in {DEADLINE} s" for result in results if not result.exists()]
    if errors:
        pytest.fail("\n".join(errors[:2]), pytrace=False)


def _work(rank, n, folder, checks):
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": n, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", **options)
    for check in checks:
        error = ""
        try:
            torch.manual_seed(0)
            check(rank, n, Path(folder))
        except BaseException:  # pytest's own are no Exception
            error = traceback.format_exc()
        Path(folder, f"{check.__name__}.{rank}").write_text(error)
        if error:
            os._exit(1)  # the others wait for this one no longer
    dist.destroy_process_group()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make(rows=V, **options):
    torch.manual_seed(1)
    return pyembed.EmbeddingQKV(rows, D, 8, **{"num_kv_heads": 4, "head_dim": 4, "max_length": 12} | options)


def batch():
    g = torch.Generator().manual_seed(2)
    return torch.randint(V, (B, T), generator=g)


def loss_of(out, rows=slice(None), share=(0, 1)):
    """A loss of the batch's `rows`, and of the heads of rank share[0] of share[1] where these are all that there is."""
    g, losses = torch.Generator().manual_seed(3), []
    for x in out:
        split = share[1] if x.dim() == 4 else 1
        shape = (B, T, x.shape[2] * split, *x.shape[3:])
        factor = torch.randn(shape, generator=g)[rows].chunk(split, 2)[share[0] if split > 1 else 0]
        losses.append((x * factor + x.square() * factor).mean(-1).sum())
    return sum(losses)


def expect_same(module, twin, message, scale=1.0):
    """Gradients of module, on several processes, are those of twin, on one."""
    names = dict(twin.named_parameters())
    found = {name: p for name, p in module.named_parameters() if "parametrizations" not in name}
    for name in [name for name in names if name not in found]:
        prefix, last = name.rsplit(".", 1)
        held = module.get_submodule(prefix).parametrizations[last]
        grads = [whole(getattr(held, f"original{i}").grad) for i in range(3)]
        torch.testing.assert_close(torch.cat(grads, held[0].dim) * scale, names[name].grad, msg=f"{message}: {name}")
    for name, p in found.items():
        torch.testing.assert_close(whole(p.grad) * scale, names[name].grad, rtol=1e-4, atol=1e-5, msg=f"{message}: {name}")


def train_step(module, ids, **options):
    module.zero_grad()
    loss = loss_of(module(ids), **options)
    loss.backward()
    return loss.detach()


def of_model(qkv="linear"):
    """A model that keeps its front end out of its registered modules."""
    torch.manual_seed(4)
    model = nn.Module()
    model.wte, model.wpe, model.norm = nn.Embedding(V, D), nn.Embedding(12, D), nn.LayerNorm(D)
    nn.init.normal_(model.norm.bias)
    if qkv == "three":
        model.q, model.k, model.v = nn.Linear(D, 32, bias=False), nn.Linear(D, 16), nn.Linear(D, 16)
        part = (model.q, model.k, model.v)
    else:
        model.c_attn = part = Conv1D() if qkv == "conv1d" else nn.Linear(D, 64)
    heads = {"num_heads": 8, "num_kv_heads": 4, "per_head": qkv == "per head"}
    model.front = [pyembed.EmbeddingQKV.from_modules(model.wte, model.wpe, model.norm, qkv=part, **heads)]
    model.forward = lambda *args, **kwargs: model.front[0](*args, **kwargs)
    return model


class Conv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, 64)), nn.Parameter(torch.randn(64))

    def forward(self, x):
        return x @ self.weight + self.bias
