"""Errors of a detector by kind: TIDE's breakdown of AP50, and Hoiem's shares of the best detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distill.evaluation.matching import Matches, average_precision, counted_objects, image_rows, match, same_label
from distill.evaluation.metric import BoolArray, DetectionArrays, FloatArray, GroundTruth, IntArray

KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
"""TIDE's kinds of errors; its code calls them Cls, Loc, Both, Dupe, Bkg and Miss."""
SHARES = ("correct", "localization", "similar", "other", "background")
"""Hoiem's kinds of detections."""
FOREGROUND, BACKGROUND = 0.5, 0.1
"""IoU from which a detection has found an object, and up to which it overlaps none."""
RECALLS = np.arange(101) / 100


class ErrorBreakdown(NamedTuple):
    """TIDE's errors of one detector."""

    ap50: float
    """AP at an IoU of 0.5, in [0, 1]; -1 without objects."""
    gain: dict[str, float]
    """Kind -> AP50 that is gained if all errors of this kind are repaired, at least 0."""
    counts: dict[str, int]
    """Kind -> number of errors. Detections that are not counted (crowds) are left out."""
    class_ap: dict[str, FloatArray]
    """``none`` and each kind -> AP50 (K,) of every class without errors of this kind; NaN for a class with neither
    objects nor detections."""


def break_down(truth: GroundTruth, detections: DetectionArrays, classes: int) -> ErrorBreakdown:
    """Break the errors of a detector down by kind, and say how much AP50 each kind costs.

    An unmatched detection is, in this order, a **localization** error (IoU from 0.1 to 0.5 with an object of its
    class), a **classification** error (IoU of at least 0.5 with an object of another class), a **duplicate** (IoU of
    at least 0.5 with an object that another detection has found), **background** (IoU of at most 0.1 with all objects),
    or **both** (the rest: an object of another class, badly localized). An object that is neither found nor the target
    of a localization or classification error is **missed**. To repair a kind, its detections are removed; those that
    are the best repairable detection of a free object become true positives; missed objects are no longer expected.

    Source: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, arXiv
    2008.08115; the rules at equality are those of tidecv 1.0.1. As there, a detection inside a crowd may become a true
    positive. Unlike there, classes without objects do not count in the means, so `ap50` is COCO's AP50 if no image has
    more than 100 detections.
    """
    matches = match(truth, detections, FOREGROUND)
    kind, target = _classify(truth, detections, matches)
    repairs = _repairs(truth, detections, kind, target)
    missed = counted_objects(truth) & (matches.detection < 0)
    missed[target[repairs]] = False

    count = {name: int(np.count_nonzero((kind == index) & matches.counted)) for index, name in enumerate(KINDS)}
    count["missed"] = int(missed.sum())
    class_ap = {"none": _class_ap(truth, detections, matches.counted, matches.correct, detections.label, classes)}
    for index, name in enumerate(KINDS):
        fixed = np.zeros(len(kind), dtype=np.bool_)
        fixed[repairs] = kind[repairs] == index
        kept = (matches.counted & (kind != index)) | fixed
        label = detections.label.copy()
        label[fixed] = truth.label[target[fixed]]
        expected = missed if name == "missed" else None
        class_ap[name] = _class_ap(truth, detections, kept, matches.correct | fixed, label, classes, expected)
    means = {name: _mean_over_present(truth, values) for name, values in class_ap.items()}
    ap50 = means.pop("none")
    return ErrorBreakdown(ap50, {name: max(0.0, value - ap50) for name, value in means.items()}, count, class_ap)


def _classify(truth: GroundTruth, detections: DetectionArrays, matches: Matches) -> tuple[IntArray, IntArray]:
    """Kind of each detection as an index of `KINDS`, -1 for a true positive, and the object that it almost found.

    The object is -1 where there is none: only localization and classification errors have one.
    """
    kind, target = np.full(len(detections.score), -1), np.full(len(detections.score), -1)
    for rows in image_rows(truth, detections):
        wrong = matches.matched[rows.detections] < 0
        errors = rows.detections[wrong]
        if not rows.objects.size:
            kind[errors] = KINDS.index("background")
            continue
        same, iou = same_label(truth, detections, rows)[wrong], rows.iou[wrong]
        own, other = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
        found = matches.detection[rows.objects] >= 0
        conditions = [
            (own.max(1) >= BACKGROUND) & (own.max(1) <= FOREGROUND),
            other.max(1) >= FOREGROUND,
            (own * found).max(1) >= FOREGROUND,
            iou.max(1) <= BACKGROUND,
        ]
        names = ("localization", "classification", "duplicate", "background")
        kind[errors] = np.select(conditions, [KINDS.index(name) for name in names], KINDS.index("both"))
        nearest = np.select(conditions[:2], [own.argmax(1), other.argmax(1)], -1)
        free = (nearest >= 0) & ~found[nearest]
        target[errors[free]] = rows.objects[nearest[free]]
    return kind, target


def _repairs(truth: GroundTruth, detections: DetectionArrays, kind: IntArray, target: IntArray) -> IntArray:
    """Rows of the detections that may become true positives: the best one for each free object."""
    rows = np.flatnonzero(target >= 0)
    rows = rows[np.argsort(-detections.score[rows], kind="stable")]
    return rows[np.unique(target[rows], return_index=True)[1]]


def _class_ap(
    truth: GroundTruth,
    detections: DetectionArrays,
    kept: BoolArray,
    correct: BoolArray,
    label: IntArray,
    classes: int,
    not_expected: BoolArray | None = None,
) -> FloatArray:
    """AP50 (K,) of each class from the kept detections; 0 with detections but without objects, NaN with neither."""
    expected = counted_objects(truth) if not_expected is None else counted_objects(truth) & ~not_expected
    order = np.argsort(-detections.score, kind="stable")
    order = order[kept[order]]
    values = np.full(classes, np.nan)
    for index in range(classes):
        hits = correct[order[label[order] == index + 1]]
        positives = int(np.count_nonzero(expected & (truth.label == index + 1)))
        if positives:
            values[index] = average_precision(hits, positives, RECALLS)
        elif hits.size:
            values[index] = 0.0
    return values


def _mean_over_present(truth: GroundTruth, values: FloatArray) -> float:
    """Mean over the classes that have objects, without NaN; -1 without any."""
    present = np.unique(truth.label[counted_objects(truth)]) - 1
    measured = values[present][~np.isnan(values[present])]
    return float(measured.mean()) if measured.size else -1.0


class ClassShares(NamedTuple):
    """Hoiem's shares of one class."""

    detections: int
    """Number of detections that were looked at: the best ones, at most as many as the class has objects."""
    counts: dict[str, int]
    """Kind -> number of detections."""


def hoiem_shares(
    truth: GroundTruth, detections: DetectionArrays, classes: Sequence[str], groups: Sequence[Sequence[str]] = ()
) -> dict[str, ClassShares]:
    """Count the kinds of the N best detections of each class, where N is the number of its objects.

    * **correct**: the detection has found an object (IoU of at least 0.5);
    * **localization**: IoU of at least 0.1 with an object of its class, or a duplicate;
    * **similar**: IoU of at least 0.1 with an object of another class of its group;
    * **other**: IoU of at least 0.1 with an object of any other class;
    * **background**: the rest.

    Source: Hoiem, Chodpathumwan, Dai, "Diagnosing Error in Object Detectors", ECCV 2012, which figures 1 and 7 of
    DeFeat (arXiv 2103.14475) use.

    Args:
        truth, detections: of one data set.
        classes: the K class names.
        groups: groups of similar classes, by name. Names that are not among `classes` have no effect.

    Returns:
        Class name -> shares, for the classes with objects.
    """
    matches = match(truth, detections, FOREGROUND)
    group_of = {name: number for number, names in enumerate(groups) for name in names}
    group = np.array([-1, *(group_of.get(name, -1) for name in classes)])
    kind = np.full(len(detections.score), SHARES.index("background"))
    for rows in image_rows(truth, detections):
        if not rows.objects.size:
            continue
        near, same = rows.iou >= BACKGROUND, same_label(truth, detections, rows)
        groups_here = group[detections.label[rows.detections]]
        similar = (groups_here[:, None] == group[truth.label[rows.objects]][None]) & (groups_here[:, None] >= 0)
        conditions = [
            matches.correct[rows.detections],
            (near & same).any(1),
            (near & similar).any(1),
            near.any(1),
        ]
        kind[rows.detections] = np.select(conditions, range(4), SHARES.index("background"))
    order = np.argsort(-detections.score, kind="stable")
    order = order[matches.counted[order]]
    shares = {}
    for label, name in enumerate(classes, start=1):
        objects = int(np.count_nonzero(counted_objects(truth) & (truth.label == label)))
        best = kind[order[detections.label[order] == label]][:objects]
        if objects:
            shares[name] = ClassShares(len(best), {share: int((best == i).sum()) for i, share in enumerate(SHARES)})
    return shares


def similar_groups(classes: Sequence[str], given: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """The groups of similar classes: the given ones, otherwise COCO's supercategories for names of COCO and VOC."""
    if given:
        return list(given)
    groups: dict[str, list[str]] = {}
    for name in classes:
        if name in _GROUP_OF:
            groups.setdefault(_GROUP_OF[name], []).append(name)
    return [names for names in groups.values() if len(names) > 1]


_SUPERCATEGORIES: Mapping[str, str] = {
    "vehicle": "bicycle, car, motorcycle, airplane, bus, train, truck, boat, aeroplane, motorbike",
    "outdoor": "traffic light, fire hydrant, stop sign, parking meter, bench",
    "animal": "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe",
    "accessory": "backpack, umbrella, handbag, tie, suitcase",
    "sports": "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, "
    "tennis racket",
    "kitchen": "bottle, wine glass, cup, fork, knife, spoon, bowl",
    "food": "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake",
    "furniture": "chair, couch, potted plant, bed, dining table, toilet, sofa, pottedplant, diningtable",
    "electronic": "tv, laptop, mouse, remote, keyboard, cell phone, tvmonitor",
    "appliance": "microwave, oven, toaster, sink, refrigerator",
    "indoor": "book, clock, vase, scissors, teddy bear, hair drier, toothbrush",
}
"""COCO's supercategories, with VOC's names for the same classes."""
_GROUP_OF = {name: group for group, names in _SUPERCATEGORIES.items() for name in names.split(", ")}
