"""bench/report.py, and that README shows what was measured."""

import importlib.util
import json
from pathlib import Path

import pytest
from typer import BadParameter

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("report", ROOT / "bench" / "report.py")
report = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(report)

MACHINE = {
    "node": "the-host",
    "python_version": "3.11.7",
    "cpu": {"brand_raw": "A CPU", "count": 8},
    "torch": "2.13.0",
    "threads": 4,
    "text": "text.txt",
}
STATS = {"median": 0.5, "rounds": 2, "data": [0.4, 0.6]}
TABLE = """\
| case | direction | plan | times as fast as stock modules |
| --- | --- | --- | ---: |
| 1 × 1 | forward / forward+backward | one_pass / distinct | 0.50 / 2.00 |
| 2 × 8 | forward | table | 3.00 |
"""


def document(rows, dirty=True):
    benchmarks = [{"name": f"row{i}", "extra_info": row, "stats": STATS} for i, row in enumerate(rows)]
    commit = {"id": "c0ffee", "dirty": dirty}
    return {"machine_info": MACHINE, "commit_info": commit, "benchmarks": benchmarks, "datetime": "2026-01-02T03:04:05"}


@pytest.fixture
def plans(tmp_path):
    rows = [
        ("1 × 1", "forward", "one_pass", 1, 0.0002, 0.0001, 0.5),
        ("1 × 1", "forward+backward", "distinct", 1, 0.25, 0.5, 2.0),
        ("2 × 8", "forward", "table", 2048, 0.0111, 0.0333, 3.0),
    ]
    keys = ("case", "direction", "plan", "tokens", "median", "stock_median", "ratio")
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(document([{**dict(zip(keys, row, strict=True)), "distinct": 1} for row in rows])))
    return path


@pytest.fixture
def scaling(tmp_path):
    rows = []
    for direction in ("forward+backward", "forward"):
        for tokens in (2048, 1024):
            median = {"eager": tokens / 1e4, "distinct": tokens / 2e4} | ({"table": 0.01} if direction == "forward" else {})
            ratio = {name: median["eager"] / value for name, value in median.items()}
            rows.append({"tokens": tokens, "distinct": 9, "direction": direction, "median": median, "ratio": ratio})
            rows[-1] |= {"repeated": tokens == 2048, "left_out": {"torch.compile": "no C++ compiler"}}
    path = tmp_path / "grown.json"
    path.write_text(json.dumps(document(rows, dirty=False)))
    return path


def test_files(plans, scaling, tmp_path):
    out = tmp_path / "results" / "device"
    report.main(plans, scaling, out=out)
    assert {path.name for path in out.iterdir()} == {"plans.md", "plans.json", "scaling.md", "scaling.json", "scaling.png"}
    text = (out / "plans.md").read_text(encoding="utf-8")
    for line in (
        "| 1 × 1 | 1 | 1 | forward | one_pass | 0.100 | 0.200 | 0.50 |",
        "| 1 × 1 | 1 | 1 | forward+backward | distinct | 500 | 250 | 2.00 |",
        "| 2 × 8 | 2,048 | 1 | forward | table | 33.3 | 11.1 | 3.00 |",
        "- CPU: A CPU, 8 cores, 4 threads",
        "- text: text.txt",
        "- commit: c0ffee, with uncommitted changes",
    ):
        assert line in text.splitlines(), line
    text = (out / "scaling.md").read_text(encoding="utf-8")
    forward, both = text.split("forward+backward")
    assert "| 1,024 | 9 | 102 (1.00×) | 51.2 (2.00×) | 10.0 (10.24×) |" in forward.splitlines()
    assert forward.index("| 1,024 |") < forward.index("| 2,048 | 9* |")
    assert "| 1,024 | 9 | 102 (1.00×) | 51.2 (2.00×) |" in both.splitlines()
    assert "torch.compile: no C++ compiler." in both and "- commit: c0ffee\n" in both
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    for source, name in ((plans, "plans.json"), (scaling, "scaling.json")):
        before, after = json.loads(source.read_text()), json.loads((out / name).read_text(encoding="utf-8"))
        assert "node" not in after["machine_info"] and "the-host" not in json.dumps(after)
        assert all(row["stats"] == {"median": 0.5, "rounds": 2} for row in after["benchmarks"])
        assert [row["extra_info"] for row in after["benchmarks"]] == [row["extra_info"] for row in before["benchmarks"]]


def test_plans_alone_and_readme(plans, tmp_path):
    readme = tmp_path / "README.md"
    for between in ("", "what stood there\n"):
        readme.write_text(f"above\n\n<!-- plans -->\n{between}<!-- /plans -->\n\nbelow\n", encoding="utf-8")
        report.main(plans, out=tmp_path / "out", readme=readme)
        assert readme.read_text(encoding="utf-8") == f"above\n\n<!-- plans -->\n{TABLE}<!-- /plans -->\n\nbelow\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plans.md", "plans.json"}


def test_copies_make_the_same_tables(plans, scaling, tmp_path):
    report.main(plans, scaling, out=tmp_path / "one")
    report.main(tmp_path / "one" / "plans.json", tmp_path / "one" / "scaling.json", out=tmp_path / "two")
    for name in ("plans.md", "plans.json", "scaling.md", "scaling.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_wrong_files_write_nothing(plans, scaling, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    for arguments, options in (((scaling,), {}), ((plans, plans), {}), ((plans,), {"readme": readme})):
        with pytest.raises(BadParameter):
            report.main(*arguments, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_readme_shows_the_committed_results():
    """python bench/report.py bench/results/DEVICE/plans.json --out bench/results/DEVICE --readme README.md makes it so."""
    section = report.SECTION.search((ROOT / "README.md").read_text(encoding="utf-8"))
    results = sorted(ROOT.glob("bench/results/*/plans.json"))
    if section is None or not results:
        pytest.skip("no results are committed, or README shows none")
    assert section[0] in [report.readme_table(json.loads(path.read_text(encoding="utf-8"))) for path in results]
