"""A director for one program: a real one, in a process of its own on a loopback port, that ends with the program.

The process is the ``fieldlab-director serve`` that anybody runs, with two descriptors more. On one it says, once, where
it answers and with which token. The other is the lifeline: it ends when the program ends, in whatever way, and the
director with it. Nothing heavy is imported here, so the program stays as light as it was.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from fieldlab_common.errors import BY_CODE, ConfigurationError, DirectorError, IllegalState

__all__ = ["Embedded", "embedded"]

START_SECONDS = 60.0
STOP_SECONDS = 60.0  # an ephemeral director first ends its runs
ATTACH_SECONDS = 90.0
Nodes = int | Sequence[str | Mapping[str, Any]]


def embedded(
    folder: str | os.PathLike[str] | None = None,
    *,
    port: int = 0,
    nodes: Nodes | None = None,
    advertise: str | None = None,
) -> Embedded:
    """A director that runs for as long as the ``with`` block does (or from ``start()`` to ``stop()``).

    ``folder`` keeps its data; a second director on the same folder goes on where the first was, with the same token.
    None: a temporary folder, which is removed, and every run that has not ended by then is cancelled. ``port`` 0: a
    free one. ``nodes`` attaches an infrastructure ``local`` of so many nodes on this machine, or of nodes with these
    names and properties: ``[{"name": "a", "site": "x"}, "b"]``. ``advertise`` is where executors reach it, when that is
    not where it listens.

        with embedded(nodes=2) as director:
            client = fl.Client(director.url, token=director.token)
    """
    return Embedded(folder, port=port, nodes=nodes, advertise=advertise)


class Embedded:
    """What ``embedded`` gives: where the director is, and the means to stop, kill and restart it."""

    def __init__(
        self, folder: str | os.PathLike[str] | None, *, port: int, nodes: Nodes | None, advertise: str | None = None
    ) -> None:
        self._ephemeral = folder is None
        self._wanted = Path(folder).absolute() if folder is not None else None
        self._port = port
        self._nodes = nodes
        self._advertise = advertise
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._folder: Path | None = None
        self._url = self._token = ""

    @property
    def url(self) -> str:
        """Where it answers, like ``http://127.0.0.1:40123``. It stays the same over restarts."""
        return self._url

    @property
    def token(self) -> str:
        """The token of its first user, an admin."""
        return self._token

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._running().pid

    @property
    def folder(self) -> Path:
        """Where its data is."""
        if self._folder is None:
            raise ConfigurationError("The director was not started.", advice="Use it in a `with` block.")
        return self._folder

    def __enter__(self) -> Embedded:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> Embedded:
        """Start it, and return once it answers.

        Raises:
            ConfigurationError: it did not start; the message has what it said. DirectorError: the nodes were refused.
        """
        if self._process is not None:
            raise ConfigurationError("The director runs already.")
        self._folder = self._folder or self._wanted or Path(tempfile.mkdtemp(prefix="fieldlab-director-"))
        self._spawn()
        try:
            self._attach()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop it gently, by force if it does not; nothing if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        if not self._ephemeral:
            process.send_signal(signal.SIGTERM)
        os.close(self._lifeline)  # an ephemeral director ends its runs when this ends
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._ephemeral and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def kill(self) -> None:
        """End it as a crash would (SIGKILL). Its data stays, and ``restart`` goes on from there."""
        process = self._running()
        process.kill()
        process.wait()
        os.close(self._lifeline)
        self._process = None

    def restart(self) -> Embedded:
        """Start it again on the same folder and port; it is killed first if it runs."""
        if self._process is not None:
            self.kill()
        return self.start()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ConfigurationError("The director does not run.", advice="Use it in a `with` block, or restart() it.")
        return self._process

    def _spawn(self) -> None:
        ready, told = os.pipe()
        line, self._lifeline = os.pipe()
        command = [sys.executable, "-m", "fieldlab_director", "serve", "--data", str(self.folder), "--bootstrap", "me"]
        command += ["--port", str(self._port), "--ready-fd", str(told), "--lifeline-fd", str(line)]
        if self._advertise is not None:
            command += ["--advertise", self._advertise]
        if self._ephemeral:
            command.append("--ephemeral")
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "start.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(told, line), start_new_session=True
            )
        os.close(told)
        os.close(line)
        try:
            self._hear(ready)
        except BaseException:
            self.kill()
            raise
        finally:
            os.close(ready)

    def _hear(self, ready: int) -> None:
        """Wait until the director says where it is, or ends, or is late."""
        deadline = time.monotonic() + START_SECONDS
        said = b""
        while not said.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([ready], [], [], left)[0]:
                raise ConfigurationError(f"The director did not start within {START_SECONDS:.0f} s.{self._said()}")
            chunk = os.read(ready, 4096)
            if not chunk:
                raise ConfigurationError(f"The director did not start.{self._said()}")
            said += chunk
        where = json.loads(said)
        self._url, self._token = where["url"], where["token"]
        self._port = urlsplit(self._url).port or self._port

    def _said(self) -> str:
        with contextlib.suppress(OSError):
            text = (self.folder / "start.log").read_text(errors="replace").strip()
            return f" It said:\n{text[-2000:]}" if text else ""
        return ""

    def _attach(self) -> None:
        if self._nodes is None:
            return
        body = {"name": "local", "spec": {"kind": "local", "body": {"nodes": _node_options(self._nodes)}}}
        # Refused as taken: an earlier director on this folder has it.
        with contextlib.suppress(IllegalState):
            self._post("/v1/infrastructures", body)

    def _post(self, path: str, body: Mapping[str, Any]) -> None:
        where = urlsplit(self._url)
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=ATTACH_SECONDS)
        try:
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body).encode(), headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            problem = json.loads(content)
            error = BY_CODE.get(problem["code"], DirectorError)
            raise error(problem["detail"], advice=problem["advice"])


def _node_options(nodes: Nodes) -> int | list[dict[str, Any]]:
    if isinstance(nodes, int):
        return nodes
    options: list[dict[str, Any]] = []
    for node in nodes:
        properties = {} if isinstance(node, str) else dict(node)
        name = node if isinstance(node, str) else properties.pop("name", None)
        if not isinstance(name, str):
            raise ConfigurationError(f"A node of an embedded director lacks a name: {node!r}.")
        options.append({"name": name, "properties": properties})
    return options
