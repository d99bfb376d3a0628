"""What a front end takes a module for: proved by value, else the module is called as it is, or refused by name."""

import copy

import pytest
import torch
from conftest import DEVICE, DTYPES, full
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import pyembed
from pyembed import EmbeddingQKV
from pyembed.modules import proofs, trials

BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
IDS = torch.tensor([[1, 5, 5, 2], [0, 3, 8, 1]], device=DEVICE)
OWN = "has a forward of its own"


def front_of(token=None, norm=None, qkv=None, D=16, **options):
    token = nn.Embedding(9, D) if token is None else token
    qkv = nn.Linear(D, 3 * D) if qkv is None else qkv
    return EmbeddingQKV.from_modules(token, norm=norm, qkv=qkv, num_heads=4, **options).to(DEVICE)


def called(front, ids=IDS):
    """hidden, query, key and value by calling the modules one after the other."""
    hidden = front.token(ids)
    normed = hidden if front.norm is None else front.norm(hidden)
    qkv = front.qkv if isinstance(front.qkv, nn.ModuleList) else [front.qkv]
    projected = torch.cat([part(normed) for part in qkv], -1)
    return hidden, *projected.unflatten(-1, (12, -1)).split(4, -2)


def hold(front, backend="torch", ids=IDS, **tolerance):
    """The same values and gradients as the modules give, and again, when the call is remembered."""
    for _ in range(2):
        with pyembed.backend(backend):
            found = front(ids)
        expected, parameters = called(front, ids), [p for p in front.parameters() if p.requires_grad]
        grads = []
        for out in (found, expected):
            torch.manual_seed(1)
            loss = sum((x.float() * torch.randn(x.shape, device=x.device)).sum() for x in out)
            grads.append(torch.autograd.grad(loss, parameters, allow_unused=True))
        torch.testing.assert_close((*found, *grads[0]), (*expected, *grads[1]), **tolerance)


# Norms whose eps PyTorch chooses


@BACKENDS
@pytest.mark.parametrize("plan", ["one_pass", "distinct", "table"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [False, True])
def test_rms_norm_that_chooses_its_eps(heads, dtype, plan, backend):
    """PyTorch takes the eps of float32 for 16-bit rows. Rows are small, so that eps is most of what they are divided by."""
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter has no bfloat16 arithmetic")
    names = ("query_norm", "key_norm") if heads else ()
    front = front_of(norm=nn.RMSNorm(16), **{name: nn.RMSNorm(4) for name in names}).to(dtype)
    with torch.no_grad():
        front.token.weight.mul_(1e-3)
        front.qkv.weight.mul_(1e-2)
        front.qkv.bias.zero_()
    exact = copy.deepcopy(front).double()
    for name in ("norm", *names):
        getattr(exact, name).eps = torch.finfo(torch.float32).eps
    _, query, key, value = called(exact)
    expected = (exact.query_norm(query), exact.key_norm(key), value) if heads else (query, key, value)
    with pyembed.backend(backend), pyembed.plan(plan), torch.no_grad():
        found = front(IDS)
    for ours, theirs in zip(found[1:], expected, strict=True):
        assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 12 * torch.finfo(dtype).eps


# Norms that are known by what they compute


class Variance(nn.Module):
    """As Llama's and Liger's: a name and an attribute that are told apart by nothing but the forward."""

    def __init__(self, D, offset=0.0, eps=1e-3):
        super().__init__()
        self.weight, self.variance_epsilon, self.offset = nn.Parameter(torch.randn(D) / 4), eps, offset

    def forward(self, x):
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() + self.offset) * (x.float() * rstd).to(x.dtype)


class LlamaRMSNorm(Variance):
    pass


class CappedRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x).clamp(-0.5, 0.5)


class BareRMSNorm(nn.Module):
    variance_epsilon = 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class LayerNorm(nn.Module):
    """Of nanoGPT and LLMs-from-scratch: names and eps of its own."""

    def __init__(self, D):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.scale * centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) + self.shift


class Unbiased(LayerNorm):
    def forward(self, x):
        return self.scale * (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5) + self.shift


class Detached(LayerNorm):
    """The same values, another gradient."""

    def forward(self, x):
        return super().forward(x.detach()) + (x - x.detach()).sum() * 0


class TrainsOtherwise(LayerNorm):
    def forward(self, x):
        return super().forward(x) * (0.9 if self.training else 1.0)


class Lower(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) - 1


@BACKENDS
@pytest.mark.parametrize(
    "norm, is_known",
    [
        (LlamaRMSNorm(16), True),
        (LlamaRMSNorm(16, offset=1.0), True),  # a fresh Gemma by Liger: its weight alone would make query zero
        (LlamaRMSNorm(16, offset=0.5), False),
        (CappedRMSNorm(16), False),
        (BareRMSNorm(), True),
        (LayerNorm(16), True),
        (Unbiased(16), False),
        (Detached(16), False),
        (TrainsOtherwise(16), False),
        (nn.Dropout(0.0), False),
        (Lower(16), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_norms_are_known_by_what_they_compute(norm, is_known, backend):
    front = front_of(norm=copy.deepcopy(norm))
    assert (OWN not in front.explain(IDS).reason) == is_known
    hold(front, backend)


class AbsRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight.abs() * x * rstd


class FloorRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + max(self.variance_epsilon, 1e-6))
        return self.weight * x * rstd


class CappedLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-50, 50)


class RankRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) * (1 if x.dim() == 3 else 2)


class NoGradRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) * (1 if torch.is_grad_enabled() else 2)


class CountingRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class GainRMSNorm(LlamaRMSNorm):
    def __init__(self, D):
        super().__init__(D)
        self.gain = torch.ones(D, device=DEVICE)

    def forward(self, x):
        return super().forward(x) * self.gain


class CappedRows(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids).clamp(-50, 50)


class DropsWords(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * (0.5 if self.training else 1.0)


class OwnId(nn.Embedding):
    """−100 has a row of zeros."""

    def forward(self, ids):
        return super().forward(ids.masked_fill(ids == -100, 0)).masked_fill((ids == -100).unsqueeze(-1), 0)


@pytest.mark.parametrize("kind", [AbsRMSNorm, FloorRMSNorm, RankRMSNorm, NoGradRMSNorm, CountingRMSNorm, GainRMSNorm])
def test_norms_that_do_less_than_the_formula_somewhere(kind):
    """Of magnitudes, ranks and modes that few trials reach, or with effects of their own."""
    front = front_of(norm=kind(16))
    assert f"norm, a {kind.__name__}, {OWN}" in front.explain(IDS).reason
    hold(front)


@pytest.mark.parametrize("kind", [CappedRows, DropsWords, OwnId])
@pytest.mark.parametrize("name", ["token", "position"])
def test_tables_that_do_less_than_a_lookup_somewhere(kind, name):
    front = front_of(**{name: kind(9, 16)})
    assert f"{name}, a {kind.__name__}, {OWN}" in front.explain(IDS).reason
    rows = front.token(IDS)
    rows = rows if name == "token" else rows + front.position(torch.arange(4, device=DEVICE))
    assert torch.equal(front(IDS).hidden, rows)


def test_a_linear_map_that_is_capped():
    front = front_of(qkv=CappedLinear(16, 48))
    assert f"qkv, a CappedLinear, {OWN}" in front.explain(IDS).reason
    hold(front)


def test_linear_maps_without_a_bias_attribute():
    class Map(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(48, 16))

        def forward(self, x):
            return x @ self.weight.t()

    front = front_of(qkv=Map())
    assert OWN not in front.explain(IDS).reason
    hold(front, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["product and sum", "float32"])
def test_linear_maps_under_autocast(kind):
    """Their dtype there is their own."""

    class Map(nn.Linear):
        def forward(self, x):
            if kind == "float32":
                with torch.autocast(DEVICE, enabled=False):
                    return super().forward(x.float())
            return x @ self.weight.t() + self.bias

    front = front_of(norm=nn.LayerNorm(16), qkv=Map(16, 48))
    assert OWN not in front.explain(IDS).reason
    with torch.autocast(DEVICE, torch.bfloat16):
        assert "another dtype under autocast" in front.explain(IDS).reason
        found, expected = front(IDS), called(front)
    assert found.query.dtype == expected[1].dtype == torch.float32
    torch.testing.assert_close(tuple(found), expected)


def test_helpers_and_values_of_the_class(monkeypatch):
    """What a forward uses of its class is part of the proof; a module that always changes is called in the end."""

    class Norm(LlamaRMSNorm):
        eps = 1e-6

        def scaled(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

        def forward(self, x):
            return self.weight * self.scaled(x)

    front = front_of(norm=Norm(16))
    assert OWN not in front.explain(IDS).reason
    hold(front)
    for name, value in (("scaled", lambda self, x: 2 * x), ("eps", 0.5)):
        with monkeypatch.context() as patch:
            patch.setattr(Norm, name, value)
            hold(front)
        hold(front)
    for step in range(20):
        front.norm.step = step
        front(IDS)
    assert OWN in front.explain(IDS).reason
    hold(front)


def test_hooks_of_all_modules_run():
    front, plain = front_of(norm=nn.LayerNorm(16)), pyembed.TokenPositionEmbedding(9, 16, 8).to(DEVICE)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: 3 * out if isinstance(module, nn.Embedding) else None
    )
    try:
        hold(front)
        assert "global module hooks" in front.explain(IDS).reason
        found, rows = plain(IDS), plain.token(IDS) + plain.position(torch.arange(4, device=DEVICE))
    finally:
        handle.remove()
    assert torch.equal(found, rows)


def test_a_forward_patched_after_a_graph_was_made():
    for norm in (LlamaRMSNorm(16), nn.RMSNorm(16)):
        front = front_of(norm=norm)
        compiled = torch.compile(front, backend="aot_eager")
        torch.testing.assert_close(tuple(compiled(IDS)), called(front))
        norm.forward = lambda x: 3 * x
        torch.testing.assert_close(tuple(compiled(IDS)), called(front))


def test_a_first_call_within_a_trace():
    front = front_of(GemmaScaledWordEmbedding(9, 16, 55.4)).requires_grad_(False)
    front._known.proofs.clear()
    with torch.no_grad():
        traced = torch.jit.trace(lambda ids: front(ids).hidden, (IDS,), check_trace=False)
        assert torch.equal(traced(IDS), front.token(IDS))


@pytest.mark.parametrize("name", ["token", "position", "segment"])
@pytest.mark.parametrize("kind", ["hook", "patched", "max_norm", "adapter"])
def test_token_position_embedding_calls_what_does_more(kind, name):
    module = pyembed.TokenPositionEmbedding(9, 16, 8, num_segments=2).to(DEVICE)
    part = getattr(module, name)
    if kind == "hook":
        part.register_forward_hook(lambda module, args, out: 2 * out)
    elif kind == "patched":
        part.forward = lambda ids: 2 * type(part).forward(part, ids)
    elif kind == "max_norm":
        part.max_norm = 0.5
    else:
        setattr(module, name, Adapter(part).to(DEVICE))
    places, segments = torch.arange(4, device=DEVICE), torch.ones_like(IDS)
    for _ in range(2):
        found = module(IDS, segment_ids=segments)
        assert torch.equal(found, module.token(IDS) + module.segment(segments) + module.position(places))


def test_what_changes_after_the_proof_is_seen(monkeypatch):
    """Attributes, a forward patched on the instance or on the class, of a known class and of PyTorch's own."""
    front = front_of(norm=LlamaRMSNorm(16))
    hold(front)
    front.norm.variance_epsilon = 1.0
    hold(front)
    front.norm.offset = 1.0
    hold(front)
    assert OWN not in front.explain(IDS).reason
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: x * self.weight, raising=False)
    hold(front)
    assert OWN in front.explain(IDS).reason
    monkeypatch.undo()
    hold(front)
    assert OWN not in front.explain(IDS).reason
    for part in ("norm", "token", "qkv"):
        front = front_of(norm=nn.LayerNorm(16))
        hold(front)
        kind, forward = type(getattr(front, part)), type(getattr(front, part)).forward
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", lambda self, x, forward=forward: 2 * forward(self, x))
            hold(front)
            assert f"{part}, a {kind.__name__}, {OWN}" in front.explain(IDS).reason
        hold(front)
        module = getattr(front, part)
        module.forward = lambda x, module=module: 3 * type(module).forward(module, x)
        hold(front)


class Draws(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x + 0 * torch.rand_like(x))


def test_proofs_leave_the_module_and_the_generator_alone():
    norm = LlamaRMSNorm(16)
    norm.register_forward_hook(lambda *args: pytest.fail("a hook ran"))
    state, before = torch.get_rng_state(), copy.deepcopy(norm.state_dict())
    finding = proofs.prove(trials.norm, norm).finding
    assert finding == ("rms", "weight", None, False, "variance_epsilon") and norm.weight.grad is None
    assert torch.equal(norm.weight, before["weight"]) and torch.equal(torch.get_rng_state(), state)
    draws = Draws(16)
    state = torch.get_rng_state()
    assert proofs.prove(trials.norm, draws).finding is not None and torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        assert proofs.prove(trials.norm, LlamaRMSNorm(16)).finding == finding


def test_a_table_follows_what_a_proof_found(monkeypatch):
    front = front_of(norm=LayerNorm(16))
    with pyembed.plan("table"), torch.no_grad():
        for change in (lambda: None, lambda: front.norm.shift.add_(1), lambda: front.norm.scale.mul_(2)):
            change()
            torch.testing.assert_close(tuple(front(IDS)), called(front))
    with torch.no_grad(), pyembed.plan("auto"):
        front.build_table()
        others = [lambda self, x: x, lambda self, x: (1 + self.scale) * nn.functional.layer_norm(x, (16,)) + self.shift]
        for other in others:  # called; known as another formula of the same weights
            with monkeypatch.context() as patch:
                patch.setattr(LayerNorm, "forward", other)
                torch.testing.assert_close(tuple(front(IDS)), called(front))


# Token embeddings that multiply their rows


class GemmaScaledWordEmbedding(nn.Embedding):
    """As Gemma's, whose number is a tensor that is rounded to the rows' dtype."""

    def __init__(self, V, D, scale):
        super().__init__(V, D)
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scales_are_those_of_the_call(dtype):
    front = front_of(GemmaScaledWordEmbedding(9, 16, 55.4256258)).to(dtype)
    changes = [lambda: None, lambda: front.token.embed_scale.fill_(3.3007), lambda: front.token.embed_scale.data.fill_(2.7)]
    changes.append(lambda: setattr(front.token, "embed_scale", torch.tensor(1.2345, device=DEVICE)))
    for change in changes:
        change()
        assert OWN not in front.explain(IDS).reason
        assert torch.equal(front(IDS).hidden, front.token(IDS))


def test_scales_of_modules_without_memory_and_of_graphs():
    with torch.device("meta"):
        front = EmbeddingQKV.from_modules(GemmaScaledWordEmbedding(9, 16, 55.4), qkv=nn.Linear(16, 48), num_heads=4)
    front = front.to_empty(device=DEVICE)
    with torch.no_grad():
        for tensor in (*front.parameters(), front.token.embed_scale):
            tensor.normal_()
    assert torch.equal(front(IDS).hidden, front.token(IDS))
    compiled = torch.compile(front, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS).hidden, front.token(IDS))
    front.token.embed_scale.fill_(2.0)
    assert torch.equal(compiled(IDS).hidden, front.token(IDS))
    front.token.embed_scale = torch.tensor(5.0, device=DEVICE)
    assert torch.equal(compiled(IDS).hidden, front.token(IDS))


class Wider(nn.Embedding):
    """Ids beyond the table, and below it, have a meaning of their own: a decoupled vocabulary, placeholders of images."""

    def __init__(self, V, D):
        super().__init__(V, D)
        self.more = nn.Parameter(torch.randn(3, D))

    def forward(self, ids):
        beyond = (ids < 0) | (ids >= self.num_embeddings)
        rows = super().forward(ids.masked_fill(beyond, 0))
        return torch.where(beyond.unsqueeze(-1), self.more[ids % 3], rows)


@pytest.mark.parametrize("policy", ["raise", "clamp", "zero", "trust"])
@pytest.mark.parametrize("rotary", [False, True])
def test_an_embedding_alone_knows_which_ids_it_takes(rotary, policy):
    front = front_of(Wider(9, 16), rotary=pyembed.Rotary(4, 8) if rotary else None)
    ids = torch.tensor([[1, 12, -1]], device=DEVICE)
    with pyembed.id_policy(policy):
        for _ in range(2):
            assert torch.equal(front(ids).hidden, front.token(ids))
        assert "token, a Wider, has a forward of its own" in front.explain(ids).reason


# Modules of positions


class Shapes(nn.Embedding):
    """As Whisper's without position_ids: what it is given has the length that it wants."""

    def forward(self, ids, past=0):
        return self.weight[past : past + ids.shape[-1]]


class Later(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 2)


class Doubled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


@BACKENDS
@pytest.mark.parametrize("position, offset", [(Later(12, 16), 2), (Doubled(12, 16), 0)], ids=["later", "doubled"])
def test_positions_of_ones_own(position, offset, backend):
    """Each is what the module gives: Later's rows are read, unless it has hooks; Doubled's forward is called."""
    front = front_of(position=copy.deepcopy(position))
    places = torch.tensor([[3, 1, 0, 7], [9, 9, 2, 4]], device=DEVICE)
    assert front.position_offset == offset
    for position_ids in (None, places, places[0], places):
        wanted = front.token(IDS) + front.position(torch.arange(4, device=DEVICE) if position_ids is None else position_ids)
        with pyembed.backend(backend):
            assert torch.equal(front(IDS, position_ids).hidden, wanted)
        if position_ids is not None and position_ids.dim() == 1:
            front.position.register_forward_hook(lambda module, args, out: 3 * out)


def test_modules_that_take_no_positions_are_refused(monkeypatch):
    with pytest.raises(TypeError, match="position: expected a module whose forward looks up rows by position, got a Shapes"):
        front_of(position=Shapes(12, 16))
    front = front_of(position=Later(12, 16))
    monkeypatch.setattr(Later, "forward", Shapes.forward)
    with pytest.raises(TypeError, match="got a Later"):
        front(IDS)


@BACKENDS
def test_position_offset(backend):
    """RoBERTa's: positions begin behind the padding row."""
    position = nn.Embedding(12, 16, padding_idx=1)
    front = front_of(position=position, position_offset=2, norm=nn.LayerNorm(16))
    hidden = front.token(IDS) + position(torch.arange(2, 6, device=DEVICE))
    with pyembed.backend(backend):
        found = front(IDS)
    assert torch.equal(found.hidden, hidden) and OWN not in front.explain(IDS).reason
    assert "padding_idx" not in front.explain(IDS).reason
    torch.testing.assert_close(found.query.flatten(-2), front.qkv(front.norm(hidden))[..., :16])
    for wrong, error in (("2", ValueError), (-1, ValueError)):
        with pytest.raises(error, match="position_offset: expected an int of at least 0"):
            front_of(position=position, position_offset=wrong)
    with pytest.raises(ValueError, match="position_offset: expected 2, that of position's own forward"):
        front_of(position=Later(12, 16), position_offset=1)
    with pytest.raises(ValueError, match="position_offset: expected 0 or None where there is no table"):
        front_of(position_offset=1)


# Modules around modules, and weights that are no plain tensors


class Adapter(nn.Module):
    """LoRA (Hu et al. 2021) around an embedding or a linear map."""

    def __init__(self, base):
        super().__init__()
        self.base, rows, columns = base, *base.weight.shape
        self.a, self.b = nn.Parameter(torch.randn(2, columns)), nn.Parameter(torch.randn(rows, 2))
        if isinstance(base, nn.Linear):
            self.in_features, self.out_features = columns, rows

    def forward(self, x):
        if isinstance(self.base, nn.Linear):
            return self.base(x) + x @ self.a.t() @ self.b.t()
        return self.base(x) + nn.functional.embedding(x, self.b) @ self.a


@BACKENDS
@pytest.mark.parametrize("part", ["token", "qkv", "one of three"])
def test_adapters_are_called(part, backend):
    token, linears = nn.Embedding(9, 16), [nn.Linear(16, 16) for _ in range(3)]
    if part == "token":
        front = front_of(Adapter(token), norm=nn.LayerNorm(16))
    elif part == "qkv":
        front = front_of(token, norm=nn.LayerNorm(16), qkv=Adapter(nn.Linear(16, 48)))
    else:
        front = front_of(token, norm=nn.LayerNorm(16), qkv=(linears[0], Adapter(linears[1]), linears[2]))
    assert f"an? Adapter, {OWN}".replace("an? ", "a ") in front.explain(IDS).reason
    hold(front, backend)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.norm = nn.Embedding(9, 16), nn.LayerNorm(16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))


@pytest.mark.parametrize(
    "kind, options",
    [
        ("LoraConfig", {"target_modules": ["q", "v", "token"], "init_lora_weights": False}),
        ("TrainableTokensConfig", {"token_indices": [1, 3], "target_modules": ["token"], "init_weights": False}),
        full("LoraConfig", {"target_modules": ["q"], "use_dora": True, "init_lora_weights": False, "modules_to_save": ["k"]}),
        full("IA3Config", {"target_modules": ["k", "v"], "feedforward_modules": [], "init_ia3_weights": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_peft(kind, options):
    """Adapters that were injected before."""
    peft = pytest.importorskip("peft")
    model = peft.inject_adapter_in_model(getattr(peft, kind)(**options), Model().to(DEVICE))
    front = front_of(model.token, norm=model.norm, qkv=(model.q, model.k, model.v))
    assert OWN in front.explain(IDS).reason
    hold(front)


class Packed(nn.Module):
    """As bitsandbytes' Linear4bit: its weight has another shape than the map."""

    in_features, out_features, bias = 16, 48, None

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randint(0, 255, (384, 1), dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.float() / 255 - 0.5).view(16, 24).repeat(1, 2).to(x.device)


@pytest.mark.parametrize("kind", ["packed", "wrapper"])
@pytest.mark.parametrize("plan", ["auto", "one_pass", "distinct"])
def test_quantised_weights_are_called_by_their_module(kind, plan):
    token = nn.Embedding(9, 16)
    if kind == "packed":
        front, why = front_of(token, norm=nn.LayerNorm(16), qkv=Packed()), "qkv, a Packed, has a forward of its own"
    else:
        linears = [nn.Linear(16, 16, bias=False) for _ in range(3)]
        for linear in linears:
            linear.weight = nn.Parameter(TwoTensor(linear.weight.detach(), linear.weight.detach() / 2), requires_grad=False)
        front, why = front_of(token, norm=nn.LayerNorm(16), qkv=tuple(linears)), "qkv's weight is a TwoTensor"
    ids = IDS.repeat(40, 8)  # enough for other plans
    with pyembed.plan(plan), torch.no_grad():
        assert why in front.explain(ids).reason
        for _ in range(2):
            for ours, theirs in zip(front(ids), called(front, ids), strict=True):
                torch.testing.assert_close(getattr(ours, "a", ours), getattr(theirs, "a", theirs))


def test_a_wrapper_weight_as_an_argument():
    """functional: PyTorch's operators run, whatever the plan would be."""
    token, weight = torch.randn(500, 64), torch.randn(192, 64)
    wrapped, ids = TwoTensor(weight, weight), torch.randint(500, (8, 512))
    found = pyembed.functional.embed_qkv(ids, token, wrapped, num_heads=4, norm="layer")
    torch.testing.assert_close(found.query.a.flatten(-2), nn.functional.layer_norm(token[ids], (64,)) @ weight[:64].t())
    with pyembed.plan("distinct"), pytest.raises(RuntimeError, match="'distinct' cannot run here: a TwoTensor brings"):
        pyembed.functional.embed_qkv(ids, token, wrapped, num_heads=4, norm="layer")


def test_weights_that_a_hook_brings():
    """accelerate's offloading: weights are on meta until the forward that it puts in place brings them."""
    accelerate = pytest.importorskip("accelerate")
    token, norm, qkv = nn.Embedding(9, 16), nn.LayerNorm(16), nn.Linear(16, 48)
    model = nn.ModuleDict({"token": token, "norm": norm, "qkv": qkv})
    expected = called(front_of(token, norm, qkv))
    accelerate.cpu_offload(model, execution_device=torch.device(DEVICE))
    assert token.weight.is_meta
    front = EmbeddingQKV.from_modules(token, norm=norm, qkv=qkv, num_heads=4, rotary=pyembed.Rotary(4, 8, device=DEVICE))
    assert "has a patched forward" in front.explain(IDS).reason
    with torch.no_grad():
        for _ in range(2):
            found = front(IDS)
            torch.testing.assert_close((found.hidden, found.value), (expected[0], expected[3]))


# Norms of all heads, and modules between the sum and the norm


@BACKENDS
@pytest.mark.parametrize("plan", ["one_pass", "distinct", "table"])
@pytest.mark.parametrize("kind", ["over all heads", "layer", "called"])
def test_norms_of_heads_that_the_kernels_lack(kind, plan, backend):
    """They are called after the projection, which is fused as ever."""
    norms = {"over all heads": lambda: nn.RMSNorm(16), "layer": lambda: nn.LayerNorm(4), "called": lambda: CappedRMSNorm(4)}
    query_norm, key_norm = norms[kind](), norms[kind]()
    rotary = pyembed.Rotary(4, 8)
    front = front_of(norm=nn.LayerNorm(16), query_norm=query_norm, key_norm=key_norm, rotary=rotary)
    hidden, query, key, value = called(front)
    if kind == "over all heads":
        query, key = (norm(x.flatten(-2)).view(x.shape) for norm, x in ((query_norm, query), (key_norm, key)))
    else:
        query, key = query_norm(query), key_norm(key)
    query, key = (
        pyembed.reference.rotate(x, pyembed.call.Epilogue(cos=rotary.cos[:4], sin=rotary.sin[:4])) for x in (query, key)
    )
    with pyembed.backend(backend), pyembed.plan(plan), torch.set_grad_enabled(plan != "table"):
        assert OWN not in front.explain(IDS).reason
        for _ in range(2):
            torch.testing.assert_close(tuple(front(IDS)), (hidden, query, key, value))
    if plan != "table":
        grads = [torch.autograd.grad(q.square().sum(), query_norm.weight)[0] for q in (front(IDS).query, query)]
        torch.testing.assert_close(*grads)


@BACKENDS
def test_modules_between_the_sum_and_the_norm(backend):
    """Bloom's norm behind the embedding, ELECTRA's projection: called, and what follows is fused."""
    for between in (nn.LayerNorm(16), nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24))):
        width = 24 if isinstance(between, nn.Sequential) else 16
        front = front_of(
            norm=nn.LayerNorm(width), qkv=nn.Linear(width, 48), embedding_transform=between, position=nn.Embedding(8, 16)
        )
        hidden = between(front.token(IDS) + front.position(torch.arange(4, device=DEVICE)))
        expected = hidden, *front.qkv(front.norm(hidden)).unflatten(-1, (12, 4)).split(4, -2)
        with pyembed.backend(backend):
            found = front(IDS)
        torch.testing.assert_close(tuple(found), expected)
        parameters = [p for p in front.parameters() if p.requires_grad]
        grads = [torch.autograd.grad(sum(x.sin().sum() for x in out), parameters) for out in (found, expected)]
        torch.testing.assert_close(*grads)
        assert "embedding_transform is called" in front.explain(IDS).reason
        with pyembed.plan("table"), torch.no_grad(), pytest.raises(RuntimeError, match="embedding_transform comes between"):
            front(IDS)
    with pytest.raises(ValueError, match="qkv: expected 16 inputs, the width of token; got 24"):
        front_of(qkv=nn.Linear(24, 48))


# Dropout


def drops(front):
    return bool((front(torch.zeros(1, 64, dtype=torch.long, device=DEVICE)).hidden == 0).any())


def test_a_models_dropout_is_obeyed():
    dropout = nn.Dropout(0.5)
    front = front_of(dropout=dropout)
    assert drops(front)
    dropout.p = 0.0  # as TRL does
    assert not drops(front)
    dropout.p = 0.5
    front.token.eval()
    assert drops(front)
    dropout.eval()
    assert not drops(front)
    front.eval(), dropout.train()
    assert drops(front)
    for change in ("register_forward_hook", "register_forward_pre_hook", "forward"):
        changed = nn.Dropout(0.5).eval()
        front = front_of(norm=nn.LayerNorm(16), dropout=changed)
        if change == "forward":
            changed.forward = lambda x: 2 * x
        else:
            getattr(changed, change)(lambda *args: None)
        with pytest.raises(RuntimeError, match=r"dropout: expected an nn\.Dropout without hooks"):
            front(IDS)
    for wrong in (nn.AlphaDropout(0.5), nn.Linear(1, 1)):
        with pytest.raises(RuntimeError, match=rf"dropout: expected an nn\.Dropout .* got {type(wrong).__name__}"):
            front_of(dropout=wrong)
    with pytest.raises(TypeError, match=r"dropout: expected a number or an nn\.Dropout, got str"):
        front_of(dropout="0.5")
    assert not drops(front_of(dropout=nn.Identity()))


def test_a_dropout_of_its_own_is_switched_alone_too():
    """A number drops as token says, and as its own module was told by itself."""
    front = front_of(dropout=0.5)
    assert drops(front)
    front.dropout.eval()
    assert not drops(front)
    front.train()
    assert drops(front)
    front.token.eval()
    assert not drops(front)
    front.eval(), front.dropout.train()
    assert drops(front)
    for front in (EmbeddingQKV(9, 16, 4, dropout=0.5), pyembed.TokenPositionEmbedding(9, 16, 64, dropout=0.5)):
        front = front.to(DEVICE)
        look = lambda: (torch.as_tensor(front(torch.zeros(1, 64, dtype=torch.long, device=DEVICE))[0]) == 0).any()  # noqa: B023, E731
        assert look()
        front.dropout.eval()
        assert not look()
        front.eval(), front.dropout.train()
        assert look()


@pytest.mark.parametrize("norm", [LlamaRMSNorm(16), nn.LayerNorm(16)], ids=["proved", "stock"])
def test_graphs_hold_the_fused_operator(norm):
    """A compiler does not make known modules unknown."""
    front, names = front_of(norm=norm), []

    def backend(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with pyembed.backend("triton"), torch.no_grad():
        torch.compile(front, backend=backend, fullgraph=True)(IDS)
    assert any("embed_qkv" in name for name in names)
