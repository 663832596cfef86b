"""Events as a stream: server-sent events (HTML Living Standard, section 9.2), for browsers and for whoever follows.

A message's ``id`` is the event's number, its data the event as JSON in one line. A comment says now and then that the
line lives. The last message is of type ``end``, with the state in which the experiment ended; whoever asks again after
that gets 204, upon which a browser asks no more. Any other end of the stream is a cut: connect again, with the last id.

What always holds: events are read from the store by cursor, a page at a time, when the subscriber has taken the last
one. So a slow subscriber has its own lag and a page in memory, and nobody else notices.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

import msgspec
from fieldlab_common.errors import FieldlabError
from fieldlab_common.events import MAX_EVENT_BYTES, Event
from fieldlab_common.protocol import EventPage

from fieldlab_director.store.base import Notifier, events_topic

__all__ = ["fitting", "follow"]

_ENCODE = msgspec.json.Encoder().encode
RETRY = b"retry: 1000\n\n"  # milliseconds until a browser connects again
COMMENT = b":\n\n"


def fitting(events: tuple[Event, ...], most_bytes: int) -> tuple[Event, ...]:
    """The first of ``events``: as many as ``most_bytes`` hold, and at least one."""
    if len(events) * MAX_EVENT_BYTES <= most_bytes:
        return events
    size = 0
    for index, event in enumerate(events):
        size += len(_ENCODE(event.data))
        if index and size > most_bytes:
            return events[:index]
    return events


async def follow(
    notifier: Notifier,
    experiment_id: str,
    after: int,
    *,
    read: Callable[[int], Awaitable[EventPage]],
    allowed: Callable[[], Awaitable[object]],
    alive_every: float,
) -> AsyncIterator[bytes]:
    """The stream of an experiment's events after ``after``, until the experiment ends or the director stops.

    ``read`` gives the page after a cursor. ``allowed`` raises when the subscriber may no longer read; it is asked every
    ``alive_every`` seconds, and so often there is a comment when there is nothing else.
    """
    loop = asyncio.get_running_loop()
    asked = loop.time()
    yield RETRY
    with notifier.watch(events_topic(experiment_id)) as watch:
        try:
            while not notifier.closed:
                page = await read(after)
                after = page.cursor
                if page.events:
                    yield _messages(page.events)
                elif page.state.terminal:
                    yield b"event: end\ndata: " + _ENCODE({"state": page.state.value}) + b"\n\n"
                    return
                elif not await watch.wait(alive_every):
                    yield COMMENT
                if loop.time() - asked >= alive_every:
                    await allowed()
                    asked = loop.time()
        except FieldlabError:  # a stream that has begun can say no more: its reader asks again, and is told then
            return


def _messages(events: Iterable[Event]) -> bytes:
    return b"".join(b"id: %d\ndata: %b\n\n" % (event.number or 0, _ENCODE(event)) for event in events)
