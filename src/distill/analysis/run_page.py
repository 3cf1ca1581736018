"""The HTML page of a run, from the files that the run and its analysis left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.analysis.html_page import Picture, Plot, Section, Table, render_page
from distill.analysis.run_analysis import PICTURES, SUMMARY
from distill.diagnostics.cost import COST_COLUMNS, ModelRow, cost_of
from distill.files import read_json
from distill.run_folder import RunFolder
from distill.units import MISSING, duration, percent

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mAP", "mask_AP")
PLOTS = {
    "Errors": {
        "errors": "AP50 that each kind of error costs, in TIDE's sense (arXiv 2008.08115).",
        "shares": "The best detections of each class: correct, or the kind of false positive (Hoiem et al., 2012).",
        "confusion": "Confusion matrix of the detections above the best threshold of their class.",
    },
    "Scores": {
        "precision_recall": "Precision over recall at IoU 0.5.",
        "f1": "F1 over the score: its highest point is the threshold to use.",
        "calibration": "Reliability: precision over the score. A calibrated detector is on the diagonal.",
    },
    "Student and teacher": {
        "agreement": "How often a model finds what the teacher finds, and copies its mistakes.",
        "cka": "Linear CKA between the necks: 1 means equal up to a rotation and a scale.",
        "gradients": "Gradient of the detection loss in the neck, inside and outside of objects (DeFeat, figure 2).",
        "distances": "Distance between student and teacher per channel of the neck (DeFeat, figure 8).",
        "ssim": "SSIM between the necks.",
    },
    "Training": {
        "terms": "Weighted terms of the loss by epoch.",
        "gradient_shares": "Share of each weighted term in the gradient at the student's neck.",
    },
}
"""Section -> name of a figure of the analysis -> its caption."""
MAPS = {
    "Student and teacher": {
        "gradients_examples": "Gradient of the detection loss at the finest level of the neck; bright is large.",
        "ssim_examples": "SSIM with the teacher at the finest level of the neck; bright is similar.",
        "edges_examples": "DSIG's edges: cosine similarity of each pair of objects; bright is similar.",
    }
}
"""Section -> name of a figure with images and maps -> its caption."""
MOST_PICTURES = 8
"""Pictures in each section, so that the page stays below 5 MB."""


def write_run_page(run: RunFolder, analysis: Path) -> Path:
    """Write the page of a finished run.

    Args:
        run: the run's folder.
        analysis: folder of its analysis; parts that it does not have are left out.
    """
    summary = read_json(run.summary)
    file = analysis / SUMMARY
    found = read_json(file) if file.is_file() else {}
    sections = [
        Section("Result", tables=result_tables(summary, baseline_results(summary, found))),
        Section("Learning curves", plots=_plots({run.curves: "Losses and validation AP by epoch."})),
        Section("To do", to_do_text(found), pictures=_pictures(analysis / PICTURES, "teacher right, student wrong")),
        *(
            Section(
                title,
                tables=tables_of(title, found),
                plots=_plots({analysis / f"{name}.png": caption for name, caption in captions.items()}),
                pictures=_maps(analysis, title),
            )
            for title, captions in PLOTS.items()
        ),
        Section("Pictures", pictures=_pictures(run.pictures, "ground truth and detections")),
        Section("Notes", [*map(str, found.get("notes", [])), *_skipped(found)]),
        Section("Run", tables=[_facts(run, summary)]),
    ]
    return render_to(run.report, run.path.name, summary, sections)


def render_to(file: Path, name: str, summary: Mapping[str, Any], sections: list[Section]) -> Path:
    """Render and write the page, completely or not at all."""
    from distill.files import write_text

    losses = "+".join(summary.get("losses") or []) or "student alone"
    return write_text(file, render_page(f"{losses}: {name}", "Metrics are in percent.", sections))


def baseline_results(summary: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, float]:
    """Results of the student alone: those of the run's own comparison, otherwise those of the analyzed baseline.

    Results of the analyzed baseline are shown only for splits with the same images as this run.
    """
    if known := (summary.get("baseline") or {}).get("values"):
        return dict(known)
    source = (report.get("models") or {}).get("baseline")
    file = RunFolder(source).summary if source else None
    if file is None or not file.is_file():
        return {}
    other = read_json(file)
    measured, here = ((one.get("measured") or {}).get("data") or {} for one in (other, summary))
    shared = {split for split in measured if measured[split] == here.get(split)}
    return {name: value for name, value in other["student"].items() if name.partition("/")[0] in shared}


def result_tables(summary: Mapping[str, Any], baseline: Mapping[str, float]) -> list[Table]:
    """A table per split: the student alone, the student and the teacher, with their costs."""
    losses = summary.get("losses") or []
    costs = summary.get("cost") or {}
    rows = [
        ModelRow("student alone", baseline, None),
        ModelRow(
            f"distilled ({', '.join(losses)})" if losses else "student",
            summary["student"],
            cost_of(costs.get("student")),
        ),
        ModelRow("teacher", (summary.get("teacher") or {}).get("values") or {}, cost_of(costs.get("teacher"))),
    ]
    tables = []
    for split in ("test", "val"):
        names = [name for name in METRICS if f"{split}/{name}" in summary["student"]]
        kept = [row for row in rows if any(f"{split}/{name}" in row.results for name in names)]
        device = next((row.cost.device for row in kept if row.cost), None)
        caption = f"{split}; one image at a time on {device}" if device else split
        cells = [row.cells([f"{split}/{name}" for name in names]) for row in kept]
        if names:
            tables.append(Table(("", *names, *COST_COLUMNS), cells, caption))
    return tables


def tables_of(title: str, report: Mapping[str, Any]) -> list[Table]:
    """The tables of a section, from the summary of the analysis."""
    if title == "Errors" and report.get("errors"):
        kinds = list(next(iter(report["errors"].values()))["ap50_gain"])
        rows = [
            [name, percent(model["ap50"]), *(percent(model["ap50_gain"][kind]) for kind in kinds)]
            for name, model in report["errors"].items()
        ]
        return [
            Table(("", "AP50", *kinds), rows, f"{report['split']}: AP50, and the AP50 that errors of each kind cost")
        ]
    if title == "Scores" and report.get("thresholds"):
        values = ("threshold", "precision", "recall", "f1")
        rows = [
            [label, str(row["objects"]), *(MISSING if row[key] is None else f"{row[key]:.3f}" for key in values)]
            for label, row in report["thresholds"].get("student", {}).items()
        ]
        return [
            Table(("class", "objects", *values), rows, "student: the threshold with the best F1 (values from 0 to 1)")
        ]
    if title == "Student and teacher" and report.get("agreement"):
        columns = ("boxes", "found", "right_found", "mistakes", "copied", "missed", "missed_too")
        rows = [
            [name, *(str(model[key]) if isinstance(model[key], int) else percent(model[key]) for key in columns)]
            for name, model in report["agreement"].items()
        ]
        names = (
            "teacher's boxes",
            "found",
            "right ones found",
            "its mistakes",
            "copied",
            "objects it misses",
            "missed too",
        )
        return [Table(("", *names), rows, "numbers, and shares in percent")]
    return []


def _plots(captions: Mapping[Path, str]) -> list[Plot]:
    return [Plot(file, caption) for file, caption in captions.items() if file.is_file()]


def _pictures(folder: Path, caption: str) -> list[Picture]:
    return [Picture(file, f"{file.stem}: {caption}") for file in sorted(folder.glob("*.png"))[:MOST_PICTURES]]


def _maps(analysis: Path, title: str) -> list[Picture]:
    files = {analysis / f"{name}.png": caption for name, caption in MAPS.get(title, {}).items()}
    return [Picture(file, caption) for file, caption in files.items() if file.is_file()]


def to_do_text(report: Mapping[str, Any]) -> list[str]:
    """The sentence above the pictures of the to-do list, from the summary of the analysis."""
    count = report.get("to_do_images", 0)
    if not count:
        return []
    return [
        f"Images with errors of the student that the teacher does not make, worst first. to_do.csv lists all {count}."
    ]


def _skipped(report: Mapping[str, Any]) -> list[str]:
    return [f"Left out, {name}: {reason}" for name, reason in (report.get("skipped") or {}).items()]


def _facts(run: RunFolder, summary: Mapping[str, Any]) -> Table:
    teacher = summary.get("teacher") or {}
    facts = {
        "folder": str(run.path),
        "teacher": str(teacher.get("source") or MISSING),
        "training images": str(summary.get("images", MISSING)),
        "duration": duration(summary["seconds"]) if "seconds" in summary else MISSING,
        "parameters of the student": f"{(summary.get('parameters') or {}).get('student', 0):,}",
        **{str(name): str(version) for name, version in (summary.get("versions") or {}).items()},
        "commit": str(summary.get("git") or MISSING),
    }
    return Table(("", ""), [[name, value] for name, value in facts.items()])
