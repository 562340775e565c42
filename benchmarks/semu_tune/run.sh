#!/usr/bin/env bash
# Which parallel sizes train VLM-M fastest on 64 H800, and what the paper's choice takes; with the
# exchange between replicas alone and hidden; and a mixture of experts:
#   benchmarks/semu_tune/run.sh > benchmarks/semu_tune/result.txt
set -euo pipefail
cd "$(dirname "$0")"
echo "$(uname -m), $(getconf _NPROCESSORS_ONLN) cores, load $(cut -d ' ' -f 1 /proc/loadavg)"
# With one thread and so many rounds the ranking depends on the job and the seed alone.
flags=(--threads 1 --seed 0 --max-rounds 60 --time-budget 30)
# show VERB JOB [FLAG...]: the command, what it prints, how long it took.
show() {
    echo
    echo "\$ pipeweaver $* ${flags[*]}"
    TIMEFORMAT="took %R s (processor time %U s)"
    time "${PYTHON:-python}" -m megatron_pipeweaver "$@" "${flags[@]}"
}
{
    show tune vlm-m-64.json
    show tune vlm-m-64-hidden.json
    show emulate vlm-m-64-hidden.json
    show tune moe-64.json --top 12
} 2>&1
