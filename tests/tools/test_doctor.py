"""`pyembed doctor`: its report, its self-check and its exit status."""

import json

import pytest
import torch

pytest.importorskip("triton")
from pyembed.kernels import tuning

from pyembed import doctor, functional
from pyembed.cli import main
from pyembed.plans import rates

CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """Rates that are not measured, and one kernel to compile."""
    monkeypatch.setattr(rates, "measure", lambda device, dtype: rates.Rates(1e12, 2e9, 3e9))
    launches = doctor._launches
    monkeypatch.setattr(
        doctor, "_launches", lambda target: [x for x in launches(target) if x.kernel.__name__ == "number_kernel"]
    )
    return launches


@pytest.fixture
def report_of(capsys):
    def run(*arguments, status=0):
        assert main(["doctor", "--json", "-", *arguments]) == status
        return json.loads(capsys.readouterr().out)

    return run


def test_all_is_well(report_of, capsys, tmp_path):
    report = report_of()
    assert report["ok"] and report["problems"] == [] and report["summary"].startswith("All is well")
    assert report["versions"]["torch"] == torch.__version__ and report["rates"] == {"flops": 1e12, "gather": 2e9, "fresh": 3e9}
    assert report["check"]["float32"] == dict.fromkeys(("hidden", "query", "key", "value"), "ok")
    assert ("kernels" in report) == CUDA  # without a GPU nothing is compiled unless it is asked for
    file = tmp_path / "report.json"
    assert main(["doctor", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert json.loads(file.read_text())["check"] == report["check"]
    assert "hidden bit-equal" in printed and "1 TFLOP/s" in printed and "All is well" in printed


@pytest.mark.parametrize("tensor", ["hidden", "key"])
def test_a_wrong_result_is_a_problem(report_of, monkeypatch, tensor):
    right = functional.embed_qkv

    def wrong(*args, **options):
        outputs = right(*args, **options)
        return outputs._replace(
            **{tensor: torch.nextafter(getattr(outputs, tensor), torch.tensor(9.0)) + 1e-4 * (tensor == "key")}
        )

    monkeypatch.setattr(functional, "embed_qkv", wrong)
    report = report_of(status=1)
    expected = "OVER (bits)" if tensor == "hidden" else "OVER (max, rms)"
    assert report["check"]["float32"][tensor] == expected and not report["ok"]
    assert f"{tensor} in float32: {expected}" in report["problems"] and "found" in report["summary"]


def test_other_bits_the_second_time_are_a_problem(report_of, monkeypatch):
    right, calls = functional.embed_qkv, []

    def varies(*args, **options):
        outputs = right(*args, **options)
        calls.append(1)
        return outputs._replace(value=torch.nextafter(outputs.value, torch.tensor(9.0))) if len(calls) % 2 == 0 else outputs

    monkeypatch.setattr(functional, "embed_qkv", varies)
    assert report_of(status=1)["check"]["float32"]["value"] == "a second run gives other bits"


def test_a_call_that_fails_is_a_problem(report_of, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(functional, "embed_qkv", fails)
    assert report_of(status=1)["check"]["float32"] == {"the call": "RuntimeError: no kernel image is available"}


def test_kernels_are_compiled_for_a_gpu_that_is_not_there(report_of):
    report = report_of("--arch", "sm_90")
    (row,) = report["kernels"].values()
    assert row["variants"] >= 1 and row["seconds"] > 0 and row["error"] is None
    assert report["target"]["arch"] == 90 and all(row["fit"] for row in report["tiles"].values())
    assert "compile for arch 90" in report["summary"]


def test_a_kernel_that_does_not_compile_is_a_problem(report_of, monkeypatch):
    small = tuning.H100._replace(shared_memory=-1)
    monkeypatch.setitem(tuning.DEVICES, 90, small)
    monkeypatch.setattr(doctor, "_tiles", lambda target: {"few": {"configurations": 1, "fit": False}})
    problems = report_of("--arch", "90", status=1)["problems"]
    assert problems[0] == "tiles of few do not fit arch 90"
    assert "number_kernel did not compile: RuntimeError: it takes" in problems[1]


def test_tiles():
    found = doctor._tiles(tuning.H100)
    assert set(found) == {"few", "product", "folded", "project", "weight_grad"}
    assert all(row["fit"] and row["configurations"] > 1 for row in found.values())
    assert not any(row["fit"] for row in doctor._tiles(tuning.H100._replace(shared_memory=1000)).values())


def test_launches_are_of_every_plan(cheap):
    names = {launch.kernel.__name__ for launch in cheap(tuning.H100)}
    assert {"embed_qkv_kernel", "project_norm_kernel", "embed_qkv_folded_kernel", "fold_kernel", "expand_kernel"} <= names
    assert {"qkv_kernel", "weight_grad_kernel", "segment_kernel", "norm_backward_kernel", "turn_back_kernel"} <= names


def test_wrong_argument_is_one_line(capsys, tmp_path):
    for arguments, message in (
        (["--arch", "7"], "error: --arch: expected one of 80, 86, 89, 90, 100, 120, gfx942, gfx950, gfx1100, got '7'\n"),
        (["--json", str(tmp_path / "no" / "file")], "error: --json: cannot write"),
    ):
        assert main(["doctor", *arguments]) == 2
        assert capsys.readouterr().err.startswith(message)
