"""One training step of an option of the group ``distill`` with small detectors, or the reason why it is refused."""

from __future__ import annotations

import functools
from typing import Any

import torch

from distill.cli.config import compose, instantiate
from distill.teacher import Teacher
from distill.training.distiller import Distiller
from distill.training.foundation import FoundationModel
from distill.types import DistillError
from helpers.detectors import FAMILIES, QUERY_FAMILIES, random_detector, random_query_detector, square_batch
from helpers.loss_states import CROP_SIDE, RandomClassifier
from helpers.training import sgd

OPTIONS = [option for option in compose.config_groups()["distill"] if option != "none"]
"""All options but ``none``."""
NECK = 64
"""Channels of all necks, and of all queries."""


def small_pair(student: str, teacher: str) -> tuple[Any, Any]:
    """A small student and teacher of two families."""
    return _small(student, 0), _small(teacher, 1)


def _small(family: str, seed: int) -> Any:
    if family in FAMILIES:
        return random_detector(family, seed, neck_channels=NECK)
    queries = {"decoder_channels": NECK} if "decoder_channels" in QUERY_FAMILIES[family].small else {}
    return random_query_detector(family, seed, neck_channels=NECK, **queries)


@functools.cache
def _nodes(option: str) -> dict[str, Any]:
    losses = compose.compose_config([f"distill={option}", "hydra.run.dir=."]).distill.losses
    nodes: dict[str, Any] = instantiate.to_containers(losses)
    return nodes


@functools.cache
def _vision_transformer() -> FoundationModel:
    return FoundationModel("test_vit.r160_in1k", "random")


def _loss(node: dict[str, Any], student: Any, teacher: Any) -> Any:
    """The loss of a node. The model that it may hold is a tiny one with random weights."""
    options, held = dict(node), dict[str, Any]()
    if options.pop("classifier", None):
        held, options["size"] = {"classifier": RandomClassifier()}, CROP_SIDE
    elif options.pop("model", None):
        held = {"model": _vision_transformer()}
    return instantiate.build_node(options, student=student.spec, teacher=teacher.spec, **held)


def refusal(option: str, student: Any, teacher: Any) -> str:
    """Build the losses of an option, and make one step forward and backward if they accept the pair.

    The second one of the two images has no boxes.

    Returns:
        The reason for which the losses refuse the pair; empty if the step was made. It then gave finite terms, and a
        gradient of the option's own terms at the student's backbone.
    """
    try:
        losses = {name: _loss(node, student, teacher) for name, node in _nodes(option).items()}
    except DistillError as error:
        return str(error)
    module = Distiller(student.train(), Teacher(teacher), losses, schedule=sgd(), metrics=[])
    module.zero_grad()
    step = module.compute_step(square_batch(((128, 128),) * 2), seed=1, progress=0.5)
    assert all(value.isfinite() for value in step.terms.values()), option
    own = [value for name, value in step.losses.items() if not name.startswith("student/")]
    assert own, option
    body = [parameter for parameter in student.body.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(torch.stack(own).sum(), body, retain_graph=True, allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in found), option
    step.loss.backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients), option
    return ""
