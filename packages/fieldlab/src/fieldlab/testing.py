"""A director for tests: in memory, with no server, no port and no director installed. ``client()`` is the real client.

::

    from fieldlab.testing import FakeDirector

    with FakeDirector(nodes=["pi-1", "pi-2"], stand_ins={"probe": {"loss": 0.1}}) as director:
        run = director.client().submit(experiment)
        run.wait()

It answers the rows of ``protocol.ENDPOINTS`` as a real one does; ``tests/contract`` holds the two to the same. What is
submitted is either played (``stand_ins`` is given: no task runs, no process is started, time is virtual and passes
only while somebody waits), or runs here, each node played by a real executor on this machine, as ``fl.run`` has it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fieldlab_common import errors as e
from fieldlab_common.node import Node

from fieldlab.client import Client
from fieldlab.fake import Desk, FakeTransport
from fieldlab.played import InTurn, StandIn, StandIns
from fieldlab.ship import PYTHON, Order
from fieldlab.source import Readable
from fieldlab.world import PlayedRun, World

__all__ = ["FakeDirector", "InTurn", "StandIn"]

ENDPOINT = "http://fake.director"
TOKEN = "fake-token"

Nodes = int | Sequence[str | Mapping[str, Any] | Node]


class FakeDirector:
    """A director in memory. ``nodes``: how many, or their names, or names and properties, or nodes.

    ``stand_ins``: what stands in for running a step, by ``(deployment, step)``, by the step's name, by its task's name,
    or ``"*"``: a value that it returns; a function, called with the step's arguments (without the context); an
    exception that it raises; a ``StandIn`` with more; or ``InTurn(...)`` of those, for one attempt or iteration after
    the other. A step for which there is none returns None at once. Time is then virtual: what takes none happens at
    once; what takes some happens while somebody waits (``run.wait()``, ``run.logs(follow=True)``, ``advance``), which
    takes none of the test's.

    Without ``stand_ins`` the tasks run, here, as with ``fl.run``.
    """

    def __init__(self, nodes: Nodes = 2, *, stand_ins: StandIns | None = None) -> None:
        self._stand_ins = None if stand_ins is None else dict(stand_ins)
        self._world = World(time.time())
        self._folder = tempfile.TemporaryDirectory(prefix="fieldlab-fake-")
        self._runs: list[Readable] = []
        self._desk = Desk(self._begin, self._clock, _made(nodes), TOKEN)

    def client(self, *, token: str = TOKEN, timeout: float = 30.0) -> Client:
        """A real client of it. Another ``token`` than its own is refused."""
        transport = FakeTransport(self._desk)
        if self._stand_ins is None:
            return Client(ENDPOINT, token, timeout=timeout, transport=transport)
        return Client(ENDPOINT, token, timeout=timeout, transport=transport, clock=self.elapsed, sleep=self.advance)

    def fail(self, endpoint: str, error: e.FieldlabError, *, times: int = 1) -> None:
        """Have the next ``times`` requests to an endpoint (a name of ``protocol.ENDPOINTS``) answered with ``error``.

        DirectorUnreachable, DirectorTimeout and BadAnswer are errors of the line to it, and raised as such.
        """
        self._desk.fail(endpoint, error, times)

    def lose_answer(self, endpoint: str, *, times: int = 1) -> None:
        """Have the next ``times`` requests to an endpoint carried out, and their answers lost on the way back."""
        self._desk.lose(endpoint, times)

    @property
    def asked(self) -> tuple[str, ...]:
        """The endpoints that were asked so far, in order."""
        return tuple(self._desk.asked)

    def elapsed(self) -> float:
        """Virtual seconds that have passed since it was made; without stand-ins, real ones of a clock of the system."""
        return time.monotonic() if self._stand_ins is None else self._world.time.now

    def advance(self, seconds: float) -> None:
        """Let virtual time pass.

        Raises:
            UnsupportedError: there are no stand-ins, so time is real.
        """
        if self._stand_ins is None:
            raise e.UnsupportedError("Time is real here, because tasks run.", advice="Give stand_ins={} to play them.")
        with self._world.lock:
            self._world.hold(seconds, lambda: False)

    def close(self) -> None:
        """End what runs, and forget everything."""
        for run in self._runs:
            run.close()
        self._folder.cleanup()

    def __enter__(self) -> FakeDirector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _clock(self) -> float:
        return time.time() if self._stand_ins is None else self._world.clock()

    def _begin(self, order: Order, name: str, run_id: str, start: bool, secrets: Mapping[str, str]) -> Readable:
        about = {"name": name, "run_id": run_id, "start": start}
        run: Readable
        if self._stand_ins is None:
            from fieldlab.local import LocalSource

            run = local = LocalSource(order, None, secrets, **about)
            local.launch()
        else:
            folder = Path(self._folder.name) / run_id
            run = PlayedRun(self._world, folder, order, self._stand_ins, secrets, **about)
        self._runs.append(run)
        return run


def _made(nodes: Nodes) -> list[Node]:
    """The nodes, with this machine's Python: that is what tasks run on here."""
    wanted = [f"node-{n}" for n in range(1, nodes + 1)] if isinstance(nodes, int) else nodes
    return [one if isinstance(one, Node) else Node.dummy(python=(PYTHON,), **_properties(one)) for one in wanted]


def _properties(node: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"name": node} if isinstance(node, str) else dict(node)
