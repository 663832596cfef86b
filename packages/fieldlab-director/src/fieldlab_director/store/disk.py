"""Files from coroutines: in a thread, to the end, and with a full disk said in words."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from fieldlab_common.errors import Unavailable

__all__ = ["on_disk", "sync", "sync_folder"]

T = TypeVar("T")


async def on_disk(fn: Callable[..., T], *arguments: Any) -> T:
    """Run ``fn`` in a thread, to its end however often the caller is cancelled: it may be using an open file.

    The caller closes that file next, and its number is then another file's. A stream whose reader has gone is
    cancelled again and again until it ends.

    Raises:
        Unavailable: the disk is full, or cannot be used.
    """
    work = asyncio.ensure_future(asyncio.to_thread(fn, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({work})
        if not work.cancelled():
            work.exception()  # nobody is left who wants to know
        raise
    except OSError as error:
        raise _full(error) from error


def sync(file: int) -> None:
    """Bring a file to the disk, and close it."""
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_folder(folder: Path) -> None:
    """Bring to the disk which files a folder has."""
    sync(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))


def _full(error: OSError) -> Unavailable:
    what = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot be written ({error.strerror})"
    return Unavailable(f"The director's disk {what}.", advice="Tell its admin, and try again.")
