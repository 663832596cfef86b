"""A real director to measure, and what it takes: a process of its own, on a core of its own where there are two.

``serving`` starts one as anybody would, beside a program that plays its executors (``Played``) on its real protocol
over real HTTP. Requests are made ready before they are timed, and sent over plain sockets: what is measured is the
director, not a client that works on the same machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import fieldlab as fl
from fieldlab.infrastructure import InfrastructureSpec
from fieldlab_common import wire
from fieldlab_common.protocol import ClaimRequest, Launch, Record
from fieldlab_director.embedded import Embedded, embedded
from measure import version

CONNECTOR = Path(__file__).with_name("simulated")
WAIT = 60.0  # seconds that one answer may take
_TICKS = os.sysconf("SC_CLK_TCK")


# --- cores ------------------------------------------------------------------------------------------------------------


def cores() -> tuple[set[int], set[int]]:
    """One core for what is measured, and the others for what measures it; the same, where there is one."""
    have = sorted(os.sched_getaffinity(0))
    return {have[0]}, set(have[1:] or have)


@contextmanager
def on(chosen: set[int]) -> Iterator[None]:
    """Run here what is within, and all that it starts, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, chosen)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# --- the director -----------------------------------------------------------------------------------------------------


@contextmanager
def serving(folder: Path, *, nodes: int | None = None, pinned: bool = False) -> Iterator[Embedded]:
    """A director on ``folder``, with so many real nodes here; ``pinned``: on one core, and this program on the others.

    Its log goes where every director's goes, and its disk is the checkout's.
    """
    mine, others = cores()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a thousand executors have two connections each
    with _on_path(CONNECTOR):
        with on(mine if pinned else os.sched_getaffinity(0)):
            director = embedded(folder, nodes=nodes).start()
        try:
            with on(others if pinned else os.sched_getaffinity(0)):
                yield director
        finally:
            director.stop()


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(folder)
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def cpu(pid: int) -> float:
    """Seconds of processor time of a process so far, all of its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident(pid: int, name: str = "VmRSS") -> int:
    """Bytes that a process holds in memory; ``VmHWM``: held at most, since ``forget_peak``."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def forget_peak(pid: int) -> None:
    """Let the peak of a process's memory begin anew (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


# --- executors that are played ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Simulated(InfrastructureSpec):
    """Nodes whose executors this program plays: their launches come to ``socket``."""

    kind: ClassVar[str] = "simulated"
    nodes: int
    python: tuple[str, ...]
    socket: str


@contextmanager
def simulated(client: fl.Client, nodes: int) -> Iterator[Simulation]:
    """Attach so many nodes, and play what is launched on them."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        path = f"{folder}/launches"  # not below the checkout: the path of a socket has 107 characters at most
        inbox.bind(path)
        inbox.setblocking(False)
        client.infrastructures.attach("simulated", Simulated(nodes=nodes, python=(version(),), socket=path))
        yield Simulation([node for node in client.nodes() if node.infrastructure == "simulated"], inbox)


class Simulation:
    """The ``nodes`` that are played, and what is launched on them."""

    def __init__(self, nodes: list[fl.Node], inbox: socket.socket) -> None:
        self.nodes, self._inbox = nodes, inbox

    async def launch(self) -> Launch:
        """The next launch."""
        async with asyncio.timeout(WAIT):
            return wire.loads(Launch, await asyncio.get_running_loop().sock_recv(self._inbox, 65536))

    def forget(self) -> None:
        """Pass over what was launched so far."""
        with suppress(BlockingIOError):
            while self._inbox.recv(65536):
                pass


class Connection:
    """A connection to the director that asks one thing at a time."""

    def __init__(self, url: str, token: str) -> None:
        where = urlsplit(url)
        self._host, self._port = where.hostname, where.port
        self._head = f"Host: {where.netloc}\r\nAuthorization: Bearer {token}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request, to be sent as often as is wanted."""
        return f"{method} {path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def ask(self, request: bytes) -> bytes:
        """Send it; the body of its answer. A connection that was closed while it was idle is made anew.

        Raises:
            RuntimeError: it was refused.
        """
        used = self._streams is not None
        try:
            status, body = await self._exchange(request)
        except (asyncio.IncompleteReadError, ConnectionError):
            if not used:
                raise
            self.close()
            status, body = await self._exchange(request)
        if status not in ("200", "201", "202"):
            raise RuntimeError(f"the director answered {body.decode(errors='replace')}")
        return body

    async def _exchange(self, request: bytes) -> tuple[str, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        reader, writer = self._streams
        writer.write(request)
        async with asyncio.timeout(WAIT):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = int(head.partition("content-length:")[2].partition("\r\n")[0])
            return head.split(" ", 2)[1], await reader.readexactly(length)

    def close(self) -> None:
        """End it."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Played(Connection):
    """An executor as the director knows it: it claims, reports and polls."""

    def __init__(self, launch: Launch) -> None:
        super().__init__(launch.director, launch.token)
        self.launch, self.journal = launch, f"j-{launch.deployment}"
        self.numbers = {"control": 0, "bulk": 0}

    async def claim(self) -> Mapping[str, Any]:
        """Take the deployment."""
        asked = ClaimRequest(journal_id=self.journal, epoch=self.launch.epoch, python=version(), pid=1)
        return self._json(await self.ask(self.request("POST", "/v1/executor/claim", wire.dumps(asked))))

    def report(self, lane: str, *records: bytes) -> bytes:
        """The request that reports these records, under the numbers that are next."""
        first = self.numbers[lane] + 1
        self.numbers[lane] += len(records)
        framed = b"".join(wire.frame(number, record) for number, record in enumerate(records, first))
        return self.request("POST", f"/v1/executor/records?lane={lane}&journal={self.journal}", framed)

    async def say(self, lane: str, *records: bytes) -> None:
        """Report, and hold that all was acknowledged."""
        numbers = self._json(await self.ask(self.report(lane, *records)))
        if numbers["acked"] != self.numbers[lane] or numbers["refusals"]:
            raise RuntimeError(f"{self.numbers[lane]} records were reported, and the answer is {numbers}")

    async def poll(self, after: int = 0, wait: float = 0.0) -> Mapping[str, Any]:
        """Ask for news; also the sign of life."""
        path = f"/v1/executor/poll?journal={self.journal}&after={after}&wait={wait}"
        return self._json(await self.ask(self.request("GET", path)))

    @staticmethod
    def _json(body: bytes) -> Mapping[str, Any]:
        found: Mapping[str, Any] = json.loads(body)
        return found


def record(kind: str, at: float, body: object) -> bytes:
    """A record as an executor journals it."""
    return wire.dumps(Record(kind=kind, at=at, body=wire.encode(body)))
