#!/usr/bin/env bash
# Runs the tests that need a real Keycloak, against one of their own.
#
#   tests/keycloak.sh         fetches Keycloak once, starts it with docker/keycloak's realm, tests, stops it
#   tests/keycloak.sh stop    \ for the tests themselves: the Keycloak in $KEYCLOAK_TEST_HOME goes down and
#   tests/keycloak.sh start   / comes back on the same port, with its keys, users and sessions
#
# Exit codes: 0 passed, 1 failed, 77 not run because Keycloak or Java cannot be had here (one line says why).
# MAVEN_REPOSITORY names another Maven repository than Maven Central; curl's own variables apply.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Both change together. The repository serves the sum next to the archive, as .sha256.
version=26.7.3
sha256=77657f30b7e90d70f727712ce1c967f430fd6a5e9f458d32d8c6df0635345f47
archive=keycloak-quarkus-dist-$version.tar.gz
url=${MAVEN_REPOSITORY:-https://repo1.maven.org/maven2}/org/keycloak/keycloak-quarkus-dist/$version/$archive
cached=${XDG_CACHE_HOME:-$HOME/.cache}/switchboard/$archive

# Seconds. The first start takes about 35 on two cores, as Keycloak builds itself; later ones about 8.
start_patience=180
stop_patience=30

fail() {
    echo "tests/keycloak.sh: $*" >&2
    exit 1
}

not_here() {
    echo "Keycloak tests not run here: $*" >&2
    exit 77
}

sum_of() {
    # macOS has no sha256sum.
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

# --- what has to be there ---

fetch() {
    # A file that was cut short by a full disk would fail in strange ways: it is checked on every run.
    if [[ -f $cached && $(sum_of "$cached") == "$sha256" ]]; then return; fi
    command -v curl >/dev/null || not_here "curl, to fetch Keycloak, is missing"
    echo "fetching Keycloak $version (170 MB) into $(dirname "$cached")" >&2
    mkdir -p "$(dirname "$cached")"
    # Fetched beside its place and moved there when it is right: two runs at once do not disturb each other.
    local part
    part=$(mktemp "$cached.XXXXXX")
    if ! curl -fsSL --retry 3 --connect-timeout 15 --max-time 1200 -o "$part" "$url"; then
        rm -f "$part"
        not_here "Keycloak cannot be fetched from $url"
    fi
    local sum
    sum=$(sum_of "$part")
    if [[ $sum != "$sha256" ]]; then
        rm -f "$part"
        fail "$url has the SHA-256 $sum, not $sha256"
    fi
    mv "$part" "$cached"
}

# Prints the path of a Java that Keycloak 26 runs on, if there is one.
java_17() {
    local java number
    for java in "${JAVA_HOME:+$JAVA_HOME/bin/java}" "$(command -v java || true)" /usr/lib/jvm/*/bin/java; do
        [[ -x $java ]] || continue
        # `openjdk version "17.0.15" 2025-04-15`; Java 8 says "1.8.0".
        number=$("$java" -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p' | head -n 1)
        if ((${number:-0} >= 17)); then
            echo "$java"
            return
        fi
    done
    return 0
}

find_java() {
    # kc.sh takes $JAVA before $JAVA_HOME and the path; `start` and `stop` inherit it.
    JAVA=$(java_17)
    if [[ -z $JAVA ]] && ((EUID == 0)) && command -v apt-get >/dev/null; then
        echo "installing a Java runtime" >&2
        if ! { apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends default-jre-headless; } >&2; then
            not_here "Java 17 or later is missing, and apt-get cannot install it"
        fi
        JAVA=$(java_17)
    fi
    [[ -n $JAVA ]] || not_here "Java 17 or later is missing; install it, or set JAVA_HOME"
    export JAVA
}

# --- one Keycloak, in $KEYCLOAK_TEST_HOME ---

free_port() {
    local port
    # Below the ports that the kernel gives to clients, so that none of them takes it while Keycloak is down.
    for _ in {1..50}; do
        port=$((20000 + RANDOM % 10000))
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
    fail "no free port was found"
}

# Unpacked for each run: Keycloak builds itself inside its own folder, and its database lies there too.
prepare() {
    mkdir "$KEYCLOAK_TEST_HOME/keycloak"
    tar -xzf "$cached" -C "$KEYCLOAK_TEST_HOME/keycloak" --strip-components 1
    mkdir -p "$KEYCLOAK_TEST_HOME/keycloak/data/import"
    cp "$root/docker/keycloak/switchboard-realm.json" "$KEYCLOAK_TEST_HOME/keycloak/data/import/"
    free_port >"$KEYCLOAK_TEST_HOME/port"
    free_port >"$KEYCLOAK_TEST_HOME/management-port"
}

alive() {
    [[ -s $KEYCLOAK_TEST_HOME/pid ]] || return 1
    local pid
    pid=$(<"$KEYCLOAK_TEST_HOME/pid")
    # In a container whose first process reaps nobody, what has ended stays as a zombie.
    kill -0 -- "-$pid" 2>/dev/null && [[ $(ps -o stat= -p "$pid" 2>/dev/null) != Z* ]]
}

start() {
    if alive; then fail "Keycloak runs already"; fi
    local port log=$KEYCLOAK_TEST_HOME/keycloak.log begun=$SECONDS
    port=$(<"$KEYCLOAK_TEST_HOME/port")
    # A developer's own settings must not change what is tested.
    unset "${!KC_@}" "${!SWITCHBOARD_@}"
    export KC_HTTP_HOST=127.0.0.1 KC_HTTP_PORT=$port
    KC_HTTP_MANAGEMENT_PORT=$(<"$KEYCLOAK_TEST_HOME/management-port")
    export KC_HTTP_MANAGEMENT_PORT KC_METRICS_ENABLED=true
    export KC_BOOTSTRAP_ADMIN_USERNAME=$KEYCLOAK_TEST_ADMIN KC_BOOTSTRAP_ADMIN_PASSWORD=$KEYCLOAK_TEST_ADMIN_PASSWORD
    # With this heap the process stays at about 600 MB.
    export JAVA_OPTS_KC_HEAP="-Xms64m -Xmx512m"
    # Job control gives it a process group of its own: kc.sh and the Java below it are stopped together,
    # and Ctrl-C reaches this script first.
    set -m
    "$KEYCLOAK_TEST_HOME/keycloak/bin/kc.sh" start-dev --import-realm </dev/null >>"$log" 2>&1 &
    echo "$!" >"$KEYCLOAK_TEST_HOME/pid"
    set +m
    # The realm's discovery answers last: the port is open long before the import is done.
    until curl -fs --noproxy '*' --max-time 5 -o /dev/null "http://127.0.0.1:$port/realms/switchboard/.well-known/openid-configuration"; do
        if ! alive || ((SECONDS - begun > start_patience)); then
            tail -n 40 "$log" >&2
            fail "Keycloak did not start within $((SECONDS - begun)) s; the end of its log is above"
        fi
        sleep 0.2
    done
}

stop() {
    alive || return 0
    local group begun=$SECONDS
    group=$(<"$KEYCLOAK_TEST_HOME/pid")
    kill -TERM -- "-$group" 2>/dev/null || true
    while alive && ((SECONDS - begun < stop_patience)); do sleep 0.1; done
    # Whatever it still does must not hold the port or the database when it is started again.
    kill -KILL -- "-$group" 2>/dev/null || true
    rm -f "$KEYCLOAK_TEST_HOME/pid"
}

# --- the tests ---

tests=
clean_up() {
    local status=$?
    trap - EXIT INT TERM
    # The tests first: one of them may be about to start Keycloak again.
    if [[ -n $tests ]]; then kill -TERM -- "-$tests" 2>/dev/null || true; fi
    stop || true
    rm -rf "$KEYCLOAK_TEST_HOME"
    exit "$status"
}

run() {
    command -v cargo >/dev/null || fail "cargo is missing"
    find_java
    fetch
    cd "$root"
    # The same features as `cargo test --workspace` has, so that nothing is built twice.
    local cargo=(cargo test --workspace --locked --test it --test modes)
    # Before Keycloak starts, which needs the processor for itself.
    "${cargo[@]}" --no-run
    # A filter that fits no test passes: a module that was renamed would go untested.
    local names
    names=$("${cargo[@]}" --quiet keycloak:: -- --ignored --list)
    grep -q '^keycloak::.*: test$' <<<"$names" || fail "no test is named keycloak::"

    KEYCLOAK_TEST_HOME=$(mktemp -d "${TMPDIR:-/tmp}/switchboard-keycloak.XXXXXX")
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    KEYCLOAK_TEST_ADMIN="admin"
    KEYCLOAK_TEST_ADMIN_PASSWORD=$(od -An -N 16 -tx1 /dev/urandom | tr -d ' \n')
    prepare
    KEYCLOAK_TEST_URL=http://127.0.0.1:$(<"$KEYCLOAK_TEST_HOME/port")
    KEYCLOAK_TEST_MANAGEMENT_URL=http://127.0.0.1:$(<"$KEYCLOAK_TEST_HOME/management-port")
    export KEYCLOAK_TEST_HOME KEYCLOAK_TEST_URL KEYCLOAK_TEST_MANAGEMENT_URL
    export KEYCLOAK_TEST_ADMIN KEYCLOAK_TEST_ADMIN_PASSWORD
    # In a subshell: what it unsets for Keycloak stays set for the tests.
    local begun=$SECONDS
    (start)
    echo "Keycloak $version is up at $KEYCLOAK_TEST_URL after $((SECONDS - begun)) s" >&2

    # In the background, as a trap waits for what runs in the foreground; one at a time, as one of them
    # stops Keycloak.
    set -m
    "${cargo[@]}" keycloak:: -- --ignored --test-threads=1 </dev/null &
    tests=$!
    set +m
    local status=0
    wait "$tests" || status=$?
    tests=
    if ((status != 0)); then
        echo "the end of Keycloak's log:" >&2
        tail -n 40 "$KEYCLOAK_TEST_HOME/keycloak.log" >&2
        exit 1
    fi
}

case ${1:-run} in
run) run ;;
start | stop)
    : "${KEYCLOAK_TEST_HOME:?is set by tests/keycloak.sh for the tests it runs}"
    "$1"
    ;;
*) fail "unknown command $1; see the head of this file" ;;
esac
