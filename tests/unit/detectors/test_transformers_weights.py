"""Weights in transformers' format, from folders that the tests write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.detectors.registry import load_detector
from distill.detectors.student_files import save_safetensors, save_student
from distill.types import DistillError
from helpers.detectors import query_detector, square_batch

pytest.importorskip("transformers", reason="the extra detr is not installed")


def publish(detector: Any, folder: Path, names: list[str]) -> str:
    """Write a detector as its authors publish it, with the norms of the backbone frozen."""
    net = detector.net
    net.config.id2label = dict(enumerate(names))
    net.config.label2id = {name: index for index, name in enumerate(names)}
    net.save_pretrained(folder)
    return str(folder)


def boxes(detector: Any) -> torch.Tensor:
    with torch.no_grad():
        last = detector.eval().view(square_batch(), training=False).queries[-1]
    return torch.cat([last.boxes, last.logits], dim=-1)


@pytest.mark.parametrize("family", ["rtdetr", "dfine"])
def test_a_folder_of_transformers_is_loaded(family: str, tmp_path: Path) -> None:
    first = query_detector(family, seed=3)
    source = publish(first, tmp_path / "published", ["cat", "dog", "owl"])
    loaded = type(first)(**{**first.options, "classes": None, "weights": source})
    assert loaded.classes == ("cat", "dog", "owl")
    assert torch.equal(boxes(loaded), boxes(first))
    assert any("same 3 classes" in line for line in loaded.report)


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    first = query_detector("rtdetr", seed=3)
    source = publish(first, tmp_path / "published", ["owl", "cat", "dog"])
    loaded = query_detector("rtdetr", weights=source)
    values, expected = boxes(loaded), boxes(first)
    assert torch.equal(values[..., :4], expected[..., :4])
    assert torch.equal(values[..., 4:], expected[..., [5, 6, 4]])
    embedding, own = (detector.net.model.denoising_class_embed.weight for detector in (loaded, first))
    assert torch.equal(embedding, own[[1, 2, 0, 3]])
    two = type(first)(**{**first.options, "classes": ["dog", "ant"], "weights": source, "head": "match"})
    rows, known = (detector.net.model.enc_score_head.weight for detector in (two, first))
    assert torch.equal(rows[0], known[2])
    with pytest.raises(DistillError, match="ant"):
        type(first)(**{**first.options, "classes": ["dog", "ant"], "weights": source})


def test_weights_of_another_meaning_are_refused(tmp_path: Path) -> None:
    first = query_detector("rtdetr", seed=3)
    source = publish(first, tmp_path / "published", ["cat", "dog", "owl"])
    with pytest.raises(DistillError, match=r"model\.decoder_heads=4"):
        query_detector("rtdetr", weights=source, decoder_heads=2)
    with pytest.raises(DistillError, match=r"expected weights of the type rt_detr, got rt_detr_v2"):
        query_detector("rtdetr", weights=source, version=1)
    first.net.config.decoder_offset_scale = 0.25
    first.net.save_pretrained(tmp_path / "published")
    with pytest.raises(DistillError, match=r"decoder_offset_scale=0\.25 \(here 0\.5\)"):
        query_detector("rtdetr", weights=source)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(DistillError, match=r"transformers cannot read .*empty"):
        query_detector("rtdetr", weights=str(tmp_path / "empty"))


@pytest.mark.parametrize("save", [save_student, save_safetensors])
def test_a_saved_detector_is_the_same(save: Any, tmp_path: Path) -> None:
    """Heads are tied to layers of the decoder. A file of safetensors holds each tensor once."""
    first = query_detector("dfine", seed=3)
    path = save(first, tmp_path)
    again = load_detector(tmp_path)
    assert torch.equal(boxes(again), boxes(first))
    assert again.resize.shape == "square"
    assert again.options == first.options
    size = sum(p.numel() for p in first.net.parameters()) * 4
    assert path.stat().st_size < 1.4 * size
