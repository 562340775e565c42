#!/usr/bin/env bash
# What only a GPU can show, all of it by one command. Raw results go to benchmarks/gpu/results;
# summary.txt there says of every part whether it ran, and why one did not.
#
#   bash scripts/gpu_check.sh [ENVIRONMENT]     default: the first of .venv-test-3.11, .venv-test-3.12
#
#   tests       the suite's GPU tests
#   accuracy    scripts/gpu_accuracy.sh: predicted against measured times and memory of chunks
#   pipeline    four ranks, PipeWeaver beside Megatron's interleaved function: on four GPUs, or, with
#               MPS and NCCL 2.30 or later, on a quarter of the only one each
#
# A part that fails does not keep the others from running; the exit code is 1 then. Without a GPU it
# ends with one line and exit code 2.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

environment=${1:-}
for folder in "$REPO/.venv-test-3.11" "$REPO/.venv-test-3.12"; do
    if [ -z "$environment" ] && [ -x "$folder/bin/python" ]; then environment=$folder; fi
done
[ -n "$environment" ] || fail "no environment; make one: bash scripts/test.sh"
python=$environment/bin/python
cd "$REPO"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    fail "no GPU: torch.cuda.is_available() is false in $environment; run this where there is one"
results=${PIPEWEAVER_GPU_RESULTS:-$REPO/benchmarks/gpu/results}
mkdir -p "$results"
: >"$results/summary.txt"
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1
failed=0 mps_folder=

# ask CODE: what Python prints of it.
ask() { "$python" -W ignore -c "$1"; }

# note PART WHAT: a line of the summary.
note() { say "$1: $2" && printf '%s: %s\n' "$1" "$2" >>"$results/summary.txt"; }

# run PART COMMAND...: its output goes to PART.log; what it ends with, to the summary.
run() {
    local part=$1
    shift
    if "$@" 2>&1 | tee "$results/$part.log"; then
        note "$part" "ran"
    else
        note "$part" "failed: see $part.log"
        failed=1
    fi
}

# stop_mps: the daemon is ours alone, found by its folder.
# shellcheck disable=SC2329
stop_mps() {
    [ -n "$mps_folder" ] || return 0
    echo quit | nvidia-cuda-mps-control >/dev/null 2>&1 || true
    rm -rf "$mps_folder"
}
trap stop_mps EXIT

# start_mps: a daemon of our own; says why where there can be none.
start_mps() {
    command -v nvidia-cuda-mps-control >/dev/null || {
        note pipeline "skipped: nvidia-cuda-mps-control is not installed, so that ranks that shared the GPU would take turns"
        return 1
    }
    mps_folder=$(mktemp -d)
    export CUDA_MPS_PIPE_DIRECTORY=$mps_folder/pipe CUDA_MPS_LOG_DIRECTORY=$mps_folder/log
    mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
    nvidia-cuda-mps-control -d >"$results/mps.log" 2>&1 && return 0
    note pipeline "skipped: the MPS daemon did not start: see mps.log"
    return 1
}

pipeline() {
    local version
    if [ "$(ask 'import torch; print(torch.cuda.device_count())')" -ge 4 ]; then
        run pipeline "$python" -m benchmarks.gpu.shared -o "$results/pipeline.csv"
        return
    fi
    version=$(ask 'import torch; print(*torch.cuda.nccl.version())')
    # shellcheck disable=SC2086
    set -- $version
    if [ "$1" -lt 2 ] || { [ "$1" -eq 2 ] && [ "$2" -lt 30 ]; }; then
        note pipeline "skipped: NCCL $1.$2 refuses ranks that share a GPU; 2.30 is the first that takes them"
        return
    fi
    start_mps || return 0
    CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=25 NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 \
        NCCL_MAX_CTAS=2 run pipeline "$python" -m benchmarks.gpu.shared -o "$results/pipeline.csv"
}

{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || echo "no nvidia-smi"
    ask 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "NCCL", *torch.cuda.nccl.version())'
} 2>&1 | tee "$results/gpu.txt"
run tests "$python" -m pytest tests/gpu -q -rs
if profile=$(ask 'from megatron_pipeweaver.plugin.training import found_device; print(found_device())' 2>"$results/accuracy.log"); then
    PYTHON=$python run accuracy bash scripts/gpu_accuracy.sh "$profile"
else
    note accuracy "skipped: $(tail -n 1 "$results/accuracy.log")"
fi
pipeline
exit "$failed"
