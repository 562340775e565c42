#!/usr/bin/env bash
# Everything that is checked without running the code; the same for pre-commit, CI and people.
#
#   bash scripts/lint.sh [ENVIRONMENT]     default: the first of .venv-test-3.11, .venv-test-3.12
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

environment=${1:-}
for folder in "$REPO/.venv-test-3.11" "$REPO/.venv-test-3.12"; do
    if [ -z "$environment" ] && [ -x "$folder/bin/ruff" ]; then environment=$folder; fi
done
[ -n "$environment" ] || fail "no environment to lint with; make one: bash scripts/test.sh"
PATH=$environment/bin:$PATH
cd "$REPO"

failed=()
# check COMMAND...: runs it, says so, and remembers a failure.
check() {
    say "$*"
    "$@" || failed+=("$1 ${2:-}")
}

check ruff format --check .
check ruff check .
check mypy
check lint-imports
check clang-format --dry-run --Werror megatron_pipeweaver/csrc/*.[ch]pp
check shellcheck -x -P SCRIPTDIR scripts/*.sh scripts/slurm/* .ci/run

if [ ${#failed[@]} -gt 0 ]; then
    say "lint failed: $(printf '%s; ' "${failed[@]}")" >&2
    exit 1
fi
