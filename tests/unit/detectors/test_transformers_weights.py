"""Weights in transformers' format, from folders that the tests write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.detectors.registry import load_detector
from distill.detectors.student_files import save_safetensors, save_student
from distill.types import DistillError
from helpers.detectors import QUERY_FAMILIES, query_batch, query_detector

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
        last = detector.eval().view(query_batch(detector.spec.family), training=False).queries[-1]
    return torch.cat([last.boxes, last.logits], dim=-1)


@pytest.mark.parametrize("family", QUERY_FAMILIES)
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


def test_published_deimv2s_are_loaded(tmp_path: Path) -> None:
    """Their configuration names the size of their evaluation; that of the lite sizes names the one stride it reads."""
    lite = {"backbone": {"name": "hgnet_pico", "width": 0.25}, "encoder": "lite", "gateway": False}
    first = query_detector("deimv2", seed=3, share_box_head=True, **lite)
    assert first.net.config.feat_strides == [16]
    first.net.config.eval_size = [640, 640]
    source = publish(first, tmp_path / "published", ["cat", "dog", "owl"])
    loaded = query_detector("deimv2", share_box_head=True, weights=source, **lite)
    assert torch.equal(boxes(loaded), boxes(first))
    with pytest.raises(DistillError, match=r"'model\.gateway=false' 'model\.share_box_head=true'"):
        query_detector("deimv2", weights=source, **{**lite, "gateway": True})
    with pytest.raises(DistillError, match=r'\'model\.encoder="lite"\''):
        query_detector("deimv2", weights=source, backbone={"name": "hgnet_b0", "width": 0.25})


def test_a_published_vision_transformer_is_refused(tmp_path: Path) -> None:
    from transformers import Deimv2Config, Deimv2ForObjectDetection, DINOv3ViTConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    body = DINOv3ViTConfig(**sizes, out_indices=[1, 2, 3], apply_layernorm=True, reshape_hidden_states=True)
    narrow = {"encoder_hidden_dim": 32, "d_model": 32, "decoder_in_channels": [32] * 3, "decoder_layers": 2}
    Deimv2ForObjectDetection(Deimv2Config(backbone_config=body, num_labels=3, **narrow)).save_pretrained(tmp_path)
    with pytest.raises(DistillError, match=r"a backbone of the type rt_detr_resnet, got dinov3_vit.*vision transf"):
        query_detector("deimv2", weights=str(tmp_path))


@pytest.mark.parametrize("family", [family for family in QUERY_FAMILIES if family != "rtdetr"])
@pytest.mark.parametrize("save", [save_student, save_safetensors])
def test_a_saved_detector_is_the_same(save: Any, family: str, tmp_path: Path) -> None:
    """Heads are tied to layers of the decoder. A file of safetensors holds each tensor once."""
    first = query_detector(family, seed=3, **({"share_box_head": True} if family == "deimv2" else {}))
    path = save(first, tmp_path)
    again = load_detector(tmp_path)
    assert torch.equal(boxes(again), boxes(first))
    assert again.resize.shape == "square"
    assert again.options == first.options
    size = sum(p.numel() for p in first.net.parameters()) * 4
    assert path.stat().st_size < 1.4 * size
