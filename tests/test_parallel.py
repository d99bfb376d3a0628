"""On several processes the front end does what it does on one: same loss, same gradients, same state_dict."""

import copy
import multiprocessing
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import pyembed
from pyembed import ops, planner
from pyembed.parallel import ColwiseQKV

V, D, B, T, DEADLINE = 13, 16, 4, 4, 150
INTERPRETED = {2: [("triton", "one_pass")], 4: []}  # four interpreters on a few cores take too long
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


@pytest.mark.parametrize("processes", [2, 4])
def test_equals_one_process(processes, tmp_path, monkeypatch):
    """One start for all checks: it takes seconds."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(["pyembed.parallel", "torch.distributed.fsdp", "torch.distributed.checkpoint"])
    work = (_work, (processes, str(tmp_path)), processes)
    spawned = mp.start_processes(*work, join=False, start_method="forkserver")
    end = time.monotonic() + DEADLINE
    try:
        while any(process.is_alive() for process in spawned.processes) and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        for process in spawned.processes:
            process.kill()
    results = [tmp_path / f"{name}.{rank}" for name in CHECKS for rank in range(processes)]
    errors = [f"{result.name}\n{result.read_text()}" for result in results if result.exists() and result.stat().st_size]
    errors += [f"{result.name} was not reached in {DEADLINE} s" for result in results if not result.exists()]
    if errors:
        pytest.fail("\n".join(errors[:2]), pytrace=False)


def _work(rank, n, folder):
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": n, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", **options)
    for name, function in CHECKS.items():
        error = ""
        try:
            torch.manual_seed(0)
            function(rank, n, Path(folder))
        except Exception:
            error = traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(error)
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


@check
def ddp(rank, n, folder):
    ids, rows = batch(), slice(rank * B // n, (rank + 1) * B // n)
    for backend, plan in [("torch", "auto"), ("torch", "one_pass"), ("torch", "distinct"), *INTERPRETED[n]]:
        front = make()
        module = nn.parallel.DistributedDataParallel(copy.deepcopy(front))
        with pyembed.backend(backend), pyembed.plan(plan):
            loss = train_step(module, ids[rows], rows=rows)
        dist.all_reduce(loss)
        torch.testing.assert_close(loss, train_step(front, ids))
        expect_same(module.module, front, f"{backend}, {plan}", scale=n)
    with torch.no_grad(), pyembed.plan("table"):
        torch.testing.assert_close(tuple(module(ids)), tuple(front(ids)))
        assert module.module._table is not None


@check
def fsdp(rank, n, folder):
    ids, rows = batch(), slice(rank * B // n, (rank + 1) * B // n)
    for backend, plan in [("torch", "auto"), ("torch", "distinct"), *INTERPRETED[n]]:
        for kind in ("front", "model") if backend == "torch" else ("front",):
            one = make() if kind == "front" else of_model()
            one.build_table() if kind == "front" else one.front[0].build_table()
            several = copy.deepcopy(one) if kind == "front" else of_model()
            fully_shard(several)
            state = get_model_state_dict(several, options=StateDictOptions(full_state_dict=True))
            assert rank or list(state) == list(one.state_dict())
            assert all(torch.equal(state[name], tensor) for name, tensor in one.state_dict().items() if name in state)
            optimizers = [torch.optim.AdamW(module.parameters(), 0.1) for module in (one, several)]
            for _ in range(2):
                with pyembed.backend(backend), pyembed.plan(plan):
                    loss = train_step(several, ids[rows], rows=rows)
                dist.all_reduce(loss)
                torch.testing.assert_close(loss, train_step(one, ids))
                expect_same(several, one, f"{backend}, {plan}, {kind}", scale=n)
                for p in several.parameters():  # a mean over ranks, where one process has the sum
                    p.grad *= n
                for optimizer in optimizers:
                    optimizer.step()
            with torch.no_grad():
                torch.testing.assert_close(tuple(several(ids)), tuple(one(ids)), rtol=1e-4, atol=1e-4)
    front = several if kind == "front" else several.front[0]
    assert "few" in front.explain(ids).reason and front.table_nbytes() == make().table_nbytes()
    with pytest.raises(RuntimeError, match=r"table: expected modules .* token's weights are spread over devices"):
        front.build_table()
    with torch.no_grad(), pyembed.plan("table"), pytest.raises(RuntimeError, match="plan: 'table' cannot run here: token's"):
        front(ids)


@check
def fsdp_in_several_groups(rank, n, folder):
    """A part with a group of its own gathers itself when it is called; weights that nothing gathers are named."""
    ids = batch()
    several, one = of_model(), of_model()
    fully_shard(several.c_attn)
    fully_shard(several)
    assert "qkv has hooks" in several.front[0].explain(ids).reason
    train_step(several, ids), train_step(one, ids)
    expect_same(several, one, "groups")
    stray = of_model()
    fully_shard(stray)
    with pytest.raises(TypeError, match=r"token: expected a Tensor, as ids is, got a DTensor .* fully_shard was given"):
        stray.front[0](ids)


STYLES = [{}, {"shard_vocabulary": True}]
OPTIONS = [
    {"rows": 3 * V},
    {"num_kv_heads": 8, "norm": "rms", "bias": False, "position": None, "padding_idx": 3},
    {"position": "rotary", "padding_idx": 12},
    {"position": "sinusoidal", "norm": None},
]


def expect_tensor_parallel(several, one, style, message, rank, n, backend="torch", plan="auto"):
    ids, mesh = batch(), init_device_mesh("cpu", (n,))
    parallelize_module(several, mesh, ColwiseQKV(**style))
    with pyembed.backend(backend), pyembed.plan(plan):
        out = several(ids)
        loss_of(out, share=(rank, n)).backward()
    expected = one(ids)
    loss_of(expected).backward()
    for ours, theirs in zip(out, (expected[0], *(x.chunk(n, 2)[rank] for x in expected[1:])), strict=True):
        torch.testing.assert_close(ours, theirs, msg=message)
    torch.testing.assert_close(out.hidden, expected.hidden, rtol=0, atol=0)
    expect_same(several, one, message)


@check
def tensor_parallel(rank, n, folder):
    for style in STYLES:
        for options in OPTIONS if n == 2 else OPTIONS[:2]:
            expect_tensor_parallel(make(**options), make(**options), style, f"{style} {options}", rank, n)
        expect_tensor_parallel(make(), make(), style, f"{style} distinct", rank, n, plan="distinct")
        expect_tensor_parallel(make(), make(), style, f"{style} triton", rank, n, "triton")
        for qkv in ("linear", "three", "conv1d", "per head"):
            several, one = of_model(qkv), of_model(qkv)
            expect_tensor_parallel(several.front[0], one.front[0], style, f"{style} {qkv}", rank, n)
    assert several.front[0].token.weight.to_local().shape[0] < V  # the last style: rows of its own


@check
def tensor_parallel_table_is_known_again(rank, n, folder):
    """What the planner has seen of a table's ids it finds at the next call."""
    front, tables = make(), []
    parallelize_module(front, init_device_mesh("cpu", (n,)), ColwiseQKV())
    choose = planner.choose
    planner.choose = lambda ids, token, *rest: tables.append(planner._table_of(token)) or choose(ids, token, *rest)
    try:
        front(batch())
        with torch.no_grad():
            front(batch())
    finally:
        planner.choose = choose
    assert tables[0] is tables[1]


@check
def tensor_parallel_with_dropout(rank, n, folder):
    for style in STYLES:
        for position in ("learned", "rotary"):
            one, several = (make(dropout=0.5, position=position) for _ in range(2))
            parallelize_module(several, init_device_mesh("cpu", (n,)), ColwiseQKV(**style))
            places = torch.arange(T).flip(0)
            torch.manual_seed(5)
            expected = one(batch(), places)
            torch.manual_seed(5)
            out = several(batch(), places)
            assert (out.hidden == 0).any()
            torch.testing.assert_close(out.hidden, expected.hidden)
            torch.testing.assert_close(out.query, expected.query.chunk(n, 2)[rank])
            loss_of(out, share=(rank, n)).backward()
            loss_of(expected).backward()
            expect_same(several, one, f"{style} {position}")


@check
def tensor_parallel_layouts(rank, n, folder):
    """ids and position_ids in shards of the sequence, hidden in shards too, DTensors in and out."""
    mesh, ids, places = init_device_mesh("cpu", (n,)), batch(), torch.randint(12, (B, T))
    mine = slice(rank * T // n, (rank + 1) * T // n)
    for position_ids, dim in [(None, 1), (places, 1), (places[0], -1), (places[:1], 1)]:
        one, several = make(), make()
        style = ColwiseQKV(input_layouts=Shard(dim), hidden_layouts=Shard(1))
        parallelize_module(several, mesh, style)
        out = several(ids[:, mine], None if position_ids is None else position_ids[..., mine])
        expected = one(ids, position_ids)
        torch.testing.assert_close(out.hidden, expected.hidden[:, mine])
        torch.testing.assert_close(out.key, expected.key.chunk(n, 2)[rank])
        (out.hidden.square().sum() + out.query.pow(3).sum()).backward()
        (expected.hidden.square().sum() + expected.query.pow(3).sum()).backward()
        expect_same(several, one, f"{position_ids is None} {dim}")
    one, several = make(), make()
    parallelize_module(several, mesh, ColwiseQKV(use_local_output=False))
    out = several(distribute_tensor(ids, mesh, [Shard(0)]))
    for x, placement in zip(out, (Replicate(), *[Shard(2)] * 3), strict=True):
        assert x.placements == (placement,)
    sum(x.pow(3).sum() for x in out).redistribute(placements=[Replicate()]).backward()
    sum(x.pow(3).sum() for x in one(ids)).backward()
    expect_same(several, one, "DTensors")


@check
def tensor_parallel_state(rank, n, folder):
    """state_dict is one process's, and loads from it, by each of PyTorch's ways; training goes the same way."""
    mesh, ids, full = init_device_mesh("cpu", (n,)), batch(), StateDictOptions(full_state_dict=True)
    for style in STYLES:
        for kind in ("front", "linear", "conv1d", "three") if n == 2 else ("front",):
            one, several = (make() if kind == "front" else of_model(kind) for _ in range(2))
            front = several if kind == "front" else several.front[0]
            parallelize_module(front, mesh, ColwiseQKV(**style))
            expected, path = one.state_dict(), str(folder / f"{n} {kind} {len(style)}")
            dcp.save(several.state_dict(), checkpoint_id=path)
            for load in ("whole", "torch", "checkpoint"):
                with torch.no_grad():
                    for p in several.parameters():
                        p.zero_()
                if load == "whole":
                    several.load_state_dict(expected)
                elif load == "torch":
                    set_model_state_dict(several, {k: v.clone() for k, v in expected.items()}, options=full)
                else:
                    state = several.state_dict()
                    dcp.load(state, checkpoint_id=path)
                    several.load_state_dict(state)
                found = {name: whole(tensor) for name, tensor in several.state_dict().items()}
                assert list(found) == list(expected), (list(found), list(expected))
                assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), (kind, load)
                state = get_model_state_dict(several, options=full)
                assert rank or all(torch.equal(state[name], tensor) for name, tensor in expected.items())
            optimizers = [torch.optim.AdamW(module.parameters(), 0.01) for module in (one, several)]
            for _ in range(3):
                train_step(one, ids), train_step(several, ids, share=(rank, n))
                for module in (one, several):
                    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
            for name, tensor in several.state_dict().items():
                torch.testing.assert_close(whole(tensor), one.state_dict()[name], rtol=1e-4, atol=1e-4, msg=name)


@check
def tensor_parallel_under_fsdp(rank, n, folder):
    if n < 4:
        return
    mesh = init_device_mesh("cpu", (2, n // 2), mesh_dim_names=("dp", "tp"))
    data, model = mesh.get_local_rank("dp"), mesh.get_local_rank("tp")
    ids, rows = batch(), slice(data * B // 2, (data + 1) * B // 2)
    for style in STYLES:
        one, several = make(), make()
        parallelize_module(several, mesh["tp"], ColwiseQKV(**style))
        fully_shard(several, mesh=mesh["dp"])
        several.load_state_dict(one.state_dict())
        train_step(several, ids[rows], rows=rows, share=(model, n // 2)), train_step(one, ids)
        expect_same(several, one, f"{style}", scale=2)
        found = {name: whole(tensor) for name, tensor in several.state_dict().items()}
        assert all(torch.equal(found[name], tensor) for name, tensor in one.state_dict().items())


@check
def tensor_parallel_refuses(rank, n, folder):
    mesh = init_device_mesh("cpu", (n,))
    for module, style, error, message in [
        (nn.Linear(2, 2), {}, TypeError, "module: expected an EmbeddingQKV, got Linear"),
        (make(num_kv_heads=1), {}, ValueError, rf"num_kv_heads: expected a multiple of the mesh's size \({n}\), got 1"),
        (pyembed.EmbeddingQKV(1, D, 4), {"shard_vocabulary": True}, ValueError, "num_embeddings: expected rows .* got 1"),
        (distribute_module(make(), mesh), {}, ValueError, "module: expected modules .* token's weights are spread"),
    ]:
        with pytest.raises(error, match=message):
            parallelize_module(module, mesh, ColwiseQKV(**style))
    with pytest.raises(TypeError, match="input_layouts: expected Shard, Replicate or None, got 0"):
        ColwiseQKV(input_layouts=0)
    for style in STYLES:
        front = parallelize_module(make(), mesh, ColwiseQKV(**style))
        assert front.explain(batch()).name == "one_pass" and front.table_nbytes() * n == make().table_nbytes()
        with pytest.raises(RuntimeError, match=r"table: expected modules .* spread over devices"):
            front.build_table()
        with torch.no_grad(), pyembed.plan("table"), pytest.raises(RuntimeError, match="plan: 'table' cannot run here"):
            front(batch())
        with pytest.raises(IndexError, match=rf"ids: expected values in \[0, {V}\), the rows of token; got {V} at \(0, 0\)"):
            front(torch.full((B, T), V))
        with pytest.raises(TypeError, match="ids: expected a Tensor, got list"):
            front([1])
    front.qkv.register_forward_hook(print)
    with pytest.raises(RuntimeError, match="expected modules that are no more than their weights, but qkv has hooks"):
        front(batch())


@check
def ids_in_shards(rank, n, folder):
    """DTensors: ids in shards, every parameter whole."""
    ids = batch()
    g = torch.Generator().manual_seed(6)
    places, turns = torch.randint(12, (B, T), generator=g), (torch.rand(T, 4, generator=g), torch.rand(T, 4, generator=g))
    mesh = init_device_mesh("cpu", (2, 2) if n == 4 else (n,))
    for placements in ([[Replicate()], [Shard(0)], [Shard(1)]], [[Shard(0), Shard(1)], [Shard(1), Replicate()]])[mesh.ndim - 1]:
        for options, call in [
            ({}, {}),
            ({"position": "rotary"}, {}),
            ({"dropout": 0.0, "position": "sinusoidal"}, {"position_ids": places}),
            ({"position": None}, {"rotary": turns}),
        ]:
            one, several = make(**options), distribute_module(make(**options), mesh)
            for backend in ("torch", "triton") if n == 2 and not options else ("torch",):
                with pyembed.backend(backend):
                    out = several(distribute_tensor(ids, mesh, placements), **call)
                expected = one(ids, **call)
                for ours, theirs in zip(out, expected, strict=True):
                    assert list(ours.placements) == placements
                    torch.testing.assert_close(whole(ours), theirs)
                for found, module in ((out, several), (expected, one)):
                    module.zero_grad()
                    loss = sum(x.pow(3).mean() for x in found)
                    (whole(loss) if module is one else loss.redistribute(placements=[Replicate()] * mesh.ndim)).backward()
                expect_same(several, one, f"{placements} {options} {backend}")
                assert all(p.grad.placements == p.placements for p in several.parameters())
        several, one = distribute_module(of_model("three").front[0], mesh), of_model("three").front[0]
        spread = distribute_tensor(ids, mesh, placements)
        assert "by the modules" in several.explain(spread).reason  # few tokens: nothing is packed
        torch.testing.assert_close(tuple(map(whole, several(spread))), tuple(one(ids)))
    with pytest.raises(TypeError, match="token: expected a Tensor, as ids is, got a DTensor"):
        several(ids)
    with pytest.raises(TypeError, match="token: expected a DTensor, as ids is, got a Tensor that wants a gradient"):
        one(distribute_tensor(ids, mesh, placements))


@check
def operators(rank, n, folder):
    """The operators themselves, by register_sharding."""
    ids, g = batch(), torch.Generator().manual_seed(7)
    token, position, weight = (torch.randn(s, D, generator=g) for s in (V, 12, 64))
    norm_weight, norm_bias, bias = (torch.randn(s, generator=g) for s in (D, D, 64))
    cos, sin = torch.rand(T, 2, generator=g), torch.rand(T, 2, generator=g)
    places, expected = torch.randint(12, (B, T), generator=g), {}
    mesh = init_device_mesh("cpu", (2, 2) if n == 4 else (n,))
    cases = [([Shard(0)], False), ([Shard(1)], True), ([Shard(1)], False)]  # the last is no sharding that they take
    for placements, given in cases if n == 2 else [([Shard(0), Shard(0)], False), ([Shard(0), Shard(1)], True)]:

        def run(spread, given=given):
            leaves = [spread(t).requires_grad_() for t in (token, position, weight, bias, norm_weight, norm_bias)]
            tables, (w, b, *norm) = leaves[:2], leaves[2:]
            where = spread(places, True) if given else None
            turns = (None, None, None, False) if given else (spread(cos), spread(sin), None, False)
            out = ops.embed(spread(ids, True), *tables, where, 3) if given else spread(token[ids], True)
            call = (spread(ids, True), tables[0], w, b, tables[1], where, *norm, 8, 4, "layer", 1e-5, 3, *turns)
            out = out, *ops.embed_qkv(*call)[:4]
            loss = sum(x.pow(3).mean() for x in out)
            loss.redistribute(placements=[Replicate()] * mesh.ndim).backward() if spread is over else loss.backward()
            return out, [leaf.grad for leaf in leaves]

        def over(tensor, is_ids=False, placements=placements):
            return distribute_tensor(tensor.clone(), mesh, placements if is_ids else [Replicate()] * mesh.ndim)

        def plain(tensor, is_ids=False):
            return tensor.clone()

        if given not in expected:
            expected[given] = run(plain)
        for ours, theirs in zip(run(over), expected[given], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(whole(a), b, rtol=1e-4, atol=1e-5, msg=f"{placements} {given}")
