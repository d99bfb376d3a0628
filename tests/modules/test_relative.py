"""Relative positions, against the formulas of their papers pair by pair, against each other and against transformers."""

import itertools
import math
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from pyembed import relative
from pyembed.relative import ALiBi, DeBERTaBias, ShawBias, T5Bias, TransformerXLBias

B, H, D, WIDTH = 2, 3, 4, 10

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

KINDS = {
    "t5-encoder": lambda **factory: T5Bias(H, 9, 7, **factory),
    "t5-decoder": lambda **factory: T5Bias(H, 6, 4, bidirectional=False, **factory),
    "alibi": lambda **factory: ALiBi(H),
    "shaw": lambda **factory: ShawBias(H, D, 3, **factory),
    "transformer-xl": lambda **factory: TransformerXLBias(H, D, WIDTH, **factory),
    "deberta-v1": lambda **factory: DeBERTaBias(H, D, WIDTH, max_distance=4, **factory),
    "deberta-v2": lambda **factory: DeBERTaBias(H, D, WIDTH, max_distance=7, position_buckets=6, norm=True, **factory),
    "deberta-c2p": lambda **factory: DeBERTaBias(H, D, max_distance=3, terms=("c2p",), **factory),
    "deberta-p2c": lambda **factory: DeBERTaBias(H, D, max_distance=5, position_buckets=4, terms=["p2c"], **factory),
}
CONTENT = [kind for kind in KINDS if "t5" not in kind and kind != "alibi"]
OFFSETS = {"none": 0, "int": 5, "tensor": torch.tensor(5), "rows": torch.tensor([2, 5], dtype=torch.int32)}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_offset = pytest.mark.parametrize("offset", OFFSETS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Eager FlexAttention goes through Dynamo, which counts recompilations."""
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture
def untraced(monkeypatch):
    """FlexAttention without Dynamo in front, which traces each call anew: the same arithmetic without gradients, faster."""
    flex_module = sys.modules[flex_attention.__module__]
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)


def make(kind, dtype=torch.float64):
    """A module whose parameters all count: far from zero, biases too."""
    module = KINDS[kind](dtype=dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def draw(Tq, Tk, dtype=torch.float64):
    return torch.randn(B, H, Tq, D, dtype=dtype), torch.randn(B, H, Tk, D, dtype=dtype), torch.randn(B, H, Tk, D, dtype=dtype)


def as_rows(offset):
    return [int(offset)] * B if not isinstance(offset, torch.Tensor) or offset.dim() == 0 else offset.tolist()


# The papers, one pair at a time: the bias of head h for the query q at position i and the key k at position j.


def t5_paper(relative_position, num_buckets, max_distance, bidirectional):
    """Raffel et al. 2020, with the floor of the logarithm in whole numbers: (x/e)^n ≥ (max/e)^m."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if relative_position > 0 else 0
        x = abs(relative_position)
    else:
        x = max(0, -relative_position)
    e = num_buckets // 2
    if x < e:
        return first + x
    n = num_buckets - e
    m = max(m for m in range(n) if x**n * e**m >= max_distance**m * e**n)
    return first + e + m


def deberta_paper(x, position_buckets, max_distance):
    """He et al. 2021's released log buckets, with the ceiling in whole numbers."""
    mid = position_buckets // 2
    if abs(x) <= mid:
        return x
    m = 0
    while (max_distance - 1) ** m * mid ** (mid - 1) < abs(x) ** (mid - 1) * mid**m:
        m += 1
    return (mid + m) * (1 if x > 0 else -1)


def slopes_paper(heads):
    """Press et al. 2022: from 2^(−8/n) on, geometric; between powers of two every other one of twice as many."""
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 / n * (i + 1)) for i in range(n)]
    return slopes if n == heads else slopes + slopes_paper(2 * n)[0::2][: heads - n]


def t5(module, q, k, h, i, j):
    return module.weight[t5_paper(j - i, module.num_buckets, module.max_distance, module.bidirectional), h]


def alibi(module, q, k, h, i, j):
    return torch.tensor(-slopes_paper(H)[h] * abs(i - j), dtype=torch.float64)


def shaw(module, q, k, h, i, j):
    return q @ module.weight[max(-3, min(3, j - i)) + 3] / math.sqrt(D)


def transformer_xl(module, q, k, h, i, j):
    angles = [(i - j) / 10000 ** (2 * t / WIDTH) for t in range(WIDTH // 2)]
    r = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)
    return q @ (module.weight[h * D : (h + 1) * D] @ r) / math.sqrt(D)


def deberta(module, q, k, h, i, j):
    x, span = i - j, module.max_distance
    if module.position_buckets:
        x, span = deberta_paper(x, module.position_buckets, module.max_distance), module.position_buckets
    row = module.weight[0 if x <= -span else 2 * span - 1 if x >= span else x + span]
    if module.norm is not None:
        row = (row - row.mean()) / torch.sqrt(row.var(correction=0) + 1e-7) * module.norm.weight + module.norm.bias
    result = 0
    for content, linear in ((q, module.pos_key_proj), (k, module.pos_query_proj)):
        if linear is not None:
            result = result + content @ (linear.weight[h * D : (h + 1) * D] @ row + linear.bias[h * D : (h + 1) * D])
    return result / math.sqrt(D * (1 + len(module.terms)))


PAPERS = {"t5": t5, "alibi": alibi, "shaw": shaw, "transformer": transformer_xl, "deberta": deberta}


def by_pairs(kind, module, q, k, offset):
    paper, rows = PAPERS[kind.split("-")[0]], as_rows(offset)
    out = torch.empty(B, H, q.shape[2], k.shape[2], dtype=torch.float64)
    for b, h, i, j in itertools.product(*map(range, out.shape)):
        out[b, h, i, j] = paper(module, q[b, h, i], k[b, h, j], h, rows[b] + i, j)
    return out


@each_kind
@each_offset
def test_bias_is_the_papers(kind, offset):
    module, (q, k, _) = make(kind), draw(4, 9)
    with torch.no_grad():
        bias = module(q, k, OFFSETS[offset])
        expected = by_pairs(kind, module, q, k, OFFSETS[offset])
    shared = kind not in CONTENT and offset != "rows"
    assert bias.shape == ((H, 4, 9) if shared else (B, H, 4, 9)) and bias.dtype == torch.float64
    torch.testing.assert_close(bias.expand_as(expected), expected, rtol=1e-6 if kind == "alibi" else 1e-12, atol=1e-12)


@each_kind
@each_offset
@pytest.mark.parametrize("causal", [True, False])
def test_score_mod_is_the_bias(kind, offset, causal, untraced):
    """Through SDPA and through FlexAttention; a key after its query counts for nothing if causal."""
    module, (q, k, v), offset = make(kind).requires_grad_(False), draw(4, 9), OFFSETS[offset]
    bias = module(q, k, offset, causal=causal)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=module.scale)
    mod = module.score_mod(q, k, offset, causal=causal)
    torch.testing.assert_close(flex_attention(q, k, v, score_mod=mod, scale=module.scale), dense, rtol=1e-6, atol=1e-6)
    future = [[[causal and j > row + i for j in range(9)] for i in range(4)] for row in as_rows(offset)]
    assert torch.equal(bias.isinf().expand(B, H, 4, 9), torch.tensor(future)[:, None].expand(B, H, 4, 9))


@pytest.mark.sample
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "alibi"])
@pytest.mark.parametrize("offset", ["none", "rows"])
def test_gradients_reach_the_tables_both_ways(kind, offset):
    """And what query and key have to do with the bias. Traced by Dynamo, as FlexAttention is without our doing."""
    module, (q, k, v), offset = make(kind, torch.float32), draw(4, 9, torch.float32), OFFSETS[offset]
    wanted = [parameter for name, parameter in module.named_parameters() if name not in ("u", "v", "value_weight")]
    grad, found = torch.randn(B, H, 4, D), []
    for way in ("bias", "score_mod"):
        content = [q.clone().requires_grad_(), k.clone().requires_grad_()]  # on a CPU FlexAttention's own may not want any
        if way == "bias":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=module(*content, offset), scale=module.scale)
        else:
            out = flex_attention(q, k, v, score_mod=module.score_mod(*content, offset), scale=module.scale)
        found.append([out, *torch.autograd.grad(out, [*wanted, *content], grad, allow_unused=True)])
    for first, second in zip(*found, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            assert first.count_nonzero() > first.numel() // 4
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert [g is not None for g in found[0][-2:]] == [kind in CONTENT and "p2c" not in kind, module.reads_key]


def attend(way, module, q, k, v, offset):
    if way == "score_mod":
        return flex_attention(q, k, v, score_mod=module.score_mod(q, k, offset, causal=True), scale=module.scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=module(q, k, offset, causal=True), scale=module.scale)


@each_kind
@pytest.mark.parametrize("way", ["bias", "score_mod"])
def test_decode_equals_one_shot(kind, way, untraced):
    """Five tokens at once, then one by one over a growing cache, the offset an int and a tensor."""
    module, (q, k, v) = make(kind, torch.float32).requires_grad_(False), draw(9, 9, torch.float32)
    parts = [(0, 5, 0), (5, 6, torch.tensor(5)), (6, 7, 6), (7, 8, torch.tensor([7, 7])), (8, 9, 8)]
    steps = [attend(way, module, q[:, :, a:b], k[:, :, :b], v[:, :, :b], offset) for a, b, offset in parts]
    torch.testing.assert_close(torch.cat(steps, 2), attend("bias", module, q, k, v, 0))


@each_kind
def test_rows_with_offsets_of_their_own(kind):
    """A row of a ragged batch gets what it gets alone."""
    module, (q, k, _) = make(kind).requires_grad_(False), draw(2, 8)
    together = module(q, k, torch.tensor([1, 6]))
    for b, offset in enumerate((1, 6)):
        alone = module(q[b : b + 1], k[b : b + 1], offset)
        torch.testing.assert_close(together[b : b + 1], alone.expand(1, H, 2, 8))


@each_kind
def test_lengths_by_default(kind):
    """No key: offset + Tq of them, where their content does not count. One query and one key are enough."""
    module, (q, k, _) = make(kind).requires_grad_(False), draw(3, 7)
    if not module.reads_key:
        assert torch.equal(module(q, None, 4), module(q, k, 4)) and torch.equal(module(q, 7, 4), module(q, k, 4))
    if kind not in CONTENT:
        torch.testing.assert_close(module(3, offset=4).double(), module(q, k, 4))
    assert module(q[:, :, :1], k[:, :, :1]).shape[-2:] == (1, 1)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tables", ["half", "float32"])
def test_half_precision(kind, dtype, tables, untraced):
    module, (q, k, v) = make(kind).requires_grad_(False), draw(4, 9)
    exact = module.to(dtype).double()  # what the rounded tables give
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    expected = exact(q.double(), k.double(), 5)
    module = module.to(dtype if tables == "half" else torch.float32)
    bias = module(q, k, 5)
    assert bias.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(bias.double(), expected, rtol=4 * eps, atol=8 * eps * expected.abs().max().item())
    flex = flex_attention(q, k, v, score_mod=module.score_mod(q, k, 5), scale=module.scale)
    assert flex.dtype == dtype
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=expected, scale=module.scale)
    torch.testing.assert_close(flex.double(), want, rtol=0, atol=16 * eps * want.abs().max().item())


def test_alibi_keeps_far_distances():
    """Slopes do not pass through half precision on their way, and the score_mod's terms not at all."""
    module, q = ALiBi(12).half(), torch.zeros(1, 12, 1, 16, dtype=torch.float16)
    mod = module.score_mod(q, 5001, 5000)
    for h, slope in enumerate(slopes_paper(12)):
        scores = [mod(torch.tensor(0.0), *map(torch.tensor, (0, h, 0, j))).item() for j in (0, 1)]
        assert scores == pytest.approx([-slope * 5000, -slope * 4999], rel=1e-6)


@each_kind
@pytest.mark.parametrize("offset", [3, torch.tensor(3), torch.tensor([3, 4])], ids=["int", "tensor", "rows"])
def test_no_tensor_is_read(kind, offset):
    """Tensors without data cannot be: neither an offset nor a table brings the host to wait."""
    module = KINDS[kind](device="meta", dtype=torch.float32)
    q, k, _ = (tensor.to("meta") for tensor in draw(2, 6))
    offset = offset.to("meta") if isinstance(offset, torch.Tensor) else offset
    assert module(q, k, offset, causal=True).shape[-2:] == (2, 6)
    assert callable(module.score_mod(q, k, offset))


def test_transformer_xl_scores_are_the_papers():
    """((q + u) · k + (q + v) · W r)/√d, softmax, values: with u and v here, and from a projection that hands both out."""
    module, (q, k, v) = make("transformer-xl"), draw(3, 5)
    bare = TransformerXLBias(H, D, WIDTH, biases=False, dtype=torch.float64)
    bare.weight = module.weight
    u, w = module.u[None, :, None], module.v[None, :, None]
    bd = by_pairs("transformer-xl", module, q + w, k, 2)
    want = torch.softmax((q + u) @ k.mT / math.sqrt(D) + bd, -1) @ v
    for queries, relative_ in ((module.queries(q), module), ((q + u, q + w), bare)):
        out = F.scaled_dot_product_attention(queries[0], k, v, attn_mask=relative_(queries[1], k, 2), scale=relative_.scale)
        torch.testing.assert_close(out, want)
    grads = torch.autograd.grad(out.sum() + module.queries(q)[1].square().sum(), [module.v, module.weight])
    assert all(grad.count_nonzero() for grad in grads)
    assert not bare.state_dict().keys() - {"weight"}


def test_shaw_values_are_the_papers():
    """z_i = Σ_j α_ij (v_j + a^V_clip(j−i)), for all rows at one offset and for a row at its own."""
    module, (q, k, _) = make("shaw"), draw(4, 9)
    for offset in (5, torch.tensor([2, 5])):
        alpha = torch.softmax(q @ k.mT * module.scale + module(q, k, offset), -1)
        want = torch.zeros(B, H, 4, D, dtype=torch.float64)
        for b, i, j in itertools.product(range(B), range(4), range(9)):
            want[b, :, i] += alpha[b, :, i, j, None] * module.value_weight[max(-3, min(3, j - as_rows(offset)[b] - i)) + 3]
        torch.testing.assert_close(module.value_term(alpha, offset), want)
    assert torch.autograd.grad(module.value_term(alpha).sum(), module.value_weight)[0].count_nonzero()


def test_shaw_sums_half_precision_in_float32(device):
    """4,096 small probabilities fall to one row: added in bf16 they would stop at a sixteenth."""
    module = ShawBias(1, 2, 1, device=device, dtype=torch.bfloat16)
    module.value_weight.data.fill_(1)
    term = module.value_term(torch.full((1, 1, 1, 4096), 1 / 4096, device=device, dtype=torch.bfloat16), 4095)
    assert term.dtype == torch.bfloat16 and torch.equal(term, torch.ones_like(term))


@each_kind
def test_scale_is_the_models(kind):
    want = {"t5": 1.0, "alibi": None, "deberta": 1 / math.sqrt((3 if kind[-2] == "v" else 2) * D)}
    assert make(kind).scale == pytest.approx(want.get(kind.split("-")[0], 1 / math.sqrt(D)))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 20), (4, 3), (33, 100), (64, 1000)])
def test_t5_buckets_are_the_papers(num_buckets, max_distance, bidirectional):
    distance = torch.arange(-300, 301)
    bucket = relative.t5_bucket(distance, num_buckets, max_distance, bidirectional)
    assert bucket.tolist() == [t5_paper(-x, num_buckets, max_distance, bidirectional) for x in distance.tolist()]


@pytest.mark.parametrize("position_buckets, max_distance", [(64, 128), (32, 128), (6, 7), (2, 3)])
def test_deberta_buckets_are_the_papers(position_buckets, max_distance):
    distance = torch.arange(-3 * max_distance, 3 * max_distance + 1)
    bucket = relative.deberta_bucket(distance, position_buckets, max_distance)
    assert bucket.tolist() == [deberta_paper(x, position_buckets, max_distance) for x in distance.tolist()]


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 16, 25, 112])
def test_alibi_slopes_are_the_papers(heads):
    slopes = relative.alibi_slopes(heads)
    assert slopes.dtype == torch.float32
    assert slopes.tolist() == pytest.approx(slopes_paper(heads), rel=1e-6)


@pytest.mark.parametrize("is_decoder", [True, False])
def test_t5_equals_transformers(is_decoder):
    t5_module = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = t5_module.T5Config(num_heads=H, d_kv=D, d_model=H * D, is_decoder=is_decoder)
    theirs = t5_module.T5Attention(config, has_relative_attention_bias=True, layer_idx=0).requires_grad_(False)
    ours = T5Bias(H, bidirectional=not is_decoder)
    ours.load_state_dict(theirs.relative_attention_bias.state_dict())
    assert torch.equal(ours(200)[None], theirs.compute_bias(200, 200))
    assert torch.equal(ours(3, 190, torch.tensor(150))[None], theirs.compute_bias(3, 190, past_seen_tokens=150))
    distance = torch.arange(-3000, 3001)
    for buckets, farthest in ((32, 128), (64, 1000), (10, 37)):
        bucket = t5_module.T5Attention._relative_position_bucket(-distance, not is_decoder, buckets, farthest)
        assert torch.equal(relative.t5_bucket(distance, buckets, farthest, not is_decoder), bucket)


@pytest.mark.parametrize("heads", [8, 12])
def test_alibi_equals_transformers(heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    theirs = bloom.build_alibi_tensor(torch.ones(1, 40), heads, torch.float32)  # (H, 1, Tk), slope · key position
    ours = ALiBi(heads)(3, offset=37, causal=True)
    future = torch.arange(40) > torch.arange(37, 40)[:, None]
    weights = torch.softmax(theirs.expand(-1, 3, -1).masked_fill(future, float("-inf")), -1)
    torch.testing.assert_close(torch.softmax(ours, -1), weights, rtol=1e-4, atol=1e-7)


def test_shaw_equals_transformers():
    wav2vec2 = pytest.importorskip("transformers.models.wav2vec2_bert.modeling_wav2vec2_bert")
    settings = {"left_max_position_embeddings": 5, "right_max_position_embeddings": 5, "num_attention_heads": H}
    config = wav2vec2.Wav2Vec2BertConfig(hidden_size=H * D, position_embeddings_type="relative_key", **settings)
    theirs = wav2vec2.Wav2Vec2BertSelfAttention(config).requires_grad_(False)
    ours = ShawBias(H, D, 5, values=False)
    ours.load_state_dict(theirs.distance_embedding.state_dict())
    q, k, _ = draw(12, 12, torch.float32)
    torch.testing.assert_close(ours(q, k), wav2vec2._apply_relative_key_position_encoding(theirs, q, k)[1])


def test_transformer_xl_equals_transformers():
    """XLNet's two-sided positions and shift; its r (embedding_dim, H, head_dim) is our weight transposed."""
    xlnet = pytest.importorskip("transformers.models.xlnet.modeling_xlnet")
    config = xlnet.XLNetConfig(vocab_size=8, d_model=H * D, n_head=H, n_layer=1, d_inner=8)
    model = xlnet.XLNetModel(config).requires_grad_(False)
    theirs, ours, (q, k, v) = model.layer[0].rel_attn, TransformerXLBias(H, D), draw(4, 9, torch.float32)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.weight.data = theirs.r.reshape(H * D, H * D).t()
    ours.u.data, ours.v.data = theirs.r_w_bias, theirs.r_r_bias
    r = torch.einsum("ibh,hnd->ibnd", model.relative_positional_encoding(4, 9, B), theirs.r)
    heads_last = [tensor.permute(2, 0, 1, 3) for tensor in (q, k, v)]
    want = theirs.eval().rel_attn_core(*heads_last, r).permute(1, 2, 0, 3)
    query, position_query = ours.queries(q)
    out = F.scaled_dot_product_attention(query, k, v, attn_mask=ours(position_query, k, 5), scale=ours.scale)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [9, 70])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("buckets", [16, None])
def test_deberta_v2_equals_transformers(T, shared, buckets):
    hf = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    settings = {"position_buckets": buckets or -1, "max_relative_positions": 40, "pos_att_type": ["c2p", "p2c"]}
    config = hf.DebertaV2Config(
        hidden_size=H * D,
        num_attention_heads=H,
        relative_attention=True,
        share_att_key=shared,
        hidden_dropout_prob=0,
        **settings,
    )
    theirs = hf.DisentangledSelfAttention(config).requires_grad_(False)
    ours = DeBERTaBias(H, D, max_distance=40, position_buckets=buckets).requires_grad_(False)
    if shared:
        ours.pos_key_proj, ours.pos_query_proj = theirs.key_proj, theirs.query_proj
    else:
        ours.load_state_dict({"weight": ours.weight, **{k: v for k, v in theirs.state_dict().items() if k.startswith("pos_")}})
    q, k, _ = draw(T, T, torch.float32)
    want = theirs.disentangled_attention_bias(q.flatten(0, 1), k.flatten(0, 1), None, ours.weight, 3)
    torch.testing.assert_close(ours(q, k).flatten(0, 1), want)
    distance = torch.arange(-2000, 2001)
    if buckets:
        bucket = hf.make_log_bucket_position(distance, 256, 512)
        assert torch.equal(relative.deberta_bucket(distance, 256, 512), bucket.long())


@pytest.mark.parametrize("T", [9, 70])
def test_deberta_v1_equals_transformers(T):
    hf = pytest.importorskip("transformers.models.deberta.modeling_deberta")
    settings = {"max_relative_positions": 40, "pos_att_type": ["c2p", "p2c"], "hidden_dropout_prob": 0}
    config = hf.DebertaConfig(hidden_size=H * D, num_attention_heads=H, relative_attention=True, **settings)
    theirs = hf.DisentangledSelfAttention(config).requires_grad_(False)
    ours = DeBERTaBias(H, D, max_distance=40).requires_grad_(False)
    ours.pos_key_proj, ours.pos_query_proj = theirs.pos_proj, theirs.pos_q_proj
    q, k, _ = draw(T, T, torch.float32)
    want = theirs.disentangled_att_bias(q * ours.scale, k, hf.build_relative_position(q, k), ours.weight, 3)
    torch.testing.assert_close(ours(q, k), want)


Q, K = torch.zeros(B, H, 2, D), torch.zeros(B, H, 5, D)
BAD = [
    (lambda: T5Bias(0), ValueError, "num_heads: expected at least 1, got 0"),
    (lambda: ALiBi(2.0), TypeError, "num_heads: expected an int, got float"),
    (lambda: relative.alibi_slopes(-1), ValueError, "num_heads: expected at least 1, got -1"),
    (lambda: T5Bias(H, 3), ValueError, "num_buckets: expected at least 4 with bidirectional=True, got 3"),
    (lambda: T5Bias(H, 1, bidirectional=False), ValueError, "num_buckets: expected at least 2 with bidirectional=False, got 1"),
    (lambda: T5Bias(H, 32, 8), ValueError, "max_distance: expected more than the 8 exact buckets, got 8"),
    (lambda: ShawBias(H, 0), ValueError, "head_dim: expected at least 1, got 0"),
    (lambda: ShawBias(H, D, -1), ValueError, "max_distance: expected at least 1, got -1"),
    (lambda: TransformerXLBias(H, D, 7), ValueError, "embedding_dim: expected an even width, .* got 7"),
    (lambda: DeBERTaBias(H, D, terms="c2p"), ValueError, "terms: expected 'c2p', 'p2c' or both in a tuple, got 'c2p'"),
    (lambda: DeBERTaBias(H, D, terms=("p2p",)), ValueError, r"terms: expected .* got \('p2p',\)"),
    (lambda: DeBERTaBias(H, D, position_buckets=7), ValueError, "position_buckets: expected an even number or None, got 7"),
    (lambda: DeBERTaBias(H, D, None, 5, 8), ValueError, r"max_distance: expected more than position_buckets/2 \+ 1, got 5"),
    (lambda: T5Bias(H)(0), ValueError, "query: expected at least 1, got 0"),
    (lambda: T5Bias(H)("4"), TypeError, "query: expected an int, got str"),
    (lambda: T5Bias(H)(Q[0]), ValueError, r"query: expected four axes of sizes \(any, 3, any, any\), .* got \(3, 2, 4\)"),
    (lambda: T5Bias(4)(Q), ValueError, r"query: expected four axes of sizes \(any, 4, any, any\), .* got \(2, 3, 2, 4\)"),
    (lambda: ShawBias(H, 8)(Q), ValueError, r"query: expected four axes of sizes \(any, 3, any, 8\), .* got \(2, 3, 2, 4\)"),
    (lambda: ShawBias(H, D)(2), TypeError, "query: expected a Tensor of a floating dtype, got int"),
    (lambda: ShawBias(H, D)(Q.long()), TypeError, "query: expected a Tensor of a floating dtype, got torch.int64"),
    (lambda: ALiBi(H)(Q[:, :, :0], 4), ValueError, r"query: .* none empty; got \(2, 3, 0, 4\)"),
    (lambda: ALiBi(H)(Q, K[0]), ValueError, r"key: expected four axes .* got \(3, 5, 4\)"),
    (lambda: ALiBi(H)(Q, 0), ValueError, "key: expected at least 1, got 0"),
    (lambda: ALiBi(H)(Q, None, torch.tensor(1)), ValueError, "key: expected the keys or their number .* got None"),
    (lambda: DeBERTaBias(H, D)(Q), TypeError, "key: expected a Tensor of a floating dtype, got NoneType"),
    (
        lambda: DeBERTaBias(H, D)(Q, K[:1]),
        ValueError,
        r"key: expected four axes of sizes \(2, 3, any, 4\), .* got \(1, 3, 5, 4\)",
    ),
    (lambda: ALiBi(H)(Q, K, -1), ValueError, "offset: expected at least 0, got -1"),
    (lambda: ALiBi(H)(Q, K, 1.0), TypeError, "offset: expected an int or an integer Tensor, got float"),
    (lambda: ALiBi(H).score_mod(Q, K, torch.ones(2)), TypeError, "offset: expected dtype torch.int32 or .* got torch.float32"),
    (lambda: ALiBi(H)(Q, K, torch.ones(3).long()), ValueError, r"offset: expected shape \(\) or \(B,\), .* \(2\); got \(3,\)"),
    (lambda: ALiBi(H)(Q, K, torch.ones(2, 1).long()), ValueError, r"offset: expected shape .* got \(2, 1\)"),
    (lambda: ALiBi(H)(Q, K, torch.tensor(1).to("meta")), ValueError, "offset: expected device cpu, .* got meta"),
    (
        lambda: ShawBias(H, D, values=False).value_term(Q),
        ValueError,
        "values: expected a module made with values=True, got False",
    ),
    (lambda: ShawBias(H, D).value_term(Q[0]), ValueError, r"probabilities: expected four axes .* got \(3, 2, 4\)"),
    (lambda: ShawBias(H, D).value_term(None), TypeError, "probabilities: expected a Tensor of a floating dtype, got NoneType"),
    (lambda: TransformerXLBias(H, D, biases=False).queries(Q), ValueError, "biases: expected .* biases=True, got False"),
    (lambda: TransformerXLBias(H, D).queries(Q[..., :1]), ValueError, r"q: expected four axes .* got \(2, 3, 2, 1\)"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message for _, _, message in BAD])
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_repr_and_state():
    assert repr(T5Bias(8)) == "T5Bias(num_heads=8, num_buckets=32, max_distance=128, bidirectional=True)"
    assert next(iter(make("deberta-v1").state_dict())) == "weight" and not ALiBi(H).state_dict()
    assert set(make("shaw").state_dict()) == {"weight", "value_weight"}
    assert set(make("transformer-xl").state_dict()) == {"weight", "u", "v"}
