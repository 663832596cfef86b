"""The spool: numbers, syncs, acknowledgements, and what a full disk, a crash and a damaged file do to it."""

import errno
import json
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fieldlab_common.errors import InvalidMessage
from fieldlab_common.protocol import Lane
from fieldlab_common.wire import MAX_FRAME, unframe
from fieldlab_executor.journal import SYNC_EVERY, Batch, Files, Journal, JournalError, JournalFull

CONTROL, BULK = Lane.CONTROL, Lane.BULK
DEADLINE = 20.0


class Disk(Files):
    """A disk of ``room`` bytes, whose syncs can be held up or made to fail."""

    def __init__(self, room: int = 1 << 40) -> None:
        self.room = room
        self.freed = 0  # what each deleted file gives back
        self.syncs = 0
        self.may_sync = threading.Event()
        self.may_sync.set()
        self.broken = False

    def write(self, descriptor: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = super().write(descriptor, data[: self.room])
        self.room -= done
        return done

    def sync(self, descriptor: int) -> None:
        assert self.may_sync.wait(DEADLINE)
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        self.syncs += 1
        super().sync(descriptor)

    def remove(self, path: str) -> bool:
        removed = super().remove(path)
        self.room += self.freed if removed else 0
        return removed

    def reserve(self, path: str, size: int) -> None:
        if size > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().reserve(path, size)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "journal")


@pytest.fixture
def journal(path: str) -> Iterator[Journal]:
    made = Journal(path, segment_bytes=100, quota=400, clock=lambda: 7.0)
    yield made
    made.close()


def fill(journal: Journal, lane: Lane, count: int, size: int = 10) -> None:
    for _ in range(count):
        number = journal.written(lane) + 1
        assert journal.append(lane, b"%0*d" % (size, number)) == number
    assert journal.sync(DEADLINE)


def numbers(batch: Batch | None) -> list[int]:
    assert batch is not None
    found = [number for number, _, _ in unframe(batch.body)]
    assert (found[0], found[-1]) == (batch.first, batch.last)
    return found


def everything(journal: Journal, lane: Lane, after: int = 0, most: int = 90) -> list[tuple[int, bytes]]:
    found = []
    while (batch := journal.read(lane, after, most)) is not None:
        found += [(number, body) for number, body, _ in unframe(batch.body)]
        assert batch.last > after
        after = batch.last
    return found


def segments(path: str, lane: Lane) -> list[str]:
    return sorted(name for name in os.listdir(os.path.join(path, lane.value)) if name.endswith(".seg"))


def test_each_lane_counts_from_one_and_gives_back_what_it_was_given(journal: Journal) -> None:
    fill(journal, CONTROL, 30)
    fill(journal, BULK, 3)
    assert everything(journal, CONTROL) == [(n, b"%010d" % n) for n in range(1, 31)]
    assert [n for n, _ in everything(journal, BULK)] == [1, 2, 3]


def test_nothing_is_read_before_it_is_synced(path: str) -> None:
    disk = Disk()
    journal = Journal(path, files=disk)
    disk.may_sync.clear()
    journal.append(CONTROL, b"x")
    assert journal.synced(CONTROL) == 0
    assert journal.read(CONTROL, 0, 100) is None
    disk.may_sync.set()
    assert journal.sync(DEADLINE)
    assert numbers(journal.read(CONTROL, 0, 100)) == [1]
    journal.close()


def test_what_comes_during_a_sync_is_synced_by_one_more(path: str) -> None:
    disk = Disk()
    journal = Journal(path, files=disk)
    disk.may_sync.clear()
    for _ in range(500):
        journal.append(CONTROL, b"x")
    disk.may_sync.set()
    assert journal.sync(DEADLINE)
    assert disk.syncs <= 2
    journal.close()


def test_a_sync_of_logs_that_takes_long_does_not_hold_up_control(path: str) -> None:
    class SlowForLogs(Disk):
        def open(self, path: str) -> int:
            descriptor = super().open(path)
            if BULK.value in path.split(os.sep):
                self.logs = descriptor
            return descriptor

        def sync(self, descriptor: int) -> None:
            if descriptor == self.logs:
                at_it.set()
                assert go_on.wait(DEADLINE)
            super().sync(descriptor)

    at_it, go_on = threading.Event(), threading.Event()
    journal = Journal(path, files=SlowForLogs())
    synced = queue.Queue[tuple[Lane, int]]()
    journal.listen(lambda *what: synced.put(what))
    journal.append(BULK, b"x")
    assert at_it.wait(DEADLINE)
    journal.append(CONTROL, b"x")
    assert synced.get(timeout=DEADLINE) == (CONTROL, 1)
    assert journal.synced(BULK) == 0
    go_on.set()
    assert synced.get(timeout=DEADLINE) == (BULK, 1)
    journal.close()


def test_what_somebody_waits_for_is_synced_at_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYNC_EVERY, CONTROL, 1e6)
    journal = Journal(path)
    synced = queue.Queue[int]()
    journal.listen(lambda lane, number: synced.put(number))
    for number in (1, 2, 3):
        journal.append(CONTROL, b"x")
        journal.hurry(CONTROL)
        while synced.get(timeout=DEADLINE) < number:
            pass
    journal.close()


def test_listeners_hear_of_every_sync(journal: Journal) -> None:
    heard: queue.Queue[tuple[Lane, int]] = queue.Queue()
    journal.listen(lambda *synced: heard.put(synced))
    fill(journal, CONTROL, 5)
    while heard.get(timeout=DEADLINE) != (CONTROL, 5):
        pass


def test_a_batch_has_at_least_one_record_and_no_more_bytes_than_asked_for(journal: Journal) -> None:
    fill(journal, CONTROL, 1, size=5_000)
    fill(journal, CONTROL, 4, size=10)
    assert numbers(journal.read(CONTROL, 0, 64)) == [1]
    batch = journal.read(CONTROL, 1, 64)
    assert numbers(batch) == [2, 3]
    assert batch is not None
    assert len(batch.body) <= 64
    assert numbers(journal.read(CONTROL, 2, 1000)) == [3, 4]  # from the middle of what was read before


def test_a_record_that_no_frame_holds_is_refused(journal: Journal) -> None:
    with pytest.raises(InvalidMessage):
        journal.append(CONTROL, bytes(MAX_FRAME + 1))
    assert journal.append(CONTROL, b"x") == 1


def test_acknowledged_segments_are_deleted_and_the_last_is_kept(journal: Journal, path: str) -> None:
    fill(journal, CONTROL, 12)
    assert len(segments(path, CONTROL)) == 4
    journal.acknowledge(CONTROL, 7)
    assert segments(path, CONTROL)[0] == f"{7:016d}.seg"
    journal.acknowledge(CONTROL, 12)
    assert len(segments(path, CONTROL)) == 1
    assert journal.acked(CONTROL) == 12


def test_an_acknowledgement_never_goes_back_nor_beyond_what_is_synced(journal: Journal) -> None:
    fill(journal, CONTROL, 5)
    journal.acknowledge(CONTROL, 99)
    assert journal.acked(CONTROL) == 5
    journal.acknowledge(CONTROL, 3)
    assert journal.acked(CONTROL) == 5


def test_reopening_keeps_id_numbers_and_acknowledgements(path: str) -> None:
    first = Journal(path, segment_bytes=100)
    fill(first, CONTROL, 12)
    first.acknowledge(CONTROL, 12)
    first.close()
    second = Journal(path, segment_bytes=100)
    assert second.id == first.id
    assert second.acked(CONTROL) == 12
    assert second.append(CONTROL, b"x") == 13
    second.close()


def test_two_journals_have_different_ids(tmp_path: Path) -> None:
    one, two = Journal(str(tmp_path / "1")), Journal(str(tmp_path / "2"))
    assert one.id != two.id
    one.close()
    two.close()


@pytest.mark.parametrize("cut", [1, 10, 16, 25])
def test_a_torn_tail_is_cut_off_and_its_number_is_used_again(path: str, cut: int) -> None:
    journal = Journal(path)
    fill(journal, CONTROL, 3)
    journal.close()
    name = os.path.join(path, "control", segments(path, CONTROL)[-1])
    os.truncate(name, os.path.getsize(name) - cut)
    again = Journal(path)
    assert [n for n, _ in everything(again, CONTROL)] == [1, 2]
    assert again.append(CONTROL, b"again") == 3
    assert again.sync(DEADLINE)
    assert everything(again, CONTROL)[-1] == (3, b"again")
    again.close()


def test_garbage_behind_the_last_record_is_cut_off(path: str) -> None:
    journal = Journal(path)
    fill(journal, CONTROL, 3)
    journal.close()
    with open(os.path.join(path, "control", segments(path, CONTROL)[-1]), "ab") as file:
        file.write(b"\xff" * 100)
    again = Journal(path)
    assert [n for n, _ in everything(again, CONTROL)] == [1, 2, 3]
    again.close()


def test_a_lost_acknowledgement_file_costs_nothing_but_a_gap_that_the_director_has_already(path: str) -> None:
    journal = Journal(path, segment_bytes=100)
    fill(journal, BULK, 12)
    journal.acknowledge(BULK, 12)
    journal.close()
    os.truncate(os.path.join(path, "bulk", "acked"), 0)
    again = Journal(path, segment_bytes=100)
    assert again.written(BULK) == 12
    assert everything(again, BULK)[0][0] < 12
    assert json.loads(everything(again, BULK)[0][1])["kind"] == "gap"
    again.close()


def test_bulk_over_its_quota_drops_its_oldest_into_one_gap_record(journal: Journal, path: str) -> None:
    fill(journal, BULK, 100)
    assert sum(os.path.getsize(os.path.join(path, "bulk", n)) for n in segments(path, BULK)) <= 400
    (number, gap), *rest = everything(journal, BULK)
    record = json.loads(gap)
    assert record["kind"] == "gap"
    assert record["at"] == 7.0
    assert record["body"]["first"] == 1
    assert record["body"]["last"] == number
    assert record["body"]["bytes"] == number * 26
    assert [n for n, _ in rest] == list(range(number + 1, 101))


def test_a_gap_begins_after_what_was_acknowledged(journal: Journal) -> None:
    fill(journal, BULK, 6)
    journal.acknowledge(BULK, 5)
    fill(journal, BULK, 60)
    gap = json.loads(everything(journal, BULK, after=5)[0][1])
    assert gap["body"]["first"] == 6


def test_control_has_no_quota(journal: Journal) -> None:
    fill(journal, CONTROL, 500)
    assert [n for n, _ in everything(journal, CONTROL)] == list(range(1, 501))


def test_on_a_full_disk_bulk_is_dropped_and_becomes_a_gap(path: str) -> None:
    disk = Disk()
    journal = Journal(path, files=disk, reserve=0)
    fill(journal, BULK, 2)
    disk.room = 30  # one record, and a piece of the next
    fill(journal, BULK, 2)
    disk.room = 1000
    fill(journal, BULK, 1)
    found = everything(journal, BULK)
    assert [n for n, _ in found] == [1, 2, 3, 4, 5]
    assert json.loads(found[3][1])["body"] == {"first": 4, "last": 4, "bytes": 26}
    journal.close()


def test_on_a_full_disk_control_takes_the_room_of_bulk_first(path: str) -> None:
    disk = Disk()
    journal = Journal(path, files=disk, segment_bytes=100, quota=10_000)
    fill(journal, BULK, 20)
    before = len(segments(path, BULK))
    disk.room, disk.freed = 0, 100
    fill(journal, CONTROL, 3)
    assert len(segments(path, BULK)) == before - 1
    assert os.path.exists(os.path.join(path, "reserve"))
    journal.close()


def test_then_control_takes_what_was_reserved_and_then_says_that_it_is_full(path: str) -> None:
    disk = Disk()
    journal = Journal(path, files=disk)
    disk.room, disk.freed = 0, 100
    fill(journal, CONTROL, 3)
    assert not os.path.exists(os.path.join(path, "reserve"))
    with pytest.raises(JournalFull, match="full"):
        journal.append(CONTROL, b"%010d" % 4)
    disk.room = 1000
    fill(journal, CONTROL, 1)  # the number of what was refused is not lost
    assert [n for n, _ in everything(journal, CONTROL)] == [1, 2, 3, 4]
    journal.close()


def test_the_reserve_is_made_again_when_there_is_room(path: str) -> None:
    disk = Disk()
    journal = Journal(path, files=disk, reserve=1000)
    disk.room, disk.freed = 0, 100
    fill(journal, CONTROL, 3)
    disk.room = 5000
    journal.acknowledge(CONTROL, 3)
    assert os.path.getsize(os.path.join(path, "reserve")) == 1000
    journal.close()


def test_a_disk_that_fails_to_sync_ends_the_journal(path: str) -> None:
    disk = Disk()
    journal = Journal(path, files=disk)
    heard = threading.Event()
    journal.listen(lambda lane, number: heard.set())
    disk.broken = True
    journal.append(CONTROL, b"x")
    assert heard.wait(DEADLINE)
    with pytest.raises(JournalError, match="Input/output"):
        journal.append(CONTROL, b"y")
    assert journal.read(CONTROL, 0, 100) is None
    journal.close()


def test_a_damaged_segment_becomes_records_that_are_refused_one_by_one(path: str) -> None:
    journal = Journal(path, segment_bytes=100)
    fill(journal, CONTROL, 9)
    with open(os.path.join(path, "control", segments(path, CONTROL)[1]), "r+b") as file:
        file.seek(40)
        file.write(b"\xff" * 8)
    found = everything(journal, CONTROL)
    assert [n for n, _ in found] == list(range(1, 10))
    assert [n for n, body in found if body.startswith(b"{")] == [5, 6]
    journal.close()


def test_a_closed_journal_takes_nothing(journal: Journal) -> None:
    journal.close()
    with pytest.raises(JournalError, match="closed"):
        journal.append(CONTROL, b"x")


def test_closing_syncs_what_is_left_and_leaves_no_descriptor_open(path: str) -> None:
    before = len(os.listdir("/dev/fd"))
    journal = Journal(path, segment_bytes=100)
    for _ in range(50):
        journal.append(BULK, b"x" * 20)
        journal.append(CONTROL, b"x" * 20)
    journal.close()
    assert journal.synced(BULK) == journal.synced(CONTROL) == 50
    assert len(os.listdir("/dev/fd")) == before


def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match="cannot be opened"):
        Journal(str(tmp_path / "file" / "journal"))
