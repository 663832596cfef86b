"""Deleted experiments: gone at once for their owner, and from the database when nothing is left on a node."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from fieldlab_common.lifecycle import DeploymentState as D
from fieldlab_director.services import experiments, removal
from fieldlab_director.store import schema
from fieldlab_director.store.rows import ExperimentRow

from .world import Run, World, failing, play


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return partial(play, tmp_path)


async def delete(world: World, experiment: ExperimentRow, *, force: bool = False) -> None:
    await world.store.write(lambda tx: removal.delete(tx, world.user, experiment.id, force=force))


async def left(world: World) -> dict[str, int]:
    """How many rows there are of each kind of what an experiment has."""
    tables = (t for t in schema.metadata.sorted_tables if "experiment_id" in t.c and t is not schema.idempotency)
    counts = [(t.name, sa.select(sa.func.count()).select_from(t)) for t in (schema.experiments, *tables)]
    return await world.store.read(lambda tx: {name: tx.value(count) for name, count in counts if tx.value(count)})


async def empty(world: World) -> bool:
    return await left(world) == {}


def test_all_rows_go_when_it_is_deleted_and_its_nodes_are_clean(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "MOST", 2)  # it takes several transactions

    async def test(world: World) -> None:
        experiment, row = await world.running("n1", "n2")
        for name in ("n1", "n2"):
            row = await world.row(experiment, name)
            await world.end(row)
            world.die(row)
        await world.reached(experiment, D.SUCCEEDED, D.SUCCEEDED)
        await delete(world, experiment)
        await world.until(lambda: empty(world))
        assert world.site.folders == set()

    run(test)


def test_others_stay_as_they_are(run: Run) -> None:
    async def test(world: World) -> None:
        kept = await world.submit("n2", start=False)
        await world.reached(kept, D.READY)
        before = await left(world)
        gone = await world.submit("n1", start=False)
        await world.reached(gone, D.READY)
        await delete(world, gone, force=True)

        async def same() -> bool:
            return await left(world) == before

        await world.until(same)
        told = await world.store.read(lambda tx: experiments.experiment(tx, world.user, kept.id))
        assert told.name == kept.name

    run(test)


def test_what_runs_is_stopped_and_its_node_is_free_only_when_it_is_clean(run: Run) -> None:
    async def test(world: World) -> None:
        world.site.act = failing("clean_up", 1)
        experiment, row = await world.running("n1")
        following = await world.submit("n1")
        await delete(world, experiment, force=True)
        world.pass_time(20)
        await world.did("clean_up", 1)
        assert (await left(world))["experiments"] == 2
        await world.reached(following, D.PENDING)
        world.pass_time(3600)
        await world.launched(following)

        async def gone() -> bool:
            return (await left(world))["experiments"] == 1

        await world.until(gone)
        assert row.id not in world.site.folders

    run(test)


def test_the_key_of_a_request_is_forgotten_when_its_time_is_over(run: Run) -> None:
    async def test(world: World) -> None:
        request = world.request("n1")

        async def submit() -> str:
            return (
                await world.store.write(
                    lambda tx: experiments.submit(tx, world.user, request, key="k", digest="d" * 64)
                )
            ).name

        assert [await submit(), await submit()] == ["exp", "exp"]
        world.clock.now += experiments.KEY_SECONDS
        assert await submit() == "exp#2"

    run(test)
