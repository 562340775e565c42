# shellcheck shell=bash disable=SC2034
# What quickstart.sh, test.sh and lint.sh share. Source it; nothing runs by itself.
#
# Packages are installed with uv. It is told what pip is told (index, find-links, certificate), and
# its own settings hold (UV_TORCH_BACKEND=cpu fetches torch without CUDA).

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
UV_VERSION=0.13.9
unset PYTHONPATH PYTHONHOME

say() { printf '[pipeweaver] %s\n' "$*"; }

# fail MESSAGE...: something the user has to mend first.
fail() {
    printf '[pipeweaver] %s\n' "$@" >&2
    exit 2
}

# pyenv_roots: one folder a line; found through PATH too, for the variables may not be set.
pyenv_roots() {
    local entry
    printf '%s\n' "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"
    while read -r -d : entry; do
        case $entry in
            */shims | */bin) printf '%s\n' "${entry%/*}" ;;
        esac
    done <<<"$PATH:"
}

# python_candidates VERSION: programs that may be Python VERSION, one a line.
python_candidates() {
    local root program
    type -aP "python$1" python3 python || true
    pyenv_roots | while read -r root; do
        [ -n "$root" ] || continue
        for program in "$root"/versions/"$1".*/bin/"python$1"; do
            [ -x "$program" ] && printf '%s\n' "$program"
        done
    done
    return 0
}

# inspect_python PROGRAM VERSION: prints the real program behind PROGRAM (which may be a shim) and,
# behind a blank, what it lacks; fails if it is not Python VERSION.
inspect_python() {
    "$1" - "$2" 2>/dev/null <<'PYTHON'
import importlib.util, os, sys, sysconfig
if "%d.%d" % sys.version_info[:2] != sys.argv[1]:
    sys.exit(1)
lacks = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
header = os.path.join(sysconfig.get_path("include"), "Python.h")
lacks += [] if os.path.exists(header) else [header]
print(sys.executable.replace(" ", "\\ "), *lacks)
PYTHON
}

# find_python VERSION: sets PYTHON to a program that can make environments and build extensions.
# Where there is none it fails, and PYTHON_MISSING says in a line what was found.
find_python() {
    local candidate program lacks
    PYTHON=
    PYTHON_MISSING="Python $1: not on PATH and not under pyenv"
    while read -r candidate; do
        # Without -r, so that a blank inside the path stays in the path.
        # shellcheck disable=SC2162
        read program lacks < <(inspect_python "$candidate" "$1") || continue
        if [ -z "$lacks" ]; then
            PYTHON=$program
            return 0
        fi
        PYTHON_MISSING="Python $1: $program lacks $lacks (Debian: python$1-venv, python$1-dev)"
    done < <(python_candidates "$1")
    return 1
}

# need_compiler: the native core is C++20.
need_compiler() {
    local compiler=${CXX:-c++}
    echo 'int main() {}' | ${compiler} -std=c++20 -x c++ -fsyntax-only - 2>/dev/null ||
        fail "no C++20 compiler: '$compiler' is missing or too old." \
            "Install one (Debian: apt-get install g++) or name it in CXX."
}

# digest FILE...: one word that changes when a file does.
digest() { cat "$@" | cksum | tr ' ' -; }

# quietly WHAT COMMAND...: a line before, a line after, and the output only if COMMAND fails.
quietly() {
    local what=$1 log began=$SECONDS
    shift
    log=$(mktemp)
    say "$what ..."
    if ! "$@" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        say "$what: failed: $*" >&2
        return 1
    fi
    rm -f "$log"
    say "$what: done in $((SECONDS - began)) s"
}

# follow_pip FOLDER: what pip is told, in its configuration or in PIP_..., holds for uv.
follow_pip() {
    local pair uv_name told value
    # `pip config get` overlooks the machine's own file; `list` does not, and lists PIP_... as :env:.
    told=$("$1/bin/python" -m pip config list | sed "s/\\\\n/ /g; s/'\$//" | sort -r)
    for pair in UV_FIND_LINKS=find-links UV_DEFAULT_INDEX=index-url SSL_CERT_FILE=cert; do
        uv_name=${pair%=*}
        [ -z "${!uv_name:-}" ] || continue
        value=$(sed -nE "s/^(:env:|global|install)\.${pair#*=}='[[:space:]]*//p" <<<"$told" | tail -n 1)
        value=${value// /,}
        [ -z "$value" ] || export "$uv_name=$value"
    done
}

# prepare_environment VERSION FOLDER EXTRA: makes FOLDER with PYTHON (see find_python) and installs
# the checkout into it, editable, native core built, with pyproject's EXTRA and VERSION's pins.
# What is up to date already is left alone.
prepare_environment() {
    local version=$1 folder=$2 extra=$3 pins=$REPO/scripts/requirements-$1.txt wanted
    wanted="$extra $PYTHON $(digest "$pins" "$REPO/pyproject.toml" "$REPO/setup.py") $(
        digest "$REPO"/megatron_pipeweaver/csrc/*
    ) $REPO"
    if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$wanted" ]; then
        say "$folder is up to date"
        return 0
    fi
    need_compiler
    say "Python $version: $PYTHON"
    rm -f "$folder/.installed"
    if ! "$folder/bin/python" -c '' 2>/dev/null || [ "$(cat "$folder/.python")" != "$PYTHON" ]; then
        rm -rf "$folder"
        quietly "making $folder" "$PYTHON" -m venv "$folder" || return 1
        printf '%s\n' "$PYTHON" >"$folder/.python"
        quietly "installing uv" "$folder/bin/python" -m pip install -q "uv==$UV_VERSION" || return 1
    fi
    follow_pip "$folder"
    quietly "installing packages and building the native core" \
        "$folder/bin/uv" pip install --python "$folder/bin/python" \
        --constraint "$pins" --build-constraint "$pins" --reinstall-package megatron-pipeweaver \
        --editable "${REPO}[$extra]" || return 1
    printf '%s\n' "$wanted" >"$folder/.installed"
}
