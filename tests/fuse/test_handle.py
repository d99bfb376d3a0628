"""What the handle says of a fused model."""

import pytest
from families import Own, OwnNorm, Packed, build, tokens

import pyembed
from pyembed.plans.rates import NOMINAL, Rates


def test_what_is_gained_is_measured(monkeypatch):
    """By rates that were measured on a busy machine the front end would take longer than the whole forward."""
    slow = Rates(*(rate / 1e4 for rate in NOMINAL["cpu"]))
    monkeypatch.setattr("pyembed.plans.choice.measure", lambda device, dtype: slow)
    model = build("nanoGPT")
    with pyembed.fuse(model, tokens()) as fused:
        assert 0 < fused.share < 1 and fused.saved_seconds == 0 and "no more than that can be gained" in str(fused)
    with pyembed.plan("distinct"), pyembed.fuse(model, tokens()) as fused:
        assert 0 < fused.share < 1 and fused.saved_seconds < fused.share * fused.forward_seconds
    assert not fused.calls


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_dropout_is_named(p):
    """The model is watched in eval mode, so that nothing else would say that in training it never runs fused."""
    report = str(pyembed.fuse(Own(OwnNorm, Packed, dropout=p), tokens()))
    assert ("in training the model's own modules run: drop is a dropout of p=0.25" in report) == (p > 0)
