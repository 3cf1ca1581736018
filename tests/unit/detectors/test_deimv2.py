"""DEIMv2: its sizes, its two encoders, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.cli.config import compose, instantiate
from distill.detectors import set_prediction
from distill.detectors.deimv2 import DEIMv2
from distill.types import DistillError
from helpers.detectors import query_detector, square_batch

pytest.importorskip("transformers", reason="the extra detr is not installed")

LITE = {"backbone": {"name": "hgnet_atto", "width": 0.25}, "encoder": "lite"}
COCO = [f"class {index}" for index in range(80)]


def option(name: str) -> Any:
    """The detector of an option of the group ``model``, without memory for its weights."""
    node = compose.compose_config([f"model={name}", "distill=none", "hydra.run.dir=."]).model
    with torch.device("meta"):
        return instantiate.build_node(node, classes=COCO)


@pytest.mark.parametrize(
    ("name", "millions", "queries"),
    [("deimv2_n", 3.6, 300), ("deimv2_pico", 1.5, 200), ("deimv2_femto", 1.0, 150), ("deimv2_atto", 0.5, 100)],
)
def test_sizes_have_the_published_number_of_parameters(name: str, millions: float, queries: int) -> None:
    """The table of the released models has millions of parameters with one digit, for the 80 classes of COCO."""
    detector = option(name)
    assert detector.parameters_count / 1e6 == pytest.approx(millions, abs=0.06)
    assert detector.net.config.num_queries == queries
    assert list(detector.spec.neck) == [16, 32]


def test_the_lite_encoder_reads_one_map_and_makes_two() -> None:
    detector = query_detector("deimv2", **LITE)
    assert detector.spec.body == {4: 16, 8: 64, 16: 64}
    view: Any = detector.view(square_batch())
    assert {stride: x.shape[1:] for stride, x in view.neck.items()} == {16: (32, 6, 8), 32: (32, 3, 4)}
    assert {stride: tuple(x.shape[2:]) for stride, x in view.body.items()} == {4: (24, 32), 8: (12, 16), 16: (6, 8)}
    sum(view.losses.values()).backward()
    assert not [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(("trained", "stages"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4)])
def test_stages_are_counted_from_c5_also_without_one(trained: int, stages: int) -> None:
    """The lite backbones have a stem and three stages."""
    detector = query_detector("deimv2", **{**LITE, "backbone": {**LITE["backbone"], "trainable_stages": trained}})
    body = detector.body
    parts = [body.embedder, *body.encoder.stages]
    assert [all(p.requires_grad for p in part.parameters()) for part in parts] == [False] * (4 - stages) + [
        True
    ] * stages


def test_without_corner_losses_fgl_and_ddf_are_missing_and_matches_are_not_united() -> None:
    torch.manual_seed(0)
    names = [list(query_detector("deimv2", corner_losses=on).view(square_batch()).losses) for on in (True, False)]
    assert names == [["classification", "l1", "giou", "fgl", "ddf"], ["classification", "l1", "giou"]]
    plain = query_detector("deimv2", corner_losses=False)
    assert not plain.set_criterion.union
    assert plain.spec.corner_bins == query_detector("deimv2").spec.corner_bins  # it still has the distributions
    library = query_detector("deimv2", corner_losses=False, criterion="library").view(square_batch()).losses
    assert library["fgl"] == library["ddf"] == 0
    assert library["l1"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "none"}, r"encoder: expected hybrid or lite, got 'none'"),
        ({**LITE, "strides": [8, 16, 32]}, r"strides: expected \[16, 32\] with encoder=lite, got \[8, 16, 32\]"),
        ({"encoder": "lite"}, r"expected one of hgnet_pico, hgnet_femto, hgnet_atto, .* stride 16, got 'resnet_d'"),
        ({"backbone": {"name": "hgnet_atto"}}, r"stride 32, got 'hgnet_atto', which ends at stride 16"),
        ({"backbone": {"name": "dinov3_vits16"}}, r"dinov3_vits16 is a vision transformer.*model=deimv2_n"),
        (
            {"decoder_points": [2, 2, 2]},
            r"decoder_points: expected a number from 1 on, or one for each",
        ),
        ({"bins": 7}, r"bins, bin_curve: expected an even number"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        query_detector("deimv2", **options)


def test_an_old_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    old = SimpleNamespace(
        __version__="5.1.0",
        RTDetrResNetConfig=transformers.RTDetrResNetConfig,
        HGNetV2Config=transformers.HGNetV2Config,
    )
    monkeypatch.setattr(set_prediction, "transformers", lambda: old)
    with pytest.raises(DistillError, match=r"DEIMv2 needs transformers 5\.18 or newer, got 5\.1\.0"):
        DEIMv2(["cat"])
