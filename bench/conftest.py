import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pyembed.benchmark import cases, roofline
from pyembed.benchmark.rows import as_table

collect_ignore = ["bench_models.py"]  # a program of its own, which needs transformers
ROWS = []  # of this run, to be printed
SKIPPED = {}  # {row: why it was not measured}


def pytest_addoption(parser):
    group = parser.getgroup("pyembed")
    group.addoption("--text", help="a UTF-8 text to take tokens from; default: Python's own manual")
    group.addoption("--full", action="store_true", help="every model, size, dtype and peer; default: a few minutes")
    group.addoption("--budget", type=float, default=float("inf"), metavar="SECONDS", help="start no row after this time")


def pytest_configure(config):
    config.stash["started"], config.stash["load"] = time.monotonic(), os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    text = config.getoption("--text")
    if text and not Path(text).is_file():
        raise pytest.UsageError(f"--text: expected a file, got {text}")


def pytest_runtest_setup(item):
    if time.monotonic() - item.config.stash["started"] > item.config.getoption("--budget"):
        pytest.skip("not measured: the time given is spent")


def pytest_runtest_logreport(report):
    if report.skipped:
        SKIPPED[report.nodeid.split("::")[-1]] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        SKIPPED[report.nodeid.split("::")[-1]] = "it failed"


def pytest_benchmark_update_json(output_json):
    output_json["not_measured"] = SKIPPED


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def text(request):
    return cases.read_text(request.config.getoption("--text"))


@pytest.fixture(scope="session")
def tokens(text):
    """The text in GPT-2's tokens."""
    return cases.tokens_of(text)


@pytest.fixture(scope="session")
def characters(text):
    """The text in the 65 most frequent characters, as a character model numbers them."""
    return cases.characters_of(text)


def rates_of(device):
    """{dtype: its Rates}"""
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    return {str(dtype).removeprefix("torch."): roofline.measure(device, dtype)._asdict() for dtype in dtypes}


@pytest.fixture
def record(benchmark, device):
    """Takes a row: run() measures its variants and says what was left out; JSON and the table at the end show them."""

    def take(run, **row):
        rates_of(device)  # at the first row, not while a run that was interrupted is saved
        row["variants"], row["left_out"] = run()
        if device.type == "cuda":
            row["clocks"] = _query("clocks.sm", "clocks.mem", "temperature.gpu")
        benchmark.extra_info.update(row)
        benchmark.pedantic(lambda: None, rounds=1)  # enters the row in the JSON; the times are in extra_info
        ROWS.append(row)

    return take


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    Console(width=160).print(as_table(ROWS))


def _version(package):
    try:
        return version_of(package)
    except PackageNotFoundError:
        return None


def _query(*fields):
    """What nvidia-smi says of the GPU, where it says anything."""
    gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", gpu]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields, answer.split(", "), strict=False))


def pytest_benchmark_update_machine_info(config, machine_info):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info |= {"torch": torch.__version__, "triton": _version("triton"), "threads": torch.get_num_threads()}
    machine_info["text"] = Path(config.getoption("--text") or "pydoc_data.topics").name
    machine_info["node"] = platform.machine()  # not the machine's own name
    machine_info |= {"rates": rates_of(device), "load": config.stash["load"]}
    if device.type == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name(device)
        machine_info["cuda"] = torch.version.cuda
        machine_info |= _query("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
