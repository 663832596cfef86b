"""Backups of a director on SQLite: taken while it serves, and restored, on this machine or another.

A backup is a folder with a copy of the database (one moment of it, by SQLite's own means, under which writers go on),
every complete blob that this copy refers to, and a manifest, which is written last and makes the folder a backup. It
has neither the secret, which opens what is sealed in the database, nor what connectors keep on this machine.

What was acknowledged after the moment of the backup is not in it, while those who were told have moved on. So a
restored database marks its journals, whose executors send again what their disks still have (``services.gaps``: the
rest), and lets the numbers of events and records leap, beyond every cursor that anybody may have.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import sqlalchemy as sa
from fieldlab_common.errors import ConfigurationError

from fieldlab_director.store.databases import Database
from fieldlab_director.store.disk import sync_folder
from fieldlab_director.store.schema import LEAP

__all__ = ["Backup", "backup", "mark_restored", "restore"]

_DATABASE, _BLOBS, _MANIFEST = "director.db", "blobs", "backup.json"
_FORM = 1


@dataclass(frozen=True, kw_only=True)
class Backup:
    """What a backup has: ``blobs`` copied, or None if they are in a bucket, where they stay. ``at`` is its moment."""

    at: float
    blobs: int | None
    form: int = _FORM


def backup(database: Path, blobs: Path | None, target: Path) -> Backup:
    """Take a backup into the new folder ``target``; ``blobs`` is the folder of complete ones, if they are in a folder.

    Raises:
        ConfigurationError: the folder is not empty, there is no such database, or a blob that is used is not there.
    """
    if not database.exists():
        raise ConfigurationError(f"There is no database at {database}.", advice="Give the director's --data.")
    _make_empty(target)
    at = time.time()
    with _words(target), closing(sqlite3.connect(database, timeout=60)) as source:
        with closing(sqlite3.connect(target / _DATABASE)) as copy:
            source.backup(copy)
            copied = None if blobs is None else _copy_blobs(copy, blobs, target / _BLOBS)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, whole in itself
        _sync_file(target / _DATABASE)
        made = Backup(at=at, blobs=copied)
        (target / _MANIFEST).write_text(json.dumps(asdict(made)) + "\n")
        _sync_file(target / _MANIFEST)
        sync_folder(target)
    return made


def restore(source: Path, database: Path, blobs: Path | None) -> Backup:
    """Put a backup where a director will find it; ``blobs`` is the folder for complete ones, if they are in a folder.

    Raises:
        ConfigurationError: it is no whole backup, or there is a database already.
    """
    made = _manifest(source)
    if database.exists():
        raise ConfigurationError(f"There is a database at {database} already.", advice="Give another data folder.")
    if (made.blobs is None) is not (blobs is None):
        where = "in a bucket: give --blobs" if made.blobs is None else "in the backup: give no --blobs"
        raise ConfigurationError(f"The blobs of this backup are {where}.")
    database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    written = database.with_suffix(".new")
    with _words(database.parent):
        if blobs is not None:
            for path in sorted((source / _BLOBS).glob("*/*")):
                _copy(path, blobs / path.parent.name / path.name)
            blobs.mkdir(parents=True, exist_ok=True)
            _sync_tree(blobs)
        shutil.copyfile(source / _DATABASE, written)
        with closing(sqlite3.connect(written)) as copy:
            _check(copy, source)
        mark_restored(Database(path=written))
        _settle(written)
        os.replace(written, database)
        sync_folder(database.parent)
    return made


def mark_restored(database: Database) -> None:
    """Ready a database that was restored, by whatever means, for those who know more than it does.

    Raises:
        ConfigurationError: it cannot be used.
    """
    database.upgrade()
    moved = "last_event = last_event + :leap, last_record = last_record + :leap"
    with database.engine() as engine, engine.begin() as connection:
        connection.execute(sa.text("UPDATE journals SET restored = true"))
        connection.execute(sa.text(f"UPDATE experiments SET {moved}"), {"leap": LEAP})


# --- inside ----------------------------------------------------------------------------------------------------------


@contextmanager
def _words(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise ConfigurationError(f"{folder} could not be written: {error}.") from error


def _make_empty(folder: Path) -> None:
    with _words(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    if taken:
        raise ConfigurationError(f"The folder {folder} is not empty.", advice="Give a new one for each backup.")


def _manifest(folder: Path) -> Backup:
    try:
        found = Backup(**json.loads((folder / _MANIFEST).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{folder} is no backup, or one that was not ended.") from error
    if found.form != _FORM:
        raise ConfigurationError(f"{folder} is a backup of a newer release.", advice="Restore it with that one.")
    return found


def _copy_blobs(copy: sqlite3.Connection, source: Path, target: Path) -> int:
    """Copy what the copy of the database refers to; its row is taken out if the blob went in the meantime.

    That may be with one which nothing used when the copy was made: the sweep was about to remove it.
    """
    copied = 0
    target.mkdir(mode=0o700)
    for digest, size in copy.execute("SELECT digest, size FROM blobs WHERE doomed IS NULL").fetchall():
        try:
            _copy(source / digest[:2] / digest, target / digest[:2] / digest, size)
            copied += 1
        except FileNotFoundError:
            if copy.execute("SELECT 1 FROM blob_uses WHERE digest = ?", (digest,)).fetchone():
                raise ConfigurationError(f"Blob {digest}, which an experiment uses, is not in {source}.") from None
            copy.execute("DELETE FROM blob_refs WHERE digest = ?", (digest,))
            copy.execute("DELETE FROM blobs WHERE digest = ?", (digest,))
    copy.commit()
    _sync_tree(target)
    return copied


def _copy(source: Path, target: Path, size: int | None = None) -> None:
    """A blob never changes, so on the same disk it only gets a second name."""
    if size is not None and source.stat().st_size != size:
        raise ConfigurationError(f"{source} has not the {size} bytes that it should have.")
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
        _sync_file(target)


def _check(copy: sqlite3.Connection, source: Path) -> None:
    (found,) = copy.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise ConfigurationError(f"The database in {source} is damaged: {found}.", advice="Take an earlier backup.")


def _settle(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    _sync_file(database)


def _sync_tree(folder: Path) -> None:
    for each in (*folder.iterdir(), folder):
        sync_folder(each)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
