"""The line for nodes, as the director keeps it: over its own rows, through its loop, after any crash."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from fieldlab_common.errors import InvalidRequest
from fieldlab_common.lifecycle import DeploymentState as D
from fieldlab_common.lifecycle import ExperimentState as E
from fieldlab_common.node import Availability, Elastic, Node
from fieldlab_common.protocol import CancelRequest, ExperimentInfo, Hold, NodeList, WaitsFor
from fieldlab_director.connectors import base as b
from fieldlab_director.services import experiments, infrastructures, reservation, survey
from fieldlab_director.services.outcome import move
from fieldlab_director.store import schema
from fieldlab_director.store.databases import Database
from fieldlab_director.store.rows import DeploymentRow, ExperimentRow
from hypothesis import given, settings
from hypothesis import strategies as st

from .world import Run, World, failing, hanging, play


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return partial(play, tmp_path)


async def info(world: World, experiment: ExperimentRow) -> ExperimentInfo:
    return await world.store.read(lambda tx: experiments.experiment(tx, world.user, experiment.id))


async def held(world: World) -> dict[str, int]:
    found = await world.store.read(lambda tx: tx.all(sa.select(schema.holds.c.node_name), lambda node_name: node_name))
    return dict(Counter(found))


async def end(world: World, experiment: ExperimentRow, *names: str) -> None:
    """Let executors claim, end well and leave."""
    for name in names:
        row = await world.launched(experiment, name)
        await world.claim(row)
        await world.end(row)
        world.die(row)


def test_a_run_waits_for_a_held_node_as_pending_and_nothing_is_done_there(run: Run) -> None:
    async def test(world: World) -> None:
        first, _ = await world.running("n1", "n2")
        second = await world.submit("n2", "n3")
        assert [row.state for row in await world.rows(second)] == [D.PENDING, D.PENDING]
        told = await info(world, second)
        assert told.state is E.PREPARING
        assert told.waits_for == (WaitsFor(node="n2", since=world.clock.now, runs=(first.name,)),)
        assert told.granted is None
        assert {deployment for _, deployment, _ in world.site.jobs}.isdisjoint(r.id for r in await world.rows(second))

    run(test)


def test_the_next_in_line_gets_its_nodes_when_they_were_cleaned_up_and_not_before(run: Run) -> None:
    async def test(world: World) -> None:
        world.site.act = failing("clean_up", 1)
        first = await world.submit("n1")
        second = await world.submit("n1")
        await end(world, first, "n1")
        await world.did("clean_up", 1)
        await world.reached(second, D.PENDING)
        world.pass_time(3600)
        await world.launched(second)
        assert (await world.row(first)).prepared is None

    run(test)


def test_each_node_is_free_again_when_its_own_deployment_has_ended(run: Run) -> None:
    async def test(world: World) -> None:
        first, _ = await world.running("n1", "n2")
        second = await world.submit("n1")
        row = await world.row(first, "n1")
        await world.end(row)
        world.die(row)
        await world.launched(second)
        assert (await world.row(first, "n2")).state is D.RUNNING
        assert await held(world) == {"n1": 1, "n2": 1}

    run(test)


def test_a_narrow_run_passes_a_wide_one_only_where_it_takes_nothing_from_it(run: Run) -> None:
    async def test(world: World) -> None:
        first, _ = await world.running("n1")
        wide = await world.submit("n1", "n2")
        behind = await world.submit("n2")
        beside = await world.submit("n3")
        await world.launched(beside, "n3")
        assert (await world.row(behind, "n2")).state is D.PENDING
        assert (await info(world, behind)).waits_for == (WaitsFor(node="n2", before=1),)
        await end(world, first, "n1")
        await world.launched(wide, "n2")
        await world.reached(behind, D.PENDING)

    run(test)


def test_a_cancelled_run_leaves_the_line_and_lets_the_next_have_its_nodes(run: Run) -> None:
    async def test(world: World) -> None:
        await world.running("n1")
        wide = await world.submit("n1", "n2")
        behind = await world.submit("n2")
        await world.cancel(wide)
        await world.launched(behind, "n2")
        await world.reached(wide, D.CANCELLED, D.CANCELLED)

    run(test)


def test_a_run_from_whose_nodes_one_was_cancelled_waits_for_the_others_alone(run: Run) -> None:
    async def test(world: World) -> None:
        await world.running("n1")
        wide = await world.submit("n1", "n2")
        request = CancelRequest(deployments=("n1",))
        await world.store.write(lambda tx: experiments.cancel(tx, world.user, wide.id, request))
        await world.launched(wide, "n2")

    run(test)


def test_a_node_with_slots_is_held_by_as_many_runs(run: Run) -> None:
    async def test(world: World) -> None:
        infrastructure = (await world.rows(await world.submit("n3")))[0].infrastructure_id
        nodes = [Node(name="n1", slots=2), Node(name="n3")]
        await world.store.write(lambda tx: survey.reached(tx, infrastructure, nodes))
        runs = [await world.submit("n1") for _ in range(3)]
        for one in runs[:2]:
            await world.launched(one)
        await world.reached(runs[2], D.PENDING)
        assert (await held(world))["n1"] == 2

    run(test)


def test_a_slot_more_lets_the_next_in(run: Run) -> None:
    async def test(world: World) -> None:
        first, row = await world.running("n1")
        second = await world.submit("n1")
        nodes = [Node(name="n1", slots=2)]
        await world.store.write(lambda tx: survey.reached(tx, row.infrastructure_id, nodes))
        await world.launched(second)
        assert (await world.row(first)).state is D.RUNNING

    run(test)


def test_deployments_of_one_run_share_its_hold_until_the_last_has_ended(run: Run) -> None:
    async def test(world: World) -> None:
        first = await world.submit("n1", "n1:second")
        second = await world.submit("n1")
        await end(world, first, "n1")
        await world.did("clean_up", 1)
        await world.until(lambda: quiet(world))
        await world.reached(second, D.PENDING)
        assert await held(world) == {"n1": 1}
        await end(world, first, "n1:second")
        await world.launched(second)

    run(test)


async def quiet(world: World) -> bool:
    return not (await world.store.read(reservation.look)).due


def test_a_director_that_was_killed_finds_holds_and_line_as_they_were(run: Run) -> None:
    async def test(world: World) -> None:
        first, row = await world.running("n1")
        second = await world.submit("n1")
        await world.loop.stop()
        await world.start()
        await world.until(lambda: quiet(world))
        assert [r.state for r in await world.rows(second)] == [D.PENDING]
        await world.loop.stop()
        await world.end(row)  # what frees the node comes while no loop runs
        world.site.executors[row.id, row.epoch] = b.Liveness.DEAD
        await world.start()
        world.fleet.hear(row.infrastructure_id, row.id)
        await world.launched(second)
        assert (await world.experiment(first.id)).state is E.SUCCEEDED

    run(test)


def test_a_run_with_a_time_takes_its_nodes_shortly_before_it(run: Run) -> None:
    async def test(world: World) -> None:
        later = await world.submit("n1", start_at=world.clock.now + 7200)
        assert (await info(world, later)).queued == world.clock.now + 6300
        between = await world.submit("n1")
        await end(world, between, "n1")
        await world.did("clean_up", 1)
        await world.until(lambda: quiet(world))
        await world.reached(later, D.PENDING)
        world.clock.now += 6300
        world.store.notifier.wake(["line"])
        await world.reached(later, D.READY)

    run(test)


def test_a_run_that_cannot_be_prepared_does_not_keep_its_nodes(run: Run) -> None:
    async def test(world: World) -> None:
        world.site.act = failing("prepare", transient=False, node="n2")
        first = await world.submit("n1", "n2")
        second = await world.submit("n1")
        await world.reached(first, D.CANCELLED, D.FAILED)
        await world.launched(second)

    run(test)


def test_a_hanging_preparation_keeps_its_node_only_until_it_is_cancelled(run: Run) -> None:
    async def test(world: World) -> None:
        world.site.act = hanging("prepare")
        first = await world.submit("n1")
        second = await world.submit("n1")
        await world.did("prepare")
        world.site.act = None
        await world.cancel(first)
        await world.launched(second)

    run(test)


# --- nodes as they are seen ------------------------------------------------------------------------------------------


async def nodes(world: World) -> NodeList:
    return await world.store.read(lambda tx: infrastructures.nodes(tx, world.user))


async def lists(world: World, row: DeploymentRow, *found: Node) -> None:
    await world.store.write(lambda tx: survey.reached(tx, row.infrastructure_id, found))


def test_a_held_node_is_seen_as_held_by_ones_own_run_and_anothers_run_is_not_named(run: Run) -> None:
    async def test(world: World) -> None:
        experiment, _ = await world.running("n1")
        seen = await nodes(world)
        assert [node.availability.value for node in seen.nodes] == ["held", "available", "available"]
        hold = Hold(node="n1", infrastructure="lab", since=world.clock.now, run=experiment.name)
        assert seen.holds == (hold,)
        await world.become("bob")
        await world.hand_over("lab")
        assert (await nodes(world)).holds == (replace(hold, run=None),)
        told = await info(world, await world.submit("n1"))
        assert told.waits_for == (WaitsFor(node="n1", since=world.clock.now, others=1),)

    run(test)


def test_a_node_that_vanishes_while_it_is_held_stays_listed_as_gone_until_it_is_free(run: Run) -> None:
    async def test(world: World) -> None:
        _, row = await world.running("n1")
        await lists(world, row, Node(name="n2"))
        seen = {node.name: node for node in (await nodes(world)).nodes}
        assert sorted(seen) == ["n1", "n2"]
        assert (seen["n1"].availability, seen["n1"].reason) == (
            Availability.OFFLINE,
            "Its infrastructure does not list it any more.",
        )
        await world.end(row)
        world.die(row)
        await world.did("clean_up")
        await world.until(lambda: quiet(world))
        await lists(world, row, Node(name="n2"))
        assert [node.name for node in (await nodes(world)).nodes] == ["n2"]

    run(test)


def test_a_node_that_was_not_looked_at_for_long_is_unknown(run: Run) -> None:
    async def test(world: World) -> None:
        await world.loop.stop()
        world.clock.now += infrastructures.UNHEARD_SECONDS + 1
        assert {node.availability for node in (await nodes(world)).nodes} == {Availability.UNKNOWN}

    run(test)


def elastic(most: int) -> Node:
    return Node(name="cloud", elastic=Elastic(most=most))


def test_elastic_nodes_are_made_under_their_names_up_to_the_limit_and_gone_after_the_run(run: Run) -> None:
    async def test(world: World) -> None:
        _, row = await world.running("n1")
        await lists(world, row, Node(name="n1"), elastic(3))
        first = await world.submit("cloud-a", "cloud-b", template="cloud")
        second = await world.submit("cloud-c", "cloud-d", template="cloud")
        for name in ("cloud-a", "cloud-b"):
            made = await world.launched(first, name)
            assert (made.node.name, made.node.template, made.node.elastic) == (name, "cloud", None)
        await world.reached(second, D.PENDING, D.PENDING)
        assert (await info(world, second)).waits_for[0].node == "cloud"
        seen = await nodes(world)
        assert [node.name for node in seen.nodes] == ["n1", "cloud"]
        assert {hold.node for hold in seen.holds if hold.template == "cloud"} == {"cloud-a", "cloud-b"}
        await end(world, first, "cloud-a", "cloud-b")
        await world.launched(second, "cloud-c")

    run(test)


def test_a_run_that_wants_more_than_the_limit_has_them_when_nobody_else_has_any(run: Run) -> None:
    async def test(world: World) -> None:
        _, row = await world.running("n1")
        await lists(world, row, Node(name="n1"), elastic(1))
        await world.launched(await world.submit("cloud-a", "cloud-b", template="cloud"), "cloud-b")
        assert await held(world) == {"n1": 1, "cloud-a": 1, "cloud-b": 1}

    run(test)


@pytest.mark.parametrize(
    ("name", "template", "said"),
    [("cloud", "", "is a template"), ("x", "n1", "is not a template"), ("n1", "cloud", "there is one of that name")],
)
def test_a_template_is_no_node_and_a_node_no_template(run: Run, name: str, template: str, said: str) -> None:
    async def test(world: World) -> None:
        _, row = await world.running("n1")
        await lists(world, row, Node(name="n1"), elastic(1))
        with pytest.raises(InvalidRequest, match=said):
            await world.submit(name, template=template)

    run(test)


# --- any order of what can happen ------------------------------------------------------------------------------------

Step = tuple[str, int, frozenset[str]]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "end", "cancel", "crash"]),
        st.integers(0, 30),
        st.sets(st.sampled_from(["n1", "n2", "n3"]), min_size=1).map(frozenset),
    ),
    max_size=25,
)


class Rows:
    """What a loop would do to the rows, without connectors: the line alone is real."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.runs: list[ExperimentRow] = []

    async def do(self, what: str, which: int, nodes: frozenset[str]) -> None:
        if what == "submit":
            self.world.clock.now += which % 3  # some come at the same time
            self.runs.append(await self.world.submit(*sorted(nodes)))
        elif what == "crash":
            await self.world.store.write(reservation.serve)
        elif self.runs:
            await self.over(self.runs[which % len(self.runs)], sorted(nodes) if what == "end" else [])

    async def over(self, run: ExperimentRow, names: list[str]) -> None:
        """End a run on some nodes, as if all was cleaned up there; with none, cancel it."""
        granted = (await self.world.experiment(run.id)).granted is not None
        for row in await self.world.rows(run):
            if not row.state.terminal and (not names or (granted and row.name in names)):
                await self.world.store.write(lambda tx, row=row: move(tx, row, D.CANCELLED))  # type: ignore[misc]
        await self.world.store.write(reservation.serve)

    async def check(self) -> None:
        """No slot twice, nobody without all of it, and all whom nothing hinders served."""
        found = await held(self.world)
        assert all(count == 1 for count in found.values()), found
        standing = await self.world.store.read(reservation.look)
        assert not standing.due
        line = []
        for run in self.runs:
            row = await self.world.experiment(run.id)
            left = {one.name for one in await self.world.rows(run) if not one.state.terminal}
            if row.granted is None and left:
                assert left & {*found, *(name for before in line for name in before)}, "it waits for nothing"
                line.append(left)
            elif row.granted is not None:
                assert left <= set(found)


def test_in_any_order_no_node_is_held_twice_and_every_run_is_served_in_the_end(tmp_path: Path) -> None:
    async def example(world: World, steps: list[Step]) -> None:
        rows = Rows(world)
        for step in steps:
            await rows.do(*step)
            await rows.check()
        for run in rows.runs:  # in the order of the line: each has its nodes by the time that those before it ended
            row = await world.experiment(run.id)
            assert row.granted is not None or row.state.terminal
            await rows.over(run, [])

    with asyncio.Runner() as runner:
        world = World(tmp_path / "data")
        runner.run(world.open())
        runner.run(world.loop.stop())

        @settings(max_examples=25, deadline=None)
        @given(steps=STEPS)
        def in_any_order(steps: list[Step]) -> None:
            runner.run(example(world, steps))

        in_any_order()
        runner.run(world.close())


def test_two_directors_that_serve_the_line_at_once_grant_a_node_once(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = request.getfixturevalue("postgres").make()

    async def test(world: World) -> None:
        await world.loop.stop()
        first = await world.submit("n1")
        waiting = [await world.submit("n1") for _ in range(5)]
        for row in await world.rows(first):
            await world.store.write(lambda tx, row=row: move(tx, row, D.CANCELLED))  # type: ignore[misc]
        other = await Database(path=tmp_path / "none", url=url).open(clock=world.clock)
        try:
            await asyncio.gather(*(store.write(reservation.serve) for store in (world.store, other) * 8))
        finally:
            await other.close()
        assert await held(world) == {"n1": 1}
        assert [(await world.experiment(one.id)).granted is not None for one in waiting] == [True, *[False] * 4]
        await world.start()
        await world.launched(waiting[0])

    play(tmp_path, test, url)
