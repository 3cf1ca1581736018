"""RF-DETR: equal to transformers bit for bit, groups that see nothing of each other, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cli.config import compose, instantiate
from distill.detectors.registry import load_detector
from distill.detectors.rfdetr import RFDETR
from distill.detectors.student_files import save_safetensors, save_student
from distill.types import DistillError, Target
from helpers.detectors import (
    SMALL_RFDETR,
    assert_order_changes_nothing,
    assert_same,
    gradients,
    query_detector,
    square_batch,
)

pytest.importorskip("transformers", reason="the extra detr is not installed")

SQUARE = ((128, 128),) * 3


def rfdetr(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    detector = RFDETR(["cat", "dog", "owl"], **{**SMALL_RFDETR, **options})
    with torch.no_grad():  # fresh box heads are 0, and all boxes those of their cells
        for head in (detector.net.bbox_embed, *detector.net.model.enc_out_bbox_embed):
            head.layers[-1].weight.normal_(std=0.05)
    return detector


@pytest.mark.parametrize("sizes", [SQUARE, ((96, 96),) * 3], ids=["codes-as-trained", "interpolated"])
def test_losses_and_gradients_equal_the_librarys_bit_for_bit(sizes: Any) -> None:
    """In training mode, with all groups and with dropout."""
    detector, data = rfdetr(criterion="library", dropout=0.1), square_batch(sizes)
    reference = copy.deepcopy(detector.net)
    torch.manual_seed(7)
    view = detector.view(data)
    total = sum(view.library_terms.values())
    total.backward()
    torch.manual_seed(7)
    expected = reference(view.images, labels=view.labels)
    expected.loss.backward()
    assert torch.equal(total, expected.loss)
    assert set(view.library_terms) == {name for name in expected.loss_dict if not name.startswith("cardinality")}
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert_same(gradients(detector), theirs)
    assert len(theirs) > 100
    assert torch.isclose(sum(view.losses.values()), expected.loss, rtol=1e-6)


def test_detections_equal_the_librarys_bit_for_bit() -> None:
    from transformers import RfDetrImageProcessor

    detector, data = rfdetr(detections_per_img=20).eval(), square_batch(SQUARE)
    view = detector.view(data, training=False, frozen=True)
    with torch.no_grad():
        outputs = detector.net(view.images)
    sizes = torch.tensor(data.original_sizes)
    expected = RfDetrImageProcessor().post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    for actual, other in zip(view.detections, expected, strict=True):
        assert len(actual.boxes) == 20
        assert torch.equal(actual.boxes, other["boxes"])
        assert torch.equal(actual.scores, other["scores"])
        assert torch.equal(actual.labels - 1, other["labels"])
    assert view.class_logits[16].shape == (3, 3, 8, 8)


def test_the_own_losses_are_the_librarys_up_to_rounding() -> None:
    """On one process. The matching's logarithms differ by 1e-8."""
    detector, data = rfdetr(), square_batch(SQUARE)
    library = rfdetr(criterion="library")
    library.load_state_dict(detector.state_dict())
    own, theirs = (x.view(data).losses for x in (detector, library))
    assert list(own) == list(theirs) == ["classification", "l1", "giou"]
    for name, value in own.items():
        assert value.item() == pytest.approx(theirs[name].item(), rel=1e-4), name


def test_groups_see_nothing_of_each_other() -> None:
    """The first group's queries are those without any other group, and the losses are the mean over the groups."""
    detector, data = rfdetr(), square_batch(SQUARE)
    training, alone = detector.view(data), detector.view(data, training=False)
    for x, y in zip(training.queries, alone.queries, strict=True):
        torch.testing.assert_close(x.logits, y.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(x.boxes, y.boxes, rtol=0, atol=1e-5)
    assert [len(x) for x in training.query_targets] == [3, 3, 3]
    _ = training.losses
    counts = [[len(objects) for _, objects in layer] for layer in training.query_targets]
    assert counts == [[3, 0, 3]] * 3
    assert {int(queries.max()) < 20 for layer in training.query_targets for queries, _ in layer if len(queries)} == {
        True
    }
    model = detector.net.model
    with torch.no_grad():  # all groups are copies of the first one
        for parts in (model.enc_output, model.enc_output_norm, model.enc_out_bbox_embed, model.enc_out_class_embed):
            for part in parts[1:]:
                part.load_state_dict(parts[0].state_dict())
        for table in (model.reference_point_embed, model.query_feat):
            table.weight.copy_(table.weight[:20].repeat(3, 1))
    for name, value in detector.view(data).losses.items():
        torch.testing.assert_close(value, detector.view(data, training=False).losses[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("criterion", ["own", "library"])
@pytest.mark.parametrize("boxes", [True, False])
def test_every_parameter_and_layer_gets_a_gradient(criterion: str, boxes: bool) -> None:
    detector, data = rfdetr(criterion=criterion), square_batch(SQUARE)
    if not boxes:
        data = replace(data, targets=tuple(Target(x.boxes[:0], x.labels[:0]) for x in data.targets))
    view = detector.view(data)
    layers = view._layers
    for layer in layers:
        layer.logits.retain_grad()
        layer.boxes.retain_grad()
    losses = view.losses
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert not [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    if boxes and criterion == "own":
        assert all(layer.logits.grad.abs().sum() > 0 and layer.boxes.grad.abs().sum() > 0 for layer in layers)


def test_reading_order_changes_nothing() -> None:
    assert_order_changes_nothing(rfdetr(dropout=0.1), square_batch(SQUARE))


def test_a_frozen_view_gives_every_layer_and_changes_no_mode() -> None:
    detector, data = rfdetr(), square_batch(SQUARE)
    view = detector.view(data, training=False, frozen=True)
    assert len(view.queries) == 3
    assert not any(x.requires_grad for layer in view.queries for x in layer if x is not None)
    assert all(module.training for module in detector.net.modules())
    assert view.roi_features([target.boxes for target in data.targets]).shape == (6, 32, 7, 7)
    assert {stride: x.shape[1:] for stride, x in view.body.items()} == {16: (64, 8, 8)}
    with pytest.raises(DistillError, match=r"rfdetr, which has no query_points|query_points"):
        _ = view.query_points


def test_operations_can_be_counted() -> None:
    """Trained queries are inputs of the decoder. As views of weights without a history they broke torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert rfdetr().eval().view(square_batch(SQUARE), training=False).detections
    assert counter.get_total_flops() > 1e6


def test_boxes_are_float32_in_bfloat16() -> None:
    from distill.teacher import Teacher

    detector, data = rfdetr(), square_batch(SQUARE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view = detector.view(data)
        losses = view.losses
    assert {x.dtype for layer in view.queries for x in layer if x is not None} == {torch.float32}
    assert all(value.isfinite() for value in losses.values())
    rounded = Teacher(detector, dtype="bfloat16").view(data)
    assert rounded.neck[16].dtype == torch.bfloat16
    assert rounded.queries[-1].boxes.dtype == torch.float32


@pytest.mark.parametrize(
    "option", ["detr_logits", "detr_features", "detr_assignment", "pkd", "cwd", "fgd", "detr_points"]
)
def test_it_teaches_and_learns_from_another_family(option: str) -> None:
    """On the shared map of stride 16. Its decoder cannot start from foreign points, so `detr_points` refuses it."""
    pair = rfdetr(neck_channels=64).train(), query_detector("rtdetr", 1, neck_channels=64, decoder_channels=64)
    data, nodes = square_batch(SQUARE), compose.compose_config([f"distill={option}", "hydra.run.dir=."]).distill.losses
    for student, teacher in (pair, pair[::-1]):

        def build(student: Any = student, teacher: Any = teacher) -> list[Any]:
            specs = {"student": student.spec, "teacher": teacher.spec}
            return [instantiate.build_node(node, **specs) for node in nodes.values()]

        if option in ("detr_points", "detr_assignment"):
            with pytest.raises(DistillError, match="rfdetr"):
                build()
            continue
        views = student.view(data, seed=1), teacher.view(data, frozen=True, seed=2)
        terms = [term for loss in build() for term in loss(*views).values()]
        assert terms
        sum(terms).backward()
        assert all(term.isfinite() for term in terms)
        assert any(p.grad is not None and p.grad.any() for p in student.body.parameters())


@pytest.mark.parametrize("save", [save_student, save_safetensors])
def test_a_saved_detector_is_the_same(save: Any, tmp_path: Path) -> None:
    first = rfdetr(seed=3)
    save(first, tmp_path)
    again = load_detector(tmp_path)
    assert again.options == first.options
    assert again.resize.shape == "square"
    assert_same(dict(again.state_dict()), dict(first.state_dict()))


def test_a_folder_of_transformers_is_loaded(tmp_path: Path) -> None:
    first = rfdetr(seed=3)
    first.net.config.id2label = {0: "owl", 1: "cat", 2: "dog"}
    first.net.config.label2id = {"owl": 0, "cat": 1, "dog": 2}
    first.net.save_pretrained(tmp_path)
    loaded = RFDETR(["cat", "dog", "owl"], **{**SMALL_RFDETR, "weights": str(tmp_path)})
    data = square_batch(SQUARE)
    expected, found = (x.eval().view(data, training=False, frozen=True).queries[-1] for x in (first, loaded))
    assert torch.equal(found.boxes, expected.boxes)
    torch.testing.assert_close(found.logits, expected.logits[..., [1, 2, 0]], rtol=0, atol=1e-6)
    assert RFDETR(**{**SMALL_RFDETR, "weights": str(tmp_path)}).classes == ("owl", "cat", "dog")
    with pytest.raises(DistillError, match=r"model\.windows=2.*model\.self_heads=4"):
        RFDETR(["cat", "dog", "owl"], **{**SMALL_RFDETR, "weights": str(tmp_path), "windows": 1, "self_heads": 2})


@pytest.mark.parametrize(("name", "millions"), [("rfdetr_nano", 30.5), ("rfdetr_small", 32.1), ("rfdetr_medium", 33.7)])
def test_sizes_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    """The published table, in millions, for the 91 outputs of COCO."""
    node = compose.compose_config([f"model={name}", "distill=none", "hydra.run.dir=."]).model
    with torch.device("meta"):
        detector = instantiate.build_node(node, classes=[f"class {index}" for index in range(91)])
    assert round(detector.parameters_count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": {"name": "resnet_d"}}, r"backbone\.name: expected dinov2"),
        ({"backbone": {"name": "dinov2", "depth": 6}}, r"backbone\.depth.*multiple of 4"),
        ({"backbone": {"name": "dinov2", "depth": 4, "norm": "frozen"}}, r"backbone\.norm"),
        ({"min_size": 144}, r"min_size, max_size: expected multiples of 32 pixels.*144 and 128"),
        ({"self_heads": 5}, r"neck_channels: expected a multiple of 4, of self_heads=5"),
        ({"groups": 0}, r"groups=0: expected numbers from 1 on"),
        ({"criterion": "both"}, r"criterion: expected own or library"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        rfdetr(**options)


def test_images_that_do_not_fit_are_refused() -> None:
    """The library mixes up rows and columns of windows in images that are not square."""
    detector = rfdetr()
    for size in ((96, 128), (112, 112)):
        with pytest.raises(DistillError, match=r"expected square images whose sides are multiples of 32"):
            _ = detector.view(square_batch((size,))).neck
    with pytest.raises(DistillError, match=r"64 cells of stride 16.*model\.queries=64"):
        _ = rfdetr(queries=100).view(square_batch(SQUARE)).queries


@pytest.mark.exhaustive
def test_one_batch_can_be_learned_by_heart() -> None:
    from torchvision.ops import box_iou

    detector, data = rfdetr(), square_batch(SQUARE[:2])
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        sum(detector.view(data).losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
    found, truth = detector.view(data).predictions(top=3)[0], data.targets[0]
    best = box_iou(truth.boxes, found.boxes).max(dim=1)
    assert best.values.min() > 0.7
    assert torch.equal(found.labels[best.indices], truth.labels)
