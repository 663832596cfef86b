"""Where complete blobs stand, by their SHA-256: a folder, or a bucket of an object store that speaks S3.

A blob is put on the shelf whole, as a file that was checked before, so it is there entirely or not at all. A folder is
read and written as files; a bucket through obstore, in requests that are short whatever the size of the blob, and with
so few of them at once that memory stays flat.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from fieldlab_common.errors import ConfigurationError, InternalError, NotFound, Unavailable

from fieldlab_director.store.disk import on_disk, sync_folder

__all__ = ["BucketShelf", "FolderShelf", "Shelf", "begun"]

CHUNK = 1024 * 1024
PIECE = 8 * 1024 * 1024  # bytes of one request to a bucket: at most 10,000 of them make a blob
AT_ONCE = 3  # requests for one blob
LISTED = 1000  # blobs of one page of a listing
REQUEST_SECONDS = 60.0
CONNECT_SECONDS = 10.0
RETRY_SECONDS = 60.0  # a bucket that fails for so long is said to be unavailable


class Shelf(Protocol):
    """What uploads and downloads know of where complete blobs stand."""

    async def adopt(self, path: Path, digest: str) -> None:
        """Take the file at ``path``, which is gone then, as the blob ``digest``; it is there for good on return.

        Raises:
            Unavailable: it cannot be taken now; the file is still there.
        """
        ...

    def read(self, digest: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from ``start`` up to ``end``, chunk by chunk.

        Raises:
            NotFound: it is not there. Unavailable: it cannot be reached.
        """
        ...

    async def remove(self, digest: str) -> None:
        """Let a blob be gone; nothing if it is.

        Raises:
            Unavailable: it cannot be removed now.
        """
        ...

    def older(self, before: float) -> AsyncIterator[list[str]]:
        """The digests of all blobs that were put here before a time, in seconds since the epoch, page by page."""
        ...


class FolderShelf:
    """Blobs as files of a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    async def adopt(self, path: Path, digest: str) -> None:
        """Take a file of the same disk (see ``Shelf``)."""
        await on_disk(self._adopt, path, self._folder / _key(digest))

    async def read(self, digest: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes of a blob (see ``Shelf``)."""
        # Not by obstore, which reads 8 KiB at a time, each in a thread: ten times the processor time.
        try:
            file = await asyncio.to_thread((self._folder / _key(digest)).open, "rb", buffering=0)
        except FileNotFoundError as error:
            raise _not_here(digest) from error
        with file:
            while start < end and (chunk := await on_disk(os.pread, file.fileno(), min(CHUNK, end - start), start)):
                start += len(chunk)
                yield chunk

    async def remove(self, digest: str) -> None:
        """Let a blob be gone (see ``Shelf``)."""
        await on_disk((self._folder / _key(digest)).unlink, True)

    async def older(self, before: float) -> AsyncIterator[list[str]]:
        """Old blobs, folder by folder (see ``Shelf``)."""
        for part in sorted(await asyncio.to_thread(lambda: list(self._folder.iterdir()))):
            yield await asyncio.to_thread(_older_files, part, before)

    @staticmethod
    def _adopt(path: Path, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        sync_folder(target.parent)
        sync_folder(target.parent.parent)


class BucketShelf:
    """Blobs as objects of a bucket: ``url`` is ``s3://bucket/prefix``.

    ``endpoint`` is the URL of another store than Amazon's. Everything else (credentials, region) comes from where the
    tools of S3 look for it: ``AWS_…`` in the environment, or the machine's role.
    """

    def __init__(self, url: str, *, endpoint: str | None = None, environment: Mapping[str, str] = os.environ) -> None:
        self._url = url
        endpoint = endpoint or environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
        self._store = _bucket(url, endpoint)

    async def check(self) -> None:
        """Hold that the bucket can be written and read.

        Raises:
            ConfigurationError: it cannot.
        """
        import obstore

        try:
            await obstore.put_async(self._store, "fieldlab-check", b"written when a director starts")
            await obstore.get_async(self._store, "fieldlab-check")
        except _failures() as error:
            raise ConfigurationError(
                f"The blobs at {self._url} cannot be used: {_brief(error)}.",
                advice="See whether the bucket is there, and the endpoint and AWS_… in the environment are right.",
            ) from error

    async def adopt(self, path: Path, digest: str) -> None:
        """Send a file (see ``Shelf``); in parts if it is large, of which the bucket shows none before the last."""
        import obstore

        try:
            await obstore.put_async(self._store, _key(digest), path, chunk_size=PIECE, max_concurrency=AT_ONCE)
        except _failures() as error:
            raise self._unavailable(error) from error
        await on_disk(path.unlink, True)

    async def read(self, digest: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes of a blob (see ``Shelf``): one piece is asked for while the one before it is given away."""
        asked = self._ask(digest, start, end)
        try:
            while asked is not None:
                piece = await asked
                start += len(piece)
                asked = self._ask(digest, start, end) if len(piece) else None
                for at in range(0, len(piece), CHUNK):
                    yield piece[at : at + CHUNK]
        finally:
            if asked is not None:
                asked.cancel()

    async def remove(self, digest: str) -> None:
        """Let a blob be gone (see ``Shelf``)."""
        import obstore

        try:
            await obstore.delete_async(self._store, _key(digest))
        except FileNotFoundError:
            return
        except _failures() as error:
            raise self._unavailable(error) from error

    async def older(self, before: float) -> AsyncIterator[list[str]]:
        """Old blobs, as the bucket lists them (see ``Shelf``)."""
        import obstore

        try:
            async for page in obstore.list(self._store, chunk_size=LISTED):
                names = [one["path"].rpartition("/")[2] for one in page if one["last_modified"].timestamp() < before]
                yield [name for name in names if len(name) == 64]
        except _failures() as error:
            raise self._unavailable(error) from error

    def _ask(self, digest: str, start: int, end: int) -> asyncio.Task[bytes] | None:
        return asyncio.create_task(self._piece(digest, start, min(end, start + PIECE))) if start < end else None

    async def _piece(self, digest: str, start: int, end: int) -> bytes:
        import obstore

        try:
            return bytes(await obstore.get_range_async(self._store, _key(digest), start=start, end=end))
        except FileNotFoundError as error:
            raise _not_here(digest) from error
        except _failures() as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: BaseException) -> Unavailable:
        return Unavailable(f"The director's blobs cannot be reached: {_brief(error)}.", advice="Try again in a moment.")


def _bucket(url: str, endpoint: str | None) -> Any:
    from obstore.store import S3Store

    options: dict[str, Any] = {"retry_config": {"retry_timeout": timedelta(seconds=RETRY_SECONDS)}}
    options["client_options"] = {
        "timeout": timedelta(seconds=REQUEST_SECONDS),
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "allow_http": bool(endpoint and endpoint.startswith("http://")),
    }
    if endpoint:
        options["endpoint"] = endpoint
    if not url.startswith("s3://"):
        raise ConfigurationError(f"{url!r} is no place for blobs.", advice="Give s3://bucket/prefix.")
    try:
        return S3Store.from_url(url, **options)
    except _failures() as error:
        raise ConfigurationError(f"{url!r} is no place for blobs: {_brief(error)}.") from error


def _failures() -> tuple[type[Exception], ...]:
    from obstore.exceptions import BaseError

    return (BaseError, OSError, TimeoutError)


def _brief(error: BaseException) -> str:
    """What obstore says, without its source's structure."""
    return str(error).partition("\n\nDebug source")[0].strip().rstrip(".")


async def begun(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The bytes of a blob that the database knows, of which the first are read: now it is an error if they cannot be,
    later it would be an answer that is cut.

    Raises:
        InternalError: they are not there. Unavailable: the bucket does not answer.
    """
    try:
        first = await anext(chunks, b"")
    except NotFound as error:
        raise InternalError(
            f"{error.message} The database has it, so that its bytes are lost, or elsewhere.",
            advice="The director's admin can see whether all directors on its database were given the same --blobs.",
        ) from error
    return _continued(first, chunks)


async def _continued(first: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in chunks:
        yield chunk


def _key(digest: str) -> str:
    return f"{digest[:2]}/{digest}"


def _not_here(digest: str) -> NotFound:
    return NotFound(f"Blob {digest} is not here.")


def _older_files(folder: Path, before: float) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.stat().st_mtime < before]
