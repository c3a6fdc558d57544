"""Writes the dashboards next door, one JSON file each; with `--check`, says which of them differ instead."""

import difflib
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from logs import APPLICATION_LOGS, AUDIT_LOGS
from surroundings import KEYCLOAK, TRAEFIK
from switchboard import DASHBOARD

FOLDER = Path(__file__).resolve().parent.parent / "dashboards"

wanted = {
    FOLDER / f"{made.uid}.json": JSONEncoder(sort_keys=True, indent=2).encode(made) + "\n"
    for made in (DASHBOARD, TRAEFIK, KEYCLOAK, APPLICATION_LOGS, AUDIT_LOGS)
}
there = {file: file.read_text() for file in FOLDER.glob("*.json")}

if "--check" in sys.argv:
    for file in sorted(wanted.keys() | there.keys()):
        old, new = there.get(file, ""), wanted.get(file, "")
        sys.stdout.writelines(difflib.unified_diff(
            old.splitlines(True), new.splitlines(True), f"{file.name} as it is", f"{file.name} as described"))
    if wanted != there:
        sys.exit("docker/grafana/dashboards differs from its description: run docker/grafana/generate")
else:
    FOLDER.mkdir(exist_ok=True)
    for file in there.keys() - wanted.keys():
        file.unlink()
    for file, text in wanted.items():
        file.write_text(text)
