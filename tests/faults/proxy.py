"""A line between two parties that does what lines do: it is cut, goes silent, loses the end of an answer, doubles.

``Line`` passes TCP from its own port to ``target``. ``plan`` says, for each connection in the order in which they are
made, what becomes of it; after ``bytes`` have passed (both ways together), so that a fault can hit any moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

DEADLINE = 20.0


class Kind(StrEnum):
    """What can happen to a connection."""

    NONE = "none"
    REFUSE = "refuse"  # it is closed as soon as it is made
    CUT = "cut"  # both ends get a reset
    TRUNCATE = "truncate"  # answers end too early, as if that were all
    STALL = "stall"  # nothing passes any more; it stays open until the line is closed
    DOUBLE = "double"  # all that is asked goes to the target twice; the second answers are dropped


@dataclass(frozen=True)
class Fault:
    """What happens to one connection, after so many bytes."""

    kind: Kind = Kind.NONE
    bytes: int = 0


Plan = Callable[[int], Fault]


def good(number: int) -> Fault:
    """A line without faults."""
    return Fault()


def seeded(seed: int, *kinds: Kind, most_bytes: int = 3000, good_every: int = 3) -> Plan:
    """Faults of these kinds at random places, the same ones for the same seed; one connection of so many is good."""

    def plan(number: int) -> Fault:
        chance = random.Random(f"{seed}:{number}")
        if number % good_every == good_every - 1:
            return Fault()
        return Fault(chance.choice(kinds), chance.randrange(most_bytes))

    return plan


@dataclass(eq=False)
class Line:
    """The line; ``target`` is a port of this machine, and may be set later. ``plan`` may change at any time."""

    target: int = 0
    plan: Plan = good
    port: int = 0
    connections: int = 0
    met: dict[Kind, int] = field(default_factory=dict)  # how many connections had which fault
    _down: bool = False

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(DEADLINE)

    @property
    def url(self) -> str:
        """Where the target is reached through this line."""
        return f"http://127.0.0.1:{self.port}"

    def down(self) -> None:
        """Cut everything, and let nothing through until it is ``up`` again."""
        self._call(lambda: self._set(down=True))

    def up(self) -> None:
        """Let everything through again."""
        self._call(lambda: self._set(down=False))

    def cut(self) -> None:
        """Cut what is open now."""
        self._call(self._cut_all)

    def close(self) -> None:
        """End the line and all that is on it."""
        self._call(self._cut_all)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE)

    # --- on the loop -------------------------------------------------------------------------------------------------

    def _call(self, what: Callable[[], None]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (what(), done.set()))
        assert done.wait(DEADLINE)

    def _set(self, *, down: bool) -> None:
        self._down = down
        if down:
            self._cut_all()

    def _cut_all(self) -> None:
        for writer in list(self._open):
            _reset(writer)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", self.port))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self._tracked(writer), contextlib.suppress(OSError, asyncio.CancelledError):  # cancelled: it is closed
            if self._down:
                return
            fault = self.plan(self.connections)
            self.connections += 1
            self.met[fault.kind] = self.met.get(fault.kind, 0) + 1
            if fault.kind is Kind.REFUSE:
                return
            await self._pass(reader, writer, fault)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault) -> None:
        there, to_there = await asyncio.open_connection("127.0.0.1", self.target)
        with self._tracked(to_there), contextlib.ExitStack() as stack:
            ways = [to_there]
            if fault.kind is Kind.DOUBLE:
                again, to_again = await asyncio.open_connection("127.0.0.1", self.target)
                stack.enter_context(self._tracked(to_again))
                ways.append(to_again)
                dropping = asyncio.ensure_future(_drop(again))
                stack.callback(dropping.cancel)
            state = _State(fault, [writer, *ways])
            await asyncio.gather(_pump(reader, ways, state, up=True), _pump(there, [writer], state, up=False))

    @contextlib.contextmanager
    def _tracked(self, writer: asyncio.StreamWriter) -> Iterator[None]:
        self._open.add(writer)
        try:
            yield
        finally:
            self._open.discard(writer)
            writer.close()


@dataclass(eq=False)
class Tunnel(Line):
    """An HTTP proxy that tunnels (CONNECT, RFC 9110, section 9.3.6), wherever that is to go, to ``target``."""

    asked: list[str] = field(default_factory=list)  # the request lines

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head.partition("\r\n")[0])
        if not head.startswith("CONNECT "):
            writer.write(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n")
            return
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await super()._pass(reader, writer, fault)


@dataclass(eq=False)
class _State:
    """One connection: its fault, its ends, and how much has passed."""

    fault: Fault
    ends: list[asyncio.StreamWriter]
    passed: int = 0


async def _pump(reader: asyncio.StreamReader, ways: list[asyncio.StreamWriter], state: _State, *, up: bool) -> None:
    kind = state.fault.kind
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            left = state.fault.bytes - state.passed
            hit = kind in (Kind.CUT, Kind.STALL) or (kind is Kind.TRUNCATE and not up)
            if hit and len(data) > left:
                _write(ways, data[: max(0, left)])
                await _befall(state)
                return
            state.passed += len(data)
            _write(ways, data)
            for way in ways:
                await way.drain()
    for way in ways:
        with contextlib.suppress(OSError, RuntimeError):
            way.write_eof()


async def _befall(state: _State) -> None:
    if state.fault.kind is Kind.CUT:
        for end in state.ends:
            _reset(end)
    elif state.fault.kind is Kind.TRUNCATE:
        for end in state.ends:
            end.close()
    else:
        await asyncio.Event().wait()


async def _drop(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(65536):
            pass


def _write(ways: list[asyncio.StreamWriter], data: bytes) -> None:
    for way in ways:
        way.write(data)


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
