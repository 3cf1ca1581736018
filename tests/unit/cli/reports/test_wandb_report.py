"""The report on W&B's site, up to its upload."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from distill.analysis.comparison import Comparison, compare
from distill.analysis.configurations import FinishedRun
from distill.cli.reports.wandb_report import Site, build_pages, parse_site
from distill.types import DistillError

reports = pytest.importorskip("wandb_workspaces.reports.v2", reason="needs the extra wandb-report")
SITE = Site("my-team", "shapes")


def run(folder: Path, method: str, seed: int, ap: float, logged: bool) -> FinishedRun:
    folder.mkdir(parents=True)
    if logged:
        (folder / "wandb_id").write_text(f"{method}{seed}\n")
    losses = () if method == "none" else (method,)
    return FinishedRun(
        folder=folder,
        config={
            "seed": seed,
            "schedule": {"epochs": 4},
            "distill": {"losses": {loss: {"weight": 4.0, "seed": seed} for loss in losses}},
        },
        words=[f"distill={method}", f"seed={seed}"],
        losses=losses,
        values={"test/AP": ap, "test/AP50": 2 * ap},
        classes=("cat",),
        teacher={"source": "teachers/x", "values": {"test/AP": 0.5}} if losses else None,
        fingerprints={"test": "same"},
        seconds=10.0,
        seconds_per_step=0.1,
    )


def comparison(folder: Path, logged: bool = True) -> Comparison:
    values = {"none": (0.10, 0.20, 0.30), "defeat": (0.25, 0.34, 0.46)}
    runs = [
        run(folder / f"{method}{seed}", method, seed, ap, logged)
        for method, aps in values.items()
        for seed, ap in enumerate(aps)
    ]
    return compare(runs)


def texts(blocks: list[Any]) -> str:
    """All texts of a report."""
    lines = []
    for block in blocks:
        lines.append(str(getattr(block, "text", "")))
        lines += map(str, getattr(block, "items", []))
    return "\n".join(lines)


def test_the_report_has_the_tables_the_verdict_and_the_runs(tmp_path: Path) -> None:
    report, workspace = build_pages(comparison(tmp_path), SITE, "distill: sweep")
    assert (report.entity, report.project, report.title) == ("my-team", "shapes", "distill: sweep")
    text = texts(report.blocks)
    # 15, 14 and 16 points: mean 15, standard deviation 1, t of two degrees of freedom 4.303 / sqrt(3) = 2.484.
    assert "gain shown: defeat: +15.0 AP over none, 95 % interval +12.5 to +17.5 over 3 seeds" in text
    assert "| defeat | 3 | 35.0 ± 10.5 | 70.0 |" in text
    assert "| teacher | – | 50.0 |" in text
    assert "| defeat | none | 3 | +15.0 | +12.5 to +17.5 |" in text
    grid = next(block for block in report.blocks if isinstance(block, reports.PanelGrid))
    (runs,) = grid.runsets
    assert (runs.entity, runs.project, runs.groupby) == ("my-team", "shapes", ["group"])
    names = [f"{method}{seed}" for method in ("none", "defeat") for seed in range(3)]
    assert all(f"'{name}'" in str(workspace.runset_settings.filters) for name in names)


def test_plots_name_what_a_run_logs(tmp_path: Path) -> None:
    report, workspace = build_pages(comparison(tmp_path), SITE, "sweep")
    grid = next(block for block in report.blocks if isinstance(block, reports.PanelGrid))
    lines = [panel for panel in grid.panels if isinstance(panel, reports.LinePlot)]
    drawn = [str(name) for panel in lines for name in panel.y]
    assert drawn == ["val/AP", "epoch/loss/detection", "epoch/loss/distillation"]
    (parallel,) = (panel for panel in grid.panels if isinstance(panel, reports.ParallelCoordinatesPlot))
    axes = [str(column.metric.name) for column in parallel.columns]
    assert "distill.losses.defeat.weight" in axes
    assert axes[-1] == "test/AP"
    assert [section.name for section in workspace.sections] == ["Results", "Training", "Predictions"]


def test_without_a_login_the_upload_ends_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    pages = build_pages(comparison(tmp_path), SITE, "sweep")
    with pytest.raises(DistillError, match=r"W&B: .* Log in with `wandb login`"):
        pages.save()


def test_runs_that_were_not_logged_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"None of the 6 runs was logged to W&B\. Train with logger=wandb"):
        build_pages(comparison(tmp_path, logged=False), SITE, "sweep")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(DistillError, match=r"pip install 'distill\[wandb-report\]', or: uv pip install"):
        build_pages(comparison(tmp_path), SITE, "sweep")


@pytest.mark.parametrize("word", ["project", "a/b/c", "/project", "team/"])
def test_a_site_without_entity_or_project_is_refused(word: str) -> None:
    with pytest.raises(DistillError, match="expected ENTITY/PROJECT"):
        parse_site(word)
