#!/usr/bin/env bash
# Predicted against measured layers of megatron-core on this machine's GPU: ViT, language and
# diffusion chunks, forward and backward, peak memory, each strategy, at sizes that calibration
# never saw. The raw table goes to benchmarks/semu_accuracy/results.
#
#   bash scripts/gpu_accuracy.sh H100            the profile with the GPU's data-sheet rates
#   bash scripts/gpu_accuracy.sh cpu --small     tries the script out on a CPU, in about a minute
#
# Without a GPU it ends with one line and exit code 2.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

base=${1:-}
[ -n "$base" ] || fail "name the device profile, such as H100 (or cpu): bash scripts/gpu_accuracy.sh H100"
shift
python=""
for folder in "$REPO/.venv-test-3.11" "$REPO/.venv-test-3.12"; do
    if [ -z "$python" ] && [ -x "$folder/bin/python" ]; then python=$folder/bin/python; fi
done
[ -n "$python" ] || fail "no environment; make one: bash scripts/test.sh"
cd "$REPO"
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1

if [ "$base" = cpu ]; then
    exec "$python" -m benchmarks.semu_accuracy.run --device cpu "$@"
fi
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    fail "no GPU: torch.cuda.is_available() is false; run this where there is one"
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -c 'A-Za-z0-9\n' '-')
"$python" -m benchmarks.semu_accuracy.run --device cuda --base "$base" \
    -o "benchmarks/semu_accuracy/results/$name.md" "$@"
# Collectives need several ranks; with one GPU there is nothing to measure.
count=$(nvidia-smi --list-gpus | wc -l)
if [ "$count" -gt 1 ]; then
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$count" \
        -m megatron_pipeweaver calibrate --device cuda --base "$base" \
        -o "benchmarks/semu_accuracy/results/$name-x$count.json"
fi
