"""A connector in a process of its own: the side that runs it, and the side that asks.

    python -m fieldlab_director.connectors.host KIND

The asking side writes frames to its standard input and reads frames from its standard output: a length (4 bytes) and
JSON. The first frame opens it with an ``Opening``; then come calls, in any number at a time; answers bear their
number and come as they are ready. A connector is somebody's code, so nothing of it is trusted to be well-behaved:

- it cannot see the store, nor the director's memory;
- a call that is over its deadline is cancelled inside; when even that is not answered, or a ping is not, the process is
  killed with all calls in it, and the next call starts a new one;
- what it prints goes to its standard error, whose last lines stand in the error when it dies;
- it ends at end-of-file, so it never outlives the director. What it started on nodes does.

Callers get an answer or a ``ConnectorError``, within their deadline, whatever happens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import signal
import struct
import sys
from collections import deque
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, cast

from fieldlab_common import wire
from fieldlab_common.errors import ConnectorError, FieldlabError, InvalidMessage

from fieldlab_director.connectors.base import DEADLINES, METHODS, Connector, Opening

__all__ = ["GROUP", "ConnectorProcess", "kinds", "main"]

GROUP = "fieldlab.connectors"
MAX_FRAME = 64 * 1024 * 1024
MARGIN = 3.0  # seconds that a call has, after its deadline, to say that it was cancelled
PING_EVERY = 10.0
PING_WITHIN = 20.0  # an event loop that is blocked for longer is not coming back
OPEN_WITHIN = 60.0
CLOSE_WITHIN = 3.0
_LENGTH = struct.Struct(">I")


def kinds() -> tuple[str, ...]:
    """The kinds of infrastructure for which a connector is installed."""
    return tuple(sorted(point.name for point in entry_points(group=GROUP)))


async def _read(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next frame; None at the end, or where there is no frame."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_FRAME:
            return None
        message = json.loads(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError, ValueError):
        return None
    return message if isinstance(message, dict) else None


def _frame(message: Mapping[str, Any]) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


# --- the side that asks ----------------------------------------------------------------------------------------------


class ConnectorProcess:
    """Asks the connector of one infrastructure, and restarts its process when it must.

    ``notice`` is called with a deployment's id when its executor may have ended, and with None when the process was
    lost: whoever relies on notices then looks at all.
    """

    def __init__(
        self,
        kind: str,
        opening: Opening,
        *,
        notice: Callable[[str | None], None],
        deadlines: Mapping[str, float] | None = None,
        ping_within: float = PING_WITHIN,
    ) -> None:
        self.kind = kind
        self.opening = opening
        self._notice = notice
        self._deadlines = {**DEADLINES, **(deadlines or {})}
        self._ping_within = ping_within
        self._starting = asyncio.Lock()
        self._live: _Live | None = None
        self._closed = False
        self._deaths = 0
        self._not_before = 0.0

    async def call(self, method: str, request: Any) -> Any:
        """Ask for ``method`` of ``METHODS``.

        Raises:
            ConnectorError: the connector says that it cannot, does not answer in time, or has died.
        """
        answer_type = METHODS[method][1]
        deadline = self._deadlines[method]
        live = await self._started()
        message = {"method": method, "body": wire.encode(request), "deadline": deadline}
        answer = await live.ask(message, deadline + MARGIN)
        try:
            decoded: Any = wire.decode(answer_type, answer)
        except InvalidMessage as error:
            raise self._error(f"answered {method} with something else ({error.message})", transient=False) from error
        self._deaths = 0
        return decoded

    async def observe_every(self) -> float:
        """Seconds between two looks, as the connector wants it."""
        return (await self._started()).observe_every

    async def close(self) -> None:
        """End the process: gently, then by force."""
        self._closed = True
        if self._live is not None:
            await self._live.close()

    async def _started(self) -> _Live:
        async with self._starting:
            if self._live is not None and self._live.ending:
                await self._live.ended()
            if self._closed:
                raise self._error("is closed")
            if self._live is None:
                wait = self._not_before - asyncio.get_running_loop().time()
                if wait > 0:
                    raise self._error(f"died {self._deaths} times in a row and is started again in {wait:.0f} s")
                self._live = await self._start()
            return self._live

    async def _start(self) -> _Live:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fieldlab_director.connectors.host", self.kind),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the director's terminal is the director's business
        )
        live = _Live(process, self._error, self._notice, self._lost, self._ping_within)
        opened = False
        try:
            body = await live.ask({"method": "open", "body": wire.encode(self.opening)}, OPEN_WITHIN)
            live.observe_every = float(body["observe_every"])
            opened = True
            return live
        finally:
            if not opened:
                live.kill("could not be opened")
                await live.close()

    def _lost(self, live: _Live) -> None:
        self._deaths += 1
        delay = 0.0 if self._deaths == 1 else min(30.0, 0.5 * 2.0 ** min(self._deaths - 2, 10))
        self._not_before = asyncio.get_running_loop().time() + delay
        if self._live is live:
            self._live = None
            if not self._closed:
                self._notice(None)

    def _error(self, what: str, *, transient: bool = True) -> ConnectorError:
        return ConnectorError(
            f"The connector of infrastructure {self.opening.infrastructure!r} ({self.kind}) {what}.",
            transient=transient,
        )


class _Live:
    """One process of a connector, while it lives."""

    observe_every = 2.0

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        error: Callable[..., ConnectorError],
        notice: Callable[[str | None], None],
        lost: Callable[[_Live], None],
        ping_within: float,
    ) -> None:
        assert process.stdin is not None  # PIPE was asked for, three times
        assert process.stdout is not None
        assert process.stderr is not None
        self._process, self._in = process, process.stdin
        self._error, self._notice, self._lost = error, notice, lost
        self._ping_within = ping_within
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._last = 0
        self._said: deque[str] = deque(maxlen=20)
        self._why = ""
        self._listening = asyncio.create_task(self._listen(process.stderr))
        self._receiving = asyncio.create_task(self._receive(process.stdout))
        self._pinging = asyncio.create_task(self._ping())

    @property
    def ending(self) -> bool:
        """Whether it was killed, and cannot be asked any more."""
        return bool(self._why)

    async def ended(self) -> None:
        """Wait for the end of a process that was killed."""
        await asyncio.wait([self._receiving], timeout=CLOSE_WITHIN)

    async def ask(self, message: Mapping[str, Any], within: float) -> Any:
        """The body of the answer to ``message``."""
        if self._why:
            raise self._error(self._why)
        self._last += 1
        number = self._last
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        try:
            self._send({**message, "id": number})
            async with asyncio.timeout(within):  # not wait_for: on Python 3.11 it can swallow a cancel
                return await future
        except TimeoutError:
            self.kill(f"did not answer {message['method']} within {within:.0f} s and was ended")
            raise self._error(self._why) from None
        except asyncio.CancelledError:
            self._send({"cancel": number})
            raise
        finally:
            self._calls.pop(number, None)

    def kill(self, why: str) -> None:
        """End the process by force; every call that waits gets an error."""
        self._why = self._why or why
        self._kill()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(self._error(self._why))

    def _kill(self) -> None:
        # Not Process.kill: that polls first, and takes the exit code away from the event loop's own wait.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        """Let it end by itself at end-of-file; by force if it does not."""
        self._why = self._why or "is closed"
        self._in.close()
        try:
            async with asyncio.timeout(CLOSE_WITHIN):
                await self._process.wait()
        except TimeoutError:
            self.kill("is closed")
            await self._process.wait()
        await asyncio.gather(self._receiving, self._listening, self._pinging, return_exceptions=True)

    def _send(self, message: Mapping[str, Any]) -> None:
        if not self._in.is_closing():
            self._in.write(_frame(message))

    async def _receive(self, stdout: asyncio.StreamReader) -> None:
        while (message := await _read(stdout)) is not None:
            if "notice" in message:
                self._notice(str(message["notice"]))
                continue
            future = self._calls.get(message.get("id", 0))
            if future is None or future.done():
                continue
            if "error" in message:
                future.set_exception(_as_error(message["error"]))
            else:
                future.set_result(message.get("body"))
        await self._ended()

    async def _ended(self) -> None:
        self._kill()  # if it lives, it closed its output or sent what is no frame: it can answer nothing more
        code = await self._process.wait()
        await asyncio.wait([self._listening], timeout=1.0)
        said = "".join(f"\n  {line}" for line in self._said)
        self.kill(f"has died (exit {code}){'; it last said:' + said if said else ''}")
        self._pinging.cancel()
        self._in.close()
        self._lost(self)

    async def _listen(self, stderr: asyncio.StreamReader) -> None:
        while chunk := await stderr.read(65536):
            self._said.extend(line[:500] for line in chunk.decode(errors="replace").splitlines())

    async def _ping(self) -> None:
        while not self._why:
            await asyncio.sleep(min(PING_EVERY, self._ping_within))
            if self._calls:
                with contextlib.suppress(ConnectorError):
                    await self.ask({"method": "ping"}, self._ping_within)


def _as_error(data: Any) -> ConnectorError:
    fields = data if isinstance(data, Mapping) else {}
    return ConnectorError(
        str(fields.get("message", "The connector failed.")),
        advice=str(fields.get("advice", "")),
        transient=bool(fields.get("transient", True)),
        log=str(fields.get("log", "")),
    )


# --- the side that runs it -------------------------------------------------------------------------------------------


class _Server:
    def __init__(self, kind: str, reader: asyncio.StreamReader, write: Callable[[Mapping[str, Any]], None]) -> None:
        self._kind = kind
        self._reader = reader
        self._write = write
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._connector: Connector | None = None

    async def serve(self) -> None:
        while (message := await _read(self._reader)) is not None:
            if "cancel" in message:
                if task := self._tasks.get(message["cancel"]):
                    task.cancel()
                continue
            number = message["id"]
            task = asyncio.create_task(self._answer(number, message))
            self._tasks[number] = task
            task.add_done_callback(functools.partial(self._done, number))
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._connector is not None:
            await self._connector.close()

    def _done(self, number: int, task: asyncio.Task[None]) -> None:
        del self._tasks[number]

    async def _answer(self, number: int, message: Mapping[str, Any]) -> None:
        method = message["method"]
        try:
            async with asyncio.timeout(message.get("deadline")):
                answer: dict[str, Any] = {"body": await self._run(method, message.get("body", {}))}
        except TimeoutError:
            text = f"{self._kind}: {method} took longer than its {message.get('deadline')} s."
            answer = {"error": {"message": text, "transient": True}}
        except ConnectorError as error:
            said = {"message": error.message, "advice": error.advice, "transient": error.transient, "log": error.log}
            answer = {"error": said}
        except FieldlabError as error:
            answer = {"error": {"message": str(error), "transient": False}}
        except Exception as error:  # noqa: BLE001 - a connector is somebody's code: what it raises is an answer too
            text = f"{self._kind}: {method} failed: {type(error).__name__}: {error}"
            answer = {"error": {"message": text, "transient": True}}
        self._write({"id": number, **answer})

    async def _run(self, method: str, body: Any) -> Any:
        if method == "ping":
            return {}
        if method == "open":
            return self._open(wire.decode(Opening, body))
        if self._connector is None:
            raise ConnectorError("The connector was not opened.", transient=False)
        request_type: type[Any] = METHODS[method][0]
        return wire.encode(await getattr(self._connector, method)(wire.decode(request_type, body)))

    def _open(self, opening: Opening) -> dict[str, Any]:
        found = entry_points(group=GROUP, name=self._kind)
        if not found:
            raise ConnectorError(f"There is no connector {self._kind!r}.", transient=False)
        make = cast("Callable[[Opening, Callable[[str], None]], Connector]", next(iter(found)).load())
        self._connector = make(opening, lambda deployment: self._write({"notice": deployment}))
        return {"observe_every": self._connector.observe_every}


async def _serve(kind: str) -> None:
    # Standard output belongs to the frames: whatever the connector prints goes where people read.
    frames = os.dup(1)
    os.dup2(2, 1)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(frames, "wb", buffering=0))
    await _Server(kind, reader, lambda message: transport.write(_frame(message))).serve()


def main() -> None:
    """Run the connector that the command line names, until standard input ends."""
    parser = argparse.ArgumentParser(description="Run a connector; it is spoken to in frames on stdin and stdout.")
    parser.add_argument("kind")
    asyncio.run(_serve(parser.parse_args().kind))


if __name__ == "__main__":
    main()
