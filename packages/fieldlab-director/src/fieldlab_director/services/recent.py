"""The newest events of experiments, encoded once: a thousand executors poll, one after the other, for the same ones.

What always holds: an event that was committed never changes, and numbers have no gaps; so what is kept is right for
ever, and only what is newer has to be read. What is not kept is read from the store, as it would be without this.
"""

from __future__ import annotations

import threading
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
    first: int  # the number of the first that is kept
    kept: list[bytes] = field(default_factory=list)

    @property
    def last(self) -> int:
        return self.first + len(self.kept) - 1


class Recent:
    """Pages of events after a cursor. May be used by several threads."""

    def __init__(self, most_kept: int = MOST_KEPT) -> None:
        self._most_kept = most_kept
        self._lock = threading.Lock()
        self._logs: dict[str, _Log] = {}
        self._size = 0

    def after(self, tx: Tx, experiment_id: str, after: int, *, limit: int, most_bytes: int) -> tuple[Event, ...]:
        """The events after ``after``: at most ``limit``, and as many as ``most_bytes`` hold, but at least one.

        They are ready to be encoded, and for nothing else: each is its JSON already (``msgspec.Raw``).
        """
        with self._lock:
            log = self._logs.setdefault(experiment_id, _Log(after + 1))
            known = max(after, log.last) if log.first <= after + 1 else after
        rows = tx.all(queries.EVENTS, Event, experiment_id=experiment_id, after=known, limit=limit)
        read = [msgspec.json.encode(event) for event in rows]
        with self._lock:
            self._keep(experiment_id, log, known, read)
            if log.first <= after + 1:
                read = log.kept[after + 1 - log.first :][:limit]
        return tuple(cast(Event, msgspec.Raw(data)) for data in _fitting(read, most_bytes))

    def _keep(self, experiment_id: str, log: _Log, known: int, read: list[bytes]) -> None:
        """Keep what was read after number ``known``, where it follows on what is kept."""
        fresh = read[log.last - known :] if log.first - 1 <= known <= log.last else []
        log.kept += fresh
        if self._logs.get(experiment_id) is not log:
            return
        self._size += sum(map(len, fresh))
        if self._size > self._most_kept:
            self._logs.clear()
            self._size = 0


def _fitting(events: Iterable[bytes], most_bytes: int) -> Iterable[bytes]:
    size = 0
    for index, data in enumerate(events):
        size += len(data)
        if index and size > most_bytes:
            return
        yield data
