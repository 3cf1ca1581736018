"""The keys `classes` and `rename` of a data source."""

from __future__ import annotations

import shlex

import numpy as np
import pytest

from distill.cli.config.overrides import parse_overrides
from distill.data.class_names import ClassChoice, describe_similar_names
from distill.data.records import Record, pack_records
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


@pytest.mark.parametrize(("classes", "labels"), [(["a", "b"], [2, 2, 1]), (["b", "a"], [1, 1, 2]), (["a"], [1])])
def test_names_that_are_exchanged(classes: list[str], labels: list[int]) -> None:
    """Label 1 stands for a, which is called b from now on."""
    box = np.tile([0.0, 0.0, 4.0, 4.0], (3, 1))
    flags, area = np.zeros(3, bool), np.full(3, 16.0)
    record = Record(0, "x.jpg", (8, 8), box, np.array([1, 1, 2]), flags, flags, area)
    chosen, records = ClassChoice(classes, {"a": "b", "b": "a"}).select(["a", "b"], pack_records([record]))
    assert chosen == tuple(classes)
    assert records.labels.tolist() == labels
