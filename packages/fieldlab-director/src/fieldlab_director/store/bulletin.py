"""How directors that share a PostgreSQL database wake each other: LISTEN and NOTIFY, on two connections of their own.

Topics are told after the commit, many in one message, and not as part of the transaction: PostgreSQL lets only one
transaction with a notice commit at a time. So a director that dies in between wakes nobody; whoever waits looks again
when its time is up, as always. A director that could not listen for a while wakes all who wait here: they look, and
find what they missed.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import sqlalchemy as sa
import structlog
from fieldlab_common.errors import Unavailable

from fieldlab_director.store.base import Notifier

__all__ = ["Bulletin"]

log = structlog.get_logger("fieldlab.store")

CHANNEL = "fieldlab"
MOST_BYTES = 7_500  # of one message; PostgreSQL takes fewer than 8000
FIRST_SECONDS = 15.0  # to connect at the start
COMPARE_SECONDS = 60.0  # between two looks at the database's clock
PAUSE = 1.0  # seconds before connecting again


class Bulletin:
    """Posts what was woken here, and wakes here what others post."""

    def __init__(self, url: str, notifier: Notifier) -> None:
        where = sa.make_url(url).set(drivername="postgresql")
        self._conninfo = where.render_as_string(hide_password=False)
        self._notifier = notifier
        self._me = secrets.token_hex(8)
        self._posted: set[str] = set()
        self._news = asyncio.Event()
        self._compared = asyncio.Event()
        self._ahead = 0.0
        parts = {"fieldlab listens": self._listen, "fieldlab tells": self._tell}
        self._tasks = [asyncio.create_task(self._lasting(name, part)) for name, part in parts.items()]

    def clock(self) -> float:
        """The database's time, in seconds since the epoch."""
        return time.time() + self._ahead

    def post(self, topics: Iterable[str]) -> None:
        """Tell the other directors that ``topics`` were woken."""
        self._posted.update(topics)
        self._news.set()

    async def compared(self) -> None:
        """Wait until the clocks are compared for the first time.

        Raises:
            Unavailable: the database cannot be reached.
        """
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                await self._compared.wait()
        except TimeoutError as error:
            raise Unavailable(
                "The director's database cannot be listened to.", advice="See the director's log."
            ) from error

    async def close(self) -> None:
        """Let go of the connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _lasting(self, name: str, part: Callable[[Any], Awaitable[None]]) -> None:
        """Do a part on a connection, and on another one when that is lost."""
        import psycopg

        while True:
            try:
                connected = psycopg.AsyncConnection.connect(self._conninfo, autocommit=True, application_name=name)
                async with await connected as connection:
                    await part(connection)
            except psycopg.Error as error:
                log.warning("other directors are not heard for now", error=str(error))
            await asyncio.sleep(PAUSE)

    async def _listen(self, connection: Any) -> None:
        await connection.execute(f"LISTEN {CHANNEL}")
        self._notifier.wake_all()
        while True:
            await self._compare(connection)
            async for notice in connection.notifies(timeout=COMPARE_SECONDS):
                sender, *topics = notice.payload.split(" ")
                if sender != self._me:
                    self._notifier.wake(topics)

    async def _compare(self, connection: Any) -> None:
        before = time.time()
        row = await (await connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8")).fetchone()
        self._ahead = row[0] - (before + time.time()) / 2
        self._compared.set()

    async def _tell(self, connection: Any) -> None:
        await connection.execute("SET synchronous_commit = off")  # a notice is worth nothing after a crash
        while True:
            await self._news.wait()
            self._news.clear()
            topics, self._posted = self._posted, set()
            for message in _messages(self._me, sorted(topics)):
                await connection.execute("SELECT pg_notify(%s, %s)", (CHANNEL, message))


def _messages(sender: str, topics: list[str]) -> Iterator[str]:
    message = sender
    for topic in topics:
        if len(message) + 1 + len(topic) > MOST_BYTES:
            yield message
            message = sender
        message += f" {topic}"
    yield message
