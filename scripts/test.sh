#!/usr/bin/env bash
# Installs into .venv-test-VERSION, lints once, and runs the tests.
#
#   bash scripts/test.sh [3.11|3.12|all] [PYTEST ARGUMENTS]
#
# `all`, the default, takes each of the two Pythons that is found. Ends with 0 if everything
# passed, 1 if something failed, 2 if a Python or a compiler is missing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-all} in
    all) versions=(3.11 3.12) ;;
    3.11 | 3.12) versions=("$1") ;;
    *) fail "usage: bash scripts/test.sh [3.11|3.12|all] [PYTEST ARGUMENTS]" ;;
esac
[ $# -eq 0 ] || shift
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1
[ "$(uname)" != Linux ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
cd "$REPO"

missing=()
failed=()
tested=0
for version in "${versions[@]}"; do
    if ! find_python "$version"; then
        missing+=("$PYTHON_MISSING")
        say "$PYTHON_MISSING; its tests are not run"
        continue
    fi
    folder=$REPO/.venv-test-$version
    prepare_environment "$version" "$folder" dev || exit 1
    if [ "$tested" -eq 0 ]; then
        bash scripts/lint.sh "$folder" || failed+=("lint")
    fi
    tested=$((tested + 1))
    say "pytest on Python $version"
    # Two files at a time, also where there are more cores: a test may start eight ranks. A later
    # -n wins: `test.sh 3.11 -n 0` runs in one process.
    "$folder/bin/python" -m pytest -n 2 --dist loadfile "$@" || failed+=("pytest on Python $version")
done

[ "$tested" -gt 0 ] || fail "nothing was tested." "${missing[@]}"
if [ ${#failed[@]} -gt 0 ]; then
    say "failed: $(printf '%s; ' "${failed[@]}")" >&2
    exit 1
fi
