"""The migrations, from every revision that was ever released, with rows in the tables, on both databases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fieldlab_common.errors import ConfigurationError
from fieldlab_director.store import migrations, schema
from fieldlab_director.store.databases import Database

STEPS = sorted(path.name[:4] for path in (Path(migrations.__file__).parent / "versions").glob("[0-9]*.py"))
GRAPH, INPUT, TRACE = "a" * 64, "b" * 64, "c" * 64
NODE = json.dumps({"name": "pi-1"})
SPEC = json.dumps({"graph": GRAPH, "blobs": [INPUT]})
SPECIAL = {"node": NODE, "spec": SPEC, "sha256": TRACE, "stored": True, "lane": "bulk"}


@pytest.fixture(params=["sqlite", "postgres"])
def empty(request, tmp_path):
    url = request.getfixturevalue("postgres").make_empty() if request.param == "postgres" else None
    return Database(path=tmp_path / "d.db", url=url)


def _value(column: sa.Column[Any], number: int) -> Any:
    if column.foreign_keys:
        return _value(next(iter(column.foreign_keys)).column, number)
    if column.name in SPECIAL:
        return SPECIAL[column.name]
    kinds = {bool: False, int: number, float: float(number), bytes: b"{}", str: f"{column.table.name[:9]}-{number}"}
    return kinds[column.type.python_type]


def _fill(connection: sa.Connection) -> dict[str, int]:
    """Two rows in each table of whatever revision the database has, if it has none yet; how many there are."""
    found = sa.MetaData()
    found.reflect(connection)
    found.remove(found.tables["alembic_version"])
    for table in found.sorted_tables:
        for number in () if _counts(connection, [table.name])[table.name] else (1, 2):
            connection.execute(sa.insert(table), {column.name: _value(column, number) for column in table.c})
    return _counts(connection, list(found.tables))


def _counts(connection: sa.Connection, tables: list[str]) -> dict[str, int]:
    return {name: connection.execute(sa.text(f"SELECT count(*) FROM {name}")).scalar_one() for name in tables}


def test_the_migrations_make_the_tables_of_the_schema(empty):
    empty.upgrade()
    with empty.engine() as engine, engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


@pytest.mark.parametrize("earlier", STEPS[:-1])
def test_an_earlier_database_keeps_its_rows_and_gets_the_tables_of_the_schema(empty, earlier):
    with empty.engine() as engine:
        migrations.upgrade(engine, earlier)
        with engine.begin() as connection:
            counts = _fill(connection)
    empty.upgrade()
    with empty.engine() as engine, engine.connect() as connection:
        assert _counts(connection, list(counts)) == counts
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


@pytest.mark.parametrize("earlier", ["0001", "0002"])
def test_an_earlier_experiment_goes_on_numbering_its_records_and_has_its_blobs(empty, earlier):
    with empty.engine() as engine:
        migrations.upgrade(engine, earlier)
        with engine.begin() as connection:
            _fill(connection)
    empty.upgrade()
    with empty.engine() as engine, engine.connect() as connection:
        counters = connection.execute(sa.text("SELECT last_record FROM experiments ORDER BY id")).scalars().all()
        records = connection.execute(sa.text("SELECT seq FROM records ORDER BY experiment_id")).scalars().all()
        uses = connection.execute(sa.select(schema.blob_uses.c.digest).distinct()).scalars().all()
    assert counters == records == [1, 2]
    assert sorted(uses) == [GRAPH, INPUT, TRACE]


def test_an_earlier_run_that_had_begun_has_its_node_and_one_that_had_not_stands_in_the_line(empty):
    with empty.engine() as engine:
        migrations.upgrade(engine, "0003")
        with engine.begin() as connection:
            _fill(connection)
            for number, state in ((1.0, "running"), (2.0, "pending")):
                connection.execute(
                    sa.text("UPDATE deployments SET state = :state WHERE started = :started"),
                    {"state": state, "started": number},
                )
    empty.upgrade()
    with empty.engine() as engine, engine.connect() as connection:
        holds = connection.execute(sa.select(schema.holds.c.node_name, schema.holds.c.experiment_id)).all()
        granted = connection.execute(sa.text("SELECT granted IS NOT NULL FROM experiments ORDER BY created")).scalars()
        assert [bool(has) for has in granted] == [True, False]
    assert [name for name, _ in holds] == ["pi-1"]


def test_what_is_pending_is_told_in_words(empty):
    with empty.engine() as engine:
        migrations.upgrade(engine, "0001")
    assert empty.pending()[0] == "0002: Users' secrets."
    empty.upgrade()
    assert empty.pending() == []


def test_a_database_of_a_newer_release_is_refused(empty):
    empty.upgrade()
    with empty.engine() as engine:
        with engine.begin() as connection:
            connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
        for refused in (migrations.upgrade, migrations.pending):
            with pytest.raises(ConfigurationError, match="newer release"):
                refused(engine)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "d.db").write_text("this is not a database, and long enough to be read as one " * 20)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Database(path=tmp_path / "d.db").upgrade()


@pytest.mark.parametrize("url", ["postgresql://nobody@127.0.0.1:1/x", "not a url", "mysql://a@b/c"])
def test_a_database_that_is_not_there_is_said(tmp_path, url):
    with pytest.raises(ConfigurationError, match="database"):
        Database(path=tmp_path / "d.db", url=url).upgrade()
