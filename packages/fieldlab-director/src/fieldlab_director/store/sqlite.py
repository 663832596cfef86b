"""The store on SQLite: one thread writes, a few read, and nobody is answered before the disk has it.

Commands queue for the writer. It takes what has gathered, opens one transaction (``BEGIN IMMEDIATE``), runs each
command in a savepoint of its own, commits once, and only then answers them all: one sync of the disk is shared by the
group. A command that raises is undone to its savepoint and alone gets its error; should the database itself give up
the transaction, nobody of the group is told that it worked. WAL lets readers go on meanwhile, on their own
connections; ``synchronous=FULL`` makes a commit survive a power cut.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from fieldlab_common.errors import ConfigurationError, Unavailable

from fieldlab_director.store.base import Notifier, Tx

__all__ = ["SqliteStore"]

T = TypeVar("T")

GROUP = 256  # at most so many commands share a commit
QUEUE = 10_000  # more than so many commands waiting: the next is refused
READERS = 4
QUESTION_SECONDS = 30.0  # a question that takes longer is given up: the log of writes cannot be reused before it ends
WAL_BYTES = 64 * 1024 * 1024  # of the log of writes that are kept on disk once it was copied into the database
CHECK_SECONDS = 1.0  # of looking for damage at the start, however large the database
BUSY_SECONDS = 10.0  # how long another process (a command line) may hold the database before a command is refused


@dataclass(eq=False)
class _Command:
    run: Callable[[Tx], Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    topics: frozenset[str] = frozenset()
    value: Any = None
    error: BaseException | None = None


class SqliteStore:
    """A ``Store`` (see ``base``) on one database file. Make it on the event loop that will use it.

    ``path`` may be an SQLite URI, like ``file:/name?vfs=memdb`` for one in memory.
    """

    shared = False

    def __init__(self, path: Path | str, *, clock: Callable[[], float] = time.time) -> None:
        self.notifier = Notifier()
        self._clock = clock
        self._writer = _engine(path, "PRAGMA synchronous=FULL", f"PRAGMA journal_size_limit={WAL_BYTES}")
        self._reader = _engine(path, "PRAGMA query_only=ON")
        self._queue: queue.Queue[_Command | None] = queue.Queue(QUEUE)
        self._closed = False
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="store-read")
        self._thread = threading.Thread(target=self._serve, name="store-write", daemon=True)
        self._thread.start()

    async def write(self, fn: Callable[[Tx], T]) -> T:
        """Run a command (see ``base.Store.write``)."""
        loop = asyncio.get_running_loop()
        command = _Command(fn, loop, loop.create_future())
        if self._closed:
            raise Unavailable("The director is stopping.", advice="Try again in a moment.")
        try:
            self._queue.put_nowait(command)
        except queue.Full:
            raise Unavailable("The director has too much to write.", advice="Try again in a moment.") from None
        result: T = await command.future
        return result

    async def read(self, fn: Callable[[Tx], T]) -> T:
        """Run a question (see ``base.Store.read``)."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._ask, fn)

    async def close(self) -> None:
        """Finish what was accepted, then let go of the database."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._queue.put, None)
            await asyncio.to_thread(self._thread.join)
            self._pool.shutdown()
            self._reader.dispose()
            self._writer.dispose()

    # --- on the readers' threads -------------------------------------------------------------------------------------

    def _ask(self, fn: Callable[[Tx], T]) -> T:
        try:
            with self._reader.begin() as connection, _given_up_after(connection, QUESTION_SECONDS):
                return fn(Tx(connection, self._clock()))
        except sa.exc.OperationalError as error:
            raise _unavailable(error) from error

    # --- on the writer's thread --------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (first := self._queue.get()) is not None:
            group, last = self._gather(first)
            try:
                self._commit(group)
            except sa.exc.SQLAlchemyError as error:
                for command in group:
                    command.error = command.error or _unavailable(error)
            self._answer(group)
            if last:
                return

    def _gather(self, first: _Command) -> tuple[list[_Command], bool]:
        group = [first]
        while len(group) < GROUP:
            try:
                command = self._queue.get_nowait()
            except queue.Empty:
                break
            if command is None:
                return group, True
            group.append(command)
        return group, False

    def _commit(self, group: list[_Command]) -> None:
        with self._writer.begin() as connection:
            for command in group:
                self._run(connection, command)

    def _run(self, connection: sa.Connection, command: _Command) -> None:
        # By name, not as a nested transaction of SQLAlchemy's, which compiles these statements anew each time.
        connection.exec_driver_sql("SAVEPOINT command")
        tx = Tx(connection, self._clock())
        try:
            command.value = command.run(tx)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's; this thread must live on
            command.error = error
            # Raises when the database dropped the whole transaction: then the group failed.
            connection.exec_driver_sql("ROLLBACK TO command")
        else:
            connection.exec_driver_sql("RELEASE command")
            command.topics = frozenset(tx.topics)

    def _answer(self, group: list[_Command]) -> None:
        for loop in {command.loop for command in group}:
            mine = [command for command in group if command.loop is loop]
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._deliver, mine)

    def _deliver(self, group: list[_Command]) -> None:
        for command in group:
            if command.error is None:
                self.notifier.wake(command.topics)
            if command.future.cancelled():
                continue
            if command.error is None:
                command.future.set_result(command.value)
            else:
                command.future.set_exception(_to_caller(command.error))


def _to_caller(error: BaseException) -> BaseException:
    if isinstance(error, sa.exc.OperationalError):
        return _unavailable(error)
    return error if isinstance(error, Exception) else RuntimeError(f"A command ended with {error!r}.")


def _unavailable(error: sa.exc.SQLAlchemyError) -> Unavailable:
    cause = getattr(error, "orig", None) or error
    unavailable = Unavailable(f"The director's database cannot be used now: {cause}.", advice="Try again in a moment.")
    unavailable.__cause__ = error
    return unavailable


@contextmanager
def _given_up_after(connection: sa.Connection, seconds: float) -> Iterator[None]:
    raw: Any = connection.connection.dbapi_connection
    deadline = time.monotonic() + seconds
    raw.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
    try:
        yield
    finally:
        raw.set_progress_handler(None, 0)


def check_sound(path: Path | str) -> None:
    """Look for damage in the database for at most ``CHECK_SECONDS``.

    Raises:
        ConfigurationError: there is some.
    """
    deadline = time.monotonic() + CHECK_SECONDS
    with closing(sqlite3.connect(str(path), uri=str(path).startswith("file:"))) as connection:
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 20_000)
        try:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.OperationalError as error:
            found = "ok" if "interrupted" in str(error) else str(error)
        except sqlite3.DatabaseError as error:
            found = str(error)
    if found != "ok":
        raise ConfigurationError(
            f"The director's database {path} is damaged: {' '.join(found.split())}.",
            advice="Put it aside, and run: fieldlab-director restore, with the last backup.",
        )


def _engine(path: Path | str, *pragmas: str) -> sa.Engine:
    engine = sa.create_engine(
        f"sqlite:///{path}&uri=true" if str(path).startswith("file:") else f"sqlite:///{path}",
        poolclass=sa.pool.QueuePool,
        pool_size=READERS,
        connect_args={"isolation_level": None, "check_same_thread": False, "timeout": BUSY_SECONDS},
    )
    begin = "BEGIN" if "PRAGMA query_only=ON" in pragmas else "BEGIN IMMEDIATE"

    @sa.event.listens_for(engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        for pragma in ("PRAGMA journal_mode=WAL", "PRAGMA foreign_keys=ON", *pragmas):
            connection.execute(pragma)

    @sa.event.listens_for(engine, "begin")
    def began(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)  # the driver is in autocommit: it would begin later than it should

    return engine


def engine_for_migration(path: Path | str) -> sa.Engine:
    """An engine with which ``migrations`` can make and change tables.

    Raises:
        ConfigurationError: the file cannot be opened, or is no database.
    """
    engine = _engine(path)
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA schema_version")
    except sa.exc.DatabaseError as error:
        raise ConfigurationError(f"{path} cannot be used as the director's database: {error.orig}.") from error
    return engine
