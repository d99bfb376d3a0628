"""The data loader against a list of windows (GPTDatasetV1 of github.com/rasbt/LLMs-from-scratch, ch02), 1 MB of text at
stride 1. Each round times the list method right before ours; `extra_info` holds its median and the ratio of medians.

    python -m pytest -s bench/bench_data.py
"""

import pydoc_data.topics
import statistics
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pyembed.data import TokenDataset, create_dataloader, get_encoding

TOPICS = "\n".join(pydoc_data.topics.topics.values())
TEXT = (TOPICS * (1_000_000 // len(TOPICS) + 1))[:1_000_000]


class ListDataset(Dataset):
    def __init__(self, token_ids, max_length, stride):
        self.windows = [
            (torch.tensor(token_ids[i : i + max_length]), torch.tensor(token_ids[i + 1 : i + max_length + 1]))
            for i in range(0, len(token_ids) - max_length, stride)
        ]

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        return self.windows[index]


def encode(text):
    return get_encoding("gpt2").encode(text, allowed_special={"<|endoftext|>"})


def compare(benchmark, ours, theirs, rounds):
    seconds = []

    def run_theirs():
        start = time.perf_counter()
        theirs()
        seconds.append(time.perf_counter() - start)

    ours()
    benchmark.pedantic(ours, setup=run_theirs, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable, or pytest-xdist: correctness alone
        return
    benchmark.extra_info["list_median_s"] = statistics.median(seconds)
    benchmark.extra_info["ratio"] = statistics.median(seconds) / benchmark.stats.stats.median
    print(f"\n{benchmark.name}: list {statistics.median(seconds):.4g} s, ratio {benchmark.extra_info['ratio']:.4g}")


def assert_same_windows(ours, theirs):
    assert len(ours) == len(theirs)
    for index in (0, 1, len(theirs) // 2, len(theirs) - 1):
        assert all(torch.equal(a, b) for a, b in zip(ours[index], theirs[index], strict=True))


@pytest.mark.benchmark(group="construct from token ids")
def test_construct_from_ids(benchmark):
    token_ids = encode(TEXT)
    ids = torch.tensor(token_ids)

    def ours():
        return TokenDataset(ids, 50257, max_length=4, stride=1)

    def theirs():
        return ListDataset(token_ids, max_length=4, stride=1)

    assert_same_windows(ours(), theirs())
    compare(benchmark, ours, theirs, rounds=3)


@pytest.mark.parametrize(("characters", "max_length"), [(1_000_000, 4), (100_000, 256)])
@pytest.mark.benchmark(group="construct from text")
def test_construct_from_text(benchmark, characters, max_length):
    text = TEXT[:characters]

    def ours():
        return create_dataloader(text, 8, max_length, stride=1)

    def theirs():
        return DataLoader(ListDataset(encode(text), max_length, stride=1), 8, shuffle=True, drop_last=True)

    assert_same_windows(ours().dataset, theirs().dataset)
    compare(benchmark, ours, theirs, rounds=3)


@pytest.mark.parametrize("batch_size", [1, 8, 64])
@pytest.mark.benchmark(group="one epoch")
def test_epoch(benchmark, batch_size):
    ids = torch.tensor(encode(TEXT)[:20_000])
    ours = create_dataloader(ids, batch_size, 256, 1, vocab_size=50257)
    theirs = DataLoader(ListDataset(ids.tolist(), 256, 1), batch_size, shuffle=True, drop_last=True)

    def run(loader):
        torch.manual_seed(0)
        return sum(int(targets[-1, -1]) for _, targets in loader)

    assert run(ours) == run(theirs)
    compare(benchmark, lambda: run(ours), lambda: run(theirs), rounds=5)
