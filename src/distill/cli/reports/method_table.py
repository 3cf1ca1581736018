"""The table of all options of the group ``distill``: what each compares, for which detectors, with which weights."""

from __future__ import annotations

import csv
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf

from distill.cli.config import compose, instantiate
from distill.cli.config.suggestions import nearest
from distill.losses.places import KINDS, places
from distill.types import DetectorSpec, DistillError

QUERY_NAMES = {"rtdetr": "RT-DETR", "dfine": "D-FINE", "deimv2": "DEIMv2", "rfdetr": "RF-DETR"}
"""Family with queries -> its name in `PAIRS`."""
PAIRS = {
    "two-stage": ("faster_rcnn", "faster_rcnn"),
    "one-stage": ("retinanet", "retinanet"),
    "FCOS": ("fcos", "fcos"),
    "mixed": ("retinanet", "faster_rcnn"),
    **{name: (family, family) for family, name in QUERY_NAMES.items()},
    **{f"{name} as teacher": ("faster_rcnn", family) for family, name in QUERY_NAMES.items()},
    **{f"{name} as student": (family, "faster_rcnn") for family, name in QUERY_NAMES.items()},
}
"""Name -> the families of student and teacher for which an option is built."""
GROUPS = {
    f"queries{role}": [name + role for name in QUERY_NAMES.values()] for role in ("", " as teacher", " as student")
}
"""Name of a group of pairs -> its names in `PAIRS`."""
DISTRIBUTIONS = "distribution heads"
"""Name of a pair of one-stage detectors with ``box_head=distribution``, for options that fit no other pair."""
COMPOSED = "_global_.distill.losses."
"""Prefix of the place of each loss in the defaults of an option that composes several losses."""
COSTS = "costs.csv"
"""File of the measured costs: ``docs/results/costs.csv`` of the checkout, in ``conf`` of an installed package."""
HELD_MODELS = frozenset({"classifier", "model"})
"""Keys of a loss's frozen model."""


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
    refused: dict[str, str]
    """Name in `PAIRS` of a pair that the option does not fit -> the reason."""
    terms: dict[str, float]
    """Term -> weight."""
    places: list[str]
    """The places that the terms compare, see `losses.places`."""
    cost: float | None
    """Duration of a training step, relative to that of the student alone; None where it was not measured."""

    @property
    def kinds(self) -> list[str]:
        """What the terms compare, each once."""
        return list(dict.fromkeys(KINDS[place] for place in self.places))


def method_rows(names: Collection[str] = ()) -> Iterator[MethodRow]:
    """One row for each option of the group, by name. ``none`` is left out. An option that composes several losses has
    the terms of all, and the pairs that all of them fit.

    Args:
        names: options, or names of methods, of which rows are wanted; empty for all.

    Raises:
        DistillError: there is no such option and no such method.
    """
    specs, nodes = _specs(), {option: _node(option) for option in compose.config_groups()["distill"]}
    methods = {
        option: [instantiate.load_target(part) for part in _parts(node).values()]
        for option, node in nodes.items()
        if _parts(node)
    }
    known = {option: {option, *(loss.__name__.lower() for loss in losses)} for option, losses in methods.items()}
    for name in names:
        if not any(name in synonyms for synonyms in known.values()):
            raise DistillError(f"there is no method '{name}'{nearest(name, set().union(*known.values()))}")
    costs = measured_costs()
    for option, losses in methods.items():
        if not names or known[option] & set(names):
            parts = zip(losses, _parts(nodes[option]).items(), strict=True)
            rows = [_row(name or option, loss, part, specs, costs.get(option)) for loss, (name, part) in parts]
            yield rows[0] if len(rows) == 1 else _composed(option, rows)


def _parts(node: DictConfig) -> dict[str, DictConfig]:
    """Name -> node of each loss of an option; the name of a single loss is empty."""
    if "_target_" in node:
        return {"": node}
    return {str(key).removeprefix(COMPOSED): part for key, part in node.items() if str(key).startswith(COMPOSED)}


def _composed(option: str, rows: Sequence[MethodRow]) -> MethodRow:
    """The row of an option that composes the losses of several rows."""
    return MethodRow(
        option,
        " + ".join(row.name for row in rows),
        "; ".join(row.idea for row in rows),
        "; ".join(row.paper for row in rows),
        [pair for pair in rows[0].pairs if all(pair in row.pairs for row in rows)],
        {pair: reason for row in rows for pair, reason in row.refused.items()},
        {f"{row.option}/{term}": weight for row in rows for term, weight in row.terms.items()},
        list(dict.fromkeys(place for row in rows for place in row.places)),
        rows[0].cost,
    )


def options_by_place(rows: Iterable[MethodRow]) -> dict[str, list[str]]:
    """Place -> the options that compare it. Options of different places may be combined."""
    by_place: dict[str, list[str]] = {}
    for row in rows:
        for place in row.places:
            by_place.setdefault(place, []).append(row.option)
    return by_place


def grouped(pairs: Iterable[str]) -> list[str]:
    """Names of pairs, with one name for each group in `GROUPS` of which all pairs are given; ``all pairs`` for all."""
    given = list(pairs)
    if given == list(PAIRS):
        return ["all pairs"]
    group_of = {name: group for group, names in GROUPS.items() if set(names) <= set(given) for name in names}
    return list(dict.fromkeys(group_of.get(name, name) for name in given))


def refusals(row: MethodRow) -> dict[str, str]:
    """Names of pairs that an option refuses for the same reason, as `grouped` writes them -> the reason.

    Reasons that differ only in the name of a family with queries are the same.
    """
    families, alike = "|".join(QUERY_NAMES), dict[str, dict[str, str]]()
    for pair, reason in row.refused.items():
        kind = re.sub(rf"\ba (?:{families})\b", "a detector with queries", reason)
        alike.setdefault(kind, {})[pair] = reason
    return {
        ", ".join(grouped(pairs)): kind if len(set(pairs.values())) > 1 else next(iter(pairs.values()))
        for kind, pairs in alike.items()
    }


def partners(row: MethodRow, rows: Iterable[MethodRow]) -> list[str]:
    """The options that compare no place of this option, for at least one pair of detectors that both fit."""
    return [
        other.option
        for other in rows
        if not set(row.places) & set(other.places) and _fitting(row) & _fitting(other) and row.name != other.name
    ]


def _fitting(row: MethodRow) -> set[str]:
    """The pairs that an option fits, some only with distribution heads."""
    return {*row.pairs, *(("one-stage", "FCOS") if DISTRIBUTIONS in row.pairs else ())}


def measured_costs() -> dict[str, float]:
    """Option -> duration of its step, relative to the student alone, from the file that ``bench --csv`` wrote."""
    folder = compose.config_folder()
    files = [file for file in (folder / COSTS, folder.parent / "docs" / "results" / COSTS) if file.is_file()]
    if not files:
        return {}
    with files[0].open(encoding="utf-8", newline="") as file:
        lines = [line for line in file if not line.startswith("#")]
    return {row["distill"]: float(row["ratio"]) for row in csv.DictReader(lines)}


def _node(option: str) -> DictConfig:
    """The node of an option's loss. Only its file and those that it inherits are read: composing takes far longer."""
    files = [folder / "distill" / f"{option}.yaml" for folder in compose.all_folders()]
    own = cast(DictConfig, OmegaConf.load(next(file for file in files if file.is_file())))
    whole: Any = OmegaConf.create({"seed": 0, "node": {}})
    for line in own.pop("defaults", []):
        if line == "_self_":
            continue
        parent, _, place = str(line).partition("@")
        inherited = _node(parent)
        whole = OmegaConf.merge(whole, {"node": inherited if place in ("", "_here_") else {place: inherited}})
    return cast(DictConfig, OmegaConf.merge(whole, {"node": own}).node)


def _row(option: str, loss: Any, node: DictConfig, specs: Mapping[str, DetectorSpec], cost: float | None) -> MethodRow:
    fitting, refused, terms = list[str](), dict[str, str](), dict[str, float]()
    build = _constructor(node, loss)  # once, because Hydra takes longer than the constructor
    for pair, (student, teacher) in {**PAIRS, DISTRIBUTIONS: (DISTRIBUTIONS, DISTRIBUTIONS)}.items():
        if pair == DISTRIBUTIONS and fitting:
            break
        try:
            built = build(specs[student], specs[teacher])
        except (DistillError, *instantiate.ARGUMENT_ERRORS) as error:
            if pair in PAIRS:
                refused[pair] = str(error)
            continue
        fitting.append(pair)
        terms = terms or dict(built.weights)
    documentation = " ".join((loss.__doc__ or "").split())
    words = _idea(documentation), _paper(documentation)
    return MethodRow(option, loss.__name__, *words, fitting, refused, terms, places(terms), cost)


def _constructor(node: DictConfig, loss: Any) -> Callable[[DetectorSpec, DetectorSpec], Any]:
    """The function from two specs to the loss of a node.

    Models that losses hold, such as an image classifier, are not built: they need weights.
    """
    options = instantiate.to_containers(node)
    if not any(key in options for key in HELD_MODELS):
        made: Callable[..., Any] = instantiate.build_node({**options, "_partial_": True})
        return lambda student, teacher: made(student=student, teacher=teacher)

    def with_stand_in(student: DetectorSpec, teacher: DetectorSpec) -> Any:
        held = dict.fromkeys(HELD_MODELS & options.keys(), SimpleNamespace(classes=student.classes, channels=8))
        return loss(student, teacher, **{**options, **held})

    del options["_target_"]
    return with_stand_in


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

    specs: dict[str, DetectorSpec] = {}
    small = {"backbone": {"depth": 10, "width": 0.25}, "neck_channels": 64}
    specs |= {family: query_spec(family) for family in QUERY_NAMES}
    for family in {family for pair in PAIRS.values() for family in pair} - specs.keys():
        build: Any = FAMILIES[family]
        with torch.device("meta"):
            specs[family] = build(["a", "b"], **small).spec
    with torch.device("meta"):
        heads = {"box_head": "distribution", "box_loss": "giou"}
        specs[DISTRIBUTIONS] = FAMILIES["retinanet"](["a", "b"], **small, **heads).spec  # type: ignore[arg-type]
    return specs


def query_spec(family: str) -> DetectorSpec:
    """The spec of a set-prediction detector with default options, from what its class declares.

    The detector is not built, because the library of its network may be missing.
    """
    from distill.detectors.registry import FAMILIES
    from distill.detectors.rfdetr import STRIDE
    from distill.detectors.set_prediction import BODY_STRIDES, SetPredictionDetector

    kind: Any = FAMILIES[family]
    options = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    pyramid = issubclass(kind, SetPredictionDetector)  # an RF-DETR has one stride
    return DetectorSpec(
        family=family,
        outputs=kind.view_class.outputs,
        classes=("a", "b"),
        body=dict.fromkeys(BODY_STRIDES if pyramid else (STRIDE,), 64),
        neck=dict.fromkeys(options["strides"] if pyramid else (STRIDE,), 64),
        anchors={},
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        norm="batch",
        corner_bins=kind.corner_bins(options) if pyramid else {},
    )
