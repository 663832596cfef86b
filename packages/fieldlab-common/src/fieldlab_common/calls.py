"""The side that answers calls of ``keeping.METHODS``: a connector in a process of its own, and a keeper on a node.

Bytes come in from ``read`` and go out through ``write``, which are somebody else's: here is no input or output. The
first call is ``open``; then come calls, in any number at a time. Answers bear their call's number, and come as they are
ready. A call that takes longer than its deadline, or that is taken back, is cancelled. It ends at the end of ``read``.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fieldlab_common import wire
from fieldlab_common.errors import ConnectorError, FieldlabError, InvalidMessage
from fieldlab_common.keeping import METHODS, Frames, frame, problem_of

__all__ = ["Answerer"]

Notice = Callable[[str], None]


class Answerer:
    """Answers with the methods of what ``make`` makes of the opening's JSON.

    ``name`` stands in the errors of calls that fail. What was made has an ``observe_every``, and is closed at the end.
    """

    def __init__(self, name: str, make: Callable[[Any, Notice], Any], write: Callable[[bytes], None]) -> None:
        self._name = name
        self._make = make
        self._write = write
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._made: Any = None

    async def serve(self, read: Callable[[], Awaitable[bytes]]) -> None:
        """Answer until ``read`` gives nothing, or what is no frame."""
        frames = Frames()
        try:
            while data := await read():
                for message in frames.feed(data):
                    self._take(message)
        except (InvalidMessage, ConnectionError):
            pass  # whoever asks has gone, or speaks something else: either way there is nobody to tell
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._made is not None:
            await self._made.close()

    def _take(self, message: Mapping[str, Any]) -> None:
        if "cancel" in message:
            if running := self._tasks.get(message["cancel"]):
                running.cancel()
            return
        number = message["id"]
        task = self._tasks[number] = asyncio.create_task(self._answer(number, message))
        task.add_done_callback(functools.partial(self._done, number))

    def _done(self, number: int, task: asyncio.Task[None]) -> None:
        del self._tasks[number]

    async def _answer(self, number: int, message: Mapping[str, Any]) -> None:
        method = message["method"]
        try:
            async with asyncio.timeout(message.get("deadline")):
                answer: dict[str, Any] = {"body": await self._run(method, message.get("body", {}))}
        except TimeoutError:
            text = f"{self._name}: {method} took longer than its {message.get('deadline')} s."
            answer = {"error": {"message": text, "transient": True}}
        except FieldlabError as error:
            answer = {"error": problem_of(error)}
        except Exception as error:  # noqa: BLE001 - a connector is somebody's code: what it raises is an answer too
            text = f"{self._name}: {method} failed: {type(error).__name__}: {error}"
            answer = {"error": {"message": text, "transient": True}}
        self._write(frame({"id": number, **answer}))

    async def _run(self, method: str, body: Any) -> Any:
        if method == "ping":
            return {}
        if method == "open":
            self._made = self._make(body, self._notice)
            return {"observe_every": self._made.observe_every}
        if self._made is None:
            raise ConnectorError("It was not opened.", transient=False)
        if method not in METHODS:
            raise ConnectorError(f"There is no method {method!r}.", transient=False)
        return wire.encode(await getattr(self._made, method)(wire.decode(METHODS[method][0], body)))

    def _notice(self, deployment: str) -> None:
        self._write(frame({"notice": deployment}))
