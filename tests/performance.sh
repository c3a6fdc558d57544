#!/usr/bin/env bash
# Compares what the server costs with tests/performance.txt and with tests/performance-base.txt: instructions
# a message, a connection and a push under valgrind's callgrind, KiB an idle connection. docs/performance.md has
# what each may add. They are of a release build, which takes most of the time.
#
#   tests/performance.sh             compares
#   tests/performance.sh --update    compares, and writes tests/performance.txt anew: for a change that is meant;
#                                    the base is never written
#
# Exit codes: 0 passed, 1 failed, 77 not run because valgrind cannot be had here (one line says why).
# Further options are those of `switchboard-load guard`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

not_here() {
    echo "performance not compared here: $*" >&2
    exit 77
}

[[ $(uname -sm) == "Linux x86_64" ]] || not_here "the figures are of Linux on x86-64, this is $(uname -sm)"
if ! command -v callgrind_control >/dev/null; then
    ((EUID == 0)) && command -v apt-get >/dev/null || not_here "valgrind is missing (Debian, Ubuntu: apt-get install valgrind)"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends valgrind; } >&2 ||
        not_here "valgrind is missing, and apt-get cannot install it"
fi

cargo build --locked --quiet --release --workspace --bins
"${CARGO_TARGET_DIR:-target}/release/switchboard-load" guard --baseline tests/performance.txt --base tests/performance-base.txt "$@"
