#!/usr/bin/env bash
# Loads the compose files of docker/ with the loader of Compose itself: syntax, the specification's schema, how
# the files lie over each other. No engine is needed.
#
# It is `docker compose config` where that is installed, else Compose's own library (compose-go), which Go builds
# once. What cargo can test of the stack is in tests/it/stack.rs and tests/it/traefik.rs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=v2.16.2
cache=${XDG_CACHE_HOME:-$HOME/.cache}/switchboard
loader=$cache/compose-go-$version

fail() {
    echo "tests/stack.sh: $*" >&2
    exit 1
}

build() {
    if ! command -v go >/dev/null && ((EUID == 0)) && command -v apt-get >/dev/null; then
        apt-get update -qq >&2
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends golang-go >&2
    fi
    command -v go >/dev/null || fail "neither the compose plugin of Docker nor Go, to build its loader, is here"
    local folder
    mkdir -p "$cache"
    folder=$(mktemp -d "$cache/compose.XXXXXX")
    GOBIN=$folder go install "github.com/compose-spec/compose-go/v2/cmd@$version" ||
        fail "compose-go cannot be built"
    mv "$folder/cmd" "$loader"
    rmdir "$folder"
}

# Prints the model that the files give together.
load() {
    if docker compose version >/dev/null 2>&1; then
        local file files=()
        for file; do files+=(--file "$file"); done
        docker compose "${files[@]}" config
    else
        "$loader" "$@"
    fi
}

docker compose version >/dev/null 2>&1 || [[ -x $loader ]] || build

here=$(mktemp -d "${TMPDIR:-/tmp}/switchboard-stack.XXXXXX")
trap 'rm -rf "$here"' EXIT
cp -r docker "$here/docker"
cd "$here/docker"

load compose.yml >"$here/development" || fail "docker/compose.yml is not what Compose takes"

# What production asks for is there in .env.example. The library's command looks at no variables, so they are
# put in place first.
for name in DOMAIN SECRETS ALLOWED_WS_ORIGINS; do
    value=$(sed -n "s/^$name=//p" .env.example)
    [[ -n $value ]] || fail "docker/.env.example has no $name"
    sed -E -i "s#\\\$\{$name(:\?[^}]*)?\}#$value#g" compose.yml compose.prod.yml
done
load compose.yml compose.prod.yml >"$here/production" || fail "docker/compose.prod.yml is not what Compose takes"

# Open to the world in production, and in development to this machine alone.
open=$(sed -n 's/^ *published: "\{0,1\}\([0-9]*\)"\{0,1\}$/\1/p' "$here/production" | sort -n | tr '\n' ' ')
[[ $open == "80 443 " ]] || fail "production opens the ports $open"
ports=$(grep -c ' published:' "$here/development") || fail "development opens no port"
[[ $(grep -c ' host_ip: 127.0.0.1' "$here/development") == "$ports" ]] ||
    fail "development opens ports to other machines"
grep -q 'ENV[:=] \{0,1\}production' "$here/production" || fail "production does not say ENV=production"
! grep -q 'localhost' "$here/production" || fail "production names localhost: $(grep -m 1 localhost "$here/production")"
