"""The few kinds of panels, variables and links that all dashboards are made of.

Every dashboard of this folder is a list of these; `__main__.py` writes them out. In expressions, `OURS` stands
for the chosen instances of Switchboard, `CLIENTS` for that without probes and scrapes, which would make a node
without clients look fast and healthy, and `RATE` for the window of a rate, which Grafana fits to the scrape
interval and the zoom.
"""

from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.builders import logs as logs_panel
from grafana_foundation_sdk.builders import loki, prometheus, stat as stat_panel, table as table_panel, timeseries
from grafana_foundation_sdk.builders.common import (
    GraphThresholdsStyleConfig, ReduceDataOptions, StackingConfig, VizLegendOptions, VizTooltipOptions,
)
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync, DashboardLinkType, DataSourceRef, Threshold, ThresholdsMode, ValueMap,
    ValueMappingResult, VariableOption, VariableRefresh, VariableSort,
)

PROMETHEUS = DataSourceRef(type_val="prometheus", uid="prometheus")
LOKI = DataSourceRef(type_val="loki", uid="loki")
POSTGRES = DataSourceRef(type_val="grafana-postgresql-datasource", uid="postgres")

TAG = "switchboard"
# A link to another panel of the same dashboard, by its title.
DETAIL = "panel:"
OURS = 'job="switchboard", instance=~"$instance"'
# In this order: one holds another.
WORDS = {
    "CLIENTS": f'{OURS}, endpoint!~"/health.*|/metrics"',
    "OURS": OURS,
    "RATE": "$__rate_interval",
}
ALL = VariableOption(text="All", value="$__all")


# --- dashboards ---

def dashboard(uid, title, description, variables, rows, refresh="10s", since="now-1h"):
    """A dashboard of rows, each a title and its panels, with a link to all the others in its head."""
    made = (
        grafana.Dashboard(title).uid(uid).description(description).tags([TAG]).editable()
        .refresh(refresh).time(since, "now").timezone(common.TimeZoneBrowser)
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(grafana.DashboardLink("Dashboards").type(DashboardLinkType.DASHBOARDS).tags([TAG])
              .as_dropdown(True).keep_time(True))
    )
    for variable in variables:
        made.with_variable(variable)
    numbers = {}
    for place, (name, panels) in enumerate(rows):
        made.with_row(grafana.Row(name).id(1000 + place))
        for panel in panels:
            number = len(numbers) + 1
            # Of two of one title, the one further down: the graph behind a number.
            numbers[panel.build().title] = number
            made.with_panel(panel.id(number))
    made = made.build()
    for panel in made.panels:
        settings = getattr(panel, "field_config", None)
        for to in settings.defaults.links or [] if settings else []:
            if to.url.startswith(DETAIL):
                to.url = f"/d/{uid}?viewPanel={numbers[to.url[len(DETAIL):]]}&${{__url_time_range}}"
    return made


# --- variables ---

def choice(name, query, label=None, source=PROMETHEUS):
    """Values that a data source has; several can be chosen, and all of them are at first."""
    return (
        grafana.QueryVariable(name).label(label or name).query(query).datasource(source).multi(True)
        .include_all(True).all_value(".*").current(ALL).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )


def options(name, values, label=None):
    """A fixed list; several can be chosen, and all of them are at first."""
    return (
        grafana.CustomVariable(name).label(label or name).values(",".join(values)).multi(True)
        .include_all(True).all_value(".*").current(ALL)
    )


def text(name, label, value=""):
    """Free text."""
    return (
        grafana.TextBoxVariable(name).label(label).default_value(value)
        .current(VariableOption(text=value, value=value))
    )


# --- links ---

def link(title, url):
    """A link of each series for the time that is shown; `url` has a query, with labels as `label` gives them."""
    return grafana.DashboardLink(title).type(DashboardLinkType.LINK).url(f"{url}&${{__url_time_range}}")


def label(name):
    """The label of the series that was clicked, in a URL."""
    return f"${{__field.labels.{name}:percentencode}}"


# --- panels ---

def graph(title, unit, *queries, about=None, links=(), width=8, limit=None, stacked=False):
    """Lines over time. A query is an expression and the legend of its series; `limit` draws a red line."""
    panel = timeseries.Panel().fill_opacity(10).show_points(common.VisibilityMode.NEVER)
    panel.legend(VizLegendOptions().show_legend(True).placement(common.LegendPlacement.BOTTOM)
                 .display_mode(common.LegendDisplayMode.LIST))
    panel.tooltip(VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
    panel.min(0)
    if stacked:
        panel.draw_style(common.GraphDrawStyle.BARS).fill_opacity(80)
        panel.stacking(StackingConfig().mode(common.StackingMode.NORMAL))
    if limit is not None:
        panel.thresholds(steps((None, "transparent"), (limit, "red")))
        panel.thresholds_style(GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.LINE))
    return _asked(panel, title, unit, queries, about, links, width, 8)


def stat(title, unit, expr, colours=((None, "green"),), about=None, links=(), width=4, legend="__auto",
         words=None, detail=None):
    """One number and its recent course. `colours` are thresholds, from below; `words` name single values;
    `detail` is the title of the panel that it leads to."""
    if detail:
        links = [grafana.DashboardLink("Detail").type(DashboardLinkType.LINK).url(DETAIL + detail), *links]
    panel = stat_panel.Panel().graph_mode(common.BigValueGraphMode.AREA).thresholds(steps(*colours))
    panel.color_mode(common.BigValueColorMode.VALUE).reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    if legend != "__auto":
        panel.text_mode(common.BigValueTextMode.NAME)
    if words:
        panel.mappings([_words(words)])
    return _asked(panel, title, unit, [(expr, legend)], about, links, width, 4)


def lines(title, expr, about=None, width=24, height=12):
    """Log lines, newest first."""
    panel = logs_panel.Panel().show_time(True).wrap_log_message(True).enable_log_details(True)
    panel.sort_order(common.LogsSortOrder.DESCENDING)
    query = loki.Dataquery().expr(expr).datasource(LOKI).ref_id("A").max_lines(500).query_type("range")
    return _placed(panel, title, about, width, height, LOKI).with_target(query)


def log_graph(title, *queries, about=None, unit="short", width=8, stacked=True):
    """What is counted from log lines, over time."""
    panel = graph(title, unit, about=about, width=width, stacked=stacked).datasource(LOKI)
    for letter, (expr, legend) in zip("ABCDEF", queries):
        panel.with_target(loki.Dataquery().expr(expr).legend_format(legend).datasource(LOKI)
                          .ref_id(letter).query_type("range"))
    return panel


def log_table(title, expr, about=None, width=12):
    """What is counted from log lines over the whole time range, the most first."""
    query = loki.Dataquery().expr(expr).datasource(LOKI).ref_id("A").query_type("instant")
    return _placed(table_panel.Panel(), title, about, width, 8, LOKI).with_target(query)


def sql_stat(title, sql, width=6):
    """One number of the audit trail."""
    panel = _placed(stat_panel.Panel(), title, None, width, 4, POSTGRES).with_target(Sql(sql, "table"))
    return panel.reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))


def sql_table(title, sql, about=None, links=(), width=24, height=12):
    """Rows of the audit trail."""
    panel = _placed(table_panel.Panel(), title, about, width, height, POSTGRES).with_target(Sql(sql, "table"))
    return panel.data_links(list(links)) if links else panel


def sql_graph(title, sql, about=None, width=12):
    """Counts in the audit trail over time: columns time, metric, value."""
    panel = graph(title, "short", about=about, width=width, stacked=True).datasource(POSTGRES)
    return panel.with_target(Sql(sql, "time_series"))


class Sql(Dataquery):
    """A query of a Postgres data source, which the SDK has no builder for."""

    def __init__(self, sql, form):
        self.sql, self.form = sql, form

    def build(self):
        return self

    def to_json(self):
        return {"refId": "A", "datasource": POSTGRES, "editorMode": "code", "format": self.form,
                "rawQuery": True, "rawSql": self.sql}


# --- parts ---

def steps(*colours):
    """Thresholds as pairs of value and colour, the first from minus infinity."""
    return grafana.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(
        [Threshold(value=value, color=colour) for value, colour in colours])


def _words(words):
    return ValueMap(options={str(value): ValueMappingResult(text=word, index=index)
                             for index, (value, word) in enumerate(words.items())})


def _placed(panel, title, about, width, height, source):
    panel.title(title).datasource(source).span(width).height(height)
    return panel.description(about) if about else panel


def _asked(panel, title, unit, queries, about, links, width, height):
    _placed(panel, title, about, width, height, PROMETHEUS).unit(unit)
    if links:
        panel.data_links(list(links))
    for letter, (expr, legend) in zip("ABCDEFGH", queries):
        for word, meaning in WORDS.items():
            expr = expr.replace(word, meaning)
        panel.with_target(prometheus.Dataquery().expr(expr).legend_format(legend).datasource(PROMETHEUS)
                          .ref_id(letter).range())
    return panel
