import importlib.util
import os

import hypothesis
import pytest
import torch

import pyembed
from pyembed import functional as F
from pyembed.plans import rates

# The same cases on every run: a red test is a change's doing.
hypothesis.settings.register_profile("default", derandomize=True, max_examples=5)
hypothesis.settings.register_profile("full", derandomize=True, max_examples=100)
hypothesis.settings.register_profile("nightly", max_examples=2000)  # other cases on every run, of tests that set no number

torch.set_num_threads(1)  # workers share the cores, and a thread that waits for others takes CPU time

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BYTES_OF_A_WORKER = 2 << 30  # an allowance, measured on no GPU; tests that need far more run one at a time (test_sizes.py)
# Triton's interpreter has no bf16 product of its own: what bf16 rounds to is a GPU's to say.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]


def pytest_addoption(parser, pluginmanager):
    pluginmanager.import_plugin("default_run")  # --full
    pluginmanager.import_plugin("recorder")  # --record
    help = "of the ahead-of-time cases, only kernels that these files of kernels/triton make, as embed,tiles"
    parser.getgroup("pyembed").addoption("--kernels", metavar="FILES", help=help)


def pytest_configure(config):
    full = config.getoption("--full")
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "full" if full else "default"))
    examples.full = full
    if CUDA and config.getoption("--record"):
        raise pytest.UsageError("--record: expected a machine without a GPU, where kernels are interpreted")
    if CUDA or config.getoption("--record"):
        config.option.limit = 0  # kernels are compiled, or run three times


def pytest_collection_finish(session):
    """What the first test would pay for all: Dynamo's first graph, loading the interpreted kernels, measuring rates."""
    option = session.config.option
    if session.items and option.limit and not (option.full or option.collectonly or importlib.util.find_spec("triton") is None):
        token, weight = torch.randn(3, 4, requires_grad=True), torch.randn(12, 4, requires_grad=True)
        torch.compile(lambda x: x.sin().sum(), fullgraph=True, dynamic=True, backend="aot_eager")(token).backward()
        for plan in ("one_pass", "distinct"):
            with pyembed.backend("triton"), pyembed.plan(plan):
                F.embed_qkv(torch.tensor([[0, 2]]), token, weight, num_heads=1).query.sum().backward()
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            rates.measure(torch.device("cpu"), dtype)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Of -n auto: as many as have room on the GPU; None: as many as xdist takes by itself, one for each core."""
    return fitting(torch.cuda.mem_get_info()[0], len(os.sched_getaffinity(0))) if CUDA else None


def fitting(free, cores):
    """Workers that fit in so many free bytes, where these are fewer than cores."""
    return max(free // BYTES_OF_A_WORKER, 1) if free < cores * BYTES_OF_A_WORKER else None


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around what prints the last line otherwise
def pytest_sessionfinish(session):
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not (session.config.option.collectonly or hasattr(session.config, "workerinput")):
        reporter.write_line(f"kernels: {where_kernels_ran()}")
    return result


def where_kernels_ran():
    """The GPU that kernels were compiled for, or what ran them in place of one."""
    if importlib.util.find_spec("triton") is None:
        return "none, triton is not installed"
    import triton

    if not CUDA:
        return "Triton's interpreter, on a CPU"
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    architecture = torch.cuda.get_device_properties(0).gcnArchName if torch.version.hip else f"sm_{major}{minor}"
    return f"{'interpreted on' if triton.knobs.runtime.interpret else 'compiled for'} {name}, {architecture}"


def full(*values):
    """A case of pytest.mark.parametrize that only --full runs."""
    return pytest.param(*values, marks=pytest.mark.full)


def examples(default, full):
    """Hypothesis' settings: so many random examples by default, and with --full."""
    return hypothesis.settings(max_examples=full if examples.full else default, deadline=None)


def pytest_make_parametrize_id(config, val, argname):
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    return f"{argname}={val}" if val is None or isinstance(val, bool | int | str) else None


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What a kernel does not write is NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        tensor = new_empty(self, *args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture
def triton():
    """Within the test, calls run by the kernels: compiled on a GPU, interpreted without one."""
    with pyembed.backend("triton"):
        yield
