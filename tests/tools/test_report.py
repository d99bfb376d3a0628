"""bench/report.py, and that README shows what was measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from matplotlib import figure
from typer import BadParameter

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
report = importlib.import_module("report")
sys.path.remove(str(ROOT / "bench"))

MACHINE = {
    "node": "the-host",
    "python_version": "3.11.7",
    "cpu": {"brand_raw": "A CPU (R)", "count": 8},
    "torch": "2.13.0",
    "triton": "3.7.1",
    "threads": 4,
    "text": "text.txt",
    "rates": {"float32": {"copy": 2e10, "flops": 1.5e11}},
}
FORWARD, TRAINING = ("forward",), ("training forward", "backward", "forward+backward")


def variant(median, directions, limit=None, **more):
    seconds = {d: {"median": median, "q1": median * 0.9, "q3": median * 1.1} for d in directions}
    row = {"rounds": 5, "seconds": seconds, "peak": 3 << 20, "saved": 24 * 8 if directions == TRAINING else None, **more}
    return row | ({"limit": dict.fromkeys(directions, limit)} if limit else {})


def row(case, tokens, eager, ours, trains=False, suite="front end", **more):
    directions = TRAINING if trains else FORWARD
    variants = {
        "eager": variant(eager, directions, ours / 4, plan="eager"),
        "torch.compile": variant(eager / 2, directions, ours / 4, plan="torch.compile"),
        "distinct": variant(ours, directions, ours / 2, plan="distinct"),
        **({} if trains else {"table": variant(ours / 10, directions, ours / 20, plan="table")}),
        "auto": variant(ours, directions, ours / 2, **({"plan": "distinct"} if suite == "front end" else {})),
    }
    base = {"suite": suite, "case": case, "model": "GPT-2 small", "tokens": tokens, "distinct": 9, "ids": "natural"}
    base |= {"shape": [1, tokens], "dtype": "float32", "direction": "training" if trains else "forward", "variants": variants}
    return base | {"left_out": {"Liger norm": "its kernels want a GPU"}} | more


ROWS = [
    row("GPT-2 small, 1 × 8", 8, 0.002, 0.001),
    row("GPT-2 small, 1 × 8", 8, 0.5, 0.4, trains=True),
    *(row(f"GPT-2 small, 1 × {n}", n, n / 1e4, n / 2e4, trains) for n in (16, 32, 64) for trains in (False, True)),
    row("GPT-2 small, 1 × 8", 8, 0.004, 0.001, ids="uniform"),
    row("a call", 1, 0.004, 0.001, suite="host"),
]
TABLE = """\
| case | direction | plan | × stock modules | × torch.compile | % of limit | `table` plan, × stock modules |
| --- | --- | --- | ---: | ---: | ---: | ---: |
| GPT-2 small, 1 × 8 | forward / forward+backward | distinct / distinct | 2.00 / 1.25 | 1.00 / 0.62 | 50 / 50 | 20.00 |
"""


def document(rows, dirty=True):
    benchmarks = [{"name": f"row{i}", "extra_info": row, "stats": {"data": [1.0]}} for i, row in enumerate(rows)]
    commit = {"id": "c0ffee", "dirty": dirty}
    found = {"machine_info": MACHINE, "commit_info": commit, "benchmarks": benchmarks, "datetime": "2026-01-02T03:04:05"}
    return found | {"not_measured": {"test_a": "a row of --full", "test_b": "a row of --full"}}


@pytest.fixture
def measured(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(document(ROWS)))
    return path


def test_files(measured, tmp_path):
    out = tmp_path / "results" / "device"
    report.main(measured, into=out)
    assert {path.name for path in out.iterdir()} == {"report.md", "bench.json", *report.FIGURES}
    lines = (out / "report.md").read_text(encoding="utf-8").splitlines()
    for line in (
        "| GPT-2 small, 1 × 8 | 9 | 2.00 (1.00×) 12 % | 1.00 (2.00×) 25 % | 1.00 (2.00×) 50 % | 0.100 (20.00×) 50 % "
        "| 1.00 (2.00×) 50 % distinct |",
        "| GPT-2 small, 1 × 8 | 9 | 500 (1.00×) 20 % | 250 (2.00×) 40 % | 400 (1.25×) 50 % | 400 (1.25×) 50 % distinct |",
        "| GPT-2 small, 1 × 8, uniform ids | 9 | 4.00 (1.00×) 6 % | 2.00 (2.00×) 12 % | 1.00 (4.00×) 50 % "
        "| 0.100 (40.00×) 50 % | 1.00 (4.00×) 50 % distinct |",
        "| GPT-2 small, 1 × 8 | 24, 3 | 24, 3 | 24, 3 | 24, 3 |",
        "- CPU: A CPU (R), 8 cores, 4 threads",
        "- measured rates, float32: copy 20.0 GB/s, matrix product 0.150 TFLOP/s",
        "- text: text.txt",
        "- commit: c0ffee, with uncommitted changes",
        "## Host time of a call, forward",
        "- Liger norm: its kernels want a GPU (10 rows, for example GPT-2 small, 1 × 8 forward)",
        "- entire rows: a row of --full (2 rows, for example test_a)",
        "- All GPU rows: this machine has no GPU.",
    ):
        assert line in lines, line
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("time.png", "limit.png", "map.png"))
    before, after = json.loads(measured.read_text()), json.loads((out / "bench.json").read_text(encoding="utf-8"))
    assert "the-host" not in json.dumps(after) and "stats" not in after["benchmarks"][0]
    assert [row["extra_info"] for row in after["benchmarks"]] == [row["extra_info"] for row in before["benchmarks"]]


def test_readme(measured, tmp_path):
    readme = tmp_path / "README.md"
    for between in ("", "what stood there\n"):
        readme.write_text(f"above\n\n<!-- measured -->\n{between}<!-- /measured -->\n\nbelow\n", encoding="utf-8")
        report.main(measured, into=tmp_path / "out", readme=readme)
        text = readme.read_text(encoding="utf-8")
        assert text.startswith(f"above\n\n<!-- measured -->\n{TABLE}") and text.endswith("|\n<!-- /measured -->\n\nbelow\n")


def test_a_copy_makes_the_same_report(measured, tmp_path):
    report.main(measured, into=tmp_path / "one")
    report.main(tmp_path / "one" / "bench.json", into=tmp_path / "two")
    for name in ("report.md", "bench.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_panels_have_every_size(measured, tmp_path, monkeypatch):
    """A row of training and one of inference of the same number of tokens are points of a panel each."""
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path: drawn.append((Path(path).name, self)))
    report.main(measured, into=tmp_path)
    for name, found in drawn[1:3]:
        assert name in ("time.png", "limit.png") and len(found.axes) == 2
        for axis in found.axes:
            assert {len(line.get_xdata()) for line in axis.get_lines()} == {4}, axis.get_title()
    (gain,) = drawn[0][1].axes
    assert drawn[0][0] == "gain.png" and len(gain.patches) == 9
    (_, found) = drawn[3]
    for axis in found.axes:
        assert axis.get_xlabel() == "batch × tokens" and axis.get_ylabel() == "model" and len(axis.texts) == 4
    assert {text.get_color() for axis in found.axes for text in axis.texts} == {"#1f2328"}  # torch.compile's ground is pale


def test_no_figure_of_another_run_is_left(measured, tmp_path, capsys):
    (tmp_path / "map.png").write_text("old")
    few = tmp_path / "few.json"
    few.write_text(json.dumps(document(ROWS[:2])))
    report.main(few, into=tmp_path)
    assert (
        not (tmp_path / "map.png").exists()
        and f"wrote report.md, bench.json, gain.png to {tmp_path}" in capsys.readouterr().out
    )


def test_busy_rows_are_marked():
    busy = row("GPT-2 small, 1 × 8", 8, 0.002, 0.001)
    busy["variants"]["auto"]["seconds"]["forward"]["q3"] = 0.0012
    assert "| 2.00 ~ | 1.00 ~ | 50 ~ | 20.00 |" in report.readme_table(document([busy]))
    assert " ~" not in report.readme_table(document(ROWS))
    table = row("GPT-2 small, 1 × 8", 8, 0.002, 0.001)
    table["variants"]["table"]["seconds"]["forward"]["q3"] = 0.0002
    assert "| 2.00 | 1.00 | 50 | 20.00 ~ |" in report.readme_table(document([table]))
    assert " ~ 50 % distinct" in report.times([busy], "forward")


def test_a_gpu_says_what_it_is():
    gpu = {"gpu": "NVIDIA H200", "driver_version": "580.1", "cuda": "13.0", "clocks.max.sm": "1980", "clocks.max.mem": "3201"}
    rows = [row("x", 8, 1, 1) | {"clocks": {"clocks.sm": clock}} for clock in ("1980", "1755")]
    text = report.provenance(document(rows) | {"machine_info": MACHINE | gpu | {"power.limit": "700"}})
    for line in (
        "- GPU: NVIDIA H200",
        "- driver, CUDA: 580.1, 13.0",
        "- maximum clocks (SM, memory), power limit: 1980 and 3201 MHz, 700 W",
        "- SM clock during the run: 1,755 to 1,980 MHz",
    ):
        assert line in text.splitlines()


def test_wrong_files_write_nothing(measured, tmp_path):
    readme, other = tmp_path / "README.md", tmp_path / "other.json"
    readme.write_text("no markers\n")
    for text in ("no JSON", "[]", '{"a": 1}', '{"benchmarks": []}', '{"benchmarks": [{"extra_info": {"case": "old"}}]}'):
        other.write_text(text)
        with pytest.raises(BadParameter, match=r"expected what `python -m pytest bench` saved"):
            report.main(other, into=tmp_path / "out")
    with pytest.raises(BadParameter, match="expected what"):
        report.main(tmp_path / "missing.json", into=tmp_path / "out")
    with pytest.raises(BadParameter, match="lacks the lines"):
        report.main(measured, into=tmp_path / "out", readme=readme)
    other.write_text(json.dumps(document([row("a call", 1, 1, 1, suite="host")])))
    with pytest.raises(BadParameter, match="rows of the front end"):
        report.main(other, into=tmp_path / "out", readme=ROOT / "README.md")
    assert not (tmp_path / "out").exists()


def test_a_part_of_the_suite(tmp_path):
    path = tmp_path / "host.json"
    path.write_text(json.dumps(document([row("a call", 1, 1e-5, 2e-5, suite="host")])))
    report.main(path, into=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| a call | 9 | 10.0 µs (1.00×)" in text and "## Front end" not in text and "## Memory" not in text
    assert {found.name for found in (tmp_path / "out").iterdir()} == {"report.md", "bench.json"}


def test_readme_shows_the_committed_results():
    """python bench/report.py bench/results/DEVICE/bench.json --into bench/results/DEVICE --readme README.md makes it so."""
    section = report.SECTION.search((ROOT / "README.md").read_text(encoding="utf-8"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in ROOT.glob("bench/results/*/bench.json")]
    assert section[0] in [report.readme_table(found) for found in results]
