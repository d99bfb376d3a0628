"""The plugin that says what the default run takes: what is left to --full, and that a slow function fails the run."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import conftest
import default_run
import pytest
import torch
from default_run import ALLOWED, covering, function_of

TESTS = Path(__file__).parents[1]
FILE = """
import pytest, time

def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.mark.parametrize("x", range(3))
def test_slow_in_sum(x):
    spin(0.1)

def test_waits():
    time.sleep(0.4)

@pytest.mark.full
def test_later():
    pass

@pytest.mark.sample
@pytest.mark.parametrize("x, y", [(1, 1), (2, 2), (3, 3), pytest.param(4, 4, marks=pytest.mark.full)])
@pytest.mark.parametrize("z", [1, 2])
def test_sampled(x, y, z):
    pass

@pytest.mark.sample(2)
@pytest.mark.parametrize("x", [1, 2])
@pytest.mark.parametrize("y", [1, 2])
@pytest.mark.parametrize("z", [1, 2])
def test_pairs(x, y, z):
    pass
"""


def run(folder, *options):
    (folder / "test_these.py").write_text(FILE)
    command = [sys.executable, "-m", "pytest", "-p", "default_run", "-p", "no:cacheprovider", *options, "-v", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(TESTS / "helpers"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("workers", [(), ("-p", "xdist", "-n2")], ids=["alone", "workers"])
def test_a_slow_function_fails_the_run(tmp_path, workers):
    """By what its cases take in sum, wherever they ran; by CPU time, so that one that waits is not slow."""
    found = run(tmp_path, "--limit", "0.08", *workers)
    assert found.returncode == 1 and " 11 passed" in found.stdout, found.stdout + found.stderr
    assert re.search("test_these.py::test_slow_in_sum took 0.[345] core-seconds, of at most 0.08 without --full", found.stdout)
    assert found.stdout.count(" core-seconds, of at most ") == 1 and "10 cases were left to --full" in found.stdout


def test_one_a_little_over_the_limit_is_named(tmp_path):
    """It fails nothing: on another machine it may take less."""
    found = run(tmp_path, "--limit", "0.22")
    assert found.returncode == 0 and "test_slow_in_sum took 0.3 core-seconds, of at most 0.22 without --full" in found.stdout


def test_what_runs(tmp_path):
    default, full = run(tmp_path, "--limit", "0"), run(tmp_path, "--limit", "0.2", "--full")
    assert full.returncode == default.returncode == 0
    assert full.stdout.count(" PASSED ") == 3 + 1 + 1 + 8 + 8 and default.stdout.count(" PASSED ") == 3 + 1 + 3 + 4
    assert default.stdout.count("::test_sampled") == 3 and default.stdout.count("::test_pairs") == 4
    assert "::test_later" not in default.stdout and "left to --full" not in full.stdout


def test_covering():
    cases = [{"x": x, "y": y, "z": z} for x in range(3) for y in range(2) for z in range(4) if (x, y) != (2, 1)]
    assert len(covering(cases, 1)) == 4 and len(covering(cases, 3)) == len(cases)
    for strength in (1, 2):
        chosen = [cases[i] for i in covering(cases, strength)]
        for names in (("x",), ("y",), ("z",)) if strength == 1 else (("x", "y"), ("x", "z"), ("y", "z")):
            assert {tuple(c[n] for n in names) for c in chosen} == {tuple(c[n] for n in names) for c in cases}
    assert covering([{}], 2) == [0]


def test_exceptions_are_few_and_of_functions_that_there_are():
    assert len(ALLOWED) <= 8
    for function, (seconds, why) in ALLOWED.items():
        path, _, name = function.partition("::")
        assert f"def {name}(" in (TESTS.parent / path).read_text(encoding="utf-8")
        assert seconds > default_run.LIMIT and why
    assert function_of("a/test_b.py::test_c[x=1]") == "a/test_b.py::test_c"


def test_workers_fit_on_the_gpu():
    GiB = 1 << 30
    assert [conftest.fitting(free * GiB, 16) for free in (80, 32, 31, 8, 1, 0)] == [None, None, 15, 4, 1, 1]


@pytest.mark.parametrize(
    "card, hip, interprets, said",
    [
        (None, None, False, "Triton's interpreter, on a CPU"),
        ("NVIDIA GeForce RTX 4090", None, False, "compiled for NVIDIA GeForce RTX 4090, sm_89"),
        ("NVIDIA GeForce RTX 4090", None, True, "interpreted on NVIDIA GeForce RTX 4090, sm_89"),
        ("AMD Instinct MI300X", "7.0", False, "compiled for AMD Instinct MI300X, gfx942"),
    ],
)
def test_where_kernels_ran(card, hip, interprets, said, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(conftest, "CUDA", card is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(gcnArchName="gfx942"))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton.knobs, "runtime", types.SimpleNamespace(interpret=interprets))
    assert conftest.where_kernels_ran() == said
