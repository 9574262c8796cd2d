#!/usr/bin/env bash
# Runs every check that needs a GPU, in under 9 minutes: builds the extension for the installed torch, runs the CUDA
# tests, compute-sanitizer on a small case and the GPU benchmarks, and prints a short summary.
#
#     bash tools/gpu_check.sh [folder for logs and results, default out/gpu_check]
#
# Needs torch with CUDA, nvcc, ninja and pybind11. If the current folder has a subfolder `wheels`, its contents (pytest,
# hypothesis, psutil, datasets, liger-kernel, quack-kernels, ...) are installed first, without network access.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/gpu_check}
mkdir -p "$out"
python=$(realpath --no-symlinks "$(command -v "${PYTHON:-python3}")")
status=0

stage() { # stage NAME SECONDS COMMAND...: writes the output to a log and prints whether the command succeeded
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
        echo "ok      $name ($((SECONDS - begin)) s)"
    else
        echo "FAILED  $name ($((SECONDS - begin)) s); the end of $out/$name.log:"
        tail -n 15 "$out/$name.log"
        status=1
    fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 1
if [ -d wheels ]; then
    stage wheels 20 bash -c "for wheel in wheels/*.whl; do $python -m pip install --no-index --no-deps \"\$wheel\"; done"
fi
arch=$("$python" -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability())))')
TDPO_CUDA=1 TDPO_CUDA_ARCHS=${TDPO_CUDA_ARCHS:-$arch} \
    stage build 150 "$python" -m pip install --no-build-isolation --no-deps --force-reinstall .
# From tests/: in the root, `-m pytest` would import the source tree, which has no compiled module.
stage tests 110 env --chdir=tests "$python" -m pytest -q -m cuda -p no:cacheprovider .
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        stage "$tool" 35 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" tools/sanitizer_case.py
    done
else
    echo "skipped: compute-sanitizer is not installed"
fi
stage bench_logits 70 "$python" benchmarks/bench_logits.py --device cuda --rounds 9
stage bench_linear 110 "$python" benchmarks/bench_linear.py --device cuda --rounds 3
cp benchmarks/results/*_cuda.json "$out" 2>/dev/null
"$python" tools/gpu_table.py
exit $status
