"""The one-pass kernel and its gradients, against float64."""

import pytest
import torch
from conftest import CUDA, DEVICE, DTYPES, examples, full
from hypothesis import given
from hypothesis import strategies as st
from numerics import WAYS, Case, assert_no_worse, take, tf32

import pyembed
from pyembed import functional as F
from pyembed import reference
from pyembed.call import FRONT_END, HIDDEN, Epilogue
from pyembed.plans import one_pass, operators

pytestmark = pytest.mark.usefixtures("triton")


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("position", ["learned", None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["few", "rows"])
def test_variants(dtype, norm, position, bias, way, monkeypatch):
    take(way, monkeypatch)
    Case(dtype, DEVICE, norm=norm, position=position, bias=bias).check(F.embed_qkv)


@pytest.mark.sample
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_grouped_query_heads(dtype, heads, kv_heads):
    Case(dtype, DEVICE, heads=heads, kv_heads=kv_heads, head_dim=8).check(F.embed_qkv)


@pytest.mark.parametrize(
    "B, T, D, head_dim", [(1, 1, 1, 1), full(1, 1, 64, 16), (3, 1, 33, 5), (1, 67, 130, 11), full(5, 13, 17, 1)]
)
def test_ragged_shapes(B, T, D, head_dim):
    Case(torch.float32, DEVICE, B=B, T=T, D=D, head_dim=head_dim, heads=1).check(F.embed_qkv)


@pytest.mark.sample
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("D", [64, 72, 70])
@pytest.mark.parametrize("way", ["few", "rows"])
def test_several_tiles_each_way(D, way, transposed, monkeypatch):
    """More tokens, columns and depth than one tile of any size: rows that end inside a tile, aligned and not."""
    take(way, monkeypatch)
    case = Case(torch.float16, DEVICE, B=2, T=41, D=D, heads=5, kv_heads=5, head_dim=9)
    if transposed:  # as Conv1D holds it
        case.parameters["weight"] = case.parameters["weight"].t().contiguous().t()
    case.check(F.embed_qkv)


@pytest.mark.sample
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("position_ids", [None, "T", "1T", "BT"])
def test_ids_and_positions(ids_dtype, position_ids):
    Case(torch.float32, DEVICE, B=3, ids_dtype=ids_dtype, position_ids=position_ids).check(F.embed_qkv)


def test_no_affine_part():
    for norm in ("layer", "rms"):
        Case(torch.float32, DEVICE, norm=norm, affine=False).check(F.embed_qkv)


def test_scalar_and_three_dimensional_ids():
    Case(torch.float32, DEVICE, T=None).check(F.embed_qkv)
    case = Case(torch.float32, DEVICE, B=6, T=5)
    case.ids = case.ids.view(2, 3, 5)
    case.grads = [g.unflatten(0, (2, 3)) for g in case.grads]
    case.check(F.embed_qkv)


@pytest.mark.parametrize("head_dim", [7, 8])
def test_non_contiguous_tensors(head_dim):
    case = Case(torch.float32, DEVICE, B=4, T=9, D=24, head_dim=head_dim)  # a head of 7 starts at no multiple of 16 bytes
    case.ids = case.ids.t()[:4, :].contiguous().t()  # (4, 4), strides swapped
    case.grads = [g[:, :4].transpose(0, 1).contiguous().transpose(0, 1) for g in case.grads]
    case.parameters["weight"] = case.parameters["weight"].t().contiguous().t()  # as Conv1D holds it
    case.parameters["token"] = case.parameters["token"].repeat(1, 2)[:, :24]
    case.parameters["norm_weight"] = case.parameters["norm_weight"].repeat_interleave(2)[::2]
    assert not case.ids.is_contiguous() and not case.parameters["token"].is_contiguous()
    case.check(F.embed_qkv)


def test_expanded_gradients(device):
    """sum().backward() hands down a gradient of stride 0."""
    case = Case(torch.float32, device)
    case.grads = [torch.full((), 0.37, device=device).expand(g.shape) for g in case.grads]
    case.check(F.embed_qkv)


@pytest.mark.sample
@pytest.mark.parametrize("centre", [0.0, 30.0])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["few", "rows"])
def test_rows_with_a_large_mean(dtype, norm, centre, way, monkeypatch):
    take(way, monkeypatch)
    case = Case(dtype, DEVICE, norm=norm, position=None)
    case.parameters["token"] += centre
    case.check(F.embed_qkv)


@pytest.mark.parametrize("norm, dtype, centre", [("layer", torch.float32, 30.0), full("rms", torch.float16, 0.0)])
def test_rows_too_wide_to_be_held(norm, dtype, centre, monkeypatch):
    """The norm's backward in parts of a row, of which the last is not full; its sums have a fixed order too."""
    module, _ = operators.launcher("embed_grad", torch.empty(0, device=DEVICE))
    monkeypatch.setattr(module.tuning, "rows", lambda D, dtype: (2, 16, 4))
    case = Case(dtype, DEVICE, T=5, heads=1, norm=norm)
    case.parameters["token"] += centre
    first, second = case.check(F.embed_qkv), case.run(F.embed_qkv)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_without_variance():
    """A constant row (a zero padding row, say): eps alone keeps it finite."""
    case = Case(torch.float32, DEVICE, position=None)
    case.parameters["token"][::2] = 0.0
    case.parameters["token"][1] = 2.5
    case.check(F.embed_qkv)


def test_rows_are_normalised_before_their_fp16_products(monkeypatch):
    """Rows times the norm's weight are beyond fp16 here, and normalised rows are not."""
    take("few", monkeypatch)
    case = Case(torch.float16, DEVICE, norm="rms", position=None)
    case.parameters["token"] *= 500
    case.parameters["norm_weight"] *= 500
    case.check(F.embed_qkv)


@pytest.mark.sample
@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("programs", [2, 3, 5])
def test_programs_that_share_rows(programs, norm, monkeypatch):
    """The N tiles of a block of rows split among programs, evenly and not."""
    module, _ = operators.launcher("embed_qkv", torch.empty(0, device=DEVICE))
    monkeypatch.setattr(module.tuning, "runs", lambda M, N, tiles, device, resident: programs)
    take("few", monkeypatch)
    Case(torch.float32, DEVICE, heads=5, head_dim=11, norm=norm).check(F.embed_qkv)


@pytest.mark.parametrize("way", WAYS)
def test_an_id_without_a_row_is_nan_by_the_kernel(way, monkeypatch):
    """On a GPU nothing looks at ids: its heads become NaN there, and no other row's."""
    take(way, monkeypatch)
    case = Case(torch.float32, DEVICE)
    case.ids[0, 3], case.ids[1, 5] = -1, 31
    case.options["id_policy"] = "trust"
    for name, output in case.run(F.embed_qkv, backward=False).items():
        lost = output.isnan()
        assert lost[0, 3].all() and lost[1, 5].all() and lost.sum() == 2 * output[0, 0].numel(), name


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_eps(eps):
    case = Case(torch.float32, DEVICE, scale=0.01)
    case.options["eps"] = eps
    case.check(F.embed_qkv)


@pytest.mark.sample
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("position", ["learned", None])
@pytest.mark.parametrize("centre", [full(0.0), 5.0])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2])
@pytest.mark.parametrize("D, bias, affine", [(40, True, True), (70, False, True), (136, True, False)])
def test_folded(D, bias, affine, dtype, norm, position, centre, monkeypatch):
    """The kernel for many tokens, here with few: its weight carries the norm."""
    take("folded", monkeypatch)
    called = []
    fold_kernel = operators.launcher("embed_qkv_folded", torch.empty(0, device=DEVICE))[0].fold_kernel
    monkeypatch.setattr(fold_kernel, "run", lambda *a, _run=fold_kernel.run, **k: (called.append(1), _run(*a, **k)))
    case = Case(dtype, DEVICE, T=37, D=D, head_dim=11, norm=norm, position=position, bias=bias, affine=affine)
    case.parameters["token"] += centre
    case.check(F.embed_qkv)
    assert len(called) == 1


@pytest.mark.sample
@pytest.mark.parametrize("D, position, centre", [(48, "learned", 0.0), (70, None, 5.0)])
@pytest.mark.parametrize("way", ["rows", "folded"])
def test_without_tma(way, D, position, centre, monkeypatch):
    """On an A100, which has no descriptors; 70: rows that do not start at multiples of 16 bytes."""
    kernels, _ = operators.launcher("tuning", torch.empty(0, device=DEVICE))
    monkeypatch.setattr(kernels, "device_of", lambda tensor: kernels.DEVICES[80])
    take(way, monkeypatch)
    monkeypatch.setattr(kernels, "TensorDescriptor", None)
    case = Case(torch.float16, DEVICE, T=67, D=D, head_dim=11, position=position)
    case.parameters["token"] += centre
    case.check(F.embed_qkv)


def test_many_tokens(device):
    """At the size where tuning.py turns to the folded weight, where bf16 runs."""
    case = Case(DTYPES[-1], device, B=8, T=129, D=24, heads=2, head_dim=8)
    case.check(F.embed_qkv)


@pytest.mark.parametrize("frozen", ["token", "weight", full("bias"), "position", "norm_weight", full("norm_bias")])
def test_frozen_parameters(frozen, device):
    """A frozen parameter has no gradient, the others keep theirs, bit for bit."""
    case = Case(torch.float32, device)
    everything = case.run(F.embed_qkv)
    leaves = {k: p.detach().requires_grad_(k != frozen) for k, p in case.parameters.items()}
    outputs = F.embed_qkv(case.ids, **leaves, **case.options)
    torch.autograd.backward(outputs, case.grads)
    for name, leaf in leaves.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, everything[f"grad of {name}"]), name


def test_frozen_costs_nothing(device, monkeypatch):
    """With only the projection trained, no table gradient and no product with the weight is computed."""
    case = Case(torch.float32, device)
    module, _ = operators.launcher("embed_grad", case.ids)
    monkeypatch.setattr(module, "table_grad", lambda *a, **k: pytest.fail("a table gradient was computed"))
    monkeypatch.setattr(module, "position_grad", lambda *a, **k: pytest.fail("a position gradient was computed"))
    monkeypatch.setattr(torch.Tensor, "addmm", lambda *a, **k: pytest.fail("a product with the weight was computed"))
    products = []
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: products.append(a.shape) or torch.mm(a, b))
    leaves = {k: p.detach().requires_grad_(k == "weight") for k, p in case.parameters.items()}
    F.embed_qkv(case.ids, **leaves, **case.options).query.square().sum().backward()
    N, M = leaves["weight"].shape[0], case.ids.numel()
    assert products == [(N, M)]


@pytest.mark.parametrize("used", ["hidden", "query", "key", "value"])
def test_single_output_used(used, device):
    case = Case(torch.float32, device)
    found = {}
    for way, function in {"ours": F.embed_qkv, "eager": reference.embed_qkv, "oracle": reference.embed_qkv}.items():
        dtype = torch.float64 if way == "oracle" else torch.float32
        leaves = {k: p.detach().to(dtype).requires_grad_() for k, p in case.parameters.items()}
        outputs = function(case.ids, **leaves, **case.options)
        index = outputs._fields.index(used)
        outputs[index].backward(case.grads[index].to(dtype))
        found[way] = {k: p.grad for k, p in leaves.items() if p.grad is not None}
    assert found["ours"].keys() == found["eager"].keys()  # what is not reached has no gradient, as in eager
    for name, grad in found["oracle"].items():
        assert_no_worse(name, found["ours"][name], found["eager"][name], grad)


def test_the_call_that_an_operator_is_given(device):
    """Every field comes through its arguments; of the results for the backward none wants a gradient."""
    case = Case(torch.float32, device)
    case.parameters = {name: p.requires_grad_() for name, p in case.parameters.items()}
    for policy, invariant in (("raise", False), ("trust", True)):
        call = case.call(epilogue=Epilogue(heads_first=True, head_eps=0.5), id_policy=policy, batch_invariant=invariant)
        again = FRONT_END.rebuild(FRONT_END.flatten(call))
        assert all(a is b or a == b for a, b in zip(again.values(), call.values(), strict=True))
        assert again[4:] == call[4:] and list(map(type, again)) == list(map(type, call))
        alone = HIDDEN.rebuild(HIDDEN.flatten(call))
        assert all(a is b or a == b for a, b in zip(alone.terms, call.terms, strict=True))
        assert alone.projection is None and alone.id_policy == policy
    for observed in (False, True):
        outputs = one_pass.embed_qkv(call, observed=observed)
        assert [x.requires_grad for x in outputs] == [True] * 4 + [False] * 2


def test_what_is_changed_between_forward_and_backward(device):
    """A bias, since the backward needs no values of it; a weight not, and an error says so, as eager's does."""
    case = Case(torch.float32, device)
    expected = case.run(F.embed_qkv)
    for name, allowed in {"bias": True, "weight": False, "norm_weight": False}.items():
        leaves = {k: p.detach().clone().requires_grad_() for k, p in case.parameters.items()}
        outputs = F.embed_qkv(case.ids, **leaves, **case.options)
        with torch.no_grad():
            leaves[name].zero_()
        if allowed:
            for key, grad in zip(leaves, torch.autograd.grad(list(outputs), list(leaves.values()), case.grads), strict=True):
                assert torch.equal(grad, expected[f"grad of {key}"]), key
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(list(outputs), list(leaves.values()), case.grads)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
def test_empty(shape, device):
    case = Case(torch.float32, device, T=5)
    leaves = {k: p.detach().requires_grad_() for k, p in case.parameters.items()}
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    outputs = F.embed_qkv(ids, **leaves, **case.options)
    expected = reference.embed_qkv(ids, **leaves, **case.options)
    assert [o.shape for o in outputs] == [o.shape for o in expected]
    sum(o.sum() for o in outputs).backward()
    assert all(not p.grad.any() for p in leaves.values())


@pytest.mark.parametrize("padding_idx", [0, 30, -1])
def test_padding_row_gets_no_gradient(padding_idx, device):
    case = Case(torch.float32, device, V=31, padding_idx=padding_idx)
    case.ids[0, :7] = padding_idx % 31
    ours = case.check(F.embed_qkv)
    assert not ours["grad of token"][padding_idx].any() and ours["grad of token"].any()


@pytest.mark.parametrize("dtype", [DTYPES[0], *map(full, DTYPES[1:])])
def test_repeatable(dtype, device):
    case = Case(dtype, device, B=4, T=50, V=3)
    first, second = case.run(F.embed_qkv), case.run(F.embed_qkv)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_nan_stays_in_its_row(device):
    """A row of NaN reaches the outputs of its own tokens, and no other token's."""
    case = Case(torch.float32, device)
    clean = case.run(F.embed_qkv, backward=False)
    case.parameters["token"][case.ids[0, 0]] = float("nan")
    hit = case.ids == case.ids[0, 0]
    assert hit.any() and not hit.all()
    for name, output in case.run(F.embed_qkv, backward=False).items():
        assert output[hit].isnan().all() and torch.equal(output[~hit], clean[name][~hit]), name


@examples(8, full=200 if CUDA else 25)
@given(
    B=st.integers(0, 4), T=st.integers(1, 40), V=st.integers(1, 20), D=st.integers(1, 70), heads=st.sampled_from([1, 2, 6]),
    kv_heads=st.sampled_from([1, 2]), head_dim=st.integers(1, 9), norm=st.sampled_from(["layer", "rms", None]),
    position=st.sampled_from(["learned", None]), bias=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(B, T, V, D, heads, kv_heads, head_dim, norm, position, bias, dtype, seed):
    if heads % kv_heads:
        kv_heads = 1
    with pyembed.backend("triton"):
        Case(
            dtype, DEVICE, B=B, T=T, V=V, D=D, heads=heads, kv_heads=kv_heads, head_dim=head_dim, norm=norm,
            position=position, bias=bias, seed=seed,
        ).check(F.embed_qkv)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B, T, D, heads, kv_heads, head_dim, norm, position",
    [
        (8, 1024, 768, 12, 12, 64, "layer", "learned"),
        (1, 1, 768, 12, 12, 64, "layer", "learned"),
        (4, 1000, 2048, 32, 8, 64, "rms", None),
        (2, 2049, 4096, 32, 8, 128, "rms", None),
        (33, 1, 4096, 32, 8, 128, "rms", None),
        (2, 777, 771, 3, 3, 257, "layer", "learned"),
    ],
)
def test_model_widths(dtype, B, T, D, heads, kv_heads, head_dim, norm, position):
    Case(
        dtype, "cuda", B=B, T=T, V=50257, D=D, heads=heads, kv_heads=kv_heads, head_dim=head_dim, norm=norm,
        position=position, scale=0.02,
    ).check(F.embed_qkv)  # fmt: skip


@pytest.mark.gpu
def test_bad_ids_on_a_gpu_make_nan():
    """No synchronisation, no dead CUDA context, and no quiet wrong number: the row is NaN, its neighbours are right."""
    case = Case(torch.bfloat16, "cuda")
    clean = case.run(F.embed_qkv, backward=False)
    bad = torch.zeros_like(case.ids, dtype=torch.bool)
    bad[0, 3] = bad[1, 5] = True
    case.ids[0, 3], case.ids[1, 5] = -1, 31
    for name, output in case.run(F.embed_qkv, backward=False).items():
        assert output[bad].isnan().all() and torch.equal(output[~bad], clean[name][~bad]), name


@pytest.mark.gpu
def test_fp32_follows_torchs_tf32_switch():
    case = Case(torch.float32, "cuda", D=512, head_dim=64)
    with tf32(False):
        exact = case.run(F.embed_qkv, backward=False)["query"]
    with tf32(True):
        assert not torch.equal(exact, case.run(F.embed_qkv, backward=False)["query"])
