"""What only PostgreSQL has: transactions side by side, several directors, connections that break."""

from __future__ import annotations

import asyncio
import threading

import pytest
import sqlalchemy as sa
from fieldlab_common.errors import InvalidRequest, Unavailable
from fieldlab_common.events import Event
from fieldlab_common.lifecycle import ExperimentState
from fieldlab_common.protocol import ExperimentSettings, Lane
from fieldlab_director.services.accounts import add_user
from fieldlab_director.store import queries, schema
from fieldlab_director.store.postgres import TRIES, PostgresStore
from fieldlab_director.store.rows import ExperimentRow
from fieldlab_director.store.states import append_event, append_records

WITHIN = 30


def _add_experiment(tx):
    settings = ExperimentSettings(reporting="live", lost_after=60.0)
    fields = dict.fromkeys(("start_requested", "cancel_requested", "granted", "deleted", "started", "ended"))
    row = ExperimentRow(
        id="e",
        owner_id=add_user(tx, "ada").id,
        name="e",
        state=ExperimentState.RUNNING,
        message="",
        settings=settings,
        cancel_reason="",
        queued=tx.now,
        number=1,
        last_event=0,
        last_record=0,
        created=tx.now,
        **fields,
    )
    tx.execute(queries.ADD_EXPERIMENT, **vars(row))


def _records(count, who="d"):
    common = {"deployment_id": who, "journal_id": "j", "lane": Lane.BULK, "late": False, "data": b"{}"}
    return [{**common, "number": number} for number in range(count)]


def _after(cursor, limit=1000):
    r = schema.records
    chosen = sa.select(r.c.seq).where(r.c.experiment_id == "e", r.c.seq > cursor).order_by(r.c.seq).limit(limit)
    return lambda tx: tx.all(chosen, lambda seq: seq)


def run(postgres, scenario, *, stores=1):
    """Run a scenario with some stores on one new database, on an event loop of its own."""
    url = postgres.make()

    async def main():
        opened = [PostgresStore(url) for _ in range(stores)]
        try:
            for store in opened:
                await store.compared()
            await opened[0].write(_add_experiment)
            async with asyncio.timeout(60):
                return await scenario(*opened)
        finally:
            for store in opened:
                await store.close()

    return asyncio.run(main())


def held_up(fn):
    """A command that does ``fn`` and then does not commit before ``go``; ``there`` is set when it waits."""
    there, go = threading.Event(), threading.Event()

    def command(tx):
        value = fn(tx)
        there.set()
        assert go.wait(WITHIN)
        return value

    return command, there, go


def test_what_is_committed_later_never_has_a_smaller_number(postgres):
    async def scenario(store):
        first, there, go = held_up(lambda tx: append_records(tx, "e", _records(3)))
        slow = asyncio.ensure_future(store.write(first))
        await asyncio.to_thread(there.wait, WITHIN)
        quick = asyncio.ensure_future(store.write(lambda tx: append_records(tx, "e", _records(2))))
        await asyncio.wait({quick}, timeout=0.2)
        seen_meanwhile = await store.read(_after(0))
        overtaken = quick.done()
        go.set()
        await asyncio.gather(slow, quick)
        return overtaken, seen_meanwhile, await store.read(_after(0))

    assert run(postgres, scenario) == (False, [], [1, 2, 3, 4, 5])


def test_a_reader_by_cursor_passes_over_nothing_while_two_directors_write(postgres):
    each, batch = 25, 4

    async def write(store):
        for _ in range(each):
            await store.write(lambda tx: append_records(tx, "e", _records(batch)))

    async def read(store, total):
        found: list[int] = []
        while len(found) < total:
            found += await store.read(_after(found[-1] if found else 0, limit=7))
        return found

    async def scenario(one, other):
        writers = [write(one), write(one), write(other), write(other)]
        total = len(writers) * each * batch
        found, *_ = await asyncio.gather(read(one, total), *writers)
        return found == list(range(1, total + 1))

    assert run(postgres, scenario, stores=2)


def test_events_of_two_directors_have_one_order_without_gaps(postgres):
    async def send(store, who):
        for number in range(20):
            event = Event(name="go", data=None, sent_at=0.0, key=f"{who}:{number}")
            await store.write(lambda tx, event=event: append_event(tx, "e", event))

    async def scenario(one, other):
        await asyncio.gather(send(one, "a"), send(other, "b"))
        found = await one.read(lambda tx: tx.all(queries.EVENTS, Event, experiment_id="e", after=0, limit=100))
        assert [event.number for event in found] == list(range(1, 41))
        return [[e.key for e in found if e.key.startswith(who)] for who in "ab"]

    orders = run(postgres, scenario, stores=2)
    assert orders == [[f"{who}:{number}" for number in range(20)] for who in "ab"]


def test_commands_that_meet_act_as_if_one_came_after_the_other(postgres):
    """Each adds its own only if there is nothing: both saw nothing, and one of them has to look again."""
    met = threading.Barrier(2)
    tries = []

    def first(name):
        def command(tx):
            tries.append(name)
            there = tx.all(sa.select(schema.meta.c.name), lambda name: name)
            if len(tries) <= 2:
                met.wait(WITHIN)
            if not there:
                tx.execute(queries.ADD_META, name=name, value="")
            return not there

        return command

    async def scenario(one, other):
        won = await asyncio.gather(one.write(first("a")), other.write(first("b")))
        return sorted(won), len(await one.read(lambda tx: tx.all(sa.select(schema.meta.c.name), lambda name: name)))

    assert run(postgres, scenario, stores=2) == ([False, True], 1)
    assert len(tries) == 3


def test_a_command_that_never_gets_its_turn_is_refused_as_busy(postgres):
    tries = []

    def command(tx):
        tries.append(tx)
        tx.execute(queries.ADD_META, name="a", value="")
        tx.execute(queries.ADD_META, name="a", value="")

    async def scenario(store):
        with pytest.raises(Unavailable, match="too busy"):
            await store.write(command)

    run(postgres, scenario)
    assert len(tries) == TRIES


def test_those_who_wait_at_one_director_are_woken_by_another(postgres):
    async def scenario(one, other):
        with other.notifier.watch("x") as watch, other.notifier.watch("y") as silent:
            await one.write(lambda tx: tx.notify("x", *(f"experiment:{number:020}" for number in range(1000))))
            return await watch.wait(WITHIN), await silent.wait(0)

    assert run(postgres, scenario, stores=2) == (True, False)


def test_a_director_that_was_not_listening_wakes_all_who_wait(postgres):
    async def scenario(one, other):
        with other.notifier.watch("x") as watch:
            await one.write(lambda tx: _end_connections(tx, "fieldlab listens"))
            assert await watch.wait(WITHIN)
            await one.write(lambda tx: tx.notify("x"))
            return await watch.wait(WITHIN)

    assert run(postgres, scenario, stores=2)


def test_a_connection_that_broke_while_nobody_used_it_is_made_anew(postgres):
    async def scenario(one, other):
        await asyncio.gather(*(other.read(lambda tx: tx.now) for _ in range(4)))
        await one.write(lambda tx: _end_connections(tx, "%"))
        return await other.write(lambda tx: tx.execute(queries.ADD_META, name="a", value=""))

    assert run(postgres, scenario, stores=2) == 1


def test_times_are_the_databases(postgres):
    async def scenario(store):
        ours = await store.write(lambda tx: tx.now)
        theirs = await store.read(lambda tx: tx.value(sa.text("SELECT extract(epoch FROM clock_timestamp())::float8")))
        return abs(ours - theirs) < 60

    assert run(postgres, scenario)


def test_what_a_text_of_postgres_cannot_hold_is_shown_or_refused(postgres):
    async def scenario(store):
        await store.write(lambda tx: tx.execute(queries.ADD_META, name="a\0b", value="1\0002"))
        with pytest.raises(InvalidRequest, match="no room"):
            await store.write(lambda tx: tx.execute(queries.ADD_META, name="x" * 65, value=""))
        return await store.read(lambda tx: tx.value(queries.META, name="a\0b"))

    assert run(postgres, scenario) == "1␀2"


def _end_connections(tx, name):
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    tx.value(sa.text(f"{end} AND datname = current_database() AND application_name LIKE :name"), name=name)
