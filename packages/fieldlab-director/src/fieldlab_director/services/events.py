"""Events of an experiment, sent and read by people. Executors' events come with their journals."""

from __future__ import annotations

import msgspec
from fieldlab_common.errors import EventTooLarge, IllegalState, InvalidRequest
from fieldlab_common.events import MAX_EVENT_BYTES, RESERVED_PREFIX, Event
from fieldlab_common.protocol import EventPage, SendEvent

from fieldlab_director.services.experiments import find
from fieldlab_director.services.identity import UserCaller
from fieldlab_director.services.intake import MAX_DEPTH, too_deep
from fieldlab_director.services.quotas import hold_events
from fieldlab_director.services.streams import fitting
from fieldlab_director.store import queries
from fieldlab_director.store.base import Tx
from fieldlab_director.store.states import append_event

__all__ = ["events", "send_event"]

_MAX_NAME = 200
_MAX_KEY = 100


def send_event(tx: Tx, caller: UserCaller, experiment: str, request: SendEvent, *, most: int) -> Event:
    """Append an event; under a ``key`` that was used before, the event that was made then.

    Raises:
        NotFound, EventTooLarge. TooLarge: the experiment has ``most`` events. IllegalState: the experiment has ended.
        InvalidRequest: the name or key cannot be one.
    """
    if not request.name or len(request.name) > _MAX_NAME or request.name.startswith(RESERVED_PREFIX):
        raise InvalidRequest(
            f"$.name must have 1 to {_MAX_NAME} characters and not begin with {RESERVED_PREFIX!r}.",
            details={"path": "$.name"},
        )
    if len(request.key) > _MAX_KEY:
        raise InvalidRequest(f"$.key must have at most {_MAX_KEY} characters.", details={"path": "$.key"})
    if len(msgspec.json.encode(request.data)) > MAX_EVENT_BYTES:
        raise EventTooLarge(
            f"The data of event {request.name!r} is over {MAX_EVENT_BYTES} bytes.",
            advice="Put the data into an artifact, and its name into the event.",
        )
    if too_deep(request.data):
        raise InvalidRequest(f"$.data is nested more than {MAX_DEPTH} levels deep.", details={"path": "$.data"})
    row = find(tx, caller, experiment)
    # The prefix keeps what people choose apart from the keys of executors and of the director.
    key = f"user:{caller.id}:{request.key}" if request.key else ""
    known = tx.one(queries.EVENT_BY_KEY, Event, experiment_id=row.id, key=key) if key else None
    if known is not None:
        return known
    if row.state.terminal:
        raise IllegalState(f"Experiment {row.name!r} is {row.state.value}: nobody would receive the event.")
    sent = append_event(tx, row.id, Event(name=request.name, data=request.data, sent_at=tx.now, key=key))
    hold_events(tx, row.id, most)
    return sent


def events(
    tx: Tx, caller: UserCaller, experiment: str, *, after: int, limit: int, most_bytes: int
) -> tuple[str, EventPage]:
    """The id of the experiment, and its events after a cursor.

    Raises:
        NotFound.
    """
    row = find(tx, caller, experiment)
    found = fitting(tuple(tx.all(queries.EVENTS, Event, experiment_id=row.id, after=after, limit=limit)), most_bytes)
    return row.id, EventPage(events=found, cursor=(found[-1].number or after) if found else after, state=row.state)
