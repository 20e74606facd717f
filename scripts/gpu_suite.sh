#!/usr/bin/env bash
# What waits for a machine with a GPU, in commands of less than ten minutes; needs no network.
#
#   scripts/gpu_suite.sh tests           pytest -m gpu, and the table of torch-against-JAX differences; more arguments
#                                        are pytest's (-k float64)
#   scripts/gpu_suite.sh torch           benchmarks.torch_engine --device gpu (ARGS=... goes to it)
#   scripts/gpu_suite.sh jax             benchmarks.jax_engine --device gpu
#   scripts/gpu_suite.sh rehearsal       as `tests`, with the cases that run on the CPU: does all of this work?
#
# Dated files are written into the folder $OUT, or benchmarks/results. PYTHON says which Python (python3); it must have
# torch, jax, flax, pytest, hypothesis, rich and safetensors: a machine's own will do, revcore itself is taken from here.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" XLA_PYTHON_CLIENT_PREALLOCATE=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results}"
stem="$out/$(date +%F)-gpu"
mkdir -p "$out"

suite() { # device, then what selects tests
    local device="$1" at="$stem-suite" code=0
    shift
    local xml="$out/gpu-suite-junit.xml" workers=()
    if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n "${WORKERS:-8}"); fi
    # a machine's own packages may warn of what the pinned ones do not: their warnings are shown, not judged
    # an interrupt, not a kill: what was found by then is written
    timeout --signal=INT --kill-after=20 "${LIMIT:-550}" "$python" -m pytest --tier all "${workers[@]}" -W default -q -p no:cacheprovider -o junit_family=xunit2 \
        --junitxml "$xml" -rs --durations 20 "$@" 2>&1 | tee "$at.txt" || code=$?
    if [ -s "$xml" ]; then "$python" scripts/gpu_table.py "$xml" "$device" >"$stem-torch-against-jax.md" || code=$?; fi
    rm -f "$xml"
    return "$code"
}

need_gpu() {
    "$python" - <<'PY' || exit 1
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("scripts/gpu_suite.sh: torch sees no GPU here (scripts/gpu_suite.sh rehearsal needs none)")
PY
}

case "${1:-}" in
tests)
    need_gpu
    export REVCORE_TEST_GPU=1
    # no other file, for it may need a package that the machine has not
    mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
    suite "$("$python" -c 'import jax, torch; print(torch.cuda.get_device_name(0), "torch", torch.__version__, "jax", jax.__version__, sep=", ")')" \
        -m gpu "${files[@]}" "${@:2}"
    ;;
rehearsal)
    WORKERS="${WORKERS:-2}" suite "no GPU: a rehearsal on the CPU" tests/conformance/test_gpu.py -m "not gpu"
    ;;
torch)
    need_gpu
    timeout "${LIMIT:-570}" "$python" -m benchmarks.torch_engine --device gpu --write --out "$out" ${ARGS:-}
    ;;
jax)
    need_gpu
    timeout "${LIMIT:-570}" "$python" -m benchmarks.jax_engine --device gpu --write --out "$out" \
        ${ARGS:---workload mlp --depths 8 32 --scan-depths 128 --rounds 5}
    ;;
*)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac
