"""DICOD: a slow oracle for every term and family, its minimum, and the promise that the classifier stays frozen."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.losses import dicod
from distill.losses.base import DistillLoss
from distill.losses.dicod import DICOD
from distill.training.schedule import Schedule
from distill.types import AnchorTargets, Batch, DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import NOTHING, OBJECTS, LossGrid
from helpers.loss_states import CLASSIFIER_CLASSES, CROP_SIDE, RandomClassifier
from helpers.slow_oracles import slow_crop
from helpers.two_processes import run_in_two_processes


class Scene(FakeView):
    """A FakeView whose boxes follow from its deltas, which its oracle can read too: 4 pixels each."""

    def roi_boxes(self, boxes: Any) -> Tensor:
        deltas = self.stages["roi_logits"][1]
        return torch.cat(list(boxes))[:, None] + 4 * deltas.float().reshape(len(deltas), len(self.spec.classes) + 1, 4)

    def anchor_boxes(self, deltas: Tensor) -> Tensor:
        return torch.cat(list(self.stages["anchors"].values())) + 4 * deltas.float()


def scene(images: Batch, known: DetectorSpec, seed: int, **options: Any) -> Scene:
    """Clouds in the images; positives of several classes, matched to the objects of their image in turn."""
    noise = torch.stack([torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(i)) for i in images.ids])
    clouds = nn.functional.interpolate(255 * noise, size=(64, 64), mode="bilinear")
    images = replace(images, images=clouds.to(torch.uint8))
    view = random_view(images, known, seed, **options)
    labels, truth, boxes = [], [], []
    for positive, old, target, away in zip(*view.rois[1:3], images.targets, view.rois.deltas, strict=True):
        places = torch.arange(len(positive))
        labels.append(positive * (1 + places % len(known.classes)))
        truth.append(target.boxes[places % len(target.boxes)] if len(target.boxes) else old)
        boxes.append(truth[-1] + 3 * away)
    stages = {**view.stages, "rois": view.rois._replace(boxes=boxes, labels=labels, truth=truth)}
    stages["anchor_targets"] = near(images, torch.cat(list(view.anchors.values())), len(known.classes))
    return Scene(images, known, **stages)


def near(images: Batch, anchors: Tensor, classes: int) -> AnchorTargets:
    """Anchors with all sides within 16 pixels of an object's are positive; a third of the other anchors is ignored."""
    labels = torch.zeros(len(images), len(anchors), dtype=torch.int64)
    labels[:, ::3] = -1
    deltas = torch.zeros(len(images), len(anchors), 4)
    for image, target in enumerate(images.targets):
        for row, anchor in enumerate(anchors):
            for index, box in enumerate(target.boxes):
                if (box - anchor).abs().max() < 16:
                    labels[image, row] = 1 + (row + index) % classes
                    deltas[image, row] = (box - anchor) / 4
    return AnchorTargets(labels, deltas, labels >= 0)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(z - top) for z in row]
    return [power / sum(powers) for power in powers]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def slow_kl(p: list[float], q: list[float]) -> float:
    return sum((a + 1e-10) * (math.log(a + 1e-10) - math.log(b + 1e-10)) for a, b in zip(p, q, strict=True))


def slow_pool(crop: Tensor, cells: int) -> Tensor:
    """A cell takes the pixels from floor(i n / cells) to ceil((i + 1) n / cells)."""
    side = crop.shape[-1]
    spans = [(i * side // cells, -(-(i + 1) * side // cells)) for i in range(cells)]
    rows = [torch.stack([crop[:, a:b, c:d].mean((1, 2)) for c, d in spans], dim=1) for a, b in spans]
    return torch.stack(rows, dim=1)


class DICODGrid(LossGrid):
    relative = 2e-4  # the classifier and its crops are float32
    sigmoid = "kl-ce"

    def pair(self, images: Batch, **options: Any) -> tuple[FakeView, FakeView]:
        return scene(images, self.student, 1, **options), random_view(images, self.teacher, 2, **options)

    def loss(self, student: DetectorSpec, teacher: DetectorSpec | None) -> DistillLoss:
        return DICOD(student, teacher, RandomClassifier(), size=CROP_SIDE, sigmoid=self.sigmoid)

    def positives(self, student: FakeView) -> list[tuple[int, list[float], Tensor, Tensor]]:
        """(image, logits, predicted box, object's box) of each."""
        raise NotImplementedError

    def kl(self, student: list[float], teacher: list[float]) -> float:
        raise NotImplementedError

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        classifier = RandomClassifier()
        images, positives = classifier.images(student.batch), self.positives(student)
        columns = [CLASSIFIER_CLASSES.index(name) for name in student.spec.classes]
        totals = dict.fromkeys(loss.weights, 0.0)
        for image, logits, box, truth in positives:
            predicted_crop, object_crop = (
                slow_crop(images[image], (64, 64), corners.tolist(), CROP_SIDE).float()[None]
                for corners in (box.detach(), truth)
            )
            z = classifier.logits(object_crop)[0, columns].tolist()
            totals["classes"] += 4 * self.kl([logit / 2 for logit in logits], [logit / 2 for logit in z])
            totals["pixels"] += (slow_pool(predicted_crop[0], 4) - slow_pool(object_crop[0], 4)).abs().mean().item()
            pooled = [slow_pool(classifier.stem(crop)[0], 8) for crop in (predicted_crop, object_crop)]
            totals["features"] += (pooled[0] - pooled[1]).abs().mean().item()
        return {term: total / max(1, len(positives)) for term, total in totals.items()}

    def ideal(self, student: Scene) -> Scene:
        """The student that says what the classifier says, of boxes that are the objects'."""
        raise NotImplementedError

    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        student = self.ideal(scene(batch(OBJECTS), self.student, 1))
        for name, value in self.run(self.loss(self.student, None), student, student).items():
            assert value.item() == pytest.approx(0, abs=2e-5), name

    def test_falls_when_only_it_is_minimised(self) -> None:
        student, teacher = self.views(OBJECTS)
        loss = self.loss(self.student, self.teacher)
        for term in loss.weights:
            leaves = [leaf.detach().clone() for leaf in student.leaves()]
            optimizer = torch.optim.Adam(student.leaves(), 0.1)
            values = []
            for _ in range(20):
                value = self.run(loss, student, teacher)[term]
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                values.append(value.item())
            assert values[-1] < 0.8 * values[0], term
            for leaf, before in zip(student.leaves(), leaves, strict=True):
                leaf.data.copy_(before)

    def test_the_teacher_is_never_read_and_may_be_missing(self) -> None:
        student, teacher = self.views(OBJECTS)
        loss = self.loss(self.student, None)
        values = [self.run(loss, student, teacher), loss(student, None)]
        assert not teacher.reads
        assert values[0] == values[1]

    def test_each_object_is_named_once(self) -> None:
        student, teacher = self.pair(batch(OBJECTS), regions=12)
        loss = self.loss(self.student, None)
        self.run(loss, student, teacher)
        assert loss.classifier.classified == 4
        assert len(self.positives(student)) > 4


class TestTwoStage(DICODGrid):
    def positives(self, student: FakeView) -> list[tuple[int, list[float], Tensor, Tensor]]:
        logits, boxes, positives = student.roi_logits([])[0], student.roi_boxes(student.rois.boxes), []
        row = 0
        for image, labels in enumerate(student.rois.labels):
            for label, truth in zip(labels.tolist(), student.rois.truth[image], strict=True):
                if label:
                    positives.append((image, logits[row].tolist(), boxes[row, label], truth))
                row += 1
        return positives

    def kl(self, student: list[float], teacher: list[float]) -> float:
        return slow_kl([0.0, *softmax(teacher)], softmax(student))

    def ideal(self, student: Scene) -> Scene:
        classifier, rois = RandomClassifier(), student.rois
        z, deltas = torch.zeros(12, 5), torch.zeros(12, 5, 4)
        z[:, 0] = -1e4
        for row, (image, label) in enumerate(zip([0] * 6 + [1] * 6, torch.cat(rois.labels).tolist(), strict=True)):
            truth = rois.truth[image][row % 6]
            crop = slow_crop(classifier.images(student.batch)[image], (64, 64), truth.tolist(), CROP_SIDE).float()
            z[row, 1:] = classifier.logits(crop[None])[
                0, [CLASSIFIER_CLASSES.index(name) for name in student.spec.classes]
            ]
            rois.boxes[image][row % 6] = truth - 1
            deltas[row, label] = 1 / 4
        return Scene(student.batch, student.spec, **{**student.stages, "roi_logits": (z, deltas.flatten(1))})

    def test_a_wrong_shape_is_refused(self) -> None:
        student, teacher = self.views(OBJECTS)
        logits, deltas = student.stages["roi_logits"]
        student.stages["roi_logits"] = logits[:, :-1], deltas
        with pytest.raises(
            DistillError, match=r"classes.* expected student and teacher of equal shape, got the student's \("
        ):
            self.loss(self.student, self.teacher)(student, teacher)


class TestOneStage(DICODGrid):
    student = spec(two_stage=False, strides=(8, 16, 32))

    def positives(self, student: FakeView) -> list[tuple[int, list[float], Tensor, Tensor]]:
        positives, start = [], 0
        anchors, targets = torch.cat(list(student.anchors.values())), student.anchor_targets
        for stride, logits in student.class_logits.items():
            height, width = logits.shape[-2:]
            for image in range(len(student.batch)):
                for index in range(height * width * 3):
                    cell, anchor = divmod(index, 3)
                    i, j = divmod(cell, width)
                    if targets.labels[image, start + index] > 0:
                        z = [logits[image, anchor * 4 + k, i, j].item() for k in range(4)]
                        d = torch.stack([student.deltas[stride][image, anchor * 4 + k, i, j] for k in range(4)])
                        box = anchors[start + index] + 4 * d.float()
                        truth = anchors[start + index] + 4 * targets.deltas[image, start + index]
                        positives.append((image, z, box, truth))
            start += height * width * 3
        return sorted(positives, key=lambda positive: positive[0])

    def kl(self, student: list[float], teacher: list[float]) -> float:
        q, p = ([sigmoid(z) for z in logits] for logits in (student, teacher))
        return slow_kl([probability / sum(p) for probability in p], [probability / sum(q) for probability in q])

    def ideal(self, student: Scene) -> Scene:
        classifier, stages, start = RandomClassifier(), dict(student.stages), 0
        anchors, targets = torch.cat(list(student.anchors.values())), student.anchor_targets
        stages["class_logits"] = {stride: x.clone() for stride, x in student.class_logits.items()}
        stages["deltas"] = {stride: x.clone() for stride, x in student.deltas.items()}
        columns = [CLASSIFIER_CLASSES.index(name) for name in student.spec.classes]
        for stride, logits in stages["class_logits"].items():
            count, width = logits[0, 0].numel() * 3, logits.shape[-1]
            for image, row in (targets.labels[:, start : start + count] > 0).nonzero().tolist():
                cell, anchor = divmod(row, 3)
                i, j = divmod(cell, width)
                move = targets.deltas[image, start + row]
                truth = (anchors[start + row] + 4 * move).tolist()
                crop = slow_crop(classifier.images(student.batch)[image], (64, 64), truth, CROP_SIDE).float()
                logits[image, anchor * 4 : anchor * 4 + 4, i, j] = classifier.logits(crop[None])[0, columns].double()
                stages["deltas"][stride][image, anchor * 4 : anchor * 4 + 4, i, j] = move.double()
            start += count
        return Scene(student.batch, student.spec, **stages)

    def test_a_wrong_shape_is_refused(self) -> None:
        """A View's dense maps have the shapes of its own spec: here of another student than the loss was built for."""
        other = scene(batch(OBJECTS), spec(("cat", "dog"), two_stage=False, strides=(8, 16, 32)), 1)
        with pytest.raises(
            DistillError, match=r"classes.* expected student and teacher of equal shape, got the student's \("
        ):
            self.loss(self.student, self.teacher)(other, other)


class TestOneStageBinary(TestOneStage):
    sigmoid = "kl-bce"

    def kl(self, student: list[float], teacher: list[float]) -> float:
        pairs = [[[sigmoid(z), sigmoid(-z)] for z in logits] for logits in (teacher, student)]
        return sum(slow_kl(p, q) for p, q in zip(*pairs, strict=True)) / len(student)


# -- the mathematics, and its edges


@pytest.mark.parametrize("form", [dicod.softmax_divergence, dicod.sigmoid_divergence, dicod.binary_divergence])
def test_certain_logits_stay_finite(form: Any) -> None:
    teacher = torch.tensor([[6e4, -6e4, 0.0], [-6e4, -6e4, -6e4], [3.0, 1.0, 2.0]])
    student = torch.cat([-teacher, torch.tensor([[-6e4, 6e4, 6e4]])]).requires_grad_()
    teacher = torch.cat([teacher, torch.zeros(1, 3)])
    student_logits = nn.functional.pad(student, (1, 0)) if form is dicod.softmax_divergence else student
    value = form(student_logits, teacher, 2.0)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_an_object_is_found_in_its_own_image() -> None:
    twin = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 9.0, 9.0], [4.0, 4.0, 9.0, 9.0]])
    owner = torch.tensor([0, 1, 1, 0])
    asked, image = twin[[0, 0, 2, 2]] + 1e-3, torch.tensor([1, 0, 0, 1])
    assert dicod.nearest(asked, image, twin, owner).tolist() == [1, 0, 3, 2]


def test_terms_without_weight_cost_no_crop_of_predictions_and_no_naming() -> None:
    student = scene(batch(OBJECTS), spec(), 1)
    classifier = RandomClassifier()
    loss = DICOD(spec(), None, classifier, {"classes": 0, "features": 0}, size=CROP_SIDE)
    assert list(loss(student, None)) == ["pixels"]
    assert classifier.classified == 0


# -- a frozen model


def test_the_classifier_is_nowhere_in_what_is_trained_averaged_or_saved() -> None:
    classifier = RandomClassifier()
    loss = DICOD(spec(), None, classifier, size=CROP_SIDE)
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert [type(module) for module in loss.modules()] == [DICOD]
    assert copy.deepcopy(loss).classifier is classifier
    loss.train()
    assert not any(module.training for module in classifier.net.modules())
    assert not any(parameter.requires_grad for parameter in classifier.net.parameters())
    student = nn.Linear(2, 2)
    optimizer, _ = Schedule().build_optimizer(student, nn.ModuleDict({"dicod": loss}), 10, 8)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in student.parameters()}


def test_the_classifier_keeps_its_weights_and_gets_no_gradient() -> None:
    classifier, student = RandomClassifier(), scene(batch(OBJECTS), spec(), 1)
    before = classifier.fingerprint
    for leaf in student.leaves():
        leaf.requires_grad_()
    sum(DICOD(spec(), None, classifier, size=CROP_SIDE)(student, None).values()).backward()
    assert all(parameter.grad is None for parameter in classifier.net.parameters())
    classifier._fingerprint = None
    assert classifier.fingerprint == before


# -- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"class": 1}}, "weights: unknown option 'class'.*did you mean 'classes'"),
        ({"weights": {"classes": -1}}, "DICOD: expected weights"),
        ({"temperature": 0}, "temperature: expected a number above 0, got 0"),
        ({"temperature": math.inf}, "temperature"),
        ({"sigmoid": "bce"}, "sigmoid: expected kl-ce or kl-bce, got 'bce'"),
        ({"size": 4}, "size: expected crops of at least 8"),
        ({"classifier": RandomClassifier(("cat", "dog", "hen"))}, r"\['cow'\] of .* train a classifier on this data"),
        ({"classifier": RandomClassifier(("Cat", "dog", "hen", "cow"))}, r"\['cat'\] of"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        DICOD(spec(), None, **{"classifier": RandomClassifier(), **options})


def test_one_class_alone_needs_the_divergence_of_yes_and_no() -> None:
    """The others say nothing: a row of one sigmoid, divided by its sum, is 1 whatever it was."""
    for sigmoid, two_stage in (("kl-ce", True), ("kl-bce", False)):
        DICOD(spec(two_stage=two_stage, classes=("cat",)), None, RandomClassifier(("cat",)), sigmoid=sigmoid)
    with pytest.raises(DistillError, match=r"only one class, \['cat'\]\. Set sigmoid=kl-bce"):
        DICOD(spec(two_stage=False, classes=("cat",)), None, RandomClassifier(("cat",)))


def test_localisation_alone_takes_a_classifier_of_other_classes() -> None:
    loss = DICOD(spec(), None, RandomClassifier(("owl",)), {"classes": 0}, size=CROP_SIDE)
    assert loss(scene(batch(OBJECTS), spec(), 1), None).keys() == {"pixels", "features"}


# -- several processes


def gradient(rows: slice, normalizer: str) -> Tensor:
    """Of one number that the student's logits and deltas are multiplied with, in the images of these rows."""
    boxes = [OBJECTS[0], OBJECTS[1], NOTHING, OBJECTS[1][:1]]
    factor = torch.ones((), requires_grad=True)
    part = batch(boxes[rows], first_id=7 + rows.start)
    view = scene(part, spec(), 1, dtype=torch.float32, regions=6)
    view.stages["roi_logits"] = tuple(factor * x for x in view.stages["roi_logits"])
    loss = DICOD(spec(), None, RandomClassifier(), size=CROP_SIDE, normalizer=normalizer)
    sum(loss(view, None).values()).backward()
    assert factor.grad is not None
    return factor.grad


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for normalizer in ("global", "process"):
        shared = gradient([slice(0, 3), slice(3, 4)][rank], normalizer)
        dist.all_reduce(shared)
        if rank == 0:
            torch.save(shared / 2, f"{folder}/{normalizer}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Four positives in the first, two in the second, gradients averaged as DDP does."""
    run_in_two_processes(one_rank, str(tmp_path))
    whole = gradient(slice(0, 4), "global")
    torch.testing.assert_close(torch.load(tmp_path / "global.pt"), whole, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(torch.load(tmp_path / "process.pt"), whole, rtol=1e-3)
