#!/usr/bin/env bash
# On a CUDA machine, also without a network: GPU tests, compute-sanitizer, predictions beside measurements, and the benchmark,
# within a time given.
#
#     bench/gpu.sh OUT [SECONDS=1500] [arguments of `python -m pytest bench`, as --full or --text FILE]
#
# Leaves in OUT: gpu.txt, predict.json, bench.json, report/ and a log of each part. Every part runs, whatever came of those
# before it. Exit status: 0, all went well; 1, a part failed or its time ran out; 2, it could not start.
set -uo pipefail

[ $# -ge 1 ] || { echo "usage: bench/gpu.sh OUT [SECONDS] [arguments of the benchmark]" >&2 && exit 2; }
out=$1
total=${2:-1500}
shift $(($# < 2 ? $# : 2))
[ "$total" -ge 300 ] 2>/dev/null || { echo "bench/gpu.sh: expected SECONDS of at least 300, got $total" >&2 && exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1

missing=$("$python" - 2>"$out/gpu.txt" <<'EOF'
import importlib.util as found
names = ("torch", "triton", "pytest", "pytest_benchmark", "xdist", "hypothesis", "typer", "rich", "matplotlib", "tiktoken")
lacking = [name for name in names if not found.find_spec(name)]
if "torch" not in lacking:
    import torch
    lacking += [] if torch.cuda.is_available() else ["a CUDA device"]
print(", ".join(lacking), end="")
EOF
)
if [ $? -ne 0 ] || [ -n "$missing" ]; then
    echo "bench/gpu.sh: expected ${missing:-a $python that runs: see $out/gpu.txt}" >&2
    exit 2
fi
if ! "$python" -c 'import pyembed.kernels' 2>/dev/null; then # not installed: the kernels are the package that setup.py names
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    cp -r . "$copy" && cp -r kernels/triton "$copy/pyembed/kernels" && cd "$copy" || exit 2
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
{ nvidia-smi; "$python" -m torch.utils.collect_env; git log -1 --format='commit %H'; } >>"$out/gpu.txt" 2>&1

failed=0
part() { # NAME SECONDS COMMAND...: a part, its output and how it ended
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout --signal=INT --kill-after=30 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "$name: exit $status after $((SECONDS - start)) of $limit s" | tee -a "$out/$name.log"
    [ $status -eq 0 ] || failed=1
}

part gpu-tests $((total * 20 / 100)) "$python" -m pytest -q -m gpu tests --full
part kernel-tests $((total * 20 / 100)) "$python" -m pytest -q -m 'not gpu' \
    tests/kernels/test_{embed,embed_qkv,embed_grad,epilogue,terms,rotary,distinct_kernels}.py \
    tests/plans/test_{distinct,determinism}.py tests/machinery/test_{ids,autocast,ops}.py tests/modules/test_modules.py --full
if command -v compute-sanitizer >/dev/null; then # without PyTorch's cache, so that an access past a tensor's end is one past its memory
    part sanitizer $((total * 15 / 100)) env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode=1 \
        "$python" -m pytest -q -n0 -m 'not gpu' tests/kernels/test_{embed,embed_grad,distinct_kernels}.py --full
else
    echo "sanitizer: not run: compute-sanitizer is not installed" | tee "$out/sanitizer.log"
fi
part predict $((total * 10 / 100)) env COLUMNS=200 "$python" bench/predict.py --measure --json "$out/predict.json"
left=$((total - SECONDS - 150)) # for the row under way, and the report
part bench $((left + 60)) "$python" -m pytest bench/bench_{host,front,embedding,step}.py --budget "$left" --benchmark-json="$out/bench.json" "$@"
[ -s "$out/bench.json" ] && part report 60 "$python" bench/report.py "$out/bench.json" --into "$out/report"
exit $failed
