"""Set-prediction detectors as files: no GridSample node, and the detections of the detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from distill.export.exported import ExportedDetector
from distill.export.graphs import Canvas, FullGraph, dense_graph
from distill.export.parity import compare_detections
from distill.export.routes import ROUTES, ExportOptions, open_program
from distill.imaging.resizing import ResizeOptions
from distill.types import Detections, DistillError
from helpers.detectors import QUERY_FAMILIES, query_detector

pytest.importorskip("transformers", reason="the extra detr is not installed")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SIDE = 128
SIZES = ((120, 150), (97, 203), (64, 64), (300, 200))
QUERIES = 20


def detector_of(family: str, **options: Any) -> Any:
    """A detector whose scores are apart from one another: equal ones would come in any order."""
    detector: Any = query_detector(family, **options).eval()
    for layer in detector.class_layers:
        torch.nn.init.normal_(detector.net.get_submodule(layer).weight, std=0.3)
    # Offsets of this size put some of the points outside of the maps.
    for module in detector.net.model.decoder.modules():
        if hasattr(module, "sampling_offsets"):
            torch.nn.init.normal_(module.sampling_offsets.weight, std=0.3)
    return detector


def picture(size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, size[0] // 8 + 1, size[1] // 8 + 1, generator=generator)
    return (255 * F.interpolate(coarse, size=size, mode="bilinear")[0]).to(torch.uint8)


def export(detector: Any, folder: Path, canvas: Canvas | None = None, to: str = "onnx", **options: Any) -> Path:
    chosen = ExportOptions(to=to, parts="full" if canvas is None else "dense", **options)
    chosen.check()
    return ROUTES[to].write(detector, chosen, canvas, {}, folder).main


def operators(path: Path) -> set[str]:
    """Kinds of all nodes, those of subgraphs included."""
    found: set[str] = set()
    graphs = [onnx.load(str(path)).graph]
    while graphs:
        for node in graphs.pop().node:
            found.add(node.op_type)
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return found


def assert_equal_detections(detector: Any, path: Path, to: str = "onnx") -> None:
    detect = open_program(to, path, detector)(1)
    images = [picture(size, seed) for seed, size in enumerate(SIZES)]
    ours = [Detections(image.boxes, image.scores, image.labels) for image in detector(images)]
    parity = compare_detections(ours, [detect(image) for image in images])
    assert parity.detections == 3 * QUERIES * len(SIZES)  # every pair of a query and a class
    assert (parity.missing, parity.surplus) == (0, 0)
    assert parity.pixels < 0.01, parity
    assert parity.score < 1e-4, parity


FULL: list[tuple[str, dict[str, Any]]] = [
    ("rtdetr", {"version": 1}),
    ("rtdetr", {"version": 2, "strides": (16, 32)}),
    ("dfine", {}),
    ("rfdetr", {"positions": 6}),  # the position codes are resized to 8 x 8 cells
    ("dfine", {"backbone": {"name": "hgnet_b0", "width": 0.25}, "strides": (16, 32), "decoder_points": (3, 6)}),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "options"), FULL)
def test_full_file_has_no_grid_sample_and_finds_what_the_detector_finds(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    detector = detector_of(family, **options)
    path = export(detector, tmp_path)
    assert "GridSample" not in operators(path)
    assert_equal_detections(detector, path)
    facts = ExportedDetector(path).facts
    assert facts["resize"]["shape"] == "square"
    assert "both sides" in facts["resize"]["rule"]
    assert facts["nms_threshold"] is None


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", [family for family in QUERY_FAMILIES if family != "rfdetr"])  # see below
@pytest.mark.parametrize("top", [None, 3 * QUERIES, 7])
def test_dense_file_in_batches(family: str, top: int | None, tmp_path: Path) -> None:
    detector = detector_of(family)
    path = export(detector, tmp_path, Canvas(SIDE, SIDE), batch="dynamic", top=top)
    assert "GridSample" not in operators(path)
    exported = ExportedDetector(path, 1)
    images = torch.stack([picture((SIDE, SIDE), seed) for seed in range(3)])
    sizes = torch.tensor([[SIDE, SIDE]] * 3, dtype=torch.int32)
    together = exported.run(images, sizes)
    for index in range(3):
        alone = exported.run(images[index : index + 1], sizes[index : index + 1])
        for name, values in together.items():
            torch.testing.assert_close(values[index], alone[name][0], rtol=1e-4, atol=1e-3)
    wide = exported.run(images, sizes * torch.tensor([1, 2], dtype=torch.int32))
    name = "query_boxes" if top is None else "boxes"
    torch.testing.assert_close(wide[name], together[name] * torch.tensor([2, 1, 2, 1]), rtol=1e-4, atol=1e-3)
    if top != 7:
        assert_equal_detections(detector, path)
        return
    (ours,), (found,) = detector([images[0]]), exported([images[0]])
    best = Detections(ours.boxes[:7], ours.scores[:7], ours.labels[:7])
    parity = compare_detections([best], [Detections(found.boxes, found.scores, found.labels)])
    assert (parity.detections, parity.missing, parity.surplus) == (7, 0, 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", QUERY_FAMILIES)
@pytest.mark.parametrize("to", ["openvino", "torchscript"])
def test_other_programs_find_what_the_detector_finds(family: str, to: str, tmp_path: Path) -> None:
    if to == "openvino":
        pytest.importorskip("openvino", reason="the extra openvino is not installed")
    detector = detector_of(family)
    assert_equal_detections(detector, export(detector, tmp_path, to=to), to)


@pytest.mark.exhaustive
@pytest.mark.parametrize("top", [None, 3 * QUERIES])
def test_a_dense_rfdetr_takes_one_image(top: int | None, tmp_path: Path) -> None:
    detector = detector_of("rfdetr")
    with pytest.raises(DistillError, match=r"--batch dynamic: the library's rfdetr .* Use --batch 1"):
        export(detector, tmp_path, Canvas(SIDE, SIDE), batch="dynamic", top=top)
    assert_equal_detections(detector, export(detector, tmp_path, Canvas(SIDE, SIDE), batch="1", top=top))


@pytest.mark.parametrize("family", QUERY_FAMILIES)
def test_a_graph_never_samples_by_grid_sample(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a threshold applies. The detector itself samples as its library does, before and after."""
    detector, image = detector_of(family), picture((97, 203))
    detector.options["score_thresh"] = detector([image])[0].scores[QUERIES].item()
    (expected,) = detector([image])
    monkeypatch.setattr(F, "grid_sample", lambda *_, **__: pytest.fail("grid_sample was called"))
    with torch.no_grad():
        boxes, scores, labels = FullGraph(detector).eval()(image.permute(1, 2, 0))
    assert 0 < len(expected.scores) < 3 * QUERIES
    torch.testing.assert_close(boxes, expected.boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(scores, expected.scores)
    assert labels.tolist() == expected.labels.tolist()
    with pytest.raises(pytest.fail.Exception):
        detector([image])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    detector = detector_of("rtdetr")
    with pytest.raises(DistillError, match=r"--canvas 96x128: .* expected 128x128"):
        dense_graph(detector, Canvas(96, 128))
    with pytest.raises(DistillError, match="the family rtdetr"):
        export(detector, tmp_path, to="torchvision")
    detector.resize = ResizeOptions(shape="ratio")
    for make in (FullGraph, lambda kept: dense_graph(kept, Canvas(SIDE, SIDE))):
        with pytest.raises(DistillError, match=r"data\.resize=square"):
            make(detector)
