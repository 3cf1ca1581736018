"""The keys `classes` and `rename` of a data source."""

from __future__ import annotations

import shlex

import pytest

from distill.cli.overrides import parse_overrides
from distill.data.class_names import ClassChoice, describe_similar_names
from distill.types import DistillError


@pytest.mark.parametrize(
    "names",
    [
        ["dog", "Dog", "DOG"],
        ["dog", " dog", "cat", "d og", "Cat"],
        ["école", "École"],
        ['a "b"', 'A "b"', "it's", "It's"],
        ["a\\", "A\\", "x,y", "X,Y", "{z}", "{Z}"],
        ["true", "True", "null", "NULL", "5 x", "5x"],
        ["traffic light", "Traffic Light"],
    ],
)
def test_the_printed_override_merges_the_classes_as_it_stands(names: list[str]) -> None:
    message = describe_similar_names(names)
    assert message is not None
    (word,) = shlex.split(message.partition("merge them: ")[2])
    (override,) = parse_overrides([word])
    assert override.key_or_group == "data.source.rename"
    merged = ClassChoice(rename=override.value()).rename_all(names)
    assert describe_similar_names(merged) is None
    assert set(merged) < set(names)


@pytest.mark.parametrize("rename", ["dog", [["a"]], ["ab"], [["a", "b"], ["a", "c"]]])
def test_renames_of_another_form_are_refused(rename: object) -> None:
    with pytest.raises(DistillError, match=r"data\.source\.rename: "):
        ClassChoice(rename=rename)  # type: ignore[arg-type]
