#!/usr/bin/env bash
# Sets up .venv from the locks named: `requirements/install.sh cpu [test]`. What is up to date already
# is left alone, and two calls at once take turns. PYTHON names the interpreter (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec 9<requirements/install.sh && flock 9

readonly base_python=${PYTHON:-python3} python=.venv/bin/python needed_mb=$([[ $* == *test* ]] && echo 4500 || echo 3000)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '[deltarl set-up] %s\n' "$*"; }
fail() { printf '[deltarl set-up] failed: %s\n' "$*" >&2; exit 1; }
digest() { cat "$@" | sha256sum | cut -c1-16; }
is_current() { [ "$(cat ".venv/.deltarl-$1" 2>/dev/null)" = "$2" ]; }
mark_current() { echo "$2" >".venv/.deltarl-$1"; }

make_venv() {
    "$python" -c 'import pip' 2>/dev/null && return
    command -v "$base_python" >/dev/null || fail "$base_python not found: apt install python3 python3-venv"
    "$base_python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
        fail "$("$base_python" -V) is outside 3.11 to 3.13: name another with make PYTHON=python3.12"
    "$base_python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "Python's venv module is missing: apt install python3-venv"
    [ "$(df -Pm . | awk 'NR == 2 { print $4 }')" -ge "$needed_mb" ] ||
        fail "less than $needed_mb MB free in $PWD: make room, then run the same command again"
    say "making .venv with $("$base_python" -V)"
    "$base_python" -m venv --clear .venv || fail "no .venv could be made; the reason is above"
}

# pip_install TOTAL ARGUMENTS...: pip with a counter of the packages instead of its own lines.
pip_install() {
    local total=$1 terminal=0
    shift
    [ -t 1 ] && terminal=1
    "$python" -m pip install --no-deps --no-build-isolation --no-compile --progress-bar off "$@" \
        2> >(grep -v '^WARNING: ' >&2) |
        awk -v total="$total" -v terminal="$terminal" '
            /^(Collecting|Processing|Requirement already satisfied)/ {
                count++; name = $1 == "Requirement" ? $4 : $2; sub(/ .*/, "", name)
                if (terminal) printf "\r\033[K    fetching %d/%d %s", count, total, name
                else if (count % 25 == 0) printf "    fetching %d/%d\n", count, total
            }
            /^Installing collected/ { if (terminal) printf "\r\033[K"; print "    writing files" }
            { fflush() }'
}

# The CPU build of torch: pip finds it where an index or a wheel folder with CPU builds is set up; uv knows where it is.
install_torch() {
    local pin
    pin=$(grep '^torch==' requirements/cpu.txt)
    say "installing $pin (190 MB)"
    pip_install 1 "$pin" 2>/dev/null && return
    say "pip knows no CPU build of torch here: fetching it with uv"
    "$python" -m pip install --quiet uv &&
        "$python" -m uv pip install --python "$python" --no-deps --torch-backend cpu "${pin%+cpu}" ||
        fail "no CPU build of torch could be installed; the reason is above (network, or disk space?)"
    "$python" -m pip uninstall --quiet --yes uv
}

# Proves that the engine and the learner import. Writes the bytecode of what they load, which pip was told not to do
# for every file of every package: 7 seconds less at each later start for one slow start now. -P, because the folder
# kernels/ here is not the library of that name that transformers looks for.
check_imports() {
    local output
    say "importing vLLM and TRL for the first time (up to a minute)"
    output=$(env -u PYTHONDONTWRITEBYTECODE "$python" -P -W ignore -c 'from vllm import LLM; from trl import GRPOTrainer' 2>&1) ||
        fail "vLLM or TRL does not import: $(tail -n 1 <<<"$output")"
}

install_lock() {
    local lock=requirements/$1.txt count key
    key=$(digest "$lock")
    is_current "$1" "$key" && return
    count=$(grep -c '==' "$lock")
    [ "$1" != cpu ] || install_torch
    say "installing the $count packages of $lock"
    pip_install "$count" -r "$lock" || fail "$lock could not be installed; the reason is above (network, or disk space?)"
    [ "$1" != cpu ] || check_imports
    mark_current "$1" "$key"
}

install_deltarl() {
    local key
    key="$PWD $(digest pyproject.toml)"
    is_current self "$key" && return
    say "installing deltarl itself (editable)"
    "$python" -m pip install --quiet --no-deps --no-build-isolation -e . || fail "deltarl could not be installed; the reason is above"
    mark_current self "$key"
}

make_venv
for lock in "$@"; do install_lock "$lock"; done
install_deltarl
say "ready: .venv ($*)"
