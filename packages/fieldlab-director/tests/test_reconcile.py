"""The loop over a real store, with infrastructure that the tests play, and a clock that they turn."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fieldlab_common.errors import ClaimRefused
from fieldlab_common.lifecycle import DeploymentState as D
from fieldlab_common.lifecycle import ExperimentState as E
from fieldlab_common.lifecycle import Reason
from fieldlab_common.node import Availability, Node
from fieldlab_common.protocol import CancelRequest
from fieldlab_director.connectors import base as b
from fieldlab_director.reconcile import Reconciler, loop
from fieldlab_director.services import experiments, infrastructures
from fieldlab_director.store import queries, schema
from fieldlab_director.store.rows import DeploymentRow, ExperimentRow

from .world import WITHIN, Run, World, failing, hanging, play


@pytest.fixture(params=["sqlite", "postgres"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    url = request.getfixturevalue("postgres").make() if request.param == "postgres" else None
    return partial(play, tmp_path, url=url)


# --- the way through -------------------------------------------------------------------------------------------------


def test_an_experiment_goes_through_to_its_end_and_nothing_is_left(run: Run) -> None:
    async def test(world: World) -> None:
        experiment = await world.submit("n1", "n2")
        for name in ("n1", "n2"):
            row = await world.launched(experiment, name)
            await world.claim(row)
            await world.end(row)
            world.die(row)
        await world.reached(experiment, D.SUCCEEDED, D.SUCCEEDED)
        assert (await world.experiment(experiment.id)).state is E.SUCCEEDED
        await world.did("clean_up", 2)
        jobs = Counter(job for job, _, _ in world.site.jobs)
        assert jobs == {"prepare": 2, "launch": 2, "clean_up": 2}
        assert world.site.folders == set()

    run(test)


def test_executors_dial_the_director_where_their_infrastructure_reaches_it(run: Run) -> None:
    async def test(world: World) -> None:
        told: dict[str, tuple[str, str | None]] = {}

        async def note(method: str, request: Any) -> None:
            if method == "launch":
                told[request.target.node] = (request.launch.director, request.launch.ca)

        await world.attach("far", "f1", director_url="https://far", director_ca="PEM")
        for site in world.fleet.sites.values():
            site.act = note
        for node in ("n1", "f1"):
            await world.launched(await world.submit(node), node)
        assert told == {"n1": ("http://d", None), "f1": ("https://far", "PEM")}

    run(test)


def test_an_epoch_is_on_disk_before_its_launch(run: Run) -> None:
    async def test(world: World) -> None:
        seen: list[tuple[D, int]] = []

        async def act(method: str, request: Any) -> None:
            if method == "launch":
                found = await world.store.read(
                    lambda tx: tx.one(queries.DEPLOYMENT, DeploymentRow, id=request.target.deployment)
                )
                assert found is not None
                seen.append((found.state, found.epoch))
                assert request.launch.epoch == request.target.epoch == found.epoch
                assert request.launch.token.startswith(f"fle_{found.id}.{found.epoch}.")

        world.site.act = act
        await world.launched(await world.submit())
        assert seen == [(D.LAUNCHING, 1)]

    run(test)


def test_a_run_waits_for_its_start_and_for_its_time(run: Run) -> None:
    async def test(world: World) -> None:
        experiment = await world.submit(start=False, start_at=world.clock.now + 600)
        await world.reached(experiment, D.READY)
        await world.store.write(lambda tx: experiments.start(tx, world.user, experiment.id))
        world.pass_time(569)
        await world.until(lambda: world.store.read(lambda tx: True))
        assert (await world.experiment(experiment.id)).state is E.READY
        world.pass_time(1)
        await world.launched(experiment)
        assert (await world.experiment(experiment.id)).state is E.RUNNING

    run(test)


# --- what cannot be prepared or launched -----------------------------------------------------------------------------


def test_what_fails_for_a_passing_reason_is_tried_again_later(run: Run) -> None:
    async def test(world: World) -> None:
        world.site.act = failing("prepare", 2)
        experiment = await world.submit()
        await world.did("prepare", 1)

        async def waiting() -> bool:
            row = await world.row(experiment)
            return row.attempts == 1 and row.lease is None and row.look_at == world.clock.now + 0.75

        await world.until(waiting)
        world.pass_time(0.75)
        await world.did("prepare", 2)
        await world.until(lambda: _attempts(world, experiment, 2))
        world.pass_time(1.5)
        await world.launched(experiment)
        assert (await world.row(experiment)).attempts == 0

    run(test)


async def _attempts(world: World, experiment: ExperimentRow, count: int) -> bool:
    row = await world.row(experiment)
    return row.attempts == count and row.lease is None


def test_without_min_nodes_one_that_cannot_be_prepared_ends_the_experiment(run: Run) -> None:
    async def test(world: World) -> None:
        world.site.act = failing("prepare", transient=False, node="n2")
        experiment = await world.submit("n1", "n2", "n3")
        rows = await world.reached(experiment, D.CANCELLED, D.FAILED, D.CANCELLED)
        assert rows[1].reason is Reason.PREPARE_FAILED
        assert rows[1].message.startswith("prepare went wrong")
        ended = await world.experiment(experiment.id)
        assert ended.state is E.FAILED
        assert "1 of 3 deployments could not be prepared" in ended.message
        assert world.site.count("launch") == 0

    run(test)


def test_with_min_nodes_the_others_run(run: Run) -> None:
    async def test(world: World) -> None:
        world.site.act = failing("prepare", transient=False, node="n2")
        experiment = await world.submit("n1", "n2", "n3", min_nodes=2)
        for name in ("n1", "n3"):
            row = await world.launched(experiment, name)
            await world.claim(row)
            await world.end(row)
        await world.reached(experiment, D.SUCCEEDED, D.FAILED, D.SUCCEEDED)
        assert (await world.experiment(experiment.id)).state is E.FAILED

    run(test)


def test_a_launch_that_fails_is_retried_under_its_epoch(run: Run) -> None:
    async def test(world: World) -> None:
        world.site.act = failing("launch")
        experiment = await world.submit()
        await world.until(lambda: _attempts(world, experiment, 1))
        world.pass_time(10)
        assert (await world.launched(experiment)).epoch == 1
        assert world.site.count("launch") == 2

    run(test)


def test_an_executor_that_never_claims_is_replaced_twice_and_then_the_launch_has_failed(run: Run) -> None:
    async def test(world: World) -> None:
        experiment = await world.submit()
        first = await world.launched(experiment, epoch=1)
        world.die(first)
        second = await world.launched(experiment, epoch=2)
        with pytest.raises(ClaimRefused):
            await world.claim(second, epoch=1)
        world.pass_time(60)
        await world.did("stop", 1)
        world.die(await world.launched(experiment, epoch=3))
        (row,) = await world.reached(experiment, D.FAILED)
        assert row.reason is Reason.LAUNCH_FAILED
        assert "boom" in row.message
        await world.did("clean_up")

    run(test)


def test_who_waits_for_an_engine_says_what_for_and_is_not_late(run: Run) -> None:
    async def test(world: World) -> None:
        experiment = await world.submit()
        row = await world.launched(experiment, epoch=1)

        async def seen(executor: b.Liveness, message: str) -> None:
            world.site.executors[row.id, 1], world.site.queue = executor, message
            world.fleet.hear(row.infrastructure_id, row.id)

            async def told() -> bool:
                return (await world.row(experiment)).message == message

            await world.until(told)

        await seen(b.Liveness.QUEUED, "in the queue: Priority")
        world.pass_time(3600)
        await seen(b.Liveness.QUEUED, "in the queue: Resources")
        world.pass_time(50)
        await world.loop.stop()
        await world.start()
        world.pass_time(50)
        await seen(b.Liveness.QUEUED, "in the queue: Priority")
        await seen(b.Liveness.ALIVE, "")
        assert world.site.count("stop") == 0
        world.pass_time(60)
        await world.did("stop", 1)

    run(test)


# --- executors that die or fall silent -------------------------------------------------------------------------------


def test_a_dead_executor_is_drained_and_its_deployment_has_failed_while_others_go_on(run: Run) -> None:
    async def test(world: World) -> None:
        experiment, row = await world.running("n1", "n2")
        world.die(row)
        rows = await world.reached(experiment, D.FAILED, D.RUNNING)
        assert rows[0].reason is Reason.EXECUTOR_LOST
        assert rows[0].drained
        assert [job for job, deployment, _ in world.site.jobs if deployment == row.id][2:3] == ["drain"]

    run(test)


def test_what_a_drain_brings_can_end_the_deployment_well(run: Run) -> None:
    async def test(world: World) -> None:
        experiment, row = await world.running()

        async def act(method: str, request: Any) -> None:
            if method == "drain":
                await world.end(row)

        world.site.act = act
        world.die(row)
        await world.reached(experiment, D.SUCCEEDED)
        assert (await world.experiment(experiment.id)).state is E.SUCCEEDED

    run(test)


def test_a_drain_that_fails_is_tried_again_and_then_given_up(run: Run) -> None:
    async def test(world: World) -> None:
        world.site.act = failing("drain", 3)
        experiment, row = await world.running()
        world.die(row)
        for attempt in (1, 2):
            await world.until(lambda attempt=attempt: _attempts(world, experiment, attempt))  # type: ignore[misc]
            world.pass_time(60)
        (row,) = await world.reached(experiment, D.FAILED)
        assert "drain went wrong" in row.message
        assert not row.drained
        world.pass_time(3600)
        await world.did("drain", 4)
        await world.did("clean_up")

    run(test)


def test_a_silent_executor_is_unreachable_comes_back_and_is_lost_in_the_end(run: Run) -> None:
    async def test(world: World) -> None:
        experiment, row = await world.running(lost_after=300.0)
        world.pass_time(44)
        await world.heard(row)
        world.pass_time(44)
        await world.reached(experiment, D.RUNNING)
        world.pass_time(1)
        await world.reached(experiment, D.UNREACHABLE)
        await world.heard(row)
        await world.reached(experiment, D.RUNNING)
        world.pass_time(45)
        await world.reached(experiment, D.UNREACHABLE)
        world.pass_time(255)
        (row,) = await world.reached(experiment, D.LOST)
        assert row.reason is Reason.SILENT
        assert (await world.experiment(experiment.id)).state is E.FAILED

    run(test)


def test_silence_counts_only_while_the_director_serves(run: Run) -> None:
    async def test(world: World) -> None:
        experiment, row = await world.running(lost_after=300.0)
        world.pass_time(45)
        await world.reached(experiment, D.UNREACHABLE)
        await world.loop.stop()
        world.pass_time(100_000)
        await world.start()
        world.pass_time(200)
        await world.until(lambda: _looked(world, experiment))
        await world.reached(experiment, D.UNREACHABLE)
        world.pass_time(100)
        await world.reached(experiment, D.LOST)
        assert row.id

    run(test)


DAY = 86_400.0


def test_a_node_that_is_cut_off_for_a_day_is_not_lost_before_its_time_and_goes_on(run: Run) -> None:
    async def test(world: World) -> None:
        experiment, row = await world.running(lost_after=2 * DAY)
        for _ in range(24):
            world.pass_time(3600)
            await world.until(lambda: _looked(world, experiment))
        await world.reached(experiment, D.UNREACHABLE)
        await world.heard(row)
        await world.reached(experiment, D.RUNNING)
        await world.end(row)
        await world.reached(experiment, D.SUCCEEDED)

    run(test)


@pytest.mark.parametrize("jump", [DAY, -DAY], ids=["forwards", "backwards"])
def test_a_clock_that_is_set_by_a_day_makes_nobody_unreachable_and_nobody_stay_unnoticed(run: Run, jump: float) -> None:
    async def test(world: World) -> None:
        experiment, row = await world.running(lost_after=300.0)
        await world.heard(row)
        world.jump(jump)
        for _ in range(4):  # in the new time it is heard of as in the old
            world.pass_time(40)
            await world.heard(row)
            await world.until(lambda: _looked(world, experiment))
            assert (await world.row(experiment)).state is D.RUNNING
        world.pass_time(46)
        await world.reached(experiment, D.UNREACHABLE)
        world.pass_time(300)
        await world.reached(experiment, D.LOST)

    run(test)


async def _looked(world: World, experiment: ExperimentRow) -> bool:
    row = await world.row(experiment)
    return row.look_at > world.clock.now and row.lease is None


# --- cancel ----------------------------------------------------------------------------------------------------------


def test_a_cancel_does_not_wait_for_an_environment_that_is_being_made(run: Run) -> None:
    async def test(world: World) -> None:
        world.site.act = hanging("prepare")
        experiment = await world.submit("n1", "n2")
        await world.did("prepare", 2)
        await world.cancel(experiment)
        (row, _) = await world.reached(experiment, D.CANCELLED, D.CANCELLED)
        assert row.message == "wrong site"
        assert (await world.experiment(experiment.id)).state is E.CANCELLED
        await world.did("clean_up", 2)

    run(test)


def test_an_executor_that_does_not_cancel_is_stopped_drained_and_cancelled(run: Run) -> None:
    async def test(world: World) -> None:
        experiment, _ = await world.running()
        await world.cancel(experiment)
        world.pass_time(19)
        await world.until(lambda: _looked(world, experiment))
        assert world.site.count("stop") == 0
        world.pass_time(1)
        await world.reached(experiment, D.CANCELLED)
        assert [job for job, _, _ in world.site.jobs][2:4] == ["stop", "drain"]
        assert (await world.experiment(experiment.id)).state is E.CANCELLED

    run(test)


def test_a_launch_under_way_is_broken_off_and_what_it_may_have_started_is_stopped(run: Run) -> None:
    async def test(world: World) -> None:
        world.site.act = hanging("launch")
        experiment = await world.submit()
        await world.did("launch")
        await world.cancel(experiment)
        await world.reached(experiment, D.CANCELLED)
        assert [job for job, _, _ in world.site.jobs][:3] == ["prepare", "launch", "stop"]

    run(test)


def test_deployments_that_are_cancelled_one_by_one_let_the_others_run(run: Run) -> None:
    async def test(world: World) -> None:
        world.site.act = hanging("prepare")
        experiment = await world.submit("n1", "n2")
        await world.did("prepare", 2)
        world.site.act = None
        request = CancelRequest(deployments=("n2",))
        await world.store.write(lambda tx: experiments.cancel(tx, world.user, experiment.id, request))
        await world.reached(experiment, D.PREPARING, D.CANCELLED)
        assert (await world.experiment(experiment.id)).state is E.PREPARING

    run(test)


# --- crashes and bad neighbours --------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["prepare", "launch", "drain", "stop", "clean_up"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_director_that_dies_with_a_job_under_way_goes_on_from_what_is_stored(run: Run, job: str, moment: str) -> None:
    """``before``: the node never heard of the job; ``after``: it was done, and the director never learned."""

    async def test(world: World) -> None:
        died = asyncio.Event()

        async def act(method: str, request: Any) -> None:
            if method == job and not died.is_set():
                if moment == "after":
                    getattr(world.site, f"_{method}")(request if isinstance(request, b.Target) else request.target)
                died.set()
                await asyncio.Event().wait()

        async def restart() -> None:
            await died.wait()
            await world.loop.stop()
            await world.start()

        world.site.act = act
        restarting = asyncio.create_task(restart())
        experiment = await world.submit()
        row = await world.launched(experiment)
        await world.claim(row)
        await world.reached(experiment, D.RUNNING)
        if job == "stop":
            await world.cancel(experiment)
            world.pass_time(20)
        else:
            world.die(row)
        expected = D.CANCELLED if job == "stop" else D.FAILED
        await world.reached(experiment, expected)
        async with asyncio.timeout(WITHIN):
            await restarting
        world.die(row)

        async def cleaned() -> bool:
            return (await world.row(experiment)).handle is None

        await world.until(cleaned)
        assert world.site.folders == set()
        assert [key for key in world.site.executors if key[0] == row.id] == [(row.id, 1)]

    run(test)


def test_a_hanging_infrastructure_delays_nobody_else(run: Run) -> None:
    async def test(world: World) -> None:
        await world.attach("other", "o1")
        names = [f"w{number}" for number in range(60)]  # more than it may have under way
        await world.attach("wide", *names)
        world.fleet.sites["wide"].act = hanging("prepare")
        stuck = [await world.submit(*names[at : at + 3]) for at in range(0, 60, 3)]
        experiment = await world.submit("o1")
        await world.claim(await world.launched(experiment, "o1"))
        await world.reached(experiment, D.RUNNING)
        assert {row.state for row in await world.rows(stuck[-1])} == {D.PREPARING}
        await world.cancel(stuck[-1])
        await world.reached(stuck[-1], D.CANCELLED, D.CANCELLED, D.CANCELLED)

    run(test)


def test_a_fault_with_one_deployment_is_survived_and_tried_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        faults = [RuntimeError("a fault in fieldlab")]
        real = Reconciler._launch

        def launch(self: Reconciler, *given: Any) -> Any:
            if faults:
                raise faults.pop()
            return real(self, *given)

        monkeypatch.setattr(Reconciler, "_launch", launch)
        await world.launched(await world.submit())

    run(test)


def test_nodes_are_listed_again_and_go_offline_with_the_reason(run: Run) -> None:
    async def test(world: World) -> None:
        async def nodes() -> list[Node]:
            return list((await world.store.read(lambda tx: infrastructures.nodes(tx, world.user))).nodes)

        async def listed() -> bool:
            return [node.name for node in await nodes()] == ["n1", "n9"]

        await world.loop.stop()
        world.site.nodes = ["n1", "n9"]
        await world.start()
        await world.until(listed)
        await world.loop.stop()
        world.site.offline = "no route to host"
        await world.start()

        async def offline() -> bool:
            return {(node.availability, node.reason) for node in await nodes()} == {
                (Availability.OFFLINE, "no route to host")
            }

        await world.until(offline)
        (info,) = (await world.store.read(lambda tx: infrastructures.infrastructures(tx, world.user))).infrastructures
        assert (info.state, info.message) == ("unavailable", "no route to host")

    run(test)


def test_stopping_ends_every_task(run: Run) -> None:
    async def test(world: World) -> None:
        world.site.act = hanging("prepare")
        await world.submit("n1", "n2")
        await world.did("prepare", 2)
        await world.loop.stop()
        assert asyncio.all_tasks() <= world.others
        await world.start()

    run(test)


# --- many rows -------------------------------------------------------------------------------------------------------


async def crowd(world: World, count: int, **columns: Any) -> ExperimentRow:
    """An experiment of so many deployments, each on a node of its own, put as they are into the store."""
    names = [f"c{number}" for number in range(count)]
    await world.attach(f"crowd-{count}", *names)
    experiment = await world.submit(*names, start=False)
    table = schema.deployments
    change = sa.update(table).where(table.c.experiment_id == experiment.id).values(**columns)
    await world.store.write(lambda tx: tx.execute(change))
    return experiment


def test_thousands_that_run_are_looked_at_in_few_transactions_after_a_restart(run: Run) -> None:
    async def test(world: World) -> None:
        await world.loop.stop()
        await crowd(world, 1200, state=D.RUNNING, look_at=0.0, epoch=1, journal_id="j")
        writes = 0
        write = world.store.write

        async def counted(fn: Any) -> Any:
            nonlocal writes
            writes += 1
            return await write(fn)

        world.store.write = counted  # type: ignore[method-assign]
        await world.start()

        due = sa.select(sa.func.count()).where(schema.deployments.c.look_at <= world.clock.now)

        async def looked() -> bool:
            return await world.store.read(lambda tx: tx.value(due)) == 0

        await world.until(looked)
        assert writes < 200
        assert world.site.jobs == []

    run(test)


def test_thousands_of_rows_of_one_user_do_not_keep_anothers_waiting(run: Run) -> None:
    async def test(world: World) -> None:
        await world.loop.stop()
        await crowd(world, 1200, state=D.PREPARING, look_at=0.0)
        world.fleet.sites["crowd-1200"].act = hanging("prepare")
        bob = await world.become("bob")
        await world.attach("bobs", "b1")
        experiment = await world.submit("b1")
        seen: list[str] = []
        original = loop.begin_many

        def noted(tx: Any, ids: Any, kept_of: Any) -> Any:
            seen.extend(ids)
            return original(tx, ids, kept_of)

        loop.begin_many = noted  # type: ignore[assignment]
        try:
            await world.start()
            row = await world.launched(experiment, "b1")
        finally:
            loop.begin_many = original
        assert seen.index(row.id) < 2
        assert bob.name == "bob"

    run(test)


def test_jobs_of_one_user_that_hang_do_not_keep_anothers_from_the_same_infrastructure(run: Run) -> None:
    async def test(world: World) -> None:
        names = [f"w{number}" for number in range(60)]
        await world.attach("wide", *names, "free")

        async def act(method: str, request: Any) -> None:
            target = request if isinstance(request, b.Target) else request.target
            if target.node != "free":
                await asyncio.Event().wait()

        world.fleet.sites["wide"].act = act
        await world.submit(*names)
        await world.did("prepare", 32, site="wide")
        await world.become("bob")
        await world.hand_over("wide")
        await world.launched(await world.submit("free"), "free")

    run(test)
