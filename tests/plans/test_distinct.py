"""The `distinct` plan: the same answer, whatever repeats."""

import gc
import io
import os

import pytest
import torch
from numerics import Case

import pyembed
from pyembed import functional as F
from pyembed import memory, positions, reference
from pyembed.call import FRONT_END
from pyembed.plans import distinct_cpu
from pyembed.plans.distinct import distinct_qkv

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VARIANTS = [
    {},
    {"norm": "rms"},
    {"norm": None},
    {"position": None},
    {"norm": "rms", "position": None, "bias": False, "heads": 4, "kv_heads": 1},
    {"affine": False, "bias": False},
    {"position_ids": "T"},
    {"position_ids": "1T"},
    {"position_ids": "BT", "B": 3},
    {"padding_idx": 3},
    {"T": None},
    {"T": 1, "B": 9},
    {"V": 1},
    {"scale": 1e-4},
    {"scale": 300.0},
    {"ids_dtype": torch.int32},
]


@pytest.fixture(autouse=True)
def forced():
    with pyembed.plan("distinct"):
        yield


@pytest.fixture(params=[None, 1 << 10], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """With a small block the tokens go by in pieces of sequences, and several short sequences at a time."""
    if request.param:
        monkeypatch.setattr(distinct_cpu, "BLOCK_BYTES", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants(dtype, variant, blocks):
    Case(dtype, "cpu", **variant).check(F.embed_qkv)


@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_gradcheck(norm):
    case = Case(torch.float64, "cpu", V=5, T=4, D=6, heads=1, head_dim=2, norm=norm)
    leaves = {k: p.detach().requires_grad_() for k, p in case.parameters.items() if p is not None}

    def function(*tensors):
        return tuple(F.embed_qkv(case.ids, **dict(zip(leaves, tensors, strict=True)), **case.options))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("frozen", ["token", "weight", "bias", "position", "norm_weight", "norm_bias"])
def test_frozen_parameters(frozen):
    case = Case(torch.float32, "cpu")
    everything = case.run(F.embed_qkv)
    leaves = {k: p.detach().requires_grad_(k != frozen) for k, p in case.parameters.items()}
    torch.autograd.backward(F.embed_qkv(case.ids, **leaves, **case.options), case.grads)
    for name, leaf in leaves.items():
        assert (leaf.grad is None) if name == frozen else torch.equal(leaf.grad, everything[f"grad of {name}"]), name


@pytest.mark.parametrize("used", ["hidden", "key"])
def test_single_output_used(used):
    case = Case(torch.float64, "cpu")
    grads = []
    for name in ("distinct", "one_pass"):
        leaves = {k: p.detach().requires_grad_() for k, p in case.parameters.items()}
        with pyembed.plan(name):
            out = getattr(F.embed_qkv(case.ids, **leaves, **case.options), used)
        out.backward(torch.ones_like(out).cumsum(-1))
        grads.append([p.grad for p in leaves.values()])
    for ours, eager in zip(*grads, strict=True):
        assert (ours is None) == (eager is None)
        if ours is not None:
            torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
def test_empty(shape):
    case = Case(torch.float32, "cpu", T=5)
    leaves = {k: p.detach().requires_grad_() for k, p in case.parameters.items()}
    outputs = F.embed_qkv(torch.zeros(shape, dtype=torch.long), **leaves, **case.options)
    assert outputs.query.shape == (*shape, 3, 7)
    sum(o.sum() for o in outputs).backward()
    assert all(p.grad is None or not p.grad.any() for p in leaves.values())


def test_repeatable():
    case = Case(torch.float32, "cpu", B=8, T=60, V=4)
    first, second = case.run(F.embed_qkv), case.run(F.embed_qkv)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_opcheck():
    case = Case(torch.float32, "cpu", heads=1)
    case.parameters = {k: v.requires_grad_() for k, v in case.parameters.items()}
    arguments = (*FRONT_END.flatten(case.call()), None, None, None, False)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(distinct_qkv.forward.op, arguments, test_utils=utilities)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_that_cancel_lose_digits(backend):
    """What the plan pays for its speed: where token and position nearly cancel, the sum of two projections keeps as many
    fewer digits as the sum is smaller than its terms. The bound is stated in README, and here it holds."""
    case = Case(torch.float32, "cpu")
    token, position = case.parameters["token"], case.parameters["position"]
    token[case.ids[0, 0]] = -position[0] * (1 + 1e-3 * torch.randn(40))
    with pyembed.backend(backend):
        ours = case.run(F.embed_qkv, backward=False)["query"][0, 0].double()
    exact = case.run(reference.embed_qkv, torch.float64, backward=False)["query"][0, 0]
    row = token[case.ids[0, 0]].double()
    smaller = row.std() / (row + position[0].double()).std()
    assert smaller > 500
    wrong, eps = (ours - exact).abs().amax() / exact.abs().amax(), torch.finfo(torch.float32).eps
    assert wrong <= 4 * smaller * eps


IDS = torch.tensor([[3, 1, 3], [0, 1, 4]])
REFUSED = {
    "token rows are scaled": {"scale": 2.0},
    "segments are added": {"segment": torch.randn(2, 8), "segment_ids": IDS % 2},
    "positions are computed, not looked up": {"position": positions.sinusoidal_steps(8)},
    "dropout comes between sum and norm": {"dropout": 0.5},
    "batch_invariant wants one order of sums": {"batch_invariant": True},
    "id_policy 'zero' is PyTorch's operators' alone": {"id_policy": "zero"},
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("why", REFUSED)
def test_refused_calls(why, backend):
    """Forced, it says why; where plans are chosen, another runs them."""
    token, weight = torch.randn(5, 8), torch.randn(24, 8)
    with pyembed.backend(backend):
        with pytest.raises(RuntimeError, match=f"^plan: 'distinct' cannot run here: {why}$"):
            F.embed_qkv(IDS, token, weight, num_heads=2, **REFUSED[why])
        with pyembed.plan("auto"):
            assert F.embed_qkv(IDS, token, weight, num_heads=2, **REFUSED[why]).query.shape == (2, 3, 2, 4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_padding_row_gets_no_gradient(backend):
    token, weight = torch.randn(5, 8, requires_grad=True), torch.randn(24, 8)
    with pyembed.backend(backend):
        outputs = F.embed_qkv(IDS, token, weight, num_heads=2, norm="rms", padding_idx=-2)
    sum(x.square().sum() for x in outputs).backward()
    assert token.grad.any(1).tolist() == [True, True, False, False, True]


def test_bad_ids_are_named():
    case = Case(torch.float32, "cpu")
    case.ids = case.ids.clone()
    case.ids[1, 2] = 77
    with pytest.raises(IndexError, match=r"ids: expected values in \[0, 31\).* got 77 at \(1, 2\)"):
        case.run(F.embed_qkv)


def test_switching_plans_changes_nothing_but_speed():
    case = Case(torch.float32, "cpu", B=6, T=30)
    with pyembed.plan("one_pass"):
        eager = case.run(F.embed_qkv)
    for name, tensor in case.run(F.embed_qkv).items():
        torch.testing.assert_close(tensor, eager[name], rtol=1e-4, atol=1e-5)


def large(value):
    return memory.empty(1024, 2048, dtype=torch.float32).fill_(value)


def test_memory_is_used_again_only_when_free():
    memory.empty_cache()
    first = large(1.0)
    pointer, view = first.data_ptr(), first[3:5]
    del first
    second = large(2.0)  # the view still needs the first buffer
    assert second.data_ptr() != pointer and (view == 1.0).all()
    array = view.numpy()
    del view
    assert large(3.0).data_ptr() != pointer and (array == 1.0).all()
    del array
    gc.collect()
    assert large(4.0).data_ptr() == pointer and (second == 2.0).all()


def test_memory_is_safe_in_a_graph():
    """What autograd saved is not written over by the next call."""
    memory.empty_cache()
    leaf = torch.ones(1024, 2048, requires_grad=True)
    saved = large(5.0)
    product = leaf * saved
    del saved
    large(7.0)
    product.sum().backward()
    assert (leaf.grad == 5.0).all()


def test_memory_is_given_back(monkeypatch):
    memory.empty_cache()
    held = [large(float(i)) for i in range(4)]
    del held
    gc.collect()
    assert len(memory._storages) == 4
    monkeypatch.setattr(memory, "KEEP_BYTES", 16 << 20)
    kept = large(0.0)
    assert len(memory._storages) == 3
    pyembed.empty_cache()
    assert len(memory._storages) == 1 and (kept == 0.0).all()


def resized_to_nothing_and_back(x):
    size = x.untyped_storage().nbytes()
    x.untyped_storage().resize_(0)
    x.untyped_storage().resize_(size)
    return x.fill_(2.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.resize_(1025, 1024)[:1024],
        lambda x: x.resize_(2, 3),
        lambda x: x.resize_(0),
        resized_to_nothing_and_back,
        lambda x: x.set_(torch.ones(2)),
        lambda x: x.set_(x.untyped_storage(), 1024, (3, 1024), (1, 4)),
        lambda x: x.mul_(3.0).t_(),
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: torch.from_dlpack(x),
        lambda x: x.share_memory_(),
    ],
    ids=["larger", "smaller", "nothing", "storage", "set", "set to its own", "in place", "numpy", "dlpack", "shared"],
)
def test_results_are_like_any_tensor(change):
    """In new memory and in memory that was used before: what is done with PyTorch's can be done with them, to the same end."""
    memory.empty_cache()
    expected = change(torch.full((1024, 1024), 1.5))
    for _ in range(3):
        result = memory.empty(1024, 1024, dtype=torch.float32).fill_(1.5)
        assert result.untyped_storage().nbytes() == result.nbytes and result.data_ptr() % 64 == 0
        found = change(result)
        assert torch.equal(found, expected) and found.stride() == expected.stride()
        assert found.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
        del result, found


def test_memory_that_others_hold_is_not_used_again():
    """A storage without a tensor, and one that another process may have been sent."""
    memory.empty_cache()
    storage = large(1.0).untyped_storage()
    assert large(2.0).data_ptr() != storage.data_ptr() and torch.tensor(storage[:8]).view(torch.float32).eq(1.0).all()
    del storage
    sent = large(3.0)
    received = torch.UntypedStorage._new_shared_fd_cpu(*sent.untyped_storage()._share_fd_cpu_())
    del sent
    assert not any(large(value).is_shared() for value in (4.0, 5.0, 6.0))
    assert torch.tensor(received[:8]).view(torch.float32).eq(3.0).all()


@pytest.mark.parametrize("tokens", [1200, 1024])
def test_a_file_holds_the_result_alone(tokens):
    """Also where what lay in the memory before was larger."""
    memory.empty_cache()
    token, weight = torch.randn(8, 1024), torch.randn(3 * 1024, 1024)
    for M in (1200, tokens):
        found = None  # gives its memory back
        found = F.embed_qkv(torch.randint(8, (M,)), token, weight, num_heads=8)
    for result in found:
        file = io.BytesIO()
        torch.save(result, file)
        assert result.nbytes < len(file.getvalue()) < result.nbytes + 2000


@pytest.mark.sample
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("given", ["strided", "more rows"])
def test_given_distinct_ids(backend, given):
    """Of any strides, and with rows that this batch does not name: a part of a larger one that was counted."""
    case = Case(torch.float32, "cpu")
    rows, inverse = case.ids.unique(return_inverse=True)
    if given == "strided":
        rows = torch.stack([rows, torch.full_like(rows, 7)], 1)[:, 0]
        inverse = torch.stack([inverse, torch.zeros_like(inverse)], -1)[..., 0]
    else:
        rows, inverse = torch.arange(31), case.ids
    with pyembed.backend(backend):
        expected = case.run(F.embed_qkv)
        case.options["distinct"] = pyembed.DistinctIds(rows, inverse)
        found = case.run(F.embed_qkv)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_half_precision_sums_keep_their_range():
    """Σ rstd·grad over many tokens of one id, at rows as small as a fresh GPT-2's, is beyond fp16; what comes of it is not."""
    g = torch.Generator().manual_seed(0)
    front = pyembed.EmbeddingQKV(3, 64, 4, position=None, norm="rms", bias=False, dtype=torch.float16)
    torch.nn.init.normal_(front.token.weight, std=0.02, generator=g)
    ids = torch.randint(3, (8, 512), generator=g)
    grads = [torch.randn(8, 512, 4, 16, generator=g).half() + 2 for _ in range(3)]
    found = []
    for name in ("one_pass", "distinct"):
        front.zero_grad()
        front.token.weight.requires_grad_(False)
        with pyembed.plan(name):
            torch.autograd.backward(front(ids)[1:], grads)
        found.append([front.norm.weight.grad, front.qkv.weight.grad])
    for eager, ours in zip(*found, strict=True):
        assert eager.isfinite().all()
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2 * eager.abs().max().item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_its_own_results():
    result = memory.empty(2048, 1024, dtype=torch.float32).fill_(1.0)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        result.zero_()
        os._exit(0 if not memory._storages else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (result == 1).all()


def test_width_one():
    with pyembed.backend("triton"):
        Case(torch.float32, "cpu", D=1, heads=1, head_dim=8, norm=None).check(F.embed_qkv)
