"""The benchmark suite: what it counts, that a wrong result is never timed, and that one run makes rows and a report."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench():
    """Imports a module of the benchmark by its name."""
    return lambda name: importlib.import_module(f"pyembed.benchmark.{name}")


def test_counts(bench):
    """By hand: GPT-2 small, 8 tokens of which 5 are distinct, in rows of 4, fp32."""
    roofline, model = bench("roofline"), bench("cases").MODELS["GPT-2 small"]
    D, N, V, L = 768, 2304, 50257, 1024
    io, tables, weights = 8 * (8 + 4 * (D + N)), 4 * 9 * D, 4 * N * D
    expected = {
        ("one_pass", "forward"): (io + tables + weights, 2 * 8 * D * N),
        ("distinct", "forward"): (io + tables + weights, 2 * 9 * D * N),
        ("table", "forward"): (io + tables + 4 * 9 * N, 0),
        ("linear alone", "forward"): (4 * 8 * (D + N) + weights, 2 * 8 * D * N),
        ("eager", "backward"): (io + tables + 4 * (V + L) * D + 2 * weights, 4 * 8 * D * N),
    }
    for (plan, direction), work in expected.items():
        assert roofline.front_end(model, direction, 8, 5, 4, 4, plan) == work, plan
    both = roofline.front_end(model, "forward+backward", 8, 5, 4, 4, "distinct")
    assert both.flops == 6 * 9 * D * N
    assert roofline.Work(6e9, 1e9).seconds(roofline.Rates(2e9, 1e9)) == 3
    assert roofline.lookup(100, 10, 8, 5, 2, places=4) == ((160 + 180 + 64, 0), (160 + 2000 + 64, 0))


def test_share_of_a_whole_model(bench):
    """GPT-2 small's by its parameters: 2 FLOPs each, of all but the position table, and attention's."""
    roofline, models = bench("roofline"), bench("cases").MODELS
    model = models["GPT-2 small"]
    whole = 2 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 4 * 768 * 1025 / 2
    assert roofline.share(model, 1024) == pytest.approx(2 * 768 * 2304 / whole)
    assert 0.01 < roofline.share(model, 1024) < 0.015 < roofline.share(model, 1024, layers=1)


def test_ids(bench):
    make_ids = bench("cases").make_ids
    text = torch.tensor([50000, 7, 7, 7, 9, 9, 50000, 3])
    assert make_ids("natural", 50257, 10, text).tolist() == [*text.tolist(), 50000, 7]
    assert make_ids("natural", 100, 8, text).tolist() == [2, 0, 0, 0, 1, 1, 2, 3]  # by how often they come, ties by number
    for kind in ("zipf", "uniform", "half"):
        ids = make_ids(kind, 1000, 5000, text)
        assert ids.shape == (5000,) and int(ids.min()) >= 0 and int(ids.max()) < 1000
        assert torch.equal(ids, make_ids(kind, 1000, 5000, text))
        top = ids.bincount().max().item() / 5000
        assert {"zipf": 0.1 < top < 0.2, "uniform": top < 0.01, "half": top >= 0.5}[kind], (kind, top)


def test_stock_and_ours_share_weights(bench):
    cases = bench("cases")
    for model in cases.MODELS.values():
        small = cases.dataclasses.replace(model, V=50, D=32, heads=4, kv_heads=2, head_dim=16, L=8 if model.L else None)
        stock = cases.Stock(small, 8)
        ours, ids = stock.fused(), torch.randint(50, (2, 8))
        assert {id(p) for p in ours.parameters()} == {id(p) for p in stock.parameters()}
        for a, b in zip(ours(ids), stock(ids), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_wrong_result_is_not_timed(bench):
    peers, timing = bench("peers"), bench("timing")
    x = torch.randn(3, requires_grad=True)
    right = timing.Variant(lambda: (2 * x,), [x])
    wrong_gradient = timing.Variant(lambda: (2 * x.detach() + x - x.detach(),), [x])
    wrong = timing.Variant(lambda: (2.001 * x,), [x])
    for trains in (False, True):
        for name, caught in (("torch.compile", True), ("auto", False)):
            for variant, seen in ((wrong, True), (wrong_gradient, trains), (right, False)):
                variants = {"eager": right, name: variant}
                grads = peers.gradients(variants, trains)
                if seen and not caught:
                    with pytest.raises(AssertionError):
                        peers.check(variants, grads)
                else:
                    left_out = peers.check(variants, grads)
                    assert (name in variants) != seen and (name in left_out) == seen


def test_memory(bench):
    timing = bench("timing")
    x = torch.randn(1 << 20, requires_grad=True)
    variant = timing.Variant(lambda: (x.exp().sin().sum(),), [x])  # keeps exp, the input of sin
    assert timing.saved_bytes(variant) == 4 << 20
    peak = timing.peak_bytes(variant, [torch.tensor(1.0)], torch.device("cpu"))
    assert peak is None or peak > 4 << 20


def clock(timing):
    """One whose every mark takes 2, and that goes on when its `now` is raised."""

    class Clock:
        now = 0

        def mark(self):
            self.now += 2
            return self.now

        start, seconds = mark, timing.Wall.seconds

    return Clock()


def test_orders_of_a_row_differ(bench):
    """A variant that always came after the same one would be timed with what that leaves in the caches."""
    timing, ran = bench("timing"), []

    variants = {name: timing.Variant(lambda name=name: ran.append(name) or (torch.zeros(1),), []) for name in "abcd"}
    rounds = timing.compare(variants, None, clock(timing), seconds=0)["a"]["rounds"]
    orders = [tuple(ran[4 * k : 4 * k + 4]) for k in range(rounds)]
    assert len(set(orders)) > 1 and all(set(order) == set("abcd") for order in orders) and len(ran) == 4 * rounds


@pytest.mark.parametrize("trains", [False, True])
def test_medians(bench, trains):
    """By a clock that goes on when a variant says so: 4 forward, and 2 for what lies between two marks."""
    timing = bench("timing")

    timer, x = clock(timing), torch.randn(3, requires_grad=True)

    def forward():
        timer.now += 4
        return (x.sin(),)

    grads = {"one": [torch.randn(3)]} if trains else None
    row = timing.compare({"one": timing.Variant(forward, [x])}, grads, timer, seconds=0)["one"]
    expected = {"training forward": 6, "backward": 2, "forward+backward": 8} if trains else {"forward": 6}
    assert row["rounds"] == timing.ROUNDS[0]
    assert row["seconds"] == {d: {"median": n, "q1": n, "q3": n} for d, n in expected.items()}
    assert timing._quartiles([1, 2, 3, 4, 9]) == {"median": 3, "q1": 2, "q3": 4}


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not say how long threads wait")
def test_waiting_for_a_core_is_seen(bench):
    """Of two programs on one core each has it for half the time, and all times of the one may be alike."""
    timing, rows = bench("timing"), bench("rows")
    cores = os.sched_getaffinity(0)
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for process in (0, rival.pid):
            os.sched_setaffinity(process, {min(cores)})
        work = timing.Variant(lambda: (sum(range(1_000_000)),), [])
        found = timing.compare({"one": work}, None, timing.Wall(), seconds=0.3)["one"]
    finally:
        os.sched_setaffinity(0, cores)
        rival.kill()
        rival.wait()
    assert found["waited"] > rows.WAITED and rows.busy(found)


def test_a_run_saves_its_rows(tmp_path):
    """The command of README for the smallest rows, and what stands in the JSON; a budget that is spent starts no row."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(ROOT / "bench"),  # all of it is collected
        "-k",
        "bench_host and Embedding-forward and not TokenPosition",
        "-p",
        "no:cacheprovider",
    ]
    run = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run(command, **run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stock modules" in done.stdout
    document = json.loads((tmp_path / "bench.json").read_text())
    rows = [row["extra_info"] for row in document["benchmarks"]]
    assert rows and all(row["suite"] == "host" and "operators" in row["variants"] for row in rows)
    machine = document["machine_info"]
    assert machine["torch"] == torch.__version__ and machine["rates"]["float32"]["copy"] > 0 and "text" in machine
    done = subprocess.run([*command, "--budget", "0"], **run)
    assert done.returncode == 0 and "skipped" in done.stdout and "stock modules" not in done.stdout


GPU_SH = ROOT / "bench" / "gpu.sh"
STUB = """#!/usr/bin/env bash
case "$1" in
    -) exit 0 ;;  # nothing is missing
    -c) exit 0 ;;
    -m) [ "$2" = torch.utils.collect_env ] && exit 0 ;;
esac
echo "$@" >> "$CALLS"
case "$*" in *--benchmark-json=*) echo '{}' > "$OUT_FOLDER/bench.json" ;; esac
case "$*" in *"$FAILS"*) exit 1 ;; esac
"""


@pytest.mark.parametrize("fails", ["nothing", "-m gpu", "bench/predict.py", "bench/report.py"])
def test_gpu_script_runs_every_part(tmp_path, fails):
    """With a Python that notes what it is asked to do: the parts, in order, whatever came of those before."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(STUB)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "CALLS": str(tmp_path / "calls"), "OUT_FOLDER": str(out), "FAILS": fails}
    done = subprocess.run([GPU_SH, out, "300", "--full"], env=environment, capture_output=True, text=True)
    assert done.returncode == (0 if fails == "nothing" else 1), done.stdout + done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split("tests")[0].split("bench")[0] for call in calls][:2] == [
        "-m pytest -q -m gpu ",
        "-m pytest -q -m not gpu ",
    ]
    assert calls[-3] == f"bench/predict.py --measure --json {out}/predict.json"
    assert (
        "-m pytest bench/bench_host.py bench/bench_front.py" in calls[-2]
        and "--budget" in calls[-2]
        and calls[-2].endswith("--full")
        and "bench/report.py" in calls[-1]
    )
    assert {"gpu.txt", "gpu-tests.log", "kernel-tests.log", "sanitizer.log", "predict.log", "bench.log", "bench.json"} <= {
        p.name for p in out.iterdir()
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_gpu_script_says_what_is_missing(tmp_path):
    done = subprocess.run([GPU_SH, tmp_path], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 2 and "expected" in done.stderr and "CUDA device" in done.stderr
    for arguments, message in (([], "usage"), ([tmp_path, "60"], "at least 300"), ([tmp_path, "soon"], "at least 300")):
        done = subprocess.run([GPU_SH, *arguments], capture_output=True, text=True)
        assert done.returncode != 0 and message in done.stderr
