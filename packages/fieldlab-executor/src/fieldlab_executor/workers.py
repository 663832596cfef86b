"""Warm workers for ``isolation="shared"``: children that do one job after another instead of ending with the first.

A worker is a child like any other until it is given a shared job (``child``); when it has answered, and has nothing
left behind, it waits for the next. Who breaks that rule (a thread, a process, a signal that was sent to it) ends with
its job, and another takes its place: so a job can be killed with its worker and take no other job with it.

What always holds: no more workers than ``most``, and one more for each job that only waits for an event or a barrier;
no more than ``most`` idle ones; a worker that died is never given a job that it could not begin.
"""

from __future__ import annotations

from collections import deque

from fieldlab_executor.pool import Pool, Taker, Takers, Warm

__all__ = ["Workers"]


class Workers:
    """The workers of one spawner. ``most``: how many work at a time."""

    def __init__(self, pool: Pool, most: int) -> None:
        self._pool = pool
        self._most = most
        self._waiting = 0  # jobs that only wait
        self._asked = 0  # children that were asked for and have not come
        self._pids: set[int] = set()  # of the workers that are alive
        self._idle: deque[Warm] = deque()
        self.takers = Takers()

    def take(self, taker: Taker) -> None:
        """Give ``taker`` a worker, now or as soon as one is free."""
        while self._idle and not self.takers:
            child = self._idle.pop()  # the one that is warmest
            if child.sock not in child.news():  # it is alive and silent, as one that waits for a job is
                taker(child)
                return
            self._dismiss(child)
        self.takers.append(taker)
        self._ask()

    def give_back(self, child: Warm) -> None:
        """A worker has done its job, and waits for the next."""
        self._serve(child)

    def wait(self, more: int) -> None:
        """So many jobs more (or less) only wait: others may work meanwhile."""
        self._waiting += more
        self._ask()

    def ended(self, pid: int) -> None:
        """The process ``pid`` has ended; it need not have been a worker."""
        if pid not in self._pids:
            return
        self._pids.discard(pid)
        for child in [one for one in self._idle if one.pid == pid]:
            self._idle.remove(child)
            child.close()
        self._ask()

    def lost(self) -> None:
        """The spawner died, and every worker with it; those that were asked for come from its successor."""
        self._pids.clear()
        self.close()
        self._ask()

    def close(self) -> None:
        """Let the idle workers go."""
        while self._idle:
            self._idle.popleft().close()

    def _ask(self) -> None:
        while self._asked < len(self.takers) and len(self._pids) + self._asked < self._most + self._waiting:
            self._asked += 1
            self._pool.take(self._arrived)

    def _arrived(self, child: Warm) -> None:
        self._asked -= 1
        self._pids.add(child.pid)
        self._serve(child)

    def _serve(self, child: Warm) -> None:
        if self.takers:
            self.takers.popleft()(child)
        elif len(self._idle) < self._most:
            self._idle.append(child)
        else:
            self._dismiss(child)

    def _dismiss(self, child: Warm) -> None:
        """Let a worker go: it sees the end of its socket and leaves."""
        self._pids.discard(child.pid)
        child.close()
