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
