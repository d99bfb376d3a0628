"""The modules are drop-ins: same names, same weights, same results."""

import copy
import pickle

import pytest
import torch
from conftest import DEVICE, full
from torch import nn

import pyembed
from pyembed import EmbeddingQKV, TokenPositionEmbedding


def test_state_dict_keys():
    assert list(EmbeddingQKV(9, 8, 2).state_dict()) == [
        "token.weight", "position.weight", "norm.weight", "norm.bias", "qkv.weight", "qkv.bias",
    ]  # fmt: skip
    assert list(EmbeddingQKV(9, 8, 2, position="sinusoidal", norm="rms", bias=False).state_dict()) == [
        "token.weight", "norm.weight", "qkv.weight",
    ]  # fmt: skip
    assert list(EmbeddingQKV(9, 8, 2, position=None, norm=None).state_dict()) == ["token.weight", "qkv.weight", "qkv.bias"]
    assert list(TokenPositionEmbedding(9, 8, 4).state_dict()) == ["token.weight", "position.weight"]


def stock(module, ids, position_ids=None):
    """The composition that the module replaces, by its own submodules."""
    hidden = module.token(ids)
    if module.position is not None:
        hidden = hidden + module.position(
            torch.arange(ids.shape[-1], device=ids.device) if position_ids is None else position_ids
        )
    normed = hidden if module.norm is None else module.norm(hidden)
    if isinstance(module.qkv, nn.ModuleList):
        parts = [linear(normed) for linear in module.qkv]
    else:
        H, K = module.num_heads, module.num_kv_heads
        qkv = module.qkv(normed)
        d = qkv.shape[-1] // (H + 2 * K)
        parts = qkv.split([H * d, K * d, K * d], -1)
    heads = (module.num_heads, module.num_kv_heads, module.num_kv_heads)
    return (hidden, *(p.unflatten(-1, (h, -1)) for p, h in zip(parts, heads, strict=True)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2},
        {"head_dim": 5},
        {"position": "sinusoidal"},
        {"position": None, "norm": "rms", "bias": False, "num_kv_heads": 1},
        {"norm": None},
        {"padding_idx": 0},
    ],
    ids=str,
)
def test_equals_stock_modules(options, backend):
    torch.manual_seed(0)
    module = EmbeddingQKV(11, 16, 4, max_length=12, **options).to(DEVICE)
    ids = torch.randint(11, (3, 7), device=DEVICE)
    with pyembed.backend(backend):
        out = module(ids)
        torch.testing.assert_close(tuple(out), stock(module, ids))
        places = torch.randint(12, (3, 7), device=DEVICE)
        if module.position is not None:
            torch.testing.assert_close(tuple(module(ids, places)), stock(module, ids, places))
        grads = [torch.randn_like(o) for o in out]
        torch.autograd.backward(out, grads)
    ours = {k: p.grad for k, p in module.named_parameters()}
    module.zero_grad()
    torch.autograd.backward(stock(module, ids), grads)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_positions_with_an_offset_or_beside_tokens(backend):
    ids, places = torch.randint(11, (3, 7), device=DEVICE), torch.randint(12, (3, 7), device=DEVICE)
    options = {"max_length": 12, "device": DEVICE}
    later, beside = (EmbeddingQKV(11, 16, 4, **options, **o) for o in ({"position_offset": 2}, {"combine": "concat"}))
    for given, rows in ((None, torch.arange(7, device=DEVICE)), (places, places)):
        for front in (later, beside):
            token, position = front.token(ids), front.position(rows + front.position_offset)
            hidden = token + position if front is later else torch.cat([token, position.expand_as(token)], -1)
            with pyembed.backend(backend):
                found = front(ids, given)
            assert torch.equal(found.hidden, hidden)
            projected = torch.cat([x.flatten(-2) for x in found[1:]], -1)
            torch.testing.assert_close(projected, front.qkv(front.norm(hidden)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sums_and_concatenations_of_the_same_tables(backend):
    module, ids = TokenPositionEmbedding(11, 16, 12).to(DEVICE), torch.randint(11, (3, 7), device=DEVICE)
    rows = module.token(ids), module.position(torch.arange(7, device=DEVICE)).expand(3, 7, 16)
    for combine in ("sum", "concat", "sum", "concat"):
        module.combine = combine
        with pyembed.backend(backend):
            assert torch.equal(module(ids), sum(rows) if combine == "sum" else torch.cat(rows, -1))


def test_a_padding_row_of_positions_gets_no_gradient():
    """As nn.Embedding has it: the module is called."""
    parts = nn.Embedding(11, 16), nn.Embedding(12, 16, padding_idx=1), nn.LayerNorm(16)
    front = EmbeddingQKV.from_modules(*parts, qkv=nn.Linear(16, 48), num_heads=4).to(DEVICE)
    front(torch.randint(11, (3, 7), device=DEVICE)).query.square().sum().backward()
    assert front.position.weight.grad.any(1).tolist() == [True, False, *[True] * 5, *[False] * 5]


class Conv1D(nn.Module):
    """The layout of Hugging Face's Conv1D: weight (inputs, outputs)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class LlamaRMSNorm(nn.Module):
    """Hugging Face's: the row is cast back before it meets the weight."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width)), 1e-6

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "three", "three, biases on some"])
def test_from_modules(kind, backend):
    token, position = nn.Embedding(11, 16), nn.Embedding(9, 16)
    norm = nn.LayerNorm(16)
    heads = {"num_heads": 4}
    if kind == "linear":
        qkv = nn.Linear(16, 48)
    elif kind == "conv1d":
        qkv = Conv1D(48, 16)
    else:
        norm, position, heads["num_kv_heads"] = LlamaRMSNorm(16), None, 2
        biases = (True, False, False) if "some" in kind else (False,) * 3
        qkv = tuple(nn.Linear(16, n, bias=b) for n, b in zip((16, 8, 8), biases, strict=True))
    module = EmbeddingQKV.from_modules(token, position, norm, qkv=qkv, **heads).to(DEVICE)
    assert module.token is token and module.norm is norm and module.position is position
    ids = torch.randint(11, (2, 6), device=DEVICE)
    with pyembed.backend(backend):
        out = module(ids)
        torch.testing.assert_close(tuple(out), stock(module, ids))
        out.value.square().sum().backward()
    owner = qkv[2] if isinstance(qkv, tuple) else qkv
    assert owner.weight.grad.abs().sum() > 0 and token.weight.grad.abs().sum() > 0


class Embedding:
    """Of a library that has its own."""


HEAD = nn.ModuleDict({name: nn.Linear(8, 4) for name in ("query", "key", "value")})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"token": nn.Linear(2, 2)}, TypeError, "token: expected an nn.Embedding, got nn.Linear"),
        ({"position": nn.Linear(2, 2)}, TypeError, "position: expected an nn.Embedding or None, got nn.Linear"),
        ({"norm": "layer"}, TypeError, "norm: expected a module or None, got str"),
        ({"qkv": nn.Conv1d(8, 24, 1)}, TypeError, "qkv: expected one nn.Linear, .* tuple of these, got nn.Conv1d"),
        ({"num_heads": 0}, ValueError, "num_heads: expected a positive int, got 0"),
        ({"per_head": True, "qkv": [nn.Linear(8, 8)] * 3}, ValueError, "per_head: expected False where .* three modules"),
        ({"num_kv_heads": 3}, ValueError, r"num_heads: expected a multiple of num_kv_heads \(3\), got 2"),
        ({"qkv": [nn.Linear(n, 8) for n in (8, 7, 8)]}, ValueError, r"qkv: expected three of as many inputs, got \[8, 7, 8\]"),
        ({"qkv": nn.Linear(9, 24)}, ValueError, "qkv: expected 8 inputs, the width of token; got 9"),
        ({"position": nn.Embedding(4, 9)}, ValueError, "position: expected 8 columns, the width of token; got 9"),
        ({"norm": nn.LayerNorm((2, 8))}, ValueError, r"norm: expected normalized_shape \(8,\).* got \(2, 8\)"),
        ({"qkv": nn.Linear(8, 25)}, ValueError, "qkv: expected a multiple of .* outputs, got 25"),
        (
            {"qkv": [nn.Linear(8, n) for n in (4, 16, 4)]},
            ValueError,
            r"qkv: expected outputs .* ratio \(2, 2, 2\), got \[4, 16, 4\]",
        ),
        ({"qkv": [nn.Linear(8, 8)] * 2}, TypeError, r"qkv: .*, of all heads, or a .* got \(nn.Linear, nn.Linear\)"),
        ({"qkv": [HEAD] * 2}, TypeError, r"qkv: .*, of all heads, or a .* got \(nn.ModuleDict, nn.ModuleDict\)"),
        ({"qkv": [HEAD] * 3}, TypeError, "qkv: .*, of all heads, or a .* got nn.ModuleDict"),
        ({"qkv": nn.ModuleList([HEAD] * 2)}, TypeError, "qkv: .*, of all heads, or a .* got nn.ModuleDict"),
        ({"qkv": {"query": None}}, TypeError, "qkv: .* got dict"),
        ({"token": Embedding()}, TypeError, f"token: expected an nn.Embedding, got {__name__}.Embedding"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_from_modules_refuses(arguments, error, message):
    given = {"token": nn.Embedding(5, 8), "position": None, "norm": None, "qkv": nn.Linear(8, 24), "num_heads": 2}
    with pytest.raises(error, match=message):
        EmbeddingQKV.from_modules(**(given | arguments))


def test_constructor_refuses():
    for options, message in [
        ({"num_heads": 3}, r"embedding_dim: expected a multiple of num_heads \(3\), got 8"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_heads: expected a multiple of num_kv_heads \(3\), got 4"),
        ({"num_heads": 2.0}, r"num_heads: expected a positive int, got 2.0"),
        ({"num_heads": 2, "head_dim": 0}, "head_dim: expected a positive number, got 0"),
        ({"num_heads": 2, "max_length": 0}, "max_length: expected a positive number, got 0"),
        ({"num_heads": 2, "padding_idx": 5}, r"padding_idx: expected a row in \[-5, 5\), got 5"),
        ({"num_heads": 2, "norm": "group"}, r"norm: expected one of .* got 'group'"),
        ({"num_heads": 2, "position": "relative"}, r"position: expected 'learned', 'sinusoidal' or None, got 'relative'"),
    ]:
        with pytest.raises(ValueError, match=message):
            EmbeddingQKV(5, 8, **options)


class GemmaRMSNorm(nn.Module):
    """As transformers has it: rows by 1 + weight, in float32."""

    def __init__(self, D):
        super().__init__()
        self.eps, self.weight = 1e-6, nn.Parameter(torch.randn(D) / 4)

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.float())).type_as(x)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("plan", ["one_pass", "distinct", "table"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gemma(backend, plan, dtype):
    module = EmbeddingQKV.from_modules(nn.Embedding(11, 16), norm=GemmaRMSNorm(16), qkv=nn.Linear(16, 48), num_heads=4)
    module = module.to(DEVICE, dtype)
    ids = torch.randint(11, (2, 6), device=DEVICE)
    with pyembed.backend(backend), pyembed.plan(plan), torch.set_grad_enabled(plan != "table"):
        out = module(ids)
    assert "own" not in module.explain(ids).reason
    hidden = module.token(ids)
    expected = hidden, *module.qkv(module.norm(hidden)).unflatten(-1, (12, 4)).split(4, -2)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.float16 else {}
    torch.testing.assert_close(tuple(out), expected, **tolerance)
    if plan != "table":
        grads = [torch.autograd.grad(o[1].square().sum() + o[3].sum(), module.norm.weight)[0] for o in (out, expected)]
        torch.testing.assert_close(*grads, **tolerance)
    else:
        with torch.no_grad():
            module.norm.weight.add_(1.0)
            stale = module(ids).query
            assert not torch.equal(stale, out.query)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tokens", [6, 300])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_heads_in_turn(kv_heads, tokens, backend):
    """GPT-NeoX's rows: query, key and value of each head in turn; Falcon's: of each group of heads."""
    group, qkv = 4 // kv_heads, nn.Linear(16, (4 + 2 * kv_heads) * 6)
    module = EmbeddingQKV.from_modules(
        nn.Embedding(11, 16), norm=nn.LayerNorm(16), qkv=qkv, num_heads=4, num_kv_heads=kv_heads, per_head=True
    ).to(DEVICE)
    ids = torch.randint(11, (1, tokens), device=DEVICE)
    with pyembed.backend(backend):
        out = module(ids)
    hidden = module.token(ids)
    rows = qkv(module.norm(hidden)).view(1, tokens, kv_heads, group + 2, 6)
    expected = hidden, rows[..., :group, :].reshape(1, tokens, 4, 6), rows[..., group, :], rows[..., group + 1, :]
    torch.testing.assert_close(tuple(out), expected)
    grads = [torch.autograd.grad(o[1].square().sum() + o[2].sum(), (qkv.weight, qkv.bias)) for o in (out, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_few_tokens_do_not_pay_for_packing(monkeypatch):
    """Three projections, or one that lies head by head, are not copied together for a decode step, whatever the positions, and
    three only where a plan multiplies by all at once."""
    linears = tuple(nn.Linear(16, 16) for _ in range(3))
    parts_of = {"qkv": linears, "position": nn.Embedding(300, 16), "norm": nn.LayerNorm(16), "rotary": pyembed.Rotary(4, 300)}
    module = EmbeddingQKV.from_modules(nn.Embedding(11, 16), **parts_of, num_heads=4).to(DEVICE)
    few, many = torch.randint(11, (1, 5), device=DEVICE), torch.randint(11, (2, 200), device=DEVICE)
    with pyembed.plan("one_pass"):
        packed = module(few, torch.arange(2, 7, device=DEVICE))
    copied, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, *a: copied.append(tensors[0].shape) or cat(tensors, *a))
    torch.testing.assert_close(tuple(module(few, torch.arange(2, 7, device=DEVICE))), tuple(packed))
    assert (16, 16) not in copied and "do not pay for packing" in module.explain(few).reason
    module(many)
    assert (16, 16) not in copied and "packing" not in module.explain(many).reason
    with pyembed.plan("distinct"):
        module(many)
    assert (16, 16) in copied
    for wrong, error in (
        (torch.tensor([[11]]), IndexError),
        (torch.zeros(1, 1), TypeError),
        (torch.zeros(1, 301).long(), IndexError),
    ):
        with pytest.raises(error, match="ids: "):
            module(wrong.to(DEVICE))


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def hooked(module):
    module.register_forward_hook(lambda module, inputs, output: 2 * output)
    return module


@pytest.mark.parametrize(
    "parts, why",
    [
        ({"token": nn.Embedding(11, 16, max_norm=1.0)}, "max_norm"),
        ({"token": nn.Embedding(11, 16, scale_grad_by_freq=True)}, "scale_grad_by_freq"),
        ({"token": nn.Embedding(11, 16, sparse=True)}, "sparse"),
        ({"token": Scaled(11, 16)}, "token, a Scaled, has a forward of its own"),
        ({"position": Scaled(9, 16)}, "position, a Scaled, has a forward of its own"),
        ({"norm": nn.Identity()}, "norm, a Identity, has a forward of its own"),
        ({"qkv": Shifted(16, 48)}, "qkv, a Shifted, has a forward of its own"),
        ({"qkv": hooked(nn.Linear(16, 48))}, "qkv has hooks"),
        ({"qkv": [nn.Linear(16, 16), hooked(nn.Linear(16, 16)), Shifted(16, 16)]}, "qkv has hooks"),
    ],
    ids=lambda v: v.split()[-1] if isinstance(v, str) else "",
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_modules_that_do_more_are_called(parts, why, backend):
    """What a module does besides its class in PyTorch is not lost, and explain says that no kernel ran."""
    given = {"token": nn.Embedding(11, 16), "position": nn.Embedding(9, 16), "norm": nn.LayerNorm(16), "qkv": nn.Linear(16, 48)}
    given = {name: copy.deepcopy(part) for name, part in (given | parts).items()}
    module = EmbeddingQKV.from_modules(**given, num_heads=4).to(DEVICE)
    twin = copy.deepcopy(module)
    ids = torch.tensor([[1, 2, 2, 3]], device=DEVICE)
    hidden = twin.token(ids) + twin.position(torch.arange(4, device=DEVICE))
    normed = twin.norm(hidden)
    if isinstance(twin.qkv, nn.ModuleList):
        heads = [linear(normed).unflatten(-1, (4, 4)) for linear in twin.qkv]
    else:
        heads = twin.qkv(normed).unflatten(-1, (12, 4)).split(4, -2)
    with pyembed.backend(backend):
        assert why in module.explain(ids).reason
        out = module(ids)
    for ours, theirs in zip(out, (hidden, *heads), strict=True):
        assert torch.equal(ours, theirs)
    out.query.square().sum().backward()
    heads[0].square().sum().backward()
    for (name, ours), theirs in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    with torch.no_grad(), pytest.raises(RuntimeError, match="plan: 'table' cannot run here"), pyembed.plan("table"):
        module(ids)


def test_rms_norm_without_affine_part():
    module = EmbeddingQKV.from_modules(
        nn.Embedding(11, 16), norm=nn.RMSNorm(16, elementwise_affine=False), qkv=nn.Linear(16, 48), num_heads=4
    )
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(tuple(module(ids)), stock(module, ids))


@pytest.mark.parametrize("ids", [[1, 2], None])
def test_ids_that_are_no_tensor(ids):
    with pytest.raises(TypeError, match=f"ids: expected a Tensor, got {type(ids).__name__}"):
        EmbeddingQKV(11, 16, 4)(ids)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dropout(backend):
    """In training hidden is dropped, and what is projected is what is returned; in evaluation nothing is."""
    module = EmbeddingQKV(11, 64, 4, dropout=0.5).to(DEVICE)
    ids = torch.randint(11, (4, 50), device=DEVICE)
    with pyembed.backend(backend):
        out = module(ids)
        kept = (out.hidden != 0).float().mean()
        assert 0.45 < kept < 0.55
        query = module.qkv(module.norm(out.hidden))[..., :64].unflatten(-1, (4, 16))
        torch.testing.assert_close(out.query, query)
        module.eval()
        torch.testing.assert_close(tuple(module(ids)), stock(module, ids))
        embedding = TokenPositionEmbedding(11, 64, 50, dropout=0.5).to(DEVICE)
        assert 0.45 < (embedding(ids) != 0).float().mean() < 0.55


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_outside_of_its_models_tree(backend):
    """A front end in a list does not hear of train(), eval() and to(); its token table does."""
    token, qkv = torch.nn.Embedding(11, 16), torch.nn.Linear(16, 48)
    model = torch.nn.ModuleList([token, qkv])
    front = EmbeddingQKV.from_modules(token, qkv=qkv, num_heads=2, dropout=0.5, rotary=pyembed.Rotary(8, 32))
    ids = torch.randint(11, (4, 9))
    with pyembed.backend(backend):
        assert (front(ids).hidden == 0).any()
        model.eval()
        assert not (front(ids).hidden == 0).any()
        model.train()
        assert (front(ids).hidden == 0).any()
    model.to("meta")
    assert front(ids.to("meta")).query.shape == (4, 9, 2, 8) and front.rotary.cos.is_meta


def test_positions_of_nothing():
    """position_ids without positions, below and above the size at which three projections are packed."""
    three = tuple(torch.nn.Linear(16, 16) for _ in range(3))
    front = EmbeddingQKV.from_modules(torch.nn.Embedding(11, 16), qkv=three, num_heads=2)
    for length in (8, 300):
        with pytest.raises(ValueError, match="position_ids: expected None where there is no table of positions"):
            front(torch.zeros(1, length, dtype=torch.long), torch.arange(length))


def test_copies_and_pickles():
    module = EmbeddingQKV(11, 16, 4, position="sinusoidal")
    ids = torch.randint(11, (2, 5))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(ids), module(ids))
    meta = EmbeddingQKV(11, 16, 4, device="meta")
    assert meta.token.weight.is_meta and meta(torch.zeros(2, 5, dtype=torch.long, device="meta")).query.shape == (2, 5, 4, 4)
    assert EmbeddingQKV(11, 16, 4, dtype=torch.float64)(ids).key.dtype == torch.float64


@pytest.mark.parametrize("steps", [10, full(20)])
def test_training_follows_stock_modules(steps):
    """Steps of SGD by the kernels and by stock modules end with the same weights."""
    torch.manual_seed(0)
    ours = EmbeddingQKV(13, 16, 2, max_length=8).to(DEVICE)
    theirs = copy.deepcopy(ours)
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(13, (4, 8), generator=g).to(DEVICE)
        target = torch.randn(4, 8, 2, 8, generator=g).to(DEVICE)
        for module in (ours, theirs):
            with pyembed.backend("triton"):
                out = module(ids) if module is ours else stock(module, ids)
            loss = sum((o.reshape(target.shape) - target).square().mean() for o in out)
            module.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.3 * parameter.grad
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("combine", ["sum", "concat"])
@pytest.mark.parametrize("position_ids", [None, [3, 1, 0], [[3, 1, 0]], [[0, 1, 2], [4, 4, 4]]])
def test_combine_and_scale(backend, scale, combine, position_ids):
    module = TokenPositionEmbedding(11, 16, 5, combine=combine, scale=scale, position="sinusoidal:marian").to(DEVICE)
    ids = torch.randint(11, (2, 3), device=DEVICE)
    position_ids = None if position_ids is None else torch.tensor(position_ids, device=DEVICE)
    with pyembed.backend(backend):
        found = module(ids, position_ids)
    rows = module.token.weight[ids] * (scale or 1.0)
    places = module.position.weight[torch.arange(3, device=DEVICE) if position_ids is None else position_ids].expand_as(rows)
    assert torch.equal(found, rows + places if combine == "sum" else torch.cat([rows, places], -1))
    found.sum().backward()
    assert module.token.weight.grad.sum().item() == 6 * 16 * (scale or 1.0)
    with pytest.raises(IndexError, match=r"ids: expected values in \[0, 11\)"):
        module(ids + 11)


def test_combine_refuses():
    with pytest.raises(ValueError, match=r"combine: expected one of \('sum', 'concat'\), got 'add'"):
        TokenPositionEmbedding(11, 16, 5, combine="add")
    with pytest.raises(ValueError, match="combine: expected 'sum' where there are no positions"):
        TokenPositionEmbedding(11, 16, 5, combine="concat", position=None)
    assert "combine='concat', scale=4.0" in repr(TokenPositionEmbedding(11, 16, 5, combine="concat", scale=4.0))
    scalar = TokenPositionEmbedding(11, 16, 5, combine="concat")(torch.tensor(3))
    assert scalar.shape == (32,)


def fronts_of_positions():
    """Whose rows PyTorch's operators would find for a negative position too."""
    three, token = tuple(nn.Linear(4, 4) for _ in range(3)), nn.Embedding(3, 4)
    sines, turns = {"position": "sinusoidal", "max_length": None}, {"position": "rotary", "max_length": 8}
    return {
        "sines": pyembed.EmbeddingQKV(3, 4, 1, **sines),
        "sines beside": pyembed.EmbeddingQKV(3, 4, 1, **sines, combine="concat"),
        "sines, three projections": pyembed.EmbeddingQKV.from_modules(
            token, pyembed.positions.Sinusoidal(None, 4), qkv=three, num_heads=1
        ),
        "turns": pyembed.EmbeddingQKV(3, 4, 1, **turns),
        "turns, three projections": pyembed.EmbeddingQKV.from_modules(
            token, qkv=three, num_heads=1, rotary=pyembed.Rotary(4, 8)
        ),
        "offset": pyembed.EmbeddingQKV(3, 4, 1, max_length=5, position_offset=2),
        "offset beside": pyembed.EmbeddingQKV(3, 4, 1, max_length=5, position_offset=2, combine="concat"),
    }


@pytest.mark.parametrize("plan", ["auto", "one_pass"])
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("kind", fronts_of_positions())
def test_a_negative_position_has_no_row(kind, backend, plan):
    front, ids = fronts_of_positions()[kind], torch.tensor([[0, 1]])
    with pyembed.backend(backend), pyembed.plan(plan):
        front(ids, torch.tensor([0, 1]))
        with pytest.raises(IndexError, match=r"position_ids: expected values in .* got -1 at \(1,\)"):
            front(ids, torch.tensor([0, -1]))
