"""On several processes the front end does what it does on one: same loss, same gradients, same state_dict."""

import copy

import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import INTERPRETED, B, D, T, V, batch, expect_same, loss_of, make, of_model, train_step, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import pyembed
from pyembed import positions
from pyembed.call import HIDDEN, Call, Epilogue, Norm, Projection, Terms
from pyembed.parallel import ColwiseQKV
from pyembed.plans import choice, one_pass

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.full)])
def test_equals_one_process(count, tmp_path, monkeypatch):
    """One start for all checks: it takes seconds."""
    processes.run(CHECKS, count, tmp_path, monkeypatch)


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
    {"position": "rotary", "qk_norm": "rms", "num_segments": 2, "scale": 2.0},
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
def tensor_parallel_of_one_result(rank, n, folder):
    """What a loss does not reach gets None, as on one process."""
    ids, mesh = batch(), init_device_mesh("cpu", (n,))
    for style, plan, used in ((style, plan, used) for style in STYLES for plan in ("auto", "distinct") for used in (0, 1)):
        several, one = of_model("three"), of_model("three")
        parallelize_module(several.front[0], mesh, ColwiseQKV(**style))
        with pyembed.plan(plan):
            loss_of([several(ids)[used]], share=(rank, n)).backward()
        loss_of([one(ids)[used]]).backward()
        for name, parameter in one.named_parameters():
            found = several.get_parameter(name).grad
            assert (found is None) == (parameter.grad is None), f"{style} {plan} {used}: {name}"
            if found is not None:
                torch.testing.assert_close(whole(found), parameter.grad, rtol=1e-4, atol=1e-5, msg=f"{style} {used}: {name}")


@check
def tensor_parallel_table_is_known_again(rank, n, folder):
    """What the planner has seen of a table's ids it finds at the next call."""
    front, tables = make(), []
    parallelize_module(front, init_device_mesh("cpu", (n,)), ColwiseQKV())
    weigh_now, is_small, choice._is_small = pyembed.run.weigh_now, choice._is_small, lambda *_: False
    pyembed.run.weigh_now = lambda call: tables.append(choice._table_of(call.terms.token)) or weigh_now(call)
    try:
        front(batch())
        with torch.no_grad():
            front(batch())
    finally:
        pyembed.run.weigh_now, choice._is_small = weigh_now, is_small
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
        assert ("vocabulary" in front.explain(batch()).reason) == bool(style)
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
def tensor_parallel_policies(rank, n, folder):
    """Ids and positions without a row, as on one process: of a vocabulary in shards the nearest row is one rank's alone."""
    mesh, ids = init_device_mesh("cpu", (n,)), batch()
    ids[0, 0], ids[1, 2], ids[1, 3] = V, -1, 2**40
    places = torch.arange(T).repeat(B, 1)
    places[1, 0], places[0, 2] = 12, -3
    for style in STYLES:
        one, several = make(), parallelize_module(make(), mesh, ColwiseQKV(**style))
        for policy in ("clamp", "zero"):
            one.id_policy = several.id_policy = policy
            for call in ((ids,), (ids, places)):
                with pyembed.id_policy("raise"):
                    found, expected = several(*call), one(*call)
                torch.testing.assert_close(found.hidden, expected.hidden, msg=f"{style} {policy}")
                torch.testing.assert_close(found.query, expected.query.chunk(n, -2)[rank], msg=f"{style} {policy}")


@check
def ids_in_shards(rank, n, folder):
    """DTensors: ids in shards, every parameter whole."""
    ids = batch()
    g = torch.Generator().manual_seed(6)
    places, turns = torch.randint(12, (B, T), generator=g), tuple(torch.rand(2, T, 2, generator=g).repeat(1, 1, 2))
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
        for count, rest in ((positions.from_attention_mask, ()), (positions.from_input_ids, (0, 2))):
            mask = ids % 3
            torch.testing.assert_close(whole(count(distribute_tensor(mask, mesh, placements), *rest)), count(mask, *rest))
    with pytest.raises(TypeError, match="token: expected a Tensor, as ids is, got a DTensor"):
        several(ids)
    with pytest.raises(TypeError, match="token: expected a DTensor, as ids is, got a Tensor that wants a gradient"):
        one(distribute_tensor(ids, mesh, placements))


@check
def operators(rank, n, folder):
    """The operators themselves, by register_sharding: also where ids and gradients lie as no rank can run them alone."""
    ids, g = batch(), torch.Generator().manual_seed(7)
    leaves = [torch.randn(shape, generator=g) for shape in ((V, D), (12, D), (64, D), (64,), (D,), (D,), (2, D))]
    turns, places = [torch.rand(T, 2, generator=g) for _ in range(2)], torch.randint(12, (B, T), generator=g)
    grads = [torch.randn(B, T, *shape, generator=g) for shape in ((D,), (8, 4), (4, 4), (4, 4), (D,))]
    mesh = init_device_mesh("cpu", (2, 2) if n == 4 else (n,))
    on_two = [([Shard(0)], [Shard(0)], False, True), ([Shard(1)], [Shard(0)], True, False)]
    on_two += [([Shard(1)], [Shard(1)], True, True), ([Shard(1)], [Replicate()], False, False)]
    on_four = [([Shard(0)] * 2, [Shard(0)] * 2, False, True), ([Shard(0), Shard(1)], [Shard(1), Shard(0)], True, False)]
    for of_ids, of_grads, has_places, has_turns in on_two if n == 2 else on_four:

        def run(spread, of_ids=of_ids, of_grads=of_grads, has_places=has_places, has_turns=has_turns):
            token, position, w, b, *norm, segment = held = [spread(t).requires_grad_() for t in leaves]
            where = spread(places, of_ids) if has_places else None
            cos, sin = (spread(t) if has_turns else None for t in turns)
            segment_ids = spread(places % 2, of_ids)
            terms = Terms(spread(ids, of_ids), token, position, where, segment, segment_ids, None, 2.0, 0.0, 3)
            call = Call(terms, Norm("layer", *norm, 1e-5), Projection(w, b, 8, 4), Epilogue(cos=cos, sin=sin))
            out = one_pass.embed_qkv(call, observed=None)[:4]
            if not has_turns:
                out = *out, one_pass.embed(*HIDDEN.flatten(call))
            torch.autograd.backward(out, [spread(grad, of_grads) for grad in grads[: len(out)]])
            return out, [leaf.grad for leaf in held]

        def over(tensor, placements=None):
            return distribute_tensor(tensor.clone(), mesh, placements or [Replicate()] * mesh.ndim)

        def plain(tensor, placements=None):
            return tensor.clone()

        for ours, theirs in zip(run(over), run(plain), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(whole(a), b, rtol=1e-4, atol=1e-5, msg=f"{of_ids} {has_places} {has_turns}")
