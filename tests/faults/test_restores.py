"""A director that was restored from a backup, and executors whose journals it had acknowledged further than that."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fieldlab as fl
import pytest
from fieldlab_common.protocol import Lane, RecordEntry
from fieldlab_director import Embedded, embedded
from fieldlab_director.settings import Settings
from fieldlab_director.store.backup import backup, restore

from .played import DEADLINE, Played, end, numbers, parts

Records = Callable[[fl.Run, Lane], list[RecordEntry]]
BEFORE, AFTER = 20, 300  # records of each lane that the backup has, and that came after it
SEGMENT = 4096


@pytest.fixture
def director(tmp_path: Path) -> Iterator[Embedded]:
    with embedded(tmp_path / "director", nodes=["a"]) as director:
        yield director


def go_back(director: Embedded, source: Path) -> None:
    """Have the director lose its data, and serve what a backup has."""
    end(director)
    settings = Settings(data=director.folder)
    director.folder.rename(director.folder.with_name("lost"))
    restore(source, settings.database, settings.complete_blobs)
    shutil.copy(director.folder.with_name("lost") / settings.key_file.name, settings.key_file)
    director.start()


@pytest.mark.parametrize("news", [(Lane.CONTROL,), tuple(Lane)], ids=["one lane has news", "both have"])
def test_after_a_restore_all_that_the_executors_disk_still_has_arrives_and_the_rest_is_a_gap_that_readers_see(
    director: Embedded, records: Records, tmp_path: Path, news: tuple[Lane, ...]
) -> None:
    run, (part,) = parts(director, fl.Client(director.url, token=director.token), "restored")
    played = Played(part, director.url, tmp_path / "journal", journal_options={"segment_bytes": SEGMENT}).begin()
    settings = Settings(data=director.folder)
    for number in range(1, BEFORE + AFTER + 1):
        if number == BEFORE + 1:
            assert played.link.drain(DEADLINE)
            backup(settings.database, settings.complete_blobs, tmp_path / "backup")
        for lane in Lane:
            played.say(lane, number)
    assert played.link.drain(DEADLINE)
    held = {lane: played.journal.begins(lane) for lane in Lane}
    assert all(BEFORE < first < BEFORE + AFTER for first in held.values())

    go_back(director, tmp_path / "backup")
    last = dict.fromkeys(Lane, BEFORE + AFTER)
    for lane in news:
        last[lane] = played.say(lane, BEFORE + AFTER + 1)
    assert played.link.drain(DEADLINE)
    played.close()

    ours = list(range(1, BEFORE + 1))
    control = numbers(records(run, Lane.CONTROL), part.name)
    assert control == ours + list(range(held[Lane.CONTROL] + 1, last[Lane.CONTROL] + 1))
    logs = [entry for entry in records(run, Lane.BULK) if entry.record.body.get("stream") != "executor"]
    assert [e.number for e in logs] == ours + list(range(held[Lane.BULK], last[Lane.BULK] + 1))
    gap = logs[BEFORE]
    assert (gap.record.kind, gap.record.body["first"]) == ("gap", BEFORE + 1)
    said = [str(line) for line in run.logs()]
    assert sum("chunks of log missing: the director was restored from a backup" in line for line in said) == 1
    lost = f"Records {BEFORE + 1} to {held[Lane.CONTROL]} of the lane 'control' are lost"
    assert sum(lost in line for line in said) == 1
