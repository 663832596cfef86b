"""Virtual time for runs that are played, and such a run as a reader has it. For ``fieldlab.testing``.

A request that waits (a long-poll) is what makes time pass, so a test that waits for a run of 24 hours takes none, and
one that does not wait finds everything where it left it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fieldlab_common import protocol as p
from fieldlab_common.course import NEVER
from fieldlab_common.errors import UnsupportedError
from fieldlab_common.events import Event, Member
from fieldlab_common.lifecycle import DeploymentState

from fieldlab.hub import Hub
from fieldlab.played import Player, Scene, StandIns
from fieldlab.ship import Order
from fieldlab.virtual import VirtualTime

__all__ = ["PlayedRun", "World"]

Page = TypeVar("Page", p.RecordPage, p.EventPage)
MOST_CALLS = 1_000_000  # things that happen while one request waits
OTHERS = 0.2  # real seconds for which a request waits for other threads, when nothing is due in virtual time


class World:
    """Virtual time, and the runs that it passes for; one lock for all of it.

    What takes no time happens at once; what takes time happens while somebody waits.
    """

    def __init__(self, begins: float) -> None:
        self._begins = begins  # when virtual time begins, in seconds since the epoch
        self.time = VirtualTime()
        self.lock = threading.Condition(threading.RLock())
        self.runs: list[PlayedRun] = []
        self._news = False

    def clock(self) -> float:
        """Seconds since the epoch, virtually."""
        return self._begins + self.time.now

    def woken(self) -> None:
        """There may be something that a player has not seen."""
        self._news = True

    def catch_up(self) -> None:
        """Do all that is due by now."""
        self._settle()
        self._pass(self.time.now)

    def hold(self, wait: float, news: Callable[[], bool]) -> None:
        """Let time pass until there is news, or ``wait`` seconds have."""
        self.catch_up()
        until = self.time.now + wait
        while not news():
            due = self.time.next
            if due is None and wait and self.lock.wait(OTHERS):
                self.catch_up()  # another thread did something
            elif due is None or due > until:
                self.time.now = until
                return
            else:
                self._pass(due)

    def _pass(self, until: float) -> None:
        calls = 0
        while self.time.next is not None and self.time.next <= until:
            self.time.run(until, 1)
            self._settle()
            calls += 1
            if calls > MOST_CALLS:
                raise UnsupportedError(
                    f"{MOST_CALLS} things happened, and virtual time did not pass.",
                    advice="Something is repeated without end: give it a stand-in that takes time, StandIn(after=1).",
                )

    def _settle(self) -> None:
        while self._news:
            self._news = False
            for run in self.runs:
                run.look()


class PlayedRun:
    """A run that is played, as ``Run`` and the desk read it (``source.Source``)."""

    def __init__(
        self, world: World, folder: Path, order: Order, stand_ins: StandIns, secrets: Mapping[str, str], **about: Any
    ) -> None:
        self._world, self._order = world, order
        self._hub = Hub(order, folder, woken=world.woken, clock=world.clock, secrets=secrets, **about)
        members = tuple(
            Member(deployment=spec.name, role=spec.role, node=node.name) for spec, node in order.deployments
        )
        scene = Scene(
            hub=self._hub,
            blobs=order.blobs,
            time=world.time,
            clock=world.clock,
            stand_ins=stand_ins,
            secrets=secrets,
            members=members,
        )
        self._players = {spec.name: Player(scene, spec, node) for spec, node in order.deployments}
        self._begun: list[Player] = []
        self._look_at = -1.0
        with world.lock:
            world.runs.append(self)
            for name in self._players:
                self._hub.move(name, DeploymentState.PREPARING, DeploymentState.READY)

    def look(self) -> None:
        """Launch what may start, and have the players see what is new."""
        for name in self._hub.launchable():
            if not self._hub.move(name, DeploymentState.LAUNCHING).terminal:
                self._begun.append(self._players[name])
                self._players[name].begin()
        for player in self._begun:
            player.look()
        start = self._hub.until_start()
        if 0.0 < start < NEVER and self._world.time.now + start > self._look_at:
            self._look_at = self._world.time.now + start
            self._world.time.at(self._look_at, self._world.woken)

    def _after(self, change: Callable[[], Any]) -> Any:
        """Make a change when all that came before it is done; what follows from it is done before anybody asks."""
        with self._world.lock:
            self._world.catch_up()
            try:
                return change()
            finally:
                self._world.woken()
                self._world.lock.notify_all()

    def info(self) -> p.ExperimentInfo:
        """How it stands."""
        with self._world.lock:
            self._world.catch_up()
            return self._hub.info()

    def start(self) -> p.ExperimentInfo:
        """Start it."""
        self._after(self._hub.request_start)
        return self._hub.info()

    def cancel(self, reason: str, deployments: Sequence[str]) -> p.ExperimentInfo:
        """Stop it, or some of it."""
        self._after(lambda: self._hub.cancel(reason, deployments))
        return self._hub.info()

    def records(self, lane: p.Lane, after: int, wait: float, deployment: str = "") -> p.RecordPage:
        """Records after the cursor."""
        return self._held(
            wait, lambda: self._hub.records(lane, after, 0.0, deployment), lambda page: bool(page.records)
        )

    def events(self, after: int, wait: float) -> p.EventPage:
        """Events after the cursor."""
        return self._held(wait, lambda: self._hub.events(after, 0.0), lambda page: bool(page.events))

    def _held(self, wait: float, read: Callable[[], Page], news: Callable[[Page], bool]) -> Page:
        with self._world.lock:
            self._world.hold(wait, lambda: news(page := read()) or page.state.terminal)
            return read()

    def send(self, event: p.SendEvent) -> Event:
        """Send an event into it."""
        sent: Event = self._after(lambda: self._hub.send(event))
        return sent

    def artifacts(self) -> tuple[p.ArtifactInfo, ...]:
        """The artifacts so far."""
        return self._hub.artifacts()

    def blob(self, digest: str, offset: int) -> Iterator[bytes]:
        """The bytes of a blob."""
        return self._hub.blob(digest, offset)

    def close(self) -> None:
        """Nothing is open."""
