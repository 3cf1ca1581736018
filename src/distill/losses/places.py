"""What the terms of a loss compare, and which losses compare the same place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

PLACES = {
    **dict.fromkeys(("neck", "hint"), "neck"),
    "backbone": "backbone",
    **dict.fromkeys(("regions", "nodes"), "regions"),
    **dict.fromkeys(("edges", "relation"), "relations"),
    **dict.fromkeys(("pixels", "features"), "crops"),
    "corners": "corners",
    "tokens": "masks",
}
"""First part of a term's name -> the place that the term compares. Other terms compare `OUTPUTS`."""
OUTPUTS = "outputs"
"""The place of all outputs of the heads: class scores, boxes and proposals."""
KINDS = {
    **dict.fromkeys(("neck", "backbone", "regions"), "features"),
    "relations": "relations",
    "crops": "boxes",
    "masks": "masks",
    "corners": "boxes",
    OUTPUTS: OUTPUTS,
}
"""Place -> the kind of what is compared there."""


def places(terms: Iterable[str]) -> list[str]:
    """The places that terms compare, each once, in the order of the terms."""
    return list(dict.fromkeys(PLACES.get(term.partition(".")[0], OUTPUTS) for term in terms))


def shared_places(terms: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """The places that several losses compare.

    Args:
        terms: loss -> names of its terms.

    Returns:
        Place -> the losses.
    """
    losses: dict[str, list[str]] = {}
    for loss, names in terms.items():
        for place in places(names):
            losses.setdefault(place, []).append(loss)
    return {place: several for place, several in losses.items() if len(several) > 1}
