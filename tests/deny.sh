#!/usr/bin/env bash
# What cargo-deny has to say of the crates: advisories, licences, doubled and banned crates, sources.
# Exit 77: cargo-deny is not installed, or the database of advisories cannot be had; the rest has passed then.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! cargo deny --version >/dev/null 2>&1; then
    echo "NOT CHECKED: advisories, licences, crates and sources, since cargo-deny is not there" \
        "(cargo install cargo-deny --locked)" >&2
    exit 77
fi
if cargo deny --locked fetch db; then
    exec cargo deny --locked check
fi
cargo deny --locked check licenses bans sources
echo "NOT CHECKED: advisories, since their database (RustSec) cannot be fetched here." \
    "Licences, crates and sources are fine." >&2
exit 77
