#!/usr/bin/env python3
"""Runs the commands of a document's `console` blocks and puts their output below them.

    load/refresh.py docs/load-testing.md [WORD ...]     all of them, or those whose command has a WORD

`switchboard-load` is the release build; standard error is not kept, nor the repeated command.
"""
import os, pathlib, re, subprocess, sys

root = pathlib.Path(__file__).resolve().parent.parent
target = os.environ.get("CARGO_TARGET_DIR", root / "target")
subprocess.run(["cargo", "build", "--release", "--locked", "--workspace"], cwd=root, check=True)
path = f"{target}/release{os.pathsep}{os.environ['PATH']}"
document, words = pathlib.Path(sys.argv[1]), sys.argv[2:]

for block in re.finditer(r"```console\n\$ (.*)\n(?:(?!```).*\n)*```", document.read_text()):
    command = block[1]
    if words and not any(word in command for word in words):
        continue
    print(f"$ {command}", flush=True)
    environment = os.environ | {"PATH": path}
    output = subprocess.run(
        command, shell=True, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    # The tool's last line is the command, which stands above already.
    output = re.sub(r"- `switchboard-load .*`\n\Z", "", output)
    fresh = f"```console\n$ {command}\n{output}```"
    # At once: a later command may fail.
    document.write_text(document.read_text().replace(block[0], fresh, 1))
