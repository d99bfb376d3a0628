"""Tile configurations: valid for every device, and how programs share the tiles."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
from pyembed.kernels import tuning

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def test_every_configuration_is_valid():
    sizes = itertools.product((1, 16, 17, 33, 300, 1000, 5000, 100_000), (48, 2304, 6144, 12288), (16, 768, 771, 4096))
    for (M, N, D), dtype, device in itertools.product(sizes, DTYPES, tuning.DEVICES.values()):
        assert tuning.is_valid(tuning.embed_qkv(M, N, D, dtype, device), dtype, device)
        if tuning.folds(M, dtype):
            assert tuning.is_valid(tuning.embed_qkv_folded(M, N, D, dtype, device), dtype, device)
    too_big = tuning.Tiles(256, 256, 128, 8, 4)
    assert not any(tuning.is_valid(too_big, torch.bfloat16, device) for device in tuning.DEVICES.values())
    assert not tuning.is_valid(tuning.Tiles(48, 64, 64, 4, 2), torch.bfloat16, tuning.H100)


@pytest.mark.parametrize("M, N", [(1, 2304), (64, 6144), (4096, 2304), (20_000, 3072), (1_000_000, 12288)])
def test_runs_fill_the_device(M, N):
    """No split of the N tiles among programs ends earlier by the model that runs() states."""
    tiles, device = tuning.embed_qkv(M, N, 768, torch.bfloat16, tuning.H100), tuning.H100
    count = -(-N // tiles.BLOCK_N)
    chosen = tuning.runs(M, count, tiles, device)
    assert 1 <= chosen <= count
    blocks = -(-M // tiles.BLOCK_M)
    cost = {share: -(-blocks * share // device.multiprocessors) * (0.5 + -(-count // share)) for share in range(1, count + 1)}
    assert cost[chosen] == min(cost.values())


def test_weight_descriptor_copies_only_what_it_must():
    tiles = tuning.Tiles(64, 64, 32, 4, 2)
    weight = torch.randn(12, 16)
    for matrix, transposed, copied in ((weight, False, False), (weight.t(), True, False), (torch.randn(12, 15), False, True)):
        descriptor, turned = tuning.weight_descriptor(matrix, tiles)
        assert turned == transposed and (descriptor.base.data_ptr() != matrix.data_ptr()) == copied
        assert torch.equal(descriptor.base.t() if turned else descriptor.base, matrix)
