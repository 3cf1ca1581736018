"""FGD: its four terms by loops over boxes, cells and channels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill.losses.base import DistillLoss
from distill.losses.context import GlobalContext
from distill.losses.fgd import FGD
from distill.losses.masks import inverse_areas
from distill.types import DetectorSpec, DistillError
from helpers.fake_view import FakeView, batch, random_view, spec
from helpers.loss_grid import NOTHING, OBJECTS, LossGrid, TrainedLayers

TAU = 0.5


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(v / TAU) for v in row]
    return [power / sum(powers) for power in powers]


def slow_attention(image: Tensor) -> tuple[Tensor, Tensor]:
    """(C, H, W) -> the attention of the cells (H, W), and of the channels (C,)."""
    channels, height, width = image.shape
    cells = [sum(abs(v) for v in cell) / channels for cell in image.flatten(1).T.tolist()]
    means = [sum(abs(v) for v in row) / (height * width) for row in image.flatten(1).tolist()]
    spatial = torch.tensor([height * width * v for v in softmax(cells)], dtype=torch.float64).view(height, width)
    return spatial, torch.tensor([channels * v for v in softmax(means)], dtype=torch.float64)


def slow_masks(boxes: Tensor, size: tuple[int, int], height: int, width: int) -> tuple[Tensor, Tensor]:
    inside = torch.zeros(height, width, dtype=torch.float64)
    for x1, y1, x2, y2 in boxes.tolist():
        a, b = math.floor(x1 * width / size[1]), math.ceil(x2 * width / size[1])
        c, d = math.floor(y1 * height / size[0]), math.ceil(y2 * height / size[0])
        for row in range(c, min(d, height - 1) + 1):
            for column in range(a, min(b, width - 1) + 1):
                inside[row, column] = max(inside[row, column].item(), 1 / ((b - a + 1) * (d - c + 1)))
    outside = (inside == 0).double()
    return inside, outside / max(1.0, outside.sum().item())


def slow_context(block: GlobalContext, image: Tensor) -> Tensor:
    """(C, H, W) -> (C, H, W)."""
    cells = image.flatten(1)
    logits = block.mask.weight.flatten() @ cells
    context = cells @ (logits.exp() / logits.exp().sum())
    hidden = block.reduce.weight[:, :, 0, 0] @ context + block.reduce.bias
    variance = ((hidden - hidden.mean()) ** 2).mean()
    hidden = (hidden - hidden.mean()) / (variance + 1e-5).sqrt()
    hidden = (hidden * block.norm.weight.flatten() + block.norm.bias.flatten()).clamp(min=0)
    return image + (block.expand.weight[:, :, 0, 0] @ hidden + block.expand.bias)[:, None, None]


def stirred(loss: FGD) -> FGD:
    """Context blocks that are not the identity; the loss's seed decides their values."""
    generator = torch.Generator().manual_seed(loss.seed)
    with torch.no_grad():
        for block in (block for blocks in loss.contexts.values() for block in blocks.values()):
            block.expand.weight.normal_(generator=generator)
            block.expand.bias.normal_(generator=generator)
    return loss


EQUAL_WEIGHTS = {"foreground": 1.0, "background": 1.0, "attention": 1.0, "relation": 1.0}


class TestFGD(TrainedLayers):
    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return stirred(FGD(student, teacher, neck={**EQUAL_WEIGHTS, "levels": None}, adapter={"kernel": None}))

    def adapted(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return stirred(FGD(student, teacher, neck={**EQUAL_WEIGHTS, "levels": 3}, adapter={"kernel": 1}))

    def oracle(self, loss: FGD, student: FakeView, teacher: FakeView) -> dict[str, float]:
        terms = dict.fromkeys(loss.weights, 0.0)
        images = len(student.batch)
        for at, level in student.neck.items():
            for x, y, target in zip(level, teacher.neck[at], student.batch.targets, strict=True):
                spatial, channels = slow_attention(y)
                inside, outside = slow_masks(target.boxes, (64, 64), *x.shape[1:])
                error = (spatial * channels[:, None, None] * (y - x) ** 2).sum(0)
                own_spatial, own_channels = slow_attention(x)
                attention = (spatial - own_spatial).abs().sum() + (channels - own_channels).abs().sum()
                related = slow_context(loss.contexts["teacher"][str(at)], y) - slow_context(
                    loss.contexts["student"][str(at)], x
                )
                values = (inside * error).sum(), (outside * error).sum(), attention, related.square().sum()
                for term, value in zip(loss.weights, values, strict=True):
                    terms[term] += value.item() / images
        return terms

    relative = 1e-6  # masks are float32


class TestFocalFGD(LossGrid):
    """Without the context blocks there is nothing to train."""

    relative = 1e-6

    def loss(self, student: DetectorSpec, teacher: DetectorSpec) -> DistillLoss:
        return FGD(student, teacher, neck={**EQUAL_WEIGHTS, "relation": 0.0, "levels": 2}, adapter={"kernel": None})

    def oracle(self, loss: DistillLoss, student: FakeView, teacher: FakeView) -> dict[str, float]:
        whole = FGD(self.student, self.teacher, neck={**EQUAL_WEIGHTS, "levels": 2}).double()
        kept = {at: x for at, x in student.neck.items() if at in (4, 8)}
        some = FakeView(student.batch, student.spec, neck=kept)
        terms = TestFGD().oracle(whole, some, teacher)
        return {name: value for name, value in terms.items() if name != "neck.relation"}


def test_context_blocks_start_as_the_identity_and_both_are_trained() -> None:
    loss = FGD(spec(), spec(), neck=EQUAL_WEIGHTS).double()
    student, teacher = random_view(batch(OBJECTS), spec(), 1), random_view(batch(OBJECTS), spec(), 2)
    values = loss(student, teacher)
    expected = sum((student.neck[at] - teacher.neck[at]).square().sum() / 2 for at in (4, 8, 16, 32))
    torch.testing.assert_close(values["neck.relation"], expected)
    values["neck.relation"].backward()
    assert all(blocks["4"].expand.bias.grad.any() for blocks in loss.contexts.values())


def test_the_teachers_blocks_are_saved_with_the_loss() -> None:
    """The Distiller saves the losses' weights beside the student's, and a resume loads them."""
    trained, fresh = stirred(FGD(spec(), spec())), FGD(spec(), spec(), seed=1)
    fresh.load_state_dict(trained.state_dict())
    views = (
        random_view(batch(OBJECTS), spec(), 1, dtype=torch.float32),
        random_view(batch(OBJECTS), spec(), 2, dtype=torch.float32),
    )
    assert torch.equal(fresh(*views)["neck.relation"], trained(*views)["neck.relation"])
    assert any("contexts.teacher" in name for name in trained.state_dict())


def test_every_box_is_on_every_level_and_counts_as_one() -> None:
    boxes = [torch.tensor([[1.0, 1.0, 30.0, 20.0]]), torch.zeros(0, 4)]
    for cells in ((16, 16), (4, 4)):
        mask = inverse_areas(boxes, [(64, 64)] * 2, cells)
        assert mask[0].sum().item() == pytest.approx(1)
        assert not mask[1].any()


def test_boxes_of_padded_images_are_stretched_as_published_only_on_demand() -> None:
    images = replace(batch([OBJECTS[1], NOTHING]), sizes=((64, 64), (64, 64)))
    images = replace(images, sizes=((64, 32), (64, 64)))
    student, teacher = random_view(images, spec(), 1), random_view(images, spec(), 2)
    for boxes, width in (("padded", 64), ("image", 32)):
        mask = FGD(spec(), spec(), boxes=boxes)._objects(student, (16, 16))
        expected, _ = slow_masks(images.targets[0].boxes, (64, width), 16, 16)
        torch.testing.assert_close(mask[0], expected.float())
    assert teacher.spec == student.spec


def test_refusals() -> None:
    with pytest.raises(DistillError, match="boxes: expected padded or image"):
        FGD(spec(), spec(), boxes="original")
    with pytest.raises(DistillError, match="temperature: expected a number above 0"):
        FGD(spec(), spec(), temperature=0)
