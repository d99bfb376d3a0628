"""The data loader against a list of windows (GPTDatasetV1 of github.com/rasbt/LLMs-from-scratch, ch02), 200 kB of text at
stride 1.
"""

import pydoc_data.topics

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pyembed.benchmark.timing import Variant, Wall, compare
from pyembed.data import TokenDataset, create_dataloader, get_encoding

TOPICS = "\n".join(pydoc_data.topics.topics.values())
TEXT = (TOPICS * (200_000 // len(TOPICS) + 1))[:200_000]


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


def measure(record, case, theirs, ours):
    def run():
        variants = {"a list of windows": Variant(theirs, []), "pyembed.data": Variant(ours, [])}
        return compare(variants, None, Wall(), seconds=1), {}

    record(run, suite="data", case=case, direction="forward")


def assert_same_windows(ours, theirs):
    assert len(ours) == len(theirs)
    for index in (0, 1, len(theirs) // 2, len(theirs) - 1):
        assert all(torch.equal(a, b) for a, b in zip(ours[index], theirs[index], strict=True))


def test_construct_from_ids(record):
    token_ids = encode(TEXT)
    ids = torch.tensor(token_ids)

    def ours():
        return TokenDataset(ids, 50257, max_length=4, stride=1)

    def theirs():
        return ListDataset(token_ids, max_length=4, stride=1)

    assert_same_windows(ours(), theirs())
    measure(record, "windows of token ids", theirs, ours)


@pytest.mark.parametrize(("characters", "max_length"), [(200_000, 4), (40_000, 256)])
def test_construct_from_text(record, characters, max_length):
    text = TEXT[:characters]

    def ours():
        return create_dataloader(text, 8, max_length, stride=1)

    def theirs():
        return DataLoader(ListDataset(encode(text), max_length, stride=1), 8, shuffle=True, drop_last=True)

    assert_same_windows(ours().dataset, theirs().dataset)
    measure(record, f"a loader of {characters:,} characters, windows of {max_length}", theirs, ours)


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_epoch(record, batch_size):
    ids = torch.tensor(encode(TEXT)[:20_000])
    ours = create_dataloader(ids, batch_size, 256, 1, vocab_size=50257)
    theirs = DataLoader(ListDataset(ids.tolist(), 256, 1), batch_size, shuffle=True, drop_last=True)

    def run(loader):
        torch.manual_seed(0)
        return sum(int(targets[-1, -1]) for _, targets in loader)

    assert run(ours) == run(theirs)
    measure(record, f"an epoch of windows of 256, batches of {batch_size}", lambda: run(theirs), lambda: run(ours))
