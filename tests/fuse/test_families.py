"""Models of transformers, and of the shapes that people write, give the same with their front end fused; or a report says why
it is not."""

import pytest
import torch
from conftest import full
from families import FAMILIES, OWN, build, logits, tokens

import pyembed

NOT = {  # nothing is fused, and the report says this
    "Olmo2": "self_attn.q_proj, a Linear",
    "Bloom": "but by transformer.h.0.input_layernorm, a LayerNorm",
}
DEFAULT = ("nanoGPT", "GPT2", "Qwen3", "Olmo2")
CASES = [name if name in DEFAULT else full(name) for name in (*OWN, *FAMILIES)]


def gradients(model, ids):
    model.zero_grad()
    out = logits(model, ids)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def near(found, expected, name):
    error, size = (found - expected).abs().max(), expected.abs().max()
    assert error <= 1e-4 * size + 1e-6, f"{name}: {error:.1e} off, of {size:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_same_results(name):
    """Of other ids than those it was fused with, by every plan that can run them."""
    model, ids = build(name), tokens(3, 11, seed=5)
    names, keys = {n: type(m) for n, m in model.named_modules()}, list(model.state_dict())
    expected, wanted = gradients(model, ids)
    with torch.no_grad():
        plain = logits(model, ids)
    fused = pyembed.fuse(model, tokens())
    assert list(model.state_dict()) == keys
    if name in NOT:
        assert NOT[name] in str(fused) and {n: type(m) for n, m in model.named_modules()} == names
        return
    plan = "one_pass" if {"segment"} & fused.modules.keys() or "scaled" in fused.plan else "distinct"
    for backend in ("auto",) if plan == "distinct" else ("triton",):
        fused.calls.clear()
        with pyembed.backend(backend), pyembed.plan(plan):
            found, grads = gradients(model, ids)
            with torch.no_grad():
                near(logits(model, ids), plain, "logits without gradients")
        assert fused.calls["fused"] == 1 + (fused.not_in_training is None), fused.calls
        near(found, expected, "logits")
        assert grads.keys() == wanted.keys()
        for key, grad in grads.items():
            if not key.endswith(("k_proj.bias", "key.bias")):  # whose gradient is zero but for rounding
                near(grad, wanted[key], key)
    fused.undo()
    assert {n: type(m) for n, m in model.named_modules()} == names
    assert torch.equal(logits(model, ids), expected)
