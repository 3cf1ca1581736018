"""Many byte strings in one array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class PackedBytes:
    """Many byte strings in one array. Entry i is `blob[starts[i]:ends[i]]`. Several entries may share bytes.

    Thousands of separate strings would take more memory, and forked loader processes would copy them: reading an object
    changes its reference count.
    """

    def __init__(self, blob: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self.blob, self.starts, self.ends = blob, starts, ends

    @classmethod
    def pack(cls, entries: Sequence[bytes] | Sequence[Any]) -> PackedBytes:
        """Copy byte strings, or objects with the buffer protocol, into one array."""
        blob = np.frombuffer(b"".join(entries), np.uint8)
        ends = np.cumsum(np.fromiter((memoryview(entry).nbytes for entry in entries), np.int64, len(entries)))
        return cls(blob, np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)], ends)

    @classmethod
    def pack_texts(cls, texts: Sequence[str]) -> PackedBytes:
        """Pack texts. `text` returns them again, also paths that are no valid UTF-8."""
        return cls.pack([text.encode("utf-8", "surrogateescape") for text in texts])

    @classmethod
    def repeat(cls, entry: bytes, count: int) -> PackedBytes:
        """Return `count` equal entries."""
        return cls(
            np.frombuffer(entry, np.uint8), np.zeros(count, np.int64), np.full(count, len(entry), dtype=np.int64)
        )

    @classmethod
    def join(cls, parts: Sequence[PackedBytes]) -> PackedBytes:
        """Return the entries of all parts."""
        firsts = np.cumsum([0, *(len(part.blob) for part in parts)])
        return cls(
            np.concatenate([part.blob for part in parts]),
            np.concatenate([part.starts + first for part, first in zip(parts, firsts, strict=False)]),
            np.concatenate([part.ends + first for part, first in zip(parts, firsts, strict=False)]),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        return self.blob[self.starts[index] : self.ends[index]].tobytes()

    def text(self, index: int) -> str:
        """Return entry `index` as a text."""
        return self[index].decode("utf-8", "surrogateescape")

    def texts(self) -> list[str]:
        """Return all entries as texts."""
        content = self.blob.tobytes()
        rows = zip(self.starts.tolist(), self.ends.tolist(), strict=True)
        return [content[start:end].decode("utf-8", "surrogateescape") for start, end in rows]

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of bytes of each entry."""
        return self.ends - self.starts

    def select(self, rows: NDArray[np.bool_]) -> PackedBytes:
        """Return the entries of a mask. The bytes are shared, not copied."""
        return PackedBytes(self.blob, self.starts[rows], self.ends[rows])
