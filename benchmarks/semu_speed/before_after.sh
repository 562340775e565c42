#!/usr/bin/env bash
# The speed of emulation at an earlier commit and now, one after the other, three times each:
#   benchmarks/semu_speed/before_after.sh COMMIT [PYTHON]
set -euo pipefail
commit=$1 python=${2:-python}
here=$(git rev-parse --show-toplevel)
before=$(mktemp -d)
trap 'rm -rf "$before"' EXIT
git -C "$here" archive "$commit" megatron_pipeweaver | tar -x -C "$before"
for round in 1 2 3; do
  for tree in "$before" "$here"; do
    [ "$tree" = "$here" ] && name=now || name=$commit
    echo "== round $round, $name"
    (cd "$tree" && PYTHONPATH=$tree "$python" "$here/benchmarks/semu_speed/run.py" --workload-only)
  done
done
