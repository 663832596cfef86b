"""The executor from ``fieldlab.pyz``: how soon it gives its first result, and what it holds in memory.

It runs against a stand-in for the director: the client's own ``Hub``, which answers executors in memory, behind a plain
HTTP server on a loopback port. So the requests are real, and what is measured is the executor, not a director that
works on the same processor.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import fieldlab as fl
import programs
from fieldlab.hub import Hub
from fieldlab.ship import pack, require_sound
from fieldlab_common import protocol as p
from fieldlab_common import wire
from fieldlab_common.lifecycle import DeploymentState as State
from measure import timed, version

WAIT = 60.0  # seconds that a measurement may take
PYTHON = str(Path(sys.executable).resolve())  # a node's: not the one of the development environment
_ROUTES = [
    (row.method, re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", row.path) + "$"), row.name)
    for row in p.ENDPOINTS.values()
    if p.Caller.EXECUTOR in row.callers
]


class Standin:
    """A director for one deployment of ``dag``, named ``node``.

    ``begun`` is when its executor was started, ``first`` when a step was first reported done.
    """

    def __init__(self, dag: fl.DAG, folder: Path) -> None:
        shipment = require_sound(pack(fl.Experiment("bench").map(dag, fl.Node(name="node", python=(version(),)))))
        self.begun = self.first = 0.0
        self.done = threading.Event()
        self._news = threading.Condition()
        self.hub = Hub(shipment.order(), folder / "hub", woken=self._woken)
        self.hub.move("node", State.PREPARING, State.READY, State.LAUNCHING)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, endpoint: str, path: dict[str, str], query: dict[str, str], body: bytes) -> Any:
        """Answer as the director would; a poll is held while there is nothing to say."""
        if endpoint == "poll":
            with self._news:
                after = int(query.get("after", 0))
                self._news.wait_for(lambda: self.hub.news("node", after), float(query.get("wait", 0)))
        answered = self.hub.answer("node", endpoint, path, query, body)
        if endpoint == "report" and not self.first and any(map(_ends_a_step, wire.unframe(body))):
            self.first = time.perf_counter()
            self.done.set()
        with self._news:
            self._news.notify_all()
        return answered

    def wait_for_event(self, name: str) -> None:
        """Wait until a step sent it."""
        deadline = time.monotonic() + WAIT
        with self._news:
            while not any(event.name == name for event in self.hub.events(0, 0).events):
                if not self._news.wait(max(0.0, deadline - time.monotonic())):
                    raise RuntimeError(f"no step sent {name!r} within {WAIT:g} s")

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def _woken(self) -> None:
        with self._news:
            self._news.notify_all()


def _ends_a_step(framed: tuple[int, bytes, int]) -> bool:
    record = json.loads(framed[1])
    return record["kind"] == "step" and record["body"]["state"] == "succeeded"


def _handler(standin: Standin) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def serve(self) -> None:
            where = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            for method, pattern, endpoint in _ROUTES:
                if method == self.command and (match := pattern.match(where.path)):
                    answered = standin.answer(endpoint, match.groupdict(), dict(parse_qsl(where.query)), body)
                    kind = "application/json" if answered.status < 300 else p.PROBLEM
                    head = f"HTTP/1.1 {answered.status} \r\nContent-Type: {kind}\r\n"
                    self.wfile.write(f"{head}Content-Length: {len(answered.body)}\r\n\r\n".encode() + answered.body)
                    return
            self.send_error(404)

        do_GET = do_POST = do_PUT = serve  # noqa: N815 - the names are the base class's

        def log_message(self, *arguments: object) -> None:
            return

    return Handler


@contextmanager
def executor(pyz: Path, folder: Path, cache: Path, dag: fl.DAG) -> Iterator[tuple[subprocess.Popen[bytes], Standin]]:
    """An executor for ``dag``, and its stand-in director, which notes the time just before; ended with SIGTERM."""
    place = folder / "executor"
    place.mkdir(parents=True)
    standin = Standin(dag, folder)
    launch = p.Launch(director=standin.url, token="t", experiment="bench", deployment="node", epoch=1)
    (place / "launch.json").write_bytes(wire.dumps(launch))
    with (folder / "executor.log").open("wb") as log:
        standin.begun = time.perf_counter()
        process = subprocess.Popen(
            [PYTHON, str(pyz), "run", str(place)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "FIELDLAB_CACHE": str(cache)},
            start_new_session=True,
        )
    try:
        yield process, standin
    finally:
        process.terminate()
        process.wait(WAIT)
        standin.close()


def first_result(pyz: Path, folder: Path, cache: Path) -> float:
    """Seconds from the start of the process until the director has its first step's result."""
    with executor(pyz, folder, cache, programs.one_step()) as (_, standin):
        if not standin.done.wait(WAIT):
            raise RuntimeError(f"no result within {WAIT:g} s; see {folder}/executor.log")
        return standin.first - standin.begun


def idle_memory(pyz: Path, folder: Path, cache: Path) -> dict[str, int]:
    """Bytes that an idle executor with one sleeping background step holds."""
    with executor(pyz, folder, cache, programs.asleep()) as (process, standin):
        standin.wait_for_event(programs.UP)
        time.sleep(programs.SETTLE)
        return programs.memory(process.pid)


def bare_python() -> float:
    """Seconds of a Python that imports what any program that speaks HTTP over TLS needs."""
    return timed(lambda: subprocess.run([PYTHON, "-c", "import ssl, http.client, dataclasses"], check=True))
