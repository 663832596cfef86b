"""What runs on a node around a netunicorn task. No node has this module: it travels by value with each task.

A netunicorn task expects of its executor what stands here, and gets it from ours: the results of earlier tasks in
``previous_steps``, a working folder that all tasks of the deployment share, and netunicorn's gateway, of which tasks
use the flags. Results are kept in ``ctx.store``, an entry a step, so that tasks that run beside each other never write
the same one; a flag is the fold of the experiment's events of its name.

Invariant: nothing at the top of this module needs more of a node than fieldlab's executor and netunicorn-base.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
import traceback
import urllib.parse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

from fieldlab_common.context import TaskContext
from fieldlab_common.errors import FieldlabError
from fieldlab_common.events import Event
from returns.pipeline import is_successful
from returns.result import Failure, Result, Success

__all__ = ["FLAG", "Call", "Events", "TaskFailed", "joined", "read_flag", "synchronise"]

FLAG = "netunicorn.flag."  # with the flag's name: the events that make it
_STORED = "netunicorn:"  # with the step's name: its entry in ctx.store
_FOLDER = "netunicorn"  # in the folder of the deployment


class TaskFailed(FieldlabError):
    """A netunicorn task returned a Failure; the message is what it holds."""

    code: ClassVar[str] = "netunicorn_failure"


# --- a task -----------------------------------------------------------------------------------------------------------


class Call:
    """Runs a netunicorn task as its own executor would. ``step`` names the entry of its result."""

    def __init__(self, task: Any, name: str) -> None:
        self.task = task
        self.__name__ = name

    def __call__(self, *, ctx: TaskContext) -> Any:
        """Run it; its value, if it has succeeded.

        Raises:
            TaskFailed: it returned a Failure. Whatever it raises is raised.
        """
        _enter_shared_folder()
        self.task.previous_steps = _previous(ctx)
        with _gateway(ctx):
            result, error = _run(self.task)
        ctx.store[_STORED + ctx.step] = (self.task.name, time.monotonic_ns(), result)
        if error is not None:
            raise error
        if not is_successful(result):
            raise TaskFailed(str(result.failure()))
        return result.unwrap()


def _enter_shared_folder() -> None:
    """Go from the step's folder to the one that netunicorn's tasks share, in that of the deployment."""
    own = os.getcwd()
    root = next(str(path) for path in pathlib.Path(own).parents if (path / "context.json").is_file())
    os.makedirs(f"{root}/{_FOLDER}", exist_ok=True)
    os.chdir(f"{root}/{_FOLDER}")


def _run(task: Any) -> tuple[Result[Any, Any], Exception | None]:
    try:
        result = task.run()
    except Exception as error:  # noqa: BLE001 - it is netunicorn's rule that any exception is a Failure
        return Failure(traceback.format_exc()), error
    return (result if isinstance(result, Result) else Success(result)), None


def _previous(ctx: TaskContext) -> defaultdict[str, list[Result[Any, Any]]]:
    """The results so far, by the name of the task, in the order in which they came."""
    entries = [ctx.store[key] for key in ctx.store if key.startswith(_STORED)]
    found: defaultdict[str, list[Result[Any, Any]]] = defaultdict(list)
    for name, _, result in sorted(entries, key=lambda entry: entry[1]):
        found[name].append(result)
    return found


# --- steps that are no tasks ------------------------------------------------------------------------------------------


def synchronise() -> None:
    """What a synchronisation point does."""


def joined(met: bool, sources: Iterable[tuple[Iterable[str], str, bool]]) -> bool:
    """Whether netunicorn would start a node: each node before it has run, and one of the edges from them was traversed.

    Of each source: the states of its steps, the present round's last; the edge's ``traverse_on``; and whether the edge
    can be traversed in this round. ``met``: an edge that is not among them was.
    """
    ran = True
    for states, condition, counts in sources:
        known = list(states)
        ran = ran and any(state in ("succeeded", "failed") for state in known)
        wanted = {"success": ("succeeded",), "failure": ("failed",)}.get(condition, ("succeeded", "failed"))
        met = met or (counts and known[-1] in wanted)
    return ran and met


# --- flags ------------------------------------------------------------------------------------------------------------


class Events(Protocol):
    """What a flag needs of an event log: a task's and a run's have it."""

    def wait(self, name: str, *, count: int = 1) -> list[Event]:
        """The first ``count`` events of that name."""
        ...

    def count(self, name: str) -> int:
        """How many there are."""
        ...


def read_flag(events: Events, name: str) -> dict[str, Any] | None:
    """The flag's ``text_value`` and ``int_value``, or None if nobody has set it.

    Numbered events count in their order; those that the director has not numbered yet come after them.
    """
    found = events.wait(FLAG + name, count=count) if (count := events.count(FLAG + name)) else []
    found.sort(key=lambda event: (event.number is None, event.number or 0))
    value: dict[str, Any] | None = None
    for event in found:
        change = event.data if isinstance(event.data, Mapping) else {}
        if "add" in change:
            old = value or {"text_value": None, "int_value": 0}
            value = {**old, "int_value": old["int_value"] + int(change["add"])}
        else:
            value = {"text_value": change.get("text_value"), "int_value": int(change.get("int_value") or 0)}
    return value


@contextlib.contextmanager
def _gateway(ctx: TaskContext) -> Iterator[None]:
    """Serve netunicorn's gateway to this process and those below it, at an address that nobody else knows."""
    secret = secrets.token_urlsafe(16)
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.environ["NETUNICORN_GATEWAY_ENDPOINT"] = f"http://127.0.0.1:{server.getsockname()[1]}/{secret}"
        os.environ["NETUNICORN_EXPERIMENT_ID"] = ctx.experiment.id
        os.environ["NETUNICORN_EXECUTOR_ID"] = ctx.deployment
        threading.Thread(target=_serve, args=(server, secret, ctx), name="netunicorn-gateway", daemon=True).start()
        yield


def _serve(server: socket.socket, secret: str, ctx: TaskContext) -> None:
    handler: Any = None
    while True:
        try:
            connection, address = server.accept()
        except OSError:  # the task has ended
            return
        handler = handler or _handler(secret, ctx)  # made when a task asks: most never do
        with connection, contextlib.suppress(OSError):
            connection.settimeout(30)
            handler(connection, address, None)


def _handler(secret: str, ctx: TaskContext) -> Any:
    from http.server import BaseHTTPRequestHandler

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(*_answer(ctx, self._path(), None))

        def do_POST(self) -> None:
            self._answer(*_answer(ctx, self._path(), self.rfile.read(int(self.headers["Content-Length"] or 0))))

        def _path(self) -> list[str]:
            first, *rest = self.path.lstrip("/").split("/")
            return [urllib.parse.unquote_plus(part) for part in rest] if first == secret else []

        def _answer(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: what is printed here would be the task's output."""

    return Handler


def _answer(ctx: TaskContext, path: list[str], body: bytes | None) -> tuple[int, Any]:
    try:
        return _flag_request(ctx, path, body)
    except (ValueError, TypeError, AttributeError) as error:
        return 422, {"detail": f"This is no flag: {error}"}
    except FieldlabError as error:
        return 400, str(error)


def _flag_request(ctx: TaskContext, path: list[str], body: bytes | None) -> tuple[int, Any]:
    """Answer a request of netunicorn's gateway about a flag; ``body`` is None for GET."""
    match path:
        case ["api", "v1", "experiment", _, "flag", name] if body is None:
            value = read_flag(ctx.events, name)
            return (404, None) if value is None else (200, value)
        case ["api", "v1", "experiment", _, "flag", name]:
            values = json.loads(body or b"{}")
            if values.get("text_value") is None and values.get("int_value") is None:
                return 400, "Either text_value or int_value must be set"
            ctx.events.send(FLAG + name, {key: values.get(key) for key in ("text_value", "int_value")})
            return 200, None
        case ["api", "v1", "experiment", _, "flag", name, "increment" | "decrement" as what] if body is not None:
            ctx.events.send(FLAG + name, {"add": 1 if what == "increment" else -1})
            return 200, None
    return 404, {"detail": "Not Found"}
