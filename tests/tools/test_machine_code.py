"""helpers/machine_code.py finds loops and what is wrong with them, in short texts written as nvdisasm and LLVM write them."""

import machine_code
import pytest
from machine_code import amdgcn, is_copy, is_load, loops, matrix_overlaps, sass, width


def sass_of(*lines):
    """nvdisasm's text: labels end with a colon."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{i:04x}*/                   {line} ;" for i, line in enumerate(lines)
    )


def amd_of(*lines):
    return "\n".join(line if line.endswith(":") else f"\t{line}" for line in lines)


def names(loop):
    return [each.name for each in loop.body]


HMMA, COPY, MFMA = (
    "HMMA.16816.F32 R4, R8, R12, R4",
    "LDGSTS.E.BYPASS.128 [R5], [R6.64]",
    "v_mfma_f32_16x16x16_f16 v[0:3], v4, v5",
)
NESTED = sass_of(
    "kernel:", "S2R R0, SR_TID.X", "@P0 EXIT",
    ".L_x_0:", "LDG.E.64 R2, desc[UR4][R2.64]",
    ".L_x_1:", "DEPBAR.LE SB0, 0x1", "@!P4 BRA `(.L_x_3)",
    ".L_x_2:", "HMMA.16816.F32 R4, R8, R12, R4", "LDGSTS.E.BYPASS.128 [R5], desc[UR4][R6.64], P1", "LDGDEPBAR",
    "@!P1 BRA `(.L_x_1)",
    "STG.E.U16 desc[UR4][R2.64], R7", "BRA.U UP0, `(.L_x_0)", "EXIT",
    ".L_x_3:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR7], R6", "@!P4 BRA `(.L_x_3)", "BRA `(.L_x_2)",
    ".L_x_4:", "BRA `(.L_x_4)",
)  # fmt: skip


def test_loops():
    """One within another, a part of it that stands elsewhere, and loops without a matrix instruction, which are left out."""
    outer, inner = sorted(loops(sass(NESTED)), key=lambda loop: loop.innermost)
    assert inner.innermost and not outer.innermost
    assert names(inner) == [
        "DEPBAR.LE", "BRA", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA", "BRA",
        "HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDGDEPBAR", "BRA",
    ]  # fmt: skip
    assert set(names(outer)) == {*names(inner), "LDG.E.64", "STG.E.U16", "BRA.U"} and len(outer.body) == len(inner.body) + 3
    assert [each.name for each in inner.matrix()] == ["HMMA.16816.F32"]


def test_calls():
    """One of a label of the kernel is a jump, as ptxas leaves a loop; one of a function comes back."""
    text = sass_of(
        ".L_x_0:", "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rem_s64)", ".L_x_1:", HMMA, "@P5 CALL.REL.NOINC `(.L_x_2)",
        "BRA `(.L_x_1)", ".L_x_2:", "STG.E.128 [R2.64], R4", "@P0 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    outer, inner = sorted(loops(sass(text)), key=lambda loop: loop.innermost)
    assert names(inner) == ["HMMA.16816.F32", "CALL.REL.NOINC", "BRA"] and "STG.E.128" in names(outer)


def test_schedules():
    """What some versions of nvdisasm print behind the operands is none of them."""
    (loop,) = loops(sass(sass_of(".L_x_0:", HMMA + "  &req={1}  ?trans11", "@P0 BRA `(.L_x_0)   &req={0}   ?trans5", "EXIT")))
    assert [" ".join(each[:2]) for each in loop.body] == [HMMA, "BRA `(.L_x_0)"]


def test_no_loop():
    assert loops(sass(sass_of("HMMA.16816.F32 R4, R8, R12, R4", "BRA `(.L_x_0)", "NOP", ".L_x_0:", "EXIT"))) == []
    assert loops(sass(sass_of(".L_x_0:", "FFMA R1, R2, R3, R1", "@P0 BRA `(.L_x_0)", "EXIT"))) == []


def test_loops_of_amd():
    """Whose blocks may stand in another order than they run, and whose directives and data are no instructions."""
    text = amd_of(
        ".section .text", "kernel:", "s_branch .LBB0_2",
        ".LBB0_1:", "s_waitcnt vmcnt(0)", MFMA, "s_cbranch_scc0 .LBB0_4",
        ".LBB0_2:", "s_cbranch_execz .LBB0_3", "global_load_ushort v1, v[2:3], off ; 2-byte",
        ".LBB0_3:", "s_branch .LBB0_1",
        ".LBB0_4:", "global_store_dwordx4 v[2:3], v[4:7], off", "s_endpgm",
        ".LBB0_5:", MFMA, "s_branch .LBB0_5",
    )  # fmt: skip
    (loop,) = loops(amdgcn(text))
    assert names(loop) == [
        "s_cbranch_execz", "global_load_ushort", "s_branch", "s_waitcnt", "v_mfma_f32_16x16x16_f16", "s_cbranch_scc0",
    ]  # fmt: skip
    assert loop.body[1].operands == "v1, v[2:3], off"


@pytest.mark.parametrize(
    "name, operands, bytes, load, copy",
    [
        ("LDG.E", "R2, desc[UR4][R2.64]", 4, True, False),
        ("LDG.E.U16.CONSTANT", "R2, [R2.64]", 2, True, False),
        ("LDG.E.LTC128B.U8", "R2, [R2.64]", 1, True, False),
        ("LDG.E.128", "R4, [R2.64]", 16, True, False),
        ("STG.E.64", "desc[UR4][R2.64], R4", 8, False, False),
        ("STG.E.U16", "[R2.64], R4", 2, False, False),
        ("LDGSTS.E.BYPASS.128", "[R5], [R6.64]", 16, False, True),
        ("LDGSTS.E", "[R5], [R6.64]", 4, False, True),
        ("UTMALDG.2D", "[UR8], [UR4]", None, False, True),
        ("LDS.U16", "R4, [R2]", None, False, False),
        ("LDSM.16.M88.4", "R4, [R2]", None, False, False),
        ("LDGDEPBAR", "", None, False, False),
        ("global_load_ushort", "v1, v[2:3], off", 2, True, False),
        ("global_load_d16_hi_b16", "v1, v[2:3], off", 2, True, False),
        ("global_load_dword", "v1, v[2:3], off", 4, True, False),
        ("buffer_load_dwordx4", "v[4:7], v1, s[4:7], 0 offen", 16, True, False),
        ("buffer_load_dwordx4", "v1, s[4:7], 0 offen lds", 16, False, True),
        ("global_store_b128", "v[2:3], v[4:7], off", 16, False, False),
        ("global_store_d16_hi_b16", "v[2:3], v4, off", 2, False, False),
        ("ds_read_u16", "v4, v2", None, False, False),
        ("global_atomic_add_x2", "v[6:7], v7, s[6:7]", None, False, False),
    ],
)
def test_accesses(name, operands, bytes, load, copy):
    instruction = machine_code.Instruction(name, operands)
    assert (width(instruction), is_load(instruction), is_copy(instruction)) == (bytes, load, copy)


def test_encoding():
    """As `nvdisasm -hex` writes it, the upper half of each instruction on a line of its own."""
    text = """
        /*0900*/                   LDGSTS.E.BYPASS.128 [R113], desc[UR10][R90.64], P6 ;                /* 0x000000005a717fae */
                                                                                                       /* 0x0003e2000b101c4a */
        /*0960*/                   LDGDEPBAR ;                                                         /* 0x00000000000079af */
                                                                                                       /* 0x000e220000000000 */
        /*0970*/              @!P0 IMAD.MOV.U32 R27, RZ, RZ, R113 ;                                    /* 0x000000ffff1b7224 */
                                                                                                       /* 0x003fc400078e00ff */
"""
    found = [(each.stall, each.sets, each.waits) for each in sass(text)[0].instructions]
    assert found == [(1, {1}, set()), (1, {0}, set()), (2, set(), {0, 1})]
    assert sass(sass_of("NOP"))[0].instructions[0].sets == set()


HMMA, COPY, MFMA = (
    "HMMA.16816.F32 R4, R8, R12, R4",
    "LDGSTS.E.BYPASS.128 [R5], [R6.64]",
    "v_mfma_f32_16x16x16_f16 v[0:3], v4, v5",
)


@pytest.mark.parametrize(
    "overlaps, body",
    [
        # One batch of wgmma stays under way, or each is waited for.
        (True, ["HGMMA.64x256x16.F32 R24, gdesc[UR16], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"]),
        (False, ["HGMMA.64x256x16.F32 R24, gdesc[UR16], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]),
        (False, ["HGMMA.64x8x16.F32 R24, gdesc[UR16], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"] * 4),
        # The barrier of this step's products, or of those before.
        (True, ["UTCHMMA gdesc[UR8], gdesc[UR12], tmem[UR5]", "UTCBAR [UR17], URZ", "SYNCS.PHASECHK.TRANS64 P5, [UR65], R6"]),
        (False, ["UTCHMMA gdesc[UR8], gdesc[UR12], tmem[UR5]", "UTCBAR [UR17], URZ", "SYNCS.PHASECHK.TRANS64 P5, [UR17], R6"]),
        # A copy goes on during the products, or is waited for before them.
        (True, ["DEPBAR.LE SB0, 0x1", HMMA, COPY, "LDGDEPBAR"]),
        (False, ["DEPBAR.LE SB0, 0x0", HMMA, COPY, "LDGDEPBAR"]),
        (True, ["DEPBAR.LE SB0, 0x0", COPY, "LDGDEPBAR", HMMA]),
        # Without copies (TMA): an operand is read while another product runs, or each just before its own.
        (
            True,
            ["LDSM.16.M88.4 R8, [R1]", "LDSM.16.M88.2 R12, [R2]", HMMA.replace("R12", "R14"), HMMA, "UTMALDG.2D [UR8], [UR4]"],
        ),
        (True, ["LDS.128 R8, [R1]", "LDS.64 R12, [R2]", HMMA.replace("R8, R12", "R16, R20"), HMMA.replace("R12", "R13")]),
        (False, ["LDSM.16.M88.4 R8, [R1]", "LDSM.16.M88.2 R12, [R2]", HMMA, "UTMALDG.2D [UR8], [UR4]"]),
    ],
)
def test_overlap(overlaps, body):
    (loop,) = loops(sass(sass_of(".L_x_0:", *body, "@P0 BRA `(.L_x_0)", "EXIT")))
    assert matrix_overlaps(loop) == overlaps


@pytest.mark.parametrize(
    "overlaps, body",
    [
        (True, ["global_load_dwordx4 v[4:7], v[2:3], off", MFMA, "s_waitcnt vmcnt(0)", "ds_write_b128 v8, v[4:7]"]),
        (False, ["global_load_dwordx4 v[4:7], v[2:3], off", "s_waitcnt vmcnt(0)", "ds_write_b128 v8, v[4:7]", MFMA]),
        (True, ["global_load_dwordx4 v[4:7], v[2:3], off"] * 2 + ["s_waitcnt vmcnt(1) lgkmcnt(0)", MFMA]),
    ],
)
def test_overlap_of_amd(overlaps, body):
    (loop,) = loops(amdgcn(amd_of(".LBB0_0:", *body, "s_cbranch_scc1 .LBB0_0", "s_endpgm")))
    assert matrix_overlaps(loop) == overlaps
