"""The seam between the services and a database: transactions, their topics, and those who wait for them.

A command is ``await store.write(fn)``: ``fn(tx)`` is a synchronous function of one transaction, and runs on a thread of
the store. When ``write`` returns, what ``fn`` did is on disk; when ``fn`` raises, nothing of it is. Topics that it
noted (``tx.notify``) are woken after the commit. A question is ``await store.read(fn)``: one consistent snapshot.

Invariants: ``fn`` touches nothing but its transaction (no network, no file, no await), because others wait behind it,
and because it may be run again from the start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa

__all__ = ["LINE", "WORK", "Notifier", "Store", "Tx", "Watch", "deployment_topic", "events_topic", "experiment_topic"]

T = TypeVar("T")
Row = TypeVar("Row")

WORK = "work"  # the topic of the reconcile loop: some row wants to be looked at
NARROW = 32  # watches of a topic that are always woken at once
EACH = 0.002  # seconds that the answer to one of those who were woken takes
LINE = "line"  # the topic of the line for nodes: one may have become free, or somebody waits who did not


def experiment_topic(experiment_id: str) -> str:
    """The topic of what readers of an experiment wait for, but its events: its records, artifacts and states."""
    return f"experiment:{experiment_id}"


def events_topic(experiment_id: str) -> str:
    """The topic of an experiment's events, for readers and executors: of these there are many, and logs wake none."""
    return f"events:{experiment_id}"


def deployment_topic(deployment_id: str) -> str:
    """The topic of what only one executor waits for: the order to stop."""
    return f"deployment:{deployment_id}"


class Tx:
    """One transaction. ``now`` is its time, in seconds since the epoch."""

    def __init__(self, connection: sa.Connection, now: float) -> None:
        self._connection = connection
        self.now = now
        self.topics: set[str] = set()

    def execute(self, statement: sa.Executable, /, **parameters: Any) -> int:
        """Run a statement; the number of rows that it changed."""
        return self._connection.execute(statement, parameters).rowcount

    def execute_many(self, statement: sa.Executable, rows: list[dict[str, Any]]) -> None:
        """Run a statement once for each of ``rows``; nothing when there is none."""
        if rows:
            self._connection.execute(statement, rows)

    def value(self, statement: sa.Executable, /, **parameters: Any) -> Any:
        """The first column of the first row, or None."""
        return self._connection.execute(statement, parameters).scalar()

    def one(self, statement: sa.Executable, row: Callable[..., Row], /, **parameters: Any) -> Row | None:
        """The first row as a ``row``, or None."""
        found = self._connection.execute(statement, parameters).mappings().first()
        return None if found is None else row(**found)

    def all(self, statement: sa.Executable, row: Callable[..., Row], /, **parameters: Any) -> list[Row]:
        """Every row as a ``row``."""
        return [row(**found) for found in self._connection.execute(statement, parameters).mappings()]

    def notify(self, *topics: str) -> None:
        """Wake those who watch ``topics`` once this transaction is committed."""
        self.topics.update(topics)


class Watch:
    """Tells when one of its topics was woken since the last ``wait`` (or since it was made)."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._event = asyncio.Event()
        self._left = False

    def wake(self) -> None:
        """Let the present or the next ``wait`` return."""
        self._event.set()

    def leave(self) -> None:
        """End every wait: nobody wants to know any more."""
        self._left = True
        self._event.set()

    async def wait(self, timeout: float) -> bool:
        """Wait until woken, for at most ``timeout`` seconds.

        False: that time ran out, the director stops, or nobody wants to know any more.
        """
        if self._notifier.closed or self._left:
            return False
        try:
            async with asyncio.timeout(timeout):  # not wait_for: on Python 3.11 it can swallow a cancel
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return not (self._notifier.closed or self._left)


@dataclass(eq=False)
class _Turn:
    until: float = 0.0  # the event loop's time from which on the next may begin
    wide: int = 0  # how many were woken
    next: asyncio.TimerHandle | None = None


class Notifier:
    """Wakes watches by topic, within this process (``bulletin`` carries it to others).

    Everything happens on the thread of one event loop. A topic that many watch is woken in turns: at once after a
    silence, then no sooner than those who were woken can have been answered. Else a thousand who wait for the same
    events, each of whom makes another, would be woken a million times, and nobody would get through.
    """

    def __init__(self) -> None:
        self._watches: dict[str, set[Watch]] = {}
        self._turns: dict[str, _Turn] = {}
        self._listeners: list[Callable[[Iterable[str]], None]] = []
        self.closed = False

    def listen(self, listener: Callable[[Iterable[str]], None]) -> None:
        """Have ``listener`` told of all topics that are woken, before those who watch are."""
        self._listeners.append(listener)

    @contextmanager
    def watch(self, *topics: str) -> Iterator[Watch]:
        """A watch over ``topics``. Begin it before you read, so that nothing falls between reading and waiting."""
        watch = Watch(self)
        for topic in topics:
            self._watches.setdefault(topic, set()).add(watch)
        try:
            yield watch
        finally:
            for topic in topics:
                self._watches[topic].discard(watch)
                if not self._watches[topic]:
                    del self._watches[topic]

    def wake(self, topics: Collection[str]) -> None:
        """Wake every watch over one of ``topics``; a wide one's when its turn comes."""
        for listener in self._listeners:
            listener(topics)
        for topic in topics:
            watches = self._watches.get(topic, ())
            if len(watches) <= NARROW or self.closed:
                for watch in watches:
                    watch.wake()
            else:
                self._wake_in_turn(topic)

    def pause(self, topic: str) -> float:
        """Seconds until a wide topic is woken again, at the soonest; 0 of any other."""
        turn = self._turns.get(topic)
        return max(0.0, turn.until - asyncio.get_running_loop().time()) if turn else 0.0

    def _wake_in_turn(self, topic: str) -> None:
        turn = self._turns.setdefault(topic, _Turn())
        loop = asyncio.get_running_loop()
        if turn.next is not None:
            return
        if loop.time() < turn.until:
            turn.next = loop.call_at(turn.until, self._begin_turn, topic, turn)
        else:
            self._begin_turn(topic, turn)

    def _begin_turn(self, topic: str, turn: _Turn) -> None:
        watches = self._watches.get(topic, ())
        if not watches and turn.next is not None:  # nobody is left: all have ended
            self._turns.pop(topic, None)
            return
        # Those who were just answered are about to come back.
        turn.wide, turn.next = max(len(watches), turn.wide // 2), None
        turn.until = asyncio.get_running_loop().time() + turn.wide * EACH
        for watch in watches:
            watch.wake()

    def wake_all(self) -> None:
        """Wake every watch: something may have been missed."""
        self.wake(list(self._watches))

    def close(self) -> None:
        """End every wait, now and from now on: the director stops."""
        self.closed = True
        self.wake_all()


class Store(Protocol):
    """What services, HTTP and the reconcile loop know of a database."""

    @property
    def notifier(self) -> Notifier:
        """Who waits for what is committed here."""
        ...

    @property
    def shared(self) -> bool:
        """Whether other directors may be serving on the same database."""
        ...

    async def write(self, fn: Callable[[Tx], T]) -> T:
        """Run a command; it is on disk when this returns.

        Raises:
            Unavailable: the database could not take it (busy, disk full, stopping). Whatever ``fn`` itself raises.
        """
        ...

    async def read(self, fn: Callable[[Tx], T]) -> T:
        """Run a question on a snapshot; ``fn`` cannot change anything."""
        ...

    async def close(self) -> None:
        """Finish what was accepted, then let go of the database."""
        ...
