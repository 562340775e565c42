#!/usr/bin/env bash
# Puts PipeWeaver's calls into a checkout of Megatron-LM, for those who keep a fork of it.
#
#   bash scripts/apply_patches.sh CHECKOUT
#
# Takes the patch of patches/ that fits the checkout's version. Ends with 0 if it is applied, now or
# before, and with 2 and one line if it cannot be; then nothing is changed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[ $# -eq 1 ] || fail "usage: bash scripts/apply_patches.sh CHECKOUT"
command -v git >/dev/null || fail "git is not installed; it applies the patches"
info=$1/megatron/core/package_info.py
[ -f "$info" ] || fail "$1 is no checkout of Megatron-LM: it has no megatron/core/package_info.py"

# number NAME: a part of the version, as package_info.py says it.
number() { sed -n "s/^$1 = \([0-9]*\)$/\1/p" "$info"; }
version=$(number MAJOR).$(number MINOR)
patch=
for candidate in "$REPO"/patches/core_v"$version".*.patch; do
    [ ! -f "$candidate" ] || patch=$candidate
done
known=$(cd "$REPO/patches" && printf '%s ' *.patch)
[ -n "$patch" ] ||
    fail "$1 is Megatron-LM $version, for which there is no patch; there are ${known//.patch/}"

# Not as part of a repository that the checkout may lie in.
cd "$1"
export GIT_CEILING_DIRECTORIES=${PWD%/*}
if git apply --reverse --check "$patch" 2>/dev/null; then
    say "$1 has ${patch##*/} already"
elif reason=$(git apply --check "$patch" 2>&1); then
    git apply "$patch"
    say "$1 has ${patch##*/} now"
else
    fail "${patch##*/} does not fit $1: $(sed -n 's/^error: //p;T;q' <<<"$reason"); its fork changed \
those lines, so make the patch's changes by hand"
fi
