"""Every recipe of a paper's pair has the paper's pair, schedule and weights.

The values are retyped from the sources that each block names, never from the recipes. Where a source is silent and the
value is ours, the block says so.
"""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import DictConfig

from distill.cli.config import compose, instantiate
from distill.cli.config.auto_values import auto_keys
from distill.cli.config.override_checks import compose_without_run
from distill.cli.runs.preflight import plan_teacher
from distill.cli.runs.shared_run import compose_run
from distill.cli.runs.teacher_cache import teacher_overrides
from helpers.detectors import FAMILIES, QUERY_FAMILIES, random_detector


class Recipe(NamedTuple):
    """`student`, `teacher`: family and backbone; `rate` for a total batch of `batch`; `milestones`: epochs of drops."""

    student: str
    teacher: str
    rate: float
    batch: int
    milestones: tuple[float, ...]
    epochs: int
    weights: dict[str, float]


def weights(loss: str, **terms: float) -> dict[str, float]:
    """``neck_all=1`` -> ``{"LOSS/neck.all": 1}``."""
    return {f"{loss}/{term.replace('_', '.', 1)}": weight for term, weight in terms.items()}


# DeFeat, arXiv 2103.14475: 0.04 (Faster R-CNN) and 0.02 (RetinaNet) on 8 x 4 images, 12 epochs, drops at 8 and 11;
# weights 4 and 16, proposals 0.05 and 2 (table 5). VOC as in its released configuration: 0.01 on 2 x 8 images, one drop
# after 9 of 12 epochs; weights 3 and 12.
COCO = {"rate": 0.04, "batch": 32, "milestones": (8, 11), "epochs": 12}
COCO_ONE_STAGE = {**COCO, "rate": 0.02}
VOC = {"rate": 0.01, "batch": 16, "milestones": (9,), "epochs": 12}
NECK, NECK_VOC = (weights("defeat", neck_foreground=f, neck_background=b) for f, b in ((4, 16), (3, 12)))
FULL = NECK | weights("defeat", proposals_positive=0.05, proposals_negative=2)
DEFEAT = {
    "defeat_coco_frcnn_r152_r50": Recipe("frcnn r50", "frcnn r152", **COCO, weights=FULL),
    "defeat_coco_frcnn_r50_quarter": Recipe("frcnn r50 x0.25", "frcnn r50", **COCO, weights=FULL),
    "defeat_coco_retinanet_r152_r50": Recipe("retinanet r50", "retinanet r152", **COCO_ONE_STAGE, weights=NECK),
    "defeat_voc_frcnn_r101_r50": Recipe("frcnn r50", "frcnn r101", **VOC, weights=NECK_VOC),
    "defeat_voc_frcnn_r152_r50": Recipe("frcnn r50", "frcnn r152", **VOC, weights=NECK_VOC),
}

# FGFI (arXiv 1906.03609) as DeFeat reran it, with DeFeat's schedule; weight 4 on COCO (the paper's weight of objects),
# 3 on VOC (released).
# PAD (arXiv 2008.01458) keeps the weights of what it wraps.
FGFI = {
    "fgfi_coco_frcnn_r101_r50": Recipe("frcnn r50", "frcnn r101", **COCO, weights=weights("fgfi", neck_foreground=4)),
    "fgfi_coco_frcnn_r152_r50": Recipe("frcnn r50", "frcnn r152", **COCO, weights=weights("fgfi", neck_foreground=4)),
    "fgfi_coco_frcnn_r50_quarter": Recipe(
        "frcnn r50 x0.25", "frcnn r50", **COCO, weights=weights("fgfi", neck_foreground=4)
    ),
    "fgfi_coco_retinanet_r152_r50": Recipe(
        "retinanet r50", "retinanet r152", **COCO_ONE_STAGE, weights=weights("fgfi", neck_foreground=4)
    ),
    "fgfi_voc_frcnn_r101_r50": Recipe("frcnn r50", "frcnn r101", **VOC, weights=weights("fgfi", neck_foreground=3)),
    "fgfi_voc_frcnn_r152_r50": Recipe("frcnn r50", "frcnn r152", **VOC, weights=weights("fgfi", neck_foreground=3)),
    "fgfi_voc_frcnn_r101_r50_pad": Recipe(
        "frcnn r50", "frcnn r101", **VOC, weights=weights("pad_fgfi", neck_foreground=3)
    ),
}

# Mimic on the whole neck (DeFeat's table 3) and TADF-style (arXiv 2006.13108; DeFeat's tables 2 and 3), with DeFeat's
# schedule.
# The weights are ours, none is published: DeFeat's 3 of objects; FGFI's 0.01 for the same sum, and 10 and 1.
MIMIC = {
    "mimic_voc_frcnn_r101_r50": Recipe("frcnn r50", "frcnn r101", **VOC, weights=weights("mimic", neck_all=3)),
    "mimic_voc_frcnn_r101_r50_pad": Recipe("frcnn r50", "frcnn r101", **VOC, weights=weights("pad_mimic", neck_all=3)),
}
STYLE = weights("tadf", neck_foreground=0.01, head_classification=10, head_regression=1)
TADF = {
    "tadf_coco_frcnn_r152_r50": Recipe("frcnn r50", "frcnn r152", **COCO, weights=STYLE),
    "tadf_voc_frcnn_r152_r50": Recipe("frcnn r50", "frcnn r152", **VOC, weights=STYLE),
}

# DSIG, arXiv 2109.12862, as released: 0.01 (Faster R-CNN) and 0.005 (RetinaNet) on 4 x 2 images, drops after 120k and
# 160k of 180k steps, which are 12 epochs here; weights per pair. Mask R-CNN has no released configuration and uses the
# one of Faster R-CNN.
STEPS = {"milestones": (round(12 * 120 / 180, 2), round(12 * 160 / 180, 2)), "epochs": 12}
TWO_STAGE, ONE_STAGE = {"rate": 0.01, "batch": 8, **STEPS}, {"rate": 0.005, "batch": 8, **STEPS}
BIGGEST = weights("dsig", nodes_foreground=0.5, edges_all=1)
BIG = BIGGEST | weights("dsig", nodes_background=0.5)
SMALL = BIG | weights("dsig", neck_all=0.5, edges_all=2, logits_classes=3, logits_boxes=1)
DENSE = weights("dsig", nodes_predicted=0.5, edges_all=1, neck_all=0.5)
DSIG = {
    "dsig_coco_frcnn_r50_r18": Recipe("frcnn r18", "frcnn r50", **TWO_STAGE, weights=SMALL),
    "dsig_coco_frcnn_r50_mnv2": Recipe("frcnn mobilenet_v2", "frcnn r50", **TWO_STAGE, weights=SMALL),
    "dsig_coco_frcnn_r101_eb0": Recipe("frcnn efficientnet_b0", "frcnn r101", **TWO_STAGE, weights=SMALL),
    "dsig_coco_frcnn_r101_r50": Recipe("frcnn r50", "frcnn r101", **TWO_STAGE, weights=BIG),
    "dsig_coco_frcnn_r152_r101": Recipe("frcnn r101", "frcnn r152", **TWO_STAGE, weights=BIGGEST),
    "dsig_coco_mask_rcnn_r50_r18": Recipe("mask_rcnn r18", "mask_rcnn r50", **TWO_STAGE, weights=SMALL),
    "dsig_coco_retinanet_r50_r18": Recipe(
        "retinanet r18",
        "retinanet r50",
        **ONE_STAGE,
        weights=DENSE | weights("dsig", logits_classes=1, logits_boxes=1),
    ),
    "dsig_coco_retinanet_r50_mnv2": Recipe("retinanet mobilenet_v2", "retinanet r50", **ONE_STAGE, weights=DENSE),
    "dsig_coco_retinanet_r101_eb0": Recipe("retinanet efficientnet_b0", "retinanet r101", **ONE_STAGE, weights=DENSE),
}

# SSIM, arXiv 2211.13133: lambda 4 (2 or 4 are best). The paper gives no schedule, so the recipes use the detectors' 1x
# defaults: 0.02 (Faster R-CNN) and 0.01 (RetinaNet) on 8 x 2 images. The teacher of the second recipe is a Cascade
# R-CNN in the paper; here it is the nearest available detector.
DEFAULTS = {"batch": 16, "milestones": (8, 11), "epochs": 12, "weights": weights("ssim", neck_foreground=4)}
SSIM = {
    "ssim_coco_retinanet_r101_r50": Recipe("retinanet r50", "retinanet r101", rate=0.01, **DEFAULTS),
    "ssim_coco_frcnn_x101_r50": Recipe("frcnn r50", "frcnn resnext101_64x4d", rate=0.02, **DEFAULTS),
}

# The 2x schedule of MMDetection: 0.02 (Faster R-CNN) and 0.01 (RetinaNet) on 8 x 2 images, drops at 16 and 22 of 24
# epochs. Weights as released: PKD 10 (arXiv 2207.02039), CWD 5 (mmdetection-distiller), MGD 2e-5 (arXiv 2205.01529),
# FGD 1e-3, 5e-4, 5e-4, 5e-6 (arXiv 2111.11837, its code), CrossKD 1 and 1 (arXiv 2306.11369), FRS 0.005 and 0.02 (arXiv
# 2111.00674), DIST 1 and 1 with mimic 1 (arXiv 2205.10536), FBKD as in MMRazor, MasKD 1 (arXiv 2205.14589; the weights
# of its tokens are ours).
TWICE = {"batch": 16, "milestones": (16, 22), "epochs": 24}
RETINANET = partial(Recipe, "retinanet r50", rate=0.01, **TWICE)
FASTER = partial(Recipe, "frcnn r50", "frcnn r101", rate=0.02, **TWICE)
X101, R101 = "retinanet resnext101_64x4d", "retinanet r101"
FOCAL = weights("fgd", neck_foreground=1e-3, neck_background=5e-4, neck_attention=5e-4, neck_relation=5e-6)
FEATURES = weights("fbkd", neck_attended=7e-5, neck_channels=4e-3, neck_cells=4e-3, neck_relation=7e-5)
MODERN = {
    "pkd_coco_retinanet_x101_r50": RETINANET(X101, weights=weights("pkd", neck_all=10)),
    "cwd_coco_retinanet_x101_r50": RETINANET(X101, weights=weights("cwd", neck_all=5)),
    "mgd_coco_retinanet_x101_r50": RETINANET(X101, weights=weights("mgd", neck_all=2e-5)),
    "fgd_coco_retinanet_x101_r50": RETINANET(X101, weights=FOCAL),
    "dist_coco_retinanet_x101_r50": RETINANET(
        X101, weights=weights("dist", classes_inter=1, classes_intra=1) | weights("hint", neck_all=1)
    ),
    "crosskd_coco_retinanet_r101_r50": RETINANET(R101, weights=weights("crosskd", heads_classes=1, heads_boxes=1)),
    "frs_coco_retinanet_r101_r50": RETINANET(R101, weights=weights("frs", neck_features=0.005, logits_classes=0.02)),
    "fbkd_coco_frcnn_r101_r50": FASTER(weights=FEATURES),
    "maskd_coco_frcnn_r101_r50": FASTER(weights=weights("maskd", neck_all=1, tokens_task=1, tokens_diversity=1)),
}

# RT-DETRv2's released configurations: AdamW with 1e-4 on 16 images, a constant rate, 72 epochs, for ResNet-18 120, of
# which the last and the last three have no augmentation; a tenth of the rate for the backbone, except for ResNet-18.
# Those of D-FINE: N 8e-4 on 128 images, 160 epochs, from 148 on without augmentation; S 2e-4 on 32, 132, 120; half the
# rate for the backbone. Weights: DETRDistill (arXiv 2211.10156) 1, 5, 2 and 1; KD-DETR (arXiv 2211.08071) 2, 5, 2, from
# memory; DDF 1.5 (arXiv 2410.13842); RT-DETRv4 5 at the start (arXiv 2510.25257); PKD 6 for Faster R-CNN (arXiv
# 2207.02039).
SMALL_RTDETR = partial(Recipe, "rtdetr resnet_d18", rate=1e-4, batch=16, milestones=(117,), epochs=120)
MATCHED = weights("detr_logits", queries_classes=1, queries_l1=5, queries_giou=2)
QUERIES = {
    "detr_logits_coco_rtdetr_r101_r18": SMALL_RTDETR("rtdetr resnet_d101", weights=MATCHED),
    "detr_points_coco_rtdetr_r50_r18": SMALL_RTDETR(
        "rtdetr resnet_d50", weights=weights("detr_points", points_classes=2, points_l1=5, points_giou=2)
    ),
    "detr_features_coco_rtdetr_r50_r18": SMALL_RTDETR(
        "rtdetr resnet_d50", weights=weights("detr_features", neck_features=1)
    ),
    "detr_logits_coco_dfine_x_n": Recipe("dfine hgnet_b0", "dfine hgnet_b5", 8e-4, 128, (148,), 160, MATCHED),
    "detr_corners_coco_dfine_l_s": Recipe(
        *("dfine hgnet_b0", "dfine hgnet_b4", 2e-4, 32, (120,), 132), weights("detr_corners", corners_divergence=1.5)
    ),
    "foundation_coco_dfine_s": Recipe(
        *("dfine hgnet_b0", "", 2e-4, 32, (120,), 132), weights("foundation", neck_cosine=5)
    ),
    "pkd_coco_frcnn_r101_rtdetr_r18": SMALL_RTDETR("frcnn r101", weights=weights("pkd", neck_all=6)),
}
"""`milestones` has the first epoch without augmentation, because the rate is constant."""

RECIPES = MODERN | DEFEAT | FGFI | MIMIC | TADF | DSIG | SSIM | QUERIES
PREFIXES = {family.detector.__name__: family.options for family in FAMILIES.values()}
PREFIXES |= {row.detector.__name__: family for family, row in QUERY_FAMILIES.items()}


def name(model: DictConfig) -> str:
    backbone = model.backbone
    width = "" if backbone.width == 1 else f" x{backbone.width:g}"
    body = f"r{backbone.depth}" if backbone.name == "resnet" else f"{backbone.name}{backbone.depth or ''}"
    return f"{PREFIXES[model._target_.rpartition('.')[2]]} {body}{width}"


def processes(experiment: str) -> int:
    """As many as the header's command starts; 8 where it takes all GPUs of a machine."""
    header = (compose.config_folder() / "experiment" / f"{experiment}.yaml").read_text().split("\ndefaults:")[0]
    found = re.search(r"trainer=ddp(?: trainer\.devices=(\d+))?", header)
    assert found, "the header's command starts no processes"
    return int(found[1] or 8)


@cache
def composed(experiment: str) -> DictConfig:
    return compose.compose_config([f"experiment={experiment}", "paths.run=x"])


@cache
def spec(family: str) -> Any:
    return random_detector(family).spec


def planned_spec(model: DictConfig) -> Any:
    with torch.device("meta"):
        return instantiate.build_node(model, classes=["cat", "dog"], **instantiate.without_weights(model)).spec


def terms(cfg: DictConfig) -> dict[str, float]:
    """``LOSS/term`` -> weight, of the losses as they are built."""
    families = {"frcnn": "faster_rcnn", "mask_rcnn": "faster_rcnn", "retinanet": "retinanet"}
    if family := families.get(name(cfg.model).split()[0]):
        given = {"student": spec(family), "teacher": spec(family)}
    else:  # their losses look at strides and bins, in which the models of a family differ
        models = {"student": cfg.model, "teacher": cfg.teacher.get("model")}
        given = {role: model and planned_spec(model) for role, model in models.items()}
        if foundation := cfg.distill.losses.get("foundation"):
            assert foundation.model.name == "vit_base_patch16_dinov3.lvd1689m"
            foundation.model.update({"name": "test_vit.r160_in1k", "weights": "random"})
    losses = {key: instantiate.build_node(node, **given) for key, node in cfg.distill.losses.items()}
    return {f"{key}/{term}": weight for key, loss in losses.items() for term, weight in loss.weights.items()}


def test_no_recipe_is_left_out() -> None:
    assert set(RECIPES) == set(compose.config_groups()["experiment"]) - {"bccd", "demo"}


@pytest.mark.parametrize("experiment", QUERIES)
def test_a_recipe_of_queries_is_what_its_source_says(experiment: str) -> None:
    pytest.importorskip("transformers", reason="the extra detr is not installed")
    if experiment.startswith("foundation"):
        pytest.importorskip("timm", reason="the vision transformers are timm's")
    cfg = composed(experiment)
    schedule, batch = cfg.schedule, cfg.data.batch_size * processes(experiment)
    assert (schedule.shape, schedule.accumulate, schedule.clip, schedule.decay_norms) == ("constant", 1, 0.1, False)
    assert schedule.optimizer._target_ == "torch.optim.AdamW"
    teacher = cfg.teacher.get("model")
    assert RECIPES[experiment] == Recipe(
        name(cfg.model),
        name(teacher) if teacher else "",
        pytest.approx(schedule.optimizer.lr * batch / schedule.base_batch),
        batch,
        (cfg.data.augment.stop_epoch,),
        schedule.epochs,
        terms(cfg),
    )
    own_rate = {"rtdetr resnet_d18": 1.0, "rtdetr resnet_d50": 0.1}.get(name(cfg.model), 0.5)
    assert (schedule.backbone_rate, cfg.callbacks.ema.decay) == (own_rate, 0.9999)
    assert (cfg.data.min_size, cfg.data.max_size, cfg.data.resize) == (640, 640, "square")
    assert auto_keys(cfg) == []


@pytest.mark.parametrize("experiment", [name for name in RECIPES if name not in QUERIES])
def test_a_recipe_is_what_its_source_says(experiment: str) -> None:
    cfg = composed(experiment)
    schedule, batch = cfg.schedule, cfg.data.batch_size * processes(experiment)
    assert (schedule.shape, schedule.gamma, schedule.accumulate) == ("step", 0.1, 1)
    assert RECIPES[experiment] == Recipe(
        name(cfg.model),
        name(cfg.teacher.model),
        pytest.approx(schedule.optimizer.lr * batch / schedule.base_batch),
        batch,
        tuple(schedule.milestones),
        schedule.epochs,
        terms(cfg),
    )
    sizes = (600, 1000) if "_voc_" in experiment else (800, 1333)
    if experiment in DSIG:  # Detectron2's multi-scale training
        sizes = ([640, 672, 704, 736, 768, 800], 1333)
    assert (cfg.data.min_size, cfg.data.max_size) == sizes
    assert auto_keys(cfg) == []  # nothing of a recipe depends on the data


@pytest.mark.parametrize("experiment", [name for name in DSIG | SSIM | MODERN if "_retinanet_" in name])
def test_a_retinanet_of_another_framework_has_its_p6(experiment: str) -> None:
    """Detectron2 and MMDetection make it from C5, torchvision's first RetinaNet from P5."""
    cfg = composed(experiment)
    assert (cfg.model.p6_from, cfg.teacher.model.p6_from) == ("c5", "c5")


def test_a_teacher_with_anchors_trains_by_its_own_recipe() -> None:
    """RT-DETR's optimizer, average and augmentation are not those of a Faster R-CNN, but its squares are."""
    options = plan_teacher(compose_without_run(["experiment=pkd_coco_frcnn_r101_rtdetr_r18", "data.source.root=x"]))
    assert options
    cfg = compose_run(teacher_overrides(options), "teacher")
    schedule = cfg.schedule
    assert (schedule.optimizer._target_, schedule.optimizer.lr, schedule.base_batch) == ("torch.optim.SGD", 0.02, 16)
    assert (schedule.shape, list(schedule.milestones), schedule.epochs) == ("step", [16, 22], 24)
    assert (schedule.clip, schedule.backbone_rate, cfg.callbacks.ema) == (None, 1.0, None)
    assert (cfg.data.resize, cfg.data.photometric, cfg.data.augment.zoom_out, cfg.data.augment.iou_crop) == (
        *("square", False, 0, 0),
    )


@pytest.mark.parametrize("experiment", ["defeat_coco_frcnn_r152_r50", "defeat_coco_frcnn_r50_quarter"])
def test_proposals_have_the_paper_s_temperatures(experiment: str) -> None:
    """Table 5 of DeFeat: 3 for objects, 1 for background."""
    proposals = composed(experiment).distill.losses.defeat.proposals
    assert (proposals.temperature_positive, proposals.temperature_negative) == (3, 1)
