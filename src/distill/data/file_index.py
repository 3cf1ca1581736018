"""Finds files by the names that lists and annotations give them, in whatever spelling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from unicodedata import normalize
from urllib.parse import unquote

from distill.imaging.decoding import IMAGE_SUFFIXES

XML_SUFFIXES = (".xml",)


class FileIndex:
    """Files below a folder, found by the names that lists and XML files give them.

    A name is looked up among the existing files, so no name can lead out of the folder.

    Args:
        folder: the folder. Hidden files and folders are left out.
        suffixes: file extensions in lower case.
        recursive: whether subfolders are searched.
    """

    def __init__(self, folder: Path, suffixes: Sequence[str], recursive: bool) -> None:
        self.folder = folder
        self.by_path: dict[str, list[Path]] = {}
        """Path below the folder, without extension, to the files: several if they differ in the extension only."""
        self._by_end: dict[str, list[Path]] = {}
        for file in sorted(folder.rglob("*") if recursive else folder.iterdir()):
            relative = file.relative_to(folder)
            if file.suffix.lower() in suffixes and not any(part.startswith(".") for part in relative.parts):
                name = normalize("NFC", relative.with_suffix("").as_posix())
                self.by_path.setdefault(name, []).append(file)
                for end in path_ends(name)[1:]:
                    self._by_end.setdefault(end, []).append(file)
        self._in_lower_case: dict[str, list[Path]] | None = None

    def find(self, name: str) -> list[Path]:
        """Return the files of a name, which may have an extension.

        The name is the path of a file, or ends with this path, or is its end. `cam1/a` is not the name of `cam2/a`. If
        no file has the name, upper and lower case are not distinguished.
        """
        for spelling in spellings(name):
            for end in path_ends(spelling):
                if end in self.by_path:
                    return self.by_path[end]
            if spelling in self._by_end:
                return self._by_end[spelling]
        if self._in_lower_case is None:
            self._in_lower_case = {}
            for path, files in self.by_path.items():
                self._in_lower_case.setdefault(path.casefold(), []).extend(files)
        for spelling in spellings(name):
            for end in path_ends(spelling.casefold()):
                if end in self._in_lower_case:
                    return self._in_lower_case[end]
        return []

    def find_file(self, name: str) -> Path | None:
        """Return the one file of a name with an extension, or None. The extension may be in another case."""
        suffix = PurePosixPath(unquote(name)).suffix.lower()
        files = [file for file in self.find(name) if file.suffix.lower() == suffix]
        return files[0] if len(files) == 1 else None


def path_ends(path: str) -> list[str]:
    """Return the path and each of its ends: `a/b/c`, `b/c`, `c`."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def spellings(name: str) -> Iterator[str]:
    """Yield the spellings under which a name is looked up, the most literal first."""
    composed = normalize("NFC", name)
    slashes = composed.replace("\\", "/")
    for spelling in dict.fromkeys((composed, slashes, normalize("NFC", unquote(slashes)))):
        yield spelling
        stem, _, suffix = spelling.rpartition(".")
        if f".{suffix.lower()}" in (*IMAGE_SUFFIXES, *XML_SUFFIXES):
            yield stem
