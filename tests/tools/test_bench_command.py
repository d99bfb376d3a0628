"""`pyembed bench` on shapes so small that no time counts: what it measures, refuses, writes and says."""

import importlib
import json
from pathlib import Path

import pytest
import torch

import pyembed
from pyembed.benchmark import cases, peers, roofline, rows
from pyembed.benchmark.command import conclusions
from pyembed.cli import main

SHAPE = ["bench", "--shape", "97,32,2,1,2,8"]
MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(97, 32), nn.Embedding(8, 32)
        self.norm, self.linear, self.head = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(96, 97)

    def forward(self, ids):
        return {"logits": self.head(self.linear(self.norm(self.token(ids) + self.position(torch.arange(ids.shape[1])))).tanh())}

def bare():
    return nn.Linear(2, 2)
"""


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """No compiler, and neither rates nor memory are measured."""
    monkeypatch.setattr(rows, "peak_bytes", lambda variant, grads, device: 1)
    for module in (peers, rows):
        monkeypatch.setattr(module, "compiler_missing", lambda device: "no C++ compiler")
    monkeypatch.setattr(roofline, "measure", lambda device, dtype: roofline.Rates(1e10, 1e11))


@pytest.fixture
def report_of(tmp_path, capsys):
    def run(*arguments):
        file, text = tmp_path / "report.json", tmp_path / "text.txt"
        text.write_text("one two one two " * 9)  # the default text takes longer to encode than all the rest
        assert main([*arguments, "--seconds", "0", "--json", str(file), "--text", str(text)]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return json.loads(file.read_text(encoding="utf-8")), printed.out

    return run


def test_a_shape(report_of, tmp_path):
    plot = tmp_path / "times.png"
    report, printed = report_of(*SHAPE, "--plot", str(plot))
    assert list(report["variants"]) == ["stock modules", "linear alone", "one_pass", "distinct", "table", "auto"]
    assert report["left_out"] == {"torch.compile": "no C++ compiler"}
    assert (report["shape"], report["tokens"]) == ([2, 8], 16) and report["text"] == "text.txt"
    assert report["distinct"] == 6  # characters: a vocabulary of 97 rows is taken for one
    for name, row in report["variants"].items():
        assert row["seconds"].keys() == {"forward"} and row["seconds"]["forward"]["median"] > 0
        model = cases.Model("", 97, 32, 2, 1, 0, 8, 1, 16)
        plan = row["plan"] if name != "stock modules" else "eager"
        work = roofline.front_end(
            model, "forward", 16, report["distinct"], 8, torch.finfo(getattr(torch, report["dtype"])).bits // 8, plan
        )
        assert row["limit"]["forward"] == work.seconds(roofline.Rates(1e10, 1e11)), name
    assert "torch.compile was not measured: no C++ compiler" in printed
    assert "x stock" in printed and "% of limit" in printed
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000


def test_training(report_of):
    report, _ = report_of(*SHAPE, "--train", "--norm", "rms", "--rotary")
    assert list(report["variants"]) == [
        "stock modules",
        "linear alone",
        "one_pass",
        "distinct",
        "auto",
    ]  # a table has no gradients
    every = {"training forward", "backward", "forward+backward"}
    assert all(row["seconds"].keys() == every and row["saved"] >= 0 for row in report["variants"].values())


def test_a_model(report_of, tmp_path, monkeypatch):
    (tmp_path / "model_to_measure.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    report, _ = report_of("bench", "--fuse", "model_to_measure:Model", "--batch", "2", "--length", "8", "--dtype", "fp32")
    assert {"stock modules", "distinct", "table", "auto"} <= report["variants"].keys()
    assert not report["variants"].keys() & report["left_out"].keys()
    for name in ("model_to_measure:bare", "model_to_measure:nope"):
        assert main(["bench", "--fuse", name]) == 2
    assert main(["bench", "--fuse", "model_to_measure:Model", "--length", "9"]) == 2


def test_a_wrong_result_raises(monkeypatch):
    def fused(stock):
        ours = made(stock)
        ours.register_forward_hook(lambda module, ids, outputs: outputs._replace(query=outputs.query * 1.01))
        return ours

    made = cases.Stock.fused
    monkeypatch.setattr(cases.Stock, "fused", fused)
    with pytest.raises(AssertionError, match="one_pass gives other results than eager"):
        main([*SHAPE, "--dtype", "fp32"])


@pytest.mark.parametrize(("spreads", "marked"), [([1.0], False), ([1.5, 1.2], False), ([1.3, 1.3], True)])
@pytest.mark.parametrize("by", ["spread", "waited"])
def test_a_busy_row_is_measured_again(report_of, monkeypatch, tmp_path, spreads, marked, by):
    """As often as spreads says: of `distinct`, third quartiles over first in one measurement after the other, or 1 + the share
    of its time in which it waited for a core."""
    left = list(spreads)

    def compare(variants, grads, timer, seconds, tell):
        times = {name: {"q1": 1.0, "median": 1.0, "q3": 1.0} for name in variants}
        found = {name: {"rounds": 3, "waited": 0.0, "seconds": {"forward": each}} for name, each in times.items()}
        spread = left.pop(0)
        if by == "spread":
            times["distinct"]["q3"] = spread
        else:
            found["distinct"]["waited"] = (spread - 1) / 2.5  # 0.2, 0.08, 0.12
        return found

    monkeypatch.setattr(rows, "compare", compare)
    report, printed = report_of(*SHAPE, "--plot", str(tmp_path / "times.svg"))
    assert left == [] and report["busy"] == (["distinct"] if marked else [])
    assert ("too busy to believe this row" in printed) == marked == (" busy" in printed.split("pyembed as it is")[0])
    assert "pyembed as it is" in printed  # neither stock modules nor auto were busy
    assert ("not to be believed" in (tmp_path / "times.svg").read_text()) == marked


def test_nothing_is_concluded_from_a_busy_row():
    row = {"seconds": {"forward": {"q1": 1.0, "median": 1.0, "q3": 1.0}}, "plan": "distinct"}
    report = {"variants": {"stock modules": row, "auto": row}, "busy": []}
    assert conclusions(report) == ["pyembed as it is (auto, here distinct): 1.00 times as fast as stock modules."]
    for busy in ("stock modules", "auto"):
        (said,) = conclusions(report | {"busy": [busy]})
        assert said.startswith("The machine was too busy to believe this row") and said.endswith(f": {busy}.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2,3"], "--shape: expected 5 or 6 positive whole numbers V,D,HEADS[,KV_HEADS],B,T, got '1,2,3'"),
        (["--shape", "97,32,2,0,2,8"], "--shape: expected 5 or 6 positive whole numbers"),
        (["--shape", "97,32,a,2,8"], "--shape: expected 5 or 6 positive whole numbers"),
        (["--shape", "97,32,5,2,8"], "--shape: expected a width D that its heads divide, got D 32 and 5 heads"),
        (["--shape", "97,32,4,3,2,8"], "--shape: expected KV_HEADS that divide HEADS, got 3 and 4"),
        (["--shape", "97,30,2,2,8", "--rotary"], "--rotary: expected heads of an even width"),
        (["--shape", "900000000000,4096,4,2,8"], "GiB of memory"),
        (["--model", "GPT-9"], "--model: expected one of character GPT, GPT-2 small"),
        (["--model", "BERT-base", "--length", "513"], "--length: expected at most the 512 positions of BERT-base, got 513"),
        (["--model", "BERT-base", "--fuse", "a:b"], "expected one of --shape, --model and --fuse"),
        (["--fuse", "no_such_module:f"], "--fuse: No module named 'no_such_module'"),
        (["--fuse", "nothing"], "--fuse: expected module:function"),
        (["--text", "/no/such/file"], "--text: cannot read /no/such/file"),
        (["--dtype", "int8"], "--dtype: expected one of fp32, fp16, bf16, got 'int8'"),
        (["--plot", "times.bmp"], "--plot: expected a name that ends in"),
    ],
)
def test_wrong_argument_is_one_line(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("error: ") and printed.err.count("\n") == 1 and not printed.out


def test_every_package_is_installed(monkeypatch):
    """A wheel holds what setup.py lists, and nothing else."""
    root, found = Path(pyembed.__file__).parents[1], {}
    if not (root / "setup.py").is_file():
        pytest.skip("not a checkout")
    setuptools = importlib.import_module("setuptools")
    monkeypatch.setattr(setuptools, "setup", found.update)
    exec(
        compile((root / "setup.py").read_text(encoding="utf-8"), str(root / "setup.py"), "exec"),
        {"__file__": str(root / "setup.py")},
    )
    folders = {path.parent.relative_to(root).as_posix().replace("/", ".") for path in root.glob("pyembed/**/__init__.py")}
    assert set(found["packages"]) == folders | {"pyembed.kernels"}
