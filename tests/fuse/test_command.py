"""`pyembed fuse MODEL`."""

import pytest
from families import Own, Packed
from torch import nn

from pyembed.cli import main
from pyembed.fuse.load import load_model


def make():
    return Own(nn.LayerNorm, Packed)


def nothing():
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))


def number():
    return 3


@pytest.mark.parametrize("function, status, line", [("make", 0, "the front end is fused"), ("nothing", 1, "nothing is fused")])
def test_prints_the_report(function, status, line, capsys):
    assert main(["fuse", f"{__name__}:{function}"]) == status
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, line",
    [
        ("number", "an nn.Module, got a int"),
        ("absent", "has no attribute 'absent'"),
        (None, "expected module:function or the name"),
        ("NoSuchConfig", "transformers has no NoSuchConfig"),
    ],
)
def test_wrong_names(name, line, capsys):
    argument = "nope" if name is None else name if name.endswith("Config") else f"{__name__}:{name}"
    assert main(["fuse", argument]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("name", ["LlamaConfig", "GPT2Config", "BertConfig", "MixtralConfig"])
def test_tiny_models(name):
    assert sum(p.numel() for p in load_model(name).parameters()) < 60e6
