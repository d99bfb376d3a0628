"""Front ends over the modules of real models, against what those models compute (transformers, where it is installed)."""

import importlib
import sys

import pytest
import torch
from conftest import DEVICE
from torch import nn

import pyembed
from pyembed import Rotary
from pyembed.call import Epilogue
from pyembed.modules.known import OwnScale
from pyembed.modules.trials import RowsFinding
from pyembed.reference import rotate
from pyembed.rotary import turns

transformers = pytest.importorskip("transformers")
EmbeddingQKV = pyembed.EmbeddingQKV
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
IDS = torch.randint(90, (2, 9), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}


def model_of(config):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").to(DEVICE).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)  # zero biases and norms of one hide mistakes
    return model


def seen_by_attention(model, attention, **call):
    """query, key and value (B, H, T, d_h) as the first layer's attention function gets them."""
    module = __import__(type(attention).__module__, fromlist=["eager_attention_forward"])
    seen, original = [], module.eager_attention_forward

    def spy(module, query, key, value, *args, **kwargs):
        seen.append((query, key, value))
        return original(module, query, key, value, *args, **kwargs)

    module.eager_attention_forward = spy
    try:
        with torch.no_grad():
            model(IDS.to(DEVICE), **call)
    finally:
        module.eager_attention_forward = original
    return seen[0]


def hold(front, expected, backend, **call):
    """In inference, where norms of heads are fused, and where gradients are wanted."""
    assert "modules themselves" not in str(front.explain(IDS.to(DEVICE)))
    for grad in (False, True):
        with pyembed.backend(backend), torch.set_grad_enabled(grad):
            found = front(IDS.to(DEVICE), **call)
        for ours, theirs in zip(found[1:], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    return found


@pytest.mark.sample
@BACKENDS
@pytest.mark.parametrize("kind", ["Qwen3Config", "Gemma3TextConfig", "LlamaConfig", "Qwen2Config", "GemmaConfig"])
def test_rotary_models(backend, kind):
    """RMSNorm with the cast before the weight and after, 1 + w, biases on a subset, norms of heads, scaled token rows."""
    model = model_of(getattr(transformers, kind)(**GROUPED))
    layer = model.layers[0]
    attention = layer.self_attn
    norms = {"query_norm": attention.q_norm, "key_norm": attention.k_norm} if hasattr(attention, "q_norm") else {}
    front = EmbeddingQKV.from_modules(
        model.embed_tokens, None, layer.input_layernorm, qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        num_heads=4, num_kv_heads=2, heads_first=True, **norms,
    )  # fmt: skip
    position_ids = torch.arange(9, device=DEVICE)[None]
    hidden = torch.zeros(2, 9, 32, device=DEVICE)
    if kind == "Gemma3TextConfig":
        rotary = model.rotary_emb(hidden, position_ids, attention.layer_type)
    else:
        rotary = model.rotary_emb(hidden, position_ids)
    expected = seen_by_attention(model, attention)
    hold(front, expected, backend, rotary=rotary)


@pytest.mark.sample
@BACKENDS
@pytest.mark.parametrize("kind", ["CohereConfig", "GlmConfig", "Ernie4_5Config", "HeliumConfig"])
def test_models_that_turn_neighbours(backend, kind):
    """Their (cos, sin) and their tables; whoever does not say how they turn is asked, since GLM's pair looks like Llama's."""
    more = {"pad_token_id": 0} if kind != "Ernie4_5Config" else {}
    model = model_of(getattr(transformers, kind)(**{**GROUPED, "head_dim": 8}, **more))
    layer, hidden, position_ids = model.layers[0], torch.zeros(2, 9, 32, device=DEVICE), torch.arange(9, device=DEVICE)[None]
    attention = layer.self_attn
    modules = {
        "token": model.embed_tokens, "norm": layer.input_layernorm, "num_heads": 4, "num_kv_heads": 2, "heads_first": True,
        "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
    }  # fmt: skip
    cos, sin = model.rotary_emb(hidden, position_ids)
    expected, front = seen_by_attention(model, attention), EmbeddingQKV.from_modules(**modules)
    own = EmbeddingQKV.from_modules(**modules, rotary=Rotary.from_module(model.rotary_emb, 9))
    told = pyembed.CosSin(cos, sin, interleaved=True)
    with pyembed.backend(backend), torch.no_grad():
        for found in (front(IDS.to(DEVICE), rotary=told), own(IDS.to(DEVICE)), own(IDS.to(DEVICE), rotary=(cos, sin))):
            for ours, theirs in zip(found[1:], expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"rotary: expected a pyembed.CosSin\(cos, sin, interleaved=…\).* got a tuple"):
        front(IDS.to(DEVICE), rotary=(cos, sin))
    with pytest.raises(ValueError, match="rotary: expected one that is told interleaved=True or False"):
        EmbeddingQKV.from_modules(**modules, rotary=Rotary(cos.shape[-1], 9))
    EmbeddingQKV.from_modules(**modules, rotary=Rotary(cos.shape[-1], 9, interleaved=False))


def scaled(kind="Llama", **rope):
    config = getattr(transformers, f"{kind}Config")
    more = {"pad_token_id": 0, "eos_token_id": 0, "original_max_position_embeddings": 64} if kind == "Phi3" else {}
    return config(**SMALL, **more, max_position_embeddings=64, rope_parameters={"rope_theta": 10_000.0, **rope})


LONG = {"factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
ROTARIES = {  # the file's model, its class's beginning, a configuration
    "llama": ("llama", "Llama", lambda: transformers.LlamaConfig(**SMALL)),
    "llama3": ("llama", "Llama", lambda: scaled(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, **LONG)),
    "linear": ("llama", "Llama", lambda: scaled(rope_type="linear", factor=4.0)),
    "yarn": ("llama", "Llama", lambda: scaled(rope_type="yarn", **LONG)),
    "dynamic": ("llama", "Llama", lambda: scaled(rope_type="dynamic", factor=4.0)),
    "longrope": ("phi3", "Phi3", lambda: scaled("Phi3", rope_type="longrope", **FACTORS, **LONG)),
    "neox": ("gpt_neox", "GPTNeoX", lambda: transformers.GPTNeoXConfig(**SMALL)),
    "cohere": ("cohere", "Cohere", lambda: transformers.CohereConfig(**SMALL)),
    "glm": ("glm", "Glm", lambda: transformers.GlmConfig(**SMALL, head_dim=16, pad_token_id=0)),
    "gptj": ("gptj", "GPTJ", lambda: transformers.GPTJConfig(n_embd=32, n_head=4, rotary_dim=4)),
    "gpt_oss": ("gpt_oss", "GptOss", lambda: transformers.GptOssConfig(**SMALL, head_dim=16)),
    "gemma3": ("gemma3", "Gemma3", lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=16)),
    "modernbert": ("modernbert", "ModernBert", lambda: transformers.ModernBertConfig(**SMALL)),
}
CHANGES = ("dynamic", "longrope")  # beyond 64 positions
TYPES = {"gemma3": "sliding_attention", "modernbert": "full_attention"}


def rotary_module(name):
    model, start, config = ROTARIES[name]
    file = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    return getattr(file, f"{start}RotaryEmbedding")(config()), {"layer_type": TYPES[name]} if name in TYPES else {}


def turned_as(module, x, rows, **more):
    """x (1, T, 1, R) as the functions of the module's own file turn it, in float64, at the last T of these rows."""
    file = sys.modules[type(module).__module__]
    tables = module(torch.zeros(1, rows, 1), torch.arange(rows)[None], **more)
    first, second = (table.double()[:, -x.shape[1] :] for table in tables)
    if "GPTJ" in type(module).__name__:
        return file.apply_rotary_pos_emb(x, first, second)
    return file.apply_rotary_pos_emb(x, x, first, second, unsqueeze_dim=2)[0]


@pytest.mark.parametrize("name", ROTARIES)
def test_rotary_of_a_model(name):
    """All that its module computes, factors among it, also where its frequencies would change beyond the given length."""
    module, more = rotary_module(name)
    rows = 64 if name in CHANGES else 150
    rotary = Rotary.from_module(module, rows, **more)
    x = torch.randn(1, 3, 1, rotary.rotary_dim, dtype=torch.float64)
    epilogue = Epilogue(None, None, None, *turns(rotary, torch.zeros(1, 3, dtype=torch.long), torch.arange(rows - 3, rows)))
    torch.testing.assert_close(rotate(x, epilogue), turned_as(module, x, rows, **more), rtol=1e-6, atol=1e-6)
    short, kept = module(torch.zeros(1, 4, 1), torch.arange(4)[None], **more), (rotary.cos, rotary.sin)
    assert any(torch.equal(table[0, :, 0], kept[0][:4, 0]) for table in short)  # bit for bit
    moved = rotary.half().float()
    assert torch.equal(moved.cos, kept[0]) and torch.equal(moved.to_empty(device="cpu").sin, kept[1])
    if name in CHANGES:
        module, _ = rotary_module(name)
        inv_freq, state = module.inv_freq, set(vars(module))
        for longer in (65, 150):
            with pytest.raises(ValueError, match="module: expected angles that do not change with the length"):
                Rotary.from_module(module, longer)
        assert module.inv_freq is inv_freq and set(vars(module)) == state  # a copy was called


def test_a_rotary_module_that_was_moved_or_cast():
    """model.to(torch.bfloat16) rounds its frequencies, and then its angles are those of the rounded ones."""
    module, _ = rotary_module("llama")
    exact, module = Rotary.from_module(module, 90), module.to(torch.bfloat16)
    cos, _ = module(torch.zeros(1, 90, 1), torch.arange(90)[None])
    rounded = Rotary.from_module(module, 90)
    assert torch.equal(rounded.cos, cos[0, :, :4]) and not torch.equal(rounded.cos, exact.cos)
    with pytest.raises(ValueError, match="module: expected one with values, got a LlamaRotaryEmbedding on meta"):
        Rotary.from_module(module.to("meta"), 90)
    with torch.inference_mode():
        rotary = Rotary.from_module(rotary_module("longrope")[0], 9)
    assert not rotary.cos.is_inference()
    with torch.device("meta"):
        rotary = Rotary.from_module(rotary_module("yarn")[0].to_empty(device="cpu"), 1)
    assert rotary.cos.is_meta


class Tables(nn.Module):
    """A rotary module of one's own, beside which no function tells how heads are turned."""

    def __init__(self, change=lambda cos, sin: (cos, sin)):
        super().__init__()
        self.change = change

    def forward(self, x, position_ids):
        angle = position_ids[..., None] * torch.tensor([1.0, 0.3, 0.1])
        return self.change(torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin())


def test_rotary_modules_of_ones_own():
    """Only what can be proved is taken."""
    with pytest.raises(ValueError, match="interleaved: expected True or False, since nothing beside Tables tells"):
        Rotary.from_module(Tables(), 9)
    for interleaved in (False, True):
        rotary = Rotary.from_module(Tables(lambda cos, sin: (sin, cos)), 9, interleaved=interleaved)
        assert (
            rotary.interleaved is interleaved
            and rotary.is_told
            and torch.equal(rotary.cos[:, 1], (0.3 * torch.arange(9)).cos())
        )
    beside = Tables(lambda cos, sin: (cos[..., :3].repeat_interleave(2, -1), sin[..., :3].repeat_interleave(2, -1)))
    assert Rotary.from_module(beside, 9).interleaved and Rotary.from_module(beside, 9).cos.shape == (9, 3)
    with pytest.raises(
        ValueError, match="interleaved: expected True, since a Tables gives equal values side by side; got False"
    ):
        Rotary.from_module(beside, 9, interleaved=False)
    for change, error, message in [
        (lambda cos, sin: cos, TypeError, r"module: expected one that gives \(cos, sin\).* got a Tables: Tensor"),
        (lambda cos, sin: (cos, sin[..., 1:]), TypeError, r"got a Tables: \(1, 9, 6\), \(1, 9, 5\)"),
        (lambda cos, sin: (cos * sin.add(2).cumsum(1), sin), ValueError, "module: expected angles that do not change"),
        (lambda cos, sin: (cos + 0.5, sin), ValueError, "module: expected cosines and sines, which turn nothing"),
        (lambda cos, sin: (cos, cos), ValueError, "module: expected cosines and sines, which turn nothing"),
    ]:
        with pytest.raises(error, match=message):
            Rotary.from_module(Tables(change), 9, interleaved=False)
    for wrong, error, message in [
        (torch.ones(4), TypeError, "module: expected a model's rotary nn.Module, got Tensor"),
        (nn.ReLU(), TypeError, r"module: expected one that takes \(x, position_ids\), got a ReLU"),
    ]:
        with pytest.raises(error, match=message):
            Rotary.from_module(wrong, 9)
    learned = Tables()
    learned.weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="module: expected fixed frequencies, got a Tables"):
        Rotary.from_module(learned, 9, interleaved=True)
    assert Rotary.from_module(learned.requires_grad_(False), 9, interleaved=True).rotary_dim == 6
    with pytest.raises(ValueError, match="max_length: expected a positive number, got 0"):
        Rotary.from_module(Tables(), 0)


VISION = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
REFUSED = {
    "qwen2_vl": ("Qwen2VL", lambda: transformers.Qwen2VLConfig(text_config={**SMALL, "rope_parameters": VISION}).text_config,
                 ValueError, "one position for each token, got a Qwen2VLRotaryEmbedding, which takes 3"),
    "llama4": ("Llama4Text", lambda: transformers.Llama4TextConfig(**SMALL, head_dim=16), TypeError, r"\(cos, sin\).*: Tensor"),
    "nanochat": ("NanoChat", lambda: transformers.NanoChatConfig(**SMALL), ValueError, "forward, got a NanoChatRotary"),
    "deepseek_v3": ("DeepseekV3", lambda: transformers.DeepseekV3Config(**SMALL), ValueError, "interleaved: expected True or"),
    "gemma3": ("Gemma3", lambda: transformers.Gemma3TextConfig(**SMALL), ValueError, "layer_type: expected .* got None"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_rotary_modules_that_are_refused(name):
    """Positions of several axes, complex tables, turns back, heads rearranged, and frequencies of a type of layer, unsaid."""
    start, config, error, message = REFUSED[name]
    file = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    module = getattr(file, f"{start}RotaryEmbedding")(config())
    with pytest.raises(error, match=message):
        Rotary.from_module(module, 9)


def test_a_model_that_turns_back_needs_a_statement():
    nanochat = pytest.importorskip("transformers.models.nanochat.modeling_nanochat")
    front = EmbeddingQKV.from_modules(
        nn.Embedding(90, 16), None, nanochat.NanoChatRMSNorm(), qkv=nn.Linear(16, 48), num_heads=2
    )
    angle = torch.randn(9, 4).repeat(1, 2)
    with pytest.raises(ValueError, match="the model of a NanoChatRMSNorm does not turn"):
        front(IDS, rotary=(angle.cos(), angle.sin()))
    query = front(IDS, rotary=pyembed.CosSin(angle.cos(), -angle.sin())).query
    plain = front(IDS).query
    expected, _ = nanochat.apply_rotary_pos_emb(plain, plain, angle.cos()[None], angle.sin()[None], unsqueeze_dim=2)
    torch.testing.assert_close(query, expected)


def test_scales_are_read_when_they_change():
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma").GemmaTextScaledWordEmbedding
    bart = pytest.importorskip("transformers.models.bart.modeling_bart").BartScaledWordEmbedding
    for kind, change in ((gemma, lambda t: t.embed_scale.fill_(2.0)), (bart, lambda t: setattr(t, "embed_scale", 2.0))):
        token = kind(90, 16, 0, 3.3).half().float()
        front = EmbeddingQKV.from_modules(token, qkv=torch.nn.Linear(16, 48), num_heads=2)
        assert torch.equal(front(IDS).hidden, token(IDS))
        change(token)
        assert torch.equal(front(IDS).hidden, token(IDS))
    with torch.inference_mode():  # whose tensors count no changes
        token = gemma(90, 16, 0, 3.3)
        front = EmbeddingQKV.from_modules(token, qkv=torch.nn.Linear(16, 48), num_heads=2)
        for scale in (3.0, 0.5):
            token.embed_scale.fill_(scale)
            assert torch.equal(front(IDS).hidden, token(IDS))


def test_a_scale_of_inference_mode_on_a_gpu():
    """It counts no changes, so it is read at each call."""

    class OnGPU(torch.Tensor):
        is_cpu = False

    token, own = nn.Embedding(3, 4), OwnScale()
    with torch.inference_mode():
        token.embed_scale = torch.tensor(3.0).as_subclass(OnGPU)
        for scale in (3.0, 0.5):
            token.embed_scale.fill_(scale)
            assert own.of(token, RowsFinding("embed_scale", False)) == scale


def test_an_embedding_that_does_more_than_scale_is_called():
    t5 = pytest.importorskip("transformers.models.t5gemma2.modeling_t5gemma2")
    token = t5.T5Gemma2TextScaledWordEmbedding(9, 16, 0, 4.0, eoi_token_index=5)
    token.eoi_embedding.data.fill_(7.0)
    front = EmbeddingQKV.from_modules(token, qkv=torch.nn.Linear(16, 48), num_heads=2)
    assert torch.equal(front(torch.tensor([[1, 5]])).hidden, token(torch.tensor([[1, 5]])))


@BACKENDS
def test_opt(backend):
    """Positions that begin at row 2 of their table."""
    model = model_of(transformers.OPTConfig(**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, ffn_dim=16,
                                            word_embed_proj_dim=32, max_position_embeddings=20, dropout=0.0))  # fmt: skip
    decoder = model.decoder
    layer = decoder.layers[0]
    attention = layer.self_attn
    front = EmbeddingQKV.from_modules(
        decoder.embed_tokens, decoder.embed_positions, layer.self_attn_layer_norm,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj), num_heads=4, heads_first=True,
    )  # fmt: skip
    assert front.position_offset == 2
    query, key, value = seen_by_attention(model, attention)
    scale = query / front(IDS.to(DEVICE)).query  # OPT scales queries itself
    assert scale.std() < 1e-3
    found = hold(front, (query / scale.mean(), key, value), backend)
    sum(x.sum() for x in found).backward()
    assert not decoder.embed_positions.weight.grad[:2].any() and decoder.embed_positions.weight.grad[2:11].any()


@BACKENDS
def test_bert(backend):
    """Token types; hidden is the sum, bit for bit."""
    model = model_of(transformers.BertConfig(**SMALL, max_position_embeddings=20, hidden_dropout_prob=0.0))
    embeddings, attention = model.embeddings, model.encoder.layer[0].attention.self
    front = EmbeddingQKV.from_modules(
        embeddings.word_embeddings, embeddings.position_embeddings, embeddings.LayerNorm,
        qkv=(attention.query, attention.key, attention.value), num_heads=4, heads_first=True,
        segment=embeddings.token_type_embeddings,
    )  # fmt: skip
    kinds = torch.randint(2, (2, 9), device=DEVICE)
    expected = seen_by_attention(model, attention, token_type_ids=kinds)
    sums = []
    handle = embeddings.LayerNorm.register_forward_pre_hook(lambda module, args: sums.append(args[0]))
    model(IDS.to(DEVICE), token_type_ids=kinds)
    handle.remove()
    found = hold(front, expected, backend, segment_ids=kinds)
    assert torch.equal(found.hidden, sums[0])
    alone = front(IDS.to(DEVICE)).hidden
    model(IDS.to(DEVICE))
    torch.testing.assert_close(alone, front(IDS.to(DEVICE), segment_ids=torch.zeros_like(kinds)).hidden)


def three(attention, names=("q_proj", "k_proj", "v_proj")):
    return tuple(getattr(attention, name) for name in names)


@BACKENDS
def test_olmo2(backend):
    """No norm before attention, and norms of all heads of query and of key at once."""
    model = model_of(transformers.Olmo2Config(**{**SMALL, "num_key_value_heads": 2}, pad_token_id=0))
    attention = model.layers[0].self_attn
    front = EmbeddingQKV.from_modules(
        model.embed_tokens, qkv=three(attention), num_heads=4, num_kv_heads=2, heads_first=True,
        query_norm=attention.q_norm, key_norm=attention.k_norm,
    )  # fmt: skip
    hidden, position_ids = torch.zeros(2, 9, 32, device=DEVICE), torch.arange(9, device=DEVICE)[None]
    expected = seen_by_attention(model, attention)
    hold(front, expected, backend, rotary=model.rotary_emb(hidden, position_ids))


@BACKENDS
def test_electra(backend):
    """A norm and a projection behind the sum, which are called."""
    model = model_of(transformers.ElectraConfig(**SMALL, embedding_size=16, max_position_embeddings=20))
    embeddings, attention = model.embeddings, model.encoder.layer[0].attention.self
    front = EmbeddingQKV.from_modules(
        embeddings.word_embeddings, embeddings.position_embeddings, segment=embeddings.token_type_embeddings,
        embedding_transform=torch.nn.Sequential(embeddings.LayerNorm, embeddings.dropout, model.embeddings_project),
        qkv=three(attention, ("query", "key", "value")), num_heads=4, heads_first=True,
    )  # fmt: skip
    found = hold(front, seen_by_attention(model, attention), backend)
    assert found.hidden.shape == (2, 9, 32)


@BACKENDS
def test_bloom(backend):
    """A norm behind the embedding, and rows of query, key and value of each head in turn."""
    model = model_of(transformers.BloomConfig(vocab_size=90, hidden_size=32, n_layer=1, n_head=4))
    layer = model.h[0]
    front = EmbeddingQKV.from_modules(
        model.word_embeddings, norm=layer.input_layernorm, qkv=layer.self_attention.query_key_value, num_heads=4,
        embedding_transform=model.word_embeddings_layernorm, per_head=True,
    )  # fmt: skip
    seen = []
    layer.input_layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer.self_attention.query_key_value.register_forward_hook(lambda module, args, out: seen.append(out))
    model(IDS.to(DEVICE))
    with pyembed.backend(backend):
        found = front(IDS.to(DEVICE))
    torch.testing.assert_close(found.hidden, seen[0])
    rows = torch.stack([found.query, found.key, found.value], -2).flatten(-3)
    torch.testing.assert_close(rows, seen[1], rtol=1e-4, atol=1e-4)


@BACKENDS
def test_roberta(backend):
    """Positions begin behind the padding row."""
    model = model_of(transformers.RobertaConfig(**SMALL, max_position_embeddings=20, pad_token_id=1, type_vocab_size=1))
    embeddings, attention = model.embeddings, model.encoder.layer[0].attention.self
    front = EmbeddingQKV.from_modules(
        embeddings.word_embeddings, embeddings.position_embeddings, embeddings.LayerNorm, num_heads=4, heads_first=True,
        qkv=three(attention, ("query", "key", "value")), segment=embeddings.token_type_embeddings, position_offset=2,
    )  # fmt: skip
    assert (IDS != 1).all()
    hold(front, seen_by_attention(model, attention), backend)


@pytest.mark.sample
@pytest.mark.parametrize("family", ["marian", "whisper", "pegasus", "informer", "bart", "biogpt", "roformer"])
@BACKENDS
def test_tables_of_positions(family, backend):
    """Whatever their forward takes first: rows of the positions that are given, or of 0 … T−1."""
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["nn"])
    kind = next(value for name, value in vars(module).items() if name.endswith("PositionalEmbedding"))
    position = kind(20, 32)
    with torch.no_grad():
        position.weight.normal_()
    front = EmbeddingQKV.from_modules(torch.nn.Embedding(90, 32), position, qkv=torch.nn.Linear(32, 96), num_heads=4).to(DEVICE)
    places = torch.randint(15, (2, 9), device=DEVICE)
    for position_ids in (None, places, places[0]):
        flat = torch.arange(9, device=DEVICE) if position_ids is None else position_ids.reshape(-1)
        rows = position(torch.ones(1, len(flat), device=DEVICE).long(), position_ids=flat).reshape(-1, 9, 32)
        with pyembed.backend(backend):
            assert torch.equal(front(IDS.to(DEVICE), position_ids).hidden, front.token(IDS.to(DEVICE)) + rows)
        assert "forward of its own" not in front.explain(IDS.to(DEVICE)).reason
