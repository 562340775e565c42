#!/usr/bin/env bash
# The native core under AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   bash scripts/sanitize.sh [ENVIRONMENT] [PROBLEMS]     default: .venv-test-3.12, 400 problems
#
# Builds a copy of the package beside the sanitized core in a temporary folder, then runs a slice of
# the fuzz, the search's unit tests, and the tests that read and prove plans, damaged ones among them.
# The first finding ends it with an error.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

environment=$(realpath "${1:-$REPO/.venv-test-3.12}")
problems=${2:-400}
[ -x "$environment/bin/python" ] || fail "no environment at $environment; make one: bash scripts/test.sh"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

say "building the native core with sanitizers ..."
cp -r "$REPO/megatron_pipeweaver" "$REPO/benchmarks" "$REPO/tests" "$REPO/pyproject.toml" "$folder"
rm -f "$folder"/megatron_pipeweaver/_core*.so
suffix=$("$environment/bin/python" -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
read -ra includes <<<"$("$environment/bin/python" -m pybind11 --includes)"
"${CXX:-c++}" -std=c++20 -O1 -g -fPIC -shared -fvisibility=hidden -fno-omit-frame-pointer \
    -fsanitize=address,undefined -fno-sanitize-recover=all "${includes[@]}" \
    "$folder"/megatron_pipeweaver/csrc/*.cpp -o "$folder/megatron_pipeweaver/_core$suffix" -pthread

# Python itself keeps memory to its end, so leaks are not looked for.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$("${CXX:-c++}" -print-file-name=libasan.so) $("${CXX:-c++}" -print-file-name=libubsan.so)"
LD_PRELOAD+=" $("${CXX:-c++}" -print-file-name=libstdc++.so.6)"
cd "$folder"
# sanitized COMMAND...: with the copy in front of what is installed.
sanitized() {
    PYTHONPATH=$folder LD_PRELOAD=$LD_PRELOAD PYTHONMALLOC=malloc OMP_NUM_THREADS=1 "$@"
}
sanitized "$environment/bin/python" -c "
import megatron_pipeweaver._core as core
assert core.__file__.startswith('$folder'), core.__file__"
say "fuzz ..."
sanitized "$environment/bin/python" -m benchmarks.search.fuzz --problems "$problems" -o fuzz.csv
say "unit tests of the search ..."
sanitized "$environment/bin/python" -m pytest -q -p no:cacheprovider tests/unit/search
say "plans, damaged ones and mutants ..."
sanitized "$environment/bin/python" -m pytest -q -p no:cacheprovider tests/unit/compiler \
    tests/property/test_compiler_packed.py tests/property/test_compiler_mutants.py
say "sanitizers: clean"
