#!/usr/bin/env bash
# Predicted against measured chunks on this machine's GPU: ViT, language and diffusion layers, and
# whole modules with their embeddings, projector, heads and losses; forward and backward, peak
# memory, each strategy, at sizes that calibration never saw. The raw table goes to
# benchmarks/semu_accuracy/results, or where -o says.
#
#   bash scripts/gpu_accuracy.sh H100            the profile with the GPU's data-sheet rates
#   bash scripts/gpu_accuracy.sh cpu --small     the same code on a CPU, in about a minute
#   PYTHON=python3 bash scripts/gpu_accuracy.sh H200 -o FILE
#
# PYTHON is any Python with torch and megatron-core, PYTHONPATH included; the environment of
# scripts/test.sh by default. Nothing is fetched, and the native core is not needed. It takes
# several minutes and up to 60 GiB of the GPU. Without a GPU it ends with one line and exit code 2.
set -euo pipefail
python=${PYTHON:-} path=${PYTHONPATH:-}
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

base=${1:-}
[ -n "$base" ] || fail "name the device profile, such as H100 (or cpu): bash scripts/gpu_accuracy.sh H100"
shift
[ -z "$path" ] || [ -z "$python" ] || export PYTHONPATH=$path
for folder in "$REPO/.venv-test-3.11" "$REPO/.venv-test-3.12"; do
    if [ -z "$python" ] && [ -x "$folder/bin/python" ]; then python=$folder/bin/python; fi
done
[ -n "$python" ] || fail "no environment; make one: bash scripts/test.sh" \
    "or name a Python with torch and megatron-core: PYTHON=python3 bash scripts/gpu_accuracy.sh $base"
cd "$REPO"
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1
"$python" -W ignore -c 'import megatron.core' 2>/dev/null ||
    fail "$python cannot import megatron.core (try it: $python -c 'import megatron.core')"

if [ "$base" = cpu ]; then
    exec "$python" -m benchmarks.semu_accuracy.run --device cpu "$@"
fi
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "no GPU: torch.cuda.is_available() is false; run this where there is one"
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
"$python" -m benchmarks.semu_accuracy.run --device cuda --base "$base" \
    -o "benchmarks/semu_accuracy/results/$name.md" "$@"
# Collectives need several ranks; with one GPU there is nothing to measure.
count=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$count" -gt 1 ]; then
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$count" \
        -m megatron_pipeweaver calibrate --device cuda --base "$base" \
        -o "benchmarks/semu_accuracy/results/$name-x$count.json"
fi
