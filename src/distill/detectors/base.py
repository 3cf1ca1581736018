"""The base class of all detectors: a torchvision network with a spec, a description and Views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from distill.detectors.prediction import Prediction, predict_images
from distill.detectors.view import LazyView
from distill.imaging.resizing import ResizeOptions
from distill.types import Batch, Detections, DetectorSpec, DistillError, View


class Detector(nn.Module):
    """A torchvision detection model, `net`, with the interface that all families share.

    The state dict is torchvision's, with the prefix ``net.``. A subclass builds `net` and passes its `options`: the
    arguments of its constructor, which no state dict holds. The lines in `report` say what was loaded at construction.
    `resize` are the options of the resize in its training; `load_detector` sets them.

    Args:
        net: torchvision's network.
        spec: the facts about the detector that Views and losses use.
        options: the arguments of the subclass's constructor, in plain containers.
        frozen: names of the body's modules that stay in evaluation mode.
    """

    family: ClassVar[str]
    """Name of the family, see `DetectorSpec.family`."""
    enum: ClassVar[Any]
    """torchvision's enum of weights of this family, with a ResNet-50."""
    coco_eps: ClassVar[float] = 0.0
    """Epsilon of the norms for the enum's COCO_V1. torchvision's builders set 0, except the builder of FCOS."""
    class_layers: Mapping[str, int]
    """Name of a layer whose rows belong to classes -> number of consecutive rows per class.

    `rows_around` names further rows. In a dense head all rows repeat for each anchor.
    """
    needs_squares: ClassVar[bool] = False
    """Whether the detector sees padding as image. Where it takes part, all images are resized to squares."""
    paper_schedule: ClassVar[str | None] = None
    """Option of the group ``schedule`` for a public data set at full size. None: that of the papers on the data set."""
    float32_parts: ClassVar[Sequence[str]] = ()
    """Names of modules of `net` that keep float32 in a teacher of a lower precision, because they compute boxes."""
    view_class: type[LazyView]
    """The View of the family, or of the detector's options."""
    body_path: ClassVar[str] = "backbone.body"
    """Name of the backbone's body in `net`."""
    probe_size: tuple[int, int] = (64, 96)
    """(height, width) of a small image that the network takes."""

    net: Any

    def __init__(self, net: nn.Module, spec: DetectorSpec, options: dict[str, Any], frozen: Sequence[str]) -> None:
        super().__init__()
        self.net = net
        self.spec = spec
        self.options = options
        self.report: list[str] = []
        self.resize = ResizeOptions()
        self._frozen = tuple(frozen)
        self._pixels: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.train()

    def view(
        self,
        batch: Batch,
        *,
        training: bool = True,
        frozen: bool = False,
        seed: int | None = None,
        prefetch: Sequence[str] = (),
    ) -> View:
        """Create a View on a batch.

        The View stores the autocast mode and the grad mode at its creation. All stages use these modes, in whatever
        mode a stage is read.

        Args:
            batch: on the detector's device.
            training: whether the numbers of proposals are those of training or of testing. `.training` is not used.
            frozen: whether autograd records no stage.
            seed: the seed of all random draws. The global random state does not change. Without a seed the draws come
                from the global random state, in torchvision's order.
            prefetch: names of stages to compute at once. Intermediate results of these stages are not kept.
        """
        view = self.view_class(self, batch, training, frozen, seed)
        view.prefetch(prefetch)
        return cast(View, view)

    def forward(self, images: Iterable[Any], score: float = 0.0, batch_size: int = 1) -> list[Prediction]:
        """Detect objects in images, on the detector's device and in evaluation mode. Gradients are not recorded.

        Args:
            images: tensors (3, H, W), arrays (H, W, 3), PIL images or paths of files, see `imaging.conversion`. They
                are resized as in the detector's training.
            score: lowest score of a detection. The detector itself has a limit, too (``model.score_thresh``).
            batch_size: images that are computed together, if they have the same size after resize and padding. The
                results do not depend on this number, up to rounding.

        Returns:
            One prediction per image, in the order of the images, on the CPU.

        Raises:
            DistillError: an image cannot be read.
        """

        def detect(batch: Batch) -> list[Detections]:
            return self.view(batch.to(self.device), training=False, frozen=True).detections

        training, limits = self.training, (self.options["min_size"], self.options["max_size"])
        self.eval()
        try:
            return predict_images(images, detect, self.classes, limits, self.resize, score, batch_size)
        finally:
            self.train(training)

    def describe(self) -> dict[str, Any]:
        """Return what a state dict does not hold, in plain containers: the family and the constructor's arguments.

        A family that is not part of distill is named by the path of its class.
        """
        backbone = {**self.options["backbone"], "weights": None}
        is_own = type(self).__module__.partition(".")[0] == __name__.partition(".")[0]
        family = self.family if is_own else import_path(type(self))
        return {"family": family, **self.options, "backbone": backbone, "weights": None, "head": "keep"}

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order; label 0 is background."""
        return self.spec.classes

    @classmethod
    def has_batch_norms(cls, backbone: Mapping[str, Any]) -> bool:
        """Whether a backbone has batch norms, which ``backbone.norm=frozen`` fixes in a teacher.

        Args:
            backbone: the argument `backbone` of the constructor.
        """
        return True

    @classmethod
    def side_multiple(cls, options: Mapping[str, Any]) -> int:
        """Return the number of pixels of which both sides of every batch must be multiples.

        Args:
            options: the arguments of the constructor.
        """
        return 1

    def rows_around(self, layer: str) -> tuple[int, int]:
        """Return how many groups of rows a layer of `class_layers` has before and behind those of the classes.

        torchvision's layers have one before them: the background, which has label 0.
        """
        return 1, 0

    def read_published(self, source: str) -> Any:
        """Read weights in a format of the library that this family comes from, other than torchvision.

        Returns:
            A `weights.Source`, or None if `source` names no such weights.
        """
        return None

    @property
    def body(self) -> Any:
        """The part of the network that computes the maps C2 to C5."""
        return self.net.get_submodule(self.body_path)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def parameters_count(self) -> int:
        """Number of parameters, trained or not."""
        return sum(parameter.numel() for parameter in self.parameters())

    def train(self, mode: bool = True) -> Detector:
        """Set the mode as in torch. Frozen stages stay in evaluation mode, so that their statistics do not change."""
        super().train(mode)
        for name in self._frozen:
            self.body.get_submodule(name).eval()
        return self

    def pixels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each (3, 1, 1) float32, on a device.

        They are not buffers, because a cast of the teacher to bfloat16 must not round them.
        """
        if device not in self._pixels:
            mean, std = (
                torch.tensor(values, device=device).view(3, 1, 1) for values in (self.spec.mean, self.spec.std)
            )
            self._pixels[device] = mean, std
        return self._pixels[device]


def import_path(kind: type) -> str:
    """The path by which a class is imported: module and name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the class names as a tuple in label order.

    Each name may occur once, except "N/A", which fills the unused labels of torchvision's COCO weights.

    Raises:
        DistillError: the list is empty, or a name is repeated.
    """
    names = tuple(classes)
    repeated = sorted(name for name, count in Counter(names).items() if count > 1 and name != "N/A")
    if not names or repeated:
        raise DistillError(f"classes: expected at least one name, each once, got {list(names)}; repeated: {repeated}")
    return names
