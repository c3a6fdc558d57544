#!/usr/bin/env bash
# Measures Switchboard beside a bare tokio-tungstenite server, axum and Node's ws, and prints the table.
#
#   load/compare/run.sh [--rounds N] [--seconds S] [--connections N]
#
# Needs Node 18 or later with npm. What it builds stands in target/compare.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
target=${CARGO_TARGET_DIR:-$PWD/target}
compare=$target/compare
mkdir -p "$compare"
command -v npm >/dev/null || { echo "npm is missing: install Node 18 or later" >&2; exit 1; }
cp load/compare/ws.mjs load/compare/package.json "$compare/"
npm install --prefix "$compare" --silent --no-audit --no-fund
cargo build --release --locked --quiet --manifest-path load/compare/Cargo.toml --target-dir "$compare"
exec cargo run --release --locked --quiet -p switchboard-load -- compare \
    --axum "$compare/release/axum-echo" --ws "$compare/ws.mjs" "$@"
