"""Bytes, named by their SHA-256: complete ones on a shelf (``shelves``), unfinished ones as files of this machine.

An unfinished upload is a file that grows by offset and is synced before its new length is told to anybody. When it has
its announced size it is hashed, and given to the shelf as a whole, or thrown away if the hash is another. Nothing
is ever held in memory but one chunk. Uploads are kept apart by scope (a user, a deployment), so that nobody can add to,
or learn of, what another is sending.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fieldlab_common.errors import BlobMismatch, TooLarge, Unavailable

from fieldlab_director.store.disk import on_disk, sync
from fieldlab_director.store.shelves import Shelf

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["Blobs"]

CHUNK = 1024 * 1024
HASHES = 256  # unfinished uploads whose hash so far is remembered; others are read again at their end


@dataclass
class _Running:
    hash: _Hash
    offset: int


@dataclass
class _Turns:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0
    finished: bool = False  # the blob is on the shelf: those who waited need not send it again


class Blobs:
    """Uploads in ``folder``, and the ``shelf`` of what is complete.

    ``reserve``: bytes of disk that uploads leave free; ``most``: the size of one blob; ``patience``: seconds to wait
    for another that sends the same.
    """

    def __init__(self, shelf: Shelf, folder: Path, *, most: int, reserve: int, patience: float) -> None:
        self.shelf = shelf
        self._partial = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._most, self._reserve, self._patience = most, reserve, patience
        self._hashes: OrderedDict[Path, _Running] = OrderedDict()
        self._turns: dict[Path, _Turns] = {}

    def offset(self, scope: str, digest: str) -> int:
        """How many bytes of an unfinished upload are on disk."""
        try:
            return self._path(scope, digest).stat().st_size
        except FileNotFoundError:
            return 0

    async def write(self, scope: str, digest: str, offset: int, size: int, body: AsyncIterator[bytes]) -> int:
        """Add the bytes of ``body`` to an upload at ``offset``; how many it has then, all of them on disk.

        When it has ``size`` bytes it is complete, and ``body`` of it can be read.

        Raises:
            BlobMismatch: the offset is beyond what is there, more came than ``size``, or the hash is another.
            TooLarge: ``size`` is over the limit. Unavailable: the disk is full, or another sends the same.
        """
        self._admit(offset, size)
        path = self._path(scope, digest)
        async with self._turn(path) as turns:
            if turns.finished:
                return size
            reached = await self._append(path, digest, offset, size, body)
            turns.finished = reached == size
            return reached

    async def expire(self, before: float) -> int:
        """Throw away uploads to which nothing was added since a time, in seconds since the epoch; how many."""
        old = await asyncio.to_thread(_older_uploads, self._partial, before)
        for path in old:
            async with self._turn(path):
                await on_disk(_unlink_older, path, before)
        return len(old)

    # --- inside ------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _turn(self, path: Path) -> AsyncIterator[_Turns]:
        """Alone with an upload."""
        turns = self._turns.setdefault(path, _Turns())
        turns.waiting += 1
        try:
            try:
                await asyncio.wait_for(turns.lock.acquire(), self._patience)
            except TimeoutError as error:
                message = f"Blob {path.name} is being sent by another."
                raise Unavailable(message, advice="Try again in a moment.") from error
            try:
                yield turns
            finally:
                turns.lock.release()
        finally:
            turns.waiting -= 1
            if not turns.waiting:
                self._turns.pop(path, None)

    def _path(self, scope: str, digest: str) -> Path:
        return self._partial / scope / digest

    def _admit(self, offset: int, size: int) -> None:
        if not 0 <= offset <= size:
            raise BlobMismatch(f"The offset {offset} is not within a blob of {size} bytes.")
        if size > self._most:
            raise TooLarge(f"A blob of {size} bytes is over the limit of {self._most}.")
        if shutil.disk_usage(self._partial).free < size - offset + self._reserve:
            raise Unavailable(f"The director's disk has no room for {size - offset} bytes.", advice="Tell its admin.")

    async def _append(self, path: Path, digest: str, offset: int, size: int, body: AsyncIterator[bytes]) -> int:
        file = await on_disk(self._begin, path, offset)
        running = self._hashes.pop(path, None)
        if running is None or running.offset != offset:
            running = _Running(hashlib.sha256(), 0) if offset == 0 else None
        reached, behind = offset, _Behind(file, running)
        try:
            async for chunk in _gathered(body):
                if reached + len(chunk) > size:
                    raise BlobMismatch(f"More than the announced {size} bytes came.", details={"offset": reached})
                await behind.put(chunk)
                reached += len(chunk)
        finally:
            try:
                await behind.settle()
            finally:
                await on_disk(sync, file)
                self._remember(path, running)
        return await self._finish(path, digest, size) if reached == size else reached

    def _begin(self, path: Path, offset: int) -> int:
        path.parent.mkdir(exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        there = os.fstat(file).st_size
        if there < offset:
            os.close(file)
            raise BlobMismatch(f"The upload has {there} bytes, fewer than {offset}.", details={"offset": there})
        os.ftruncate(file, offset)
        os.lseek(file, offset, os.SEEK_SET)
        return file

    def _remember(self, path: Path, running: _Running | None) -> None:
        if running is not None:
            self._hashes[path] = running
            while len(self._hashes) > HASHES:
                self._hashes.popitem(last=False)

    async def _finish(self, path: Path, digest: str, size: int) -> int:
        running = self._hashes.pop(path, None)
        known = running.hash.hexdigest() if running and running.offset == size else None
        found = known or await on_disk(_hash, path)
        if found != digest:
            await on_disk(path.unlink, True)
            raise BlobMismatch(
                f"The bytes that arrived have the SHA-256 {found}, not {digest}.",
                advice="Send it again from the start.",
                details={"offset": 0},
            )
        await self.shelf.adopt(path, digest)
        return size


class _Behind:
    """Writes a chunk, and hashes it, in a thread while the next one is on its way: it holds one at most."""

    def __init__(self, file: int, running: _Running | None) -> None:
        self._file, self._running = file, running
        self._work: asyncio.Future[None] | None = None

    async def put(self, chunk: bytes) -> None:
        """Begin with ``chunk`` once the one before it is written; that one's fault is raised here."""
        await self.settle()
        self._work = asyncio.ensure_future(on_disk(_put, self._file, chunk, self._running))

    async def settle(self) -> None:
        """Wait until all is written."""
        work, self._work = self._work, None
        if work is not None:
            await work


async def _gathered(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in chunks that are worth a turn in a thread."""
    parts: list[bytes] = []
    size = 0
    try:
        async for part in body:
            parts.append(part)
            size += len(part)
            if size >= CHUNK:
                yield b"".join(parts)
                parts, size = [], 0
    except Exception:  # however the body broke off, what came of it is kept: so a bad line makes headway too
        if parts:
            yield b"".join(parts)
        raise
    if parts:
        yield b"".join(parts)


def _put(file: int, chunk: bytes, running: _Running | None) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(file, view) :]
    if running is not None:
        running.hash.update(chunk)
        running.offset += len(chunk)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _older_uploads(folder: Path, before: float) -> list[Path]:
    return [path for path in folder.glob("*/*") if _changed(path) < before]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # it was finished meanwhile
        return math.inf


def _unlink_older(path: Path, before: float) -> None:
    """Remove an upload, unless it went on meanwhile; and the folder of its scope, if it was the last there."""
    if _changed(path) < before:
        path.unlink()
    with contextlib.suppress(OSError):
        path.parent.rmdir()
