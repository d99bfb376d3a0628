"""Relative position biases of attention scores: T5, ALiBi, Shaw, Transformer-XL and DeBERTa, nn.Modules with one interface::

    bias = relative(query, key, offset)                       # (H, Tq, Tk) or (B, H, Tq, Tk), in query's dtype
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=relative.scale)

    mod = relative.score_mod(query, key, offset)              # for FlexAttention; avoids a (Tq, Tk) tensor where possible
    out = flex_attention(query, key, value, score_mod=mod, scale=relative.scale)

query: (B, H, Tq, d), as attention gets it (for Transformer-XL see its class), or Tq, an int, if the bias depends on lengths
alone (T5, ALiBi). key: (B, H, Tk, d), or Tk if the bias does not depend on it; None: offset + Tq. offset: the first query's
position (keys start at 0), so n in a decode step with n tokens in the KV cache; an int, a 0-d integer tensor (compiled
FlexAttention then compiles once for all steps) or (B,), one per sequence. The host reads no tensor. causal=True: −inf where the
key comes after the query. scale: attention's factor for query · key, None for the default 1/√d; it does not multiply the bias.
A bias has query's dtype; a score_mod adds in FlexAttention's (fp32), so it is more exact in half precision.

Tables, of any dtype, start from N(0, 0.02²), and gradients reach them both ways. Compiled FlexAttention has open bugs with
captured tensors that require gradients (pytorch#145208, #145869, #157677). On a CPU its query, key and value may not require
them, and torch 2.13 fails (invalid C++, or NaN) if a captured tensor has a dynamic size: compile with dynamic=False.
TypeError, ValueError: a wrong argument.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .buckets import deberta_bucket, t5_bucket
from .modes import refuse_scripting


class RelativeBias(nn.Module):
    """Interface, checks and causal mask. Subclasses define _dense and _term of (query, key, offset, Tq, Tk, device)."""

    scale: float | None = None
    head_dim: int | None = None  # None: the bias depends on lengths alone, not on the values of query and key
    reads_key = False
    _dense: Callable[..., Tensor]  # -> the bias without the causal mask
    _term: Callable[..., Callable[..., Tensor]]  # -> f(b, h, q, k, distance), the bias of one score
    __prepare_scriptable__ = refuse_scripting

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = _positive("num_heads", num_heads)

    def forward(
        self, query: Tensor | int, key: Tensor | int | None = None, offset: int | Tensor = 0, *, causal: bool = False
    ) -> Tensor:
        """The additive bias: (H, Tq, Tk), or (B, H, Tq, Tk) if it depends on query's values or offset is (B,)."""
        Tq, Tk, device = self._lengths(query, key, offset)
        bias = self._dense(query, key, offset, Tq, Tk, device)
        if causal:
            future = _toeplitz(_distances(offset, Tq, Tk, device), Tk) < 0
            bias = bias.masked_fill(future.unsqueeze(-3), float("-inf"))
        return bias

    def score_mod(
        self, query: Tensor | int, key: Tensor | int | None = None, offset: int | Tensor = 0, *, causal: bool = False
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
        """score_mod(score, b, h, q, k) for one call of flex_attention, with this query and key."""
        Tq, Tk, device = self._lengths(query, key, offset)
        term = self._term(query, key, offset, Tq, Tk, device)

        def add_bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            distance = q - k + (offset[b] if isinstance(offset, Tensor) and offset.dim() == 1 else offset)
            score = score + term(b, h, q, k, distance)
            return torch.where(distance < 0, float("-inf"), score) if causal else score

        return add_bias

    def _lengths(self, query, key, offset) -> tuple[int, int, torch.device]:
        """Checks the arguments -> Tq, Tk and the device."""
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

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in vars(self).items() if k[0] != "_" and k not in ("training", "reads_key"))


class T5Bias(RelativeBias):
    """A learned bias per head and bucket of distances: Raffel et al. 2020, "T5", section 2.1.

    weight: (num_buckets, num_heads), as Hugging Face's `relative_attention_bias.weight`. In each direction half of the buckets
    hold one distance each, the others logarithmically growing ranges up to max_distance tokens. bidirectional: for an encoder,
    where keys may come after the query; False: a decoder. scale is 1.0: T5 does not divide by √d. All layers share one module.
    """

    scale = 1.0

    def __init__(
        self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_heads)
        least = 4 if bidirectional else 2
        if _positive("num_buckets", num_buckets) < least:
            raise ValueError(f"num_buckets: expected at least {least} with bidirectional={bidirectional}, got {num_buckets}")
        exact = num_buckets // least
        if _positive("max_distance", max_distance) <= exact:
            raise ValueError(f"max_distance: expected more than the {exact} exact buckets, got {max_distance}")
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.weight = _table(num_buckets, num_heads, device=device, dtype=dtype)

    def _values(self, distance: Tensor) -> Tensor:
        """distance (..., R) -> biases (..., H, R)."""
        bucket = t5_bucket(distance, self.num_buckets, self.max_distance, self.bidirectional)
        return nn.functional.embedding(bucket, self.weight).transpose(-1, -2)

    def _dense(self, query, key, offset, Tq, Tk, device):
        return _toeplitz(self._values(_distances(offset, Tq, Tk, device)), Tk, query)

    def _term(self, query, key, offset, Tq, Tk, device):
        far = self.max_distance  # all greater distances are in the same bucket
        values = self._values(torch.arange(-far, far + 1, device=device))  # (H, 2·far + 1)
        return lambda b, h, q, k, distance: values[h, distance.clamp(-far, far) + far]


class ALiBi(RelativeBias):
    """−slope · |query position − key position|, with a fixed slope per head: Press et al. 2022. No parameters.

    Bloom adds slope · key position instead, which under a causal mask gives the same softmax. In a 16-bit bias distances above
    2^8 (bf16) or 2^11 (fp16) are rounded; in the score_mod they are not.
    """

    def _dense(self, query, key, offset, Tq, Tk, device):
        slopes, distance = alibi_slopes(self.num_heads, device), _distances(offset, Tq, Tk, device)
        return _toeplitz(slopes[:, None] * -distance.abs().unsqueeze(-2), Tk, query)

    def _term(self, query, key, offset, Tq, Tk, device):
        heads = self.num_heads
        return lambda b, h, q, k, distance: -_slope(h, heads) * distance.abs()


class ShawBias(RelativeBias):
    """query · a^K(clipped distance) / √head_dim, and a^V added to the values: Shaw et al. 2018, equations 3 and 4.

    weight: (2·max_distance + 1, head_dim), a^K for key position − query position = −max_distance … max_distance, shared by
    the heads (Wav2Vec2-BERT's `distance_embedding.weight`). value_weight: a^V, of the same shape; None if values=False.
    """

    def __init__(
        self, num_heads: int, head_dim: int, max_distance: int = 16, values: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_heads)
        self.head_dim, self.max_distance = _positive("head_dim", head_dim), _positive("max_distance", max_distance)
        self.scale = head_dim**-0.5
        self.weight, value_weight = (_table(2 * max_distance + 1, head_dim, device=device, dtype=dtype) for _ in range(2))
        self.register_parameter("value_weight", value_weight if values else None)

    def _rows(self, offset: int | Tensor, Tq: int, Tk: int, device: torch.device) -> Tensor:
        """(Tq, Tk) or (B, Tq, Tk): the row of weight and value_weight for each query and key."""
        far = self.max_distance
        return _toeplitz(far - _distances(offset, Tq, Tk, device).clamp(-far, far), Tk)

    def _dense(self, query, key, offset, Tq, Tk, device):
        return _gather(_project(query, self.scale, self.weight), self._rows(offset, Tq, Tk, device))

    def _term(self, query, key, offset, Tq, Tk, device):
        projected, far = _project(query, self.scale, self.weight), self.max_distance  # (B, H, Tq, 2·far + 1)
        return lambda b, h, q, k, distance: projected[b, h, q, far - distance.clamp(-far, far)]

    def value_term(self, probabilities: Tensor, offset: int | Tensor = 0) -> Tensor:
        """probabilities (B, H, Tq, Tk), the softmax of the scores -> (B, H, Tq, head_dim), to be added to attention's result.

        PyTorch's attention functions do not return the probabilities: the caller computes them. Summed in fp32.
        """
        if not isinstance(self.value_weight, Tensor):
            raise ValueError("values: expected a module made with values=True, got False")
        _check_heads("probabilities", probabilities, (None, self.num_heads, None, None))
        _check_offset(offset, probabilities, probabilities.device)
        rows = self._rows(offset, probabilities.shape[-2], probabilities.shape[-1], probabilities.device)
        exact = torch.promote_types(probabilities.dtype, torch.float32)
        summed = probabilities.new_zeros(*probabilities.shape[:-1], 2 * self.max_distance + 1, dtype=exact)
        summed = summed.scatter_add(-1, rows.unsqueeze(-3).expand_as(probabilities), probabilities.to(exact))
        return (summed @ self.value_weight.to(exact)).to(probabilities.dtype)


class TransformerXLBias(RelativeBias):
    """(q + v) · W r(distance) / √head_dim: Dai et al. 2019, section 3.3, terms b and d.

    Terms a and c are attention's (q + u) · k / √head_dim, so attention's query is q + u, and this module's q + v::

        query, position_query = relative.queries(q)           # q + u, q + v
        bias = relative(position_query, key, offset)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=relative.scale)

    biases=False: without u and v, for a projection that returns q + u and q + v. r: sines, then cosines, of distance ·
    10000^(−2i/embedding_dim), angles in float64. weight: W (num_heads · head_dim, embedding_dim), Hugging Face's
    `r_net.weight`; u, v: (num_heads, head_dim), its `r_w_bias` and `r_r_bias`. embedding_dim None: num_heads · head_dim.
    Bias and score_mod both allocate (B, H, Tq, Tq + Tk) scores of positions.
    """

    def __init__(
        self, num_heads: int, head_dim: int, embedding_dim: int | None = None, biases: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
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
        """q (B, H, Tq, head_dim) -> (q + u, q + v): attention's query and this module's."""
        if not isinstance(self.u, Tensor) or not isinstance(self.v, Tensor):
            raise ValueError("biases: expected a module made with biases=True, got False: the projection adds u and v")
        _check_heads("q", q, (None, self.num_heads, None, self.head_dim))
        return q + self.u.to(q.dtype).unsqueeze(-2), q + self.v.to(q.dtype).unsqueeze(-2)

    def _scores(self, query, offset, Tq, Tk, device):
        """(B, H, Tq, Tq + Tk): row i has the score of key j in column Tq − 1 − i + j; the last column is for _dense's shift."""
        exponent = -torch.arange(0, self.embedding_dim, 2, dtype=torch.float64, device=device) / self.embedding_dim
        angle = _distances(offset, Tq, Tk + 1, device).unsqueeze(-1) * 10_000.0**exponent
        r = torch.cat([angle.sin(), angle.cos()], -1).to(query.dtype)
        r = nn.functional.linear(r, self.weight.to(query.dtype)).unflatten(-1, (self.num_heads, self.head_dim))
        return _project(query, self.scale, r.transpose(-2, -3))

    def _dense(self, query, key, offset, Tq, Tk, device):
        flat, width = self._scores(query, offset, Tq, Tk, device).flatten(-2), Tq + Tk - 1
        return flat[..., Tq - 1 : Tq - 1 + Tq * width].unflatten(-1, (Tq, width))[..., :Tk]  # the paper's relative shift

    def _term(self, query, key, offset, Tq, Tk, device):
        scores = self._scores(query, offset, Tq, Tk, device)
        return lambda b, h, q, k, distance: scores[b, h, q, Tq - 1 - q + k]


class DeBERTaBias(RelativeBias):
    """Content-to-position and position-to-content terms, q · Kr + k · Qr: He et al. 2021, "DeBERTa", equation 4.

    weight: (2·span, embedding_dim), Hugging Face's `rel_embeddings.weight`; Kr = pos_key_proj(weight), Qr =
    pos_query_proj(weight), both at row clamp(span + b(query position − key position), 0, 2·span − 1). (In the paper Qr is at
    the opposite distance; this follows Hugging Face's code, which runs the published weights.) position_buckets=None (v1):
    b(x) = x, span = max_distance; else (v2, v3: 256, max_distance 512) b is logarithmic from position_buckets/2 tokens to
    max_distance, span = position_buckets. terms: "c2p", "p2c" or both. norm: LayerNorm of weight's rows (v2, v3;
    `encoder.LayerNorm`). scale and bias include 1/√(d·(1 + number of terms)): pass scale to attention. To share a model's
    modules, assign pos_key_proj, pos_query_proj (v1: pos_proj, pos_q_proj; share_att_key: key_proj, query_proj), norm, weight.
    """

    def __init__(
        self, num_heads: int, head_dim: int, embedding_dim: int | None = None, max_distance: int = 512,
        position_buckets: int | None = None, terms: tuple[str, ...] = ("c2p", "p2c"), norm: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
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

        embedding_dim = num_heads * head_dim if embedding_dim is None else _positive("embedding_dim", embedding_dim)
        self.weight = _table(2 * self.span, embedding_dim, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(embedding_dim, 1e-7, device=device, dtype=dtype) if norm else None
        for term, name in (("c2p", "pos_key_proj"), ("p2c", "pos_query_proj")):
            linear = nn.Linear(embedding_dim, num_heads * head_dim, device=device, dtype=dtype) if term in terms else None
            self.register_module(name, linear)

    def _row(self, distance):
        if self.position_buckets is not None:
            distance = deberta_bucket(distance, self.position_buckets, self.max_distance)
        return (distance + self.span).clamp(0, 2 * self.span - 1)

    def _scores(self, content, linear):
        """content (B, H, T, d) · linear(weight) -> (B, H, T, 2·span); None if linear is None: not one of the terms."""
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
        far = 2 * self.max_distance  # all greater distances take the first or the last row
        rows = self._row(torch.arange(-far, far + 1, device=device))

        def term(b, h, q, k, distance):
            row = rows[distance.clamp(-far, far) + far]
            content = 0 if c2p is None else c2p[b, h, q, row]
            return content if p2c is None else content + p2c[b, h, k, row]

        return term


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """(num_heads,) float32: 2^(−8·(h+1)/n) for the first n heads, where n is the largest power of two up to num_heads; the
    others take every second slope of 2n heads, 2^(−8·(2j+1)/2n) for j = 0, 1, …, as in Press et al.'s code and Bloom."""
    return _slope(torch.arange(_positive("num_heads", num_heads), device=device), num_heads)


def _slope(head, num_heads):
    n = 2 ** (num_heads.bit_length() - 1)
    return torch.exp2(torch.where(head < n, 2 * head + 2, 2 * (head - n) + 1).to(torch.float32) * (-4 / n))


def _distances(offset, Tq, Tk, device):
    """(Tq + Tk − 1,), or (B, Tq + Tk − 1) for offset (B,): all values of query position − key position, descending."""
    if isinstance(offset, Tensor):
        return offset.unsqueeze(-1) + torch.arange(Tq - 1, -Tk, -1, device=device)
    return torch.arange(offset + Tq - 1, offset - Tk, -1, device=device)


def _toeplitz(values, Tk, query=None):
    """values (..., Tq + Tk − 1), one per element of _distances -> (..., Tq, Tk), in query's dtype if that is a Tensor."""
    return (values.to(query.dtype) if isinstance(query, Tensor) else values).unfold(-1, Tk, 1).flip(-2)


def _project(content, scale, table):
    """content (B, H, T, d), table (R, d), (H, R, d) or (B, H, R, d) -> scale · content · tableᵀ (B, H, T, R)."""
    return (content * scale) @ table.to(content.dtype).transpose(-1, -2)


def _gather(scores, rows):
    """scores (B, H, T, R), rows (T, S) or (B, T, S) -> scores[b, h, t, rows[b, t, s]] (B, H, T, S)."""
    return scores.gather(-1, rows.unsqueeze(-3).expand(*scores.shape[:-1], -1))


def _table(*size: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(size, device=device, dtype=dtype), std=0.02))


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def _check_heads(name, tensor, shape):
    """shape: the expected sizes, None for any. Only the first axis may be empty."""
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
