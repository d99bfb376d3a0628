import importlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import full

import pyembed
from pyembed import cli, data, functional, settings
from pyembed.budget import judge
from pyembed.cli import main

SMALL = ["demo", "--width", "64", "--batch", "1", "--length", "17"]
MODE = "compiled" if torch.cuda.is_available() else "interpreter"
GRADIENTS = ["token.weight", "position.weight", "norm.weight", "norm.bias", "qkv.weight", "qkv.bias"]
TENSORS = ["hidden", "query", "key", "value", *(f"{name}.grad" for name in GRADIENTS)]
CHINESE = "春眠不觉晓，处处闻啼鸟。🐦🌧️ 夜来风雨声，花落知多少。🌸\n" * 3


@pytest.fixture
def report_of(tmp_path, capsys):
    """Runs a small demo, checks its exit status, returns what it wrote to --json."""

    def run(*arguments, status=0):
        file = tmp_path / "report.json"
        assert main([*SMALL, "--json", str(file), *arguments]) == status
        assert capsys.readouterr().err == ""
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)

    return run


def test_report_holds_every_number(report_of, tmp_path):
    plot = tmp_path / "errors.png"
    report = report_of("--plot", str(plot), "--dtype", "fp32,fp16")
    assert list(report["dtypes"]) == ["fp32", "fp16"]
    for result in report["dtypes"].values():
        assert list(result["tensors"]) == TENSORS
        for row in result["tensors"].values():
            assert row["verdict"] == "ok"
            for size in ("max", "rms"):
                assert 0 <= row["ours"][size] <= row["budget"][size]
                assert row["eager"][size] < row["budget"][size]
        assert result["tensors"]["hidden"]["bit_equal"] is True
        assert all(seconds > 0 for times in result["seconds"].values() for seconds in times.values())
        assert result.keys() == {"tensors", "plans", "seconds"}  # no ratio of times
        assert list(result["plans"]["distinct"]) == TENSORS and list(result["plans"]["table"]) == TENSORS[:4]
        assert all(row["verdict"] == "ok" for tensors in result["plans"].values() for row in tensors.values())
    assert report["passed"] is True
    assert report["mode"] == MODE
    assert report["text"] == {
        "name": "Python's manual (pydoc_data.topics)",
        "encoding": "gpt2",
        "tokens": report["text"]["tokens"],
    }
    assert report["shape"]["tokens"] == 17 >= report["shape"]["distinct_tokens"]
    assert report["shape"]["vocabulary"] == 50257
    assert report["versions"]["torch"] == torch.__version__
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 20_000


def test_table_fits_80_columns_and_is_plain_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*SMALL, "--dtype", "fp16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and not any("\x1b" in line for line in lines)
    assert [line.split()[-5] for line in lines if line.rstrip().endswith(" ok")] == TENSORS[1:]
    assert "bit-equal" in next(line for line in lines if "hidden" in line)
    assert lines[-1].strip() == "none of 24 tensors over budget"
    speeds = [line for line in lines if line.startswith("fp16") and "ward" in line]
    assert len(speeds) == 2 and all(("not a speed" in line) == (MODE == "interpreter") for line in speeds)


@pytest.mark.parametrize(
    ("norm", "missing"), [("rms", {"norm.bias.grad"}), full("none", {"norm.weight.grad", "norm.bias.grad"})]
)
def test_other_norms_and_shared_heads(report_of, norm, missing):
    report = report_of("--norm", norm, "--width", "128", "--kv-heads", "1", "--dtype", "fp32")
    assert set(report["dtypes"]["fp32"]["tensors"]) == set(TENSORS) - missing
    assert (report["shape"]["heads"], report["shape"]["kv_heads"]) == (2, 1)


@pytest.mark.parametrize(("width", "heads"), [(1, 1), (96, 3), full(97, 1)])
def test_any_width_has_heads(report_of, width, heads):
    seed = "1"  # at seed 0 and width 1 eager's only element of norm.bias.grad is right by luck, and ours cannot be
    assert report_of("--width", str(width), "--dtype", "fp32", "--seed", seed)["shape"]["heads"] == heads


def test_the_interpreter_has_a_smaller_model_by_default(monkeypatch):
    """GPT-2's width takes the interpreter a minute and a half."""
    shapes = []

    def draw(shape, *_):
        shapes.append(shape)
        raise cli.UsageError("enough")

    monkeypatch.setattr(cli, "_draw", draw)
    assert main(["demo"]) == main(["demo", "--width", "64"]) == 2
    assert [shape["width"] for shape in shapes] == [768 if MODE == "compiled" else 256, 64]


def test_own_text_of_any_script(report_of, tmp_path):
    text = tmp_path / "唐诗 $x^2$ [red].txt"
    text.write_text(CHINESE + "<|endoftext|>", encoding="utf-8")
    plot = tmp_path / "errors.svg"
    report = report_of("--text", str(text), "--encoding", "cl100k_base", "--dtype", "fp16", "--plot", str(plot))
    assert report["text"]["name"] == str(text)
    assert report["shape"]["vocabulary"] == 100277
    assert "<svg" in plot.read_text(encoding="utf-8")


def test_seed_decides_the_numbers(report_of):
    first, again, other = (
        report_of("--width", "16", "--dtype", "fp32", "--seed", seed)["dtypes"]["fp32"]["tensors"] for seed in "001"
    )
    if MODE == "interpreter":  # eager's gradients on a GPU are sums in any order
        assert first == again
    assert first["query"] != other["query"]


def scaled(outputs, name, change):
    return outputs._replace(**{name: change(getattr(outputs, name))})


def first_is_nan(tensor):
    return torch.where(torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape) == 0, float("nan"), tensor)


@pytest.mark.parametrize(
    ("tensor", "change", "verdict"),
    [
        ("query", lambda x: x + 1e-3, "OVER (max, rms)"),
        full("key", first_is_nan, "OVER (max, rms)"),
        full("value", lambda x: x * float("inf"), "OVER (max, rms)"),
        ("hidden", lambda x: x * (1 + 2**-23), "OVER (bits)"),
    ],
)
def test_wrong_output_is_over_budget(report_of, tmp_path, monkeypatch, tensor, change, verdict):
    real = functional.embed_qkv
    monkeypatch.setattr(functional, "embed_qkv", lambda *a, **k: scaled(real(*a, **k), tensor, change))
    plot = tmp_path / "errors.png"
    report = report_of("--dtype", "fp32", "--plot", str(plot), status=1)
    assert report["passed"] is False
    assert report["dtypes"]["fp32"]["tensors"][tensor]["verdict"] == verdict
    assert plot.stat().st_size > 20_000


def test_wrong_gradient_is_over_budget(report_of, monkeypatch, capsys):
    real = functional.embed_qkv

    def wrong(*args, weight, **kwargs):
        weight = weight.view_as(weight)
        weight.register_hook(lambda gradient: gradient * 1.001)
        return real(*args, weight=weight, **kwargs)

    monkeypatch.setattr(functional, "embed_qkv", wrong)
    tensors = report_of("--dtype", "fp32", status=1)["dtypes"]["fp32"]["tensors"]
    assert {name for name, row in tensors.items() if row["verdict"] != "ok"} == {"qkv.weight.grad"}


def test_rms_alone_can_be_over_budget():
    exact = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eager = exact.float()
    assert judge(eager + 3e-7, eager, exact, False)["verdict"] == "OVER (rms)"
    assert judge(eager, eager, exact, True)["verdict"] == "ok"


REFUSED = [
    ("--text missing.txt", "--text: cannot read missing.txt: No such file or directory"),
    ("--text folder", "--text: cannot read folder: Is a directory"),
    ("--text latin1.txt", "--text: latin1.txt is not UTF-8: invalid continuation byte at byte 1"),
    ("--text empty.txt", "empty.txt holds 0 tokens of gpt2, and 1 x 17 = 17 are needed: lower --length or --batch"),
    ("--text short.txt", "short.txt holds 3 tokens of gpt2, and 1 x 17 = 17"),
    ("--encoding nope", "expected one of"),
    ("--json folder", "--json: cannot write folder: Is a directory"),
    ("--json no/such.json", "--json: cannot write no/such.json: No such file or directory"),
    ("--plot no/such.png", "--plot: cannot write no/such.png: No such file or directory"),
    ("--plot errors.xyz", "--plot: expected a name that ends in .png, .svg or .pdf, got errors.xyz"),
    ("--text long.txt --json long.txt", "expected different files"),
    ("--width 0", "'--width'"),
    ("--width wide", "'--width'"),
    ("--batch 0", "'--batch'"),
    ("--length -1", "'--length'"),
    ("--width 192 --kv-heads 2", "--kv-heads: expected a divisor of the 3 heads that width 192 has, got 2"),
    ("--norm batch", "'--norm'"),
    ("--dtype fp8", "--dtype: expected names out of fp32, fp16, bf16, got 'fp8'"),
    ("--nonsense", "No such option: --nonsense"),
]


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Runs in tmp_path what must be refused before any work, with one line; returns that line."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes("né!".encode("latin-1"))
    (tmp_path / "short.txt").write_text("one two three")
    (tmp_path / "long.txt").write_text("one two three " * 100)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def run(*arguments):
        monkeypatch.setattr(cli, "_draw", lambda *_: pytest.fail("went to work"))
        assert main([*SMALL, *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[arguments for arguments, _ in REFUSED])
def test_wrong_argument_is_one_line(refusal, arguments, message):
    assert message in refusal(*arguments.split())


@pytest.mark.skipif(MODE == "compiled", reason="a GPU has bf16")
def test_interpreter_refuses_bf16(refusal):
    assert "only a GPU" in refusal("--dtype", "fp32", "--dtype", "bf16")


def test_missing_packages_are_named(refusal, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        assert "pip install triton" in refusal()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert "pip install matplotlib" in refusal("--plot", "errors.png")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tiktoken", None)
        data._encodings.clear()
        assert "pip install tiktoken" in refusal()


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_missing_command_line_packages_are_named(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "pyembed.cli")
    with pytest.raises(SystemExit) as exit:
        importlib.import_module("pyembed.cli")
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: the command line needs {package}: pip install 'pyembed[demo]'\n"


def test_unwritable_after_all_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "check_writable", lambda *_: None)
    assert main([*SMALL, "--dtype", "fp32", "--json", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "none of 24 tensors over budget" in out and err == f"error: cannot write {tmp_path}: Is a directory\n"


def test_interrupt_is_quiet(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(functional, "embed_qkv", interrupt)
    assert main([*SMALL, "--dtype", "fp32"]) == 130
    assert capsys.readouterr() == ("", "")
    assert settings.current.backend == "auto"


def test_help_without_a_command(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_python_m_pyembed():
    result = subprocess.run([sys.executable, "-m", "pyembed", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"pyembed {pyembed.__version__}\n", "")
