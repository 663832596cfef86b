"""Where the database is, SQLite's file or a PostgreSQL URL: opened, brought up to date, and looked at."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from fieldlab_common.errors import ConfigurationError

from fieldlab_director.store import migrations
from fieldlab_director.store.base import Store
from fieldlab_director.store.sqlite import SqliteStore, check_sound, engine_for_migration

__all__ = ["Database"]


@dataclass(frozen=True, kw_only=True)
class Database:
    """A database by its ``path`` or, if there is one, its ``url`` (``postgresql://…``)."""

    path: Path | str
    url: str | None = None

    async def open(self, *, clock: Callable[[], float] | None = None) -> Store:
        """The store, on tables of this release, on the running event loop.

        Raises:
            ConfigurationError: it cannot be used, or a newer release made it. Unavailable: it does not answer.
        """
        await asyncio.to_thread(self.upgrade)
        if self.url is None:
            await asyncio.to_thread(check_sound, self.path)
            return SqliteStore(self.path, clock=clock or time.time)
        from fieldlab_director.store.postgres import PostgresStore

        store = PostgresStore(self.url, clock=clock)
        try:
            await store.compared()
        except BaseException:
            await store.close()
            raise
        return store

    def upgrade(self) -> None:
        """Make the tables, or change those of an earlier release (see ``migrations.upgrade``)."""
        with self.engine() as engine:
            migrations.upgrade(engine)

    def pending(self) -> list[str]:
        """The steps that ``upgrade`` would take, each in words (see ``migrations.pending``)."""
        with self.engine() as engine:
            return migrations.pending(engine)

    @contextmanager
    def engine(self) -> Iterator[sa.Engine]:
        """An engine for what is not a director's work.

        Raises:
            ConfigurationError: the database cannot be used.
        """
        engine = engine_for_migration(self.path) if self.url is None else _postgres(self.url)
        try:
            yield engine
        finally:
            engine.dispose()


def _postgres(url: str) -> sa.Engine:
    from fieldlab_director.store.postgres import postgres_engine

    engine = postgres_engine(url)
    try:
        with engine.connect():
            return engine
    except sa.exc.DBAPIError as error:
        engine.dispose()
        raise ConfigurationError(
            f"The director's database cannot be used: {error.orig}.",
            advice="See whether PostgreSQL runs, and whether the URL has the right host, user and database.",
        ) from error
