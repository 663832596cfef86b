"""The store: groups of commands, each alone with its error; the states' one way in. On each kind of database."""

import asyncio
import threading

import pytest
import sqlalchemy as sa
from fieldlab_common.errors import ConfigurationError, IllegalTransition, Unavailable
from fieldlab_common.lifecycle import DeploymentState as D
from fieldlab_director.services.vault import Vault, check_canary, open_vault
from fieldlab_director.store import queries, schema
from fieldlab_director.store.base import Notifier
from fieldlab_director.store.states import set_deployment_state

sqlite_only = pytest.mark.parametrize("database", ["memory", "sqlite"], indirect=True)


def add(name):
    return lambda tx: tx.execute(queries.ADD_META, name=name, value="x")


def names(tx):
    return set(tx.all(sa.select(schema.meta.c.name), lambda name: name))


def run(database, scenario):
    """Run ``scenario(store)`` on an event loop of its own."""

    async def main():
        store = await database.open()
        try:
            return await scenario(store)
        finally:
            await store.close()

    return asyncio.run(main())


def hold(store):
    """Keep a writer busy until the returned event is set, so that with SQLite what follows is one group."""
    go = threading.Event()
    return asyncio.ensure_future(store.write(lambda tx: go.wait(20))), go


def test_a_command_that_fails_is_undone_alone(database):
    def broken(tx):
        add("half")(tx)
        raise ZeroDivisionError

    async def scenario(store):
        busy, go = hold(store)
        group = [store.write(add("a")), store.write(broken), store.write(add("b"))]
        results = asyncio.gather(*group, return_exceptions=True)
        await asyncio.sleep(0)
        go.set()
        await busy
        return await results, await store.read(names)

    results, stored = run(database, scenario)
    assert [type(r) for r in results] == [int, ZeroDivisionError, int]
    assert stored == {"a", "b"}


@sqlite_only
def test_when_the_commit_fails_nobody_of_the_group_is_told_that_it_worked(database):
    def sabotage(tx):
        tx._connection.exec_driver_sql("PRAGMA defer_foreign_keys=ON")
        tx.execute(queries.ADD_BLOB_REF, owner_id="nobody", digest="0", created=0.0)

    async def scenario(store):
        busy, go = hold(store)
        results = asyncio.gather(store.write(add("a")), store.write(sabotage), return_exceptions=True)
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(busy, return_exceptions=True)
        return await results, await store.read(names), await store.write(add("later"))

    results, stored, later = run(database, scenario)
    assert [type(r) for r in results] == [Unavailable, Unavailable]
    assert stored == set()
    assert later == 1


def test_a_question_cannot_change_anything(database):
    async def scenario(store):
        with pytest.raises(Unavailable):
            await store.read(add("a"))
        return await store.read(names)

    assert run(database, scenario) == set()


def test_what_was_accepted_is_finished_when_the_store_closes_and_what_comes_later_is_refused(database):
    async def scenario(store):
        accepted = [asyncio.ensure_future(store.write(add(str(n)))) for n in range(50)]
        await asyncio.sleep(0)
        await store.close()
        assert await asyncio.gather(*accepted) == [1] * 50
        with pytest.raises(Unavailable):
            await store.write(add("late"))

    run(database, scenario)


def test_topics_are_woken_after_the_commit_and_not_by_what_failed(database):
    def note(topic, fail):
        def fn(tx):
            tx.notify(topic)
            if fail:
                raise ZeroDivisionError

        return fn

    async def scenario(store):
        with store.notifier.watch("good") as good, store.notifier.watch("bad") as bad:
            await asyncio.gather(
                store.write(note("good", False)), store.write(note("bad", True)), return_exceptions=True
            )
            return await good.wait(5), await bad.wait(0)

    assert run(database, scenario) == (True, False)


def test_a_wait_ends_when_the_director_stops_and_when_nobody_wants_to_know():
    async def scenario():
        notifier = Notifier()
        with notifier.watch("x") as watch, notifier.watch("x") as other:
            waiting = asyncio.ensure_future(watch.wait(60))
            await asyncio.sleep(0)
            other.leave()
            assert await other.wait(60) is False
            notifier.close()
            assert await waiting is False
            assert await watch.wait(60) is False

    asyncio.run(scenario())


def test_another_secret_than_the_databases_own_is_refused(database, tmp_path):
    vault = open_vault(tmp_path / "secret.key")

    async def scenario(store):
        await store.write(lambda tx: check_canary(tx, vault))
        await store.write(lambda tx: check_canary(tx, open_vault(tmp_path / "secret.key")))
        with pytest.raises(ConfigurationError, match="another secret"):
            await store.write(lambda tx: check_canary(tx, Vault(b"x" * 32)))

    run(database, scenario)


def test_a_secret_that_others_can_read_is_refused(tmp_path):
    open_vault(tmp_path / "secret.key")
    (tmp_path / "secret.key").chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        open_vault(tmp_path / "secret.key")


def test_a_row_that_moved_since_it_was_read_is_not_moved_again(ada, lab):
    row = lab.row(ada.experiment())
    lab.move(row, D.PREPARING)
    with pytest.raises(IllegalTransition, match="no longer pending"):
        lab.write(lambda tx: set_deployment_state(tx, row, D.FAILED))


def test_a_way_that_the_tables_lack_is_refused(ada, lab):
    row = lab.row(ada.experiment())
    with pytest.raises(IllegalTransition):
        lab.write(lambda tx: set_deployment_state(tx, row, D.RUNNING))
    assert lab.row(row.experiment_id).state is D.PENDING
