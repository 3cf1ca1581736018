"""The whole analysis of a run: measures its models, and writes tables, figures, pictures and a summary."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.analysis.detections import record_detections
from distill.analysis.errors import similar_groups
from distill.analysis.figures import model_figures, neck_figures, training_figures
from distill.analysis.model_report import TEACHER, Comparison, Rows, compare_models, model_summary, model_tables
from distill.analysis.neck_report import NeckReport, examine_necks, neck_tables
from distill.analysis.to_do_pictures import draw_image, image_indices
from distill.analysis.training_log import read_training
from distill.data.datamodule import DetectionData
from distill.detectors.base import Detector
from distill.evaluation.pictures import save_panel
from distill.evaluation.recording import Recording
from distill.files import atomic_write, write_text
from distill.run_folder import METRICS, STEPS, RunFolder
from distill.training.callbacks.history import to_csv

FOLDER = "analysis"
"""Folder of the results, in the run's folder."""
SUMMARY = "analysis.json"
PICTURES = "pictures"
"""Folder of the pictures of the to-do list, in the folder of the results."""
LISTED = 100
"""Images of the to-do list in the summary, which has the number of all of them, too. The table has all."""


def analyze_models(
    models: Mapping[str, Detector],
    data: DetectionData,
    split: str,
    folder: Path,
    groups: Sequence[Sequence[str]] = (),
    neck_images: int = 20,
    pictures: int = 12,
    device: torch.device | str = "cpu",
    recorded: Mapping[str, Recording] | None = None,
) -> tuple[Comparison, NeckReport]:
    """Measure detectors on a split, and write tables, figures and pictures. Files of an earlier analysis are removed.

    Args:
        models: name -> detector: ``student``, and perhaps ``teacher`` and others.
        data: the data set.
        split: `train`, `val` or `test`.
        folder: folder of the files.
        groups: groups of similar classes; empty: those of COCO and VOC.
        neck_images: images on which the necks are compared.
        pictures: images of the to-do list that are drawn.
        device: device of the detectors.
        recorded: name -> detections on the split that are known already. Those of other models are computed.
    """
    known = recorded or {}
    recordings = {
        name: known.get(name) or record_detections(detector, data, split, torch.device(device), f"{name}, {split}")
        for name, detector in models.items()
    }
    truth = next(iter(recordings.values())).truth
    detections = {name: recording.detections for name, recording in recordings.items()}
    result = compare_models(truth, detections, data.classes, similar_groups(data.classes, groups))
    necks = NeckReport(0, skipped={"necks": "no images were asked for"})
    if neck_images:
        students = {name: detector for name, detector in models.items() if name != TEACHER}
        necks = examine_necks(
            students, models.get(TEACHER), data, split, neck_images, torch.device(device), bar=f"necks, {split}"
        )
    for old in (*folder.glob("*.csv"), *folder.glob("*.png"), *folder.glob(f"{PICTURES}/*.png"), *folder.glob(SUMMARY)):
        old.unlink()
    drawn = _draw_to_do(result, data, split, folder, pictures)
    for name, rows in (model_tables(result) | neck_tables(necks)).items():
        write_text(folder / f"{name}.csv", to_csv(rows))
    if result.to_do:
        write_text(folder / "to_do.csv", to_csv(_to_do_rows(result, data, split, drawn)))
    for name, figure in (model_figures(result) | neck_figures(necks)).items():
        atomic_write(folder / f"{name}.png", partial(figure.savefig, format="png"))
    return result, necks


def write_summary(
    folder: Path, result: Comparison, necks: NeckReport, data: DetectionData, split: str, facts: Mapping[str, Any]
) -> Path:
    """Write the main numbers as JSON, values from 0 to 1, null where there is none. `facts` are added in front."""
    tables = neck_tables(necks)
    content = {
        **facts,
        "split": split,
        "images": len(data.ground_truth(split)["images"]),
        "classes": list(data.classes),
        **model_summary(result),
        "neck_images": necks.images,
        **{name: rows for name, rows in tables.items() if name != "distances"},
        "to_do_images": len(result.to_do),
        "to_do": [row._asdict() for row in result.to_do[:LISTED]],
        "skipped": necks.skipped,
    }
    return write_text(folder / SUMMARY, json.dumps(_without_nan(content), indent=1))


def draw_training(run: RunFolder, folder: Path) -> dict[str, str]:
    """Draw the loss terms and their gradients over the training. Returns what is left out -> the reason."""
    losses, gradients = read_training(run)
    for name, figure in training_figures(losses, gradients).items():
        atomic_write(folder / f"{name}.png", partial(figure.savefig, format="png"))
    reasons = {"terms": f"{METRICS} has no loss terms"} if not losses else {}
    return reasons | ({} if gradients else {"gradient_shares": f"{STEPS} has none (callbacks.gradients)"})


def _draw_to_do(result: Comparison, data: DetectionData, split: str, folder: Path, count: int) -> dict[int, str]:
    """Draw the first images of the to-do list; image id -> file name."""
    confident = {name: model.confident for name, model in result.models.items()}
    ids = [row.image for row in result.to_do[:count]]
    names = {image_id: f"{PICTURES}/{rank:03d}-{image_id}.png" for rank, image_id in enumerate(ids, start=1)}
    for image_id, index in zip(ids, image_indices(data, split, ids), strict=True):
        save_panel(folder / names[image_id], draw_image(data, split, index, confident))
    return names


def _to_do_rows(result: Comparison, data: DetectionData, split: str, drawn: Mapping[int, str]) -> Rows:
    files = {image["id"]: image["file_name"] for image in data.ground_truth(split)["images"]}
    return [
        {"rank": rank, **row._asdict(), "file": files[row.image], "picture": drawn.get(row.image, "")}
        for rank, row in enumerate(result.to_do, start=1)
    ]


def _without_nan(value: Any) -> Any:
    """The same containers with None instead of NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
