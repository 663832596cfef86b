"""Hashes the files that steps produced, in a thread: a large one must not hold up the supervisor's loop.

The thread is started with the first file, and ends with the last. A file that is not there, or no regular file, is
given back with a reason instead of a digest.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fieldlab_executor.instructions import Key
from fieldlab_executor.loop import Loop

__all__ = ["Hashed", "Hasher"]

_BLOCK = 1 << 20


@dataclass(eq=False)
class Hashed:
    """A declared file of an attempt's; ``digest`` None: it is lost, for ``problem``."""

    key: Key
    name: str
    path: str
    digest: str | None = None
    size: int = 0
    problem: str = ""


class Hasher:
    """Calls ``done`` in the loop's thread with each file, in order."""

    def __init__(self, loop: Loop, done: Callable[[Hashed], None]) -> None:
        self._loop = loop
        self._done = done
        self._waiting: deque[Hashed] = deque()
        self._lock = threading.Lock()
        self._running = False
        self.busy = 0  # files that were not given back yet

    def add(self, file: Hashed) -> None:
        """Hash one more."""
        self.busy += 1
        with self._lock:
            self._waiting.append(file)
            if self._running:
                return
            self._running = True
        threading.Thread(target=self._run, name="hash", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running = False
                    return
                file = self._waiting.popleft()
            _hash(file)
            self._loop.call(lambda file=file: self._give_back(file))  # type: ignore[misc]

    def _give_back(self, file: Hashed) -> None:
        self.busy -= 1
        self._done(file)


def _hash(file: Hashed) -> None:
    total = hashlib.sha256()
    try:
        # Not blocking: a pipe that a step made would be waited for until somebody writes to it.
        with open(os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as source:
            if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                file.problem = "It is not a regular file."
                return
            while block := source.read(_BLOCK):
                total.update(block)
                file.size += len(block)
    except FileNotFoundError:
        file.problem = "The step did not write it."
    except OSError as error:
        file.problem = f"It could not be read: {error.strerror}."
    else:
        file.digest = total.hexdigest()
