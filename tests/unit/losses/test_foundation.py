"""Foundation: its loss by loops, its share of the gradient on one and two processes, and a tiny ViT of timm."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distill.losses.base import DistillLoss
from distill.losses.foundation import Foundation, corrected
from distill.training.foundation import FoundationModel
from distill.types import Batch, DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import NOTHING, OBJECTS, LossGrid
from helpers.two_processes import run_in_two_processes


class FixedFeatures:
    """A model whose features follow from the image's id."""

    channels = 6

    def features(self, batch: Batch, cells: tuple[int, int]) -> Tensor:
        generators = [torch.Generator().manual_seed(image) for image in batch.ids]
        return torch.stack([torch.randn(6, *cells, generator=g, dtype=torch.float64) for g in generators])

    def identity(self) -> dict[str, Any]:
        return {"source": "memory"}


class TestFoundation(LossGrid):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec | None) -> DistillLoss:
        return Foundation(student, teacher, FixedFeatures(), {"level": 8}, adapter={"kernel": None})

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec | None) -> DistillLoss:
        return Foundation(student, teacher, FixedFeatures(), {"level": 8})

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        total, neck = 0.0, student.neck[8]
        target = FixedFeatures().features(student.batch, (8, 8))
        for image in range(len(neck)):
            for i in range(8):
                for j in range(8):
                    s, t = neck[image, :, i, j].tolist(), target[image, :, i, j].tolist()
                    dot = sum(a * b for a, b in zip(s, t, strict=True))
                    total += 1 - dot / math.sqrt(sum(a * a for a in s) * sum(b * b for b in t))
        return {"neck.cosine": total / len(neck) / 64}

    def test_is_at_its_minimum_when_student_equals_teacher(self) -> None:
        student, _ = self.views(OBJECTS)
        student.stages["neck"][8] = FixedFeatures().features(student.batch, (8, 8))
        assert self.run(self.loss(self.student, None), student, student)["neck.cosine"].item() == pytest.approx(0)

    def test_a_wrong_shape_is_refused(self) -> None:
        """The model follows the map's cells, so only its channels can be wrong."""
        model = FixedFeatures()
        model.channels = 5
        student, _ = self.views(OBJECTS)
        with pytest.raises(DistillError, match=r"expected student and teacher of equal shape, got the student's \("):
            self.run(Foundation(self.student, None, model), student, student)


def test_cells_of_the_padding_do_not_count() -> None:
    view = random_view(batch([NOTHING]), spec(), 1)
    view.batch = replace(view.batch, sizes=((33, 64),))
    loss = Foundation(spec(), None, FixedFeatures(), {"level": 8}, adapter={"kernel": None})
    similarity = torch.cosine_similarity(view.neck[8], FixedFeatures().features(view.batch, (8, 8)), dim=1)
    assert loss(view)["neck.cosine"].item() == pytest.approx(1 - similarity[:, :4].mean().item())  # the 5th center: 36


# -- the share of the gradient


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.10, 1.0),
        (0.095, 1.0),
        (0.05, 0.11 * 0.95 / (0.05 * 0.89)),
        (0.30, 0.09 * 0.70 / (0.30 * 0.91)),
        (0.001, 10.0),
        (0.9, 0.1),
        (0.99, 0.1),
        (1.0, 0.1),  # the gradients of the other losses cancel a part of the term's gradient
        (1.5, 0.1),
        (math.inf, 0.1),
        (0.0, 1.0),
    ],
)
def test_the_correction_leads_to_the_far_bound(share: float, expected: float) -> None:
    """If the other gradients stay, the share p of a weight w becomes p* with the weight w p* (1 - p) / (p (1 - p*))."""
    assert corrected(1.0, share, 0.1, 0.01) == pytest.approx(expected)


def step(loss: DistillLoss, rows: slice = slice(0, 4)) -> float:
    """A backward pass of the weighted term beside another loss; returns the share by torch.autograd.grad."""
    images = batch([OBJECTS[0], OBJECTS[1], NOTHING, OBJECTS[1]][rows], first_id=7 + rows.start)
    view = random_view(images, spec(), 1, dtype=torch.float32)
    for x in view.leaves():
        x.requires_grad_()
    neck = view.stages["neck"][64] = view.neck[64] * 1.5
    term = loss.weights["neck.cosine"] * loss.factor("neck.cosine", 0, 1) * loss(view)["neck.cosine"]
    other = 0.3 * neck.square().sum() / 4 * (4 / len(images) if dist.is_initialized() else 1)
    norms = [x.abs().sum() for part in (term, term + other) for x in torch.autograd.grad(part, neck, retain_graph=True)]
    (term + other).backward()
    return (norms[0] / norms[1]).item()


def test_the_share_is_measured_and_steers_the_weight() -> None:
    loss = Foundation(spec(), None, FixedFeatures())
    loss.on_epoch_start(0, None, None, None)
    shares = [step(loss) for _ in range(3)]
    step(loss)  # the last step of an epoch is not collected
    assert (loss.norms[0] / loss.norms[1]).item() == pytest.approx(shares[0], rel=1e-5)
    assert abs(shares[0] - 0.1) > 0.01
    loss.on_epoch_start(1, None, None, None)
    expected = corrected(1.0, shares[0], 0.1, 0.01)
    assert loss.factor("neck.cosine", 0, 1) == pytest.approx(expected, rel=1e-5)
    assert not loss.norms.any()
    other = Foundation(spec(), None, FixedFeatures())
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert other.factor("neck.cosine", 0, 1) == loss.factor("neck.cosine", 0, 1)


def test_a_term_that_outweighs_the_whole_loss_gets_a_lower_weight() -> None:
    """The weight would stay at its highest: such a share is the strongest sign that it is too high."""
    loss = Foundation(spec(), None, FixedFeatures())
    for whole in (1.0, 0.8, 0.0):
        before = loss.factor("neck.cosine", 0, 1)
        loss.norms.copy_(torch.tensor([1.0, whole]))
        loss.on_epoch_start(1, None, None, None)
        assert loss.factor("neck.cosine", 0, 1) == pytest.approx(before / 10)


def test_a_constant_weight_measures_nothing() -> None:
    loss = Foundation(spec(), None, FixedFeatures(), steer={"share": None})
    for _ in range(2):
        step(loss)
    loss.on_epoch_start(1, None, None, None)
    assert loss.factor("neck.cosine", 0, 1) == 1
    assert not loss.last_norms.any()


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loss = Foundation(spec(), None, FixedFeatures())
    for _ in range(3):
        step(loss, slice(2 * rank, 2 * rank + 2))
    torch.save(loss.norms[0] / loss.norms[1], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_measure_the_share_of_one(tmp_path: Path) -> None:
    loss = Foundation(spec(), None, FixedFeatures())
    whole = step(loss)
    run_in_two_processes(one_rank, str(tmp_path))
    measured = [torch.load(tmp_path / f"{rank}.pt").item() for rank in (0, 1)]
    assert measured[0] == measured[1]
    assert measured[0] == pytest.approx(whole, rel=1e-4)


# -- the model

TINY_VIT = "test_vit.r160_in1k"


@pytest.fixture(scope="module")
def vit() -> FoundationModel:
    pytest.importorskip("timm", reason="the vision transformers are timm's")
    return FoundationModel(TINY_VIT, "random")


def test_a_vision_transformer_gives_one_patch_per_cell(vit: FoundationModel) -> None:
    images = batch([NOTHING, NOTHING], height=64, width=96)
    images = replace(images, images=torch.randint(0, 256, images.images.shape, dtype=torch.uint8))
    features = vit.features(images, (2, 3))
    assert features.shape == (2, vit.channels, 2, 3)
    assert not features.requires_grad
    pixels = torch.nn.functional.interpolate(images.images / 255, (32, 48), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (vit.mean, vit.std))
    tokens = vit.net.forward_features((pixels - mean) / std)
    torch.testing.assert_close(features[:, :, 1, 2], tokens[:, vit.net.num_prefix_tokens + 5], rtol=1e-4, atol=1e-4)


def test_the_model_is_nowhere_in_what_is_trained_or_saved(vit: FoundationModel) -> None:
    loss = Foundation(spec(), None, vit)
    assert {name.partition(".")[0] for name in loss.state_dict()} == {
        "adapter",
        "factor_of_weight",
        "norms",
        "last_norms",
    }
    assert not any(parameter.requires_grad for parameter in vit.net.parameters())
    assert loss.identity() == {"source": f"{TINY_VIT}, random", "sha256": vit.fingerprint}
    assert vit.license == "apache-2.0"


def test_weights_come_from_a_file(vit: FoundationModel, tmp_path: Path) -> None:
    torch.save(vit.net.state_dict(), tmp_path / "vit.pt")
    assert FoundationModel(TINY_VIT, str(tmp_path / "vit.pt")).fingerprint == vit.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": None}, "model.weights: expected timm .*, or a file with a state dict, got null"),
        ({"name": "no_such_vit", "weights": "random"}, "model.name: timm cannot make no_such_vit"),
        ({"name": "resnet18", "weights": "random"}, "model.name: "),
        ({"name": TINY_VIT, "weights": "no/such/file.pt"}, "no/such/file.pt"),
    ],
)
def test_what_no_model_can_be_made_of_is_refused(options: dict[str, Any], message: str) -> None:
    pytest.importorskip("timm", reason="the vision transformers are timm's")
    with pytest.raises(DistillError, match=message):
        FoundationModel(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steer": {"share": 1.5}}, "steer: expected a share of the gradient"),
        ({"steer": {"share": 0.1, "tolerance": 0.2}}, "share=0.1 and tolerance=0.2"),
        ({"neck": {"level": 7}}, r"neck.level: expected one of the strides \[4, 8, 16, 32, 64\], got 7"),
        ({"student": replace(spec(), neck={})}, "neck: the student has no feature pyramid"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        Foundation(**{"student": spec(), "teacher": None, "model": FixedFeatures(), **options})
