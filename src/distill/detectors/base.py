"""The grammar that every detector shares: what is known of it before any forward pass, and the View it opens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from distill.detectors.view import LazyView
from distill.types import Batch, DetectorSpec, DistillError, View


class Detector(nn.Module):
    """A torchvision detection model, `net`, behind one grammar. Its state dict is torchvision's, prefixed by ``net.``.

    A subclass builds `net` and hands over what no state dict holds: its `options`, which are the arguments of its
    constructor. `report` says what was loaded at construction.
    """

    family: ClassVar[str]
    enum: ClassVar[Any]
    """torchvision's weights of this family (ResNet-50)."""
    coco_eps: ClassVar[float] = 0.0
    """Epsilon of the norms under the enum's COCO_V1: 0 by torchvision's builders, but not by FCOS's."""
    class_layers: ClassVar[Mapping[str, int]]
    """Layers whose rows belong to classes -> neighbouring rows a class (background first; per anchor, if dense)."""
    view_class: ClassVar[type[LazyView]]

    net: Any

    def __init__(self, net: nn.Module, spec: DetectorSpec, options: dict[str, Any], frozen: Sequence[str]) -> None:
        super().__init__()
        self.net = net
        self.spec = spec
        self.options = options
        self.report: list[str] = []
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
        """Open a View on `batch`, which must lie on the detector's device.

        `training` chooses between training and test counts of proposals, whatever `.training` says. `frozen` keeps
        every stage out of autograd. With a `seed` all draws come from it and the global stream is left alone; without
        one they come from the global stream in torchvision's order.

        The View keeps the autocast and grad mode it was opened under, so it does not matter where a stage is read. The stages
        named in `prefetch` are computed at once, and nothing else that they are built on is kept.
        """
        view = self.view_class(self, batch, training, frozen, seed)
        view.prefetch(prefetch)
        return cast(View, view)

    def describe(self) -> dict[str, Any]:
        """Everything that a state dict does not hold, as plain JSON: the family and the constructor's arguments."""
        backbone = {**self.options["backbone"], "weights": None}
        return {"family": self.family, **self.options, "backbone": backbone, "weights": None, "head": "keep"}

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order; label 0 is background."""
        return self.spec.classes

    @property
    def parameters_count(self) -> int:
        """Number of parameters, trained or not."""
        return sum(parameter.numel() for parameter in self.parameters())

    def train(self, mode: bool = True) -> Detector:
        """As in torch, but the statistics of frozen stages stay as they are, as their weights do."""
        super().train(mode)
        for name in self._frozen:
            self.net.backbone.body.get_submodule(name).eval()
        return self

    def pixels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and std as (3, 1, 1) float32. Not buffers: a teacher cast to bfloat16 must not round them."""
        if device not in self._pixels:
            mean, std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (self.spec.mean, self.spec.std))
            self._pixels[device] = mean, std
        return self._pixels[device]


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Class names in label order, each once. ("N/A" fills the unused labels of torchvision's COCO weights.)"""
    names = tuple(classes)
    twice = sorted(name for name, count in Counter(names).items() if count > 1 and name != "N/A")
    if not names or twice:
        raise DistillError(f"classes: expected at least one name, each once, got {list(names)}; repeated: {twice}")
    return names
