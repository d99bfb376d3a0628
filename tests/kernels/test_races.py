"""Races and stray addresses: planted ones are found by the recorder, and a launch of every kind that ships has none."""

import re
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, examples, full
from numerics import Case, take
from recorder import checking, recording

import pyembed
from pyembed import functional as F
from pyembed import positions
from pyembed.plans import operators
from pyembed.rotary import Rotary
from pyembed.rows import Rows
from pyembed.vocabulary import linear_cross_entropy

tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")
tools = pytest.importorskip("triton.tools.tensor_descriptor")

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="what is compiled is not recorded")


# Faults


def two_writers(out):
    tl.store(out + 3 * (tl.program_id(0) % 2) + tl.arange(0, 2), tl.program_id(0))


def two_writers_of_the_same_bits(out):
    tl.store(out + tl.arange(0, 4), 7)


def two_lanes(out):
    tl.store(out + tl.arange(0, 4) // 2, tl.arange(0, 4))


def reads_the_next_ones_write(out, tables):
    place = tl.program_id(0)
    tl.store(tables[1] + place, tl.load(out + (place + 1) % 4) * 0)
    tl.store(out + place, 5 + place)


def reads_what_is_written_unchanged(out):
    tl.store(out + tl.arange(0, 4), tl.load(out + tl.arange(0, 4)))


def reads_back(out, BARRIER: tl.constexpr):
    place = tl.arange(0, 4)
    tl.store(out + place, place + 5)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + 4 + tl.program_id(0), tl.sum(tl.load(out + place), 0))


def masked_too_late(x, out, size):
    place = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(out + place, tl.load(x + place), mask=place < size)


def beside_its_columns(view):
    row, column = tl.arange(0, 4)[:, None], tl.program_id(0) + tl.arange(0, 2)[None, :]
    tl.store(view + row * 4 + column, 1 + column)


def beyond_by_descriptor(x, out):
    tile = x.load([2 * tl.program_id(0), 0])
    tl.store(out + tl.program_id(0), tl.sum(tl.sum(tile, 1), 0))


def last_come(out):
    tl.atomic_xchg(out + 2, tl.program_id(0))


def counts(out):
    tl.atomic_add(out + 1, tl.program_id(0))


def counts_and_stores(out):
    if tl.program_id(0) == 2:
        tl.store(out + 1, 3)
    else:
        tl.atomic_add(out + 1, 1)


def words(size=8):
    return torch.zeros(size, dtype=torch.int32)


def rows(*shape):
    return torch.ones(shape, dtype=torch.float32)


def descriptor(given, described):
    return tools.TensorDescriptor(rows(*given), list(described), [described[1], 1], [2, 4])


# (kernel, arguments, programs): (kind, argument, element, programs, elements)
PLANTED = [
    (two_writers, (words(),), 3, [("write", "out", (0,), (0, 2), 2)]),
    (two_lanes, (words(),), 1, [("write", "out", (0,), (0,), 2)]),
    (reads_the_next_ones_write, (words(), (None, words())), 4, [("read", "out", (0,), (0, 3), 4)]),
    (reads_back, (words(), False), 2, [("barrier", "out", (0,), (0, 1), 4)]),
    (masked_too_late, (words(6), words(6), 6), 2, [("address", "x", (6,), (1,), 2)]),
    (beside_its_columns, (words(16).view(4, 4)[:, :2],), 2, [("address", "view", (0, 2), (1,), 4)]),
    (beyond_by_descriptor, (descriptor((3, 4), (4, 4)), rows(2)), 2, [("address", "x", (12,), (1,), 4)]),
    (last_come, (words(),), 3, [("order", "out", (2,), (0, 1, 2), 1)]),
    (counts_and_stores, (words(),), 3, [("write", "out", (1,), (0, 1, 2), 1), ("order", "out", (1,), (0, 1, 2), 1)]),
    (two_writers_of_the_same_bits, (words(),), 3, []),
    (reads_what_is_written_unchanged, (words(),), 3, []),
    (reads_back, (words(), True), 2, []),
    (counts, (words(),), 3, []),
    (beyond_by_descriptor, (descriptor((3, 4), (3, 4)), rows(2)), 2, []),
]


@pytest.mark.parametrize(
    "kernel, arguments, programs, expected", PLANTED, ids=[f"{p[0].__name__}-{len(p[3])}" for p in PLANTED]
)
def test_planted_faults(kernel, arguments, programs, expected):
    with operators.kernels("interpreter").running(), recording() as recorder:
        interpreter.InterpretedFunction(kernel)[(programs,)](*arguments)
    assert recorder.kernels == {kernel.__name__: programs}
    found = [(f.kind, f.argument, f.index, tuple(x for x, _, _ in f.programs), f.count) for f in recorder.faults]
    assert set(expected) <= set(found), found
    assert {fault[0] for fault in found} <= {"order", *(fault[0] for fault in expected)}, found
    assert bool(found) == bool(expected), found
    for fault in recorder.faults:
        assert str(fault).startswith(f"{kernel.__name__}: {fault.kind} of {fault.argument}[")


def test_results_are_those_of_ascending_order():
    out = words()
    with operators.kernels("interpreter").running(), recording():
        interpreter.InterpretedFunction(last_come)[(3,)](out)
        interpreter.InterpretedFunction(counts)[(3,)](out)
    assert out.tolist() == [0, 3, 2, 0, 0, 0, 0, 0]


def test_faults_are_the_tests():
    wrong = pytest.raises(AssertionError, match=r"last_come: order of out\[2\]")
    with wrong, checking(), operators.kernels("interpreter").running():
        interpreter.InterpretedFunction(last_come)[(3,)](words())


# The library's launches


def kernels_of(name):
    module, _ = operators.launcher(name, torch.empty(0))
    return module


@pytest.fixture
def small_tiles(monkeypatch):
    """Makes several programs of each kernel at small sizes; of 80, an A100, by pointers, since it has no descriptors."""
    tuning = kernels_of("tuning")
    tiles = tuning.Tiles(4, 16, 16, 4, 1)
    for name in ("few", "product", "embed_qkv_folded", "project", "weight_grad"):
        monkeypatch.setattr(tuning, name, lambda *args, **options: tiles)
    several = {
        "rows": (2, 8, 4),
        "stream": (4, 32),
        "streaming": (4, 16),
        "expand": (4, 32, 16),
        "segment": (4, 32),
        "embed_norm": (2, 16),
    }
    for name, sizes in several.items():
        monkeypatch.setattr(tuning, name, lambda *args, sizes=sizes: sizes)
    monkeypatch.setattr(tuning, "runs", lambda M, count, tiles, device, resident: min(2, count))
    monkeypatch.setattr(tuning, "fold", lambda weight: {"BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4})
    monkeypatch.setattr(kernels_of("table_grad"), "CHUNK", 2)

    def of(arch, way):
        device = tuning.DEVICES[arch]._replace(multiprocessors=3)
        monkeypatch.setattr(tuning, "device_of", lambda tensor: device)
        take(way, monkeypatch)

    return of


def case(**options):
    """Of 2 ids, so that runs of equal ones go on for more than a chunk; rows and heads end inside a tile."""
    options = {"B": 1, "T": 5, "V": 2, "D": 12, "heads": 2, "kv_heads": 1, "head_dim": 8} | options
    return Case(torch.float32, "cpu", **options)


def with_segments(found):
    found.parameters["segment"] = torch.randn(3, 12)
    found.options["segment_ids"] = torch.randint(3, found.ids.shape)
    return found


def one_pass(**options):
    found = case(padding_idx=-1, **options)
    found.options["rotary"] = Rotary(8, 24, rotary_dim=4)
    found.run(F.embed_qkv)


def many_terms():
    found = with_segments(case(norm="rms", position_ids="BT", T=4))
    found.options |= {"dropout": 0.25, "scale": 3.0, "rotary": Rotary(8, 24, interleaved=True)}
    found.run(F.embed_qkv)


def without_norm():
    found = with_segments(case(norm=None, bias=False))
    found.options |= {"dropout": 0.25}
    found.run(F.embed_qkv)


def ends():
    found = case(norm="rms", head_dim=16, T=3)
    found.parameters |= {"query_norm": torch.randn(16), "key_norm": torch.randn(16)}
    second = case(norm="rms", T=3)
    found.options |= {"heads_first": True, "rotary": Rotary(16, 24)}
    second.options |= {"heads_first": True, "query_biases": torch.randn(2, 2, 8).unbind()}
    with torch.no_grad():
        found.run(F.embed_qkv, backward=False)
        second.run(F.embed_qkv, backward=False)


def distinct(**options):
    found = case(**options)
    found.options["rotary"] = Rotary(8, 24)
    with pyembed.plan("distinct"):
        found.run(F.embed_qkv)


def numbering():
    """More rows and tokens than a program of each kernel marks and numbers."""
    kernels_of("distinct").find(torch.randint(5000, (1500,)), 5000)


def keying():
    """More tokens than a program of each kernel has; a wrong count and two ids without a row are told of."""
    ids, values = torch.randint(50, (1100,)), torch.arange(3, 9)
    ids[[0, 1099]] = 99
    none, words = values[:0], torch.zeros(6, dtype=torch.long)
    streams = [7, -1, 9], [2, 6, 1], [none, values, none], [none, values - 3, none], [4, 5, 6]
    keys = kernels_of("keys").find_keys(ids, 50, *streams, False, (words, 1100))
    kernels_of("keys").find_used(keys, 59)
    assert words[0] == 4


def table():
    front = pyembed.EmbeddingQKV(9, 20, 2, num_kv_heads=1, head_dim=12, max_length=12)
    with torch.no_grad(), pyembed.plan("table"):
        front(torch.randint(9, (1, 11)))


def embeddings():
    ids = torch.tensor([[3, 3, 3, 1, 0, 3]])
    token, table = (torch.randn(4, 20, requires_grad=True) for _ in range(2))
    F.embedding(ids, token, padding_idx=1).backward(torch.randn(1, 6, 20))
    F.embed(ids, token, table, ids, segment=table, segment_ids=ids, dropout=0.5).backward(torch.randn(1, 6, 20))


def tied(plan, **options):
    """Lookups whose rows are added to the gradient of a head."""
    found = case(**options)
    ids, weight = found.ids, found.parameters["token"].requires_grad_()
    for _ in range(2):
        with pyembed.plan(plan):
            hidden = F.embed_qkv(ids, weight, found.parameters["weight"], num_heads=2, num_kv_heads=1).query.flatten(-2)
        linear_cross_entropy(hidden[..., :12], weight, ids).backward()


def two_tables():
    ids, weight, own = torch.tensor([[3, 5, 2, 6, 3]]), rows(6, 20).requires_grad_(), rows(2, 20).requires_grad_()
    F.embed(ids, weight, rows=Rows(own, [5, 6])).sum().backward()


def sines():
    F.embed(torch.randint(5, (2, 6)), torch.randn(5, 20), positions.sinusoidal_steps(20))


def split_weights():
    token, norm, qkv = torch.nn.Embedding(5, 12), torch.nn.LayerNorm(12), tuple(torch.nn.Linear(12, 16) for _ in range(3))
    front = pyembed.EmbeddingQKV.from_modules(token, norm=norm, qkv=qkv, num_heads=2)
    front(torch.randint(5, (1, 3))).query.sum().backward()


def absent():
    """Two tokens without a row, in two programs: the report, which is made where nobody looked at ids before, names either."""
    found = case(position=None)
    found.ids = torch.tensor([[0, 99, 2, 3, 4, -1]])
    for plan in ("one_pass", "distinct"):
        with pyembed.plan(plan), pyembed.id_policy("trust"), torch.no_grad():
            assert found.run(F.embed_qkv, backward=False)["hidden"].isnan().any()


RAGGED = {"norm": "rms", "position_ids": "BT", "B": 2, "T": 3, "V": 5, "padding_idx": 3}
# the device, which kernels of embed_qkv, a function and its arguments: kernels that it runs in more than one program
SHIPPED = [
    (90, "few", one_pass, {}, "embed_qkv norm_backward segment join turn_back"),
    (80, "folded", one_pass, {"position": None}, "fold embed_qkv_folded norm_backward turn_back"),
    (90, "rows", one_pass, {"norm": "rms"}, "embed_norm project_norm norm_backward segment join turn_back"),
    full(90, "few", one_pass, {"norm": "rms"}, "embed_qkv norm_backward segment join turn_back"),
    full(90, "folded", one_pass, {"norm": "rms"}, "fold embed_qkv_folded norm_backward segment join turn_back"),
    (90, "few", many_terms, {}, "embed_qkv norm_backward segment"),
    full(90, "rows", many_terms, {}, "embed_norm project_norm norm_backward segment"),
    full(90, "folded", many_terms, {}, "fold embed_qkv_folded norm_backward segment"),
    (90, "few", without_norm, {}, "embed_qkv embed drop segment"),
    full(80, "rows", without_norm, {}, "embed_norm project_norm embed drop segment"),
    (90, "few", ends, {}, "embed_qkv"),
    full(90, "rows", ends, {}, "embed_norm project_norm"),
    full(90, "folded", ends, {}, "embed_qkv_folded"),
    (90, "few", distinct, {}, "prepare project shift expand turn_back qkv weight_grad sum table segment"),
    full(80, "few", distinct, RAGGED, "prepare project expand qkv weight_grad sum table segment"),
    full(90, "few", distinct, RAGGED, "prepare project expand qkv weight_grad sum table segment"),
    full(90, "few", distinct, {"norm": None, "position_ids": "T"}, "prepare project expand qkv weight_grad table"),
    (90, "few", numbering, {}, "mark number"),
    (90, "few", keying, {}, "count keys index"),
    (90, "few", table, {}, "expand"),
    (90, "few", embeddings, {}, "embed drop segment join"),
    (90, "few", two_tables, {}, "gather segment"),
    (90, "few", tied, {"plan": "one_pass"}, "embed_qkv segment join"),
    (90, "few", tied, {"plan": "distinct", "V": 5}, "project expand qkv table segment"),
    (90, "few", sines, {}, "embed"),
    (90, "few", split_weights, {}, "embed_qkv norm_backward"),
    (90, "few", absent, {}, "embed_qkv expand"),
    full(90, "rows", absent, {}, "embed_norm project_norm expand"),
]


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("arch, way, function, options, kernels", SHIPPED)
def test_launches_that_ship(arch, way, function, options, kernels, small_tiles):
    torch.manual_seed(0)
    small_tiles(arch, way)
    with operators.kernels("interpreter").running(), recording(every_order=examples.full) as recorder:
        function(**options)
    recorder.check()
    several = {name.removesuffix("_kernel") for name, programs in recorder.kernels.items() if programs > 1}
    assert set(kernels.split()) <= several, recorder.kernels


def test_every_kernel_is_among_them():
    source = "".join(file.read_text() for file in Path(kernels_of("launch").__file__).parent.glob("*.py"))
    ran = {name for case in SHIPPED if not hasattr(case, "marks") for name in case[-1].split()}
    assert set(re.findall(r"launch\((\w+)_kernel,", source)) == set(re.findall(r"def (\w+)_kernel\(", source)) == ran
