"""The few kinds of panels that the dashboards are made of, and the frame that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as models
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

Panel = timeseries.Panel | stat.Panel | bargauge.Panel
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
GRID_WIDTH = 24  # columns, as Grafana has it
TAG = "tknp"
# Grafana's names of units.
SECONDS, BYTES, BYTES_PER_SECOND, SHARE, PER_SECOND, COUNT = "s", "bytes", "Bps", "percentunit", "cps", "short"


@dataclass(frozen=True)
class Query:
    expr: str
    legend: str = ""  # what a line is called, with labels as {{label}}


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


def _target(query: Query, ref: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(ref).datasource(SOURCE).range()


def _targets(queries: Sequence[Query]) -> list[prometheus.Dataquery]:
    return [_target(query, chr(ord("A") + i)) for i, query in enumerate(queries)]


def _steps(colors: Sequence[tuple[float | None, str]]) -> dashboard.ThresholdsConfig:
    steps = [Threshold(value, color) for value, color in colors]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def graph(
    title: str, description: str, unit: str, *queries: Query, width: int = 8, is_stacked: bool = False
) -> timeseries.Panel:
    """Lines over time, from 0; shares up to 1."""
    panel = timeseries.Panel().title(title).description(description).unit(unit).min(0).span(width).height(8)
    panel.datasource(SOURCE).line_width(1).fill_opacity(60 if is_stacked else 8).show_points(
        models.VisibilityMode.NEVER
    )
    panel.legend(
        common.VizLegendOptions()
        .display_mode(models.LegendDisplayMode.LIST)
        .placement(models.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    panel.tooltip(common.VizTooltipOptions().mode(models.TooltipDisplayMode.MULTI).sort(models.SortOrder.DESCENDING))
    if is_stacked:
        panel.stacking(common.StackingConfig().mode(models.StackingMode.NORMAL))
    for target in _targets(queries):
        panel.with_target(target)
    return panel


def number(
    title: str, description: str, unit: str, query: Query, *colors: tuple[float | None, str], width: int = 4
) -> stat.Panel:
    """The last value, in the color of the highest step that it reaches."""
    panel = stat.Panel().title(title).description(description).unit(unit).span(width).height(4).datasource(SOURCE)
    panel.thresholds(_steps(colors or [(None, "blue")])).graph_mode(models.BigValueGraphMode.AREA)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.with_target(_target(query, "A"))


def bars(
    title: str, description: str, unit: str, query: Query, *colors: tuple[float | None, str], width: int = 8
) -> bargauge.Panel:
    """A bar for each series' last value, between 0 and 1."""
    panel = bargauge.Panel().title(title).description(description).unit(unit).min(0).max(1).span(width).height(8)
    panel.datasource(SOURCE).thresholds(_steps(colors)).orientation(models.VizOrientation.HORIZONTAL)
    panel.display_mode(models.BarGaugeDisplayMode.BASIC)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.with_target(_target(query, "A"))


def all_of(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """A variable with the values of a label; all at first, which also means series without the label."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def engines(component: str) -> dashboard.QueryVariable:
    """The variable `engine`: the scraped addresses of one kind of engine."""
    metric = f'vllm:num_requests_running{{namespace=~"$namespace", {component}}}'
    return all_of("engine", "Engine", f"label_values({metric}, instance)")


def board(
    name: str, title: str, description: str, rows: Sequence[Row], *variables: dashboard.QueryVariable
) -> dashboard.Dashboard:
    """A dashboard with the uid tknp-`name`, with links to the others."""
    built = dashboard.Dashboard(f"tknp / {title}").uid(f"tknp-{name}").description(description).tags([TAG])
    built.annotations([])
    built.time("now-1h", "now").refresh("30s").timezone("browser").tooltip(DashboardCursorSync.CROSSHAIR).editable()
    built.link(
        dashboard.DashboardLink("tknp")
        .type(DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .as_dropdown(True)
        .include_vars(True)
        .keep_time(True)
    )
    built.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    built.with_variable(all_of("namespace", "Namespace", "label_values(tknp_engine_up, namespace)"))
    for variable in variables:
        built.with_variable(variable)
    ids = iter(range(1, 1000))
    for row in rows:
        built.with_row(dashboard.Row(row.title).id(next(ids)))
        for panel in row.panels:
            built.with_panel(panel.id(next(ids)))
    return built
