"""bench/bench_models.py: stock and fused models in one run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "bench" / "bench_models.py"


def run(*arguments):
    return subprocess.run([sys.executable, FILE, *arguments], capture_output=True, text=True, timeout=600)


@pytest.mark.full
def test_rows():
    ran = run("--models", "nanoGPT, one layer", "--pairs", "2", "--steps", "3", "--largest", "256", "--what", "decode,prefill")
    assert ran.returncode == 0, ran.stderr
    rows = re.findall(r"^  ([a-z, ]*?) +\d+ x \d+ +[\d.]+ ms +[\d.]+ ms +[\d.]+ .*fused calls (\d+)/\d+$", ran.stdout, re.M)
    assert [what for what, _ in rows][:4] == ["decode", "decode", "prefill", "table, prefill"], ran.stdout
    assert [calls for _, calls in rows[:4]] == ["0", "0", "0", "2"], ran.stdout
    curves = re.findall(r"losses of 3 steps: .* largest difference (\S+), fused calls (\d+)", ran.stdout)
    assert len(curves) == 2 and all(float(difference) < 1e-3 and calls == "3" for difference, calls in curves), ran.stdout


@pytest.mark.full
def test_wrong_names():
    ran = run("--models", "GPT5")
    assert ran.returncode == 2 and "expected of nanoGPT;" in ran.stderr and "got 'GPT5'" in ran.stderr
