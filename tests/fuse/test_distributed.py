"""Fused models in torch.distributed: one process's results and gradients, on two."""

import copy

import processes
import pytest
import torch
import torch.distributed as dist
from families import Own, Packed, tokens
from processes import whole
from torch import nn

import pyembed


def twins():
    torch.manual_seed(1)
    model = Own(nn.LayerNorm, Packed)
    return model, copy.deepcopy(model)


def gradients(model, ids):
    model.zero_grad()
    out = model(ids)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) / ids.numel())
    return out.detach(), [whole(p.grad) for p in model.parameters()]


def expect_same(wrapped, twin, rank, n, steps=2):
    """Each rank takes its part of the batch, and an optimizer steps."""
    ids = tokens(2 * n, 9)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (wrapped, twin)]
    for _ in range(steps):
        outs, grads = zip(
            gradients(wrapped, ids[2 * rank : 2 * rank + 2]), gradients(twin, ids[2 * rank : 2 * rank + 2]), strict=True
        )
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(*grads, strict=True):
            dist.all_reduce(theirs)
            torch.testing.assert_close(ours, theirs / n, rtol=1e-4, atol=1e-5)
        for p, grad in zip(twin.parameters(), grads[1], strict=True):
            p.grad = grad / n
        for optimizer in optimizers:
            optimizer.step()


def ddp(rank, n, folder):
    model, twin = twins()
    fused = pyembed.fuse(model, tokens())
    with pyembed.plan("distinct"):
        expect_same(nn.parallel.DistributedDataParallel(model), twin, rank, n)
    assert fused.calls == {"fused": 2}, fused.calls


def fused_around_ddp(rank, n, folder):
    model, twin = twins()
    wrapped = nn.parallel.DistributedDataParallel(model)
    fused = pyembed.fuse(wrapped, tokens(), gradients=False)
    with pyembed.plan("distinct"):
        expect_same(wrapped, twin, rank, n)
    assert fused.calls == {"fused": 2}, fused.calls


def fsdp(rank, n, folder):
    """Whose weights are there only within a forward: the model's own modules run, and this is counted."""
    from torch.distributed.fsdp import fully_shard

    for blocks, again in ((False, False), (False, True), (True, None)):
        model, twin = twins()
        fused = pyembed.fuse(model, tokens())
        for block in model.blocks if blocks else ():
            fully_shard(block)
        fully_shard(model, reshard_after_forward=again)
        with pyembed.plan("distinct"):
            expect_same(model, twin, rank, n)
        assert fused.calls == {"tok is managed by FSDP, which spreads its weights over devices": 2}, fused.calls
        with pytest.raises(RuntimeError, match="weights that one device holds"):
            fused.build_table()
        fused.undo()
        expect_same(model, twin, rank, n)


def fsdp_before(rank, n, folder):
    from torch.distributed.fsdp import fully_shard

    model, twin = twins()
    fully_shard(model)
    fused = pyembed.fuse(model, tokens())
    assert "is managed by FSDP" in str(fused), fused
    model.reshard()  # as after any forward without a backward
    expect_same(model, twin, rank, n)


CHECKS = (ddp, fused_around_ddp, fsdp, fsdp_before)


@pytest.mark.full
def test_two_processes(tmp_path, monkeypatch):
    processes.run(CHECKS, 2, tmp_path, monkeypatch)
