"""A model card in Markdown: results and costs of all forms of a model, data, recipe, seeds and licenses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.diagnostics.cost import Cost, cost_of
from distill.export.proof import MAIN
from distill.files import read_json
from distill.run_folder import RunFolder
from distill.types import DistillError
from distill.units import MISSING

COLUMNS = ("", "AP", "M parameters", "GFLOPs", "MB", "ms", "AP per ms")
ORIGINS = {
    "IMAGENET1K": "torchvision's weights (torchvision: BSD-3-Clause), trained on ImageNet; see ImageNet's terms of use",
    "COCO": "torchvision's weights (torchvision: BSD-3-Clause), trained on COCO; see COCO's terms of use",
    "timm/": "timm's weights; see the license on the model's page",
}
"""Beginning of a name of weights -> their origin and license."""


@dataclass(frozen=True)
class CardRow:
    """A form of the model in the cost card."""

    name: str
    ap: float | None
    """From 0 to 1."""
    parameters: float | None
    gflops: float | None
    megabytes: float | None
    milliseconds: float | None

    @classmethod
    def of(cls, name: str, ap: float | None, cost: Cost | None) -> CardRow:
        """A row of a detector in PyTorch."""
        if cost is None:
            return cls(name, ap, None, None, None, None)
        return cls(name, ap, cost.parameters, cost.gflops, cost.megabytes, cost.milliseconds)

    def cells(self) -> list[str]:
        """Texts of the row: AP in percent, and AP per millisecond in percentage points."""
        per_ms = 100 * self.ap / self.milliseconds if self.ap is not None and self.milliseconds else None
        return [
            self.name,
            MISSING if self.ap is None else f"{100 * self.ap:.1f}",
            _number(None if self.parameters is None else self.parameters / 1e6),
            _number(self.gflops),
            _number(self.megabytes),
            _number(self.milliseconds),
            _number(per_ms),
        ]


def card_rows(run: RunFolder) -> tuple[str, list[CardRow]]:
    """The split of a run's results, and rows of the teacher, the student alone, the student, and its exported files.

    Costs are those that the run and its exports measured.

    Raises:
        DistillError: the run did not finish.
    """
    if not run.finished:
        raise DistillError(f"{run.path}: expected a finished run, with {run.summary.name} and {run.student.name}")
    summary = read_json(run.summary)
    results: Mapping[str, float] = summary.get("student") or {}
    split = "test" if any(name.startswith("test/") for name in results) else "val"
    costs = {name: cost_of(value) for name, value in (summary.get("cost") or {}).items()}
    rows = []
    if teacher := summary.get("teacher"):
        rows.append(CardRow.of("teacher", _ap(teacher.get("values") or {}, split), costs.get("teacher")))
    student = costs.get("student")
    if baseline := summary.get("baseline"):
        rows.append(CardRow.of("student alone", _ap(baseline.get("values") or {}, split), student))
    name = "distilled student" if summary.get("losses") else "student"
    rows.append(CardRow.of(name, _ap(results, split), student))
    for file in sorted((run.path / "export").glob("*/proof.json")):
        proof = read_json(file)
        exported, count = proof["exported"], (summary.get("parameters") or {}).get("student")
        times = [spread["median"] for spread in exported["latency"]]
        label = f"{exported['name']} ({proof['split']}, {proof['images']} images)"
        found = _ap({f"{split}/{key}": value for key, value in exported["results"].items()}, split)
        gflops = student.gflops if student else None
        rows.append(CardRow(label, found, count, gflops, exported["megabytes"], times[0] if times else None))
    return split, rows


def write_card(
    run: RunFolder, config: Mapping[str, Any], overrides: Sequence[str], license_text: str, classes: Sequence[str]
) -> str:
    """The model card of a finished run.

    Args:
        run: the run.
        config: its resolved configuration.
        overrides: its overrides.
        license_text: license of the student's weights.
        classes: class names of the student.
    """
    split, rows = card_rows(run)
    summary = read_json(run.summary)
    device = next((cost["device"] for cost in (summary.get("cost") or {}).values() if cost), None)
    latency = f"ms: one image at a time on {device}" if device else "ms: not measured by the run (cost=0)"
    data, source = config["data"], config["data"].get("source") or {}
    schedule = json.dumps(config["schedule"], default=str)
    front = ["---", "library_name: distill", "pipeline_tag: object-detection"]
    known = license_text if license_text.lower().replace(".", "").replace("-", "").isalnum() else "other"
    front += [f"license: {known.lower()}", "tags:", "- object-detection", "- knowledge-distillation", "---"]
    facts = [
        ("run", config.get("name")),
        ("data", f"{source.get('_target_')} {source.get('root') or ''}".strip()),
        ("training images", summary.get("images")),
        ("image size", f"min_size {data.get('min_size')}, max_size {data.get('max_size')}"),
        ("methods", ", ".join(summary.get("losses") or []) or "none"),
        ("overrides", " ".join(overrides)),
        ("schedule", schedule),
        ("seeds", f"seed {config.get('seed')}, data {data.get('seed')}"),
        ("distill's commit", summary.get("git")),
        ("versions", ", ".join(f"{name} {number}" for name, number in (summary.get("versions") or {}).items())),
    ]
    lines = [
        *front,
        "",
        f"# {config.get('name')}",
        "",
        f"An object detector for {len(classes)} classes: {', '.join(classes)}.",
        "",
        "## Results and costs",
        "",
        *_table(COLUMNS, [row.cells() for row in rows]),
        "",
        f"AP in percent on {split}. Exported files: on the images in brackets, with one thread, from pixels to "
        f"detections, resize included. Others, {latency}, from the resized image.",
        "",
        "## Recipe",
        "",
        *_table(("", ""), [[name, str(value)] for name, value in facts if value not in (None, "")]),
        "",
        "## Weights and licenses",
        "",
        *_table(("weights", "origin and license"), weights_used(config, summary, license_text)),
        "",
        "## Use",
        "",
        "```python",
        "import distill",
        "",
        'detector = distill.load_detector("FOLDER")  # the folder of this card',
        'print(detector(["image.jpg"])[0].names)',
        "```",
    ]
    return "\n".join(lines) + "\n"


def weights_used(config: Mapping[str, Any], summary: Mapping[str, Any], license_text: str) -> list[list[str]]:
    """Weights from which the student and its teacher come, with their origin."""
    rows = [["this student", license_text]]
    model = config.get("model") or {}
    for label, name in (
        ("start of the student", model.get("weights")),
        ("start of the student's backbone", (model.get("backbone") or {}).get("weights")),
        ("teacher", (summary.get("teacher") or {}).get("source")),
    ):
        if name:
            origin = next(
                (text for start, text in ORIGINS.items() if str(name).startswith(start)), "as its owner states"
            )
            rows.append([f"{label}: {name}", origin])
    return rows


def _ap(values: Mapping[str, float], split: str) -> float | None:
    found = next((values[f"{split}/{name}"] for name in MAIN if f"{split}/{name}" in values), -1.0)
    return found if found >= 0 else None


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *escaped)]


def card_folder(run: RunFolder) -> Path:
    """The folder of a run's card, with the weights beside it."""
    return run.path / "export" / "card"
