# `just` lists these; each is one command that can be typed by hand as well.

# Serve on 127.0.0.1:8000
run:
    cargo run --release

# Everything that has to pass before a change lands
ci:
    bash .ci/run

# The tests alone
test:
    cargo test --workspace --locked

# The models of what many threads share: the same code, in thousands of orders
models:
    cargo test --workspace --locked --lib --features switchboard/models models

# Bytes of strangers that a fuzzer makes up, so many seconds for each target
fuzz seconds="20" *targets:
    fuzz/run {{ seconds }} {{ targets }}

# The tests against a real Keycloak, which it fetches once (170 MB) and runs
keycloak:
    tests/keycloak.sh

# The compose files of docker/, loaded as Compose loads them
stack:
    tests/stack.sh

# The scenarios for Locust and k6, a few seconds each
load-tools:
    tests/load_tools.sh

# Instructions a message and KiB a connection, beside those that were committed (--update: commit them anew)
performance *options:
    tests/performance.sh {{ options }}

# The dashboards' JSON from their description (needs Python 3.11)
dashboards:
    docker/grafana/generate

# Advisories, licences, banned and doubled crates, sources (cargo install cargo-deny)
deny:
    tests/deny.sh

# The release in target/dist: program, bill of materials, checksums (cargo install cargo-deny cargo-cyclonedx)
release:
    .ci/release

# Load on a private server, or with --url on another: throughput, latency, fanout … (docs/load-testing.md)
load mode *options:
    cargo run --release -p switchboard-load -- {{ mode }} {{ options }}

# Runs the commands in docs/load-testing.md anew and keeps their output there (words: only commands that have one)
load-outputs *words:
    load/refresh.py docs/load-testing.md {{ words }}

# Beside axum, Node's ws and a bare WebSocket server (needs npm)
compare *options:
    load/compare/run.sh {{ options }}

# What a message and a connection cost, beside a bare WebSocket server
bench *options:
    cargo run --release -p switchboard-load -- bench {{ options }}

# Requests a second and their latency, on SQLite and on Postgres
bench-database *options:
    cargo run --release -p switchboard-load -- database {{ options }}

# What the audit trail costs
bench-audit *options:
    cargo run --release -p switchboard-load -- audit {{ options }}
