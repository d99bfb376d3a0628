"""Reads machine code as an expert does: its loops, and what those with matrix instructions load, store and wait for.

sass() takes the text of `nvdisasm -c`, amdgcn() that of LLVM for AMD; both give basic blocks, in which loops() finds loops.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Instruction(NamedTuple):
    name: str  # as LDG.E.128 or global_load_dwordx4
    operands: str
    control: int = 0  # with `nvdisasm -hex`: stall (4 bits), a hint (1), scoreboards that it sets (3, 3) and waits for (6)

    @property
    def stall(self):
        """Cycles after which the warp's next instruction may issue, at the earliest."""
        return self.control & 15

    @property
    def sets(self):
        """Scoreboards that it clears when its result is there, or when it has read its operands."""
        return {self.control >> 5 & 7, self.control >> 8 & 7} - {7} if self.control else set()

    @property
    def waits(self):
        """Scoreboards that must be clear before it issues."""
        return {board for board in range(6) if self.control >> 11 + board & 1}


@dataclass
class Block:
    """Instructions without a jump between them, and the blocks that may run next."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


class Loop(NamedTuple):
    body: list[Instruction]  # of its blocks, inner loops' too, in the order in which they run
    innermost: bool  # no loop within it has matrix instructions

    def matrix(self):
        return [each for each in self.body if MATRIX.match(each.name)]


MATRIX = re.compile(r"HGMMA|HMMA|IMMA|DMMA|OMMA|QMMA|UTC\w*MMA|v_mfma_|v_wmma_|v_smfmac_")
ENCODING = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/$")  # the upper half of an instruction, on a line of its own
LINES = {  # a label, or an instruction with what guards it
    "sass": re.compile(
        r"(?P<label>[.$][\w$.]+):|\s*/\*\w+\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<name>[A-Z][\w.]*)(?P<operands>[^;]*);"
    ),
    "amdgcn": re.compile(r"(?P<label>[.\w]+):|\t(?P<name>[a-z]\w+)(?P<operands>[^;]*)(?P<guard>(?!))?"),
}


SCHEDULE = re.compile(r"\s(?:&\w+=|\?\w).*")  # which some versions of nvdisasm print behind the operands


def _blocks(language, text, jumps):
    """jumps(instruction, guard): None where it goes on with the next, else the label that it may jump to ("": it ends), and
    whether it may go on with the next too."""
    blocks, labels, targets, last = [Block()], {}, {}, None
    for line in text.splitlines():
        found, encoding = LINES[language].match(line), ENCODING.match(line)
        if encoding and last:
            last[-1] = last[-1]._replace(control=int(encoding[1], 16) >> 41)
        if found is None:
            continue
        if found["label"]:
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[found["label"]] = len(blocks) - 1
            continue
        instruction = Instruction(found["name"], SCHEDULE.sub("", found["operands"]).strip())
        blocks[-1].instructions.append(instruction)
        last = blocks[-1].instructions
        jump = jumps(instruction, found["guard"])
        if jump is not None:
            targets[len(blocks) - 1] = jump
            blocks.append(Block())
    for place, block in enumerate(blocks):
        label, goes_on = targets.get(place, ("", True))
        following = [place + 1] if goes_on and place + 1 < len(blocks) else []
        block.next = [*([labels[label]] if label else []), *following]
    return blocks


def sass(text):
    """The basic blocks of a kernel of NVIDIA's. A call comes back, so it is no jump; but ptxas also calls labels of the kernel
    itself, and never comes back."""

    def jumps(instruction, guard):
        kind = instruction.name.partition(".")[0]
        if kind in ("EXIT", "RET"):
            return "", guard is not None
        if kind != "BRA" and not (kind == "CALL" and "`(.L_x_" in instruction.operands):
            return None
        condition, _, label = instruction.operands.partition("`(")  # BRA.U UP0, `(.L_x_1)
        return label.rstrip(")"), guard is not None or bool(condition.strip())

    return _blocks("sass", text, jumps)


def amdgcn(text):
    """The basic blocks of a kernel of AMD's."""

    def jumps(instruction, guard):
        if instruction.name in ("s_endpgm", "s_setpc_b64"):
            return "", False
        if instruction.name == "s_branch" or instruction.name.startswith("s_cbranch"):
            return instruction.operands, instruction.name != "s_branch"
        return None

    return _blocks("amdgcn", text, jumps)


def natural_loops(blocks):
    """{header: the blocks of its loop}, and the blocks that can run, in an order in which they do. A loop is, from each block
    that a later one jumps back to, all that lead to that jump."""
    order, backwards = [], {}  # order: of leaving, so that reversed a block comes before those that follow it
    entered, left, path = {0}, set(), [(0, iter(blocks[0].next))]
    while path:
        place, following = path[-1]
        successor = next(following, None)
        if successor is None:
            path.pop()
            left.add(place)
            order.append(place)
        elif successor not in entered:
            entered.add(successor)
            path.append((successor, iter(blocks[successor].next)))
        elif successor not in left:
            backwards.setdefault(successor, []).append(place)
    before = {place: [i for i in entered if place in blocks[i].next] for place in entered}
    found = {}
    for header, ends in backwards.items():
        members, waiting = {header}, list(ends)
        while waiting:
            place = waiting.pop()
            if place not in members:
                members.add(place)
                waiting += before[place]
        found[header] = members
    return found, order[::-1]


def loops(blocks):
    """The loops that have matrix instructions."""
    found, order = natural_loops(blocks)
    bodies = {
        header: [each for place in order if place in members for each in blocks[place].instructions]
        for header, members in found.items()
    }
    with_matrix = [header for header, body in bodies.items() if any(MATRIX.match(each.name) for each in body)]
    return [
        Loop(bodies[header], not any(other != header and found[other] < found[header] for other in with_matrix))
        for header in with_matrix
    ]


WIDTHS = {
    "U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "96": 12, "128": 16, "256": 32,
    "ubyte": 1, "sbyte": 1, "byte": 1, "u8": 1, "i8": 1, "b8": 1, "ushort": 2, "sshort": 2, "short": 2, "u16": 2, "i16": 2,
    "b16": 2, "dwordx2": 8, "b64": 8, "dwordx3": 12, "b96": 12, "dwordx4": 16, "b128": 16,
}  # fmt: skip
ACCESS = re.compile(r"(?:LDG|STG|LDGSTS|LD|ST)(?=\.|$)|(?:global|buffer|flat)_(?:load|store)_")  # of memory that is not shared
LOAD = re.compile(r"(?:LDG|LD)(?=\.|$)|(?:global|buffer|flat)_load_")
COPY = re.compile(r"LDGSTS|UTMALDG|UBLKCP|(?:global|buffer)_load_lds_")  # into shared memory, without passing registers


def is_copy(instruction):
    """Whether it reads global memory into shared memory by itself, while the program goes on."""
    return bool(COPY.match(instruction.name)) or bool(LOAD.match(instruction.name)) and instruction.operands.endswith(" lds")


def width(instruction):
    """Bytes that a thread reads, writes or copies of global memory; None: another instruction, or TMA, which copies blocks."""
    if not ACCESS.match(instruction.name):
        return None
    return min((WIDTHS[word] for word in re.split(r"[._]", instruction.name) if word in WIDTHS), default=4)


def is_load(instruction):
    """Whether it reads global memory into registers."""
    return bool(LOAD.match(instruction.name)) and not is_copy(instruction)


def registers(operand):
    """The numbers of the registers that operands name: {24, 8} of "R24.reuse, [R8.64]"."""
    return {int(number) for number in re.findall(r"\bR(\d+)", operand)}


def matrix_overlaps(loop):
    """Whether products run while the next ones' operands are on their way, by the loop's waits:

    HGMMA      the loop waits for all batches but the last (WARPGROUP.DEPBAR.LE gsb0, 1)
    UTC*MMA    it waits for another batch than the one that it has just started (UTCBAR [a], SYNCS.PHASECHK [b])
    others     a product runs between a load and the wait for it: LDGSTS and DEPBAR, global_load and s_waitcnt vmcnt; where the
               loop has no such wait, between the read of an operand from shared memory and its use
    """
    names = [each.name for each in loop.body]
    if any(name.startswith("HGMMA") for name in names):
        depths = [int(each.operands.rpartition(",")[2], 0) for each in loop.body if each.name.startswith("WARPGROUP.DEPBAR")]
        return any(depths) or not depths
    if any(name.startswith("UTC") for name in names):
        return not _waits_for_its_own(loop.body)
    return _products_meet_loads(loop.body)


def _waits_for_its_own(body):
    """Whether a loop of UTC*MMA waits for the barrier that its last products report to."""
    reported, waits = None, False
    for each in body:
        place = re.search(r"\[([^\]]*)\]", each.operands)
        if each.name.startswith("UTCBAR"):
            reported = place[1]
        elif each.name.startswith("SYNCS.PHASECHK") and reported is not None:
            waits |= place[1] == reported
    return waits


def _products_meet_loads(body):
    """Whether in a loop's steady state a product runs while a load is under way."""
    waits = [wait for wait in map(allows, body) if wait is not None]
    if not waits:
        return _operands_come_early(body)
    pending, meets = 0, False
    for each in body * 2:
        allowed = allows(each)
        if allowed is not None:
            pending = min(pending, allowed)
        elif each.name == "LDGDEPBAR" or each.name[0].islower() and (is_load(each) or is_copy(each)):
            pending += 1  # a group of LDGSTS, or an AMD load
        elif MATRIX.match(each.name):
            meets |= pending > 0
    return meets


def allows(instruction):
    """The number of loads that may be under way after a wait; None: the instruction waits for no load."""
    if instruction.name == "DEPBAR.LE" and instruction.operands.startswith("SB0"):
        return int(instruction.operands.partition(",")[2].split(",")[0], 0)
    if instruction.name in ("s_waitcnt", "s_wait_loadcnt"):
        found = re.search(r"vmcnt\((\d+)\)", instruction.operands) or re.fullmatch(r"(0x\w+|\d+)", instruction.operands)
        return found and int(found[1], 0)
    return None


READ = {"4": 4, "2": 2, "128": 4, "64": 2}  # registers, by the end of LDSM's and LDS' names


def _operands_come_early(body):
    """Whether another product runs between the read of an operand from shared memory and the first product that uses it."""
    pending, early = {}, False  # {register: whether a product has run since it was read}
    for each in body * 2:
        target, _, sources = each.operands.partition(",")
        if each.name.startswith("LDS"):  # LDSM too
            first, count = min(registers(target), default=0), READ.get(each.name.rpartition(".")[2], 1)
            pending |= dict.fromkeys(range(first, first + count), False)
        elif MATRIX.match(each.name):
            used = registers(sources) & pending.keys()
            early |= any(pending.pop(register) for register in used)
            pending = dict.fromkeys(pending, True)
    return early
