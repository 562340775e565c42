#!/usr/bin/env bash
# Which parallel sizes train VLM-M fastest on 64 H800, and what the paper's choice takes:
#   benchmarks/semu_tune/run.sh > benchmarks/semu_tune/result.txt
set -euo pipefail
cd "$(dirname "$0")"
echo "$(uname -m), $(getconf _NPROCESSORS_ONLN) cores, load $(cut -d ' ' -f 1 /proc/loadavg)"
job=vlm-m-64.json
for verb in tune emulate; do
  echo
  echo "\$ pipeweaver $verb $job --threads 2 --seed 0 --time-budget 0.3"
  TIMEFORMAT="took %R s (processor time %U s)"
  time "${PYTHON:-python}" -m megatron_pipeweaver "$verb" "$job" --threads 2 --seed 0 --time-budget 0.3
done 2>&1
