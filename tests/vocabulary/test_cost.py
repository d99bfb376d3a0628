import json

import pytest
import torch

from pyembed.cli import main
from pyembed.vocabulary import cost


def test_bytes_are_those_of_the_tensors():
    found = cost(100, 8, dtype=torch.bfloat16, measure=False)
    assert found[:5] == (100, 1600, 1600, 3200, 6400) and found.total == 12_800 and found.step_ms is None
    tied = cost(100, 8, tied=True, tokens=4)
    assert tied[:5] == (100, 3200, 0, 3200, 6400)
    assert all(time > 0 for time in (tied.lookup_ms, tied.head_ms, tied.step_ms))
    with pytest.raises(ValueError, match="width: expected a positive number, got 0"):
        cost(1, 0)


def test_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    picture = tmp_path / "cost.svg"
    assert main(["vocabulary", "cost", "--sizes", "20,3000", "--width", "8", "--tokens", "4", "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "width 8, fp32, 4 tokens a step" in lines[0]
    assert any(line.split()[:11] == ["3,000", "96", "kB", "96", "kB", "192", "kB", "384", "kB", "768", "kB"] for line in lines)
    assert "<svg" in picture.read_text(encoding="utf-8")
    assert main(["vocabulary", "cost", "--sizes", "50257", "--no-measure", "--tied", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sizes"][0] == {
        "size": 50257, "table": 154389504, "head": 0, "gradients": 154389504, "optimizer": 308779008, "lookup_ms": None,
        "head_ms": None, "step_ms": None, "total": 617558016,
    }  # fmt: skip
    assert main(["vocabulary"]) == 0 and "report" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "5,x"], "--sizes: expected positive numbers, as 32000,50257, got '5,x'"),
        (["--sizes", "0"], "--sizes: expected positive numbers"),
        (["--sizes", ""], "--sizes: expected positive numbers"),
        (["--sizes", "2000000000", "--width", "60000"], "--sizes: it does not fit, --no-measure only counts"),
        (["--width", "0"], "'--width'"),
        (["--dtype", "fp8"], "'--dtype'"),
        (
            ["--sizes", "5", "--no-measure", "--plot", "no/such.png"],
            "--plot: cannot write no/such.png: No such file or directory",
        ),
    ],
)
def test_command_refuses_in_one_line(capsys, arguments, message):
    assert main(["vocabulary", "cost", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("wrong", [{"size": 1.5}, {"width": True}, {"tokens": "64"}])
def test_numbers_are_whole(wrong):
    with pytest.raises(TypeError, match=rf"{next(iter(wrong))}: expected an int, got "):
        cost(**{"size": 8, "width": 4, "measure": False} | wrong)
