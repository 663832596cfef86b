"""What an executor uploads, read into records: pure, and done before a transaction begins.

Nothing that an executor sends may hold up what it sends next. So a record that cannot be taken becomes a ``Refusal``,
which counts as dealt with; a kind that this release does not know is kept as it came; and a number that is not the next
one ends the reading: what comes after a gap is asked for again.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from fieldlab_common.context import check_artifact_name
from fieldlab_common.errors import ArtifactNameError, InvalidRequest
from fieldlab_common.events import BARRIER, MAX_EVENT_BYTES, RESERVED_PREFIX
from fieldlab_common.lifecycle import DeploymentState
from fieldlab_common.protocol import (
    CONTROL_KINDS,
    RECORDS,
    ArtifactRecord,
    Ended,
    EventRecord,
    GapRecord,
    Lane,
    Record,
    Refusal,
)
from fieldlab_common.wire import FRAME, MAX_FRAME

__all__ = ["MAX_DEPTH", "Entry", "Upload", "read_upload", "too_deep"]

_RECORD = msgspec.json.Decoder(Record)
_MAX_NAME = 200
MAX_DEPTH = 500  # levels of lists and objects: half of what Python's own codec reads, wherever it is called from
_MAX_NUMBER = 2**53  # what JSON numbers, and the columns of all databases, hold exactly
_ENDS = (DeploymentState.SUCCEEDED, DeploymentState.FAILED, DeploymentState.CANCELLED)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One record to be stored: ``data`` as it came, ``body`` decoded, or None when its kind is unknown.

    ``through`` is the number up to which it accounts for: its own, or more for a gap.
    """

    number: int
    through: int
    at: float
    data: bytes
    body: Any = None


@dataclass(frozen=True, kw_only=True)
class Upload:
    """The records of one upload, in order, each either an entry or a refusal."""

    lane: Lane
    entries: tuple[Entry | Refusal, ...]

    def after(self, acked: int) -> Iterator[Entry | Refusal]:
        """Those that follow on ``acked`` without a gap; what was taken before is passed over."""
        for entry in self.entries:
            if isinstance(entry, Entry) and isinstance(entry.body, GapRecord):
                if entry.body.first > acked + 1:
                    return
            elif entry.number > acked + 1:
                return
            through = entry.through if isinstance(entry, Entry) else entry.number
            if through > acked:
                yield entry
                acked = through


def read_upload(lane: Lane, body: bytes) -> Upload:
    """Read the frames of one upload.

    Raises:
        InvalidRequest: it does not begin with a frame.
    """
    entries = tuple(_read(lane, number, data) for number, data in _frames(body))
    if body and not entries:
        raise InvalidRequest("The body is not a sequence of journal records.", details={"path": "body"})
    return Upload(lane=lane, entries=entries)


def too_deep(value: Any) -> bool:
    """Whether JSON data is nested deeper than ``MAX_DEPTH``: nobody could read it, nor what stands on its page."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()


def _frames(body: bytes) -> Iterator[tuple[int, bytes | str]]:
    """(number, its bytes, or why they cannot be taken). A cut frame at the end is left for the next upload."""
    offset = 0
    while offset + FRAME.size <= len(body):
        length, crc, number = FRAME.unpack_from(body, offset)
        end = offset + FRAME.size + length
        if length > MAX_FRAME:
            yield number, f"it has {length} bytes, more than the {MAX_FRAME} that a record may have"
        elif end > len(body):
            return
        else:
            data = body[offset + FRAME.size : end]
            damaged = zlib.crc32(data, number & 0xFFFFFFFF) != crc
            yield number, "it does not match its checksum" if damaged else data
        offset = end


def _read(lane: Lane, number: int, data: bytes | str) -> Entry | Refusal:
    if isinstance(data, str):
        return Refusal(number=number, message=f"Record {number} was refused: {data}.")
    try:
        data.decode()  # also what no field takes must be text, or nobody could read the page that it stands in
        record = _RECORD.decode(data)
        if data.count(b"[") + data.count(b"{") > MAX_DEPTH and too_deep(record.body):
            raise _Refused(f"it is nested more than {MAX_DEPTH} levels deep")
        body = _body(lane, record)
        _check(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ArtifactNameError, _Refused) as error:
        return Refusal(number=number, message=f"Record {number} was refused: {error}.")
    through = max(number, body.last) if isinstance(body, GapRecord) else number
    return Entry(number=number, through=through, at=record.at, data=data, body=body)


class _Refused(ValueError):
    """The record has the form, and still cannot be taken."""


def _body(lane: Lane, record: Record) -> Any:
    cls = RECORDS.get(record.kind)
    if cls is None:
        return None
    if cls is GapRecord and lane is Lane.CONTROL:
        raise _Refused("its node cannot give it: the disk is damaged, or a proxy lets nothing so long through")
    if (record.kind in CONTROL_KINDS) is not (lane is Lane.CONTROL):
        raise _Refused(f"a record of kind {record.kind!r} does not go by the lane {lane.value!r}")
    return msgspec.convert(record.body, cls)


def _check(body: Any) -> None:
    _check_columns(body)
    if isinstance(body, EventRecord):
        if body.name.startswith(RESERVED_PREFIX) and body.name != BARRIER:
            raise _Refused(f"event names that begin with {RESERVED_PREFIX!r} are fieldlab's own")
        if not body.name or len(body.name) > _MAX_NAME:
            raise _Refused(f"the name of an event has 1 to {_MAX_NAME} characters")
        if len(msgspec.json.encode(body.data)) > MAX_EVENT_BYTES:
            raise _Refused(f"the data of event {body.name!r} is over {MAX_EVENT_BYTES} bytes; use an artifact")
    elif isinstance(body, ArtifactRecord):
        check_artifact_name(body.name)
        if body.size < 0 or len(body.sha256) != 64 or not set(body.sha256) <= set("0123456789abcdef"):
            raise _Refused("an artifact has a size, and a SHA-256 in lower-case hexadecimal")
    elif isinstance(body, Ended) and body.state not in _ENDS:
        raise _Refused(f"an executor cannot end its deployment as {body.state.value!r}")
    elif isinstance(body, GapRecord) and not 0 < body.first <= body.last:
        raise _Refused(f"there is no gap from {body.first} to {body.last}")


def _check_columns(body: Any) -> None:
    """Hold that the database has room for each field that becomes a column."""
    for name in ("attempt", "iteration", "size", "bulk", "first", "last"):
        if not 0 <= (getattr(body, name, 0) or 0) <= _MAX_NUMBER:
            raise _Refused(f"its {name} is out of range")
    if len(getattr(body, "step", "") or "") > _MAX_NAME:
        raise _Refused(f"the name of a step has at most {_MAX_NAME} characters")
