"""Breaks the code in one place at a time and runs the tests that should see it; a mutant that lives is a test that is missing.

    python tests/mutations.py [part of a mutation's text or file ...]

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

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    file: str
    before: str
    after: str
    tests: str  # pytest's arguments


KERNELS, QKV, TERMS, ENDS = "kernels/triton/", "tests/test_embed_qkv.py", "tests/test_terms.py", "tests/test_epilogue.py"
GRAD, ROTARY, DISTINCT = "tests/test_embed_grad.py", "tests/test_rotary.py", "tests/test_distinct_kernels.py"
IDS, SAME, CAST = "tests/test_ids.py", "tests/test_determinism.py", "tests/test_autocast.py"
THIN, AGAIN = "tests/test_thin.py", "tests/test_replays.py"
MUTATIONS = [
    Mutation(
        KERNELS + "tiles.py", "known = (row >= 0) & (row < size)", "known = row < size", "tests/test_embed.py -k without_a_row"
    ),
    Mutation(
        KERNELS + "tiles.py", "other=0).to(tl.int64)\n    known", "other=0)\n    known", "tests/test_sizes.py -k tables_beyond"
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
    Mutation(KERNELS + "embed_grad.py", "terms.padding_idx, weights=weights)", "terms.padding_idx)", TERMS + " -k scale"),
    Mutation(KERNELS + "embed_grad.py", "grad[0] = rows.sum(0", "grad[-1] = rows.sum(0", TERMS + " -k segments"),
    Mutation(
        KERNELS + "embed_grad.py",
        "            grad_sum = drop_again(grad_sum, terms)",
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
    Mutation(KERNELS + "expand.py", "x *= factor\n", "x *= 1.0\n", 'tests/test_table.py -k "half or dtype or sixteen"'),
    Mutation(KERNELS + "expand.py", "tl.where(known, slot, -1)", "tl.where(known, slot, 0)", DISTINCT),
    Mutation("pyembed/call.py", "2**31 - 1\n", "4\n", TERMS + " -k sines"),
    Mutation(KERNELS + "arguments.py", "1 / (1 - terms.dropout)", "1.0", TERMS + " -k nn_dropouts"),
    Mutation(KERNELS + "embed_grad.py", "heads[0] = query.sum(0)", "heads[0] = query[0]", ENDS + " -k second"),
    Mutation(KERNELS + "embed_grad.py", "else grad.transpose(-3, -2)", "else grad", ENDS + " -k every_plan"),
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
    Mutation("pyembed/checks.py", "if low < 0 or high >= size:", "if high >= size:", "tests/test_functional.py"),
    Mutation(
        "pyembed/checks.py", "if query_norm is not None or rotary is not None:", "if query_norm is not None:", ENDS + " -k bad"
    ),
    Mutation("pyembed/checks.py", "if not 0 <= dropout <= 1:", "if dropout < 0:", TERMS + " -k bad"),
    Mutation("pyembed/planner.py", 'return "token rows are scaled"', "return None", TERMS + " " + ENDS),
    Mutation(KERNELS + "tiles.py", "first = absent & (came == 0)", "first = absent", IDS + " -k several_launches"),
    Mutation(KERNELS + "embed_grad.py", "embed(terms, absent=0.0)", "embed(terms)", IDS + " -k loss"),
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
    Mutation("pyembed/parts.py", 'return f"{name} has a padding_idx"', "pass", "tests/test_modules.py"),
    Mutation("pyembed/reference.py", "query, query + second.view", "query, query - second.view", ENDS + " -k transformer_xl"),
    Mutation("pyembed/thin.py", "token.shape[1] != D:", "False:", THIN + " -k error"),
    Mutation("pyembed/thin.py", "tensor.dtype == token.dtype", "True", THIN + " -k sums"),
    Mutation("pyembed/thin.py", "+ position[:T] if T <= L else None", "+ position[:T]", THIN + " -k sums"),
    Mutation("pyembed/thin.py", "bias.shape != weight.shape[:1]", "False", THIN + " -k error"),
    Mutation("pyembed/thin.py", 'state["_forward_hooks"]\n            or ', "", THIN + " -k more_than"),
    Mutation("pyembed/thin.py", 'or "forward" in state', "", THIN + " -k more_than"),
    Mutation("pyembed/thin.py", "type(module) in kinds\n", "isinstance(module, kinds)\n", THIN + " -k more_than"),
    Mutation("pyembed/thin.py", "or front.heads_first\n", "\n", THIN + " -k more_than"),
    Mutation("pyembed/thin.py", 'in ("raise", "trust")', "in outside.POLICIES", THIN),
    Mutation(
        "pyembed/thin.py",
        "torch.embedding(rotary.cos, places), torch.embedding(rotary.sin, places)",
        "rotary.cos[places], rotary.sin[places]",
        THIN + " -k error",
    ),
    Mutation("pyembed/thin.py", "query + key), rotation)", "query + key), rotation._replace(sin=-rotation.sin))", THIN),
    Mutation("pyembed/thin.py", "token.dtype and tensor.is_cpu", "token.dtype", THIN + " -k meta"),
    Mutation("pyembed/thin.py", 'and "weight" in state["_parameters"]\n', "\n", THIN + " -k no_parameters"),
    Mutation(KERNELS + "launch.py", "append(argument.data_ptr() % 16)", "append(0)", AGAIN + " -k address"),
    Mutation(KERNELS + "launch.py", "            append(argument)\n", "            append(0)\n", AGAIN),
    Mutation(KERNELS + "launch.py", "if len(names) < len(given):", "if False:", AGAIN + " -k two_places"),
    Mutation(KERNELS + "launch.py", "if len(memory) >= KINDS:", "if False:", AGAIN + " -k bounded"),
    Mutation("pyembed/replays.py", "tensor.data_ptr() % 16", "0", AGAIN + " -k address"),
    Mutation("pyembed/replays.py", "tensor.stride(), ", "", AGAIN + " -k looked_at"),
    Mutation("pyembed/replays.py", "grads and tensor.requires_grad", "False", AGAIN + " -k forgotten"),
    Mutation("pyembed/replays.py", "outside.look(ids.device)", "pass", AGAIN + " -k absent"),
    Mutation("pyembed/replays.py", "direct.is_heard() or", "", AGAIN + " -k profiler"),
    Mutation("pyembed/direct.py", "tensor.is_neg() or ", "", "tests/test_ops.py -k views"),
    Mutation("pyembed/direct.py", " or _is_batched(tensor)", "", "tests/test_embedding.py -k batched"),
    Mutation("pyembed/direct.py", "        or torch._C._len_torch_dispatch_stack()\n", "", AGAIN + " -k modes"),
    Mutation(
        "pyembed/direct.py", "        or torch._ops._len_torch_dispatch_stack_pre_dispatch()\n", "", AGAIN + " -k tracers"
    ),
    Mutation("pyembed/thin.py", "front._own_rotary(table.device)", 'modules["rotary"]', AGAIN + " -k moved"),
    Mutation("pyembed/replays.py", "ids.contiguous() if", "ids if", AGAIN + " -k column"),
    Mutation("pyembed/replays.py", "direct.is_strange(tensor) or ", "", AGAIN + " -k many"),
    Mutation("pyembed/direct.py", "if of not in kinds:", "if False:", AGAIN + " -k eps"),
    Mutation("bench/timing.py", "atol=tolerance * largest", "atol=1.0", "tests/test_bench.py -k wrong"),
    Mutation("bench/roofline.py", "2 * rows * D * N", "rows * D * N", "tests/test_bench.py -k counts"),
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
    command = f"{sys.executable} -m pytest -x -q -n0 -p no:cacheprovider {mutation.tests}"
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
            row = (mutation.file, mutation.before.strip(), mutation.after.strip(), "NOTHING" if alive else mutation.tests)
            table.add_row(*row, f"{seconds:.0f}")
            print(f"{'LIVES' if alive else 'killed'}  {mutation.file}: {mutation.before.strip()!r}", flush=True)
    Console(width=200).print(table)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
