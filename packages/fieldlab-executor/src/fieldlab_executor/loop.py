"""The supervisor's one loop: descriptors, timers, and calls from other threads. It sleeps until one of them has news.

No polling: with nothing to do the process does not wake up. What other threads have to say they say with ``call``,
which wakes the loop; everything else here belongs to the loop's own thread.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import selectors
import time
from collections import deque
from collections.abc import Callable

__all__ = ["Loop", "Timer"]

Callback = Callable[[], None]


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
        self._selector = selectors.DefaultSelector()
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
        """Call ``ready`` whenever ``fd`` can be read."""
        self._selector.register(fd, selectors.EVENT_READ, (ready, None))

    def watch_room(self, fd: int, room: Callback | None) -> None:
        """Call ``room`` too whenever the watched ``fd`` can be written; None: no more."""
        ready = self._selector.get_key(fd).data[0]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if room else 0)
        self._selector.modify(fd, events, (ready, room))

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``; before it is closed."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def watches(self, fd: int) -> bool:
        """Whether ``fd`` is watched."""
        return fd in self._selector.get_map()

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
            for key, mask in self._selector.select(self._patience()):
                ready, room = key.data
                # What an earlier callback of this round has closed must not be called any more.
                if mask & selectors.EVENT_READ and self._watched(key):
                    ready()
                if mask & selectors.EVENT_WRITE and room is not None and self._watched(key):
                    room()
            self._fire()

    def _watched(self, key: selectors.SelectorKey) -> bool:
        now = self._selector.get_map().get(key.fd)
        return now is not None and now.data[0] is key.data[0]

    def close(self) -> None:
        """Give the descriptors back."""
        self._selector.close()
        os.close(self._wake)
        os.close(self._waker)

    def _patience(self) -> float | None:
        while self._timers and self._timers[0][2].then is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

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
