"""An image classifier as a guest: for losses that a classifier teaches, read from a file, or trained on the data's crops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from distill.data.datamodule import DetectionData
from distill.detectors.base import check_classes
from distill.detectors.weights import download, fit, read_state
from distill.files import atomic_write, read_json, write_text
from distill.frozen import FrozenModel
from distill.losses.crops import crops
from distill.progress import track
from distill.types import Batch, DistillError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN_COMMAND = "distill classifier FILE.pt data=…"
MISMATCH_ADVICE = "Set classifier.arch and classifier.classes to what the weights were made for."


class Classifier(FrozenModel):
    """A frozen torchvision ResNet that names what a crop shows. It has no background class.

    Args:
        arch: torchvision's name of a ResNet, ResNeXt or wide ResNet.
        weights: a file with a state dict, as the verb ``classifier`` writes it, or torchvision's name (IMAGENET1K_V1).
        classes: names in the order of the outputs; None takes those of torchvision's weights, or of the JSON that the verb
            writes beside the file.
        mean, std: pixel statistics that it was trained with, of RGB in [0, 1].

    Raises:
        DistillError: no weights, or weights that are unreadable, do not fit, or do not tell their classes.
    """

    def __init__(
        self,
        arch: str = "resnet50",
        weights: str | None = None,
        classes: Sequence[str] | None = None,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        if weights is None:
            raise DistillError(
                "classifier.weights: expected a file, or a name of torchvision's such as IMAGENET1K_V1, whose classes include "
                f"the student's; got null. Train one on the objects of the training images with\n  {TRAIN_COMMAND}"
            )
        state, known = _load_weights(arch, str(weights))
        names = known if classes is None else tuple(classes)
        if names is None:
            raise DistillError(
                f"classifier.classes: {weights} does not tell its classes: there is no {Path(weights).with_suffix('.json').name}"
                " beside it. Give their names in the order of the outputs"
            )
        net = build_classifier(arch, len(names))
        fit(net, state, str(weights), what=f"classifier ({arch}, {len(names)} classes)", advice=MISMATCH_ADVICE)
        super().__init__(net, str(weights))
        self.net, self.classes = net, names
        self.mean, self.std = tuple(mean), tuple(std)

    def images(self, batch: Batch) -> Tensor:
        """(B, 3, H, W) float32, normalised as the classifier expects, the padding too. It moves to the batch's device."""
        self.move(batch.images.device)
        return normalize_batch(batch, self.mean, self.std)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, h, w), normalised -> (N, classes)."""
        found: Tensor = self.net(images)
        return found

    def stem(self, images: Tensor) -> Tensor:
        """(N, 3, h, w), normalised -> (N, 64, h/4, w/4), after the max-pool; a gradient flows to the images."""
        net = self.net
        found: Tensor = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        return found


def build_classifier(arch: str, classes: int) -> torchvision.models.ResNet:
    """A fresh classifier, whose start values cost no draw of the global stream.

    Raises:
        DistillError: torchvision has no ResNet of this name.
    """
    known = torchvision.models.list_models(torchvision.models, include=["*resnet*", "resnext*"])
    if arch not in known:
        raise DistillError(f"classifier.arch: expected one of {', '.join(known)}, got '{arch}'")
    with torch.random.fork_rng(devices=[]):
        net: torchvision.models.ResNet = torchvision.models.get_model(arch, weights=None, num_classes=classes)
    return net


def _load_weights(arch: str, source: str) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """The weights of a file or of torchvision's name, and the class names that come along with them."""
    path = Path(source).expanduser()
    if path.is_file():
        facts = path.with_suffix(".json")
        return read_state(path), _read_class_names(facts) if facts.is_file() else None
    build_classifier(arch, 1)
    enum = torchvision.models.get_model_weights(arch).__members__
    if source not in enum:
        raise DistillError(
            f"classifier.weights: {source} is neither a file nor one of torchvision's names for {arch}, {', '.join(enum)}. "
            f"Train a classifier with\n  {TRAIN_COMMAND}"
        )
    return dict(download(enum[source], "classifier.weights")), tuple(enum[source].value.meta["categories"])


def _read_class_names(path: Path) -> tuple[str, ...]:
    names = read_json(path).get("classes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DistillError(f"{path}: expected a list of names as 'classes'")
    return check_classes(names)


def normalize_batch(batch: Batch, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The pixels of a batch (B, 3, H, W) float32 with these statistics."""
    center, scale = (
        torch.tensor(each).view(3, 1, 1).to(batch.images.device, non_blocking=True) for each in (mean, std)
    )
    return (batch.images.to(torch.float32, memory_format=torch.contiguous_format) / 255 - center) / scale


# -- making one


def crop_objects(batch: Batch, side: int) -> tuple[Tensor, Tensor]:
    """Crops (N, 3, side, side) of all ground-truth boxes, normalised, and their classes (N,) from 0."""
    boxes = torch.cat([target.boxes for target in batch.targets])
    owner = torch.cat([torch.full_like(target.labels, index) for index, target in enumerate(batch.targets)])
    labels = torch.cat([target.labels for target in batch.targets]) - 1
    return crops(normalize_batch(batch, MEAN, STD), batch.sizes, boxes, owner, side), labels


def train_classifier(
    data: DetectionData,
    file: Path,
    arch: str = "resnet50",
    start: str | None = None,
    epochs: int = 12,
    rate: float = 0.02,
    side: int = 112,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> float:
    """Train a classifier on the objects of the training images; returns its accuracy on those of the validation images.

    Plain: cross-entropy, SGD with momentum, one cycle of the learning rate, the data's own augmentation.

    Args:
        data: where the boxes come from.
        file: the state dict is written there, and a JSON with the class names beside it.
        arch: torchvision's name.
        start: weights to start from, but for the last layer: a file or torchvision's name; None: from scratch.
        epochs: how often each training image is seen.
        rate: highest learning rate.
        side: of a crop in pixels.
        device: to train on.
        seed: of the start values.
    """
    classes = check_classes(data.classes)
    torch.manual_seed(seed)
    net = build_classifier(arch, len(classes)).to(device)
    if start is not None:
        body = {name: value for name, value in _load_weights(arch, start)[0].items() if not name.startswith("fc.")}
        fit(
            net,
            body,
            start,
            fresh=("fc.",),
            what=f"classifier ({arch})",
            advice="Set --arch to what they were made for.",
        )
    loader = data.train_dataloader()
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(loader))
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for batch in track(loader, f"epoch {epoch + 1} of {epochs}"):
            pictures, labels = crop_objects(batch.to(device), side)
            if len(labels) > 1:  # batch norm has no statistics of one
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(net(pictures), labels))
                optimizer.step()
            schedule.step()
    state = {name: value.detach().cpu() for name, value in net.state_dict().items()}
    write_text(file.with_suffix(".json"), json.dumps({"arch": arch, "classes": list(classes)}, indent=2) + "\n")
    atomic_write(file, lambda handle: torch.save(state, handle))
    return measure_accuracy(net, data, side, device)


@torch.no_grad()
def measure_accuracy(net: torch.nn.Module, data: DetectionData, side: int, device: torch.device | str) -> float:
    """Part of the validation images' objects that are named rightly."""
    net.eval()
    right, count = 0, 0
    for batch in track(data.eval_dataloader("val"), "accuracy"):
        pictures, labels = crop_objects(batch.to(device), side)
        if len(labels):
            right += int((net(pictures).argmax(1) == labels).sum())
            count += len(labels)
    return right / max(1, count)
