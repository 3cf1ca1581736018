"""The table of all options of the group ``distill``: what each compares, for which detectors, with which weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf

from distill.cli.config import compose, instantiate
from distill.cli.config.suggestions import nearest
from distill.types import DetectorSpec, DistillError

PAIRS = {
    "two-stage": ("faster_rcnn", "faster_rcnn"),
    "one-stage": ("retinanet", "retinanet"),
    "FCOS": ("fcos", "fcos"),
    "mixed": ("retinanet", "faster_rcnn"),
}
"""Name -> the families of student and teacher for which an option is built."""
DISTRIBUTIONS = "distribution heads"
"""Name of a pair of one-stage detectors with ``box_head=distribution``, for options that fit no other pair."""
KINDS = {
    **dict.fromkeys(("neck", "backbone", "regions", "nodes", "hint"), "features"),
    **dict.fromkeys(("edges", "relation"), "relations"),
    **dict.fromkeys(("pixels", "features"), "boxes"),
    "tokens": "masks",
}
"""First part of a term's name -> what the term compares. Other terms compare outputs of the heads."""
OUTPUTS = "outputs"


class MethodRow(NamedTuple):
    """One option of the group ``distill``."""

    option: str
    name: str
    """Of the class."""
    idea: str
    """First sentence of the class's documentation."""
    paper: str
    """First author, year and arXiv number, as far as the documentation names them."""
    pairs: list[str]
    """Names in `PAIRS` of the pairs that the option fits, without changed settings."""
    terms: dict[str, float]
    """Term -> weight."""
    kinds: list[str]
    """What the terms compare, each once."""


def method_rows(names: Collection[str] = ()) -> Iterator[MethodRow]:
    """One row for each option of the group, by name. Options without a single loss are left out.

    Args:
        names: options, or names of methods, of which rows are wanted; empty for all.

    Raises:
        DistillError: there is no such option and no such method.
    """
    specs, nodes = _specs(), {option: _node(option) for option in compose.config_groups()["distill"]}
    methods = {option: instantiate.load_target(node) for option, node in nodes.items() if "_target_" in node}
    known = {
        name: {option, loss.__name__.lower()} for name, (option, loss) in zip(methods, methods.items(), strict=True)
    }
    for name in names:
        if not any(name in synonyms for synonyms in known.values()):
            raise DistillError(f"there is no method '{name}'{nearest(name, set().union(*known.values()))}")
    for option, loss in methods.items():
        if not names or known[option] & set(names):
            yield _row(option, loss, nodes[option], specs)


def _node(option: str) -> DictConfig:
    """The node of an option's loss. Only its file and those that it inherits are read: composing takes far longer."""
    files = [folder / "distill" / f"{option}.yaml" for folder in compose.all_folders()]
    own = cast(DictConfig, OmegaConf.load(next(file for file in files if file.is_file())))
    whole: Any = OmegaConf.create({"seed": 0, "node": {}})
    for line in own.pop("defaults", []):
        parent, _, place = str(line).partition("@")
        inherited = _node(parent)
        whole = OmegaConf.merge(whole, {"node": inherited if place in ("", "_here_") else {place: inherited}})
    return cast(DictConfig, OmegaConf.merge(whole, {"node": own}).node)


def _row(option: str, loss: Any, node: DictConfig, specs: Mapping[str, DetectorSpec]) -> MethodRow:
    fitting, terms = list[str](), dict[str, float]()
    for pair, (student, teacher) in {**PAIRS, DISTRIBUTIONS: (DISTRIBUTIONS, DISTRIBUTIONS)}.items():
        if pair == DISTRIBUTIONS and fitting:
            break
        try:
            built = _build(node, loss, specs[student], specs[teacher])
        except DistillError:
            continue
        fitting.append(pair)
        terms = terms or dict(built.weights)
    documentation = " ".join((loss.__doc__ or "").split())
    kinds = dict.fromkeys(KINDS.get(term.partition(".")[0], OUTPUTS) for term in terms)
    return MethodRow(option, loss.__name__, _idea(documentation), _paper(documentation), fitting, terms, list(kinds))


def _build(node: DictConfig, loss: Any, student: DetectorSpec, teacher: DetectorSpec) -> Any:
    """The loss of a node, without the weights of an image classifier, which a user has to train first."""
    if "classifier" not in node:
        return instantiate.build_node(node, student=student, teacher=teacher)
    options = {key: value for key, value in instantiate.to_containers(node).items() if key != "_target_"}
    return loss(student, teacher, **{**options, "classifier": SimpleNamespace(classes=student.classes)})


def _idea(documentation: str) -> str:
    return documentation.partition(". ")[0].partition(" ::")[0].rstrip(":.")


def _paper(documentation: str) -> str:
    """``Cao 2022, arXiv 2207.02039`` of the sentence after "Source"."""
    source = re.search(r"(?:Source|In the style of)[^:]*: (.{0,600})", documentation)
    if not source:
        return ""
    author = re.match(r"(?:de |van )?[\w'-]+", source[1])
    year = re.search(r"\b(?:19|20)\d\d\b", source[1])
    number = re.search(r"arXiv (\d{4}\.\d{4,5})", source[1])
    words = [author[0] if author else "", year[0] if year else ""]
    return " ".join(filter(None, words)) + (f", arXiv {number[1]}" if number else "")


def _specs() -> dict[str, DetectorSpec]:
    """Specs of small detectors of the families in `PAIRS`, built without memory for their weights."""
    import torch

    from distill.detectors.registry import FAMILIES

    specs, small = {}, {"backbone": {"depth": 10, "width": 0.25}, "neck_channels": 64}
    for family in {family for pair in PAIRS.values() for family in pair}:
        build: Any = FAMILIES[family]
        with torch.device("meta"):
            specs[family] = build(["a", "b"], **small).spec
    with torch.device("meta"):
        heads = {"box_head": "distribution", "box_loss": "giou"}
        specs[DISTRIBUTIONS] = FAMILIES["retinanet"](["a", "b"], **small, **heads).spec  # type: ignore[arg-type]
    return specs
