"""Front ends over the modules of real models, against what those models compute (transformers, where it is installed)."""

import pytest
import torch
from conftest import DEVICE

import pyembed

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


def test_scales_are_read_when_they_change():
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma").GemmaTextScaledWordEmbedding
    bart = pytest.importorskip("transformers.models.bart.modeling_bart").BartScaledWordEmbedding
    for kind, change in ((gemma, lambda t: t.embed_scale.fill_(2.0)), (bart, lambda t: setattr(t, "embed_scale", 2.0))):
        token = kind(90, 16, 0, 3.3).half().float()
        front = EmbeddingQKV.from_modules(token, qkv=torch.nn.Linear(16, 48), num_heads=2)
        assert torch.equal(front(IDS).hidden, token(IDS))
        change(token)
        assert torch.equal(front(IDS).hidden, token(IDS))


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
    hold(front, seen_by_attention(model, attention), backend)


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
