"""All nodes of a run begin together: who is waited for, when the order comes, and what it says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from fieldlab_common.events import START, Event
from fieldlab_common.lifecycle import DeploymentState as D
from fieldlab_common.lifecycle import ExperimentState as E
from fieldlab_common.protocol import Claim, ClaimRequest
from fieldlab_director.services import journals
from fieldlab_director.services.identity import ExecutorCaller
from fieldlab_director.store import queries
from fieldlab_director.store.rows import DeploymentRow, ExperimentRow

from .world import Run, World, failing, play


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return partial(play, tmp_path)


async def claim(world: World, row: DeploymentRow) -> Claim:
    caller = ExecutorCaller(deployment_id=row.id, epoch=row.epoch)
    request = ClaimRequest(journal_id=f"j{row.epoch}", epoch=row.epoch)
    return await world.store.write(lambda tx: journals.claim(tx, caller, world.vault, journals.Members(), request))


async def order(world: World, experiment: ExperimentRow) -> float | None:
    events = await world.store.read(
        lambda tx: tx.all(queries.EVENTS, Event, experiment_id=experiment.id, after=0, limit=1000)
    )
    times = [event.data["at"] for event in events if event.name == START]
    assert len(times) <= 1
    return times[0] if times else None


async def ready(world: World, row: DeploymentRow, bound: float = 0.0) -> None:
    await world.report(row, 1, "ready", {"bound": bound})


async def launched(world: World, *names: str, **settings: object) -> tuple[ExperimentRow, list[DeploymentRow]]:
    experiment = await world.submit(*names, **settings)
    return experiment, [await world.launched(experiment, name) for name in names]


def test_the_order_comes_when_the_last_executor_could_begin_with_time_for_the_slowest_line(run: Run) -> None:
    async def test(world: World) -> None:
        experiment, rows = await launched(world, "n1", "n2")
        for row in rows:
            assert (await claim(world, row)).start_at is None
        await ready(world, rows[0], bound=0.2)
        assert await order(world, experiment) is None
        assert (await world.experiment(experiment.id)).started is None
        await ready(world, rows[1], bound=0.1)
        assert await order(world, experiment) == pytest.approx(world.clock.now + 0.85)
        assert (await world.experiment(experiment.id)).started == await order(world, experiment)

    run(test)


def test_an_executor_that_is_alone_is_told_with_its_claim(run: Run) -> None:
    async def test(world: World) -> None:
        _, (row,) = await launched(world, "n1")
        assert (await claim(world, row)).start_at == world.clock.now

    run(test)


def test_a_time_that_was_asked_for_is_kept_and_executors_are_there_before_it(run: Run) -> None:
    async def test(world: World) -> None:
        at = world.clock.now + 600
        experiment = await world.submit("n1", "n2", start_at=at)
        await world.reached(experiment, D.READY, D.READY)
        world.pass_time(570)
        for name in ("n1", "n2"):
            row = await world.launched(experiment, name)
            await claim(world, row)
            await ready(world, row)
        assert await order(world, experiment) == at

    run(test)


def test_one_that_claims_after_the_order_is_told_with_its_claim(run: Run) -> None:
    async def test(world: World) -> None:
        experiment, rows = await launched(world, "n1", "n2", min_nodes=1)
        await claim(world, rows[0])
        await ready(world, rows[0])
        await claim(world, rows[1])
        world.pass_time(45)  # the second falls silent while it fetches what it takes
        await world.reached(experiment, D.UNREACHABLE, D.UNREACHABLE)
        told = await order(world, experiment)
        assert told is not None
        assert (await claim(world, await world.row(experiment, "n2"))).start_at == told

    run(test)


def test_who_cannot_be_reached_is_waited_for_if_all_are_needed(run: Run) -> None:
    async def test(world: World) -> None:
        experiment, rows = await launched(world, "n1", "n2")
        for row in rows:
            await claim(world, row)
        await ready(world, rows[0])
        world.pass_time(45)
        await world.reached(experiment, D.UNREACHABLE, D.UNREACHABLE)
        assert await order(world, experiment) is None
        await ready(world, rows[1])
        assert await order(world, experiment) is not None

    run(test)


def test_a_launch_that_failed_before_all_began_ends_those_that_need_it(run: Run) -> None:
    async def test(world: World) -> None:
        world.site.act = failing("launch", transient=False, node="n2")
        experiment = await world.submit("n1", "n2")
        await world.reached(experiment, D.CANCELLED, D.FAILED)
        assert await order(world, experiment) is None
        ended = await world.experiment(experiment.id)
        assert ended.state is E.FAILED
        assert "could not be launched" in ended.message

    run(test)


def test_one_that_was_cancelled_is_not_waited_for(run: Run) -> None:
    async def test(world: World) -> None:
        experiment, rows = await launched(world, "n1", "n2")
        await claim(world, rows[0])
        await ready(world, rows[0])
        await claim(world, rows[1])
        await world.report(rows[1], 1, "ended", {"state": "cancelled", "reason": "cancelled"})
        assert await order(world, experiment) is not None

    run(test)


def test_an_executor_that_knows_of_no_order_and_began_is_not_waited_for(run: Run) -> None:
    async def test(world: World) -> None:
        experiment, rows = await launched(world, "n1", "n2")
        for row in rows:
            await claim(world, row)
        await ready(world, rows[0])
        await world.report(rows[1], 1, "started", {})
        assert await order(world, experiment) is not None

    run(test)
