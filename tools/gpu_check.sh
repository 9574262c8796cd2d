#!/usr/bin/env bash
# Every check that needs a GPU, in two calls that each stand alone and take at most five minutes:
#
#     bash tools/gpu_check.sh facts [FOLDER]      figures (benchmarks/gpu_facts.py), the CUDA tests, compute-sanitizer
#     bash tools/gpu_check.sh peers [FOLDER]      benchmarks beside other implementations, hardware counters
#
# With --rehearse at the end: the same stages with tiny shapes on the package as it is installed, such as on the virtual
# GPU, and without the programs that watch kernels.
#
# Needs torch with CUDA, and pytest. If there is a folder `wheels` beside `tools`, its packages are used, without a
# network: the benchmarks' peers and, if it is among them, tdpo_ext; else tdpo_ext is built from the source, with nvcc.
# Nothing is installed into the environment. FOLDER (default $OUT, or out/gpu_check) gets eight files at most, of both
# calls together: facts.jsonl, bench_linear_cuda.json, bench_logits_cuda.json and counters.csv, and of each call a list
# of its stages and an archive of their logs, packed anew after each. The most valuable stages are first; one that runs
# out of its time loses what it has not written, and one that no longer fits into the call is skipped.
set -uo pipefail
call=${1:-}
case $call in
facts) seconds=300 ;;
peers) seconds=290 ;;
*)
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
shift
rehearse="" out=${OUT:-out/gpu_check}
for argument in "$@"; do
    if [ "$argument" = --rehearse ]; then rehearse=1; else out=$argument; fi
done
out=$(realpath -m "$out") root=$(realpath "$(dirname "$0")/..") work=${TMPDIR:-/tmp}/tdpo_gpu_check
python=$(realpath --no-symlinks "$(command -v "${PYTHON:-python3}")")
status=0 tiny="" slowness=1
if [ -n "$rehearse" ]; then
    tiny=--tiny slowness=5 # the limits are those of a GPU
fi
rm -rf "$work/logs" "$work/site"
mkdir -p "$out" "$work/logs" "$work/site"
cd "$root/tests" || exit 1 # in the root, `python -m` would import the source tree, which has no compiled module
export PYTHONUNBUFFERED=1 PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton

say() {
    echo "$*" | tee -a "$out/${call}_stages.txt"
}

stage() { # stage NAME SECONDS COMMAND...: its output goes to a log; prints and returns whether it succeeded
    local name=$1 limit=$((slowness * $2)) log=$work/logs/$1.log begin=$SECONDS failed=0
    shift 2
    if ((SECONDS + limit > slowness * seconds)); then
        say "skipped $name: less than its $limit s are left"
        status=1
        return 1
    fi
    timeout -k 3 $limit "$@" >"$log" 2>&1 || failed=$?
    if ((failed == 0)); then
        say "ok      $name ($((SECONDS - begin)) s)"
    else
        say "FAILED  $name (status $failed, $((SECONDS - begin)) s)"
        tail -n 15 "$log"
        status=1
    fi
    tar -C "$work/logs" -czf "$out/${call}_logs.tar.gz" .
    return $failed
}

watched_by() { # watched_by PROGRAM: whether it is there; a rehearsal does without
    [ -n "$rehearse" ] || command -v "$1" >/dev/null && return
    say "skipped: $1 is not installed"
    return 1
}

describe() {
    date -u
    uname -sr
    "$python" -VV
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    nvcc --version | tail -n 2
}

imports() {
    stage import 25 "$python" -c 'import tdpo_ext; info = tdpo_ext.build_info(); print(info); assert info["cuda_archs"]'
}

# tests/library/test_gpu_check.py adds up the limits.
prepare() {
    describe >"$out/${call}_stages.txt" 2>&1
    if [ -n "$rehearse" ]; then
        imports
        return
    fi
    local pip=("$python" -m pip install --quiet --no-deps --upgrade --target "$work/site")
    if compgen -G "$root/wheels/*.whl" >/dev/null; then
        stage wheels 15 "${pip[@]}" --no-index --no-compile "$root"/wheels/*.whl
    fi
    if ! compgen -G "$root/wheels/tdpo_ext-*.whl" >/dev/null || ! imports; then
        local arch
        arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
        stage build 110 env TDPO_CUDA=1 "TDPO_CUDA_ARCHS=${TDPO_CUDA_ARCHS:-$arch}" TDPO_BRGEMM=0 \
            "${pip[@]}" --no-build-isolation "$root"
    fi
}

facts() {
    local some=() memcheck=() racecheck=()
    if [ -n "$rehearse" ]; then
        some=(-k "repeatable or alignment")
    else
        memcheck=(compute-sanitizer --error-exitcode 1 --kernel-name kns=tdpo --tool memcheck)
        racecheck=(compute-sanitizer --error-exitcode 1 --kernel-name kns=tdpo --tool racecheck)
    fi
    stage facts 75 "$python" "$root/benchmarks/gpu_facts.py" $tiny --output "$out"
    stage tests 85 "$python" -m pytest -vv -m cuda -p no:cacheprovider "${some[@]}" library
    if watched_by compute-sanitizer; then
        stage memcheck 50 "${memcheck[@]}" "$python" "$root/tools/every_kernel.py"
        stage racecheck 45 "${racecheck[@]}" "$python" "$root/tools/every_kernel.py"
    fi
}

counters=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
counters+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed
counters+=,sm__warps_active.avg.pct_of_peak_sustained_active,smsp__inst_executed.sum

peers() {
    local ncu=() large=""
    if [ -z "$rehearse" ]; then
        large=--large
        ncu=(ncu --clock-control none --kernel-name "regex:row_state_kernel|gradient_kernel" --metrics "$counters")
        ncu+=(--csv --log-file "$out/counters.csv")
    fi
    stage bench_linear 140 "$python" "$root/benchmarks/bench_linear.py" --device cuda $tiny --rounds 3 --output "$out"
    stage bench_logits 60 "$python" "$root/benchmarks/bench_logits.py" --device cuda $tiny --rounds 5 --output "$out"
    if watched_by ncu; then
        stage counters 40 "${ncu[@]}" "$python" "$root/tools/every_kernel.py" $large
    fi
}

if prepare; then $call; else status=1; fi
"$python" "$root/tools/gpu_table.py" --results "$out" || status=1
exit $status
