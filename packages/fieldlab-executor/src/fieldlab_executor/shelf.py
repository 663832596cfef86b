"""The shelf of virtual environments: each made once, found by its key, held while it is used, removed when it is old.

On disk a key has ``<key>.json`` (which folder is the finished one, its size, for what it was made), ``<key>.lock`` and
the folders ``<key>-<random>``. A folder counts only once the record names it, and the record is written last and at
once: what a builder that died left behind is never used, and a builder that still writes somewhere hurts nobody.

Locks are flock(2) on the lock file: shared by whoever uses the environment, exclusive for who makes or removes it. So
an environment is built once however many want it (the others wait, and then find it), and one in use is never removed.
The time of the lock file is that of the last use.

Removal (``evict``): what was not used for ``age``, then the least recently used until all together take up no more than
``size``; the latter spares what was used within the last day: it was prepared for something that has not begun.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fieldlab_common.environment import parse_duration, parse_size

__all__ = ["Bounds", "Held", "Shelf", "Unavailable"]

SPARED = 24 * 3600.0  # seconds since the last use in which no lack of room removes an environment


class Unavailable(TimeoutError):
    """Another process makes the environment, and has not done it in time."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How long an unused environment is kept, in seconds, and how much room all may take, in bytes."""

    age: float = 30 * 86400.0
    size: int = 10 << 30

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Bounds:
        """As ``FIELDLAB_CACHE_AGE`` (``30d``) and ``FIELDLAB_CACHE_SIZE`` (``10 GiB``) say.

        Raises:
            DefinitionError: one of them is no duration or size.
        """
        age, size = environ.get("FIELDLAB_CACHE_AGE"), environ.get("FIELDLAB_CACHE_SIZE")
        return cls(age=parse_duration(age) if age else cls.age, size=parse_size(size) if size else cls.size)


class Held:
    """An environment that cannot be removed until ``close``; ``folder`` is its own."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock = lock

    def close(self) -> None:
        """Let go of it; now counts as its last use."""
        if self._lock >= 0:
            os.utime(self._lock)
            os.close(self._lock)
            self._lock = -1


@dataclass(frozen=True)
class _Entry:
    key: str
    size: int
    used: float


class Shelf:
    """The environments in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, key: str) -> Held | None:
        """The environment, held, if it is there and nobody is about to remove it."""
        if not self._record(key):
            return None
        lock = _locked(self._lock(key), fcntl.LOCK_SH, 0.0)
        if lock is None:
            return None
        folder = self._finished(key)
        if folder is None:
            os.close(lock)
            return None
        os.utime(lock)
        return Held(folder, lock)

    def make(
        self, key: str, build: Callable[[Path], None], what: Sequence[str], *, seconds: float, waits: Callable[[], None]
    ) -> Held:
        """The environment, held; made by ``build`` in the folder that it is given if it is not there.

        ``what`` it was made for goes into its record, for people. ``waits`` is called when another process has it.

        Raises:
            Unavailable: another process was not done with it within ``seconds``.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        deadline = time.monotonic() + seconds
        while (held := self.find(key)) is None:
            lock = _locked(self._lock(key), fcntl.LOCK_EX, 0.0)
            if lock is None:
                waits()
                lock = _locked(self._lock(key), fcntl.LOCK_EX, deadline - time.monotonic())
            if lock is None:
                raise Unavailable(f"another process was not done with it within {seconds:.0f} s")
            try:
                if self._finished(key) is None:
                    self._build(key, build, what)
            finally:
                os.close(lock)
        return held

    def evict(self, bounds: Bounds, now: float) -> list[str]:
        """Remove what is old, what there is no room for, and what dead builders left; the keys that were removed."""
        entries = sorted(self._entries(), key=lambda entry: entry.used)
        total = sum(entry.size for entry in entries)
        removed = []
        for entry in entries:
            unused = now - entry.used
            wanted = unused > bounds.age or (total > bounds.size and unused > SPARED)
            if wanted and self._remove(entry.key):
                removed.append(entry.key)
                total -= entry.size
        self._clear({entry.key for entry in entries})
        return removed

    # --- inside

    def _lock(self, key: str) -> Path:
        return self._folder / f"{key}.lock"

    def _record(self, key: str) -> dict[str, Any]:
        try:
            found = json.loads((self._folder / f"{key}.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _finished(self, key: str) -> Path | None:
        """Its folder, if it is whole: made to the end, and the interpreter that it is of is still there."""
        name = str(self._record(key).get("folder", ""))
        folder = self._folder / name
        return folder if name and os.access(folder / "bin" / "python", os.X_OK) else None

    def _build(self, key: str, build: Callable[[Path], None], what: Sequence[str]) -> None:
        for left in self._folder.glob(f"{key}-*"):
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{key}-", dir=self._folder))
        try:
            build(folder)
            record = {"folder": folder.name, "size": _size(folder), "for": list(what)}
            part = folder / ".record"
            part.write_text(json.dumps(record))
            part.replace(self._folder / f"{key}.json")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _entries(self) -> Iterator[_Entry]:
        for path in self._folder.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                size = int(self._record(path.stem).get("size", 0))
                yield _Entry(path.stem, size, self._lock(path.stem).stat().st_mtime)

    def _remove(self, key: str) -> bool:
        """Whether it could be: nobody holds it."""
        lock = _locked(self._lock(key), fcntl.LOCK_EX, 0.0)
        if lock is None:
            return False
        try:
            (self._folder / f"{key}.json").unlink(missing_ok=True)
            for folder in self._folder.glob(f"{key}-*"):
                shutil.rmtree(folder, ignore_errors=True)
            self._lock(key).unlink(missing_ok=True)  # who waits for it sees that it is another file now
        finally:
            os.close(lock)
        return True

    def _clear(self, known: set[str]) -> None:
        """Remove what has no record, and nobody at work on it."""
        for path in self._folder.glob("*.lock"):
            if path.stem not in known:
                self._remove(path.stem)


def _locked(path: Path, operation: int, seconds: float) -> int | None:
    """A descriptor with the lock; None if it cannot be had within ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _acquire(fd, operation, deadline - time.monotonic()):
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(fd).st_ino == path.stat().st_ino:
                return fd
        os.close(fd)  # who had it has removed the file


def _acquire(fd: int, operation: int, seconds: float) -> bool:
    """Lock ``fd``; close it if that takes longer. flock(2) has no deadline: a thread waits in it."""
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        if seconds <= 0:
            os.close(fd)
            return False
    done, settling = threading.Event(), threading.Lock()
    given_up = False

    def wait() -> None:
        fcntl.flock(fd, operation)
        with settling:
            if given_up:
                os.close(fd)
            else:
                done.set()

    threading.Thread(target=wait, name="lock", daemon=True).start()
    done.wait(seconds)
    with settling:
        given_up = not done.is_set()
    return not given_up


def _size(folder: Path) -> int:
    """The room that a folder takes on disk, in bytes."""
    return sum(
        os.lstat(os.path.join(root, name)).st_blocks * 512 for root, _, names in os.walk(folder) for name in names
    )
