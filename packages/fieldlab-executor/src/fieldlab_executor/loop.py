"""The supervisor's one loop: descriptors, timers, and calls from other threads. It sleeps until one of them has news.

No polling: with nothing to do the process does not wake up. What other threads have to say they say with ``call``,
which wakes the loop; everything else here belongs to the loop's own thread.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import os
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Loop", "Timer"]

Callback = Callable[[], None]
_READ, _WRITE = select.POLLIN, select.POLLOUT  # epoll(7) has the same values


_EPOLL = hasattr(select, "epoll")  # Linux; its objects have the methods of select.poll


def _poll() -> Any:
    """What waits for descriptors. Without what ``selectors`` puts around it: an empty step needs it several times."""
    return select.epoll() if hasattr(select, "epoll") else select.poll()


class Timer:
    """A call at a time; ``cancel`` forgets it."""

    __slots__ = ("at", "then")

    def __init__(self, at: float, then: Callback) -> None:
        self.at = at
        self.then: Callback | None = then

    def cancel(self) -> None:
        """Do not call it any more."""
        self.then = None


class Loop:
    """``at`` of timers is in seconds of ``time.monotonic``."""

    def __init__(self) -> None:
        self._poll = _poll()
        self._ready: dict[int, Callback] = {}
        self._room: dict[int, Callback] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._calls: deque[Callback] = deque()
        self._wake, self._waker = os.pipe()
        for fd in (self._wake, self._waker):
            os.set_blocking(fd, False)
        self._stopped = False
        self.watch(self._wake, self._woken)

    @property
    def waker(self) -> int:
        """A descriptor for ``signal.set_wakeup_fd``: a byte written to it wakes the loop."""
        return self._waker

    def watch(self, fd: int, ready: Callback) -> None:
        """Call ``ready`` whenever ``fd`` can be read, until ``unwatch`` or ``forget``."""
        self._ready[fd] = ready
        self._poll.register(fd, _READ)

    def watch_room(self, fd: int, room: Callback | None) -> None:
        """Call ``room`` too whenever the watched ``fd`` can be written; None: no more."""
        if room is None:
            self._room.pop(fd, None)
        else:
            self._room[fd] = room
        self._poll.modify(fd, _READ | _WRITE if room else _READ)

    def unwatch(self, fd: int) -> None:
        """Watch ``fd`` no longer, if it is watched; it stays open."""
        if self._ready.pop(fd, None) is not None:
            self._room.pop(fd, None)
            self._poll.unregister(fd)

    def forget(self, fd: int) -> None:
        """As ``unwatch``, for one that is closed at once, which ends it for the kernel too."""
        if self._ready.pop(fd, None) is not None:
            self._room.pop(fd, None)
            if not _EPOLL:
                self._poll.unregister(fd)

    def watches(self, fd: int) -> bool:
        """Whether ``fd`` is watched."""
        return fd in self._ready

    def at(self, at: float, then: Callback) -> Timer:
        """Call ``then`` at the time ``at``."""
        timer = Timer(at, then)
        heapq.heappush(self._timers, (at, next(self._order), timer))
        return timer

    def after(self, seconds: float, then: Callback) -> Timer:
        """Call ``then`` in so many seconds."""
        return self.at(time.monotonic() + seconds, then)

    def call(self, then: Callback) -> None:
        """Call ``then`` in the loop's thread; from any thread."""
        self._calls.append(then)
        with contextlib.suppress(BlockingIOError, OSError):  # full: it will wake anyway; closed: it has ended
            os.write(self._waker, b"\0")

    def stop(self) -> None:
        """End ``run`` after the present round."""
        self._stopped = True

    def run(self) -> None:
        """Serve until ``stop``."""
        self._stopped = False
        while not self._stopped:
            events = self._poll.poll(self._patience())
            found = [(self._ready.get(fd), self._room.get(fd), fd, mask) for fd, mask in events]
            for ready, room, fd, mask in found:
                # Not what an earlier callback of this round has closed, nor what has got its number since.
                if ready is not None and mask & ~_WRITE and self._ready.get(fd) is ready:
                    ready()
                if room is not None and mask & ~_READ and self._room.get(fd) is room:
                    room()
            self._fire()

    def close(self) -> None:
        """Give the descriptors back."""
        if hasattr(self._poll, "close"):
            self._poll.close()
        os.close(self._wake)
        os.close(self._waker)

    def _patience(self) -> float | None:
        """How long there is nothing to do, in the unit of the poll object: epoll's seconds, or poll's milliseconds."""
        while self._timers and self._timers[0][2].then is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        seconds = max(0.0, self._timers[0][0] - time.monotonic())
        return seconds if _EPOLL else math.ceil(seconds * 1000)

    def _fire(self) -> None:
        while self._timers and (self._timers[0][2].then is None or self._timers[0][0] <= time.monotonic()):
            timer = heapq.heappop(self._timers)[2]
            if timer.then is not None:
                then, timer.then = timer.then, None
                then()

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)
        while self._calls:
            self._calls.popleft()()
