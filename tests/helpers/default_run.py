"""What the default run takes of the tests, and that none of them takes long; `--full` runs everything, however long it takes.

    @pytest.mark.full          of a function or of a case: only with --full
    @pytest.mark.sample        of a function: by default the fewest cases in which each value of each parametrize occurs
    @pytest.mark.sample(2)     by default the fewest in which each pair of values occurs; sample(3): each three, and so on

A pytest plugin that conftest.py registers. It imports nothing of the library, so that test_default_run.py can run it alone.
"""

import itertools
import os
from collections import Counter

import pytest

LIMIT = 3.0  # core-seconds of all cases of a function in sum: CPU time of its process, and of its children that have ended
SLOWER = 3.0  # so many times the limit fail the run; less is only named: machines differ, and so does one under load
ALLOWED = {  # {function: (core-seconds, why it cannot take less)}
    "tests/kernels/test_ahead_of_time.py::test_ahead_of_time": (90.0, "every kernel is compiled once, in 0.4 to 2 s"),
    "tests/kernels/test_ahead_of_time.py::test_known_faults_are_there": (30.0, "kernels are compiled, in 0.4 to 2 s"),
    "tests/kernels/test_races.py::test_launches_that_ship": (15.0, "each launch runs twice in the interpreter"),
    "tests/modules/test_known.py::test_peft": (8.0, "importing peft takes 3 s"),
    "tests/fuse/test_families.py::test_same_results": (8.0, "importing transformers takes 3 s"),
    "tests/plans/test_sizes.py::test_tables_beyond_two_to_the_31_elements": (8.0, "its process imports torch, for 2 s"),
    "tests/tools/test_bench.py::test_a_run_saves_its_rows": (20.0, "two runs of the benchmark, whose rows take their time"),
    "tests/tools/test_readme.py::test_snippets_run": (10.0, "README fuses a model of transformers, which is imported"),
}

spent = Counter()  # {function: core-seconds}, of the whole run where it is reported
left_out = 0


def pytest_addoption(parser):
    group = parser.getgroup("pyembed")
    group.addoption("--full", action="store_true", help="every case, as before a release, on a GPU and nightly")
    help = "core-seconds that a test function may take without --full; 0: any (default: %(default)s)"
    group.addoption("--limit", type=float, default=LIMIT, metavar="SECONDS", help=help)


def pytest_configure(config):
    config.addinivalue_line("markers", "full: runs only with --full")
    config.addinivalue_line("markers", "sample(strength=1): without --full, the fewest cases that cover the parameters' values")


def function_of(nodeid):
    return nodeid.partition("[")[0]


def values_of(item):
    """{arguments of a parametrize, or a fixture: the value that the case has of it}, as identities, which any value has."""
    given = dict(item.callspec.params)
    marked = [mark.args[0] for mark in item.iter_markers("parametrize")]
    together = [names.replace(" ", "").split(",") if isinstance(names, str) else names for names in marked]
    values = {",".join(names): tuple(id(given.pop(name)) for name in names) for names in together}
    return values | {name: id(value) for name, value in given.items()}


def covering(cases, strength):
    """Indices of few cases, dicts {parameter: value}, that have each combination of `strength` values that any case has."""
    combinations = [set(itertools.combinations(sorted(case.items()), min(strength, len(case)))) for case in cases]
    wanted, chosen = set().union(*combinations), []
    while wanted:
        best = max(range(len(cases)), key=lambda i: len(combinations[i] & wanted))
        wanted -= combinations[best]
        chosen.append(best)
    return sorted(chosen)


@pytest.hookimpl(trylast=True)  # of what -k and -m have left
def pytest_collection_modifyitems(config, items):
    global left_out
    if config.getoption("--full"):
        return
    dropped = {item for item in items if item.get_closest_marker("full")}
    sampled = {}
    for item in items:
        if item not in dropped and item.get_closest_marker("sample") and hasattr(item, "callspec"):
            sampled.setdefault(function_of(item.nodeid), []).append(item)
    for cases in sampled.values():
        strength = (*cases[0].get_closest_marker("sample").args, 1)[0]
        chosen = covering([values_of(case) for case in cases], strength)
        dropped.update(case for i, case in enumerate(cases) if i not in chosen)
    left_out = len(dropped)
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = [item for item in items if item not in dropped]


# Seconds


def core_seconds():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


STARTED = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[STARTED] = core_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "teardown":
        report.core_seconds = core_seconds() - item.stash[STARTED]  # a worker's report reaches the controller with it
    return report


def pytest_runtest_logreport(report):
    spent[function_of(report.nodeid)] += getattr(report, "core_seconds", 0.0)


def too_long(config, times=1.0):
    """Of each function over so many times its limit a line."""
    limit = config.getoption("--limit")
    if config.getoption("--full") or not limit:
        return []
    may = {function: ALLOWED.get(function, (limit,))[0] for function in spent}
    return [
        f"{function} took {seconds:.1f} core-seconds, of at most {may[function]:g} without --full: leave cases to --full "
        "(pytest.mark.full, pytest.mark.sample) or make them smaller"
        for function, seconds in spent.most_common()
        if seconds > times * may[function]
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = left_out
    elif exitstatus == pytest.ExitCode.OK and too_long(config, SLOWER):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    global left_out
    left_out = max(left_out, getattr(node, "workeroutput", {}).get("left_out", 0))


def pytest_terminal_summary(terminalreporter, config):
    if left_out:
        terminalreporter.write_line(f"{left_out} cases were left to --full")
    if config.getoption("durations"):
        terminalreporter.section("core-seconds of functions")
        for function, seconds in spent.most_common(config.getoption("durations") or None):
            terminalreporter.write_line(f"{seconds:6.2f}  {function}")
    lines = too_long(config)
    if lines:
        terminalreporter.section("functions that take too long", red=True)
        for line in lines:
            terminalreporter.write_line(line, red=True)
