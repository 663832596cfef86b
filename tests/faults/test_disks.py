"""A full disk, on a node and at the director: small file systems of their own, filled to the last byte."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import fieldlab as fl
import pytest
from fieldlab_common.protocol import Lane, RecordEntry
from fieldlab_director import Embedded, embedded

from .played import DEADLINE, Played, end, numbers, parts
from .proxy import Line

Records = Callable[[fl.Run, Lane], list[RecordEntry]]
Small = Callable[[int], Path]
COUNT = 300


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    """File systems of so many megabytes, in memory."""
    made: list[Path] = []

    def make(megabytes: int) -> Path:
        path = tmp_path_factory.mktemp("disk")
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
        made.append(path)
        return path

    yield make
    for path in made:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Take all the room that there is; the file that has it."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return filler


class Cast:
    """A director on a small disk, and the parts of its two nodes."""

    def __init__(self, director: Embedded) -> None:
        self.disk = director.folder.parent
        self.port = urlsplit(director.url).port or 0
        self.run, (self.one, self.other) = parts(director, fl.Client(director.url, token=director.token), "full")


@pytest.fixture(scope="module")
def cast(small: Small) -> Iterator[Cast]:
    with embedded(small(100) / "director", nodes=["a", "b"]) as director:
        yield Cast(director)
        end(director)


def test_with_the_directors_disk_full_nothing_is_acknowledged_and_nothing_lost_and_it_goes_on_when_there_is_room(
    cast: Cast, records: Records, tmp_path: Path
) -> None:
    played = Played(cast.one, f"http://127.0.0.1:{cast.port}", tmp_path / "journal").begin()
    filler = fill(cast.disk)
    for number in range(1, COUNT + 1):
        played.say(Lane.CONTROL, number)
        played.say(Lane.BULK, number)
    assert not played.link.drain(1.0)
    assert played.journal.acked(Lane.CONTROL) < COUNT
    filler.unlink()
    assert played.link.drain(DEADLINE)
    played.close()
    for lane in Lane:
        assert numbers(records(cast.run, lane), cast.one.name) == list(range(1, COUNT + 1))


def test_with_a_nodes_disk_full_logs_make_room_and_control_is_kept_whole(
    cast: Cast, line: Callable[..., Line], records: Records, small: Small
) -> None:
    way, node = line(cast.port), small(2)
    options = {"segment_bytes": 65536, "quota": 1024 * 1024, "reserve": 256 * 1024}
    played = Played(cast.other, way.url, node / "journal", journal_options=options).begin()
    way.down()
    for number in range(1, 10 * COUNT + 1):
        played.say(Lane.BULK, number)
    fill(node)
    for number in range(1, 5 * COUNT + 1):
        played.say(Lane.CONTROL, number)
        played.say(Lane.BULK, number)
    way.up()
    assert played.link.drain(DEADLINE)
    played.close()
    assert numbers(records(cast.run, Lane.CONTROL), cast.other.name) == list(range(1, 5 * COUNT + 1))
    logs = [entry for entry in records(cast.run, Lane.BULK) if entry.deployment == cast.other.name]
    accounted = 0
    for entry in logs:  # each number is a record, or a part of a gap that says so
        assert (entry.record.body["first"] if entry.record.kind == "gap" else entry.number) == accounted + 1
        accounted = entry.number
    assert accounted == 15 * COUNT
    assert "gap" in {entry.record.kind for entry in logs}
