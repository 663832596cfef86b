"""Taking back what was asked and is not answered: for when something is measured, and nothing may cross the line.

The sender gives a ``Recall`` with its request, the transport arms it with what ends that request on its kind of line,
and whoever wants quiet calls ``now``. Whatever way the three meet, a request that was taken back does not go out later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Recall", "Recalled"]


class Recalled(Exception):
    """The request was taken back; no answer to it will come."""


class Recall:
    """Takes requests back that wait for their answers, so that nothing more of them crosses the line."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._backs: dict[object, Callable[[], None]] = {}
        self.done = False

    def now(self) -> None:
        """Take them back, and let no other begin; from any thread. What has its answer is not touched."""
        with self._lock:
            self.done = True
            backs, self._backs = self._backs, {}
            for back in backs.values():
                back()

    def arm(self, request: object, back: Callable[[], None]) -> None:
        """Of a transport: ``request`` is about to go out, and ``back`` takes it back.

        Raises:
            Recalled: it was taken back already.
        """
        with self._lock:
            if self.done:
                raise Recalled
            self._backs[request] = back

    def disarm(self, request: object) -> None:
        """Of a transport: there is nothing to take back any more."""
        with self._lock:
            self._backs.pop(request, None)
