#!/usr/bin/env bash
# What only a GPU can show. Raw results go to benchmarks/gpu/results.
#
#   bash scripts/gpu_check.sh [ENVIRONMENT]     default: the first of .venv-test-3.11, .venv-test-3.12
#
# Without a GPU it ends with one line and exit code 2.
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
results=$REPO/benchmarks/gpu/results
mkdir -p "$results"
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1

# one_rank: the suite's GPU tests, and what one rank's stages take and hold.
one_rank() {
    if [ -d tests/gpu ]; then "$python" -m pytest tests/gpu -q; fi
}

# shared_gpu: four ranks on one GPU, a quarter of its multiprocessors each, so that bubbles are real.
shared_gpu() {
    local folder
    command -v nvidia-cuda-mps-control >/dev/null || {
        say "nvidia-cuda-mps-control is not installed: ranks cannot share the GPU; skipped"
        return 0
    }
    folder=$(mktemp -d)
    export CUDA_MPS_PIPE_DIRECTORY=$folder/pipe CUDA_MPS_LOG_DIRECTORY=$folder/log
    mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
    nvidia-cuda-mps-control -d
    # The daemon is ours alone, found by its folder; it ends whatever happens here.
    trap 'echo quit | nvidia-cuda-mps-control >/dev/null; rm -rf "$folder"' RETURN
    CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=25 NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 \
        NCCL_MAX_CTAS=2 "$python" -m benchmarks.gpu.shared -o "$results/shared.csv"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$results/gpu.txt"
one_rank
shared_gpu
