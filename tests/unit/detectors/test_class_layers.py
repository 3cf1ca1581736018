"""head=match: known classes keep their rows in every layer that belongs to classes, new classes start afresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.detectors.student_files import save_student
from distill.types import DistillError
from helpers.detectors import FAMILIES, random_detector, small_options

SOURCE = ("background", "cat", "dog", "owl")
TARGET = ("background", "owl", "fox", "cat")


def matched(family: str, weights: Path | None, head: str = "match", classes: Any = TARGET[1:]) -> Any:
    torch.manual_seed(5)
    options = small_options(family, {"head_channels": 32}, neck_channels=FAMILIES[family].neck_channels or 32)
    source = {} if weights is None else {"weights": str(weights), "head": head}
    return FAMILIES[family].detector(list(classes), **options, **source)


def rows_by_class(values: Tensor, name: str, classes: tuple[str, ...]) -> dict[str, Tensor]:
    """Class -> its rows, by the order that torchvision documents for each layer."""
    if "bbox_pred" in name:  # four rows for each class
        return {c: values[4 * label : 4 * label + 4] for label, c in enumerate(classes)}
    return {c: values[label :: len(classes)] for label, c in enumerate(classes)}  # dense heads: once for each anchor


@pytest.mark.parametrize("family", FAMILIES)
def test_known_classes_keep_their_rows_and_new_ones_start_afresh(family: str, tmp_path: Path) -> None:
    source = random_detector(family)
    save_student(source, tmp_path)
    detector, fresh = matched(family, tmp_path), matched(family, None)
    state, source_state, fresh_state = (one.net.state_dict() for one in (detector, source, fresh))
    layers = tuple(f"{layer}." for layer in detector.class_layers)
    for name, values in state.items():
        if not name.startswith(layers):
            if "num_batches_tracked" not in name:  # the source has frozen norms
                assert torch.equal(values, source_state[name]), name
            continue
        rows, source_rows = rows_by_class(values, name, TARGET), rows_by_class(source_state[name], name, SOURCE)
        for known in ("background", "owl", "cat"):
            assert len(rows[known]) > 0
            assert torch.equal(rows[known], source_rows[known]), (name, known)
        assert torch.equal(rows["fox"], rows_by_class(fresh_state[name], name, TARGET)["fox"]), name
    assert "head: kept the rows of owl, cat; new: fox" in detector.report


def test_the_same_classes_in_another_order_are_all_kept(tmp_path: Path) -> None:
    source = random_detector("retinanet")
    save_student(source, tmp_path)
    detectors = [matched("retinanet", tmp_path, head, ("owl", "cat")) for head in ("match", "keep")]
    first, second = (detector.net.state_dict() for detector in detectors)
    assert all(torch.equal(values, second[name]) for name, values in first.items())
    assert "head: kept the rows of owl, cat; new: none" in detectors[0].report


def test_match_needs_names_and_a_common_one(tmp_path: Path) -> None:
    save_student(random_detector("retinanet"), tmp_path)
    with pytest.raises(DistillError, match=r"head=match: .*'Cat'.*'cat', 'dog', 'owl'.* share no name"):
        matched("retinanet", tmp_path, classes=("Cat", "Dog"))
    with pytest.raises(DistillError, match=r"\['fox'\].*model.head=match"):
        matched("retinanet", tmp_path, "keep")
    (tmp_path / "student.json").unlink()
    with pytest.raises(DistillError, match="head=match needs the class names"):
        matched("retinanet", tmp_path / "student.pt")


def test_a_head_with_other_anchors_does_not_fit(tmp_path: Path) -> None:
    """One class more and a third of the anchors: rows of different meaning must not be taken for each other."""
    save_student(random_detector("retinanet", anchor_ratios=(1.0,)), tmp_path)
    (tmp_path / "student.json").write_text(
        (tmp_path / "student.json")
        .read_text()
        .replace('"ratios": [\n        1.0\n      ]', '"ratios": [0.5, 1.0, 2.0]')
    )
    with pytest.raises(DistillError, match="of another shape: head"):
        matched("retinanet", tmp_path)
