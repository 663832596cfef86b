"""What a running task can ask, on the child's side: questions over the child's socket, answered by the supervisor.

The supervisor holds the authority: events, barriers, the store and other steps' results live there. Here are requests
with numbers, and a thread that reads the answers; it is started when something is first asked or awaited, so
that a task which never uses its context never has a second thread. In a shared worker it goes on from job to job, and
reads the next job too.

Invariant: only the step's own process speaks. A process that user code forks from it inherits the socket and must not
use it; it gets an error that says so.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Protocol

from fieldlab_common import paths
from fieldlab_common.context import (
    Artifact,
    Clock,
    EventLog,
    ExperimentView,
    Stopping,
    TaskContext,
    check_artifact_name,
    check_parties,
)
from fieldlab_common.errors import (
    BY_CODE,
    BarrierBroken,
    DefinitionError,
    EventTooLarge,
    FieldlabError,
    UnsupportedError,
    WaitTimeout,
)
from fieldlab_common.events import MAX_EVENT_BYTES, RESERVED_PREFIX, Event, Member
from fieldlab_common.node import Node
from fieldlab_common.wire import decode

from fieldlab_executor import frames
from fieldlab_executor.given import Given

__all__ = ["Codec", "Connection", "Context", "check_event"]

MAX_LOG_TEXT = 32 * 1024
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Codec(Protocol):
    """What opens and keeps values on the node."""

    def open(self, handle: Mapping[str, Any] | None) -> Any:
        """The value that a handle stands for."""

    def open_input(self, given: Mapping[str, Any]) -> Any:
        """The value of a step."""

    def keep_local(self, value: Any, name: str) -> dict[str, Any]:
        """A handle for a value that stays on the node."""


class _Answer:
    __slots__ = ("came", "content")

    def __init__(self) -> None:
        self.came = threading.Event()
        self.content: dict[str, Any] = {}


class Connection:
    """The child's end of its socket, used by any thread of the child."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pid = os.getpid()
        self._writing = threading.Lock()
        self._waiting: dict[int, _Answer] = {}
        self._last = 0
        self._reader: threading.Thread | None = None
        self._stop = threading.Event()
        self._heeds: dict[int, Any] = {}  # the signals that it answers, and how they were answered before
        self._jobs: queue.SimpleQueue[frames.Job | None] = queue.SimpleQueue()

    @property
    def threads(self) -> int:
        """How many threads of its own it has."""
        return 0 if self._reader is None else 1

    def next_job(self) -> frames.Job | None:
        """Forget what belonged to the last job, and wait for the next; None if the supervisor is gone."""
        self._stop = threading.Event()
        for number, before in self._heeds.items():
            signal.signal(number, before)
        self._heeds.clear()
        if self._reader is not None:
            return self._jobs.get()
        job: frames.Job | None = frames.receive(self._fd)
        return job

    @property
    def stopping(self) -> threading.Event:
        """Set when the supervisor says that the step is to stop.

        A task that looks at it ends by itself: from then on the signals that ask it to stop do not end it, which would
        cost its value. What it has started gets them all the same.
        """
        self._listen()
        if not self._heeds and os.getpid() == self._pid and threading.current_thread() is threading.main_thread():
            for number in _ASKING:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._heeds[number] = signal.signal(number, self._asked)
        return self._stop

    def _asked(self, number: int, frame: object) -> None:
        """Leave it to the supervisor's word, which comes with the signal; a forked process ends as it would."""
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def write(self, header: Mapping[str, Any], data: bytes = b"") -> None:
        """Send one frame."""
        if os.getpid() != self._pid:
            raise UnsupportedError(
                "The task's context was used in a process that the task forked.",
                advice="Use ctx in the step's own process only; let the others return their results to it.",
            )
        view = memoryview(frames.pack(header, data))
        with self._writing:
            while view:
                view = view[os.write(self._fd, view) :]

    def ask(self, op: str, *, timeout: float | None = None, **fields: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            WaitTimeout: none came within ``timeout`` seconds; ``details`` has what the supervisor knows instead.
            FieldlabError: of the class that the answer names.
        """
        answer = _Answer()
        with self._writing:
            self._last += 1
            number = self._last
            self._waiting[number] = answer
        self._listen()
        self.write({"op": op, "id": number, **fields})
        if not answer.came.wait(timeout) and op != "forget":
            seen = self.ask("forget", number=number)
            if not answer.came.is_set():
                raise WaitTimeout(f"Nothing came within {timeout:g} s.", details=seen.get("seen") or {})
        self._waiting.pop(number, None)
        return _checked(answer.content)

    def _listen(self) -> None:
        with self._writing:
            if self._reader is None and os.getpid() == self._pid:
                self._reader = threading.Thread(target=self._read, name="fieldlab", daemon=True)
                self._reader.start()

    def _read(self) -> None:
        while header := frames.receive(self._fd):
            if type(header) is tuple:
                self._jobs.put(header)
            elif header.get("op") == "stop":
                self._stop.set()
            elif answer := self._waiting.pop(header.get("re", 0), None):
                answer.content = header
                answer.came.set()
        self._jobs.put(None)
        self._stop.set()
        for answer in list(self._waiting.values()):
            answer.content = {"error": FieldlabError.code, "message": "The executor is gone."}
            answer.came.set()


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" not in answer:
        return answer
    cls = BY_CODE.get(answer["error"], FieldlabError)
    raise cls(answer.get("message", ""), advice=answer.get("advice", ""), details=answer.get("details"))


# --- events ----------------------------------------------------------------------------------------------------------


def _event(data: Mapping[str, Any]) -> Event:
    return Event(**data)


def check_event(name: object, data: Any) -> None:
    """Refuse what cannot be sent as an event; EventTooLarge, or DefinitionError."""
    if not isinstance(name, str) or not 0 < len(name) <= 200 or name.startswith(RESERVED_PREFIX):
        raise DefinitionError(
            f"{name!r:.100} cannot be the name of an event.",
            advice=f"Use text of 1 to 200 characters that does not begin with {RESERVED_PREFIX!r}.",
        )
    try:
        size = len(json.dumps(data, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise DefinitionError(
            f"The data of event {name!r} is not JSON: {error}.",
            advice="Send None, bool, numbers, text, and lists and dicts of them.",
        ) from error
    if size > MAX_EVENT_BYTES:
        raise EventTooLarge(
            f"The data of event {name!r} has {size} bytes; at most {MAX_EVENT_BYTES} are possible.",
            advice="Put the data into an artifact, and its name into the event.",
        )


class _Events(EventLog):
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, name: str, data: Any = None) -> None:
        check_event(name, data)
        self._connection.ask("send", name=name, data=data)

    def wait(
        self,
        name: str,
        *,
        count: int = 1,
        where: Callable[[Event], bool] | None = None,
        after: int = 0,
        timeout: float | None = None,
    ) -> list[Event]:
        found: list[Event] = []
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            for event in self._follow(name, after, deadline):
                if where is None or where(event):
                    found.append(event)
                if len(found) >= count:
                    break
        except WaitTimeout:
            raise WaitTimeout(
                f"{len(found)} of {count} events {name!r} came within {timeout:g} s.",
                advice="Give it more time, or see whether their sender runs.",
            ) from None
        return found

    def stream(self, *, after: int = 0, timeout: float | None = None) -> Iterator[Event]:
        position = 0
        while True:
            try:
                page = self._connection.ask("events", name=None, after=after, position=position, timeout=timeout)
            except WaitTimeout:
                return
            position = page["position"]
            yield from map(_event, page["events"])

    def _follow(self, name: str, after: int, deadline: float | None) -> Iterator[Event]:
        position = 0
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            page = self._connection.ask("events", name=name, after=after, position=position, timeout=left)
            position = page["position"]
            yield from map(_event, page["events"])

    def latest(self, name: str) -> Event | None:
        found = self._connection.ask("latest", name=name)["event"]
        return None if found is None else _event(found)

    def count(self, name: str) -> int:
        return int(self._connection.ask("count", name=name)["count"])


# --- results, store, log ----------------------------------------------------------------------------------------------


class _Results(Mapping[str, Any]):
    """The values of steps that succeeded so far, by name."""

    def __init__(self, connection: Connection, values: Codec) -> None:
        self._connection = connection
        self._values = values

    def __getitem__(self, name: str) -> Any:
        given = self._connection.ask("input", name=name)["input"]
        if given["status"] != "succeeded":
            raise KeyError(f"{name}: it has no value; it is {given['status']}")
        return self._values.open_input(given)

    def __iter__(self) -> Iterator[str]:
        return iter(self._connection.ask("results")["names"])

    def __len__(self) -> int:
        return len(self._connection.ask("results")["names"])


class _Store(MutableMapping[str, Any]):
    """Keys and values that the steps of one executor share."""

    def __init__(self, connection: Connection, values: Codec) -> None:
        self._connection = connection
        self._values = values

    def __getitem__(self, key: str) -> Any:
        answer = self._connection.ask("store_get", key=_key(key))
        if not answer["found"]:
            raise KeyError(key)
        return self._values.open(answer["handle"])

    def __setitem__(self, key: str, value: Any) -> None:
        name = f"store-{os.getpid()}-{time.monotonic_ns()}"
        self._connection.ask("store_set", key=_key(key), handle=self._values.keep_local(value, name))

    def __delitem__(self, key: str) -> None:
        if not self._connection.ask("store_delete", key=_key(key))["found"]:
            raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._connection.ask("store_keys")["keys"])

    def __len__(self) -> int:
        return len(self._connection.ask("store_keys")["keys"])


def _key(key: object) -> str:
    if not isinstance(key, str) or not 0 < len(key) <= 1000:
        raise DefinitionError(f"{key!r:.100} cannot be a key of ctx.store: it is text of 1 to 1000 characters.")
    return key


class _LogHandler(logging.Handler):
    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"{record.levelname} {self.format(record)}"
            self._connection.write({"op": "log", "text": text[:MAX_LOG_TEXT]})
        except OSError:
            self.handleError(record)


# --- the context -----------------------------------------------------------------------------------------------------


class Context(TaskContext):
    """The TaskContext of one attempt."""

    def __init__(self, given: Given, connection: Connection, values: Codec) -> None:
        with open(os.path.join(given.root, "context.json"), "rb") as file:
            facts = json.load(file)
        self._connection = connection
        self._artifacts = given.artifacts
        self._declared: dict[str, Artifact] = {}
        self.events = _Events(connection)
        self.results = _Results(connection, values)
        self.store = _Store(connection, values)
        self.node = decode(Node, facts["node"])
        members = tuple(decode(Member, member) for member in facts["members"])
        self.experiment = ExperimentView(name=facts["experiment"], id=facts["experiment_id"], deployments=members)
        self.deployment = facts["deployment"]
        self.clock = Clock(offset=facts["clock"][0], bound=facts["clock"][1])
        self.step = given.step
        self.attempt = given.attempt
        self.iteration = (given.iteration if given.iteration is not None else paths.iteration_of(self.step)) or 0
        self.log = _logger(connection, self.step)

    @property
    def stopping(self) -> Stopping:  # type: ignore[override]
        return self._connection.stopping

    def artifact(self, name: str) -> Artifact:
        name = check_artifact_name(name)
        if name not in self._declared:
            path = os.path.join(self._artifacts, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._connection.write({"op": "artifact", "name": name})
            self._declared[name] = Artifact(name, path)
        return self._declared[name]

    def ready(self) -> None:
        self._connection.write({"op": "ready"})

    def gate(self, name: str, *, after: int = 0, timeout: float | None = None) -> Event:
        try:
            return _event(self._connection.ask("gate", name=name, after=after, timeout=timeout)["event"])
        except WaitTimeout:
            raise WaitTimeout(
                f"No event {name!r} came within {timeout:g} s.",
                advice="Give it more time, or see whether its sender runs.",
            ) from None

    def barrier(self, name: str, parties: int | str = "all", timeout: float | None = None) -> None:
        check_parties(parties, timeout)
        try:
            answer = self._connection.ask("barrier", name=name, parties=parties, timeout=timeout)
        except WaitTimeout as late:
            arrived = late.details.get("arrived")
            came = ", ".join(map(str, arrived)) if isinstance(arrived, list) and arrived else "nobody"
            raise WaitTimeout(
                f"The barrier {name!r} did not fill within {timeout:g} s; there came {came}.",
                advice="Give it more time, or see whether the others run.",
                details=late.details,
            ) from None
        if missing := answer.get("missing"):
            raise BarrierBroken(
                f"The barrier {name!r} can no longer fill; missing: {', '.join(missing)}.",
                details={"missing": missing, "arrived": answer.get("arrived", [])},
            )


def _logger(connection: Connection, step: str) -> logging.Logger:
    logger = logging.getLogger(f"fieldlab.step.{step}")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.handlers = [_LogHandler(connection)]
    return logger
