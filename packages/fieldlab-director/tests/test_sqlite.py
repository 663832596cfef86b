"""What only SQLite has: one file that fills its disk, is damaged, or has a log that cannot be reused."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading

import pytest
import sqlalchemy as sa
from fieldlab_common.errors import ConfigurationError, Unavailable
from fieldlab_director.store import queries, schema, sqlite
from fieldlab_director.store.databases import Database


@pytest.fixture
def made(tmp_path):
    database = Database(path=tmp_path / "d.db")
    database.upgrade()
    return database


def run(database, scenario):
    async def main():
        store = await database.open()
        try:
            return await scenario(store)
        finally:
            await store.close()

    return asyncio.run(main())


def add(name, value="x"):
    return lambda tx: tx.execute(queries.ADD_META, name=name, value=value)


def names(tx):
    return set(tx.all(sa.select(schema.meta.c.name), lambda name: name))


def test_a_full_disk_is_said_and_what_follows_is_taken_once_there_is_room(made):
    def room(pages):
        return lambda tx: tx._connection.exec_driver_sql(f"PRAGMA max_page_count={pages}").scalar()

    async def scenario(store):
        await store.write(add("before"))
        await store.write(room(1))  # SQLite makes it the present size: not a page more
        with pytest.raises(Unavailable, match="full"):
            await store.write(add("too much", "x" * 200_000))
        meanwhile = await store.read(names)
        await store.write(room(1_000_000))
        await store.write(add("after", "x" * 200_000))
        return meanwhile, await store.read(names)

    assert run(made, scenario) == ({"before"}, {"before", "after"})


def test_the_log_of_writes_is_small_again_once_a_long_question_has_ended(made, monkeypatch):
    monkeypatch.setattr(sqlite, "WAL_BYTES", 1_000_000)
    wal = made.path.with_name("d.db-wal")
    asking, go = threading.Event(), threading.Event()

    def long_question(tx):
        names(tx)
        asking.set()
        assert go.wait(60)

    async def scenario(store):
        question = asyncio.ensure_future(store.read(long_question))
        await asyncio.to_thread(asking.wait, 60)
        for number in range(30):
            await store.write(add(f"n{number}", "x" * 200_000))
        grown = wal.stat().st_size
        go.set()
        await question
        for number in range(3):
            await store.write(add(f"m{number}"))
        return grown, wal.stat().st_size

    grown, after = run(made, scenario)
    assert grown > 5_000_000
    assert after <= 1_000_000


def test_a_question_that_takes_too_long_is_given_up(made, monkeypatch):
    monkeypatch.setattr(sqlite, "QUESTION_SECONDS", 0.1)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"

    async def scenario(store):
        with pytest.raises(Unavailable, match="interrupted"):
            await store.read(lambda tx: tx.value(sa.text(endless)))
        return await store.read(names)

    assert run(made, scenario) == set()


def test_a_damaged_database_is_refused_with_what_to_do(made):
    async def fill(store):
        for number in range(200):
            await store.write(add(f"n{number}", "x" * 2000))

    run(made, fill)
    content = bytearray(made.path.read_bytes())
    half = len(content) // 2 // 4096 * 4096
    content[half : half + 4 * 4096] = os.urandom(4 * 4096)
    made.path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"damaged.*restore"):
        run(made, fill)


def test_looking_for_damage_ends_when_its_time_is_over(made, monkeypatch):
    monkeypatch.setattr(sqlite, "CHECK_SECONDS", -1.0)

    async def fill(store):
        for number in range(300):
            await store.write(add(f"n{number}", "x" * 3000))

    run(made, fill)
    sqlite.check_sound(made.path)


PROGRAM = """
import asyncio, os, sys
from fieldlab_director.store import queries
from fieldlab_director.store.databases import Database
async def main():
    store = await Database(path=sys.argv[1]).open()
    for number in range(5):
        os.write(1, b"ask\\n")
        await store.write(lambda tx: tx.execute(queries.ADD_META, name=f"n{number}", value="x"))
        os.write(1, b"answered\\n")
    await store.close()
asyncio.run(main())
"""


def test_the_disk_has_it_before_anybody_is_answered(made, tmp_path):
    """Seen by strace: between each question and its answer the log of writes is synced after it was written."""
    trace = tmp_path / "trace"
    traced = "trace=write,pwrite64,fsync,fdatasync"
    command = ["strace", "-f", "-y", "-e", traced, "-o", str(trace), sys.executable, "-c", PROGRAM, str(made.path)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    happened: list[str] = []
    for line in trace.read_text().splitlines():
        if '"ask\\n"' in line:
            happened.append("ask")
        elif '"answered\\n"' in line:
            happened.append("answered")
        elif "d.db-wal" in line:
            happened.append("write" if "pwrite64(" in line else "sync")
    rounds = "".join(f"{word} " for word in happened).split("ask ")[1:]
    assert len(rounds) == 5
    for one in rounds:
        words = one.split("answered")[0].split()
        assert "write" in words
        assert words[-1] == "sync"
