"""The supervisor's answers to what running tasks ask: events, barriers, the store, earlier results.

A question has a number and gets one answer, at once or when what it waits for has come; a child that waits no longer
says so (``forget``). Announcements (``ready``, ``artifact``, ``log``) get none. What a child says is checked here as
if a stranger had said it: it is user code that runs there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fieldlab_common.context import check_artifact_name
from fieldlab_common.errors import (
    DefinitionError,
    EventTooLarge,
    FieldlabError,
    InvalidMessage,
    TooLarge,
    UnknownNameError,
)
from fieldlab_common.events import BARRIER, DEPLOYMENT, MAX_EVENT_BYTES, RESERVED_PREFIX, Gates, arrival
from fieldlab_common.paths import Round

from fieldlab_executor.attempt import Attempt
from fieldlab_executor.eventlog import EventBook, as_json
from fieldlab_executor.secrets import Secrets

__all__ = ["Answers", "Deployment"]

MAX_ARTIFACTS = 10_000  # of one attempt
MAX_LOG = 32 * 1024
STORE_KEYS = 10_000
STORE_BYTES = 16 * 1024 * 1024


class Deployment(Protocol):
    """What the answers need of the supervisor."""

    name: str
    book: EventBook
    secrets: Secrets

    def send_event(self, attempt: Attempt, name: str, data: Any, size: int) -> None:
        """Put an event of the attempt's into the journal and the log."""

    def ready(self, attempt: Attempt) -> None:
        """The attempt is ready."""

    def waits(self, attempt: Attempt, waits: bool) -> None:
        """The attempt only waits for an event or a barrier, or no more."""

    def said(self, attempt: Attempt, stream: str, text: str) -> None:
        """The attempt logged something."""

    def place_of(self, attempt: Attempt) -> tuple[str, Round]:
        """Where the attempt stands among what is repeated: there, and in which round."""

    def result_of(self, attempt: Attempt, step: str) -> dict[str, Any] | None:
        """What may be known now of the result of a step that the attempt names; None: there is no such step."""

    def results(self, attempt: Attempt) -> list[str]:
        """The steps that have a value and that the attempt sees."""


class Answers:
    """Answers for one deployment."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._gates = Gates()
        self._store: dict[str, Any] = {}
        self._store_bytes = 0
        self._handlers: Mapping[str, Callable[[Attempt, dict[str, Any]], dict[str, Any] | None]] = {
            "send": self._send,
            "events": self._events,
            "latest": self._latest,
            "count": self._count,
            "gate": self._gate,
            "barrier": self._barrier,
            "forget": self._forget,
            "input": self._input,
            "results": self._results,
            "store_get": self._store_get,
            "store_set": self._store_set,
            "store_delete": self._store_delete,
            "store_keys": self._store_keys,
            "artifact": self._artifact,
            "ready": self._ready,
            "log": self._log,
            "secret": self._secret,
        }

    def answer(self, attempt: Attempt, header: dict[str, Any]) -> None:
        """Take in one frame of a child."""
        number = header.get("id")
        try:
            handler = self._handlers.get(str(header.get("op")))
            if handler is None:
                raise InvalidMessage(f"{header.get('op')!r} is nothing that a task can ask.")
            answer = handler(attempt, header)
        except FieldlabError as error:
            answer = {"error": error.code, "message": error.message, "advice": error.advice, "details": error.details}
        except (KeyError, TypeError, ValueError) as error:
            answer = {"error": InvalidMessage.code, "message": f"A malformed question: {error!r}."}
        if answer is not None and number is not None:
            attempt.write({"re": number, **answer})

    def leave(self, attempt: Attempt) -> None:
        """The attempt is over: nothing waits for it any more."""
        for number in list(attempt.waiters):
            self._leave(attempt, number)

    # --- events

    def _send(self, attempt: Attempt, ask: dict[str, Any]) -> dict[str, Any]:
        name, data = ask["name"], ask["data"]
        if not isinstance(name, str) or not 0 < len(name) <= 200 or name.startswith(RESERVED_PREFIX):
            raise DefinitionError(f"{name!r:.100} cannot be the name of an event.")
        size = len(json.dumps(data, ensure_ascii=False).encode())
        if size > MAX_EVENT_BYTES:
            raise EventTooLarge(f"The data of event {name!r} has {size} bytes; at most {MAX_EVENT_BYTES} are possible.")
        self._keep_in(json.dumps([name, data]), "An event")
        self._deployment.send_event(attempt, name, data, size)
        return {}

    def _keep_in(self, text: str, what: str) -> None:
        """Refuse text that holds a secret, and would be reported."""
        if shown := self._deployment.secrets.shown_in(text.encode()):
            raise DefinitionError(f"{what} would hold the secret {shown!r}, which must not leave the node.")

    def _events(self, attempt: Attempt, ask: dict[str, Any]) -> None:
        name, after, position = ask["name"], int(ask["after"]), int(ask["position"])

        def look() -> bool:
            nonlocal position
            found, position = self._deployment.book.since(position, name, after)
            if found:
                self._came(attempt, ask, {"events": [as_json(event) for event in found], "position": position})
            return bool(found)

        self._wait(attempt, ask, () if name is None else (name,), look)

    def _latest(self, attempt: Attempt, ask: dict[str, Any]) -> dict[str, Any]:
        event = self._deployment.book.latest(ask["name"])
        return {"event": None if event is None else as_json(event)}

    def _count(self, attempt: Attempt, ask: dict[str, Any]) -> dict[str, Any]:
        return {"count": self._deployment.book.count(ask["name"])}

    def _gate(self, attempt: Attempt, ask: dict[str, Any]) -> None:
        name, after = str(ask["name"]), int(ask["after"])
        place, round = self._deployment.place_of(attempt)
        position = self._gates.mark(place, name, round)

        def look() -> bool:
            nonlocal position
            found, position = self._deployment.book.since(position, name, after, most=1)
            if found:
                self._gates.opened(place, name, position)
                self._came(attempt, ask, {"event": as_json(found[0])})
            return bool(found)

        self._wait(attempt, ask, (name,), look)

    def _barrier(self, attempt: Attempt, ask: dict[str, Any]) -> None:
        name, parties = ask["name"], ask["parties"]
        if not isinstance(name, str) or not 0 < len(name) <= 200:
            raise DefinitionError(f"{name!r:.100} cannot be the name of a barrier.")
        self._keep_in(name, "The name of a barrier")
        if (
            isinstance(parties, bool)
            or not isinstance(parties, int | str)
            or (isinstance(parties, int) and parties < 1)
        ):
            raise DefinitionError(f"parties={parties!r}: it is a number from 1, 'all', or a role.")
        book, round = self._deployment.book, self._deployment.place_of(attempt)[1]
        if not book.arrivals.has(name, round, self._deployment.name, attempt.key.step, attempt.key.iteration or 0):
            self._deployment.send_event(attempt, BARRIER, arrival(name, round), len(name))

        def look() -> bool:
            view = book.barrier(name, parties, round)
            if view.open or view.broken:
                missing = [] if view.open else list(view.missing_for_good)
                self._came(attempt, ask, {"arrived": list(view.arrived), "missing": missing})
            return view.open or view.broken

        self._wait(attempt, ask, (BARRIER, DEPLOYMENT), look)

    def _forget(self, attempt: Attempt, ask: dict[str, Any]) -> dict[str, Any]:
        self._leave(attempt, ask["number"])
        question = attempt.questions.pop(ask["number"], {})
        if question.get("op") != "barrier":
            return {"seen": {}}
        round = self._deployment.place_of(attempt)[1]
        view = self._deployment.book.barrier(question["name"], question["parties"], round)
        return {"seen": {"arrived": list(view.arrived), "needed": view.needed}}

    def _wait(self, attempt: Attempt, ask: dict[str, Any], names: tuple[str, ...], look: Callable[[], bool]) -> None:
        waiter = self._deployment.book.wait(names, look)
        if waiter is not None:
            attempt.waiters[ask["id"]] = waiter
            attempt.questions[ask["id"]] = ask
            if len(attempt.waiters) == 1:
                self._deployment.waits(attempt, True)

    def _leave(self, attempt: Attempt, number: Any) -> None:
        """The question waits no longer."""
        waiter = attempt.waiters.pop(number, None)
        if waiter is not None:
            self._deployment.book.leave(waiter)
            if not attempt.waiters:
                self._deployment.waits(attempt, False)

    def _came(self, attempt: Attempt, ask: dict[str, Any], answer: dict[str, Any]) -> None:
        self._leave(attempt, ask["id"])
        attempt.questions.pop(ask["id"], None)
        attempt.write({"re": ask["id"], **answer})

    # --- results and store

    def _input(self, attempt: Attempt, ask: dict[str, Any]) -> dict[str, Any]:
        found = self._deployment.result_of(attempt, ask["name"])
        if found is None:
            raise UnknownNameError(f"There is no step {ask['name']!r:.100} in this deployment.")
        return {"input": found}

    def _results(self, attempt: Attempt, ask: dict[str, Any]) -> dict[str, Any]:
        return {"names": self._deployment.results(attempt)}

    def _store_get(self, attempt: Attempt, ask: dict[str, Any]) -> dict[str, Any]:
        return {"found": ask["key"] in self._store, "handle": self._store.get(ask["key"])}

    def _store_set(self, attempt: Attempt, ask: dict[str, Any]) -> dict[str, Any]:
        key, handle = str(ask["key"]), ask["handle"]
        size = len(key) + len(json.dumps(handle))
        old = len(key) + len(json.dumps(self._store[key])) if key in self._store else 0
        if self._store_bytes - old + size > STORE_BYTES or (not old and len(self._store) >= STORE_KEYS):
            raise TooLarge(
                f"ctx.store is full: it holds at most {STORE_KEYS} keys and {STORE_BYTES} bytes.",
                advice="Delete what is not needed any more, or write a file and store its name.",
            )
        self._store_bytes += size - old
        self._store[key] = handle
        return {}

    def _store_delete(self, attempt: Attempt, ask: dict[str, Any]) -> dict[str, Any]:
        key = ask["key"]
        if key not in self._store:
            return {"found": False}
        self._store_bytes -= len(key) + len(json.dumps(self._store.pop(key)))
        return {"found": True}

    def _store_keys(self, attempt: Attempt, ask: dict[str, Any]) -> dict[str, Any]:
        return {"keys": list(self._store)}

    def _secret(self, attempt: Attempt, ask: dict[str, Any]) -> dict[str, Any]:
        value = self._deployment.secrets.get(ask["name"])
        if value is None:
            raise UnknownNameError(
                f"There is no secret {ask['name']!r:.100} for this deployment.",
                advice=f"Store it: client.secrets.set({ask['name']!r:.100}, ...), or fl.run(..., secrets={{...}}).",
            )
        return {"value": value}

    # --- announcements

    def _artifact(self, attempt: Attempt, ask: dict[str, Any]) -> None:
        name = check_artifact_name(ask["name"])
        if shown := self._deployment.secrets.shown_in(name.encode()):
            text = f"A file is not collected: its name holds the secret {shown!r}, which must not leave the node.\n"
            self._deployment.said(attempt, "executor", text)
        elif len(attempt.artifacts) < MAX_ARTIFACTS:
            attempt.artifacts[name] = None

    def _ready(self, attempt: Attempt, ask: dict[str, Any]) -> None:
        self._deployment.ready(attempt)

    def _log(self, attempt: Attempt, ask: dict[str, Any]) -> None:
        text = str(ask["text"])[:MAX_LOG]
        self._deployment.said(attempt, "log", text + "\n")
