"""What a director takes in and has on its disk before it says so: records in batches, and single ones at a given rate.

Both with SQLite at ``synchronous=FULL``, one core for the director, and the others for the program that plays its
executors. Beside it, in turns and on the same core and disk: ``sqlite3`` alone, with the same pragmas, that puts the
same rows into the same table of a director's database, a transaction for each batch.

Single requests are sent by the clock, ``RATE`` a second, whatever the director does. A time is taken from when the
request was due, not from when it could be sent: one that is late behind another counts as late, so that a pause of the
director is felt by all that it kept waiting (the omission that is called coordinated is thereby avoided).
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import director as d
import fieldlab as fl
import programs
from fieldlab_common.lifecycle import StepState
from fieldlab_common.records import LogRecord, StepRecord
from measure import Row, Versions, run, work

__all__ = ["ingest"]

BATCH = 100  # records
EXECUTORS = 16
SECONDS = 6.0  # of one round
RATE = 500.0  # single reports a second
SINGLES = 64  # executors that share them
RATE_SECONDS = 20.0


def ingest(rounds: int, versions: Versions) -> list[Row]:
    """Records a second in batches, beside ``sqlite3``; and how long single ones take at a rate."""
    versions["sqlite"] = sqlite3.sqlite_version
    folder = work("ingest")
    with d.serving(folder / "director", pinned=True) as director, fl.Client(director.url, director.token) as client:
        found = asyncio.run(_measure(director, client, rounds, folder))
    shutil.rmtree(folder)
    per_record = {name: [1e6 / rate for rate in found[name]] for name in ("ours", "sqlite")}
    single: list[float] = found["single"]
    cut = statistics.quantiles(single, n=1000)
    beside = {"peer": "sqlite3", "peer_samples": per_record["sqlite"], "aim": 8, "aimed": "ratio"}
    each = found["cpu"] / sum(found["count"]), found["single_cpu"] / len(single)
    note = f"of the director's core, {each[0] * 1e6:.0f} µs a record in batches and {each[1] * 1e3:.2f} ms a single one"
    return [
        Row(
            name=f"a durable record, in batches of {BATCH}", unit="µs", samples=per_record["ours"], note=note, **beside
        ),
        Row(name=f"single report at {RATE:g}/s, p50", unit="ms", samples=[cut[499]], note=note),
        Row(name=f"single report at {RATE:g}/s, p99", unit="ms", samples=[cut[989]], aim=20),
        Row(name=f"single report at {RATE:g}/s, p99.9", unit="ms", samples=[cut[998]]),
    ]


async def _measure(director: d.Embedded, client: fl.Client, rounds: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"ours": [], "sqlite": [], "count": [], "cpu": 0.0}
    with d.simulated(client, SINGLES) as lab:
        client.submit(fl.Experiment("ingest").map(programs.one_step(), lab.nodes))
        executors = [d.Played(await lab.launch()) for _ in range(SINGLES)]
        for executor in executors:
            await executor.claim()
        for number in range(rounds):
            began, used = time.perf_counter(), d.cpu(director.pid)
            counts = await asyncio.gather(*(_batches(one, began + SECONDS) for one in executors[:EXECUTORS]))
            found["ours"].append(sum(counts) / (time.perf_counter() - began))
            found["count"].append(sum(counts))
            found["cpu"] += d.cpu(director.pid) - used
            with d.on(d.cores()[0]):  # nothing else is to be done meanwhile: the loop may wait
                found["sqlite"].append(_raw(director.folder, folder / f"raw-{number}"))
        used = d.cpu(director.pid)
        found["single"] = [1000 * seconds for seconds in await _by_the_clock(executors)]
        found["single_cpu"] = d.cpu(director.pid) - used
        for executor in executors:
            executor.close()
    return found


def _log(at: float) -> bytes:
    text = "64 bytes from 192.0.2.17: icmp_seq=4711 ttl=57 time=12.8 ms, as ping says it\n"
    return d.record("log", at, LogRecord(step="probe", text=text))


async def _batches(executor: d.Played, until: float) -> int:
    """Report batch after batch until then; how many records were acknowledged."""
    count = 0
    records = [_log(time.time())] * BATCH
    while time.perf_counter() < until:
        await executor.say("bulk", *records)
        count += BATCH
    return count


async def _by_the_clock(executors: list[d.Played]) -> list[float]:
    """Seconds from when each single report was due until it was acknowledged."""
    count = int(RATE * RATE_SECONDS)
    begin = time.perf_counter() + 0.5
    lanes = (range(number, count, len(executors)) for number in range(len(executors)))
    taken = await asyncio.gather(*(_due(one, lane, begin) for one, lane in zip(executors, lanes, strict=True)))
    return [seconds for one in taken for seconds in one]


async def _due(executor: d.Played, numbers: range, begin: float) -> list[float]:
    taken: list[float] = []
    for number in numbers:
        due = begin + number / RATE
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        step = StepRecord(step="probe", state=StepState.SUCCEEDED, iteration=number, started=due, ended=due)
        await executor.say("control", d.record("step", time.time(), step))
        taken.append(time.perf_counter() - due)
    return taken


# --- beside it --------------------------------------------------------------------------------------------------------


def _raw(director: Path, path: Path) -> float:
    """Records a second of ``sqlite3`` alone, in a process of its own, on a copy of the tables of the director."""
    return float(run([sys.executable, __file__, str(director / "director.db"), str(path)]))


def _insert(source: str, path: str) -> float:
    with sqlite3.connect(source) as tables:
        made = [sql for (sql,) in tables.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")]
        rows = {name: tables.execute(f"SELECT * FROM {name}").fetchall() for name in _PARENTS}
    database = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        database.execute(f"PRAGMA {pragma}")
    for sql in made:
        if "sqlite_sequence" not in sql:
            database.execute(sql)
    for name, content in rows.items():
        database.executemany(f"INSERT INTO {name} VALUES ({','.join('?' * len(content[0]))})", content)
    experiment, deployment = database.execute("SELECT experiment_id, id FROM deployments").fetchone()
    data, number, begin = _log(time.time()), 0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        numbers = range(number + 1, number + BATCH + 1)
        values = [(n, experiment, deployment, "j", "bulk", n, False, data) for n in numbers]
        database.execute("BEGIN IMMEDIATE")
        database.executemany(_ADD, values)
        database.execute("COMMIT")
        number += BATCH
    return number / (time.perf_counter() - begin)


_PARENTS = ("users", "infrastructures", "experiments", "deployments")
_ADD = (
    "INSERT INTO records (seq, experiment_id, deployment_id, journal_id, lane, number, late, data) "
    "VALUES (?,?,?,?,?,?,?,?)"
)


if __name__ == "__main__":
    print(_insert(*sys.argv[1:]))
