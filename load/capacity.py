#!/usr/bin/env python3
"""Measures the figures of the model of docs/capacity.md, and what it predicts beside what is measured.

`load/refresh.py docs/capacity.md` calls it and keeps the output. Takes about three minutes on one core.
"""
import json, os, pathlib, subprocess, sys

root = pathlib.Path(__file__).resolve().parent.parent
release = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", root / "target")) / "release"
os.environ["PATH"] += f"{os.pathsep}{release}"
PING_SECONDS = 25  # WS_PING_INTERVAL
SECONDS = 8
# Connections, messages a second, pushes to everybody a second.
POINTS = [(2_000, 20_000, 0), (8_000, 10_000, 1), (15_000, 5_000, 0)]

notes = []


def measure(*arguments):
    command = ["switchboard-load", *map(str, arguments), "--json", "-"]
    print(*command, file=sys.stderr)
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    notes.extend(f"- {' '.join(map(str, arguments))}: {note}" for note in result["notes"] if "**" in note)
    return result


def figures(*arguments):
    return measure(*arguments)["figures"]


# The first ping comes when a connection has been silent for this long: each is pinged once meanwhile.
idle = figures("idle", "--connections", 8_000, "--seconds", PING_SECONDS)
base, kib = idle["before_mib"], idle["kib_per_connection"]
ping = idle["server_cpu"] * PING_SECONDS * 1e6 / 8_000
# The busier a server is, the less often it has to be woken for a message.
alone = {
    rate: figures("latency", "--rate", rate, "--seconds", SECONDS)["server_micros_per_message"]
    for rate in sorted(rate for _, rate, _ in POINTS)
}
batch = figures("throughput", "--seconds", 4)["server_micros_per_message"]
connect = figures("connect")["server_micros_per_connect"]
unseen = figures("connect", "--set", "TOKEN_CACHE_SIZE=0")["server_micros_per_connect"]
delivery = figures("fanout", "--connections", 8_000, "--rounds", 1)["server_micros_per_delivery"]

rates = " | ".join(f"MESSAGE, {rate}/s" for rate in alone)
print(f"| BASE | KIB | {rates} | of 16 at once | DELIVERY | CONNECT | with a new token | PING |")
print(f"|---|---|{'---|' * len(alone)}---|---|---|---|---|")
cells = [*alone.values(), batch, delivery, connect, unseen, ping]
print(f"| {base:.1f} MiB | {kib:.2f} KiB | {' | '.join(f'{cell:.2f} µs' for cell in cells)} |\n")
print("| connections | messages/s | deliveries/s | CPU, predicted | measured | memory, predicted | measured | p99 |")
print("|---|---|---|---|---|---|---|---|")
for connections, rate, pushes in POINTS:
    # An author that is created is pushed to everybody.
    mix = f"100={rate - pushes},3={pushes}" if pushes else "100=1"
    result = measure(
        *("latency", "--connections", connections, "--rate", rate, "--seconds", SECONDS),
        *("--mix", mix, "--set", f"WS_BROADCAST_CHANGES={'true' if pushes else 'false'}"),
    )
    # Nobody is silent for long enough to be pinged.
    cpu = (rate * alone[rate] + pushes * connections * delivery) / 1e6
    memory = base + connections * kib / 1024
    measured = result["timeline"][-1]["server_mib"]
    print(
        f"| {connections} | {rate} | {pushes * connections} | {cpu:.2f} of a core "
        f"| {result['figures']['server_cpu']:.2f} | {memory:.0f} MiB | {measured:.0f} MiB "
        f"| {result['latencies'][0]['p99_ms']:.1f} ms |"
    )
print("", *notes, sep="\n")
print(f"- {result['machine']}\n- {result['at']}")
