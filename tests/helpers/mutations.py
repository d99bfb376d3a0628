"""Breaks the code in one place at a time and runs the tests that should see it; a mutant that lives is a test that is missing.

    python tests/helpers/mutations.py [part of a mutation's text or file ...]

Works on a copy, prints a table and exits with 1 where a mutant lived. Every mutation must fit the code in exactly one place.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutation(NamedTuple):
    file: str
    before: str
    after: str
    tests: str  # pytest's arguments


KERNELS = "kernels/triton/"
EMBED, GRAD, QKV = (f"tests/kernels/test_{name}.py" for name in ("embed", "embed_grad", "embed_qkv"))
ROTARY, DISTINCT = (f"tests/kernels/test_{name}.py" for name in ("rotary", "distinct_kernels"))
TERMS, ENDS = (f"tests/kernels/test_{name}.py" for name in ("terms", "epilogue"))
SAME, SIZES, TABLE = (f"tests/plans/test_{name}.py" for name in ("determinism", "sizes", "table"))
IDS, CAST, FUNCTIONS = (f"tests/machinery/test_{name}.py" for name in ("ids", "autocast", "functional"))
FAST, LAUNCHES, OPS = (f"tests/machinery/test_{name}.py" for name in ("fast_path", "launches", "ops"))
EMBEDDING, MODULES, TAKEN = (f"tests/modules/test_{name}.py" for name in ("embedding", "modules", "known"))
KEPT = "tests/plans/test_kept.py"
SAMES, PLANNER = (f"tests/plans/test_{name}.py" for name in ("distinct", "planner"))
PARALLEL, TRACES, UNUSED = (f"tests/machinery/test_{name}.py" for name in ("parallel", "traces", "unused"))
TUNING, AHEAD = (f"tests/kernels/test_{name}.py" for name in ("tuning", "ahead_of_time"))
RUN, ONE_PASS, OPERATORS = (f"pyembed/{name}.py" for name in ("run", "plans/one_pass", "plans/operators"))
CHOICE, PARTS = "pyembed/plans/choice.py", "pyembed/modules/parts.py"
KNOWN, KEEPS = "pyembed/modules/known.py", "pyembed/modules/keeps_table.py"
PROOFS, TRIALS = (f"pyembed/modules/{name}.py" for name in ("proofs", "trials"))
SWAPS, PLACES = (f"tests/modules/test_{name}.py" for name in ("swaps", "positions"))
TURNS, TURNS_OF = "pyembed/rotary.py", "pyembed/rotary_of.py"
BENCH, DATA, COMMAND, DOCTOR = (f"tests/tools/test_{name}.py" for name in ("bench", "data", "bench_command", "doctor"))
MEMORY = "pyembed/memory.py"
GROWTH, GROWN, TABLES, UNTRAINED, PIECES = (
    f"pyembed/vocabulary/{name}.py" for name in ("growth", "optimizer", "tables", "untrained", "pieces")
)
TO_GROW, TO_STEP, TO_REPORT, TO_CUT = (
    f"tests/vocabulary/test_{name}.py" for name in ("growth", "grown_optimizer", "untrained", "pieces")
)
ROWS, GATHER, KEYS, TO_ROW, TO_GATHER = (
    "pyembed/rows.py",
    KERNELS + "gather.py",
    KERNELS + "keys.py",
    "tests/vocabulary/test_rows_distinct.py",
    "tests/kernels/test_gather.py",
)
HEAD, TIED = "pyembed/vocabulary/head.py", "pyembed/tied.py"
TO_LOSE, TO_TIE = (f"tests/vocabulary/test_{name}.py" for name in ("head", "tied"))
MUTATIONS = [
    Mutation(GATHER, "tl.where((key >= V)[:, None], y, x)", "x + y", TO_GATHER + " -k equals"),
    Mutation(GATHER, "keys.reshape(-1) - size", "keys.reshape(-1)", TO_GATHER + " -k gradients"),
    Mutation(KEYS, "report_absent(report, 0, row, m, (m < M) & (key == -1), V)", "key = key", TO_GATHER),
    Mutation(KEYS, "tl.where(TABLE == OWN, key, row)", "row", "tests/vocabulary/test_rows.py -k clamped"),
    Mutation(KEYS, "tl.where(total == R, rank + start + V, WRONG)", "rank + start + V", TO_GATHER + " -k nobody"),
    Mutation(KEYS, "tl.where(p < tl.program_id(0), count, 0)", "0", TO_GATHER + " -k test_keys"),
    Mutation(ROWS, "torch.where(is_right, rank - 1, -2)", "rank - 1", TO_ROW.replace("_distinct", "") + " -k transform"),
    Mutation(ROWS, "masked_fill(self.slot != -1, 0)", "masked_fill(self.slot < -1, 0)", TO_ROW),
    Mutation("pyembed/plans/distinct.py", "count if used is None else used", "count", TO_GATHER + " -k front_end"),
    Mutation(ROWS, "else mine * terms.scale", "else mine", TO_ROW + " -k train"),
    Mutation(ROWS, "torch.where(found < 0, found, found + start)", "found", TO_ROW),
    Mutation(ROWS, "found if self._scale is None else found * self._scale", "found", TO_ROW),
    Mutation(
        "pyembed/run.py",
        "        compare_ranges(call)  # beyond the table's ids are those of other rows\n",
        "",
        TO_ROW + " -k beyond",
    ),
    Mutation(CHOICE, ".requires_grad_(trains)", "", TO_GATHER),
    Mutation("pyembed/plans/gathered.py", "elif padding_idx >= 0", "elif padding_idx > 99", TO_GATHER + " -k second"),
    Mutation(
        KERNELS + "tiles.py",
        "known = (row >= 0) & (row < size)",
        "known = row < size",
        EMBED + " -k without_a_row",
    ),
    Mutation(
        KERNELS + "tiles.py",
        "other=0).to(tl.int64)\n    known",
        "other=0)\n    known",
        SIZES + " -k tables_beyond",
    ),
    Mutation(KERNELS + "tiles.py", "place = m % T\n    known = place", "place = m\n    known = place", QKV),
    Mutation(KERNELS + "tiles.py", "x = (x.to(ACC) * scale).to(x.dtype)", "x = x", TERMS + " -k scale"),
    Mutation(KERNELS + "tiles.py", "load_rows(kind_ids, m % period,", "load_rows(kind_ids, m,", TERMS + " -k segments"),
    Mutation(KERNELS + "tiles.py", ") >> 32\n", ") >> 33\n", TERMS + " -k sines"),
    Mutation(KERNELS + "tiles.py", "turn > 0, half, -half) - turn", "turn > 0, half, half) - turn", TERMS + " -k sines"),
    Mutation(KERNELS + "tiles.py", "bits) >= probability", "bits) < probability", TERMS + " -k nn_dropouts"),
    Mutation(KERNELS + "tiles.py", "* factor, 0.0).to(x.dtype)", ", 0.0).to(x.dtype)", TERMS + " -k nn_dropouts"),
    Mutation(KERNELS + "tiles.py", "low + zero, high + zero, zero)", "zero, high + zero, zero)", TERMS + " -k nn_dropouts"),
    Mutation(
        KERNELS + "tiles.py",
        "tl.join(tl.join(a, c), tl.join(b, d))",
        "tl.join(tl.join(a, a), tl.join(b, d))",
        TERMS + " -k nn_drop",
    ),
    Mutation(KERNELS + "tiles.py", "delta * delta * (seen * share)", "0.0", QKV + " -k variants"),
    Mutation(KERNELS + "tiles.py", "1.0 / tl.sqrt(scale / D + eps)", "1.0 / tl.sqrt(scale / D)", QKV),
    Mutation(KERNELS + "tiles.py", "scale += tl.sum(apart * apart * seen, 1)", "scale += 0.0", QKV + " -k variants"),
    Mutation(KERNELS + "tiles.py", "D % BLOCK_K - tl.arange(0, LANES) * LANE", "D % BLOCK_K", QKV + " -k variants"),
    Mutation(KERNELS + "tiles.py", "x -= mean[:, None]", "x -= 0.0", QKV + " -k variants"),
    Mutation(KERNELS + "epilogue.py", "y * c + x * s, y)", "y * c - x * s, y)", ROTARY + " -k every_plan"),
    Mutation(
        KERNELS + "epilogue.py", "load_places(turn_ids, m, mask", "load_places(None, m, mask", ROTARY + " -k as_they_come"
    ),
    Mutation(KERNELS + "epilogue.py", "HEAD_DIM + eps)", "HEAD_DIM)", ENDS + " -k fused"),
    Mutation(
        KERNELS + "epilogue.py",
        "first < query, query_weight, key_weight",
        "first < query, key_weight, key_weight",
        ENDS + " -k fused",
    ),
    Mutation(KERNELS + "epilogue.py", "first < query + key, normed, acc", "first >= 0, normed, acc", ENDS + " -k fused"),
    Mutation(
        KERNELS + "epilogue.py",
        "paired_source(tl.arange(0, HEAD_DIM), HEAD_DIM, HALF)",
        "tl.arange(0, HEAD_DIM)",
        ENDS + " -k fused",
    ),
    Mutation(KERNELS + "epilogue.py", "t // length).to(tl.int64)", "t // length * 2).to(tl.int64)", ROTARY + " -k blocks"),
    Mutation(KERNELS + "epilogue.py", "m0 // length * length * width", "m0 // length * width", ROTARY + " -k blocks"),
    Mutation(KERNELS + "epilogue.py", "(m0 % rotary[3]).to(tl.int32) + row", "row", ROTARY + " -k blocks"),
    Mutation(KERNELS + "epilogue.py", "group // 2 * GROUP + group % 2", "group % 2", ROTARY + " -k blocks"),
    Mutation(KERNELS + "epilogue.py", "y * s, y * c + x * s\n", "y * s, y * c - x * s\n", ROTARY + " -k blocks"),
    Mutation(KERNELS + "tiles.py", "mask=(r < height) & (c < width)", "mask=r < height", DISTINCT + " -k without_tma"),
    Mutation(KERNELS + "tiles.py", "mask=(r < height) & (c < width)", "mask=c < width", DISTINCT + " -k without_tma"),
    Mutation(KERNELS + "tuning.py", "if device.tma and block", "if block", DISTINCT + " -k without_tma"),
    Mutation(KERNELS + "epilogue.py", "more = acc + tl.load", "more = acc - tl.load", ENDS + " -k second"),
    Mutation(KERNELS + "embed_qkv.py", "(m, tl.minimum(m, M - 1), m, m)", "(m, m * 0, m, m)", TERMS + " -k scale"),
    Mutation(
        KERNELS + "embed_qkv.py", 'writes = (run == 0) | (READS == "back")', "writes = run > 0", TERMS + " -k many_programs"
    ),
    Mutation(KERNELS + "embed_qkv_folded.py", "acc -= mu[:, None]", "acc += mu[:, None]", QKV + " -k folded"),
    Mutation(
        KERNELS + "embed_qkv_folded.py",
        "left += rounded.to(ACC)",
        "left += w - centre[:, None]",
        QKV + " -k folded",
    ),
    Mutation(
        KERNELS + "embed_qkv.py", 'acc = tl.where(turned[:, None], acc, float("nan"))', "acc = acc", QKV + " -k without_a_row"
    ),
    Mutation(KERNELS + "embed_grad.py", "dx = drop(dx, terms[4], m, d, ACC)", "dx = dx", TERMS + " -k forward_and_backward"),
    Mutation(KERNELS + "embed_grad.py", "dx -= drift[:, None]", "dx -= 0.0", QKV + " -k variants"),
    Mutation(KERNELS + "embed_grad.py", "dx *= scale[:, None]\n", "dx *= 1.0\n", QKV + " -k variants"),
    Mutation(KERNELS + "embed_grad.py", "drift += tl.sum(lanes(dy, token), 2)", "drift += 0.0", QKV + " -k too_wide"),
    Mutation(KERNELS + "embed_grad.py", "BLOCK_D if HELD else D, BLOCK_D)", "BLOCK_D, BLOCK_D)", QKV + " -k too_wide"),
    Mutation(
        KERNELS + "distinct_grad.py", "pull += tl.sum(shares, 0)", "pull = tl.sum(shares, 0)", DISTINCT + " -k many_shares"
    ),
    Mutation(
        KERNELS + "distinct_grad.py",
        "tl.store(means + total + r, tl.sum(drift",
        "tl.store(means + r, tl.sum(drift",
        DISTINCT + " -k wide",
    ),
    Mutation(KERNELS + "distinct.py", "x - centre[:, None], 0.0)", "x, 0.0)", DISTINCT + " -k wide"),
    Mutation(KERNELS + "epilogue.py", "first + HEAD_DIM // 2 - HALF)", "first + HEAD_DIM // 2)", ROTARY + " -k every_plan"),
    Mutation(KERNELS + "embed_grad.py", "weights=weights, out=into", "out=into", TERMS + " -k scale"),
    Mutation(KERNELS + "table_grad.py", "leaves == 0):\n            if ADDS:", "leaves == 0):\n            if False:", GRAD),
    Mutation(KERNELS + "table_grad.py", "BLOCK_M\n        if ADDS:", "BLOCK_M\n        if False:", GRAD),
    Mutation(KERNELS + "distinct_grad.py", "        if ADDS:", "        if False:", TO_TIE),
    Mutation(TIED, "if found is None or not found.is_of(weight):", "if found is None:", TO_TIE),
    Mutation(TIED, "found is not None and found.is_of(weight)", "found is not None", TO_TIE),
    Mutation(TIED, "return is_same and self.stream == _stream(weight)", "return is_same", TO_TIE),
    Mutation(OPERATORS, "run = self.backward if into is None else", "run = self.backward if True else", TO_TIE),
    Mutation(ONE_PASS, "run = embed_backward if into is None else", "run = embed_backward if True else", TO_TIE),
    Mutation(TIED, "ctx.buffers.pop(torch", "ctx.buffers.get(torch", TO_TIE),
    Mutation(TIED, "before.add_(gradient)  #", "pass  #", TO_TIE),
    Mutation(TIED, "weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()", "Any = {}", TO_TIE),
    Mutation(TIED, "        into[padding_idx] = kept", "        pass", TO_TIE),
    Mutation(HEAD, "        if torch.is_grad_enabled():  #", "        if False:  #", TO_TIE),
    Mutation(HEAD, "                if grads is None:", "                if False:", TO_TIE),
    Mutation(
        HEAD, "_add_product(grad_weight[:size], factor, (h * scale)", "_add_product(grad_weight[:size], factor, (h)", TO_LOSE
    ),
    Mutation(HEAD, "if smoothing:\n            logits.sub_(", "if False:\n            logits.sub_(", TO_LOSE),
    Mutation(HEAD, "target[part, None].where(keep, 0)", "target[part, None].clamp(0)", TO_LOSE),
    Mutation(KERNELS + "table_grad.py", "grad[0] = rows.sum(0", "grad[-1] = rows.sum(0", TERMS + " -k segments"),
    Mutation(
        KERNELS + "embed_grad.py",
        "            grad_sum = drop_again(grad_sum, terms)",
        "            pass",
        TERMS + " -k forward_and",
    ),
    Mutation(
        KERNELS + "table_grad.py",
        "(row < V) & (row != padding_idx):\n        count",
        "(row < V):\n        count",
        QKV + " -k padding",
    ),
    Mutation(KERNELS + "table_grad.py", "chunk += BLOCK_M", "chunk += 2 * BLOCK_M", GRAD),
    Mutation(KERNELS + "expand.py", "x *= factor\n", "x *= 1.0\n", TABLE + ' -k "half or dtype or sixteen"'),
    Mutation(KERNELS + "expand.py", "tl.where(known, slot, -1)", "tl.where(known, slot, 0)", DISTINCT),
    Mutation("pyembed/call.py", "2**31 - 1\n", "4\n", TERMS + " -k sines"),
    Mutation(KERNELS + "arguments.py", "1 / (1 - terms.dropout)", "1.0", TERMS + " -k nn_dropouts"),
    Mutation(KERNELS + "embed_grad.py", "heads[0] = query.sum(0)", "heads[0] = query[0]", ENDS + " -k second"),
    Mutation(KERNELS + "embed_grad.py", "else grad.transpose(-3, -2)", "else grad", ENDS + " -k every_plan"),
    Mutation(
        "pyembed/call.py",
        "if self.query_norm is not None or self.query_offset is not None:",
        "if self.query_offset is not None:",
        ENDS + " -k every_plan",
    ),
    Mutation(
        "pyembed/call.py",
        "if self.query_norm is not None or self.query_offset is not None:",
        "if self.query_norm is not None:",
        ENDS + " -k second_query",
    ),
    Mutation(ONE_PASS, "return is_tile and not call.wants_grad()", "return is_tile", ENDS + " -k where_they_learn"),
    Mutation(ONE_PASS, "16 <= head_dim <= 256 and", "head_dim <= 256 and", ENDS + " -k fused"),
    Mutation(
        ONE_PASS,
        "torch.randint(2**62, (1,), device=terms.ids.device)",
        "torch.zeros(1, dtype=torch.int64, device=terms.ids.device)",
        TERMS + " -k nn",
    ),
    Mutation("pyembed/checks.py", "if low < 0 or high >= size:", "if high >= size:", FUNCTIONS),
    Mutation(
        "pyembed/checks.py",
        "if call.epilogue.query_norm is not None or call.epilogue.cos is not None:",
        "if call.epilogue.query_norm is not None:",
        ENDS + " -k bad",
    ),
    Mutation("pyembed/checks.py", "if not 0 <= dropout <= 1:", "if dropout < 0:", TERMS + " -k bad"),
    Mutation(CHOICE, 'return "token rows are scaled"', "return None", SAMES + " -k refused"),
    Mutation(CHOICE, 'return "dropout comes between sum and norm"', "pass", SAMES + " -k refused"),
    Mutation(CHOICE, 'return f"{added[0]}s are added" if added else None', "return None", SAMES + " -k refused"),
    Mutation(KERNELS + "tiles.py", "first = absent & (came == 0)", "first = absent", IDS + " -k several_launches"),
    Mutation(KERNELS + "embed_grad.py", "embed(terms, absent=0.0)", "embed(terms)", IDS + " -k loss"),
    Mutation(KERNELS + "epilogue.py", "period, rows, report, 3)", "period, rows, report, 1)", IDS + " -k report"),
    Mutation(KERNELS + "embed_qkv.py", "tuning.INVARIANT if batch_invariant else M", "M", SAME + " -k tiles"),
    Mutation(KERNELS + "embed_qkv.py", "if bare and weight.dtype != torch.float16", "if bare", QKV + " -k fp16_products"),
    Mutation(KERNELS + "embed_qkv.py", "tl.store(rstd + m, late", "tl.store(rstd + m, 2 * late", QKV + " -k variants"),
    Mutation(KERNELS + "embed_qkv.py", "table=dtype", "table=weight_dtype", AHEAD + " -k 86-mixed"),
    Mutation(
        KERNELS + "embed_qkv_rows.py", "tl.where(turned[:, None], x", "tl.where(known[:, None], x", ROTARY + " -k place_without"
    ),
    Mutation(KERNELS + "embed_qkv_rows.py", "bias + column", "bias + n", QKV + " -k variants"),
    Mutation(
        KERNELS + "embed_qkv_rows.py",
        "column = first + paired_source(n, HEAD_DIM, HALF)",
        "column = first + n",
        ROTARY + " -k alternate",
    ),
    Mutation(KERNELS + "embed_qkv_rows.py", " and tuning.aligned(normed.dtype, *widths)", "", QKV + " -k several_tiles"),
    Mutation(KERNELS + "tuning.py", "reversed(choices), key=time", "choices, key=lambda tiles: -time(tiles)", TUNING),
    Mutation(KERNELS + "tuning.py", "else max(1024, 3 * N)", "else 32", TUNING + " -k ways"),
    Mutation(
        KERNELS + "tuning.py",
        "        loop = max(loop, 4 * max",
        "        max(loop, 4 * max",
        TUNING,
    ),
    Mutation(
        KERNELS + "tuning.py",
        "return fitted(_with_heads(tiles, head, dtype, device), dtype, device, table or dtype)",
        "return tiles",
        TUNING,
    ),
    Mutation(KERNELS + "tuning.py", "return fitted(tiles, dtype, device, spare=1)  # the", "return tiles  # the", TUNING),
    Mutation(KERNELS + "tuning.py", "(M + 1) * K * table.itemsize", "(M + 1) * K * dtype.itemsize", TUNING),
    Mutation(KERNELS + "tuning.py", "return max(loop, epilogue)", "return loop", TUNING),
    Mutation(KERNELS + "tuning.py", 'for name in ("", "_optin")', 'for name in ("",)', TUNING),
    Mutation(
        "pyembed/plans/rates.py", " and torch.cuda.is_current_stream_capturing():", " and False:", PLANNER + " -k capture"
    ),
    Mutation("pyembed/ids.py", "ids.clamp(0, rows - 1)", "ids.clamp(0, rows)", IDS + " -k clamp"),
    Mutation("pyembed/reference.py", "(part, (0, -D % line, 0,", "(part, (0, 0, 0,", SAME + " -k wide"),
    Mutation("pyembed/reference.py", "absent.unsqueeze(-1), 0)", "absent.unsqueeze(-1), 1)", IDS + " -k zero"),
    Mutation("pyembed/ids.py", "(epilogue.cos, 1.0)", "(epilogue.cos, 0.0)", IDS + " -k zero"),
    Mutation("pyembed/ids.py", "(epilogue.sin, 0.0)", "(epilogue.sin, 1.0)", IDS + " -k zero"),
    Mutation("pyembed/ids.py", "cos=cos, sin=sin, turn_ids=None)", "cos=cos, sin=sin)", IDS + " -k zero"),
    Mutation("pyembed/ids.py", "epilogue=epilogue, distinct=None)", "epilogue=epilogue)", IDS + " -k clamp"),
    Mutation("pyembed/ids.py", "return places(ids) if is_short else", "return", IDS + " -k longer"),
    Mutation(
        "pyembed/ids.py", '_clamped(ids, table) if call.id_policy == "clamp" else ids', "ids", TERMS + " -k segments_without"
    ),
    Mutation("pyembed/ids.py", "return reports[raises].words", "return reports[True].words", IDS),
    Mutation("pyembed/reference.py", "rows.split(ROWS)", "rows.split(max(1, rows.shape[0]))", SAME + " -k invariant"),
    Mutation(OPERATORS, "torch.autocast(device_type, enabled=False)", "contextlib.nullcontext()", CAST),
    Mutation(ONE_PASS, "projection=cast(projection),", "projection=projection,", CAST),
    Mutation(CHOICE, 'return "autocast is on"', "pass", CAST + " -k plans"),
    Mutation(KNOWN, 'return f"{name} has a padding_idx"', "pass", MODULES + " -k padding_row"),
    Mutation(
        "pyembed/reference.py",
        "query, query + epilogue.query_offset",
        "query, query - epilogue.query_offset",
        ENDS + " -k transformer_xl",
    ),
    Mutation(
        "pyembed/checks.py",
        "check_shape(name, fields[name], (None, width)",
        "check_shape(name, fields[name], (None, None)",
        FAST + " -k wrong",
    ),
    Mutation("pyembed/checks.py", "and value.dtype not in dtypes:", "and False:", FAST + " -k sums"),
    Mutation("pyembed/checks.py", "if rows is not None and rows < terms.length:", "if False:", FAST + " -k sums"),
    Mutation("pyembed/checks.py", '"bias", bias, (weight.shape[0],)', '"bias", bias, (None,)', FAST + " -k wrong"),
    Mutation("pyembed/checks.py", "        if value.device != token.device:\n", "        if False:\n", FAST + " -k meta"),
    Mutation("pyembed/checks.py", "dtypes.add(wide_dtype(token.dtype))", "pass", FUNCTIONS + " -k float32_beside"),
    Mutation("pyembed/checks.py", "if weight.shape[0] % total:", "if False:", FUNCTIONS + " -k wrong"),
    Mutation("pyembed/checks.py", "if not token.is_floating_point():", "if False:", FAST + " -k floats"),
    Mutation("pyembed/checks.py", "weight.dtype != bias.dtype:", "False:", FUNCTIONS + " -k one_dtype"),
    Mutation("pyembed/checks.py", "len(shape) == tensor.dim() and shape ==", "True or", TERMS + " -k modules_called"),
    Mutation("pyembed/checks.py", "if num_heads % num_kv_heads:", "if False:", FUNCTIONS + " -k wrong"),
    Mutation("pyembed/checks.py", "if not same.all():", "if False:", FUNCTIONS + " -k distinct"),
    Mutation("pyembed/checks.py", "if given is not None and table is None:", "if False:", FUNCTIONS + " -k wrong"),
    Mutation("pyembed/checks.py", "and (width > head_dim or head_dim % 2)", "and head_dim % 2", ROTARY + " -k wrong"),
    Mutation("pyembed/checks.py", "if call.epilogue.heads_first and ids.dim() == 0:", "if False:", ENDS + " -k bad"),
    Mutation("pyembed/checks.py", "terms.ids.numel() and rows_of(table) == 0:", "False:", IDS + " -k without_rows"),
    Mutation(
        "pyembed/checks.py",
        'if name == "position" else table.shape[-2]',
        "if True else table.shape[-2]",
        ROTARY + " -k passes_them",
    ),
    Mutation(PARTS, 'hooks = state["_forward_hooks"] or ', "hooks = ", FAST + " -k what_more_than"),
    Mutation(PARTS, '["_backward_hooks"] or state["_backward_pre_hooks"]', '["_backward_hooks"]', FAST + " -k shows_in"),
    Mutation(PARTS, 'kind in (nn.Linear, nn.LayerNorm) and "bias" not in parameters', "False", FAST + " -k no_parameters"),
    Mutation(PARTS, 'return not (hooks or "forward" in state or', "return not (hooks or", FAST + " -k what_more_than"),
    Mutation(
        PARTS,
        "    if module is None or kind not in kinds or ",
        "    if not isinstance(module, kinds) or ",
        FAST + " -k what_more_than",
    ),
    Mutation(PARTS, 'if "weight" not in parameters or kind', "if kind", FAST + " -k no_parameters"),
    Mutation(PARTS, "Epilogue(heads_first=True) if self.heads_first else", "", FAST + " -k what_more_than"),
    Mutation(PARTS, "and self.scale is None\n", "\n", FAST + " -k what_more_than"),
    Mutation(PARTS, "            and _only_looks_up(token)\n", "", FAST + " -k what_more_than"),
    Mutation(PARTS, "                and position.padding_idx is None\n", "", FAST + " -k what_more_than"),
    Mutation(PARTS, "and not (self.position_offset or self._groups)", "and not self._groups", MODULES + " -k with_an_offset"),
    Mutation(PARTS, "and not (self.position_offset or self._groups)", "and not self.position_offset", MODULES),
    Mutation(PARTS, 'and modules["query_norm"] is None\n', "\n", ENDS + " -k modules"),
    Mutation(PARTS, 'self.combine == "sum"\n            and ', "", MODULES + " -k beside_tokens"),
    Mutation(
        PARTS, "segment_ids is None and query_biases is None and", "query_biases is None and", TERMS + " -k without_segments"
    ),
    Mutation(PARTS, "return dropout.p if training else 0.0", "return dropout.p", MODULES + " -k dropout"),
    Mutation(KNOWN, "finfo(wide_dtype(dtype)).eps", "finfo(dtype).eps", TAKEN + " -k eps"),
    Mutation(PARTS, "finfo(wide_dtype(table.dtype)).eps", "finfo(table.dtype).eps", TAKEN + " -k eps"),
    Mutation(PARTS, " or kind.forward is not FORWARDS[kind] or kind", " or kind", TAKEN),
    Mutation(KNOWN, "if kind.forward is FORWARDS[stock] and issubclass", "if issubclass", TAKEN + " -k what_they_compute"),
    Mutation(KNOWN, "            if is_patched(part):\n", "            if False:\n", TAKEN + " -k after_the_proof"),
    Mutation(KNOWN, "if proof is None or not proof.holds(module):", "if proof is None:", TAKEN + " -k after_the_proof"),
    Mutation(
        KNOWN, "scale.requires_grad or torch.compiler.is_compiling() or", "scale.requires_grad or", TAKEN + " -k of_graphs"
    ),
    Mutation(KNOWN, "if scale.is_cpu or version is None", "if version is None", TAKEN + " -k those_of_the_call"),
    Mutation(KNOWN, ".item() if found.rounds else", ".item() if False else", TAKEN + " -k those_of_the_call"),
    Mutation(KNOWN, "if offset and way.offset is None:", "if offset:", TAKEN + " -k ones_own"),
    Mutation(KNOWN, "if type(weight) not in TENSORS and brings", "if False and brings", TAKEN + " -k quantised"),
    Mutation(KNOWN, 'skipped = name == "position" and', "skipped = False and", TAKEN + " -k test_position_offset"),
    Mutation(KNOWN, "    found += [(proofs, name, proof)", "    [(proofs, name, proof)", TAKEN + " -k follows"),
    Mutation(KNOWN, "    if query.weight.shape != (head_dim,):\n", "    if False:\n", TAKEN + " -k kernels_lack"),
    Mutation(PROOFS, "if getattr(kind, name, None) is not function:", "if False:", TAKEN + " -k after_the_proof"),
    Mutation(PROOFS, "if now is not value and (type(now)", "if False and (type(now)", TAKEN + " -k after_the_proof"),
    Mutation(TRIALS, "            for training in (True, False):\n", "            for training in (False,):\n", TAKEN),
    Mutation(TRIALS, "found.append((out, *grads,", "found.append((out,", TAKEN + " -k what_they_compute"),
    Mutation(TRIALS, "    if before.keys() != after.keys() or any(", "    if any(", TAKEN + " -k less_than"),
    Mutation(TRIALS, "for size in (1.0, 60.0, 0.02)):", "for size in (1.0,)):", TAKEN + " -k less_than"),
    Mutation(TRIALS, "for eps in (3e-5, 2e-9, 0.7)]", "for eps in (3e-5,)]", TAKEN + " -k less_than"),
    Mutation(TRIALS, "if not _same_ranks(ranks[0], ranks[1], x, 1e-4):", "if False:", TAKEN + " -k less_than"),
    Mutation(
        "pyembed/run.py", " or torch._C._len_torch_dispatch_stack() > 0", "", "tests/machinery/test_machinery.py -k selective"
    ),
    Mutation("pyembed/fuse/fused.py", "if module.p > 0:", "if False:", "tests/fuse/test_handle.py -k dropout"),
    Mutation("pyembed/benchmark/rows.py", ' or found.get("waited", 0.0) > WAITED', "", COMMAND + " -k busy"),
    Mutation("pyembed/benchmark/timing.py", "waiting_seconds() - before)", "0.0)", BENCH + " -k waiting"),
    Mutation(PROOFS, "[device.index for device in devices]", "[], enabled=False", TAKEN + " -k leave"),
    Mutation(TRIALS, "if torch.equal(straight.flip(0), turned) and", "if", TAKEN + " -k no_positions"),
    Mutation("pyembed/call.py", "isinstance(table, Called) and not table.has_rows", "False", TAKEN + " -k which_ids"),
    Mutation("pyembed/checks.py", "token is None or _brings_weights(fields", "token is None and _brings_weights(fields", TAKEN),
    Mutation(CHOICE, "refused = refuses(call) or _why_strange(call)", "refused = refuses(call)", TAKEN + " -k as_an_argument"),
    Mutation(
        PARTS, "if self._follows_token and training == self.training:", "if self._follows_token:", TAKEN + " -k alone_too"
    ),
    Mutation(PARTS, "if self._follows_token and training == self.training:", "if False:", TAKEN + " -k alone_too"),
    Mutation(PARTS, "terms = terms._replace(position_ids=None)", "pass", ROTARY + " -k one_shot"),
    Mutation(
        "pyembed/functional.py",
        'if ids.is_cpu and settings.current.backend != "triton":',
        "if ids.is_cpu:",
        EMBEDDING + " -k explain_says",
    ),
    Mutation("pyembed/functional.py", 'and policy in ("raise", "trust")', "and policy", IDS + " -k embedding"),
    Mutation(
        "pyembed/functional.py",
        "or type(padding_idx) is int and weight.dim() == 2 and 0 <= padding_idx < weight.shape[0])",
        "or True)",
        EMBEDDING + " -k is_torchs",
    ),
    Mutation(
        "pyembed/reference.py",
        "cos, sin = torch.embedding(cos, ids), torch.embedding(sin, ids)",
        "cos, sin = cos[ids], sin[ids]",
        FAST + " -k wrong",
    ),
    Mutation(
        "pyembed/reference.py",
        "rotate(qkv.narrow(-2, 0, query_heads + heads), epilogue)",
        "qkv.narrow(-2, 0, query_heads + heads)",
        ROTARY + " -k passes_them",
    ),
    Mutation(KERNELS + "launch.py", "append(argument.data_ptr() % 16)", "append(0)", LAUNCHES + " -k address"),
    Mutation(KERNELS + "launch.py", "            append(argument)\n", "            append(0)\n", LAUNCHES),
    Mutation(KERNELS + "launch.py", "if len(names) < len(given):", "if False:", LAUNCHES + " -k two_places"),
    Mutation(KERNELS + "launch.py", "if len(memory) >= KINDS:", "if False:", LAUNCHES + " -k bounded"),
    # The signature of a call, what is kept under it, and what repeats a launch.
    Mutation(RUN, "= (current, policy, invariant", "= (policy, invariant", FAST + " -k asked_for"),
    Mutation(RUN, "policy, invariant, concat,", "invariant, concat,", FAST),
    Mutation(RUN, "policy, invariant, concat,", "policy, concat,", FAST),
    Mutation(RUN, "kind.numbers(values), more)", "more)", FAST),
    Mutation(RUN, "kind = _kinds.get(classes)", "kind = _kinds.get(len(classes))", FAST),
    Mutation(RUN, "guard.check(*tensors) and state.check()", "state.check()", FAST),
    Mutation(RUN, "guard.check(*tensors) and state.check()", "guard.check(*tensors)", FAST),
    Mutation(RUN, "    if is_observed():\n", "    if False:\n", LAUNCHES + ' -k "modes or tracers"'),
    Mutation(RUN, "return tensor.data_ptr() % 16 if", "return 0 if", LAUNCHES + " -k address"),
    Mutation(RUN, "return is_profiled() or forward_ad", "return forward_ad", LAUNCHES + " -k profiler"),
    Mutation(RUN, "is_profiled() or forward_ad._current_level >= 0 or", "is_profiled() or", EMBEDDING + " -k forward_mode"),
    Mutation(RUN, "type(tensor) in TENSORS and not is_strange(tensor) for", "True for", EMBED + " -k negated"),
    Mutation(RUN, "not keeps or not _has_schema_types(call)", "not keeps", LAUNCHES + " -k eps"),
    Mutation(RUN, "look(token.device)\n", "pass\n", LAUNCHES + " -k absent"),
    Mutation(RUN, "**{field: tensor.contiguous()}", "**{field: tensor}", LAUNCHES + " -k column"),
    Mutation(RUN, "None if observed or call.wants_grad() else", "None if observed else", FAST + " -k like_one_before"),
    Mutation(RUN, "None if observed or call.wants_grad() else", "None if call.wants_grad() else", LAUNCHES + " -k profiler"),
    Mutation(
        RUN, "observed=observed, grads=call.wants_grad())", "observed=observed, grads=False)", FAST + " -k like_one_before"
    ),
    Mutation(RUN, "return inner(apply_policy(call))", "return inner(call)", IDS + " -k clamp"),
    Mutation(
        RUN,
        "if must_check or call.distinct is not None else composition",
        "if must_check else composition",
        FUNCTIONS + " -k given_distinct",
    ),
    Mutation(RUN, "must_check = is_lenient and", "must_check = False and", TERMS + " -k bad"),
    Mutation(RUN, "runner if call.distinct is None else _checked(runner, False)", "runner", FUNCTIONS + " -k every_policy"),
    Mutation(RUN, 'call.id_policy == "raise" and can_read', "can_read", DISTINCT + " -k unknown"),
    Mutation(RUN, 'if plan is not None and plan.name == "one_pass":', "if False:", PLANNER),
    Mutation(RUN, '(other if weigh_now(call).name == "distinct" else one)', "one", PLANNER + " -k each_batch"),
    Mutation(RUN, '(other if weigh_now(call).name == "distinct" else one)', "other", PLANNER + " -k each_batch"),
    Mutation(ONE_PASS, "if call.terms.dropout or call.projection", "if call.projection", TERMS + " -k nn_dropouts"),
    Mutation(ONE_PASS, "and autocast_dtype(call.terms.token) is not None:\n", "and False:\n", CAST),
    Mutation(
        ONE_PASS,
        "is not None and not normalises_heads(call):\n        return None",
        "is None:\n        pass",
        ENDS + " -k fused",
    ),
    Mutation("pyembed/call.py", 'bool(named["batch_invariant"])', "False", QKV + " -k operator_is_given"),
    Mutation("pyembed/call.py", '"raise" if named["reports"] else "trust"', '"raise"', IDS),
    Mutation(ONE_PASS, "sizes = [size if wanted[name] else 0 for", "sizes = [size for", EMBED + " -k cost_nothing"),
    Mutation(ONE_PASS, "elif terms.padding_idx >= 0:", "elif False:", EMBEDDING + " -k double_backward"),
    Mutation(OPERATORS, "tensor.is_neg() or ", "", OPS + " -k views"),
    Mutation(OPERATORS, " or _is_batched(tensor)", "", EMBEDDING + " -k batched"),
    Mutation(OPERATORS, "        or torch._C._len_torch_dispatch_stack()\n", "", LAUNCHES + " -k modes"),
    Mutation(OPERATORS, "        or torch._ops._len_torch_dispatch_stack_pre_dispatch()\n", "", LAUNCHES + " -k tracers"),
    Mutation(OPERATORS, "return type(tensor) in (Tensor, nn.Parameter) and not", "return not", PARALLEL),
    Mutation(
        OPERATORS, "ctx.sources, strict=True) if grad is not None", "ctx.sources, strict=True)", QKV + " -k single_output"
    ),
    Mutation(OPERATORS, 'SOURCES[named["key_weight"] is not None]', "SOURCES[0]", UNUSED + " -k without"),
    Mutation("pyembed/call.py", "found[name] = part.clone()", "found[name] = part", UNUSED + " -k their_own"),
    Mutation("pyembed/reference.py", "elif key_weight is not None:  # not", "elif False:  # not", UNUSED + " -k without"),
    Mutation(
        KNOWN,
        "return tuple([linear(normed) for linear in qkv])",
        "return torch.cat([linear(normed) for linear in qkv], -1)",
        UNUSED,
    ),
    Mutation("pyembed/parallel.py", "        if grad is None:\n", "        if False:\n", PARALLEL),
    Mutation(OPERATORS, "[wanted[name] and name in reached for", "[name in reached for", QKV + " -k frozen_costs"),
    Mutation(OPERATORS, "        if all(grad is None for grad in outputs):\n", "        if False:\n", OPS),
    Mutation(OPERATORS, "        if ctx.has_head_norm:\n", "        if False:\n", ENDS + " -k operator"),
    Mutation(OPERATORS, "        refuse_tangents(*grads)\n        if", "        if", OPS + " -k tangents"),
    Mutation(OPERATORS, "(named | dict.fromkeys(UNSAVED)).values()", "named.values()", QKV + " -k changed_between"),
    Mutation(OPERATORS, "ctx.set_materialize_grads(False)", "pass", QKV + " -k single_output"),
    Mutation(
        OPERATORS, "ctx.mark_non_differentiable(*results, ", "ctx.mark_non_differentiable(", QKV + " -k operator_is_given"
    ),
    Mutation(
        OPERATORS,
        "ctx.mark_non_differentiable(*results, *constant)",
        "ctx.mark_non_differentiable(*results)",
        UNUSED + " -k frozen",
    ),
    Mutation(OPERATORS, "empty_grad(call, name, needed).zero_()", "empty_grad(call, name, needed)", QKV + " -k empty"),
    Mutation(
        OPERATORS,
        "    except BaseException:\n        forget(device)\n",
        "    except BaseException:\n",
        IDS + " -k another_error",
    ),
    Mutation("pyembed/call.py", "map(NAMES.index, self.names)", "map(self.names.index, self.names)", QKV + " -k variants"),
    Mutation("pyembed/call.py", "dict.fromkeys(NAMES) | dict(", "dict(", QKV + " -k variants"),
    Mutation("pyembed/call.py", "is not None and not qkv\n", "is not None and False\n", ENDS + " -k second"),
    Mutation(CHOICE, "handicapped = {name: value * MARGIN if", "handicapped = {name: value if", PLANNER + " -k promise"),
    Mutation(CHOICE, "if token.requires_grad and torch.is_grad_enabled() and", "if", PLANNER + " -k small_calls"),
    Mutation(CHOICE, "return before + weights if", "return before if", PLANNER + " -k frozen"),
    Mutation(
        "pyembed/modes.py", "return not (is_traced() or is_transformed() or is_recorded())", "return True", PLANNER + " -k fake"
    ),
    Mutation(
        "pyembed/modes.py",
        'device.type == "cpu" or settings.current.debug and',
        'device.type == "cpu" or',
        FUNCTIONS + " -k debug",
    ),
    Mutation(
        "pyembed/settings.py", "        current = current._replace(**before)\n", "        pass\n", PLANNER + " -k restored"
    ),
    Mutation(CHOICE, "is_compiling() or is_recorded()  # whose", "is_compiling()  # whose", TRACES + " -k weighs"),
    Mutation(RUN, "        call = write_out(call)\n", "", TRACES + " -k row"),
    Mutation(KEEPS, "if is_recorded() or not is_plain_eager()", "if not is_plain_eager()", TRACES + " -k follows"),
    Mutation(
        "pyembed/reference.py",
        "elif cos.dim() > 1 and cos.shape[-2] != heads.shape[-3]:",
        "elif False:",
        ROTARY + " -k too_few",
    ),
    Mutation(MEMORY, "for storage in _storages if sys.getrefcount(storage) <= unused]", "for storage in _storages]", SAMES),
    Mutation(MEMORY, " and not storage.is_shared()]", "]", SAMES + " -k memory"),
    Mutation(MEMORY, "if has_room else 1\n", "\n", SAMES + " -k file"),
    Mutation(MEMORY, "if storage.nbytes() == size)", "if storage.nbytes() >= size)", SAMES + " -k file"),
    Mutation("pyembed/plans/distinct_cpu.py", "pull *= rstd.pow(3) / -D", "pull *= rstd / -D", SAMES + " -k gradcheck"),
    Mutation(
        "pyembed/plans/distinct_cpu.py",
        '["token"][call.terms.padding_idx] = 0.0',
        '["token"][call.terms.padding_idx] *= 1.0',
        SAMES + " -k padding",
    ),
    Mutation("pyembed/plans/distinct_cpu.py", "grad_rows -= grad_rows.mean(1, keepdim=True)", "pass", SAMES + " -k gradcheck"),
    Mutation("pyembed/kept.py", "if tensor._version != version or", "if", TABLE + " -k stale"),
    Mutation(
        "pyembed/kept.py", "            if holder.get(key) is not value:\n", "            if False:\n", TABLE + " -k stale"
    ),
    Mutation("pyembed/kept.py", "if tensor._version != version or", "if", KEPT + " -k by_what_is"),
    Mutation(
        "pyembed/kept.py", "            if holder.get(key) is not value:\n", "            if False:\n", KEPT + " -k by_what"
    ),
    Mutation("pyembed/kept.py", " or tensor.data_ptr() != address or storage.expired()", "", KEPT + " -k by_what_is"),
    Mutation("pyembed/kept.py", " or storage.expired()", "", KEPT + " -k same_address"),
    Mutation("pyembed/kept.py", "torch.equal(view, copy) for view", "True for view", KEPT + " -k a_cpu"),
    Mutation("pyembed/kept.py", "            sources._stepped = True\n", "            pass\n", KEPT + " -k by_what_is"),
    Mutation("pyembed/kept.py", "        if any(id(tensor) in stepped for", "        if any(True for", KEPT + " -k matter"),
    Mutation(
        "pyembed/kept.py",
        "@torch._disable_dynamo",
        "@(lambda f: lambda *a: torch.compiler.is_compiling() or f(*a))",
        KEPT + " -k compiled",
    ),
    Mutation("pyembed/kept.py", ".cuda_stream if self._device", ".device if self._device", KEPT + " -k stream"),
    Mutation("pyembed/kept.py", "if found is None or found[0] != key:", "if found is None:", KEPT + " -k pairs"),
    Mutation("pyembed/kept.py", "if found is None or found[0] != key:", "if True:", KEPT + " -k same_bits"),
    Mutation("pyembed/call.py", "            kept = None  # the bias is this call's own\n", "", KEPT + " -k biases"),
    Mutation("pyembed/call.py", "if kept is None else kept.get(", "if True else kept.get(", KEPT + " -k projections"),
    Mutation(
        KEEPS,
        " or torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):\n",
        ":\n",
        KEPT + " -k gradients",
    ),
    Mutation(KEEPS, '        if is_captured(self._modules["token"].weight):\n', "        if False:\n", KEPT + " -k captured"),
    Mutation(KEEPS, "kept is None or not kept.sources.are_unchanged()", "kept is None", KEPT + " -k by_what_is"),
    Mutation(KEEPS, "        self._table = self._kept = None", "        self._table = None", KEPT + " -k memory_is"),
    Mutation(KEEPS, ', "_kept": None}', "}", KEPT + " -k memory_is"),
    Mutation(KEEPS, "        replica.keep_folded(False)\n", "", KEPT + " -k replica"),
    Mutation(KEEPS, "        replica.drop_table()\n", "", KEPT + " -k replica"),
    Mutation(KERNELS + "embed_qkv.py", "(weight.dtype, *pairs.values())\n", "None\n", KEPT + " -k pairs"),
    Mutation(KERNELS + "tuning.py", "many = 1024 if kept else max", "many = max", TUNING + " -k ways"),
    Mutation(
        "pyembed/plans/table.py", "(Norm(), None) if self.position is None", "(Norm(), None) if False", TABLE + " -k variants"
    ),
    Mutation(
        KEEPS,
        "call.terms.position_ids):\n            return found",
        "call.terms.position_ids) or True:\n            return found",
        TABLE + " -k stale",
    ),
    Mutation(KEEPS, "            if kernels:  # they do not look at ids\n", "            if False:\n", TABLE + " -k bad"),
    Mutation("pyembed/benchmark/timing.py", "atol=tolerance * largest", "atol=1.0", BENCH + " -k wrong"),
    Mutation("pyembed/benchmark/roofline.py", "2 * rows * D * N", "rows * D * N", BENCH + " -k counts"),
    Mutation("pyembed/benchmark/rows.py", "if not any(map(busy, found.values())):", "if True:", COMMAND + " -k busy"),
    Mutation(
        "pyembed/benchmark/rows.py",
        "left_out = check(variants, grads",
        "left_out = {} and (variants, grads",
        COMMAND + " -k raises",
    ),
    Mutation("pyembed/benchmark/rows.py", 'chosen if name == "auto" else name', '"one_pass"', COMMAND + " -k a_shape"),
    Mutation(
        "pyembed/benchmark/peers.py", "        if name not in wanted:\n            continue\n", "", COMMAND + " -k a_shape"
    ),
    Mutation("pyembed/benchmark/command.py", "if D % heads:", "if False:", COMMAND + " -k wrong_argument"),
    Mutation("pyembed/benchmark/command.py", 'if not {STOCK, "auto"} & set(report["busy"]):', "if True:", COMMAND + " -k busy"),
    Mutation("pyembed/doctor.py", "raise typer.Exit(1 if problems else 0)", "raise typer.Exit(0)", DOCTOR),
    Mutation("pyembed/doctor.py", "second[name].view(torch.uint8)", "ours.view(torch.uint8)", DOCTOR + " -k second_time"),
    Mutation("pyembed/doctor.py", "if shared > target.shared_memory:", "if False:", DOCTOR + " -k does_not_compile"),
    Mutation(
        "pyembed/doctor.py", 'row["fit"] &= tuning.is_valid(tiles, dtype, target, table, spare)', "pass", DOCTOR + " -k tiles"
    ),
    Mutation(TURNS, "        if not torch.equal(first, second):", "        if False:", ROTARY + " -k laid_out_otherwise"),
    Mutation(TURNS, ":half], _nan_unless_equal(first, second)", ":half], first", ROTARY + " -k laid_out_otherwise"),
    Mutation(
        TURNS,
        "torch.where(beside, left, halves)",
        "torch.where(beside, first, halves)",
        ROTARY + " -k under_a_compiler",
    ),
    Mutation(TURNS, "@torch.inference_mode(False)", "@torch.no_grad()", ROTARY + " -k inference_mode"),
    Mutation(PARTS, "position_ids, own is not None and own.interleaved)", "position_ids)", ROTARY + " -k front_ends_own"),
    Mutation(PARTS, "own is None and self._unlike_halves and", "False and", SWAPS + " -k neighbours"),
    Mutation("pyembed/modules/fits.py", "unlike_halves and not rotary.is_told", "False", SWAPS + " -k neighbours"),
    Mutation(KNOWN, "version is None or ", "", SWAPS + " -k on_a_gpu"),
    Mutation(TURNS_OF, "copy.deepcopy(module), ", "module, ", SWAPS + " -k rotary_of_a_model"),
    Mutation(TURNS_OF, "if 2**i < rows), rows)", "if False), rows)", SWAPS + " -k rotary_of_a_model"),
    Mutation(TURNS_OF, "if shape == (1, 2, first.shape[1]):", "if False:", SWAPS + " -k that_are_refused"),
    Mutation(TURNS_OF, "(second, first) if second[0].any() else whole", "whole", SWAPS + " -k ones_own"),
    Mutation(TURNS_OF, "table[:, ::2] if beside else table", "table", SWAPS + " -k rotary_of_a_model"),
    Mutation(TURNS_OF, "for width in (R, R + 2):", "for width in (R + 2,):", SWAPS + " -k rotary_of_a_model"),
    Mutation("pyembed/positions.py", "if self.weight.is_inference():", "if False:", PLACES + " -k inference_mode"),
    Mutation("pyembed/checks.py", "(TypeError, RuntimeError)", "(TypeError)", EMBEDDING + " -k torchs_class"),
    Mutation("pyembed/checks.py", "(ValueError, RuntimeError)", "(ValueError)", EMBEDDING + " -k torchs_class"),
    Mutation("pyembed/call.py", "(ValueError, AssertionError)", "(ValueError)", EMBEDDING + " -k torchs_class"),
    Mutation("pyembed/checks.py", "(IndexError, RuntimeError)", "(IndexError)", EMBEDDING + " -k torchs_class"),
    Mutation("pyembed/call.py", "if isinstance(padding_idx, bool) or", "if", EMBEDDING + " -k torchs_class"),
    Mutation(
        "pyembed/functional.py",
        "            _check_rows(ids, weight, policy)\n",
        "            pass\n",
        EMBEDDING + " -k torchs_class",
    ),
    Mutation(
        "pyembed/functional.py", "        pad_row(padding_idx, count)\n", "        pass\n", EMBEDDING + " -k torchs_class"
    ),
    Mutation("pyembed/functional.py", "type(padding_idx) is int and weight", "weight", EMBEDDING + " -k torchs_class"),
    Mutation("pyembed/data.py", "_encodings.setdefault(name, mine)", "mine", DATA + " -k threads"),
    Mutation(
        "pyembed/data.py", "            del _encodings[name]  # a later", "            pass  # a later", DATA + " -k threads"
    ),
    Mutation("pyembed/data.py", "_encodings.items() if not found.done()]", "()]", DATA + " -k hangs"),
    Mutation("pyembed/data.py", ".numpy()[index,]", ".numpy()[index]", DATA + " -k list_methods"),
    Mutation(
        "pyembed/data.py", "encoding.encode_to_numpy(text, **special)", "encoding.encode_to_numpy(text)", DATA + " -k special"
    ),
    Mutation("pyembed/data.py", "encoding.encode(text, **special)", "encoding.encode(text)", DATA + " -k special"),
    Mutation("pyembed/plans/rates.py", "    with _measuring:\n", "    if True:\n", PLANNER + " -k threads"),
    Mutation(CHOICE, "self.tokens = pending\n", "self.tokens = self.pending\n", PLANNER + " -k waiting"),
    Mutation(KERNELS + "interpreter.py", '.glob("[!_]*.py")', '.glob("none")', OPS + " -k imported_while"),
    Mutation("pyembed/positions.py", "is_token.cumsum(is_token.dim() - 1)", "is_token.cumsum(-1)", PARALLEL),
    Mutation("pyembed/positions.py", "+ offset) * is_token +", ") * is_token + offset +", PLACES + " -k ids"),
    Mutation(GROWTH, "-math.inf if old.ndim == 1 else 0.0", "0.0", TO_GROW + " -k padding"),
    Mutation(GROWTH, "    bias[size:] = -math.inf\n", "", TO_GROW + " -k padding"),
    Mutation(
        GROWTH,
        "(count, len(rows)), math.sqrt(COVARIANCE / max(",
        "(count, len(rows)), (COVARIANCE / max(",
        TO_GROW + " -k sample",
    ),
    Mutation(GROWTH, "            scale *= 2\n", "", TO_GROW + " -k bf16"),
    Mutation(GROWTH, "rows if kept.all() else rows[kept.to(rows.device)]", "rows", TO_GROW + " -k trained"),
    Mutation(GROWTH, "        mask[padding_idx] = False\n", "", TO_GROW + " -k trained"),
    Mutation(GROWTH, "if count > size:", "if False:", TO_GROW + " -k refused"),
    Mutation(GROWTH, "        for take_back in reversed(undo):\n            take_back()\n", "", TO_GROW + " -k taken_back"),
    Mutation(GROWTH, "        parameter.grad[:size] =", "        parameter.grad[:0] =", TO_GROW + " -k gradients"),
    Mutation(GROWTH, "vocabulary.heads and module._parameters.get", "() and module._parameters.get", TO_GROW + " -k padding"),
    Mutation(
        GROWTH, 'persistent = set(head._non_persistent_buffers_set) | {"bias"}', "persistent = set()", TO_GROW + " -k padding"
    ),
    Mutation(TABLES, "        if stranger not in names:", "        if False:", TO_GROW + " -k refused"),
    Mutation(TABLES, "(other not in own or held !=", "(False or held !=", TO_GROW + " -k refused"),
    Mutation(TABLES, "if tables is None and heads is None:", "if False:", TO_GROW + " -k unknown"),
    Mutation(GROWN, "                    parameter.grad[rows] = 0\n", "", TO_STEP + " -k slow"),
    Mutation(GROWN, "            parameter.grad[rows] = small.grad\n", "", TO_STEP + " -k start"),
    Mutation(GROWN, "            parameter[rows] = small\n", "", TO_STEP + " -k start"),
    Mutation(
        GROWN,
        "                value[rows] = alone.state[small].pop(name)\n",
        "                alone.state[small].pop(name)\n",
        TO_STEP,
    ),
    Mutation(GROWN, "            _check_padding(optimizer, group)\n", "            pass\n", TO_STEP + " -k nan"),
    Mutation(GROWN, '"stop": min(one["stop"], change.start)}', '"stop": one["stop"], "state": {}}', TO_STEP + " -k twice"),
    Mutation(GROWN, "if is_row != is_column:", "if True:", TO_STEP + " -k rows"),
    Mutation(GROWN, "type(alone).step(alone)", "alone.step()", TO_STEP + " -k schedules"),
    Mutation(UNTRAINED, "total.float() - rows * known[a:b, None]", "total.float() - 0 * rows", TO_REPORT + " -k random"),
    Mutation(UNTRAINED, "used = not misleads and", "used =", TO_REPORT + " -k norm"),
    Mutation(UNTRAINED, "gaps[widest] > WIDE", "gaps[widest] > 9 * WIDE", TO_REPORT + " -k planted"),
    Mutation(UNTRAINED, "max(LEAST_AUC, 0.5 + SIGMAS * _chance(len(of_known)))", "0.0", TO_REPORT + " -k random"),
    Mutation(PIECES, "if any((end - cut) % 3 for cut in inner):", "if inner:", TO_CUT + " -k digits"),
    Mutation(PIECES, "piece.start + len(piece.data) > end]", "piece.start + len(piece.data) >= end]", TO_CUT + " -k trailing"),
    Mutation(PIECES, 'normalize("NFC", text)', 'normalize("NFKC", text)', TO_CUT + " -k form"),
    Mutation(PIECES, "piece.id >= size})", "piece.id > size})", TO_CUT + " -k beyond"),
]


def copy_of(folder):
    unneeded = shutil.ignore_patterns(".git", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=unneeded, symlinks=True, dirs_exist_ok=True)
    kernels = folder / "pyembed" / "kernels"
    if not kernels.exists():
        kernels.symlink_to("../kernels/triton")  # so that an installed pyembed does not bring its own


def lives(mutation, folder):
    """Whether no test sees it, and the seconds that took."""
    file = folder / mutation.file
    source, start = file.read_text(encoding="utf-8"), time.monotonic()
    file.write_text(source.replace(mutation.before, mutation.after), encoding="utf-8")
    command = f"{sys.executable} -m pytest -x -q -n0 --limit 0 -p no:cacheprovider {mutation.tests}"
    run = subprocess.run(command, shell=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True)
    file.write_text(source, encoding="utf-8")
    if run.returncode not in (0, 1) and run.returncode < 128:  # from there on a signal ended it
        raise RuntimeError(f"{command}: {run.stdout.decode()[-2000:]}")
    return run.returncode == 0, time.monotonic() - start


def main(words):
    from rich.console import Console
    from rich.table import Table

    chosen = [m for m in MUTATIONS if not words or any(word in " ".join(m) for word in words)]
    table = Table("file", "before", "after", "seen by", "seconds")
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of(folder)
        for mutation in chosen:
            alive, seconds = lives(mutation, folder)
            survivors += alive
            row = (mutation.file, mutation.before.strip(), mutation.after.strip(), "NOTHING" if alive else mutation.tests)
            table.add_row(*row, f"{seconds:.0f}")
            print(f"{'LIVES' if alive else 'killed'}  {mutation.file}: {mutation.before.strip()!r}", flush=True)
    Console(width=200).print(table)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
