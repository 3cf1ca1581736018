"""Prototypes through real detectors and data: what an epoch's start chooses, keeps and leaves alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distill.data.datamodule import DetectionData
from distill.data.shapes import Shapes
from distill.losses.candidates import select_candidates
from distill.losses.global_knowledge import GlobalKnowledge
from distill.losses.prototypes import box_means, choose_prototypes
from distill.teacher import Teacher
from helpers.detectors import random_detector
from helpers.two_processes import run_in_two_processes


def small_pair_and_data(**prototypes: Any) -> tuple[GlobalKnowledge, DetectionData, Any, Teacher]:
    data = DetectionData(Shapes(train=10, val=2, test=0, size=64), batch_size=4, workers=0, min_size=64, max_size=64)
    student, teacher = (
        random_detector("faster_rcnn", seed=1, norm="batch"),
        random_detector("faster_rcnn", seed=2, depth=18),
    )
    student, teacher = (
        type(detector)(data.classes, **{k: v for k, v in detector.options.items() if k != "classes"})
        for detector in (student, teacher)
    )
    loss = GlobalKnowledge(student.spec, teacher.spec, prototypes={"count": 2, "min_side": 6.0, **prototypes})
    return loss, data, student, Teacher(teacher)


def test_prototypes_are_features_of_boxes_of_their_class() -> None:
    loss, data, student, teacher = small_pair_and_data()
    state = torch.get_rng_state()
    buffers = {name: value.clone() for name, value in student.named_buffers()}
    loss.on_epoch_start(0, data, student, teacher)
    assert torch.equal(state, torch.get_rng_state())
    assert student.training
    for name, value in student.named_buffers():
        assert torch.equal(value, buffers[name]), name

    whole = data.load_batch("train", range(10))
    labels = torch.cat([target.labels for target in whole.targets])
    large = torch.cat([((t.boxes[:, 2:] - t.boxes[:, :2]) > 6).all(1) for t in whole.targets])
    student.eval()
    views = student.view(whole, frozen=True), teacher.view(whole)
    boxes = [target.boxes for target in whole.targets]
    for label in range(1, len(data.classes) + 1):
        rows = (labels == label) & large
        for level, stride in enumerate((4, 8, 16, 32, 64)):
            student_features, teacher_features = (box_means(view.neck[stride], boxes, (64, 64))[rows] for view in views)
            # Which instances are chosen hangs on their order in ties alone; as sets of features they are the same.
            best = choose_prototypes(student_features, teacher_features, 2)
            for chosen, features in (
                (loss.student_prototypes, student_features),
                (loss.teacher_prototypes, teacher_features),
            ):
                chosen_rows = {tuple(round(x, 3) for x in row) for row in chosen[label - 1, level].tolist()}
                assert chosen_rows == {tuple(round(x, 3) for x in row) for row in features[best].tolist()}


def test_student_features_are_recomputed_and_teacher_features_kept() -> None:
    loss, data, student, teacher = small_pair_and_data()
    reads = []
    view = teacher.view
    teacher.view = lambda *given, **options: reads.append(1) or view(*given, **options)  # type: ignore[method-assign]
    loss.on_epoch_start(0, data, student, teacher)
    assert reads
    # What is kept, and sent to other processes, is each image's own: no view that takes along all of its batch.
    assert all(
        features.untyped_storage().nbytes() == features.numel() * 4
        for features in loss.candidates.teacher_features.values()
    )
    assert max(len(features) for features in loss.candidates.teacher_features.values()) > 1
    before, count = loss.student_prototypes.clone(), len(reads)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    loss.on_epoch_start(1, data, student, teacher)
    assert len(reads) == count
    assert not torch.equal(loss.student_prototypes, before)


def test_candidates_respect_the_limits_of_images_and_sides() -> None:
    loss, data, student, teacher = small_pair_and_data(images=2)
    chosen = list(select_candidates(data.dataset("train", training=False), 2, 6.0, loss.seed))
    for label in range(1, len(data.classes) + 1):
        assert sum(bool((names == label).any()) for _, _, names in chosen) == 2
    loss, data, student, teacher = small_pair_and_data(min_side=64.0)
    loss.on_epoch_start(0, data, student, teacher)
    assert not loss.student_prototypes.any()


class Uneven:
    """Drawn images, every second one cut to half its height; the first holds a box thinner than training takes."""

    splits = ("train", "val")
    masks = False

    def __init__(self) -> None:
        self.shapes = Shapes(train=8, val=2, test=0, size=64)

    def read_split(self, split: str) -> tuple[Any, Any]:
        classes, records = self.shapes.read_split(split)
        cut = []
        for index, record in enumerate(records):
            boxes = np.clip(record.boxes, 0, 40 if index % 2 else 64)
            keep = (boxes[:, 3] - boxes[:, 1] > 4) & (boxes[:, 2] - boxes[:, 0] > 4)
            boxes = boxes[keep]
            if index == 0:
                boxes[0, 2] = boxes[0, 0] + 0.005
            cut.append(
                replace(
                    record,
                    size=(40 if index % 2 else 64, 64),
                    boxes=boxes,
                    labels=record.labels[keep],
                    crowd=record.crowd[keep],
                    difficult=record.difficult[keep],
                    area=record.area[keep],
                    segmentation=None,
                    annotation_indices=None,
                )
            )
        return classes, cut

    def load_image(self, file: str) -> torch.Tensor:
        index = next(
            i
            for split in self.splits
            for i, record in enumerate(self.shapes.read_split(split)[1])
            if record.file == file
        )
        image = self.shapes.load_image(file)
        return image[:, :40] if index % 2 else image


def test_prototypes_do_not_depend_on_the_batch() -> None:
    prototypes = []
    for size in (1, 4):
        data = DetectionData(Uneven(), batch_size=size, workers=0, min_size=64, max_size=64)
        _, _, student, teacher = small_pair_and_data()
        loss = GlobalKnowledge(student.spec, teacher.spec, prototypes={"count": 2, "min_side": 0.0})
        loss.on_epoch_start(0, data, student, teacher)
        prototypes.append((loss.student_prototypes, loss.teacher_prototypes))
    for one, four in zip(*prototypes, strict=True):
        assert one.any()
        torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-5)


# -- several processes


def save_prototypes(folder: Path, name: str) -> None:
    """Prototypes of two epochs, and how many images the teacher was teacher_images about."""
    loss, data, student, teacher = small_pair_and_data()
    teacher_images: list[int] = []
    view = teacher.view
    teacher.view = lambda images, **options: teacher_images.extend(images.ids) or view(images, **options)  # type: ignore[method-assign]
    for epoch in (0, 1):
        loss.on_epoch_start(epoch, data, student, teacher)
    torch.save((loss.student_prototypes, loss.teacher_prototypes, teacher_images), folder / f"{name}.pt")


def one_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    save_prototypes(folder, str(rank))
    dist.destroy_process_group()


def test_two_processes_share_the_images_and_choose_the_same(tmp_path: Path) -> None:
    run_in_two_processes(one_rank, tmp_path)
    save_prototypes(tmp_path, "alone")
    (student_prototypes, teacher_prototypes, teacher_images), *parts = (
        torch.load(tmp_path / f"{name}.pt") for name in ("alone", "0", "1")
    )
    assert all(len(part[2]) < len(teacher_images) for part in parts)
    assert sorted(parts[0][2] + parts[1][2]) == sorted(teacher_images)
    assert student_prototypes.any()
    for part in parts:
        torch.testing.assert_close(part[:2], (student_prototypes, teacher_prototypes), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(parts[0][:2], parts[1][:2], strict=True))
