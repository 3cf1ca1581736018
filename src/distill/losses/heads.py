"""Outputs of detection heads that losses compare: matching the classes, anchors and regions of student and teacher."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.labels import match_classes
from distill.losses.base import require_equal_shapes, require_outputs
from distill.precision import upcast
from distill.types import DetectorSpec, DistillError, Pyramid, Regions, View

REMEDY = "Build the loss with the specs of both detectors"


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(softmax(T / tau) || softmax(S / tau)) over the last axis; logits (..., K) -> (...)."""
    log_p = F.log_softmax(upcast(student) / temperature, dim=-1)
    log_q = F.log_softmax(upcast(teacher.detach()) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def sigmoid_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """tau^2 KL of the Bernoulli distributions sigmoid(T / tau) and sigmoid(S / tau); equal shapes -> the same shape."""
    s, t = upcast(student) / temperature, upcast(teacher.detach()) / temperature
    q = t.sigmoid()
    error = q * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - q) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return temperature**2 * error


def quality_focal(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """``|p - q|^beta`` BCE(p, q) of logits, p = sigmoid(S), q = sigmoid(T); equal shapes -> the same shape.

    The gradient also flows through the weight ``|p - q|^beta`` (Li et al., "Generalized Focal Loss", NeurIPS 2020).
    """
    logits, target = upcast(student), upcast(teacher.detach()).sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (logits.sigmoid() - target).abs().pow(beta) * entropy


def label_deltas(deltas: Tensor, labels: Tensor) -> Tensor:
    """The deltas of each region's label (R,), from class-major box deltas (R, (K+1)*4) -> (R, 4)."""
    return deltas.view(len(deltas), deltas.shape[1] // 4, 4)[torch.arange(len(labels), device=labels.device), labels]


IMPOSSIBLE = -1e4
"""Logit of an outcome with probability 0, whose gradient is 0 too."""


class ClassMap(nn.Module):
    """Brings the teacher's head outputs into the order of the student's classes.

    Without a bridge, classes match by exact name. With the bridge of the teacher's spec, several classes of the teacher
    may stand for one of the student: their probabilities are summed. A class of the student that the teacher does not
    know takes no part: `compared` removes its column, and the rows that are labeled with it, from both sides of a
    softmax. Where each class has a sigmoid of its own, `covered` and `covered_maps` remove its column.

    Args:
        name: of the terms, for the message.
        student, teacher: specs of both detectors. The teacher may know more classes.
        partial: whether the terms can leave out classes that the teacher does not know, because they call `compared`,
            `covered` or `covered_maps`.

    Raises:
        DistillError: the teacher does not know a class of the student and has no bridge, its bridge leads to no class
            of the student, or not to all of them, which these terms need.
    """

    columns: Tensor | None
    """(K+1,) the teacher's labels of the student's labels, background first; None if both class lists are equal. With a
    bridge, the first of several labels; 0 for an unknown class."""
    members: Tensor
    """(K+1, M) all labels of the teacher that stand for each label of the student, filled up with -1."""
    known: Tensor
    """(K+1,) bool: whether the teacher knows the student's label. The background is known."""
    covered_columns: Tensor
    """(K',) the columns, of K+1, that the teacher knows."""

    def __init__(self, name: str, student: DetectorSpec, teacher: DetectorSpec, partial: bool = False) -> None:
        super().__init__()
        remedy = f"choose another teacher, map the classes (classes.map=auto), or set the weights of {name} to 0"
        if teacher.bridge is None:
            labels = [[label] for label in match_classes(student.classes, teacher.classes, remedy)]
        else:
            labels = [[0]]
            for wanted in student.classes:
                partners = enumerate(teacher.data_classes, start=1)
                labels.append(
                    [label for label, partner in partners if partner == wanted and self._linked(label, teacher)]
                )
            if not any(labels[1:]):
                raise DistillError(f"{name}: classes.map leads to none of the student's classes; {remedy}")
            if not (partial or all(labels)):
                unknown = [own for own, known in zip(student.classes, labels[1:], strict=True) if not known]
                raise DistillError(
                    f"{name}: classes.map leads to no class of the teacher for {unknown}, and these terms need all "
                    f"classes. Add pairs, or set the weights of {name} to 0: terms on features need no classes"
                )
        widest = max(len(own) for own in labels)
        equal = teacher.bridge is None and student.classes == teacher.classes
        columns = torch.tensor([own[0] if own else 0 for own in labels])
        self.register_buffer("columns", None if equal else columns, persistent=False)
        members = torch.tensor([[*own, *[-1] * (widest - len(own))] for own in labels])
        self.register_buffer("members", members, persistent=False)
        self.register_buffer("known", torch.tensor([bool(own) for own in labels]), persistent=False)
        covered = [column for column, own in enumerate(labels) if own]
        self.register_buffer("covered_columns", torch.tensor(covered), persistent=False)
        self.count = len(covered) - 1
        """Number of the student's classes that the teacher knows."""
        self.is_partial, self.is_merged = not all(labels), widest > 1

    @staticmethod
    def _linked(label: int, teacher: DetectorSpec) -> bool:
        return teacher.bridge is not None and teacher.classes[label - 1] in teacher.bridge

    def logits(self, teacher: Tensor) -> Tensor:
        """The teacher's logits with background first -> the student's columns (..., K+1).

        The softmax of a class is the sum over its members.
        """
        if self.columns is None:
            return teacher
        if not self.is_merged:
            return self._without_unknown(teacher[..., self.columns], self.known)
        parts = upcast(teacher)[..., self.members.clamp(min=0)]
        merged = parts.masked_fill(self.members < 0, -torch.inf).logsumexp(-1)
        return self._without_unknown(merged, self.known)

    def dense_logits(self, teacher: Tensor) -> Tensor:
        """The teacher's logits without background -> the student's columns (..., K).

        The sigmoid of a class is the sum over its members, at most 1 - 1e-6.
        """
        if self.columns is None:
            return teacher
        if not self.is_merged:
            return self._without_unknown(teacher[..., self.columns[1:] - 1], self.known[1:])
        members = self.members[1:]
        parts = upcast(teacher)[..., (members - 1).clamp(min=0)]
        total = parts.sigmoid().masked_fill(members < 0, 0.0).sum(-1)
        single = (members >= 0).sum(-1) < 2  # exact, also where the sigmoid rounds to 0 or 1
        merged = torch.where(single, parts[..., 0], torch.logit(total, eps=1e-6))
        return self._without_unknown(merged, self.known[1:])

    def map_logits(self, teacher: Tensor, classes: int) -> Tensor:
        """The teacher's dense logits (B, A*classes, H, W) -> the student's columns (B, A*K, H, W)."""
        if self.columns is None:
            return teacher
        batch, channels, height, width = teacher.shape
        by_anchor = teacher.reshape(batch, channels // classes, classes, height, width)
        if self.is_merged:
            return self.dense_logits(by_anchor.movedim(2, -1)).movedim(-1, 2).flatten(1, 2)
        return by_anchor[:, :, self.columns[1:] - 1].flatten(1, 2)

    def _without_unknown(self, logits: Tensor, known: Tensor) -> Tensor:
        return logits.masked_fill(~known, IMPOSSIBLE) if self.is_partial else logits

    def compared(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both models for the terms. What the teacher does not know is equal on both sides, without gradient.

        Args:
            student: (..., K+1) with background first, or (..., K).
            teacher: of the same shape, from `logits` or `dense_logits`.
            labels: (...) the student's label of each row; below 1: no class.
        """
        if not self.is_partial:
            return student, teacher
        columns = self.known[-student.shape[-1] :]
        rows = self.known[labels.clamp(min=0)]
        fill = torch.full_like(columns, IMPOSSIBLE, dtype=torch.float32)
        if student.shape[-1] == len(self.known):
            fill[0] = -IMPOSSIBLE  # a row of an unknown class is background on both sides
        taught = columns & rows[..., None]
        return torch.where(taught, upcast(student), fill), torch.where(taught, upcast(teacher), fill)

    def covered(self, values: Tensor) -> Tensor:
        """The columns that the teacher knows, with or without background: (..., K+1) or (..., K) -> (..., K')."""
        if not self.is_partial:
            return values
        has_background = values.shape[-1] == len(self.known)
        columns = self.covered_columns if has_background else self.covered_columns[1:] - 1
        return values.index_select(-1, columns)

    def covered_maps(self, logits: Tensor) -> Tensor:
        """The maps of the classes that the teacher knows: dense logits (B, A*K, H, W) -> (B, A*K', H, W)."""
        if not self.is_partial:
            return logits
        batch, channels, height, width = logits.shape
        classes = len(self.known) - 1
        by_anchor = logits.reshape(batch, channels // classes, classes, height, width)
        return by_anchor.index_select(2, self.covered_columns[1:] - 1).flatten(1, 2)

    def labels(self, student: Tensor, teacher: Tensor | None = None) -> Tensor:
        """The student's labels -> the teacher's labels, of the same shape.

        Args:
            student: labels (R,).
            teacher: the teacher's own logits (R, columns). They choose among several classes that stand for one.
        """
        if self.columns is None:
            return student
        if not self.is_merged or teacher is None:
            return self.columns[student]
        members = self.members[student]
        scores = teacher.gather(1, members.clamp(min=0)).masked_fill(members < 0, -torch.inf)
        best = members.gather(1, scores.argmax(1, keepdim=True))[:, 0]
        return best.clamp(min=0)


class RegionOutputs(NamedTuple):
    """Outputs of both box heads for the same R regions."""

    labels: Tensor
    """(R,) the student's labels, 0 for background."""
    student_logits: Tensor
    """(R, K+1), background first."""
    teacher_logits: Tensor
    """(R, K+1), in the order of the student's classes."""
    student_deltas: Tensor
    """(R, (K+1)*4), class-major."""
    teacher_deltas: Tensor
    """(R, (K_teacher+1)*4), class-major, in the order of the teacher's classes."""
    classes: ClassMap
    own_teacher_logits: Tensor
    """(R, K_teacher+1), in the order of the teacher's classes."""

    @property
    def teacher_labels(self) -> Tensor:
        """(R,) the regions' classes as labels of the teacher; 0 where it does not know the class."""
        return self.classes.labels(self.labels, self.own_teacher_logits)

    def label_deltas(self) -> tuple[Tensor, Tensor]:
        """The deltas of each region's label, (R, 4) of the student and of the teacher.

        Where the teacher does not know the class, both are the student's, without a gradient.
        """
        student = label_deltas(self.student_deltas, self.labels)
        teacher = label_deltas(self.teacher_deltas, self.teacher_labels)
        if not self.classes.is_partial:
            return student, teacher
        known = self.classes.known[self.labels][:, None]
        return torch.where(known, student, student.detach()), torch.where(known, teacher, student.detach())


def region_outputs(place: str, student: View, teacher: View, regions: Regions, classes: ClassMap) -> RegionOutputs:
    """Run both box heads on the same regions.

    Raises:
        DistillError: the logits differ in shape.
    """
    student_logits, student_deltas = student.roi_logits(regions.boxes)
    own_teacher_logits, teacher_deltas = teacher.roi_logits(regions.boxes)
    teacher_logits = classes.logits(own_teacher_logits)
    require_equal_shapes(f"{place}, logits of regions (R, K+1)", student_logits, teacher_logits, REMEDY)
    labels = torch.cat(list(regions.labels))
    student_logits, teacher_logits = classes.compared(student_logits, teacher_logits, labels)
    return RegionOutputs(
        labels, student_logits, teacher_logits, student_deltas, teacher_deltas, classes, own_teacher_logits
    )


def flatten_anchors(maps: Pyramid, width: int) -> Tensor:
    """Dense outputs (B, A*width, H, W) of all levels -> (B, N, width), in the order of the View's anchors."""
    anchors = (x.view(len(x), x.shape[1] // width, width, *x.shape[2:]) for x in maps.values())
    return torch.cat([x.permute(0, 3, 4, 1, 2).flatten(1, 3) for x in anchors], dim=1)


def anchor_outputs(place: str, stage: str, student: View, teacher: View, width: int) -> tuple[Tensor, Tensor]:
    """A dense stage of both models, (B, N, width) each.

    Raises:
        DistillError: the stages differ in shape.
    """
    student_maps, teacher_maps = getattr(student, stage), getattr(teacher, stage)
    for stride, x in student_maps.items():
        require_equal_shapes(f"{place}, {stage} at stride {stride}", x, teacher_maps[stride], REMEDY)
    return flatten_anchors(student_maps, width), flatten_anchors(teacher_maps, width)


def class_maps(name: str, student: View, teacher: View, classes: ClassMap) -> list[tuple[Tensor, Tensor]]:
    """The dense class logits (B, A*K, H, W) of both models by level, in the student's classes, in float32 at least.

    Classes that the teacher does not know are left out: K is the number of the others.

    Raises:
        DistillError: the logits differ in shape.
    """
    pairs = []
    for stride, x in student.class_logits.items():
        target = classes.map_logits(teacher.class_logits[stride], len(teacher.spec.classes))
        require_equal_shapes(f"{name}, class_logits at stride {stride}", x, target, REMEDY)
        pairs.append((upcast(classes.covered_maps(x)), upcast(classes.covered_maps(target.detach()))))
    return pairs


def anchor_classes(name: str, student: View, teacher: View, classes: ClassMap) -> tuple[Tensor, Tensor]:
    """The dense class logits (B, N, K) of both models, in the student's classes, in float32 at least.

    Classes that the teacher does not know are left out: K is the number of the others.

    Raises:
        DistillError: the logits differ in shape.
    """
    maps, width = class_maps(name, student, teacher, classes), classes.count
    by_model = [dict(enumerate(x)) for x in zip(*maps, strict=True)]
    return flatten_anchors(by_model[0], width), flatten_anchors(by_model[1], width)


def dense_class_map(name: str, student: DetectorSpec, teacher: DetectorSpec, boxes: bool = False) -> ClassMap:
    """The class map of a pair of one-stage detectors.

    Args:
        name: of the terms, for the message.
        student, teacher: specs of both detectors.
        boxes: whether a term compares boxes, too, see `require_equal_anchors`.

    Raises:
        DistillError: a detector is not one-stage, their anchors differ, or the teacher lacks a class and has no bridge.
    """
    require_outputs(name, student, teacher, "class_logits")
    require_equal_anchors(name, student, teacher, boxes)
    return ClassMap(name, student, teacher, partial=True)


def head_class_map(name: str, student: DetectorSpec, teacher: DetectorSpec) -> ClassMap:
    """The class map of a pair of two-stage detectors, or of one-stage detectors with equal anchors.

    Raises:
        DistillError: only one is two-stage, the anchors differ, or the teacher lacks a class and has no bridge.
    """
    if "rois" not in student.outputs:
        return dense_class_map(name, student, teacher)
    require_outputs(name, student, teacher, "rois", "roi_logits")
    return ClassMap(name, student, teacher, partial=True)


DELTA_OPTIONS = ("anchor_delta_weights", "box_head")
"""Options that decide which box a delta stands for, but not where its anchor is."""


def require_equal_anchors(name: str, student: DetectorSpec, teacher: DetectorSpec, boxes: bool = True) -> None:
    """Refuse a pair with unequal anchors, because their outputs then belong to different places.

    The places of detectors without anchors are the cells of their necks.

    Args:
        name: of the terms, for the message.
        student, teacher: specs of both detectors.
        boxes: whether a term compares boxes or deltas. Then equal deltas must also be equal boxes.

    Raises:
        DistillError: the anchors differ at some image size, or, with `boxes`, the meaning of the deltas; or two
            detectors without anchors have necks of different strides.
    """
    if not student.anchors and not teacher.anchors and list(student.neck) != list(teacher.neck):
        raise DistillError(
            f"{name}: expected outputs at the same strides, got {list(student.neck)} of the student (a "
            f"{student.family}) and {list(teacher.neck)} of the teacher (a {teacher.family}). Choose a teacher with "
            f"the student's strides, or set the weights of {name} to 0"
        )
    same = "Give both models the same input_stride and the same options of anchors and deltas"
    remedy = f"{same}, or set the weights of {name} to 0"
    if student.anchors != teacher.anchors:
        raise DistillError(
            f"{name}: expected as many anchors per cell at the same strides, got (stride: anchors) {student.anchors} "
            f"of the student and {teacher.anchors} of the teacher. {remedy}"
        )
    options = student.anchor_options.keys() | teacher.anchor_options.keys()
    for option in sorted(options.difference(() if boxes else DELTA_OPTIONS)):
        values = [spec.anchor_options.get(option) for spec in (student, teacher)]
        if values[0] != values[1]:
            raise DistillError(
                f"{name}: expected equal anchors, but {option} is {values[0]} for the student and {values[1]} "
                f"for the teacher. {remedy}"
            )


class Positives(NamedTuple):
    """The student's outputs for its P positive regions or anchors, over all images."""

    image: Tensor
    """(P,) index of the image."""
    logits: Tensor
    """(P, K+1), background first, of a softmax head; (P, K) of a sigmoid head."""
    boxes: Tensor
    """(P, 4) predicted boxes."""
    truth: Tensor
    """(P, 4) matched ground truth boxes, up to rounding."""


def split_levels(x: Tensor, view: View) -> tuple[Tensor, ...]:
    """Values of all anchors (B, N, ...), divided into the levels of a View's anchors."""
    return torch.split(x, [len(level) for level in view.anchors.values()], dim=1)


def count_positives(positive: Tensor) -> Tensor:
    """Number of positive anchors, at least 1 in each image; (B, N) bool -> scalar."""
    return positive.sum(1).clamp(min=1).sum()


def positive_regions(view: View) -> Positives:
    """The sampled regions that are objects, each with the box of its label's deltas."""
    regions = view.rois
    labels = torch.cat(regions.labels)
    image = torch.cat([torch.full_like(image_labels, index) for index, image_labels in enumerate(regions.labels)])
    rows = labels.nonzero()[:, 0]
    logits, boxes = view.roi_logits(regions.boxes)[0], view.roi_boxes(regions.boxes)
    return Positives(image[rows], logits[rows], boxes[rows, labels[rows]], torch.cat(regions.truth)[rows])


def positive_anchors(view: View) -> Positives:
    """The anchors or points of all levels that are objects."""
    targets = view.anchor_targets
    image, rows = (targets.labels > 0).nonzero(as_tuple=True)
    logits = flatten_anchors(view.class_logits, len(view.spec.classes))
    deltas = flatten_anchors(view.deltas, 4)
    boxes, truth = view.anchor_boxes(deltas), view.anchor_boxes(targets.deltas)
    return Positives(image, logits[image, rows], boxes[image, rows], truth[image, rows])
