"""Which implementation runs."""

import pytest
import torch
from conftest import CUDA

import pyembed
from pyembed import functional as F
from pyembed import ops, planner


def runs_triton(monkeypatch, token):
    calls = []
    monkeypatch.setattr(ops, "embed", lambda *a: calls.append(a) or torch.empty(0))
    F.embedding(torch.tensor([0], device=token.device), token)
    return bool(calls)


def test_backend(monkeypatch):
    cpu = torch.randn(3, 2)
    assert not runs_triton(monkeypatch, cpu)
    with pyembed.backend("triton"):
        assert runs_triton(monkeypatch, cpu)
        with pyembed.backend("torch"):
            assert not runs_triton(monkeypatch, cpu)
        assert runs_triton(monkeypatch, cpu)
    assert not runs_triton(monkeypatch, cpu)
    if CUDA:
        assert runs_triton(monkeypatch, cpu.cuda()) and not runs_triton(monkeypatch, cpu.double().cuda())


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError), pyembed.backend("triton"):
        raise KeyError
    assert planner._backend == "auto"


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match=r"backend: expected one of \('auto', 'triton', 'torch'\), got 'cuda'"),
        pyembed.backend("cuda"),
    ):
        pass


@pytest.mark.gpu
def test_kernels_refuse_float64():
    with pyembed.backend("triton"), pytest.raises(TypeError, match=r"token: .* got torch.float64"):
        F.embedding(torch.tensor([0], device="cuda"), torch.randn(3, 2, dtype=torch.float64, device="cuda"))
