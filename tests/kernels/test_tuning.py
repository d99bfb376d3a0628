"""Tile configurations: valid for every device, and how programs share the tiles."""

import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from numerics import tf32

pytest.importorskip("triton")
from pyembed.kernels import tuning

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def described(arch, shared_memory, **more):
    """The device that torch.cuda.get_device_properties(…) says is there."""
    kind = {"major": arch // 10, "minor": arch % 10} if isinstance(arch, int) else {"gcnArchName": f"{arch}:sramecc+:xnack-"}
    properties = SimpleNamespace(multi_processor_count=20, shared_memory_per_block=min(shared_memory, 65_536), **kind, **more)
    with mock.patch.object(torch.version, "hip", None if isinstance(arch, int) else "7.0"):
        return tuning.described(properties)


OTHERS = [  # that DEVICES has not: the least that Triton compiles for, and what may come
    described(75, 49_152, shared_memory_per_block_optin=65_536, warp_size=32, regs_per_multiprocessor=65_536),
    described(87, 49_152, shared_memory_per_block_optin=166_912, warp_size=32),
    described(95, 49_152, shared_memory_per_block_optin=101_376, warp_size=32),
    described(121, 49_152, shared_memory_per_block_optin=101_376, warp_size=32),
    described("gfx90a", 65_536, warp_size=64),
    described("gfx1201", 65_536, warp_size=32),
]
DEVICES = [*tuning.DEVICES.values(), *OTHERS]


def test_devices_are_as_they_describe_themselves():
    """Also one that nobody knew: its own shared memory, beyond the 48 KB that need no asking, warps and registers."""
    assert [(each.arch, each.shared_memory, each.lanes, each.tma) for each in OTHERS] == [
        (75, 65_536, 32, False), (87, 166_912, 32, False), (95, 101_376, 32, True), (121, 101_376, 32, True),
        ("gfx90a", 65_536, 64, False), ("gfx1201", 65_536, 32, False),
    ]  # fmt: skip
    assert all(each.registers == 65_536 and each.multiprocessors == 20 for each in OTHERS)
    known = [described(arch, 49_152, warp_size=32).products for arch in (89, 90, "gfx942")]
    assert known == [256, 2048, 1024] and {each.products for each in OTHERS} == {1024}
    assert {arch for arch, each in tuning.DEVICES.items() if each.tma} == {90, 100, 120}
    assert {each.shared_memory for arch, each in tuning.DEVICES.items() if arch in (86, 89, 120)} == {101_376}
    assert all(arch == each.arch for arch, each in tuning.DEVICES.items())


def test_tf32_only_where_triton_compiles_it():
    """For any of NVIDIA's and for gfx942; other dtypes have no such choice."""
    with tf32(True):
        found = {each.arch for each in DEVICES if tuning.precision(torch.float32, each) == "tf32"}
        assert found == {each.arch for each in DEVICES if isinstance(each.arch, int)} | {"gfx942"}
        assert all(tuning.precision(torch.bfloat16, each) == "ieee" for each in DEVICES)
    assert all(tuning.precision(torch.float32, each) == "ieee" for each in DEVICES)


@pytest.mark.parametrize("table", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration_is_valid(dtype, table):
    """On every device, for products of any dtype over tables of any other, and heads of any width."""
    needs = [(False, 0), (True, 0), *((True, head) for head in (64, 128, 256))]
    sizes = list(itertools.product((1, 17, 33, 300, 5000), ((48, 771), (2304, 768), (6144, 4096))))
    for (M, (N, D)), need, device in itertools.product(sizes, needs, DEVICES):
        ways = {tuning.few: ((table,), table), tuning.product: (("tf32",), None), tuning.embed_qkv_folded: ((), None)}
        for function, (more, rows) in ways.items():
            tiles = function(M, N, D, dtype, device, *need, *more)
            assert tuning.is_valid(tiles, dtype, device, rows), (tiles, device)
            assert need[1] <= tiles.BLOCK_N
            operand = min(tiles.BLOCK_M, tiles.BLOCK_N) * tiles.BLOCK_K * dtype.itemsize
            assert device.lanes == 32 or tiles.num_warps == 4 or operand >= 16 * device.lanes * tiles.num_warps
        assert tuning.is_valid(tuning.project(N, D, dtype, device), dtype, device)
        assert tuning.is_valid(tuning.weight_grad(N, D, dtype, device), dtype, device, spare=1)


def test_ways():
    """Few tokens by one launch; a weight is folded where that costs less than writing normed rows, and in bf16 alone."""
    half, h100 = torch.bfloat16, tuning.H100
    found = [tuning.way(M, 2304, 768, half, h100) for M in (1, 32, 33, 1024, 6912, 6913)]
    assert found == ["few", "few", "rows", "rows", "rows", "folded"]
    assert tuning.way(1024, 64, 768, half, h100) == "rows" and tuning.way(1025, 64, 768, half, h100) == "folded"
    assert [tuning.way(M, 2304, 768, half, h100, kept=True) for M in (32, 1024, 1025)] == ["few", "rows", "folded"]
    for dtype in (torch.float32, torch.float16):
        assert [tuning.way(M, 2304, 768, dtype, h100) for M in (32, 50_000)] == ["few", "rows"]
    assert tuning.way(1, 2304, 771, half, h100) == tuning.way(1, 2313, 768, half, h100) == "rows"  # rows of no whole 16 bytes
    assert [tuning.way(16, 2304, 768, half, tuning.DEVICES[arch]) for arch in ("gfx942", "gfx1100")] == ["few", "rows"]
    heads = [tuning.way(1, 2304, 768, half, tuning.DEVICES["gfx942"], head=head) for head in (32, 64)]
    assert heads == ["few", "rows"]  # wide heads leave the norm's weight 2 bytes a thread


def test_products_fill_the_device():
    """Small tiles where there are few tokens, so that every multiprocessor has one; the largest where there are many."""
    for M, N, D, size in ((33, 6144, 4096, (64, 64)), (512, 2304, 768, (128, 128)), (50_000, 6144, 4096, (128, 256))):
        assert tuning.product(M, N, D, torch.bfloat16, tuning.H100)[:2] == size
    wide = [tuning.product(512, 2304, 768, torch.float32, tuning.H100, precision=p) for p in ("ieee", "tf32")]
    assert wide[0][:3] == (64, 64, 16) and wide[1][:3] == (128, 128, 32)
    crowded = tuning.product(512, 2304, 768, torch.float32, tuning.H100, True, precision="tf32")
    assert crowded[:3] == (128, 64, 32)  # a turn and 128 columns would spill
    # An RTX 4090 multiplies an eighth as much a cycle: its small tiles wait for memory no more than large ones, and fill it.
    assert tuning.product(512, 6144, 4096, torch.bfloat16, tuning.DEVICES[89])[:2] == (64, 128)


def test_is_valid():
    too_big = tuning.Tiles(256, 256, 128, 8, 4)
    assert not any(tuning.is_valid(too_big, torch.bfloat16, device) for device in DEVICES)
    assert not tuning.is_valid(tuning.Tiles(48, 64, 64, 4, 2), torch.bfloat16, tuning.H100)
    # Rows of fp32 under autocast, with their positions: 107,520 bytes as Triton 3.7 compiles it.
    tiles = tuning.Tiles(64, 128, 64, 8, 3)
    assert tuning.is_valid(tiles, torch.bfloat16, tuning.DEVICES[86], torch.bfloat16)
    assert not tuning.is_valid(tiles, torch.bfloat16, tuning.DEVICES[86], torch.float32)
    # Hopper's products in flight hold a tile more, and the masked rows of the weight's gradient are read besides.
    tiles = tuning.Tiles(128, 128, 64, 8, 3)
    taken = [tuning.shared_memory(tiles, torch.bfloat16, tuning.DEVICES[arch]) // 1024 for arch in (86, 90)]
    assert taken == [64, 96]
    # Rows are read 8 KB at a time for their statistics, two steps of token and position rows, however small the tiles.
    assert tuning.shared_memory(tuning.Tiles(32, 32, 16, 4, 3), torch.float32, tuning.DEVICES[80], torch.float32) == 32 * 1024
    assert tuning.shared_memory(tiles, torch.bfloat16, tuning.DEVICES[86], spare=1) == 3 * 32 * 1024
    # Products of 128·256 in fp32 have no room on their way to the stores, however little the operands take.
    assert not tuning.is_valid(tuning.Tiles(128, 256, 16, 8, 2), torch.bfloat16, tuning.DEVICES[86])


def test_rows_leave_registers():
    """A thread may use 255 of the 65,536 that a program's threads share, and about eight for each of its elements of a tile."""
    for D, dtype in itertools.product((1, 64, 768, 2049, 4096, 4097, 5120, 8192, 16_384, 100_000), DTYPES):
        rows, columns, warps = tuning.rows(D, dtype)
        assert 32 * warps * 256 <= 65_536 and rows * columns // (32 * warps) <= 16
        assert columns >= D or D > 4096


@pytest.mark.parametrize("M, N", [(1, 2304), (64, 6144), (4096, 2304), (20_000, 3072), (1_000_000, 12288)])
def test_runs_fill_the_device(M, N):
    """No split of the N tiles among programs ends earlier by the model that runs() states."""
    tiles, device = tuning.embed_qkv_folded(M, N, 768, torch.bfloat16, tuning.H100), tuning.H100
    count = -(-N // tiles.BLOCK_N)
    chosen = tuning.runs(M, count, tiles, device)
    assert 1 <= chosen <= count
    blocks = -(-M // tiles.BLOCK_M)
    cost = {share: -(-blocks * share // device.multiprocessors) * (0.5 + -(-count // share)) for share in range(1, count + 1)}
    assert cost[chosen] == min(cost.values())


def test_a_weight_is_copied_only_where_it_must_be():
    """Descriptors want unit stride and rows at multiples of 16 bytes; pointers, where the hardware has no TMA, unit stride."""
    tiles, weight, a100 = tuning.Tiles(64, 64, 32, 4, 2), torch.randn(12, 16), tuning.DEVICES[80]
    for matrix, transposed, copied, copied_without_tma in (
        (weight, False, False, False),
        (weight.t(), True, False, False),
        (torch.randn(12, 15), False, True, False),
        (torch.randn(12, 32)[:, ::2], False, True, True),
    ):
        descriptor, turned = tuning.weight_operand(matrix, tiles, tuning.H100)
        assert turned == transposed and (descriptor.base.data_ptr() != matrix.data_ptr()) == copied
        assert torch.equal(descriptor.base.t() if turned else descriptor.base, matrix)
        (pointer, rows, columns, stride), turned = tuning.weight_operand(matrix, tiles, a100)
        assert turned == transposed and (pointer.data_ptr() != matrix.data_ptr()) == copied_without_tma
        found = pointer.as_strided((rows, columns), (stride, 1))
        assert torch.equal(found.t() if turned else found, matrix)
