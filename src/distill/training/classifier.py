"""An image classifier as the teacher of a loss. It is loaded from a file or trained on crops of the training images."""

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
from distill.detectors.state_dicts import fit, read_state
from distill.detectors.torchvision_weights import download
from distill.files import atomic_write, read_json, write_text
from distill.frozen import FrozenModel
from distill.losses.crops import crops
from distill.progress import track
from distill.types import Batch, DistillError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN_COMMAND = "distill classifier FILE.pt data=…"
MISMATCH_ADVICE = "Set classifier.arch and classifier.classes to what the weights were made for."


class Classifier(FrozenModel):
    """A frozen torchvision ResNet that classifies crops of objects. It has no background class.

    Args:
        arch: torchvision's name of a ResNet, ResNeXt or wide ResNet.
        weights: a file with a state dict, as the command `distill classifier` writes it, or the name of a weights enum
            of torchvision (IMAGENET1K_V1).
        classes: class names in the order of the outputs; None: the names stored with torchvision's weights, or in the
            JSON file that `distill classifier` writes beside the weights.
        mean, std: pixel statistics of the classifier's training, of RGB in [0, 1].

    Raises:
        DistillError: `weights` is None, or the weights are unreadable, do not fit, or have no class names.
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
                "classifier.weights: expected a file, or a name of torchvision's such as IMAGENET1K_V1, whose classes "
                f"include the student's; got null. Train one on the objects of the training images with\n"
                f"  {TRAIN_COMMAND}"
            )
        state, known = _load_weights(arch, str(weights))
        names = known if classes is None else tuple(classes)
        if names is None:
            raise DistillError(
                f"classifier.classes: {weights} does not tell its classes: there is no "
                f"{Path(weights).with_suffix('.json').name} beside it. Give their names in the order of the outputs"
            )
        net = build_classifier(arch, len(names))
        fit(net, state, str(weights), what=f"classifier ({arch}, {len(names)} classes)", advice=MISMATCH_ADVICE)
        super().__init__(net, str(weights))
        self.net, self.classes = net, names
        self.mean, self.std = tuple(mean), tuple(std)

    def images(self, batch: Batch) -> Tensor:
        """Normalize the images of a batch for the classifier, including their padding.

        The classifier moves to the device of the batch.

        Returns:
            (B, 3, H, W) float32.
        """
        self.move(batch.images.device)
        return normalize_batch(batch, self.mean, self.std)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Compute the class logits (N, K) of normalized images (N, 3, h, w), without a gradient."""
        logits: Tensor = self.net(images)
        return logits

    def stem(self, images: Tensor) -> Tensor:
        """Compute the maps (N, 64, h/4, w/4) after the max-pool from normalized images (N, 3, h, w).

        A gradient flows to the images.
        """
        net = self.net
        features: Tensor = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        return features


def build_classifier(arch: str, classes: int) -> torchvision.models.ResNet:
    """Build a classifier with random weights and `classes` outputs.

    The state of torch's global random number generator is restored afterwards.

    Raises:
        DistillError: torchvision has no ResNet with this name.
    """
    known = torchvision.models.list_models(torchvision.models, include=["*resnet*", "resnext*"])
    if arch not in known:
        raise DistillError(f"classifier.arch: expected one of {', '.join(known)}, got '{arch}'")
    with torch.random.fork_rng(devices=[]):
        net: torchvision.models.ResNet = torchvision.models.get_model(arch, weights=None, num_classes=classes)
    return net


def _load_weights(arch: str, source: str) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """Load weights from a file or from torchvision. Return them with the stored class names, or None without names."""
    path = Path(source).expanduser()
    if path.is_file():
        facts = path.with_suffix(".json")
        return read_state(path), _read_class_names(facts) if facts.is_file() else None
    build_classifier(arch, 1)
    enum = torchvision.models.get_model_weights(arch).__members__
    if source not in enum:
        raise DistillError(
            f"classifier.weights: {source} is neither a file nor one of torchvision's names for {arch}, "
            f"{', '.join(enum)}. Train a classifier with\n  {TRAIN_COMMAND}"
        )
    return dict(download(enum[source], "classifier.weights")), tuple(enum[source].value.meta["categories"])


def _read_class_names(path: Path) -> tuple[str, ...]:
    names = read_json(path).get("classes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DistillError(f"{path}: expected a list of names as 'classes'")
    return check_classes(names)


def normalize_batch(batch: Batch, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the pixels of a batch as (B, 3, H, W) float32, normalized with these statistics of RGB in [0, 1]."""
    center, scale = (
        torch.tensor(channels).view(3, 1, 1).to(batch.images.device, non_blocking=True) for channels in (mean, std)
    )
    return (batch.images.to(torch.float32, memory_format=torch.contiguous_format) / 255 - center) / scale


# -- training a classifier


def crop_objects(batch: Batch, side: int) -> tuple[Tensor, Tensor]:
    """Crop all ground-truth boxes of a batch. Return normalized crops (N, 3, side, side) and classes (N,) from 0."""
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
    """Train a classifier on crops of the objects in the training images.

    The training uses cross-entropy, SGD with momentum, the one-cycle learning rate and the augmentation of `data`.

    Args:
        data: source of the images and boxes.
        file: path of the state dict to write. A JSON file with the class names is written beside it.
        arch: torchvision's name of a ResNet, ResNeXt or wide ResNet.
        start: initial weights of all layers but the last: a file or a name of torchvision; None: random weights.
        epochs: passes over the training images.
        rate: highest learning rate.
        side: side of a crop in pixels.
        device: device of the training.
        seed: seed of the random initial weights.

    Returns:
        The accuracy on the objects in the validation images, in [0, 1].

    Raises:
        DistillError: `arch` is unknown, or the weights `start` cannot be read or do not fit.
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
            if len(labels) > 1:  # batch norm needs more than one sample
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
    """Return the fraction of the objects in the validation images that the classifier labels correctly."""
    net.eval()
    right, count = 0, 0
    for batch in track(data.eval_dataloader("val"), "accuracy"):
        pictures, labels = crop_objects(batch.to(device), side)
        if len(labels):
            right += int((net(pictures).argmax(1) == labels).sum())
            count += len(labels)
    return right / max(1, count)
