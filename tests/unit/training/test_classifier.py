"""The image classifier: what it reads and refuses, that it is frozen, and that one can be made."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from distill.data.datamodule import DetectionData
from distill.data.shapes import CLASSES, Shapes
from distill.losses.crops import crops
from distill.training.classifier import Classifier, crop_objects, train_classifier
from distill.types import Batch, DistillError, Target

NAMES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=3)
    for norm in (each for each in net.modules() if isinstance(each, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_mean, -0.2, 0.2)
    path = tmp_path_factory.mktemp("classifier") / "made.pt"
    torch.save(net.state_dict(), path)
    return path


def batch() -> Batch:
    images = torch.randint(0, 256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    boxes = torch.tensor([[4.0, 4, 40, 50], [20, 10, 60, 30]])
    targets = (Target(boxes, torch.tensor([2, 3])), Target(boxes[:0], torch.zeros(0, dtype=torch.int64)))
    return Batch(images, ((64, 96), (64, 80)), ((64, 96), (64, 80)), targets, (1, 2))


def test_says_what_torchvision_s_own_model_says(file: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    made = Classifier("resnet18", str(file), NAMES, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    assert torch.equal(state, torch.get_rng_state())
    net = torchvision.models.resnet18(num_classes=3).eval()
    net.load_state_dict(torch.load(file, weights_only=True))
    seen: list[Tensor] = []
    net.maxpool.register_forward_hook(lambda *each: seen.append(each[2]))
    center, scale = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.1]).view(3, 1, 1)
    images = (batch().images / 255 - center) / scale
    torch.testing.assert_close(made.images(batch()), images)
    expected = net(images)
    assert torch.equal(made.logits(images), expected)
    assert torch.equal(made.stem(images), seen[0])


def test_a_gradient_flows_through_the_stem_and_not_to_its_weights(file: Path) -> None:
    made = Classifier("resnet18", str(file), NAMES)
    images = made.images(batch()).requires_grad_()
    assert not made.logits(images).requires_grad
    made.stem(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(each.grad is None for each in made.net.parameters())


def test_is_a_frozen_guest(file: Path) -> None:
    made = Classifier("resnet18", str(file), NAMES)
    assert copy.deepcopy(made) is made
    assert not isinstance(made, torch.nn.Module)
    assert not any(module.training for module in made.net.modules())
    before = made.fingerprint
    made.logits(made.images(batch()))
    made._fingerprint = None
    assert made.fingerprint == before


def test_class_names_come_with_the_weights_or_are_given(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"classifier.classes: .*made.json"):
        Classifier("resnet18", str(file))
    beside = tmp_path / "named.pt"
    beside.write_bytes(file.read_bytes())
    beside.with_suffix(".json").write_text(json.dumps({"classes": ["a", "b", "c"]}))
    assert Classifier("resnet18", str(beside)).classes == ("a", "b", "c")
    assert Classifier("resnet18", str(beside), NAMES).classes == NAMES


def test_torchvision_s_names_bring_their_classes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("distill.training.classifier.download", lambda entry, option: state)
    made = Classifier("resnet18", "IMAGENET1K_V1")
    assert len(made.classes) == 1000
    assert made.classes[:2] == ("tench", "goldfish")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": None}, r"classifier.weights: .*got null.*\n  distill classifier FILE.pt"),
        ({"weights": "missing.pt"}, r"missing.pt is neither a file nor .* IMAGENET1K_V1.*\n  distill classifier"),
        ({"arch": "resnet19"}, "classifier.arch: expected one of .*resnet18.*got 'resnet19'"),
        ({"arch": "vgg16"}, "classifier.arch"),
        (
            {"arch": "resnet34"},
            r"do not fit this classifier \(resnet34, 3 classes\).\n.*missing: .*\nSet classifier.arch",
        ),
        ({"classes": ("cat", "dog")}, r"of another shape: fc.bias: \(3,\), expected \(2,\)"),
    ],
)
def test_what_cannot_be_a_classifier_is_refused(options: dict[str, object], message: str, file: Path) -> None:
    with pytest.raises(DistillError, match=message):
        Classifier(**{"arch": "resnet18", "weights": str(file), "classes": NAMES, **options})  # type: ignore[arg-type]


def test_only_tensors_are_unpickled(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(num_classes=3), tmp_path / "pickle.pt")
    with pytest.raises(DistillError, match="not a file of tensors"):
        Classifier("resnet18", str(tmp_path / "pickle.pt"), NAMES)


def test_objects_are_the_crops_of_boxes_with_their_classes() -> None:
    pictures, labels = crop_objects(batch(), 16)
    assert labels.tolist() == [1, 2]
    images = (batch().images / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    boxes = batch().targets[0].boxes
    torch.testing.assert_close(
        pictures, crops(images[:1], [(64, 96)], boxes, torch.tensor([0, 0]), 16), atol=1e-4, rtol=0
    )


class Known(Shapes):
    """Shapes whose validation images are the training images: what can be learnt by heart."""

    def read_split(self, split: str) -> Any:
        return super().read_split("train")


def test_one_is_made_that_learns_and_can_be_read(tmp_path: Path) -> None:
    source = Known(train=6, val=6, test=0, size=64)
    data = DetectionData(source, batch_size=3, workers=0, min_size=64, max_size=64, flip=0.0)
    right = train_classifier(data, tmp_path / "made.pt", "resnet18", epochs=20, side=32)
    made = Classifier("resnet18", str(tmp_path / "made.pt"))
    assert made.classes == tuple(CLASSES)
    assert right > 0.6  # one in six by chance
    found = [
        (made.logits(pictures).argmax(1), labels)
        for pictures, labels in (crop_objects(b, 32) for b in data.eval_dataloader("val"))
    ]
    hits = torch.cat([names == labels for names, labels in found])
    assert hits.float().mean().item() == pytest.approx(right)

    train_classifier(
        data, tmp_path / "on.pt", "resnet18", start=str(tmp_path / "made.pt"), epochs=1, rate=1e-6, side=32
    )
    stem = [torch.load(tmp_path / name, weights_only=True)["conv1.weight"] for name in ("made.pt", "on.pt")]
    torch.testing.assert_close(*stem, atol=1e-4, rtol=0)
