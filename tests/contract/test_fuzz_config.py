"""Whatever is said on the command line or in a file: a run that can be built, or one message of ours.

``make test-all`` tries 500 settings; DISTILL_FUZZ=20000 tries that many settings a test.
"""

from __future__ import annotations

import copy
import os
from functools import cache
from typing import Any

import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.cli.config import compose, instantiate, override_checks, target_policy
from distill.cli.runs.assembly import build_losses
from distill.cli.runs.preflight import plan_losses, plan_teacher
from distill.cli.runs.teacher_cache import untrained
from distill.types import DetectorSpec, DistillError

DAILY, ALL = (int(os.environ.get("DISTILL_FUZZ", examples)) for examples in ("150", "500"))


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize="DISTILL_FUZZ" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )


@cache
def base(distill: str) -> DictConfig:
    compose.runs_folder([])  # plan_teacher asks Hydra for the name of the model option
    return compose.compose_config([f"distill={distill}", "paths.run=x", "name=x"])


LOSSES = ("defeat_full", "dsig", "ssim", "fgfi", "mimic", "tadf", "pad_mimic", "chen", "global_knowledge", "dicod")
VALUES = st.one_of(
    st.sampled_from(
        [
            "null",
            "true",
            "false",
            "-1",
            "0",
            "1",
            "2",
            "7",
            ".5",
            "1e308",
            "-1e-30",
            "nan",
            "inf",
            "-inf",
            "99999999999999999999",
            "[]",
            "{}",
            "[0]",
            "[1,2]",
            "[[1]]",
            "[null]",
            "{a:1}",
            "abc",
            "''",
            "???",
            "${seed}",
            "${nowhere}",
            "${oc.env:HOME}",
            "${model}",
            "${oc.decode:7}",
            "auto",
            "none",
            "cosine",
            "os.system",
            "[a,b]",
            "{neck:1}",
            "[-1]",
            "[nan]",
            "{_target_:os.system}",
            "[{_target_:os.system}]",
            "{_target_:torch.nn.Linear}",
        ]
    ),
    st.integers(-(10**6), 10**6).map(str),
    st.floats(width=32).map(str),
    st.text(st.characters(codec="utf-8"), max_size=6),
)


def keys(node: Any, prefix: str = "") -> list[str]:
    """Full keys of everything below a node."""
    pairs = node.items() if isinstance(node, dict) else ()
    return [each for key, value in pairs for each in (f"{prefix}{key}", *keys(value, f"{prefix}{key}."))]


def all_keys(distill: str) -> list[str]:
    plain = OmegaConf.to_container(base(distill), resolve=False)
    return [
        key
        for key in keys(plain)
        if key.split(".")[0] in ("data", "model", "schedule", "distill", "metrics", "teacher")
    ]


def lines(distill: str) -> st.SearchStrategy[list[str]]:
    line = st.tuples(st.sampled_from(["", "", "", "", "+", "++", "~"]), st.sampled_from(all_keys(distill)), VALUES)
    return st.lists(line.map(lambda part: f"{part[0]}{part[1]}={part[2]}"), min_size=1, max_size=2)


def changed(distill: str, words: list[str]) -> DictConfig:
    """The configuration with these overrides, as Hydra makes it."""
    cfg = copy.deepcopy(base(distill))
    OmegaConf.set_struct(cfg, True)
    try:
        parsed = OverridesParser.create().parse_overrides(words)
        if any(each.is_sweep_override() or each.is_hydra_override() for each in parsed):
            raise DistillError("a sweep")
        ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)
    except (
        HydraException,
        OmegaConfBaseException,
    ) as error:  # override_checks.validate_overrides makes a message of it
        raise DistillError(str(error)) from error
    compose.require_nodes(OmegaConf.to_container(cfg, resolve=False))  # type: ignore[arg-type]
    return cfg


@cache
def spec(group: str) -> DetectorSpec:
    with torch.device("meta"):
        node = base("mimic").model if group == "model" else base("mimic").teacher.model
        found: DetectorSpec = instantiate.build_node(
            node, classes=["a", "b"], **instantiate.without_weights(instantiate.to_containers(node))
        ).spec
    return found


def build(cfg: DictConfig, groups: set[str]) -> None:
    """What a run builds of these groups before it reads data."""
    if "data" in groups:
        instantiate.build_node(cfg.data)
    if "schedule" in groups:
        instantiate.build_node(cfg.schedule)
    if "metrics" in groups:
        for make in map(instantiate.build_node, instantiate.named_nodes(cfg.metrics).values()):
            make({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}, ("a",))
    with torch.device("meta"):
        if "model" in groups:
            instantiate.build_node(cfg.model, classes=["a", "b"], min_size=64, max_size=64)
        if "teacher" in groups:
            options = plan_teacher(cfg)
            if options is not None:
                untrained(options, ["a", "b"])
    if "distill" in groups:
        losses = plan_losses(cfg)
        needs_teacher = any(loss.kind.needs_teacher for loss in losses.values())
        build_losses(losses, spec("model"), spec("teacher") if needs_teacher else None)


def judged(error: DistillError) -> None:
    said = str(error)
    assert said.strip()
    assert len(said) < 20_000


def try_values(data: st.DataObject, distill: str) -> None:
    words = data.draw(lines(distill))
    state = torch.random.get_rng_state()
    try:
        build(changed(distill, words), {word.lstrip("+~").split(".")[0].split("=")[0] for word in words})
    except OmegaConfBaseException:  # of which the verb train makes a message
        return
    except DistillError as error:
        judged(error)
    finally:
        torch.random.set_rng_state(state)


@fuzz(DAILY)
@given(data=st.data(), distill=st.sampled_from(LOSSES))
def test_any_values_of_any_keys(data: st.DataObject, distill: str) -> None:
    try_values(data, distill)


@pytest.mark.exhaustive
@fuzz(ALL)
@given(data=st.data(), distill=st.sampled_from(LOSSES))
def test_many_values_of_any_keys(data: st.DataObject, distill: str) -> None:
    try_values(data, distill)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher=null", "distill.losses=true"], "expected a mapping of names to parts"),
        (["teacher=null", "distill.losses=abc"], "expected a mapping of names to parts"),
        (["+metrics.coco={neck:1}"], "distill.CocoMetric has no option neck"),
        (["distill.losses.defeat=${model}"], r"losses\.defeat: expected a DistillLoss, got distill\.FasterRCNN"),
    ],
)
def test_what_the_fuzz_found_once(words: list[str], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        build(changed("defeat_full", words), {word.lstrip("+~").split(".")[0].split("=")[0] for word in words})


GROUPS = compose.config_groups()
CHOICES = st.sampled_from(sorted(GROUPS)).flatmap(
    lambda group: st.one_of(st.sampled_from(GROUPS[group]), VALUES).map(lambda option: f"{group}={option}")
)
ODD = st.sampled_from(
    ["=", "a", "+", "~model", "~", "seed", "+x=1", "trust=[a]", "hydra.x=1", "hydra/y=z", "model@x=frcnn_r50", "-m"]
)
WORD = st.one_of(
    CHOICES,
    st.tuples(st.sampled_from(all_keys("defeat_full")), VALUES).map("=".join),
    st.text(st.characters(codec="utf-8"), max_size=8),
    ODD,
)


def try_words(words: list[str]) -> None:
    try:
        target_policy.set_trusted(words)
        override_checks.validate_overrides(words)
    except DistillError as error:
        judged(error)
    finally:
        target_policy.set_trusted([])


@fuzz(max(1, DAILY // 10))
@given(words=st.lists(WORD, min_size=1, max_size=3))
def test_any_command_line(words: list[str]) -> None:
    try_words(words)


@pytest.mark.exhaustive
@fuzz(max(1, ALL // 10))
@given(words=st.lists(WORD, min_size=1, max_size=3))
def test_many_command_lines(words: list[str]) -> None:
    try_words(words)
