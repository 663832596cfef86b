"""The experiment's events as one executor has seen them, and who waits for what.

Own events stand in the log at once, *provisional*; when the director's numbered echo comes, it takes their place and is
not delivered again (``Event.key`` tells it). Waiters name a position in this log, counted from its beginning, so
that nothing is missed or doubled between two questions of theirs.

Bound: the log holds at most ``MAX_BYTES`` of data; of older events only their number by name is kept, and a
waiter that comes late does not see them. What barriers are decided by is kept apart (``events.Arrivals``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from fieldlab_common.events import Arrivals, BarrierView, Event, Member
from fieldlab_common.paths import Round

__all__ = ["EventBook", "Waiter", "as_json"]

MAX_BYTES = 32 * 1024 * 1024
_OVERHEAD = 500  # of an event besides its data


class Waiter:
    """Somebody who waits: ``look`` is called after each new event, and says whether it has what it waited for."""

    __slots__ = ("look", "names")

    def __init__(self, names: Collection[str], look: Callable[[], bool]) -> None:
        self.names = names
        self.look = look


class EventBook:
    """The log. ``members`` are the experiment's deployments, for barriers."""

    def __init__(self, members: Sequence[Member] = (), *, max_bytes: int = MAX_BYTES) -> None:
        self.members = members
        self._most = max_bytes
        self._log: list[tuple[Event, int]] = []
        self._first = 0  # the position of the first event that is kept
        self._bytes = 0
        self._provisional: dict[str, int] = {}  # key -> position
        self._counts: dict[str, int] = {}
        self._latest: dict[str, Event] = {}
        self.arrivals = Arrivals()  # what barriers are decided by
        self._waiters: list[Waiter] = []

    def add(self, event: Event, size: int = 0) -> None:
        """Take in an event, own or numbered; waiters are told, unless it is an echo."""
        position = self._provisional.pop(event.key, None) if event.number is not None else None
        if position is not None:
            self._number(event, position)
            return
        if event.number is None:
            self._provisional[event.key] = self._first + len(self._log)
        self._log.append((event, size + _OVERHEAD))
        self._bytes += size + _OVERHEAD
        self._counts[event.name] = self._counts.get(event.name, 0) + 1
        self._latest[event.name] = event
        self.arrivals.add(event)
        if self._bytes > self._most:
            self._forget()
        self._tell(event.name)

    def _forget(self) -> None:
        """Drop the oldest: an eighth at once, so that it is not done for every event."""
        gone = 0
        while self._bytes > self._most * 7 // 8 and gone < len(self._log) - 1:
            self._bytes -= self._log[gone][1]
            gone += 1
        del self._log[:gone]
        self._first += gone

    def _number(self, event: Event, position: int) -> None:
        """The echo of an own event: it has its number now."""
        index = position - self._first
        if index >= 0:
            known, size = self._log[index]
            self._log[index] = replace(known, number=event.number), size
        latest = self._latest.get(event.name)
        if latest is not None and latest.key == event.key:
            self._latest[event.name] = event

    def _tell(self, name: str) -> None:
        for waiter in [w for w in self._waiters if not w.names or name in w.names]:
            if waiter in self._waiters and waiter.look():
                self.leave(waiter)

    def wait(self, names: Collection[str], look: Callable[[], bool]) -> Waiter | None:
        """Call ``look`` now and after each event of those names (none: any) until it is true; None if it is now."""
        if look():
            return None
        waiter = Waiter(names, look)
        self._waiters.append(waiter)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Stop waiting."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)

    def since(self, position: int, name: str | None, after: int, most: int = 100) -> tuple[list[Event], int]:
        """Events from ``position`` on, of that name and with a number above ``after``; and the position to go on at."""
        found: list[Event] = []
        position = max(position, self._first)
        end = self._first + len(self._log)
        while position < end and len(found) < most:
            event = self._log[position - self._first][0]
            position += 1
            if (name is None or event.name == name) and (event.number is None or event.number > after):
                found.append(event)
        return found, position

    def latest(self, name: str) -> Event | None:
        """The last event of that name."""
        return self._latest.get(name)

    def count(self, name: str) -> int:
        """How many of that name there were."""
        return self._counts.get(name, 0)

    def barrier(self, name: str, parties: int | str, round: Round) -> BarrierView:
        """How the barrier stands."""
        return self.arrivals.view(name, parties, self.members, round)


def as_json(event: Event) -> dict[str, Any]:
    """An event for a child."""
    return {
        "name": event.name,
        "data": event.data,
        "number": event.number,
        "sender": event.sender,
        "step": event.step,
        "iteration": event.iteration,
        "sent_at": event.sent_at,
        "key": event.key,
    }
