"""The detections of an evaluation with its ground truth, in one file: what a later comparison of two models needs."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.evaluation.metric import DetectionArrays, DetectionMetric, GroundTruth
from distill.files import atomic_write
from distill.types import DistillError

FORMAT = 1


@dataclass(frozen=True)
class Recording:
    """The ground truth of a split and the detections of one model, without masks.

    Labels are those of `classes`: class `i` has label `i + 1`.
    """

    classes: tuple[str, ...]
    truth: GroundTruth
    detections: DetectionArrays

    def truth_digest(self) -> str:
        """SHA-256 of the classes and the ground truth. Recordings with the same digest can be paired by image."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for column in self.truth[:-1]:
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()


class DetectionRecorder(DetectionMetric):
    """Collects the detections of an evaluation as a metric does, with all ranks, and gives no numbers.

    After `compute`, `recording` has the detections.
    """

    recording: Recording | None = None

    def compute(self) -> dict[str, float]:
        """Collect the detections of all ranks into `recording`."""
        self.recording = Recording(self.classes, self.truth, self._collect()[0])
        return {}


def save_recording(path: Path, recording: Recording) -> Path:
    """Write a recording as a compressed file of numpy. Boxes and scores are float32 if that loses nothing."""
    truth, found = recording.truth, recording.detections
    content: dict[str, Any] = {
        "format": np.array(FORMAT),
        "classes": np.array(recording.classes, dtype=np.str_),
        **{f"truth_{name}": getattr(truth, name) for name in truth._fields if name != "code"},
        "image": found.image,
        "label": found.label.astype(np.uint16 if len(recording.classes) < 2**16 else np.int64),
        "box": _shortest(found.box),
        "score": _shortest(found.score),
    }
    return atomic_write(path, lambda file: np.savez_compressed(file, **content))


def _shortest(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    short = values.astype(np.float32)
    return short if np.array_equal(short.astype(values.dtype), values) else values


def load_recording(path: Path) -> Recording:
    """Read a recording.

    Raises:
        DistillError: the file does not exist, is damaged, or was written by a newer version.
    """
    try:
        if path.is_file() and not zipfile.is_zipfile(path):  # numpy would take it for a pickle, and advise to load that
            raise ValueError("no archive of numpy")
        with np.load(path, allow_pickle=False) as content:
            if int(content["format"]) != FORMAT:
                raise ValueError(f"format {int(content['format'])}, this version of distill reads {FORMAT}")
            columns = {name: content[name] for name in content.files}
        truth = {name: columns[f"truth_{name}"] for name in GroundTruth._fields if name != "code"}
        objects, count = len(truth["label"]), len(columns["label"])
        return Recording(
            classes=tuple(str(name) for name in columns["classes"]),
            truth=GroundTruth(**truth, code=np.full(objects, None, dtype=object)),
            detections=DetectionArrays(
                image=columns["image"].astype(np.int64),
                label=columns["label"].astype(np.int64),
                box=columns["box"].astype(np.float64).reshape(-1, 4),
                score=columns["score"].astype(np.float64),
                code=np.full(count, None, dtype=object),
            ),
        )
    except Exception as error:  # damaged archives raise exceptions of many types
        raise DistillError(f"{path}: not the detections of a run ({error}); copy the file or train again") from error
