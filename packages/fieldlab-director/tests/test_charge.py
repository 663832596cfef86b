"""Two directors on one database: which of them works on what, and what becomes of it when one is gone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fieldlab_common.lifecycle import DeploymentState as D
from fieldlab_director.connectors.base import Liveness
from fieldlab_director.reconcile import Reconciler
from fieldlab_director.reconcile.charge import CHARGE_SECONDS
from fieldlab_director.store.databases import Database

from .world import Fleet, Run, World, play


@pytest.fixture
def run(postgres: Any, tmp_path: Path) -> Run:
    return partial(play, tmp_path, url=postgres.make())


class Second:
    """Another director on the database of a world, which reaches the same sites by a fleet of its own."""

    def __init__(self, world: World, home: str) -> None:
        self.world, self.home = world, home
        self.fleet = Fleet(world.fleet.sites)

    async def start(self) -> None:
        settings = self.world.settings
        self.store = await Database(path=settings.database, url=settings.database_url).open(clock=self.world.clock)
        fleet: Any = self.fleet
        self.loop = Reconciler(
            self.store,
            fleet,
            self.world.vault,
            "http://e",
            home=self.home,
            monotonic=self.world.clock,
            jitter=lambda: 0.5,
        )
        await self.loop.start()

    async def crash(self) -> None:
        """Go without a word: the database is out of its reach before it could let anything go."""
        await self.store.close()
        await self.loop.stop()

    async def close(self) -> None:
        await self.loop.stop()
        await self.store.close()


@asynccontextmanager
async def second(world: World, home: str = "b") -> AsyncIterator[Second]:
    director = Second(world, home)
    await director.start()
    try:
        yield director
    finally:
        await director.close()


def asked(fleet: Fleet, names: list[str]) -> Callable[..., Any]:
    """Note the infrastructures whose connector a fleet was asked for."""
    real = fleet.connector

    def connector(infrastructure_id: str, name: str, kind: str, options: Any, *, trusted: bool) -> Any:
        names.append(name)
        return real(infrastructure_id, name, kind, options, trusted=trusted)

    return connector


async def end(world: World, row: Any) -> None:
    """The executor reports its end, and is gone."""
    await world.end(row)
    world.fleet.sites["wide"].executors[row.id, row.epoch] = Liveness.DEAD


def test_an_infrastructure_is_the_business_of_one_director(run: Run) -> None:
    async def test(world: World) -> None:
        await world.attach("wide", "w1", "w2", kind="ssh")
        await world.submit("w1")
        await world.did("launch", site="wide")
        async with second(world) as other:
            names: list[str] = []
            other.fleet.connector = asked(other.fleet, names)  # type: ignore[method-assign]
            experiment = await world.submit("w2")
            await world.claim(await world.launched(experiment, "w2"))
            await world.reached(experiment, D.RUNNING)
            assert names == []
        assert world.fleet.sites["wide"].count("launch") == 2

    run(test)


def test_what_a_dead_director_had_is_taken_by_another_and_goes_on(run: Run) -> None:
    async def test(world: World) -> None:
        other = Second(world, "b")
        await world.loop.stop()
        await other.start()
        await world.attach("wide", "w1", kind="ssh")
        experiment = await world.submit("w1")
        row = await world.launched(experiment, "w1")
        await world.claim(row)
        await other.crash()
        await world.start()
        await end(world, row)
        world.pass_time(CHARGE_SECONDS + 1)
        await world.reached(experiment, D.SUCCEEDED)
        await world.did("clean_up", site="wide")

    run(test)


def test_a_director_that_stops_leaves_its_business_to_another_at_once(run: Run) -> None:
    async def test(world: World) -> None:
        await world.attach("wide", "w1", kind="ssh")
        experiment = await world.submit("w1")
        row = await world.launched(experiment, "w1")
        await world.loop.stop()
        await world.claim(row)
        await end(world, row)
        async with second(world):
            await world.reached(experiment, D.SUCCEEDED)
            await world.did("clean_up", site="wide")

    run(test)


def test_what_is_at_home_at_one_director_is_not_touched_by_another(run: Run) -> None:
    async def test(world: World) -> None:
        await world.loop.stop()
        async with second(world) as other:
            names: list[str] = []
            other.fleet.connector = asked(other.fleet, names)  # type: ignore[method-assign]
            await world.attach("wide", "w1", kind="ssh")
            experiment = await world.submit("n1")
            await world.launched(await world.submit("w1"), "w1")
            assert set(names) == {"wide"}
            assert world.site.count("launch") == 0
        await world.start()
        await world.launched(experiment)

    run(test)


def test_a_director_that_comes_back_does_not_wait_for_its_former_life(run: Run) -> None:
    async def test(world: World) -> None:
        await world.loop.stop()
        director = Second(world, "b")
        await director.start()
        await world.attach("wide", "w1", kind="ssh")
        experiment = await world.submit("w1")
        row = await world.launched(experiment, "w1")
        await director.crash()
        await world.claim(row)
        await end(world, row)
        async with second(world, "b"):
            await world.reached(experiment, D.SUCCEEDED)
            await world.did("clean_up", site="wide")

    run(test)
