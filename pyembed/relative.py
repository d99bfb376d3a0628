"""Relative positions, which act on attention scores: T5, ALiBi, Shaw, Transformer-XL and DeBERTa, for PyTorch's attention.

Each is an nn.Module with one interface. `offset` is the position of the first query and keys start at 0, so that a decode step
over a KV cache of n tokens has offset n::

    bias = relative(query, key, offset)                       # (H, Tq, Tk) or (B, H, Tq, Tk), in query's dtype
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=relative.scale)

    mod = relative.score_mod(query, key, offset)              # the same by FlexAttention; no (Tq, Tk) tensor where avoidable
    out = flex_attention(query, key, value, score_mod=mod, scale=relative.scale)

query: (B, H, Tq, d), as attention gets it (Transformer-XL differs: see there). key: (B, H, Tk, d), or only Tk, an int, where
its content does not count; None: offset + Tq. Where query's does not count either (T5, ALiBi), it may be an int, Tq. offset: an
int, a 0-d integer tensor (compiled FlexAttention then compiles once for all steps) or (B,), one for each row; no tensor is read
by the host. causal=True: −inf where the key comes after the query. scale: what attention multiplies query · key by, None its
default 1/√d; it never multiplies the bias. A bias comes in query's dtype from tables of any, a score_mod adds to scores of
whatever dtype FlexAttention has (fp32), so in half precision it is the more exact.

Tables start from N(0, 0.02²) and gradients reach them both ways. Compiled FlexAttention has open bugs with captured tensors
that want gradients (pytorch#145208, #145869, #157677). On a CPU its query, key and value may not want them, and torch 2.13 errs
(no C++, or NaN) where a captured tensor's size is dynamic: compile it with dynamic=False. A wrong argument raises TypeError or
ValueError that names it, what was expected and what came.
"""

import math

import torch
from torch import Tensor, nn


class RelativeBias(nn.Module):
    """The interface, and what the kinds share. A kind defines _dense and _term."""

    scale: float | None = None
    head_dim: int | None = None  # None: only lengths count, not what query and key hold
    reads_key = False

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = _positive("num_heads", num_heads)

    def forward(self, query: Tensor | int, key: Tensor | int | None = None, offset: int | Tensor = 0, *, causal: bool = False):
        """The additive bias: (H, Tq, Tk), or (B, H, Tq, Tk) where query's content counts or offset is (B,)."""
        Tq, Tk, device = self._lengths(query, key, offset)
        bias = self._dense(query, key, offset, Tq, Tk, device)
        if causal:
            future = _toeplitz(_distances(offset, Tq, Tk, device), Tk) < 0
            bias = bias.masked_fill(future.unsqueeze(-3), float("-inf"))
        return bias

    def score_mod(self, query: Tensor | int, key: Tensor | int | None = None, offset: int | Tensor = 0, *, causal=False):
        """score_mod(score, b, h, q, k) for flex_attention over this query and this key: a new one for each call of it."""
        Tq, Tk, device = self._lengths(query, key, offset)
        term = self._term(query, key, offset, Tq, Tk, device)
        per_row = isinstance(offset, Tensor) and offset.dim() == 1

        def add_bias(score, b, h, q, k):
            distance = q - k + (offset[b] if per_row else offset)
            score = score + term(b, h, q, k, distance)
            return torch.where(distance < 0, float("-inf"), score) if causal else score

        return add_bias

    def _lengths(self, query, key, offset):
        """Tq, Tk and the device, all arguments checked."""
        shape = (None, self.num_heads, None, self.head_dim)
        if isinstance(query, Tensor) or self.head_dim is not None:
            _check_heads("query", query, shape)
            Tq, device = query.shape[-2], query.device
        else:
            homes = [*self.parameters(), offset if isinstance(offset, Tensor) else torch.empty(0)]
            Tq, device = _positive("query", query), homes[0].device
        _check_offset(offset, query, device)
        if isinstance(key, Tensor) or self.reads_key:
            _check_heads("key", key, (query.shape[0], *shape[1:]) if self.reads_key else (None,) * 4)
            Tk = key.shape[-2]
        elif key is not None:
            Tk = _positive("key", key)
        elif isinstance(offset, Tensor):
            raise ValueError("key: expected the keys or their number where offset is a Tensor, which is not read; got None")
        else:
            Tk = offset + Tq
        return Tq, Tk, device

    def extra_repr(self):
        return ", ".join(f"{k}={v}" for k, v in vars(self).items() if k[0] != "_" and k not in ("training", "reads_key"))


class T5Bias(RelativeBias):
    """A learned bias for each head and bucket of the distance: Raffel et al. 2020, "T5", section 2.1.

    weight: (num_buckets, num_heads), as Hugging Face's `relative_attention_bias.weight`. Half of a direction's buckets are
    exact, the others grow as the logarithm up to max_distance tokens. bidirectional: an encoder, whose keys may come after the
    query; False: a decoder. scale is T5's, which does not divide by √d: 1.0. One module serves all layers.
    """

    scale = 1.0

    def __init__(self, num_heads, num_buckets=32, max_distance=128, bidirectional=True, device=None, dtype=None):
        super().__init__(num_heads)
        least = 4 if bidirectional else 2
        if _positive("num_buckets", num_buckets) < least:
            raise ValueError(f"num_buckets: expected at least {least} with bidirectional={bidirectional}, got {num_buckets}")
        exact = num_buckets // least
        if _positive("max_distance", max_distance) <= exact:
            raise ValueError(f"max_distance: expected more than the {exact} exact buckets, got {max_distance}")
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.weight = _table(num_buckets, num_heads, device=device, dtype=dtype)

    def _values(self, distance):
        """distance (..., R) -> (..., H, R)."""
        bucket = t5_bucket(distance, self.num_buckets, self.max_distance, self.bidirectional)
        return nn.functional.embedding(bucket, self.weight).transpose(-1, -2)

    def _dense(self, query, key, offset, Tq, Tk, device):
        return _toeplitz(self._values(_distances(offset, Tq, Tk, device)), Tk, query)

    def _term(self, query, key, offset, Tq, Tk, device):
        far = self.max_distance  # and beyond: one bucket
        values = self._values(torch.arange(-far, far + 1, device=device))  # (H, 2·far + 1)
        return lambda b, h, q, k, distance: values[h, distance.clamp(-far, far) + far]


class ALiBi(RelativeBias):
    """−slope · |query position − key position|, a fixed slope for each head: Press et al. 2022. No parameters.

    Bloom adds slope · key position instead: the same after softmax, under a causal mask. A 16-bit bias rounds distances
    beyond 2^8 (bf16) or 2^11 (fp16); the score_mod does not.
    """

    def _dense(self, query, key, offset, Tq, Tk, device):
        slopes, distance = alibi_slopes(self.num_heads, device), _distances(offset, Tq, Tk, device)
        return _toeplitz(slopes[:, None] * -distance.abs().unsqueeze(-2), Tk, query)

    def _term(self, query, key, offset, Tq, Tk, device):
        heads = self.num_heads
        return lambda b, h, q, k, distance: -_slope(h, heads) * distance.abs()


class ShawBias(RelativeBias):
    """query · a^K(clipped distance) / √head_dim, and the like for values: Shaw et al. 2018, equations 3 and 4.

    weight: (2·max_distance + 1, head_dim), a^K for key position − query position = −max_distance … max_distance, shared by
    the heads (Wav2Vec2-BERT's `distance_embedding.weight`). value_weight: a^V, alike, or None where values=False.
    """

    def __init__(self, num_heads, head_dim, max_distance=16, values=True, device=None, dtype=None):
        super().__init__(num_heads)
        self.head_dim, self.max_distance = _positive("head_dim", head_dim), _positive("max_distance", max_distance)
        self.scale = head_dim**-0.5
        self.weight, value_weight = (_table(2 * max_distance + 1, head_dim, device=device, dtype=dtype) for _ in range(2))
        self.register_parameter("value_weight", value_weight if values else None)

    def _rows(self, offset, Tq, Tk, device):
        """(Tq, Tk) or (B, Tq, Tk): each pair's row of the tables."""
        far = self.max_distance
        return _toeplitz(far - _distances(offset, Tq, Tk, device).clamp(-far, far), Tk)

    def _dense(self, query, key, offset, Tq, Tk, device):
        return _gather(_project(query, self.scale, self.weight), self._rows(offset, Tq, Tk, device))

    def _term(self, query, key, offset, Tq, Tk, device):
        projected, far = _project(query, self.scale, self.weight), self.max_distance  # (B, H, Tq, 2·far + 1)
        return lambda b, h, q, k, distance: projected[b, h, q, far - distance.clamp(-far, far)]

    def value_term(self, probabilities: Tensor, offset: int | Tensor = 0) -> Tensor:
        """probabilities (B, H, Tq, Tk), softmax of the scores -> (B, H, Tq, head_dim): what a^V adds to attention's result.

        PyTorch's attention does not return its probabilities, so this part needs them computed in the open. Summed in fp32.
        """
        if self.value_weight is None:
            raise ValueError("values: expected a module made with values=True, got False")
        _check_heads("probabilities", probabilities, (None, self.num_heads, None, None))
        _check_offset(offset, probabilities, probabilities.device)
        rows = self._rows(offset, *probabilities.shape[-2:], probabilities.device)
        exact = torch.promote_types(probabilities.dtype, torch.float32)
        summed = probabilities.new_zeros(*probabilities.shape[:-1], 2 * self.max_distance + 1, dtype=exact)
        summed = summed.scatter_add(-1, _to_heads(rows).expand_as(probabilities), probabilities.to(exact))
        return (summed @ self.value_weight.to(exact)).to(probabilities.dtype)


class TransformerXLBias(RelativeBias):
    """(q + v) · W r(distance), beside attention's own (q + u) · k: Dai et al. 2019, section 3.3, terms b and d.

    The score is ((q + u) · k + (q + v) · W r)/√head_dim: attention gets q + u as its query, this module q + v as its::

        query, position_query = relative.queries(q)           # q + u, q + v
        bias = relative(position_query, key, offset)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=relative.scale)

    biases=False: no u and v here, for a projection that hands out q + u and q + v. r is sines then cosines of distance ·
    10000^(−2i/embedding_dim), angles in float64. weight: W (num_heads · head_dim, embedding_dim), Hugging Face's
    `r_net.weight`; u, v: (num_heads, head_dim), its `r_w_bias` and `r_r_bias`. embedding_dim: num_heads · head_dim where None.
    Both ways hold (B, H, Tq, Tq + Tk) of position scores.
    """

    def __init__(self, num_heads, head_dim, embedding_dim=None, biases=True, device=None, dtype=None):
        super().__init__(num_heads)
        self.head_dim = _positive("head_dim", head_dim)
        self.embedding_dim = num_heads * head_dim if embedding_dim is None else embedding_dim
        if _positive("embedding_dim", self.embedding_dim) % 2:
            raise ValueError(f"embedding_dim: expected an even width, as many sines as cosines; got {self.embedding_dim}")
        self.scale = head_dim**-0.5
        self.weight = _table(num_heads * head_dim, self.embedding_dim, device=device, dtype=dtype)
        for name in "uv":
            self.register_parameter(name, _table(num_heads, head_dim, device=device, dtype=dtype) if biases else None)

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, H, Tq, head_dim) -> (q + u, q + v): attention's query, and this module's."""
        if self.u is None:
            raise ValueError("biases: expected a module made with biases=True, got False: the projection adds u and v")
        _check_heads("q", q, (None, self.num_heads, None, self.head_dim))
        return q + self.u.to(q.dtype).unsqueeze(-2), q + self.v.to(q.dtype).unsqueeze(-2)

    def _scores(self, query, offset, Tq, Tk, device):
        """(B, H, Tq, Tq + Tk): in row i, the score of key j is in column Tq − 1 − i + j."""
        r = _sinusoid(_distances(offset, Tq, Tk + 1, device), self.embedding_dim).to(query.dtype)  # one column more to shift
        r = nn.functional.linear(r, self.weight.to(query.dtype)).unflatten(-1, (self.num_heads, self.head_dim))
        return _project(query, self.scale, r.transpose(-2, -3))

    def _dense(self, query, key, offset, Tq, Tk, device):
        flat, width = self._scores(query, offset, Tq, Tk, device).flatten(-2), Tq + Tk - 1
        return flat[..., Tq - 1 : Tq - 1 + Tq * width].unflatten(-1, (Tq, width))[..., :Tk]  # the paper's relative shift

    def _term(self, query, key, offset, Tq, Tk, device):
        scores = self._scores(query, offset, Tq, Tk, device)
        return lambda b, h, q, k, distance: scores[b, h, q, Tq - 1 - q + k]


class DeBERTaBias(RelativeBias):
    """Content to position and position to content, q · Kr + k · Qr: He et al. 2021, "DeBERTa", equation 4.

    weight: (2·span, embedding_dim), Hugging Face's `rel_embeddings.weight`; Kr = pos_key_proj(weight), Qr =
    pos_query_proj(weight), both at row clamp(span + b(query position − key position), 0, 2·span − 1). (The paper has Qr at
    the opposite distance; Hugging Face's code, and so the weights that it runs, are as here.) position_buckets=None: b(x) = x,
    span = max_distance (v1); else b is logarithmic from position_buckets/2 tokens to max_distance, span = position_buckets
    (v2, v3: 256 and 512). terms: "c2p", "p2c" or both. norm: LayerNorm over weight's rows (v2, v3; `encoder.LayerNorm`).
    scale and the bias divide by √(d·(1 + the number of terms)): pass scale on. To share a model's modules, set them:
    pos_key_proj, pos_query_proj (v1: pos_proj, pos_q_proj; share_att_key: key_proj, query_proj), norm, weight.
    """

    def __init__(
        self, num_heads, head_dim, embedding_dim=None, max_distance=512, position_buckets=None, terms=("c2p", "p2c"),
        norm=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__(num_heads)
        self.head_dim, self.max_distance = _positive("head_dim", head_dim), _positive("max_distance", max_distance)
        if isinstance(terms, str) or not terms or not set(terms) <= {"c2p", "p2c"} or len(set(terms)) < len(terms):
            raise ValueError(f"terms: expected 'c2p', 'p2c' or both in a tuple, got {terms!r}")
        if position_buckets is not None:
            if _positive("position_buckets", position_buckets) % 2:
                raise ValueError(f"position_buckets: expected an even number or None, got {position_buckets}")
            if max_distance <= position_buckets // 2 + 1:
                raise ValueError(f"max_distance: expected more than position_buckets/2 + 1, got {max_distance}")
        self.position_buckets, self.terms, self.reads_key = position_buckets, tuple(terms), "p2c" in terms
        self.span = max_distance if position_buckets is None else position_buckets
        self.scale = (head_dim * (1 + len(terms))) ** -0.5
        factory = {"device": device, "dtype": dtype}
        embedding_dim = num_heads * head_dim if embedding_dim is None else _positive("embedding_dim", embedding_dim)
        self.weight = _table(2 * self.span, embedding_dim, **factory)
        self.norm = nn.LayerNorm(embedding_dim, 1e-7, **factory) if norm else None
        for term, name in (("c2p", "pos_key_proj"), ("p2c", "pos_query_proj")):
            self.register_module(name, nn.Linear(embedding_dim, num_heads * head_dim, **factory) if term in terms else None)

    def _row(self, distance):
        if self.position_buckets is not None:
            distance = deberta_bucket(distance, self.position_buckets, self.max_distance)
        return (distance + self.span).clamp(0, 2 * self.span - 1)

    def _scores(self, content, linear):
        """content (B, H, T, d) · linear(weight) -> (B, H, T, 2·span); None without this term."""
        if linear is None:
            return None
        rows = linear(self.weight if self.norm is None else self.norm(self.weight))
        return _project(content, self.scale, rows.unflatten(-1, (self.num_heads, self.head_dim)).transpose(0, 1))

    def _dense(self, query, key, offset, Tq, Tk, device):
        rows = _toeplitz(self._row(_distances(offset, Tq, Tk, device)), Tk)
        c2p, p2c = self._scores(query, self.pos_key_proj), self._scores(key, self.pos_query_proj)
        content = 0 if c2p is None else _gather(c2p, rows)
        return content if p2c is None else content + _gather(p2c, rows.transpose(-1, -2)).transpose(-1, -2)

    def _term(self, query, key, offset, Tq, Tk, device):
        c2p, p2c = self._scores(query, self.pos_key_proj), self._scores(key, self.pos_query_proj)
        far = 2 * self.max_distance  # and beyond: the first or the last row
        rows = self._row(torch.arange(-far, far + 1, device=device))

        def term(b, h, q, k, distance):
            row = rows[distance.clamp(-far, far) + far]
            content = 0 if c2p is None else c2p[b, h, q, row]
            return content if p2c is None else content + p2c[b, h, k, row]

        return term


def t5_bucket(distance: Tensor, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> Tensor:
    """distance = query position − key position, integer (...) -> T5's bucket (...) int64; logarithm in fp32, as usual."""
    distance = distance.long()
    if bidirectional:
        num_buckets //= 2
        first, distance = (distance < 0).long() * num_buckets, distance.abs()
    else:
        first, distance = 0, distance.clamp(min=0)
    exact = num_buckets // 2
    logarithm = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    far = (exact + (logarithm * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


def deberta_bucket(distance: Tensor, position_buckets: int, max_distance: int) -> Tensor:
    """distance = query position − key position, integer (...) -> DeBERTa-v2's signed bucket (...) int64; logarithm in fp32."""
    exact = position_buckets // 2
    ends = torch.tensor((max_distance - 1) / exact, dtype=torch.float32, device="cpu").log()
    logarithm = torch.log(distance.abs().clamp(min=exact).float() / exact) / ends
    far = torch.ceil(logarithm * (exact - 1)).long() + exact
    return torch.where(distance.abs() <= exact, distance, far * distance.sign())


def alibi_slopes(num_heads: int, device=None) -> Tensor:
    """(num_heads,) float32: 2^(−8·(h+1)/n) for the first n heads, n the greatest power of two that is not above num_heads;
    for the others the slopes of 2n heads that are missing between them, as in Press et al.'s code and Bloom."""
    return _slope(torch.arange(_positive("num_heads", num_heads), device=device), num_heads)


def _slope(head, num_heads):
    n = 2 ** (num_heads.bit_length() - 1)
    return torch.exp2(torch.where(head < n, 2 * head + 2, 2 * (head - n) + 1).to(torch.float32) * (-4 / n))


def _distances(offset, Tq, Tk, device):
    """(Tq + Tk − 1,), or (B, Tq + Tk − 1) for offset (B,): query position − key position, from the greatest downwards."""
    if isinstance(offset, Tensor):
        return offset.unsqueeze(-1) + torch.arange(Tq - 1, -Tk, -1, device=device)
    return torch.arange(offset + Tq - 1, offset - Tk, -1, device=device)


def _toeplitz(values, Tk, query=None):
    """values (..., Tq + Tk − 1), one for each of _distances -> (..., Tq, Tk), in query's dtype where it is a Tensor."""
    values = values.to(query.dtype) if isinstance(query, Tensor) else values
    return values.unfold(-1, Tk, 1).flip(-2)


def _sinusoid(distance, width):
    """(...,) -> (..., width) float64: sines, then cosines."""
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=distance.device) / width)
    angle = distance.unsqueeze(-1) * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


def _project(content, scale, table):
    """content (B, H, T, d), table (R, d), (H, R, d) or (B, H, R, d) -> scale · content · tableᵀ (B, H, T, R)."""
    return (content * scale) @ table.to(content.dtype).transpose(-1, -2)


def _to_heads(rows):
    """(T, S) or (B, T, S) -> (1 or B, 1, T, S)."""
    return rows.reshape(-1, 1, *rows.shape[-2:])


def _gather(scores, rows):
    """scores (B, H, T, R), rows (T, S) or (B, T, S) -> (B, H, T, S)."""
    return scores.gather(-1, _to_heads(rows).expand(*scores.shape[:-1], -1))


def _table(*size, device=None, dtype=None):
    return nn.Parameter(nn.init.normal_(torch.empty(size, device=device, dtype=dtype), std=0.02))


def _positive(name, value):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def _check_heads(name, tensor, shape):
    """shape holds None where any size from 1 on will do."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a Tensor of a floating dtype, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    if tensor.dim() != 4 or 0 in tensor.shape[1:] or any(w not in (None, g) for w, g in zip(shape, tensor.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected four axes of sizes ({wanted}), none empty; got {tuple(tensor.shape)}")


def _check_offset(offset, query, device):
    if not isinstance(offset, Tensor):
        if isinstance(offset, bool) or not isinstance(offset, int):
            raise TypeError(f"offset: expected an int or an integer Tensor, got {type(offset).__name__}")
        if offset < 0:
            raise ValueError(f"offset: expected at least 0, got {offset}")
        return
    if offset.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offset: expected dtype torch.int32 or torch.int64, got {offset.dtype}")
    batch = query.shape[0] if isinstance(query, Tensor) else None
    if offset.dim() > 1 or offset.dim() == 1 and batch not in (None, offset.shape[0]):
        raise ValueError(f"offset: expected shape () or (B,), the batch of query ({batch}); got {tuple(offset.shape)}")
    if offset.device != device:
        raise ValueError(f"offset: expected device {device}, that of query; got {offset.device}")
