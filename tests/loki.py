"""Feeds log lines to a Loki as Alloy would, and asks it every query of dashboards and docs.

    loki.py URL LOG

LOG holds what a server wrote. A query of a dashboard or of docs/monitoring.md has to find something, each side of an
`or` by itself, and so has what a line links to; a query of a runbook only has to be right, as what it looks for may
not have happened.
"""

import json
import re
import sys
import time
from datetime import datetime
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parent.parent
BATCH = 500


def of_alloy(stage):
    """The names in a stage of docker/alloy: what tells streams apart, or what comes with each line."""
    text = (ROOT / "docker/alloy/config.alloy").read_text()
    values = re.search(rf"stage\.{stage} \{{\s*values = \{{(.*?)\}}", text, re.DOTALL)[1]
    return re.findall(r"(\w+)\s*=", values)


LABELS, METADATA = of_alloy("labels"), of_alloy("structured_metadata")


def push(url, lines):
    """Sends the lines; returns the time of the first and of the last, in nanoseconds."""
    times = []
    for start in range(0, len(lines), BATCH):
        streams = {}
        for text in lines[start:start + BATCH]:
            line = json.loads(text)
            when = datetime.fromisoformat(line["timestamp"])
            # Of one microsecond there may be several: they stay in their order.
            times.append(int(when.timestamp() * 1_000_000) * 1000 + len(times) % 1000)
            labels = {"service": "switchboard", **{name: line[name] for name in LABELS}}
            metadata = {name: str(line[name]) for name in METADATA if name in line}
            streams.setdefault(tuple(labels.items()), []).append([str(times[-1]), text, metadata])
        body = {"streams": [{"stream": dict(labels), "values": values} for labels, values in streams.items()]}
        urlopen(Request(f"{url}/loki/api/v1/push", json.dumps(body).encode(), {"Content-Type": "application/json"}), timeout=30)
    return min(times), max(times)


def ask(url, query, first, last):
    """How many series or lines a query finds; raises what Loki says of a query that is wrong."""
    values = re.fullmatch(r"label_values\((\w+)\)", query)
    span = {"start": first - 1, "end": last + 1}
    if values:
        path, parameters = f"label/{values[1]}/values", span
    elif re.match(r"\s*(sum|topk|rate|count_over_time|avg|max|quantile_over_time)\b", query):
        path, parameters = "query", {"query": query, "time": last + 1}
    else:
        path, parameters = "query_range", {"query": query, "limit": 1000, **span}
    with urlopen(f"{url}/loki/api/v1/{path}?{urlencode(parameters)}", timeout=30) as answer:
        data = json.load(answer)["data"]
    if isinstance(data, list):
        return len(data)
    return sum(len(found.get("values", [1])) for found in data["result"])


def of_dashboards():
    """Every query of every dashboard, with its variables as they are at first: place and text."""
    for file in sorted((ROOT / "docker/grafana/dashboards").glob("*.json")):
        board = json.loads(file.read_text())
        variables = board.get("templating", {}).get("list", [])
        chosen = {v["name"]: v.get("allValue") if v.get("includeAll") else v["query"] for v in variables}
        asked = [(v["name"], v["query"]) for v in variables if (v.get("datasource") or {}).get("uid") == "loki"]
        asked += [(panel["title"], target["expr"]) for panel in board["panels"]
                  for target in panel.get("targets", []) if target["datasource"]["uid"] == "loki"]
        for place, query in asked:
            query = query.replace("$__auto", "1h").replace("$__range", "1h")
            for name in sorted(chosen, key=len, reverse=True):
                query = query.replace(f"${name}", chosen[name])
            yield f"{board['title']}: {place}", query


def of_docs(*files):
    """Every query of a block of LogQL. What is indented belongs to the line before."""
    for file in files:
        for block in re.findall(r"```logql\n(.*?)```", file.read_text(), re.DOTALL):
            for query in re.findall(r"^[^#\s].*(?:\n[ )].*)*", block, re.MULTILINE):
                yield file.name, re.sub(r"\[\d+[mhd]\]", "[1h]", query)


def of_links(lines):
    """What the links of Grafana ask, each for the last line that has it."""
    file = ROOT / "docker/grafana/provisioning/datasources/datasources.yml"
    link = r"name: (.+)\n\s*matcherRegex: '(.+)'\n\s*datasourceUid: loki\n\s*url: '(.+)'\n"
    for name, pattern, query in re.findall(link, file.read_text()):
        found = next(filter(None, (re.search(pattern, line) for line in reversed(lines))))
        yield f"link: {name}", query.replace("$${__value.raw}", found[1])


def sides(place, query):
    """A query; and for each side of an `or` among its filters, the query with that side alone."""
    yield place, query
    for part in re.findall(r"\| ([^|]*? or [^|\[]*)", query):
        for side in part.strip().split(" or "):
            yield f"{place}, one side", query.replace(part.strip(), side)


def main(url, log):
    lines = [line for line in Path(log).read_text().splitlines() if line.startswith("{")]
    first, last = push(url, lines)
    print(f"{len(lines)} lines of {(last - first) / 1e9:.0f} s")
    time.sleep(1)
    asked = [*of_dashboards(), *of_docs(ROOT / "docs/monitoring.md")]
    strict = [*(side for query in asked for side in sides(*query)), *of_links(lines)]
    lax = list(of_docs(*sorted((ROOT / "docs/runbooks").glob("*.md"))))
    failed = 0
    for place, query in strict + lax:
        try:
            found = ask(url, query, first, last)
            verdict = "found" if found else "nothing" if (place, query) in lax else "NOTHING"
        except HTTPError as error:
            found, verdict = 0, f"WRONG {error.read().decode().strip()}"
        failed += verdict[0].isupper()
        print(f"{verdict:>7} {found:>5}  {place}  {' '.join(query.split())}", flush=True)
    print(f"{len(strict) + len(lax)} queries, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
