"""The side that asks: a connector in its process, or a keeper on a node, over whatever carries bytes to it.

A ``Channel`` is one life of the other side: a process with its pipes, or a command over SSH. ``Remote`` asks over it,
and starts the next when it must. What answers is somebody's code on somebody's machine, so nothing of it is trusted to
be well-behaved:

- a call that is over its deadline is cancelled inside; when even that is not answered, or a ping is not, the channel is
  killed with all calls in it, and the next call starts a new one, less and less often when it dies at once;
- what it writes to its standard error is kept, and its last lines stand in the error when it dies.

Callers get an answer or a ``ConnectorError``, within their deadline, whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from fieldlab_common import wire
from fieldlab_common.errors import ConnectorError, InvalidMessage
from fieldlab_common.keeping import DEADLINES, METHODS, Frames, error_of, frame

__all__ = ["Channel", "ProcessChannel", "Remote"]

MARGIN = 3.0  # seconds that a call has, after its deadline, to say that it was cancelled
PING_EVERY = 10.0
PING_WITHIN = 20.0  # an event loop that is blocked for longer is not coming back
OPEN_WITHIN = 60.0
CLOSE_WITHIN = 3.0
_CHUNK = 65536


class Channel(Protocol):
    """One life of the other side."""

    async def read(self) -> bytes:
        """Some of what it answers; nothing at its end."""
        ...

    async def read_errors(self) -> bytes:
        """Some of what it says to people; nothing at its end."""
        ...

    def write(self, data: bytes) -> None:
        """Send to it."""
        ...

    def end_input(self) -> None:
        """Let it see the end of its input, at which it leaves by itself."""
        ...

    def kill(self) -> None:
        """End it by force."""
        ...

    async def wait(self) -> int | None:
        """Wait for its end; its exit code, if it has one."""
        ...


class ProcessChannel:
    """A ``Channel`` to a process on this machine."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None  # PIPE was asked for, three times
        assert process.stdout is not None
        assert process.stderr is not None
        self._process, self._in, self._out, self._err = process, process.stdin, process.stdout, process.stderr

    @classmethod
    async def start(cls, command: Sequence[str], env: Mapping[str, str] | None = None) -> ProcessChannel:
        """Start ``command``, in a session of its own: a Ctrl-C in the director's terminal is the director's business.

        Raises:
            OSError: it cannot be started.
        """
        pipe = asyncio.subprocess.PIPE
        return cls(
            await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, start_new_session=True
            )
        )

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    async def read(self) -> bytes:
        """See ``Channel``."""
        return await self._out.read(_CHUNK)

    async def read_errors(self) -> bytes:
        """See ``Channel``."""
        return await self._err.read(_CHUNK)

    def write(self, data: bytes) -> None:
        """See ``Channel``."""
        if not self._in.is_closing():
            self._in.write(data)

    def end_input(self) -> None:
        """See ``Channel``."""
        self._in.close()

    def kill(self) -> None:
        """See ``Channel``. Not Process.kill: that polls, and takes the exit code from the event loop's own wait."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def wait(self) -> int | None:
        """See ``Channel``."""
        return await self._process.wait()


class Remote:
    """Asks what ``start`` gives a channel to. ``name`` says what that is, at the beginning of its errors.

    ``opening`` is the body of the first call. ``notice`` is called with a deployment's id when its executor may have
    ended, and with None when the channel was lost: whoever relies on notices then looks at all.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[Channel]],
        opening: Any,
        *,
        notice: Callable[[str | None], None],
        deadlines: Mapping[str, float] | None = None,
        ping_within: float = PING_WITHIN,
    ) -> None:
        self._name = name
        self._start_channel = start
        self._opening = wire.encode(opening)
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
            ConnectorError: it says that it cannot, does not answer in time, or has died.
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
        """Seconds between two looks, as it wants them."""
        return (await self._started()).observe_every

    @property
    def channel(self) -> Channel | None:
        """The present channel, if there is one."""
        return self._live.channel if self._live is not None else None

    async def close(self) -> None:
        """End it: gently, then by force."""
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
        live = _Live(await self._start_channel(), self._error, self._notice, self._lost, self._ping_within)
        opened = False
        try:
            body = await live.ask({"method": "open", "body": self._opening}, OPEN_WITHIN)
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
        return ConnectorError(f"{self._name} {what}.", transient=transient)


class _Live:
    """One channel, while it lives."""

    observe_every = 2.0

    def __init__(
        self,
        channel: Channel,
        error: Callable[..., ConnectorError],
        notice: Callable[[str | None], None],
        lost: Callable[[_Live], None],
        ping_within: float,
    ) -> None:
        self.channel = channel
        self._error, self._notice, self._lost = error, notice, lost
        self._ping_within = ping_within
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._last = 0
        self._said: deque[str] = deque(maxlen=20)
        self._why = ""
        self._listening = asyncio.create_task(self._listen())
        self._receiving = asyncio.create_task(self._receive())
        self._pinging = asyncio.create_task(self._ping())

    @property
    def ending(self) -> bool:
        """Whether it was killed, and cannot be asked any more."""
        return bool(self._why)

    async def ended(self) -> None:
        """Wait for the end of what was killed."""
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
            self.channel.write(frame({**message, "id": number}))
            async with asyncio.timeout(within):  # not wait_for: on Python 3.11 it can swallow a cancel
                return await future
        except TimeoutError:
            self.kill(f"did not answer {message['method']} within {within:.0f} s and was ended")
            raise self._error(self._why) from None
        except asyncio.CancelledError:
            self.channel.write(frame({"cancel": number}))
            raise
        finally:
            self._calls.pop(number, None)

    def kill(self, why: str) -> None:
        """End it by force; every call that waits gets an error."""
        self._why = self._why or why
        self.channel.kill()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(self._error(self._why))

    async def close(self) -> None:
        """Let it end by itself at the end of its input; by force if it does not."""
        self._why = self._why or "is closed"
        self.channel.end_input()
        try:
            async with asyncio.timeout(CLOSE_WITHIN):
                await self.channel.wait()
        except TimeoutError:
            self.kill("is closed")
            await self.channel.wait()
        await asyncio.gather(self._receiving, self._listening, self._pinging, return_exceptions=True)

    async def _receive(self) -> None:
        frames = Frames()
        with contextlib.suppress(ConnectionError, InvalidMessage):
            while data := await self.channel.read():
                for message in frames.feed(data):
                    self._hear(message)
        await self._ended()

    def _hear(self, message: Mapping[str, Any]) -> None:
        if "notice" in message:
            self._notice(str(message["notice"]))
            return
        future = self._calls.get(message.get("id", 0))
        if future is None or future.done():
            return
        if "error" in message:
            future.set_exception(error_of(message["error"]))
        else:
            future.set_result(message.get("body"))

    async def _ended(self) -> None:
        self.channel.kill()  # if it lives, it closed its output or sent what is no frame: it can answer nothing more
        code = await self.channel.wait()
        await asyncio.wait([self._listening], timeout=1.0)
        said = "".join(f"\n  {line}" for line in self._said)
        self.kill(f"has died (exit {code}){'; it last said:' + said if said else ''}")
        self._pinging.cancel()
        self.channel.end_input()
        self._lost(self)

    async def _listen(self) -> None:
        while chunk := await self.channel.read_errors():
            self._said.extend(line[:500] for line in chunk.decode(errors="replace").splitlines())

    async def _ping(self) -> None:
        while not self._why:
            await asyncio.sleep(min(PING_EVERY, self._ping_within))
            if self._calls:
                with contextlib.suppress(ConnectorError):
                    await self.ask({"method": "ping"}, self._ping_within)
