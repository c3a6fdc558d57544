#!/usr/bin/env bash
# Asks a real Loki every LogQL query of the dashboards and docs, on the log lines of the live test.
#
#   tests/loki.sh         builds Loki once (Go, a quarter of an hour on two cores), runs the live test for its lines
#   tests/loki.sh FILE    takes the lines of a file instead
#
# Not a part of .ci/run, as it takes long. docs/loki.txt keeps what it said.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
version=v3.7.8
cached=${XDG_CACHE_HOME:-$HOME/.cache}/switchboard
loki=$cached/loki-$version

build() {
    local module
    module=$(cd "$(mktemp -d)" && go mod download -json "github.com/grafana/loki/v3@$version" |
        sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
    local source
    source=$(mktemp -d)
    cp -r "$module/." "$source"
    chmod -R u+w "$source"
    cd "$source"
    # Replaced by a folder that modules do not carry; its published version is the same.
    go mod edit -dropreplace=github.com/grafana/loki/pkg/push
    mkdir -p "$cached"
    CGO_ENABLED=0 GOFLAGS=-mod=mod go build -trimpath -ldflags='-s -w' -o "$loki" ./cmd/loki
    rm -rf "$source"
}

[[ -x $loki ]] || (build)

log=${1:-}
if [[ -z $log ]]; then
    (cd "$root" && cargo test --locked --test it -- --exact \
        monitoring::dashboards_have_data_alerts_fire_and_lines_are_as_documented >&2)
    log=$root/target/tmp/monitoring.log
fi

folder=$(mktemp -d)
port=$((32000 + RANDOM % 700))
sed "s#/loki\b#$folder#g" "$root/docker/loki/loki.yml" > "$folder/loki.yml"
"$loki" -config.file="$folder/loki.yml" -server.http-listen-address=127.0.0.1 -server.http-listen-port="$port" \
    -server.grpc-listen-address=127.0.0.1 -frontend.instance-addr=127.0.0.1 \
    -server.grpc-listen-port=$((port + 1000)) > "$folder/log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT

for _ in {1..120}; do
    if curl -sf "http://127.0.0.1:$port/ready" | grep -q ready; then
        python3 "$root/tests/loki.py" "http://127.0.0.1:$port" "$log"
        exit
    fi
    sleep 0.5
done
cat "$folder/log" >&2
exit 1
