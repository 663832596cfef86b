"""The store: groups of commands, each alone with its error; migrations; the states' one way in."""

import asyncio
import threading

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fieldlab_common.errors import ConfigurationError, IllegalTransition, Unavailable
from fieldlab_common.lifecycle import DeploymentState as D
from fieldlab_director.services.vault import Vault, check_canary, open_vault
from fieldlab_director.store import migrations, queries, schema
from fieldlab_director.store.base import Notifier
from fieldlab_director.store.sqlite import SqliteStore, engine_for_migration
from fieldlab_director.store.states import set_deployment_state


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "d.db"
    engine = engine_for_migration(path)
    migrations.upgrade(engine)
    engine.dispose()
    return path


def add(name):
    return lambda tx: tx.execute(queries.ADD_META, name=name, value="x")


def names(tx):
    return set(tx.all(sa.select(schema.meta.c.name), lambda name: name))


def run(path, scenario):
    """Run ``scenario(store)`` on an event loop of its own."""

    async def main():
        store = SqliteStore(path)
        try:
            return await scenario(store)
        finally:
            await store.close()

    return asyncio.run(main())


def hold(store):
    """Keep the writer busy until the returned event is set, so that what follows is one group."""
    go = threading.Event()
    return asyncio.ensure_future(store.write(lambda tx: go.wait(20))), go


def test_the_migrations_make_the_tables_of_the_schema(path):
    engine = engine_for_migration(path)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
    engine.dispose()


def test_a_database_of_a_newer_release_is_refused(path):
    engine = engine_for_migration(path)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigurationError, match="newer release"):
        migrations.upgrade(engine)
    engine.dispose()


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "d.db").write_text("this is not a database, and long enough to be read as one " * 20)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        engine_for_migration(tmp_path / "d.db")


def test_a_command_that_fails_is_undone_alone(path):
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

    results, stored = run(path, scenario)
    assert [type(r) for r in results] == [int, ZeroDivisionError, int]
    assert stored == {"a", "b"}


def test_when_the_commit_fails_nobody_of_the_group_is_told_that_it_worked(path):
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

    results, stored, later = run(path, scenario)
    assert [type(r) for r in results] == [Unavailable, Unavailable]
    assert stored == set()
    assert later == 1


def test_a_question_cannot_change_anything(path):
    async def scenario(store):
        with pytest.raises(Unavailable):
            await store.read(add("a"))
        return await store.read(names)

    assert run(path, scenario) == set()


def test_what_was_accepted_is_finished_when_the_store_closes_and_what_comes_later_is_refused(path):
    async def scenario(store):
        accepted = [asyncio.ensure_future(store.write(add(str(n)))) for n in range(50)]
        await asyncio.sleep(0)
        await store.close()
        assert await asyncio.gather(*accepted) == [1] * 50
        with pytest.raises(Unavailable):
            await store.write(add("late"))

    run(path, scenario)


def test_topics_are_woken_after_the_commit_and_not_by_what_failed(path):
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

    assert run(path, scenario) == (True, False)


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


def test_another_secret_than_the_databases_own_is_refused(path, tmp_path):
    vault = open_vault(tmp_path / "secret.key")

    async def scenario(store):
        await store.write(lambda tx: check_canary(tx, vault))
        await store.write(lambda tx: check_canary(tx, open_vault(tmp_path / "secret.key")))
        with pytest.raises(ConfigurationError, match="another secret"):
            await store.write(lambda tx: check_canary(tx, Vault(b"x" * 32)))

    run(path, scenario)


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
