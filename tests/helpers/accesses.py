"""What the programs of one launch did to memory, and what is wrong with that: see recorder.py."""

import ctypes
import math
from typing import NamedTuple

import numpy as np

SLOT = 48  # bits of a real address; above them, the number of the argument (from 1) that a pointer belongs to
REAL = np.uint64(2**SLOT - 1)
# What may depend on the order of programs: a report names any one of the ids without a row (tiles.report_absent).
ANY_ORDER = ("terms[5][0]",)


class Fault(NamedTuple):
    kind: str  # address, write, read, barrier, order
    kernel: str
    argument: str  # as "qkv[0]", of the launch
    index: tuple  # element of the argument; (offset,) in elements where it lies outside
    programs: tuple  # (x, y, z) of each one that takes part, at most four
    count: int  # elements of the argument with this fault
    detail: str

    def __str__(self):
        programs = ", ".join(map(str, self.programs))
        where = f"{self.argument}{list(self.index)} by programs {programs}"
        return f"{self.kernel}: {self.kind} of {where}: {self.detail}; elements: {self.count}"


class Argument:
    """The elements of a tensor that a launch is given."""

    def __init__(self, name, tensor, slot):
        self.name, self.slot, self.shape, self.start, self.itemsize = (
            name,
            slot,
            tuple(tensor.shape),
            tensor.data_ptr(),
            tensor.element_size(),
        )
        self.storage, self.dims = tensor.untyped_storage(), tensor.dim()
        axes = [axis for axis in range(tensor.dim()) if tensor.shape[axis] > 1 and tensor.stride(axis)]
        axes.sort(key=tensor.stride, reverse=True)
        self.axes = [(axis, tensor.shape[axis], tensor.stride(axis) * self.itemsize) for axis in axes]
        self.span, elements, self.exact = self.itemsize, self.itemsize, True
        for _, size, stride in reversed(self.axes):
            self.exact &= stride >= self.span  # else rows overlap, and an offset has more than one index
            self.span += (size - 1) * stride
            elements *= size
        self.span *= tensor.numel() > 0
        self.gaps = self.exact and elements < self.span

    def inside(self, address, size):
        """Which addresses are of elements; size: bytes that are accessed."""
        rest = (address - np.uint64(self.start)).view(np.int64)
        found = (rest >= 0) & (rest <= self.span - size)
        if self.gaps:
            for _, length, stride in self.axes:
                found &= rest // stride < length
                rest = rest % stride
            found &= rest <= self.itemsize - size
        return found

    def index(self, address):
        rest, index = int(address) - self.start, [0] * self.dims
        if not 0 <= rest < self.span or not self.exact:
            return (rest // self.itemsize,)
        for axis, _, stride in self.axes:
            index[axis], rest = divmod(rest, stride)
        return tuple(index)


def bytes_of(storage):
    """The memory of a storage."""
    return np.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()), np.uint8)


def runs_of(ordered):
    """Where runs of equal values begin, and the number of each element's run."""
    new = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    return np.flatnonzero(new), np.cumsum(new) - 1


class Access(NamedTuple):
    address: np.ndarray  # real, of lanes that no mask excludes
    size: int  # bytes of each
    instruction: int
    value: np.ndarray | None  # of a store


class Launch:
    """One launch: its arguments, and what its programs did in the run under way."""

    def __init__(self, kernel, arguments):
        self.kernel, self.slots, self.arguments, self.faults = kernel, {}, [], {}
        self.before, self.recorded, self.grid = {}, False, ()  # {address of a storage: (storage, its bytes)} of what is written
        self.run, self.order = "ascending", None  # the run under way, and the numbers of its programs
        for name, value in arguments.items():
            self._name(name, value)
        self.clear()

    def _name(self, name, value):
        if isinstance(value, tuple):
            for place, part in enumerate(value):
                self._name(f"{name}[{place}]", part)
        elif hasattr(value, "base") and hasattr(value, "block_shape"):
            self._name(name, value.base)
        elif hasattr(value, "data_ptr"):
            slot = self.slots.setdefault(self._key(value), len(self.slots) + 1)
            if slot > len(self.arguments):
                self.arguments.append(Argument(name, value, slot))

    @staticmethod
    def _key(tensor):
        return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())

    def base(self, tensor):
        """What is added to the addresses of a tensor: the bits above SLOT."""
        return np.uint64(self.slots[self._key(tensor)] << SLOT)

    def clear(self):
        self.stores, self.loads = {}, {}  # [Access] by address of the storage
        self.programs, self.epochs, self.atomic = [], [], []  # by instruction: who, after how many barriers, whether an atomic
        self.program = self.epoch = 0

    def fault(self, kind, argument, address, programs, count, detail):
        """Notes a fault: of those that differ in elements only the first, and their number in the run that met it first."""
        run, found = self.faults.get((kind, argument.name), (self.run, None))
        if run != self.run:
            return
        if found is None:
            programs = tuple(tuple(map(int, np.unravel_index(p, self.grid))) for p in programs[:4])
            found = Fault(kind, self.kernel, argument.name, argument.index(address), programs, 0, detail)
        self.faults[kind, argument.name] = run, found._replace(count=found.count + int(count))

    def start(self, dims):
        self.grid = dims
        self.recorded |= self.count == 1

    @property
    def count(self):
        return math.prod(self.grid)

    def step(self, place):
        """The program that is run in this place of the order."""
        number = int(np.ravel_multi_index(place, self.grid))
        self.program = number if self.order is None else int(self.order[number])
        return np.unravel_index(self.program, self.grid)

    def check(self, pointers, mask, size, word):
        """Real addresses, the mask without stray lanes, and of the lanes under it the argument (None: there are none) and the
        addresses."""
        mask = np.broadcast_to(np.asarray(mask, bool), pointers.shape)
        active = pointers.ravel() if mask.all() else pointers[mask]
        argument, real = None, active & REAL
        if active.size:
            low, high = int(active.min()), int(active.max())
            argument = self.arguments[min(max(low >> SLOT, 1), len(self.arguments)) - 1]
            first, last = (end - (argument.slot << SLOT) - argument.start for end in (low, high))
            if first < 0 or last > argument.span - size or argument.gaps and not argument.inside(real, size).all():
                keep = self._keep(active, real, size, word)
                mask = mask.copy()
                mask[mask] = keep
                active, real = active[keep], real[keep]
                argument = self.arguments[int(active[0] >> np.uint64(SLOT)) - 1] if active.size else None
        return pointers & REAL, mask, argument, real

    def _keep(self, active, real, size, word):
        """Which lanes are inside the argument that their pointer came from; the others are faults."""
        slots, keep = active >> np.uint64(SLOT), np.zeros(active.size, bool)
        for argument in self.arguments:
            keep |= (slots == argument.slot) & argument.inside(real, size)
        stray = slots[~keep]
        for slot in np.unique(stray).tolist():
            argument = self.arguments[min(max(slot, 1), len(self.arguments)) - 1]
            address = real[~keep][stray == slot]
            detail = f"a {word} outside the tensor, whose elements are of shape {argument.shape}"
            self.fault("address", argument, address[0], [self.program], len(address), detail)
        return keep

    def add(self, table, argument, address, size, value=None, atomic=False):
        """Notes an access; a storage that is about to be written for the first time is copied before."""
        storage = argument.storage.data_ptr()
        if value is not None and storage not in self.before:
            self.before[storage] = (argument.storage, bytes_of(argument.storage).copy())
        if not self.recorded:
            return
        table.setdefault(storage, []).append(Access(address, size, len(self.programs), value))
        self.programs.append(self.program)
        self.epochs.append(self.epoch)
        self.atomic.append(atomic)

    def argument_of(self, storage, address):
        """The argument whose element has this address, the smallest if there are more."""
        found = [
            a for a in self.arguments if a.storage.data_ptr() == storage and a.inside(np.array([address], np.uint64), 1)[0]
        ]
        return min(found, key=lambda a: a.span)

    def races(self):
        """Adds the faults of the recorded run."""
        for storage, stores in self.stores.items():
            loads = self.loads.get(storage, [])
            unit = min(access.size for access in stores + loads)
            self._races(storage, spread(stores, unit), spread(loads, unit), unit)

    def _races(self, storage, stores, loads, unit):
        program, epoch, atomic = np.array(self.programs), np.array(self.epochs), np.array(self.atomic)
        address, instruction, bits = stores
        by = np.argsort(address, kind="stable")  # of one element, in the order of instructions
        address, instruction, bits, writer = address[by], instruction[by], bits[by], program[instruction[by]]
        first, group = runs_of(address)
        differs = bits != bits[first][group]
        low, high = np.minimum.reduceat(writer, first), np.maximum.reduceat(writer, first)
        mixed = np.logical_or.reduceat(differs | atomic[instruction], first)
        plain = ~np.logical_and.reduceat(atomic[instruction], first)
        self._report(
            "write", storage, mixed & plain & (low != high), address[first], group, writer, "different bits are written"
        )
        same = (group[1:] == group[:-1]) & (instruction[1:] == instruction[:-1]) & (bits[1:] != bits[:-1])
        lanes = np.zeros(len(first), bool)
        lanes[group[1:][same & ~atomic[instruction[1:]]]] = True
        self._report("write", storage, lanes, address[first], group, writer, "lanes of one store write different bits")
        if loads is None:
            return
        before = self.before[storage]
        whole = before[1][: len(before[1]) // unit * unit].view(f"u{unit}")
        kept = ~mixed & (whole[(address[first] - np.uint64(storage)) // np.uint64(unit)] == bits[first])
        read, reading = loads
        place = np.minimum(np.searchsorted(address[first], read), len(first) - 1)
        doubtful = (address[first][place] == read) & ~kept[place]
        place, reading = place[doubtful], reading[doubtful]
        reader = program[reading]
        # The reader's own last write before: keys order by element, program and instruction.
        instructions = len(program)
        own = np.sort((group * self.count + writer) * instructions + instruction)
        key = (place * self.count + reader) * instructions
        last = np.searchsorted(own, key + reading) - 1
        wrote = (last >= 0) & (own[last] >= key)
        fenced = wrote & (epoch[own[last] % instructions] < epoch[reading])
        other = (low[place] != reader) | (high[place] != reader)
        raced, unfenced = np.zeros(len(first), bool), np.zeros(len(first), bool)
        raced[place[other & (mixed[place] | ~wrote)]] = True
        unfenced[place[wrote & ~fenced]] = True
        both, members = np.concatenate((group, place)), np.concatenate((writer, reader))
        self._report("read", storage, raced, address[first], both, members, "another program writes what one reads")
        detail = "read back without a barrier after the write"
        self._report("barrier", storage, unfenced & ~raced, address[first], place, reader, detail)

    def _report(self, kind, storage, wrong, address, group, program, detail):
        if wrong.any():
            place = int(np.flatnonzero(wrong)[0])
            programs = np.unique(program[group == place]).tolist()
            self.fault(kind, self.argument_of(storage, address[place]), address[place], programs, wrong.sum(), detail)

    def compare(self, after):
        """Notes where memory differs from `after`, by storage, and puts that back."""
        for storage, (memory, before) in self.before.items():
            found, expected = bytes_of(memory), after.get(storage, before)
            wrong = np.flatnonzero(found != expected).astype(np.uint64) + np.uint64(storage)
            for argument in self.arguments if len(wrong) else ():
                mine = wrong[argument.inside(wrong, 1)] if argument.storage.data_ptr() == storage else ()
                if len(mine) and argument.name not in ANY_ORDER:
                    elements = np.unique((mine - np.uint64(argument.start)) // np.uint64(argument.itemsize))
                    detail = f"the results of {self.run} order have other bits"
                    self.fault("order", argument, mine[0], self.writers(storage, mine[0]), len(elements), detail)
            found[:] = expected

    def writers(self, storage, address):
        """The programs that wrote the byte at this address in the recorded run."""
        accesses = self.stores.get(storage, [])
        touched = [((a.address <= address) & (address < a.address + np.uint64(a.size))).any() for a in accesses]
        return sorted({self.programs[a.instruction] for a, touches in zip(accesses, touched, strict=True) if touches})


def spread(accesses, unit):
    """Addresses, instructions and, of stores, bits, of accesses in units of so many bytes; None of none."""
    if not accesses:
        return None
    steps = [np.arange(0, access.size, unit, dtype=np.uint64) for access in accesses]
    address = [(a.address[:, None] + step).ravel() for a, step in zip(accesses, steps, strict=True)]
    instruction = np.repeat([a.instruction for a in accesses], [len(part) for part in address])
    if accesses[0].value is None:
        return np.concatenate(address), instruction
    bits = np.concatenate([np.ascontiguousarray(a.value).view(f"u{unit}") for a in accesses])
    return np.concatenate(address), instruction, bits
