"""Every wrong argument is refused with its name, what was expected and what came; and the two backends agree."""

import functools
import itertools

import pytest
import torch
import torch._dynamo.testing
from conftest import DEVICE, DTYPES
from numerics import Case

import pyembed
from pyembed import functional as F


def arguments(**changes):
    base = {
        "ids": torch.tensor([[1, 2, 3], [4, 0, 1]]),
        "token": torch.randn(5, 8),
        "weight": torch.randn(24, 8),
        "bias": torch.randn(24),
        "position": torch.randn(4, 8),
        "position_ids": None,
        "norm": "layer",
        "norm_weight": torch.ones(8),
        "norm_bias": torch.zeros(8),
        "num_heads": 2,
    }
    return base | changes


WRONG = [
    ({"ids": [1, 2]}, TypeError, r"ids: expected a Tensor, got list"),
    ({"ids": torch.ones(2, 3)}, TypeError, r"ids: expected dtype torch.int32 or torch.int64, got torch.float32"),
    ({"ids": torch.ones(2, 3, dtype=torch.int16)}, TypeError, r"ids: .* got torch.int16"),
    ({"ids": torch.tensor([[0, 5, 1]])}, IndexError, r"ids: expected values in \[0, 5\), the rows of token; got 5 at \(0, 1\)"),
    ({"ids": torch.tensor([[0, 1], [-3, 9]])}, IndexError, r"ids: .* got -3 at \(1, 0\)"),
    (
        {"ids": torch.zeros(1, 5, dtype=torch.long)},
        IndexError,
        r"ids: sequence length 5 needs positions up to 4, position has 4",
    ),
    ({"position_ids": torch.tensor([0, 1, 4])}, IndexError, r"position_ids: expected values in \[0, 4\).* got 4 at \(2,\)"),
    ({"position_ids": torch.tensor([[-1, 0, 1]])}, IndexError, r"position_ids: .* got -1 at \(0, 0\)"),
    ({"position_ids": torch.tensor([0.0, 1.0, 2.0])}, TypeError, r"position_ids: expected dtype .* got torch.float32"),
    (
        {"position_ids": torch.tensor([0, 1])},
        ValueError,
        r"position_ids: expected shape \(3,\) or .* for ids \(2, 3\), got \(2,\)",
    ),
    (
        {"position": None, "position_ids": torch.arange(3)},
        ValueError,
        r"position_ids: expected None where there is no table of positions",
    ),
    ({"position": torch.randn(4, 7)}, ValueError, r"position: expected shape \(any, 8\).* got \(4, 7\)"),
    ({"token": torch.randn(8)}, ValueError, r"token: expected shape \(any, any\).* got \(8,\)"),
    ({"token": torch.ones(5, 8, dtype=torch.long)}, TypeError, r"token: expected a floating dtype, got torch.int64"),
    ({"weight": torch.randn(24, 9)}, ValueError, r"weight: expected shape \(any, 8\).* got \(24, 9\)"),
    ({"weight": torch.randn(25, 8), "bias": None}, ValueError, r"weight: expected a multiple of .* = 6 rows, got 25"),
    ({"bias": torch.randn(23)}, ValueError, r"bias: expected shape \(24,\).* got \(23,\)"),
    ({"norm_weight": torch.ones(7)}, ValueError, r"norm_weight: expected shape \(8,\).* got \(7,\)"),
    ({"norm_bias": torch.ones(8, 1)}, ValueError, r"norm_bias: expected shape \(8,\).* got \(8, 1\)"),
    ({"norm": "batch"}, ValueError, r"norm: expected one of .* got 'batch'"),
    ({"norm": None}, ValueError, r"norm_weight, norm_bias: norm None takes no such parameter"),
    ({"norm": "rms"}, ValueError, r"norm_weight, norm_bias: norm 'rms' takes no such parameter"),
    ({"num_heads": 0}, ValueError, r"num_heads: expected a positive int, got 0"),
    ({"num_heads": 4, "num_kv_heads": 3}, ValueError, r"num_heads: expected a multiple of num_kv_heads \(3\), got 4"),
    ({"bias": torch.randn(24).half()}, TypeError, r"bias: expected dtype torch.float32, that of token; got torch.float16"),
    ({"weight": torch.randn(24, 8, device="meta")}, ValueError, r"weight: expected device cpu, that of token; got meta"),
    ({"bias": torch.ones(24, dtype=torch.long)}, TypeError, r"bias: expected dtype torch.float32, .* got torch.int64"),
    ({"position": [[0.0] * 8] * 4}, TypeError, r"position: expected a Tensor, got list"),
    ({"position_ids": [0, 1, 2]}, TypeError, r"position_ids: expected a Tensor, got list"),
    ({"num_heads": "2"}, ValueError, r"num_heads: expected a positive int, got '2'"),
    ({"eps": -1.0}, ValueError, r"eps: expected a number of at least 0, got -1.0"),
    ({"weight": None}, TypeError, r"weight: expected a Tensor, got NoneType"),
    ({"padding_idx": 5}, ValueError, r"padding_idx: expected a row in \[-5, 5\), got 5"),
    ({"padding_idx": 1.0}, TypeError, r"padding_idx: expected an int, got float"),
    ({"padding_idx": "1"}, TypeError, r"padding_idx: expected an int, got str"),
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("changes, error, message", WRONG, ids=[f"{next(iter(c))}-{i}" for i, (c, _, _) in enumerate(WRONG)])
def test_wrong_arguments(changes, error, message, backend):
    given = arguments(**changes)
    with pyembed.backend(backend), pytest.raises(error, match=message):
        F.embed_qkv(given.pop("ids"), given.pop("token"), given.pop("weight"), given.pop("bias"), **given)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_embed_and_embedding_check_too(backend):
    with pyembed.backend(backend):
        with pytest.raises(IndexError, match=r"ids: .* got 7 at \(0,\)"):
            F.embedding(torch.tensor([7]), torch.randn(7, 3))
        with pytest.raises(IndexError, match=r"got 7 at \(\)"):
            F.embedding(torch.tensor(7), torch.randn(7, 3))
        with pytest.raises(ValueError, match="position: expected shape"):
            F.embed(torch.tensor([0]), torch.randn(7, 3), torch.randn(7, 4))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_norm_has_one_dtype(backend):
    given = {k: v.half() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments().items()}
    with (
        pyembed.backend(backend),
        pytest.raises(TypeError, match=r"norm_bias: expected dtype torch.float32, .* got torch.float16"),
    ):
        F.embed_qkv(**given | {"norm_weight": torch.ones(8)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backends_agree(dtype):
    given = arguments()
    given = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()}
    results = []
    for name in ("torch", "triton"):
        with pyembed.backend(name):
            results.append(F.embed_qkv(**given))
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.gpu
def test_devices_must_agree():
    with pytest.raises(ValueError, match="ids: expected device cuda:0, that of token; got cpu"):
        F.embedding(torch.tensor([0]), torch.randn(3, 4, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_calls_are_a_launch(dtype, monkeypatch):
    """As test_launches.py has it where there is no device."""
    from pyembed.kernels import launch

    asked, by_launcher = [], launch._launch
    monkeypatch.setattr(launch, "_launch", lambda *args, **options: asked.append(args) or by_launcher(*args, **options))
    front = pyembed.EmbeddingQKV(97, 64, 4, max_length=16, position="rotary", norm="rms", device=DEVICE, dtype=dtype)
    front.requires_grad_(False)
    for step in range(4):
        for parameter in front.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        asked.clear()
        ids, places = torch.randint(97, (3, 9), device=DEVICE)[:, step : step + 1], torch.full((3, 1), step, device=DEVICE)
        found = front(ids, places)
        assert bool(asked) == (step == 0)
        with pyembed.backend("torch"):
            torch.testing.assert_close(found, front(ids, places), rtol=2e-2, atol=2e-2)
    pyembed.check_ids()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_outputs_are_heads(backend):
    """Of one buffer, where PyTorch's operators compute it; the kernels write query, key and value apart."""
    given = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments(num_kv_heads=1, num_heads=4).items()}
    with pyembed.backend(backend):
        out = F.embed_qkv(**given)
    assert out.query.shape == (2, 3, 4, 4) and out.key.shape == out.value.shape == (2, 3, 1, 4)
    assert (out.query.untyped_storage().data_ptr() == out.value.untyped_storage().data_ptr()) == (backend == "torch")


@pytest.mark.parametrize("run", ["torch", "triton", "distinct"])
def test_outputs_may_be_changed_in_place(run):
    """x += attention(…) on the residual stream."""
    token, weight, position = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 24, 4))
    ids = torch.tensor([[1, 2, 3], [4, 0, 1]])
    results = []
    for ours in (True, False):
        with (
            pyembed.backend("triton" if ours and run == "triton" else "torch"),
            pyembed.plan("distinct" if ours and run == "distinct" else "auto"),
        ):
            out = F.embed_qkv(ids, token, weight, num_heads=2, norm="rms", position=position)
            hidden = out.hidden if run != "torch" else out.hidden.clone()
            hidden += 2.0
            rows = F.embedding(ids, token)
            rows *= 3.0
        grads = torch.autograd.grad((hidden.square().sum() + out.key.square().sum() + rows.sum()), (token, weight, position))
        results.append(grads)
        if run == "torch":
            break
        run = "torch"
    for mine, theirs in zip(results[0], results[-1], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_interpreter_refuses_bf16():
    with pyembed.backend("triton"), pytest.raises(TypeError, match="token: Triton's interpreter has no bfloat16"):
        F.embed(torch.tensor([0]), torch.randn(3, 4, dtype=torch.bfloat16))


def test_given_distinct_ids_are_checked():
    """What a loader hands over belongs to the batch; whatever the plan, and also where it goes unused."""
    ids, token, weight = torch.tensor([[3, 1, 3], [0, 1, 4]]), torch.randn(5, 8), torch.randn(24, 8)
    right = pyembed.DistinctIds(*ids.unique(return_inverse=True))
    over = right._replace(inverse=right.inverse + 1)
    wrong = {
        r"distinct: expected the ids of this batch, 1 at \(0, 1\); got 0": right._replace(inverse=right.inverse.clone()),
        r"distinct.ids: expected each id once, in ascending order": right._replace(ids=right.ids.flip(0)),
        r"distinct.inverse: expected shape \(2, 3\)": right._replace(inverse=right.inverse[:1]),
        r"distinct.inverse: expected values in \[0, 4\), the rows of distinct.ids; got 4": over,
        r"distinct.ids: expected dtype torch.int32 or torch.int64, got torch.float32": right._replace(ids=right.ids.float()),
        r"distinct: expected a DistinctIds, got tuple": tuple(right),
        r"distinct: expected a DistinctIds, got list": list(right),
    }
    next(iter(wrong.values())).inverse[0, 1] = 0
    for plan, backend in itertools.product(("distinct", "one_pass"), ("torch", "triton")):
        with pyembed.plan(plan), pyembed.backend(backend):
            F.embed_qkv(ids, token, weight, num_heads=1, distinct=right)
            for message, given in wrong.items():
                with pytest.raises((ValueError, TypeError, IndexError), match=message):
                    F.embed_qkv(ids, token, weight, num_heads=1, distinct=given)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_given_distinct_ids_are_checked_under_every_policy(backend):
    ids, token, weight = torch.tensor([[3, 1, 3], [0, 1, 4]]), torch.randn(5, 8), torch.randn(24, 8)
    right = pyembed.DistinctIds(*ids.unique(return_inverse=True))
    wrong = right._replace(inverse=right.inverse.flip(0))
    for policy, plan in itertools.product(("raise", "clamp", "zero", "trust"), ("one_pass", "distinct")):
        if (policy, plan) == ("zero", "distinct"):
            continue  # which that plan refuses
        with pyembed.backend(backend), pyembed.plan(plan), pyembed.id_policy(policy):
            for _ in range(2):
                F.embed_qkv(ids, token, weight, num_heads=1, distinct=right)
                with pytest.raises(ValueError, match="distinct: expected the ids of this batch"):
                    F.embed_qkv(ids, token, weight, num_heads=1, distinct=wrong)


def test_debug_looks_at_values(monkeypatch):
    from pyembed import modes

    on_gpu = type("Ids", (), {"is_cuda": True, "device": torch.device("cuda")})()
    assert not modes.can_read(on_gpu) and modes.can_read(torch.empty(0))
    with pyembed.debug():
        assert modes.can_read(on_gpu)
    assert not modes.can_read(on_gpu)


@pytest.mark.sample
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("plan", ["one_pass", "distinct"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_in_float32_beside_sixteen_bits(dtype, backend, plan, norm):
    """Their gradients come in float32 too."""
    if backend == "triton" and dtype not in DTYPES:
        pytest.skip("the interpreter has no bf16 product")
    case = Case(dtype, DEVICE, norm=norm)
    for name in ("norm_weight", "norm_bias"):
        if case.parameters[name] is not None:
            case.parameters[name] = torch.randn(40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with pyembed.backend(backend), pyembed.plan(plan):
        found = case.check(F.embed_qkv)
    assert found["grad of norm_weight"].dtype == torch.float32 and found["query"].dtype == dtype


@pytest.mark.parametrize("given", [True, pytest.param(False, marks=pytest.mark.full)])
def test_lengths_share_a_graph(given):
    """With position_ids (1, T), given or made within, there is one graph for the first length and one for all others."""
    table, places, weight = torch.randn(7, 4), torch.randn(16, 4), torch.randn(12, 4)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @functools.partial(torch.compile, fullgraph=True, backend=counter)
    def front(ids, position_ids):
        position_ids = position_ids if given else torch.arange(ids.shape[1])[None]
        return F.embed_qkv(ids, table, weight, num_heads=2, position=places, position_ids=position_ids, norm="layer").query

    torch._dynamo.reset()
    for T in (5, 7, 9, 11):
        front(torch.randint(7, (2, T)), torch.arange(T)[None])
    assert counter.frame_count == 2
