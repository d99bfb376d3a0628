"""Models to be fused: tiny ones of transformers by name, and four in the shapes that people write themselves."""

import torch
from torch import nn

V, D, T = 97, 32, 24


class OwnNorm(nn.Module):
    """LayerNorm as many write it: eps is in the code."""

    def __init__(self, width, bias=True, names=("weight", "bias")):
        super().__init__()
        self.names = names
        setattr(self, names[0], nn.Parameter(torch.ones(width)))
        setattr(self, names[1], nn.Parameter(torch.zeros(width)) if bias else None)

    def forward(self, x):
        weight, bias = (getattr(self, name) for name in self.names)
        return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


class HandNorm(nn.Module):
    """LayerNorm by its formula."""

    def __init__(self, width):
        super().__init__()
        self.eps = 1e-5
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return self.scale * ((x - mean) / torch.sqrt(var + self.eps)) + self.shift


def attend(q, k, v):
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Packed(nn.Module):
    """One linear map to query, key and value (nanoGPT, minGPT)."""

    def __init__(self, heads=4, bias=True, width=D):
        super().__init__()
        self.heads, self.c_attn, self.c_proj = heads, nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)

    def forward(self, x):
        B, T, width = x.shape
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in self.c_attn(x).split(width, 2))
        return self.c_proj(attend(q, k, v).transpose(1, 2).reshape(B, T, width))


class Three(nn.Module):
    """Three maps, in the order key, query, value (LLMs-from-scratch)."""

    def __init__(self, heads=4):
        super().__init__()
        self.heads = heads
        self.W_query, self.W_key, self.W_value = (nn.Linear(D, D, bias=False) for _ in range(3))

    def forward(self, x):
        B, T, _ = x.shape
        k, q, v = (w(x).view(B, T, self.heads, -1).transpose(1, 2) for w in (self.W_key, self.W_query, self.W_value))
        return attend(q, k, v).transpose(1, 2).reshape(B, T, D)


class Head(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(D, width, bias=False) for _ in range(3))

    def forward(self, x):
        k, q = self.key(x), self.query(x)
        weights = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        mask = torch.ones(x.shape[1], x.shape[1], device=x.device).tril()
        return weights.masked_fill(mask == 0, float("-inf")).softmax(-1) @ self.value(x)


class Heads(nn.Module):
    """Three maps for each head (the lecture)."""

    def __init__(self, heads=4):
        super().__init__()
        self.heads = nn.ModuleList([Head(D // heads) for _ in range(heads)])

    def forward(self, x):
        return torch.cat([head(x) for head in self.heads], -1)


class Block(nn.Module):
    def __init__(self, norm, attention, width=D):
        super().__init__()
        self.norm1, self.attention, self.norm2 = norm(width), attention(), norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Own(nn.Module):
    """GPT: tables of tokens and positions, dropout or none, blocks, a head that may be tied."""

    def __init__(self, norm, attention, dropout=0.0, tied=False, layers=2, rows=V, length=T, width=D):
        super().__init__()
        self.tok, self.pos = nn.Embedding(rows, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout) if dropout is not None else nn.Identity()
        self.blocks = nn.ModuleList([Block(norm, attention, width) for _ in range(layers)])
        self.norm, self.head = norm(width), nn.Linear(width, rows, bias=False)
        if tied:
            self.head.weight = self.tok.weight

    def hidden(self, ids):
        x = self.drop(self.tok(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, ids):
        return self.head(self.hidden(ids))


OWN = {
    "nanoGPT": lambda: Own(OwnNorm, Packed, 0.1, tied=True),
    "minGPT": lambda: Own(nn.LayerNorm, Packed, 0.1),
    "LLMs-from-scratch": lambda: Own(HandNorm, Three, 0.1),
    "lecture": lambda: Own(nn.LayerNorm, Heads, None),
}

_SMALL = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": V}
_SMALL |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8}
_OPT = {"hidden_size": D, "ffn_dim": 64, "word_embed_proj_dim": D}
_BART = {"d_model": D, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
FAMILIES = {  # name: (config, model, arguments)
    "Llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "Mistral": ("MistralConfig", "MistralForCausalLM", _GROUPED),
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_GROUPED, "num_local_experts": 2}),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_SMALL, "num_key_value_heads": 2}),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GROUPED),
    "Gemma": ("GemmaConfig", "GemmaForCausalLM", _GROUPED),
    "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GROUPED),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GROUPED),
    "Phi": ("PhiConfig", "PhiForCausalLM", _SMALL),
    "Phi3": ("Phi3Config", "Phi3ForCausalLM", _SMALL),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel", _SMALL),
    "GPTJ": ("GPTJConfig", "GPTJForCausalLM", {**_SMALL, "rotary_dim": 4}),
    "GPTNeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _SMALL),
    "Falcon": ("FalconConfig", "FalconForCausalLM", _SMALL),
    "StarCoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {**_SMALL, "num_key_value_heads": 2}),
    "Cohere": ("CohereConfig", "CohereForCausalLM", _SMALL),
    "OPT": ("OPTConfig", "OPTForCausalLM", {**_SMALL, **_OPT}),
    "BART": ("BartConfig", "BartModel", {**_SMALL, **_BART}),
    "BERT": ("BertConfig", "BertModel", _SMALL),
    "RoBERTa": ("RobertaConfig", "RobertaModel", _SMALL),
    "ModernBERT": ("ModernBertConfig", "ModernBertModel", {**_SMALL, "attn_implementation": "sdpa"}),
    "Olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _SMALL),
    "Bloom": ("BloomConfig", "BloomForCausalLM", _SMALL),
}


def build(name, **more):
    """A model in eval mode, whose parameters are all random: at initial values w and 1 + w cannot be told apart."""
    torch.manual_seed(0)
    if name in OWN:
        model = OWN[name]()
    else:
        import transformers

        config, kind, arguments = FAMILIES[name]
        model = getattr(transformers, kind)(getattr(transformers, config)(**{**arguments, **more}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def logits(model, ids, **batch):
    out = model(ids, **batch)
    return out if isinstance(out, torch.Tensor) else out[0]


def tokens(B=2, length=9, seed=0):
    return torch.randint(3, V, (B, length), generator=torch.Generator().manual_seed(seed))
