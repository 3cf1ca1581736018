"""A frozen vision transformer of timm whose patch features teach a detector."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.detectors.state_dicts import fit, read_state
from distill.detectors.timm import timm_network
from distill.frozen import FrozenModel
from distill.training.classifier import normalize_batch
from distill.types import Batch, DistillError

KEY = "model.name"


class FoundationModel(FrozenModel):
    """A frozen vision transformer of timm: its patch tokens after the last normalization, as a map.

    The weights of a foundation model have a license of their own, which also binds what is made with them. DINOv2
    (``*_dinov2.lvd142m``) and SigLIP 2 are Apache-2.0; DINOv3 (``*_dinov3.lvd1689m``) has Meta's DINOv3 License. The
    attribute `license` is what timm states.

    Args:
        name: timm's name of a vision transformer, with the tag of its weights.
        weights: ``timm`` for the weights that timm downloads; a file with a state dict; ``random`` for tests.

    Raises:
        DistillError: `weights` is None; timm is missing or cannot build the network; the weights are unreadable or do
            not fit; the network has no patches.
    """

    def __init__(self, name: str = "vit_small_patch14_dinov2.lvd142m", weights: str | None = None) -> None:
        if weights is None:
            raise DistillError(
                "model.weights: expected timm (timm downloads the weights of model.name), or a file with a state dict, "
                "got null"
            )
        with torch.random.fork_rng(devices=[]):
            options = {"num_classes": 0, "dynamic_img_size": True}
            net = timm_network(name, KEY, pretrained=weights == "timm", **options)
        patches = getattr(net, "patch_embed", None)
        if patches is None or not hasattr(net, "num_prefix_tokens"):
            raise DistillError(f"{KEY}: expected a vision transformer, {name} has no patches")
        if weights not in ("timm", "random"):
            path = Path(weights).expanduser()
            advice = "Set model.name to what the weights were made for."
            fit(net, read_state(path), str(path), what=f"vision transformer ({name})", advice=advice)
        super().__init__(net, name if weights == "timm" else f"{name}, {weights}")
        self.net: Any = net
        config = net.pretrained_cfg
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.patch: tuple[int, int] = tuple(patches.patch_size)
        self.channels: int = net.num_features
        self.license = str(config.get("license") or "unknown")

    @torch.no_grad()
    def features(self, batch: Batch, cells: tuple[int, int]) -> Tensor:
        """Compute the patch features of a batch on a grid of `cells` (rows, columns): one patch per cell.

        The model moves to the device of the batch. The images, with their padding, are resized to the size of the grid.

        Returns:
            (B, channels, rows, columns).
        """
        self.move(batch.images.device)
        size = cells[0] * self.patch[0], cells[1] * self.patch[1]
        images = normalize_batch(batch, self.mean, self.std)
        images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        tokens: Tensor = self.net.forward_features(images)[:, self.net.num_prefix_tokens :]
        if tokens.shape[1] != math.prod(cells):
            raise DistillError(f"{KEY}: expected {math.prod(cells)} patch tokens, got {tokens.shape[1]}")
        return tokens.transpose(1, 2).reshape(len(tokens), -1, *cells)
