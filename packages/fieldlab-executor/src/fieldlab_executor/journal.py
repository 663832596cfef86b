"""The spool: everything that an executor reports, on disk before it is on the line.

Two lanes, control and bulk (``protocol.Lane``), each a folder of segments of framed records (``wire.frame``), named
after the number of their first record. ``append`` writes at once, so that what was appended survives the death of the
process; a background thread for each lane syncs in groups, so that it survives the death of the node, and only what is
synced is handed out by ``read``. Acknowledged segments are deleted, but the last one: its name carries the numbers on.

What always holds: numbers only grow, and are never used twice by one journal id; a number that is not on disk any more
is read as part of a gap record. A gap needs no entry of its own: it is where a segment begins later than the one before
it ended. Bulk over its quota, or on a full disk, loses its oldest segments; control never loses any, and has disk set
aside that is released for it when the disk is full.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from fieldlab_common.errors import FieldlabError, InvalidMessage
from fieldlab_common.protocol import GapRecord, Lane, Record
from fieldlab_common.wire import MAX_FRAME, dumps, encode, frame, unframe

__all__ = ["Batch", "Files", "Journal", "JournalError", "JournalFull"]

SEGMENT_BYTES = 1024 * 1024
BULK_QUOTA = 256 * 1024 * 1024
CONTROL_RESERVE = 4 * 1024 * 1024
# Seconds between two syncs; the first record after a pause is synced at once, and so is what somebody waits for.
SYNC_EVERY = {Lane.CONTROL: 0.01, Lane.BULK: 0.1}
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SUFFIX = ".seg"


class JournalError(FieldlabError):
    """The journal's disk failed. What was appended after its last sync may be lost; the deployment cannot go on."""

    code: ClassVar[str] = "journal"
    default_advice: ClassVar[str] = "Check the disk of the node, then run the experiment again."


class JournalFull(JournalError):
    """There is no room for a control record, not even in the space that was set aside."""

    code: ClassVar[str] = "journal_full"
    default_advice: ClassVar[str] = "Free disk space on the node, then run the experiment again."


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Framed records ``first`` to ``last`` of a lane, as they are uploaded."""

    body: bytes
    first: int
    last: int


class Files:
    """What the journal does with files: the seam through which tests let a disk fail."""

    def open(self, path: str) -> int:
        """A descriptor that appends to ``path``, made if it is not there."""
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, data: bytes) -> int:
        """Write; the number of bytes that were written may be less than all."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Return when everything written is on the disk."""
        (getattr(os, "fdatasync", None) or os.fsync)(descriptor)

    def remove(self, path: str) -> bool:
        """Delete a file; whether it was there."""
        try:
            os.unlink(path)
        except OSError:
            return False
        return True

    def reserve(self, path: str, size: int) -> None:
        """Make a file that really takes ``size`` bytes of the disk."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
            else:
                for _ in range(0, size, 65536):
                    os.write(descriptor, bytes(min(65536, size)))
        finally:
            os.close(descriptor)


@dataclass(eq=False)
class _Segment:
    path: str
    first: int
    last: int  # first - 1: it is empty
    size: int = 0
    descriptor: int | None = None


@dataclass(eq=False)
class _Spool:
    """One lane: its segments in order, the last of which is written to."""

    lane: Lane
    path: str
    news: threading.Condition  # wakes its syncing thread
    segments: list[_Segment] = field(default_factory=list)
    written: int = 0  # the last number given out
    synced: int = 0
    acked: int = 0
    note: int | None = None  # the descriptor of the file that says what was acknowledged
    size: int = 0
    dropped: int = 0  # bytes that were dropped, of numbers up to `gap`
    gap: int = 0
    dirty: bool = False  # something was appended since the last sync began
    pending: set[int] = field(default_factory=set)  # descriptors to be synced
    closing: list[int] = field(default_factory=list)  # that only the syncing thread closes, when it has synced them
    new_names: bool = False  # the folder has entries that are not synced
    due: float = 0.0  # not synced again before
    place: tuple[int, str, int] = (0, "", 0)  # where the last read ended: number, file, offset


class Journal:
    """The journal in ``path``, made if it is not there, repaired if a crash left a torn record at its end.

    All methods may be called from any thread. ``quota``: bytes of bulk on disk; ``reserve``: bytes set aside for
    control; ``clock``: seconds since the epoch, for gap records.

    Raises:
        JournalError: the folder cannot be used.
    """

    def __init__(
        self,
        path: str,
        *,
        files: Files | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        quota: int = BULK_QUOTA,
        reserve: int = CONTROL_RESERVE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._files = files or Files()
        self._segment_bytes = segment_bytes
        self._quota = max(quota, 2 * segment_bytes)
        self._reserve_bytes = reserve
        self._reserved = False
        self._clock = clock
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._listeners: list[Callable[[Lane, int], None]] = []
        self._fault: OSError | None = None
        self._closed = False
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
            self.id = self._identity()
            self._spools = {lane: self._open(lane) for lane in Lane}
        except OSError as error:
            raise JournalError(f"The journal in {path} cannot be opened: {error}.") from error
        self._make_reserve()
        # A thread each: on a slow disk the sync of a megabyte of logs takes long, and no event is to wait for it.
        self._threads = [
            threading.Thread(target=self._sync_loop, args=(spool,), name=f"journal-{lane.value}", daemon=True)
            for lane, spool in self._spools.items()
        ]
        for thread in self._threads:
            thread.start()

    # --- what the supervisor and the link call

    def append(self, lane: Lane, *records: bytes) -> int:
        """Append records (the JSON of a ``protocol.Record`` each) with one write; the number of the last.

        Bulk records that find no room are dropped, and are part of a gap; of control, all are kept or none.

        Raises:
            JournalFull: no room is left for a control record. JournalError: the disk failed.
            InvalidMessage: the record is longer than a frame may be.
        """
        if (longest := max(map(len, records))) > MAX_FRAME:
            raise InvalidMessage(f"A record of {longest} bytes is over the limit of {MAX_FRAME}.")
        with self._wake:
            self._check()
            spool = self._spools[lane]
            first = spool.written + 1
            spool.written += len(records)
            self._store(spool, first, b"".join(map(frame, range(first, spool.written + 1), records)))
            if not spool.dirty:
                spool.dirty = True
                spool.news.notify()
            return spool.written

    def hurry(self, lane: Lane) -> None:
        """Have what was appended to the lane synced now, not with what comes in the next moments."""
        spool = self._spools[lane]
        with spool.news:
            spool.due = 0.0
            spool.news.notify()

    def synced(self, lane: Lane) -> int:
        """The number up to which the lane is on disk."""
        with self._lock:
            return self._spools[lane].synced

    def written(self, lane: Lane) -> int:
        """The number of the last record."""
        with self._lock:
            return self._spools[lane].written

    def acked(self, lane: Lane) -> int:
        """The number up to which the lane was acknowledged."""
        with self._lock:
            return self._spools[lane].acked

    def listen(self, listener: Callable[[Lane, int], None]) -> None:
        """Have ``listener(lane, number)`` called, by a syncing thread, whenever a lane was synced up to ``number``.

        It is also called, with the number as it was, when the disk fails: the next call here raises then.
        """
        with self._lock:
            self._listeners.append(listener)

    def sync(self, timeout: float) -> bool:
        """Wait until everything that was appended is on disk; False if ``timeout`` seconds pass before."""
        with self._wake:
            targets = [(spool, spool.written) for spool in self._spools.values()]
            for spool in self._spools.values():
                spool.due = 0.0
                spool.news.notify()
            done = self._wake.wait_for(
                lambda: self._fault is not None or all(spool.synced >= number for spool, number in targets), timeout
            )
            self._check()
            return done

    def read(self, lane: Lane, after: int, max_bytes: int) -> Batch | None:
        """Synced records that follow on ``after``: at least one, then as many as ``max_bytes`` hold. None: none."""
        with self._lock:
            spool = self._spools[lane]
            synced = spool.synced
            if after >= synced:
                return None
            segment = next((s for s in spool.segments if s.last > after), None)
            if segment is None or segment.first > after + 1:
                return self._gap(spool, after + 1, synced if segment is None else min(segment.first - 1, synced))
            path, size, last = segment.path, segment.size, min(segment.last, synced)
            offset = spool.place[2] if spool.place[:2] == (after, path) else 0
        batch, offset = _read(path, offset, size, after, last, max_bytes)
        with self._lock:
            if batch is None:  # it was deleted meanwhile, or the disk gave back something else than was written
                return self._gap(spool, after + 1, last)
            spool.place = (batch.last, path, offset)
            return batch

    def instead(self, lane: Lane, number: int) -> Batch:
        """What can be sent in place of a record that cannot: it says that the record will not come."""
        with self._lock:
            return self._gap(self._spools[lane], number, number)

    def begins(self, lane: Lane) -> int:
        """The number after which there is something on disk: the director has, or had, everything up to it."""
        with self._lock:
            segments = self._spools[lane].segments
            return segments[0].first - 1 if segments else 0

    def behind(self, lane: Lane, after: int) -> bool:
        """Whether what follows on ``after`` has grown beyond one segment."""
        with self._lock:
            segments = self._spools[lane].segments
            return bool(segments) and segments[-1].first > after

    def acknowledge(self, lane: Lane, number: int) -> None:
        """Note that everything up to ``number`` is the director's, and delete the segments that nobody needs now."""
        with self._lock:
            spool = self._spools[lane]
            number = min(number, spool.synced)
            if number <= spool.acked:
                return
            spool.acked = number
            if number >= spool.gap:
                spool.dropped = 0
            while len(spool.segments) > 1 and spool.segments[0].last <= number:
                self._delete(spool, spool.segments[0])
            self._save_acked(spool)
            if not self._reserved:
                self._make_reserve()

    def close(self) -> None:
        """Sync what is left, and let go of the files."""
        with self._wake:
            self._closed = True
            for spool in self._spools.values():
                spool.news.notify()
        for thread in self._threads:
            thread.join()
        for spool in self._spools.values():
            spool.closing += [s.descriptor for s in spool.segments if s.descriptor is not None]
            for segment in spool.segments:
                segment.descriptor = None
            for descriptor in spool.closing:
                os.close(descriptor)
            spool.closing = []
            if spool.note is not None:
                os.close(spool.note)
                spool.note = None

    # --- opening

    def _identity(self) -> str:
        path = os.path.join(self._path, "id")
        try:
            with open(path, encoding="ascii") as file:
                if found := file.read().strip():
                    return found
        except FileNotFoundError:
            pass
        made = os.urandom(16).hex()
        with open(path + ".new", "w", encoding="ascii") as file:
            file.write(made)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
        _sync_folder(self._path)
        return made

    def _open(self, lane: Lane) -> _Spool:
        spool = _Spool(lane, os.path.join(self._path, lane.value), threading.Condition(self._lock))
        os.makedirs(spool.path, mode=0o700, exist_ok=True)
        spool.acked, spool.dropped = _read_acked(spool.path)
        names = sorted(n for n in os.listdir(spool.path) if n.endswith(_SUFFIX) and n[: -len(_SUFFIX)].isdigit())
        numbers = [int(name[: -len(_SUFFIX)]) for name in names]
        for name, first, following in zip(names, numbers, [*numbers[1:], 0], strict=False):
            path = os.path.join(spool.path, name)
            last = following - 1 if following else _repair(path, first)
            spool.segments.append(_Segment(path, first, last, os.path.getsize(path)))
        spool.size = sum(segment.size for segment in spool.segments)
        spool.gap = spool.segments[0].first - 1 if spool.segments else 0
        spool.written = spool.synced = max(spool.segments[-1].last if spool.segments else 0, spool.acked)
        for segment in spool.segments:  # whether it was ever synced is not known
            descriptor = self._files.open(segment.path)
            self._files.sync(descriptor)
            os.close(descriptor)
        return spool

    def _make_reserve(self) -> None:
        if not self._reserve_bytes:
            return
        try:
            self._files.reserve(os.path.join(self._path, "reserve"), self._reserve_bytes)
            self._reserved = True
        except OSError:  # a full disk: control goes on for as long as there is room at all
            self._files.remove(os.path.join(self._path, "reserve"))

    # --- writing (with the lock)

    def _check(self) -> None:
        if self._fault is not None:
            raise JournalError(f"The journal in {self._path} could not be synced: {self._fault}.") from self._fault
        if self._closed:
            raise JournalError(f"The journal in {self._path} is closed.")

    def _store(self, spool: _Spool, first: int, data: bytes) -> None:
        """Write the frames from number ``first`` on, making room as far as that is possible."""
        while True:
            try:
                self._write(spool, first, data)
                break
            except OSError as error:
                if error.errno not in _FULL:
                    self._fault = error
                    self._check()
                if self._make_room(spool.lane):
                    continue
                if spool.lane is Lane.BULK:
                    spool.dropped += len(data)
                    spool.gap = spool.written
                    return
                spool.written = first - 1
                raise JournalFull(f"The journal in {self._path} is full: {error}.") from error
        if spool.lane is Lane.BULK:
            while spool.size > self._quota and len(spool.segments) > 1:
                self._drop(spool)

    def _write(self, spool: _Spool, first: int, data: bytes) -> None:
        segment = self._current(spool, first, len(data))
        assert segment.descriptor is not None
        begun = segment.size
        done = 0
        try:
            while done < len(data):
                done += self._files.write(segment.descriptor, data[done:])
        except OSError:
            if done:
                os.ftruncate(segment.descriptor, begun)
            raise
        segment.size += done
        segment.last = spool.written
        spool.size += done
        spool.pending.add(segment.descriptor)

    def _current(self, spool: _Spool, first: int, size: int) -> _Segment:
        """The segment that record ``first`` goes to: a new one when the last is full, or ended before a gap."""
        last = spool.segments[-1] if spool.segments else None
        if last is None or last.last + 1 != first or (last.size and last.size + size > self._segment_bytes):
            path = os.path.join(spool.path, f"{first:016d}{_SUFFIX}")
            segment = _Segment(path, first, first - 1, descriptor=self._files.open(path))
            if last is not None and last.descriptor is not None:
                spool.closing.append(last.descriptor)
                last.descriptor = None
            spool.segments.append(segment)
            spool.new_names = True
            return segment
        if last.descriptor is None:
            last.descriptor = self._files.open(last.path)
        return last

    def _make_room(self, lane: Lane) -> bool:
        bulk = self._spools[Lane.BULK]
        if len(bulk.segments) > 1:
            self._drop(bulk)
            return True
        if lane is Lane.CONTROL and self._reserved:
            self._reserved = False
            return self._files.remove(os.path.join(self._path, "reserve"))
        return False

    def _drop(self, spool: _Spool) -> None:
        oldest = spool.segments[0]
        spool.dropped += oldest.size
        spool.gap = max(spool.gap, oldest.last)
        self._delete(spool, oldest)
        self._save_acked(spool)

    def _delete(self, spool: _Spool, segment: _Segment) -> None:
        spool.segments.remove(segment)
        spool.size -= segment.size
        if segment.descriptor is not None:
            spool.closing.append(segment.descriptor)
            segment.descriptor = None
        self._files.remove(segment.path)

    def _save_acked(self, spool: _Spool) -> None:
        # Not synced, and it may fail: a number that is too low makes the director pass over what it has already.
        # Always of one length, into one file that stays open: to cut a file and write it anew costs more than a step.
        try:
            if spool.note is None:
                spool.note = os.open(os.path.join(spool.path, "acked"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.pwrite(spool.note, b"%20d %20d\n" % (spool.acked, spool.dropped), 0)
        except OSError:
            return

    # --- reading what is not there

    def _gap(self, spool: _Spool, first: int, last: int) -> Batch:
        """Gap records in place of records ``first`` to ``last``.

        In the control lane nothing is ever dropped: there it means a damaged disk, or a record that gets through to
        nobody. The director refuses each of these numbers visibly and goes on with the next.
        """
        if spool.lane is Lane.BULK:
            return Batch(body=frame(last, self._gap_record(first, last, spool.dropped)), first=first, last=last)
        last = min(last, first + 999)
        frames = [frame(number, self._gap_record(number, number, 0)) for number in range(first, last + 1)]
        return Batch(body=b"".join(frames), first=first, last=last)

    def _gap_record(self, first: int, last: int, size: int) -> bytes:
        body = encode(GapRecord(first=first, last=last, bytes=size))
        return dumps(Record(kind="gap", at=self._clock(), body=body))

    # --- the syncing threads, one for each lane

    def _sync_loop(self, spool: _Spool) -> None:
        while self._wait_until_due(spool):
            with self._wake:
                pending, spool.pending = spool.pending, set()
                closing, spool.closing = spool.closing, []
                target, spool.dirty = spool.written, False
                folder, spool.new_names = spool.path if spool.new_names else None, False
                spool.due = float("inf")  # a hurry that comes during the sync is for what comes during the sync
            fault = self._sync_files(pending, folder)
            with self._wake:
                if fault is None:
                    spool.synced = target
                else:
                    self._fault = fault
                spool.due = min(spool.due, time.monotonic() + SYNC_EVERY[spool.lane])
                synced, listeners = spool.synced, list(self._listeners)
                self._wake.notify_all()
            for descriptor in closing:
                os.close(descriptor)
            for listener in listeners:
                listener(spool.lane, synced)
            if fault is not None:
                return

    def _wait_until_due(self, spool: _Spool) -> bool:
        """Wait until the lane is to be synced; False: the journal is closed and all of it is."""
        with spool.news:
            while True:
                dirty = spool.dirty or spool.pending
                now = time.monotonic()
                if dirty and (self._closed or spool.due <= now):
                    return True
                if self._closed:
                    return False
                spool.news.wait(spool.due - now if dirty else None)

    def _sync_files(self, descriptors: set[int], folder: str | None) -> OSError | None:
        try:
            for descriptor in descriptors:
                self._files.sync(descriptor)
            if folder is not None:
                _sync_folder(folder)
        except (
            OSError
        ) as error:  # after a failed sync the kernel may have forgotten what it did not write: no second try
            return error
        return None


# --- files ------------------------------------------------------------------------------------------------------------


def _read(path: str, offset: int, size: int, after: int, last: int, most: int) -> tuple[Batch | None, int]:
    """The frames of numbers ``after`` + 1 to ``last`` that ``most`` bytes hold, and where they end in the file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None, 0
    try:
        while True:
            data = os.pread(descriptor, min(most, size - offset), offset)
            begin, end, first, number = _cut(data, after, last)
            if number:
                return Batch(body=data[begin:end], first=first, last=number), offset + end
            if end:  # all of these came before
                offset += end
            elif most < size - offset:  # one record is longer
                most = size - offset
            else:
                return None, 0
    except OSError:
        return None, 0
    finally:
        os.close(descriptor)


def _cut(data: bytes, after: int, last: int) -> tuple[int, int, int, int]:
    """Where the wanted frames begin and end in ``data``, and the first and last number among them (0: none)."""
    begin = end = first = number = 0
    try:
        for found, _, position in unframe(data):
            if found > last:
                break
            if found <= after:
                begin = position
            else:
                first, number = first or found, found
            end = position
    except InvalidMessage:  # the disk gave back something else than was written
        pass
    return begin, end, first, number


def _repair(path: str, first: int) -> int:
    """Cut off a torn record at the end of the last segment; the number of the last whole one."""
    with open(path, "r+b") as file:
        data = file.read()
        last, end = first - 1, 0
        try:
            for number, _, position in unframe(data):
                if number != last + 1:
                    break
                last, end = number, position
        except InvalidMessage:  # torn in the middle of a page: the rest never was synced
            pass
        if end < len(data):
            file.truncate(end)
    return last


def _read_acked(folder: str) -> tuple[int, int]:
    try:
        with open(os.path.join(folder, "acked"), encoding="ascii") as file:
            acked, dropped = file.read().split()
            return int(acked), int(dropped)
    except (OSError, ValueError):  # not there yet, or cut: the director passes over what it has already
        return 0, 0


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
