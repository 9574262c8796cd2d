#!/usr/bin/env bash
# Runs every check that needs a GPU, in two calls of under 9 minutes each, the most valuable stages first:
#
#     bash tools/gpu_check.sh --prepare     builds the extension for the installed torch, compiles the benchmarks' peers
#     bash tools/gpu_check.sh               CUDA tests, benchmarks, compute-sanitizer, and a summary
#     bash tools/gpu_check.sh --rehearse    the stages of both on the CPU, with tiny shapes, without a build or a GPU
#
# A second argument is the folder for logs, results and compiled code (default out/gpu_check). Needs torch with CUDA, nvcc,
# ninja and pybind11. If the current folder has a subfolder `wheels`, its contents (pytest, hypothesis, psutil, trl,
# liger-kernel, quack-kernels, ...) are installed first, without network access. A stage that runs out of its time loses
# only its last case: the benchmarks save after each.
set -uo pipefail
cd "$(dirname "$0")/.."
mode=--check
if [[ ${1:-} == --* ]]; then
    mode=$1
    shift
fi
out=$(realpath -m "${1:-out/gpu_check}")
mkdir -p "$out"
python=$(realpath --no-symlinks "$(command -v "${PYTHON:-python3}")")
export TORCHINDUCTOR_CACHE_DIR=$out/cache/inductor TRITON_CACHE_DIR=$out/cache/triton
status=0
device=cuda size=""
if [ "$mode" = --rehearse ]; then
    device=cpu size=--tiny
fi

stage() { # stage NAME SECONDS COMMAND...: writes the output to a log and prints whether the command succeeded
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    if [ "$mode" = --rehearse ]; then
        limit=$((5 * limit)) # the limits are of a machine with a GPU; a rehearsal shows that the stages run
    fi
    if timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1; then
        echo "ok      $name ($((SECONDS - begin)) s)"
    else
        echo "FAILED  $name ($((SECONDS - begin)) s); the end of $out/$name.log:"
        tail -n 15 "$out/$name.log"
        status=1
    fi
}

sanitizer=(compute-sanitizer --error-exitcode 1 --kernel-name kns=tdpo --tool)
if [ "$device" = cpu ]; then
    sanitizer=(bash -c 'shift; "$@"' rehearsal)
fi

# tests/library/test_gpu_check.py adds up the limits.
prepare() {
    local arch
    arch=$("$python" -c 'import torch; print("".join(map(str, torch.cuda.get_device_capability())))')
    TDPO_CUDA=1 TDPO_CUDA_ARCHS=${TDPO_CUDA_ARCHS:-$arch} \
        stage build 240 "$python" -m pip install --no-build-isolation --no-deps --force-reinstall .
}

warm_up() {
    stage warm_logits 100 "$python" benchmarks/bench_logits.py --device $device $size --warm-up
    stage warm_linear 160 "$python" benchmarks/bench_linear.py --device $device $size --warm-up
}

check() {
    # From tests/: in the root, `-m pytest` would import the source tree, which has no compiled module.
    stage tests 110 env --chdir=tests "$python" -m pytest -q -m cuda -p no:cacheprovider library
    stage bench_logits 80 "$python" benchmarks/bench_logits.py --device $device $size --rounds 9 --output "$out"
    stage bench_linear 170 "$python" benchmarks/bench_linear.py --device $device $size --rounds 3 --skip-sweep \
        --output "$out"
    if [ "$device" = cpu ] || command -v compute-sanitizer >/dev/null; then
        stage memcheck 80 "${sanitizer[@]}" memcheck "$python" tools/sanitizer_case.py $device
        stage racecheck 80 "${sanitizer[@]}" racecheck "$python" tools/sanitizer_case.py $device
    else
        echo "skipped: compute-sanitizer is not installed"
    fi
    "$python" tools/gpu_table.py --results "$out" --device $device || status=1
}

if [ "$mode" = --rehearse ]; then
    warm_up
    check
    exit $status
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 1
if [ "$mode" = --prepare ]; then
    if [ -d wheels ]; then
        stage wheels 30 bash -c "for wheel in wheels/*.whl; do $python -m pip install --no-index --no-deps \"\$wheel\"; done"
    fi
    prepare
    warm_up
else
    check
    cp "$out"/bench_*_cuda.json benchmarks/results/ 2>/dev/null
fi
exit $status
