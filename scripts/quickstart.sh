#!/usr/bin/env bash
# Trains a small vision-language model on four CPU ranks through PipeWeaver's schedule.
#
#   bash scripts/quickstart.sh [OPTIONS OF scripts/quickstart/train.py]
#
# Makes .venv in the repository and needs nothing else but Python 3.11 or 3.12 and a C++ compiler.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

RANKS=4

# train ARGUMENTS...: the one place that starts the ranks.
train() {
    cd "$REPO"
    export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 CUDA_VISIBLE_DEVICES='' PYTHONUNBUFFERED=1
    # megatron-core warns on every rank of what this run does without (Apex, Transformer Engine).
    export PYTHONWARNINGS=ignore
    [ "$(uname)" != Linux ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
    exec .venv/bin/torchrun --nnodes 1 --nproc-per-node "$RANKS" --local-addr 127.0.0.1 \
        --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 scripts/quickstart/train.py "$@"
}

missing=()
for version in 3.11 3.12; do
    if find_python "$version"; then
        prepare_environment "$version" "$REPO/.venv" quickstart || exit 1
        train "$@"
    fi
    missing+=("$PYTHON_MISSING")
done
fail "no fitting Python; install 3.11 or 3.12 and run this again." "${missing[@]}"
