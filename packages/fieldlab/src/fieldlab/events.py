"""The events of a run, from outside of it: sent, awaited and read in the experiment's one order.

Everything is read by cursor, a page at a time, held by the source until there is something (a long-poll): nothing is
missed or seen twice, whatever happens to the connection or the director in between.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from fieldlab_common import protocol as p
from fieldlab_common.builtin import check_event_name
from fieldlab_common.errors import DefinitionError, EventTooLarge, WaitTimeout
from fieldlab_common.events import MAX_EVENT_BYTES, Event
from fieldlab_common.lifecycle import ExperimentState

from fieldlab.source import LONG_POLL, Source
from fieldlab.text import listed
from fieldlab.transport import json_of

__all__ = ["RunEvents"]

_OTHERS = 100  # names of other events that are remembered, for the error that says what came instead


class RunEvents:
    """The events of a run: one ordered log, numbered from 1."""

    def __init__(self, source: Source, clock: Callable[[], float] = time.monotonic) -> None:
        self._source, self._clock = source, clock

    def send(self, name: str, data: Any = None) -> Event:
        """Send an event into the run; ``data`` is JSON of at most 64 KiB. Returns it with its number.

        Raises:
            DefinitionError: ``data`` is not JSON, or the name is reserved.
            EventTooLarge: ``data`` is over the limit.
            IllegalState: the run has ended.
        """
        try:
            length = len(json_of(data).encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise DefinitionError(
                f"The data of event {name!r} is not JSON: {error}.", advice="Send numbers, text, lists and dicts."
            ) from error
        if length > MAX_EVENT_BYTES:
            raise EventTooLarge(f"The data of event {name!r} has {length} bytes; the limit is {MAX_EVENT_BYTES}.")
        return self._source.send(p.SendEvent(name=check_event_name(name), data=data, key=uuid.uuid4().hex))

    def stream(self, *, after: int = 0, timeout: float | None = None) -> Iterator[Event]:
        """All events numbered above ``after``, then those to come, until the run has ended.

        It also ends when none came for ``timeout`` seconds.
        """
        quiet_since = self._clock()
        while True:
            left = LONG_POLL if timeout is None else timeout - (self._clock() - quiet_since)
            page = self._source.events(after, max(0.0, min(LONG_POLL, left)))
            after = page.cursor
            if page.events:
                yield from page.events
                quiet_since = self._clock()
            elif page.state.terminal or left <= 0:
                return

    def wait(
        self,
        name: str,
        *,
        count: int = 1,
        where: Callable[[Event], bool] | None = None,
        after: int = 0,
        timeout: float | None = None,
    ) -> list[Event]:
        """Wait for ``count`` events of that name (that ``where`` accepts), numbered above ``after``.

        Raises:
            WaitTimeout: fewer came within ``timeout`` seconds, or before the run ended.
        """
        deadline = None if timeout is None else self._clock() + timeout
        found: list[Event] = []
        others: dict[str, None] = {}
        while len(found) < count:
            left = LONG_POLL if deadline is None else deadline - self._clock()
            page = self._source.events(after, max(0.0, min(LONG_POLL, left)))
            after = page.cursor
            for event in page.events:
                if event.name == name and (where is None or where(event)):
                    found.append(event)
                elif len(others) < _OTHERS:
                    others.setdefault(event.name)
            if not page.events and (left <= 0 or page.state.terminal) and len(found) < count:
                raise _missed(name, count, found, list(others), page.state, timeout)
        return found[:count]

    def latest(self, name: str) -> Event | None:
        """The last event of that name so far."""
        last = None
        for event in self.so_far():
            if event.name == name:
                last = event
        return last

    def count(self, name: str) -> int:
        """How many events of that name there are so far."""
        return sum(event.name == name for event in self.so_far())

    def so_far(self) -> Iterator[Event]:
        """All events that there are now, page by page."""
        after = 0
        while True:
            page = self._source.events(after, 0.0)
            yield from page.events
            after = page.cursor
            if not page.events:
                return


def _missed(
    name: str, count: int, found: list[Event], others: list[str], state: ExperimentState, timeout: float | None
) -> WaitTimeout:
    when = f"before the run ended ({state.value})" if state.terminal else f"within {timeout:g} s"
    return WaitTimeout(
        f"{len(found)} of {count} events {name!r} came {when}; other events: {listed(others)}.",
        advice="Check the name, and run.logs() of what should send it.",
        details={"seen": len(found)},
    )
