"""Races and stray addresses of kernels in Triton's interpreter, which runs one program after another and so shows none of them.

    with recording() as recorder: ...                       recorder.faults: of each launch in it, what is wrong
    python -m pytest tests/kernels tests/plans --record     fails each test whose launches have faults

Processes that a test starts are not recorded, nor compiled kernels, so --record is refused where there is a GPU. A launch is
repeated with its programs in reverse and in seeded random order, and its loads, stores and atomics are recorded:

    address   a lane that no mask excludes has an address outside the tensor that its pointer came from. Each argument gets
              addresses of its own, so that an overflow into a neighbour shows; the lane is then masked, and the launch goes on
    write     programs, or lanes of one store, write different bits to an element (one of them not by an atomic)
    read      a program reads an element that another one writes, unless all writes leave the bits that were there before, or
              all write the same bits and the reader did so itself, before a barrier
    barrier   a program reads back what it wrote without a barrier between, which other threads of it may have written
    order     results differ, in bits, from those of programs in ascending order

A launch without faults of write and read, and without atomics, gives the same results in every order, so --record leaves it at
two orders, for the time; recording() runs all three. Threads of one program are not told apart: what races among them shows as
`barrier` alone.
"""

import contextlib
import inspect
from unittest import mock

import numpy as np
import pytest
from accesses import Launch, bytes_of


class Recorder:
    """Of the launches that ran within recording(): faults, and which kernels ran in how many programs."""

    def __init__(self, seed, every_order):
        self.faults, self.kernels, self.launch = [], {}, None
        self.random, self.every_order = np.random.default_rng(seed), every_order

    def check(self):
        assert not self.faults, "\n".join(map(str, self.faults))

    def run(self, execute, executor, arguments, options):
        """One launch: programs in ascending order; if there are more than one, in reverse, recorded, and in random order."""
        names = inspect.getfullargspec(executor.fn).args
        given = inspect.getcallargs(executor.fn, *arguments, **{k: v for k, v in options.items() if k in names})
        launch = self.launch = Launch(executor.fn.__name__, given)
        try:
            execute(executor, *arguments, **options)
            self.kernels[launch.kernel] = max(launch.count, self.kernels.get(launch.kernel, 0))
            if launch.count == 1:
                launch.races()
                return
            after = {storage: bytes_of(memory).copy() for storage, (memory, _) in launch.before.items()}
            orders = {"reverse": np.arange(launch.count)[::-1], "random": self.random.permutation(launch.count)}
            for launch.run, launch.order in orders.items():
                for memory, before in launch.before.values():
                    bytes_of(memory)[:] = before
                launch.recorded = launch.run == "reverse"
                execute(executor, *arguments, **options)
                if launch.recorded:
                    launch.races()
                launch.compare(after)
                if not (self.every_order or any(launch.atomic) or launch.faults):
                    break
        finally:
            self.launch = None
            self.faults += [fault for _, fault in launch.faults.values()]


_recorders: list[Recorder] = []  # of recording() within recording(), the innermost records


def _memory(inner):
    """Replacements for the interpreter's functions of memory, by name."""
    load, store, rmw, cas = inner.load, inner.store, inner.atomic_rmw, inner.atomic_cas

    def checked_load(pointers, mask, other, dtype):
        launch, size = _recorders[-1].launch, np.dtype(dtype).itemsize
        pointers, mask, argument, real = launch.check(pointers, mask, size, "load")
        if argument is not None and argument.storage.data_ptr() in launch.before:
            launch.add(launch.loads, argument, real, size)
        return load(pointers, mask, other, dtype)

    def change(pointers, value, mask, atomic):
        launch = _recorders[-1].launch
        pointers, mask, argument, real = launch.check(pointers, mask, value.itemsize, "atomic" if atomic else "store")
        if argument is not None:
            bits = np.broadcast_to(value, pointers.shape)[mask]
            launch.add(launch.stores, argument, real, value.itemsize, bits, atomic)
        return pointers, mask

    def checked_store(pointers, value, mask):
        pointers, mask = change(pointers, value, mask, False)
        return store(pointers, value, mask)

    def checked_rmw(operation, pointers, value, mask, semantics):
        pointers, mask = change(pointers, value, mask, True)
        return rmw(operation, pointers, value, mask, semantics)

    def checked_cas(pointers, compared, value, semantics):
        pointers, mask = change(pointers, value, np.ones(pointers.shape, bool), True)
        if not mask.all():  # it takes no mask, and would write there
            raise ValueError(f"{_recorders[-1].launch.kernel}: a compare-and-swap outside its tensor")
        return cas(pointers, compared, value, semantics)

    return {"load": checked_load, "store": checked_store, "atomic_rmw": checked_rmw, "atomic_cas": checked_cas}


def _walk(interpreter):
    """Replacements for what the interpreter does of a launch: [(owner, {name: function})]."""
    execute, convert, builder = interpreter.GridExecutor.__call__, interpreter._implicit_cvt, interpreter.InterpreterBuilder
    set_dim, set_idx, barrier = builder.set_grid_dim, builder.set_grid_idx, builder.create_barrier

    def run(self, *arguments, **options):
        _recorders[-1].run(execute, self, arguments, options)

    def located(argument):
        found = convert(argument)
        if hasattr(argument, "data_ptr"):
            found.handle.data = found.handle.data + _recorders[-1].launch.base(argument)
        return found

    def start(self, *dims):
        _recorders[-1].launch.start(dims)
        set_dim(self, *dims)

    def step(self, *place):
        set_idx(self, *map(int, _recorders[-1].launch.step(place)))

    def fence(self):
        _recorders[-1].launch.epoch += 1
        return barrier(self)

    steps = {"set_grid_dim": start, "set_grid_idx": step, "create_barrier": fence}
    return [(interpreter.GridExecutor, {"__call__": run}), (interpreter, {"_implicit_cvt": located}), (builder, steps)]


@contextlib.contextmanager
def recording(seed=0, every_order=True):
    """Within it, launches of the interpreter are recorded and repeated; gives the Recorder.

    seed: of the random order. every_order: take it also where without atomics and faults no result can depend on the order.
    """
    from triton.runtime import interpreter

    _recorders.append(Recorder(seed, every_order))
    with contextlib.ExitStack() as stack:
        stack.callback(_recorders.pop)
        if len(_recorders) == 1:
            for owner, replacements in [*_walk(interpreter), (interpreter._interpreter, _memory(interpreter._interpreter))]:
                stack.enter_context(mock.patch.multiple(owner, **replacements))
        yield _recorders[-1]


# --record


def pytest_addoption(parser):
    help = "repeat the interpreter's launches in other orders, and fail tests whose kernels have races or stray addresses"
    parser.getgroup("pyembed").addoption("--record", action="store_true", help=help)


@contextlib.contextmanager
def checking():
    """AssertionError at its end: launches within it had faults."""
    with recording(every_order=False) as recorder:
        yield
    recorder.check()


@pytest.fixture(autouse=True)
def recorded_launches(request):
    """With --record, the launches of each test are recorded, and their faults are the test's."""
    with checking() if request.config.getoption("--record") else contextlib.nullcontext():
        yield
