"""The commands about the director's data as a whole: migrate, gc, backup, restore. Each returns what it has to say."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldlab_common.errors import ConfigurationError

if TYPE_CHECKING:
    from fieldlab_director.settings import Settings
    from fieldlab_director.store.backup import Backup

__all__ = ["add_places", "add_upkeep", "existing", "is_there", "settings_of"]


def add_upkeep(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``migrate``, ``gc``, ``backup``, ``restore`` and ``restored`` to the command line."""
    migrate = _command(commands, "migrate", _migrate, "bring the database to the tables of this release")
    migrate.add_argument("--show", action="store_true", help="only say what would be done")
    _command(commands, "gc", _sweep, "remove blobs that nothing refers to, and uploads that nobody goes on with")
    keep = _command(commands, "backup", _backup, "copy the data, while the director serves")
    keep.add_argument("target", type=Path, metavar="FOLDER", help="a new folder")
    back = _command(commands, "restore", _restore, "make a data folder of a backup")
    back.add_argument("source", type=Path, metavar="FOLDER", help="the backup's")
    what = "say that the database was restored by other means (pg_restore), before directors start on it"
    _command(commands, "restored", _restored, what)


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add where the data is."""
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the director's data folder")
    parser.add_argument("--database", metavar="URL", help="postgresql://… (default: an SQLite file in DIR)")
    parser.add_argument("--blobs", metavar="URL", help="s3://bucket/prefix (default: a folder in DIR)")
    parser.add_argument("--blobs-endpoint", metavar="URL", help="where the bucket is, if not at Amazon's")


def settings_of(options: argparse.Namespace, **more: Any) -> Settings:
    """The settings, of which ``add_places`` has added some."""
    from fieldlab_director.settings import Settings

    return Settings(
        data=options.data.absolute(),
        database_url=options.database,
        blobs_url=options.blobs,
        blobs_endpoint=options.blobs_endpoint,
        **more,
    )


def is_there(settings: Settings) -> bool:
    """Whether there is a database; one that is not a file, or is not there yet, says so itself when it is opened."""
    return settings.database_url is not None or settings.database.exists()


def existing(options: argparse.Namespace) -> Settings:
    """The settings of a director that is there: a command about a folder with a slip in its name is to make no other.

    Raises:
        ConfigurationError: there is no database.
    """
    settings = settings_of(options)
    if not is_there(settings):
        raise ConfigurationError(
            f"There is no director's data in {options.data}.",
            advice="Give the folder of `fieldlab-director serve --data`, and --database if it has one.",
        )
    return settings


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], str],
    what: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what)
    add_places(parser)
    parser.set_defaults(run=run)
    return parser


def _migrate(options: argparse.Namespace) -> str:
    from fieldlab_director.store.databases import Database

    settings = existing(options)
    database = Database(path=settings.database, url=settings.database_url)
    steps = database.pending()
    if not steps:
        return "The database has the tables of this release."
    if not options.show:
        database.upgrade()
    said = "would be" if options.show else "were"
    return "\n".join([*steps, f"{len(steps)} steps {said} taken."])


def _sweep(options: argparse.Namespace) -> str:
    from fieldlab_director.app import sweep

    done = asyncio.run(sweep(existing(options)))
    return f"{done.let_go} blobs lost an owner, {done.removed} were removed, {done.expired} uploads were thrown away."


def _backup(options: argparse.Namespace) -> str:
    from fieldlab_director.store.backup import backup

    settings = _on_sqlite(existing(options))
    made = backup(settings.database, _folder_of_blobs(settings), options.target.absolute())
    return (
        f"The backup is in {options.target}: the database, and {_blobs_of(made)}.\n"
        f"It has no key. Keep a copy of {settings.key_file} elsewhere: without it, a restored director will not start."
    )


def _restore(options: argparse.Namespace) -> str:
    from fieldlab_director.store.backup import restore

    settings = _on_sqlite(settings_of(options))
    made = restore(options.source.absolute(), settings.database, _folder_of_blobs(settings))
    said = f"{options.data} has the database, and {_blobs_of(made)}."
    if not settings.key_file.exists():
        said += f"\nBefore you start the director, put its key back: {settings.key_file} (chmod 600)."
    return said


def _restored(options: argparse.Namespace) -> str:
    from fieldlab_director.store.backup import mark_restored
    from fieldlab_director.store.databases import Database

    settings = existing(options)
    mark_restored(Database(path=settings.database, url=settings.database_url))
    return "Executors and readers that know more than the database may go on."


def _on_sqlite(settings: Settings) -> Settings:
    if settings.database_url is not None:
        raise ConfigurationError(
            "A database on PostgreSQL is backed up with its own tools.",
            advice="Use pg_dump and pg_restore, then: fieldlab-director restored.",
        )
    return settings


def _folder_of_blobs(settings: Settings) -> Path | None:
    return settings.complete_blobs if settings.blobs_url is None else None


def _blobs_of(made: Backup) -> str:
    return "the blobs stay in their bucket" if made.blobs is None else f"{made.blobs} blobs"
