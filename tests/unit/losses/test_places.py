"""The places of terms, and losses that compare the same place."""

from __future__ import annotations

from distill.losses.places import KINDS, OUTPUTS, PLACES, places, shared_places


def test_places_of_terms() -> None:
    terms = ["neck.foreground", "neck.background", "hint.neck", "nodes.foreground", "edges.all", "logits.classes"]
    assert places(terms) == ["neck", "regions", "relations", "outputs"]
    assert places(["rpn.soft", "sides.main", "labels"]) == [OUTPUTS]
    assert {*PLACES.values(), OUTPUTS} == set(KINDS)


def test_losses_that_compare_the_same_place() -> None:
    terms = {"pkd": ["neck.all"], "dist": ["classes.inter"], "frs": ["neck.features", "logits.classes"]}
    assert shared_places(terms) == {"neck": ["pkd", "frs"], "outputs": ["dist", "frs"]}
    assert shared_places({"pkd": ["neck.all"], "dist": ["classes.inter"], "silent": []}) == {}
