"""RF-DETR: its groups of queries, its own losses, its sizes, and what is refused.

What holds for all families with queries is in ``test_query_views.py`` and the other tests over `QUERY_FAMILIES`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cli.config import compose, instantiate
from distill.types import DistillError
from helpers.detectors import QUERY_FAMILIES, query_detector, square_batch

pytest.importorskip("transformers", reason="the extra detr is not installed")

SQUARE = ((128, 128),) * 3
rfdetr = partial(query_detector, "rfdetr")


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


def test_a_view_for_evaluation_has_one_group_and_changes_no_mode() -> None:
    detector = rfdetr()
    view = detector.view(square_batch(SQUARE), training=False, frozen=True)
    assert [layer.logits.shape for layer in view._layers] == [(3, 20, 3)] * 3
    assert all(module.training for module in detector.net.modules())
    assert {stride: x.shape[1:] for stride, x in view.body.items()} == {16: (64, 8, 8)}


def test_fresh_cells_have_scores_of_one_percent_and_do_not_move_their_boxes() -> None:
    """As fresh queries, of all groups. transformers 5.18 to 5.21 start them with scores of 50 % and random boxes."""
    torch.manual_seed(0)
    row = QUERY_FAMILIES["rfdetr"]
    detector: Any = row.detector(["cat", "dog", "owl"], **row.small)
    view = detector.view(square_batch(SQUARE))
    logits = torch.cat([view.encoded.logits, *(layer.logits for layer in view._layers)], dim=1)
    assert logits.shape[1] == 4 * 3 * 20
    assert logits.sigmoid().mean(dim=(0, 1)).tolist() == pytest.approx([0.01] * 3, rel=0.3)
    assert torch.cdist(view.encoded.boxes, view._proposals[1], p=1).amin(dim=2).max() < 1e-6


def test_operations_can_be_counted() -> None:
    """Trained queries are inputs of the decoder. As views of weights without a history they broke torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert rfdetr().eval().view(square_batch(SQUARE), training=False).detections
    assert counter.get_total_flops() > 1e6


def test_classes_of_a_folder_of_transformers_are_matched_by_name(tmp_path: Path) -> None:
    first = rfdetr(seed=3)
    first.net.config.id2label = {0: "owl", 1: "cat", 2: "dog"}
    first.net.config.label2id = {"owl": 0, "cat": 1, "dog": 2}
    first.net.save_pretrained(tmp_path)
    loaded = rfdetr(weights=str(tmp_path))
    data = square_batch(SQUARE)
    expected, found = (x.eval().view(data, training=False, frozen=True).queries[-1] for x in (first, loaded))
    assert torch.equal(found.boxes, expected.boxes)
    torch.testing.assert_close(found.logits, expected.logits[..., [1, 2, 0]], rtol=0, atol=1e-6)
    assert rfdetr(classes=None, weights=str(tmp_path)).classes == ("owl", "cat", "dog")
    with pytest.raises(DistillError, match=r"model\.windows=2.*model\.self_heads=4"):
        rfdetr(weights=str(tmp_path), windows=1, self_heads=2)


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
        ({"queries": 0, "decoder_layers": 0}, r"decoder_layers=0, queries=0: expected numbers from 1 on"),
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
