"""The store on PostgreSQL: several directors may share it, and each command is a transaction of its own.

Commands were written as if they ran one after another, and that is what they get: transactions are serialisable (SSI,
Cahill et al., SIGMOD 2008), so one that another got in the way of is undone by the database and run again. The second
try of all of them goes by one lane, so that those who met once do not meet again; after ``TRIES`` the caller is told to
come back. Nobody is answered before PostgreSQL has the commit on its disk.

What a command woke is told to the other directors by ``bulletin``. Times are the database's, as ``bulletin`` last
compared the clocks: leases mean the same to all directors.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import sqlalchemy as sa
from fieldlab_common.errors import ConfigurationError, InvalidRequest, Unavailable

from fieldlab_director.store.base import Notifier, Tx
from fieldlab_director.store.bulletin import Bulletin

__all__ = ["PostgresStore", "postgres_engine"]

T = TypeVar("T")

WRITERS = 6  # transactions under way at once, for commands
READERS = 6  # and for questions
QUEUE = 10_000  # more than so many waiting: the next is refused
TRIES = 12
PAUSE = 0.002  # seconds before the second try, twice as long before each that follows
LONGEST_PAUSE = 0.25
_SESSION = {  # a session that hangs lets go of what it holds; milliseconds
    "application_name": "fieldlab-director",
    "statement_timeout": "60000",
    "lock_timeout": "10000",
    "idle_in_transaction_session_timeout": "30000",
}
_IN_THE_WAY = {
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
    "23505",  # unique_violation: another was first; the second try sees what it made
    "55P03",  # lock_not_available
}


class PostgresStore:
    """A ``Store`` (see ``base``) on a PostgreSQL database. Make it on the event loop that will use it.

    ``clock`` replaces the database's.
    """

    shared = True

    def __init__(self, url: str, *, clock: Callable[[], float] | None = None) -> None:
        self.notifier = Notifier()
        self._engine = postgres_engine(
            url,
            pool=WRITERS + READERS,
            isolation_level="SERIALIZABLE",
            execution_options={"preserve_rowcount": True},
        )
        self._reader = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._bulletin = Bulletin(url, self.notifier)
        self._clock = clock or self._bulletin.clock
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="store-write")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-read")
        self._lane = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._under_way = 0
        self._closed = False

    async def write(self, fn: Callable[[Tx], T]) -> T:
        """Run a command (see ``base.Store.write``)."""
        return await self._run(self._writers, self._command, fn)

    async def read(self, fn: Callable[[Tx], T]) -> T:
        """Run a question (see ``base.Store.read``)."""
        return await self._run(self._readers, self._question, fn)

    async def compared(self) -> None:
        """Wait until the clocks are compared; until then, times are this machine's."""
        await self._bulletin.compared()

    async def close(self) -> None:
        """Finish what was accepted, then let go of the database."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._writers.shutdown)
            await asyncio.to_thread(self._readers.shutdown)
            await asyncio.sleep(0)  # what the last commands woke is handed over by the loop
            await self._bulletin.close()
            self._engine.dispose()

    async def _run(self, pool: ThreadPoolExecutor, way: Callable[[Callable[[Tx], T]], T], fn: Callable[[Tx], T]) -> T:
        if self._closed:
            raise Unavailable("The director is stopping.", advice="Try again in a moment.")
        if self._under_way >= QUEUE:
            raise Unavailable("The director has too much to do.", advice="Try again in a moment.")
        self._under_way += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, way, fn)
        finally:
            self._under_way -= 1

    # --- on the threads ----------------------------------------------------------------------------------------------

    def _question(self, fn: Callable[[Tx], T]) -> T:
        return self._tried(self._reader, fn)[0]

    def _command(self, fn: Callable[[Tx], T]) -> T:
        value, topics = self._tried(self._engine, fn)
        if topics:  # not left to the caller, who may have been cancelled meanwhile
            self._loop.call_soon_threadsafe(self._woken, topics)
        return value

    def _woken(self, topics: frozenset[str]) -> None:
        self.notifier.wake(topics)
        self._bulletin.post(topics)

    def _tried(self, engine: sa.Engine, fn: Callable[[Tx], T]) -> tuple[T, frozenset[str]]:
        for attempt in range(TRIES):
            if attempt:
                time.sleep(min(LONGEST_PAUSE, PAUSE * 2 ** (attempt - 1)))
            done = False
            try:
                with self._lane if attempt else nullcontext(), engine.begin() as connection:
                    tx = Tx(connection, self._clock())
                    value = fn(tx)
                    done = True
                return value, frozenset(tx.topics)
            except sa.exc.DBAPIError as error:
                if not _is_undone(error, done=done):
                    raise _to_caller(error) from error
        raise Unavailable("The director's database is too busy.", advice="Try again in a moment.")


def postgres_engine(url: str, *, pool: int = 1, **options: Any) -> sa.Engine:
    """An engine for the database at ``url`` (``postgresql://…``).

    Raises:
        ConfigurationError: it is no such URL, or the driver is not installed.
    """
    settings = " ".join(f"-c {name}={value}" for name, value in _SESSION.items())
    try:
        where = sa.make_url(url)
        if where.get_backend_name() not in ("postgresql", "postgres"):
            raise ValueError(where.drivername)
        where = where.set(drivername="postgresql+psycopg")
        engine = sa.create_engine(
            where,
            pool_size=pool,
            max_overflow=0,
            connect_args={"options": settings, "connect_timeout": 10, "tcp_user_timeout": 30_000},
            **options,
        )
    except (sa.exc.ArgumentError, ValueError) as error:
        raise ConfigurationError(
            "--database is no URL of a PostgreSQL database.", advice="Give one like postgresql://user@host/name."
        ) from error
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "The driver for PostgreSQL is not installed.", advice="Run: pip install 'fieldlab-director[postgres]'"
        ) from error
    sa.event.listen(engine, "connect", _take_any_text)
    return engine


def _take_any_text(connection: Any, _: Any) -> None:
    """Text of PostgreSQL has no NUL, while what nodes say may have one: it is stored as the symbol for it."""
    from psycopg.types.string import StrDumper

    class Dumper(StrDumper):
        def dump(self, obj: str) -> Any:
            return super().dump(obj.replace("\0", "\u2400") if "\0" in obj else obj)

    connection.adapters.register_dumper(str, Dumper)


def _is_undone(error: sa.exc.DBAPIError, *, done: bool) -> bool:
    """Whether nothing of the transaction is stored for certain, and another try may do better.

    A connection that broke before the commit was one that the server had let go of; during the commit, nobody knows.
    """
    broken = error.connection_invalidated and not done
    return broken or getattr(error.orig, "sqlstate", None) in _IN_THE_WAY


def _to_caller(error: sa.exc.DBAPIError) -> Exception:
    if isinstance(error, sa.exc.DataError):
        return InvalidRequest(f"The database has no room for a value: {error.orig}.")
    return Unavailable(f"The director's database cannot be used now: {error.orig}.", advice="Try again in a moment.")
