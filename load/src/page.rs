//! A [`Summary`] as a page that needs nothing but itself, and its plots as one picture.

use crate::{
    plot::{Axis, Plot, Series, escape, picture},
    summary::{Latency, Return, Summary},
    timeline::Point,
};

const STYLE: &str = "
:root{color-scheme:light dark;--ink:#1a2230;--soft:#5c6675;--paper:#fff;--line:#e4e8ee;
--s0:#2563c9;--s1:#c2571a;--s2:#2f855a;--s3:#8b3fa8;--s4:#a2324a;--s5:#5c6675}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa5b5;--paper:#14181f;--line:#2b323d;
--s0:#6ea3f5;--s1:#ee9a5d;--s2:#6cc597;--s3:#cf8ee6;--s4:#ee8298;--s5:#9aa5b5}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:760px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}p,li{color:var(--soft)}code{overflow-wrap:anywhere}
table{border-collapse:collapse;margin:1.2rem 0;width:100%}
th,td{padding:.3rem .6rem .3rem 0;border-bottom:1px solid var(--line);text-align:right;
font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--soft)}th:first-child,td:first-child{text-align:left}
figure{margin:1.6rem 0}figcaption span{color:var(--soft)}.legend{float:right}
.legend i{display:inline-block;width:1.1em;height:3px;margin:0 .35em 0 .9em;vertical-align:middle}
svg{width:100%;height:auto;display:block;margin-top:.4rem}
text{fill:var(--soft);font:11px system-ui,sans-serif;text-anchor:middle}text.y{text-anchor:end}
.grid{stroke:var(--line)}.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
path.s0{stroke:var(--s0)}path.s1{stroke:var(--s1)}path.s2{stroke:var(--s2)}
path.s3{stroke:var(--s3)}path.s4{stroke:var(--s4)}path.s5{stroke:var(--s5)}
i.s0{background:var(--s0)}i.s1{background:var(--s1)}i.s2{background:var(--s2)}
i.s3{background:var(--s3)}i.s4{background:var(--s4)}i.s5{background:var(--s5)}
rect.paper{fill:var(--paper)}text.start{text-anchor:start;font-size:13px}.ink{fill:var(--ink);font-weight:600}
tspan.s0{fill:var(--s0)}tspan.s1{fill:var(--s1)}";

/// What happened over time, as a picture for a document.
pub(crate) fn svg(summary: &Summary) -> String {
    let heading = format!("{}: {}, {}", summary.command, summary.machine, summary.at);
    picture(STYLE, &heading, &timeline(summary))
}

pub(crate) fn page(summary: &Summary) -> String {
    let mode = summary.mode;
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>Switchboard: {mode}</title><style>{STYLE}</style>\
         <h1>Switchboard: {mode}</h1><p>{}<br>{}<br>{}<br><code>{}</code></p><table>",
        summary.at,
        escape(&summary.server),
        escape(&summary.machine),
        escape(&summary.command)
    );
    for figure in &summary.figures {
        html += &format!("<tr><td>{}<td>{}", escape(figure.title), escape(&figure.text()));
    }
    html += "</table>";
    html += &latencies(&summary.latencies);
    html += &returns(&summary.returns);
    html += &timeline(summary).iter().map(Plot::figure).collect::<String>();
    if !summary.notes.is_empty() {
        let notes: Vec<_> = summary.notes.iter().map(|note| bold(&escape(note))).collect();
        html += &format!("<ul><li>{}</ul>", notes.join("<li>"));
    }
    html + "</html>\n"
}

/// `**…**` as in the table's notes.
fn bold(note: &str) -> String {
    match note.splitn(3, "**").collect::<Vec<_>>()[..] {
        [before, strong, after] => format!("{before}<b>{strong}</b>{after}"),
        _ => note.to_owned(),
    }
}

fn latencies(latencies: &[Latency]) -> String {
    if latencies.is_empty() {
        return String::new();
    }
    let mut html =
        "<table><tr><th>latency, ms<th>count<th>p50<th>p90<th>p99<th>p99.9<th>max".to_owned();
    for Latency { of, count, p50_ms, p90_ms, p99_ms, p999_ms, max_ms, .. } in latencies {
        html += &format!(
            "<tr><td>{}<td>{count}<td>{p50_ms:.2}<td>{p90_ms:.2}<td>{p99_ms:.2}<td>{p999_ms:.2}\
             <td>{max_ms:.2}",
            escape(of)
        );
    }
    html += "</table>";
    // Each digit of nines has the same width: what matters is at the end.
    let nines = |share: f64| -(1.0 - share).log10();
    let series: Vec<_> = latencies
        .iter()
        .filter(|latency| latency.curve.len() > 1)
        .map(|latency| Series {
            name: latency.of.clone(),
            points: latency.curve.iter().map(|(share, ms)| (nines(*share), *ms)).collect(),
        })
        .collect();
    if series.is_empty() {
        return html;
    }
    let last = series.iter().filter_map(|series| series.points.last());
    let last = last.map(|point| point.0).fold(0.0, f64::max);
    let known = [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999]
        .map(|share| (nines(share).abs(), format!("{}%", (share * 1e8).round() / 1e6)));
    let ticks = known.into_iter().filter(|(at, _)| *at <= last + 0.001).collect();
    let (title, unit) = ("Latency".to_owned(), "ms, by share of answers");
    html + &Plot { title, unit, axis: Axis { title: "percentile", ticks }, series }.figure()
}

fn returns(returns: &[Return]) -> String {
    if returns.is_empty() {
        return String::new();
    }
    let mut html = "<table><tr><th>left behind<th>before<th>after<th>returned".to_owned();
    for each in returns {
        let [before, after] = each.texts();
        let (of, returned) = (escape(&each.of), each.verdict());
        html += &format!("<tr><td>{of}<td>{before}<td>{after}<td>{}", bold(returned));
    }
    html + "</table>"
}

/// A line of a plot: its name, and its value at a point.
type Line<'a> = (&'a str, &'a dyn Fn(&Point) -> Option<f64>);

fn timeline(summary: &Summary) -> Vec<Plot> {
    let plots: [(&str, &'static str, &[Line<'_>]); 5] = [
        ("Rate", "answers a second", &[("rate", &|point| Some(point.rate))]),
        (
            "Latency over time",
            "ms",
            &[("p50", &|point| Some(point.p50_ms)), ("p99", &|point| Some(point.p99_ms))],
        ),
        (
            "CPU",
            "cores",
            &[("server", &|point| point.server_cpu), ("this tool", &|point| Some(point.tool_cpu))],
        ),
        ("Memory of the server", "MiB resident", &[("memory", &|point| point.server_mib)]),
        ("Connections", "", &[("connections", &|point| Some(point.connections as f64))]),
    ];
    let points = &summary.timeline;
    let mut drawn: Vec<_> = plots
        .into_iter()
        .filter_map(|(title, unit, series)| over_time(title, unit, points, series))
        .collect();
    for (index, name) in summary.series.iter().enumerate() {
        let value = |point: &Point| point.series.get(index).copied();
        drawn.extend(over_time(name, "", points, &[(name, &value)]));
    }
    drawn
}

/// Nothing where there is nothing to see.
fn over_time(
    title: &str,
    unit: &'static str,
    points: &[Point],
    series: &[Line<'_>],
) -> Option<Plot> {
    let series: Vec<_> = series
        .iter()
        .map(|(name, value)| Series {
            name: (*name).to_owned(),
            points: points
                .iter()
                .filter_map(|point| Some((point.seconds, value(point)?)))
                .collect(),
        })
        .filter(|series| series.points.len() > 1)
        .collect();
    if series.iter().all(|series| series.points.iter().all(|point| point.1 == 0.0)) {
        return None;
    }
    Some(Plot { title: title.to_owned(), unit, axis: Axis::seconds(&series), series })
}
