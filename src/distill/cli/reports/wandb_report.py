"""A comparison as a report and a workspace on the site of W&B."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill.analysis.comparison import Comparison
from distill.cli.reports.comparison_report import Cells, describe, difference_table, differences, value_table
from distill.run_folder import RunFolder
from distill.types import DistillError
from distill.units import MISSING

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace

INSTALL = "pip install 'distill[wandb-report]', or: uv pip install 'distill[wandb-report]'"
MOST_AXES = 8
"""Most settings among the axes of the plot with parallel coordinates."""


class Site(NamedTuple):
    """A project on the site of W&B."""

    entity: str
    project: str


class Pages(NamedTuple):
    """What the site shows of a comparison. `save` uploads both."""

    report: Report
    workspace: Workspace

    def save(self) -> list[str]:
        """Upload report and workspace, and return their addresses.

        Raises:
            DistillError: nobody is logged in, or W&B refuses the upload.
        """
        addresses = []
        for page in self:
            try:
                page.save()
            except Exception as error:  # wandb-workspaces raises plain exceptions
                raise DistillError(f"W&B: {error}. Log in with `wandb login`, then repeat the command") from error
            addresses.append(page.url)
        return addresses


def parse_site(word: str) -> Site:
    """Read ``ENTITY/PROJECT``.

    Raises:
        DistillError: the word has another form.
    """
    parts = word.split("/")
    if len(parts) != 2 or not all(parts):
        raise DistillError(f"--wandb {word}: expected ENTITY/PROJECT, such as my-team/distill")
    return Site(*parts)


def build_pages(comparison: Comparison, site: Site, title: str) -> Pages:
    """Build report and workspace. Nothing is sent.

    Plots show the comparison's own runs. Each configuration has one line: the mean over its seeds, with a band of one
    standard deviation.

    Args:
        comparison: the comparison. Its runs were trained with ``logger=wandb``.
        site: where the runs are.
        title: title of both pages.

    Raises:
        DistillError: the package wandb-workspaces is missing, or no run was logged to W&B.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ModuleNotFoundError as error:
        raise DistillError(f"--wandb needs the package wandb-workspaces: {INSTALL}") from error
    ids = run_ids(comparison)
    filters = f"ID in [{', '.join(repr(name) for name in ids)}]"
    shown = reports.Runset(
        entity=site.entity, project=site.project, name="compared runs", filters=filters, groupby=["group"]
    )
    report = reports.Report(
        entity=site.entity,
        project=site.project,
        title=title[:128],
        description=f"{len(comparison.runs)} runs on the {comparison.split} split. Tables are in percent.",
        blocks=[
            reports.H1("Verdict"),
            reports.UnorderedList(list(sentences(comparison))),
            reports.H1("Results"),
            *(
                reports.MarkdownBlock(f"{cells.title}\n\n{to_markdown(cells)}")
                for cells in (value_table(comparison), difference_table(comparison))
                if cells.rows
            ),
            reports.H1("Plots"),
            reports.PanelGrid(runsets=[shown], panels=[panel for _, part in _sections(comparison) for panel in part]),
        ],
    )
    workspace = workspaces.Workspace(
        entity=site.entity,
        project=site.project,
        name=title,
        sections=[workspaces.Section(name=name, panels=panels, is_open=True) for name, panels in _sections(comparison)],
        runset_settings=workspaces.RunsetSettings(filters=filters, groupby=[workspaces.Metric("Group")]),
    )
    return Pages(report, workspace)


def run_ids(comparison: Comparison) -> list[str]:
    """The ids on the site of those runs that have one.

    Raises:
        DistillError: no run has one.
    """
    folders = [RunFolder(Path(run["folder"])) for run in comparison.runs]
    ids = [folder.wandb_id.read_text(encoding="utf-8").strip() for folder in folders if folder.wandb_id.is_file()]
    if not ids:
        raise DistillError(f"None of the {len(folders)} runs was logged to W&B. Train with logger=wandb")
    return ids


def sentences(comparison: Comparison) -> list[str]:
    """The verdict on each configuration, and the notes."""
    verdicts = [
        f"{found.verdict}: {row.configuration}: {describe(found, comparison)}" for row, found in differences(comparison)
    ]
    return [*verdicts, *comparison.notes] or ["There is nothing to compare with."]


def to_markdown(cells: Cells) -> str:
    """A table in Markdown."""

    def line(texts: Sequence[str | None]) -> str:
        return f"| {' | '.join((text or MISSING).replace('|', '/') for text in texts)} |"

    return "\n".join([line(cells.columns), line(["---"] * len(cells.columns)), *map(line, cells.rows)])


def _sections(comparison: Comparison) -> list[tuple[str, list[Any]]]:
    """The panels of report and workspace by section. A panel belongs to one page, so each call builds new ones."""
    import wandb_workspaces.reports.v2 as reports

    over_seeds: dict[str, Any] = {
        "groupby": "group",
        "groupby_aggfunc": "mean",
        "groupby_rangefunc": "stddev",
        "aggregate": True,
    }
    name = comparison.metric.partition("/")[2]
    settings = [key for key in comparison.settings if not key.startswith("teacher.")][:MOST_AXES]
    axes = [reports.ParallelCoordinatesPlotColumn(metric=reports.Config(key), display_name=key) for key in settings]
    target = reports.ParallelCoordinatesPlotColumn(metric=reports.SummaryMetric(comparison.metric))
    return [
        (
            "Results",
            [
                reports.LinePlot(title=f"val/{name}", x="epoch", y=[f"val/{name}"], **over_seeds),
                reports.BarPlot(title=comparison.metric, metrics=[comparison.metric], groupby="group", aggregate=True),
                reports.ParallelCoordinatesPlot(title="settings that differ", columns=[*axes, target]),
            ],
        ),
        (
            "Training",
            [
                reports.LinePlot(title="detection loss", x="epoch", y=["epoch/loss/detection"], **over_seeds),
                reports.LinePlot(title="distillation loss", x="epoch", y=["epoch/loss/distillation"], **over_seeds),
                reports.LinePlot(title="share of the neck's gradient", metric_regex="gradient/.*", **over_seeds),
            ],
        ),
        (
            "Predictions",
            [reports.WeavePanelSummaryTable(table_name="predictions"), reports.RunComparer(diff_only=True)],
        ),
    ]
