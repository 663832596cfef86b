"""Backups: taken under load, restored elsewhere, and the runs go on. On SQLite; PostgreSQL has its own tools."""

from __future__ import annotations

import asyncio
import shutil
import threading
from dataclasses import replace

import pytest
from fieldlab_common.errors import ConfigurationError
from fieldlab_director.__main__ import main
from fieldlab_director.app import open_store
from fieldlab_director.settings import Settings
from fieldlab_director.store import backup as backups
from fieldlab_director.store.backup import backup, restore

STEP = {"step": "s", "state": "running"}


def log(number):
    return number, "log", {"step": "s", "text": f"line {number}\n"}


def take(lab, target):
    return backup(lab.settings.database, lab.settings.complete_blobs, target)


def put_back(source, settings, key_of=None):
    made = restore(source, settings.database, settings.complete_blobs)
    if key_of is not None:
        shutil.copy(key_of.key_file, settings.key_file)
    return made


@pytest.fixture
def elsewhere(lab, tmp_path):
    return replace(lab.settings, data=tmp_path / "elsewhere")


def read(http, experiment, after=0, lane="bulk"):
    return http.get(f"/v1/experiments/{experiment}/records", params={"lane": lane, "after": after}).json()


def test_a_backup_taken_under_load_is_restored_elsewhere_and_the_runs_go_on(ada, lab, make_lab, elsewhere, tmp_path):
    experiment = ada.experiment()
    executor = lab.launch(experiment)
    executor.claim()
    assert executor.report((1, "step", STEP)).status_code == 200
    told, rounds, stop = [], threading.Semaphore(0), threading.Event()

    def load():
        while not stop.is_set():
            number = len(told) + 1
            told.append(executor.report(log(number), lane="bulk").json()["acked"])
            executor.report((number + 1, "event", {"name": "tick", "data": number, "step": "s"}))
            rounds.release()

    loading = threading.Thread(target=load)
    loading.start()
    assert all(rounds.acquire(timeout=60) for _ in range(10))
    take(lab, tmp_path / "backup")
    while rounds.acquire(blocking=False):
        pass
    assert all(rounds.acquire(timeout=60) for _ in range(3))
    stop.set()
    loading.join(60)
    had = ada.http.get(f"/v1/experiments/{experiment}/events", params={"after": 0}).json()
    cursor = read(ada.http, experiment)["cursor"]

    put_back(tmp_path / "backup", elsewhere, lab.settings)
    anew = make_lab(elsewhere.limits, data=elsewhere.data)
    user, again = anew.client(ada.http.headers["authorization"].removeprefix("Bearer ")), executor.on(anew)
    kept = read(user, experiment)["records"]
    events = [
        entry for entry in read(user, experiment, lane="control")["records"] if entry["record"]["kind"] == "event"
    ]
    assert 10 <= len(kept) < len(told)
    assert [entry["number"] for entry in kept] == list(range(1, len(kept) + 1))

    following = len(told) + 2  # as its journal has it, of which everything up to here was acknowledged and removed
    assert again.report(log(following), lane="bulk").json()["acked"] == len(kept)
    missing = following - 1, "gap", {"first": len(kept) + 1, "last": following - 1}
    assert again.report(missing, lane="bulk").json()["acked"] == following - 1
    assert again.report(log(following), lane="bulk").json()["acked"] == following
    ended = {"state": "succeeded", "reason": "completed", "bulk": following}
    gaps = [(number, "gap", {"first": number, "last": number}) for number in range(len(events) + 2, following + 1)]
    assert again.report(*gaps).json()["acked"] == following
    assert again.report((following + 1, "event", {"name": "tock", "step": "s"})).json()["acked"] == following + 1
    assert again.report((following + 2, "ended", ended)).json()["acked"] == following + 2
    fresh = read(user, experiment, cursor)["records"]
    assert "director was restored" in fresh[0]["record"]["body"]["reason"]
    texts = [entry["record"]["body"]["text"] for entry in fresh[1:]]
    assert [text.partition(" are lost")[0] for text in texts if "director was restored" in text] == [
        f"Records {len(events) + 2} to {following} of the lane 'control'",
    ]
    assert f"line {following}\n" in texts
    news = user.get(f"/v1/experiments/{experiment}/events", params={"after": had["cursor"]}).json()["events"]
    assert "tock" in [event["name"] for event in news]
    assert user.get(f"/v1/experiments/{experiment}").json()["state"] == "succeeded"
    assert user.get(f"/v1/blobs/{ada.put(b'graph')}").content == b"graph"


def test_a_journal_that_lost_nothing_goes_on_without_a_word(ada, lab, make_lab, elsewhere, tmp_path):
    experiment = ada.experiment()
    executor = lab.launch(experiment)
    executor.claim()
    executor.report(log(1), lane="bulk")
    take(lab, tmp_path / "backup")
    put_back(tmp_path / "backup", elsewhere, lab.settings)
    anew = make_lab(elsewhere.limits, data=elsewhere.data)
    again = executor.on(anew)
    assert again.report(log(1), log(2), lane="bulk").json()["acked"] == 2
    assert again.report(log(4), lane="bulk").json()["acked"] == 2
    user = anew.client(ada.http.headers["authorization"].removeprefix("Bearer "))
    assert [entry["number"] for entry in read(user, experiment)["records"]] == [1, 2]


def test_a_database_that_was_restored_by_other_means_is_made_ready_likewise(ada, postgres, make_lab, capsys, tmp_path):
    url = postgres.make()
    lab = make_lab(ada.lab.settings.limits, data=tmp_path / "data", database_url=url)
    user = lab.user("ada", "admin")
    user.post("/v1/infrastructures", json={"name": "lab", "spec": {"kind": "local", "body": {"nodes": ["n1"]}}})
    experiment = replace(ada, lab=lab, http=user).experiment()
    executor = lab.launch(experiment)
    executor.claim()
    assert executor.report(log(7), lane="bulk").json()["acked"] == 0
    assert main(["restored", "--data", str(tmp_path / "data"), "--database", url]) == 0
    assert "may go on" in capsys.readouterr().out
    assert executor.report((6, "gap", {"first": 1, "last": 6}), log(7), lane="bulk").json()["acked"] == 7
    (gap, _) = read(user, experiment)["records"]
    assert "director was restored" in gap["record"]["body"]["reason"]


def test_a_director_that_was_restored_without_its_key_says_so(lab, elsewhere, tmp_path):
    take(lab, tmp_path / "backup")
    put_back(tmp_path / "backup", elsewhere)
    with pytest.raises(ConfigurationError, match=r"secret\.key"):
        asyncio.run(open_store(elsewhere))


def test_a_blob_that_went_while_the_backup_was_taken_is_left_out_unless_it_is_used(ada, lab, tmp_path):
    unused = ada.put(b"about to go")
    path = lab.settings.complete_blobs / unused[:2] / unused
    content = path.read_bytes()
    path.unlink()
    before = take(lab, tmp_path / "one").blobs
    path.write_bytes(content)
    ada.experiment(blobs=(b"about to go",))
    assert take(lab, tmp_path / "two").blobs == before + 1
    path.unlink()
    with pytest.raises(ConfigurationError, match=f"{unused}, which an experiment uses"):
        take(lab, tmp_path / "three")
    path.write_bytes(content)


def test_a_backup_that_was_cut_off_is_none(lab, elsewhere, tmp_path, monkeypatch):
    def crash(*_):
        raise OSError("the machine went down here")

    monkeypatch.setattr(backups, "_copy_blobs", crash)
    with pytest.raises(ConfigurationError, match="went down"):
        take(lab, tmp_path / "backup")
    with pytest.raises(ConfigurationError, match="was not ended"):
        put_back(tmp_path / "backup", elsewhere)


def test_a_damaged_backup_is_refused_and_leaves_no_database(lab, elsewhere, tmp_path):
    take(lab, tmp_path / "backup")
    path = tmp_path / "backup" / "director.db"
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 6] = bytes(4096 * 3)
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"damaged|malformed"):
        put_back(tmp_path / "backup", elsewhere)
    assert not elsewhere.database.exists()


def test_nothing_is_written_over(lab, elsewhere, tmp_path):
    take(lab, tmp_path / "backup")
    with pytest.raises(ConfigurationError, match="not empty"):
        take(lab, tmp_path / "backup")
    with pytest.raises(ConfigurationError, match="already"):
        put_back(tmp_path / "backup", lab.settings)
    with pytest.raises(ConfigurationError, match="no backup"):
        put_back(tmp_path, elsewhere)
    with pytest.raises(ConfigurationError, match="give no --blobs"):
        restore(tmp_path / "backup", elsewhere.database, None)


def test_the_commands_say_what_they_did(lab, tmp_path, capsys):
    data, target, there = str(lab.settings.data), str(tmp_path / "backup"), str(tmp_path / "there")
    assert main(["backup", target, "--data", data]) == 0
    assert "It has no key" in capsys.readouterr().out
    assert main(["restore", target, "--data", there]) == 0
    assert "put its key back" in capsys.readouterr().out
    shutil.copy(lab.settings.key_file, Settings(data=tmp_path / "there").key_file)
    assert main(["migrate", "--data", there]) == 0
    assert "tables of this release" in capsys.readouterr().out
    assert main(["gc", "--data", there]) == 0
    assert "0 were removed" in capsys.readouterr().out
    assert main(["backup", target, "--data", data, "--database", "postgresql://x/y"]) == 1
    assert "pg_dump" in capsys.readouterr().err
