"""Position tables, against the formulas of their papers and frameworks; position ids, against loops."""

import importlib
import math

import numpy as np
import pytest
import torch

import pyembed
from pyembed import functional, positions

WIDTHS = [1, 2, 3, 7, 64]
LENGTHS = [3, 0, 0, 1, 5, 0]
CU_SEQLENS = [0, 3, 3, 3, 4, 9, 9]
PACKED = [0, 1, 2, 0, 0, 1, 2, 3, 4]
IDS = torch.tensor([[1, 4, 9], [7, 3, 1]])


def interleaved(t, j, D):
    """PE(t, 2i) = sin(t / 10000^(2i/D)), PE(t, 2i+1) = cos(t / 10000^(2i/D)): Vaswani et al. 2017, section 3.5."""
    return (math.cos if j % 2 else math.sin)(t / 10000 ** (2 * (j // 2) / D))


def fairseq(t, j, D):
    """sin, then cos, of t·exp(−i·log(10000) / (half − 1)), then a zero: fairseq/modules/sinusoidal_positional_embedding.py."""
    half = D // 2
    if j == 2 * half:
        return 0.0
    step = math.log(10000) / (half - 1) if half > 1 else 0.0
    return math.sin(t * math.exp(-j * step)) if j < half else math.cos(t * math.exp(-(j - half) * step))


def marian(t, j, D):
    """XLM's columns, the even ones first: MarianSinusoidalPositionalEmbedding."""
    return interleaved(t, [*range(0, D, 2), *range(1, D, 2)][j], D)


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("formula", [interleaved, fairseq, marian])
def test_tables_are_their_formulas(formula, D):
    """Far positions too: in float32 the angle of position 100,000 would be off by 4e-3."""
    table = positions.sinusoidal_table(100_001, D, convention=formula.__name__)
    assert table.shape == (100_001, D) and table.dtype == torch.float32 and table.is_contiguous()
    assert table.min() >= -1 and table.max() <= 1
    for t in (0, 1, 17, 4999, 100_000):
        assert table[t].tolist() == pytest.approx([formula(t, j, D) for j in range(D)], abs=1e-7)


def test_base():
    assert positions.sinusoidal_table(6, 4, base=100.0)[5].tolist() == pytest.approx(
        [math.sin(5), math.cos(5), math.sin(0.5), math.cos(0.5)]
    )
    last = math.sin(5 / 100)
    assert positions.sinusoidal_table(6, 4, 100.0, "fairseq")[5, 1].item() == pytest.approx(last)
    assert positions.Sinusoidal(6, 4, "fairseq", 100.0).weight[5, 1].item() == pytest.approx(last)


@pytest.mark.parametrize("padding_idx", [0, 1, -1])
@pytest.mark.parametrize("convention", positions.CONVENTIONS)
def test_the_padding_row_alone_is_zero(convention, padding_idx):
    full = positions.sinusoidal_table(5, 7, convention=convention)
    table = positions.sinusoidal_table(5, 7, convention=convention, padding_idx=padding_idx)
    full[padding_idx] = 0
    assert torch.equal(table, full)


@pytest.mark.parametrize("D", WIDTHS)
def test_tables_are_those_of_transformers(D):
    """Its float32 angles (M2M100) differ by some of their last digits."""
    pytest.importorskip("transformers")
    from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    distilbert = create_sinusoidal_embeddings(40, D, torch.empty(40, D))
    torch.testing.assert_close(positions.sinusoidal_table(40, D), distilbert, atol=1e-7, rtol=0)
    torch.testing.assert_close(
        positions.sinusoidal_table(40, D, convention="marian"),
        MarianSinusoidalPositionalEmbedding(40, D).create_weight(), atol=1e-7, rtol=0,
    )  # fmt: skip
    if D in (2, 3):
        with pytest.raises(ZeroDivisionError):
            M2M100SinusoidalPositionalEmbedding.get_embedding(40, D)
        return
    for padding_idx in (None, 1):
        ours = positions.sinusoidal_table(40, D, convention="fairseq", padding_idx=padding_idx)
        theirs = M2M100SinusoidalPositionalEmbedding.get_embedding(40, D, padding_idx)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["sinusoidal", *(f"sinusoidal:{c}" for c in positions.CONVENTIONS)])
def test_sinusoidal_kinds(kind):
    fixed = positions.make(kind, 5, 7, dtype=torch.float16)
    convention = kind.partition(":")[2] or "interleaved"
    assert torch.equal(fixed.weight, positions.sinusoidal_table(5, 7, convention=convention).half())
    assert not fixed.state_dict() and not list(fixed.parameters()) and "weight" in dict(fixed.named_buffers())
    assert torch.equal(fixed(torch.tensor([[3]])), fixed.weight[None, 3:4])
    assert repr(fixed) == f"Sinusoidal(5, 7, convention={convention!r})"


def test_other_kinds():
    assert positions.make(None, 4, 2) is None
    learned = positions.make("learned", 4, 2, dtype=torch.float64)
    assert type(learned) is torch.nn.Embedding and learned.weight.shape == (4, 2) and learned.weight.dtype == torch.float64


def test_sums_are_right():
    token, position = torch.tensor([[9.0, 9.0, 9.0], [0.5, -0.2, 0.1]]), torch.tensor([[0.1, 0.3, -0.1]])
    torch.testing.assert_close(functional.embed(torch.tensor([1]), token, position), torch.tensor([[0.6, 0.1, 0.0]]))


@pytest.mark.parametrize("convention", positions.CONVENTIONS)
def test_a_position_has_one_row_whatever_the_length(convention):
    front = pyembed.TokenPositionEmbedding(3, 8, 64, position=f"sinusoidal:{convention}")
    short, long = (front(torch.zeros(2, T, dtype=torch.int64)) for T in (5, 64))
    assert torch.equal(short, long[:, :5])
    shorter, longer = (positions.sinusoidal_table(L, 8, convention=convention) for L in (5, 64))
    assert torch.equal(shorter, longer[:5])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
def test_attention_mask_counts_tokens(dtype):
    rows = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]]
    mask = torch.tensor(rows, dtype=dtype)
    found = positions.from_attention_mask(mask)
    assert found.dtype == torch.int64
    assert found.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 2]]
    # transformers/generation/utils.py
    assert torch.equal(found, (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0))
    assert torch.equal(positions.from_attention_mask(mask.t().contiguous().t()), found)
    assert positions.from_attention_mask(mask[:, :0]).shape == (5, 0)


def test_left_padding_gives_what_the_sequence_alone_gives():
    front = pyembed.TokenPositionEmbedding(11, 8, 16)
    ids, mask = torch.tensor([[0, 0, 0, 5, 6]]), torch.tensor([[0, 0, 0, 1, 1]])
    assert torch.equal(front(ids, positions.from_attention_mask(mask))[:, 3:], front(ids[:, 3:]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_positions_are_those_of_the_sequences(dtype):
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=dtype)
    found = positions.from_cu_seqlens(cu_seqlens, 9)
    assert found.dtype == torch.int64 and found.tolist() == [t for length in LENGTHS for t in range(length)] == PACKED
    spread = cu_seqlens.repeat_interleave(2)[::2]
    assert not spread.is_contiguous() and torch.equal(positions.from_cu_seqlens(spread, np.int64(9)), found)
    assert positions.from_cu_seqlens(torch.tensor([0, 0, 4]), 4).tolist() == [0, 1, 2, 3]
    for none in ([0], [0, 0, 0]):
        assert positions.from_cu_seqlens(torch.tensor(none, dtype=dtype), 0).shape == (0,)
    front, ids = pyembed.TokenPositionEmbedding(11, 8, 16), torch.randint(11, (9,))
    assert torch.equal(front(ids, found), torch.cat([front(part) for part in ids.split(LENGTHS)]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets(dtype):
    for offset in (7, torch.tensor(7, dtype=dtype)):
        found = positions.from_offset(offset, 3)
        assert found.dtype == torch.int64 and found.tolist() == [7, 8, 9]
    found = positions.from_offset(torch.tensor([0, 41, 7], dtype=dtype), 2)
    assert found.dtype == torch.int64 and found.tolist() == [[0, 1], [41, 42], [7, 8]]
    assert positions.from_offset(0, 0).shape == (0,) and positions.from_offset(torch.tensor([3]), 0).shape == (1, 0)
    front, ids = pyembed.TokenPositionEmbedding(11, 8, 16), torch.randint(11, (2, 6))
    step = front(ids[:, 4:], positions.from_offset(torch.tensor([4, 4], dtype=dtype), 2))
    assert torch.equal(step, front(ids)[:, 4:])


TRANSFORMERS = ["roberta", "xlm_roberta", "camembert", "longformer", "mpnet", "m2m_100"]


def transformers_positions(model, ids, padding_idx, offset):
    """As transformers' model of that name counts; it numbers the tokens before these for some of them only."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    owners = (owner for owner in (module, *vars(module).values()) if hasattr(owner, "create_position_ids_from_input_ids"))
    function = next(owners).create_position_ids_from_input_ids
    return function(ids, padding_idx, *([offset] if offset else []))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("padding_idx", [0, 1, 5])
@pytest.mark.parametrize("model", TRANSFORMERS)
def test_positions_of_ids_are_those_of_transformers(model, padding_idx, dtype):
    pytest.importorskip("transformers")
    ids = torch.randint(7, (5, 11), dtype=dtype)
    ids[0, 6:], ids[1, :4], ids[2], ids[3, 2:5] = [padding_idx] * 4
    ids[4] = ids[4].clamp(min=padding_idx + 1)
    for offset in (0, 3) if model not in ("longformer", "mpnet") else (0,):
        expected = transformers_positions(model, ids, padding_idx, offset)
        found = positions.from_input_ids(ids, padding_idx, offset)
        assert found.dtype == torch.int64 and torch.equal(found, expected)
        assert torch.equal(positions.from_input_ids(ids.t().contiguous().t(), padding_idx, torch.tensor(offset)), expected)
        assert torch.equal(positions.from_input_ids(ids[3], padding_idx, offset), expected[3])
        assert torch.equal(positions.from_input_ids(ids[:4].view(2, 2, 11), padding_idx, offset), expected[:4].view(2, 2, 11))
        assert positions.from_input_ids(ids[:, :0], padding_idx, offset).shape == (5, 0)
        offsets = torch.tensor([offset, 0, 4, 9, 1], dtype=dtype)
        each = [transformers_positions(model, row, padding_idx, 0) for row in ids.split(1)]
        expected = torch.cat([row + n * (row != padding_idx) for row, n in zip(each, offsets.tolist(), strict=True)])
        assert torch.equal(positions.from_input_ids(ids, padding_idx, offsets), expected)


@pytest.mark.parametrize(("ids", "position"), [(4, 2), (1, 1)])
def test_positions_of_a_single_id(ids, position):
    assert positions.from_input_ids(torch.tensor(ids), 1).tolist() == position


def test_input_ids_give_robertas_sums():
    """transformers' own embeddings, whose table begins with the rows of padding_idx + 1 positions that no token has."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

    sizes = {"vocab_size": 13, "hidden_size": 8, "max_position_embeddings": 12, "hidden_dropout_prob": 0.0, "pad_token_id": 1}
    theirs = RobertaEmbeddings(transformers.RobertaConfig(**sizes)).eval()
    ids = torch.randint(2, 13, (3, 10))
    ids[0, 7:] = ids[1, :2] = 1
    hidden = functional.embed(
        ids,
        theirs.word_embeddings.weight,
        theirs.position_embeddings.weight,
        positions.from_input_ids(ids, 1),
        segment=theirs.token_type_embeddings.weight,
    )
    torch.testing.assert_close(theirs.LayerNorm(hidden), theirs(ids))


CALLS = [
    (positions.from_attention_mask, torch.tensor([[0, 1, 1], [1, 1, 1]]), (), (2, 3)),
    (positions.from_input_ids, IDS, (1, 2), (2, 3)),
    (positions.from_input_ids, torch.tensor([3, 1, 4], dtype=torch.int32), (1,), (3,)),
    (positions.from_cu_seqlens, torch.tensor(CU_SEQLENS, dtype=torch.int32), (9,), (9,)),
    (positions.from_offset, torch.tensor(4), (3,), (3,)),
    (positions.from_offset, torch.tensor([4, 0], dtype=torch.int32), (3,), (2, 3)),
]


@pytest.mark.parametrize("function, tensor, rest, shape", CALLS)
def test_values_are_not_looked_at(function, tensor, rest, shape):
    """A meta tensor has none: item(), nonzero(), a branch on a value or a copy to the CPU would raise."""
    found = function(tensor.to("meta"), *rest)
    assert found.is_meta and found.shape == shape and found.dtype == torch.int64


@pytest.mark.parametrize("function, tensor, rest, shape", CALLS)
def test_one_graph_serves_other_values(function, tensor, rest, shape):
    compiled = torch.compile(function, fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(compiled(tensor, *rest), function(tensor, *rest))


@pytest.mark.gpu
@pytest.mark.parametrize("function, tensor, rest, shape", CALLS)
def test_in_a_cuda_graph(function, tensor, rest, shape):
    given = torch.zeros_like(tensor, device="cuda")
    function(given, *rest)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function(given, *rest)
    given.copy_(tensor)
    graph.replay()
    assert torch.equal(found.cpu(), function(tensor, *rest))


def test_where_nothing_looks_wrong_cu_seqlens_stay_within_memory(monkeypatch):
    """On a GPU an index outside of a tensor is a device-side assertion, which ends the process's CUDA; here an IndexError."""
    monkeypatch.setattr(positions, "can_read", lambda tensor: False)
    for wrong in ([3, 5, 9], [0, 4, 2, 5], [5, 1, 0], [-4, -2], [40, 90]):
        assert positions.from_cu_seqlens(torch.tensor(wrong), 9).shape == (9,)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: positions.sinusoidal_table(0, 4), ValueError, "max_length: expected an int of at least 1, got 0"),
        (lambda: positions.sinusoidal_table(4, -1), ValueError, "embedding_dim: expected an int of at least 1, got -1"),
        (lambda: positions.sinusoidal_table(4, 2.0), TypeError, "embedding_dim: expected an int, got float"),
        (lambda: positions.sinusoidal_table(4, 2, base=0), ValueError, "base: expected a number above 0, got 0"),
        (lambda: positions.sinusoidal_table(4, 2, base=float("nan")), ValueError, "base: expected a number above 0, got nan"),
        (
            lambda: positions.sinusoidal_table(4, 2, padding_idx=4),
            ValueError,
            r"padding_idx: expected a row in \[-4, 4\), got 4",
        ),
        (
            lambda: positions.sinusoidal_table(4, 2, convention="halves"),
            ValueError,
            r"convention: expected one of \('interleaved', 'fairseq', 'marian'\), got 'halves'",
        ),
        (lambda: positions.make("sinusoidal:bert", 4, 2), ValueError, "convention: expected one of .* got 'bert'"),
        (
            lambda: positions.make("fourier", 4, 2),
            ValueError,
            "position: expected 'learned', 'sinusoidal' or None, got 'fourier'; conventions are 'sinusoidal:interleaved', ",
        ),
        (lambda: positions.make("learned:marian", 4, 2), ValueError, "position: expected .* got 'learned:marian'"),
        (lambda: positions.make(7, 4, 2), ValueError, "position: expected .* got 7"),
        (lambda: positions.from_attention_mask([[1]]), TypeError, "mask: expected a Tensor, got list"),
        (lambda: positions.from_attention_mask(torch.ones(2, 3)), TypeError, "mask: expected dtype .* got torch.float32"),
        (
            lambda: positions.from_attention_mask(torch.ones(2, 1, 3, 3, dtype=torch.bool)),
            ValueError,
            r"mask: expected shape \(batch, length\), got \(2, 1, 3, 3\)",
        ),
        (lambda: positions.from_input_ids([[1]], 1), TypeError, "ids: expected a Tensor, got list"),
        (lambda: positions.from_input_ids(torch.ones(2, 3), 1), TypeError, "ids: expected dtype .* got torch.float32"),
        (lambda: positions.from_input_ids(torch.ones(2, 3).bool(), 1), TypeError, "ids: expected dtype .* got torch.bool"),
        (lambda: positions.from_input_ids(IDS, None), TypeError, "padding_idx: expected an int, got NoneType"),
        (lambda: positions.from_input_ids(IDS, 1.0), TypeError, "padding_idx: expected an int, got float"),
        (lambda: positions.from_input_ids(IDS, True), TypeError, "padding_idx: expected an int, got bool"),
        (lambda: positions.from_input_ids(IDS, -1), ValueError, "padding_idx: expected an int of at least 0, got -1"),
        (lambda: positions.from_input_ids(IDS, 1, -2), ValueError, "offset: expected an int of at least 0, got -2"),
        (lambda: positions.from_input_ids(IDS, 1, 0.5), TypeError, "offset: expected an int, got float"),
        (lambda: positions.from_input_ids(IDS, 1, torch.ones(2)), TypeError, "offset: expected dtype .* got torch.float32"),
        (
            lambda: positions.from_input_ids(IDS, 1, torch.ones(3, dtype=torch.int64)),
            ValueError,
            r"offset: expected shape \(\) or \(2,\), that of ids without its length; got \(3,\)",
        ),
        (
            lambda: positions.from_input_ids(IDS, 1, torch.ones(2, dtype=torch.int64, device="meta")),
            ValueError,
            "offset: expected device cpu, that of ids; got meta",
        ),
        (lambda: positions.from_cu_seqlens([0, 1], 1), TypeError, "cu_seqlens: expected a Tensor, got list"),
        (lambda: positions.from_cu_seqlens(torch.zeros(2), 0), TypeError, "cu_seqlens: expected dtype .* got torch.float32"),
        (
            lambda: positions.from_cu_seqlens(torch.tensor([[0, 1]]), 1),
            ValueError,
            r"cu_seqlens: expected shape \(sequences \+ 1,\), got \(1, 2\)",
        ),
        (
            lambda: positions.from_cu_seqlens(torch.zeros(0, dtype=torch.int32), 0),
            ValueError,
            r"cu_seqlens: expected shape \(sequences \+ 1,\), got \(0,\)",
        ),
        (lambda: positions.from_cu_seqlens(torch.tensor([1, 3]), 3), ValueError, "cu_seqlens: expected 0 at its .* got 1"),
        (
            lambda: positions.from_cu_seqlens(torch.tensor([0, 3]), 4),
            ValueError,
            r"cu_seqlens: expected tokens \(4\) at its end, got 3",
        ),
        (
            lambda: positions.from_cu_seqlens(torch.tensor([0, 5, 3, 6]), 6),
            ValueError,
            "cu_seqlens: expected values that never decrease, got 3 after 5 at 2",
        ),
        (lambda: positions.from_cu_seqlens(torch.tensor([0]), -1), ValueError, "tokens: expected an int of at least 0, got -1"),
        (
            lambda: positions.from_cu_seqlens(torch.tensor([0]), torch.tensor(0)),
            TypeError,
            "tokens: expected an int, got Tensor",
        ),
        (lambda: positions.from_offset(-1, 2), ValueError, "offset: expected an int of at least 0, got -1"),
        (lambda: positions.from_offset(1.5, 2), TypeError, "offset: expected an int, got float"),
        (lambda: positions.from_offset(torch.tensor(1.5), 2), TypeError, "offset: expected dtype .* got torch.float32"),
        (
            lambda: positions.from_offset(torch.zeros(2, 1, dtype=torch.int64), 2),
            ValueError,
            r"offset: expected shape \(\) or \(batch,\), got \(2, 1\)",
        ),
        (lambda: positions.from_offset(0, -2), ValueError, "length: expected an int of at least 0, got -2"),
        (
            lambda: positions.from_offset(torch.tensor(1), 2, device="meta"),
            ValueError,
            "device: expected cpu, that of offset, or None; got meta",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_fixed_table_keeps_its_values():
    """to_empty() after a start on the meta device leaves a buffer that no state_dict fills; there and back costs no digits."""
    table = positions.sinusoidal_table(9, 6, convention="marian")
    assert torch.equal(positions.Sinusoidal(9, 6, "marian", device="meta").to_empty(device="cpu").weight, table)
    assert torch.equal(positions.Sinusoidal(9, 6, "marian").half().float().weight, table)


@pytest.mark.sample
@pytest.mark.parametrize("plan, max_length", [("one_pass", 9), ("one_pass", None), ("distinct", 9)])
def test_training_with_a_table_made_or_moved_in_inference_mode(plan, max_length):
    with torch.inference_mode():
        made, moved = (positions.Sinusoidal(max_length, 16) for _ in range(2))
        moved.double()
    ids, expected = torch.randint(11, (2, 5)), positions.Sinusoidal(max_length, 16).weight
    for position in (made, moved.float().to("cpu")):
        norm, qkv = torch.nn.LayerNorm(16), torch.nn.Linear(16, 48)
        front = pyembed.EmbeddingQKV.from_modules(torch.nn.Embedding(11, 16), position, norm, qkv=qkv, num_heads=4)
        for backend in ("torch", "triton"):
            with pyembed.plan(plan), pyembed.backend(backend):
                sum(x.square().sum() for x in front(ids)).backward()
        assert torch.equal(position.weight, expected) and qkv.weight.grad.any()
