"""Bytes, named by their SHA-256: complete ones in an object store, unfinished ones as files beside it.

An unfinished upload is a file that grows by offset and is synced before its new length is told to anybody. When it has
its announced size it is hashed, and renamed into the store in one step, or thrown away if the hash is another. Nothing
is ever held in memory but one chunk. Uploads are kept apart by scope (a user, a deployment), so that nobody can add to,
or learn of, what another is sending.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fieldlab_common.errors import BlobMismatch, NotFound, TooLarge, Unavailable

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["Blobs"]

T = TypeVar("T")

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


class Blobs:
    """The blobs in ``folder``. ``reserve``: bytes of disk that uploads leave free; ``most``: the size of one blob."""

    def __init__(self, folder: Path, *, most: int, reserve: int, patience: float) -> None:
        self._complete, self._partial = folder / "complete", folder / "partial"
        for made in (self._complete, self._partial):
            made.mkdir(parents=True, exist_ok=True)
        self._most, self._reserve, self._patience = most, reserve, patience
        self._hashes: OrderedDict[Path, _Running] = OrderedDict()
        self._turns: dict[Path, _Turns] = {}

    def offset(self, scope: str, digest: str) -> int:
        """How many bytes of an unfinished upload are on disk."""
        try:
            return self._path(scope, digest).stat().st_size
        except FileNotFoundError:
            return 0

    async def read(self, digest: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from ``start`` up to ``end`` of a complete blob, chunk by chunk.

        Raises:
            NotFound: it is not there.
        """
        if start >= end:
            return
        # Not by obstore, which reads 8 KiB at a time, each in a thread: ten times the processor time.
        try:
            file = await asyncio.to_thread((self._complete / _key(digest)).open, "rb", buffering=0)
        except FileNotFoundError as error:
            raise NotFound(f"Blob {digest} is not here.") from error
        with file:
            while start < end and (chunk := await _on_disk(os.pread, file.fileno(), min(CHUNK, end - start), start)):
                start += len(chunk)
                yield chunk

    async def write(self, scope: str, digest: str, offset: int, size: int, body: AsyncIterator[bytes]) -> int:
        """Add the bytes of ``body`` to an upload at ``offset``; how many it has then, all of them on disk.

        When it has ``size`` bytes it is complete, and ``body`` of it can be read.

        Raises:
            BlobMismatch: the offset is beyond what is there, more came than ``size``, or the hash is another.
            TooLarge: ``size`` is over the limit. Unavailable: the disk is full, or another sends the same.
        """
        self._admit(offset, size)
        path = self._path(scope, digest)
        turns = self._turns.setdefault(path, _Turns())
        turns.waiting += 1
        try:
            await self._turn(turns, digest)
            try:
                return await self._append(path, digest, offset, size, body)
            finally:
                turns.lock.release()
        finally:
            turns.waiting -= 1
            if not turns.waiting:
                self._turns.pop(path, None)

    # --- inside ------------------------------------------------------------------------------------------------------

    async def _turn(self, turns: _Turns, digest: str) -> None:
        try:
            await asyncio.wait_for(turns.lock.acquire(), self._patience)
        except TimeoutError as error:
            raise Unavailable(f"Blob {digest} is being sent by another.", advice="Try again in a moment.") from error

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
        file = await _on_disk(self._begin, path, offset)
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
                await _on_disk(_sync, file)
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
        found = known or await _on_disk(_hash, path)
        if found != digest:
            await _on_disk(path.unlink, True)
            raise BlobMismatch(
                f"The bytes that arrived have the SHA-256 {found}, not {digest}.",
                advice="Send it again from the start.",
                details={"offset": 0},
            )
        await _on_disk(_adopt, path, self._complete / _key(digest))
        return size


class _Behind:
    """Writes a chunk, and hashes it, in a thread while the next one is on its way: it holds one at most."""

    def __init__(self, file: int, running: _Running | None) -> None:
        self._file, self._running = file, running
        self._work: asyncio.Future[None] | None = None

    async def put(self, chunk: bytes) -> None:
        """Begin with ``chunk`` once the one before it is written; that one's fault is raised here."""
        await self.settle()
        self._work = asyncio.ensure_future(_on_disk(_put, self._file, chunk, self._running))

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


async def _on_disk(fn: Callable[..., T], *arguments: Any) -> T:
    """Run ``fn`` in a thread, to its end also when the caller is cancelled: it may be using an open file."""
    work = asyncio.ensure_future(asyncio.to_thread(fn, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise
    except OSError as error:
        raise _full(error) from error


def _key(digest: str) -> str:
    return f"{digest[:2]}/{digest}"


def _put(file: int, chunk: bytes, running: _Running | None) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(file, view) :]
    if running is not None:
        running.hash.update(chunk)
        running.offset += len(chunk)


def _sync(file: int) -> None:
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _adopt(path: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    os.replace(path, target)
    for folder in (target.parent, target.parent.parent):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        _sync(descriptor)


def _full(error: OSError) -> Unavailable:
    what = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot be written ({error.strerror})"
    return Unavailable(f"The director's disk {what}.", advice="Tell its admin, and try again.")
