"""The newest events of experiments, encoded once: a thousand executors poll, one after the other, for the same ones.

What always holds: an event that was committed never changes, and none gets a number below one that was read; so what
is kept is right for ever, and only what is newer has to be read. Numbers follow on one another, but for the leap that
they make when a director is restored from a backup. What is not kept is read from the store, as without this.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import msgspec
from fieldlab_common.events import Event

from fieldlab_director.store import queries
from fieldlab_director.store.base import Tx

__all__ = ["Recent"]

MOST_KEPT = 16 * 1024 * 1024  # bytes of all experiments; beyond that it begins anew


@dataclass(eq=False)
class _Log:
    start: int  # all that have a higher number are kept, up to the last
    numbers: list[int] = field(default_factory=list)
    kept: list[bytes] = field(default_factory=list)

    @property
    def last(self) -> int:
        return self.numbers[-1] if self.numbers else self.start

    def covers(self, after: int) -> bool:
        return self.start <= after <= self.last


class Recent:
    """Pages of events after a cursor. May be used by several threads."""

    def __init__(self, most_kept: int = MOST_KEPT) -> None:
        self._most_kept = most_kept
        self._lock = threading.Lock()
        self._logs: dict[str, _Log] = {}
        self._size = 0

    def after(
        self, tx: Tx, experiment_id: str, after: int, *, limit: int, most_bytes: int
    ) -> tuple[tuple[Event, ...], int]:
        """The events after ``after``, and the cursor that they end at.

        At most ``limit``, and as many as ``most_bytes`` hold, but at least one. They are ready to be encoded, and for
        nothing else: each is its JSON already (``msgspec.Raw``).
        """
        with self._lock:
            log = self._logs.setdefault(experiment_id, _Log(after))
            known = log.last if log.covers(after) else after
        rows = tx.all(queries.EVENTS, Event, experiment_id=experiment_id, after=known, limit=limit)
        read = [(event.number or 0, msgspec.json.encode(event)) for event in rows]
        with self._lock:
            self._keep(experiment_id, log, known, read)
            if log.covers(after):
                begin = bisect_right(log.numbers, after)
                part = slice(begin, begin + limit)
                read = list(zip(log.numbers[part], log.kept[part], strict=True))
        found = list(_fitting(read, most_bytes))
        return tuple(cast(Event, msgspec.Raw(data)) for _, data in found), found[-1][0] if found else after

    def _keep(self, experiment_id: str, log: _Log, known: int, read: list[tuple[int, bytes]]) -> None:
        """Keep what was read after number ``known``, where it follows on what is kept."""
        last = log.last
        fresh = [(number, data) for number, data in read if number > last] if log.covers(known) else []
        log.numbers += (number for number, _ in fresh)
        log.kept += (data for _, data in fresh)
        if self._logs.get(experiment_id) is not log:
            return
        self._size += sum(len(data) for _, data in fresh)
        if self._size > self._most_kept:
            self._logs.clear()
            self._size = 0


def _fitting(events: Iterable[tuple[int, bytes]], most_bytes: int) -> Iterable[tuple[int, bytes]]:
    size = 0
    for index, event in enumerate(events):
        size += len(event[1])
        if index and size > most_bytes:
            return
        yield event
