"""The class list of a data set: classes that are chosen, put in order, renamed or merged."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from reprlib import repr as shown

import numpy as np

from distill.data.records import Records
from distill.quoting import quote_value
from distill.types import DistillError

Renames = Mapping[str, str] | Sequence[Sequence[str]]
"""Old name -> new name, or pairs of them."""
DROPPED = "boxes of other classes dropped"
"""Remark on boxes that `classes` leaves out."""


class ClassChoice:
    """The keys `classes` and `rename` of a data source.

    The renames come first. Two names that get the same new name become one class. `classes` then chooses among the new
    names and gives their order. Boxes of other classes are dropped and counted, crowds included. Their images stay: an
    image without boxes is left out of training unless `data.keep_empty=true`, and detections on it count as false
    positives in evaluation.

    Args:
        classes: names in the order of the labels; None: all, in the order of the source.
        rename: a mapping of old names to new names, or a list of pairs of them, for names that a key of a mapping on
            the command line must not contain; None: names stay as they are.

    Raises:
        DistillError: `classes` is no list of different names, or `rename` neither a mapping nor pairs.
    """

    def __init__(self, classes: Sequence[str] | None = None, rename: Renames | None = None) -> None:
        if classes is not None and (isinstance(classes, str) or not classes or len(set(classes)) < len(classes)):
            raise DistillError(f"data.source.classes: expected a list of different names, got {classes}")
        pairs = [] if not rename or isinstance(rename, str) else rename
        pairs = list(pairs.items()) if isinstance(pairs, Mapping) else list(pairs)
        if isinstance(rename, str) or not all(map(_is_pair, pairs)):
            raise DistillError(
                f"data.source.rename: expected {{old: new}} or pairs [[old, new], …], got {shown(rename)}; for a "
                f"shell: {write_rename_override([('old', 'new')])}"
            )
        self.classes = None if classes is None else tuple(map(str, classes))
        self.renames = {str(old): str(new) for old, new in pairs}
        if len(self.renames) < len(pairs):
            raise DistillError(f"data.source.rename: a name occurs twice among the old names, {shown(rename)}")

    def rename(self, name: str) -> str:
        """Return the new name of a class."""
        return self.renames.get(name, name)

    def rename_all(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the different new names, in the order of their first old name."""
        return tuple(dict.fromkeys(map(self.rename, names)))

    def require_known(
        self, own: Iterable[str], all_names: Callable[[], Iterable[str]], where: object, with_classes: bool = True
    ) -> None:
        """Refuse names that the data set does not have.

        Args:
            own: the old names of a split.
            all_names: returns the old names of all splits. It is called only if a name is not among `own`.
            where: the place of the class list, for the message.
            with_classes: whether the names of `classes` must be known, too.

        Raises:
            DistillError: a name of `rename` or `classes` occurs in no split.
        """
        known = tuple(own)
        wanted = self.classes if with_classes and self.classes else ()
        if set(self.renames) <= set(known) and set(wanted) <= set(self.rename_all(known)):
            return
        known = tuple(all_names())
        for key, names, choices in (
            ("rename", self.renames, known),
            ("classes", wanted, self.rename_all((*known, *self.renames))),
        ):
            for name in names:
                if name not in choices:
                    similar = get_close_matches(name, choices, 1)
                    hint = f"; did you mean '{similar[0]}'?" if similar else ""
                    after = " after data.source.rename" if key == "classes" and self.renames else ""
                    raise DistillError(
                        f"data.source.{key}: {where} has no class '{name}'{after}; the classes are "
                        f"{', '.join(choices)}{hint}"
                    )

    def select(self, names: Sequence[str], records: Records) -> tuple[tuple[str, ...], Records]:
        """Return the chosen classes, and the records with labels among them. The records are changed.

        Args:
            names: the names as the source has them. Label i + 1 of the records stands for `names[i]`.
            records: the records of a split.
        """
        classes, renamed = self.classes or self.rename_all(names), [self.rename(name) for name in names]
        if classes != tuple(renamed):
            relabel(records, renamed, classes)
        return classes, records


def relabel(records: Records, names: Sequence[str], classes: Sequence[str]) -> None:
    """Change the labels of records from places in `names` to places in `classes`, and drop boxes of other classes."""
    places = {name: label for label, name in enumerate(classes, start=1)}
    records.labels = np.array([0, *(places.get(name, 0) for name in names)], dtype=np.int64)[records.labels]
    is_kept = records.labels > 0
    records.remarks[DROPPED] += int((~is_kept).sum())
    records.keep_rows(is_kept)


def describe_similar_names(classes: Sequence[str]) -> str | None:
    """Describe classes whose names differ in case or spaces alone, and how to merge them; None if there are none."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        groups["".join(name.split()).casefold()].append(name)
    similar = [names for names in groups.values() if len(names) > 1]
    if not similar:
        return None
    listed = "; ".join(", ".join(map(repr, names)) for names in similar)
    merge = write_rename_override([(name, names[0]) for names in similar for name in names[1:]])
    return (
        f"classes whose names differ in case or spaces alone are different classes: {listed}. If they are one class, "
        f"merge them: {merge}"
    )


def write_rename_override(renames: Sequence[tuple[str, str]]) -> str:
    """Return the override `data.source.rename=…` for a shell.

    The grammar of overrides allows only plain words as keys of a mapping. Other names are written in pairs.
    """
    if all(_is_plain(old) for old, _ in renames):
        entries = "{" + ", ".join(f"{old}: {_quote(new)}" for old, new in renames) + "}"
    else:
        entries = "[" + ", ".join(f"[{_quote(old)}, {_quote(new)}]" for old, new in renames) + "]"
    return shlex.quote(f"data.source.rename={entries}")


KEYWORDS = ("true", "false", "null", "nan", "inf")
"""Words that an override reads as values other than a text."""


def _is_pair(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def _quote(name: str) -> str:
    return name if _is_plain(name) else quote_value(name, mark='"')


def _is_plain(name: str) -> bool:
    """Whether an override reads a name as this text without quotation marks."""
    return re.fullmatch(r"[A-Za-z_][\w-]*", name, re.ASCII) is not None and name.lower() not in KEYWORDS
