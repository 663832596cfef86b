"""What nothing refers to goes, after a grace; what something refers to stays; and nobody loses what just arrives."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from dataclasses import replace

import pytest
import sqlalchemy as sa
from fieldlab_director.services import sweep
from fieldlab_director.services.sweep import Sweeper, Swept
from fieldlab_director.store import schema

LABS = ("sqlite", "postgres")
GRACE = 3600.0


def digest_of(data):
    return hashlib.sha256(data).hexdigest()


class Sweep:
    """Sweeps a lab, in which a test says what is old."""

    def __init__(self, lab):
        self.lab = lab
        self.sweeper = Sweeper(lab.store, lab.desk.blobs, replace(lab.settings.limits, blob_grace=GRACE))

    def all(self):
        return self.lab.run(self.sweeper.all())

    def age(self, *blobs):
        """Let some time have gone by since blobs were sent or asked for."""
        for table in (schema.blob_refs, schema.blobs):
            older = sa.update(table).where(table.c.digest.in_([digest_of(data) for data in blobs]))
            self.lab.write(lambda tx, older=older: tx.execute(older.values(created=tx.now - 2 * GRACE)))


@pytest.fixture
def sweeping(lab):
    return Sweep(lab)


def has(http, data):
    return http.get(f"/v1/blobs/{digest_of(data)}").status_code == 200


def forget(lab, experiment):
    e = schema.experiments
    lab.write(lambda tx: tx.execute(sa.delete(e).where(e.c.id == experiment)))


def upload(executor, data):
    path = f"/v1/blobs/{digest_of(data)}"
    return executor.http.put(path, params={"offset": 0, "size": len(data)}, content=data)


def test_a_blob_that_nothing_uses_goes_after_the_grace_and_not_before(ada, sweeping):
    ada.put(b"old"), ada.put(b"young")
    sweeping.age(b"old")
    assert sweeping.all() == Swept(let_go=1, removed=1)
    assert (has(ada.http, b"old"), has(ada.http, b"young")) == (False, True)


def test_a_blob_that_was_just_asked_for_is_kept_for_who_is_about_to_use_it(ada, sweeping):
    ada.put(b"asked")
    sweeping.age(b"asked")
    ada.http.post("/v1/blobs/missing", json={"digests": [digest_of(b"asked")]})
    sweeping.all()
    assert has(ada.http, b"asked")


def test_what_an_experiment_was_submitted_with_stays_until_the_experiment_goes(ada, lab, sweeping):
    experiment = ada.experiment(blobs=(b"input",))
    sweeping.age(b"graph", b"input")
    sweeping.all()
    assert has(ada.http, b"graph")
    assert has(ada.http, b"input")
    forget(lab, experiment)
    sweeping.all()
    assert not has(ada.http, b"graph")
    assert not has(ada.http, b"input")


@pytest.mark.parametrize("value", [False, True])
def test_an_artifact_and_a_spilled_value_stay_until_the_experiment_goes(ada, lab, sweeping, value):
    experiment = ada.experiment()
    executor = lab.launch(experiment)
    executor.claim()
    data = f"made {value}".encode()
    announced = {"step": "s", "name": "a", "size": len(data), "sha256": digest_of(data), "attempt": 1, "value": value}
    assert executor.report((1, "artifact", announced)).status_code == 200
    assert upload(executor, data).json()["complete"] is True
    sweeping.age(data)
    sweeping.all()
    assert has(ada.http, data)
    forget(lab, experiment)
    sweeping.all()
    assert not has(ada.http, data)


def test_an_artifact_that_was_there_before_it_was_announced_stays(ada, lab, sweeping):
    ada.put(b"same")
    executor = lab.launch(ada.experiment())
    executor.claim()
    announced = {"step": "s", "name": "a", "size": 4, "sha256": digest_of(b"same"), "attempt": 1}
    executor.report((1, "artifact", announced))
    sweeping.age(b"same")
    sweeping.all()
    assert has(ada.http, b"same")


def test_what_one_owner_no_longer_has_another_still_has(ada, bob, sweeping):
    ada.put(b"shared"), bob.put(b"shared")
    sweeping.age(b"shared")
    bob.http.post("/v1/blobs/missing", json={"digests": [digest_of(b"shared")]})
    assert sweeping.all() == Swept(let_go=1)
    assert (has(ada.http, b"shared"), has(bob.http, b"shared")) == (False, True)


def test_who_sends_what_is_just_being_removed_is_told_to_send_it_again_and_then_has_it(ada, lab, sweeping, monkeypatch):
    ada.put(b"contested")
    sweeping.age(b"contested")
    shelf = lab.desk.blobs.shelf
    removing, go = threading.Event(), threading.Event()
    remove = shelf.remove

    async def slow(digest):
        removing.set()
        assert await asyncio.to_thread(go.wait, 30)
        await remove(digest)

    monkeypatch.setattr(shelf, "remove", slow)
    swept = lab.begin(sweeping.sweeper.all())
    assert removing.wait(30)
    path, size = f"/v1/blobs/{digest_of(b'contested')}", {"offset": 0, "size": 9}
    meanwhile = ada.http.put(path, params=size, content=b"contested")
    go.set()
    assert swept.result(30).removed == 1
    assert (meanwhile.status_code, meanwhile.json()["code"]) == (503, "unavailable")
    ada.put(b"contested")
    assert has(ada.http, b"contested")


def test_a_sweep_that_was_cut_off_is_ended_by_the_next(ada, lab, sweeping, monkeypatch):
    async def crash(digest):
        raise OSError("the director died here")

    ada.put(b"half gone")
    sweeping.age(b"half gone")
    with monkeypatch.context() as patch:
        patch.setattr(lab.desk.blobs.shelf, "remove", crash)
        with pytest.raises(OSError, match="died"):
            sweeping.all()
    assert Sweep(lab).all() == Swept(removed=1)


def test_bytes_that_no_row_knows_are_removed_once_they_are_old(ada, lab, sweeping, tmp_path, monkeypatch):
    (tmp_path / "stray").write_bytes(b"stray")
    shelf, digest = lab.desk.blobs.shelf, digest_of(b"stray")
    lab.run(shelf.adopt(tmp_path / "stray", digest))
    assert sweeping.all() == Swept()

    async def older(before):
        yield [digest]

    monkeypatch.setattr(shelf, "older", older)
    assert sweeping.all() == Swept(removed=1)
    monkeypatch.undo()
    assert digest not in lab.run(_everything(shelf))


def test_a_round_looks_at_a_bounded_number_of_rows_and_the_rounds_together_at_all(ada, sweeping, monkeypatch):
    monkeypatch.setattr(sweep, "ROWS", 3)
    monkeypatch.setattr(sweep, "REMOVED", 2)
    many = [f"many {number}".encode() for number in range(10)]
    for data in many:
        ada.put(data)
    sweeping.age(*many)
    first = sweeping.lab.run(sweeping.sweeper.round())
    assert first.let_go <= 3
    assert first.removed <= 2
    rest = sweeping.all()
    assert first.let_go + rest.let_go == first.removed + rest.removed == 10


async def _everything(shelf):
    return [digest async for page in shelf.older(4e9) for digest in page]
