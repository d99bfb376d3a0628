"""A MODEL of how long a compiled kernel takes on a device: nothing in this file is measured.

A launch is split into phases by the loops of its machine code:

    prologue     what runs once a program; its end too, where it has one column tile
    statistics   loops without matrix instructions: a pass over D columns of rows, in `fold` of the weight; within a loop over
                 column tiles once for each. Trips by what one stores; of a loop without stores, D over the launch's block
    main         innermost loops with matrix instructions
    epilogue     what else a column tile runs once

Of the busiest multiprocessor, a phase takes the largest of these times, for each round of programs that it holds at once:

    issue        instructions · warps, at four a cycle
    tensor       floating-point operations of matrix instructions, at the rate that large products sustain
    shared       bytes that threads and copies read and write in shared memory, at 128 a cycle
    warp         what one warp takes in order: the stalls in the instructions' encoding, and the waits for results of loads
                 and other instructions of no fixed time, that no other work of the warp covers; barriers take BARRIER each
    latency      a copy's time to come, over the steps that it is started ahead

and never less than the whole device's time for its bytes over L2, and for those of DRAM that it is first to read. Phases follow
each other; launches too, LAUNCH apart. Writes to DRAM go on meanwhile: "drain" is what is left of all DRAM traffic of a
launch after its phases. Not modelled: pipes of half rate, bank conflicts, conflicts in DRAM, a clock that varies, work of
programs on one multiprocessor that are in different phases, what L2 keeps from one launch to the next.
"""

import math
import re
from typing import NamedTuple

import machine_code
import torch
from pyembed.kernels.tuning import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor


class Rates(NamedTuple):
    """Of one device."""

    arch: int
    multiprocessors: int
    clock: float  # Hz, at which the data sheet's FLOPs hold
    sustained: float  # share of the data sheet's FLOPs that large products reach, by cuBLAS' bound and in this model alike
    tensor: int  # dense 16-bit FLOPs of a multiprocessor a cycle, sums in fp32; of tf32 half
    legacy: float  # share of them that mma.sync (HMMA) reaches; HGMMA reaches all
    dram: float  # bytes a second
    l2: float  # bytes a second, read
    shared: int  # bytes of shared memory of a multiprocessor
    threads: int  # of a multiprocessor
    latency_l2: int  # cycles
    latency_dram: int  # cycles


# multiprocessors, FLOPs, dram, shared, threads: NVIDIA's data sheets and whitepapers (H100 SXM, H200 SXM, A100 SXM of 80 GB,
#   RTX 4090); CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
# tensor: the whitepapers; clock: the data sheets' FLOPs / multiprocessors / tensor.
# sustained: H100, H200: cuBLAS' 788 of 989 TFLOP/s on an H200 (of an H100 660 to 800 are reported); A100, 4090: assumed.
# legacy: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture" (arXiv 2402.13499): 62.9 % of peak.
# l2: A100 whitepaper: 5,120 bytes a cycle; H100: taken to be the same; 4090: github.com/smallscientist1/cuda_microbenchmark.
# latencies: github.com/markdewing/AI_kernels (GH200, 4090); of an A100 from arXiv 2402.13499, not verified.
DEVICES = {
    "h100": Rates(90, 132, 1.83e9, 0.80, 4096, 0.629, 3.35e12, 9.4e12, 233_472, 2048, 281, 690),
    "h200": Rates(90, 132, 1.83e9, 0.80, 4096, 0.629, 4.8e12, 9.4e12, 233_472, 2048, 281, 690),
    "a100": Rates(80, 108, 1.41e9, 0.85, 2048, 1.0, 2.039e12, 7.2e12, 167_936, 2048, 262, 466),
    "4090": Rates(89, 128, 2.52e9, 0.95, 512, 1.0, 1.008e12, 4.9e12, 102_400, 1536, 296, 636),
}
COPY = 0.90  # share of DRAM's rate that a large copy reaches: 3.00 of 3.35 TB/s on an H100, 4.3 of 4.8 on an H200
LAUNCH = 1.3e-6  # seconds from one kernel of a stream or graph to the next (Hazy Research, megakernel, H100)
REGISTERS = 65_536  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that the system takes of each program (CUDA C++ Programming Guide)
BARRIER = 25  # cycles until all warps have met: assumed
ON_CHIP = {"LDS": 30, "LDSM": 33, "SHFL": 25, "ATOMS": 60}  # cycles until a result is there: arXiv 2402.13499, 29 to 33
OTHER = 20  # cycles, of another instruction of no fixed time (MUFU, conversions, constants): assumed
ISSUE, BANKS = 4, 128  # instructions, and bytes of shared memory, of a multiprocessor a cycle


class Phase(NamedTuple):
    """A part of a program's machine code."""

    name: str
    trips: float  # of the busiest program
    instructions: list  # of one trip


class Cost(NamedTuple):
    """What a phase takes of a whole launch, and the inputs that the times come from."""

    name: str
    trips: float
    instructions: int  # of a warp in one trip
    flops: float  # of a program in one trip
    l2: float  # bytes of the launch
    dram: float  # bytes of the launch
    seconds: dict  # by what would limit it

    @property
    def limit(self):
        return max(self.seconds, key=self.seconds.get)

    @property
    def time(self):
        return self.seconds[self.limit]


def flops_of(instruction):
    """Of a matrix instruction as a whole: HMMA's of a warp, HGMMA's of four."""
    shape = re.match(r"HGMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(\d+)", instruction.name)
    return 2 * math.prod(int(size) for size in shape.groups() if size) if shape else 0


def program_flops(instruction, warps):
    """Of a matrix instruction that all warps of a program run."""
    return flops_of(instruction) * (warps / 4 if instruction.name.startswith("HGMMA") else warps)


def tensor_cycles(instructions, warps, rates):
    """Of a program's matrix instructions; those of tf32 take twice as long as of 16 bits."""
    total = 0.0
    for each in instructions:
        slower = (2 if "TF32" in each.name else 1) / (1 if each.name.startswith("HGMMA") else rates.legacy)
        total += program_flops(each, warps) * slower
    return total / (rates.tensor * rates.sustained)


def shared_bytes(instructions):
    """Of a warp. HGMMA's own reading of its operands is not counted."""
    total = 0
    for each in instructions:
        words = each.name.split(".")
        if words[0] == "LDSM":  # matrices of 128 bytes
            total += 128 * machine_code.READ.get(words[-1], 1)
        elif words[0] in ("LDS", "STS") and "RZ, [RZ]" not in each.operands:  # ptxas' idle loads
            total += 32 * next((machine_code.WIDTHS[word] for word in words[1:] if word in machine_code.WIDTHS), 4)
        elif words[0] == "LDGSTS":
            total += 32 * machine_code.width(each)
    return total


def warp_cycles(instructions, latency):
    """Cycles of one more trip through these instructions, by one warp alone and in order. latency: of global loads."""

    def run(times):
        now, ready = 0, [0] * 8
        for each in instructions * times:
            kind = each.name.partition(".")[0]
            now = max([now, *(ready[board] for board in each.waits)])
            for board in each.sets:
                is_late = machine_code.is_load(each) or kind in ("ATOMG", "ATOM")
                ready[board] = max(ready[board], now + (latency if is_late else ON_CHIP.get(kind, OTHER)))
            now += max(1, each.stall) + (BARRIER if kind == "BAR" else 0)
        return now

    return run(3) - run(2)


def steps_ahead(instructions, stages):
    """How many trips before its use a copy into shared memory is started: by the groups of LDGSTS that may be under way at the
    wait for one; of TMA, by the stages of the launch."""
    waits = [machine_code.allows(each) for each in instructions if each.name == "DEPBAR.LE"]
    groups = sum(each.name == "LDGDEPBAR" for each in instructions)
    waits = [allowed for allowed in waits if allowed is not None]
    return max(waits) / groups + 1 if waits and groups else max(1, stages - 1)


def phases(blocks, trips):
    """[Phase] of a kernel's blocks. trips(name, instructions, nested): of a phase; nested: within another loop."""
    loops, order = machine_code.natural_loops(blocks)

    def code(members):
        return [each for place in order if place in members for each in blocks[place].instructions]

    def works(each):  # other loops only wait, and what they wait for is counted elsewhere
        return machine_code.is_copy(each) or machine_code.width(each) or flops_of(each)

    loops = {header: members for header, members in loops.items() if any(map(works, code(members)))}
    found, rest = [], set(order)
    for header, members in loops.items():
        inner = [loops[other] for other in loops if other != header and loops[other] < members]
        multiplies, own = any(map(flops_of, code(members))), members.difference(*inner)
        parts = {"epilogue" if multiplies and inner else "main" if multiplies else "statistics": own}
        if "main" in parts:  # tiles and steps may be one loop
            now_and_then = _epilogue(blocks, header, own)
            parts = {"main": own - now_and_then} | ({"epilogue": now_and_then} if now_and_then else {})
        nested = any(members < other for other in loops.values())
        found += [Phase(name, trips(name, code(part), nested), code(part)) for name, part in parts.items()]
        rest -= members
    return [Phase("prologue", 1, code(rest)), *found]


def _epilogue(blocks, header, members):
    """The blocks of a loop that a trip may leave out, if they write to memory: a tile's end, in a loop over tiles and steps."""

    def comes_back(without):
        seen, waiting = {without}, [place for place in blocks[header].next if place in members]
        while waiting:
            place = waiting.pop()
            if place == header:
                return True
            if place not in seen:
                seen.add(place)
                waiting += [following for following in blocks[place].next if following in members]
        return False

    def steps(place):  # products and copies are a step's, though a thread or a last trip may leave them out
        return any(flops_of(each) or machine_code.is_copy(each) for each in blocks[place].instructions)

    left_out = {place for place in members - {header} if comes_back(place) and not steps(place)}
    names = [each.name for place in left_out for each in blocks[place].instructions]
    return left_out if any(name.startswith(("STG", "UTMASTG")) for name in names) else set()


def tensors_of(value, name=""):
    """[(name of the argument, tensor)] of a launch's values."""
    if isinstance(value, dict):
        return [pair for key, each in value.items() for pair in tensors_of(each, key)]
    if isinstance(value, tuple):
        return [pair for each in value for pair in tensors_of(each, name)]
    value = value.base if isinstance(value, TensorDescriptor) else value
    return [(name, value)] if isinstance(value, torch.Tensor) else []


PHASES = {"token": "statistics", "terms": "statistics", "weight": "main", "folded": "main"}  # in which a tensor is read
WRITTEN, MADE = {"hidden", "qkv", "statistics"}, {"folded", "shift", "residual", "normed"}  # MADE: before the product


def dram_bytes(launch, case, names):
    """{phase: bytes that it reads first}, and bytes written under None: each tensor once, of tables as many rows as there are
    tokens, or positions. names: of the phases."""
    found = dict.fromkeys([*names, None], 0.0)
    for name, tensor in tensors_of(launch.values):
        place = next((each for each in (PHASES.get(name, "epilogue"), "main", "statistics") if each in found), "prologue")
        rows = max(tensor.shape[0] if tensor.dim() > 1 else 1, 1)
        most = rows if rows == case.N else max(case.T, 1) if name in ("terms", "epilogue") else case.M
        written = name in WRITTEN or name in MADE and "main" not in found
        found[None if written else place] += tensor.numel() * tensor.element_size() * min(1, most / rows)
    return found


def priced(launch, rates, case, registers, shared, blocks):
    """[Cost] of a launch's phases, by its blocks, a thread's registers and a program's bytes of shared memory.

    case: has M, T, D, N, itemsize and column_tiles(BLOCK_N), a count."""
    warps = launch.options.get("num_warps", 4)
    size_m, size_n, size_k = (launch.constant(f"BLOCK_{axis}") or 1 for axis in "MNK")
    programs, tiles = math.prod(launch.grid), cdiv(case.M, size_m) * case.column_tiles(size_n)
    columns, rows = cdiv(case.D, size_k), launch.constant("BLOCK_M") or size_n  # rows: of a program that walks over them
    per_program = max(1, cdiv(tiles, programs))
    tile_flops = 2 * size_m * size_n * size_k * columns
    per_tile = tile_flops * min(1, tiles / programs)  # less, where programs share a tile's columns

    def trips(name, own, nested):
        if name == "main":
            return per_program * per_tile / sum(program_flops(each, warps) for each in own)
        if name == "statistics":
            stored = sum(machine_code.width(each) for each in own if each.name.startswith("STG")) * 32 * warps
            wide = stored / (rows * case.itemsize) or launch.constant("BLOCK_D") or size_k
            return math.ceil(case.D / wide) * (per_program if nested else 1)
        return per_program

    found = phases(blocks, trips)
    resident = min(REGISTERS // (registers * warps * 32), rates.shared // (shared + RESERVED), rates.threads // (warps * 32))
    if resident < 1:
        raise ValueError(f"{launch.kernel.__name__}: expected a program that fits, got {registers} registers, {shared} bytes")
    busiest = cdiv(programs, rates.multiprocessors)
    rounds = [min(resident, busiest)] * (busiest // min(resident, busiest))
    rounds += [busiest % min(resident, busiest)] if busiest % min(resident, busiest) else []
    dram = dram_bytes(launch, case, {phase.name for phase in found})
    share = {name: sum(phase.name == name for phase in found) for name in dram if name}
    once = cdiv(case.M, size_m) == 1  # each tile of the weight is read by one program, from DRAM
    block = re.search(r"tensordesc<\w+\[(\d+), ?(\d+)\]", str(launch.signature))
    tma = int(block[1]) * int(block[2]) * case.itemsize if block else 0
    stages, l2 = launch.options.get("num_stages", 3), rates.latency_l2
    costs = []
    for phase in found:
        copied = rates.latency_dram if phase.name == "statistics" or once and phase.name == "main" else l2
        read = dram[phase.name] / share[phase.name]
        ahead = (
            copied / steps_ahead(phase.instructions, stages) if phase.name in LOOPS and has_copies(phase.instructions) else 0
        )
        alone = {
            "warp": warp_cycles(phase.instructions, rates.latency_dram if phase.name == "prologue" else l2),
            "latency": ahead,
        }
        costs.append(_cost(phase, rates, warps, programs, rounds, read, tma, alone))
    written, left = dram[None], sum(dram.values()) / (rates.dram * COPY) - sum(cost.time for cost in costs)
    return [*costs, Cost("drain", 1, 0, 0, 0, written, {"DRAM": max(0.0, left)})]


LOOPS = ("main", "statistics")


def has_copies(instructions):
    return any(map(machine_code.is_copy, instructions))


def _cost(phase, rates, warps, programs, rounds, dram, tma, alone):
    """alone: {what limits a program that has a multiprocessor for itself: cycles of a trip}."""
    code = phase.instructions
    # copies ahead of a loop are those that the last trips of the loop leave out
    moved = [each for each in code if machine_code.width(each) and (phase.name in LOOPS or not machine_code.is_copy(each))]
    fetched = sum(machine_code.width(each) for each in moved) * 32 * warps
    if phase.name in LOOPS:
        fetched += tma * sum(each.name.startswith("UTMALDG") for each in code)
    l2 = fetched * phase.trips * programs
    flops, tensor = sum(program_flops(each, warps) for each in code), tensor_cycles(code, warps, rates)
    together = {"issue": len(code) * warps / ISSUE, "tensor": tensor, "shared": shared_bytes(code) * warps / BANKS}
    scale = phase.trips / rates.clock
    seconds = {name: sum(rounds) * cycles * scale for name, cycles in together.items()}
    seconds |= {name: len(rounds) * cycles * scale for name, cycles in alone.items()}
    # full rounds may be limited by what programs share, and a last one by what each takes alone
    best = sum(max(max(together.values()) * count, max(alone.values())) for count in rounds) * scale
    seconds[max(seconds, key=seconds.get)] = best
    seconds |= {"L2": l2 / rates.l2, "DRAM": dram / (rates.dram * COPY)}
    return Cost(phase.name, phase.trips, len(code), flops, l2, dram, seconds)
