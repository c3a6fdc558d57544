#!/usr/bin/env bash
# Measures the latency of messages while pushes go to 10,000 connections on the same core, and without pushes. The
# process that receives the pushes has idle priority on the client's core, so that it delays no measurement.
#
#   load/beside_pushes.sh [SERVER]
#
# Exit codes: 0 the 99th percentile is at most 10 ms above that without pushes, 1 it is not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
release="${CARGO_TARGET_DIR:-target}/release"
server=${1:-$release/switchboard} tool=$release/switchboard-load
address=127.0.0.1:${PORT:-18999} connections=10000
folder=$(mktemp -d)
pids=()
trap 'kill -9 "${pids[@]}" 2>/dev/null || true; wait 2>/dev/null; rm -rf "$folder"' EXIT
ulimit -n 20000
export DATA_DIR=$folder
for user in {1..20}; do "$server" token --user "user-$user" --ttl 1h; done >"$folder/tokens"
env LISTEN_ADDR="$address" WS_MAX_CONNECTIONS=20000 WS_MAX_CONNECTIONS_PER_USER=20000 WS_MAX_PENDING=20000 \
    WS_MAX_PENDING_PER_ADDRESS=20000 WS_MESSAGE_RATE_LIMIT=0 RATE_LIMIT_PER_MINUTE=0 METRICS_RATE_LIMIT=0 \
    HTTP_MAX_CONNECTIONS_PER_ADDRESS=2000 LOG_LEVEL=warn taskset -c 0 "$server" serve >"$folder/log" 2>&1 &
pids+=($!)
until curl -sf "http://$address/health/ready" >/dev/null; do sleep 0.1; done
at=(--url "http://$address" --tokens "$folder/tokens")
chrt -i 0 taskset -c 1 "$tool" latency "${at[@]}" --connections $connections --rate 10 --seconds 60 &>/dev/null &
pids+=($!)
open() { curl -s "http://$address/metrics" | awk '/^ws_connections_active/ { print int($2) }'; }
until (($(open) >= connections)); do sleep 0.5; done
sleep 2

# Prints the row of the table, and leaves its 99th percentile in `p99`.
measure() {
    local row
    row=$(taskset -c 1 "$tool" latency "${at[@]}" --connections 50 --rate 2000 --seconds 8 2>/dev/null | grep 'package 100')
    echo "$1 $row"
    p99=$(awk -F'|' '{ print $6 }' <<<"$row")
}
echo "requests of 50 connections at 2,000/s, in ms | count | p50 | p90 | p99 | p99.9 | max |"
measure "without pushes"
without=$p99
push='{"pkg_id":100,"data":{"text":"a push to everybody"}}'
while curl -sf -o /dev/null -H "Authorization: Bearer $(head -1 "$folder/tokens")" -H 'Content-Type: application/json' \
    -d "$push" "http://$address/admin/broadcast"; do sleep 0.27; done &
pids+=($!)
measure "with 3 pushes/s   "
awk -v with="$p99" -v without="$without" 'BEGIN { exit !(with <= without + 10) }'
