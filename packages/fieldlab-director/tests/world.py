"""A director's store and loop, with infrastructure that the tests play, and a clock that they turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from fieldlab_common.accounts import Role
from fieldlab_common.environment import Host
from fieldlab_common.errors import ConnectorError
from fieldlab_common.lifecycle import DeploymentState as D
from fieldlab_common.lifecycle import Reason
from fieldlab_common.node import Node
from fieldlab_common.protocol import (
    AttachInfrastructure,
    CancelRequest,
    ClaimRequest,
    DeploymentSpec,
    Ended,
    ExperimentSettings,
    Lane,
    Record,
    SubmitExperiment,
    Tagged,
)
from fieldlab_common.wire import dumps, encode, frame
from fieldlab_director.app import open_store
from fieldlab_director.connectors import base as b
from fieldlab_director.reconcile import Reconciler
from fieldlab_director.services import accounts, blobs, experiments, identity, infrastructures, journals
from fieldlab_director.services.identity import ExecutorCaller, UserCaller
from fieldlab_director.services.intake import read_upload
from fieldlab_director.settings import Settings
from fieldlab_director.store import queries, schema
from fieldlab_director.store.base import WORK
from fieldlab_director.store.databases import Database
from fieldlab_director.store.rows import DeploymentRow, ExperimentRow

GRAPH = "ab" * 32
WITHIN = 20.0


@dataclass
class Clock:
    """Time that passes when a test says so."""

    now: float = 1_000_000.0
    jumped: float = 0.0

    def __call__(self) -> float:
        return self.now

    def steady(self) -> float:
        """The clock that nobody sets."""
        return self.now - self.jumped


Act = Callable[[str, Any], Awaitable[None]]


@dataclass
class Site:
    """An infrastructure and what is on its nodes: it stays when a director dies."""

    nodes: list[str]
    act: Act | None = None  # what happens before a job is done, by default nothing
    jobs: list[tuple[str, str, int]] = field(default_factory=list)
    executors: dict[tuple[str, int], b.Liveness] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    offline: str = ""
    queue: str = ""  # what those wait for that wait

    def count(self, job: str) -> int:
        return sum(1 for name, _, _ in self.jobs if name == job)

    async def observe_every(self) -> float:
        return 3600.0  # a test that wants a look gives notice

    async def call(self, method: str, request: Any) -> Any:
        if self.offline:
            raise ConnectorError(self.offline)
        if method == "nodes":
            return b.Listed(nodes=tuple(Node(name=name) for name in self.nodes))
        if method == "observe":
            return b.Observations(observations=tuple(map(self._look, request.targets)))
        target: b.Target = request if isinstance(request, b.Target) else request.target
        self.jobs.append((method, target.deployment, target.epoch))
        if self.act is not None:
            await self.act(method, request)
        return getattr(self, f"_{method}")(target)

    def _look(self, target: b.Target) -> b.Observation:
        executor = self.executors.get((target.deployment, target.epoch), b.Liveness.ABSENT)
        return b.Observation(deployment=target.deployment, executor=executor, tail="boom", message=self.queue)

    def _prepare(self, target: b.Target) -> b.Prepared:
        self.folders.add(target.deployment)
        return b.Prepared(prepared={"python": "3"})

    def _launch(self, target: b.Target) -> b.Launched:
        assert target.prepared == {"python": "3"}
        self.executors.setdefault((target.deployment, target.epoch), b.Liveness.ALIVE)
        return b.Launched(handle={"pid": 7})

    def _stop(self, target: b.Target) -> b.Stopped:
        self.executors[target.deployment, target.epoch] = b.Liveness.DEAD
        return b.Stopped(tail="stopped")

    def _drain(self, target: b.Target) -> b.Done:
        return b.Done()

    def _clean_up(self, target: b.Target) -> b.Done:
        self.folders.discard(target.deployment)
        return b.Done()


@dataclass
class Fleet:
    """Sites by the name of their infrastructure."""

    sites: dict[str, Site]
    hear: Callable[[str, str | None], None] = lambda infrastructure_id, deployment_id: None

    def listen(self, hear: Callable[[str, str | None], None]) -> None:
        self.hear = hear

    def connector(
        self, infrastructure_id: str, name: str, kind: str, options: Mapping[str, Any], *, trusted: bool
    ) -> Site:
        assert trusted, "everybody here is an admin"
        return self.sites[name]


class World:
    """A director's store and loop, and somebody who submits."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self.settings = Settings(data=folder, database_url=url)
        self.clock = Clock()
        self.fleet = Fleet({})
        self.user = UserCaller(id="", name="ada", role=Role.ADMIN)

    @property
    def site(self) -> Site:
        return self.fleet.sites["lab"]

    async def open(self) -> None:
        self.vault, store = await open_store(self.settings)
        await store.close()
        self.store = await Database(path=self.settings.database, url=self.settings.database_url).open(clock=self.clock)
        await self.become("ada")
        await self.attach("lab", "n1", "n2", "n3")
        await self.start()

    async def become(self, name: str) -> UserCaller:
        """From now on, another user submits."""
        user = await self.store.write(lambda tx: accounts.add_user(tx, name, role="admin"))
        self.user = UserCaller(id=user.id, name=name, role=Role.ADMIN)
        await self.store.write(lambda tx: blobs.arrived(tx, self.user, GRAPH, 5))
        return self.user

    async def hand_over(self, name: str) -> None:
        """Give an infrastructure to the present user; the runs that use it stay whose they are."""
        table = schema.infrastructures
        change = sa.update(table).where(table.c.name == name).values(owner_id=self.user.id)
        await self.store.write(lambda tx: tx.execute(change))

    async def attach(self, name: str, *nodes: str, kind: str = "local", **more: Any) -> None:
        self.fleet.sites[name] = Site(list(nodes))
        found = [Node(name=node) for node in nodes]
        request = AttachInfrastructure(name=name, spec=Tagged(kind=kind), **more)
        await self.store.write(
            lambda tx: infrastructures.attach(tx, self.user, self.vault, identity.new_id(), request, found)
        )

    async def start(self) -> None:
        fleet: Any = self.fleet
        self.others = asyncio.all_tasks()
        self.loop = Reconciler(
            self.store, fleet, self.vault, "http://d", monotonic=self.clock.steady, jitter=lambda: 0.5
        )
        await self.loop.start()

    async def close(self) -> None:
        await self.loop.stop()
        await self.store.close()

    async def submit(self, *names: str, start: bool = True, **settings: Any) -> ExperimentRow:
        """Submit deployments of these names, each on the node of its name, up to a colon."""
        request = self.request(*names, start=start, **settings)
        info = await self.store.write(lambda tx: experiments.submit(tx, self.user, request))
        return await self.experiment(info.id)

    def request(self, *names: str, start: bool = True, template: str = "", **settings: Any) -> SubmitExperiment:
        common: Any = {"environment": Tagged(kind="host", body=encode(Host())), "graph": GRAPH, "template": template}
        specs = tuple(DeploymentSpec(name=name, node=name.partition(":")[0], **common) for name in names or ("n1",))
        return SubmitExperiment(
            name="exp", deployments=specs, start=start, if_exists="new", settings=ExperimentSettings(**settings)
        )

    async def experiment(self, id: str) -> ExperimentRow:
        row = await self.store.read(lambda tx: tx.one(queries.EXPERIMENT, ExperimentRow, id=id))
        assert row is not None
        return row

    async def rows(self, experiment: ExperimentRow) -> list[DeploymentRow]:
        return await self.store.read(lambda tx: tx.all(queries.DEPLOYMENTS, DeploymentRow, experiment_id=experiment.id))

    async def row(self, experiment: ExperimentRow, name: str = "n1") -> DeploymentRow:
        return next(row for row in await self.rows(experiment) if row.name == name)

    async def until(self, true: Callable[[], Awaitable[object]]) -> None:
        """Wait until something is true of the store or of a site."""
        async with asyncio.timeout(WITHIN):
            with self.store.notifier.watch(WORK) as watch:
                while not await true():
                    await watch.wait(0.02)

    async def reached(self, experiment: ExperimentRow, *states: D) -> list[DeploymentRow]:
        """Wait until the deployments have these states; their rows."""

        async def there() -> bool:
            return [row.state for row in await self.rows(experiment)] == list(states)

        await self.until(there)
        return await self.rows(experiment)

    async def launched(self, experiment: ExperimentRow, name: str = "n1", epoch: int = 1) -> DeploymentRow:
        """Wait until the launch of an epoch was confirmed."""

        async def there() -> bool:
            row = await self.row(experiment, name)
            return row.epoch == epoch and row.handle is not None

        await self.until(there)
        return await self.row(experiment, name)

    async def did(self, job: str, times: int = 1, site: str = "lab") -> None:
        async def there() -> bool:
            return self.fleet.sites[site].count(job) >= times

        await self.until(there)

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.store.notifier.wake([WORK])

    def jump(self, seconds: float) -> None:
        """Somebody sets the director's clock; no time passes."""
        self.clock.jumped += seconds
        self.pass_time(seconds)

    def die(self, row: DeploymentRow, *, tell: bool = True) -> None:
        self.site.executors[row.id, row.epoch] = b.Liveness.DEAD
        if tell:
            self.fleet.hear(row.infrastructure_id, row.id)

    # --- the executor's part -----------------------------------------------------------------------------------------

    async def claim(self, row: DeploymentRow, *, epoch: int | None = None) -> None:
        caller = ExecutorCaller(deployment_id=row.id, epoch=epoch or row.epoch)
        request = ClaimRequest(journal_id=f"j{caller.epoch}", epoch=caller.epoch)
        await self.store.write(lambda tx: journals.claim(tx, caller, self.vault, journals.Members(), request))
        if caller.epoch == row.epoch:
            await self.report(row, 1, "ready", {"bound": 0.01})

    async def end(self, row: DeploymentRow, state: D = D.SUCCEEDED) -> None:
        await self.report(row, 2, "ended", encode(Ended(state=state, reason=Reason.COMPLETED)))

    async def report(self, row: DeploymentRow, number: int, kind: str, body: Any) -> None:
        caller = ExecutorCaller(deployment_id=row.id, epoch=row.epoch)
        upload = read_upload(Lane.CONTROL, frame(number, dumps(Record(kind=kind, at=0, body=body))))
        await self.store.write(lambda tx: journals.report(tx, caller, f"j{row.epoch}", upload, self.settings.limits))

    async def heard(self, row: DeploymentRow) -> None:
        def sign(tx: Any) -> None:
            found = tx.one(queries.DEPLOYMENT, DeploymentRow, id=row.id)
            journals.seen(tx, found)

        await self.store.write(sign)

    async def running(self, *nodes: str, **settings: Any) -> tuple[ExperimentRow, DeploymentRow]:
        """An experiment whose deployments run; the row of the first."""
        names = nodes or ("n1",)
        experiment = await self.submit(*names, **settings)
        for name in names:
            await self.claim(await self.launched(experiment, name))
        await self.reached(experiment, *(D.RUNNING for _ in names))
        return experiment, await self.row(experiment, names[0])

    async def cancel(self, experiment: ExperimentRow) -> None:
        request = CancelRequest(reason="wrong site")
        await self.store.write(lambda tx: experiments.cancel(tx, self.user, experiment.id, request))


@asynccontextmanager
async def opened(folder: Path, url: str | None = None) -> AsyncIterator[World]:
    world = World(folder / "data", url)
    await world.open()
    try:
        yield world
    finally:
        await world.close()


Run = Callable[[Callable[[World], Awaitable[None]]], None]


def play(folder: Path, test: Callable[[World], Awaitable[None]], url: str | None = None) -> None:
    """Run a test in a world of its own; on SQLite, or on the PostgreSQL database at ``url``."""

    async def main() -> None:
        async with opened(folder, url) as world:
            await test(world)

    asyncio.run(main())


def failing(job: str, times: int = 1, *, transient: bool = True, node: str = "") -> Act:
    """Let a job fail so many times."""
    left = [times]

    async def act(method: str, request: Any) -> None:
        target = request if isinstance(request, b.Target) else request.target
        if method == job and left[0] and node in ("", target.node):
            left[0] -= 1
            raise ConnectorError(f"{job} went wrong", transient=transient)

    return act


def hanging(job: str) -> Act:
    async def act(method: str, request: Any) -> None:
        if method == job:
            await asyncio.Event().wait()

    return act
