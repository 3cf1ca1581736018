"""Values that the composition computes from the classes of the detectors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.cli.config import target_policy
from distill.cli.config.compose import resize_of


@pytest.fixture(autouse=True)
def _trust_nothing() -> Iterator[None]:
    yield
    target_policy.set_trusted([])


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("distill.FasterRCNN", None, "ratio"),
        ("distill.FCOS", "distill.RetinaNet", "ratio"),
        ("distill.RTDETR", None, "square"),
        ("distill.RTDETR", "distill.FasterRCNN", "square"),
        ("distill.FasterRCNN", "distill.DFine", "square"),
        ("distill.detectors.dfine.DFine", None, "square"),  # another name of the class
        ("distill.NoSuchDetector", None, "ratio"),  # refused when it is built
    ],
)
def test_the_resize_follows_from_the_detectors(student: str, teacher: str | None, expected: str) -> None:
    assert resize_of(student, teacher) == expected


def test_a_subclass_has_the_resize_of_its_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name says nothing. It got padded images, which it sees as image."""
    (tmp_path / "own_detr.py").write_text("import distill\n\n\nclass Mine(distill.RTDETR):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resize_of("own_detr.Mine", None) == "ratio"  # the run refuses it
    assert "own_detr" not in sys.modules
    target_policy.set_trusted(["trust=[own_detr]"])
    assert resize_of("own_detr.Mine", None) == resize_of("distill.FCOS", "own_detr.Mine") == "square"
