import platform
import pydoc_data.topics
from pathlib import Path

import pytest
import torch

from pyembed.data import get_encoding


def pytest_addoption(parser):
    parser.addoption("--text", help="a UTF-8 text to take tokens from; default: Python's own manual")


@pytest.fixture(scope="session")
def text(request):
    path = request.config.getoption("--text")
    text = Path(path).read_text(encoding="utf-8") if path else "\n".join(pydoc_data.topics.topics.values())
    for raw, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "")):  # WikiText's marks
        text = text.replace(raw, plain)
    return text


@pytest.fixture(scope="session")
def tokens(text):
    """The text in GPT-2's tokens."""
    return torch.tensor(get_encoding("gpt2").encode_ordinary(text))


@pytest.fixture(scope="session")
def characters(text):
    """The text in the 65 most frequent characters, as a character model numbers them."""
    known = sorted(sorted(set(text), key=text.count, reverse=True)[:65])
    number = {character: i for i, character in enumerate(known)}
    return torch.tensor([number[character] for character in text[:100_000] if character in number])


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["text"] = Path(config.getoption("--text") or "pydoc_data.topics").name
    machine_info["node"] = platform.machine()  # not the machine's own name
