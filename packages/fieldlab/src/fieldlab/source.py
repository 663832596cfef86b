"""Where a run is read from: a director, or this process itself (``fieldlab.local``). One interface for both.

A ``Run`` follows by cursor and asks again from where it stood; a source answers one page at a time and holds no state
of the reader. ``DirectorSource`` rides out a director that is restarted: every call here is safe to repeat, and is
repeated for ``PATIENCE`` seconds before the reader is told.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Protocol

from fieldlab_common import errors as e
from fieldlab_common import protocol as p
from fieldlab_common.events import Event
from fieldlab_common.protocol import Lane

from fieldlab.transport import Session, check

__all__ = ["LONG_POLL", "PATIENCE", "DirectorSource", "Readable", "Source"]

LONG_POLL = 20.0  # seconds for which one request may be held
PATIENCE = 60.0  # seconds for which a run is followed though its director does not answer
PAGE = 1000  # records in a page at most


class Readable(Protocol):
    """One run, as it can be read and steered. ``wait``: seconds for which an answer that would be empty is held."""

    def info(self) -> p.ExperimentInfo:
        """How it stands."""
        ...

    def start(self) -> p.ExperimentInfo:
        """Start it once it is ready; nothing if it was started."""
        ...

    def cancel(self, reason: str, deployments: Sequence[str]) -> p.ExperimentInfo:
        """Stop it, or the named deployments of it."""
        ...

    def records(self, lane: Lane, after: int, wait: float, deployment: str = "") -> p.RecordPage:
        """Records after the cursor, of all deployments or of the named one."""
        ...

    def events(self, after: int, wait: float) -> p.EventPage:
        """Events numbered above ``after``."""
        ...

    def send(self, event: p.SendEvent) -> Event:
        """Send an event into the run."""
        ...

    def artifacts(self) -> tuple[p.ArtifactInfo, ...]:
        """The artifacts announced so far."""
        ...

    def blob(self, digest: str, offset: int) -> Iterator[bytes]:
        """The bytes of a blob from ``offset`` on."""
        ...

    def close(self) -> None:
        """Let go of what the run holds open."""
        ...


class Source(Readable, Protocol):
    """One run, as its handle has it: it can also be repeated, and forgotten."""

    def rerun(self, start: bool) -> tuple[Source, p.ExperimentInfo]:
        """Run it once more: the new run's source, and how it stands."""
        ...

    def delete(self, force: bool) -> None:
        """Let it go, with all that it gave."""
        ...


class DirectorSource:
    """A run at a director."""

    def __init__(self, session: Session, experiment: str) -> None:
        self._session, self._path = session, {"experiment": experiment}

    def info(self) -> p.ExperimentInfo:
        return self._session.call("experiment", p.ExperimentInfo, path=self._path, patience=PATIENCE)

    def start(self) -> p.ExperimentInfo:
        return self._session.call("start", p.ExperimentInfo, path=self._path, patience=PATIENCE)

    def cancel(self, reason: str, deployments: Sequence[str]) -> p.ExperimentInfo:
        body = p.CancelRequest(reason=reason, deployments=tuple(deployments))
        return self._session.call("cancel", p.ExperimentInfo, path=self._path, body=body, patience=PATIENCE)

    def rerun(self, start: bool) -> tuple[Source, p.ExperimentInfo]:
        body, key = p.RerunRequest(start=start), {"idempotency-key": uuid.uuid4().hex}
        info = self._session.call("rerun", p.ExperimentInfo, path=self._path, body=body, headers=key)
        return DirectorSource(self._session, info.id), info

    def delete(self, force: bool) -> None:
        query = {"force": "true"} if force else {}
        self._session.call("delete_experiment", p.Empty, path=self._path, query=query, patience=PATIENCE)

    def records(self, lane: Lane, after: int, wait: float, deployment: str = "") -> p.RecordPage:
        query = {"lane": lane.value, "after": after, "limit": PAGE}
        if deployment:
            query["deployment"] = deployment
        return self._session.call("records", p.RecordPage, path=self._path, query=query, wait=wait, patience=PATIENCE)

    def events(self, after: int, wait: float) -> p.EventPage:
        query = {"after": after, "limit": PAGE}
        return self._session.call("events", p.EventPage, path=self._path, query=query, wait=wait, patience=PATIENCE)

    def send(self, event: p.SendEvent) -> Event:
        safe = PATIENCE if event.key else 0.0
        return self._session.call("send_event", Event, path=self._path, body=event, patience=safe, safe=bool(event.key))

    def artifacts(self) -> tuple[p.ArtifactInfo, ...]:
        return self._session.call("artifacts", p.ArtifactList, path=self._path, patience=PATIENCE).artifacts

    def blob(self, digest: str, offset: int) -> Iterator[bytes]:
        pieces = _Pieces(self._session, digest, offset)
        while (chunk := self._session.retrying(pieces.next, patience=PATIENCE)) is not None:
            yield chunk

    def close(self) -> None:
        """Nothing: the session belongs to the client."""


class _Pieces:
    """The chunks of a blob; after a cut the next one comes from where the last one ended."""

    def __init__(self, session: Session, digest: str, offset: int) -> None:
        self._session, self._digest, self._offset = session, digest, offset
        self._open: Iterator[bytes] | None = None

    def next(self) -> bytes | None:
        """The next chunk; None at the end."""
        if self._open is None:
            self._open = self._chunks(self._offset)
        try:
            chunk = next(self._open, None)
        except e.FieldlabError:
            self._open = None
            raise
        self._offset += len(chunk or b"")
        return chunk

    def _chunks(self, offset: int) -> Iterator[bytes]:
        row = p.ENDPOINTS["get_blob"]
        with self._session.stream("get_blob", path={"digest": self._digest}, offset=offset) as stream:
            check(row, stream.answer, self._session.base)
            skip = offset if stream.answer.status == 200 else 0  # a server may ignore Range (RFC 9110, section 14.2)
            for chunk in stream.chunks:
                if len(chunk) > skip:
                    yield chunk[skip:]
                skip = max(0, skip - len(chunk))
