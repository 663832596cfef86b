"""The records of a run here, a file for each lane: they may be more than fits in memory."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from fieldlab_common import protocol as p
from fieldlab_common import wire

__all__ = ["PAGE", "Spool"]

PAGE = 2000  # records in a page at most
PAGE_BYTES = 16 * 1024 * 1024


class Spool:
    """The records of one lane, in order: their bytes in a file, their places in memory."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self._end = 0
        self._places: list[tuple[str, int, bool, int, int]] = []

    def __len__(self) -> int:
        return len(self._places)

    def add(self, deployment: str, number: int, late: bool, body: bytes) -> None:
        """Append one."""
        os.pwrite(self._file.fileno(), body, self._end)
        self._places.append((deployment, number, late, self._end, len(body)))
        self._end += len(body)

    def read(self, after: int, deployment: str = "") -> list[p.RecordEntry]:
        """The records after a cursor, of all or of one: a page of them, bounded in number and in bytes."""
        found: list[p.RecordEntry] = []
        size = 0
        for seq, (name, number, late, start, length) in enumerate(islice(self._places, after, None), after + 1):
            if deployment not in ("", name):
                continue
            record = wire.loads(p.Record, os.pread(self._file.fileno(), length, start))
            found.append(p.RecordEntry(seq=seq, deployment=name, number=number, record=record, late=late))
            size += length
            if size > PAGE_BYTES or len(found) == PAGE:
                break
        return found
