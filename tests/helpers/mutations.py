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
EMBEDDING, MODULES = (f"tests/modules/test_{name}.py" for name in ("embedding", "modules"))
BENCH = "tests/tools/test_bench.py"
MUTATIONS = [
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
    Mutation(KERNELS + "tiles.py", "1.0 / tl.sqrt(squares / D + eps)", "1.0 / tl.sqrt(squares / D)", QKV),
    Mutation(KERNELS + "tiles.py", "x -= mean[:, None]", "x -= 0.0", QKV + " -k variants"),
    Mutation(KERNELS + "tiles.py", "y * c + x * s, y)", "y * c - x * s, y)", ROTARY + " -k every_plan"),
    Mutation(KERNELS + "tiles.py", "load_places(turn_ids, m, mask", "load_places(None, m, mask", ROTARY + " -k as_they_come"),
    Mutation(KERNELS + "tiles.py", "HEAD_DIM + eps)", "HEAD_DIM)", ENDS + " -k fused"),
    Mutation(
        KERNELS + "tiles.py",
        "first < query, query_weight, key_weight",
        "first < query, key_weight, key_weight",
        ENDS + " -k fused",
    ),
    Mutation(KERNELS + "tiles.py", "first < query + key, normed, acc", "first >= 0, normed, acc", ENDS + " -k fused"),
    Mutation(
        KERNELS + "tiles.py",
        "paired_source(tl.arange(0, HEAD_DIM), HEAD_DIM, HALF)",
        "tl.arange(0, HEAD_DIM)",
        ENDS + " -k fused",
    ),
    Mutation(KERNELS + "tiles.py", "m // length * length * width", "m // length * width", ENDS + " -k every_plan"),
    Mutation(KERNELS + "embed_qkv.py", "more = acc + tl.load", "more = acc - tl.load", ENDS + " -k second"),
    Mutation(KERNELS + "embed_qkv.py", "(m, tl.minimum(m, M - 1), m, m)", "(m, m * 0, m, m)", TERMS + " -k scale"),
    Mutation(KERNELS + "embed_qkv.py", "writes = (run == 0) | READ_BACK", "writes = run > 0", TERMS + " -k many_programs"),
    Mutation(KERNELS + "embed_qkv.py", "acc -= mu[:, None]", "acc += mu[:, None]", QKV + " -k folded"),
    Mutation(
        KERNELS + "embed_qkv.py",
        "left += tl.sum(rounded.to(ACC), 1)",
        "left += tl.sum(w - centre[:, None], 1)",
        QKV + " -k folded",
    ),
    Mutation(
        KERNELS + "embed_qkv.py", 'acc = tl.where(known[:, None], acc, float("nan"))', "acc = acc", QKV + " -k without_a_row"
    ),
    Mutation(KERNELS + "embed_grad.py", "dx = drop(dx, terms[4], m, d, ACC)", "dx = dx", TERMS + " -k forward_and_backward"),
    Mutation(KERNELS + "embed_grad.py", "dx -= (tl.sum(dy, 1) / D)[:, None]", "dx -= 0.0", QKV + " -k variants"),
    Mutation(KERNELS + "embed_grad.py", "dx *= scale\n", "dx *= 1.0\n", QKV + " -k variants"),
    Mutation(
        KERNELS + "embed_grad.py", "weights=weights) if rows else None", "weights=None) if rows else None", TERMS + " -k scale"
    ),
    Mutation(KERNELS + "embed_grad.py", "grad[0] = rows.sum(0", "grad[-1] = rows.sum(0", TERMS + " -k segments"),
    Mutation(
        KERNELS + "embed_grad.py",
        "            grad_sum = drop_again(grad_sum, terms.dropout)",
        "            pass",
        TERMS + " -k forward_and",
    ),
    Mutation(
        KERNELS + "embed_grad.py",
        "(row < V) & (row != padding_idx):\n        chunk",
        "(row < V):\n        chunk",
        QKV + " -k padding",
    ),
    Mutation(KERNELS + "embed_grad.py", "chunk += BLOCK_M", "chunk += 2 * BLOCK_M", GRAD),
    Mutation(KERNELS + "expand.py", "x *= factor\n", "x *= 1.0\n", TABLE + ' -k "half or dtype or sixteen"'),
    Mutation(KERNELS + "expand.py", "tl.where(known, slot, -1)", "tl.where(known, slot, 0)", DISTINCT),
    Mutation(KERNELS + "arguments.py", "2**31 - 1", "4", TERMS + " -k sines"),
    Mutation(KERNELS + "arguments.py", "1 / (1 - self.probability)", "1.0", TERMS + " -k nn_dropouts"),
    Mutation("pyembed/ops.py", "grads[0].sum(0), *grads[1:]", "grads[0][0], *grads[1:]", ENDS + " -k second"),
    Mutation("pyembed/ops.py", "g.transpose(-3, -2) for g in grads", "g for g in grads", ENDS + " -k every_plan"),
    Mutation(
        "pyembed/functional.py",
        "turns = planner.uses_triton(token) and query_norm is None",
        "turns = planner.uses_triton(token)",
        ENDS,
    ),
    Mutation(
        "pyembed/functional.py",
        "torch.randint(2**62, (1,), device=device)",
        "torch.zeros(1, dtype=torch.int64, device=device)",
        TERMS + " -k nn",
    ),
    Mutation("pyembed/checks.py", "if low < 0 or high >= size:", "if high >= size:", FUNCTIONS),
    Mutation(
        "pyembed/checks.py", "if query_norm is not None or rotary is not None:", "if query_norm is not None:", ENDS + " -k bad"
    ),
    Mutation("pyembed/checks.py", "if not 0 <= dropout <= 1:", "if dropout < 0:", TERMS + " -k bad"),
    Mutation("pyembed/planner.py", 'return "token rows are scaled"', "return None", TERMS + " -k refuses"),
    Mutation(KERNELS + "tiles.py", "first = absent & (came == 0)", "first = absent", IDS + " -k several_launches"),
    Mutation(KERNELS + "embed_grad.py", "embed(ids, token, terms, 0.0)", "embed(ids, token, terms)", IDS + " -k loss"),
    Mutation(KERNELS + "tiles.py", "period, rows, report, 3)", "period, rows, report, 1)", IDS + " -k report"),
    Mutation(KERNELS + "embed_qkv.py", "tuning.INVARIANT if batch_invariant else M", "M", SAME + " -k tiles"),
    Mutation("pyembed/ids.py", "ids.clamp(0, size - 1)", "ids.clamp(0, size)", IDS + " -k clamp"),
    Mutation("pyembed/reference.py", "(part, (0, -D % line, 0,", "(part, (0, 0, 0,", SAME + " -k wide"),
    Mutation("pyembed/ids.py", "absent.unsqueeze(-1), 0)", "absent.unsqueeze(-1), 1)", IDS + " -k zero"),
    Mutation("pyembed/ids.py", ".unsqueeze(-1), 1.0), sin", ".unsqueeze(-1), 0.0), sin", IDS + " -k zero"),
    Mutation("pyembed/reference.py", "rows.split(ROWS)", "rows.split(max(1, rows.shape[0]))", SAME + " -k invariant"),
    Mutation("pyembed/ops.py", "torch.autocast(device_type, enabled=False)", "contextlib.nullcontext()", CAST),
    Mutation("pyembed/functional.py", "else t.to(cast) for t in", "else t for t in", CAST),
    Mutation("pyembed/planner.py", 'return "autocast is on"', "pass", CAST + " -k plans"),
    Mutation("pyembed/parts.py", 'return f"{name} has a padding_idx"', "pass", MODULES),
    Mutation("pyembed/reference.py", "query, query + second.view", "query, query - second.view", ENDS + " -k transformer_xl"),
    Mutation("pyembed/thin.py", "token.shape[1] != D:", "False:", FAST + " -k error"),
    Mutation("pyembed/thin.py", "tensor.dtype == token.dtype", "True", FAST + " -k sums"),
    Mutation("pyembed/thin.py", "+ position[:T] if T <= L else None", "+ position[:T]", FAST + " -k sums"),
    Mutation("pyembed/thin.py", "bias.shape != weight.shape[:1]", "False", FAST + " -k error"),
    Mutation("pyembed/thin.py", 'state["_forward_hooks"]\n            or ', "", FAST + " -k more_than"),
    Mutation("pyembed/thin.py", 'or "forward" in state', "", FAST + " -k more_than"),
    Mutation("pyembed/thin.py", "type(module) in kinds\n", "isinstance(module, kinds)\n", FAST + " -k more_than"),
    Mutation("pyembed/thin.py", "or front.heads_first\n", "\n", FAST + " -k more_than"),
    Mutation("pyembed/thin.py", 'in ("raise", "trust")', "in outside.POLICIES", FAST),
    Mutation(
        "pyembed/thin.py",
        "torch.embedding(rotary.cos, places), torch.embedding(rotary.sin, places)",
        "rotary.cos[places], rotary.sin[places]",
        FAST + " -k error",
    ),
    Mutation("pyembed/thin.py", "query + key), rotation)", "query + key), rotation._replace(sin=-rotation.sin))", FAST),
    Mutation("pyembed/thin.py", "token.dtype and tensor.is_cpu", "token.dtype", FAST + " -k meta"),
    Mutation("pyembed/thin.py", 'and "weight" in state["_parameters"]\n', "\n", FAST + " -k no_parameters"),
    Mutation(KERNELS + "launch.py", "append(argument.data_ptr() % 16)", "append(0)", LAUNCHES + " -k address"),
    Mutation(KERNELS + "launch.py", "            append(argument)\n", "            append(0)\n", LAUNCHES),
    Mutation(KERNELS + "launch.py", "if len(names) < len(given):", "if False:", LAUNCHES + " -k two_places"),
    Mutation(KERNELS + "launch.py", "if len(memory) >= KINDS:", "if False:", LAUNCHES + " -k bounded"),
    Mutation("pyembed/replays.py", "tensor.data_ptr() % 16", "0", LAUNCHES + " -k address"),
    Mutation("pyembed/replays.py", "tensor.stride(), ", "", LAUNCHES + " -k looked_at"),
    Mutation("pyembed/replays.py", "grads and tensor.requires_grad", "False", LAUNCHES + " -k forgotten"),
    Mutation("pyembed/replays.py", "outside.look(ids.device)", "pass", LAUNCHES + " -k absent"),
    Mutation("pyembed/replays.py", "direct.is_heard() or", "", LAUNCHES + " -k profiler"),
    Mutation("pyembed/direct.py", "tensor.is_neg() or ", "", OPS + " -k views"),
    Mutation("pyembed/direct.py", " or _is_batched(tensor)", "", EMBEDDING + " -k batched"),
    Mutation("pyembed/direct.py", "        or torch._C._len_torch_dispatch_stack()\n", "", LAUNCHES + " -k modes"),
    Mutation(
        "pyembed/direct.py", "        or torch._ops._len_torch_dispatch_stack_pre_dispatch()\n", "", LAUNCHES + " -k tracers"
    ),
    Mutation("pyembed/thin.py", "front._own_rotary(table.device)", 'modules["rotary"]', LAUNCHES + " -k moved"),
    Mutation("pyembed/replays.py", "ids.contiguous() if", "ids if", LAUNCHES + " -k column"),
    Mutation("pyembed/replays.py", "direct.is_strange(tensor) or ", "", LAUNCHES + " -k many"),
    Mutation("pyembed/direct.py", "if of not in kinds:", "if False:", LAUNCHES + " -k eps"),
    Mutation("bench/timing.py", "atol=tolerance * largest", "atol=1.0", BENCH + " -k wrong"),
    Mutation("bench/roofline.py", "2 * rows * D * N", "rows * D * N", BENCH + " -k counts"),
]


def copy_of(folder):
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "*.egg-info", "__pycache__"), dirs_exist_ok=True)
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
    if run.returncode not in (0, 1):
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
            row = (mutation.file, mutation.before.strip(), mutation.after.strip(), "NOFASTG" if alive else mutation.tests)
            table.add_row(*row, f"{seconds:.0f}")
            print(f"{'LIVES' if alive else 'killed'}  {mutation.file}: {mutation.before.strip()!r}", flush=True)
    Console(width=200).print(table)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
